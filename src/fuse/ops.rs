//! The typed operations that every transport speaks and `tree` implements. No transport's types appear here.
//!
//! Reads and writes come in two steps, because a hand-over to another thread costs half of a small request
//! (docs/kernel.md#hand-over): `read_now`/`write_now` run on the transport thread, with the transport's own buffer, and
//! finish only what cannot block; what they refuse goes through `read_later`/`write_later`, which own their bytes and
//! answer from whichever thread finished. Everything else that may block takes a [`Done`]: whatever asks the host,
//! since a host that hangs below one image must stop no thread that serves the others.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use crate::io::backing::Backing;
use crate::io::buffers::{self, Room};
use crate::io::planned::Planned;

/// An errno of the host, as the kernel gets it. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<&crate::Error> for Errno {
    fn from(e: &crate::Error) -> Errno {
        Errno(e.errno())
    }
}

/// The answer of an operation.
pub type Answer<T> = Result<T, Errno>;
/// Called once, from any thread, with the answer.
pub type Done<T> = Box<dyn FnOnce(Answer<T>) + Send>;

/// Inode number; never reused within a mount. 1 is the root.
pub type Ino = u64;
/// File handle: a stable number (docs/design.md#kept-open).
pub type Handle = u64;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process; 0 for kernel threads in other namespaces.
    pub pid: u32,
    /// The number of the request: no other has it, but the same one when it is sent again.
    pub request: u64,
}

/// File or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Folder.
    Folder,
}

/// What stat shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// File or folder.
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Permission bits.
    pub mode: u16,
    /// Number of names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Preferred size of a request, in bytes.
    pub block_size: u32,
    /// Last change of content.
    pub mtime: SystemTime,
}

/// A `setattr`: only what is asked for is Some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// New mode.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New length in bytes.
    pub size: Option<u64>,
    /// True when a time is set.
    pub times: bool,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// The open flags as the kernel sent them (O_ACCMODE, O_DIRECT, O_SYNC, ...).
    pub raw: i32,
}

impl OpenFlags {
    /// True when the handle may write.
    pub fn writes(self) -> bool {
        self.raw & libc::O_ACCMODE != libc::O_RDONLY
    }
}

/// What a transport answers the kernel about an opened file.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The handle for later operations.
    pub handle: Handle,
    /// Bypass the page cache, with parallel writes and no FLUSH (images); else cached (not for images).
    pub direct: bool,
    /// The host file that the kernel is to read and write in our place, if it takes it; else it is served as `direct` says.
    /// The same for every open of an inode, from its first to its last close. Only in the answer of an open, and only
    /// where [`Session::passes_through`](crate::fuse::session::Session::passes_through) said yes.
    pub backing: Option<Arc<Backing>>,
}

/// One name of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// Inode number.
    pub ino: Ino,
    /// File or folder.
    pub kind: FileKind,
    /// The name.
    pub name: OsString,
    /// Where a listing goes on behind it. Stands for this name as long as the folder lives, so that a listing needs no copy
    /// of the folder; above 2, and grows from name to name.
    pub next: u64,
}

/// statfs: in blocks of `block_size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// f_bsize and f_frsize: the unit in which punching really gives space back; loop makes it its discard granularity.
    pub block_size: u32,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks for ordinary users.
    pub available: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

/// SEEK_DATA or SEEK_HOLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// Next data.
    Data,
    /// Next hole.
    Hole,
}

/// The result of an attempt on the transport thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Now<T> {
    /// Finished; answer this.
    Done(Answer<T>),
    /// Would block, or needs more than a look-up: hand it over.
    Later,
}

/// The data of a write in memory that is the transport's, and that it needs for other requests.
pub trait Held: Send {
    /// How many bytes.
    fn len(&self) -> usize;
    /// True when the transport can do without this memory for as long as a host may take. What is not lent can still be
    /// answered, and the memory is free then.
    fn may_be_lent(&self) -> bool;
    /// The data; the memory is the transport's again when the last of it is dropped.
    fn lend(self: Box<Self>) -> Bytes;
}

