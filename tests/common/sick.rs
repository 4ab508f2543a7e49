//! A host whose disk fails or hangs where a test wants it to: ext4 on a loop device over a file that this process serves
//! through FUSE, since not every kernel has a device mapper.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use tempfile::TempDir;

use crate::common::{HostFs, memory_dir, ok, temp_dir, text, until};

/// A sector that begins so cannot be written.
pub const BAD: &[u8; 16] = b"this one is bad\n";
/// A sector that begins so is not written before the test says so.
pub const SLOW: &[u8; 16] = b"this one is slow";

const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(60);

/// What the disk does with such sectors.
#[derive(Default)]
struct Mood {
    heals: bool,
    /// How many slow writes have come, and whether they go on.
    slow: (usize, bool),
}

#[derive(Default)]
struct State {
    mood: Mutex<Mood>,
    changed: Condvar,
}

struct Served {
    file: File,
    size: u64,
    state: Arc<State>,
}

impl Served {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let then = SystemTime::UNIX_EPOCH;
        let (kind, perm, size) = match ino {
            FILE => (FileType::RegularFile, 0o600, self.size),
            _ => (FileType::Directory, 0o700, 0),
        };
        let (atime, mtime, ctime, crtime) = (then, then, then, then);
        let (blocks, blksize, flags, rdev) = (size / 512, 4096, 0, 0);
        let (uid, gid, nlink) = (0, 0, 1);
        FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attr(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size.min((self.size - offset.min(self.size)) as u32) as usize];
        match self.file.read_exact_at(&mut data, offset) {
            Ok(()) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let has = |what: &[u8]| data.chunks(512).any(|sector| sector.starts_with(what));
        if has(SLOW) {
            let mut mood = self.state.mood.lock().unwrap_or_else(PoisonError::into_inner);
            mood.slow.0 += 1;
            while !mood.slow.1 {
                mood = self.state.changed.wait(mood).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if has(BAD) && !self.state.mood.lock().unwrap_or_else(PoisonError::into_inner).heals {
            return reply.error(Errno::EIO);
        }
        match self.file.write_all_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Dropped in this order: slow writes go on, all above it is taken away, then the file.
pub struct SickHost {
    end: GoOn,
    host: Option<HostFs>,
    session: Option<fuser::BackgroundSession>,
    _folders: [TempDir; 2],
}

struct GoOn(Arc<State>);

impl SickHost {
    /// One of `size` bytes.
    #[track_caller]
    pub fn new(size: u64) -> SickHost {
        let (memory, point) = (memory_dir(), temp_dir());
        let path = memory.path().join("sick.disk");
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open().expect("a file");
        file.set_len(size).expect("a sparse file");
        let (state, mut config) = (Arc::new(State::default()), fuser::Config::default());
        // One may be held, and the others go on.
        config.n_threads = Some(4);
        let served = Served { file, size, state: state.clone() };
        let session = fuser::spawn_mount(served, point.path(), &config).expect("a mount of the test's own");
        let disk = point.path().join(NAME);
        assert!(until(Duration::from_secs(10), || disk.exists()), "it is not served");
        ok("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", text(&path)]);
        let host = Some(HostFs::open("ext4", &disk));
        SickHost { end: GoOn(state), host, session: Some(session), _folders: [memory, point] }
    }

    /// A folder on it.
    pub fn path(&self) -> PathBuf {
        self.host.as_ref().map(|host| host.path().join("images")).expect("until it is dropped")
    }

    /// Bad sectors can be written from now on.
    pub fn heal(&self) {
        self.end.0.mood.lock().expect("no panic").heals = true;
    }

    /// True when a slow sector waits to be written.
    pub fn holds(&self) -> bool {
        let mood = self.end.0.mood.lock().expect("no panic");
        mood.slow.0 > 0 && !mood.slow.1
    }

    /// Slow sectors are as all others from now on.
    pub fn go_on(&self) {
        self.end.go_on();
    }
}

impl GoOn {
    fn go_on(&self) {
        self.0.mood.lock().unwrap_or_else(PoisonError::into_inner).slow.1 = true;
        self.0.changed.notify_all();
    }
}

impl Drop for SickHost {
    fn drop(&mut self) {
        self.end.go_on();
        self.host = None;
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}
