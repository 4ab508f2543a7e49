//! Pools of named threads that execute pios (and, in pools of their own, sync rounds and opens).
//!
//! Work is queued in lanes, one per image: lanes take turns, and no lane may hold more than its share of the
//! threads, so that one image cannot starve the others (DESIGN.md 4.4). Threads come with work and go when idle:
//! an idle mount costs none.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::io::process;
use crate::sync::{Arc, Condvar, Mutex, lock, thread};

/// A piece of work. It may block on the host, never on work that another job of the same pool must do.
pub type Job = Box<dyn FnOnce() + Send>;

/// How long a thread stays without work; long enough to bridge the gaps of a bursty guest.
const LINGER: Duration = Duration::from_secs(5);

/// A pool of threads.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    max_threads: usize,
    max_per_lane: usize,
    /// Protects the queues and the thread counts. A leaf: nothing else is locked under it.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    lanes: HashMap<u64, Lane>,
    /// Lanes with work that may take one more thread, in turn.
    ready: VecDeque<u64>,
    threads: usize,
    /// Threads that sleep and that no `submit` has claimed yet.
    idle: usize,
    /// Threads claimed by a `submit` and not yet awake. Were they still counted as idle, a second job that comes
    /// before they wake would get no thread of its own and wait behind the first, however long that blocks.
    claimed: usize,
    /// Numbers the threads' names.
    born: usize,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Job>,
    running: usize,
    listed: bool,
}

impl Pool {
    /// A pool whose threads are called `name0`, `name1`, ...; a lane holds at most `max_per_lane` of them.
    pub fn new(name: &'static str, max_threads: usize, max_per_lane: usize) -> Pool {
        let shared = Shared {
            name,
            max_threads: max_threads.max(1),
            max_per_lane: max_per_lane.max(1),
            state: Mutex::default(),
            wake: Condvar::new(),
        };
        Pool { shared: Arc::new(shared) }
    }

    /// Queues `job` in `lane` (an image's id).
    pub fn submit(&self, lane: u64, job: Job) {
        let mut state = lock(&self.shared.state);
        state.lanes.entry(lane).or_default().queue.push_back(job);
        state.list(lane, self.shared.max_per_lane);
        if state.idle > 0 {
            state.idle -= 1;
            state.claimed += 1;
            drop(state);
            self.shared.wake.notify_one();
        } else if state.threads < self.shared.max_threads {
            state.threads += 1;
            let number = state.born;
            state.born += 1;
            drop(state);
            self.spawn(number);
        }
    }

    fn spawn(&self, number: usize) {
        let shared = Arc::clone(&self.shared);
        let name = format!("{}{}", self.shared.name, number % 1000);
        if let Err(e) = thread::Builder::new().name(name).spawn(move || {
            process::run_anywhere();
            shared.serve();
        }) {
            // The job stays queued for the threads that live; without any, the next submit tries again.
            log::error!("cannot start a thread {}: {e}", self.shared.name);
            lock(&self.shared.state).threads -= 1;
        }
    }
}

impl State {
    /// Puts a lane that has work and a free share among the ready ones.
    fn list(&mut self, id: u64, share: usize) {
        if let Some(lane) = self.lanes.get_mut(&id)
            && !lane.listed
            && !lane.queue.is_empty()
            && lane.running < share
        {
            lane.listed = true;
            self.ready.push_back(id);
        }
    }

    /// Takes the next job of the next lane.
    fn take(&mut self, share: usize) -> Option<(u64, Job)> {
        let id = self.ready.pop_front()?;
        let lane = self.lanes.get_mut(&id)?;
        lane.listed = false;
        let job = lane.queue.pop_front()?;
        lane.running += 1;
        self.list(id, share);
        Some((id, job))
    }

    fn finished(&mut self, id: u64, share: usize) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.running -= 1;
            if lane.running == 0 && lane.queue.is_empty() {
                self.lanes.remove(&id);
            } else {
                self.list(id, share);
            }
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some((lane, job)) = state.take(self.max_per_lane) {
                drop(state);
                // A panic in a job must not take the thread's place in the counts with it.
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                    log::error!("a job of {} panicked; its request will not be answered", self.name);
                }
                state = lock(&self.state);
                state.finished(lane, self.max_per_lane);
                continue;
            }
            state.idle += 1;
            let (next, timeout) =
                self.wake.wait_timeout(state, LINGER).unwrap_or_else(std::sync::PoisonError::into_inner);
            state = next;
            // Whichever sleeper wakes takes the claim: threads are all alike.
            if state.claimed > 0 {
                state.claimed -= 1;
            } else {
                state.idle -= 1;
            }
            if timeout.timed_out() && state.ready.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Instant;

    #[test]
    fn a_lane_holds_at_most_its_share_and_others_go_on() {
        let pool = Pool::new("test/a", 4, 2);
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let held = Arc::new(AtomicUsize::new(0));
        for _ in 0..6 {
            let (gate, held) = (Arc::clone(&gate), Arc::clone(&held));
            pool.submit(
                1,
                Box::new(move || {
                    held.fetch_add(1, Ordering::SeqCst);
                    let _ = lock(&gate).recv();
                }),
            );
        }
        let (tx, rx) = mpsc::channel();
        pool.submit(2, Box::new(move || tx.send(()).expect("the test waits")));
        rx.recv_timeout(Duration::from_secs(10)).expect("lane 2 runs while lane 1 blocks");
        assert!(held.load(Ordering::SeqCst) <= 2);
        for _ in 0..6 {
            release.send(()).expect("jobs wait");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while held.load(Ordering::SeqCst) < 6 {
            assert!(Instant::now() < deadline, "all jobs of lane 1 run in the end");
            thread::yield_now();
        }
    }

    #[test]
    fn two_jobs_that_find_one_sleeping_thread_run_side_by_side() {
        let pool = Pool::new("test/c", 4, 4);
        for _ in 0..50 {
            let (tx, rx) = mpsc::channel();
            pool.submit(1, Box::new(move || tx.send(()).expect("the test waits")));
            rx.recv_timeout(Duration::from_secs(10)).expect("a thread is there");
            let deadline = Instant::now() + Duration::from_secs(10);
            let all_sleep = || {
                let state = lock(&pool.shared.state);
                state.idle == state.threads
            };
            while !all_sleep() {
                assert!(Instant::now() < deadline, "every thread goes to sleep");
                thread::yield_now();
            }
            // As many as sleep, and one more: each job ends only when all have begun.
            let count = lock(&pool.shared.state).idle.min(3) + 1;
            let meet = Arc::new(std::sync::Barrier::new(count + 1));
            let (tx, rx) = mpsc::channel();
            let watcher = Arc::clone(&meet);
            thread::spawn(move || {
                watcher.wait();
                let _ = tx.send(());
            });
            for _ in 0..count {
                let meet = Arc::clone(&meet);
                pool.submit(
                    1,
                    Box::new(move || {
                        meet.wait();
                    }),
                );
            }
            rx.recv_timeout(Duration::from_secs(10)).expect("no job waits behind another");
        }
    }

    #[test]
    fn a_panicking_job_leaves_the_pool_working() {
        let pool = Pool::new("test/b", 1, 1);
        pool.submit(1, Box::new(|| panic!("on purpose")));
        let (tx, rx) = mpsc::channel();
        pool.submit(1, Box::new(move || tx.send(()).expect("the test waits")));
        rx.recv_timeout(Duration::from_secs(10)).expect("the next job runs");
    }
}
