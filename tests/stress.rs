//! Many submitters on the same sectors of one image, on real threads, with snapshots, merges, grows and freezes going on.
//! Every sector carries the stamp of the write that it came from; a read must return one that some order of the
//! requests could have left there: begun before the read ended, and not overwritten by a write that began after it was
//! answered and was itself answered before the read began.
//!
//! About ten seconds for each host; PLOOPFS_LONG=1 makes it ten minutes. ThreadSanitizer: `cargo +nightly test
//! --test stress --target x86_64-unknown-linux-gnutsan`, where a nightly compiler has that target; stable has none.

mod common;
#[path = "stress/history.rs"]
mod history;
#[path = "common/crash/watched.rs"]
mod watched;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::Rng;
use history::{History, SECTOR};
use ploopfs::format::header::{Header, Version};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::io::real::{Access, RealFile};
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options};
use watched::{HostCall, Watch, Watched};

const CLUSTER: u64 = 4096;
/// Guest bytes that one BAT page maps.
const PAGE: u64 = 1024 * CLUSTER;
/// More BAT pages than the smallest cache has room for.
const PAGES: u64 = 20;
/// Clusters in use at the beginning of each page: few, so that submitters meet.
const HOT: u64 = 24;
const SUBMITTERS: u64 = 6;
/// Levels from which on the operator merges.
const DEEP: usize = 5;

/// Makes host files: number and content.
type Maker<'a> = &'a (dyn Fn(usize, &[u8]) -> Arc<dyn HostFile> + Sync);

struct Stress<'a> {
    make: Maker<'a>,
    engine: Arc<Engine>,
    history: History,
    /// The chain, base first.
    files: Mutex<Vec<Arc<dyn HostFile>>>,
    made: AtomicU64,
    stop: AtomicBool,
}

fn level(file: &Arc<dyn HostFile>) -> Level {
    let mut head = [0; 64];
    file.read_at(&mut head, 0).expect("the header is readable");
    let layout = Layout::Ploop(Header::parse(&head).expect("a header"));
    Level { file: Arc::clone(file), path: PathBuf::from("stress"), layout }
}

/// The position of hot sector `n` on the disk, in sectors.
fn hot(n: u64) -> u64 {
    let per_page = HOT * CLUSTER / SECTOR;
    (n / per_page) * (PAGE / SECTOR) + n % per_page
}

impl Stress<'_> {
    fn new_file(&self, header: &Header) -> Arc<dyn HostFile> {
        let mut bytes = header.encode().to_vec();
        bytes.resize(header.geometry().first as usize, 0);
        (self.make)(self.made.fetch_add(1, Ordering::SeqCst) as usize, &bytes)
    }

    fn chain(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn HostFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, depth: usize) -> Arc<Image> {
        let levels = self.chain()[..depth].iter().map(level).collect();
        Image::open(&self.engine, "stress", levels).expect("the chain opens")
    }

    /// One thread's requests until it is told to stop.
    fn submit(&self, image: &Arc<Image>, who: usize, seed: u64) -> u64 {
        let mut rng = Rng::new(seed);
        let mut count = 0;
        while !self.stop.load(Ordering::Relaxed) {
            count += 1;
            let page = rng.below(PAGES) * HOT * CLUSTER / SECTOR;
            let first = hot(page + rng.below(HOT * CLUSTER / SECTOR));
            let end = hot(page) + HOT * CLUSTER / SECTOR;
            let longest = if rng.below(4) == 0 { 40 } else { 8 };
            let n = (1 + rng.below(longest)).min(end - first);
            let (at, len) = (first * SECTOR, n * SECTOR);
            match rng.below(20) {
                0..9 => {
                    let write = self.history.begin_write(first, n);
                    let data = write.data();
                    let durable = rng.below(40) == 0;
                    let inline =
                        if rng.below(2) == 0 && !durable { image.try_write(at, &data) } else { None };
                    match inline {
                        Some(done) => done.expect("writes"),
                        None if durable => {
                            let (tell, answer) = std::sync::mpsc::channel();
                            let reply = Box::new(move |result| drop(tell.send(result)));
                            image.write(at, data.into(), true, reply);
                            answer.recv().expect("answers").expect("writes");
                        }
                        None => image.write_at(at, &data).expect("writes"),
                    }
                    self.history.end_write(write);
                }
                9..12 => {
                    let zero = self.history.begin_zero(first, n);
                    image.discard_at(at, len).expect("discards");
                    self.history.end_write(zero);
                }
                12 if rng.below(4) == 0 => image.flush_now().expect("syncs"),
                _ => {
                    let begun = self.history.begin_read(who);
                    let mut data = vec![0xAA; len as usize];
                    match image.try_read(at, &mut data) {
                        Some(read) => assert_eq!(read.expect("reads"), data.len()),
                        None => data = image.read_at(at, len as usize).expect("reads").to_vec(),
                    }
                    self.history.end_read(who, begun, first, &data);
                }
            }
        }
        count
    }

    /// Live operations until the time is over. Returns how many.
    fn operate(&self, image: &Arc<Image>, who: usize, until: Instant) -> u64 {
        let mut rng = Rng::new(7);
        let mut count = 0;
        while Instant::now() < until && !self.stop.load(Ordering::Relaxed) {
            count += 1;
            let depth = self.chain().len();
            match rng.below(8) {
                0..3 if depth < DEEP => self.snapshot(image, who),
                0..5 if depth > 1 => self.merge(image),
                5 if image.size() < 2 * PAGES * PAGE => {
                    image.grow(image.size() + rng.below(64) * CLUSTER, &Progress::new()).expect("grows");
                }
                _ => {
                    image.freeze();
                    std::thread::sleep(Duration::from_millis(1));
                    image.thaw();
                }
            }
            std::thread::sleep(Duration::from_millis(rng.below(30)));
        }
        count
    }

    /// A snapshot; what it shows is a read of all sectors that lasted as long as it was taken.
    fn snapshot(&self, image: &Arc<Image>, who: usize) {
        let begun = self.history.begin_read(who);
        let new: Mutex<Option<Arc<dyn HostFile>>> = Mutex::default();
        let make = |plan: TopPlan| {
            let header = Header::new(plan.version, plan.disk, plan.cluster).expect("a legal size");
            let file = self.new_file(&if plan.in_use { header.marked() } else { header });
            *new.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&file));
            Ok(level(&file))
        };
        let commit = || {
            let top = new.lock().unwrap_or_else(PoisonError::into_inner).take().expect("made before");
            self.chain().push(top);
            Ok(())
        };
        image.put_on_top(make, commit).expect("a snapshot");
        let ended = self.history.now();
        let depth = self.chain().len() - 1;
        let below = self.open(depth);
        self.look_at_all(&below, |first, data| self.history.judge(begun, ended, first, data));
        self.history.forget_read(who);
    }

    fn look_at_all(&self, image: &Arc<Image>, mut each: impl FnMut(u64, &[u8])) {
        let len = HOT * CLUSTER;
        for page in 0..PAGES {
            let data = image.read_at(page * PAGE, len as usize).expect("reads");
            each(page * PAGE / SECTOR, &data);
        }
    }

    fn merge(&self, image: &Arc<Image>) {
        let depth = self.chain().len();
        if image.merge_direction(true).expect("two BATs") == Direction::Flip {
            let swap = || {
                self.chain().swap(depth - 2, depth - 1);
                Ok(())
            };
            image.flip(&Progress::new(), swap).expect("a flip");
        }
        let take_out = || {
            drop(self.chain().remove(depth - 2));
            Ok(())
        };
        image.pull_out(&Progress::new(), take_out).expect("a merge");
    }
}

