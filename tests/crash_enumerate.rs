//! Every history of up to three operations, as CrashMonkey enumerates them, on a fresh image and on prepared chains, and
//! longer ones at random: every host call is a crash point, and the states of each are chosen one by one (one change
//! alone survives, the sizes alone, the content alone, one file alone, ...) and at random. Every state must open, hold
//! an allowed value in every sector, and have nothing worse than a leak; on a sample `qemu-img check` agrees.
//!
//! The disk is tiny (239 clusters of two sectors, the last one partial), so that a growth by four clusters moves data
//! out of the BAT's way. PLOOPFS_LONG=1: ten times as many states.

mod common;
#[path = "common/crash/mod.rs"]
mod crash;

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crash::campaign::Live;
use crash::judge::{engine, judge_world};
use crash::power::{Keep, Rng, collapse, stamp};
use crash::world::{Host, Record, World, empty, lock};
use ploopfs::format::header::{Header, Version};
use ploopfs::image::check::check_level;
use ploopfs::image::kind::ImageKind;
use ploopfs::image::paths::Located;
use ploopfs::vdisk::{Engine, Image};

/// Two sectors: the least that can be written in part.
const CLUSTER: u64 = 1024;
/// One sector less than 239 clusters: the BAT fills its first cluster at 240.
const DISK: usize = 477;
/// Extensions of two clusters: several in a history.
const EXTEND: u64 = 2 * CLUSTER;
/// No round begins by itself.
const NEVER: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Half of a cluster that the top maps (on a prepared chain).
    InPlace,
    /// Half of a cluster that nobody maps.
    Allocate,
    /// All of a cluster that a lower level maps.
    Overwrite,
    /// Half of a cluster that a lower level maps.
    PartialCow,
    /// Two whole clusters: one of the top's, one of a lower level's.
    DiscardWhole,
    /// Ragged: half of each of two clusters.
    DiscardPart,
    Fsync,
    Snapshot,
    Merge,
    Grow,
    Compact,
    Defrag,
    Reopen,
}

const OPS: [Op; 13] = [
    Op::InPlace,
    Op::Allocate,
    Op::Overwrite,
    Op::PartialCow,
    Op::DiscardWhole,
    Op::DiscardPart,
    Op::Fsync,
    Op::Snapshot,
    Op::Merge,
    Op::Grow,
    Op::Compact,
    Op::Defrag,
    Op::Reopen,
];

/// An image while a history runs on it.
struct Run {
    engine: Arc<Engine>,
    record: Arc<Record>,
    image: Arc<Image>,
    /// The last stamp written.
    stamp: u32,
    allocated: usize,
}

impl Run {
    fn open(engine: &Arc<Engine>, start: &World, every: u64) -> Result<Run, String> {
        let record = Record::new(start.clone(), Host { every, ..Host::default() });
        let image = open(engine, &record)?;
        Ok(Run { engine: engine.clone(), record, image, stamp: 1000, allocated: 0 })
    }

    fn write(&mut self, at: usize, n: usize) -> ploopfs::Result<()> {
        self.stamp += 1;
        Live { record: &self.record, image: &self.image }.write(at, n, self.stamp, false)
    }

    fn carry_out(&mut self, op: Op) -> Result<(), String> {
        let live = Live { record: &self.record, image: &self.image };
        let done = match op {
            Op::InPlace => self.write(2, 1),
            Op::Allocate => {
                self.allocated += 1;
                self.write(20 + 2 * self.allocated, 1)
            }
            Op::Overwrite => self.write(4, 2),
            Op::PartialCow => self.write(1, 1),
            Op::DiscardWhole => live.discard(2, 4),
            Op::DiscardPart => live.discard(1, 2),
            Op::Fsync => live.flush(),
            Op::Snapshot => live.snapshot(),
            Op::Merge => live.merge(),
            Op::Grow => live.grow(self.image.size() + 4 * CLUSTER),
            Op::Compact => live.compact(),
            Op::Defrag => live.defrag(),
            Op::Reopen => {
                self.close()?;
                self.image = open(&self.engine, &self.record)?;
                Ok(())
            }
        };
        done.map_err(|e| format!("{op:?}: {e}"))
    }

