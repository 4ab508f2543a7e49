//! What the kernel asks, read out of its own structures (uapi/linux/fuse.h): every request of the `uring` transport,
//! from a ring or from /dev/fuse, and the header of INIT for both transports (fuse/handshake). All else of the `fuse`
//! transport fuser decodes. Nothing here trusts a length: rubbish is [`Malformed`], never a panic.

mod uapi;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::fuse::ops::{Caller, Handle, Ino, SetAttr, Whence};
use uapi::{
    BATCH_FORGET, COPY_FILE_RANGE, COPY_FILE_RANGE_64, CREATE, CopyIn, CreateIn, DESTROY, FALLOCATE,
    FATTR_GID, FATTR_MODE, FATTR_SIZE, FATTR_TIMES, FATTR_UID, FORGET, FSYNC, FSYNCDIR, FallocateIn,
    ForgetIn, ForgetsIn, GETATTR, GETXATTR, HandleIn, IOCTL, LINK, LISTXATTR, LOOKUP, LSEEK, LseekIn, MKDIR,
    MKNOD, OPEN, OPENDIR, OpenIn, READ, READDIR, READLINK, RELEASE, RELEASEDIR, RENAME, RENAME2, RMDIR,
    ReadIn, Rename2In, SETATTR, STATFS, SYMLINK, SetAttrIn, UNLINK, WRITE, XattrIn,
};
pub(in crate::fuse) use uapi::{INIT, InHeader};

/// The request is shorter than it says, or says what no kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// One request in the parts in which a ring hands it over.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The header that every request has; what lies behind it is ignored.
    pub header: &'a [u8],
    /// The structure of the operation; what lies behind it is ignored.
    pub operation: &'a [u8],
    /// Names, or data to write: exactly as long as they are.
    pub payload: &'a [u8],
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The file or folder meant.
    pub ino: Ino,
    /// The process that asks.
    pub caller: Caller,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// A request for something that is done or refused; the numbers are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Finds a name.
    Lookup {
        /// The name.
        name: &'a OsStr,
    },
    /// Look-ups that the kernel forgot. Not answered.
    Forget {
        /// How many.
        count: u64,
    },
    /// Many of these. Not answered.
    Forgets {
        /// Pairs of inode number and count, 16 bytes each.
        list: &'a [u8],
    },
    /// stat.
    GetAttr,
    /// chmod, chown, truncate, utimes.
    SetAttr(SetAttr),
    /// The target of a link.
    ReadLink,
    /// Makes or links a name.
    ChangeName {
        /// The name.
        name: &'a OsStr,
    },
    /// Removes a folder.
    RemoveFolder {
        /// The name.
        name: &'a OsStr,
    },
    /// Makes a file and opens it.
    Create {
        /// The name.
        name: &'a OsStr,
        /// Open flags.
        flags: i32,
    },
    /// Removes a file.
    Unlink {
        /// The name.
        name: &'a OsStr,
    },
    /// Gives a file another name.
    Rename {
        /// The old one.
        name: &'a OsStr,
        /// Folder of the new one.
        parent: Ino,
        /// The new one.
        new_name: &'a OsStr,
        /// RENAME_* of renameat2.
        flags: u32,
    },
    /// Copies between two open files.
    CopyRange {
        /// Handle and offset in bytes of what is read.
        from: (Handle, u64),
        /// Handle and offset in bytes of what is written.
        to: (Handle, u64),
        /// Bytes.
        len: u64,
        /// The answer has 64 bits, not 32.
        wide: bool,
    },
    /// The value of an extended attribute.
    GetXattr {
        /// Its name.
        name: &'a OsStr,
        /// Room for the value in bytes; 0 asks how long it is.
        size: u32,
    },
    /// The names of the extended attributes.
    ListXattr {
        /// Room for the list in bytes; 0 asks how long it is.
        size: u32,
    },
    /// Opens a file.
    Open {
        /// Open flags.
        flags: i32,
    },
    /// Reads.
    Read {
        /// Of which handle.
        handle: Handle,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        size: u32,
    },
    /// Writes.
    Write {
        /// To which handle.
        handle: Handle,
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: &'a [u8],
        /// Open flags of the request.
        flags: i32,
    },
    /// statfs.
    StatFs,
    /// The last reference to a handle is gone.
    Release {
        /// Which.
        handle: Handle,
    },
    /// fsync and fdatasync.
    Fsync {
        /// Of which handle.
        handle: Handle,
    },
    /// Opens a folder.
    OpenDir,
    /// Reads names.
    ReadDir {
        /// Behind which place.
        offset: u64,
        /// Room for the answer in bytes.
        size: u32,
    },
    /// Closes a folder.
    ReleaseDir,
    /// fsync of a folder.
    FsyncDir,
    /// fallocate.
    Fallocate {
        /// Of which handle.
        handle: Handle,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Mode bits.
        mode: i32,
    },
    /// SEEK_DATA, SEEK_HOLE; None: another one.
    Lseek {
        /// Of which handle.
        handle: Handle,
        /// From where, in bytes.
        offset: u64,
        /// To what.
        whence: Option<Whence>,
    },
    /// ioctl.
    Ioctl,
    /// The handshake, which comes once, before all others.
    Init,
    /// The file system goes; nothing follows.
    Destroy,
    /// ENOSYS, on purpose (docs/kernel.md#enosys) or because this is newer than we are: the kernel remembers it and
    /// goes on without.
    Unsupported,
}

