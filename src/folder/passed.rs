//! Raw images whose reads and writes the kernel takes over (`mount --passthrough`, see `io::backing`).
//!
//! What needs to see or stop the guest's I/O is refused meanwhile; what only looks (map, list, check of other images) and
//! what the kernel still asks us for (fsync, fallocate, lseek) goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::entry::Entry;
use super::live::Live;
use super::locked;
use super::scan::Source;
use super::set::Folder;
use crate::error::{Error, Kind, Result};
use crate::image::kind::ImageKind;
use crate::io::backing::Backing;
use crate::vdisk::live::Work;

impl Folder {
    /// Lets the kernel read and write raw images in our place, from the next open of each. The mount must have agreed on
    /// it with the kernel.
    pub fn pass_through(&self) {
        self.shared.passthrough.store(true, Ordering::Release);
    }
}

impl Entry {
    /// True when the next first open of it may be passed through.
    pub fn can_be_passed(&self) -> bool {
        self.shared.passthrough.load(Ordering::Acquire)
            && self.origin().source == Source::File(ImageKind::Raw)
    }

    /// True when the kernel may be reading and writing it in our place.
    pub fn may_be_passed(&self) -> bool {
        self.live.load().as_ref().is_some_and(|live| live.image.may_be_passed())
    }

    /// Before the first open of the kernel is answered.
    pub(super) fn offer_passthrough(&self, live: &Live) {
        if !self.can_be_passed() {
            return;
        }
        let file = locked(&live.hold).as_ref().map(|opened| opened.file.clone());
        if let Some(file) = file {
            let said = self.shared.passthrough_said.clone();
            live.image.pass_through(Arc::new(Backing::new(file, self.path(), said)));
        }
    }

    /// Before a close under its users: their reads and writes go on in the kernel until they close it, whether we are
    /// there or not, and so must the lock. It lives on the registered descriptor, which the kernel keeps open; here it is
    /// only not given back by name.
    pub(super) fn leave_to_kernel(&self, live: &Live) {
        if live.image.backing().is_some_and(|backing| backing.passes()) {
            std::mem::forget(locked(&live.hold).take());
            log::warn!(
                "{}: its users go on reading and writing it (passthrough); it stays locked until they have closed it",
                self.path().display()
            );
        }
    }

    /// Refuses what cannot be done while reads and writes go past us.
    pub(super) fn check_passthrough(&self, work: &Work) -> Result<()> {
        let what = match work {
            Work::Snapshot { .. } => "a snapshot",
            Work::Clone { snapshot: None, .. } => "a clone of the live disk",
            Work::Resize { .. } => "a change of size",
            // Refused by a raw file in any case, and never begun.
            Work::Compact { .. } | Work::Track { .. } | Work::Untrack => return Ok(()),
            // Of snapshots, which a raw file has none of.
            Work::Clone { .. }
            | Work::Delete { .. }
            | Work::Merge { .. }
            | Work::Switch { .. }
            | Work::Finish => {
                return Ok(());
            }
        };
        if !self.may_be_passed() {
            return Ok(());
        }
        let why = format!(
            "is open with passthrough: the kernel reads and writes its file in our place, and {what} cannot be made under \
             it; close the image (detach its loop device), or mount without --passthrough"
        );
        Err(Error::at(Kind::Busy, self.path(), why))
    }
}