    fn close(&self) -> Result<(), String> {
        self.image.close().map_err(|e| format!("cannot be closed: {e}"))?;
        lock(&self.record.world).allowed.iter_mut().for_each(collapse);
        Ok(())
    }

    /// Closes it, all of it durable; what is there now.
    fn world(self) -> Result<World, String> {
        self.close()?;
        let mut world = lock(&self.record.world).clone();
        world.files.iter_mut().for_each(|file| file.sync_all());
        Ok(world)
    }
}

fn open(engine: &Arc<Engine>, record: &Arc<Record>) -> Result<Arc<Image>, String> {
    let image = Image::open(engine, "crash", record.levels()).map_err(|e| format!("does not open: {e}"))?;
    image.make_writable().map_err(|e| format!("cannot be written: {e}"))?;
    Ok(image)
}

/// A fresh image; one with data and a free cluster; a chain of two, the top with data and a free cluster; a chain of
/// three, its middle one hiding data with a hole; one with data in an order that takes several rounds to put right; a top
/// over a raw file that is shorter than the disk and ends inside a cluster.
fn starts(engine: &Arc<Engine>) -> Result<Vec<(&'static str, World)>, String> {
    let header = Header::new(Version::V2, DISK as u64 * 512, CLUSTER).expect("a legal size");
    let fresh = World::new(vec![empty(header, false)], vec![vec![0]; DISK]);
    let failed = |e: ploopfs::Error| e.to_string();
    let mut run = Run::open(engine, &fresh, 0)?;
    // A free cluster before one in use, and the disk's partial last cluster.
    run.write(12, 2).map_err(failed)?;
    for cluster in 0..4 {
        run.write(2 * cluster, 2).map_err(failed)?;
    }
    run.write(DISK - 1, 1).map_err(failed)?;
    Live { record: &run.record, image: &run.image }.discard(12, 2).map_err(failed)?;
    let one = run.world()?;
    let mut run = Run::open(engine, &one, 0)?;
    run.carry_out(Op::Snapshot)?;
    run.write(14, 2).map_err(failed)?;
    run.write(2, 2).map_err(failed)?;
    Live { record: &run.record, image: &run.image }.discard(14, 2).map_err(failed)?;
    let two = run.world()?;
    let mut run = Run::open(engine, &two, 0)?;
    Live { record: &run.record, image: &run.image }.discard(4, 2).map_err(failed)?;
    run.carry_out(Op::Snapshot)?;
    run.write(2, 1).map_err(failed)?;
    run.write(7, 1).map_err(failed)?;
    let three = run.world()?;
    let mut run = Run::open(engine, &fresh, 0)?;
    for cluster in [3, 6, 1, 0, 7, 2, 5, 4] {
        run.write(2 * cluster, 2).map_err(failed)?;
    }
    let mixed = run.world()?;
    let mut disk = vec![vec![0]; DISK];
    (0..15).for_each(|sector| disk[sector] = vec![500 + sector as u32]);
    let bytes: Vec<u8> = disk[..15].iter().flat_map(|values| stamp(values[0])).collect();
    let files = vec![bytes, empty(header, false)];
    let raw = World { raw: Some(0), snapshots: vec![(0, disk.clone())], ..World::new(files, disk) };
    let mut run = Run::open(engine, &raw, 0)?;
    run.write(30, 2).map_err(failed)?;
    run.write(2, 2).map_err(failed)?;
    Live { record: &run.record, image: &run.image }.discard(30, 2).map_err(failed)?;
    let raw = run.world()?;
    let chains = [("fresh", fresh), ("one level", one), ("two levels", two), ("three levels", three)];
    Ok(chains.into_iter().chain([("mixed", mixed), ("over a raw file", raw)]).collect())
}

