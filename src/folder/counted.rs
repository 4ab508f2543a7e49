//! How often an image is open, and what the first, the first writing and the last opener cause.
//!
//! Pure bookkeeping over a [`Stage`]; calls come one at a time, from the image's strand. The in-use mark of an
//! image lives from its first write to [`Stage::close`], so it stays while any opener is left
//! (docs/testing.md#bugs-of-others).

use crate::error::{Error, Kind, Result};

/// What the count drives. All methods may block.
pub(super) trait Stage {
    /// The image while it is open.
    type Live: Clone;
    /// Takes the locks, reads everything anew, opens read-only.
    fn open(&self) -> Result<Self::Live>;
    /// Before the first opener that writes.
    fn make_writable(&self, live: &Self::Live) -> Result<()>;
    /// Refuses writing opens of an image that has become read-only since.
    fn check_writable(&self, live: &Self::Live) -> Result<()>;
    /// After the last opener: drains, syncs, clears the mark, releases locks and files.
    fn close(&self, live: Self::Live) -> Result<()>;
}

/// Proof of one counted open. Not Clone: what was counted once is released once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    session: u64,
}

/// The count of one image.
pub(super) struct Counted<L> {
    live: Option<L>,
    openers: u32,
    /// None before the first writer; then what [`Stage::make_writable`] said, for as long as the image is open.
    writable: Option<Result<()>>,
    /// Which opening this is. A ticket of an earlier one (closed by force) counts for nothing.
    session: u64,
}

impl<L> Default for Counted<L> {
    fn default() -> Self {
        Counted { live: None, openers: 0, writable: None, session: 0 }
    }
}

impl<L: Clone> Counted<L> {
    /// One more opener. On an error nothing has changed.
    pub(super) fn acquire<S: Stage<Live = L>>(&mut self, stage: &S, write: bool) -> Result<(L, Ticket)> {
        let live = match &self.live {
            Some(live) => live.clone(),
            None => {
                let live = stage.open()?;
                self.session += 1;
                self.live = Some(live.clone());
                live
            }
        };
        if write && let Err(refused) = self.prepare_writing(stage, &live) {
            drop(live);
            if self.openers == 0
                && let Some(Err(also)) = self.close(stage)
            {
                log::warn!("{also}");
            }
            return Err(refused);
        }
        self.openers += 1;
        Ok((live, Ticket { session: self.session }))
    }

    fn prepare_writing<S: Stage<Live = L>>(&mut self, stage: &S, live: &L) -> Result<()> {
        if self.writable.is_none() {
            let result = stage.make_writable(live);
            // Only damage is remembered: what else failed (space, a host error) may work at the next attempt.
            match &result {
                Err(e) if e.kind() != Kind::Damaged => return result,
                _ => self.writable = Some(result),
            }
        }
        match &self.writable {
            Some(Err(damage)) => Err(damage.clone()),
            _ => stage.check_writable(live),
        }
    }

    /// One opener less. Some when it was the last one: how the close went.
    pub(super) fn release<S: Stage<Live = L>>(&mut self, stage: &S, ticket: Ticket) -> Option<Result<()>> {
        if ticket.session != self.session || self.openers == 0 {
            return None;
        }
        self.openers -= 1;
        if self.openers == 0 { self.close(stage) } else { None }
    }

    /// Closes it under its openers; their tickets count for nothing from now on. None when it was closed.
    pub(super) fn close<S: Stage<Live = L>>(&mut self, stage: &S) -> Option<Result<()>> {
        let live = self.live.take()?;
        self.openers = 0;
        self.writable = None;
        Some(stage.close(live))
    }

    /// Number of openers.
    pub(super) fn openers(&self) -> u32 {
        self.openers
    }

    /// True once it was made writable, until it is closed.
    pub(super) fn is_writable(&self) -> bool {
        matches!(self.writable, Some(Ok(())))
    }

    /// Why it cannot be written although an opener asked for that.
    pub(super) fn damage(&self) -> Option<&Error> {
        self.writable.as_ref()?.as_ref().err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Fake {
        calls: RefCell<Vec<&'static str>>,
        open: Option<Kind>,
        writable: Option<Kind>,
        read_only: bool,
    }

    fn result(kind: Option<Kind>) -> Result<()> {
        kind.map_or(Ok(()), |kind| Err(Error::new(kind, "on purpose")))
    }

    impl Stage for Fake {
        type Live = ();
        fn open(&self) -> Result<()> {
            self.calls.borrow_mut().push("open");
            result(self.open)
        }
        fn make_writable(&self, _: &()) -> Result<()> {
            self.calls.borrow_mut().push("make_writable");
            result(self.writable)
        }
        fn check_writable(&self, _: &()) -> Result<()> {
            result(self.read_only.then_some(Kind::ReadOnly))
        }
        fn close(&self, _: ()) -> Result<()> {
            self.calls.borrow_mut().push("close");
            Ok(())
        }
    }

    impl Fake {
        fn calls(&self) -> Vec<&'static str> {
            self.calls.borrow().clone()
        }
    }

