//! One io_uring, through which requests of the kernel's queues come and go: at first those of its own entries, and
//! then also those of others that were answered through it.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

use super::cpus::{ADDED, MOST, Queue, grows};
use super::device::Device;
use super::exchange::Exchange;
use super::memory::{Answered, Entries, EntryId, Filling, HeldEntry};
use crate::fuse::ops::Ino;
use crate::io::ring::{begin, bound, look, passing};

/// fuse_uring_cmd: gives an entry to a queue.
const REGISTER: u32 = 1;
/// fuse_uring_cmd: answers a request, and waits for the next with the same entry, on the ring that says so.
const COMMIT_AND_FETCH: u32 = 2;

/// Marks the completion of the read of [`Entries::wake`]; entries are marked with their [`EntryId`].
const WAKE: u64 = u64::MAX;
/// Marks, with the index of its entry, a read that fills it.
const FILL: u64 = 1 << 63;

const _: () = assert!(size_of::<Entry128>() == 128, "the kernel's io_uring_sqe with IORING_SETUP_SQE128");

/// The entries of a session; each knows its number here as its home.
type Homes = Arc<[Arc<Entries>]>;

/// How many submissions a ring has room for that has no entries of its own; when they are full it submits.
const ROOM: u32 = 64;

/// How many completions a ring has room for: as many as a queue may come to have entries, and reads beside them. What is
/// more the kernel keeps until there is room.
const COMPLETIONS: u32 = 2 * MOST;

/// How often a crowded queue is looked at while its requests wait.
const LOOK: Duration = Duration::from_millis(100);

/// A ring and its entries.
pub(super) struct Ring {
    // First, so that the ring is closed before the memory of any entry goes.
    ring: IoUring<Entry128, cqueue::Entry>,
    own: Arc<Entries>,
    homes: Homes,
    answered: VecDeque<Answered>,
    /// Reads that the kernel is to have.
    to_fill: VecDeque<Filling>,
    /// Reads that the kernel has, by index of their entry, which is our own.
    filling: Vec<Option<Filling>>,
    /// How many these are.
    fills: usize,
    /// The kernel is reading `wake`.
    watching: bool,
    /// Requests whose read the kernel was not even given.
    refused: Vec<HeldEntry>,
    /// There was no memory for more entries.
    cannot_grow: bool,
    device: Option<Arc<Device>>,
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Only after a panic. The kernel may still write to what it has: that memory is never freed, and never looked
        // at again. The clusters are released, or a freeze would wait for ever.
        for Filling { held, planned } in self.filling.iter_mut().filter_map(Option::take) {
            std::mem::forget((planned.file(), held));
            planned.end(false);
        }
    }
}

/// Makes rings and their memory: one for each list of queues, and `more` that have none.
pub(super) fn make(queues: &[&[Queue]], more: usize) -> io::Result<(Vec<Ring>, Vec<Ring>)> {
    let homes = (0..).zip(queues).map(|(home, queues)| Entries::new(home, queues).map(Arc::new));
    let homes: Homes = homes.collect::<io::Result<_>>()?;
    let rings = homes.iter().map(|own| Ring::new(own.clone(), homes.clone())).collect::<io::Result<_>>()?;
    let none = || Entries::new(u32::MAX, &[]).map(Arc::new);
    let more = (0..more).map(|_| Ring::new(none()?, homes.clone())).collect::<io::Result<_>>()?;
    Ok((rings, more))
}

impl Ring {
    /// What can be submitted to it is bound to the two operations that we use, so that it is no way around the list of
    /// system calls of the sandbox. The kernel is to leave completions until its thread asks for them: otherwise each
    /// request interrupts the thread, on its CPU by a call from another, in the middle of the one that it serves. Measured,
    /// bare pass-through on 2 CPUs, 4k at QD32: 110k without, 295k with it.
    fn new(own: Arc<Entries>, homes: Homes) -> io::Result<Ring> {
        let room = (own.count() + 1).max(ROOM).next_power_of_two();
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_cqsize(COMPLETIONS);
        let ring = bound(&mut builder, room, &[opcode::UringCmd80::CODE, opcode::Read::CODE])?;
        let filling = (0..own.count()).map(|_| None).collect();
        let (answered, to_fill, refused) = (VecDeque::new(), VecDeque::new(), Vec::new());
        Ok(Ring {
            ring,
            own,
            homes,
            answered,
            to_fill,
            filling,
            fills: 0,
            watching: false,
            refused,
            cannot_grow: false,
            device: None,
        })
    }

    /// Its own entries.
    pub(super) fn entries(&self) -> &Arc<Entries> {
        &self.own
    }

