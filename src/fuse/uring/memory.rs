//! The memory in which the kernel and we take turns: for each ring entry a header and a payload.
//!
//! An entry belongs to the kernel from its submission to its completion, and to us from there to the next submission.
//! The time between is a [`HeldEntry`]: there is never more than one for an entry through which its memory may be looked at
//! (one that is being sent looks no more), and nothing else looks. The submission may be made through any ring; the next request of the entry then comes out of that one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use rustix::event::EventfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::cpus::{ADDED, MOST, Queue, SPARE};
use crate::fuse::MAX_WRITE;
use crate::io::planned::Planned;
use crate::sync::plain::lock;

mod held;

pub(super) use held::HeldEntry;

/// Room for a payload in bytes; REGISTER fails with less than the largest request.
pub(super) const PAYLOAD: usize = MAX_WRITE as usize;

/// The kernel's fuse_uring_req_header, in bytes: 128 for the header of request and answer, 128 for the structure of the
/// operation, and the entry's own fields behind these.
pub(super) const HEADER: usize = 288;
const OPERATION: usize = 128;
const COMMIT_ID: usize = 264;
const PAYLOAD_SIZE: usize = 272;

/// From one header to the next: HEADER rounded up, so that no two share a cache line.
const STEP: usize = 512;
const PAGE: usize = 4096;

/// Bytes of a huge page, where the others have 4 KiB. Where they are longer, no range of ours holds one and nothing happens.
const HUGE: usize = 2 << 20;
/// MADV_COLLAPSE (uapi/asm-generic/mman-common.h, Linux 6.1), for which no crate has a name.
const COLLAPSE: i32 = 25;
/// So often is tried to put a payload into huge pages while a thread copies it, which keeps it from being moved.
const TRIES: u8 = 4;

/// Names an entry of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryId {
    /// Which of the session's [`Entries`] it belongs to.
    pub(super) home: u32,
    pub(super) index: u32,
}

impl EntryId {
    /// As submissions are marked with it.
    pub(super) fn mark(self) -> u64 {
        u64::from(self.home) << 32 | u64::from(self.index)
    }

    /// The place that a submission was marked with; it may be none that there is.
    pub(super) fn marked(mark: u64) -> EntryId {
        EntryId { home: (mark >> 32) as u32, index: mark as u32 }
    }
}

/// An answer that lies in the memory of its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub(super) place: EntryId,
    /// What the kernel wants to hear with it, to know which request it is.
    pub(super) commit_id: u64,
}

/// A read that a ring carries out: into the payload of its entry.
pub(super) struct Filling {
    pub(super) held: HeldEntry,
    pub(super) planned: Planned,
}

/// How many reads this thread's ring has still to be given.
pub(super) fn to_fill() -> usize {
    TO_FILL.with_borrow(Vec::len)
}

/// Who has an entry.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Owner {
    /// None yet, or none any more: its queue has ended.
    None,
    /// The kernel, until it completes.
    Kernel,
    /// We, until we answer.
    We,
}

struct Entry {
    /// Which of its ring's [`Tally`]s counts it.
    tally: usize,
    /// An [`Owner`].
    owner: AtomicU8,
    /// How much of its payload was used, in bytes, or may be by the request that is ours.
    used: AtomicU32,
    /// How often its payload was to be put into huge pages; [`TRIES`] when that is over.
    tries: AtomicU8,
}

/// How one of the kernel's queues stands.
struct Tally {
    /// Its number.
    queue: u16,
    /// Its entries.
    all: AtomicU32,
    /// Those of them that are ours: requests that are being served, or wait.
    out: AtomicU32,
    /// Those of these whose memory is lent.
    lent: AtomicU32,
    /// Requests come here: its CPU is there.
    lives: AtomicBool,
}

impl Tally {
    fn is_crowded(&self) -> bool {
        // A hint: who sees one count before the other looks again soon.
        2 * self.out.load(Ordering::Relaxed) > self.all.load(Ordering::Relaxed)
    }
}

/// The memory of some entries.
struct Block {
    /// Payloads, first because huge pages begin where the mapping does; then headers, one more than entries.
    base: NonNull<u8>,
    len: usize,
    entries: Vec<Entry>,
}

/// The entries of one ring, and the way back to its thread.
pub(super) struct Entries {
    /// Made with the ring. Its spare header is for [`wake_place`](Entries::wake_place).
    first: Block,
    /// Added later, [`ADDED`] in each, in order.
    more: Box<[OnceLock<Block>]>,
    /// One for each queue of the ring.
    tallies: Vec<Tally>,
    /// The ring's thread was called because a queue is crowded, and has not looked since.
    asked: AtomicBool,
    /// See [`EntryId`].
    home: u32,
    /// Entries that have an owner.
    live: AtomicUsize,
    /// The thread of this ring serves requests just now.
    busy: AtomicBool,
    /// Answered by other threads, and not yet handed to the kernel. A leaf: no lock is taken under it.
    answered: Mutex<Vec<Answered>>,
    wake: OwnedFd,
}

