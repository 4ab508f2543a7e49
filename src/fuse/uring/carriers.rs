//! Threads for large requests, each with a ring of its own.
//!
//! A request is copied twice: from file to payload by whoever serves it, and between payload and user by the kernel, in
//! the context of the thread that submits. For large ones these copies are all there is to do, and one thread for each
//! of the kernel's queues does them one after the other. So they are spread: a carrier serves the request and answers
//! through its own ring, both copies on one CPU, with warm caches. The entry stays with the carrier's ring, where the
//! next request comes out that the kernel gives it; it goes home with the answer of a small one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::device::Device;
use super::memory::{Entries, Held, answering_here};
use super::queue::{Bench, failed, pause, sift};
use super::ring::Ring;
use super::serve::{Server, Thread};
use crate::error::Result;
use crate::io::process::spawn_thread;

/// From this size on, in bytes, the copies of a request cost far more than a hand-over, and two threads that copy are
/// faster than one: below the 512 KiB to which loop cuts, above the 128 KiB of read-ahead.
pub(super) const LARGE: u32 = 256 << 10;

/// What waits for a carrier, and which of them are free.
pub(super) struct Load {
    requests: (Sender<Held>, Receiver<Held>),
    /// Large requests that wait for a carrier or that one has.
    under_way: AtomicUsize,
    seats: Vec<Seat>,
}

struct Seat {
    /// By which the carrier is called.
    entries: Arc<Entries>,
    /// It waits, and nobody has called it since.
    free: AtomicBool,
}

impl Load {
    /// For carriers with these rings.
    pub(super) fn new(rings: &[Ring]) -> Load {
        Load::among(rings.iter().map(|ring| ring.entries().clone()))
    }

    fn among(carriers: impl Iterator<Item = Arc<Entries>>) -> Load {
        let seats = carriers.map(|entries| Seat { entries, free: AtomicBool::new(false) }).collect();
        // Unbounded, so that a queue's thread never waits; at most all entries of all rings.
        Load { requests: unbounded(), under_way: AtomicUsize::new(0), seats }
    }

    /// True while a carrier has something to do.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0
    }

    fn has_free_seat(&self) -> bool {
        self.seats.iter().any(|seat| seat.free.load(Ordering::Relaxed))
    }

    /// Calls all carriers: they look whether it is over.
    pub(super) fn call(&self) {
        self.seats.iter().for_each(|seat| seat.entries.call());
    }

    /// Hands a request to the first carrier that is free, or to the first that will be.
    pub(super) fn put(&self, held: Held) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        self.requests.0.send(held).expect("both ends of the channel are ours");
        self.call_one();
    }

    fn call_one(&self) {
        // Put, then look who is free; a carrier says that it is free, then looks what was put (`take`). So one of the two
        // sees the other.
        fence(Ordering::SeqCst);
        if let Some(seat) = self.seats.iter().find(|seat| seat.free.swap(false, Ordering::Relaxed)) {
            seat.entries.call();
        }
    }

    /// The next request. None: there is none, and the seat is free until it is told otherwise.
    fn take(&self, seat: &Seat) -> Option<Held> {
        if let Ok(held) = self.requests.1.try_recv() {
            return Some(held);
        }
        seat.free.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let held = self.requests.1.try_recv().ok()?;
        seat.free.store(false, Ordering::Relaxed);
        Some(held)
    }
}

/// One ring and what its thread needs.
pub(super) struct Carrier {
    pub(super) ring: Ring,
    pub(super) server: Arc<Server>,
    pub(super) device: Arc<Device>,
    pub(super) bench: Bench,
    pub(super) load: Arc<Load>,
    /// Dropped when this thread will not call the file system again.
    pub(super) at_work: Sender<()>,
}

impl Carrier {
    /// Starts the thread of carrier `number` of the [`Load`]. Nobody waits for its end, as for a queue's thread.
    pub(super) fn start(self, number: usize) -> Result<()> {
        let name = format!("ploopfs/c{number}");
        spawn_thread(&name, move || self.run(number)).map(drop).map_err(failed(&name))
    }