/// Every sequence of 1 to `longest` operations.
fn sequences(longest: usize) -> Vec<Vec<Op>> {
    let mut all: Vec<Vec<Op>> = Vec::new();
    let mut last = vec![Vec::new()];
    for _ in 0..longest {
        let longer = |ops: &Vec<Op>| OPS.map(|op| [&ops[..], &[op]].concat());
        last = last.iter().flat_map(longer).collect();
        all.extend(last.iter().cloned());
    }
    all
}

/// The states of a cut: those chosen one by one, then `random` others.
fn states(cut: &World, rng: &mut Rng, random: usize) -> Vec<Vec<Vec<u8>>> {
    let mut made = Vec::new();
    let mut make = |keep: &dyn Fn(usize) -> Keep| {
        let left = cut.files.iter().enumerate().map(|(n, file)| file.state(keep(n), rng));
        made.push(left.collect());
    };
    let unsynced: Vec<usize> = (0..cut.files.len()).filter(|n| cut.files[*n].pending() > 0).collect();
    make(&|_| Keep::Nothing);
    if unsynced.is_empty() {
        return made;
    }
    for keep in [Keep::Everything, Keep::Sizes, Keep::Content] {
        make(&|_| keep);
    }
    for file in unsynced {
        for others in [Keep::Nothing, Keep::Everything] {
            make(&|n| {
                if n != file {
                    others
                } else if others == Keep::Nothing {
                    Keep::Everything
                } else {
                    Keep::Nothing
                }
            });
            (0..cut.files[file].pending())
                .for_each(|change| make(&|n| if n == file { Keep::Only(change) } else { others }));
        }
    }
    (0..random).for_each(|_| make(&|_| Keep::Random));
    made
}

/// Runs one history and hands every different state of its cuts to `each`: of all, or of those from the `judged`-th
/// operation on (what comes before is another history's).
fn history(
    engine: &Arc<Engine>,
    start: &World,
    (ops, judged): (&[Op], usize),
    random: usize,
    mut each: impl FnMut(&World, &[Vec<u8>]) -> Result<(), String>,
) -> Result<(), String> {
    let mut run = Run::open(engine, start, 1)?;
    for (i, op) in ops.iter().enumerate() {
        if i == judged {
            run.record.take_cuts();
        }
        run.carry_out(*op)?;
    }
    run.close()?;
    // What was said to be there is there.
    let world = lock(&run.record.world).clone();
    judge_world(engine, &world, &world.files.iter().map(|f| f.durable.clone()).collect::<Vec<_>>())?;
    let mut seen = HashSet::new();
    let mut rng = Rng(ops.iter().fold(1u64, |seed, op| seed.wrapping_mul(16) + *op as u64));
    for (i, cut) in run.record.take_cuts().iter().enumerate() {
        let mut expected = DefaultHasher::new();
        (&cut.chain, &cut.allowed, &cut.snapshots).hash(&mut expected);
        let expected = expected.finish();
        for left in states(cut, &mut rng, random) {
            let mut state = DefaultHasher::new();
            cut.chain.iter().for_each(|n| left[*n].hash(&mut state));
            if seen.insert((expected, state.finish())) {
                each(cut, &left).map_err(|e| format!("cut {i}: {e}"))?;
            }
        }
    }
    Ok(())
}

