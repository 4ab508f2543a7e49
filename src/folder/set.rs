//! The live set: every image of one folder, served or left out, and the way to open one.
//!
//! **L4** A number stands in the ledger before any answer names it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak, mpsc};

use inotify::Inotify;

use super::bell::Watcher;
use super::changes::Announce;
use super::claims::{self, Incumbent, Verdict};
use super::deltas::Deltas;
use super::entry::{Entry, OpenImage};
use super::mounted::Silent;
use super::names::Names;
use super::place::{self, ImagesFolder};
use super::scan::{self, Claim, Look, Seen, Stamp};
use super::shared::{FOLDER, Shared};
use super::snapshots::KnownSnapshots;
use super::wanted::Wanted;
use super::{Wrap, locked, read, write};
use crate::error::{Error, Kind, Result};
use crate::image::kind::{SHOWN_SUFFIX, in_text};
use crate::image::layers::Opener;
use crate::io::file::HostSpace;
use crate::io::heirs::Heirs;
use crate::io::lock::Use;
use crate::ledger::Ledger;
use crate::rules::{Rule, broken};
use crate::vdisk::Engine;

/// How a folder is served.
#[derive(Clone, Default)]
pub struct FolderOptions {
    /// Nothing is written: images are opened read-only.
    pub read_only: bool,
    /// The mount point, named to a mount that finds the folder locked.
    pub note: String,
    /// Descriptors may name deltas outside of the images folder.
    pub allow_outside: bool,
    /// Files are read and written past the host's page cache, where it can.
    pub direct: bool,
    /// Where what a successor needs is kept; with what a daemon before has left, its work is gone on with.
    pub ledger: Option<Arc<Ledger>>,
    /// Open files that come from one, and are kept for another.
    pub heirs: Arc<Heirs>,
    /// The images that a daemon before had in use, by number.
    pub left_open: HashSet<u64>,
    /// Put around every image's file (`mount --fault`).
    #[cfg(feature = "faults")]
    pub wrap: Option<Wrap>,
}

impl FolderOptions {
    #[cfg(feature = "faults")]
    fn wrap(&self) -> Option<Wrap> {
        self.wrap.clone()
    }

    #[cfg(not(feature = "faults"))]
    fn wrap(&self) -> Option<Wrap> {
        None
    }
}

/// An images folder that is being served.
pub struct Folder {
    pub(super) own: Weak<Folder>,
    pub(super) shared: Arc<Shared>,
    next_id: AtomicU64,
    /// Protects "one look at the folder at a time" and what was seen at the last. Before `set`.
    pub(super) known: Mutex<HashMap<OsString, Seen>>,
    /// Protects the set. Before an entry's own locks. Threads of the transports take it: nothing blocks under it, and the
    /// host is not asked.
    set: RwLock<Set>,
    /// Protects the names that have no image yet. A leaf.
    pub(super) names: Mutex<Names>,
    /// Who holds images that could not be opened.
    pub(super) wanted: Arc<Wanted>,
    /// Protects the images that a daemon before had in use and that are held until they are open again. A leaf.
    pub(super) left: Mutex<Vec<Arc<Entry>>>,
    /// Protects the names of files that were created and are not closed yet. A leaf.
    writing: Mutex<HashSet<OsString>>,
    /// Protects the watch that has no thread yet. A leaf.
    pub(super) watch: Mutex<Option<Inotify>>,
    /// Protects the watching thread's handle. A leaf.
    pub(super) watcher: Mutex<Option<Watcher>>,
    /// Hears what changes; see `changes`.
    pub(super) announce: OnceLock<Arc<dyn Announce>>,
}

#[derive(Default)]
struct Set {
    by_name: BTreeMap<OsString, Arc<Entry>>,
    /// In the order in which they came.
    by_id: BTreeMap<u64, Arc<Entry>>,
    left_out: BTreeMap<OsString, (Claim, String)>,
}

/// What to do with a file that was not seen before, or is no image and has changed (`known`).
pub(super) type Accept<'a> = &'a mut dyn FnMut(&OsStr, &Stamp, bool) -> bool;

impl Folder {
    /// Opens and locks the folder, and takes in what lies in it.
    pub fn open(path: &Path, engine: &Arc<Engine>, options: FolderOptions) -> Result<Arc<Folder>> {
        Folder::open_at(place::open(path)?, path, engine, options)
    }