/// One file system, as transports see it. All methods may be called from many threads at once.
///
/// Methods without [`Done`] must not block, and none may wait on the thread that calls it.
pub trait FileSystem: Send + Sync + 'static {
    /// Finds a name in a folder.
    fn lookup(&self, caller: Caller, parent: Ino, name: &OsStr, done: Done<Attr>);
    /// The kernel forgot `count` look-ups of `ino`.
    fn forget(&self, ino: Ino, count: u64);
    /// stat.
    fn getattr(&self, ino: Ino, done: Done<Attr>);
    /// chmod, chown, truncate, utimes.
    fn setattr(&self, caller: Caller, ino: Ino, change: SetAttr, done: Done<Attr>);
    /// The names of a folder behind the place `after` ([`Name::next`]; 2 is the beginning), `most` at most, without `.` and
    /// `..`. None: the folder ends.
    fn readdir(&self, ino: Ino, after: u64, most: usize, done: Done<Vec<Name>>);
    /// statfs of the file system behind `ino`.
    fn statfs(&self, ino: Ino, done: Done<Space>);
    /// Any operation that would create, rename, link or remove a name.
    fn change_name(&self, caller: Caller, parent: Ino, name: &OsStr) -> Answer<()>;
    /// Makes a file and opens it.
    fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &OsStr,
        flags: OpenFlags,
        done: Done<(Attr, Opened)>,
    ) {
        let _ = flags;
        done(Err(self.change_name(caller, parent, name).err().unwrap_or(Errno(libc::EPERM))));
    }
    /// Gives a file another name, under which there is nothing.
    fn rename(&self, caller: Caller, from: (Ino, &OsStr), to: (Ino, &OsStr), done: Done<()>) {
        let _ = to;
        done(self.change_name(caller, from.0, from.1));
    }
    /// Removes a file.
    fn unlink(&self, caller: Caller, parent: Ino, name: &OsStr, done: Done<()>) {
        done(self.change_name(caller, parent, name));
    }
    /// Copies `len` bytes from one open file to another, each with its offset. EOPNOTSUPP: this once the kernel reads and
    /// writes; ENOSYS: it never asks again.
    fn copy_range(&self, from: (Handle, u64), to: (Handle, u64), len: u64, done: Done<u64>) {
        let _ = (from, to, len);
        done(Err(Errno(libc::ENOSYS)));
    }
    /// The value of an extended attribute; ENODATA: it has none of that name. ENOSYS: the kernel never asks again.
    fn getxattr(&self, ino: Ino, name: &OsStr, done: Done<Vec<u8>>) {
        let _ = (ino, name);
        done(Err(Errno(libc::ENOSYS)));
    }
    /// The names of the extended attributes.
    fn listxattr(&self, ino: Ino) -> Answer<Vec<&'static str>> {
        let _ = ino;
        Err(Errno(libc::ENOSYS))
    }
    /// Opens a file; may scan an image, so it answers later.
    fn open(&self, caller: Caller, ino: Ino, flags: OpenFlags, done: Done<Opened>);
    /// The last reference to a handle is gone. No thread waits for it.
    fn release(&self, handle: Handle);
    /// Reads on the transport thread. `Done(Ok(n))`: `buf[..n]` holds the answer.
    fn read_now(&self, handle: Handle, offset: u64, buf: &mut [u8]) -> Now<usize>;
    /// Where the bytes of a read lie that [`read_now`](Self::read_now) would have to wait for, for a transport that can read
    /// by itself without a thread. None: [`read_later`](Self::read_later). Never waits.
    fn plan_read(&self, handle: Handle, offset: u64, len: usize) -> Option<Planned> {
        let _ = (handle, offset, len);
        None
    }
    /// Reads; answers from any thread.
    fn read_later(&self, handle: Handle, offset: u64, len: usize, done: Done<Bytes>);
    /// Writes on the transport thread. `flags` are the open flags of the request (O_DSYNC, O_SYNC).
    fn write_now(&self, handle: Handle, offset: u64, data: &[u8], flags: OpenFlags) -> Now<usize>;
    /// True when [`write_now`](Self::write_now) on this handle may wait for the host (its file lies on a disk).
    /// A transport then keeps its last free thread out of it and hands the write over. tmpfs never waits.
    fn writes_may_block(&self, handle: Handle) -> bool {
        let _ = handle;
        false
    }
    /// Room for a write of `len` bytes that is to be copied for [`write_later`](Self::write_later). Waits where there is
    /// none, since nothing else keeps the kernel from sending more; an image whose host hangs gets EIO.
    fn room(&self, handle: Handle, len: usize) -> Answer<Room> {
        let _ = handle;
        Ok(buffers::any_room(len))
    }
    /// The same as [`room`](Self::room) and [`write_later`](Self::write_later), for data that needs no copy. What waits for
    /// room waits on no thread.
    fn write_held(
        &self,
        handle: Handle,
        offset: u64,
        data: Box<dyn Held>,
        flags: OpenFlags,
        done: Done<usize>,
    ) {
        self.write_later(handle, offset, data.lend(), flags, done);
    }
    /// Writes; answers from any thread.
    fn write_later(&self, handle: Handle, offset: u64, data: Bytes, flags: OpenFlags, done: Done<usize>);
    /// fsync and fdatasync: everything acknowledged before is durable.
    fn fsync(&self, handle: Handle, done: Done<()>);
    /// fallocate with the kernel's mode bits.
    fn fallocate(&self, handle: Handle, offset: u64, len: u64, mode: i32, done: Done<()>);
    /// SEEK_DATA, SEEK_HOLE; ENXIO at or behind the end.
    fn lseek(&self, handle: Handle, offset: u64, whence: Whence, done: Done<u64>);
    /// The connection has ended (ENODEV on /dev/fuse): no operation follows.
    fn ended(&self) {}
}
