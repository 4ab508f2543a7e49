//! Power cuts in memory during live operations: snapshots, merges in both directions and growing. After any host
//! operation on any file, with any part of what was not synced lost in each, the chain that the descriptor names opens,
//! every sector of the live disk holds an allowed value, and every snapshot has what the disk had when it was taken.
//!
//! The descriptor itself is taken to change at once and durably, as `image::store` does it (with tests of its own).

mod common;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::power::{Change, Rng, SECTOR, Unsynced, collapse, read_stamp, stamp};
use ploopfs::format::header::{FLAG_EMPTY, Header, IN_USE, Version};
use ploopfs::io::file::{HostFile, HostSpace, HostStatus, HostTraits};
use ploopfs::io::memory::MemoryFile;
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options};

/// Sectors of the disk at first.
const DISK: usize = 900;
const CLUSTER: u64 = 8 * 512;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Everything a power cut sees at once.
#[derive(Clone, Default)]
struct World {
    files: Vec<Unsynced>,
    /// The chain that the descriptor names: numbers of files, base first.
    chain: Vec<usize>,
    /// What each sector of the live disk may hold.
    allowed: Vec<Vec<u32>>,
    /// Snapshots: the file that was the top, and what each sector may hold in it.
    snapshots: Vec<(usize, Vec<Vec<u32>>)>,
}

/// The world as it goes on, and its cuts.
struct Record {
    world: Mutex<World>,
    live: Mutex<Vec<Arc<MemoryFile>>>,
    cuts: Mutex<Vec<World>>,
    operations: AtomicU64,
    every: u64,
    skip_sync: bool,
}

impl Record {
    fn cut(&self, world: &World, every: u64) {
        if self.operations.fetch_add(1, Ordering::Relaxed).is_multiple_of(every) {
            lock(&self.cuts).push(world.clone());
        }
    }

    /// A new file whose content is durable: creation ends with a sync.
    fn create(self: &Arc<Self>, bytes: &[u8]) -> usize {
        lock(&self.live).push(Arc::new(MemoryFile::from_bytes(bytes)));
        let mut world = lock(&self.world);
        world.files.push(Unsynced { durable: bytes.to_vec(), pending: Vec::new() });
        world.files.len() - 1
    }

    fn level(self: &Arc<Self>, number: usize) -> Level {
        let file = Recorded { record: Arc::clone(self), number, live: Arc::clone(&lock(&self.live)[number]) };
        let mut bytes = [0; 64];
        file.read_at(&mut bytes, 0).expect("memory reads");
        let layout = Layout::Ploop(Header::parse(&bytes).expect("a header"));
        Level { file: Arc::new(file), path: PathBuf::from(format!("file{number}")), layout }
    }
}

/// One file of the world.
struct Recorded {
    record: Arc<Record>,
    number: usize,
    live: Arc<MemoryFile>,
}

impl std::fmt::Debug for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "file{}", self.number)
    }
}

impl Recorded {
    fn step(
        &self,
        change: Option<Change>,
        act: impl FnOnce(&MemoryFile) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut world = lock(&self.record.world);
        act(&self.live)?;
        match change {
            Some(change) => world.files[self.number].pending.push(change),
            None if self.record.skip_sync => {}
            None => {
                // The cut just before a sync is the one that loses most.
                self.record.cut(&world, 1);
                world.files[self.number].sync();
            }
        }
        self.record.cut(&world, self.record.every);
        Ok(())
    }
}

impl HostFile for Recorded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.live.read_at(buf, offset)
    }
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.live.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        // Changes of part of a sector are changes of the whole sector, as a disk sees them.
        let (from, to) = (offset / 512 * 512, (offset + data.len() as u64).next_multiple_of(512));
        let end = self.live.len()?;
        let mut whole = vec![0; (to.min(end.max(offset + data.len() as u64)) - from) as usize];
        self.live.read_at(&mut whole, from)?;
        let at = (offset - from) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        let grown = offset + data.len() as u64 > end;
        if grown {
            self.set_len(offset + data.len() as u64)?;
        }
        self.step(Some(Change::Write { at: from, data: whole }), |f| f.write_at(data, offset).map(drop))?;
        Ok(data.len())
    }
    fn len(&self) -> io::Result<u64> {
        self.live.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.step(Some(Change::SetLen(len)), |f| f.set_len(len))
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.step(Some(Change::Punch { at: offset, len }), |f| f.punch(offset, len))
    }
    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        self.step(None, |_| Ok(()))
    }
    fn sync_all(&self) -> io::Result<()> {
        self.step(None, |_| Ok(()))
    }
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.live.seek_data(offset)
    }
    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        self.live.seek_hole(offset)
    }
    fn status(&self) -> io::Result<HostStatus> {
        self.live.status()
    }
    fn space(&self) -> io::Result<HostSpace> {
        self.live.space()
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
    fn traits(&self) -> HostTraits {
        HostTraits { nowait_reads: true, never_blocks: false, device: 0 }
    }
}