    /// The same of a folder that is open; `path` is its name.
    pub fn open_at(
        dir: OwnedFd,
        path: &Path,
        engine: &Arc<Engine>,
        options: FolderOptions,
    ) -> Result<Arc<Folder>> {
        let place = ImagesFolder::of(dir, path, &options.note, &options.heirs)?;
        let on = engine.clone();
        let shared = Arc::new(Shared {
            place,
            engine: engine.clone(),
            spawn: Arc::new(move |job| on.blocking(FOLDER, job)),
            deltas: Arc::new(Deltas::new(
                options.read_only,
                options.direct,
                options.wrap(),
                options.heirs.clone(),
            )),
            read_only: options.read_only,
            allow_outside: options.allow_outside,
            refusing: AtomicBool::new(false),
            passthrough: AtomicBool::new(false),
            passthrough_said: Arc::default(),
            snapshots: KnownSnapshots::default(),
            ledger: options.ledger,
            silent: Silent::default(),
        });
        let first = shared.ledger.as_ref().map_or(1, |ledger| ledger.found().next_id);
        let folder = Arc::new_cyclic(|own| Folder {
            own: own.clone(),
            shared,
            next_id: AtomicU64::new(first),
            known: Mutex::default(),
            set: RwLock::default(),
            names: Mutex::default(),
            wanted: Arc::default(),
            left: Mutex::default(),
            writing: Mutex::default(),
            watch: Mutex::default(),
            watcher: Mutex::default(),
            announce: OnceLock::new(),
        });
        folder.look_with(&mut |_, _, _| true, Some(&options.left_open))?;
        Ok(folder)
    }

    /// Takes in at once what is new in the folder, but for files that are still being written: what was closed before this
    /// call is not.
    pub fn rescan_now(&self) -> Result<()> {
        let bell = locked(&self.watcher).as_ref().map(|watcher| watcher.bell().clone());
        if let Some(bell) = bell {
            bell.catch_up();
        }
        let writing = locked(&self.writing).clone();
        self.look(&mut |file, _, _| !writing.contains(file)).map(drop)
    }

    /// The same after the file `file` was made there, which is complete: it has got its name when it was, and nothing has
    /// closed it under that name yet.
    pub fn take_in(&self, file: &OsStr) -> Result<()> {
        self.note_writing(file, false);
        self.rescan_now()
    }

    /// True when an image comes, or would come, from this file: its going changes what is served.
    pub(super) fn is_claim(&self, file: &OsStr) -> bool {
        locked(&self.known).get(file).is_some_and(|seen| seen.claim.is_some())
    }

    /// Reads the folder, decides, and changes the set. False: for some files the host had no answer at the moment. What was
    /// known of them goes on to hold; look again later.
    pub(super) fn look(&self, accept: Accept<'_>) -> Result<bool> {
        self.look_with(accept, None)
    }

    /// The same; at the first look with what a daemon before had in use.
    fn look_with(&self, accept: Accept<'_>, left_open: Option<&HashSet<u64>>) -> Result<bool> {
        let mut known = locked(&self.known);
        let held: HashSet<_> =
            read(&self.set).by_id.values().filter(|e| e.is_held()).map(|e| e.identity()).collect();
        let images = known.values().filter(|seen| seen.claim.is_some());
        let moved: HashSet<_> =
            images.map(|seen| seen.stamp.identity).filter(|identity| !held.contains(identity)).collect();
        let mut judge = |file: &OsStr, stamp: &Stamp| {
            let old = known.get(file).filter(|old| old.stamp.identity == stamp.identity);
            match old {
                // An open image changes all the time, and only its own descriptor should touch it.
                Some(old) if !old.unsure && old.stamp == *stamp || held.contains(&stamp.identity) => {
                    Look::Same(Box::new(old.clone()))
                }
                Some(old) if old.claim.is_none() && !accept(file, stamp, true) => {
                    Look::Same(Box::new(old.clone()))
                }
                Some(_) => Look::Inspect,
                // Another name of what was an image already: it is not being written just now.
                None if moved.contains(&stamp.identity) => Look::Inspect,
                None if accept(file, stamp, false) => Look::Inspect,
                None => Look::Skip,
            }
        };
        let before = |file: &OsStr| known.get(file).cloned();
        let shared = &self.shared;
        let seen = scan::read(shared.place.fd(), shared.allow_outside, &mut judge, &before, &shared.silent)
            .map_err(|e| Error::io(&e, self.path(), "cannot read the images folder"))?;
        let mut claims: Vec<Claim> = seen.iter().filter_map(|s| s.claim.clone()).collect();
        claims::leave_out_levels(&mut claims);
        let sure = !seen.iter().any(|s| s.unsure);
        *known = seen.into_iter().map(|s| (s.file.clone(), s)).collect();
        if let Some(left_open) = left_open {
            self.take_left(&claims, left_open);
        }
        let verdict = self.settle(claims);
        // Outside of the set's lock: both ask the host.
        let watched = locked(&self.watcher).is_some();
        // A takeover changes nothing before it is done: the next look does.
        if watched || !self.shared.ledger.as_ref().is_some_and(|ledger| ledger.takes_over()) {
            verdict.leftovers.iter().for_each(|leftover| self.remove_leftover(leftover));
        }
        let new = self.apply(verdict);
        if watched {
            new.iter().for_each(|entry| entry.finish_interrupted());
        }
        Ok(sure)
    }

