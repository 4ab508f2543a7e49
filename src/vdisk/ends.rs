//! That an image has failed, closes, is closed. Each comes once and stays; what follows from it is the image's (`close`,
//! and `fail` in `vdisk/mod.rs`).

use crate::error::{Error, Kind};
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, lock};

/// How an image ends.
#[derive(Default)]
pub(super) struct Ends {
    /// Copy of "there is a failure" for the fast path.
    failed: AtomicBool,
    /// Why the image is read-only since it was opened. A leaf.
    failure: Mutex<Option<Error>>,
    closing: AtomicBool,
    closed: AtomicBool,
}

impl Ends {
    fn reason(&self) -> MutexGuard<'_, Option<Error>> {
        let failure = lock(&self.failure);
        debug_assert!(self.is_sound(&failure), "why the image has failed");
        failure
    }

    /// What holds whenever the lock is free: what the fast path sees is what the reason says.
    fn is_sound(&self, failure: &Option<Error>) -> bool {
        failure.is_some() == self.has_failed()
    }

    /// True from the first failure on.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// The first failure.
    pub(super) fn failure(&self) -> Option<Error> {
        if self.has_failed() { self.reason().clone() } else { None }
    }

    /// False: it has failed before, and that reason stays.
    pub(super) fn fail(&self, error: &Error) -> bool {
        let mut failure = self.reason();
        if failure.is_some() {
            return false;
        }
        *failure = Some(error.with_kind(Kind::Io));
        self.failed.store(true, Ordering::SeqCst);
        true
    }

    /// False: a close has begun before.
    pub(super) fn begin_close(&self) -> bool {
        !self.closing.swap(true, Ordering::SeqCst)
    }

    /// True from the beginning of the close on.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// The close has ended.
    pub(super) fn close(&self) {
        debug_assert!(self.is_closing(), "a close ends that has not begun");
        self.closed.store(true, Ordering::SeqCst);
    }

    /// True from the end of the close on.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_stays_and_the_flag_goes_with_it() {
        let ends = Ends::default();
        assert!(ends.failure().is_none() && !ends.is_sound(&Some(Error::new(Kind::Io, "no flag says so"))));
        assert!(
            ends.fail(&Error::new(Kind::Damaged, "first")) && !ends.fail(&Error::new(Kind::Io, "second"))
        );
        let found = ends.failure().expect("it has failed");
        assert_eq!((found.kind(), found.to_string().contains("first")), (Kind::Io, true));
        assert!(!ends.is_sound(&None));
    }

    #[test]
    fn a_close_begins_once_and_ends_later() {
        let ends = Ends::default();
        assert!(ends.begin_close() && !ends.begin_close());
        assert_eq!((ends.is_closing(), ends.is_closed()), (true, false));
        ends.close();
        assert!(ends.is_closed());
    }
}
