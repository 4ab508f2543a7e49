//! Between fuser's types and the transport-neutral ones.

use fuser::{FileAttr, FileType, FopenFlags, Generation, INodeNo, Request};

use crate::fuse::ops::{Attr, Caller, Errno, FileKind};

/// Inode numbers are never reused within a mount, so one generation is enough.
pub(super) const GENERATION: Generation = Generation(0);

/// Images: no page cache (loop and qemu have their own), parallel writes, no FLUSH at close. 97 in numbers.
pub(super) const IMAGE_OPEN: FopenFlags = FopenFlags::FOPEN_DIRECT_IO
    .union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES)
    .union(FopenFlags::FOPEN_NOFLUSH);

/// Images that the kernel passes through; FOPEN_DIRECT_IO would bring reads and writes back to us.
pub(super) const PASSED_OPEN: FopenFlags = FopenFlags::FOPEN_NOFLUSH;

/// linux/fuse.h, FUSE_UNIQUE_RESEND: the request was sent before, to a daemon that has died.
const RESENT: u64 = 1 << 63;

pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), request: number(request) }
}

/// The number of a request, also when it is sent again.
pub(super) fn number(request: &Request) -> u64 {
    request.unique().0 & !RESENT
}

pub(super) fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.0)
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Folder => FileType::Directory,
    }
}

pub(super) fn attr(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.blocks,
        // Mounted noatime; and nothing but content changes here.
        atime: a.mtime,
        mtime: a.mtime,
        ctime: a.mtime,
        crtime: a.mtime,
        kind: file_type(a.kind),
        perm: a.mode,
        nlink: a.links,
        uid: a.uid,
        gid: a.gid,
        rdev: 0,
        blksize: a.block_size,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_opened_direct_parallel_and_without_flush() {
        assert_eq!(IMAGE_OPEN.bits(), 97);
    }

    #[test]
    fn an_errno_that_is_none_becomes_eio() {
        assert_eq!(errno(Errno(0)).code(), libc::EIO);
        assert_eq!(errno(Errno(libc::ENOSPC)).code(), libc::ENOSPC);
    }
}
