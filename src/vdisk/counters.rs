//! What one live image counts of its requests. A counter that every request touches has a shard for each thread, so that
//! they share no cache line; the sum is made when it is asked for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::latency::Latencies;
use super::{Image, Mode};
use crate::io::buffers::Writer;
use crate::sync::{Arc, AtomicU64, Ordering, Padded, SHARDS, thread_shard};

/// Live counters of one image.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Mode.
    pub mode: Mode,
    /// Free space of the host is below the low-water mark.
    pub low: bool,
    /// BAT pages not yet durable.
    pub dirty_pages: u64,
    /// Pios parked for space or waiting for unsynced data to shrink.
    pub queued: u64,
    /// Pios being carried out.
    pub inflight: u64,
    /// Finished reads.
    pub reads: u64,
    /// Finished writes.
    pub writes: u64,
    /// Finished discards.
    pub discards: u64,
    /// Finished flushes.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// What one image counts.
#[derive(Default)]
pub(super) struct ImageCounters {
    shards: [Padded<Shard>; SHARDS],
    latencies: Latencies,
    discards: AtomicU64,
    flushes: AtomicU64,
    /// Nanoseconds since 1970; 0 = never.
    last_write: AtomicU64,
}

/// Counters of one thread shard.
#[derive(Default)]
struct Shard {
    reads: AtomicU64,
    writes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Image {
    /// Live counters.
    pub fn stats(&self) -> Stats {
        let sum = |of: fn(&Shard) -> &AtomicU64| -> u64 {
            self.counters.shards.iter().map(|c| of(&c.0).load(Ordering::Relaxed)).sum()
        };
        Stats {
            mode: self.mode(),
            low: self.space.is_low(),
            dirty_pages: self.dirty_pages(),
            queued: (self.space.parked() + self.flusher.throttled()) as u64,
            inflight: self.gate.inside(),
            reads: sum(|c| &c.reads),
            writes: sum(|c| &c.writes),
            discards: self.counters.discards.load(Ordering::Relaxed),
            flushes: self.counters.flushes.load(Ordering::Relaxed),
            read_bytes: sum(|c| &c.read_bytes),
            written_bytes: sum(|c| &c.written_bytes),
        }
    }

    /// How long requests took; the code that answers them notes it.
    pub fn latencies(&self) -> &Latencies {
        &self.counters.latencies
    }

    /// Time of the last write, discard or change of size through us.
    pub fn last_write(&self) -> Option<SystemTime> {
        match self.counters.last_write.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(UNIX_EPOCH + Duration::from_nanos(nanos)),
        }
    }

    /// A write reached the host.
    pub(super) fn wrote(self: &Arc<Self>, bytes: usize) {
        self.touched(bytes as u64);
        self.count_write(bytes);
    }

    pub(super) fn count_read(&self, bytes: usize) {
        let c = &self.counters.shards[thread_shard()].0;
        c.reads.fetch_add(1, Ordering::Relaxed);
        c.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn count_write(&self, bytes: usize) {
        let c = &self.counters.shards[thread_shard()].0;
        c.writes.fetch_add(1, Ordering::Relaxed);
        c.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.stamp();
    }

    /// What a reader sees has changed, or may have: backups go by the time.
    pub(super) fn stamp(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        self.counters.last_write.store(now, Ordering::Relaxed);
    }

    pub(super) fn count_discard(&self) {
        self.counters.discards.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_flush(&self) {
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Writer for Image {
    fn id(&self) -> u64 {
        self.id
    }

    /// Writes and discards that reached the host. Not reads, which its cache may answer, nor a sync of nothing.
    fn completed(&self) -> u64 {
        let writes = self.counters.shards.iter().map(|c| c.0.writes.load(Ordering::Relaxed)).sum::<u64>();
        writes + self.counters.discards.load(Ordering::Relaxed)
    }
}
