//! What wakes the watching thread: that it is to end, or that events which are there already are to be heard before
//! something is decided.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::locked;

/// How long a caller waits for the thread: it may be in a look at a large folder, which the caller waits for anyway.
const PATIENCE: Duration = Duration::from_secs(2);

/// One bell, of one watching thread.
pub(super) struct Bell {
    /// Readable while it rings.
    fd: OwnedFd,
    /// The thread is to end.
    ending: AtomicBool,
    /// How often it was asked to hear what there is.
    asked: AtomicU64,
    /// Protects up to which asking it has heard everything. A leaf.
    heard: Mutex<u64>,
    answered: Condvar,
}

impl Bell {
    pub(super) fn new() -> io::Result<Bell> {
        Ok(Bell {
            fd: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            ending: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            heard: Mutex::new(0),
            answered: Condvar::new(),
        })
    }

    fn ring(&self) {
        // Can fail only when the counter is full, and then it rings.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Ends the thread.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Returns when the thread has heard of all that happened before the call, or is gone, or after [`PATIENCE`].
    pub(super) fn catch_up(&self) {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.ring();
        let heard = locked(&self.heard);
        let waited = self.answered.wait_timeout_while(heard, PATIENCE, |heard| *heard < asked);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// For the thread: what to wait for.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// For the thread, when it rings: silences it. False: the thread is to end.
    pub(super) fn answer(&self) -> bool {
        // Empty when it did not ring.
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        !self.ending.load(Ordering::SeqCst)
    }

    /// For the thread, before it takes in events: up to where they will all be heard.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    /// For the thread: it has heard all that it was asked for up to `asked`.
    pub(super) fn heard(&self, asked: u64) {
        let mut heard = locked(&self.heard);
        *heard = (*heard).max(asked);
        drop(heard);
        self.answered.notify_all();
    }
}

/// The watching thread.
pub(super) struct Watcher {
    bell: Arc<Bell>,
    thread: JoinHandle<()>,
}

impl Watcher {
    pub(super) fn new(bell: Arc<Bell>, thread: JoinHandle<()>) -> Watcher {
        Watcher { bell, thread }
    }

    /// Ends the thread and waits for it.
    pub(super) fn stop(self) {
        self.bell.end();
        // The last holder of a folder may be the thread itself.
        if self.thread.thread().id() != thread::current().id() && self.thread.join().is_err() {
            log::error!("the watching thread has panicked");
        }
    }

    /// What makes it hear of all that has happened.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn a_caller_waits_until_the_thread_has_heard_all_and_no_longer_than_it_lives() {
        let bell = Arc::new(Bell::new().expect("a bell"));
        let thread = {
            let bell = bell.clone();
            thread::spawn(move || {
                while bell.answer() {
                    bell.heard(bell.asked());
                    thread::yield_now();
                }
                bell.heard(u64::MAX);
            })
        };
        let began = Instant::now();
        (0..100).for_each(|_| bell.catch_up());
        bell.end();
        thread.join().expect("no panic");
        (0..100).for_each(|_| bell.catch_up());
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    }
}
