//! One request, from its bytes to its answer: the same for a ring's entry and for a message of /dev/fuse.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::answer::{self, OpenOut};
use super::device::{Device, Registered};
use super::exchange::{Exchange, Owed};
use super::lent;
use super::wire::{self, Operation, Request};
use crate::fuse::lanes::{Lanes, WriteOn};
use crate::fuse::listing;
use crate::fuse::ops::{Done, Errno, FileSystem, Handle, Now, OpenFlags, Opened};
use crate::fuse::text_of;
use crate::io::backing::Registration;
use crate::io::buffers;

/// What all threads of a session share.
pub(super) struct SessionServer {
    fs: Arc<dyn FileSystem>,
    /// The threads that may wait in a write; see [`Lanes`].
    lanes: Lanes,
    /// The connection has ended: nothing reaches the file system any more.
    closed: AtomicBool,
    /// Where host files are registered for passthrough. None in tests.
    device: Option<Arc<Device>>,
}

/// The answer of OPEN: passed through where that is wanted and the kernel takes the file.
fn opened(device: Option<&Arc<Device>>, o: &Opened) -> OpenOut {
    let passed = o.backing.as_ref().zip(device).and_then(|(backing, device)| {
        backing.register(|file| device.register(file).map(|registered| Arc::new(registered) as Registration))
    });
    match passed.as_ref().and_then(|registration| registration.downcast_ref::<Registered>()) {
        Some(registered) => answer::passed(o, registered.id),
        None => answer::opened(o),
    }
}

/// On which sort of thread a request is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    /// One that others wait for: it never waits itself.
    Transport,
    /// The same, for a request that `helpers` has looked at: it is no write that may wait.
    Sifted,
    /// One of those that may wait in a write, unless it is the last that is free.
    Helper,
}

impl SessionServer {
    /// `helpers`: how many threads may wait in writes.
    pub(super) fn new(fs: Arc<dyn FileSystem>, helpers: usize, device: Option<Arc<Device>>) -> SessionServer {
        SessionServer { fs, lanes: Lanes::new(helpers), closed: AtomicBool::new(false), device }
    }

    /// True when a write to `handle` may wait for the host.
    pub(super) fn writes_may_block(&self, handle: Handle) -> bool {
        self.fs.writes_may_block(handle)
    }

    /// No request that is served from here on reaches the file system.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// True after [`close`](Self::close).
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Reports to the file system that nothing follows.
    pub(super) fn ended(&self) {
        self.fs.ended();
    }

