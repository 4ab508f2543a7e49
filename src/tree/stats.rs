//! `.ploopfs/stats.json`: the live counters. Fields are added, never renamed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde::Serialize;

use crate::folder::{Entry, Folder};
use crate::image::kind::in_text;
use crate::vdisk::Stats;
use crate::vdisk::latency::{Histogram, Op};

/// What the mount says of itself.
#[derive(Clone, Debug)]
pub struct MountInfo {
    /// Where it is mounted.
    pub mountpoint: std::path::PathBuf,
    /// The transport that serves it.
    pub transport: &'static str,
    /// Names and sizes of images may be changed through the mount.
    pub manage: bool,
    /// What confines the process; set once, after the mount and before the first request.
    pub sandbox: Arc<OnceLock<Sandbox>>,
    /// How often a daemon was replaced.
    pub restarts: Arc<Restarts>,
}

/// How often a successor has gone on with the mount of a daemon, and for how long requests waited then.
#[derive(Debug, Default)]
pub struct Restarts {
    count: AtomicU64,
    last_pause_ms: AtomicU64,
}

impl Restarts {
    /// So many by now, of which the last was so long.
    pub fn set(&self, count: u64, last_pause_ms: u64) {
        self.last_pause_ms.store(last_pause_ms, Ordering::Relaxed);
        self.count.store(count, Ordering::Relaxed);
    }

    /// How many since the mount began.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How long requests waited at the last, in milliseconds; 0: there was none.
    pub fn last_pause_ms(&self) -> u64 {
        self.last_pause_ms.load(Ordering::Relaxed)
    }
}

/// What confines a serving process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sandbox {
    /// It can gain no privileges by starting programs.
    pub no_new_privs: bool,
    /// It opens files below the images folder only.
    pub landlock: bool,
    /// It makes only the system calls of a list.
    pub seccomp: bool,
}

/// What `.ploopfs/stats.json` holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Document {
    /// Process id of the daemon.
    pub pid: u32,
    /// The transport that serves the mount.
    pub transport: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// What confines the daemon.
    pub sandbox: Sandbox,
    /// How often a daemon of the mount was replaced.
    pub restarts: u64,
    /// How long requests waited at the last time, in milliseconds.
    pub last_pause_ms: u64,
    /// Free space of the host, in bytes.
    pub host_available: u64,
    /// Size of the host's file system, in bytes.
    pub host_size: u64,
    /// By name, without `.img`.
    pub images: BTreeMap<String, ImageStats>,
}

/// One image. Counters count from its opening on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ImageStats {
    /// What it can do; "closed" while it is not open.
    pub mode: String,
    /// Open handles.
    pub openers: u32,
    /// The kernel may be reading and writing it in our place (`mount --passthrough`): what it does there is not counted.
    pub passthrough: bool,
    /// Free space of the host is below the low-water mark.
    pub low_water: bool,
    /// BAT pages that are not durable yet.
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
    /// Finished syncs.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Disk size in bytes.
    pub size: u64,
    /// Space taken on the host, in bytes.
    pub allocated: u64,
    /// How long requests took, by kind: read, write, discard, flush. Not in the file: the control socket and `metrics` have
    /// them.
    #[serde(skip)]
    pub latency: BTreeMap<String, Histogram>,
}

impl From<Stats> for ImageStats {
    /// What a live image counts; the rest is its entry's to say.
    fn from(stats: Stats) -> ImageStats {
        let Stats {
            // Only the entry knows whether it may be written through this mount.
            mode: _,
            low,
            dirty_pages,
            queued,
            inflight,
            reads,
            writes,
            discards,
            flushes,
            read_bytes,
            written_bytes,
        } = stats;
        ImageStats {
            low_water: low,
            dirty_pages,
            queued,
            inflight,
            reads,
            writes,
            discards,
            flushes,
            read_bytes,
            written_bytes,
            ..ImageStats::default()
        }
    }
}

/// The counters at this moment. A closed image has the mode "closed" and counts nothing. Asks the hosts of all images, and
/// waits a second at most for those that do not answer.
pub fn document(folder: &Folder, info: &MountInfo) -> Document {
    folder.look_at_all();
    let image = |entry: &Entry| {
        let histogram =
            |op: Op, image: &crate::vdisk::Image| (op.as_str().to_owned(), image.latencies().of(op));
        ImageStats {
            mode: entry.mode().to_owned(),
            openers: entry.openers(),
            passthrough: entry.may_be_passed(),
            size: entry.size(),
            // stat(2) counts units of 512 bytes.
            allocated: entry.known_attributes().host.blocks * 512,
            latency: entry
                .with_image(|image| Op::ALL.map(|op| histogram(op, image)).into_iter().collect())
                .unwrap_or_default(),
            ..entry.stats().map(ImageStats::from).unwrap_or_default()
        }
    };
    let entries = folder.entries();
    let space = folder.space().ok();
    Document {
        pid: std::process::id(),
        transport: info.transport.to_owned(),
        mountpoint: info.mountpoint.to_string_lossy().into_owned(),
        sandbox: info.sandbox.get().copied().unwrap_or_default(),
        restarts: info.restarts.count(),
        last_pause_ms: info.restarts.last_pause_ms(),
        host_available: space.as_ref().map_or(0, |space| space.available),
        host_size: space.as_ref().map_or(0, |space| space.total),
        images: entries.iter().map(|e| (in_text(e.name()), image(e))).collect(),
    }
}

/// The file's content at this moment.
pub(super) fn render(folder: &Folder, info: &MountInfo) -> Bytes {
    let document = document(folder, info);
    let mut text = serde_json::to_vec_pretty(&document).expect("strings and numbers are always JSON");
    text.push(b'\n');
    text.into()
}
