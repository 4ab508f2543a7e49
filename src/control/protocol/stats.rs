//! The live counters as they are said on the socket. The types here are the protocol's own, as in [`work`](super::work);
//! `.ploopfs/stats.json` has the same fields from `tree::stats`, and neither changes with the other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tree::{Document, ImageStats, Sandbox};
use crate::vdisk::latency::{BUCKETS, Histogram};

/// [`Document`]: the counters of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsAnswer {
    /// Process id of the daemon.
    pub pid: u32,
    /// The transport that serves the mount.
    pub transport: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// What confines the daemon.
    pub sandbox: SandboxAnswer,
    /// How often a daemon of the mount was replaced.
    #[serde(default)]
    pub restarts: u64,
    /// How long requests waited at the last time, in milliseconds.
    #[serde(default)]
    pub last_pause_ms: u64,
    /// Free space of the host, in bytes.
    #[serde(default)]
    pub host_available: u64,
    /// Size of the host's file system, in bytes.
    #[serde(default)]
    pub host_size: u64,
    /// By name, without `.img`.
    pub images: BTreeMap<String, ImageStatsAnswer>,
}

impl From<Document> for StatsAnswer {
    fn from(document: Document) -> StatsAnswer {
        let Document {
            pid,
            transport,
            mountpoint,
            sandbox,
            restarts,
            last_pause_ms,
            host_available,
            host_size,
            images,
        } = document;
        let images = images.into_iter().map(|(name, image)| (name, image.into())).collect();
        let sandbox = sandbox.into();
        StatsAnswer {
            pid,
            transport,
            mountpoint,
            sandbox,
            restarts,
            last_pause_ms,
            host_available,
            host_size,
            images,
        }
    }
}

impl From<StatsAnswer> for Document {
    fn from(answer: StatsAnswer) -> Document {
        let StatsAnswer {
            pid,
            transport,
            mountpoint,
            sandbox,
            restarts,
            last_pause_ms,
            host_available,
            host_size,
            images,
        } = answer;
        let images = images.into_iter().map(|(name, image)| (name, image.into())).collect();
        let sandbox = sandbox.into();
        Document {
            pid,
            transport,
            mountpoint,
            sandbox,
            restarts,
            last_pause_ms,
            host_available,
            host_size,
            images,
        }
    }
}

/// [`Sandbox`]: what confines a serving process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxAnswer {
    /// It can gain no privileges by starting programs.
    pub no_new_privs: bool,
    /// It opens files below the images folder only.
    pub landlock: bool,
    /// It makes only the system calls of a list.
    pub seccomp: bool,
}

impl From<Sandbox> for SandboxAnswer {
    fn from(Sandbox { no_new_privs, landlock, seccomp }: Sandbox) -> SandboxAnswer {
        SandboxAnswer { no_new_privs, landlock, seccomp }
    }
}

impl From<SandboxAnswer> for Sandbox {
    fn from(SandboxAnswer { no_new_privs, landlock, seccomp }: SandboxAnswer) -> Sandbox {
        Sandbox { no_new_privs, landlock, seccomp }
    }
}

/// [`ImageStats`]: the counters of one image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatsAnswer {
    /// What it can do; "closed" while it is not open.
    pub mode: String,
    /// Open handles.
    pub openers: u32,
    /// The kernel may be reading and writing it in our place.
    #[serde(default)]
    pub passthrough: bool,
    /// Free space of the host is below the low-water mark.
    pub low_water: bool,
    /// BAT pages that are not durable yet.
    pub dirty_pages: u64,
    /// Pios parked for space or waiting for unsynced data to shrink.
    pub queued: u64,
    /// Pios being carried out.
    #[serde(default)]
    pub inflight: u64,
    /// Finished reads.
    pub reads: u64,
    /// Finished writes.
    pub writes: u64,
    /// Finished discards.
    pub discards: u64,
    /// Finished syncs.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Disk size in bytes.
    #[serde(default)]
    pub size: u64,
    /// Space taken on the host, in bytes.
    #[serde(default)]
    pub allocated: u64,
    /// How long requests took, by kind: read, write, discard, flush.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub latency: BTreeMap<String, HistogramAnswer>,
}

/// The two have the same fields; `$latency` converts one histogram.
macro_rules! same_counters {
    ($from:ident, $into:ident, $latency:ty) => {
        impl From<$from> for $into {
            fn from(stats: $from) -> $into {
                let $from {
                    mode,
                    openers,
                    passthrough,
                    low_water,
                    dirty_pages,
                    queued,
                    inflight,
                    reads,
                    writes,
                    discards,
                    flushes,
                    read_bytes,
                    written_bytes,
                    size,
                    allocated,
                    latency,
                } = stats;
                let latency = latency.into_iter().map(|(op, took)| (op, <$latency>::from(took))).collect();
                $into {
                    mode,
                    openers,
                    passthrough,
                    low_water,
                    dirty_pages,
                    queued,
                    inflight,
                    reads,
                    writes,
                    discards,
                    flushes,
                    read_bytes,
                    written_bytes,
                    size,
                    allocated,
                    latency,
                }
            }
        }
    };
}

same_counters!(ImageStats, ImageStatsAnswer, HistogramAnswer);
same_counters!(ImageStatsAnswer, ImageStats, Histogram);

/// [`Histogram`]: how many requests took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistogramAnswer {
    /// Requests by time, not cumulative. As many as the daemon has, which may be of another version.
    pub buckets: Vec<u64>,
    /// Time of all together, in nanoseconds.
    pub nanos: u64,
}

impl From<Histogram> for HistogramAnswer {
    fn from(Histogram { buckets, nanos }: Histogram) -> HistogramAnswer {
        HistogramAnswer { buckets: buckets.to_vec(), nanos }
    }
}

impl From<HistogramAnswer> for Histogram {
    fn from(HistogramAnswer { buckets: said, nanos }: HistogramAnswer) -> Histogram {
        let mut buckets = [0u64; BUCKETS];
        for (k, requests) in said.into_iter().enumerate() {
            // The last one holds all that took longer.
            let bucket = &mut buckets[k.min(BUCKETS - 1)];
            *bucket = bucket.saturating_add(requests);
        }
        Histogram { buckets, nanos }
    }
}