// SAFETY: `base` is a mapping that lives as long as this and belongs to no thread; who may look at which part of it is
// said by `Held` (one owner at a time, handed over through locks and channels).
unsafe impl Send for Block {}
// SAFETY: as above; nothing of the memory is reached through `&Block` alone but by `Held`, its only owner.
unsafe impl Sync for Block {}

thread_local! {
    /// The ring whose thread this is, as an address for comparison only.
    static OWN: Cell<*const Entries> = const { Cell::new(ptr::null()) };
    /// Whether this thread's ring takes the answers to the requests of all rings just now.
    static ALL: Cell<bool> = const { Cell::new(false) };
    /// Answered by the thread whose ring takes it: no lock, no waking.
    static ANSWERED_HERE: RefCell<Vec<Answered>> = const { RefCell::new(Vec::new()) };
    /// To be read by this thread's ring.
    static TO_FILL: RefCell<Vec<Filling>> = const { RefCell::new(Vec::new()) };
}

/// Runs `serve`; requests of any ring that it answers on this thread go to the kernel through this thread's ring, and
/// their entries stay with it.
pub(super) fn answering_here(serve: impl FnOnce()) {
    struct Until;
    impl Drop for Until {
        fn drop(&mut self) {
            ALL.set(false);
        }
    }
    let _until = Until;
    ALL.set(true);
    serve();
}

