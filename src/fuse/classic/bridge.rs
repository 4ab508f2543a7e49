//! fuser's callbacks, each turned into one call of [`FileSystem`].

use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::convert::{GENERATION, attr, caller, errno, file_type, number};
use super::door::{Door, HELLO};
use super::replies::{
    answer_attr, answer_created, answer_empty, answer_opened, answer_written, answer_xattr,
};
use crate::fuse::capabilities::{CAPABILITIES, Capability};
use crate::fuse::lanes::{Lanes, WriteOn, with_read_buffer};
use crate::fuse::listing;
use crate::fuse::ops::{self, Attr, Done, FileSystem, Name, Now, SetAttr, Space, Whence};
use crate::fuse::{MAX_WRITE, NAME_MAX, TTL, congestion, text_of};
use crate::io::backing::STACK_DEPTH;
use crate::ledger::deaths::spelled;
use crate::ledger::running;

/// One session's; what they all share is behind an `Arc`.
#[derive(Clone)]
pub(super) struct Bridge {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) lanes: Arc<Lanes>,
    /// By which this session's thread comes in.
    pub(super) door: Arc<Door>,
    /// What the kernel lacks was said by another session.
    pub(super) quiet: bool,
    pub(super) max_background: u16,
    /// Some where passthrough is wanted; true once the kernel has agreed.
    pub(super) passthrough: Option<Arc<AtomicBool>>,
}

impl Bridge {
    /// Runs one request. A panic costs that request (its reply, dropped, becomes EIO), not the transport thread:
    /// fuser would lose the thread, say nothing, and hang the mount with the last one.
    /// What has ended daemons (docs/restart.md#deaths) is not executed: it gets EIO in the same way.
    fn serve(&self, of: &Request, what: &str, request: impl FnOnce()) {
        let number = number(of);
        if running::refuses(number) {
            return log::error!("{what}: {} has ended the daemon: answered with EIO", spelled(number));
        }
        let _executing = running::begin(number);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(request)) {
            log::error!("bug: {what} panicked and was answered with EIO: {}", text_of(panic.as_ref()));
        }
    }

    /// Whether a write runs on this thread (docs/design.md#the-fast-path). On rings `uring/serve.rs` decides, where a
    /// write that may wait runs on helpers only.
    fn write_on(&self, handle: u64) -> WriteOn<'_> {
        if self.fs.writes_may_block(handle) { self.lanes.write_on() } else { WriteOn::Here(None) }
    }

    /// Asks the file system to refuse a change of names. It has no way to answer with a new name, so consent is a
    /// refusal too.
    fn refusal(&self, request: &Request, parent: INodeNo, name: &OsStr) -> fuser::Errno {
        match self.fs.change_name(caller(request), parent.0, name) {
            Err(e) => errno(e),
            Ok(()) => fuser::Errno::EPERM,
        }
    }

    fn removal(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(reply, self.fs.change_name(caller(request), parent.0, name));
    }
}

