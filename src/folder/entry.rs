//! One served image: closed, or open with its files, lock and live image, and what opens and closes it.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;

use super::counted::{Counted, Ticket};
use super::lease::Leased;
use super::live::Live;
use super::origin::Origin;
use super::scan::{Claim, Identity};
use super::shared::{Around, Shared};
use super::snapshots::Views;
use super::strand::{Spawn, Strand};
use super::{locked, read, write};
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::image::layers::Layers;
use crate::io::backing::Backing;
use crate::io::file::HostStatus;
use crate::vdisk::{Image, Mode, Stats};

/// Behind the path of a file that is gone.
const GONE: &str = " (deleted)";
/// What is said of an image that was writable and no longer is.
pub(super) const FAILED: &str =
    "can no longer be written (the log says why) until its last user has closed it";

/// Answer of an open, from a thread of the engine.
pub(super) type OpenDone = Box<dyn FnOnce(Result<OpenImage>) + Send>;

/// One image that is served.
pub struct Entry {
    id: u64,
    name: OsString,
    /// Changes when the first snapshot makes a file a folder. A leaf.
    origin: RwLock<Origin>,
    pub(super) shared: Arc<Shared>,
    pub(super) folder: Weak<dyn Around>,
    /// Runs a job on a thread that may block, beside few others of this image.
    pub(super) spawn: Spawn,
    pub(super) strand: Arc<Strand>,
    /// What is asked about it ([`Entry::ask`]).
    pub(super) questions: Arc<Strand>,
    /// A look at all images has asked about it, and has no answer yet.
    pub(super) asked: AtomicBool,
    /// Protects the count; only jobs of the strand lock it, so none ever waits. Before every other lock.
    pub(super) count: Mutex<Counted<Arc<Live>>>,
    /// Protects "an opener has it, or is about to" against "it goes". A leaf.
    hold: Mutex<Hold>,
    /// The open image, for those who only look.
    pub(super) live: ArcSwapOption<Live>,
    openers: AtomicU32,
    writable: AtomicBool,
    /// Disk size in bytes: as the header said last.
    pub(super) size: AtomicU64,
    /// The file is gone from the folder, or another now; served until the last close.
    vanished: AtomicBool,
    /// The file is there under another name.
    renamed: AtomicBool,
    /// Protects the last word of the host about the file, and why the image cannot be written or closed. A leaf.
    pub(super) last: Mutex<Last>,
    /// Protects that its layers are opened once for all users: the live disk, its snapshots, an operation. Held
    /// across that open. Before the registry's lock.
    pub(super) layers: Mutex<Leased<Layers>>,
    /// Protects which snapshots are looked at, and which are about to go. A leaf.
    pub(super) views: Mutex<Views>,
}

/// Who opens an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The mount: what is open may be passed through.
    Kernel,
    /// An operation of ours.
    Us,
}

#[derive(Default)]
struct Hold {
    /// Opens asked for and not yet given back.
    count: u32,
    /// Out of the live set; no open begins any more.
    retired: bool,
}

#[derive(Default)]
pub(super) struct Last {
    pub(super) status: HostStatus,
    /// When the host was asked for it; None: never.
    pub(super) asked: Option<Instant>,
    pub(super) trouble: Option<String>,
    /// What the last look at the file found of damage.
    damage: Option<String>,
}

/// What stat shows of an image.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// The top delta's file.
    pub host: HostStatus,
    /// Disk size in bytes.
    pub size: u64,
    /// Last write through us, else the file's own time.
    pub mtime: SystemTime,
}

impl Entry {
    pub(super) fn new(id: u64, claim: &Claim, shared: &Arc<Shared>, folder: Weak<dyn Around>) -> Entry {
        let spawn = shared.spawn_for(id);
        Entry {
            id,
            name: claim.name.clone(),
            origin: RwLock::new(Origin {
                file: claim.file.clone(),
                name: claim.name.clone(),
                source: claim.source,
                identity: claim.stamp.identity,
            }),
            shared: shared.clone(),
            folder,
            strand: Strand::new(spawn.clone()),
            questions: Strand::new(spawn.clone()),
            asked: AtomicBool::new(false),
            spawn,
            count: Mutex::default(),
            hold: Mutex::default(),
            live: ArcSwapOption::empty(),
            openers: AtomicU32::new(0),
            writable: AtomicBool::new(false),
            size: AtomicU64::new(claim.size),
            vanished: AtomicBool::new(false),
            renamed: AtomicBool::new(false),
            last: Mutex::new(Last { damage: claim.damage.clone(), ..Last::default() }),
            layers: Mutex::default(),
            views: Mutex::default(),
        }
    }

