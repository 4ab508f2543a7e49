//! One entry while it is ours.

use std::ptr;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::mm::Advice;
use zerocopy::IntoBytes;

use super::{
    Answered, COMMIT_ID, Entries, Entry, Filling, HEADER, OPERATION, OWN, PAYLOAD, PAYLOAD_SIZE, TO_FILL,
};
use crate::fuse::ops::{Answer, Errno, Ino};
use crate::fuse::uring::answer::{self, OutHeader};
use crate::fuse::uring::cpus::to_lend;
use crate::fuse::uring::exchange::Exchange;
use crate::fuse::uring::wire::{self, Parts};
use crate::io::planned::Planned;

/// A write that had its entry for so long gives the memory back: its host stood still, and others may have waited
/// likewise.
const LONG: Duration = Duration::from_secs(1);

/// An entry while it is ours: a request and the place for its answer. Dropping it loses the entry; it is to be sent.
pub(in crate::fuse::uring) struct HeldEntry {
    pub(super) entries: Arc<Entries>,
    pub(super) index: u32,
    /// Its read failed on the ring: elsewhere it is found out why.
    pub(super) failed: bool,
}

impl HeldEntry {
    fn header(&self) -> &[u8] {
        // SAFETY: HEADER bytes of the mapping that are ours until we are sent (see the module); they change through
        // `&mut self` only.
        unsafe { slice::from_raw_parts(self.entries.header(self.index), HEADER) }
    }

    fn header_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `header`, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.entries.header(self.index), HEADER) }
    }

    pub(super) fn payload(&self) -> &[u8] {
        // SAFETY: PAYLOAD bytes of the mapping, otherwise as in `header`.
        unsafe { slice::from_raw_parts(self.entries.payload(self.index), PAYLOAD) }
    }

    pub(super) fn payload_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `payload`, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.entries.payload(self.index), PAYLOAD) }
    }

    /// Its home, and which entry of it this is.
    pub(in crate::fuse::uring) fn home(&self) -> (Arc<Entries>, u32) {
        (self.entries.clone(), self.index)
    }

    /// Which entry of its home this is.
    pub(in crate::fuse::uring) fn index(&self) -> u32 {
        self.index
    }

    /// Where the kernel may put `len` bytes of an answer, as long as this is neither sent nor dropped.
    pub(in crate::fuse::uring) fn place(&mut self, len: usize) -> Option<*mut u8> {
        self.room(len).map(<[u8]>::as_mut_ptr)
    }

    /// The file that it is about; 0 for rubbish.
    pub(in crate::fuse::uring) fn ino(&self) -> Ino {
        wire::header(self.header()).map_or(0, |h| h.nodeid)
    }

    /// It reads or writes so many bytes.
    pub(in crate::fuse::uring) fn weighs(&self, bytes: u32) {
        // Stored when it grows only: the line belongs to the CPU that serves it.
        if let Some(Entry { used, .. }) = self.entries.entry(self.index)
            && used.load(Ordering::Relaxed) < bytes
        {
            used.store(bytes, Ordering::Relaxed);
        }
    }

    /// The ring could not read it.
    pub(in crate::fuse::uring) fn fail(&mut self) {
        self.failed = true;
    }

    /// What the kernel wants to hear with the answer, to know which request it is.
    pub(super) fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        *self.header()[at..].first_chunk().expect("both numbers lie inside of the header")
    }

    /// Makes an entry look as if the kernel had sent this.
    #[cfg(test)]
    pub(in crate::fuse::uring) fn pretend(
        &mut self,
        header: &[u8],
        operation: &[u8],
        payload: &[u8],
        size: u32,
    ) {
        self.header_mut()[..header.len()].copy_from_slice(header);
        self.header_mut()[OPERATION..OPERATION + operation.len()].copy_from_slice(operation);
        self.header_mut()[PAYLOAD_SIZE..PAYLOAD_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        self.payload_mut()[..payload.len()].copy_from_slice(payload);
    }
}

impl Exchange for HeldEntry {
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

    fn may_be_lent(&self) -> bool {
        self.entries.tally(self.index).is_some_and(|tally| {
            tally.lent.load(Ordering::Relaxed) < to_lend(tally.all.load(Ordering::Relaxed))
        })
    }

    fn is_lent(&self) {
        self.entries.tally(self.index).map(|tally| tally.lent.fetch_add(1, Ordering::Relaxed));
    }

    fn is_back(&mut self, after: Duration) {
        self.entries.tally(self.index).map(|tally| tally.lent.fetch_sub(1, Ordering::Relaxed));
        if after < LONG {
            return;
        }
        // SAFETY: advice about the payload, which is ours, whole pages, and borrowed by nothing; it reads as zeroes afterwards.
        // Locked pages are given back as well.
        let given = unsafe {
            rustix::mm::madvise(self.entries.payload(self.index).cast(), PAYLOAD, Advice::LinuxDontneedLocked)
        };
        if let (Ok(()), Some(entry)) = (given, self.entries.entry(self.index)) {
            entry.used.store(0, Ordering::Relaxed);
        }
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
