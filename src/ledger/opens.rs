//! Which files are open under which handle.
//!
//! The record of a place keeps its last handle when it is free: no handle is given twice.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Ledger;
use super::layout::OPENS;

/// Words of a record.
pub(super) const STATE: usize = 0;
pub(super) const HANDLE: usize = 1;
pub(super) const NODE: usize = 2;
pub(super) const FLAGS: usize = 3;
pub(super) const REQUEST: usize = 4;
/// The record is an open file's.
pub(super) const OPEN: u64 = 1;

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its handle; the low half is its place.
    pub handle: u64,
    /// Its inode.
    pub node: u64,
    /// As the kernel sent them.
    pub flags: i32,
    /// The number of the request that opened it.
    pub request: u64,
}

impl Ledger {
    /// A file was opened. One whose place is not in the ledger any more ends the mount with the daemon.
    pub fn opened(&self, open: &Open) {
        let Some(words) = self.handle(open.handle) else { return };
        let flags = u64::from(open.flags.cast_unsigned());
        for (word, value) in [(NODE, open.node), (FLAGS, flags), (REQUEST, open.request)] {
            words[word].store(value, Ordering::Relaxed);
        }
        words[STATE].store(OPEN, Ordering::Release);
    }

    /// A handle is in use that a successor does without: of a file that was made up.
    pub fn handle_given(&self, handle: u64) {
        self.handle(handle);
    }

    fn handle(&self, handle: u64) -> Option<&[AtomicU64]> {
        let place = handle as u32;
        if place >= self.layout.sizes().opens {
            self.beyond();
            return None;
        }
        let words = self.record(self.layout.open(place));
        words[STATE].store(0, Ordering::Relaxed);
        words[HANDLE].store(handle, Ordering::Release);
        self.uses(OPENS, place);
        Some(words)
    }

    /// The handle was given back.
    pub fn released(&self, handle: u64) {
        let place = handle as u32;
        if place < self.layout.sizes().opens {
            self.record(self.layout.open(place))[STATE].store(0, Ordering::Release);
        }
    }
}