    fn run(self, number: usize) {
        let Carrier { mut ring, server, device, bench, load, at_work } = self;
        let seat = &load.seats[number];
        if let Err(e) = ring.register(device) {
            log::error!("cannot start a carrier's ring: {e}");
        }
        let mut at_work = Some(at_work);
        let mut batch = Vec::new();
        let mut said = false;
        // Any entry may come out of any ring, so that all of them have to be back; before the end, none may be given yet.
        while !server.is_closed() || ring.homes().iter().any(|entries| entries.are_live()) {
            let put = load.take(seat);
            let seen = if put.is_some() { ring.look(&mut batch) } else { ring.wait(&mut batch) };
            let called = !seat.free.swap(false, Ordering::Relaxed);
            if called && put.is_none() && !batch.is_empty() {
                // Called, and busy with its own: another may be free.
                load.call_one();
            }
            if let Err(e) = seen {
                pause(&e, &mut said);
            }
            if let Some(held) = put {
                carry(&mut ring, &server, held);
                load.under_way.fetch_sub(1, Ordering::Relaxed);
            }
            let mut left = batch.len();
            for held in batch.drain(..) {
                left -= 1;
                one(&mut ring, &server, &bench, &load, held, left > 0);
            }
            if server.is_closed() {
                at_work.take();
            }
        }
    }
}

/// Serves a large request and answers it through this ring.
fn carry(ring: &mut Ring, server: &Server, held: Held) {
    answering_here(|| server.serve(held, Thread::Transport));
    ring.prompt();
}

/// A request that came out of a carrier's own ring: with an entry that an earlier large one had.
fn one(ring: &mut Ring, server: &Server, bench: &Bench, load: &Load, held: Held, more: bool) {
    let Some((held, bytes)) = sift(server, bench, held) else { return };
    if bytes < LARGE {
        return server.serve(held, Thread::Transport);
    }
    // With its payload in this CPU's caches it is better kept, unless somebody has nothing to do.
    if more && load.has_free_seat() {
        return load.put(held);
    }
    load.under_way.fetch_add(1, Ordering::Relaxed);
    carry(ring, server, held);
    load.under_way.fetch_sub(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::uring::ring::Queue;

    fn load(carriers: usize) -> Load {
        Load::among((0..carriers).map(|_| Arc::new(Entries::new(u32::MAX, &[]).expect("memory"))))
    }

    fn requests(depth: u32) -> Vec<Held> {
        let entries = Arc::new(Entries::new(0, &[Queue { id: 0, depth }]).expect("memory"));
        (0..depth).for_each(|index| entries.begins(index));
        // SAFETY: no kernel knows these entries, and each is taken once.
        (0..depth).map(|index| unsafe { entries.came(index) }.expect("it is the kernel's")).collect()
    }

    /// True when the carrier was called; it then is no longer.
    fn was_called(seat: &Seat) -> bool {
        let wake = seat.entries.wake();
        let mut ready = [rustix::event::PollFd::new(wake, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let called = rustix::event::poll(&mut ready, Some(&now)).expect("polled") == 1;
        if called {
            rustix::io::read(wake, &mut [0; 8]).expect("called");
        }
        called
    }

    #[test]
    fn a_request_calls_one_carrier_that_is_free_and_each_once() {
        let load = load(2);
        assert!(load.take(&load.seats[0]).is_none() && load.take(&load.seats[1]).is_none());
        let calls = requests(3).into_iter().map(|held| {
            load.put(held);
            load.seats.iter().map(was_called).collect::<Vec<_>>()
        });
        assert_eq!(calls.collect::<Vec<_>>(), [[true, false], [false, true], [false, false]]);
        assert!(load.is_under_way() && !load.has_free_seat());
    }

    #[test]
    fn a_request_that_no_carrier_is_free_for_is_taken_by_the_next_that_looks() {
        let load = load(1);
        requests(1).into_iter().for_each(|held| load.put(held));
        assert!(!was_called(&load.seats[0]), "it does not wait");
        assert!(load.take(&load.seats[0]).is_some() && !load.has_free_seat());
        assert!(load.take(&load.seats[0]).is_none() && load.has_free_seat());
    }
}
