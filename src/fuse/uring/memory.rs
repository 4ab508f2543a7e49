//! The memory in which the kernel and we take turns: for each ring entry a header and a payload.
//!
//! An entry belongs to the kernel from its submission to its completion, and to us from there to the next submission.
//! The time between is a [`Held`]: there is never more than one for an entry, and only through it is the memory
//! looked at.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use zerocopy::IntoBytes;

use super::answer::{self, OutHeader};
use super::serve::Exchange;
use super::wire::{self, Parts};
use crate::fuse::MAX_WRITE;
use crate::fuse::ops::{Answer, Errno};

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

/// The entries of one ring, and the way back to its thread.
pub(super) struct Entries {
    /// Headers, one more than entries (the last is for [`wake_place`](Entries::wake_place)), then payloads.
    base: NonNull<u8>,
    len: usize,
    count: u32,
    /// Answered by other threads, and not yet handed to the kernel. A leaf: no lock is taken under it.
    answered: Mutex<Vec<u32>>,
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
    /// Answered by the ring's own thread: no lock, no waking.
    static ANSWERED_HERE: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

impl Entries {
    /// Memory for `count` entries; taken from the system as far as it is used.
    pub(super) fn new(count: u32) -> io::Result<Entries> {
        let len = headers(count) + count as usize * PAYLOAD;
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that is in use.
        let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, access, kind)? };
        // SAFETY: advice about our own new mapping. Huge pages would give each entry 1 MiB at its first small request;
        // where it is refused, more memory is taken and nothing else.
        let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxNoHugepage) };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // Not non-blocking: a read of it through a ring would then fail at once instead of waiting.
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Entries { base, len, count, answered: Mutex::default(), wake })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// What becomes readable when another thread has answered.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Where the kernel may put the 8 bytes of [`wake`](Entries::wake); nobody else looks at them.
    pub(super) fn wake_place(&self) -> *mut u8 {
        self.header(self.count)
    }

    /// For the kernel: header and payload of an entry.
    pub(super) fn places(&self, index: u32) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.header(index).cast(), iov_len: HEADER },
            libc::iovec { iov_base: self.payload(index).cast(), iov_len: PAYLOAD },
        ]
    }

    fn header(&self, index: u32) -> *mut u8 {
        assert!(index <= self.count, "no such entry");
        self.base.as_ptr().wrapping_add(index as usize * STEP)
    }

    fn payload(&self, index: u32) -> *mut u8 {
        assert!(index < self.count, "no such entry");
        self.base.as_ptr().wrapping_add(headers(self.count) + index as usize * PAYLOAD)
    }

    /// Says that the calling thread is the ring's.
    pub(super) fn adopt_thread(self: &Arc<Self>) {
        OWN.set(Arc::as_ptr(self));
    }

    /// Moves what was answered since the last time to `out`. To be called by the ring's thread.
    pub(super) fn take_answered(&self, out: &mut Vec<u32>) {
        ANSWERED_HERE.with_borrow_mut(|here| out.append(here));
        out.append(&mut self.answered());
    }

    fn answered(&self) -> MutexGuard<'_, Vec<u32>> {
        // No panic can happen between two changes of the list.
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer is in the memory of `index`: to the kernel with it.
    fn answer(&self, index: u32) {
        if ptr::eq(OWN.get(), self) {
            ANSWERED_HERE.with_borrow_mut(|here| here.push(index));
            return;
        }
        let first = {
            let mut answered = self.answered();
            answered.push(index);
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
        // SAFETY: the mapping of `new`, whole; every `Held` and the ring keep this alive, so that none of them is left.
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
}

impl Held {
    /// Takes over an entry from the kernel.
    ///
    /// # Safety
    /// The kernel has completed the submission of this entry, and since then neither a `Held` was made of it nor was it
    /// submitted.
    pub(super) unsafe fn new(entries: Arc<Entries>, index: u32) -> Held {
        Held { entries, index }
    }

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

/// The number by which the kernel finds the request of an answered entry.
///
/// # Safety
/// The entry was answered and not yet submitted: its `Held` is gone, and the kernel does not have it.
pub(super) unsafe fn commit_id(entries: &Arc<Entries>, index: u32) -> u64 {
    // SAFETY: the caller's word; it is ours for the time of this call.
    let held = unsafe { Held::new(entries.clone(), index) };
    u64::from_ne_bytes(held.number(COMMIT_ID))
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

    fn send(mut self, outcome: Answer<usize>) {
        let unique = wire::header(self.header()).map_or(0, |h| h.unique);
        let (len, error) = match outcome {
            Ok(len) => (len as u32, 0),
            Err(Errno(errno)) => (0, -errno),
        };
        let out = OutHeader { len: answer::HEADER as u32 + len, error, unique };
        self.header_mut()[..answer::HEADER].copy_from_slice(out.as_bytes());
        self.header_mut()[PAYLOAD_SIZE..PAYLOAD_SIZE + 4].copy_from_slice(&len.to_ne_bytes());
        self.entries.answer(self.index);
    }

    fn forget(self) {
        // Never sent through a ring; an entry goes back all the same.
        self.send(Ok(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(entries: &Arc<Entries>, index: u32) -> Held {
        // SAFETY: no kernel knows these entries, and each test takes an index once.
        unsafe { Held::new(entries.clone(), index) }
    }

    #[test]
    fn a_payload_size_beyond_the_room_is_no_payload() {
        let entries = Arc::new(Entries::new(2).expect("memory"));
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
        let entries = Arc::new(Entries::new(3).expect("memory"));
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
        let mut answered = Vec::new();
        entries.take_answered(&mut answered);
        assert_eq!(answered, [0, 1, 2]);
        entries.take_answered(&mut answered);
        assert_eq!(answered.len(), 3, "each once");
        OWN.set(ptr::null());
    }

    #[test]
    fn an_answer_carries_the_requests_number_its_errno_and_its_length() {
        let entries = Arc::new(Entries::new(1).expect("memory"));
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