/// Calls `each` with every start and history whose number `take` wants, on as many threads as there are CPUs. Returns how
/// many.
fn for_each(
    histories: &[Vec<Op>],
    take: impl Fn(usize) -> bool + Sync,
    each: impl Fn(&Arc<Engine>, &World, &[Op]) -> Result<(), String> + Sync,
) -> usize {
    let starts = starts(&engine(NEVER, EXTEND)).expect("the prepared chains can be made");
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
    let work = || {
        let engine = engine(NEVER, EXTEND);
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let (Some(ops), Some((name, start))) =
                (histories.get(n / starts.len()), starts.get(n % starts.len()))
            else {
                return;
            };
            if take(n) {
                each(&engine, start, ops).unwrap_or_else(|e| panic!("{name}, {ops:?}: {e}"));
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter().for_each(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    });
    done.into_inner()
}

/// Judges every state of these histories, from operation `judged` on as a function of the history, and prints figures.
fn judge_all(histories: &[Vec<Op>], judged: impl Fn(&[Op]) -> usize + Sync, random: usize) {
    let (began, states) = (Instant::now(), AtomicUsize::new(0));
    let histories = for_each(
        histories,
        |_| true,
        |engine, start, ops| {
            history(engine, start, (ops, judged(ops)), random, |cut, left| {
                states.fetch_add(1, Ordering::Relaxed);
                judge_world(engine, cut, left).map(drop)
            })
        },
    );
    println!(
        "CRASH STATES {} of {histories} histories in {} s",
        states.into_inner(),
        began.elapsed().as_secs()
    );
}

#[test]
fn every_power_cut_of_every_short_history_leaves_the_disk_and_its_snapshots() {
    let (longest, random) = if common::long() { (4, 8) } else { (3, 8) };
    // The history without its last operation is one of them, so that its cuts are judged already.
    judge_all(&sequences(longest), |ops| ops.len() - 1, random);
}

#[test]
fn every_power_cut_of_long_random_histories_leaves_the_disk_and_its_snapshots() {
    let mut rng = Rng(common::number_from_env("PLOOPFS_SEED", 1));
    let many = if common::long() { 5000 } else { 500 };
    let histories: Vec<Vec<Op>> = (0..many)
        .map(|_| (0..6 + rng.below(10)).map(|_| OPS[rng.below(OPS.len() as u64) as usize]).collect())
        .collect();
    judge_all(&histories, |_| 0, 4);
}

#[test]
fn check_and_qemu_img_check_find_nothing_worse_than_leaks_in_a_sample() {
    require!("qemu");
    let folder = common::memory_dir();
    let checked = AtomicUsize::new(0);
    // A prime: every operation and every start has its turn.
    for_each(
        &sequences(3),
        |n| n.is_multiple_of(31),
        |engine, start, ops| {
            let mut n = 0;
            history(engine, start, (ops, ops.len() - 1), 1, |cut, left| {
                n += 1;
                if n % 17 != 3 {
                    return Ok(());
                }
                for file in cut.chain.iter().filter(|file| cut.raw != Some(**file)) {
                    let name = format!("{}.hds", checked.fetch_add(1, Ordering::Relaxed));
                    let path = folder.path().join(name);
                    std::fs::write(&path, &left[*file]).map_err(|e| e.to_string())?;
                    let ours = check_level(&Located::of(&path).map_err(|e| e.to_string())?, ImageKind::Ploop)
                        .map_err(|e| e.to_string())?;
                    let theirs = qemu_check(&path)?;
                    std::fs::remove_file(&path).map_err(|e| e.to_string())?;
                    // QEMU counts the in-use mark as a corruption.
                    let expected = (u64::from(ours.in_use), ours.tail);
                    if ours.is_damaged() || theirs != expected {
                        return Err(format!("file {file}: qemu-img finds {theirs:?}, we {ours:?}"));
                    }
                }
                Ok(())
            })
        },
    );
    let checked = checked.into_inner();
    println!("qemu-img check agrees on {checked} files");
    assert!(checked > 100, "the sample is large enough to tell something: {checked}");
}

/// QEMU's check: corruptions and leaks.
fn qemu_check(path: &std::path::Path) -> Result<(u64, u64), String> {
    let done =
        common::Run::new("qemu-img").args(["check", "-f", "parallels", "--output=json"]).arg(path).run();
    let json: serde_json::Value =
        serde_json::from_str(&done.stdout).map_err(|e| format!("{e}: {}", done.output()))?;
    let number = |name: &str| json[name].as_u64().unwrap_or(0);
    Ok((number("corruptions"), number("leaks")))
}
