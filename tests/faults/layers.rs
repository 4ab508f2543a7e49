//! The SQLite loop over live operations: one history of writes, snapshots, merges both ways, growth and
//! defragmentation, over a delta and over a raw file, in which host operation N fails, whichever file of the chain it
//! meets, for N = 1, 2, ... until nothing fails any more.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ploopfs::Result;
use ploopfs::format::header::Header;
use ploopfs::io::fault::{FaultFile, FaultPlan};
use ploopfs::io::file::{HostFile, write_full};
use ploopfs::io::memory::MemoryFile;
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::freeze::Uncommitted;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Engine, Image, Layout, Level, OnFull, Options};

use super::rig::{CLUSTER, Pending, SECTOR, empty_file, lock, options};

/// Clusters of the disk at first.
const CLUSTERS: u64 = 24;
const SECTORS: u64 = CLUSTERS * CLUSTER / SECTOR;
/// So many more clusters need two more clusters of BAT: what lies there is moved.
const GROWN: u64 = 2 * CLUSTER / 4;
/// Runs at once; they wait more than they work.
const AT_ONCE: u64 = 24;
/// A whole run comes to its end within this time: a BAT write is tried for 5 s, a few times in a row.
const HANG: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
enum Op {
    /// First sector, sectors, stamp (0: zeroes).
    Write(u64, u64, u32),
    Discard(u64, u64),
    Flush,
    Snapshot,
    Grow,
    /// The level below the top into it.
    Up,
    /// The top into the level below it.
    Flip,
    /// Compacts the top, and puts its clusters in order.
    Defrag,
}

/// Eight sectors are a cluster.
const HISTORY: [Op; 24] = [
    Op::Write(0, 100, 1),
    Op::Flush,
    Op::Snapshot,
    Op::Write(3, 2, 2),   // copy on write
    Op::Write(8, 8, 3),   // a whole cluster: no copy
    Op::Discard(16, 16),  // zero clusters over lower data
    Op::Discard(33, 3),   // copy, then punch
    Op::Write(150, 9, 4), // nothing below
    Op::Grow,
    Op::Write(60, 4, 5),
    Op::Snapshot,
    Op::Write(1, 1, 6),
    Op::Flip, // the lower has more
    Op::Write(70, 20, 7),
    Op::Up,
    Op::Flush,
    Op::Snapshot,
    Op::Discard(0, 24),
    Op::Write(90, 30, 8),
    Op::Defrag,
    Op::Up,
    Op::Write(20, 2, 9),
    Op::Flush,
    Op::Write(160, 24, 10), // for the close to save
];

/// Sectors of a raw base: shorter than the disk, and ends inside a cluster.
const RAW: u64 = 60;
/// Over a raw base, which nothing above merges: it is pulled up, too.
const OVER_RAW: [Op; 3] = [Op::Up, Op::Up, Op::Write(40, 30, 11)];

/// For every sector, what it may hold: now, and on the file (any value since the last sync that worked).
#[derive(Clone)]
struct Model {
    now: Vec<Vec<u32>>,
    file: Vec<Vec<u32>>,
}

impl Model {
    fn wrote(&mut self, at: u64, n: u64, value: u32, worked: bool) {
        for s in at as usize..(at + n) as usize {
            if worked {
                self.now[s].clear();
            }
            self.now[s].push(value);
            self.file[s].push(value);
        }
    }
}

fn check(image: &Arc<Image>, allowed: &[Vec<u32>]) -> bool {
    let read = Pending::start(|reply| image.read(0, (SECTORS * SECTOR) as usize, reply)).answer();
    let Ok(data) = read else { return false };
    for (s, sector) in data.chunks(SECTOR as usize).enumerate() {
        let value = u32::from_le_bytes(sector[..4].try_into().expect("four bytes"));
        assert!(sector.chunks(4).all(|c| c == value.to_le_bytes()), "sector {s} is torn");
        assert!(allowed[s].contains(&value), "sector {s} holds {value}, allowed {:?}", allowed[s]);
    }
    true
}

/// The image's files, base first, as a descriptor has them; all of them fail by one plan.
struct Chain {
    plan: Arc<FaultPlan>,
    files: Mutex<Vec<Arc<MemoryFile>>>,
    /// Stands for the descriptor: it is stored by one operation that may fail.
    descriptor: FaultFile,
}

impl Chain {
    fn new(files: Vec<Arc<MemoryFile>>, spec: &str) -> Chain {
        let plan: Arc<FaultPlan> = Arc::new(spec.parse().expect("a fault"));
        let descriptor = FaultFile::new(Arc::new(MemoryFile::new()), plan.clone());
        Chain { plan, files: Mutex::new(files), descriptor }
    }

