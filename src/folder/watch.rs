//! Sees images come and go: one thread, blocked in poll while nothing happens.
//!
//! A look costs as much as the folder is large. So changes that come close together are looked at together: a loop of `touch`
//! and `rm` in the folder, or a large clean-up, must not keep a processor from the guests.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use inotify::{EventMask, Inotify, WatchMask};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::bell::{Bell, Watcher};
use super::locked;
use super::set::Folder;
use super::settle::Settling;
use crate::error::{Error, Result};
use crate::image::reserve;

/// Room for events of one read: some 60 with the longest names. More are read in the next round.
const EVENTS: usize = 16 << 10;

/// So many readings take in all that the kernel keeps: 16,384 events.
const QUEUE: usize = 16_384 * 272 / EVENTS;
/// Between two looks at least. A person does not see the difference.
const LOOKS: Duration = Duration::from_millis(200);
/// And at least so many times as long as the last one took, up to [`SLOWEST`]: a tenth of a processor, in a folder of any
/// size.
const SHARE: u32 = 10;
/// Longest pause between looks.
const SLOWEST: Duration = Duration::from_secs(1);
/// Between two readings of events: those about one file that come meanwhile are one.
const READINGS: Duration = Duration::from_millis(20);
/// When the host had no answer, it is asked again after so long.
const AGAIN: Duration = Duration::from_secs(3);
/// How often layered images that are left out are judged again: what comes back into an image's own folder causes no event
/// in the folder around it. As long as a new file has to be still.
const BROKEN: Duration = Duration::from_secs(2);

/// Begins to note what happens in `dir`. A confined process makes no watch: it could watch any file of the machine.
pub(super) fn watch(dir: &OwnedFd) -> io::Result<Inotify> {
    let inotify = Inotify::init()?;
    // No MODIFY: every write to an image would wake us. A file that still grows is seen by its stamp.
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::DELETE_SELF
        | WatchMask::ONLYDIR;
    inotify.watches().add(format!("/proc/self/fd/{}", dir.as_raw_fd()), mask)?;
    Ok(inotify)
}

/// Begins to look at what `inotify` notes. The thread keeps no folder alive; it ends with it.
fn start(folder: &Weak<Folder>, inotify: Inotify) -> io::Result<Watcher> {
    let bell = Arc::new(Bell::new()?);
    let now = Instant::now();
    let mut watch = Watch {
        inotify,
        folder: folder.clone(),
        bell: bell.clone(),
        settling: Settling::default(),
        batch: Batch::default(),
        may_read: now,
        may_look: now,
        again: None,
        broken: None,
    };
    let thread = thread::Builder::new().name("ploopfs/watch".into()).spawn(move || {
        // What came between the first look and this watch has caused no event.
        watch.look(true);
        if let Err(e) = watch.run() {
            log::warn!("the images folder is no longer watched: {e}; new images are not seen");
        }
        // There is nothing to wait for any more.
        watch.bell.heard(u64::MAX);
    })?;
    Ok(Watcher::new(bell, thread))
}

impl Folder {
    /// Begins to note what happens in the folder, for [`start_watch`](Self::start_watch): before a sandbox, which forbids it.
    pub fn prepare_watch(&self) -> Result<()> {
        *locked(&self.watch) = Some(watch(self.shared.place.fd()).map_err(|e| self.cannot_watch(&e))?);
        Ok(())
    }

    fn cannot_watch(&self, e: &std::io::Error) -> Error {
        Error::io(e, self.path(), "cannot watch the images folder")
    }

    /// Starts the thread that sees images come and go, and goes on with merges that a crash interrupted.
    pub fn start_watch(&self) -> Result<()> {
        let started = self.start_watcher();
        self.sweep();
        if !self.shared.read_only {
            reserve::keep(self.shared.place.fd().as_fd());
        }
        // What a crash interrupted goes on by itself; not before this, since there were no threads before.
        self.entries().iter().for_each(|entry| entry.finish_interrupted());
        started
    }

