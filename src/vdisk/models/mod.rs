//! Models: the small parts of this room, and one whole image over a file in memory, under every order of steps that
//! shuttle comes up with.
//!
//! `cargo test --features shuttle --lib vdisk::models` takes about a minute; PLOOPFS_LONG=1 makes it twenty times as
//! many schedules, PLOOPFS_SEED=N others. A failure prints its schedule; `shuttle::replay` runs it again.

mod alloc;
mod cache;
mod gate;
mod image;
mod locks;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, Runner};

use super::{Layout, Level};
use crate::format::header::Header;
use crate::io::file::{HostFile, HostSpace, HostStatus, HostTraits, passed_on};
use crate::io::memory::MemoryFile;
use crate::sync::model::with_bug;
use crate::sync::plain::lock;
use crate::sync::{Arc, Bug, thread};

/// Preemptions that the second scheduler chooses its places for: most races need no more.
const DEPTH: usize = 3;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn config() -> Config {
    let mut config = Config::new();
    // Deeper calls than the 60 KiB of shuttle have room for.
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    config
}

/// Runs `model` under `schedules` schedules, half of them random at every step.
fn explore(schedules: usize, model: fn()) {
    let schedules = if number("PLOOPFS_LONG", 0) == 0 { schedules } else { 20 * schedules };
    let seed = number("PLOOPFS_SEED", 1);
    let half = schedules.div_ceil(2);
    Runner::new(RandomScheduler::new_from_seed(seed, half), config()).run(model);
    Runner::new(PctScheduler::new_from_seed(seed, DEPTH, half), config()).run(model);
    println!("SCHEDULES {}", 2 * half);
}

/// `model` must fail with `bug` in the build: else it could not fail at all.
fn finds(bug: Bug, schedules: usize, model: fn()) {
    let mut config = config();
    config.failure_persistence = FailurePersistence::None;
    let run = || Runner::new(RandomScheduler::new_from_seed(1, schedules), config).run(model);
    let found = with_bug(bug, || catch_unwind(AssertUnwindSafe(run)));
    assert!(found.is_err(), "{schedules} schedules do not show {bug:?}");
}

/// A host file in memory, where others may run before and in every call, and what of it is durable.
#[derive(Debug, Default)]
struct Host {
    file: MemoryFile,
    /// Calls take their time.
    slow: AtomicBool,
    /// The thread under all threads of the model; rayon's are others, and know nothing of it.
    home: Option<std::thread::ThreadId>,
    synced: std::sync::Mutex<Synced>,
}

#[derive(Debug, Default)]
struct Synced {
    /// Syncs begun.
    begun: u64,
    /// The newest that has ended, and the file as it was when that one began: the least that is durable.
    newest: (u64, Vec<u8>),
}

impl Host {
    fn new(bytes: &[u8], len: u64) -> Arc<Host> {
        let file = MemoryFile::from_bytes(bytes);
        file.set_len(len).expect("memory grows");
        let synced = Synced { begun: 0, newest: (0, file.to_bytes()) };
        let home = Some(std::thread::current().id());
        Arc::new(Host { file, slow: AtomicBool::new(false), home, synced: std::sync::Mutex::new(synced) })
    }

    fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    fn pause(&self) {
        if self.slow.load(Ordering::Relaxed) && self.home == Some(std::thread::current().id()) {
            thread::sleep(std::time::Duration::ZERO);
        }
    }

    fn synced(&self) -> std::sync::MutexGuard<'_, Synced> {
        lock(&self.synced)
    }

    /// What a power cut leaves at least.
    fn durable(&self) -> Vec<u8> {
        self.synced().newest.1.clone()
    }

    fn level(self: &Arc<Self>) -> Level {
        let header = Header::parse(&self.file.to_bytes()).expect("a header");
        Level { file: self.clone(), path: PathBuf::from("memory"), layout: Layout::Ploop(header) }
    }
}

impl HostFile for Host {
    passed_on! {
        fn len(&self) -> io::Result<u64>;
        fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;
        fn seek_hole(&self, offset: u64) -> io::Result<u64>;
        fn status(&self) -> io::Result<HostStatus>;
        fn space(&self) -> io::Result<HostSpace>;
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.pause();
        self.file.read_at(buf, offset)
    }
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.pause();
        // Two calls, so that others may see or change the half of it.
        let half = data.len() / 2 / 512 * 512;
        if half > 0 {
            self.file.write_at(&data[..half], offset)?;
            self.pause();
        }
        self.file.write_at(&data[half..], offset + half as u64)?;
        Ok(data.len())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pause();
        self.file.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pause();
        self.file.punch(offset, len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.pause();
        let mut synced = self.synced();
        synced.begun += 1;
        let (number, bytes) = (synced.begun, self.file.to_bytes());
        drop(synced);
        self.pause();
        let mut synced = self.synced();
        if number > synced.newest.0 {
            synced.newest = (number, bytes);
        }
        Ok(())
    }
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
    fn traits(&self) -> HostTraits {
        HostTraits { nowait_reads: false, never_blocks: false, device: 0 }
    }
}