    fn level(&self, file: &Arc<MemoryFile>) -> Level {
        // A base without a header is a raw file.
        let bytes = file.to_bytes();
        let layout = Header::parse(bytes.get(..64).unwrap_or(&bytes)).map_or(Layout::Raw, Layout::Ploop);
        let file = Arc::new(FaultFile::new(file.clone(), self.plan.clone()));
        Level { file, path: PathBuf::from("memory"), layout }
    }

    fn open(&self, engine: &Arc<Engine>) -> Result<Arc<Image>> {
        let levels = lock(&self.files).iter().map(|file| self.level(file)).collect();
        let image = Image::open(engine, "memory", levels)?;
        image.make_writable()?;
        Ok(image)
    }

    fn depth(&self) -> usize {
        lock(&self.files).len()
    }

    /// The file below the top.
    fn below(&self) -> Arc<MemoryFile> {
        lock(&self.files).iter().nth_back(1).expect("two levels").clone()
    }

    fn store(&self, change: impl FnOnce(&mut Vec<Arc<MemoryFile>>)) -> std::result::Result<(), Uncommitted> {
        self.descriptor
            .sync_all()
            .map_err(|e| Uncommitted::NotDone(ploopfs::Error::new(ploopfs::Kind::Io, e.to_string())))?;
        change(&mut lock(&self.files));
        Ok(())
    }

    fn snapshot(&self, image: &Arc<Image>) -> Result<()> {
        let made = Mutex::new(None);
        let make = |plan: TopPlan| {
            let header = Header::new(plan.version, plan.disk, plan.cluster).expect("a legal size");
            let header = if plan.in_use { header.marked() } else { header };
            let memory = Arc::new(MemoryFile::new());
            let host = FaultFile::new(memory.clone(), self.plan.clone());
            write_full(&host, &header.encode(), 0)
                .and_then(|()| host.set_len(header.geometry().first))
                .and_then(|()| host.sync_all())
                .map_err(|e| ploopfs::Error::new(ploopfs::Kind::Io, e.to_string()))?;
            let level = self.level(&memory);
            *lock(&made) = Some(memory);
            Ok(level)
        };
        image.put_on_top(make, || self.store(|files| files.push(lock(&made).take().expect("made before"))))
    }

    fn flip(&self, image: &Arc<Image>) -> Result<()> {
        let below = self.depth() - 2;
        image.flip(&Progress::new(), || self.store(|files| files.swap(below, below + 1)))
    }

    fn pull_out(&self, image: &Arc<Image>) -> Result<()> {
        let below = self.depth() - 2;
        image.pull_out(&Progress::new(), || self.store(|files| drop(files.remove(below))))
    }
}

/// A snapshot: the file that was the top, and what each sector may hold in it.
type Kept = (Arc<MemoryFile>, Vec<Vec<u32>>);

/// One run, over a `raw` file or with the first snapshot its own; returns how many faults were injected.
fn run(spec: &str, options: Options, raw: bool) -> u64 {
    let mut now = vec![vec![0]; SECTORS as usize];
    let mut files = vec![Arc::new(empty_file(CLUSTERS))];
    let mut kept: Vec<Kept> = Vec::new();
    if raw {
        (0..RAW).for_each(|sector| now[sector as usize] = vec![100 + sector as u32]);
        let bytes: Vec<u8> = now[..RAW as usize]
            .iter()
            .flat_map(|of| of[0].to_le_bytes().repeat(SECTOR as usize / 4))
            .collect();
        files.insert(0, Arc::new(MemoryFile::from_bytes(&bytes)));
        kept.push((files[0].clone(), now.clone()));
    }
    let chain = Chain::new(files, spec);
    let engine = Engine::new(options, Box::new(|_| ()));
    let Ok(image) = chain.open(&engine) else { return 1 };
    let mut model = Model { now: now.clone(), file: now };
    for op in HISTORY.into_iter().chain(OVER_RAW.into_iter().filter(|_| raw)) {
        match op {
            Op::Write(at, n, value) => {
                let data = value.to_le_bytes().repeat((n * SECTOR / 4) as usize);
                let write = Pending::start(|reply| image.write(at * SECTOR, data.into(), false, reply));
                model.wrote(at, n, value, write.answer().is_ok());
            }
            Op::Discard(at, n) => {
                let discard = Pending::start(|reply| image.discard(at * SECTOR, n * SECTOR, reply));
                model.wrote(at, n, 0, discard.answer().is_ok());
            }
            Op::Flush => {
                if image.flush_now().is_ok() {
                    model.file.clone_from(&model.now);
                }
            }
            Op::Snapshot => {
                let top = lock(&chain.files).last().expect("a top").clone();
                let before = chain.depth();
                let done = chain.snapshot(&image);
                assert!(done.is_ok() == (chain.depth() > before), "{done:?}");
                if done.is_ok() {
                    kept.push((top, model.now.clone()));
                    model.file.clone_from(&model.now);
                }
            }
            Op::Grow => {
                let size = image.size();
                let done = image.grow(size + GROWN * CLUSTER, &Progress::new());
                assert_eq!(image.size() > size, done.is_ok(), "{done:?}");
            }
            Op::Up | Op::Flip if chain.depth() < 2 => {}
            Op::Up => drop(chain.pull_out(&image)),
            Op::Defrag => drop(image.defrag(&Progress::new())),
            Op::Flip => {
                if image.merge_direction(true).is_ok_and(|d| d == Direction::Flip) {
                    // From its first step on, what is below is no snapshot of its own any more.
                    let below = chain.below();
                    kept.retain(|(file, _)| !Arc::ptr_eq(file, &below));
                    drop(chain.flip(&image));
                    let below = chain.below();
                    kept.retain(|(file, _)| !Arc::ptr_eq(file, &below));
                }
            }
        }
    }
    assert!(check(&image, &model.now) || chain.plan.injected() > 0, "a read fails only when the host does");
    let closed = image.close();
    let left = if closed.is_ok() { &model.now } else { &model.file };
    let injected = chain.plan.injected();
    afterwards(&chain, left, &kept);
    injected
}

