//! An image in memory over a file that fails where a test wants it to.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ploopfs::Result;
use ploopfs::format::header::{CLOSED, FLAG_EMPTY, Geometry, Header, Version};
use ploopfs::io::fault::{FaultFile, FaultPlan};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Engine, Image, ImageEvent, Layout, Level, OnFull, Options};

use super::watched::{HostCall, Watch, Watched};

pub const SECTOR: u64 = 512;
/// Cluster size of every image here: small, so that files are small.
pub const CLUSTER: u64 = 8 * SECTOR;
/// Every answer comes within this time, or is a hang: the longest legal wait is the BAT's 5 s of retries.
pub const HANG: Duration = Duration::from_secs(30);

pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

pub fn errno(n: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(n))
}

/// A call that reached the host file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read { at: u64, len: u64 },
    Write { at: u64, len: u64 },
    Punch { at: u64, len: u64 },
    SetLen(u64),
    Sync,
}

type Rule = Arc<dyn Fn(Call) -> io::Result<()> + Send + Sync>;

/// What the file's calls are asked of first; and their log, with how each ended.
pub struct Ruled {
    rule: Mutex<Rule>,
    log: Mutex<Vec<(Call, bool)>>,
    shorts: AtomicU64,
}

impl Ruled {
    /// From now on `rule` decides; it may block.
    pub fn rule(&self, rule: impl Fn(Call) -> io::Result<()> + Send + Sync + 'static) {
        *lock(&self.rule) = Arc::new(rule);
    }

    /// No rule any more.
    pub fn heal(&self) {
        self.rule(|_| Ok(()));
    }

    /// Calls that have ended so far, in the order of their ends, and whether they worked.
    pub fn log(&self) -> Vec<(Call, bool)> {
        lock(&self.log).clone()
    }

    pub fn count(&self, of: impl Fn(Call) -> bool) -> usize {
        lock(&self.log).iter().filter(|(call, _)| of(*call)).count()
    }

    /// Reads and writes that moved less than was asked. (No read here passes the end of a file.)
    pub fn shorts(&self) -> u64 {
        self.shorts.load(Ordering::SeqCst)
    }
}

impl Watch for Ruled {
    fn call(&self, asked: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        let (call, bytes) = match &asked {
            HostCall::Read { buf, at } | HostCall::ReadNowait { buf, at } => {
                (Call::Read { at: *at, len: buf.len() as u64 }, buf.len())
            }
            HostCall::Write { data, at } => (Call::Write { at: *at, len: data.len() as u64 }, data.len()),
            HostCall::Punch { at, len } => (Call::Punch { at: *at, len: *len }, 0),
            HostCall::SetLen(len) => (Call::SetLen(*len), 0),
            HostCall::SyncData | HostCall::SyncAll => (Call::Sync, 0),
        };
        let rule = Arc::clone(&lock(&self.rule));
        let result = rule(call).and_then(|()| asked.carry_out(file));
        if matches!(result, Ok(n) if n < bytes) {
            self.shorts.fetch_add(1, Ordering::SeqCst);
        }
        lock(&self.log).push((call, result.is_ok()));
        result
    }
}

/// Holds calls back until it is opened; knows how many have come.
#[derive(Default)]
pub struct Barrier {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Barrier {
    pub fn pass(&self) {
        let mut state = lock(&self.state);
        state.1 += 1;
        while !state.0 {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    pub fn open(&self) {
        lock(&self.state).0 = true;
        self.changed.notify_all();
    }

    /// Waits until `n` calls have come.
    pub fn wait_for(&self, n: usize) {
        until("calls at the barrier", || lock(&self.state).1 >= n);
    }
}

pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + HANG;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The answer of a request that runs.
pub struct Pending<T>(Receiver<Result<T>>);

impl<T: Send + 'static> Pending<T> {
    pub fn start(begin: impl FnOnce(ploopfs::vdisk::Reply<T>)) -> Pending<T> {
        let (tell, answer) = channel();
        begin(Box::new(move |result| {
            let _ = tell.send(result);
        }));
        Pending(answer)
    }

    /// The answer; none in time, or none at all, fails the test.
    pub fn answer(&self) -> Result<T> {
        self.0.recv_timeout(HANG).expect("every request is answered")
    }

    /// True when it is still without an answer after a short while.
    pub fn waits(&self) -> bool {
        matches!(self.0.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout))
    }
}

/// A header of a closed, empty image with `clusters` clusters.
pub fn empty_header(version: Version, clusters: u64) -> Header {
    let first = (64 + 4 * clusters).next_multiple_of(CLUSTER);
    Header {
        version,
        heads: 16,
        cylinders: 1,
        cluster_sectors: (CLUSTER / SECTOR) as u32,
        entries: clusters as u32,
        disk_sectors: clusters * CLUSTER / SECTOR,
        in_use: CLOSED,
        first_block: (first / SECTOR) as u32,
        flags: FLAG_EMPTY,
        extension: 0,
    }
}

pub fn empty_file(clusters: u64) -> MemoryFile {
    let header = empty_header(Version::V2, clusters);
    let file = MemoryFile::from_bytes(&header.encode());
    file.set_len(header.geometry().first).expect("memory grows");
    file
}

/// Settings under which nothing happens by itself: no round before somebody flushes, and work in order (a lane of
/// one runner).
pub fn options() -> Options {
    Options {
        runners: 2,
        bat_delay: Duration::from_secs(3600),
        full_timeout: None,
        low_water: 0,
        extend: 4 * CLUSTER,
        ..Options::default()
    }
}

pub fn failing_at_once() -> Options {
    Options { on_full: OnFull::Error, ..options() }
}

/// An open, writable image and everything around it.
pub struct Rig {
    pub memory: Arc<MemoryFile>,
    pub plan: Arc<FaultPlan>,
    pub file: Arc<Watched<Ruled>>,
    pub image: Arc<Image>,
    pub geometry: Geometry,
    events: Arc<Mutex<Vec<ImageEvent>>>,
}

impl Rig {
    /// 40 clusters, an empty plan.
    pub fn new(options: Options) -> Rig {
        Rig::open(empty_file(40), "", options).expect("opens")
    }

