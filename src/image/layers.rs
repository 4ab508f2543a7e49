//! A layered image, opened: its descriptor, and the files of its chains.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{Header, SECTOR};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::is_plain_name;
use crate::image::level::{Layout, Level, read_header};
use crate::image::levels::{check_chain, check_raw_base};
use crate::image::new_delta::{create_delta, new_delta_name};
use crate::image::paths;
use crate::image::store::{Replaced, Store};
use crate::io::file::HostFile;
use crate::io::heirs::Heirs;
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::{Access, RealFile};
use crate::sync::{Arc, AtomicBool, AtomicU32, Mutex, MutexGuard, Ordering, TryLockError, lock};

/// Opens and locks delta files: once in the whole process, since a second descriptor of ours would look foreign.
/// Dropped by [`Layers`] after every lock of the image, so that its end can be noticed.
pub trait Opener: Send + Sync {
    /// Opens the regular file `file` of the folder `dir`, not following a link, and locks it for `used` (never for
    /// more than a reader where [`used`](Opener::used) says so); `shown` is for messages.
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened>;

    /// What the image is opened for: a reader changes neither its files nor its descriptor.
    fn used(&self) -> Use {
        Use::Writer
    }

    /// For whom the descriptor's lock is kept.
    fn heirs(&self) -> std::sync::Arc<Heirs> {
        std::sync::Arc::default()
    }
}

/// What keeps a delta locked; dropped = unlocked.
pub trait Hold: Send + Sync {
    /// The delta is going to be changed: from now on readers are kept out too. Err(InUse): one is there, and is named.
    fn begin_writing(&self) -> Result<()>;

    /// It is not changed any more; readers may come.
    fn end_writing(&self);
}

impl Hold for DeltaLock {
    fn begin_writing(&self) -> Result<()> {
        DeltaLock::begin_writing(self)
    }

    fn end_writing(&self) {
        DeltaLock::end_writing(self);
    }
}

/// An open and locked delta.
#[derive(Clone)]
pub struct Opened {
    /// The file.
    pub file: Arc<dyn HostFile>,
    /// It can be written.
    pub writable: bool,
    /// What keeps it locked; dropped = unlocked.
    pub hold: Arc<dyn Hold>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("file", &self.file).field("writable", &self.writable).finish()
    }
}

/// Opens files for this image alone: for commands that work offline.
#[derive(Clone, Copy, Debug)]
pub struct Direct(pub Access);

impl Opener for Direct {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened> {
        let file = Arc::new(RealFile::open_as(&dir, file, shown, self.0)?);
        let used = if self.used() == Use::Reader { Use::Reader } else { used };
        let hold = DeltaLock::acquire(Arc::clone(&file), used)?;
        Ok(Opened { writable: file.writable(), file, hold: Arc::new(hold) })
    }

    fn used(&self) -> Use {
        Use::of(self.0)
    }
}

/// A layered image in use.
pub struct Layers {
    /// The descriptor. Taken before `open`, never across guest I/O.
    store: Mutex<Store>,
    /// The files opened so far, by their text in the descriptor, which stays when GUIDs move. They stay locked until
    /// they are removed or the image is closed. A leaf.
    open: Mutex<HashMap<String, Opened>>,
    /// Behind `store` and `open`: fields are dropped in this order, and the locks are in those.
    opener: Arc<dyn Opener>,
    allow_outside: bool,
    /// One operation at a time. Before every other lock; held as long as it takes.
    operation: Mutex<()>,
    /// The image is a single file again, and this folder is none. Set and asked while `operation` is held.
    retired: AtomicBool,
    /// Snapshots that are being read.
    readers: AtomicU32,
}

