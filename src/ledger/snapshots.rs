//! Which snapshot has which number (docs/restart.md#l4): the place of its record. None is used again.

use std::sync::atomic::Ordering;

use super::Ledger;
use super::layout::SNAPSHOTS;
use super::session::packed;

/// Words of a record.
pub(super) const STATE: usize = 0;
pub(super) const IMAGE: usize = 1;
pub(super) const GUID: usize = 2;
/// The record is a snapshot's.
pub(super) const TAKEN: u64 = 1;

impl Ledger {
    /// The snapshot `guid` of the image number `image` has the number `number`.
    pub fn snapshot(&self, number: u64, image: u64, guid: [u8; 16]) {
        let record = u32::try_from(number).ok().filter(|record| *record < self.layout.sizes().snapshots);
        let Some(record) = record else { return self.beyond() };
        self.uses(SNAPSHOTS, record);
        let words = self.record(self.layout.snapshot(record));
        words[IMAGE].store(image, Ordering::Relaxed);
        for (word, piece) in words[GUID..].iter().zip(guid.chunks_exact(8)) {
            word.store(packed(piece), Ordering::Relaxed);
        }
        words[STATE].store(TAKEN, Ordering::Release);
    }
}
