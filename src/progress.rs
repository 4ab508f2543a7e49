//! How far a long piece of work has come, for who does it and who watches: counted in bytes, cancelled from outside,
//! slowed down to a rate.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::sync::plain::{lock, wait_timeout};

/// How much may be done ahead of the rate: small enough that a watcher sees an even pace, large enough that one
/// late wake-up does not cost throughput.
const BURST: Duration = Duration::from_millis(100);
/// How often a wait for the rate asks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// One piece of work. Shared by the worker and those who watch it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Bytes per second; 0 = as fast as it goes.
    rate: u64,
    /// Protects the time from which the rate allows more; None before the first bytes. A leaf.
    free_at: Mutex<Option<Instant>>,
    /// Wakes who waits for the rate, when the work is cancelled.
    woken: Condvar,
}

impl Progress {
    /// Work of unknown length, none of it done, as fast as it goes.
    pub fn new() -> Progress {
        Progress::default()
    }

    /// The same, at most `rate` bytes per second; None or 0: as fast as it goes.
    pub fn with_rate(rate: Option<u64>) -> Progress {
        Progress { rate: rate.unwrap_or(0), ..Progress::default() }
    }

    /// There are `bytes` to do in all.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// `bytes` more are done. Returns when the rate allows the next, or at once when cancelled. Not under a lock that
    /// guest I/O needs.
    pub fn add(&self, bytes: u64) {
        self.add_while(bytes, || true);
    }

    /// The same; returns also when `goes_on` says no. For work that a caller may have to wait for.
    pub fn add_while(&self, bytes: u64, goes_on: impl Fn() -> bool) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.rate > 0 {
            self.pay(bytes, goes_on);
        }
    }

    /// The same bytes once more, in another step.
    pub fn restart(&self) {
        self.done.store(0, Ordering::Relaxed);
    }

    /// `bytes` more need nothing done: a hole. No rate holds it up.
    pub fn skip(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A token bucket, seen from its other side: not what is in it, but when it will be full again.
    fn pay(&self, bytes: u64, goes_on: impl Fn() -> bool) {
        let cost = Duration::try_from_secs_f64(bytes as f64 / self.rate as f64).unwrap_or(Duration::MAX);
        let mut free_at = self.lock();
        let now = Instant::now();
        // Time in which nothing was asked for is not saved up beyond the burst.
        let from = (*free_at).map_or(now, |at| at.max(now.checked_sub(BURST).unwrap_or(now)));
        // A wait beyond what the clock can say is a century of waiting as well.
        let until = from.checked_add(cost).unwrap_or(from + Duration::from_secs(3 << 30));
        *free_at = Some(until);
        while !self.is_cancelled() && goes_on() {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return;
            };
            let left = left.min(LOOK);
            free_at = wait_timeout(&self.woken, free_at, left).0;
        }
    }

    /// Asks the worker to stop at the next place where it can.
    pub fn cancel(&self) {
        // Under the lock: else a worker could look before it is set, and sleep after the wake-up.
        let _free_at = self.lock();
        self.cancelled.store(true, Ordering::Relaxed);
        self.woken.notify_all();
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The worker's question between two steps: an error when it was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(
                Kind::Cancelled,
                "cancelled; what was begun is undone or goes on at the next use",
            ));
        }
        Ok(())
    }

    /// Bytes done, and in all (0 = not known).
    pub fn so_far(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.free_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rate_nothing_waits_and_everything_is_counted() {
        let progress = Progress::new();
        progress.set_total(1 << 40);
        let begun = Instant::now();
        (0..1000).for_each(|_| progress.add(1 << 30));
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert_eq!(progress.so_far(), (1000 << 30, 1 << 40));
        progress.check().expect("not cancelled");
    }

    #[test]
    fn with_a_rate_the_bytes_take_their_time() {
        let progress = Progress::with_rate(Some(10 << 20));
        let begun = Instant::now();
        // 4 MiB at 10 MiB/s: 0.4 s.
        (0..64).for_each(|_| progress.add(64 << 10));
        assert!(begun.elapsed() >= Duration::from_millis(390), "{:?}", begun.elapsed());
        assert_eq!(progress.so_far().0, 4 << 20);
    }

    #[test]
    fn time_in_which_nothing_was_done_is_not_saved_up() {
        let progress = Progress::with_rate(Some(10 << 20));
        progress.add(1);
        std::thread::sleep(Duration::from_millis(500));
        let begun = Instant::now();
        // 0.5 s worth, of which a burst of 0.1 s is free.
        progress.add(5 << 20);
        assert!(begun.elapsed() >= Duration::from_millis(390), "{:?}", begun.elapsed());
    }

    #[test]
    fn cancelling_ends_a_wait_for_the_rate_at_once() {
        let progress = Progress::with_rate(Some(1));
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| progress.add(u64::MAX));
            std::thread::sleep(Duration::from_millis(50));
            progress.cancel();
        });
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert_eq!(progress.check().expect_err("cancelled").kind(), Kind::Cancelled);
        progress.add(u64::MAX);
    }

    #[test]
    fn a_wait_for_the_rate_ends_when_it_is_no_longer_wanted() {
        let (progress, wanted) = (Progress::with_rate(Some(1)), AtomicBool::new(true));
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| progress.add_while(u64::MAX, || wanted.load(Ordering::Relaxed)));
            std::thread::sleep(Duration::from_millis(50));
            wanted.store(false, Ordering::Relaxed);
        });
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
}