    /// True while the thread of another ring with entries serves requests.
    pub(super) fn others_are_busy(&self) -> bool {
        self.homes.iter().any(|entries| !Arc::ptr_eq(entries, &self.own) && entries.is_busy())
    }

    /// How many reads the kernel has of it.
    pub(super) fn fills(&self) -> usize {
        self.fills
    }

    /// The entries of the session.
    pub(super) fn homes(&self) -> &Homes {
        &self.homes
    }

    /// Gives every entry of its own to its queue. To be called once, by the thread that then calls
    /// [`wait`](Self::wait): the kernel copies requests in the context of the thread that submitted their entry, and no other
    /// may submit to this ring.
    pub(super) fn register(&mut self, device: Arc<Device>) -> io::Result<()> {
        begin(&self.ring)?;
        self.device = Some(device);
        self.own.adopt_thread();
        self.give(0..self.own.count())
    }

    /// Adds entries to queues of which more than half are out, within the bound in bytes (`grows`). Some: a queue is
    /// crowded all the same, and is to be looked at again after that time. To be called by the ring's thread, before it
    /// waits.
    ///
    /// The kernel gives an entry that is new to requests that come after it only. What waits already it gives to an entry
    /// that is answered, one each. So there is a request of our own for each new entry, by `at_home` on the CPU of the
    /// queue, about the file `ino`, which was asked for last (docs/kernel.md#rings).
    pub(super) fn make_room(&mut self, ino: Ino, at_home: impl Fn(&mut dyn FnMut())) -> Option<Duration> {
        let crowded: Vec<_> = self.own.crowded().collect();
        if crowded.is_empty() || self.cannot_grow {
            return None;
        }
        for (tally, all, free) in crowded {
            let bytes = self.homes.iter().map(|entries| entries.may_take()).sum();
            if !grows(all, free, bytes) {
                continue;
            }
            let added = self.own.add(tally).and_then(|entries| {
                self.filling.resize_with(entries.end as usize, || None);
                self.give(entries)
            });
            at_home(&mut || (0..ADDED).for_each(|_| self.knock(ino)));
            if let Err(e) = added {
                self.cannot_grow = true;
                log::error!(
                    "a queue gets no more entries: {e}; while many requests wait, others wait with them"
                );
            }
        }
        Some(LOOK)
    }

    fn knock(&self, ino: Ino) {
        if let Some(Err(e)) = self.device.as_ref().map(|device| device.knock(ino)) {
            log::debug!("what waits for an entry waits on: {e}");
        }
    }

    /// Gives entries of its own to their queues.
    fn give(&mut self, entries: Range<u32>) -> io::Result<()> {
        let fd = self.device.as_ref().map_or(-1, |device| device.as_raw_fd());
        let places: Vec<[libc::iovec; 2]> = entries.clone().map(|index| self.own.places(index)).collect();
        for (index, place) in entries.zip(&places) {
            let command = command(fd, REGISTER, 0, self.own.queue(index), Some(place.as_ptr() as u64));
            self.push(with_two_places(command).user_data(self.own.place(index).mark()))?;
            self.own.begins(index);
        }
        // The places are read now, in the call; afterwards `places` may go.
        while !self.ring.submission().is_empty() {
            passing(self.ring.submit())?;
        }
        Ok(())
    }

