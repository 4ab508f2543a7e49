//! The ledger: what a daemon knows and its files do not say yet, kept where the daemon's death does not reach
//! (docs/restart.md#the-ledger). A daemon writes it while it serves; its successor reads it once, and goes on writing.
//!
//! It is plain words over memory that the keeper makes (`io/shared`); tests keep them in a vector. Rules L1 to L4 name what
//! must stand here before which answer. A record is written whole and its state word last (Release), so that a death
//! between two stores leaves the record that was there before, or none.
//!
//! The successor reads it like a file from a stranger: [`Found`] holds what made sense, and says what did not.

mod book;
pub mod deaths;
mod found;
mod layout;
mod numbers;
mod opens;
mod pages;
pub(crate) mod running;
mod session;
mod snapshots;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

pub use book::Book;
pub use found::{Found, FoundImage, FoundNumber};
pub use layout::{Room, Sizes};
pub use opens::Open;
pub use pages::Slot;
pub use session::Handshake;

use crate::error::{Error, Kind, Result};
use crate::sync::plain::lock;
use layout::{BEYOND, GENERATION, Layout, MAGIC, MAGIC_WORD, SIZES, USED, VERSION, VERSION_WORD};

/// Device and inode of a file.
pub type Identity = (u64, u64);

/// Memory in whole words.
pub trait Words: Send + Sync {
    /// All of it; the same for as long as it lives.
    fn words(&self) -> &[AtomicU64];
}

impl Words for crate::io::shared::Shared {
    fn words(&self) -> &[AtomicU64] {
        crate::io::shared::Shared::words(self)
    }
}

impl<W: Words + ?Sized> Words for Arc<W> {
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

impl Words for Vec<AtomicU64> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// The ledger of one mount, as its daemon has it.
pub struct Ledger {
    memory: Box<dyn Words>,
    layout: Layout,
    /// What the daemon before has left.
    found: Found,
    /// Protects which records of each kind are free. A leaf.
    free: Mutex<Free>,
    /// Slots for pages that are free: asked at every first write, so without the lock.
    free_pages: AtomicU32,
}

/// Free records of each kind.
struct Free {
    numbers: Room,
    /// By image: its record.
    number_of: HashMap<u64, u32>,
    /// Numbers that the daemon before has left, by name, and that no image has got again.
    left_numbers: HashMap<OsString, (u64, Identity)>,
    images: Room,
    pages: Room,
    /// Places for what a thread executes.
    threads: Room,
    /// Images that the daemon before has left and that were not rescued yet.
    left: HashMap<u64, Arc<FoundImage>>,
}

/// Makes an empty ledger of memory that is all zeroes.
pub fn format(memory: &dyn Words, sizes: Sizes) -> Result<()> {
    let words = memory.words();
    let layout = Layout::of(sizes).filter(|layout| layout.words() <= words.len() as u64);
    let layout = layout.ok_or_else(|| odd("the memory is too small"))?;
    for (word, value) in SIZES.zip(layout.sizes().as_words()) {
        words[word].store(value, Ordering::Relaxed);
    }
    words[VERSION_WORD].store(VERSION, Ordering::Relaxed);
    words[MAGIC_WORD].store(MAGIC, Ordering::Release);
    Ok(())
}

fn odd(what: &str) -> Error {
    Error::new(Kind::Invalid, format!("the ledger cannot be used: {what}"))
}

impl Ledger {
    /// The ledger in `memory`, with what the daemon before has left in it. From now on it is this process's to write.
    pub fn attach(memory: Box<dyn Words>) -> Result<Ledger> {
        let layout = Layout::read(memory.words())?;
        memory.words()[GENERATION].fetch_add(1, Ordering::AcqRel);
        let found = Found::read(memory.words(), &layout);
        let free = Mutex::new(Free {
            numbers: Room::without(layout.sizes().numbers, found.numbers.iter().map(|n| n.record)),
            number_of: found.numbers.iter().map(|n| (n.id, n.record)).collect(),
            left: found.images.iter().map(|i| (i.id, Arc::new(i.clone()))).collect(),
            left_numbers: found.numbers.iter().map(|n| (n.name.clone(), (n.id, n.file))).collect(),
            threads: Room::without(layout::THREADS, std::iter::empty()),
            images: Room::without(layout.sizes().images, found.images.iter().map(|i| i.record)),
            pages: Room::without(
                layout.sizes().pages,
                found.images.iter().flat_map(|i| i.pages.iter().map(|(_, slot)| *slot)),
            ),
        });
        let used = found.images.iter().map(|image| image.pages.len() as u32).sum();
        let free_pages = AtomicU32::new(layout.sizes().pages.saturating_sub(used));
        Ok(Ledger { memory, layout, found, free, free_pages })
    }

    /// What the daemon before has left.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// True when a daemon has served with it before.
    pub fn takes_over(&self) -> bool {
        self.handshake().is_some_and(|_| self.found.next_id > 1)
    }

    /// Something is served that no successor could go on with: from now on the mount ends with this daemon.
    pub fn beyond(&self) {
        self.word(BEYOND).store(1, Ordering::Release);
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.memory.words()[at]
    }

    /// The words of a record.
    fn record(&self, (first, len): (usize, usize)) -> &[AtomicU64] {
        &self.memory.words()[first..first + len]
    }

    /// So many records of a kind are used, and no record behind them has been.
    fn uses(&self, kind: usize, record: u32) {
        self.word(USED + kind).fetch_max(u64::from(record) + 1, Ordering::AcqRel);
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        lock(&self.free)
    }
}