    /// Its number: never reused while the folder is open.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The image's name, without `.img`.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Its file's name in the folder.
    pub fn file(&self) -> OsString {
        self.origin().file
    }

    /// How it is stored: "ploop", "raw" or "layered".
    pub fn kind(&self) -> &'static str {
        self.origin().kind()
    }

    /// Where it comes from at the moment.
    pub(super) fn origin(&self) -> Origin {
        read(&self.origin).clone()
    }

    /// It is a folder from now on.
    pub(super) fn set_origin(&self, origin: Origin) {
        if let Some(ledger) = &self.shared.ledger {
            ledger.number(self.id, &self.name, origin.identity);
        }
        *write(&self.origin) = origin;
    }

    /// Its file, for messages.
    pub fn path(&self) -> PathBuf {
        self.shared.place.path().join(self.file())
    }

    /// Its file, for lists. One that is gone has a path that leads nowhere, as the kernel writes it: another image may lie
    /// under its name by now.
    pub fn shown_path(&self) -> PathBuf {
        let mut path = self.path();
        if self.vanished.load(Ordering::Acquire) && !self.renamed.load(Ordering::Acquire) {
            path.as_mut_os_string().push(GONE);
        }
        path
    }

    /// Number of openers.
    pub fn openers(&self) -> u32 {
        self.openers.load(Ordering::Acquire)
    }

    /// Live counters; None while it is closed.
    pub fn stats(&self) -> Option<Stats> {
        Some(self.live.load().as_ref()?.image.stats())
    }

    /// Looks at the live image; None while it is closed.
    pub fn with_image<T>(&self, look: impl FnOnce(&Image) -> T) -> Option<T> {
        Some(look(&self.live.load().as_ref()?.image))
    }

    /// Disk size in bytes, without asking the host.
    pub fn size(&self) -> u64 {
        self.with_image(Image::size).unwrap_or_else(|| self.size.load(Ordering::Acquire))
    }

    /// How it is open, in one word.
    pub fn mode(&self) -> &'static str {
        match self.stats().map(|s| s.mode) {
            None => "closed",
            Some(Mode::FullQueue) => "full-queue",
            Some(Mode::FullError) => "full-error",
            Some(Mode::Write) if self.writable.load(Ordering::Acquire) => "write",
            Some(Mode::Write | Mode::ReadOnly) => "read-only",
        }
    }

    /// What a person should know about it.
    pub fn trouble(&self) -> Option<String> {
        if self.vanished.load(Ordering::Acquire) {
            return Some(match self.renamed.load(Ordering::Acquire) {
                true => {
                    format!("its file was renamed to {}; served until it is closed", self.file().display())
                }
                false => "its file is gone from the folder; served until it is closed".into(),
            });
        }
        if self.writable.load(Ordering::Acquire) && self.mode() == "read-only" {
            return Some(FAILED.into());
        }
        let last = locked(&self.last);
        last.trouble.clone().or_else(|| last.damage.clone())
    }

    /// Its snapshots, as its descriptor has them at the moment.
    pub fn snapshot_lines(&self) -> Result<Vec<SnapshotLine>> {
        let (images, trusted) = (self.shared.place.fd().as_fd(), self.shared.allow_outside);
        self.origin().snapshots(images, &self.path(), trusted)
    }

    /// What stat shows. Asks the host, and so may wait for it; opens nothing. Not for threads of a transport.
    pub fn attributes(&self) -> Attributes {
        let now = Instant::now();
        let status = match &*self.live.load() {
            Some(live) => live.image.host_status().ok(),
            None => {
                let (images, trusted) = (self.shared.place.fd().as_fd(), self.shared.allow_outside);
                self.origin().status(images, &self.path(), trusted)
            }
        };
        let mut last = locked(&self.last);
        // What was known stands in for a file that is gone.
        last.status = status.unwrap_or(last.status);
        last.asked = Some(now);
        drop(last);
        self.known_attributes()
    }

    /// What stat shows, as far as it is known: owner, mode and space are what the host said last. Never waits.
    pub fn known_attributes(&self) -> Attributes {
        let (live, host) = (self.live.load(), locked(&self.last).status);
        let (size, written) = match &*live {
            // A writer past us makes it longer, too.
            Some(live) if live.image.may_be_passed() => (live.image.size().max(host.len), None),
            Some(live) => (live.image.size(), live.image.last_write()),
            None => (self.size.load(Ordering::Acquire), None),
        };
        Attributes { host, size, mtime: written.unwrap_or_else(|| time_of(host.mtime)) }
    }

    pub(super) fn identity(&self) -> Identity {
        self.origin().identity
    }

    /// True while an opener has it, or is about to.
    pub(super) fn is_held(&self) -> bool {
        locked(&self.hold).count > 0
    }

    /// Takes it out of service, unless it is held. From then on no open begins.
    pub(super) fn retire(&self) -> bool {
        let mut hold = locked(&self.hold);
        hold.retired |= hold.count == 0;
        hold.retired
    }

    /// It is in service again: what it was retired for did not happen.
    pub(super) fn restore(&self) {
        locked(&self.hold).retired = false;
    }

    /// The folder says: this is its file's state now. True when the disk has another size than before.
    pub(super) fn seen(&self, claim: Option<&Claim>) -> bool {
        self.renamed.store(false, Ordering::Release);
        self.vanished.store(claim.is_none(), Ordering::Release);
        match claim {
            Some(claim) if !self.is_held() => {
                locked(&self.last).damage.clone_from(&claim.damage);
                self.size.swap(claim.size, Ordering::AcqRel) != claim.size
            }
            _ => false,
        }
    }

    /// The folder says: its file has another name now. What changes the image goes on with the file, and commands find it
    /// by either name; what is shown keeps the old one until the last close.
    pub(super) fn follow(&self, claim: &Claim) {
        let mut origin = write(&self.origin);
        if origin.source == claim.source && origin.identity == claim.stamp.identity {
            origin.file.clone_from(&claim.file);
            origin.name.clone_from(&claim.name);
            self.renamed.store(true, Ordering::Release);
        }
    }

    /// An opener is about to have it; false: no open begins any more. Given back by [`let_go`](Self::let_go).
    pub(super) fn hold(&self) -> bool {
        let mut hold = locked(&self.hold);
        if !hold.retired {
            hold.count += 1;
        }
        !hold.retired
    }

    pub(super) fn let_go(&self) {
        let mut hold = locked(&self.hold);
        hold.count = hold.count.saturating_sub(1);
        let idle = hold.count == 0;
        drop(hold);
        if idle
            && self.vanished.load(Ordering::Acquire)
            && let Some(folder) = self.folder.upgrade()
        {
            folder.look_again();
        }
    }

    /// Opens it; `done` is called from a thread of the engine. An open waits for a close that is under way.
    pub fn open_later(self: &Arc<Self>, write: bool, done: OpenDone) {
        self.open_by(By::Us, write, done);
    }

    /// The same for an open of the kernel, which may take over reads and writes: see [`OpenImage::backing`].
    pub fn open_for_kernel(self: &Arc<Self>, write: bool, done: OpenDone) {
        self.open_by(By::Kernel, write, done);
    }

    fn open_by(self: &Arc<Self>, by: By, write: bool, done: OpenDone) {
        if !self.hold() {
            return done(Err(Error::at(Kind::NotFound, self.path(), "is no longer in the folder")));
        }
        let entry = self.clone();
        self.strand.submit(Box::new(move || {
            let result = entry.acquire(by, write);
            if result.is_err() {
                entry.let_go();
            }
            done(result);
        }));
    }

    fn acquire(self: &Arc<Self>, by: By, write: bool) -> Result<OpenImage> {
        if self.shared.refusing.load(Ordering::Acquire) {
            return Err(Error::at(Kind::Busy, self.path(), "the mount is ending and opens nothing more"));
        }
        let mut count = locked(&self.count);
        let first = count.openers() == 0;
        let result = count.acquire(&**self, write);
        self.publish(&count);
        if let Some(damage) = count.damage() {
            locked(&self.last).trouble = Some(damage.to_string());
        }
        let (live, ticket) = result?;
        // All have it open in one way, from the first to the last (see io::backing).
        if by == By::Kernel && first {
            self.offer_passthrough(&live);
        }
        let (image, never_blocks) = (live.image.clone(), live.never_blocks);
        let backing = image.backing().filter(|_| by == By::Kernel).cloned();
        Ok(OpenImage { entry: self.clone(), held: Some((image, ticket)), write, never_blocks, backing })
    }

    fn publish(&self, count: &Counted<Arc<Live>>) {
        self.openers.store(count.openers(), Ordering::Release);
        self.writable.store(count.is_writable(), Ordering::Release);
    }

    fn release(&self, ticket: Ticket) {
        let mut count = locked(&self.count);
        let closed = count.release(self, ticket);
        self.publish(&count);
        drop(count);
        if let Some(result) = closed {
            if let Err(e) = &result {
                log::error!("{e}; the in-use mark stays, and the next open checks the image");
            }
            self.closed(&result);
        }
        self.let_go();
    }

    fn closed(&self, result: &Result<()>) {
        locked(&self.last).trouble = result.as_ref().err().map(ToString::to_string);
    }

    /// Starts a sync, if there may be anything to sync; the answer comes through the channel.
    pub(super) fn sync(&self) -> Option<mpsc::Receiver<Result<()>>> {
        if !self.writable.load(Ordering::Acquire) {
            return None;
        }
        let image = self.live.load().as_ref()?.image.clone();
        let (send, receive) = mpsc::channel();
        image.flush(Box::new(move |result| drop(send.send(result))));
        Some(receive)
    }

    /// Closes it under its openers; the answer comes through the channel, None when it was closed.
    pub(super) fn close_by_force(self: &Arc<Self>) -> mpsc::Receiver<Option<Result<()>>> {
        let (send, receive) = mpsc::channel();
        let entry = self.clone();
        self.strand.submit(Box::new(move || {
            let mut count = locked(&entry.count);
            if let Some(live) = entry.live.load_full() {
                entry.leave_to_kernel(&live);
            }
            let result = count.close(&*entry);
            entry.publish(&count);
            drop(count);
            if let Some(result) = &result {
                entry.closed(result);
            }
            // The receiver may be gone (the stop timeout): the image is closed all the same.
            let _ = send.send(result);
        }));
        receive
    }
}

