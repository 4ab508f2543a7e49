//! The structures and numbers of requests, as uapi/linux/fuse.h has them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What every request begins with.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(in crate::fuse) struct InHeader {
    pub(in crate::fuse) len: u32,
    pub(in crate::fuse) opcode: u32,
    pub(in crate::fuse) unique: u64,
    pub(in crate::fuse) nodeid: u64,
    pub(in crate::fuse) uid: u32,
    pub(in crate::fuse) gid: u32,
    pub(in crate::fuse) pid: u32,
    pub(in crate::fuse) total_extlen: u16,
    pub(in crate::fuse) padding: u16,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct SetAttrIn {
    pub(super) valid: u32,
    _padding: u32,
    _handle: u64,
    pub(super) size: u64,
    _lock_owner: u64,
    _times: [u64; 3],
    _nanoseconds: [u32; 3],
    pub(super) mode: u32,
    _unused: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    _unused2: u32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct OpenIn {
    pub(super) flags: u32,
    _open_flags: u32,
}

/// READ and READDIR; WRITE has the same fields.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct ReadIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
    _flags: u32,
    _lock_owner: u64,
    pub(super) open_flags: u32,
    _padding: u32,
}

/// RELEASE, RELEASEDIR, FSYNC, FSYNCDIR begin with it; RENAME with the folder of the new name.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct HandleIn {
    pub(super) handle: u64,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct FallocateIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) mode: u32,
    _padding: u32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct LseekIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) whence: u32,
    _padding: u32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct CreateIn {
    pub(super) flags: u32,
    _mode: u32,
    _umask: u32,
    _open_flags: u32,
}

/// RENAME has the first field only.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Rename2In {
    pub(super) parent: u64,
    pub(super) flags: u32,
    _padding: u32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct CopyIn {
    pub(super) from: u64,
    pub(super) from_offset: u64,
    _to_ino: u64,
    pub(super) to: u64,
    pub(super) to_offset: u64,
    pub(super) len: u64,
    _flags: u64,
}

/// GETXATTR and LISTXATTR.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct XattrIn {
    pub(super) size: u32,
    _padding: u32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct ForgetIn {
    pub(super) count: u64,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct ForgetsIn {
    pub(super) count: u32,
    _dummy: u32,
}

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(in crate::fuse) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const RELEASEDIR: u32 = 29;
pub(super) const FSYNCDIR: u32 = 30;
pub(super) const CREATE: u32 = 35;
pub(super) const DESTROY: u32 = 38;
pub(super) const IOCTL: u32 = 39;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;
pub(super) const RENAME2: u32 = 45;
pub(super) const LSEEK: u32 = 46;
pub(super) const COPY_FILE_RANGE: u32 = 47;
pub(super) const COPY_FILE_RANGE_64: u32 = 53;

/// Bits of SETATTR's `valid`: what is to be changed.
pub(super) const FATTR_MODE: u32 = 1 << 0;
pub(super) const FATTR_UID: u32 = 1 << 1;
pub(super) const FATTR_GID: u32 = 1 << 2;
pub(super) const FATTR_SIZE: u32 = 1 << 3;
/// Atime, mtime, both to now, ctime.
pub(super) const FATTR_TIMES: u32 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10;
