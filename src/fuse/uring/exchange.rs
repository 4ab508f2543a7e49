//! A request with the place of its answer, and the answer that is owed to it: the same for a ring's entry and for a message
//! of /dev/fuse.

use std::time::Duration;

use zerocopy::{Immutable, IntoBytes};

use super::answer::{self, NamesOut};
use super::wire::Parts;
use crate::fuse::ops::{Answer, Errno, Name};
use crate::io::planned::Planned;

/// A request and the place of its answer.
pub(super) trait Exchange: Send + Sync + Sized + 'static {
    /// The request.
    fn parts(&self) -> Parts<'_>;
    /// Room for `len` bytes of an answer; None: there is not so much. The payload of the request may be lost.
    fn room(&mut self, len: usize) -> Option<&mut [u8]>;
    /// True when [`fill`](Self::fill) works, on this thread.
    fn can_fill(&self) -> bool {
        false
    }
    /// Carries a read out and answers with its bytes; where it fails, the request comes again, and cannot be filled. Only
    /// where [`can_fill`](Self::can_fill) says so.
    fn fill(self, planned: Planned) {
        planned.end(false);
        self.send(Err(Errno(libc::EIO)));
    }
    /// True when its memory may be lent to a write that waits for its host.
    fn may_be_lent(&self) -> bool {
        true
    }
    /// It is lent.
    fn is_lent(&self) {}
    /// It is no longer, after that time.
    fn is_back(&mut self, after: Duration) {
        let _ = after;
    }
    /// Answers: the first bytes of the room, so many, or an errno.
    fn send(self, outcome: Answer<usize>);
    /// Ends a request that has no answer.
    fn forget(self);
}

/// An answer that is owed: dropped, it is EIO, so that no requester waits for ever.
pub(super) struct Owed<E: Exchange>(Option<E>);

impl<E: Exchange> Owed<E> {
    /// Owes the answer to this request.
    pub(super) fn to(exchange: E) -> Owed<E> {
        Owed(Some(exchange))
    }

    /// The request; the answer is owed elsewhere.
    pub(super) fn into_exchange(mut self) -> Option<E> {
        self.0.take()
    }

    /// The request, to put the answer into its place.
    pub(super) fn exchange(&mut self) -> &mut E {
        self.0.as_mut().expect("taken by the methods that consume self only")
    }

    /// The request.
    pub(super) fn parts(&self) -> Parts<'_> {
        self.0.as_ref().expect("taken by the methods that consume self only").parts()
    }

    /// Answers, as [`Exchange::send`] does.
    pub(super) fn send(mut self, outcome: Answer<usize>) {
        if let Some(exchange) = self.0.take() {
            exchange.send(outcome);
        }
    }

    /// Ends a request that has no answer.
    pub(super) fn forget(mut self) {
        if let Some(exchange) = self.0.take() {
            exchange.forget();
        }
    }

    /// Carries a read out, as [`Exchange::fill`] does.
    pub(super) fn fill(mut self, planned: Planned) {
        if let Some(exchange) = self.0.take() {
            exchange.fill(planned);
        }
    }

    /// Answers with an errno.
    pub(super) fn error(self, errno: i32) {
        self.send(Err(Errno(errno)));
    }

    /// Answers without a value.
    pub(super) fn empty(self, answer: Answer<()>) {
        self.send(answer.map(|()| 0));
    }

    /// Answers with these bytes; EIO where there is no room for them.
    pub(super) fn bytes(mut self, answer: Answer<impl AsRef<[u8]>>) {
        let outcome = answer.and_then(|bytes| {
            let bytes = bytes.as_ref();
            let room = self.exchange().room(bytes.len()).ok_or(Errno(libc::EIO))?;
            room.copy_from_slice(bytes);
            Ok(bytes.len())
        });
        self.send(outcome);
    }

    /// A value for which there is room for `size` bytes; 0 asks how long it is.
    pub(super) fn sized(self, answer: Answer<Vec<u8>>, size: u32) {
        match answer {
            Ok(value) if size == 0 => self.fields(Ok(value.len()), answer::length),
            Ok(value) if value.len() > size as usize => self.error(libc::ERANGE),
            answer => self.bytes(answer),
        }
    }

    /// As many names as there is room for.
    pub(super) fn names(mut self, answer: Answer<Vec<Name>>, size: usize) {
        let names = match answer {
            Ok(names) => names,
            Err(e) => return self.send(Err(e)),
        };
        let Some(room) = self.exchange().room(size) else { return self.error(libc::EINVAL) };
        let mut out = NamesOut::new(room);
        for n in &names {
            if !out.fits(&n.name) {
                break;
            }
            out.add(n);
        }
        let used = out.used();
        self.send(Ok(used));
    }

    /// Answers with one of the kernel's structures.
    pub(super) fn fields<T, S: IntoBytes + Immutable>(self, answer: Answer<T>, fields: impl FnOnce(T) -> S) {
        match answer.map(fields) {
            Ok(fields) => self.bytes(Ok(fields.as_bytes())),
            Err(e) => self.send(Err(e)),
        }
    }
}

impl<E: Exchange> Drop for Owed<E> {
    fn drop(&mut self) {
        if let Some(exchange) = self.0.take() {
            exchange.send(Err(Errno(libc::EIO)));
        }
    }
}