    /// Hands over what was answered, waits for at least one request or call, or for `limit`, and puts the requests into
    /// `batch`.
    pub(super) fn wait(&mut self, batch: &mut Vec<HeldEntry>, limit: Option<Duration>) -> io::Result<()> {
        self.commit()?;
        let want = usize::from(self.refused.is_empty());
        match limit {
            None => passing(self.ring.submit_and_wait(want))?,
            Some(limit) => {
                let limit = Timespec::from(limit);
                passing(self.ring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&limit)))?;
            }
        }
        self.collect(batch)
    }

    /// The same without waiting.
    pub(super) fn look(&mut self, batch: &mut Vec<HeldEntry>) -> io::Result<()> {
        self.commit()?;
        look(&mut self.ring)?;
        self.collect(batch)
    }

    /// Hands over what was answered, without waiting.
    fn flush(&mut self) -> io::Result<()> {
        self.commit()?;
        passing(self.ring.submit())
    }

    /// Hands over what was answered now, because a requester waits. What fails stays; the next wait tries it again, and
    /// says so.
    pub(super) fn prompt(&mut self) {
        if let Err(e) = self.flush() {
            log::debug!("cannot hand an answer over: {e}");
        }
    }

    fn collect(&mut self, batch: &mut Vec<HeldEntry>) -> io::Result<()> {
        batch.append(&mut self.refused);
        while let Some(done) = self.ring.completion().next() {
            if done.user_data() == WAKE {
                self.watching = false;
                continue;
            }
            if done.user_data() & FILL != 0 {
                let index = done.user_data() & !FILL;
                let read = usize::try_from(index).ok().and_then(|index| self.filling.get_mut(index));
                match read.and_then(Option::take) {
                    Some(read) => {
                        self.fills -= 1;
                        batch.extend(filled(read, done.result()));
                    }
                    None => {
                        log::error!("the kernel completed the read of entry {index}, which it does not have")
                    }
                }
                continue;
            }
            let EntryId { home, index } = EntryId::marked(done.user_data());
            let known = self.homes.get(home as usize).is_some_and(|entries| {
                if done.result() < 0 {
                    let ended = entries.ends(index);
                    if ended {
                        report(entries.queue(index), -done.result());
                    }
                    return ended;
                }
                // SAFETY: the kernel has completed its submission just now, and each completion is seen once.
                unsafe { entries.came(index) }.map(|held| batch.push(held)).is_some()
            });
            if !known {
                log::error!("the kernel completed entry {home}.{index}, which it does not have");
            }
        }
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        if !self.watching {
            self.watch_wake()?;
            self.watching = true;
        }
        self.own.take_answered(&mut self.answered);
        let fd = self.device.as_ref().map_or(-1, |device| device.as_raw_fd());
        while let Some(&Answered { place, commit_id }) = self.answered.front() {
            let EntryId { home, index } = place;
            let ours = self.homes.get(home as usize).filter(|entries| entries.is_ours(index));
            if let Some(queue) = ours.map(|entries| entries.queue(index)) {
                let command = command(fd, COMMIT_AND_FETCH, commit_id, queue, None);
                // What fails here stays among the answers.
                self.push(command.user_data(place.mark()))?;
                self.homes[home as usize].goes(index);
            } else {
                log::error!("bug: entry {home}.{index} was answered while we did not have it");
            }
            self.answered.pop_front();
        }
        Entries::take_fillings(&mut self.to_fill);
        while let Some(filling) = self.to_fill.pop_front() {
            self.fill(filling)?;
        }
        Ok(())
    }

    /// Gives a read to the kernel. The order: (1) the read into the table, which keeps memory, file and clusters; (2) the
    /// submission. 2 before 1 would let the kernel write to what may be gone.
    fn fill(&mut self, mut filling: Filling) -> io::Result<()> {
        let planned = &filling.planned;
        let (offset, len) = (planned.offset(), planned.len());
        let fd = planned.descriptor().map(|fd| Fd(fd.as_raw_fd()));
        let (index, place) = (filling.held.index(), filling.held.place(len));
        let slot = self.filling.get_mut(index as usize);
        let (Some(fd), Some(place), Some(slot @ None)) = (fd, place, slot) else {
            // Not readable this way any more: it comes again.
            self.refused.push(again(filling));
            return Ok(());
        };
        *slot = Some(filling); // 1
        self.fills += 1;
        let read = opcode::Read::new(fd, place, len as u32).offset(offset).build();
        let pushed = self.push(Entry128::from(read).user_data(FILL | u64::from(index))); // 2
        if pushed.is_err()
            && let Some(filling) = self.filling[index as usize].take()
        {
            self.fills -= 1;
            self.refused.push(again(filling));
        }
        pushed
    }

    fn watch_wake(&mut self) -> io::Result<()> {
        let place = self.own.wake_place();
        let read = opcode::Read::new(Fd(self.own.wake().as_raw_fd()), place, 8).build();
        self.push(Entry128::from(read).user_data(WAKE))
    }

    fn push(&mut self, entry: Entry128) -> io::Result<()> {
        // SAFETY: all that an entry points to (iovecs, headers, payloads, the place for `wake`) lives until it completes:
        // the iovecs until it was submitted, the rest as long as `own` and `homes`, which go after the ring.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Seldom: there is room for all entries of its own and for `wake`.
            passing(self.ring.submit())?;
        }
        Ok(())
    }
}

/// A read is over: the answer is there, or the request comes again.
fn filled(read: Filling, result: i32) -> Option<HeldEntry> {
    if !read.planned.is_filled_by(result) {
        return Some(again(read));
    }
    let len = read.planned.len();
    read.planned.end(true);
    read.held.send(Ok(len));
    None
}

/// What the ring could not read: the request, to be served in another way.
fn again(filling: Filling) -> HeldEntry {
    let Filling { mut held, planned } = filling;
    held.fail();
    planned.end(false);
    held
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

#[cfg(test)]
mod tests;
