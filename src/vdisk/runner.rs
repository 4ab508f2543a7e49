//! Pools of named threads that execute pios (and, in pools of their own, sync rounds and opens).
//!
//! Work is queued in lanes, one per image: lanes take turns, and no lane may hold more than its share of the
//! threads, so that one image cannot starve the others (docs/design.md#threads). Threads come with work and go when
//! idle, but for one, which [`Pool::start`] makes: it takes what no other thread can be had for, so that a limit of
//! threads that is reached later (a pids cgroup, TasksMax=) makes work slow, and never leaves it lying.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::time::Duration;

use crate::io::process;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, thread, wait_timeout};

/// A piece of work. It may block on the host, never on work that another job of the same pool must do.
pub type Job = Box<dyn FnOnce() + Send>;

/// How long a thread stays without work; long enough to bridge the gaps of a bursty guest.
const LINGER: Duration = Duration::from_secs(5);

/// A pool of threads. Dropping it ends them when the queue is empty.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    max_threads: usize,
    max_per_lane: usize,
    /// Protects the queues and the thread counts. A leaf: nothing else is locked under it.
    state: Mutex<State>,
    wake: Condvar,
    /// The system has no thread any more.
    #[cfg(test)]
    refuses: crate::sync::AtomicBool,
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
    /// Threads that stay without work: 0 before [`Pool::start`], then 1.
    kept: usize,
    /// A thread could not be had; said once.
    short: bool,
    /// The pool is gone: threads end as soon as nothing is queued.
    ended: bool,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Job>,
    running: usize,
    listed: bool,
}

impl Pool {
    /// A pool whose threads are called `name0`, `name1`, ...; a lane holds at most `max_per_lane` of them.
    pub(super) fn new(name: &'static str, max_threads: usize, max_per_lane: usize) -> Pool {
        let shared = Shared {
            name,
            max_threads: max_threads.max(1),
            max_per_lane: max_per_lane.max(1),
            state: Mutex::default(),
            wake: Condvar::new(),
            #[cfg(test)]
            refuses: false.into(),
        };
        Pool { shared: Arc::new(shared) }
    }

    /// Makes the thread that stays. To be called where a refusal can still be answered: before the first job.
    pub(super) fn start(&self) -> io::Result<()> {
        let mut state = lock(&self.shared.state);
        if std::mem::replace(&mut state.kept, 1) > 0 {
            return Ok(());
        }
        let number = state.bear();
        drop(state);
        let started = self.spawn(number);
        if started.is_err() {
            let mut state = lock(&self.shared.state);
            state.threads -= 1;
            state.kept = 0;
        }
        started
    }

    /// Queues `job` in `lane` (an image's id). Without any thread, and with none to be had, the caller runs what is
    /// queued: only a pool that was never started comes to this.
    pub(super) fn submit(&self, lane: u64, job: Job) {
        let mut state = lock(&self.shared.state);
        state.lanes.entry(lane).or_default().queue.push_back(job);
        state.list(lane, self.shared.max_per_lane);
        if state.idle > 0 {
            state.idle -= 1;
            state.claimed += 1;
            drop(state);
            self.shared.wake.notify_one();
        } else if state.threads < self.shared.max_threads {
            let number = state.bear();
            drop(state);
            if let Err(e) = self.spawn(number) {
                self.shared.go_on_without(&e);
            }
        }
    }

    fn spawn(&self, number: usize) -> io::Result<()> {
        #[cfg(test)]
        if self.shared.refuses.load(crate::sync::Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let shared = Arc::clone(&self.shared);
        let name = format!("{}{}", self.shared.name, number % 1000);
        let body = move || {
            process::run_anywhere();
            shared.serve();
        };
        thread::Builder::new().name(name).spawn(body).map(drop)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.wake.notify_all();
    }
}

impl State {
    /// Counts a thread that is about to start; its number.
    fn bear(&mut self) -> usize {
        self.threads += 1;
        self.born += 1;
        self.born - 1
    }

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
        let mut state = self.work(lock(&self.state));
        loop {
            if state.ended {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let (next, timeout) = wait_timeout(&self.wake, state, LINGER);
            state = next;
            // Whichever sleeper wakes takes the claim: threads are all alike.
            if state.claimed > 0 {
                state.claimed -= 1;
            } else {
                state.idle -= 1;
            }
            if timeout.timed_out() && state.ready.is_empty() && state.threads > state.kept {
                state.threads -= 1;
                return;
            }
            state = self.work(state);
        }
    }

    /// Runs what is queued until nothing is ready.
    fn work<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while let Some((lane, job)) = state.take(self.max_per_lane) {
            drop(state);
            // A panic in a job must not take the thread's place in the counts with it.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                log::error!("a job of {} panicked; its request will not be answered", self.name);
            }
            state = lock(&self.state);
            state.finished(lane, self.max_per_lane);
        }
        state
    }

    /// No thread could be had for what was queued just now. The threads that there are take it when they are through;
    /// where there is none, the calling thread does.
    fn go_on_without(&self, e: &io::Error) {
        let mut state = lock(&self.state);
        if state.threads > 1 {
            state.threads -= 1;
            if !std::mem::replace(&mut state.short, true) {
                drop(state);
                log::warn!("cannot start one more thread {}: {e}; work waits for those there are", self.name);
            }
            return;
        }
        // This thread stands for the one that was counted.
        let mut state = self.work(state);
        state.threads -= 1;
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

    fn refusing(pool: &Pool) {
        pool.shared.refuses.store(true, Ordering::SeqCst);
    }

    #[test]
    fn work_for_which_no_thread_can_be_had_is_done_by_the_one_that_stays() {
        let pool = Pool::new("test/d", 4, 2);
        pool.start().expect("a thread");
        refusing(&pool);
        let (release, gate) = mpsc::channel::<()>();
        pool.submit(1, Box::new(move || gate.recv().expect("the test goes on")));
        let (tx, rx) = mpsc::channel();
        for lane in [1, 2, 2] {
            let tx = tx.clone();
            pool.submit(lane, Box::new(move || tx.send(thread::current().id()).expect("the test waits")));
        }
        assert!(rx.recv_timeout(Duration::from_millis(20)).is_err(), "the only thread is busy");
        release.send(()).expect("it waits");
        for _ in 0..3 {
            let thread = rx.recv_timeout(Duration::from_secs(10)).expect("none is left lying");
            assert_ne!(thread, thread::current().id());
        }
    }

    #[test]
    fn without_any_thread_the_submitter_does_the_work() {
        let pool = Pool::new("test/e", 4, 2);
        refusing(&pool);
        let (tx, rx) = mpsc::channel();
        pool.submit(1, Box::new(move || tx.send(()).expect("the test waits")));
        rx.try_recv().expect("done when submit returns");
        pool.start().expect_err("no thread is to be had");
        pool.shared.refuses.store(false, Ordering::SeqCst);
        pool.start().expect("a thread");
        assert_eq!(lock(&pool.shared.state).threads, 1);
    }

    #[test]
    fn threads_end_with_their_pool() {
        let pool = Pool::new("test/f", 4, 2);
        pool.start().expect("a thread");
        let (tx, rx) = mpsc::channel();
        pool.submit(1, Box::new(move || tx.send(()).expect("the test waits")));
        rx.recv_timeout(Duration::from_secs(10)).expect("the job runs");
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        let deadline = Instant::now() + Duration::from_secs(3);
        while shared.strong_count() > 0 {
            assert!(Instant::now() < deadline, "long before they would go by themselves");
            thread::yield_now();
        }
    }
}
