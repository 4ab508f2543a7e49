//! Cluster locks: shared for reads and writes in place, exclusive for allocation, COW and discard.
//!
//! No waiter holds a thread: what cannot have its lock is queued on it, first come first served, and is handed to
//! a runner together with the lock. There is no upgrade (two upgraders would wait for each other): release, queue
//! for exclusive, look up again.
//!
//! Locks are stripes: cluster `c` uses stripe `c % STRIPES`, without hashing, so that neighbours never share one.
//! Two far clusters on one stripe merely wait for each other. A holder of one stripe may *try* for more
//! (neighbours, fewer than `STRIPES`), but never queues while it holds any: so no cycle can form.

use std::collections::VecDeque;

use super::runner::Job;
use crate::sync::{AtomicU32, Bug, Mutex, Ordering, lock, planted};

/// Stripes of an image: many times the pios that can be in flight (64 per loop device and more), few enough to
/// be allocated with the image (1024 * 48 bytes).
pub const STRIPES: u64 = 1024;

const EXCLUSIVE: u32 = 1 << 31;
/// The queue is not empty: newcomers queue behind it, so that a stream of readers cannot starve a writer.
const WAITERS: u32 = 1 << 30;
const SHARED: u32 = WAITERS - 1;

/// How a cluster is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Together with other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

struct Waiter {
    mode: LockMode,
    job: Job,
}

#[derive(Default)]
struct Stripe {
    /// Holders and the two flags above.
    word: AtomicU32,
    /// The waiters, in order. Taken only when one waits or has to. A leaf.
    queue: Mutex<VecDeque<Waiter>>,
}

/// The locks of one image.
pub struct ClusterLocks {
    stripes: Box<[Stripe]>,
}

impl Default for ClusterLocks {
    fn default() -> ClusterLocks {
        ClusterLocks { stripes: (0..STRIPES).map(|_| Stripe::default()).collect() }
    }
}

impl ClusterLocks {
    fn stripe(&self, cluster: u64) -> &Stripe {
        &self.stripes[(cluster % STRIPES) as usize]
    }

    /// Takes the lock if no holder or waiter is in the way.
    pub fn try_lock(&self, cluster: u64, mode: LockMode) -> bool {
        self.stripe(cluster).try_lock(mode, WAITERS)
    }

    /// Takes the lock now and gives `token` back, or queues `job(token)`, which starts with the lock held: the
    /// [`unlock`](Self::unlock) that hands the lock over gives it to a runner.
    pub fn lock_or_queue<T>(
        &self,
        cluster: u64,
        mode: LockMode,
        token: T,
        job: impl FnOnce(T) -> Job,
    ) -> Option<T> {
        let stripe = self.stripe(cluster);
        if stripe.try_lock(mode, WAITERS) {
            return Some(token);
        }
        let mut queue = lock(&stripe.queue);
        // From here on every unlock sees the flag and comes for the mutex; one that came just before it has
        // changed the word, which the second try sees. Either way no waiter sleeps for ever.
        stripe.word.fetch_or(WAITERS, Ordering::SeqCst);
        if queue.is_empty() && !planted(Bug::NoSecondTry) && stripe.try_lock(mode, 0) {
            stripe.word.fetch_and(!WAITERS, Ordering::SeqCst);
            return Some(token);
        }
        queue.push_back(Waiter { mode, job: job(token) });
        None
    }

    /// Gives the lock back. `granted` receives every job that now holds the lock, to be submitted.
    pub fn unlock(&self, cluster: u64, mode: LockMode, granted: impl FnMut(Job)) {
        let stripe = self.stripe(cluster);
        let before = match mode {
            LockMode::Shared => stripe.word.fetch_sub(1, Ordering::SeqCst),
            LockMode::Exclusive => stripe.word.fetch_and(!EXCLUSIVE, Ordering::SeqCst),
        };
        let last = mode == LockMode::Exclusive || before & SHARED == 1;
        if before & WAITERS != 0 && last {
            stripe.hand_over(granted);
        }
    }
}