    fn take(count: &mut Counted<()>, fake: &Fake, write: bool) -> Ticket {
        count.acquire(fake, write).expect("opens").1
    }

    fn refused(count: &mut Counted<()>, fake: &Fake, write: bool) -> Kind {
        count.acquire(fake, write).expect_err("refused").kind()
    }

    #[test]
    fn a4_closing_the_first_of_two_handles_keeps_the_image_open_and_marked() {
        let (fake, mut count) = (Fake::default(), Counted::default());
        let a = take(&mut count, &fake, true);
        let b = take(&mut count, &fake, true);
        assert!(count.release(&fake, a).is_none());
        assert!(count.is_writable());
        assert_eq!(fake.calls(), ["open", "make_writable"]);
        assert!(count.release(&fake, b).is_some());
        assert_eq!(fake.calls(), ["open", "make_writable", "close"]);
    }

    #[test]
    fn a_reader_opens_read_only_and_the_first_writer_makes_it_writable() {
        let (fake, mut count) = (Fake::default(), Counted::default());
        let _reader = take(&mut count, &fake, false);
        assert_eq!(fake.calls(), ["open"]);
        let writer = take(&mut count, &fake, true);
        assert!(count.release(&fake, writer).is_none());
        let _again = take(&mut count, &fake, true);
        assert_eq!(fake.calls(), ["open", "make_writable"]);
    }

    #[test]
    fn everything_is_opened_anew_after_the_last_close() {
        let (fake, mut count) = (Fake::default(), Counted::default());
        let ticket = take(&mut count, &fake, true);
        count.release(&fake, ticket);
        take(&mut count, &fake, true);
        assert_eq!(fake.calls(), ["open", "make_writable", "close", "open", "make_writable"]);
    }

    #[test]
    fn a_damaged_image_stays_readable_and_is_scanned_once_per_opening() {
        let fake = Fake { writable: Some(Kind::Damaged), ..Fake::default() };
        let mut count = Counted::default();
        let _reader = take(&mut count, &fake, false);
        assert_eq!(refused(&mut count, &fake, true), Kind::Damaged);
        assert_eq!(refused(&mut count, &fake, true), Kind::Damaged);
        take(&mut count, &fake, false);
        assert!(count.damage().is_some());
        assert_eq!(fake.calls(), ["open", "make_writable"]);
    }

    #[test]
    fn a_writer_that_was_refused_leaves_no_image_open() {
        let fake = Fake { writable: Some(Kind::Damaged), ..Fake::default() };
        let mut count = Counted::default();
        assert_eq!(refused(&mut count, &fake, true), Kind::Damaged);
        assert_eq!(count.openers(), 0);
        assert_eq!(fake.calls(), ["open", "make_writable", "close"]);
    }

    #[test]
    fn a_failure_that_may_pass_is_tried_again() {
        let mut fake = Fake { writable: Some(Kind::NoSpace), ..Fake::default() };
        let mut count = Counted::default();
        let _reader = take(&mut count, &fake, false);
        assert_eq!(refused(&mut count, &fake, true), Kind::NoSpace);
        fake.writable = None;
        take(&mut count, &fake, true);
        assert!(count.is_writable());
    }

    #[test]
    fn an_image_that_became_read_only_refuses_writers_only() {
        let mut fake = Fake::default();
        let mut count = Counted::default();
        let _writer = take(&mut count, &fake, true);
        fake.read_only = true;
        assert_eq!(refused(&mut count, &fake, true), Kind::ReadOnly);
        take(&mut count, &fake, false);
        assert_eq!(count.openers(), 2);
    }

    #[test]
    fn a_failed_open_changes_nothing() {
        let fake = Fake { open: Some(Kind::InUse), ..Fake::default() };
        let mut count = Counted::default();
        assert_eq!(refused(&mut count, &fake, false), Kind::InUse);
        assert_eq!(count.openers(), 0);
        assert_eq!(fake.calls(), ["open"]);
    }

    #[test]
    fn a_ticket_from_before_a_forced_close_counts_for_nothing() {
        let (fake, mut count) = (Fake::default(), Counted::default());
        let old = take(&mut count, &fake, true);
        assert!(count.close(&fake).is_some());
        let new = take(&mut count, &fake, false);
        assert!(count.release(&fake, old).is_none());
        assert_eq!(count.openers(), 1);
        assert!(count.release(&fake, new).is_some());
    }
}
