//! Threads for large requests, each with a ring of its own.
//!
//! A request is copied twice: from file to payload by the thread that serves it, and between payload and user by the
//! kernel, in the context of the thread that submits. For large ones these copies are all there is to do, and one
//! thread for each of the kernel's queues does them one after the other. So they are spread: a carrier serves the
//! request and answers through its own ring, both copies on one CPU, with warm caches. The entry stays with the
//! carrier's ring, where the next request comes out that the kernel gives it; it goes home with the answer of a small
//! one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Sender;

use super::device::Device;
use super::helpers::{Bench, pause, sift};
use super::memory::{Entries, HeldEntry, answering_here};
use super::ring::Ring;
use super::serve::{SessionServer, Thread};
use crate::error::Result;
use crate::io::process::{no_thread, spawn_thread};
use crate::sync::{Mutex, lock};

/// From this size on, in bytes, the copies of a request cost far more than a hand-over, and two threads that copy are
/// faster than one: below the 512 KiB to which loop cuts, above the 128 KiB of read-ahead.
pub(super) const LARGE: u32 = 256 << 10;

/// What waits for a carrier, and which of them are free.
pub(super) struct Load {
    /// Protects both, so that no request waits beside a free carrier. A leaf: nothing else is locked under it, and no
    /// carrier is called.
    state: Mutex<State>,
    /// By which a carrier is called.
    carriers: Vec<Arc<Entries>>,
    /// Large requests that wait for a carrier or that one has.
    under_way: AtomicUsize,
}

struct State {
    requests: VecDeque<HeldEntry>,
    /// By carrier: it waits, and was not called since.
    free: Vec<bool>,
}

impl State {
    /// A carrier that is to be called; it is not free any more.
    fn choose(&mut self) -> Option<usize> {
        let chosen = self.free.iter().position(|free| *free)?;
        self.free[chosen] = false;
        Some(chosen)
    }
}

impl Load {
    /// For carriers with these rings.
    pub(super) fn new(rings: &[Ring]) -> Load {
        Load::among(rings.iter().map(|ring| ring.entries().clone()).collect())
    }

    fn among(carriers: Vec<Arc<Entries>>) -> Load {
        let state = State { requests: VecDeque::new(), free: vec![false; carriers.len()] };
        Load { state: Mutex::new(state), carriers, under_way: AtomicUsize::new(0) }
    }

    /// True while a carrier has something to do.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0
    }

    fn has_free(&self) -> bool {
        lock(&self.state).free.contains(&true)
    }

    /// Calls all carriers: they look whether it is over.
    pub(super) fn call(&self) {
        self.carriers.iter().for_each(|entries| entries.call());
    }

    /// Hands a request to the first carrier that is free, or to the first that will be.
    pub(super) fn put(&self, held: HeldEntry) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let chosen = {
            let mut state = lock(&self.state);
            state.requests.push_back(held);
            state.choose()
        };
        self.call_one(chosen);
    }

    fn call_one(&self, chosen: Option<usize>) {
        if let Some(carrier) = chosen {
            self.carriers[carrier].call();
        }
    }

    /// The next request. None: there is none, and the carrier is free until it [wakes](Self::woke).
    fn take(&self, carrier: usize) -> Option<HeldEntry> {
        let mut state = lock(&self.state);
        let held = state.requests.pop_front();
        state.free[carrier] = held.is_none();
        held
    }

    /// A carrier that was free has woken. If it was called and is `busy` with something else, another one may be free for
    /// what it was called for.
    fn woke(&self, carrier: usize, busy: bool) {
        let chosen = {
            let mut state = lock(&self.state);
            let called = !std::mem::replace(&mut state.free[carrier], false);
            let needed = called && busy && !state.requests.is_empty();
            needed.then(|| state.choose()).flatten()
        };
        self.call_one(chosen);
    }
}

/// One ring and what its thread needs.
pub(super) struct Carrier {
    pub(super) ring: Ring,
    pub(super) server: Arc<SessionServer>,
    pub(super) device: Arc<Device>,
    pub(super) bench: Bench,
    pub(super) load: Arc<Load>,
    /// Dropped when this thread will not call the file system again.
    pub(super) at_work: Sender<()>,
}

