//! What a caller waits for: the answer of a request (tests, library users), or what a pio would queue for (operations): the
//! gate, a cluster, a BAT page, space. Not for runners: what is waited for may need the thread that waits.
//!
//! There is one way to queue for each of them, which is given what to do then; a wait is that way, with a reply to do.

use bytes::Bytes;

use super::gate::Inside;
use super::locks::LockMode;
use super::stack::Stack;
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

/// A stay inside the gate, for threads that may wait.
pub(super) struct Visit<'a> {
    image: &'a Image,
    inside: Option<Inside>,
}

impl Visit<'_> {
    /// A place inside for work that this one starts and does not wait for.
    pub(super) fn companion(&self) -> Option<Inside> {
        self.inside.as_ref().map(|inside| self.image.gate.enter_with(inside))
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
    }
}

impl Image {
    /// Enters the gate on a thread that may wait for it to open.
    pub(super) fn enter_and_wait(self: &Arc<Self>) -> Result<Visit<'_>> {
        loop {
            if let Some(inside) = self.gate.enter(1) {
                return Ok(Visit { image: self, inside: Some(inside) });
            }
            if self.is_closed() {
                return Err(self.closed_error());
            }
            // Open, or closed for good: the next look tells.
            let _ = wait_for(|reply: Reply<()>| self.outside(Box::new(move || reply(Ok(())))));
        }
    }

    /// Takes a cluster's lock exclusively; the caller is inside the gate and holds no other.
    pub(super) fn lock_and_wait(&self, cluster: u64) {
        // The image is the caller's, so that its queues do not go before their jobs have run.
        let _ = wait_for(|reply: Reply<()>| {
            self.with_cluster(cluster, LockMode::Exclusive, move || reply(Ok(())));
        });
    }

    /// Loads the page of `cluster`, or waits for the thread that does: a runner, or another one of this kind. Neither waits
    /// for this one. Inside the gate.
    pub(super) fn load_and_wait(self: &Arc<Self>, stack: &Stack, cluster: u64) -> Result<()> {
        wait_for(|reply: Reply<()>| {
            self.with_page_of(stack, cluster, reply, |reply| reply(Ok(())), |reply, result| reply(result));
        })
    }

    /// Waits until a file cluster can be had, from `from` on where that is given, or says that there is no space. Outside
    /// the gate meanwhile.
    pub(super) fn wait_for_space(self: &Arc<Self>, from: Option<u64>) -> Result<()> {
        let there = wait_for(|reply: Reply<bool>| {
            let visit = match self.enter_and_wait() {
                Ok(visit) => visit,
                Err(closed) => return reply(Err(closed)),
            };
            let places = [visit.companion(), visit.companion()];
            self.when_space(&self.stack(), from, places, reply, |reply, there| reply(Ok(there)));
        })?;
        if there {
            return Ok(());
        }
        let context = "the host file system is full; free space there and try again";
        Err(Error::at(Kind::NoSpace, self.path(), context))
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