    fn start_watcher(&self) -> Result<()> {
        if locked(&self.watch).is_none() {
            self.prepare_watch()?;
        }
        if let Some(watch) = locked(&self.watch).take() {
            let watcher = start(&self.own, watch).map_err(|e| self.cannot_watch(&e))?;
            *locked(&self.watcher) = Some(watcher);
        }
        Ok(())
    }

    /// Ends that thread, and waits for it.
    pub fn stop_watch(&self) {
        let watcher = locked(&self.watcher).take();
        if let Some(watcher) = watcher {
            watcher.stop();
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.stop_watch();
    }
}

struct Watch {
    inotify: Inotify,
    folder: Weak<Folder>,
    bell: Arc<Bell>,
    settling: Settling,
    /// What was heard since the last look.
    batch: Batch,
    /// When events may be read, and the folder looked at, the next time.
    may_read: Instant,
    may_look: Instant,
    /// When to ask again what the host could not say.
    again: Option<Instant>,
    /// When to see whether a layered image that was left out can be served now.
    broken: Option<Instant>,
}

/// What a batch of events asks for.
#[derive(Default)]
struct Batch {
    /// Look at the folder now: something went, or was replaced.
    look: bool,
    /// Events were lost.
    lost: bool,
    /// The folder itself is gone.
    over: bool,
}

impl Watch {
    fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; EVENTS];
        while self.wait()? {
            let asked = self.bell.asked();
            self.take_events(&mut buffer)?;
            self.bell.heard(asked);
            self.look_at_broken(Instant::now());
            if self.is_due(Instant::now()) {
                self.look(false);
            }
            if self.batch.over {
                return Err(io::Error::other("it was removed"));
            }
            if self.folder.strong_count() == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Asks for a look where a layered image that was left out would be judged in another way now.
    fn look_at_broken(&mut self, now: Instant) {
        if self.broken.is_some_and(|due| due <= now)
            && let Some(folder) = self.folder.upgrade()
        {
            self.batch.look |= folder.broken_layers_changed();
            self.broken = Some(now + BROKEN);
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let Batch { look, lost, over } = self.batch;
        over || now >= self.may_look
            && (look || lost || [self.settling.next(), self.again].iter().flatten().any(|due| *due <= now))
    }

    /// Sleeps until there are events, a file may be ready, the folder may be looked at again, or the bell rings; false:
    /// the end.
    fn wait(&self) -> io::Result<bool> {
        let (now, bell) = (Instant::now(), self.bell.fd());
        if self.may_read > now && sleep(&mut [PollFd::new(bell, PollFlags::IN)], Some(self.may_read))? {
            return Ok(self.bell.answer());
        }
        let now = (self.batch.look || self.batch.lost).then_some(now);
        let due = [now, self.settling.next(), self.again, self.broken].into_iter().flatten().min();
        let events = self.inotify.as_fd();
        let mut fds = [PollFd::new(bell, PollFlags::IN), PollFd::new(&events, PollFlags::IN)];
        let rings = sleep(&mut fds, due.map(|due| due.max(self.may_look)))?;
        Ok(!rings || self.bell.answer())
    }

    /// Takes in all that there are: of each file what happened last.
    fn take_events(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let Some(folder) = self.folder.upgrade() else { return Ok(()) };
        let mut heard: HashMap<OsString, (EventMask, bool)> = HashMap::new();
        // All that there were at the first of them; more may come as fast as they are read.
        for _ in 0..QUEUE {
            let events = match self.inotify.read_events(buffer) {
                Ok(events) => events,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
                Err(e) => return Err(e),
            };
            for event in events {
                self.batch.lost |= event.mask.contains(EventMask::Q_OVERFLOW);
                self.batch.over |= event.mask.intersects(EventMask::IGNORED | EventMask::DELETE_SELF);
                if let Some(file) = event.name.filter(|name| !name.as_bytes().starts_with(b".")) {
                    let gone = event.mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM);
                    let (last, went) = heard.entry(file.to_owned()).or_insert((event.mask, false));
                    (*last, *went) = (event.mask, *went || gone);
                }
            }
        }
        for (file, (last, went)) in heard {
            self.batch.look |= note(&mut self.settling, &folder, &file, last);
            // What is no image changes nothing by going.
            self.batch.look |= went && folder.is_claim(&file);
        }
        self.may_read = Instant::now() + READINGS;
        Ok(())
    }

    /// Lets the folder look at itself, with what is still for long enough taken in. With `all`, new files that caused no
    /// event are watched until they are still.
    fn look(&mut self, all: bool) {
        let Some(folder) = self.folder.upgrade() else { return };
        let now = Instant::now();
        let all = all || self.batch.lost || self.again.is_some_and(|again| again <= now);
        (self.batch.look, self.batch.lost) = (false, false);
        let ready = self.settling.ready(now, |file| folder.stamp(file));
        let ready: HashSet<&OsStr> = ready.iter().map(OsString::as_os_str).collect();
        let settling = &mut self.settling;
        let writing = folder.clone();
        let looked = folder.look(&mut |file, stamp, known| {
            let accepted = ready.contains(file);
            if !accepted && (all || !known) && !settling.contains(file) && !writing.is_writing(file) {
                settling.touch(file, *stamp, Instant::now());
            }
            accepted
        });
        let end = Instant::now();
        self.may_look = end + LOOKS.max(SHARE * end.duration_since(now)).min(SLOWEST);
        self.broken = folder.has_broken_layers().then_some(end + BROKEN);
        let first = self.again.is_none();
        self.again = (!matches!(looked, Ok(true))).then(|| end + AGAIN);
        match looked {
            Ok(false) if first => log::warn!(
                "{}: the host could not say what some files are; what is served stays, and they are looked at again",
                folder.path().display()
            ),
            Err(e) if first => log::warn!("{e}; it is looked at again"),
            _ => {}
        }
        // What was ready and could not be looked at has caused its events already.
        if self.again.is_some() {
            for file in ready {
                if let Some(stamp) = folder.stamp(file) {
                    self.settling.touch(file, stamp, end);
                }
            }
        }
    }
}

/// Waits for any of `fds` until `deadline`; true: the first of them is ready.
fn sleep(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
    });
    match rustix::event::poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!fds[0].revents().is_empty()),
        Err(e) => Err(e.into()),
    }
}

