//! One io_uring, through which the requests of one or more of the kernel's queues come and go.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, register::Restriction, types::Fd};

use super::device::Device;
use super::memory::{self, Entries, Held};

/// fuse_uring_cmd: gives an entry to a queue.
const REGISTER: u32 = 1;
/// fuse_uring_cmd: answers a request, and waits for the next with the same entry.
const COMMIT_AND_FETCH: u32 = 2;

/// Marks the completion of the read of [`Entries::wake`]; entries are marked by their index.
const WAKE: u64 = u64::MAX;

const _: () = assert!(size_of::<Entry128>() == 128, "the kernel's io_uring_sqe with IORING_SETUP_SQE128");

/// Entries for one queue of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    /// Its number, which is that of a CPU.
    pub(super) id: u16,
    /// How many requests it may have under way.
    pub(super) depth: u32,
}

/// Who has an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The kernel, until it completes.
    Kernel,
    /// We, until we answer.
    We,
    /// Nobody any more: its queue has ended.
    Nobody,
}

/// A ring and its entries.
pub(super) struct Ring {
    // First, so that the ring is closed before its memory goes.
    ring: IoUring<Entry128, cqueue::Entry>,
    entries: Arc<Entries>,
    /// Queue and owner by index of the entry.
    owners: Vec<(u16, Owner)>,
    /// Entries that have an owner.
    live: usize,
    answered: Vec<u32>,
    device: Option<Arc<Device>>,
}