fn engine(delay: u64) -> Arc<Engine> {
    let bat_delay = Duration::from_millis(delay);
    let options = Options { runners: 4, bat_delay, extend: 128 << 10, ..Options::default() };
    Engine::new(options, Box::new(|_| ()))
}

fn empty(disk: u64, in_use: bool) -> Vec<u8> {
    let mut header = Header::new(Version::V2, disk, CLUSTER).expect("a legal size");
    if in_use {
        header.in_use = IN_USE;
        header.flags &= !FLAG_EMPTY;
    }
    let mut bytes = header.encode().to_vec();
    bytes.resize(header.geometry().first as usize, 0);
    bytes
}

/// One history of writes and live operations; its cuts are left in the record.
fn history(record: &Arc<Record>, rng: &mut Rng) {
    let engine = engine([0, 1, 1000][rng.below(3) as usize]);
    let chain = lock(&record.world).chain.clone();
    let levels = chain.iter().map(|n| record.level(*n)).collect();
    let image = Image::open(&engine, "crash", levels).expect("a sound chain opens");
    image.make_writable().expect("sound");
    let mut next = rng.below(1 << 30) as u32 * 2 + 1;
    for _ in 0..30 {
        let disk = (image.size() / 512) as usize;
        let at = rng.below(disk as u64) as usize;
        let longest = if rng.below(3) == 0 { 60 } else { 6 };
        let n = (1 + rng.below(longest) as usize).min(disk - at);
        let allow = |value: u32| {
            let mut world = lock(&record.world);
            (at..at + n).for_each(|s| world.allowed[s].push(value));
        };
        match rng.below(16) {
            0..6 => {
                next += 2;
                let value = if rng.below(8) == 0 { 0 } else { next };
                allow(value);
                image.write_at((at * SECTOR) as u64, &stamp(value).repeat(n)).expect("writes");
            }
            6..9 => {
                allow(0);
                image.discard_at((at * SECTOR) as u64, (n * SECTOR) as u64).expect("discards");
            }
            9..11 => {
                image.flush_now().expect("syncs");
                lock(&record.world).allowed.iter_mut().for_each(collapse);
            }
            11..13 => snapshot(record, &image),
            13..15 => merge(record, &image),
            _ => {
                let size =
                    image.grow(image.size() + rng.below(200) * CLUSTER, &Progress::new()).expect("grows");
                let mut world = lock(&record.world);
                world.allowed.resize(size as usize / 512, vec![0]);
            }
        }
    }
    image.close().expect("closes");
    lock(&record.world).allowed.iter_mut().for_each(collapse);
}

fn snapshot(record: &Arc<Record>, image: &Arc<Image>) {
    let number_of = Mutex::new(0);
    let commit = || {
        let mut world = lock(&record.world);
        // All that was acknowledged is durable here.
        world.allowed.iter_mut().for_each(collapse);
        let (top, then) = (*world.chain.last().expect("a top"), world.allowed.clone());
        world.snapshots.push((top, then));
        let number = *lock(&number_of);
        world.chain.push(number);
        record.cut(&world, 1);
        Ok(())
    };
    let made = |plan: TopPlan| {
        let number = record.create(&empty(plan.disk, plan.in_use));
        *lock(&number_of) = number;
        Ok(record.level(number))
    };
    image.put_on_top(made, commit).expect("a snapshot");
}

fn merge(record: &Arc<Record>, image: &Arc<Image>) {
    let depth = lock(&record.world).chain.len();
    if depth < 2 {
        return;
    }
    {
        // Marked Temporary: nobody reads it alone any more.
        let mut world = lock(&record.world);
        let lower = world.chain[depth - 2];
        world.snapshots.retain(|(file, _)| *file != lower);
    }
    if image.merge_direction(true).expect("two BATs") == Direction::Flip {
        let commit = || {
            let mut world = lock(&record.world);
            world.chain.swap(depth - 2, depth - 1);
            record.cut(&world, 1);
            Ok(())
        };
        image.flip(&Progress::new(), commit).expect("a flip");
        FLIPS.fetch_add(1, Ordering::Relaxed);
    }
    let commit = || {
        let mut world = lock(&record.world);
        world.chain.remove(depth - 2);
        record.cut(&world, 1);
        Ok(())
    };
    image.pull_out(&Progress::new(), commit).expect("a merge");
}

static FLIPS: AtomicU64 = AtomicU64::new(0);

