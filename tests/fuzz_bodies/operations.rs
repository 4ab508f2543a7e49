//! A sequence of operations on an image, with a power cut after so many operations on its files. Whatever the cut left,
//! the chain opens, every sector holds an allowed value, every snapshot has what it had, and life goes on.
//!
//! Input: one byte of settings, two of the countdown, two that seed what the cut keeps, then four for each operation:
//! what, where (two), how much.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ploopfs::format::header::{Header, IN_USE, Version};
use ploopfs::io::file::{HostFile, HostTraits};
use ploopfs::io::memory::MemoryFile;
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Engine, Image, Layout, Level};

use super::power::{Change, Keep, Rng, SECTOR, Unsynced, collapse, read_stamp, stamp};
use super::watched::{HostCall, Watch, Watched};
use super::{eager_engine, lazy_engine};

/// Sectors of the disk at first: some clusters, the last one partial.
const DISK: u64 = 300;
/// Operations of one input; a longer one says nothing new.
const MOST: usize = 48;
/// States of each cut that are looked at.
const STATES: usize = 3;

/// What each sector may hold.
type Allowed = Vec<Vec<u32>>;

/// Everything that a power cut sees at once.
#[derive(Clone, Default)]
struct World {
    files: Vec<Unsynced>,
    /// The chain that the descriptor names: numbers of files, base first.
    chain: Vec<usize>,
    allowed: Allowed,
    /// The file that was the top, and what each sector may hold in it.
    snapshots: Vec<(usize, Allowed)>,
    /// Operations on files until the cut.
    left: u64,
}

#[derive(Default)]
struct Record {
    world: Mutex<World>,
    live: Mutex<Vec<Arc<MemoryFile>>>,
    cut: Mutex<Option<World>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    fn tick(&self, world: &mut World) {
        world.left = world.left.saturating_sub(1);
        let mut cut = lock(&self.cut);
        if world.left == 0 && cut.is_none() {
            *cut = Some(world.clone());
        }
    }

    /// A new file whose content is durable: creation ends with a sync.
    fn create(&self, bytes: &[u8]) -> usize {
        lock(&self.live).push(Arc::new(MemoryFile::from_bytes(bytes)));
        let mut world = lock(&self.world);
        world.files.push(Unsynced::new(bytes.to_vec()));
        world.files.len() - 1
    }

    fn level(self: &Arc<Self>, number: usize) -> Level {
        let live = Arc::clone(&lock(&self.live)[number]);
        let layout = layout(&live);
        let file = Watched { file: live, watch: Recorded { record: Arc::clone(self), number } };
        Level { file: Arc::new(file), path: PathBuf::from(format!("file{number}")), layout }
    }
}

fn layout(file: &MemoryFile) -> Layout {
    let mut head = [0; 64];
    file.read_at(&mut head, 0).expect("memory reads");
    Header::parse(&head).map_or(Layout::Raw, Layout::Ploop)
}

/// Writes down what happens to one file of the world.
struct Recorded {
    record: Arc<Record>,
    number: usize,
}

impl Watch for Recorded {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        if matches!(call, HostCall::Read { .. } | HostCall::ReadNowait { .. }) {
            return call.carry_out(file);
        }
        let mut world = lock(&self.record.world);
        let moved = match call {
            HostCall::Write { data, at } => {
                let end = at + data.len() as u64;
                if end > file.len()? {
                    world.files[self.number].push(Change::SetLen(end));
                }
                file.write_at(data, at)?;
                // A change of part of a sector is a change of the whole sector, as a disk sees it.
                let (from, to) = (at / 512 * 512, end.next_multiple_of(512));
                let mut whole = vec![0; (to.min(file.len()?) - from) as usize];
                file.read_at(&mut whole, from)?;
                world.files[self.number].push(Change::Write { at: from, data: whole });
                data.len()
            }
            HostCall::SetLen(len) => {
                file.set_len(len)?;
                world.files[self.number].push(Change::SetLen(len));
                0
            }
            HostCall::Punch { at, len } => {
                file.punch(at, len)?;
                world.files[self.number].push(Change::Punch { at, len });
                0
            }
            _ => {
                // The cut just before a sync is the one that loses most.
                self.record.tick(&mut world);
                world.files[self.number].sync_all();
                0
            }
        };
        self.record.tick(&mut world);
        Ok(moved)
    }

    fn traits(&self, _: HostTraits) -> HostTraits {
        HostTraits { nowait_reads: true, never_blocks: false, device: 0 }
    }
}

