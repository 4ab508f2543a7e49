//! One thread that runs short callbacks at a given time: BAT deadlines, full timeouts, probes for space.
//! It starts with the engine, or the first timer, and sleeps without wake-ups while there is none.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::time::Instant;

use super::runner::Job;
use crate::io::process;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, thread, wait, wait_timeout};

/// The timers of one engine; dropped with it, and the thread ends.
#[derive(Default)]
pub(super) struct Clock {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Protects the heap. A leaf.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    due: BinaryHeap<Reverse<Timer>>,
    running: bool,
    stopped: bool,
    /// Breaks ties: first armed, first run.
    armed: u64,
}

struct Timer {
    at: Instant,
    order: u64,
    job: Job,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Timer) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Timer) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Timer) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl Clock {
    /// Starts the thread, where a refusal can still be answered.
    pub(super) fn start(&self) -> io::Result<()> {
        let state = lock(&self.shared.state);
        if state.running { Ok(()) } else { self.spawn(state) }
    }

    /// Runs `job` at `at`, on the clock's thread: it must only start work, not do it.
    pub(super) fn at(&self, at: Instant, job: Job) {
        let mut state = lock(&self.shared.state);
        let order = state.armed;
        state.armed += 1;
        state.due.push(Reverse(Timer { at, order, job }));
        if state.running {
            drop(state);
            self.shared.wake.notify_one();
        } else if let Err(e) = self.spawn(state) {
            log::error!("cannot start the clock thread: {e}; what is timed waits for the next timer");
        }
    }

    fn spawn(&self, mut state: MutexGuard<'_, State>) -> io::Result<()> {
        state.running = true;
        drop(state);
        let shared = Arc::clone(&self.shared);
        let body = move || {
            process::run_anywhere();
            shared.serve();
        };
        let started = thread::Builder::new().name("ploopfs/clock".into()).spawn(body).map(drop);
        if started.is_err() {
            lock(&self.shared.state).running = false;
        }
        started
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        lock(&self.shared.state).stopped = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = lock(&self.state);
        while !state.stopped {
            let now = Instant::now();
            let next = state.due.peek().map(|Reverse(t)| t.at);
            state = match next {
                Some(at) if at <= now => {
                    let Some(Reverse(timer)) = state.due.pop() else { continue };
                    drop(state);
                    (timer.job)();
                    lock(&self.state)
                }
                Some(at) => wait_timeout(&self.wake, state, at - now).0,
                None => wait(&self.wake, state),
            };
        }
    }
}
