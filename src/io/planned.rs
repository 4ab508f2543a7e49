//! A read whose bytes were found, and which another thread carries out: the collecting thread of
//! [`reads`](super::reads), or a transport on a ring of its own.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::file::HostFile;

/// Where the bytes of a read lie, and what keeps them there until it is dropped or [ends](Planned::end).
pub struct Planned {
    file: Arc<dyn HostFile>,
    offset: u64,
    len: usize,
    end: Box<dyn FnOnce(bool) + Send>,
}

impl Planned {
    /// `len` bytes at byte `offset` of `file`; `end` is called when they were read (true) or could not be. None: the file
    /// cannot be read this way.
    pub fn new(
        file: Arc<dyn HostFile>,
        offset: u64,
        len: usize,
        end: impl FnOnce(bool) + Send + 'static,
    ) -> Option<Planned> {
        file.queued_read(offset, len)?;
        Some(Planned { file, offset, len, end: Box::new(end) })
    }

    /// The descriptor to read from, into memory that begins at a page. None: no longer.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.queued_read(self.offset, self.len)
    }

    /// The file.
    pub fn file(&self) -> Arc<dyn HostFile> {
        self.file.clone()
    }

    /// First byte in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes; fewer than that are none.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when `result`, that of a system call, says that all bytes were read.
    pub fn is_filled_by(&self, result: i32) -> bool {
        usize::try_from(result).is_ok_and(|n| n == self.len)
    }

    /// The read is over; `whole`: all bytes are there. A panic of what is called costs nothing else.
    pub fn end(self, whole: bool) {
        if catch_unwind(AssertUnwindSafe(|| (self.end)(whole))).is_err() {
            log::error!("bug: the end of a read panicked");
        }
    }
}

impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Planned")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
