//! Load whose every sector says which write it came from, with a record of what was acknowledged as durable.
//!
//! A block is 4 KiB and belongs to one thread, which numbers its operations on it (0 = never touched, zero).
//! After a crash a sector must show the state after some operation k, durable <= k <= issued: nothing that an
//! fsync or an O_DSYNC write acknowledged may be missing, nothing may come from nowhere. The first half of the
//! span has clusters shared by all threads, block by block; in the second half each cluster has one owner, which
//! also writes and discards it whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

use super::{Rng, until};

const BLOCK: u64 = 4096;
const SECTOR: usize = 512;
/// A load without a sync for so long hangs. A busy disk needs seconds for one, not minutes.
const STANDSTILL: Duration = Duration::from_secs(300);
const MAGIC: u64 = 0x504c_4f4f_5053_544d; // "PLOOPSTM"

/// How the load looks.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Cluster size of the image in bytes, a multiple of 4 KiB.
    pub cluster: u64,
    /// Clusters touched, from the start of the disk.
    pub clusters: u64,
    /// Writing threads.
    pub threads: u64,
    /// Seed of everything.
    pub seed: u64,
}

impl Shape {
    /// Bytes touched.
    pub fn span(&self) -> u64 {
        self.cluster * self.clusters
    }
}

/// What is known of one block: numbers of operations.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    issued: u32,
    acked: u32,
    durable: u32,
    last_discard: u32,
}

struct Shared {
    shape: Shape,
    /// Protects the record alone; never held across I/O.
    blocks: Mutex<Vec<Block>>,
    stop: AtomicBool,
    syncs: AtomicU64,
    operations: AtomicU64,
}

impl Shared {
    fn blocks(&self) -> MutexGuard<'_, Vec<Block>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Load in progress, or what is known of it after its end.
pub struct Workload {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

/// What a look at an image after a crash found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Blocks of which something was durable.
    pub durable: u64,
    /// The first contradictions, in words.
    pub problems: Vec<String>,
}

/// What was durable at one moment.
pub struct Durable(Vec<u32>);

impl Workload {
    /// Zeroes the span, syncs, and begins.
    pub fn start(flat: &Path, shape: Shape) -> Workload {
        let open = |flags: i32| {
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(flat);
            file.unwrap_or_else(|error| panic!("cannot open {}: {error}", flat.display()))
        };
        let file = open(0);
        punch(&file, 0, shape.span()).expect("the punch that begins the load");
        file.sync_all().expect("the fsync that begins the load");
        let blocks = vec![Block::default(); usize::try_from(shape.span() / BLOCK).expect("a small span")];
        let shared = Arc::new(Shared {
            shape,
            blocks: Mutex::new(blocks),
            stop: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            operations: AtomicU64::new(0),
        });
        let threads = (0..shape.threads).map(|number| {
            let worker = Worker {
                number,
                rng: Rng::new(shape.seed * 1000 + number),
                plain: open(0),
                durable: open(libc::O_DSYNC),
                shared: shared.clone(),
            };
            std::thread::spawn(move || worker.run())
        });
        let threads = threads.collect();
        Workload { shared, threads }
    }

    /// Waits until `more` further syncs were acknowledged; panics where the load stands still.
    #[track_caller]
    pub fn wait_for_syncs(&self, more: u64) {
        let syncs = || self.shared.syncs.load(Ordering::SeqCst);
        let goal = syncs() + more;
        let over = || self.threads.iter().any(JoinHandle::is_finished);
        until(STANDSTILL, || syncs() >= goal || over());
        let why = if over() { "one of its threads failed" } else { "it stands still" };
        assert!(syncs() >= goal, "the load has {} syncs of {goal}: {why}", syncs());
    }

    /// What is durable now.
    pub fn durable(&self) -> Durable {
        Durable(self.shared.blocks().iter().map(|block| block.durable).collect())
    }

    /// The shape it was started with.
    pub fn shape(&self) -> Shape {
        self.shared.shape
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.shared.operations.load(Ordering::SeqCst)
    }

    /// Ends the load; returns the errors of its threads.
    pub fn stop(&mut self) -> Vec<io::Error> {
        self.shared.stop.store(true, Ordering::SeqCst);
        let ended = self.threads.drain(..).map(|thread| thread.join().expect("a load thread panicked"));
        ended.filter_map(Result::err).collect()
    }