/// What a request weighs, before anything else of it is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weight {
    /// Bytes to be read or written; 0 for anything else.
    pub bytes: u32,
    /// The handle, if it is a write.
    pub writes: Option<Handle>,
}

/// Length of [`InHeader`] in bytes.
const HEADER: usize = size_of::<InHeader>();

fn structure<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, Malformed> {
    T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_| Malformed)
}

/// The first of the names in a payload: not empty, and ended by a NUL.
fn name(payload: &[u8]) -> Result<&OsStr, Malformed> {
    Ok(first_name(payload)?.0)
}

/// The first of the names in a payload, and what follows it.
fn first_name(payload: &[u8]) -> Result<(&OsStr, &[u8]), Malformed> {
    match payload.iter().position(|&byte| byte == 0) {
        None | Some(0) => Err(Malformed),
        Some(end) => Ok((OsStr::from_bytes(&payload[..end]), &payload[end + 1..])),
    }
}

/// How long the structure of an operation is in a message of /dev/fuse, where the payload follows it.
fn structure_size(opcode: u32) -> usize {
    match opcode {
        FORGET | MKDIR | RENAME | LINK | OPEN | OPENDIR | BATCH_FORGET | GETXATTR | LISTXATTR => 8,
        MKNOD | GETATTR | FSYNC | FSYNCDIR | CREATE | RENAME2 => 16,
        RELEASE | RELEASEDIR | LSEEK => 24,
        FALLOCATE | IOCTL => 32,
        READ | READDIR | WRITE => 40,
        COPY_FILE_RANGE | COPY_FILE_RANGE_64 => size_of::<CopyIn>(),
        INIT => 64,
        SETATTR => size_of::<SetAttrIn>(),
        _ => 0,
    }
}

/// The header of a request.
pub(in crate::fuse) fn header(bytes: &[u8]) -> Result<InHeader, Malformed> {
    structure(bytes)
}

/// Takes a message of /dev/fuse apart.
pub fn split(message: &[u8]) -> Result<Parts<'_>, Malformed> {
    let fields = header(message)?;
    if fields.len as usize != message.len() {
        return Err(Malformed);
    }
    let (header, rest) = message.split_at(HEADER);
    // Older kernels send shorter forms of some structures; an operation that needs more than there is, is malformed.
    let (operation, payload) = rest.split_at(structure_size(fields.opcode).min(rest.len()));
    Ok(Parts { header, operation, payload })
}

/// What a request weighs; rubbish weighs nothing.
pub fn weight(parts: Parts<'_>) -> Weight {
    let opcode = header(parts.header).map_or(0, |h| h.opcode);
    if opcode != READ && opcode != WRITE {
        return Weight::default();
    }
    structure::<ReadIn>(parts.operation).map_or(Weight::default(), |io| Weight {
        bytes: io.size,
        writes: (opcode == WRITE).then_some(io.handle),
    })
}