/// What is left opens, is sound, holds what it must, and everything works again.
fn afterwards(chain: &Chain, left: &[Vec<u32>], kept: &[Kept]) {
    let files = lock(&chain.files).clone();
    let engine = Engine::new(options(), Box::new(|_| ()));
    let copies = |files: &[Arc<MemoryFile>]| {
        files.iter().map(|f| Arc::new(MemoryFile::from_bytes(&f.to_bytes()))).collect()
    };
    for (top, then) in kept {
        let Some(at) = files.iter().position(|file| Arc::ptr_eq(file, top)) else { continue };
        let snapshot = Chain::new(copies(&files[..=at]), "");
        let image = snapshot.open(&engine).expect("a snapshot opens, with no double use");
        assert!(check(&image, then));
        image.close().expect("closes");
    }
    let again = Chain::new(copies(&files), "");
    let image = again.open(&engine).expect("opens, with no double use, nothing out of range");
    assert!(check(&image, left));
    again.snapshot(&image).expect("a snapshot");
    image.write_at(0, &[0x77; CLUSTER as usize]).expect("writes again");
    while again.depth() > 1 {
        if again.depth() == 2 && image.merge_direction(true).expect("two BATs") == Direction::Flip {
            again.flip(&image).expect("a flip");
        }
        again.pull_out(&image).expect("a merge");
    }
    let mut expected = left.to_vec();
    expected[..(CLUSTER / SECTOR) as usize].fill(vec![0x7777_7777]);
    assert!(check(&image, &expected));
    image.close().expect("closes");
    let image = again.open(&engine).expect("opens");
    assert!(check(&image, &expected));
    image.close().expect("closes");
}

/// Runs `fault` with N in place of `#` for N = 1, 2, ...
fn every_n(fault: &str, options: &Options, raw: bool) -> u64 {
    let (mut total, mut first) = (0, 1);
    loop {
        let runs: Vec<_> = (first..first + AT_ONCE)
            .map(|n| {
                let (spec, options) = (fault.replace('#', &n.to_string()), options.clone());
                let (tell, end) = channel();
                let thread = std::thread::Builder::new().name(spec.clone());
                let work = move || {
                    let _ = tell.send(run(&spec, options, raw));
                };
                (thread.spawn(work).expect("a thread"), end)
            })
            .collect();
        let mut all = true;
        for (thread, end) in runs {
            match end.recv_timeout(HANG) {
                Ok(faults) => {
                    total += faults;
                    all &= faults > 0;
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    panic!("{:?} hangs", thread.thread().name())
                }
                Err(_) => thread.join().expect("no run fails"),
            }
        }
        if !all {
            return total;
        }
        first += AT_ONCE;
    }
}

fn all(faults: &[&str]) {
    let options = Options { on_full: OnFull::Error, ..options() };
    let count: u64 =
        faults.iter().flat_map(|fault| [false, true].map(|raw| every_n(fault, &options, raw))).sum();
    println!("FAULTS {count}");
}

#[test]
fn live_operations_survive_every_host_call_failing_once_with_eio() {
    all(&["fail=any:#:EIO"]);
}

#[test]
fn live_operations_survive_every_host_call_finding_the_host_full() {
    all(&["fail=any:#:ENOSPC", "fail=write:#:ENOSPC:forever"]);
}

#[test]
fn live_operations_survive_every_kind_of_call_failing_for_good() {
    all(&["fail=sync:#:EIO:forever", "fail=set_len:#:EIO:forever", "fail=punch:#:EIO:forever"]);
}

#[test]
fn live_operations_lose_no_tail_to_short_reads_and_writes() {
    all(&["short=write:#", "short=read:#"]);
}
