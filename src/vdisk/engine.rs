//! What all live images of one process share: thread pools, clock, the BAT cache's budget, settings, events.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::bat::budget::Budget;
use super::clock::Clock;
use super::runner::{Job, Pool};
use crate::error::Result;
use crate::io::process;
use crate::io::reads::Reads;
use crate::ledger::running;
use crate::sync::{Arc, AtomicU64, AtomicUsize, Mutex, Ordering, lock};

/// What to do when the host is full (docs/design.md#a-full-host).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// Park writes until space comes back or the timeout is over.
    Queue,
    /// Fail at once with ENOSPC.
    Error,
}

/// Settings shared by all images of one process.
#[derive(Clone, Debug)]
pub struct Options {
    /// Runner threads that one image may hold: its slow operations in flight. The pool is twice as large, so that
    /// no image ever holds more than half of it.
    pub runners: usize,
    /// Bound of the BAT cache in bytes, over all images.
    pub bat_cache: u64,
    /// How long a changed BAT page may stay unwritten; zero = at once.
    pub bat_delay: Duration,
    /// Queue or fail when full.
    pub on_full: OnFull,
    /// How long a parked write waits; None = for ever.
    pub full_timeout: Option<Duration>,
    /// Percent of free host space below which the low-water event is raised; 0 = never.
    pub low_water: u8,
    /// How far a delta is extended at a time, in bytes: sparse, so it costs nothing. A step per 64 MiB of first writes is
    /// rare, and a crash leaves little to cut off.
    pub extend: u64,
    /// How many background requests the connection has: bounds what may be parked.
    pub background: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            runners: 16,
            bat_cache: 256 << 20,
            bat_delay: Duration::from_millis(1000),
            on_full: OnFull::Queue,
            full_timeout: Some(Duration::from_secs(60)),
            low_water: 10,
            extend: 64 << 20,
            background: 4096,
        }
    }
}

/// Something a person should hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageEvent {
    /// Free host space fell below the mark; both in bytes.
    LowWater {
        /// Name of the image that noticed.
        image: String,
        /// Free bytes of the host file system.
        free: u64,
        /// Its size in bytes.
        total: u64,
    },
    /// Writes are parked, or fail, for want of space.
    Full {
        /// Name of the image.
        image: String,
    },
    /// Space is back.
    Space {
        /// Name of the image.
        image: String,
    },
    /// The image can no longer be written.
    ReadOnly {
        /// Name of the image.
        image: String,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for ImageEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageEvent::LowWater { image, free, total } => {
                write!(f, "{image}: the host file system has {} MiB of {} MiB left", free >> 20, total >> 20)
            }
            ImageEvent::Full { image } => {
                write!(f, "{image}: the host file system is full; writes wait or fail")
            }
            ImageEvent::Space { image } => write!(f, "{image}: space is back; writes go on"),
            ImageEvent::ReadOnly { image, reason } => write!(f, "{image}: read-only from now on: {reason}"),
        }
    }
}

/// Called with true when pages are clean: look again; with false when its image's pages cannot be written for want
/// of space, or it closes.
pub(super) type CleanWaiter = Box<dyn FnOnce(bool) + Send>;

/// Hears events, from any thread; must not block.
pub(super) type Listener = Box<dyn Fn(ImageEvent) + Send + Sync>;

/// Threads that sync (a round, an extension, a scrub) or open; they wait for disks, not for CPUs, and images must
/// not wait for each other's.
const SYNC_THREADS: usize = 64;

/// Threads that open, close, seek and ask for one image: an open, a question and two seeks or snapshots at a time.
const OPEN_SHARE: usize = 4;

/// Threads, BAT cache budget and clock, shared by all images of a process.
pub struct Engine {
    pub(super) options: Options,
    pub(super) runners: Pool,
    pub(super) syncers: Pool,
    openers: Pool,
    pub(super) clock: Clock,
    pub(super) budget: Arc<Budget>,
    /// Pios parked for space, over all images, and the bytes that they are to write.
    pub(super) parked: AtomicUsize,
    pub(super) parked_bytes: AtomicU64,
    /// Jobs that wait until fewer BAT pages are dirty, each with the number of its image. A leaf.
    dirty_waiters: Mutex<Vec<(u64, CleanWaiter)>>,
    listener: Listener,
    next_id: AtomicU64,
    /// For reads that wait for a disk; without it runners wait.
    reads: OnceLock<Reads>,
}

