//! The allocator: no cluster twice, none outside the file, none with old content, and no pio waits for ever.

use std::collections::HashSet;
use std::sync::Mutex;

use super::{explore, finds};
use crate::sync::mpsc::{Sender, channel};
use crate::sync::plain::lock;
use crate::sync::{Arc, Bug, thread};
use crate::vdisk::alloc::{Alloc, Allocator, Bits, Due};
use crate::vdisk::runner::Job;

/// File clusters that the format can address here.
const LIMIT: u64 = 6;
/// File clusters under the BAT that grows.
const RESERVED: u64 = 2;

/// The host's side, in types that are no steps of the model.
struct Truth {
    /// The file's length in clusters.
    end: u64,
    used: HashSet<u64>,
    /// Not known to be zero.
    stale: HashSet<u64>,
    /// Not handed out from now on: below this one.
    reserved: u64,
}

struct Rig {
    alloc: Allocator,
    truth: Mutex<Truth>,
    /// Extensions and scrubs under way.
    syncers: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Rig {
    /// Clusters 0 and 1 are free and hold old data; the file ends behind them.
    fn new() -> Arc<Rig> {
        let mut stale = Bits::default();
        (0..2).for_each(|n| assert!(stale.insert(n)));
        let truth = Truth { end: 2, used: HashSet::new(), stale: (0..2).collect(), reserved: 0 };
        Arc::new(Rig {
            alloc: Allocator::new(2, LIMIT, 2, stale),
            truth: Mutex::new(truth),
            syncers: Mutex::default(),
        })
    }

    fn truth(&self) -> std::sync::MutexGuard<'_, Truth> {
        lock(&self.truth)
    }

    /// What `extend` and `scrub` do, with the host in between.
    fn carry_out(self: &Arc<Self>, due: Due) {
        let waiting = match due {
            Due::Extend => {
                let (from, to) = self.alloc.extension();
                assert!(from <= to && to <= LIMIT);
                thread::yield_now();
                let mut truth = self.truth();
                truth.end = truth.end.max(to);
                drop(truth);
                self.alloc.extended(to)
            }
            Due::Scrub => {
                let batch = self.alloc.scrub_batch();
                thread::yield_now();
                let mut truth = self.truth();
                for n in &batch {
                    assert!(!truth.used.contains(n), "cluster {n} is punched under its user");
                    truth.stale.remove(n);
                }
                drop(truth);
                self.alloc.scrubbed(&batch, true)
            }
        };
        waiting.into_iter().for_each(|job| drop(thread::spawn(job)));
    }

    /// A cluster, after as many waits as it takes; None when there are no more.
    fn take(self: &Arc<Self>) -> Option<u64> {
        loop {
            let (reply, heard) = channel();
            let later = |reply: Sender<()>| -> Job { Box::new(move || reply.send(()).expect("it waits")) };
            let reserved = self.truth().reserved;
            let mut due = Vec::new();
            let taken = self.alloc.take(reply, later, |what| due.push(what));
            if let Alloc::Got(n, _) = taken {
                let mut truth = self.truth();
                assert!(truth.used.insert(n), "cluster {n} is handed out twice");
                assert!(n < truth.end, "cluster {n} lies behind the end {}", truth.end);
                assert!(!truth.stale.contains(&n), "cluster {n} holds old data");
                assert!(n >= reserved, "cluster {n} is reserved");
            }
            for due in due {
                let rig = self.clone();
                let syncer = thread::spawn(move || rig.carry_out(due));
                self.syncers.lock().expect("no panic").push(syncer);
            }
            match taken {
                Alloc::Got(n, _) => return Some(n),
                Alloc::Full(_) => return None,
                Alloc::Wait => heard.recv().expect("a waiter is woken"),
            }
        }
    }

    /// Gives a cluster back: untouched, with data in it, or freed by a durable BAT page.
    fn give(&self, n: u64, how: u64) {
        let mut truth = self.truth();
        truth.used.remove(&n);
        if how != 0 {
            truth.stale.insert(n);
        }
        drop(truth);
        match how {
            0 => self.alloc.put_back(n),
            1 => self.alloc.give_back(n),
            _ => self.alloc.freed(&[n], false),
        }
    }
}

fn takers(rig: &Arc<Rig>) {
    let threads: Vec<_> = (0..3)
        .map(|how| {
            let rig = rig.clone();
            thread::spawn(move || {
                let kept = rig.take();
                if let Some(n) = rig.take() {
                    rig.give(n, how);
                }
                kept
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
}

fn taking_and_giving() {
    let rig = Rig::new();
    takers(&rig);
    // What is being scrubbed counts as used.
    for syncer in std::mem::take(&mut *rig.syncers.lock().expect("no panic")) {
        syncer.join().expect("no panic");
    }
    let used = rig.truth().used.len() as u64;
    assert_eq!(rig.alloc.used(), used, "what is not free is in use");
    // Nothing was lost: all that the format has can still be had.
    let more = std::iter::from_fn(|| rig.take()).count() as u64;
    assert_eq!(used + more, LIMIT);
}

fn reserving_meanwhile() {
    let rig = Rig::new();
    let other = rig.clone();
    let grow = thread::spawn(move || {
        other.alloc.reserve(RESERVED);
        other.truth().reserved = RESERVED;
    });
    takers(&rig);
    grow.join().expect("no panic");
    while let Some(n) = rig.take() {
        assert!(n >= RESERVED);
    }
}

#[test]
fn a_cluster_is_handed_out_once_inside_the_file_and_clean() {
    explore(15_000, taking_and_giving);
}

#[test]
fn a_reserved_cluster_is_handed_out_to_nobody() {
    explore(10_000, reserving_meanwhile);
}

#[test]
fn a_waiter_that_comes_too_late_is_found() {
    finds(Bug::LetGoBeforeWaiting, 20_000, taking_and_giving);
}