/// Notes what happened to a file last; true when the folder must be looked at for it.
fn note(settling: &mut Settling, folder: &Folder, file: &OsStr, mask: EventMask) -> bool {
    if mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
        folder.note_writing(file, false);
        settling.forget(file);
        return false;
    }
    let Some(stamp) = folder.stamp(file) else { return false };
    // A second name for a finished file is created, and never closed.
    let begun = mask.contains(EventMask::CREATE) && !mask.contains(EventMask::ISDIR) && stamp.links == 1;
    folder.note_writing(file, begun);
    if begun {
        // A look at the folder may have found it before we heard of its creation.
        settling.forget(file);
    } else {
        settling.touch(file, stamp, Instant::now());
    }
    // A file that was moved over another: the old one is gone.
    mask.contains(EventMask::MOVED_TO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FolderOptions;
    use crate::vdisk::{Engine, Options};

    #[test]
    fn a_file_found_before_its_creation_was_heard_of_waits_for_its_close() {
        let temp = tempfile::tempdir().expect("a folder");
        let engine = Engine::new(Options::default(), Box::new(|_| {}));
        let folder = Folder::open(temp.path(), &engine, FolderOptions::default()).expect("opens");
        let mut settling = Settling::default();
        let file = OsStr::new("slow.raw");
        std::fs::write(temp.path().join(file), "x").expect("written");
        settling.touch(file, folder.stamp(file).expect("there"), Instant::now());
        assert!(!note(&mut settling, &folder, file, EventMask::CREATE));
        assert!(!settling.contains(file) && folder.is_writing(file));
        assert!(!note(&mut settling, &folder, file, EventMask::CLOSE_WRITE));
        assert!(settling.contains(file) && !folder.is_writing(file));
    }
}