fn empty(version: Version, disk: u64, cluster: u64, in_use: bool) -> Vec<u8> {
    let header = Header::new(version, disk, cluster).expect("a legal size");
    let header = if in_use { header.marked() } else { header };
    let mut bytes = header.encode().to_vec();
    bytes.resize(header.geometry().first as usize, 0);
    bytes
}

/// The body.
pub fn operations(data: &[u8]) {
    let [settings, countdown @ .., _, _] = *data.first_chunk::<5>().unwrap_or(&[0; 5]);
    let seed = data.get(3..5).map_or(0, |b| u64::from(u16::from_le_bytes([b[0], b[1]])));
    let engine = if settings & 1 == 0 { lazy_engine() } else { eager_engine() };
    let version = if settings & 2 == 0 { Version::V2 } else { Version::V1 };
    let cluster = [8, 1, 63, 64][usize::from(settings >> 2 & 3)] * SECTOR as u64;
    let record = Arc::new(Record::default());
    let base = match settings & 0x10 {
        0 => empty(version, DISK * SECTOR as u64, cluster, false),
        _ => vec![0; DISK as usize * SECTOR],
    };
    record.create(&base);
    {
        let mut world = lock(&record.world);
        world.chain = vec![0];
        world.allowed = vec![vec![0]; DISK as usize];
        world.left = u64::from(u16::from_le_bytes([countdown[0], countdown[1]]) % 1024);
        if world.left == 0 {
            world.left = u64::MAX;
        }
    }
    let mut open = None;
    let mut value = 0;
    for op in data.get(5..).unwrap_or_default().chunks_exact(4).take(MOST) {
        let image = open.get_or_insert_with(|| begin(&record, engine));
        value += 1;
        if !carry_out(&record, image, op, value) {
            open = None;
        }
        if lock(&record.cut).is_some() {
            break;
        }
    }
    if lock(&record.cut).is_none()
        && let Some(image) = &open
    {
        close(&record, image);
    }
    let world = match lock(&record.cut).take() {
        Some(world) => world,
        None => lock(&record.world).clone(),
    };
    let mut rng = Rng(seed);
    for _ in 0..STATES {
        judge_world(&world, &mut rng);
    }
}

fn begin(record: &Arc<Record>, engine: &Arc<Engine>) -> Arc<Image> {
    let chain = lock(&record.world).chain.clone();
    let levels = chain.iter().map(|number| record.level(*number)).collect();
    let image = Image::open(engine, "fuzz", levels).expect("a sound chain opens");
    image.make_writable().expect("a sound BAT");
    image
}

fn close(record: &Arc<Record>, image: &Arc<Image>) {
    image.close().expect("closes");
    lock(&record.world).allowed.iter_mut().for_each(collapse);
}

/// One operation; false when the image was closed.
fn carry_out(record: &Arc<Record>, image: &Arc<Image>, op: &[u8], value: u32) -> bool {
    let disk = (image.size() / SECTOR as u64) as usize;
    let at = usize::from(u16::from_le_bytes([op[1], op[2]])) % disk;
    let n = (1 + usize::from(op[3]) % 80).min(disk - at);
    let (offset, len) = ((at * SECTOR) as u64, (n * SECTOR) as u64);
    let allow = |value: u32| lock(&record.world).allowed[at..at + n].iter_mut().for_each(|s| s.push(value));
    match op[0] % 16 {
        what @ 0..=5 => {
            let value = if what == 5 { 0 } else { value };
            allow(value);
            let data = stamp(value).repeat(n);
            let inline = if what < 3 { image.try_write(offset, &data) } else { None };
            match inline {
                Some(done) => done.expect("writes"),
                None => image.write_at(offset, &data).expect("writes"),
            }
        }
        6 => {
            allow(value);
            let (tell, answer) = std::sync::mpsc::channel();
            let reply = Box::new(move |result| drop(tell.send(result)));
            image.write(offset, stamp(value).repeat(n).into(), true, reply);
            answer.recv().expect("answers").expect("writes");
            lock(&record.world).allowed[at..at + n].iter_mut().for_each(collapse);
        }
        7 | 8 => {
            allow(0);
            image.discard_at(offset, len).expect("discards");
        }
        9 | 10 => {
            image.flush_now().expect("syncs");
            lock(&record.world).allowed.iter_mut().for_each(collapse);
        }
        11 => snapshot(record, image),
        12 => merge(record, image),
        13 => {
            let more = u64::from(op[3]) * SECTOR as u64;
            let size = image.grow(image.size() + more, &Progress::new()).expect("grows");
            lock(&record.world).allowed.resize(size as usize / SECTOR, vec![0]);
        }
        14 => {
            close(record, image);
            return false;
        }
        _ => {
            let data = image.read_at(offset, len as usize).expect("reads");
            let world = lock(&record.world);
            for (sector, allowed) in data.chunks(SECTOR).zip(&world.allowed[at..at + n]) {
                // Without a cut there is one truth: the last write.
                assert_eq!(read_stamp(sector).as_ref(), allowed.last(), "a read sees something else");
            }
        }
    }
    true
}

