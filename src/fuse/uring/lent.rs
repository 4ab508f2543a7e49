//! The data of a write that waits, in the memory of its request: lent to the file system instead of copied.
//!
//! The answer lies in the same memory. So it is given when the file system has dropped the last of the data, and not
//! before: what looks at the data never sees an answer there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;

use super::answer;
use super::exchange::{Exchange, Owed};
use super::wire::{self, Operation, Request};
use crate::fuse::ops::{Answer, Done, Held};

/// A request whose data may be lent; dropped, it is answered.
struct Lent<E: Exchange> {
    /// Some until it is dropped.
    exchange: Option<E>,
    /// None at the end: EIO.
    answer: OnceLock<Answer<usize>>,
    since: Instant,
    is_lent: AtomicBool,
}

impl<E: Exchange> Lent<E> {
    fn data(&self) -> &[u8] {
        let parts = self.exchange.as_ref().map(E::parts);
        match parts.map(wire::decode) {
            Some(Ok(Request { operation: Operation::Write { data, .. }, .. })) => data,
            _ => &[],
        }
    }
}

impl<E: Exchange> Drop for Lent<E> {
    fn drop(&mut self) {
        let Some(mut exchange) = self.exchange.take() else { return };
        if *self.is_lent.get_mut() {
            exchange.is_back(self.since.elapsed());
        }
        // Without an answer the reply is EIO.
        let reply = Owed::to(exchange);
        if let Some(answer) = self.answer.take() {
            reply.fields(answer, answer::written);
        }
    }
}

/// A share of it: the data, before and while it is lent.
struct Data<E: Exchange>(Arc<Lent<E>>);

impl<E: Exchange> AsRef<[u8]> for Data<E> {
    fn as_ref(&self) -> &[u8] {
        self.0.data()
    }
}

impl<E: Exchange> Held for Data<E> {
    fn len(&self) -> usize {
        self.0.data().len()
    }

    fn may_be_lent(&self) -> bool {
        self.0.exchange.as_ref().is_some_and(E::may_be_lent)
    }

    fn lend(self: Box<Self>) -> Bytes {
        if !self.0.is_lent.swap(true, Ordering::Relaxed) {
            self.0.exchange.iter().for_each(E::is_lent);
        }
        Bytes::from_owner(*self)
    }
}

/// The data of a write, and its answer. None: it is answered already.
pub(super) fn lend<E: Exchange>(reply: Owed<E>) -> Option<(Box<dyn Held>, Done<usize>)> {
    let exchange = Some(reply.into_exchange()?);
    let (answer, is_lent) = (OnceLock::new(), AtomicBool::new(false));
    let lent = Arc::new(Lent { exchange, answer, since: Instant::now(), is_lent });
    let answered = lent.clone();
    let done = move |answer| {
        // The first one: an answer is given once.
        let _ = answered.answer.set(answer);
    };
    Some((Box::new(Data(lent)), Box::new(done)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::ops::Errno;
    use crate::fuse::uring::wire::Parts;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[derive(Default)]
    struct Seen {
        lent: AtomicUsize,
        back: AtomicUsize,
        answers: Mutex<Vec<Answer<usize>>>,
    }

    /// A write of four bytes.
    struct Sheet {
        header: [u8; 40],
        operation: [u8; 128],
        memory: [u8; 16],
        seen: Arc<Seen>,
    }

    impl Exchange for Sheet {
        fn parts(&self) -> Parts<'_> {
            Parts { header: &self.header, operation: &self.operation, payload: &self.memory[..4] }
        }
        fn room(&mut self, len: usize) -> Option<&mut [u8]> {
            self.memory.get_mut(..len)
        }
        fn is_lent(&self) {
            self.seen.lent.fetch_add(1, Ordering::Relaxed);
        }
        fn is_back(&mut self, _: Duration) {
            self.seen.back.fetch_add(1, Ordering::Relaxed);
        }
        fn send(self, outcome: Answer<usize>) {
            self.seen.answers.lock().expect("no panic under it").push(outcome);
        }
        fn forget(self) {}
    }

    fn sheet() -> (Arc<Seen>, Box<dyn Held>, Done<usize>) {
        let seen = Arc::<Seen>::default();
        let (mut header, mut operation) = ([0; 40], [0; 128]);
        header[4..8].copy_from_slice(&16u32.to_ne_bytes());
        operation[16..20].copy_from_slice(&4u32.to_ne_bytes());
        let exchange = Sheet { header, operation, memory: *b"data............", seen: seen.clone() };
        let (data, done) = lend(Owed::to(exchange)).expect("not answered");
        (seen, data, done)
    }

    #[test]
    fn the_answer_comes_when_the_last_of_the_data_is_dropped_and_never_before() {
        let (seen, data, done) = sheet();
        assert_eq!((data.len(), data.may_be_lent()), (4, true));
        let data = data.lend();
        let part = data.slice(2..);
        done(Ok(4));
        drop(data);
        assert_eq!((&part[..], seen.answers.lock().expect("no panic").len()), (&b"ta"[..], 0));
        drop(part);
        assert_eq!(*seen.answers.lock().expect("no panic"), [Ok(8)], "with the length of what was written");
        assert_eq!((seen.lent.load(Ordering::Relaxed), seen.back.load(Ordering::Relaxed)), (1, 1));
    }

    #[test]
    fn a_write_that_was_not_lent_is_answered_at_once_and_one_that_is_lost_with_eio() {
        let (seen, data, done) = sheet();
        drop(data);
        done(Err(Errno(libc::ENOSPC)));
        assert_eq!(*seen.answers.lock().expect("no panic"), [Err(Errno(libc::ENOSPC))]);
        assert_eq!((seen.lent.load(Ordering::Relaxed), seen.back.load(Ordering::Relaxed)), (0, 0));
        let (seen, data, done) = sheet();
        let data = data.lend();
        drop((done, data));
        assert_eq!(*seen.answers.lock().expect("no panic"), [Err(Errno(libc::EIO))]);
    }
}
