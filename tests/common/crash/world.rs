//! The files of an image as they go on, and everything a power cut would see of them at some moment.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ploopfs::format::header::{FLAG_EMPTY, Header, IN_USE};
use ploopfs::io::file::{HostFile, HostTraits};
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Layout, Level};

use super::power::{Change, Keep, Rng, Unsynced};
use super::watched::{HostCall, Watch, Watched};

/// What every sector may hold: the values written since the last sync that covers it, and the one before.
pub type Allowed = Vec<Vec<u32>>;

pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Everything a power cut sees at once.
#[derive(Clone, Default)]
pub struct World {
    pub files: Vec<Unsynced>,
    /// The chain that the descriptor names: numbers of files, base first.
    pub chain: Vec<usize>,
    /// The base where it is a raw file: it has no header.
    pub raw: Option<usize>,
    /// The live disk.
    pub allowed: Allowed,
    /// Snapshots: the file that was the top, and what the disk held then.
    pub snapshots: Vec<(usize, Allowed)>,
    /// The folder of the files, where it is recorded too.
    pub folder: Names,
}

/// The names of a folder: what is durable, and what came after its last sync.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Names and numbers of files.
    pub durable: BTreeMap<String, usize>,
    /// Changes of names, each as a whole or not at all; None: gone.
    pub pending: Vec<Vec<(String, Option<usize>)>>,
    /// Snapshots by name, what the disk held then, and whether they must be there.
    pub snapshots: BTreeMap<String, (Vec<u32>, bool)>,
}

impl Names {
    /// The folder with those unsynced changes that `keep` wants.
    pub fn state(&self, mut keep: impl FnMut(usize) -> bool) -> BTreeMap<String, usize> {
        let mut names = self.durable.clone();
        for (_, change) in self.pending.iter().enumerate().filter(|(n, _)| keep(*n)) {
            for (name, file) in change {
                match file {
                    Some(file) => drop(names.insert(name.clone(), *file)),
                    None => drop(names.remove(name)),
                }
            }
        }
        names
    }

    /// The folder was synced.
    pub fn sync(&mut self) {
        self.durable = self.state(|_| true);
        self.pending.clear();
    }
}

impl World {
    /// A chain of these files, all of them durable.
    pub fn new(files: Vec<Vec<u8>>, allowed: Allowed) -> World {
        let chain = (0..files.len()).collect();
        World { files: files.into_iter().map(Unsynced::new).collect(), chain, allowed, ..World::default() }
    }

    /// What a cut leaves of every file.
    pub fn left(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        self.files.iter().map(|file| file.state(Keep::Random, rng)).collect()
    }
}

/// How the host behaves while a world is recorded.
#[derive(Clone, Copy, Default)]
pub struct Host {
    /// Every so many operations are a crash point, beside every sync; 0: none.
    pub every: u64,
    /// A broken host: a sync answers and does nothing.
    pub skip_sync: bool,
    /// How long a sync takes: what comes meanwhile is not covered by it.
    pub sync_takes: Duration,
    /// The sync that fails, counted from 1; 0: none. What it should have saved is lost, in part, and the page cache
    /// takes it for clean: the next sync succeeds and saves nothing of it.
    pub failing_sync: u64,
}

/// The world as it goes on, and its cuts.
pub struct Record {
    pub world: Mutex<World>,
    live: Mutex<Vec<Arc<MemoryFile>>>,
    cuts: Mutex<Vec<World>>,
    operations: AtomicU64,
    syncs: AtomicU64,
    host: Host,
}

impl Record {
    /// Goes on from `world`, of which everything is durable.
    pub fn new(world: World, host: Host) -> Arc<Record> {
        let live = world.files.iter().map(|f| Arc::new(MemoryFile::from_bytes(&f.durable))).collect();
        Arc::new(Record {
            world: Mutex::new(world),
            live: Mutex::new(live),
            cuts: Mutex::default(),
            operations: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            host,
        })
    }

    /// The cuts so far; the record begins a new list.
    pub fn take_cuts(&self) -> Vec<World> {
        std::mem::take(&mut *lock(&self.cuts))
    }

    /// A crash point whatever the count says.
    pub fn cut(&self, world: &World) {
        lock(&self.cuts).push(world.clone());
    }

    fn count(&self, world: &World) {
        let n = self.operations.fetch_add(1, Ordering::Relaxed);
        if self.host.every > 0 && n.is_multiple_of(self.host.every) {
            self.cut(world);
        }
    }

    /// True once the failing sync has failed.
    pub fn has_failed(&self) -> bool {
        self.host.failing_sync > 0 && self.syncs.load(Ordering::SeqCst) >= self.host.failing_sync
    }

