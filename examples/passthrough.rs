//! Serves the regular files of a folder as they are, in the foreground: the bare ceiling of a transport.
//!
//! `passthrough --transport fuse|uring FOLDER MOUNTPOINT [--threads N]`; ends on SIGTERM or SIGINT, when the last file is
//! closed. Same operations and same open flags as ploopfs, every read and write one system call on the transport
//! thread, no image format in between. `contrib/bench` measures against it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use ploopfs::fuse::ops::{
    Answer, Attr, Caller, Done, Errno, FileKind, FileSystem, Handle, Ino, Name, Now, OpenFlags, Opened,
    SetAttr, Space, Whence,
};
use ploopfs::fuse::session;
use ploopfs::io::unmount::unmount;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

/// The root of the mount.
const ROOT: Ino = 1;

/// Serve the regular files of a folder as they are.
#[derive(Parser)]
struct Arguments {
    /// How requests arrive.
    #[arg(long, value_enum, default_value_t = Transport::Fuse)]
    transport: Transport,
    /// Transport threads; with uring, beside the one of each CPU (default: CPUs, 2 to 8).
    #[arg(long)]
    threads: Option<usize>,
    /// The folder to serve.
    folder: PathBuf,
    /// Where to mount it.
    mountpoint: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Transport {
    /// /dev/fuse.
    Fuse,
    /// FUSE over io_uring.
    Uring,
}

impl From<Transport> for session::Transport {
    fn from(transport: Transport) -> session::Transport {
        match transport {
            Transport::Fuse => session::Transport::Fuse,
            Transport::Uring => session::Transport::Uring,
        }
    }
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    let arguments = Arguments::parse();
    let folder = std::fs::canonicalize(&arguments.folder)?;
    let files = Files { folder: folder.clone(), names: Mutex::default(), open: ArcSwap::default() };
    let mut settings = session::Settings { fs_name: folder.into(), ..session::Settings::default() };
    if let Some(threads) = arguments.threads {
        settings.threads = threads;
    }
    // Before the mount, so that a signal never leaves one behind.
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let transport = arguments.transport.into();
    let session = session::mount(transport, Arc::new(files), &arguments.mountpoint, &settings)?;
    let mountpoint = session.mountpoint().to_owned();
    let stop = signals.handle();
    let ender = std::thread::spawn(move || {
        if signals.forever().next().is_some()
            && let Err(e) = unmount(&mountpoint, true)
        {
            log::error!("{e}");
        }
    });
    let served = session.run();
    stop.close();
    if ender.join().is_err() {
        log::error!("the signal thread panicked");
    }
    Ok(served?)
}

/// The folder's regular files, by number.
struct Files {
    folder: PathBuf,
    /// Protects the numbering of names; never held across I/O on a file.
    names: Mutex<Names>,
    /// Open files; the handle is the index. Read without a lock on every request.
    open: ArcSwap<Vec<Option<Arc<File>>>>,
}

#[derive(Default)]
struct Names {
    by_name: HashMap<OsString, Ino>,
    /// Index 0 is inode 2.
    by_number: Vec<OsString>,
}

fn errno(e: &std::io::Error) -> Errno {
    Errno(e.raw_os_error().unwrap_or(libc::EIO))
}

fn host<T>(result: Result<T, rustix::io::Errno>) -> Answer<T> {
    result.map_err(|e| Errno(e.raw_os_error()))
}

impl Files {
    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self, name: &OsStr) -> Ino {
        let mut names = self.names();
        if let Some(&ino) = names.by_name.get(name) {
            return ino;
        }
        names.by_number.push(name.to_owned());
        let ino = ROOT + names.by_number.len() as Ino;
        names.by_name.insert(name.to_owned(), ino);
        ino
    }

    fn path(&self, ino: Ino) -> Answer<PathBuf> {
        if ino == ROOT {
            return Ok(self.folder.clone());
        }
        let index = usize::try_from(ino - ROOT - 1).map_err(|_| Errno(libc::ENOENT))?;
        self.names().by_number.get(index).map(|n| self.folder.join(n)).ok_or(Errno(libc::ENOENT))
    }

    fn attr(ino: Ino, m: &Metadata) -> Attr {
        Attr {
            ino,
            kind: if m.is_dir() { FileKind::Folder } else { FileKind::File },
            size: m.len(),
            blocks: m.blocks(),
            mode: (m.mode() & 0o7777) as u16,
            links: 1,
            uid: m.uid(),
            gid: m.gid(),
            block_size: 1 << 20,
            mtime: m.modified().unwrap_or(SystemTime::UNIX_EPOCH + Duration::ZERO),
        }
    }

    fn find(&self, parent: Ino, name: &OsStr) -> Answer<Attr> {
        if parent != ROOT {
            return Err(Errno(libc::ENOENT));
        }
        let status = std::fs::symlink_metadata(self.folder.join(name)).map_err(|e| errno(&e))?;
        if !status.is_file() {
            return Err(Errno(libc::ENOENT));
        }
        Ok(Files::attr(self.number(name), &status))
    }

    /// All names; the place of each follows from its number, which it keeps.
    fn list(&self) -> Answer<Vec<Name>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(|e| errno(&e))? {
            let entry = entry.map_err(|e| errno(&e))?;
            if entry.file_type().is_ok_and(|t| t.is_file()) {
                let name = entry.file_name();
                let ino = self.number(&name);
                names.push(Name { ino, kind: FileKind::File, name, next: ino + 2 });
            }
        }
        Ok(names)
    }

    /// Calls `f` with the open file.
    fn with<T>(&self, handle: Handle, f: impl FnOnce(&File) -> Answer<T>) -> Answer<T> {
        let open = self.open.load();
        match usize::try_from(handle).ok().and_then(|index| open.get(index)) {
            Some(Some(file)) => f(file),
            _ => Err(Errno(libc::EBADF)),
        }
    }
}