impl Engine {
    /// Starts no thread: [`start`](Self::start) does, or the first image that is opened.
    pub fn new(options: Options, listener: Listener) -> Arc<Engine> {
        let runners = options.runners.max(1);
        Arc::new(Engine {
            runners: Pool::new("ploopfs/r", 2 * runners, runners),
            // A lane of two: a round and an extension or scrub of one image may overlap.
            syncers: Pool::new("ploopfs/sync", SYNC_THREADS, 2),
            openers: Pool::new("ploopfs/open", SYNC_THREADS, OPEN_SHARE),
            clock: Clock::default(),
            budget: Arc::new(Budget::new(options.bat_cache)),
            parked: AtomicUsize::new(0),
            parked_bytes: AtomicU64::new(0),
            dirty_waiters: Mutex::default(),
            listener,
            next_id: AtomicU64::new(1),
            reads: OnceLock::new(),
            options,
        })
    }

    /// Starts the clock and one thread of each pool, which stay as long as the engine; more come with work and go. In a
    /// daemon before it says that the mount works: work for which no thread can be had later is then done by these.
    /// Nothing happens where they run already.
    pub fn start(&self) -> Result<()> {
        let pools = [&self.runners, &self.syncers, &self.openers];
        let started = pools.into_iter().try_for_each(Pool::start).and_then(|()| self.clock.start());
        started.map_err(process::no_thread("for the work on images"))
    }

    /// From now on small reads that must wait for a disk go through `reads` instead of runners.
    pub fn queue_reads(&self, reads: Reads) {
        // A second one would be no better than the first.
        let _ = self.reads.set(reads);
    }

    pub(super) fn reads(&self) -> Option<&Reads> {
        self.reads.get()
    }

    /// Runs `job` on a thread that may block: opens, closes, seeks, questions to the host. `lane` is the image it is about:
    /// one whose host hangs keeps its share of the threads and no more.
    pub fn blocking(&self, lane: u64, job: Job) {
        self.openers.submit(lane, running::part(job));
    }

    /// Runs `job` at that time, on the clock's thread: it must only start work.
    pub fn at(&self, at: Instant, job: Job) {
        self.clock.at(at, job);
    }

    pub(super) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn emit(&self, event: ImageEvent) {
        (self.listener)(event);
    }

    /// Queues `waiter` of image `lane` until a round of any image has made pages clean. True when it was queued;
    /// else it looks again at once (it is not `crowded` by now), or hears that its image is `closing`: both are looked
    /// at under the lock, so that no waiter comes too late for the last wake-up.
    pub(super) fn when_pages_are_clean(
        &self,
        lane: u64,
        closing: impl FnOnce() -> bool,
        crowded: impl FnOnce() -> bool,
        waiter: CleanWaiter,
    ) -> bool {
        let mut waiters = lock(&self.dirty_waiters);
        let closing = closing();
        if !closing && crowded() {
            waiters.push((lane, waiter));
            return true;
        }
        drop(waiters);
        self.runners.submit(lane, Box::new(move || waiter(!closing)));
        false
    }

    /// A round has ended: the jobs that waited for clean pages look again.
    pub(super) fn pages_are_clean(&self) {
        for (lane, waiter) in std::mem::take(&mut *lock(&self.dirty_waiters)) {
            self.runners.submit(lane, Box::new(move || waiter(true)));
        }
    }

    /// Image `lane` cannot write its pages, or closes: its jobs that wait for clean ones give up.
    pub(super) fn no_clean_pages(&self, lane: u64) {
        let mut waiters = lock(&self.dirty_waiters);
        let (own, others) = std::mem::take(&mut *waiters).into_iter().partition::<Vec<_>, _>(|w| w.0 == lane);
        *waiters = others;
        drop(waiters);
        for (lane, waiter) in own {
            self.runners.submit(lane, Box::new(move || waiter(false)));
        }
    }

    /// BAT pages in memory.
    pub fn cached_pages(&self) -> u64 {
        self.budget.loaded()
    }
}
