//! The memory in which the kernel and we take turns: for each ring entry a header and a payload.
//!
//! An entry belongs to the kernel from its submission to its completion, and to us from there to the next submission.
//! The time between is a [`Held`]: there is never more than one for an entry through which its memory may be looked at
//! (one that is being sent looks no more), and nothing else looks. The submission may be made through any ring; the next request of the entry then comes out of that one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use zerocopy::IntoBytes;

use super::answer::{self, OutHeader};
use super::ring::Queue;
use super::serve::Exchange;
use super::wire::{self, Parts};
use crate::fuse::MAX_WRITE;
use crate::fuse::ops::{Answer, Errno};
use crate::io::planned::Planned;

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
/// So often is tried to put a payload into huge pages while somebody copies it, which keeps it from being moved.
const TRIES: u8 = 4;

/// Names an entry of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Which of the session's [`Entries`] it belongs to.
    pub(super) home: u32,
    pub(super) index: u32,
}

impl Place {
    /// As submissions are marked with it.
    pub(super) fn mark(self) -> u64 {
        u64::from(self.home) << 32 | u64::from(self.index)
    }

    /// The place that a submission was marked with; it may be none that there is.
    pub(super) fn marked(mark: u64) -> Place {
        Place { home: (mark >> 32) as u32, index: mark as u32 }
    }
}

/// An answer that lies in the memory of its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub(super) place: Place,
    /// What the kernel wants to hear with it, to know which request it is.
    pub(super) commit_id: u64,
}

/// A read that a ring carries out: into the payload of its entry.
pub(super) struct Filling {
    pub(super) held: Held,
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
    /// Nobody yet, or nobody any more: its queue has ended.
    Nobody,
    /// The kernel, until it completes.
    Kernel,
    /// We, until we answer.
    We,
}

struct Entry {
    /// The kernel's.
    queue: u16,
    /// An [`Owner`].
    owner: AtomicU8,
    /// How often its payload was to be put into huge pages; [`TRIES`] when that is over.
    tries: AtomicU8,
}

/// The entries of one ring, and the way back to its thread.
pub(super) struct Entries {
    /// Payloads, first because huge pages begin where the mapping does; then headers, one more than entries (the last is for
    /// [`wake_place`](Entries::wake_place)).
    base: NonNull<u8>,
    len: usize,
    /// See [`Place`].
    home: u32,
    entries: Vec<Entry>,
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
unsafe impl Send for Entries {}
// SAFETY: as above; nothing of the memory is reached through `&Entries` alone but by `Held`, its only owner.
unsafe impl Sync for Entries {}

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

impl Entries {
    /// Memory for the entries of `queues`, as number `home` of the session; taken from the system as far as it is used.
    pub(super) fn new(home: u32, queues: &[Queue]) -> io::Result<Entries> {
        let entry =
            |queue| Entry { queue, owner: AtomicU8::new(Owner::Nobody as u8), tries: AtomicU8::new(0) };
        let entries: Vec<_> =
            queues.iter().flat_map(|queue| (0..queue.depth).map(|_| entry(queue.id))).collect();
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
        // Not non-blocking: a read of it through a ring would then fail at once instead of waiting.
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let (live, busy, answered) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::default());
        Ok(Entries { base, len, home, entries, live, busy, answered, wake })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.entries.len() as u32
    }

    /// The name of an entry.
    pub(super) fn place(&self, index: u32) -> Place {
        Place { home: self.home, index }
    }

