//! Reads that wait for a disk without a thread each: an io_uring, and one thread that submits to it and collects.
//!
//! A thread that blocks in a read costs two changes of threads besides the read itself. Here, what comes while the thread
//! is at work goes to the disk in one call with its neighbours, and what the disk has finished is taken in one as well.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use io_uring::{IoUring, opcode, types::Fd};
use rustix::event::EventfdFlags;

use super::pages::Pages;
use super::planned::Planned;
use super::process::spawn_thread;
use super::ring::{begin, bound, passing};
use crate::sync::plain::lock;

/// Reads at the disk at a time, over all images: more than a disk takes at once; what comes beyond waits its turn.
const DEPTH: u32 = 256;

/// So many reads are answered before what has come meanwhile goes to the disk: an answered requester asks for the next, and the
/// disk should not stand idle until the last of many is answered. Cold 4k reads with O_DIRECT, QD32: 41k when all are answered
/// first, 48k with 8, 49k with 4, 52k with 2, 53k with 1; through the page cache 2 to 4 gain a little, and 1 loses it.
const PIECE: usize = 2;

/// Marks the completion of the read of [`Shared::wake`]; reads are marked by their slot.
const WAKE: u64 = u64::MAX;

/// What is called once with the bytes, from the collecting thread: it must not block. None: something was in the way, an
/// error or the file's end among it; read in the ordinary way, which finds out.
pub type ReadDone = Box<dyn FnOnce(Option<Bytes>) + Send>;

/// A read to be done.
pub struct Read {
    /// Where from. It ends before `done` is called.
    pub planned: Planned,
    /// What is called.
    pub done: ReadDone,
}

impl Read {
    /// A panic costs one request, not the thread that all of them need.
    fn over(self, data: Option<Bytes>) {
        self.planned.end(data.is_some());
        if catch_unwind(AssertUnwindSafe(|| (self.done)(data))).is_err() {
            log::error!("bug: the answer to a read panicked");
        }
    }
}

/// The queue of one process. Its thread comes with the first read; it goes with the queue, when the disk has answered.
pub struct Reads {
    shared: Arc<Shared>,
}

struct Shared {
    /// Protects what waits, and which threads must be woken. A leaf: nothing else is locked under it.
    state: Mutex<State>,
    /// Written to wake the thread.
    wake: OwnedFd,
}

struct State {
    /// Until the thread has it.
    ring: Option<IoUring>,
    waiting: VecDeque<Read>,
    /// The thread waits in the kernel and does not see what comes: it must be woken, once.
    asleep: bool,
    ended: bool,
    /// No thread could be started, or its ring failed.
    broken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// From now on everything is read in the ordinary way.
    fn give_up(&self) {
        let mut state = self.lock();
        state.broken = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(|read| read.over(None));
    }
}

impl Reads {
    /// Makes the ring, and starts no thread. What can be submitted to it is bound to reads, so that it is no way around the
    /// list of system calls of the sandbox. An error where the system has none (or forbids it).
    pub fn new() -> io::Result<Reads> {
        // COOP_TASKRUN: completions wait for the thread, which is on its way to them, instead of interrupting it.
        let ring = bound(IoUring::builder().setup_coop_taskrun(), DEPTH + 1, &[opcode::Read::CODE])?;
        begin(&ring)?;
        // Not non-blocking: a read of it through a ring would then fail at once instead of waiting.
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let state =
            State { ring: Some(ring), waiting: VecDeque::new(), asleep: false, ended: false, broken: false };
        Ok(Reads { shared: Arc::new(Shared { state: Mutex::new(state), wake }) })
    }

    /// Queues `read`. Never blocks.
    pub fn submit(&self, read: Read) {
        let mut state = self.shared.lock();
        if state.broken {
            drop(state);
            return read.over(None);
        }
        state.waiting.push_back(read);
        let ring = state.ring.take();
        let wake = std::mem::take(&mut state.asleep);
        drop(state);
        if let Some(ring) = ring {
            self.start(ring);
        } else if wake {
            self.shared.wake();
        }
    }

    fn start(&self, ring: IoUring) {
        let collector = Collector::new(ring, Arc::clone(&self.shared));
        if let Err(e) = spawn_thread("ploopfs/disk", move || collector.run()) {
            log::error!("cannot start the thread that reads: {e}");
            self.shared.give_up();
        }
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.wake();
    }
}

/// A read that the kernel has, and the memory that it reads into.
struct Under {
    read: Read,
    memory: Pages,
}

/// What the collecting thread does when it has taken what waits.
#[derive(PartialEq, Eq)]
enum Then {
    /// Waits in the kernel, from where it is to be woken.
    Sleep,
    /// Looks again by itself.
    GoOn,
}