    /// Serves one request. A panic costs that request, not the thread.
    pub(super) fn serve<E: Exchange>(&self, exchange: E, thread: Thread) {
        let reply = Owed::to(exchange);
        if self.is_closed() {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.carry_out(reply, thread))) {
            log::error!("bug: a request panicked and was answered with EIO: {}", text_of(panic.as_ref()));
        }
    }

    fn carry_out<E: Exchange>(&self, reply: Owed<E>, thread: Thread) {
        let Ok(Request { ino, caller, operation }) = wire::decode(reply.parts()) else {
            log::warn!("the kernel sent a request that makes no sense; it was answered with EIO");
            return;
        };
        match operation {
            Operation::Lookup { name } => {
                let name = name.to_owned();
                let done = Box::new(move |answer| reply.fields(answer, |a| answer::entry(&a)));
                self.fs.lookup(caller, ino, &name, done);
            }
            Operation::Forget { count } => {
                self.fs.forget(ino, count);
                reply.forget();
            }
            Operation::Forgets { list } => {
                wire::forgets(list).for_each(|(ino, count)| self.fs.forget(ino, count));
                reply.forget();
            }
            Operation::GetAttr => {
                self.fs.getattr(ino, Box::new(move |answer| reply.fields(answer, |a| answer::attr(&a))));
            }
            Operation::SetAttr(change) => {
                let done = Box::new(move |answer| reply.fields(answer, |a| answer::attr(&a)));
                self.fs.setattr(caller, ino, change, done);
            }
            Operation::ReadLink => reply.error(libc::EINVAL),
            // It has no way to answer with a new name, so consent is a refusal too.
            Operation::ChangeName { name } => {
                let answer = self.fs.change_name(caller, ino, name);
                reply.send(Err(answer.err().unwrap_or(Errno(libc::EPERM))));
            }
            Operation::RemoveFolder { name } => {
                let answer = self.fs.change_name(caller, ino, name);
                reply.empty(answer);
            }
            Operation::Create { name, flags } => {
                let name = name.to_owned();
                let done: Done<_> = Box::new(move |answer| reply.fields(answer, answer::created));
                self.fs.create(caller, ino, &name, OpenFlags { raw: flags }, done);
            }
            Operation::Unlink { name } => {
                let name = name.to_owned();
                self.fs.unlink(caller, ino, &name, Box::new(move |answer| reply.empty(answer)));
            }
            // Never replacing is what is always done; two names cannot be exchanged.
            Operation::Rename { flags, .. } if flags & !libc::RENAME_NOREPLACE != 0 => {
                reply.error(libc::EINVAL);
            }
            Operation::Rename { name, parent, new_name, .. } => {
                let (name, new_name) = (name.to_owned(), new_name.to_owned());
                let done = Box::new(move |answer| reply.empty(answer));
                self.fs.rename(caller, (ino, &name), (parent, &new_name), done);
            }
            Operation::CopyRange { from, to, len, wide: true } => {
                let done: Done<u64> = Box::new(move |answer| reply.fields(answer, |copied| copied));
                self.fs.copy_range(from, to, len, done);
            }
            Operation::CopyRange { from, to, len, wide: false } => {
                let done = Box::new(move |answer| reply.fields(answer, answer::copied));
                self.fs.copy_range(from, to, len, done);
            }
            Operation::GetXattr { name, size } => {
                let name = name.to_owned();
                self.fs.getxattr(ino, &name, Box::new(move |answer| reply.sized(answer, size)));
            }
            Operation::ListXattr { size } => {
                let names = self.fs.listxattr(ino);
                let list = |names: Vec<&str>| names.iter().flat_map(|name| name.bytes().chain([0])).collect();
                reply.sized(names.map(list), size);
            }
            Operation::Open { flags } => {
                let device = self.device.clone();
                let done =
                    Box::new(move |answer| reply.fields(answer, |o: Opened| opened(device.as_ref(), &o)));
                self.fs.open(caller, ino, OpenFlags { raw: flags }, done);
            }
            Operation::Read { handle, offset, size } => self.read(reply, handle, offset, size as usize),
            Operation::Write { handle, offset, data, flags } => {
                let flags = OpenFlags { raw: flags };
                let now = match self.write_on(handle, thread) {
                    WriteOn::Here(_inside) => self.fs.write_now(handle, offset, data, flags),
                    WriteOn::Elsewhere => Now::Later,
                };
                match now {
                    Now::Done(answer) => reply.fields(answer, answer::written),
                    // Small: its entry is to be the kernel's as soon as it can.
                    Now::Later if buffers::is_small(data.len()) => {
                        let data = Bytes::copy_from_slice(data);
                        let done = Box::new(move |answer| reply.fields(answer, answer::written));
                        self.fs.write_later(handle, offset, data, flags, done);
                    }
                    Now::Later => {
                        if let Some((data, done)) = lent::lend(reply) {
                            self.fs.write_held(handle, offset, data, flags, done);
                        }
                    }
                }
            }
            Operation::StatFs => {
                self.fs.statfs(ino, Box::new(move |answer| reply.fields(answer, |s| answer::space(&s))));
            }
            Operation::Release { handle } => {
                self.fs.release(handle);
                reply.empty(Ok(()));
            }
            Operation::Fsync { handle } => {
                self.fs.fsync(handle, Box::new(move |answer| reply.empty(answer)));
            }
            // Nothing is kept for it.
            Operation::OpenDir => {
                reply.fields(Ok(0), |handle| answer::opened(&Opened { handle, direct: false, backing: None }))
            }
            Operation::ReadDir { offset, size } => {
                let done = Box::new(move |answer| reply.names(answer, size as usize));
                listing::portion(self.fs.as_ref(), ino, offset, done);
            }
            Operation::ReleaseDir => reply.empty(Ok(())),
            // Names do not change through the mount; what changes them syncs its folder itself (R8).
            Operation::FsyncDir => reply.empty(Ok(())),
            Operation::Fallocate { handle, offset, len, mode } => {
                self.fs.fallocate(handle, offset, len, mode, Box::new(move |answer| reply.empty(answer)));
            }
            Operation::Lseek { whence: None, .. } => reply.error(libc::EINVAL),
            Operation::Lseek { offset, .. } if i64::try_from(offset).is_err() => reply.error(libc::ENXIO),
            Operation::Lseek { handle, offset, whence: Some(whence) } => {
                let done: Done<u64> = Box::new(move |answer| reply.fields(answer, |found| found));
                self.fs.lseek(handle, offset, whence, done);
            }
            Operation::Ioctl => reply.error(libc::ENOTTY),
            // Answered before the session began; a second one is no request of a kernel.
            Operation::Init => reply.error(libc::EIO),
            Operation::Destroy => reply.empty(Ok(())),
            Operation::Unsupported => reply.error(libc::ENOSYS),
        }
    }

    /// Straight into the place of the answer, if that ends at once.
    fn read<E: Exchange>(&self, mut reply: Owed<E>, handle: Handle, offset: u64, len: usize) {
        let Some(room) = reply.exchange().room(len) else { return reply.error(libc::EINVAL) };
        match self.fs.read_now(handle, offset, room) {
            Now::Done(answer) => reply.send(answer.map(|n| n.min(len))),
            Now::Later => {
                if reply.exchange().can_fill()
                    && let Some(planned) = self.fs.plan_read(handle, offset, len)
                {
                    return reply.fill(planned);
                }
                let done: Done<Bytes> = Box::new(move |answer| reply.bytes(answer));
                self.fs.read_later(handle, offset, len, done);
            }
        }
    }

    /// Whether a write runs on this thread (docs/design.md#the-fast-path): a sifted one does, which cannot wait
    /// (`queue`), and of those that may wait what comes on a helper, while another stays free. `classic/bridge.rs`
    /// decides for fuser's.
    fn write_on(&self, handle: Handle, thread: Thread) -> WriteOn<'_> {
        if thread == Thread::Sifted || !self.fs.writes_may_block(handle) {
            return WriteOn::Here(None);
        }
        if thread == Thread::Helper { self.lanes.write_on() } else { WriteOn::Elsewhere }
    }
}

#[cfg(test)]
mod tests;