/// A snapshot is being read, perhaps from files that the descriptor names no more.
#[derive(Debug)]
pub struct Reader(Arc<Layers>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layers").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Layers {
    /// Opens the image in the folder `dir` (`path`, for messages): locks its descriptor, then the files of the live
    /// chain, which is returned base first. Where the top can be written, what a crash left is removed, and a disk
    /// size that differs from the top's header is corrected: the header is written first by a grow, so it is newer.
    pub fn open(
        dir: OwnedFd,
        path: &Path,
        opener: Arc<dyn Opener>,
        allow_outside: bool,
    ) -> Result<(Arc<Layers>, Vec<Level>)> {
        let store = Store::open(dir, path, opener.used(), &opener.heirs())?;
        if let Some(why) = store.descriptor().refusal() {
            return Err(Error::at(Kind::Unsupported, path.join(DESCRIPTOR), why));
        }
        let open = Mutex::new(HashMap::new());
        let layers = Arc::new(Layers {
            store: Mutex::new(store),
            open,
            opener,
            allow_outside,
            operation: Mutex::default(),
            retired: AtomicBool::new(false),
            readers: AtomicU32::new(0),
        });
        let top = lock(&layers.store).descriptor().top;
        let levels = layers.chain(top)?;
        if layers.writable() {
            layers.begin_settling(top, &levels)?;
            let mut store = lock(&layers.store);
            store.make_durable()?;
            // What is corrected here can wait, for space above all: no reason to keep an opener from the disk.
            let later = |e| log::warn!("{e}; the next open tries again");
            store.clean_up().unwrap_or_else(later);
            if let Some(Layout::Ploop(header)) = levels.last().map(|level| &level.layout)
                && header.disk_sectors != store.descriptor().disk_sectors
            {
                let mut next = store.descriptor().clone();
                next.set_size(header.disk_sectors);
                store.replace(next).and_then(Replaced::durable).unwrap_or_else(later);
            }
        }
        Ok((layers, levels))
    }

    /// The descriptor and labels. Nothing slow may be done while the guard lives, and no other method of this called.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    /// Begins an operation, or says that one is running: its requester should know, and not wait for it.
    pub fn begin_operation(&self) -> Result<MutexGuard<'_, ()>> {
        let begun = match self.operation.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                let why = "another operation on this image is running; try again when it has ended";
                Err(Error::at(Kind::Busy, self.store().path(), why))
            }
        };
        if begun.is_ok() && self.retired.load(Ordering::SeqCst) {
            return Err(Error::at(
                Kind::Busy,
                self.store().path(),
                "became a single file just now; try again",
            ));
        }
        begun
    }

    /// No operation begins any more, since the folder is the image's no longer. The caller has begun one.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
    }

    /// The live chain, base first, headers as they are now.
    pub fn live_chain(&self) -> Result<Vec<Level>> {
        let top = self.store().descriptor().top;
        self.chain(top)
    }

    /// One level of the tree, its header as it is now.
    pub fn level_of(&self, guid: Guid) -> Result<Level> {
        let mut chain = self.chain(guid)?;
        chain
            .pop()
            .ok_or_else(|| Error::at(Kind::Damaged, self.store().path(), format!("has no delta {guid}")))
    }

    /// True when a merge may change this delta: it can be written, and has no other name (R9).
    pub fn may_change(&self, guid: Guid) -> Result<bool> {
        self.level_of(guid)?; // Opens it.
        let file = self.store().descriptor().delta(guid).map(|delta| delta.file.clone()).unwrap_or_default();
        let writable = lock(&self.open).get(&file).is_some_and(|opened| opened.writable);
        Ok(writable && !self.is_shared(&file)?)
    }

    /// This delta, frozen until now, is going to be changed: its file is locked as a writer's, or its holder is named.
    /// Only the top's is locked so otherwise, and what a crash left in use (`vdisk::mark::settle_lower` closes it).
    pub fn begin_changing(&self, guid: Guid) -> Result<()> {
        self.level_of(guid)?; // Opens it.
        let file = self.store().descriptor().delta(guid).map(|delta| delta.file.clone()).unwrap_or_default();
        let hold = lock(&self.open).get(&file).map(|opened| Arc::clone(&opened.hold));
        hold.map_or(Ok(()), |hold| hold.begin_writing())
    }

    /// Keeps other programs' readers off the files that a merge of these changes, or names who reads them. A file that a
    /// clone has as well is not changed, and its readers are the clone's.
    pub fn claim(&self, guids: &[Guid]) -> Result<()> {
        for guid in guids {
            if self.may_change(*guid)? {
                self.begin_changing(*guid)?;
            }
        }
        Ok(())
    }

    /// The end of an operation: all files but the top's are frozen again, and other readers may come.
    pub fn end_changing(&self) {
        let store = lock(&self.store);
        let top = store.descriptor().delta(store.descriptor().top).map(|delta| delta.file.clone());
        let open = lock(&self.open);
        let frozen = open.iter().filter(|(file, _)| Some(*file) != top.as_ref());
        frozen.for_each(|(_, opened)| opened.hold.end_writing());
    }

    /// What a crash left in use below the top is closed at the first write. A file that a clone has as well stays.
    /// `levels` is its chain.
    fn begin_settling(&self, top: Guid, levels: &[Level]) -> Result<()> {
        let chain = self.store().descriptor().chain(top).unwrap_or_default();
        for (guid, level) in chain.into_iter().zip(levels).filter(|(guid, _)| *guid != top) {
            let in_use = matches!(level.layout, Layout::Ploop(header) if header.is_in_use());
            if in_use && self.may_change(guid)? {
                self.begin_changing(guid)?;
            }
        }
        Ok(())
    }

    /// True when the live top was opened for writing.
    pub fn writable(&self) -> bool {
        let store = lock(&self.store);
        let top = store.descriptor().delta(store.descriptor().top).map(|delta| delta.file.clone());
        top.is_some_and(|file| lock(&self.open).get(&file).is_some_and(|opened| opened.writable))
    }

    /// The chain of a snapshot or of the live top, base first. Files that are open already are not opened again.
    pub fn chain(&self, guid: Guid) -> Result<Vec<Level>> {
        let store = lock(&self.store);
        let descriptor = store.descriptor();
        let xml = store.path().join(DESCRIPTOR);
        let damaged = |why: String| Error::at(Kind::Damaged, &xml, why);
        let chain = descriptor.chain(guid).map_err(|bad| damaged(bad.to_string()))?;
        let mut levels = Vec::new();
        for (index, guid) in chain.iter().enumerate() {
            let delta = descriptor.delta(*guid).ok_or_else(|| damaged(format!("{guid} has no Image")))?;
            // Only a base can be raw, whatever Type says above it. The guest writes a raw base's first bytes: they
            // must not decide.
            levels.push(self.level(&store, &delta.file, delta.plain && index == 0)?);
        }
        if let (Some(base), Some(level)) = (chain.first(), levels.first()) {
            check_raw_base(*base, level, levels.get(1), descriptor, store.labels())?;
        }
        check_chain(&levels, descriptor)?;
        Ok(levels)
    }

    /// Makes a new empty delta with this header and opens it, with the owner and mode of the top. No descriptor names
    /// it yet; after a crash it is removed. Returns its text for the descriptor.
    pub fn add_delta(&self, header: &Header) -> Result<(String, Level)> {
        self.add_delta_for(header, None)
    }

    /// The same of one that takes the place of the file `going`, which is noted with it: one write for both, before the
    /// descriptor drops it.
    pub fn add_delta_for(&self, header: &Header, going: Option<&str>) -> Result<(String, Level)> {
        let mut store = lock(&self.store);
        let name = new_delta_name(store.descriptor());
        let like = self.top_status(&store)?;
        let noted: Vec<&str> = [Some(&*name), going].into_iter().flatten().collect();
        store.note(&noted)?;
        drop(create_delta(store.dir(), store.path(), &name, header, &like)?);
        let level = self.level(&store, &name, false)?;
        Ok((name, level))
    }

    /// Notes a reader of a snapshot, for as long as what it returns lives. Before its chain is looked up.
    pub fn begin_reading(self: &Arc<Self>) -> Reader {
        self.readers.fetch_add(1, Ordering::SeqCst);
        Reader(Arc::clone(self))
    }

    /// Closes a file that the descriptor does not name any more, and removes its name. A file with other names (hard
    /// links) lives on under those; while a snapshot is being read, it keeps ours, too: without it nothing would show
    /// a clone that another reader depends on the file (R9). It is noted, and goes at the next open.
    pub fn remove(&self, file: &str) -> Result<()> {
        if self.readers.load(Ordering::SeqCst) > 0 && self.is_shared(file).unwrap_or(false) {
            return Ok(());
        }
        let mut store = lock(&self.store);
        store.remove(file)?;
        lock(&self.open).remove(file);
        Ok(())
    }

    /// True when another image may have the file (R9), so that it must not be changed: it has another name, or lies in a
    /// folder that is not this image's own.
    pub fn is_shared(&self, file: &str) -> Result<bool> {
        if !is_plain_name(file) {
            return Ok(true);
        }
        let store = lock(&self.store);
        let level = self.level(&store, file, true)?;
        let status = level.file.status().map_err(|e| Error::io(&e, &level.path, "cannot look at it"))?;
        Ok(status.links > 1)
    }

    fn top_status(&self, store: &Store) -> Result<crate::io::file::HostStatus> {
        let descriptor = store.descriptor();
        let file = descriptor.delta(descriptor.top).map(|delta| delta.file.clone()).unwrap_or_default();
        let level = self.level(store, &file, true)?;
        level.file.status().map_err(|e| Error::io(&e, &level.path, "cannot look at it"))
    }

    /// One file as a level; `raw` files are not looked into.
    fn level(&self, store: &Store, file: &str, raw: bool) -> Result<Level> {
        let path = paths::shown(store.path(), file);
        let (opened, is_new) = self.opened(store, file, &path)?;
        // Every delta that will lie on it has the clusters that the descriptor says, whatever would fit its length.
        let plain = || Layout::Plain { cluster: u64::from(store.descriptor().cluster_sectors) * SECTOR };
        let layout = if raw { plain() } else { Layout::Ploop(read_header(&*opened.file, &path)?) };
        let mut level = Level { file: opened.file, path, layout };
        if is_new {
            // Now, and not when a snapshot is looked at: by then the file may have a writer.
            level.distrust()?;
        }
        Ok(level)
    }

    /// The file, and whether it was not open before.
    fn opened(&self, store: &Store, file: &str, path: &Path) -> Result<(Opened, bool)> {
        let mut open = lock(&self.open);
        if let Some(opened) = open.get(file) {
            return Ok((opened.clone(), false));
        }
        // The descriptor names it: that it is not there is damage of the image, and not a wrong name of the caller's.
        let missing = |e: Error| match e.kind() {
            Kind::NotFound => Error::at(Kind::Damaged, path, paths::MISSING),
            _ => e,
        };
        let place = paths::resolve(store.dir(), Path::new(file), path, self.allow_outside);
        let (dir, name) = place.map_err(missing)?;
        let descriptor = store.descriptor();
        let top = descriptor.delta(descriptor.top).map(|delta| &*delta.file);
        // One that no descriptor names yet is about to become the top, or a copy's place.
        let frozen = descriptor.names(file) && top != Some(file);
        let used = if frozen { Use::Reader } else { Use::Writer };
        let opened = self.opener.open(dir.as_fd(), Path::new(&name), path, used).map_err(missing)?;
        open.insert(file.to_owned(), opened.clone());
        Ok((opened, true))
    }

    /// The folder and the name of a file of this image.
    pub(super) fn place(&self, file: &str) -> Result<(OwnedFd, std::ffi::OsString)> {
        let store = lock(&self.store);
        paths::resolve(store.dir(), Path::new(file), &paths::shown(store.path(), file), self.allow_outside)
    }
}

#[cfg(test)]
mod tests;
