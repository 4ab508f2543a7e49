//! Cluster locks: alone or together, in order, and no waiter is forgotten.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{explore, finds};
use crate::sync::mpsc::{Sender, channel};
use crate::sync::plain::lock;
use crate::sync::{Arc, Bug, thread};
use crate::vdisk::locks::{ClusterLocks, LockMode};
use crate::vdisk::runner::Job;

const CLUSTER: u64 = 7;

/// What is observed, in types that are no steps of the model.
#[derive(Default)]
struct Rig {
    locks: ClusterLocks,
    /// Shared holders; -1000 for an exclusive one.
    holders: AtomicI32,
    /// The threads that had to queue, in the order of the queue: for which mode, and whether they have finished.
    queued: Mutex<Vec<(LockMode, bool)>>,
}

impl Rig {
    fn queued(&self) -> std::sync::MutexGuard<'_, Vec<(LockMode, bool)>> {
        lock(&self.queued)
    }

    /// Holds the lock for a while and gives it back.
    fn section(self: &Arc<Self>, mode: LockMode, ticket: Option<usize>) {
        let weight = if mode == LockMode::Exclusive { -1000 } else { 1 };
        let before = self.holders.fetch_add(weight, Ordering::SeqCst);
        let fits = if mode == LockMode::Exclusive { before == 0 } else { before >= 0 };
        assert!(fits, "{mode:?} beside {before}");
        if let Some(ticket) = ticket {
            // Shared ones in a row are let in together; everyone else before me is through.
            let earlier = |(other, done): &(LockMode, bool)| {
                *done || (*other, mode) == (LockMode::Shared, LockMode::Shared)
            };
            assert!(self.queued()[..ticket].iter().all(earlier), "overtaken");
        }
        thread::yield_now();
        self.holders.fetch_sub(weight, Ordering::SeqCst);
        if let Some(ticket) = ticket {
            self.queued()[ticket].1 = true;
        }
        self.locks.unlock(CLUSTER, mode, |job| drop(thread::spawn(job)));
    }

    /// Takes the lock, now or later; `reply` hears of the end.
    fn ask(self: &Arc<Self>, mode: LockMode, reply: Sender<()>) {
        let later = |(rig, reply): (Arc<Rig>, Sender<()>)| -> Job {
            let mut queued = rig.queued();
            let ticket = queued.len();
            queued.push((mode, false));
            drop(queued);
            Box::new(move || {
                rig.section(mode, Some(ticket));
                let _ = reply.send(());
            })
        };
        if let Some((rig, reply)) = self.locks.lock_or_queue(CLUSTER, mode, (self.clone(), reply), later) {
            rig.section(mode, None);
            let _ = reply.send(());
        }
    }
}

fn run(threads: &[&'static [LockMode]]) {
    let rig = Arc::new(Rig::default());
    let (reply, heard) = channel();
    for &modes in threads {
        let (rig, reply) = (rig.clone(), reply.clone());
        thread::spawn(move || modes.iter().for_each(|mode| rig.ask(*mode, reply.clone())));
    }
    let count: usize = threads.iter().map(|modes| modes.len()).sum();
    // One that is forgotten would be waited for here for ever, which shuttle calls a deadlock.
    (0..count).for_each(|_| heard.recv().expect("each ends"));
    assert!(rig.locks.try_lock(CLUSTER, LockMode::Exclusive), "free in the end");
}

const E: LockMode = LockMode::Exclusive;
const S: LockMode = LockMode::Shared;

fn writers_and_readers() {
    run(&[&[E, S], &[S, E], &[S, S]]);
}

fn writers() {
    run(&[&[E, E], &[E], &[E]]);
}

/// Readers come all the time; one writer waits.
fn a_stream_of_readers() {
    let rig = Arc::new(Rig::default());
    let (reply, heard) = channel();
    for _ in 0..2 {
        let (rig, reply) = (rig.clone(), reply.clone());
        thread::spawn(move || (0..3).for_each(|_| rig.ask(S, reply.clone())));
    }
    rig.ask(E, reply);
    let waits = rig.queued().iter().any(|(mode, done)| *mode == E && !done);
    // Alone among readers, it can only be in their way while it waits or holds the lock.
    let overtook = rig.locks.try_lock(CLUSTER, S);
    if overtook {
        let done = rig.queued().iter().all(|(mode, done)| *mode == S || *done);
        assert!(!waits || done, "a newcomer overtook the writer");
        rig.locks.unlock(CLUSTER, S, |job| drop(thread::spawn(job)));
    }
    (0..7).for_each(|_| heard.recv().expect("each ends"));
}

#[test]
fn cluster_locks_exclude_each_other_and_forget_nobody() {
    explore(8000, writers_and_readers);
    explore(8000, writers);
}

#[test]
fn newcomers_do_not_overtake_a_waiting_writer() {
    explore(8000, a_stream_of_readers);
}

#[test]
fn a_lost_wake_up_is_found() {
    finds(Bug::NoSecondTry, 20_000, writers);
}
