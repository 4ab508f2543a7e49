//! BAT pages with entries that are not durable. When a slot is reserved, filled and given back: `vdisk/bat/kept.rs`.

use std::sync::atomic::Ordering;

use super::layout::PAGES;
use super::{Identity, Ledger};

/// Words of a page's state.
pub(super) const STATE: usize = 0;
pub(super) const IMAGE: usize = 1;
pub(super) const DEV: usize = 2;
pub(super) const INO: usize = 3;
pub(super) const NUMBER: usize = 4;
/// The slot has a page.
pub(super) const FILLED: u64 = 1;

/// A slot that is reserved for one BAT page.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    pub(super) record: u32,
    /// What the page's next copy would write stands in it.
    pub(super) filled: bool,
}

impl Ledger {
    pub(super) fn reserve_page(&self) -> Option<Slot> {
        let record = self.free().pages.take()?;
        self.free_pages.fetch_sub(1, Ordering::Relaxed);
        self.uses(PAGES, record);
        Some(Slot { record, filled: false })
    }

    pub(super) fn pages_are_full(&self) -> bool {
        self.free_pages.load(Ordering::Relaxed) == 0
    }

    /// Puts the page `number` of `image` into the slot, whole.
    pub(super) fn fill_page(&self, slot: &mut Slot, image: u64, file: Identity, number: u32, page: &[u8]) {
        let data = self.record(self.layout.page(slot.record));
        for (word, piece) in data.iter().zip(page.chunks_exact(8)) {
            word.store(super::session::packed(piece), Ordering::Relaxed);
        }
        let state = self.record(self.layout.state(slot.record));
        for (word, value) in [(IMAGE, image), (DEV, file.0), (INO, file.1), (NUMBER, number.into())] {
            state[word].store(value, Ordering::Relaxed);
        }
        state[STATE].store(FILLED, Ordering::Release);
        slot.filled = true;
    }

    /// Changes one entry of a filled slot. The page's lock keeps the other half of the word from changing meanwhile.
    pub(super) fn change_entry(&self, slot: &Slot, entry: usize, value: u32) {
        debug_assert!(slot.filled);
        let word = &self.record(self.layout.page(slot.record))[entry / 2];
        let mut halves = word.load(Ordering::Relaxed).to_ne_bytes();
        let at = entry % 2 * 4;
        halves[at..at + 4].copy_from_slice(&value.to_le_bytes());
        word.store(u64::from_ne_bytes(halves), Ordering::Release);
    }

    /// What stands in the slot is durable.
    pub(super) fn empty_page(&self, slot: &mut Slot) {
        self.record(self.layout.state(slot.record))[STATE].store(0, Ordering::Release);
        slot.filled = false;
    }

    pub(super) fn give_page_back(&self, mut slot: Slot) {
        if slot.filled {
            self.empty_page(&mut slot);
        }
        self.free().pages.give_back(slot.record);
        self.free_pages.fetch_add(1, Ordering::Relaxed);
    }
}