    /// Decides, and makes sure that what is dropped is not opened meanwhile: an entry that is held after all
    /// stays, and then the decision is made anew.
    fn settle(&self, claims: Vec<Claim>) -> Verdict {
        let entries: BTreeMap<u64, Arc<Entry>> = read(&self.set).by_id.clone();
        let mut incumbents: Vec<Incumbent> = entries
            .values()
            .map(|e| Incumbent {
                id: e.id(),
                name: e.name().to_owned(),
                file: e.file(),
                identity: e.identity(),
                open: e.is_held(),
            })
            .collect();
        // Each round marks at least one more as open, so this ends.
        loop {
            let verdict = claims::decide(claims.clone(), &incumbents);
            let stays = |id: &u64| entries.get(id).is_some_and(|e| !e.retire());
            let held: HashSet<u64> = verdict.dropped.iter().copied().filter(stays).collect();
            if held.is_empty() {
                return verdict;
            }
            incumbents.iter_mut().filter(|i| held.contains(&i.id)).for_each(|i| i.open = true);
        }
    }

    /// Changes the set; the entries that are new.
    fn apply(&self, verdict: Verdict) -> Vec<Arc<Entry>> {
        let (mut set, mut new) = (write(&self.set), Vec::new());
        for (id, claim) in &verdict.kept {
            if let Some(entry) = set.by_id.get(id)
                && entry.seen(Some(claim))
            {
                self.with_announce(|announce| announce.disk(*id));
            }
        }
        for id in &verdict.vanished {
            if let Some(entry) = set.by_id.get(id) {
                entry.seen(None);
            }
        }
        for (id, claim) in &verdict.renamed {
            if let Some(entry) = set.by_id.get(id) {
                entry.follow(claim);
            }
        }
        for id in &verdict.dropped {
            if let Some(entry) = set.by_id.remove(id) {
                set.by_name.remove(entry.name());
                if let Some(ledger) = &self.shared.ledger {
                    ledger.no_number(*id);
                }
                // Announced before the lock is released: a lookup meanwhile waits for it, and finds the name gone.
                self.with_announce(|announce| announce.name(entry.name()));
                log::info!("{}: no longer served", entry.path().display());
            }
        }
        for claim in &verdict.new {
            let kept = locked(&self.names).take(&claim.name);
            let left = || self.shared.ledger.as_ref()?.take_number(&claim.name, claim.stamp.identity);
            let id =
                kept.or_else(left).filter(|id| !set.by_id.contains_key(id)).unwrap_or_else(|| self.new_id());
            if let Some(ledger) = &self.shared.ledger
                && !broken(Rule::L4)
            {
                ledger.number(id, &claim.name, claim.stamp.identity);
            }
            let entry = self.add(&mut set, id, claim);
            log::info!("{}: served as {}{SHOWN_SUFFIX}", entry.path().display(), claim.name.display());
            if let Some(damage) = &claim.damage {
                log::warn!("{}: {damage}; served, and cannot be written", entry.path().display());
            }
            new.push(entry);
        }
        let mut left_out = BTreeMap::new();
        for (claim, reason) in verdict.left_out {
            let said = set.left_out.get(&claim.file).is_some_and(|(_, old)| *old == reason);
            if !said {
                log::warn!("{}: not served: {reason}", self.path().join(&claim.file).display());
            }
            left_out.insert(claim.file.clone(), (claim, reason));
        }
        set.left_out = left_out;
        new
    }

    fn add(&self, set: &mut Set, id: u64, claim: &Claim) -> Arc<Entry> {
        let entry = Arc::new(Entry::new(id, claim, &self.shared, self.own.clone()));
        set.by_name.insert(claim.name.clone(), entry.clone());
        set.by_id.insert(id, entry.clone());
        entry
    }