impl fuser::Filesystem for Bridge {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for Capability { bit, name, loss } in CAPABILITIES {
            if config.add_capabilities(InitFlags::from_bits_retain(bit)).is_err() && !self.quiet {
                log::warn!("the kernel (FUSE {}) has no {name}: {loss}", config.kernel_abi());
            }
        }
        for (what, refused) in [
            ("max_write", config.set_max_write(MAX_WRITE).err()),
            ("max_background", config.set_max_background(self.max_background).err().map(u32::from)),
            (
                "congestion",
                config.set_congestion_threshold(congestion(self.max_background)).err().map(u32::from),
            ),
        ] {
            if let Some(nearest) = refused {
                log::warn!("{what} is out of range; the nearest that works is {nearest}");
            }
        }
        if let Some(agreed) = &self.passthrough {
            let offered = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
            agreed.store(offered && config.set_max_stack_depth(STACK_DEPTH).is_ok(), Ordering::Release);
        }
        Ok(())
    }

    fn lookup(&self, r: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.serve(r, "lookup", || {
            let done: Done<Attr> = Box::new(move |answer| match answer {
                Ok(a) => reply.entry(&TTL, &attr(&a), GENERATION),
                Err(e) => reply.error(errno(e)),
            });
            self.fs.lookup(caller(r), parent.0, name, done);
        });
    }

    fn forget(&self, r: &Request, ino: INodeNo, count: u64) {
        if ino.0 == HELLO {
            return self.door.enter();
        }
        self.serve(r, "forget", || self.fs.forget(ino.0, count));
    }

    fn getattr(&self, r: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.serve(r, "getattr", || {
            self.fs.getattr(ino.0, Box::new(move |answer| answer_attr(reply, answer)));
        });
    }

    fn setattr(
        &self,
        r: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let times = atime.is_some() || mtime.is_some() || ctime.is_some();
        let change = SetAttr { mode, uid, gid, size, times };
        self.serve(r, "setattr", || {
            let done: Done<Attr> = Box::new(move |answer| answer_attr(reply, answer));
            self.fs.setattr(caller(r), ino.0, change, done);
        });
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        reply.error(fuser::Errno::EINVAL);
    }

    fn mknod(&self, r: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        self.serve(r, "mknod", || reply.error(self.refusal(r, parent, name)));
    }

    fn mkdir(&self, r: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.serve(r, "mkdir", || reply.error(self.refusal(r, parent, name)));
    }

    fn unlink(&self, r: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve(r, "unlink", || {
            let done: Done<()> = Box::new(move |answer| answer_empty(reply, answer));
            self.fs.unlink(caller(r), parent.0, name, done);
        });
    }

    fn rmdir(&self, r: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve(r, "rmdir", || self.removal(r, parent, name, reply));
    }

    fn symlink(&self, r: &Request, parent: INodeNo, name: &OsStr, _: &Path, reply: ReplyEntry) {
        self.serve(r, "symlink", || reply.error(self.refusal(r, parent, name)));
    }

    fn rename(
        &self,
        r: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        // Never replacing is what is always done; two names cannot be exchanged.
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return reply.error(fuser::Errno::EINVAL);
        }
        self.serve(r, "rename", || {
            let done: Done<()> = Box::new(move |answer| answer_empty(reply, answer));
            self.fs.rename(caller(r), (parent.0, name), (new_parent.0, new_name), done);
        });
    }

    fn link(&self, r: &Request, _: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.serve(r, "link", || reply.error(self.refusal(r, parent, name)));
    }

    fn create(
        &self,
        r: &Request,
        parent: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.serve(r, "create", || {
            let done: Done<(Attr, ops::Opened)> = Box::new(move |answer| answer_created(reply, answer));
            self.fs.create(caller(r), parent.0, name, ops::OpenFlags { raw: flags }, done);
        });
    }

    fn open(&self, r: &Request, ino: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        self.serve(r, "open", || {
            let done: Done<ops::Opened> = Box::new(move |answer| answer_opened(reply, answer));
            self.fs.open(caller(r), ino.0, ops::OpenFlags { raw: flags.0 }, done);
        });
    }

    fn read(
        &self,
        r: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: fuser::OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve(r, "read", || {
            let len = size as usize;
            let mut reply = Some(reply);
            with_read_buffer(len, |buf| match self.fs.read_now(fh.0, offset, buf) {
                Now::Later => {}
                Now::Done(answer) => {
                    if let Some(reply) = reply.take() {
                        match answer {
                            Ok(n) => reply.data(&buf[..n]),
                            Err(e) => reply.error(errno(e)),
                        }
                    }
                }
            });
            // Refused here, or larger than the buffer (the handshake forbids it).
            if let Some(reply) = reply {
                let done: Done<Bytes> = Box::new(move |answer| match answer {
                    Ok(data) => reply.data(&data),
                    Err(e) => reply.error(errno(e)),
                });
                self.fs.read_later(fh.0, offset, len, done);
            }
        });
    }

    fn write(
        &self,
        r: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: fuser::OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.serve(r, "write", || {
            let flags = ops::OpenFlags { raw: flags.0 };
            let now = match self.write_on(fh.0) {
                WriteOn::Here(_inside) => self.fs.write_now(fh.0, offset, data, flags),
                WriteOn::Elsewhere => Now::Later,
            };
            match now {
                Now::Done(answer) => answer_written(reply, answer),
                Now::Later => {
                    let room = match self.fs.room(fh.0, data.len()) {
                        Ok(room) => room,
                        Err(e) => return answer_written(reply, Err(e)),
                    };
                    let done: Done<usize> = Box::new(move |answer| answer_written(reply, answer));
                    self.fs.write_later(fh.0, offset, room.copy(data), flags, done);
                }
            }
        });
    }

    fn release(
        &self,
        r: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: fuser::OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(r, "release", || {
            self.fs.release(fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, r: &Request, _: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.serve(r, "fsync", || self.fs.fsync(fh.0, Box::new(move |answer| answer_empty(reply, answer))));
    }

    fn fallocate(
        &self,
        r: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve(r, "fallocate", || {
            let done: Done<()> = Box::new(move |answer| answer_empty(reply, answer));
            self.fs.fallocate(fh.0, offset, len, mode, done);
        });
    }

    fn lseek(&self, r: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(fuser::Errno::ENXIO);
        };
        self.serve(r, "lseek", || {
            let done: Done<u64> = Box::new(move |answer| match answer.map(i64::try_from) {
                Ok(Ok(found)) => reply.offset(found),
                Ok(Err(_)) => reply.error(fuser::Errno::EOVERFLOW),
                Err(e) => reply.error(errno(e)),
            });
            self.fs.lseek(fh.0, offset, whence, done);
        });
    }

    fn opendir(&self, r: &Request, _: INodeNo, _: fuser::OpenFlags, reply: ReplyOpen) {
        // Nothing is kept for it.
        self.serve(r, "opendir", || reply.opened(FileHandle(0), FopenFlags::empty()));
    }

    fn readdir(&self, r: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.serve(r, "readdir", || {
            let done: Done<Vec<Name>> = Box::new(move |answer| {
                let names = match answer {
                    Ok(names) => names,
                    Err(e) => return reply.error(errno(e)),
                };
                for n in &names {
                    if reply.add(INodeNo(n.ino), n.next, file_type(n.kind), &n.name) {
                        break;
                    }
                }
                reply.ok();
            });
            listing::portion(self.fs.as_ref(), ino.0, offset, done);
        });
    }

    fn releasedir(&self, r: &Request, _: INodeNo, _: FileHandle, _: fuser::OpenFlags, reply: ReplyEmpty) {
        self.serve(r, "releasedir", || reply.ok());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names do not change through the mount; what changes them syncs its folder itself (R8).
        reply.ok();
    }

    fn statfs(&self, r: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.serve(r, "statfs", || {
            let done: Done<Space> = Box::new(move |answer| match answer {
                Ok(s) => {
                    let bs = s.block_size;
                    reply.statfs(s.blocks, s.free, s.available, s.files, s.files_free, bs, NAME_MAX, bs);
                }
                Err(e) => reply.error(errno(e)),
            });
            self.fs.statfs(ino.0, done);
        });
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn getxattr(&self, r: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.serve(r, "getxattr", || {
            let done: Done<Vec<u8>> = Box::new(move |answer| answer_xattr(reply, size, answer));
            self.fs.getxattr(ino.0, name, done);
        });
    }

    fn listxattr(&self, r: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.serve(r, "listxattr", || {
            let list = self
                .fs
                .listxattr(ino.0)
                .map(|names| names.iter().flat_map(|name| name.bytes().chain([0])).collect());
            answer_xattr(reply, size, list);
        });
    }

    fn copy_file_range(
        &self,
        r: &Request,
        _: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _: INodeNo,
        to: FileHandle,
        to_offset: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.serve(r, "copy_file_range", || {
            let done: Done<u64> = Box::new(move |answer| match answer {
                // The answer has 32 bits, and the copying program asks again for the rest. A whole page, as the kernel
                // cuts it.
                Ok(n) => reply.written(u32::try_from(n).unwrap_or(!4095)),
                Err(e) => reply.error(errno(e)),
            });
            self.fs.copy_range((from.0, from_offset), (to.0, to_offset), len, done);
        });
    }

    // ENOSYS from here on, on purpose: the kernel remembers it and does the right thing without asking again. For
    // any other operation it would be remembered too, and something would be lost for the whole mount
    // (docs/kernel.md#enosys).

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