/// The thread.
struct Collector {
    ring: IoUring,
    shared: Arc<Shared>,
    /// By mark. The kernel writes to the memory in them until it completes them.
    slots: Vec<Option<Under>>,
    free: Vec<u32>,
    /// Where the kernel puts what it reads from `wake`.
    woken: Box<u64>,
    /// The kernel is reading `wake`.
    watching: bool,
    finished: Vec<(u64, i32)>,
}

impl Collector {
    fn new(ring: IoUring, shared: Arc<Shared>) -> Collector {
        Collector {
            ring,
            shared,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            woken: Box::new(0),
            watching: false,
            finished: Vec::with_capacity(DEPTH as usize + 1),
        }
    }

    /// Until the queue has ended and the kernel has nothing of ours.
    fn run(mut self) {
        while self.take(Then::Sleep) {
            if let Err(e) = self.wait() {
                log::error!("the ring that reads has failed: {e}; reading without it");
                return self.fail();
            }
            self.finish();
        }
    }

    /// Gives the ring what waits. False: the end.
    fn take(&mut self, then: Then) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        state.asleep = false;
        if state.ended && state.waiting.is_empty() {
            return self.watching || self.free.len() < self.slots.len();
        }
        // Not after the end, which wakes once: a watch that begins behind it would wait for ever.
        if !self.watching && !state.ended {
            self.watch();
        }
        while !state.waiting.is_empty() {
            let Some(slot) = self.free.pop() else { break };
            let Some(read) = state.waiting.pop_front() else { break };
            self.push(slot, read);
        }
        // Looked at under the lock: what comes from here on sees it, and wakes.
        state.asleep = then == Then::Sleep && state.waiting.is_empty();
        true
    }

    fn watch(&mut self) {
        let place: *mut u64 = &raw mut *self.woken;
        let entry =
            opcode::Read::new(Fd(self.shared.wake.as_raw_fd()), place.cast(), 8).build().user_data(WAKE);
        // SAFETY: `woken` and `wake` live as long as the collector, which goes after this read has completed (`take`), or
        // never (`fail`).
        self.watching = unsafe { self.ring.submission().push(&entry) }.is_ok();
    }

    fn push(&mut self, slot: u32, read: Read) {
        let mut memory = Pages::zeroed(read.planned.len());
        let (place, len) = (memory.as_mut().as_mut_ptr(), read.planned.len() as u32);
        let Some(fd) = read.planned.descriptor().map(|fd| Fd(fd.as_raw_fd())) else {
            self.free.push(slot);
            return read.over(None);
        };
        let entry =
            opcode::Read::new(fd, place, len).offset(read.planned.offset()).build().user_data(slot.into());
        self.slots[slot as usize] = Some(Under { read, memory });
        // SAFETY: memory and file are in the slot, which is emptied when the read has completed (`finish`), or never
        // (`fail`).
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // A place for each slot and one for `wake`: never full, but nothing depends on it.
            self.free.push(slot);
            if let Some(under) = self.slots[slot as usize].take() {
                under.read.over(None);
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        passing(self.ring.submit_and_wait(1))
    }

    /// Gives the kernel what the ring has. What fails stays there; [`wait`](Self::wait) tries it again, and says so.
    fn submit(&mut self) {
        if !self.ring.submission().is_empty()
            && let Err(e) = passing(self.ring.submit())
        {
            log::debug!("cannot submit a read: {e}");
        }
    }

    /// Hands out what the kernel has completed.
    fn finish(&mut self) {
        let mut finished = std::mem::take(&mut self.finished);
        finished.extend(self.ring.completion().map(|done| (done.user_data(), done.result())));
        for (number, (mark, result)) in finished.drain(..).enumerate() {
            if number > 0 && number.is_multiple_of(PIECE) {
                self.take(Then::GoOn);
                self.submit();
            }
            if mark == WAKE {
                self.watching = false;
                continue;
            }
            let slot = usize::try_from(mark).ok().and_then(|mark| self.slots.get_mut(mark));
            let Some(Under { read, memory }) = slot.and_then(Option::take) else {
                log::error!("bug: the kernel completed read {mark}, which it does not have");
                continue;
            };
            self.free.push(mark as u32);
            let whole = read.planned.is_filled_by(result);
            read.over(whole.then(|| Bytes::from_owner(memory)));
        }
        self.finished = finished;
    }

    /// The kernel may still write to what it was given: that memory is never freed.
    fn fail(mut self) {
        self.shared.give_up();
        for slot in &mut self.slots {
            if let Some(Under { read, memory }) = slot.take() {
                std::mem::forget((read.planned.file(), memory));
                read.over(None);
            }
        }
        std::mem::forget(self);
    }
}

#[cfg(test)]
mod tests;