impl FileSystem for Files {
    fn lookup(&self, _: Caller, parent: Ino, name: &OsStr, done: Done<Attr>) {
        done(self.find(parent, name));
    }

    fn forget(&self, _: Ino, _: u64) {}

    fn getattr(&self, ino: Ino, done: Done<Attr>) {
        let status = |path| std::fs::symlink_metadata(path).map_err(|e| errno(&e));
        done(self.path(ino).and_then(status).map(|status| Files::attr(ino, &status)));
    }

    fn setattr(&self, _: Caller, _: Ino, _: SetAttr, done: Done<Attr>) {
        done(Err(Errno(libc::EPERM)));
    }

    fn readdir(&self, _: Ino, after: u64, most: usize, done: Done<Vec<Name>>) {
        done(self.list().map(|mut names| {
            names.retain(|name| name.next > after);
            names.sort_by_key(|name| name.next);
            names.truncate(most);
            names
        }));
    }

    fn statfs(&self, _: Ino, done: Done<Space>) {
        done(host(rustix::fs::statvfs(&self.folder)).map(|s| Space {
            block_size: s.f_bsize as u32,
            blocks: s.f_blocks,
            free: s.f_bfree,
            available: s.f_bavail,
            files: s.f_files,
            files_free: s.f_ffree,
        }));
    }

    fn change_name(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<()> {
        Err(Errno(libc::EPERM))
    }

    fn open(&self, _: Caller, ino: Ino, flags: OpenFlags, done: Done<Opened>) {
        let path = match self.path(ino) {
            Ok(path) => path,
            Err(e) => return done(Err(e)),
        };
        // Always readable: O_WRONLY users map files too. The page cache serves: O_DIRECT is between user and us.
        match File::options().read(true).write(flags.writes()).open(path) {
            Ok(file) => {
                let file = Arc::new(file);
                let mut handle = 0;
                // May run more than once when two opens meet; the last run counts.
                self.open.rcu(|open| {
                    let mut open = Vec::clone(open);
                    handle = open.iter().position(Option::is_none).unwrap_or(open.len());
                    if handle == open.len() {
                        open.push(None);
                    }
                    open[handle] = Some(file.clone());
                    open
                });
                done(Ok(Opened { handle: handle as Handle, direct: true, backing: None }));
            }
            Err(e) => done(Err(errno(&e))),
        }
    }

    fn release(&self, handle: Handle) {
        self.open.rcu(|open| {
            let mut open = Vec::clone(open);
            if let Some(slot) = usize::try_from(handle).ok().and_then(|index| open.get_mut(index)) {
                *slot = None;
            }
            open
        });
    }

    fn read_now(&self, handle: Handle, offset: u64, buf: &mut [u8]) -> Now<usize> {
        Now::Done(self.with(handle, |file| {
            let mut done = 0;
            while done < buf.len() {
                match file.read_at(&mut buf[done..], offset + done as u64) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(errno(&e)),
                }
            }
            Ok(done)
        }))
    }

    fn read_later(&self, handle: Handle, offset: u64, len: usize, done: Done<Bytes>) {
        let mut data = vec![0; len];
        match self.read_now(handle, offset, &mut data) {
            Now::Done(Ok(n)) => {
                data.truncate(n);
                done(Ok(data.into()));
            }
            Now::Done(Err(e)) => done(Err(e)),
            Now::Later => done(Err(Errno(libc::EIO))),
        }
    }

    fn write_now(&self, handle: Handle, offset: u64, data: &[u8], flags: OpenFlags) -> Now<usize> {
        // O_SYNC contains O_DSYNC's bit; the kernel sends no fsync for either.
        let how = match flags.raw & libc::O_DSYNC {
            0 => ReadWriteFlags::empty(),
            _ => ReadWriteFlags::DSYNC,
        };
        Now::Done(self.with(handle, |file| {
            let mut done = 0;
            while done < data.len() {
                let parts = [IoSlice::new(&data[done..])];
                match rustix::io::pwritev2(file, &parts, offset + done as u64, how) {
                    Ok(n) => done += n,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(Errno(e.raw_os_error())),
                }
            }
            Ok(done)
        }))
    }

    fn write_later(&self, handle: Handle, offset: u64, data: Bytes, flags: OpenFlags, done: Done<usize>) {
        match self.write_now(handle, offset, &data, flags) {
            Now::Done(answer) => done(answer),
            Now::Later => done(Err(Errno(libc::EIO))),
        }
    }

    fn fsync(&self, handle: Handle, done: Done<()>) {
        done(self.with(handle, |file| file.sync_data().map_err(|e| errno(&e))));
    }

    fn fallocate(&self, handle: Handle, offset: u64, len: u64, mode: i32, done: Done<()>) {
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        done(self.with(handle, |file| host(rustix::fs::fallocate(file, mode, offset, len))));
    }

    fn lseek(&self, handle: Handle, offset: u64, whence: Whence, done: Done<u64>) {
        let from = match whence {
            Whence::Data => SeekFrom::Data(offset),
            Whence::Hole => SeekFrom::Hole(offset),
        };
        done(self.with(handle, |file| host(rustix::fs::seek(file, from))));
    }
}
