//! Requests whose caller waits for the answer: for tests, library users and operations. Not for runners: the answer may need
//! the thread that waits.

use bytes::Bytes;

use super::{Image, Reply};
use crate::error::{Error, Kind, Result};
use crate::sync::{Arc, mpsc};

impl Image {
    /// Blocking read, for tests and library users.
    pub fn read_at(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes> {
        wait_for(|reply| self.read(offset, len, reply))
    }

    /// Blocking write.
    pub fn write_at(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<()> {
        wait_for(|reply| self.write(offset, Bytes::copy_from_slice(data), false, reply))
    }

    /// Blocking discard.
    pub fn discard_at(self: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        wait_for(|reply| self.discard(offset, len, reply))
    }

    /// Blocking flush.
    pub fn flush_now(self: &Arc<Self>) -> Result<()> {
        wait_for(|reply| self.flush(reply))
    }
}

/// Turns a call with a reply into one that waits.
pub(super) fn wait_for<T: Send + 'static>(start: impl FnOnce(Reply<T>)) -> Result<T> {
    let (reply, answer) = mpsc::channel();
    start(Box::new(move |result| {
        let _ = reply.send(result);
    }));
    answer.recv().unwrap_or_else(|_| Err(Error::new(Kind::Io, "internal error: the request was dropped")))
}
