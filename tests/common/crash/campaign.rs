//! Random histories over a world, and the judgement of every cut of theirs. A restart goes on from a clean close, or
//! from what a cut left: leaks, a tail, old content in free clusters, a lower level in use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ploopfs::format::header::{Header, Version};
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Image, Mode};

use super::judge::{engine, judge_world};
use super::power::{Rng, SECTOR, collapse, stamp};
use super::tracked::Since;
use super::world::{Host, Record, World, empty, lock};

const CLUSTER: u64 = 8 * 512;
/// Short extensions: many of them, and small files to copy at every cut.
const EXTEND: u64 = 128 << 10;

/// What the histories are made of.
#[derive(Clone)]
pub struct Campaign {
    pub histories: u64,
    pub seed: u64,
    /// Sectors of the disk at first.
    pub disk: usize,
    /// With snapshots, merges and growth.
    pub layers: bool,
    /// Its changes are tracked.
    pub tracked: bool,
    /// Openings of one image, and operations between two.
    pub rounds: (u64, u64),
    /// States made of each cut.
    pub states: u64,
    pub host: Host,
}

/// One file: writes, discards and syncs.
pub fn one_file() -> Campaign {
    let host = Host { every: 7, ..Host::default() };
    Campaign {
        histories: 60,
        seed: 1,
        disk: 3000,
        layers: false,
        tracked: false,
        rounds: (3, 40),
        states: 2,
        host,
    }
}

/// A chain, with live operations on it.
pub fn layers() -> Campaign {
    let host = Host { every: 11, ..Host::default() };
    Campaign {
        histories: 60,
        seed: 1,
        disk: 900,
        layers: true,
        tracked: false,
        rounds: (2, 30),
        states: 1,
        host,
    }
}

/// Merges in which the two levels changed places.
pub static FLIPS: AtomicU64 = AtomicU64::new(0);

impl Campaign {
    /// With the number of histories and the seed that the environment asks for.
    pub fn with_environment(self) -> Campaign {
        let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
        let histories = number("PLOOPFS_CRASH_HISTORIES").unwrap_or(self.histories);
        Campaign { histories, seed: number("PLOOPFS_SEED").unwrap_or(self.seed), ..self }
    }

    /// Runs histories until a violation is found; returns the crash states judged.
    pub fn run(&self) -> Result<u64, String> {
        let mut rng = Rng(self.seed);
        let judges = engine(1000, EXTEND);
        let mut states = 0;
        for n in 0..self.histories {
            let header =
                Header::new(Version::V2, (self.disk * SECTOR) as u64, CLUSTER).expect("a legal size");
            let mut world = World::new(vec![empty(header, false)], vec![vec![0]; self.disk]);
            let mut since = Since::default();
            for round in 0..self.rounds.0 {
                let mut host = self.host;
                if host.failing_sync > 0 {
                    host.failing_sync = 1 + rng.below(host.failing_sync);
                }
                let record = Record::new(world.clone(), host);
                let place = |e: String| format!("seed {}, history {n}, round {round}: {e}", self.seed);
                history(&record, &mut rng, self, &mut since).map_err(place)?;
                let cuts = record.take_cuts();
                // After a failure nobody knows what the file holds, until a cut was looked at.
                let clean = if record.has_failed() { 0 } else { cuts.len() as u64 };
                let restart = rng.below(cuts.len() as u64 + clean) as usize;
                world = lock(&record.world).clone();
                world.files.iter_mut().for_each(|file| file.sync_all());
                let mut next = since.clone();
                for (i, cut) in cuts.iter().enumerate() {
                    for _ in 0..self.states {
                        states += 1;
                        let left = cut.left(&mut rng);
                        let here = |e: String| place(format!("cut {i} of {}: {e}", cuts.len()));
                        let found = judge_world(&judges, cut, &left).map_err(here)?;
                        let kept = since.judge(&judges, cut, &left, &found).map_err(here)?;
                        if i == restart {
                            world = after(cut, &left, found);
                            next = if kept { since.clone() } else { Since::default() };
                        }
                    }
                }
                since = next;
            }
        }
        Ok(states)
    }
}

/// The world as it is after the cut `cut` left these files, in which the disk was found to hold `found`.
fn after(cut: &World, left: &[Vec<u8>], found: Vec<u32>) -> World {
    let top = cut.chain.last().expect("a top");
    let size = Header::parse(&left[*top][..64]).expect("judged").disk_sectors;
    let mut allowed: Vec<_> = found.into_iter().map(|value| vec![value]).collect();
    allowed.resize(size as usize, vec![0]);
    let (chain, snapshots) = (cut.chain.clone(), cut.snapshots.clone());
    World { chain, snapshots, raw: cut.raw, ..World::new(left.to_vec(), allowed) }
}