impl Ring {
    /// Makes the ring and its memory. What can be submitted to it is bound to the two operations that we use, so that
    /// it is no way around the list of system calls of the sandbox.
    pub(super) fn new(queues: &[Queue]) -> io::Result<Ring> {
        let owners: Vec<(u16, Owner)> = queues
            .iter()
            .flat_map(|queue| std::iter::repeat_n((queue.id, Owner::Nobody), queue.depth as usize))
            .collect();
        let count = owners.len() as u32;
        let ring = IoUring::builder().setup_r_disabled().build((count + 1).next_power_of_two())?;
        let submitter = ring.submitter();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::UringCmd80::CODE),
            Restriction::sqe_op(opcode::Read::CODE),
        ])?;
        submitter.register_enable_rings()?;
        let entries = Arc::new(Entries::new(count)?);
        Ok(Ring { ring, entries, owners, live: 0, answered: Vec::new(), device: None })
    }

    /// The entries.
    pub(super) fn entries(&self) -> &Arc<Entries> {
        &self.entries
    }

    /// True until the last queue has ended and the last answer was sent.
    pub(super) fn is_live(&self) -> bool {
        self.live > 0
    }

    /// Gives every entry to its queue. To be called once, by the thread that then calls [`wait`](Self::wait): the kernel
    /// copies requests in the context of the thread that submitted their entry.
    pub(super) fn register(&mut self, device: Arc<Device>) -> io::Result<()> {
        let fd = device.as_raw_fd();
        self.device = Some(device);
        self.entries.adopt_thread();
        let places: Vec<[libc::iovec; 2]> =
            (0..self.entries.count()).map(|index| self.entries.places(index)).collect();
        for (index, place) in (0u32..).zip(&places) {
            let queue = self.owners[index as usize].0;
            let command = command(fd, REGISTER, 0, queue, Some(place.as_ptr() as u64));
            self.push(with_two_places(command).user_data(index.into()))?;
            self.owners[index as usize].1 = Owner::Kernel;
            self.live += 1;
        }
        self.watch_wake()?;
        // The places are read now, in the call; afterwards `places` may go.
        while !self.ring.submission().is_empty() {
            retry(self.ring.submit())?;
        }
        Ok(())
    }

    /// Hands over what was answered, waits for at least one request or call, and puts the requests into `batch`.
    pub(super) fn wait(&mut self, batch: &mut Vec<Held>) -> io::Result<()> {
        self.commit()?;
        retry(self.ring.submit_and_wait(1))?;
        let mut woken = false;
        while let Some(done) = self.ring.completion().next() {
            if done.user_data() == WAKE {
                woken = true;
                continue;
            }
            let owner = usize::try_from(done.user_data()).ok().and_then(|index| self.owners.get_mut(index));
            let Some((queue, owner @ Owner::Kernel)) = owner else {
                log::error!("the kernel completed entry {}, which it does not have", done.user_data());
                continue;
            };
            if done.result() < 0 {
                *owner = Owner::Nobody;
                self.live -= 1;
                report(*queue, -done.result());
                continue;
            }
            *owner = Owner::We;
            // SAFETY: the kernel had this entry and has completed it just now.
            batch.push(unsafe { Held::new(self.entries.clone(), done.user_data() as u32) });
        }
        if woken {
            self.watch_wake()?;
        }
        Ok(())
    }

    /// Hands over what was answered, without waiting.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.commit()?;
        retry(self.ring.submit())
    }

    fn commit(&mut self) -> io::Result<()> {
        let mut answered = std::mem::take(&mut self.answered);
        self.entries.take_answered(&mut answered);
        let fd = self.device.as_ref().map_or(-1, |device| device.as_raw_fd());
        for index in answered.drain(..) {
            let (queue, owner) = self.owners[index as usize];
            if owner != Owner::We {
                log::error!("bug: entry {index} was answered while {owner:?} had it");
                continue;
            }
            // SAFETY: it was ours and is answered; it is submitted below.
            let id = unsafe { memory::commit_id(&self.entries, index) };
            let command = command(fd, COMMIT_AND_FETCH, id, queue, None);
            self.push(command.user_data(index.into()))?;
            self.owners[index as usize].1 = Owner::Kernel;
        }
        self.answered = answered;
        Ok(())
    }

    fn watch_wake(&mut self) -> io::Result<()> {
        let place = self.entries.wake_place();
        let read = opcode::Read::new(Fd(self.entries.wake().as_raw_fd()), place, 8).build();
        self.push(Entry128::from(read).user_data(WAKE))
    }

    fn push(&mut self, entry: Entry128) -> io::Result<()> {
        // SAFETY: all that an entry points to (iovecs, headers, payloads, the place for `wake`) lives until it completes:
        // the iovecs until it was submitted, the rest as long as `entries`, which goes after the ring.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // One place for each entry and one for `wake`: never full, but nothing depends on it.
            retry(self.ring.submit())?;
        }
        Ok(())
    }
}

/// A failure that passes by itself is none.
fn retry(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        // EBUSY: completions wait to be taken first.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Why an entry does not come back. ENOTCONN, ECANCELED: the mount has ended.
fn report(queue: u16, errno: i32) {
    if matches!(errno, libc::ENOTCONN | libc::ECANCELED) {
        return;
    }
    let e = io::Error::from_raw_os_error(errno);
    log::error!(
        "the kernel refused an entry of queue {queue}: {e}; with none left, its CPU's requests wait for ever"
    );
}

/// A command to /dev/fuse: fuse_uring_cmd_req in the 80 bytes of the entry.
fn command(fd: i32, what: u32, commit_id: u64, queue: u16, place: Option<u64>) -> Entry128 {
    let mut fields = [0; 80];
    fields[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    fields[16..18].copy_from_slice(&queue.to_ne_bytes());
    opcode::UringCmd80::new(Fd(fd), what).cmd(fields).addr(place).build()
}

/// REGISTER points to two iovecs and says so in the field `len`, for which the crate has no setter.
fn with_two_places(mut entry: Entry128) -> Entry128 {
    // SAFETY: Entry128 is the kernel's io_uring_sqe of 128 bytes, repr(C) and aligned to 8; at 24 lies its `len`, four
    // bytes that may hold anything.
    unsafe { (&raw mut entry).cast::<u8>().add(24).cast::<u32>().write(2) };
    entry
}
