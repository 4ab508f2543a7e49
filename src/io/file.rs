//! What a delta file can do, whatever stands behind it: a host file, memory, a file that fails on demand.
//!
//! Everything above this trait reaches a delta by offset and length only, so that a frozen delta may one day
//! live on an object store (docs/design.md#kept-open). No method keeps a position; all may be called from many threads.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

/// One open delta (or raw) file.
pub trait HostFile: Send + Sync + fmt::Debug {
    /// Reads up to `buf.len()` bytes at byte `offset`. May be short; 0 means end of file. EINTR is retried inside.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Like [`read_at`](Self::read_at), but fails with EAGAIN (or is short) where it would wait for the disk.
    /// Only called where [`HostTraits::nowait_reads`] is set.
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The descriptor on which a read of `len` bytes at byte `offset` into page-aligned memory may be queued
    /// ([`reads`](super::reads)); None where only [`read_at`](Self::read_at) will do.
    fn queued_read(&self, offset: u64, len: usize) -> Option<BorrowedFd<'_>> {
        let _ = (offset, len);
        None
    }

    /// Writes up to `data.len()` bytes at byte `offset`. May be short, never 0 for non-empty data without an error.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Makes the file exactly `len` bytes long; a longer file reads as zeroes (sparse) in the new part.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes `[offset, offset + len)` read as zeroes and gives whole host blocks back. The length stays.
    /// EOPNOTSUPP where the host cannot: the caller then writes zeroes.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// fdatasync: content, and the metadata needed to read it back (length, extents, punched holes), is durable.
    fn sync_data(&self) -> io::Result<()>;

    /// fsync.
    fn sync_all(&self) -> io::Result<()>;

    /// First byte at or after `offset` that may hold data; None when only a hole follows.
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// First byte at or after `offset` that lies in a hole; the end of the file counts as one.
    fn seek_hole(&self, offset: u64) -> io::Result<u64>;

    /// Owner, mode, times and space of the file.
    fn status(&self) -> io::Result<HostStatus>;

    /// Free and total space of the file system that holds the file.
    fn space(&self) -> io::Result<HostSpace>;

    /// Drops clean cached pages, so that the next read comes from the disk (R7).
    fn drop_cache(&self) -> io::Result<()>;

    /// What was probed once, at open.
    fn traits(&self) -> HostTraits;

    /// The host's descriptor, where there is one: two files that have it may share extents.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// In a [`HostFile`] that stands before another, its `file`: these methods are that one's.
macro_rules! passed_on {
    ($(fn $method:ident(&self $(, $argument:ident: $of:ty)*) -> $result:ty;)+) => {$(
        fn $method(&self $(, $argument: $of)*) -> $result {
            self.file.$method($($argument),*)
        }
    )+};
}
pub(crate) use passed_on;

/// What a host file system can do for one file; probed at open, never guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTraits {
    /// `RWF_NOWAIT` reads work (ext4, XFS, btrfs; not tmpfs).
    pub nowait_reads: bool,
    /// Reads and writes never wait for a device (tmpfs, memory): they may run on any thread.
    pub never_blocks: bool,
    /// The device number of the host file system; 0 where there is none.
    pub device: u64,
}

/// What `fstat` says of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStatus {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub len: u64,
    /// Space taken on the host, in units of 512 bytes.
    pub blocks: u64,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names (hard links).
    pub links: u64,
    /// Last change of content: seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
}

impl From<rustix::fs::Stat> for HostStatus {
    fn from(stat: rustix::fs::Stat) -> HostStatus {
        HostStatus {
            dev: stat.st_dev,
            ino: stat.st_ino,
            len: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            links: stat.st_nlink,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        }
    }
}

/// What `statfs` says of a host file system, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSpace {
    /// Size of the file system.
    pub total: u64,
    /// Free for root.
    pub free: u64,
    /// Free for all others.
    pub available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

/// Reads until `buf` is full or the file ends; returns the bytes read.
pub fn read_full(file: &dyn HostFile, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Writes all of `data`, or says why not. A short write is continued, never reported as success.
pub fn write_full(file: &dyn HostFile, data: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match file.write_at(&data[done..], offset + done as u64)? {
            0 => return Err(io::Error::from_raw_os_error(libc::EIO)),
            n => done += n,
        }
    }
    Ok(())
}

/// A mebibyte of zeroes to write where a host cannot punch.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// Writes `len` zero bytes at `offset`.
pub fn write_zeroes(file: &dyn HostFile, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let step = (len - done).min(ZEROES.len() as u64);
        write_full(file, &ZEROES[..step as usize], offset + done)?;
        done += step;
    }
    Ok(())
}
