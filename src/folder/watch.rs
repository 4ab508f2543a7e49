//! Sees images come and go: one thread, blocked in poll while nothing happens.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use inotify::{EventMask, Inotify, WatchMask};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::set::Folder;
use super::settle::Settling;

/// Room for events of one read: some 60 with the longest names. More are read in the next round.
const EVENTS: usize = 16 << 10;

/// The watching thread.
pub struct Watcher {
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

/// Begins to note what happens in `dir`. A confined process makes no watch: it could watch any file of the machine.
pub fn watch(dir: &OwnedFd) -> io::Result<Inotify> {
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

impl Watcher {
    /// Begins to look at what `inotify` notes. The thread keeps no folder alive; it ends with it.
    pub fn start(folder: &Weak<Folder>, inotify: Inotify) -> io::Result<Watcher> {
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut watch = Watch { inotify, folder: folder.clone(), settling: Settling::default() };
        let wait_for = stop.clone();
        let thread = thread::Builder::new().name("ploopfs/watch".into()).spawn(move || {
            // What came between the first look and this watch has caused no event.
            watch.look(&[], true);
            if let Err(e) = watch.run(&wait_for) {
                log::warn!("the images folder is no longer watched: {e}; new images are not seen");
            }
        })?;
        Ok(Watcher { stop, thread })
    }

    /// Ends the thread and waits for it.
    pub fn stop(self) {
        self.signal();
        // The last one to let go of a folder may be the thread itself.
        if self.thread.thread().id() != thread::current().id() && self.thread.join().is_err() {
            log::error!("the watching thread has panicked");
        }
    }

    fn signal(&self) {
        // Can fail only when the counter is full, and then the thread has long been told.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
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
    settling: Settling,
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
    fn run(&mut self, stop: &OwnedFd) -> io::Result<()> {
        let mut buffer = vec![0; EVENTS];
        loop {
            if !self.wait(stop)? {
                return Ok(());
            }
            let batch = self.take_events(&mut buffer)?;
            let Some(folder) = self.folder.upgrade() else { return Ok(()) };
            let ready = self.settling.ready(Instant::now(), |file| folder.stamp(file));
            drop(folder);
            if batch.look || batch.lost || batch.over || !ready.is_empty() {
                self.look(&ready, batch.lost);
            }
            if batch.over {
                return Err(io::Error::other("it was removed"));
            }
        }
    }

    /// Sleeps until there are events or a file may be ready; false: stop.
    fn wait(&self, stop: &OwnedFd) -> io::Result<bool> {
        let timeout = self.settling.next().map(|due| {
            let left = due.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let events = self.inotify.as_fd();
        let mut fds = [PollFd::new(&events, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(fds[1].revents().is_empty()),
            Err(e) => Err(e.into()),
        }
    }

    fn take_events(&mut self, buffer: &mut [u8]) -> io::Result<Batch> {
        let mut batch = Batch::default();
        let Some(folder) = self.folder.upgrade() else { return Ok(batch) };
        let events = match self.inotify.read_events(buffer) {
            Ok(events) => events,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(batch);
            }
            Err(e) => return Err(e),
        };
        for event in events {
            batch.lost |= event.mask.contains(EventMask::Q_OVERFLOW);
            batch.over |= event.mask.intersects(EventMask::IGNORED | EventMask::DELETE_SELF);
            if let Some(file) = event.name.filter(|name| !name.as_bytes().starts_with(b".")) {
                batch.look |= note(&mut self.settling, &folder, file, event.mask);
            }
        }
        Ok(batch)
    }

    /// Lets the folder look at itself, with `ready` taken in. With `all`, new files that caused no event are
    /// watched until they are still.
    fn look(&mut self, ready: &[OsString], all: bool) {
        let Some(folder) = self.folder.upgrade() else { return };
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
        if let Err(e) = looked {
            log::warn!("{e}");
        }
    }
}

/// Notes one event; true when the folder must be looked at now.
fn note(settling: &mut Settling, folder: &Folder, file: &OsStr, mask: EventMask) -> bool {
    if mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
        folder.note_writing(file, false);
        settling.forget(file);
        return true;
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