impl Carrier {
    /// Starts the thread of carrier `number` of the [`Load`]. No thread waits for its end, as for a queue's.
    pub(super) fn start(self, number: usize) -> Result<()> {
        let name = format!("ploopfs/c{number}");
        spawn_thread(&name, move || self.run(number)).map(drop).map_err(no_thread(&name))
    }

    fn run(self, number: usize) {
        let Carrier { mut ring, server, device, bench, load, at_work } = self;
        if let Err(e) = ring.register(device) {
            log::error!("cannot start a carrier's ring: {e}");
        }
        let mut at_work = Some(at_work);
        let mut batch = Vec::new();
        let mut said = false;
        // Any entry may come out of any ring, so that all of them have to be back; before the end, none may be given yet.
        while !server.is_closed() || ring.homes().iter().any(|entries| entries.are_live()) {
            let put = load.take(number);
            let seen = if put.is_some() { ring.look(&mut batch) } else { ring.wait(&mut batch, None) };
            if put.is_none() {
                load.woke(number, !batch.is_empty());
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
fn carry(ring: &mut Ring, server: &SessionServer, held: HeldEntry) {
    let (home, index) = held.home();
    answering_here(|| server.serve(held, Thread::Sifted));
    ring.prompt();
    home.make_huge(index);
}

/// A request that came out of a carrier's own ring: with an entry that an earlier large one had.
fn one(ring: &mut Ring, server: &SessionServer, bench: &Bench, load: &Load, held: HeldEntry, more: bool) {
    let Some((held, bytes)) = sift(server, bench, held) else { return };
    if bytes < LARGE {
        return server.serve(held, Thread::Sifted);
    }
    // With its payload in this CPU's caches it is better kept, unless a carrier has nothing to do.
    if more && load.has_free() {
        return load.put(held);
    }
    load.under_way.fetch_add(1, Ordering::Relaxed);
    carry(ring, server, held);
    load.under_way.fetch_sub(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::uring::cpus::Queue;

    fn load(carriers: usize) -> Load {
        Load::among((0..carriers).map(|_| Arc::new(Entries::new(u32::MAX, &[]).expect("memory"))).collect())
    }

    fn requests(depth: u32) -> Vec<HeldEntry> {
        let entries = Arc::new(Entries::new(0, &[Queue { id: 0, depth }]).expect("memory"));
        (0..depth).for_each(|index| entries.begins(index));
        // SAFETY: no kernel knows these entries, and each is taken once.
        (0..depth).map(|index| unsafe { entries.came(index) }.expect("it is the kernel's")).collect()
    }

    /// True when the carrier was called; it then is no longer.
    fn was_called(carrier: &Arc<Entries>) -> bool {
        let wake = carrier.wake();
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
        assert!(load.take(0).is_none() && load.take(1).is_none());
        let calls = requests(3).into_iter().map(|held| {
            load.put(held);
            load.carriers.iter().map(was_called).collect::<Vec<_>>()
        });
        assert_eq!(calls.collect::<Vec<_>>(), [[true, false], [false, true], [false, false]]);
        assert!(load.is_under_way() && !load.has_free());
    }

    #[test]
    fn a_request_that_no_carrier_is_free_for_is_taken_by_the_next_that_looks() {
        let load = load(1);
        requests(1).into_iter().for_each(|held| load.put(held));
        assert!(!was_called(&load.carriers[0]), "it does not wait");
        assert!(load.take(0).is_some() && !load.has_free());
        assert!(load.take(0).is_none() && load.has_free());
    }

    #[test]
    fn a_carrier_that_was_called_and_is_busy_calls_another_that_is_free() {
        let load = load(2);
        assert!(load.take(0).is_none());
        let mut requests = requests(2).into_iter();
        load.put(requests.next().expect("two"));
        assert!(was_called(&load.carriers[0]) && load.take(1).is_some() && load.take(1).is_none());
        load.woke(0, true);
        assert!(!was_called(&load.carriers[1]), "nothing waits any more");
        assert!(load.take(0).is_none());
        load.put(requests.next().expect("two"));
        assert!(was_called(&load.carriers[0]));
        load.woke(0, true);
        assert!(was_called(&load.carriers[1]), "the other one is free");
    }
}
