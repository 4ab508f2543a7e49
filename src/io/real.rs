//! A file of the host file system.
//!
//! One descriptor per file in the whole process (docs/design.md#who-may-use-a-file): locks of a second descriptor of
//! ours would look foreign. So nothing here reopens a file to make it writable. [`Access::Widest`] takes read-write
//! where the host allows it, and "opened read-only" is the policy of the holder.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use super::file::{HostFile, HostSpace, HostStatus, HostTraits};
use crate::{Error, Kind, Result};

/// `statfs` magic of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `statfs` magic of ramfs.
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing, or an error.
    ReadWrite,
    /// Reading and writing where the host allows it, else reading; [`RealFile::writable`] says which.
    Widest,
}

/// An open regular file.
#[derive(Debug)]
pub struct RealFile {
    file: File,
    path: PathBuf,
    writable: bool,
    traits: HostTraits,
    /// Set once the host said that it cannot punch: later punches are refused without a system call.
    cannot_punch: AtomicBool,
}

impl RealFile {
    /// Opens the regular file at `path`. The last part of the path must not be a link; whatever is not a
    /// regular file is [`Kind::Invalid`], and is named.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<RealFile> {
        RealFile::open_at(&CWD, path, access)
    }

    /// Like [`open`](Self::open), with `name` looked up in the folder `dirfd`.
    pub fn open_at(dirfd: &impl AsFd, name: impl AsRef<Path>, access: Access) -> Result<RealFile> {
        RealFile::open_as(dirfd, name.as_ref(), name.as_ref(), access)
    }

    /// Like [`open_at`](Self::open_at); messages say `shown`.
    pub fn open_as(
        dirfd: &impl AsFd,
        name: impl AsRef<Path>,
        shown: impl AsRef<Path>,
        access: Access,
    ) -> Result<RealFile> {
        let (name, shown) = (name.as_ref(), shown.as_ref());
        // Looked at before it is opened: opening a device or a pipe can have effects of its own.
        let stat = retry_on_intr(|| rustix::fs::statat(dirfd, name, AtFlags::SYMLINK_NOFOLLOW))
            .map_err(|e| Error::io(&e.into(), shown, "cannot open"))?;
        require_regular(&stat, shown)?;

        let open = |mode| {
            // NONBLOCK: should the name become a pipe meanwhile, the open must not wait for its other end.
            let flags = mode | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            retry_on_intr(|| rustix::fs::openat(dirfd, name, flags, Mode::empty()))
        };
        let opened = match access {
            Access::ReadOnly => open(OFlags::RDONLY),
            Access::ReadWrite => open(OFlags::RDWR),
            Access::Widest => match open(OFlags::RDWR) {
                Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::TXTBSY) => open(OFlags::RDONLY),
                result => result,
            },
        };
        let how = if access == Access::ReadWrite { "cannot open for writing" } else { "cannot open" };
        let fd = opened.map_err(|e| Error::io(&e.into(), shown, how))?;
        RealFile::from_file(File::from(fd), shown)
    }

    /// Takes over an open file; `path` is how messages name it. It must be a regular file.
    pub fn from_file(file: File, path: impl Into<PathBuf>) -> Result<RealFile> {
        let path = path.into();
        let probe = || -> rustix::io::Result<(Stat, OFlags)> {
            Ok((rustix::fs::fstat(&file)?, rustix::fs::fcntl_getfl(&file)?))
        };
        let (stat, flags) = probe().map_err(|e| Error::io(&e.into(), &path, "cannot open"))?;
        require_regular(&stat, &path)?;
        if flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)
                .map_err(|e| Error::io(&e.into(), &path, "cannot open"))?;
        }
        let traits = probe_traits(&file).map_err(|e| Error::io(&e.into(), &path, "cannot probe"))?;
        let writable = flags & OFlags::ACCMODE == OFlags::RDWR;
        Ok(RealFile { file, path, writable, traits, cannot_punch: AtomicBool::new(false) })
    }

    /// True when the descriptor can write.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The name it was opened by, as messages say it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for RealFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Refuses everything but regular files, and says what was found.
fn require_regular(stat: &Stat, path: &Path) -> Result<()> {
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a folder",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "a character device",
        FileType::Unknown => "of an unknown type",
    };
    Err(Error::at(
        Kind::Invalid,
        path,
        format!("is {what}, not a regular file; images must be regular files"),
    ))
}

fn probe_traits(file: &File) -> rustix::io::Result<HostTraits> {
    let magic = rustix::fs::fstatfs(file)?.f_type as u64;
    let mut byte = [0u8; 1];
    let nowait = retry_on_intr(|| {
        rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT)
    });
    Ok(HostTraits {
        // EAGAIN is the honest answer of a host that has it; any other error means: read plainly.
        nowait_reads: matches!(nowait, Ok(_) | Err(Errno::AGAIN)),
        never_blocks: magic == TMPFS_MAGIC || magic == RAMFS_MAGIC,
        device: rustix::fs::fstat(file)?.st_dev,
    })
}

/// Linux takes a signed position; for `preadv2` the largest unsigned number even means "the current one".
fn check_position(offset: u64) -> io::Result<()> {
    match i64::try_from(offset) {
        Ok(_) => Ok(()),
        Err(_) => Err(Errno::INVAL.into()),
    }
}

impl HostFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(retry_on_intr(|| rustix::io::pread(&self.file, &mut *buf, offset))?)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        check_position(offset)?;
        Ok(retry_on_intr(|| {
            rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
        })?)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        match retry_on_intr(|| rustix::io::pwrite(&self.file, data, offset))? {
            // A host that takes nothing and names no reason would make the caller try for ever.
            0 if !data.is_empty() => Err(Errno::IO.into()),
            n => Ok(n),
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.file)?.st_size as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::ftruncate(&self.file, len))?)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if self.cannot_punch.load(Relaxed) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| rustix::fs::fallocate(&self.file, mode, offset, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.cannot_punch.store(true, Relaxed);
                Err(Errno::OPNOTSUPP.into())
            }
            result => Ok(result?),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fdatasync(&self.file))?)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fsync(&self.file))?)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        check_position(offset)?;
        // The descriptor's position moves, which nothing here ever uses.
        match retry_on_intr(|| rustix::fs::seek(&self.file, SeekFrom::Data(offset))) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        check_position(offset)?;
        match retry_on_intr(|| rustix::fs::seek(&self.file, SeekFrom::Hole(offset))) {
            Ok(at) => Ok(at),
            Err(Errno::NXIO) => self.len(),
            Err(e) => Err(e.into()),
        }
    }

    fn status(&self) -> io::Result<HostStatus> {
        Ok(rustix::fs::fstat(&self.file)?.into())
    }

    fn space(&self) -> io::Result<HostSpace> {
        let fs = retry_on_intr(|| rustix::fs::fstatvfs(&self.file))?;
        let bytes = |blocks: u64| blocks.saturating_mul(fs.f_frsize);
        Ok(HostSpace {
            total: bytes(fs.f_blocks),
            free: bytes(fs.f_bfree),
            available: bytes(fs.f_bavail),
            files: fs.f_files,
            files_free: fs.f_ffree,
        })
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed))?)
    }

    fn traits(&self) -> HostTraits {
        self.traits
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn queued_read(&self, _: u64, _: usize) -> Option<BorrowedFd<'_>> {
        // What is in memory is read at once.
        (!self.traits.never_blocks).then(|| self.file.as_fd())
    }
}

#[cfg(test)]
mod tests;