    pub fn open(memory: MemoryFile, spec: &str, options: Options) -> Result<Rig> {
        let events: Arc<Mutex<Vec<ImageEvent>>> = Arc::default();
        let heard = Arc::clone(&events);
        let engine = Engine::new(options, Box::new(move |event| lock(&heard).push(event)));
        Rig::open_with(memory, spec, &engine, events)
    }

    pub fn open_with(
        memory: MemoryFile,
        spec: &str,
        engine: &Arc<Engine>,
        events: Arc<Mutex<Vec<ImageEvent>>>,
    ) -> Result<Rig> {
        let memory = Arc::new(memory);
        let plan: Arc<FaultPlan> = Arc::new(spec.parse().expect("a fault"));
        let faulty = FaultFile::new(memory.clone(), Arc::clone(&plan));
        let watch = Ruled {
            rule: Mutex::new(Arc::new(|_| Ok(()))),
            log: Mutex::default(),
            shorts: AtomicU64::new(0),
        };
        let file = Arc::new(Watched { file: Arc::new(faulty), watch });
        let header = header(&memory);
        let level =
            Level { file: file.clone(), path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
        let image = Image::open(engine, "memory", vec![level])?;
        image.make_writable()?;
        Ok(Rig { memory, plan, file, image, geometry: header.geometry(), events })
    }

    pub fn events(&self) -> Vec<ImageEvent> {
        lock(&self.events).clone()
    }

    pub fn is_data(&self) -> impl Fn(Call) -> bool + Send + Sync + use<> {
        let first = self.geometry.first;
        move |call| matches!(call, Call::Write { at, .. } if at >= first)
    }

    /// A write of BAT pages (the mark is the header alone).
    pub fn is_bat(&self) -> impl Fn(Call) -> bool + Send + Sync + use<> {
        let first = self.geometry.first;
        move |call| matches!(call, Call::Write { at, len } if at < first && len > 64)
    }

    /// Fills guest cluster `n` with `byte`, and waits.
    pub fn fill(&self, n: u64, byte: u8) -> Result<()> {
        self.start_fill(n, byte).answer()
    }

    pub fn start_fill(&self, n: u64, byte: u8) -> Pending<()> {
        self.start_write(n * CLUSTER, vec![byte; CLUSTER as usize], false)
    }

    pub fn start_write(&self, at: u64, data: Vec<u8>, durable: bool) -> Pending<()> {
        Pending::start(|reply| self.image.write(at, data.into(), durable, reply))
    }

    pub fn start_flush(&self) -> Pending<()> {
        Pending::start(|reply| self.image.flush(reply))
    }

    pub fn flush(&self) -> Result<()> {
        self.start_flush().answer()
    }

    pub fn start_discard(&self, at: u64, len: u64) -> Pending<()> {
        Pending::start(|reply| self.image.discard(at, len, reply))
    }

    pub fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.start_discard(at, len).answer()
    }

    pub fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let pending = Pending::start(|reply| self.image.read(at, len as usize, reply));
        pending.answer().map(|bytes| bytes.to_vec())
    }

    /// The byte that guest cluster `n` is full of.
    pub fn byte(&self, n: u64) -> u8 {
        full_of(&self.read(n * CLUSTER, CLUSTER).expect("reads"))
    }

    /// Where guest cluster `n` lies, as the file says.
    pub fn entry(&self, n: u64) -> Option<u64> {
        entry(&self.memory.to_bytes(), n)
    }

    /// What a later opening of the file finds in it.
    pub fn reopened(&self) -> Rig {
        let copy = MemoryFile::from_bytes(&self.memory.to_bytes());
        Rig::open(copy, "", options()).expect("what is on the file opens and is sound")
    }

    /// Closes without error, and checks that the file is as after a clean close.
    pub fn close(&self) {
        self.image.close().expect("closes");
        let bytes = self.memory.to_bytes();
        let header = header(&self.memory);
        assert_eq!(header.in_use, CLOSED, "a clean close clears the mark");
        let used: Vec<u64> = (0..u64::from(header.entries)).filter_map(|n| entry(&bytes, n)).collect();
        let mut once = used.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), used.len(), "no file cluster is used twice");
        let end = once.last().map_or(self.geometry.first, |last| last + CLUSTER);
        assert_eq!(bytes.len() as u64, end, "the file ends behind the last cluster in use");
        drop(self.reopened());
    }
}

pub fn header(file: &MemoryFile) -> Header {
    let mut bytes = [0; 64];
    file.read_at(&mut bytes, 0).expect("memory reads");
    Header::parse(&bytes).expect("the header is well-formed")
}

pub fn entry(bytes: &[u8], n: u64) -> Option<u64> {
    let header = Header::parse(&bytes[..64]).expect("the header is well-formed");
    let at = 64 + 4 * n as usize;
    match u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) {
        0 => None,
        entry => Some(header.geometry().position(entry).expect("an entry on the grid")),
    }
}

/// The byte that all of `data` is.
pub fn full_of(data: &[u8]) -> u8 {
    assert!(data.iter().all(|b| *b == data[0]), "a mixture");
    data[0]
}
