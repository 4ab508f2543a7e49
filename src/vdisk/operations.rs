//! The image as an operation sees it. Operations come one at a time; [`Operating`] is the proof that one is under way. What
//! changes only under it is changed through it: the stack (in `live::freeze`), the bits of the tracking, and whether a level
//! below the top may come back. Pios, which see the [`Image`], read these and cannot change them.

use std::ops::Deref;

use arc_swap::{ArcSwapOption, Guard};

use super::Image;
use super::changed::Changed;
use crate::error::{Error, Kind, Result};
use crate::sync::{Arc, AtomicBool, Mutex, MutexGuard, Ordering, PoisonError, TryLockError, lock};

/// The operation of an image that is under way, and what none but it changes.
#[derive(Default)]
pub(super) struct Operations {
    /// Held by a live operation, by what makes the image writable or follows its file, and by the close. It protects the
    /// fields below, stack and size. Before every other lock of the image; held across I/O.
    running: Mutex<()>,
    /// Entries were taken away from a level below the top, and that is not durable (or failed): a cached page may say
    /// that nothing lies below a cluster where a power cut brings something back. Discards unmap nothing meanwhile.
    lower_may_return: AtomicBool,
    /// What has changed since the tracking began (`tracking`).
    changed: ArcSwapOption<Changed>,
}

impl Operations {
    /// What has changed since the tracking began. None: it is not tracked.
    pub(super) fn changed(&self) -> Guard<Option<Arc<Changed>>> {
        self.changed.load()
    }

    /// True while a cluster that no lower level maps by what is cached may be mapped there again after a power cut. To be
    /// asked after the look-up: a page that was loaded from a level while that changed was loaded after this was set.
    pub(super) fn lower_may_return(&self) -> bool {
        self.lower_may_return.load(Ordering::SeqCst)
    }

    /// True while an operation is under way.
    pub(super) fn is_running(&self) -> bool {
        matches!(self.running.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// What holds whenever the lock is free: the bits reach to the end of a disk of `disk` bytes, since a write behind
    /// them would have no bit; and no operation has left a level that may come back to an image that goes on.
    fn is_sound(&self, disk: u64, has_failed: bool) -> bool {
        self.changed().as_ref().is_none_or(|changed| changed.disk == disk)
            && (!self.lower_may_return() || has_failed)
    }
}

/// An image of which this thread carries out an operation; dropped, the operation has ended. Not for runners.
pub(super) struct Operating<'a> {
    image: &'a Arc<Image>,
    _running: MutexGuard<'a, ()>,
}

impl Deref for Operating<'_> {
    type Target = Arc<Image>;

    fn deref(&self) -> &Arc<Image> {
        self.image
    }
}

impl<'a> Operating<'a> {
    fn new(image: &'a Arc<Image>, running: MutexGuard<'a, ()>) -> Operating<'a> {
        let sound = || image.operations.is_sound(image.size(), image.ends.has_failed());
        debug_assert!(sound(), "what only operations change");
        Operating { image, _running: running }
    }

    /// These are the changes from now on. None: they are not tracked.
    pub(super) fn set_changed(&self, changed: Option<Changed>) {
        self.image.operations.changed.store(changed.map(Arc::new));
    }

    /// Before entries of a level below the top are taken away (true), and when that is durable (false).
    pub(super) fn set_lower_may_return(&self, may: bool) {
        self.image.operations.lower_may_return.store(may, Ordering::SeqCst);
    }
}

impl Image {
    /// Begins an operation when the one under way has ended. Blocks for as long as that takes.
    pub(super) fn wait_to_operate(self: &Arc<Self>) -> Operating<'_> {
        Operating::new(self, lock(&self.operations.running))
    }

    /// Begins an operation. None: one is under way.
    pub(super) fn try_to_operate(self: &Arc<Self>) -> Option<Operating<'_>> {
        match self.operations.running.try_lock() {
            Ok(running) => Some(Operating::new(self, running)),
            Err(TryLockError::Poisoned(poisoned)) => {
                Some(Operating::new(self, PoisonError::into_inner(poisoned)))
            }
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Begins a live operation. While another is under way it is refused and not queued: its requester should know. A
    /// close waits for one that has begun; none begins after it, when the file may be another process's.
    pub(super) fn begin_operation(self: &Arc<Self>) -> Result<Operating<'_>> {
        let Some(operating) = self.try_to_operate() else {
            let why = "another operation on this image is running; try again when it has ended";
            return Err(Error::at(Kind::Busy, self.path(), why));
        };
        if self.is_closing() {
            return Err(self.closed_error());
        }
        Ok(operating)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::descriptor::Guid;
    use crate::vdisk::Options;
    use crate::vdisk::races::{bench, engine};

    #[test]
    fn one_operation_runs_at_a_time_and_none_begins_on_a_closed_image() {
        let b = bench(&engine(Options::default()), "");
        let first = b.image.begin_operation().expect("none is under way");
        assert!(b.image.operations.is_running() && b.image.try_to_operate().is_none());
        assert_eq!(b.image.begin_operation().err().map(|e| e.kind()), Some(Kind::Busy));
        drop(first);
        assert!(!b.image.operations.is_running());
        b.image.close().expect("closes");
        assert_eq!(b.image.begin_operation().err().map(|e| e.kind()), Some(Kind::Io));
    }

    #[test]
    fn bits_of_another_size_and_a_level_that_may_return_to_an_image_that_goes_on_are_not_sound() {
        let operations = Operations::default();
        assert!(operations.is_sound(4096, false));
        operations.changed.store(Some(Arc::new(Changed::new(Guid::NONE, 4096, 512))));
        assert!(operations.is_sound(4096, false) && !operations.is_sound(8192, false));
        operations.lower_may_return.store(true, Ordering::SeqCst);
        assert!(!operations.is_sound(4096, false), "a discard would unmap what shows through");
        assert!(operations.is_sound(4096, true), "nothing is written any more");
    }
}