    /// Compares what `file` shows with what must be there.
    pub fn verify(&self, file: &File, durable: &Durable) -> Verdict {
        let mut verdict = Verdict::default();
        let shape = &self.shared.shape;
        let per_cluster = shape.cluster / BLOCK;
        let mut data = vec![0; usize::try_from(shape.cluster).expect("a cluster fits into memory")];
        for cluster in 0..shape.clusters {
            if let Err(error) = file.read_exact_at(&mut data, cluster * shape.cluster) {
                verdict.note(format!("cluster {cluster} cannot be read: {error}"));
                continue;
            }
            for (inside, bytes) in data.chunks_exact(BLOCK as usize).enumerate() {
                let number = cluster * per_cluster + inside as u64;
                let block = self.shared.blocks()[number as usize];
                let floor = durable.0[number as usize];
                verdict.durable += u64::from(floor > 0);
                for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
                    if let Some(problem) = judge(shape.seed, number, sector as u64, bytes, block, floor) {
                        verdict.note(problem);
                    }
                }
            }
        }
        verdict
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Verdict {
    fn note(&mut self, problem: String) {
        // Ten tell the pattern; thousands hide it.
        if self.problems.len() < 10 {
            self.problems.push(problem);
        }
    }
}

/// What is wrong with a sector, if anything.
fn judge(seed: u64, number: u64, sector: u64, bytes: &[u8], block: Block, floor: u32) -> Option<String> {
    let place = || format!("block {number} sector {sector} (cluster byte {})", number * BLOCK);
    if bytes.iter().all(|&byte| byte == 0) {
        let lost = block.last_discard < floor;
        return lost.then(|| {
            format!(
                "{}: zero, but write {floor} was durable, discard {} before it",
                place(),
                block.last_discard
            )
        });
    }
    let word = |index: usize| {
        let mut raw = [0; 8];
        raw.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
        u64::from_le_bytes(raw)
    };
    let operation = word(1) as u32;
    if word(0) != MAGIC || bytes != stamp(seed, number, sector, operation) {
        return Some(format!("{}: bytes of no write here: {:x?}", place(), &bytes[..32]));
    }
    if operation < floor || operation > block.issued {
        return Some(format!("{}: write {operation}, not {floor}..={}", place(), block.issued));
    }
    None
}

/// The content of one sector.
fn stamp(seed: u64, number: u64, sector: u64, operation: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mut rng = Rng::new(seed ^ (number << 40) ^ (sector << 32) ^ u64::from(operation));
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => number << 32 | u64::from(operation),
            2 => sector,
            _ => rng.next(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Makes a range read as zero.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
}

struct Worker {
    number: u64,
    rng: Rng,
    plain: File,
    durable: File,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self) -> io::Result<()> {
        while !self.shared.stop.load(Ordering::SeqCst) {
            match self.rng.below(100) {
                0..60 => {
                    let range = self.pick();
                    self.write(range, false)?;
                }
                60..72 => {
                    let range = self.pick();
                    self.write(range, true)?;
                    self.shared.syncs.fetch_add(1, Ordering::SeqCst);
                }
                72..87 => {
                    let range = self.pick();
                    self.discard(range)?;
                }
                _ => self.sync()?,
            }
            self.shared.operations.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// First block and number of blocks, all of them this thread's own.
    fn pick(&mut self) -> (u64, u64) {
        let Shape { cluster, clusters, threads, .. } = self.shared.shape;
        let per_cluster = cluster / BLOCK;
        let shared_clusters = clusters / 2;
        if self.rng.below(2) == 0 {
            let rows = shared_clusters * per_cluster / threads;
            return (self.rng.below(rows) * threads + self.number, 1);
        }
        let own = (clusters - shared_clusters) / threads;
        let first = (shared_clusters + self.rng.below(own) * threads + self.number) * per_cluster;
        if self.rng.below(4) == 0 {
            return (first, per_cluster);
        }
        let inside = self.rng.below(per_cluster);
        (first + inside, 1 + self.rng.below((per_cluster - inside).min(16)))
    }

    fn issue(&self, (first, count): (u64, u64), discard: bool) -> Vec<u32> {
        let mut blocks = self.shared.blocks();
        let mut numbers = Vec::with_capacity(count as usize);
        for block in &mut blocks[first as usize..(first + count) as usize] {
            block.issued += 1;
            if discard {
                block.last_discard = block.issued;
            }
            numbers.push(block.issued);
        }
        numbers
    }

    fn acknowledge(&self, (first, count): (u64, u64), durable: bool) {
        for block in &mut self.shared.blocks()[first as usize..(first + count) as usize] {
            block.acked = block.issued;
            if durable {
                block.durable = block.issued;
            }
        }
    }

    fn write(&mut self, range: (u64, u64), durable: bool) -> io::Result<()> {
        let operations = self.issue(range, false);
        // On a page's border: the kernel cuts a request of 256 pages in an unaligned buffer in the middle of a sector.
        let len = range.1 as usize * BLOCK as usize;
        let mut buffer = vec![0; len + BLOCK as usize];
        let start = buffer.as_ptr().align_offset(BLOCK as usize);
        let data = &mut buffer[start..start + len];
        let sectors = data.chunks_exact_mut(SECTOR).enumerate();
        let per_block = BLOCK as usize / SECTOR;
        for (index, bytes) in sectors {
            let number = range.0 + (index / per_block) as u64;
            let operation = operations[index / per_block];
            bytes.copy_from_slice(&stamp(
                self.shared.shape.seed,
                number,
                (index % per_block) as u64,
                operation,
            ));
        }
        let file = if durable { &self.durable } else { &self.plain };
        file.write_all_at(data, range.0 * BLOCK)?;
        self.acknowledge(range, durable);
        Ok(())
    }

    fn discard(&mut self, range: (u64, u64)) -> io::Result<()> {
        self.issue(range, true);
        punch(&self.plain, range.0 * BLOCK, range.1 * BLOCK)?;
        self.acknowledge(range, false);
        Ok(())
    }

    /// Everything acknowledged before the call, by any thread, is durable after it.
    fn sync(&mut self) -> io::Result<()> {
        let acked: Vec<u32> = self.shared.blocks().iter().map(|block| block.acked).collect();
        self.plain.sync_data()?;
        for (block, acked) in self.shared.blocks().iter_mut().zip(acked) {
            block.durable = block.durable.max(acked);
        }
        self.shared.syncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
