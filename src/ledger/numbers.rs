//! Which image has which number (docs/restart.md#l4).
//!
//! A record is used again when its image is gone from the set; a number never is.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;

use super::layout::{NEXT_ID, NUMBERS};
use super::session::packed;
use super::{Identity, Ledger};

/// The longest name in bytes, as a folder has them.
pub(super) const MAX_NAME: usize = 255;

/// Words of a record.
pub(super) const STATE: usize = 0;
pub(super) const ID: usize = 1;
pub(super) const DEV: usize = 2;
pub(super) const INO: usize = 3;
pub(super) const LEN: usize = 4;
pub(super) const NAME: usize = 5;
/// The record is an image's.
pub(super) const TAKEN: u64 = 1;

impl Ledger {
    /// The image `name`, whose file is `file`, has the number `id`. Where it had one, it has a new file.
    pub fn number(&self, id: u64, name: &OsStr, file: Identity) {
        let name = name.as_bytes();
        let mut free = self.free();
        let known = free.number_of.get(&id).copied();
        let Some(record) = known.or_else(|| free.numbers.take()).filter(|_| name.len() <= MAX_NAME) else {
            drop(free);
            return self.beyond();
        };
        free.number_of.insert(id, record);
        drop(free);
        self.uses(NUMBERS, record);
        let words = self.record(self.layout.number(record));
        // A file that becomes another is between the two for as long as nothing else is: dead in between, its image is none
        // of the daemon's before, and its handles are lost. Never a wrong file.
        words[STATE].store(0, Ordering::Release);
        for (word, value) in [(ID, id), (DEV, file.0), (INO, file.1), (LEN, name.len() as u64)] {
            words[word].store(value, Ordering::Relaxed);
        }
        for (word, piece) in words[NAME..].iter().zip(name.chunks(8)) {
            word.store(packed(piece), Ordering::Relaxed);
        }
        words[STATE].store(TAKEN, Ordering::Release);
    }

    /// The number that the image `name` with this file had before, once.
    pub fn take_number(&self, name: &OsStr, file: Identity) -> Option<u64> {
        let mut free = self.free();
        let (id, _) = free.left_numbers.get(name).filter(|(_, known)| *known == file).copied()?;
        free.left_numbers.remove(name);
        Some(id)
    }

    /// What was served before is served again: a number that no image has got is none's from now on.
    pub fn settle_numbers(&self) {
        let left = std::mem::take(&mut self.free().left_numbers);
        left.values().for_each(|(id, _)| self.no_number(*id));
    }

    /// The image with this number is gone.
    pub fn no_number(&self, id: u64) {
        let mut free = self.free();
        if let Some(record) = free.number_of.remove(&id) {
            self.record(self.layout.number(record))[STATE].store(0, Ordering::Release);
            free.numbers.give_back(record);
        }
    }

    /// The next number will be `next` or above.
    pub fn next_number(&self, next: u64) {
        self.word(NEXT_ID).fetch_max(next, Ordering::AcqRel);
    }
}
