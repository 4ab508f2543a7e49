//! One served image: closed, or open with its files, lock and live image, and what opens and closes it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use rustix::fs::AtFlags;

use super::counted::{Counted, Stage, Ticket};
use super::scan::{Claim, Identity, Source};
use super::set::{Folder, Shared};
use super::strand::Strand;
use super::{Wrap, locked};
use crate::error::{Error, Kind, Result};
use crate::format::header::{HEADER_BYTES, Header};
use crate::image::kind::ImageKind;
use crate::io::file::{HostFile, HostStatus, read_full};
use crate::io::lock::DeltaLock;
use crate::io::real::{Access, RealFile};
use crate::vdisk::{Image, Layout, Level, Mode, Stats};

/// What is said of an image that was writable and no longer is.
const FAILED: &str = "can no longer be written (the log says why) until everybody has closed it";

/// Answer of an open, from a thread of the engine.
pub type OpenDone = Box<dyn FnOnce(Result<OpenImage>) + Send>;

/// One image that is served.
pub struct Entry {
    id: u64,
    name: OsString,
    file: OsString,
    kind: ImageKind,
    identity: Identity,
    shared: Arc<Shared>,
    folder: Weak<Folder>,
    strand: Arc<Strand>,
    /// Protects the count; only jobs of the strand lock it, so nobody ever waits. Before every other lock.
    count: Mutex<Counted<Arc<Live>>>,
    /// Protects "somebody has it open, or is about to" against "it goes". A leaf.
    hold: Mutex<Hold>,
    /// The open image, for those who only look.
    live: ArcSwapOption<Live>,
    openers: AtomicU32,
    writable: AtomicBool,
    /// Disk size in bytes: as the header said last.
    size: AtomicU64,
    /// The file is gone from the folder, or another now; served until the last close.
    vanished: AtomicBool,
    /// Protects the last word of the host about the file, and why the image cannot be written or closed. A leaf.
    last: Mutex<Last>,
}

#[derive(Default)]
struct Hold {
    /// Opens asked for and not yet given back.
    count: u32,
    /// Out of the live set; no open begins any more.
    retired: bool,
}

#[derive(Default)]
struct Last {
    status: HostStatus,
    trouble: Option<String>,
}

