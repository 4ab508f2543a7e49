//! The transport threads: their read buffers, and the rule that one of them stays free.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fuse::mount::MAX_READ;

/// Alignment of read buffers: a page, so that O_DIRECT reads of the host file may go straight into them.
const PAGE: usize = 4096;

/// The transport threads of one session.
///
/// Only a write may wait on a transport thread (fuse/ops); everything else ends at once or is handed over. So it is
/// enough to count the threads that are inside such a write: with one thread left outside, the kernel always finds
/// a reader, and a getattr, a cached read or an fsync is never stuck behind a slow disk.
#[derive(Debug)]
pub(super) struct Lanes {
    threads: usize,
    /// Threads inside a write that may block.
    waiting: AtomicUsize,
}

impl Lanes {
    pub(crate) fn new(threads: usize) -> Lanes {
        Lanes { threads, waiting: AtomicUsize::new(0) }
    }

    /// Takes a place for a write that may block; None on the last free thread, which must hand it over.
    pub(super) fn enter(&self) -> Option<InsideLane<'_>> {
        // Relaxed: the count guards no data, and the sum of increments is exact in any order.
        if self.waiting.fetch_add(1, Ordering::Relaxed) + 1 < self.threads {
            return Some(InsideLane { lanes: self });
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Where a write that may block is carried out: here, unless this is the last free thread.
    pub(super) fn write_on(&self) -> WriteOn<'_> {
        self.enter().map_or(WriteOn::Elsewhere, |inside| WriteOn::Here(Some(inside)))
    }

    /// How many threads are inside a write that may block.
    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// Where a write is carried out.
pub(super) enum WriteOn<'a> {
    /// On this thread; the guard, where there is one, keeps the count.
    Here(Option<InsideLane<'a>>),
    /// On another: it may block, and this thread may not.
    Elsewhere,
}

/// One place taken; given back on drop, a panic included.
#[derive(Debug)]
pub(super) struct InsideLane<'a> {
    lanes: &'a Lanes,
}

impl Drop for InsideLane<'_> {
    fn drop(&mut self) {
        self.lanes.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `f` with the first `len` bytes of this thread's page-aligned buffer; None when it is not that large.
/// Memory is touched, and so taken, only as far as requests really went.
pub(crate) fn with_read_buffer<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    BUFFER.with_borrow_mut(|memory| {
        if memory.is_empty() {
            *memory = vec![0; MAX_READ as usize + PAGE];
        }
        // A vector does not move while it keeps its size, but asking again costs nothing.
        let start = memory.as_ptr().align_offset(PAGE);
        memory.get_mut(start..start.checked_add(len)?).map(f)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_free_thread_hands_blocking_writes_over() {
        let lanes = Lanes::new(3);
        let first = lanes.enter().expect("two others are free");
        let second = lanes.enter().expect("one other is free");
        assert!(lanes.enter().is_none());
        assert_eq!(lanes.waiting(), 2);
        drop(first);
        assert!(lanes.enter().is_some());
        drop(second);
        assert_eq!(lanes.waiting(), 0);
    }

    #[test]
    fn a_single_thread_never_blocks_in_a_write() {
        assert!(Lanes::new(1).enter().is_none());
    }

    #[test]
    fn the_read_buffer_is_page_aligned_and_refuses_more_than_max_read() {
        let aligned = with_read_buffer(MAX_READ as usize, |b| (b.len(), b.as_ptr().align_offset(PAGE)));
        assert_eq!(aligned, Some((MAX_READ as usize, 0)));
        assert_eq!(with_read_buffer(2 * MAX_READ as usize, |_| ()), None);
    }
}
