//! What is opened once for all who use it, and opened again only when its last use has wholly ended.
//!
//! A `Weak` alone is empty from the moment the last user is gone; what is then still being dropped has its locks yet,
//! and an open at that moment would take them for a stranger's.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};

use crate::error::Result;

/// Kept in what is opened, and dropped after its locks: says that it is over.
pub(super) type Lease = Sender<Infallible>;

/// The place of one such thing; belongs into a mutex of its own, which then is held across opens.
pub(super) struct Leased<T> {
    last: Option<(Weak<T>, Receiver<Infallible>)>,
}

impl<T> Default for Leased<T> {
    fn default() -> Leased<T> {
        Leased { last: None }
    }
}

impl<T> Leased<T> {
    /// The thing, if it is in use.
    pub(super) fn get(&self) -> Option<Arc<T>> {
        self.last.as_ref()?.0.upgrade()
    }

    /// The thing, opened unless it is in use. Waits while a last use ends, on whatever thread that happens: its drop
    /// must take no lock that is held here.
    pub(super) fn get_or_open(&mut self, open: impl FnOnce(Lease) -> Result<Arc<T>>) -> Result<Arc<T>> {
        if let Some(used) = self.get() {
            return Ok(used);
        }
        if let Some((_, over)) = self.last.take() {
            // Nothing can be sent; the end of the lease ends the wait.
            let _ = over.recv();
        }
        let (lease, over) = channel();
        let opened = open(lease)?;
        self.last = Some((Arc::downgrade(&opened), over));
        Ok(opened)
    }

    /// True when it is not in use and nothing of it is left.
    pub(super) fn is_over(&self) -> bool {
        self.last.as_ref().is_none_or(|(_, over)| over.try_recv() == Err(TryRecvError::Disconnected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// Locked until the end of a slow drop.
    struct Slow {
        locked: Arc<AtomicBool>,
        dropping: Arc<Barrier>,
        _lease: Lease,
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            self.dropping.wait();
            thread::yield_now();
            self.locked.store(false, Ordering::SeqCst);
        }
    }

    fn open(
        leased: &mut Leased<Slow>,
        locked: &Arc<AtomicBool>,
        dropping: &Arc<Barrier>,
    ) -> Result<Arc<Slow>> {
        leased.get_or_open(|lease| {
            if locked.swap(true, Ordering::SeqCst) {
                return Err(Error::new(Kind::InUse, "is locked"));
            }
            Ok(Arc::new(Slow { locked: locked.clone(), dropping: dropping.clone(), _lease: lease }))
        })
    }

    #[test]
    fn all_users_share_one_thing() {
        let (locked, dropping) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(1)));
        let mut leased = Leased::default();
        let one = open(&mut leased, &locked, &dropping).expect("opens");
        let two = open(&mut leased, &locked, &dropping).expect("shared");
        assert!(Arc::ptr_eq(&one, &two) && !leased.is_over());
        drop((one, two));
        assert!(leased.is_over() && leased.get().is_none());
    }

    #[test]
    fn an_open_waits_for_the_end_of_a_drop_that_has_begun() {
        let (locked, dropping) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(2)));
        let mut leased = Leased::default();
        for _ in 0..100 {
            let first = open(&mut leased, &locked, &dropping).expect("opens");
            let ending = thread::spawn(move || drop(first));
            dropping.wait(); // The last user is gone; the lock is still there.
            let again = open(&mut leased, &locked, &dropping).expect("not in use");
            ending.join().expect("dropped");
            let ending = thread::spawn(move || drop(again));
            dropping.wait();
            ending.join().expect("dropped");
        }
    }

    #[test]
    fn an_open_that_failed_leaves_nothing_to_wait_for() {
        let mut leased: Leased<Slow> = Leased::default();
        for _ in 0..2 {
            let failed = leased.get_or_open(|_lease| Err(Error::new(Kind::NotFound, "gone")));
            assert_eq!(failed.map(|_| ()).expect_err("fails").kind(), Kind::NotFound);
        }
        assert!(leased.is_over());
    }
}
