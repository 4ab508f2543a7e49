//! The gate: closed means empty, and each visitor is let in or refused.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use super::{explore, finds};
use crate::sync::mpsc::{Sender, channel};
use crate::sync::{Arc, Bug, thread};
use crate::vdisk::gate::{Gate, Inside};

/// What is observed, in types that are no steps of the model.
#[derive(Default)]
struct Rig {
    gate: Gate,
    inside: AtomicI64,
    frozen: AtomicBool,
    /// Closed for good; no visitor waits outside any more.
    closed: AtomicBool,
}

impl Rig {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn leave(&self, inside: Inside, count: i64) {
        assert!(!self.frozen.load(Ordering::SeqCst), "inside while it is frozen");
        self.inside.fetch_sub(count, Ordering::SeqCst);
        self.gate.leave(inside);
    }

    /// A request of two pios, one of which starts work of its own. Outside it waits, as `Image::outside` has it.
    fn visit(self: &Arc<Self>, reply: Sender<bool>) {
        let Some(mut inside) = self.gate.enter(2) else {
            if self.is_closed() {
                let _ = reply.send(false);
                return;
            }
            let again = self.clone();
            if let Some(job) = self.gate.wait(Box::new(move || again.visit(reply))) {
                thread::spawn(job);
            }
            if self.is_closed() {
                self.gate.take_outside().into_iter().for_each(|job| drop(thread::spawn(job)));
            }
            return;
        };
        self.inside.fetch_add(2, Ordering::SeqCst);
        let one = inside.split();
        let rig = self.clone();
        thread::spawn(move || {
            let companion = rig.gate.enter_with(&one);
            rig.inside.fetch_add(1, Ordering::SeqCst);
            rig.leave(one, 1);
            rig.leave(companion, 1);
        });
        self.leave(inside, 1);
        let _ = reply.send(true);
    }

    fn freeze(&self) {
        self.gate.close();
        self.frozen.store(true, Ordering::SeqCst);
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "closed, and not empty");
        thread::yield_now();
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "a visitor came in");
    }

    fn thaw(&self) {
        self.frozen.store(false, Ordering::SeqCst);
        self.gate.open().into_iter().for_each(|job| drop(thread::spawn(job)));
    }
}

fn visitors(rig: &Arc<Rig>, count: usize, reply: &Sender<bool>) {
    for _ in 0..count {
        let (rig, reply) = (rig.clone(), reply.clone());
        thread::spawn(move || rig.visit(reply));
    }
}

fn freeze_and_thaw() {
    let rig = Arc::new(Rig::default());
    let (reply, heard) = channel();
    visitors(&rig, 3, &reply);
    for _ in 0..2 {
        rig.freeze();
        rig.thaw();
    }
    (0..3).for_each(|_| assert!(heard.recv().expect("let in"), "it was not closed for good"));
}

fn freeze_against_shut() {
    let rig = Arc::new(Rig::default());
    let (reply, heard) = channel();
    visitors(&rig, 2, &reply);
    let other = rig.clone();
    let frozen = thread::spawn(move || {
        other.gate.close();
        other.gate.open().into_iter().for_each(|job| drop(thread::spawn(job)));
    });
    rig.gate.shut();
    assert_eq!(rig.inside.load(Ordering::SeqCst), 0, "shut, and not empty");
    rig.closed.store(true, Ordering::SeqCst);
    rig.gate.take_outside().into_iter().for_each(|job| drop(thread::spawn(job)));
    for _ in 0..2 {
        heard.recv().expect("let in or refused");
    }
    frozen.join().expect("no panic");
    assert!(rig.gate.enter(1).is_none(), "a thaw opened what is shut");
}

#[test]
fn a_closed_gate_is_empty_and_everyone_outside_comes_in_later() {
    explore(15_000, freeze_and_thaw);
}

#[test]
fn a_gate_that_is_shut_stays_so_and_everyone_is_told() {
    explore(15_000, freeze_against_shut);
}

#[test]
fn a_closer_that_misses_the_last_one_out_is_found() {
    finds(Bug::WakeWithoutMutex, 20_000, freeze_and_thaw);
}