impl Block {
    /// Memory for entries that the tallies of these numbers count; taken from the system as far as it is used.
    fn new(tallies: impl Iterator<Item = usize>) -> io::Result<Block> {
        let owner = Owner::None as u8;
        let entry = |tally| Entry { tally, owner: owner.into(), used: 0.into(), tries: 0.into() };
        let entries: Vec<_> = tallies.map(entry).collect();
        // Linux begins a mapping at a huge page when it is as long as some.
        let unit = if entries.is_empty() { PAGE } else { HUGE };
        let len = (headers(entries.len() as u32) + entries.len() * PAYLOAD).next_multiple_of(unit);
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that is in use.
        let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, access, kind)? };
        // SAFETY: advice about our own new mapping. Huge pages would give each entry 1 MiB at its first small request (see
        // `make_huge` for large ones); where it is refused, more memory is taken and nothing else.
        let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxNoHugepage) };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Block { base, len, entries })
    }

    fn header(&self, at: usize) -> *mut u8 {
        assert!(at <= self.entries.len(), "no such entry");
        self.base.as_ptr().wrapping_add(self.entries.len() * PAYLOAD + at * STEP)
    }

    fn payload(&self, at: usize) -> *mut u8 {
        assert!(at < self.entries.len(), "no such entry");
        self.base.as_ptr().wrapping_add(at * PAYLOAD)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, whole; every `Held` and all rings keep its `Entries` alive, so that none is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl Entries {
    /// Memory for the entries of `queues`, as number `home` of the session.
    pub(super) fn new(home: u32, queues: &[Queue]) -> io::Result<Entries> {
        let of_queue = |(tally, queue): (usize, &Queue)| (0..queue.depth).map(move |_| tally);
        let first = Block::new(queues.iter().enumerate().flat_map(of_queue))?;
        let blocks = queues.len() * MOST.div_ceil(ADDED) as usize;
        let more = (0..blocks).map(|_| OnceLock::new()).collect();
        let tally = |queue: &Queue| Tally {
            queue: queue.id,
            all: 0.into(),
            out: 0.into(),
            lent: 0.into(),
            lives: (queue.depth > SPARE).into(),
        };
        let tallies = queues.iter().map(tally).collect();
        // Not non-blocking: a read of it through a ring would then fail at once instead of waiting.
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Entries {
            first,
            more,
            tallies,
            asked: AtomicBool::new(false),
            home,
            live: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            answered: Mutex::default(),
            wake,
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        let blocks = self.more.iter().map_while(OnceLock::get);
        self.first.entries.len() as u32 + blocks.map(|block| block.entries.len() as u32).sum::<u32>()
    }

    /// How much memory the payloads may come to take as they are, in bytes: what requests have that are ours, and all of
    /// what the kernel may fill at any time, so not those for CPUs that are not there. Looks at all of them: for a queue
    /// that is crowded.
    pub(super) fn may_take(&self) -> usize {
        let blocks = [&self.first].into_iter().chain(self.more.iter().map_while(OnceLock::get));
        let is_ours = |entry: &Entry| entry.owner.load(Ordering::Relaxed) == Owner::We as u8;
        let lives =
            |entry: &Entry| self.tallies.get(entry.tally).is_some_and(|t| t.lives.load(Ordering::Relaxed));
        let of = |entry: &Entry| match is_ours(entry) || !lives(entry) {
            true => entry.used.load(Ordering::Relaxed) as usize,
            false => PAYLOAD,
        };
        blocks.flat_map(|block| &block.entries).map(of).sum()
    }

    /// The queues of which more than half of the entries are out, each with how many it has and how many of them are not.
    /// For the ring's thread, which is called when another one makes a queue crowded after this.
    pub(super) fn crowded(&self) -> impl Iterator<Item = (usize, u32, u32)> {
        // Before the look: who makes one crowded after it calls again.
        if self.asked.load(Ordering::Relaxed) {
            self.asked.store(false, Ordering::SeqCst);
        }
        let crowded = self.tallies.iter().enumerate().filter(|(_, tally)| tally.is_crowded());
        crowded.map(|(number, tally)| {
            let all = tally.all.load(Ordering::Relaxed);
            (number, all, all.saturating_sub(tally.out.load(Ordering::Relaxed)))
        })
    }

    /// Makes [`ADDED`] more entries for the queue that this tally counts, which the kernel does not know yet. For the ring's
    /// thread alone.
    pub(super) fn add(&self, tally: usize) -> io::Result<Range<u32>> {
        let start = self.count();
        let free = self.more.iter().find(|block| block.get().is_none()).ok_or(io::ErrorKind::OutOfMemory)?;
        let _ = free.set(Block::new((0..ADDED).map(|_| tally))?);
        Ok(start..start + ADDED)
    }

    /// The block of an entry, and its place there.
    fn find(&self, index: u32) -> Option<(&Block, usize)> {
        let at = index as usize;
        let Some(behind) = at.checked_sub(self.first.entries.len()) else { return Some((&self.first, at)) };
        let block = self.more.get(behind / ADDED as usize)?.get()?;
        Some((block, behind % ADDED as usize))
    }

    fn entry(&self, index: u32) -> Option<&Entry> {
        self.find(index).and_then(|(block, at)| block.entries.get(at))
    }

    fn tally(&self, index: u32) -> Option<&Tally> {
        self.tallies.get(self.entry(index)?.tally)
    }

    /// The name of an entry.
    pub(super) fn place(&self, index: u32) -> EntryId {
        EntryId { home: self.home, index }
    }

    /// The kernel's queue that an entry is for.
    pub(super) fn queue(&self, index: u32) -> u16 {
        self.tally(index).expect("an entry that there is").queue
    }

    /// True from the first entry that the kernel was given until the last one came back for good.
    pub(super) fn are_live(&self) -> bool {
        self.live.load(Ordering::Acquire) > 0
    }

    /// Whether the thread of this ring serves requests just now; only a hint to others.
    pub(super) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// See [`set_busy`](Self::set_busy).
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// The kernel is given an entry for the first time.
    pub(super) fn begins(&self, index: u32) {
        if self.pass(index, Owner::None, Owner::Kernel) {
            self.live.fetch_add(1, Ordering::AcqRel);
            self.tally(index).map(|tally| tally.all.fetch_add(1, Ordering::Relaxed));
        }
    }

    /// Takes over an entry from the kernel. None: it did not have it.
    ///
    /// # Safety
    /// The kernel has completed a submission of this entry, and this is the first call since then.
    pub(super) unsafe fn came(self: &Arc<Self>, index: u32) -> Option<HeldEntry> {
        if !self.pass(index, Owner::Kernel, Owner::We) {
            return None;
        }
        if let Some(tally) = self.tally(index) {
            tally.out.fetch_add(1, Ordering::Relaxed);
            if !tally.lives.load(Ordering::Relaxed) {
                tally.lives.store(true, Ordering::Relaxed);
            }
            if tally.is_crowded() && !ptr::eq(OWN.get(), &raw const **self) {
                self.ask();
            }
        }
        Some(HeldEntry { entries: self.clone(), index, failed: false })
    }

    /// True when an entry is ours.
    pub(super) fn is_ours(&self, index: u32) -> bool {
        self.entry(index).is_some_and(|e| e.owner.load(Ordering::Acquire) == Owner::We as u8)
    }

    /// The kernel gets an entry that is ours back.
    pub(super) fn goes(&self, index: u32) {
        if self.pass(index, Owner::We, Owner::Kernel) {
            self.tally(index).map(|tally| tally.out.fetch_sub(1, Ordering::Relaxed));
        }
    }

    /// The kernel does not want an entry any more. False: it did not have it.
    pub(super) fn ends(&self, index: u32) -> bool {
        let ended = self.pass(index, Owner::Kernel, Owner::None);
        if ended {
            self.tally(index).map(|tally| tally.all.fetch_sub(1, Ordering::Relaxed));
        }
        if ended && self.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The thread that saw it may be another ring's.
            self.call();
        }
        ended
    }

    /// Acquire and release: what the last owner did with the entry comes before what the next one does.
    fn pass(&self, index: u32, from: Owner, to: Owner) -> bool {
        let Some(Entry { owner, .. }) = self.entry(index) else { return false };
        owner.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// What becomes readable when another thread has answered.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Where the kernel may put the 8 bytes of [`wake`](Entries::wake); they are never read.
    pub(super) fn wake_place(&self) -> *mut u8 {
        self.first.header(self.first.entries.len())
    }

    /// For the kernel: header and payload of an entry.
    pub(super) fn places(&self, index: u32) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.header(index).cast(), iov_len: HEADER },
            libc::iovec { iov_base: self.payload(index).cast(), iov_len: PAYLOAD },
        ]
    }

    fn header(&self, index: u32) -> *mut u8 {
        let (block, at) = self.find(index).expect("an entry that there is");
        block.header(at)
    }

    fn payload(&self, index: u32) -> *mut u8 {
        let (block, at) = self.find(index).expect("an entry that there is");
        block.payload(at)
    }

    /// Puts the payload of an entry, and what shares a huge page with it, into huge pages: a large request has taken most of
    /// that memory already. For a thread that may lose a millisecond, once for each entry; a user of the memory
    /// meanwhile sees no change. Measured, 1 MiB reads at QD8: 1.07 of what small pages give, writes 1.02.
    pub(super) fn make_huge(&self, index: u32) {
        let Some((block, at)) = self.find(index) else { return };
        let Some(Entry { tries, .. }) = block.entries.get(at) else { return };
        let before = tries.load(Ordering::Relaxed);
        if before >= TRIES {
            return;
        }
        let base = block.base.as_ptr() as usize;
        let at = block.payload(at) as usize;
        let start = (at & !(HUGE - 1)).max(base);
        let end = (at + PAYLOAD).next_multiple_of(HUGE).min(base + block.len);
        let place = block.base.as_ptr().wrapping_add(start - base).cast();
        // SAFETY: advice about a part of our own mapping, which leaves its content as it is.
        let refused = unsafe {
            let _ = rustix::mm::madvise(place, end - start, Advice::LinuxHugepage);
            libc::madvise(place, end - start, COLLAPSE) != 0
        };
        // Anything else than EAGAIN, such as no memory in one piece, would be the same the next time.
        let again = refused && io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN);
        tries.store(if again { before + 1 } else { TRIES }, Ordering::Relaxed);
    }

    /// Says that the calling thread is the ring's.
    pub(super) fn adopt_thread(self: &Arc<Self>) {
        OWN.set(Arc::as_ptr(self));
    }

    /// Moves what was answered since the last time to `out`. To be called by the ring's thread.
    pub(super) fn take_answered(&self, out: &mut VecDeque<Answered>) {
        ANSWERED_HERE.with_borrow_mut(|here| out.extend(here.drain(..)));
        out.extend(self.answered().drain(..));
    }

    /// Moves the reads that this thread's ring is to carry out to `out`.
    pub(super) fn take_fillings(out: &mut VecDeque<Filling>) {
        TO_FILL.with_borrow_mut(|here| out.extend(here.drain(..)));
    }

    fn answered(&self) -> MutexGuard<'_, Vec<Answered>> {
        // No panic can happen between two changes of the list.
        lock(&self.answered)
    }

    /// An answer is in the memory of an entry: to the kernel with it.
    fn answer(&self, answer: Answered) {
        if ALL.get() || ptr::eq(OWN.get(), self) {
            ANSWERED_HERE.with_borrow_mut(|here| here.push(answer));
            return;
        }
        let first = {
            let mut answered = self.answered();
            answered.push(answer);
            answered.len() == 1
        };
        // Else the first one has called, and the ring's thread has not come yet.
        if first {
            self.call();
        }
    }

    /// Calls the ring's thread to look whether a queue is [crowded](Self::crowded), once.
    fn ask(&self) {
        if !self.asked.swap(true, Ordering::SeqCst) {
            self.call();
        }
    }

    /// Wakes the ring's thread.
    pub(super) fn call(&self) {
        if let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            log::error!("cannot wake a ring's thread: {e}");
        }
    }
}

/// Length of all headers, in bytes.
fn headers(count: u32) -> usize {
    ((count as usize + 1) * STEP).next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests;