    /// The kernel's queue that an entry is for.
    pub(super) fn queue(&self, index: u32) -> u16 {
        self.entries[index as usize].queue
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
        if self.pass(index, Owner::Nobody, Owner::Kernel) {
            self.live.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Takes over an entry from the kernel. None: it did not have it.
    ///
    /// # Safety
    /// The kernel has completed a submission of this entry, and this is the first call since then.
    pub(super) unsafe fn came(self: &Arc<Self>, index: u32) -> Option<Held> {
        self.pass(index, Owner::Kernel, Owner::We).then(|| Held {
            entries: self.clone(),
            index,
            failed: false,
        })
    }

    /// True when an entry is ours.
    pub(super) fn is_ours(&self, index: u32) -> bool {
        self.entries.get(index as usize).is_some_and(|e| e.owner.load(Ordering::Acquire) == Owner::We as u8)
    }

    /// The kernel gets an entry that is ours back.
    pub(super) fn goes(&self, index: u32) {
        self.pass(index, Owner::We, Owner::Kernel);
    }

    /// The kernel does not want an entry any more. False: it did not have it.
    pub(super) fn ends(&self, index: u32) -> bool {
        let ended = self.pass(index, Owner::Kernel, Owner::Nobody);
        if ended && self.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever saw it may be another ring's thread.
            self.call();
        }
        ended
    }

    /// Acquire and release: what the last owner did with the entry comes before what the next one does.
    fn pass(&self, index: u32, from: Owner, to: Owner) -> bool {
        let Some(Entry { owner, .. }) = self.entries.get(index as usize) else { return false };
        owner.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// What becomes readable when another thread has answered.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Where the kernel may put the 8 bytes of [`wake`](Entries::wake); nobody else looks at them.
    pub(super) fn wake_place(&self) -> *mut u8 {
        self.header(self.count())
    }

    /// For the kernel: header and payload of an entry.
    pub(super) fn places(&self, index: u32) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.header(index).cast(), iov_len: HEADER },
            libc::iovec { iov_base: self.payload(index).cast(), iov_len: PAYLOAD },
        ]
    }

    fn header(&self, index: u32) -> *mut u8 {
        assert!(index <= self.count(), "no such entry");
        self.base.as_ptr().wrapping_add(self.entries.len() * PAYLOAD + index as usize * STEP)
    }

    fn payload(&self, index: u32) -> *mut u8 {
        assert!(index < self.count(), "no such entry");
        self.base.as_ptr().wrapping_add(index as usize * PAYLOAD)
    }

    /// Puts the payload of an entry, and what shares a huge page with it, into huge pages: a large request has taken most of
    /// that memory already. For a thread that may lose a millisecond, once for each entry; whoever uses the memory meanwhile
    /// sees no change. Measured, 1 MiB reads at QD8: 1.07 of what small pages give, writes 1.02.
    pub(super) fn make_huge(&self, index: u32) {
        let Some(Entry { tries, .. }) = self.entries.get(index as usize) else { return };
        let before = tries.load(Ordering::Relaxed);
        if before >= TRIES {
            return;
        }
        let base = self.base.as_ptr() as usize;
        let at = self.payload(index) as usize;
        let start = (at & !(HUGE - 1)).max(base);
        let end = (at + PAYLOAD).next_multiple_of(HUGE).min(base + self.len);
        let place = self.base.as_ptr().wrapping_add(start - base).cast();
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
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
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
        // Else whoever was first has called, and the ring's thread has not come yet.
        if first {
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

impl Drop for Entries {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, whole; every `Held` and all rings keep this alive, so that none of them is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Length of all headers, in bytes.
fn headers(count: u32) -> usize {
    ((count as usize + 1) * STEP).next_multiple_of(PAGE)
}

/// An entry while it is ours: a request and the place for its answer. Dropping it loses the entry; it is to be sent.
pub(super) struct Held {
    entries: Arc<Entries>,
    index: u32,
    /// Its read failed on the ring: elsewhere it is found out why.
    failed: bool,
}

impl Held {
    fn header(&self) -> &[u8] {
        // SAFETY: HEADER bytes of the mapping that are ours until we are sent (see the module); they change through
        // `&mut self` only.
        unsafe { slice::from_raw_parts(self.entries.header(self.index), HEADER) }
    }

    fn header_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `header`, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.entries.header(self.index), HEADER) }
    }

    fn payload(&self) -> &[u8] {
        // SAFETY: PAYLOAD bytes of the mapping, otherwise as in `header`.
        unsafe { slice::from_raw_parts(self.entries.payload(self.index), PAYLOAD) }
    }

    fn payload_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `payload`, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.entries.payload(self.index), PAYLOAD) }
    }

    /// Its home, and which entry of it this is.
    pub(super) fn home(&self) -> (Arc<Entries>, u32) {
        (self.entries.clone(), self.index)
    }

    /// Which entry of its home this is.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Where the kernel may put `len` bytes of an answer, as long as this is neither sent nor dropped.
    pub(super) fn place(&mut self, len: usize) -> Option<*mut u8> {
        self.room(len).map(<[u8]>::as_mut_ptr)
    }

    /// The ring could not read it.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// What the kernel wants to hear with the answer, to know which request it is.
    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        *self.header()[at..].first_chunk().expect("both numbers lie inside of the header")
    }

    /// Makes an entry look as if the kernel had sent this.
    #[cfg(test)]
    pub(super) fn pretend(&mut self, header: &[u8], operation: &[u8], payload: &[u8], size: u32) {
        self.header_mut()[..header.len()].copy_from_slice(header);
        self.header_mut()[OPERATION..OPERATION + operation.len()].copy_from_slice(operation);
        self.header_mut()[PAYLOAD_SIZE..PAYLOAD_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        self.payload_mut()[..payload.len()].copy_from_slice(payload);
    }
}

