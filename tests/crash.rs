//! Power cuts in memory: after any host operation, with any part of what was not synced lost, the image opens,
//! its BAT is sound, every sector holds an allowed value, and what an fsync or an O_DSYNC write acknowledged is there.
//!
//! A recording file keeps what is durable and the log of what is not (see `common::power`).

mod common;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::power::{Change, Rng, SECTOR, Unsynced, collapse, read_stamp, stamp};
use ploopfs::format::header::{CLOSED, FLAG_EMPTY, Header, Version};
use ploopfs::io::file::{HostFile, HostSpace, HostStatus, HostTraits};
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options};

/// What a sector may hold: every value written since the last sync that covers it, and the one before.
type Allowed = Vec<Vec<u32>>;

#[derive(Clone)]
struct Cut {
    file: Unsynced,
    allowed: Allowed,
}

struct Recording {
    live: MemoryFile,
    log: Mutex<Unsynced>,
    allowed: Arc<Mutex<Allowed>>,
    /// Cuts taken so far; every `every`-th host operation is a crash point.
    cuts: Mutex<Vec<Cut>>,
    operations: AtomicU64,
    every: u64,
    /// Where a broken build is wanted: fdatasync answers and does nothing.
    skip_sync: bool,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recording")
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Recording {
    fn new(file: &MemoryFile, allowed: Allowed, every: u64, skip_sync: bool) -> Recording {
        Recording {
            live: MemoryFile::from_bytes(&file.to_bytes()),
            log: Mutex::new(Unsynced { durable: file.to_bytes(), pending: Vec::new() }),
            allowed: Arc::new(Mutex::new(allowed)),
            cuts: Mutex::default(),
            operations: AtomicU64::new(0),
            every,
            skip_sync,
        }
    }

    /// Does `change` and logs it as one step; then maybe cuts.
    fn step(
        &self,
        change: Option<Change>,
        act: impl FnOnce(&MemoryFile) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut log = lock(&self.log);
        act(&self.live)?;
        match change {
            Some(change) => log.pending.push(change),
            None if self.skip_sync => {}
            None => {
                // The cut just before a sync is the one that loses most.
                self.cut(&log, 1);
                log.sync();
            }
        }
        self.cut(&log, self.every);
        Ok(())
    }

    fn cut(&self, log: &Unsynced, every: u64) {
        if self.operations.fetch_add(1, Ordering::Relaxed).is_multiple_of(every) {
            let allowed = lock(&self.allowed).clone();
            lock(&self.cuts).push(Cut { file: log.clone(), allowed });
        }
    }
}

impl HostFile for Recording {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.live.read_at(buf, offset)
    }
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.live.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let change = Change::Write { at: offset, data: data.to_vec() };
        self.step(Some(change), |f| f.write_at(data, offset).map(drop))?;
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

const DISK: usize = 3000;
const CLUSTER_SECTORS: u32 = 8;

fn empty_image() -> MemoryFile {
    let cluster = u64::from(CLUSTER_SECTORS) * 512;
    let entries = (DISK as u64).div_ceil(u64::from(CLUSTER_SECTORS)) as u32;
    let first = (64 + 4 * u64::from(entries)).next_multiple_of(cluster);
    let header = Header {
        version: Version::V2,
        heads: 16,
        cylinders: 1,
        cluster_sectors: CLUSTER_SECTORS,
        entries,
        disk_sectors: DISK as u64,
        in_use: CLOSED,
        first_block: (first / 512) as u32,
        flags: FLAG_EMPTY,
        extension: 0,
    };
    let file = MemoryFile::from_bytes(&header.encode());
    file.set_len(first).expect("memory grows");
    file
}

fn engine(delay: u64) -> Arc<Engine> {
    // Short steps: many extensions, and small files to copy at every cut.
    let bat_delay = Duration::from_millis(delay);
    let options = Options { runners: 4, bat_delay, extend: 128 << 10, ..Options::default() };
    Engine::new(options, Box::new(|_| ()))
}

fn open(engine: &Arc<Engine>, file: Arc<dyn HostFile>) -> ploopfs::Result<Arc<Image>> {
    let mut bytes = [0; 64];
    file.read_at(&mut bytes, 0).expect("memory reads");
    let header =
        Header::parse(&bytes).map_err(|e| ploopfs::Error::new(ploopfs::Kind::Damaged, e.to_string()))?;
    let level = Level { file, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
    let image = Image::open(engine, "crash", vec![level])?;
    image.make_writable()?;
    Ok(image)
}

/// A history of random operations on `file`; returns the cuts.
fn history(
    file: MemoryFile,
    allowed: Allowed,
    rng: &mut Rng,
    skip_sync: bool,
) -> (Vec<Cut>, MemoryFile, Allowed) {
    let delay = [0, 1, 1000][rng.below(3) as usize];
    let recording = Arc::new(Recording::new(&file, allowed, 7, skip_sync));
    let allowed = Arc::clone(&recording.allowed);
    let image = open(&engine(delay), recording.clone()).expect("a sound image opens");
    let mut next = rng.below(1 << 30) as u32 * 2 + 1;
    for _ in 0..40 {
        let at = rng.below(DISK as u64) as usize;
        let longest = if rng.below(3) == 0 { 60 } else { 6 };
        let n = (1 + rng.below(longest) as usize).min(DISK - at);
        match rng.below(10) {
            0..5 => {
                let durable = rng.below(6) == 0;
                next += 2;
                let value = if rng.below(8) == 0 { 0 } else { next };
                (at..at + n).for_each(|s| lock(&allowed)[s].push(value));
                let data = stamp(value).repeat(n);
                let offset = (at * SECTOR) as u64;
                if durable || image.try_write(offset, &data).is_none() {
                    let (tell, answer) = std::sync::mpsc::channel();
                    let reply = Box::new(move |r| tell.send(r).expect("waits"));
                    image.write(offset, data.into(), durable, reply);
                    answer.recv().expect("answers").expect("writes");
                }
                if durable {
                    // As SQLite and every journal rely on: this write, and in our rounds all before it.
                    (at..at + n).for_each(|s| collapse(&mut lock(&allowed)[s]));
                }
            }
            5..8 => {
                (at..at + n).for_each(|s| lock(&allowed)[s].push(0));
                image.discard_at((at * SECTOR) as u64, (n * SECTOR) as u64).expect("discards");
            }
            _ => {
                image.flush_now().expect("syncs");
                lock(&allowed).iter_mut().for_each(collapse);
            }
        }
    }
    image.close().expect("closes");
    lock(&allowed).iter_mut().for_each(collapse);
    let cuts = std::mem::take(&mut *lock(&recording.cuts));
    let end = MemoryFile::from_bytes(&recording.live.to_bytes());
    let allowed = lock(&allowed).clone();
    (cuts, end, allowed)
}

/// R1: an image that says it was closed cleanly has neither leaks nor a tail.
fn clean_means_clean(bytes: &[u8]) -> Result<(), String> {
    let header = Header::parse(&bytes[..64]).map_err(|e| e.to_string())?;
    if header.is_in_use() {
        return Ok(());
    }
    let geometry = header.geometry();
    let entry = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    let used = (0..header.entries as usize).filter_map(|i| geometry.position(entry(64 + 4 * i))).max();
    let end = used.map_or(geometry.first, |last| last + geometry.cluster);
    if bytes.len() as u64 == end {
        return Ok(());
    }
    Err(format!("not in use, but {} bytes long instead of {end}", bytes.len()))
}

/// The value of every sector of an image that a cut left, or what is wrong with it.
fn judge(engine: &Arc<Engine>, bytes: &[u8], allowed: &Allowed) -> Result<Vec<u32>, String> {
    clean_means_clean(bytes)?;
    let image =
        open(engine, Arc::new(MemoryFile::from_bytes(bytes))).map_err(|e| format!("does not open: {e}"))?;
    let data = image.read_at(0, DISK * SECTOR).map_err(|e| format!("cannot be read: {e}"))?;
    let mut values = Vec::with_capacity(DISK);
    for (sector, allowed) in allowed.iter().enumerate() {
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
        let mut file = empty_image();
        let mut allowed: Allowed = vec![vec![0]; DISK];
        // Later rounds meet a clean close, or what a cut left: leaks, a tail, old content in free clusters.
        for _ in 0..3 {
            let cuts;
            (cuts, file, allowed) = history(file, allowed, &mut rng, skip_sync);
            let restart = rng.below(2 * cuts.len() as u64) as usize;
            for (i, cut) in cuts.iter().enumerate() {
                for _ in 0..2 {
                    states += 1;
                    let state = cut.file.state(&mut rng);
                    let found = judge(&judges, &state, &cut.allowed)?;
                    if i == restart {
                        file = MemoryFile::from_bytes(&state);
                        allowed = found.into_iter().map(|value| vec![value]).collect();
                    }
                }
            }
        }
    }
    Ok(states)
}

#[test]
fn every_power_cut_leaves_a_sound_image_with_all_that_was_synced() {
    let histories = std::env::var("PLOOPFS_CRASH_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let seed = std::env::var("PLOOPFS_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    match campaign(histories, seed, false) {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("seed {seed}: {e}"),
    }
}

#[test]
fn a_build_without_fdatasync_is_caught() {
    campaign(60, 1, true).expect_err("a file that never syncs must lose something");
}