pub(super) fn time_of((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    base.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(nanoseconds.into())
}

/// An image that is held open. Dropping it gives it back: the last one of an image lets it close, on a thread of
/// the engine. Nothing blocks.
pub struct OpenImage {
    entry: Arc<Entry>,
    /// Some until it is dropped.
    held: Option<(Arc<Image>, Ticket)>,
    write: bool,
    never_blocks: bool,
    backing: Option<Arc<Backing>>,
}

impl OpenImage {
    /// The live image.
    pub fn image(&self) -> &Arc<Image> {
        let (image, _) = self.held.as_ref().expect("only dropping takes it");
        image
    }

    /// The image's place in the folder.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// The host file that the kernel may read and write in our place: the same for all handles for which the kernel has
    /// the image open. None: the image is not raw, passthrough is not wanted or not to be had, or another user (an
    /// operation) had it open first.
    pub fn backing(&self) -> Option<&Arc<Backing>> {
        self.backing.as_ref()
    }

    /// True when it was opened for writing.
    pub fn writes(&self) -> bool {
        self.write
    }

    /// True when its host never waits for a device (tmpfs).
    pub fn never_blocks(&self) -> bool {
        self.never_blocks
    }

    /// True when it is open for writing, so that there may be something to sync; and when it failed: a close
    /// under its users may have lost something, and no sync says otherwise (R7).
    pub fn may_change(&self) -> bool {
        self.entry.writable.load(Ordering::Acquire) || self.image().failure().is_some()
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        let Some((image, ticket)) = self.held.take() else { return };
        drop(image);
        let entry = self.entry.clone();
        self.entry.strand.submit(Box::new(move || entry.release(ticket)));
    }
}