/// An image while it is open.
pub struct Live {
    image: Arc<Image>,
    file: Arc<dyn HostFile>,
    can_write: bool,
    never_blocks: bool,
    /// Protects the lock's end: it is given back at the close itself and not when the last one who looks lets
    /// go, since our own next open would find it and take it for a stranger's. A leaf.
    lock: Mutex<Option<DeltaLock>>,
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
    pub(super) fn new(
        id: u64,
        claim: &Claim,
        kind: ImageKind,
        shared: &Arc<Shared>,
        folder: &Weak<Folder>,
    ) -> Entry {
        Entry {
            id,
            name: claim.name.clone(),
            file: claim.file.clone(),
            kind,
            identity: claim.stamp.identity,
            shared: shared.clone(),
            folder: folder.clone(),
            strand: Strand::new(shared.spawn.clone()),
            count: Mutex::default(),
            hold: Mutex::default(),
            live: ArcSwapOption::empty(),
            openers: AtomicU32::new(0),
            writable: AtomicBool::new(false),
            size: AtomicU64::new(claim.size),
            vanished: AtomicBool::new(false),
            last: Mutex::default(),
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
    pub fn file(&self) -> &OsStr {
        &self.file
    }

    /// How it is stored.
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// Its file, for messages.
    pub fn path(&self) -> PathBuf {
        self.shared.place.path().join(&self.file)
    }

    /// Number of openers.
    pub fn openers(&self) -> u32 {
        self.openers.load(Ordering::Acquire)
    }

    /// Live counters; None while it is closed.
    pub fn stats(&self) -> Option<Stats> {
        Some(self.live.load().as_ref()?.image.stats())
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
            return Some("its file is gone from the folder; served until it is closed".into());
        }
        if self.writable.load(Ordering::Acquire) && self.mode() == "read-only" {
            return Some(FAILED.into());
        }
        locked(&self.last).trouble.clone()
    }

    /// What stat shows. Asks the host, opens nothing.
    pub fn attributes(&self) -> Attributes {
        let live = self.live.load();
        let status = match &*live {
            Some(live) => live.file.status().ok(),
            None => self.status_by_name(),
        };
        let mut last = locked(&self.last);
        // What was known stands in for a file that is gone.
        last.status = status.unwrap_or(last.status);
        let host = last.status;
        drop(last);
        let (size, written) = match &*live {
            Some(live) => (live.image.size(), live.image.last_write()),
            None => (self.size.load(Ordering::Acquire), None),
        };
        Attributes { host, size, mtime: written.unwrap_or_else(|| time_of(host.mtime)) }
    }

    fn status_by_name(&self) -> Option<HostStatus> {
        let s = rustix::fs::statat(self.shared.place.fd(), &self.file, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        ((s.st_dev, s.st_ino) == self.identity).then_some(HostStatus {
            dev: s.st_dev,
            ino: s.st_ino,
            len: s.st_size as u64,
            blocks: s.st_blocks as u64,
            mode: s.st_mode & 0o7777,
            uid: s.st_uid,
            gid: s.st_gid,
            links: s.st_nlink,
            mtime: (s.st_mtime, s.st_mtime_nsec as u32),
        })
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// True while somebody has it open, or is about to.
    pub(super) fn is_held(&self) -> bool {
        locked(&self.hold).count > 0
    }

    /// Takes it out of service, unless it is held. From then on no open begins.
    pub(super) fn retire(&self) -> bool {
        let mut hold = locked(&self.hold);
        hold.retired |= hold.count == 0;
        hold.retired
    }

    /// The folder says: this is its file's state now.
    pub(super) fn seen(&self, claim: Option<&Claim>) {
        self.vanished.store(claim.is_none(), Ordering::Release);
        if let Some(claim) = claim
            && !self.is_held()
        {
            self.size.store(claim.size, Ordering::Release);
        }
    }

    fn hold(&self) -> bool {
        let mut hold = locked(&self.hold);
        if !hold.retired {
            hold.count += 1;
        }
        !hold.retired
    }

    fn let_go(&self) {
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
        if !self.hold() {
            return done(Err(Error::at(Kind::NotFound, self.path(), "is no longer in the folder")));
        }
        let entry = self.clone();
        self.strand.submit(Box::new(move || {
            let result = entry.acquire(write);
            if result.is_err() {
                entry.let_go();
            }
            done(result);
        }));
    }

    fn acquire(self: &Arc<Self>, write: bool) -> Result<OpenImage> {
        if self.shared.refusing.load(Ordering::Acquire) {
            return Err(Error::at(Kind::Busy, self.path(), "the mount is ending and opens nothing more"));
        }
        let mut count = locked(&self.count);
        let result = count.acquire(&**self, write);
        self.publish(&count);
        if let Some(damage) = count.damage() {
            locked(&self.last).trouble = Some(damage.to_string());
        }
        let (live, ticket) = result?;
        let never_blocks = live.never_blocks;
        Ok(OpenImage { entry: self.clone(), held: Some((live.image.clone(), ticket)), write, never_blocks })
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

    /// Closes it whoever has it open; the answer comes through the channel, None when it was closed.
    pub(super) fn close_by_force(self: &Arc<Self>) -> mpsc::Receiver<Option<Result<()>>> {
        let (send, receive) = mpsc::channel();
        let entry = self.clone();
        self.strand.submit(Box::new(move || {
            let mut count = locked(&entry.count);
            let result = count.close(&*entry);
            entry.publish(&count);
            drop(count);
            if let Some(result) = &result {
                entry.closed(result);
            }
            // Nobody may be waiting any more (the stop timeout): the image is closed all the same.
            let _ = send.send(result);
        }));
        receive
    }
}

impl Stage for Entry {
    type Live = Arc<Live>;

    /// Order: (1) open; (2) lock; (3) read the header: before the lock, a user who is just leaving would be seen
    /// half done.
    fn open(&self) -> Result<Arc<Live>> {
        let path = self.path();
        let access = if self.shared.read_only { Access::ReadOnly } else { Access::Widest };
        let file = Arc::new(RealFile::open_at(self.shared.place.fd(), &self.file, access)?);
        let status = file.status().map_err(|e| Error::io(&e, &path, "cannot open"))?;
        if (status.dev, status.ino) != self.identity {
            return Err(Error::at(Kind::NotFound, &path, "is another file now; it will be taken in anew"));
        }
        let lock = DeltaLock::acquire(file.clone())?;
        if !lock.held() && !self.shared.unlocked.swap(true, Ordering::AcqRel) {
            log::warn!("{}: no locks on this file system; let nothing else use the images", path.display());
        }
        let (can_write, never_blocks) = (file.writable(), file.traits().never_blocks);
        let file = wrap(&self.shared.wrap, file);
        let layout = match self.kind {
            ImageKind::Raw => Layout::Raw,
            ImageKind::Ploop => Layout::Ploop(read_header(&*file, &path)?),
        };
        let level = Level { file: file.clone(), path, layout };
        let name = self.name.to_string_lossy();
        let image = Image::open(&self.shared.engine, &name, vec![level])?;
        self.size.store(image.size(), Ordering::Release);
        let live = Arc::new(Live { image, file, can_write, never_blocks, lock: Mutex::new(Some(lock)) });
        self.live.store(Some(live.clone()));
        Ok(live)
    }

    fn make_writable(&self, live: &Arc<Live>) -> Result<()> {
        if self.shared.read_only || !live.can_write {
            let why =
                if self.shared.read_only { "the mount is read-only" } else { "the host refuses writing" };
            return Err(Error::at(Kind::ReadOnly, self.path(), why));
        }
        live.image.make_writable()
    }

    fn check_writable(&self, live: &Arc<Live>) -> Result<()> {
        match live.image.stats().mode {
            Mode::ReadOnly => Err(Error::at(Kind::ReadOnly, self.path(), FAILED)),
            _ => Ok(()),
        }
    }

    /// Order: (1) the image's own close: durable, mark cleared; (2) the lock. Swapped, somebody else would open
    /// an image that we still change.
    fn close(&self, live: Arc<Live>) -> Result<()> {
        let result = live.image.close();
        self.size.store(live.image.size(), Ordering::Release);
        if let Ok(status) = live.file.status() {
            locked(&self.last).status = status;
        }
        self.live.store(None);
        drop(locked(&live.lock).take());
        result
    }
}

fn wrap(wrap: &Option<Wrap>, file: Arc<RealFile>) -> Arc<dyn HostFile> {
    match wrap {
        Some(wrap) => wrap(file),
        None => file,
    }
}

/// Reads the header. What the host caches of a file found in use is dropped by [`Image::open`] (R7); only clean
/// pages can be dropped, so they are made clean here.
fn read_header(file: &dyn HostFile, path: &Path) -> Result<Header> {
    let mut head = [0; HEADER_BYTES as usize];
    let n = read_full(file, &mut head, 0).map_err(|e| Error::io(&e, path, "cannot read the header"))?;
    let header =
        Header::parse(&head[..n]).map_err(|field| Error::at(Kind::Damaged, path, field.to_string()))?;
    if header.is_in_use() {
        log::warn!("{}: was not closed cleanly; it is scanned before its first write", path.display());
        // A failure is an old one that nobody was told of: what is read from now on is what the disk has.
        if let Err(e) = file.sync_data() {
            log::warn!("{}: an earlier write never reached the disk: {e}", path.display());
        }
    }
    Ok(header)
}

fn time_of((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    base.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(nanoseconds.into())
}

/// What an image's source is served as; None for what cannot be served.
pub(super) fn single_file(source: Source) -> Option<ImageKind> {
    match source {
        Source::File(kind) => Some(kind),
        Source::Layers => None,
    }
}

/// An image that is held open. Dropping it gives it back: the last one of an image lets it close, on a thread of
/// the engine. Nothing blocks.
pub struct OpenImage {
    entry: Arc<Entry>,
    /// Some until it is dropped.
    held: Option<(Arc<Image>, Ticket)>,
    write: bool,
    never_blocks: bool,
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

    /// True when it was opened for writing.
    pub fn writes(&self) -> bool {
        self.write
    }

    /// True when its host never waits for a device (tmpfs).
    pub fn never_blocks(&self) -> bool {
        self.never_blocks
    }

    /// True when it is open for writing by anybody, so that there may be something to sync.
    pub fn may_change(&self) -> bool {
        self.entry.writable.load(Ordering::Acquire)
    }

    /// Gives it back; the same as dropping it.
    pub fn release(self) {}
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        let Some((image, ticket)) = self.held.take() else { return };
        drop(image);
        let entry = self.entry.clone();
        self.entry.strand.submit(Box::new(move || entry.release(ticket)));
    }
}