/// Reads a request.
pub fn decode(parts: Parts<'_>) -> Result<Request<'_>, Malformed> {
    let fields = header(parts.header)?;
    let caller = Caller { uid: fields.uid, gid: fields.gid, pid: fields.pid, request: fields.unique };
    Ok(Request { ino: fields.nodeid, caller, operation: operation(fields.opcode, parts)? })
}

fn operation(opcode: u32, parts: Parts<'_>) -> Result<Operation<'_>, Malformed> {
    let handle = || structure::<HandleIn>(parts.operation).map(|h| h.handle);
    Ok(match opcode {
        LOOKUP => Operation::Lookup { name: name(parts.payload)? },
        FORGET => Operation::Forget { count: structure::<ForgetIn>(parts.operation)?.count },
        BATCH_FORGET => {
            let count = structure::<ForgetsIn>(parts.operation)?.count as usize;
            let len = count.checked_mul(FORGET_ONE).ok_or(Malformed)?;
            Operation::Forgets { list: parts.payload.get(..len).ok_or(Malformed)? }
        }
        GETATTR => Operation::GetAttr,
        SETATTR => Operation::SetAttr(change(&structure(parts.operation)?)),
        READLINK => Operation::ReadLink,
        SYMLINK | MKNOD | MKDIR | LINK => Operation::ChangeName { name: name(parts.payload)? },
        RMDIR => Operation::RemoveFolder { name: name(parts.payload)? },
        CREATE => {
            let c: CreateIn = structure(parts.operation)?;
            Operation::Create { name: name(parts.payload)?, flags: c.flags.cast_signed() }
        }
        UNLINK => Operation::Unlink { name: name(parts.payload)? },
        RENAME | RENAME2 => {
            let (name, rest) = first_name(parts.payload)?;
            let (new_name, _) = first_name(rest)?;
            let (parent, flags) = if opcode == RENAME {
                (handle()?, 0)
            } else {
                let r: Rename2In = structure(parts.operation)?;
                (r.parent, r.flags)
            };
            Operation::Rename { name, parent, new_name, flags }
        }
        COPY_FILE_RANGE | COPY_FILE_RANGE_64 => {
            let c: CopyIn = structure(parts.operation)?;
            let wide = opcode == COPY_FILE_RANGE_64;
            Operation::CopyRange { from: (c.from, c.from_offset), to: (c.to, c.to_offset), len: c.len, wide }
        }
        GETXATTR => {
            let x: XattrIn = structure(parts.operation)?;
            Operation::GetXattr { name: name(parts.payload)?, size: x.size }
        }
        LISTXATTR => Operation::ListXattr { size: structure::<XattrIn>(parts.operation)?.size },
        OPEN => Operation::Open { flags: structure::<OpenIn>(parts.operation)?.flags.cast_signed() },
        READ => {
            let r: ReadIn = structure(parts.operation)?;
            Operation::Read { handle: r.handle, offset: r.offset, size: r.size }
        }
        WRITE => {
            let w: ReadIn = structure(parts.operation)?;
            let data = parts.payload.get(..w.size as usize).ok_or(Malformed)?;
            let flags = w.open_flags.cast_signed();
            Operation::Write { handle: w.handle, offset: w.offset, data, flags }
        }
        STATFS => Operation::StatFs,
        RELEASE => Operation::Release { handle: handle()? },
        FSYNC => Operation::Fsync { handle: handle()? },
        OPENDIR => Operation::OpenDir,
        READDIR => {
            let r: ReadIn = structure(parts.operation)?;
            Operation::ReadDir { offset: r.offset, size: r.size }
        }
        RELEASEDIR => Operation::ReleaseDir,
        FSYNCDIR => Operation::FsyncDir,
        FALLOCATE => {
            let f: FallocateIn = structure(parts.operation)?;
            let (offset, len) = (f.offset, f.length);
            Operation::Fallocate { handle: f.handle, offset, len, mode: f.mode.cast_signed() }
        }
        LSEEK => {
            let l: LseekIn = structure(parts.operation)?;
            let whence = match l.whence.cast_signed() {
                libc::SEEK_DATA => Some(Whence::Data),
                libc::SEEK_HOLE => Some(Whence::Hole),
                _ => None,
            };
            Operation::Lseek { handle: l.handle, offset: l.offset, whence }
        }
        IOCTL => Operation::Ioctl,
        INIT => Operation::Init,
        DESTROY => Operation::Destroy,
        _ => Operation::Unsupported,
    })
}

/// Length of one pair in [`Operation::Forgets`], in bytes.
const FORGET_ONE: usize = 16;

/// The pairs of inode number and count of [`Operation::Forgets`].
pub fn forgets(list: &[u8]) -> impl Iterator<Item = (Ino, u64)> + '_ {
    list.chunks_exact(FORGET_ONE).filter_map(|pair| {
        let (ino, count) = pair.split_first_chunk::<8>()?;
        Some((u64::from_ne_bytes(*ino), u64::from_ne_bytes(*count.first_chunk()?)))
    })
}

fn change(s: &SetAttrIn) -> SetAttr {
    let wanted = |bit: u32| s.valid & bit != 0;
    SetAttr {
        mode: wanted(FATTR_MODE).then_some(s.mode),
        uid: wanted(FATTR_UID).then_some(s.uid),
        gid: wanted(FATTR_GID).then_some(s.gid),
        size: wanted(FATTR_SIZE).then_some(s.size),
        times: wanted(FATTR_TIMES),
    }
}

#[cfg(test)]
mod tests;
