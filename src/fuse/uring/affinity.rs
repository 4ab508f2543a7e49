//! Where the thread of a queue runs.
//!
//! On the CPU of its queue it has the submitter's caches, and is woken without a call to another CPU: best for one request
//! at a time, and where all CPUs have requests of their own. But a single submitter with many requests under way shares
//! that one CPU with it, and the others stand idle: then it may run anywhere. Measured on 2 CPUs (bare pass-through), bound :
//! free: 4k reads QD1 56k : 17k, QD4 126k : 86k, QD8 147k : 217k, QD32 179k : 307k, 4 jobs x QD16 360k : 279k; with the rule
//! below the better one of each.

use rustix::thread::CpuSet;

/// How many batches are looked at together: some milliseconds under load.
const LOOK: u32 = 128;
/// Every so many batches it is looked at the other queues, which on a large machine are many.
const SAMPLE: u32 = 8;
/// From so many requests in a batch, on average, many are under way, and a bound thread is freed; a free one is bound
/// again below half of that, so that it does not go back and forth.
const DEEP: u32 = 4;

/// The rule, and what it has seen since it last decided.
pub(super) struct Affinity {
    /// The CPU of the queue, and all that we may use.
    own: Option<CpuSet>,
    all: Option<CpuSet>,
    bound: bool,
    batches: u32,
    requests: u32,
    /// Samples in which another queue was being served too.
    accompanied: u32,
}

impl Affinity {
    /// Binds the calling thread to `cpu`. None: it is left where it is, now and later. Without `all` it stays bound.
    pub(super) fn new(cpu: Option<usize>, all: Option<CpuSet>) -> Affinity {
        let own = cpu.filter(|cpu| *cpu < CpuSet::MAX_CPU).map(|cpu| {
            let mut own = CpuSet::new();
            own.set(cpu);
            own
        });
        let mut affinity = Affinity { own, all, bound: false, batches: 0, requests: 0, accompanied: 0 };
        affinity.bind(true);
        affinity
    }

    /// The thread was woken, and has so many requests: those that came, and those that wait for the disk. `others`: whether
    /// another queue is being served just now.
    pub(super) fn saw(&mut self, requests: usize, others: impl FnOnce() -> bool) {
        // Only a call.
        if requests == 0 {
            return;
        }
        self.batches += 1;
        self.requests = self.requests.saturating_add(requests as u32);
        if self.batches.is_multiple_of(SAMPLE) {
            self.accompanied += u32::from(others());
        }
        if self.batches == LOOK {
            let bound = self.decide();
            if bound != self.bound {
                self.bind(bound);
            }
            (self.batches, self.requests, self.accompanied) = (0, 0, 0);
        }
    }

    /// Whether to be bound.
    fn decide(&self) -> bool {
        // Measured, of 16 samples: none with one submitter, mostly 3 to 8 with two or four (1 to 12).
        let (depth, company) = if self.bound { (DEEP, 0) } else { (DEEP / 2, 1) };
        let alone = self.accompanied <= company;
        let deep = self.requests / self.batches >= depth;
        !(alone && deep)
    }

    /// Does something on the CPU of the queue.
    pub(super) fn at_home(&self, act: &mut dyn FnMut()) {
        if !self.bound {
            self.run_on(true);
        }
        act();
        if !self.bound {
            self.run_on(false);
        }
    }

    fn bind(&mut self, bound: bool) {
        self.run_on(bound);
        self.bound = bound;
    }

    fn run_on(&self, bound: bool) {
        let cpus = if bound { self.own } else { self.own.and(self.all) };
        let Some(cpus) = cpus else { return };
        if let Err(e) = rustix::thread::sched_setaffinity(None, &cpus) {
            // Outside of the CPUs that we may use, perhaps: it works from any.
            log::debug!("cannot choose a queue's CPU: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not on a CPU that a test could not have.
    fn affinity(bound: bool) -> Affinity {
        Affinity { own: None, all: None, bound, batches: 0, requests: 0, accompanied: 0 }
    }

    /// What is decided after `count` batches of `size` requests.
    fn decided(bound: bool, size: u32, accompanied: u32) -> bool {
        Affinity { batches: LOOK, requests: size * LOOK, accompanied, ..affinity(bound) }.decide()
    }

    #[test]
    fn a_single_deep_submitter_frees_the_thread_and_company_or_a_shallow_one_binds_it() {
        assert!(!decided(true, 8, 0));
        assert!(decided(true, 1, 0) && decided(true, 3, 0), "shallow");
        assert!(decided(true, 8, 1) && decided(false, 8, 5), "company");
        assert!(decided(false, 1, 0));
    }

    #[test]
    fn what_is_neither_here_nor_there_leaves_it_where_it_is() {
        assert!(decided(true, 3, 0) && !decided(false, 3, 0));
        assert!(decided(true, 8, 1) && !decided(false, 8, 1));
    }

    #[test]
    fn calls_without_requests_are_no_batches() {
        let mut affinity = affinity(true);
        (0..1000).for_each(|_| affinity.saw(0, || unreachable!("nothing to decide")));
        assert_eq!(affinity.batches, 0);
    }

    #[test]
    fn after_each_look_it_counts_anew() {
        let mut affinity = affinity(true);
        let mut samples = 0;
        for _ in 0..LOOK {
            affinity.saw(2, || {
                samples += 1;
                true
            });
        }
        assert_eq!(
            (samples, affinity.batches, affinity.requests, affinity.accompanied),
            (LOOK / SAMPLE, 0, 0, 0)
        );
    }
}