/// The values of the disk that `files`, base first, make; or what is wrong with it.
fn judge(engine: &Arc<Engine>, files: &[Vec<u8>], allowed: &[Vec<u32>]) -> Result<Vec<u32>, String> {
    let kept: Vec<_> = files.iter().map(|bytes| Arc::new(MemoryFile::from_bytes(bytes))).collect();
    let level = |file: &Arc<MemoryFile>| {
        let mut head = [0; 64];
        file.read_at(&mut head, 0).expect("memory reads");
        let header = Header::parse(&head).map_err(|e| e.to_string())?;
        let file = Arc::clone(file);
        Ok(Level { file, path: PathBuf::from("state"), layout: Layout::Ploop(header) })
    };
    let levels = kept.iter().map(level).collect::<Result<Vec<_>, String>>()?;
    let image = Image::open(engine, "state", levels).map_err(|e| format!("does not open: {e}"))?;
    image.make_writable().map_err(|e| format!("cannot be written: {e}"))?;
    // What a crash left below the top is closed by the first writable open.
    for file in &kept[..kept.len() - 1] {
        let mut head = [0; 64];
        file.read_at(&mut head, 0).expect("memory reads");
        if Header::parse(&head).map_err(|e| e.to_string())?.is_in_use() {
            return Err("a lower level still says in use".into());
        }
    }
    let size = (image.size() as usize / SECTOR).min(allowed.len().max(1));
    let data = image.read_at(0, size * SECTOR).map_err(|e| format!("cannot be read: {e}"))?;
    let mut values = Vec::with_capacity(size);
    for (sector, allowed) in allowed.iter().enumerate().take(size) {
        match read_stamp(&data[sector * SECTOR..(sector + 1) * SECTOR]) {
            Some(value) if allowed.contains(&value) => values.push(value),
            found => return Err(format!("sector {sector} holds {found:?}, allowed {allowed:?}")),
        }
    }
    Ok(values)
}

/// Runs histories until a violation is found; returns the crash states judged.
fn campaign(histories: u64, seed: u64, skip_sync: bool) -> Result<u64, String> {
    let mut rng = Rng(seed);
    let judges = engine(1000);
    let mut states = 0;
    for _ in 0..histories {
        let mut world = World {
            files: vec![Unsynced { durable: empty(DISK as u64 * 512, false), pending: Vec::new() }],
            chain: vec![0],
            allowed: vec![vec![0]; DISK.next_multiple_of(8)],
            snapshots: Vec::new(),
        };
        for _ in 0..2 {
            let live = world.files.iter().map(|f| Arc::new(MemoryFile::from_bytes(&f.durable))).collect();
            let record = Arc::new(Record {
                world: Mutex::new(world.clone()),
                live: Mutex::new(live),
                cuts: Mutex::default(),
                operations: AtomicU64::new(0),
                every: 11,
                skip_sync,
            });
            history(&record, &mut rng);
            let cuts = std::mem::take(&mut *lock(&record.cuts));
            let restart = rng.below(2 * cuts.len() as u64) as usize;
            for (i, cut) in cuts.iter().enumerate() {
                states += 1;
                let left: Vec<Vec<u8>> = cut.files.iter().map(|file| file.state(&mut rng)).collect();
                let files = |chain: &[usize]| chain.iter().map(|n| left[*n].clone()).collect::<Vec<_>>();
                let chain = files(&cut.chain);
                let found = judge(&judges, &chain, &cut.allowed)
                    .map_err(|e| format!("cut {i} of {}: live, chain {:?}: {e}", cuts.len(), cut.chain))?;
                for (top, then) in &cut.snapshots {
                    let Some(at) = cut.chain.iter().position(|n| n == top) else { continue };
                    judge(&judges, &chain[..=at], then)
                        .map_err(|e| format!("cut {i}: snapshot {top} of chain {:?}: {e}", cut.chain))?;
                }
                if i == restart {
                    let files = left.iter().map(|b| Unsynced { durable: b.clone(), pending: Vec::new() });
                    let mut allowed: Vec<_> = found.into_iter().map(|value| vec![value]).collect();
                    let size = Header::parse(&chain[chain.len() - 1][..64]).expect("judged").disk_sectors;
                    allowed.resize(size as usize, vec![0]);
                    let snapshots = cut.snapshots.clone();
                    world = World { files: files.collect(), chain: cut.chain.clone(), allowed, snapshots };
                }
            }
            if restart >= cuts.len() {
                world = lock(&record.world).clone();
                world.files.iter_mut().for_each(Unsynced::sync);
            }
        }
    }
    Ok(states)
}

#[test]
fn every_power_cut_during_live_operations_leaves_the_disk_and_its_snapshots() {
    let histories = std::env::var("PLOOPFS_CRASH_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let seed = std::env::var("PLOOPFS_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    match campaign(histories, seed, false) {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("seed {seed}: {e}"),
    }
    assert!(FLIPS.load(Ordering::Relaxed) > 0, "no merge went the other way");
}

#[test]
fn live_operations_without_fdatasync_are_caught() {
    campaign(60, 1, true).expect_err("files that never sync must lose something");
}