    /// A new file whose content is durable: creation ends with a sync.
    pub fn create(&self, bytes: Vec<u8>) -> usize {
        lock(&self.live).push(Arc::new(MemoryFile::from_bytes(&bytes)));
        let mut world = lock(&self.world);
        world.files.push(Unsynced::new(bytes));
        world.files.len() - 1
    }

    /// File `number` as a level of an image.
    pub fn level(self: &Arc<Self>, number: usize) -> Level {
        let file = Arc::clone(&lock(&self.live)[number]);
        let raw = lock(&self.world).raw == Some(number);
        level(self.recorded(number, file), &format!("file{number}"), raw).expect("a header")
    }

    /// `file`, with its changes recorded as file `number`'s.
    pub fn recorded(self: &Arc<Self>, number: usize, file: Arc<dyn HostFile>) -> Arc<dyn HostFile> {
        Arc::new(Watched { file, watch: Recorder { record: Arc::clone(self), number } })
    }

    /// The levels of the live chain, base first.
    pub fn levels(self: &Arc<Self>) -> Vec<Level> {
        let chain = lock(&self.world).chain.clone();
        chain.into_iter().map(|number| self.level(number)).collect()
    }
}

/// A file as a level, its header as it is now.
pub fn level(file: Arc<dyn HostFile>, name: &str, raw: bool) -> Result<Level, String> {
    let layout = if raw {
        Layout::Raw
    } else {
        let mut bytes = [0; 64];
        file.read_at(&mut bytes, 0).map_err(|e| e.to_string())?;
        Layout::Ploop(Header::parse(&bytes).map_err(|e| e.to_string())?)
    };
    Ok(Level { file, path: PathBuf::from(name), layout })
}

/// An empty delta.
pub fn empty(mut header: Header, in_use: bool) -> Vec<u8> {
    if in_use {
        header.in_use = IN_USE;
        header.flags &= !FLAG_EMPTY;
    }
    let mut bytes = header.encode().to_vec();
    bytes.resize(header.geometry().first as usize, 0);
    bytes
}

/// One file of the world.
struct Recorder {
    record: Arc<Record>,
    number: usize,
}

impl Recorder {
    fn sync(&self) -> io::Result<()> {
        let (record, host) = (&self.record, &self.record.host);
        if host.skip_sync {
            record.count(&lock(&record.world));
            return Ok(());
        }
        let covered = lock(&record.world).files[self.number].mark();
        if !host.sync_takes.is_zero() {
            std::thread::sleep(host.sync_takes);
        }
        let mut world = lock(&record.world);
        // The cut just before a sync is the one that loses most.
        record.cut(&world);
        if record.syncs.fetch_add(1, Ordering::SeqCst) + 1 == host.failing_sync {
            world.files[self.number].lose(&mut Rng(host.failing_sync));
            record.cut(&world);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        world.files[self.number].sync(covered);
        record.count(&world);
        Ok(())
    }
}

impl Watch for Recorder {
    /// Does the call and logs it as one step; then maybe cuts.
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        let change = match &call {
            HostCall::Read { .. } | HostCall::ReadNowait { .. } => return call.carry_out(file),
            HostCall::SyncData | HostCall::SyncAll => return self.sync().map(|()| 0),
            HostCall::Punch { at, len } => Change::Punch { at: *at, len: *len },
            HostCall::SetLen(len) => Change::SetLen(*len),
            HostCall::Write { .. } => Change::SetLen(0), // Made below, under the lock.
        };
        let mut world = lock(&self.record.world);
        let mut changes = vec![change];
        if let HostCall::Write { data, at } = &call {
            let (end, written) = (file.len()?, at + data.len() as u64);
            // A change of part of a sector is one of the whole sector, as a disk sees it.
            let (from, to) = (at / 512 * 512, written.next_multiple_of(512).min(end.max(written)));
            let mut whole = vec![0; (to - from) as usize];
            file.read_at(&mut whole, from)?;
            let inside = (at - from) as usize;
            whole[inside..inside + data.len()].copy_from_slice(data);
            changes = vec![Change::Write { at: from, data: whole }];
            if written > end {
                changes.insert(0, Change::SetLen(written));
            }
        }
        let done = call.carry_out(file)?;
        for change in changes {
            world.files[self.number].push(change);
            self.record.count(&world);
        }
        Ok(done)
    }

    fn traits(&self, _: HostTraits) -> HostTraits {
        // As a disk: reads may be had without waiting, writes may wait.
        HostTraits { nowait_reads: true, never_blocks: false, device: 0 }
    }
}