    /// Serves an image under the number that it has had.
    pub(super) fn serve(&self, id: u64, claim: &Claim) -> Arc<Entry> {
        self.add(&mut write(&self.set), id, claim)
    }

    /// True when a layered image is left out, which may come back without an event in this folder.
    pub(super) fn has_broken_layers(&self) -> bool {
        read(&self.set).left_out.values().any(|(claim, _)| waits(claim))
    }

    /// True when one of those would be judged in another way now.
    pub(super) fn broken_layers_changed(&self) -> bool {
        let broken: Vec<Claim> = read(&self.set)
            .left_out
            .values()
            .map(|(claim, _)| claim)
            .filter(|claim| waits(claim))
            .cloned()
            .collect();
        let shared = &self.shared;
        broken.iter().any(|old| {
            let now = scan::folder_again(shared.place.fd(), &old.file, shared.allow_outside, &shared.silent);
            now.is_some_and(|now| now.is_none_or(|now| now.problem != old.problem))
        })
    }

    /// From now on `announce` hears what changes; only the first is taken.
    pub fn announce_to(&self, announce: Arc<dyn Announce>) {
        let _ = self.announce.set(announce);
    }

    /// Calls `what` where there is one to announce to.
    pub(super) fn with_announce(&self, what: impl FnOnce(&dyn Announce)) {
        if let Some(announce) = self.announce.get() {
            what(&**announce);
        }
    }

    /// A number that nothing had before.
    pub(super) fn new_id(&self) -> u64 {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        if let Some(ledger) = &self.shared.ledger {
            ledger.next_number(id + 1);
        }
        id
    }

    /// The number of what is shown under `name`: a served image, or a name that was created and has no size yet.
    pub fn find_id(&self, name: &OsStr) -> Option<u64> {
        // Together: a name that becomes an image is at no moment neither.
        let set = read(&self.set);
        set.by_name.get(name).map(|entry| entry.id()).or_else(|| locked(&self.names).id(name))
    }

    /// Removes the second name of a file that lies in an image's folder: what a crash left of the step that made a
    /// single file a folder. The data stays: the folder has it.
    fn remove_leftover(&self, claim: &Claim) {
        let path = self.path().join(&claim.file);
        if self.shared.read_only || self.stamp(&claim.file) != Some(claim.stamp) {
            return;
        }
        // Another process may be between the two: it holds the lock, and takes the folder away next.
        let dir = self.shared.place.fd().as_fd();
        let held = match self.shared.deltas.open(dir, claim.file.as_ref(), &path, Use::Writer) {
            Ok(held) => held,
            Err(e) => {
                return log::warn!("{e}; the same file lies in the image's folder, and one of the two goes");
            }
        };
        // The crash may have come before the folder's own name was durable: a power cut now would leave neither.
        let removed = rustix::fs::fsync(self.shared.place.fd()).and_then(|()| {
            rustix::fs::unlinkat(self.shared.place.fd(), &claim.file, rustix::fs::AtFlags::empty())
        });
        match removed {
            Ok(()) => {
                log::info!(
                    "{}: removed; the same file lies in the image's folder, which is served",
                    path.display()
                );
            }
            Err(e) => log::warn!("{}: left from a crash, and cannot be removed: {e}", path.display()),
        }
        drop(held);
    }

    /// Notes that a file was created and is being written, or no longer is.
    pub(super) fn note_writing(&self, file: &OsStr, is: bool) {
        let mut writing = locked(&self.writing);
        if is {
            writing.insert(file.to_owned());
        } else {
            writing.remove(file);
        }
    }

    pub(super) fn is_writing(&self, file: &OsStr) -> bool {
        locked(&self.writing).contains(file)
    }

    pub(super) fn stamp(&self, file: &OsStr) -> Option<Stamp> {
        scan::stamp(self.shared.place.fd(), file)
    }

    /// What the kernel knows of the image from a daemon before may be old.
    pub fn announce_disk(&self, id: u64) {
        self.with_announce(|announce| announce.disk(id));
    }

    /// All that was open is open again: what was not taken of those files is given up.
    pub fn settle_inheritance(&self) {
        self.shared.deltas.heirs.settle();
        self.let_go_of_left();
    }