/// One opening of the image; its cuts are left in the record. An error is a violation that the history itself met.
fn history(
    record: &Arc<Record>,
    rng: &mut Rng,
    campaign: &Campaign,
    since: &mut Since,
) -> Result<(), String> {
    let engine = engine([0, 1, 1000][rng.below(3) as usize], EXTEND);
    let image = Image::open(&engine, "crash", record.levels()).map_err(|e| format!("does not open: {e}"))?;
    image.make_writable().map_err(|e| format!("cannot be written: {e}"))?;
    if campaign.tracked {
        let allowed = lock(&record.world).allowed.clone();
        match since.begin(&image, &allowed) {
            Err(_) if record.has_failed() => {}
            begun => begun?,
        }
    }
    let live = Live { record, image: &image };
    let mut next = rng.below(1 << 30) as u32 * 2 + 1;
    let kinds = if campaign.layers { 18 } else { 12 };
    for _ in 0..campaign.rounds.1 {
        let disk = (image.size() / 512) as usize;
        let at = rng.below(disk as u64) as usize;
        let longest = if rng.below(3) == 0 { 60 } else { 6 };
        let n = (1 + rng.below(longest) as usize).min(disk - at);
        let done = match rng.below(kinds) {
            0..5 => {
                let durable = rng.below(6) == 0;
                next += 2;
                live.write(at, n, if rng.below(8) == 0 { 0 } else { next }, durable)
            }
            5..8 => live.discard(at, n),
            8..10 => live.flush(),
            10 => live.compact(),
            11 => live.defrag(),
            12..14 => live.snapshot(),
            14..16 => live.merge(),
            _ => live.grow(image.size() + rng.below(200) * CLUSTER),
        };
        // A host that fails us is heard of; nothing else is an error.
        match done {
            Err(e) if !record.has_failed() => return Err(format!("an operation failed: {e}")),
            _ => {}
        }
        if image.mode() == Mode::ReadOnly {
            break;
        }
    }
    match image.close() {
        Ok(()) => lock(&record.world).allowed.iter_mut().for_each(collapse),
        Err(e) if !record.has_failed() => return Err(format!("cannot be closed: {e}")),
        Err(_) => {}
    }
    Ok(())
}

/// An open image of a world: what is done to it, and what its sectors may hold from then on.
pub struct Live<'a> {
    pub record: &'a Arc<Record>,
    pub image: &'a Arc<Image>,
}

impl Live<'_> {
    fn allow(&self, at: usize, n: usize, value: u32) {
        let mut world = lock(&self.record.world);
        world.allowed[at..at + n].iter_mut().for_each(|sector| sector.push(value));
    }

    /// Sectors `at..at + n` become `value`; `durable`: as O_DSYNC.
    pub fn write(&self, at: usize, n: usize, value: u32, durable: bool) -> ploopfs::Result<()> {
        self.allow(at, n, value);
        let (offset, data) = ((at * SECTOR) as u64, stamp(value).repeat(n));
        if !durable && let Some(done) = self.image.try_write(offset, &data) {
            return done;
        }
        let (tell, answer) = std::sync::mpsc::channel();
        let reply = Box::new(move |result| tell.send(result).expect("waits"));
        self.image.write(offset, data.into(), durable, reply);
        answer.recv().expect("every request is answered")?;
        if durable {
            // As SQLite and every journal rely on: this write, and in our rounds all before it.
            let mut world = lock(&self.record.world);
            world.allowed[at..at + n].iter_mut().for_each(collapse);
        }
        Ok(())
    }

    /// Sectors `at..at + n` read as zero.
    pub fn discard(&self, at: usize, n: usize) -> ploopfs::Result<()> {
        self.allow(at, n, 0);
        self.image.discard_at((at * SECTOR) as u64, (n * SECTOR) as u64)
    }

    /// All that was acknowledged is durable.
    pub fn flush(&self) -> ploopfs::Result<()> {
        self.image.flush_now()?;
        lock(&self.record.world).allowed.iter_mut().for_each(collapse);
        Ok(())
    }

    /// Puts a new top over the chain. The descriptor is taken to change at once and durably (R8 has its own tests).
    pub fn snapshot(&self) -> ploopfs::Result<()> {
        let record = self.record;
        let number_of = Mutex::new(0);
        let commit = || {
            let mut world = lock(&record.world);
            // All that was acknowledged is durable here.
            world.allowed.iter_mut().for_each(collapse);
            let (top, then) = (*world.chain.last().expect("a top"), world.allowed.clone());
            world.snapshots.push((top, then));
            let number = *lock(&number_of);
            world.chain.push(number);
            record.cut(&world);
            Ok(())
        };
        let made = |plan: TopPlan| {
            let header = Header::new(Version::V2, plan.disk, plan.cluster).expect("a legal size");
            let number = record.create(empty(header, plan.in_use));
            *lock(&number_of) = number;
            Ok(record.level(number))
        };
        self.image.put_on_top(made, commit)
    }

    /// Merges the two uppermost levels, the way that copies less.
    pub fn merge(&self) -> ploopfs::Result<()> {
        let record = self.record;
        let depth = lock(&record.world).chain.len();
        if depth < 2 {
            return Ok(());
        }
        {
            // Marked Temporary: nobody reads it alone any more.
            let mut world = lock(&record.world);
            let lower = world.chain[depth - 2];
            world.snapshots.retain(|(file, _)| *file != lower);
        }
        if self.image.merge_direction(true)? == Direction::Flip {
            let commit = || {
                let mut world = lock(&record.world);
                world.chain.swap(depth - 2, depth - 1);
                record.cut(&world);
                Ok(())
            };
            self.image.flip(&Progress::new(), commit)?;
            FLIPS.fetch_add(1, Ordering::Relaxed);
        }
        let commit = || {
            let mut world = lock(&record.world);
            world.chain.remove(depth - 2);
            record.cut(&world);
            Ok(())
        };
        self.image.pull_out(&Progress::new(), commit)
    }

    /// Frees zero clusters and makes the top shorter.
    pub fn compact(&self) -> ploopfs::Result<()> {
        self.image.compact(&Progress::new()).map(drop)
    }

    /// The same, and puts its clusters in order.
    pub fn defrag(&self) -> ploopfs::Result<()> {
        self.image.defrag(&Progress::new()).map(drop)
    }

    /// Makes the disk `size` bytes long, or a little longer.
    pub fn grow(&self, size: u64) -> ploopfs::Result<()> {
        let size = self.image.grow(size, &Progress::new())?;
        lock(&self.record.world).allowed.resize(size as usize / SECTOR, vec![0]);
        Ok(())
    }
}