impl Exchange for Held {
    fn parts(&self) -> Parts<'_> {
        let header = self.header();
        let size = u32::from_ne_bytes(self.number(PAYLOAD_SIZE)) as usize;
        // A size beyond the room is rubbish: then there is no payload, and what needs one is malformed.
        let payload = self.payload().get(..size).unwrap_or_default();
        Parts { header: &header[..OPERATION], operation: &header[OPERATION..2 * OPERATION], payload }
    }

    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.payload_mut().get_mut(..len)
    }

    fn can_fill(&self) -> bool {
        !self.failed && ptr::eq(OWN.get(), &raw const *self.entries)
    }

    fn fill(self, planned: Planned) {
        TO_FILL.with_borrow_mut(|here| here.push(Filling { held: self, planned }));
    }

    fn send(mut self, outcome: Answer<usize>) {
        let unique = wire::header(self.header()).map_or(0, |h| h.unique);
        let (len, error) = match outcome {
            Ok(len) => (len as u32, 0),
            Err(Errno(errno)) => (0, -errno),
        };
        let out = OutHeader { len: answer::HEADER as u32 + len, error, unique };
        self.header_mut()[..answer::HEADER].copy_from_slice(out.as_bytes());
        self.header_mut()[PAYLOAD_SIZE..PAYLOAD_SIZE + 4].copy_from_slice(&len.to_ne_bytes());
        let place = self.entries.place(self.index);
        let answered = Answered { place, commit_id: u64::from_ne_bytes(self.number(COMMIT_ID)) };
        self.entries.answer(answered);
    }

    fn forget(self) {
        // Never sent through a ring; an entry goes back all the same.
        self.send(Ok(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(depth: u32) -> Arc<Entries> {
        Arc::new(Entries::new(7, &[Queue { id: 3, depth }]).expect("memory"))
    }

    /// As if the kernel had just completed it.
    fn held(entries: &Arc<Entries>, index: u32) -> Held {
        entries.begins(index);
        entries.goes(index);
        // SAFETY: no kernel knows these entries, and no test holds an index twice.
        unsafe { entries.came(index) }.expect("the kernel had it")
    }

    #[test]
    fn a_payload_size_beyond_the_room_is_no_payload() {
        let entries = entries(2);
        let mut held = held(&entries, 1);
        held.pretend(&[1; 40], &[2; 128], b"abcd", 4);
        assert_eq!(held.parts().payload, b"abcd");
        held.pretend(&[1; 40], &[2; 128], b"abcd", PAYLOAD as u32 + 1);
        assert_eq!(held.parts().payload, b"");
        held.pretend(&[1; 40], &[2; 128], b"abcd", u32::MAX);
        assert_eq!(held.parts().payload, b"");
    }

    #[test]
    fn an_answer_from_another_thread_wakes_the_rings_thread_and_one_of_its_own_does_not() {
        let entries = entries(3);
        entries.adopt_thread();
        held(&entries, 0).send(Ok(0));
        let others = entries.clone();
        let thread = std::thread::spawn(move || {
            held(&others, 1).send(Err(Errno(libc::EIO)));
            held(&others, 2).send(Ok(3));
        });
        thread.join().expect("no panic");
        let mut count = [0; 8];
        rustix::io::read(entries.wake(), &mut count).expect("called");
        assert_eq!(u64::from_ne_bytes(count), 1, "once for both");
        let mut answered = VecDeque::new();
        entries.take_answered(&mut answered);
        let places = answered.iter().map(|a| a.place).collect::<Vec<_>>();
        assert_eq!(places, [0, 1, 2].map(|index| Place { home: 7, index }));
        entries.take_answered(&mut answered);
        assert_eq!(answered.len(), 3, "each once");
        OWN.set(ptr::null());
    }

    #[test]
    fn an_answer_given_for_all_rings_stays_on_the_thread_and_wakes_nobody() {
        let (own, others) = (entries(1), entries(2));
        own.adopt_thread();
        answering_here(|| held(&others, 1).send(Ok(0)));
        held(&others, 0).send(Ok(0));
        let mut answered = VecDeque::new();
        own.take_answered(&mut answered);
        assert_eq!(answered.iter().map(|a| a.place.index).collect::<Vec<_>>(), [1]);
        others.take_answered(&mut answered);
        assert_eq!(answered.iter().map(|a| a.place.index).collect::<Vec<_>>(), [1, 0]);
        OWN.set(ptr::null());
    }

    #[test]
    fn an_entry_is_taken_over_once_and_the_last_that_ends_calls() {
        let entries = entries(2);
        assert!(!entries.are_live());
        (0..2).for_each(|index| entries.begins(index));
        // SAFETY: no kernel knows these entries; the second call takes nothing.
        let (first, second) = unsafe { (entries.came(1), entries.came(1)) };
        assert!(first.is_some() && second.is_none());
        assert!(!entries.ends(1), "it is ours");
        entries.goes(1);
        assert!(entries.ends(0) && entries.are_live() && entries.ends(1) && !entries.are_live());
        assert!(!entries.ends(2) && !entries.is_ours(2), "there is none");
        let mut count = [0; 8];
        rustix::io::read(entries.wake(), &mut count).expect("called");
    }

    /// Kilobytes of huge pages in the mapping of these entries.
    fn huge(entries: &Entries) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("our own");
        let (mut inside, mut sum) = (false, 0);
        for line in maps.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some(start) = range.and_then(|(start, _)| usize::from_str_radix(start, 16).ok()) {
                let base = entries.base.as_ptr() as usize;
                inside = (base..base + entries.len).contains(&start);
            } else if let (true, Some(rest)) = (inside, line.strip_prefix("AnonHugePages:")) {
                sum += rest.trim_end_matches("kB").trim().parse::<u64>().expect("a number");
            }
        }
        sum
    }

    #[test]
    fn a_payload_keeps_its_content_when_it_is_put_into_huge_pages() {
        let entries = entries(4);
        let (mut small, mut large) = (held(&entries, 0), held(&entries, 2));
        small.payload_mut()[..4].copy_from_slice(b"abcd");
        large.payload_mut().fill(7);
        assert_eq!(huge(&entries), 0, "small requests take small pages");
        (0..2 * TRIES).for_each(|_| entries.make_huge(2));
        assert_eq!(&small.payload()[..4], b"abcd");
        assert!(large.payload().iter().all(|byte| *byte == 7));
        // None on a kernel without them, or without memory in one piece; two where the mapping does not begin at one.
        assert!(huge(&entries) <= 2 * (HUGE as u64 >> 10), "those of the entry only");
        assert_eq!(entries.entries[2].tries.load(Ordering::Relaxed), TRIES);
        entries.make_huge(9);
    }

    #[test]
    fn a_place_is_known_again_by_its_mark() {
        let place = Place { home: 3, index: 1023 };
        assert_eq!(Place::marked(place.mark()), place);
    }

    #[test]
    fn an_answer_carries_the_requests_number_its_errno_and_its_length() {
        let entries = entries(1);
        let mut request = held(&entries, 0);
        let mut header = [0; 40];
        header[8..16].copy_from_slice(&77u64.to_ne_bytes());
        request.pretend(&header, &[], &[], 0);
        assert_eq!(request.room(PAYLOAD + 1), None);
        request.send(Err(Errno(libc::ENOSPC)));
        let sent = held(&entries, 0);
        let error = i32::from_ne_bytes(sent.number(4));
        assert_eq!((error, u64::from_ne_bytes(sent.number(8))), (-libc::ENOSPC, 77));
        assert_eq!(u32::from_ne_bytes(sent.number(PAYLOAD_SIZE)), 0);
        sent.send(Ok(5));
        let sent = held(&entries, 0);
        assert_eq!(u32::from_ne_bytes(sent.number(PAYLOAD_SIZE)), 5);
        assert_eq!(u32::from_ne_bytes(sent.number(0)), 21);
    }
}
