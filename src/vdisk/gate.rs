//! The gate of one image: every pio is counted in and out; closing it freezes the image
//! (docs/design.md#the-life-of-a-request).
//!
//! The counter is sharded per thread, so that submitters on different CPUs do not share a cache line.

use std::collections::VecDeque;

use super::runner::Job;
use crate::sync::{
    AtomicBool, AtomicU64, Bug, Condvar, Mutex, MutexGuard, Ordering, Padded, SHARDS, lock, planted,
    thread_shard, wait,
};

/// Counts what is inside; can be closed.
#[derive(Default)]
pub(super) struct Gate {
    inside: [Padded<AtomicU64>; SHARDS],
    closed: AtomicBool,
    /// Closed for good. Changes and counts only under `outside`.
    shut: AtomicBool,
    /// What arrived while the gate was closed, in order. Also the mutex behind `emptied`. A leaf.
    outside: Mutex<VecDeque<Job>>,
    emptied: Condvar,
}

/// Proof of being inside, for a number of pios; handed back with [`Gate::leave`], from any thread.
#[derive(Debug)]
#[must_use]
pub(super) struct Inside {
    shard: usize,
    count: u64,
}

impl Inside {
    /// Takes one pio's share out.
    pub(super) fn split(&mut self) -> Inside {
        self.count -= 1;
        Inside { shard: self.shard, count: 1 }
    }
}

impl Gate {
    fn outside(&self) -> MutexGuard<'_, VecDeque<Job>> {
        let outside = lock(&self.outside);
        debug_assert!(self.is_sound(&outside), "jobs wait at an open gate");
        outside
    }

    /// What holds whenever the lock of `outside` is free: what waits there is let in by an [`Gate::open`] to come, or
    /// taken out of what is shut. The flag is set by a `close` at any time, and taken back under the lock only.
    fn is_sound(&self, outside: &VecDeque<Job>) -> bool {
        outside.is_empty() || self.closed.load(Ordering::SeqCst)
    }

    /// Enters for `count` pios; None while the gate is closed.
    pub(super) fn enter(&self, count: u64) -> Option<Inside> {
        let shard = thread_shard();
        // The order matters: count first, look second. `close` sets the flag first and counts second, so one of
        // the two sees the other (both are SeqCst).
        self.inside[shard].0.fetch_add(count, Ordering::SeqCst);
        let inside = Inside { shard, count };
        if self.closed.load(Ordering::SeqCst) {
            self.leave(inside);
            return None;
        }
        Some(inside)
    }

    /// Enters for one more while `other` is inside, also while the gate closes: for work that an inside pio starts
    /// and that a freeze or a close must wait for.
    pub(super) fn enter_with(&self, other: &Inside) -> Inside {
        self.inside[other.shard].0.fetch_add(1, Ordering::SeqCst);
        Inside { shard: other.shard, count: 1 }
    }

    /// True while it is closed, or about to be: work that can leave in its middle does, so that no pio stands
    /// still for all of it.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// How many are inside at about this moment.
    pub(super) fn inside(&self) -> u64 {
        // One that leaves through another shard between two loads must not make it negative.
        self.inside.iter().fold(0u64, |sum, n| sum.wrapping_add(n.0.load(Ordering::Relaxed)))
    }

    /// Runs `job` when the gate is open again, unless it is open by now: then `job` comes back.
    pub(super) fn wait(&self, job: Job) -> Option<Job> {
        let mut outside = self.outside();
        if self.closed.load(Ordering::SeqCst) {
            outside.push_back(job);
            return None;
        }
        Some(job)
    }

    /// Leaves.
    pub(super) fn leave(&self, inside: Inside) {
        let before = self.inside[inside.shard].0.fetch_sub(inside.count, Ordering::SeqCst);
        // Below zero, the closer would wait for ever; too few, it would freeze an image with a pio inside.
        debug_assert!(before >= inside.count, "{} leave of the {before} that are inside", inside.count);
        if self.closed.load(Ordering::SeqCst) {
            // Under the mutex, so that the closer cannot miss it between its look and its sleep.
            let _outside = (!planted(Bug::WakeWithoutMutex)).then(|| self.outside());
            self.emptied.notify_all();
        }
    }

    /// Closes the gate and waits until everything inside has left. Never called from a runner.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let mut outside = self.outside();
        while self.inside.iter().any(|n| n.0.load(Ordering::SeqCst) != 0) {
            outside = wait(&self.emptied, outside);
        }
    }

    /// Closes for good: a [`Gate::open`] that comes later, or at the same moment, opens nothing.
    pub(super) fn shut(&self) {
        {
            let _outside = self.outside();
            self.shut.store(true, Ordering::SeqCst);
        }
        self.close();
    }

    /// Takes what waits outside, without opening the gate: the image is closed for good.
    pub(super) fn take_outside(&self) -> VecDeque<Job> {
        std::mem::take(&mut *self.outside())
    }

    /// Opens the gate; returns what waited, in order, to be submitted by the caller.
    pub(super) fn open(&self) -> VecDeque<Job> {
        let mut outside = self.outside();
        if self.shut.load(Ordering::SeqCst) {
            return VecDeque::new();
        }
        self.closed.store(false, Ordering::SeqCst);
        std::mem::take(&mut *outside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Arc;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn close_waits_for_what_is_inside_and_nothing_enters_meanwhile() {
        let gate = Arc::new(Gate::default());
        let mut inside = gate.enter(2).expect("open");
        let one = inside.split();
        let (tx, rx) = mpsc::channel();
        let closer = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            closer.close();
            tx.send(()).expect("the test waits");
        });
        while gate.wait(Box::new(|| ())).is_some() {
            std::thread::yield_now();
        }
        assert!(gate.enter(1).is_none());
        gate.leave(one);
        assert!(rx.recv_timeout(Duration::from_millis(50)).is_err(), "one pio is still inside");
        gate.leave(inside);
        rx.recv_timeout(Duration::from_secs(10)).expect("closed once empty");
        thread.join().expect("no panic");
        assert_eq!(gate.open().len(), 1);
        assert!(gate.enter(1).is_some());
    }

    #[test]
    fn a_job_that_waits_at_an_open_gate_is_not_sound() {
        let gate = Gate::default();
        let job: Job = Box::new(|| ());
        let outside = VecDeque::from([job]);
        assert!(!gate.is_sound(&outside));
        gate.close();
        assert!(gate.is_sound(&outside));
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "2 leave of the 1")]
    fn a_pio_that_leaves_twice_is_caught() {
        let gate = Gate::default();
        let mut inside = gate.enter(1).expect("open");
        inside.count = 2;
        gate.leave(inside);
    }
}