impl Stripe {
    /// Takes the lock unless a holder or one of `flags` is in the way.
    fn try_lock(&self, mode: LockMode, flags: u32) -> bool {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let (blocked, next) = match mode {
                LockMode::Shared => (word & (EXCLUSIVE | flags) != 0, word + 1),
                LockMode::Exclusive => (word & (EXCLUSIVE | SHARED | flags) != 0, word | EXCLUSIVE),
            };
            if blocked {
                return false;
            }
            match self.word.compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
    }

    /// Gives the lock to the head of the queue, and to every shared waiter directly behind a shared one.
    fn hand_over(&self, mut granted: impl FnMut(Job)) {
        let mut ready = Vec::new();
        let mut queue = lock(&self.queue);
        while let Some(head) = queue.front() {
            if !self.try_lock(head.mode, 0) {
                break;
            }
            if let Some(waiter) = queue.pop_front() {
                ready.push(waiter.job);
            }
        }
        if queue.is_empty() {
            self.word.fetch_and(!WAITERS, Ordering::SeqCst);
        }
        drop(queue);
        ready.into_iter().for_each(&mut granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{Arc, AtomicU64};
    use crate::vdisk::runner::Pool;

    #[test]
    fn a_shared_request_queues_behind_a_waiting_exclusive_one() {
        let locks = ClusterLocks::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let note = |what: &'static str| -> Job {
            let order = Arc::clone(&order);
            Box::new(move || lock(&order).push(what))
        };
        let queue = |mode, what| locks.lock_or_queue(7, mode, what, note).is_none();
        assert!(!queue(LockMode::Shared, "at once"));
        assert!(queue(LockMode::Exclusive, "exclusive"));
        assert!(!locks.try_lock(7, LockMode::Shared), "a newcomer does not overtake");
        assert!(queue(LockMode::Shared, "shared 1"));
        assert!(queue(LockMode::Shared, "shared 2"));
        locks.unlock(7, LockMode::Shared, |job| job());
        assert_eq!(*lock(&order), ["exclusive"]);
        locks.unlock(7, LockMode::Exclusive, |job| job());
        assert_eq!(*lock(&order), ["exclusive", "shared 1", "shared 2"]);
        locks.unlock(7, LockMode::Shared, |job| job());
        locks.unlock(7, LockMode::Shared, |job| job());
        assert!(locks.try_lock(7, LockMode::Exclusive));
    }

    #[test]
    fn neighbours_do_not_share_a_stripe() {
        let locks = ClusterLocks::default();
        for cluster in 100..100 + STRIPES {
            assert!(locks.try_lock(cluster, LockMode::Exclusive));
        }
        assert!(!locks.try_lock(100, LockMode::Shared));
    }

    #[test]
    fn exclusive_sections_never_overlap_under_contention() {
        let locks = Arc::new(ClusterLocks::default());
        let (value, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        const ROUNDS: u64 = 20_000;
        let pool = Arc::new(Pool::new("test/l", 4, 4));
        type Shared = (Arc<ClusterLocks>, Arc<AtomicU64>, Arc<AtomicU64>, Arc<Pool>);
        fn section((locks, value, done, pool): &Shared, mode: LockMode) {
            if mode == LockMode::Exclusive {
                // Not atomic as a pair: only mutual exclusion keeps the sum right.
                let v = value.load(Ordering::Relaxed);
                value.store(v + 1, Ordering::Relaxed);
            }
            locks.unlock(3, mode, |job| pool.submit(0, job));
            done.fetch_add(1, Ordering::SeqCst);
        }
        let shared: Shared = (locks, value, done, pool);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let shared = &shared;
                scope.spawn(move || {
                    let mode = if thread % 2 == 0 { LockMode::Exclusive } else { LockMode::Shared };
                    for _ in 0..ROUNDS {
                        let later = shared.clone();
                        let job = |later: Shared| -> Job { Box::new(move || section(&later, mode)) };
                        if let Some(now) = shared.0.lock_or_queue(3, mode, later, job) {
                            section(&now, mode);
                        }
                    }
                });
            }
        });
        let (_, value, done, _) = shared;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while done.load(Ordering::SeqCst) < 4 * ROUNDS {
            assert!(std::time::Instant::now() < deadline, "every waiter gets its turn");
            std::thread::yield_now();
        }
        assert_eq!(done.load(Ordering::SeqCst), 4 * ROUNDS);
        assert_eq!(value.load(Ordering::SeqCst), 2 * ROUNDS);
    }
}
