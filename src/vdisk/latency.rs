//! How long requests take, in histograms. Noting one is two additions in counters of the thread's own shard: no lock, no
//! allocation, no cache line that all threads write.

// Not `crate::sync`'s: nothing depends on these, and a model (`vdisk::models`) would try every order of 1,700 counters.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sync::{Padded, SHARDS, thread_shard};

/// Bucket k counts what took up to 2^k microseconds: 25 of them reach 16 s, and one more holds what took longer.
pub const BUCKETS: usize = 26;

/// What is measured, from its arrival to its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A read.
    Read = 0,
    /// A write.
    Write = 1,
    /// A discard or a write of zeroes.
    Discard = 2,
    /// A sync.
    Flush = 3,
}

impl Op {
    /// All, in the order of their histograms.
    pub const ALL: [Op; 4] = [Op::Read, Op::Write, Op::Discard, Op::Flush];

    /// The word for people and for labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Discard => "discard",
            Op::Flush => "flush",
        }
    }
}

/// How many requests took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Requests by time, not cumulative; see [`BUCKETS`].
    pub buckets: [u64; BUCKETS],
    /// Time of all together, in nanoseconds.
    pub nanos: u64,
}

impl Histogram {
    /// Number of requests.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Upper bound of bucket `k` in microseconds; None for the last, which has none.
    pub fn bound(k: usize) -> Option<u64> {
        (k + 1 < BUCKETS).then(|| 1 << k)
    }

    /// The time in microseconds within which `percent` of the requests ended, estimated inside its bucket; None where
    /// there were none.
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = (count as f64 * percent / 100.0).max(1.0);
        let mut before = 0.0;
        for (k, requests) in self.buckets.iter().enumerate() {
            let requests = *requests as f64;
            if before + requests >= wanted {
                let low = if k == 0 { 0.0 } else { (1u64 << (k - 1)) as f64 };
                let high = (1u64 << k) as f64;
                return Some(low + (high - low) * (wanted - before) / requests);
            }
            before += requests;
        }
        None
    }

    /// What came since `earlier`; everything where that is of another opening of the image.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        if self.nanos < earlier.nanos || self.buckets.iter().zip(&earlier.buckets).any(|(a, b)| a < b) {
            return self.clone();
        }
        let mut buckets = self.buckets;
        buckets.iter_mut().zip(&earlier.buckets).for_each(|(now, before)| *now -= before);
        Histogram { buckets, nanos: self.nanos - earlier.nanos }
    }
}

#[derive(Default)]
struct Shard {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

/// The histograms of one image.
#[derive(Default)]
pub struct Latencies {
    shards: [Padded<[Shard; Op::ALL.len()]>; SHARDS],
}

impl Latencies {
    /// Notes a request.
    pub fn note(&self, op: Op, took: Duration) {
        let shard = &self.shards[thread_shard()].0[op as usize];
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        shard.buckets[bucket_of(nanos)].fetch_add(1, Ordering::Relaxed);
        shard.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What was noted of one kind.
    pub fn of(&self, op: Op) -> Histogram {
        let mut sum = Histogram::default();
        for shard in self.shards.iter().map(|shard| &shard.0[op as usize]) {
            for (into, from) in sum.buckets.iter_mut().zip(&shard.buckets) {
                *into += from.load(Ordering::Relaxed);
            }
            sum.nanos += shard.nanos.load(Ordering::Relaxed);
        }
        sum
    }
}

/// The smallest k with nanos <= 2^k microseconds.
fn bucket_of(nanos: u64) -> usize {
    let micros = nanos.div_ceil(1000).max(1);
    let k = (u64::BITS - (micros - 1).leading_zeros()) as usize;
    k.min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_into_the_first_bucket_whose_bound_holds_it() {
        for (nanos, k) in [(0, 0), (1, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (4000, 2), (4001, 3)] {
            assert_eq!(bucket_of(nanos), k, "{nanos}");
        }
        let longest = Histogram::bound(BUCKETS - 2).expect("a bound") * 1000;
        assert_eq!((bucket_of(longest), bucket_of(longest + 1)), (BUCKETS - 2, BUCKETS - 1));
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(Histogram::bound(BUCKETS - 1), None);
    }

    #[test]
    fn percentiles_lie_in_the_bucket_that_has_them() {
        let latencies = Latencies::default();
        assert_eq!(latencies.of(Op::Read).percentile(50.0), None);
        (0..98).for_each(|_| latencies.note(Op::Read, Duration::from_micros(100)));
        (0..2).for_each(|_| latencies.note(Op::Read, Duration::from_millis(3)));
        let read = latencies.of(Op::Read);
        assert_eq!((read.count(), read.nanos), (100, 98 * 100_000 + 2 * 3_000_000));
        let at = |percent| read.percentile(percent).expect("requests");
        assert!((64.0..=128.0).contains(&at(50.0)), "{}", at(50.0));
        assert!((2048.0..=4096.0).contains(&at(99.0)), "{}", at(99.0));
        assert_eq!(latencies.of(Op::Write), Histogram::default());
    }

    #[test]
    fn the_difference_of_two_moments_is_what_came_between() {
        let latencies = Latencies::default();
        latencies.note(Op::Write, Duration::from_micros(10));
        let before = latencies.of(Op::Write);
        latencies.note(Op::Write, Duration::from_micros(20));
        let after = latencies.of(Op::Write);
        assert_eq!((after.since(&before).count(), after.since(&before).nanos), (1, 20_000));
        assert_eq!(before.since(&after), before, "an image that was opened anew counts anew");
    }
}
