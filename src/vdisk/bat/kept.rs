//! The BAT cache's part in the ledger: what stands there of a page. All of it under the page's lock.
//!
//! **L1** An entry stands in the ledger before its reply leaves: in the set, unmap and relocate of the BAT cache, under the
//! page's lock. A slot is reserved where the page is pinned, so that a set waits for none; where all are taken, first
//! writes wait as for clean pages.
//!
//! **L2** A page of the ledger is given back only when its copy is durable and nothing was added since.

use std::ops::Range;
use std::sync::Arc;

use super::page::{Page, Place};
use crate::format::header::Geometry;
use crate::ledger::{Book, Slot};
use crate::rules::{Rule, broken};

/// Where the cache of one image keeps what is not durable.
pub(in crate::vdisk) struct Kept {
    pub(in crate::vdisk) book: Arc<Book>,
    /// The top, and its geometry, as long as no operation has changed them: then the image is beyond.
    pub(in crate::vdisk) top: u16,
    pub(in crate::vdisk) geometry: Geometry,
}

impl Kept {
    /// The page was pinned.
    pub(super) fn reserve(&self, page: &mut Page) {
        if page.slot.is_none() {
            page.slot = self.book.reserve();
        }
    }

    /// The entries `slots` of page `number` have changed (L1).
    pub(super) fn enter(&self, number: u32, page: &mut Page, slots: Range<usize>) {
        if self.book.is_beyond() || broken(Rule::L1) {
            return;
        }
        self.reserve(page);
        let Some(mut slot) = page.slot.take() else {
            // More pages are pinned at once than there are slots.
            return self.book.beyond();
        };
        if self.book.is_filled(&slot) {
            for entry in slots {
                self.book.change(&slot, entry, self.own(page.get(entry)));
            }
        } else {
            let (bytes, _) = page.own_entries(self.top, &self.geometry);
            self.book.fill(&mut slot, number, &bytes);
        }
        page.slot = Some(slot);
    }

    /// The top's own entry for a place, as it is in the file.
    fn own(&self, place: Place) -> u32 {
        match place {
            Place::At { level, position } if level == self.top => {
                self.geometry.entry(position).expect("an allocation checks that its entry fits the format")
            }
            _ => 0,
        }
    }

    /// The page was copied, and its copy is not durable.
    pub(super) fn copied(&self, page: &mut Page) {
        if broken(Rule::L2) {
            self.let_go(&mut page.slot);
        }
    }

    /// The page may be clean, or not pinned any more (L2).
    pub(super) fn settle(&self, page: &mut Page) {
        if page.dirty_since.is_some() || page.writing {
            return;
        }
        match (&mut page.slot, page.pins) {
            (None, _) => {}
            (Some(slot), 1..) => {
                if self.book.is_filled(slot) {
                    self.book.empty(slot);
                }
            }
            (slot, 0) => self.let_go(slot),
        }
    }

    /// Gives the slot back, whatever the page is.
    pub(super) fn let_go(&self, slot: &mut Option<Slot>) {
        if let Some(slot) = slot.take() {
            self.book.give_back(slot);
        }
    }
}