/// The whole of it; panics at the first read that cannot be.
fn stress(make: Maker<'_>, history: History, time: Duration) {
    let options = Options {
        runners: 4,
        bat_cache: 0,
        bat_delay: Duration::from_millis(5),
        extend: 64 * CLUSTER,
        low_water: 0,
        ..Options::default()
    };
    let run = Stress {
        make,
        engine: Engine::new(options, Box::new(|_| ())),
        history,
        files: Mutex::default(),
        made: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    let header = Header::new(Version::V2, PAGES * PAGE, CLUSTER).expect("a legal size");
    let base = run.new_file(&header);
    run.chain().push(base);
    let image = run.open(1);
    image.make_writable().expect("a new image is sound");
    let (requests, operations) = std::thread::scope(|scope| {
        /// Whoever ends, also by a panic, ends all.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let submitters: Vec<_> = (0..SUBMITTERS)
            .map(|n| {
                let (run, image) = (&run, &image);
                scope.spawn(move || {
                    let _stop = Stop(&run.stop);
                    run.submit(image, n as usize, n + 1)
                })
            })
            .collect();
        let stop = Stop(&run.stop);
        let operations = run.operate(&image, SUBMITTERS as usize, Instant::now() + time);
        drop(stop);
        let join = |thread: std::thread::ScopedJoinHandle<'_, u64>| match thread.join() {
            Ok(count) => count,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        (submitters.into_iter().map(join).sum::<u64>(), operations)
    });
    image.close().expect("closes");
    let depth = run.chain().len();
    let again = run.open(depth);
    again.make_writable().expect("the chain is sound");
    let now = run.history.now();
    run.look_at_all(&again, |first, data| run.history.judge(now, now, first, data));
    again.close().expect("closes");
    println!(
        "STRESS {requests} requests, {operations} live operations, {} sectors read",
        run.history.judged()
    );
}

fn history() -> History {
    History::new(PAGES * PAGE / SECTOR, SUBMITTERS as usize + 1)
}

fn time() -> Duration {
    Duration::from_secs(if common::long() { 300 } else { 9 })
}

#[test]
fn in_memory_every_read_is_one_that_some_order_of_requests_allows() {
    let _turn = common::heavy();
    stress(&|_, bytes| Arc::new(MemoryFile::from_bytes(bytes)), history(), time());
}

#[test]
fn on_disk_every_read_is_one_that_some_order_of_requests_allows() {
    let _turn = common::heavy();
    let folder = common::temp_dir();
    stress(&|number, bytes| on_disk(folder.path(), number, bytes), history().that_may_tear(), time());
}

fn on_disk(folder: &Path, number: usize, bytes: &[u8]) -> Arc<dyn HostFile> {
    let path = folder.join(format!("{number}.hds"));
    std::fs::write(&path, bytes).expect("space");
    Arc::new(RealFile::open(&path, Access::ReadWrite).expect("just made"))
}

/// Forgets a write of data now and then.
#[derive(Default)]
struct Forgetful(AtomicU64);

impl Watch for Forgetful {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        match call {
            HostCall::Write { data, at } if at > 64 + 4 * PAGES * 1024 => {
                if self.0.fetch_add(1, Ordering::Relaxed) % 100 == 99 {
                    return Ok(data.len());
                }
                file.write_at(data, at)
            }
            call => call.carry_out(file),
        }
    }
}

#[test]
fn a_host_file_that_forgets_writes_is_found() {
    let _turn = common::heavy();
    let make = |_: usize, bytes: &[u8]| -> Arc<dyn HostFile> {
        Arc::new(Watched { file: Arc::new(MemoryFile::from_bytes(bytes)), watch: Forgetful::default() })
    };
    let found = catch_unwind(AssertUnwindSafe(|| stress(&make, history(), Duration::from_secs(20))));
    assert!(found.is_err(), "lost writes are not seen");
}