    /// Where what a successor needs is kept.
    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.shared.ledger.as_ref()
    }

    /// The folder, as it was named.
    pub fn path(&self) -> &Path {
        self.shared.place.path()
    }

    /// The folder itself, open.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.shared.place.fd().as_fd()
    }

    /// True when `path` leads to a place in the folder, which may have been renamed, and its old path be another's.
    pub fn is_around(&self, path: &Path) -> bool {
        self.shared.place.is_around(path)
    }

    /// Space of the file system that holds the images.
    pub fn space(&self) -> Result<HostSpace> {
        self.shared.place.space()
    }

    /// The served image of this name (without `.img`).
    pub fn find(&self, name: &OsStr) -> Option<Arc<Entry>> {
        read(&self.set).by_name.get(name).cloned()
    }

    /// The served image of this number.
    pub fn get(&self, id: u64) -> Option<Arc<Entry>> {
        read(&self.set).by_id.get(&id).cloned()
    }

    /// The served image that is written so in text ([`in_text`]).
    pub fn find_text(&self, text: &str) -> Option<Arc<Entry>> {
        let as_it_is = self.find(text.as_ref());
        // Only a name that is no text, or has a backslash, is written in another way.
        as_it_is.or_else(|| {
            let written = |entry: &&Arc<Entry>| in_text(entry.name()) == text;
            text.contains('\\').then(|| read(&self.set).by_name.values().find(written).cloned())?
        })
    }

    /// Served images whose number is above `after`, at most `most`, in the order of their numbers.
    pub fn entries_behind(&self, after: u64, most: usize) -> Vec<Arc<Entry>> {
        let set = read(&self.set);
        let behind = set.by_id.range((Bound::Excluded(after), Bound::Unbounded));
        behind.take(most).map(|(_, entry)| entry.clone()).collect()
    }

    /// All served images, sorted by name.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        read(&self.set).by_name.values().cloned().collect()
    }

    /// What is not served, and why.
    pub(super) fn left_out(&self) -> Vec<(Claim, String)> {
        read(&self.set).left_out.values().cloned().collect()
    }

    /// Opens an image by name (without `.img`), and waits for it. Not for threads of the engine or a transport.
    pub fn open_image(&self, name: &str, write: bool) -> Result<OpenImage> {
        let missing = || Error::at(Kind::NotFound, self.path().join(name), "no such image is served");
        let entry = self.find_text(name).ok_or_else(missing)?;
        let (send, receive) = mpsc::channel();
        entry.open_later(write, Box::new(move |result| drop(send.send(result))));
        receive.recv().unwrap_or_else(|_| Err(Error::at(Kind::Io, entry.path(), "the open was abandoned")))
    }

    /// From now on every open is refused (EBUSY).
    pub fn refuse_new_opens(&self) {
        self.shared.refusing.store(true, Ordering::Release);
    }

    /// Names of the images that are open.
    pub fn busy(&self) -> Vec<String> {
        let entries = self.entries();
        let busy = entries.iter().filter(|e| e.openers() > 0);
        busy.map(|e| in_text(e.name())).collect()
    }

    /// Makes everything that was acknowledged durable, in every image that is open for writing, at the same
    /// time. Blocks. Not for threads of the engine.
    pub fn sync_all(&self) -> Vec<(String, Result<()>)> {
        let entries = self.entries();
        let syncing: Vec<_> = entries.iter().filter_map(|e| Some((e.clone(), e.sync()?))).collect();
        let synced = syncing.into_iter().map(|(entry, answer)| {
            let abandoned = || Err(Error::at(Kind::Io, entry.path(), "the sync was abandoned"));
            let result = answer.recv().unwrap_or_else(|_| abandoned());
            (in_text(entry.name()), result)
        });
        synced.collect()
    }

    /// The end: refuses opens, then drains, syncs and closes every open image under its openers, all at the same
    /// time; waits for all, also for closes under way. What fails is for the caller to log. Not for threads of the engine.
    pub fn close_all(&self) -> Vec<(String, Result<()>)> {
        self.refuse_new_opens();
        let closing: Vec<_> = self.entries().iter().map(|e| (e.clone(), e.close_by_force())).collect();
        let ended = closing.into_iter().filter_map(|(entry, answer)| {
            let abandoned = || Some(Err(Error::at(Kind::Io, entry.path(), "the close was abandoned")));
            let result = answer.recv().unwrap_or_else(|_| abandoned())?;
            Some((in_text(entry.name()), result))
        });
        ended.collect()
    }
}

/// A layered image that is left out for what is in its own folder.
fn waits(claim: &Claim) -> bool {
    claim.source == scan::Source::Layers && claim.problem.is_some()
}
