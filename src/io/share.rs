//! Sharing extents between two files of one host file system (FICLONERANGE), and remembering where it does not work.
//!
//! A copy that shares moves no data and takes no space until one side changes.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Mutex;

use super::file::HostFile;
use crate::sync::plain::lock;

/// Pairs of devices (from, to) whose file systems refused: nothing is tried there again. A leaf; taken once per copy
/// of a cluster.
static REFUSED: Mutex<Option<HashSet<(u64, u64)>>> = Mutex::new(None);

/// The block of the file systems that share extents (XFS, btrfs); the kernel refuses what is not aligned to it.
const ALIGN: u64 = 4096;

/// Makes `len` bytes at `to` of `target` share the extents of those at `from` of `source`. False where that cannot be
/// had and the caller must copy: another file system, one that does not share, odd alignment, or a source that ends
/// before. An error is the host's answer to the write (no space).
pub fn clone_range(
    source: &dyn HostFile,
    from: u64,
    target: &dyn HostFile,
    to: u64,
    len: u64,
) -> io::Result<bool> {
    if !from.is_multiple_of(ALIGN) || !to.is_multiple_of(ALIGN) || !len.is_multiple_of(ALIGN) || len == 0 {
        return Ok(false);
    }
    let (Some(source_fd), Some(target_fd)) = (source.descriptor(), target.descriptor()) else {
        return Ok(false);
    };
    // Device numbers are those probed at open: no system call.
    let pair = (source.traits().device, target.traits().device);
    let refused = |set: &Option<HashSet<_>>| set.as_ref().is_some_and(|set| set.contains(&pair));
    if refused(&lock(&REFUSED)) {
        return Ok(false);
    }
    // The kernel demands that the source holds all of the range.
    if source.len()? < from + len {
        return Ok(false);
    }
    match ficlonerange(source_fd, from, target_fd, to, len) {
        Ok(()) => Ok(true),
        Err(e) => match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EXDEV | libc::ENOTTY | libc::ENOSYS) => {
                let mut set = lock(&REFUSED);
                set.get_or_insert_default().insert(pair);
                Ok(false)
            }
            // This range only (a swap file, a file system with larger blocks).
            Some(libc::EINVAL | libc::ETXTBSY | libc::EPERM) => Ok(false),
            _ => Err(e),
        },
    }
}

fn ficlonerange(
    source: BorrowedFd<'_>,
    from: u64,
    target: BorrowedFd<'_>,
    to: u64,
    len: u64,
) -> io::Result<()> {
    /// `struct file_clone_range` of linux/fs.h.
    #[repr(C)]
    struct Range {
        source: i64,
        from: u64,
        len: u64,
        to: u64,
    }
    /// _IOW(0x94, 13, struct file_clone_range)
    const FICLONERANGE: libc::Ioctl = 0x4020_940d;
    let range = Range { source: source.as_raw_fd().into(), from, len, to };
    loop {
        // SAFETY: both descriptors are borrowed for the call, and the kernel only reads the one struct.
        if unsafe { libc::ioctl(target.as_raw_fd(), FICLONERANGE, &raw const range) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}
