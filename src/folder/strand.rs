//! Jobs of one image, one after another and in order, on threads that may block.
//!
//! A mutex held over an open or a close would let every further opener of a slow image keep a thread of the
//! engine waiting; a strand keeps them in a list instead, and takes one thread however many wait.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::sync::plain::lock;

/// What is queued.
pub(super) type Job = Box<dyn FnOnce() + Send>;
/// Runs a job on a thread that may block; returns at once.
pub(super) type Spawn = Arc<dyn Fn(Job) + Send + Sync>;

/// A list of jobs that run one at a time, first come first served.
pub(super) struct Strand {
    spawn: Spawn,
    /// Protects the list. A leaf: nothing is locked and no job runs while it is held.
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// True while a thread works on the list.
    running: bool,
}

impl Strand {
    /// An idle strand whose jobs run through `spawn`.
    pub(super) fn new(spawn: Spawn) -> Arc<Strand> {
        Arc::new(Strand { spawn, queue: Mutex::default() })
    }

    /// Runs `job` after all that were submitted before. Never blocks.
    pub(super) fn submit(self: &Arc<Self>, job: Job) {
        let mut queue = self.lock();
        queue.jobs.push_back(job);
        if std::mem::replace(&mut queue.running, true) {
            return;
        }
        drop(queue);
        let strand = self.clone();
        (self.spawn)(Box::new(move || strand.work()));
    }

    fn work(&self) {
        // A job that panics must not end the strand: the image could never be closed again.
        let guard = Restart(self);
        loop {
            let mut queue = self.lock();
            let Some(job) = queue.jobs.pop_front() else {
                queue.running = false;
                drop(queue);
                break std::mem::forget(guard);
            };
            drop(queue);
            job();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

/// Dropped only by a panicking job: lets the next `submit` start a new thread.
struct Restart<'a>(&'a Strand);

impl Drop for Restart<'_> {
    fn drop(&mut self) {
        self.0.lock().running = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    fn threads() -> (Spawn, Arc<AtomicUsize>) {
        let started = Arc::new(AtomicUsize::new(0));
        let count = started.clone();
        let spawn: Spawn = Arc::new(move |job| {
            count.fetch_add(1, Ordering::SeqCst);
            thread::spawn(job);
        });
        (spawn, started)
    }

    #[test]
    fn jobs_run_in_order_and_never_two_at_once() {
        let (spawn, _) = threads();
        let strand = Strand::new(spawn);
        let (send, receive) = mpsc::channel();
        let inside = Arc::new(AtomicUsize::new(0));
        for i in 0..100 {
            let (send, inside) = (send.clone(), inside.clone());
            strand.submit(Box::new(move || {
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                send.send(i).expect("the test waits");
            }));
        }
        let order: Vec<i32> = receive.iter().take(100).collect();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn many_waiting_jobs_take_one_thread() {
        let (spawn, started) = threads();
        let strand = Strand::new(spawn);
        let (open, gate) = mpsc::channel::<()>();
        let (send, receive) = mpsc::channel();
        strand.submit(Box::new(move || gate.recv().expect("the test opens the gate")));
        for _ in 0..50 {
            let send = send.clone();
            strand.submit(Box::new(move || send.send(()).expect("the test waits")));
        }
        open.send(()).expect("the first job waits");
        assert_eq!(receive.iter().take(50).count(), 50);
        assert_eq!(started.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_panicking_job_does_not_stop_the_next() {
        let (spawn, _) = threads();
        let strand = Strand::new(spawn);
        let (send, receive) = mpsc::channel();
        let (failed, seen) = mpsc::channel::<()>();
        strand.submit(Box::new(move || {
            let _told = failed;
            panic!("on purpose");
        }));
        assert!(seen.recv().is_err());
        // The thread is on its way out of the panic; whichever comes first, a later submit finds a runner.
        while receive.try_recv().is_err() {
            let send = send.clone();
            strand.submit(Box::new(move || send.send(()).expect("the test waits")));
            thread::yield_now();
        }
    }
}