fn snapshot(record: &Arc<Record>, image: &Arc<Image>) {
    if lock(&record.world).chain.len() >= 8 {
        return;
    }
    let new = Mutex::new(0);
    let make = |plan: TopPlan| {
        *lock(&new) = record.create(&empty(plan.version, plan.disk, plan.cluster, plan.in_use));
        Ok(record.level(*lock(&new)))
    };
    let commit = || {
        let mut world = lock(&record.world);
        // All that was acknowledged is durable here.
        world.allowed.iter_mut().for_each(collapse);
        let (top, then) = (*world.chain.last().expect("a top"), world.allowed.clone());
        world.snapshots.push((top, then));
        world.chain.push(*lock(&new));
        record.tick(&mut world);
        Ok(())
    };
    image.put_on_top(make, commit).expect("a snapshot");
}

fn merge(record: &Arc<Record>, image: &Arc<Image>) {
    let depth = lock(&record.world).chain.len();
    if depth < 2 {
        return;
    }
    let lower = {
        // Deleted: nobody reads it alone any more.
        let mut world = lock(&record.world);
        let lower = world.chain[depth - 2];
        world.snapshots.retain(|(file, _)| *file != lower);
        lower
    };
    let raw = matches!(layout(&lock(&record.live)[lower]), Layout::Raw);
    if !raw && image.merge_direction(true).expect("two BATs") == Direction::Flip {
        let commit = || {
            let mut world = lock(&record.world);
            world.chain.swap(depth - 2, depth - 1);
            record.tick(&mut world);
            Ok(())
        };
        image.flip(&Progress::new(), commit).expect("a flip");
    }
    let commit = || {
        let mut world = lock(&record.world);
        world.chain.remove(depth - 2);
        record.tick(&mut world);
        Ok(())
    };
    image.pull_out(&Progress::new(), commit).expect("a merge");
}

fn judge_world(world: &World, rng: &mut Rng) {
    let left: Vec<Arc<MemoryFile>> = world
        .files
        .iter()
        .map(|file| Arc::new(MemoryFile::from_bytes(&file.state(Keep::Random, rng))))
        .collect();
    let chain: Vec<_> = world.chain.iter().map(|number| Arc::clone(&left[*number])).collect();
    // The snapshots are looked at as they were left; the live disk is written to.
    for (top, then) in &world.snapshots {
        if let Some(at) = world.chain.iter().position(|number| number == top) {
            judge(&chain[..=at], then);
        }
    }
    let image = judge(&chain, &world.allowed);
    image.make_writable().expect("whatever a cut leaves can be written");
    for file in &chain[..chain.len() - 1] {
        let mark = if let Layout::Ploop(header) = layout(file) { header.in_use } else { 0 };
        assert_ne!(mark, IN_USE, "a lower level still says in use");
    }
    let middle = image.size() / 2 / SECTOR as u64 * SECTOR as u64;
    image.write_at(middle, &stamp(0xFFFF_FFFF)).expect("writes");
    image.flush_now().expect("syncs");
    image.close().expect("closes");
    let mut allowed = world.allowed.clone();
    allowed.resize(image.size() as usize / SECTOR, vec![0]);
    allowed[middle as usize / SECTOR] = vec![0xFFFF_FFFF];
    judge(&chain, &allowed);
}

/// Every sector of the disk that `files`, base first, make.
fn judge(files: &[Arc<MemoryFile>], allowed: &Allowed) -> Arc<Image> {
    let level = |file: &Arc<MemoryFile>| {
        let layout = layout(file);
        let file = Arc::clone(file);
        Level { file, path: PathBuf::from("state"), layout }
    };
    let image = Image::open(lazy_engine(), "state", files.iter().map(level).collect());
    let image = image.expect("whatever a cut leaves opens");
    let data = image.read_at(0, image.size() as usize).expect("reads");
    // A cut in a growth may leave either size; what is new reads as zero.
    let new = vec![0];
    for (sector, data) in data.chunks(SECTOR).enumerate() {
        let allowed = allowed.get(sector).unwrap_or(&new);
        let found = read_stamp(data);
        let legal = found.is_some_and(|value| allowed.contains(&value));
        assert!(legal, "sector {sector} holds {found:?}, allowed are {allowed:?}");
    }
    image
}
