//! What the ledger has of one image that is open.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::layout::IMAGES;
use super::pages::Slot;
use super::{FoundImage, Identity, Ledger};
use crate::sync::plain::lock;

/// Words of a record.
pub(super) const STATE: usize = 0;
pub(super) const ID: usize = 1;
pub(super) const DEV: usize = 2;
pub(super) const INO: usize = 3;
pub(super) const FAILED: usize = 4;
pub(super) const BEYOND: usize = 5;
pub(super) const OWNER_DEV: usize = 6;
pub(super) const OWNER_INO: usize = 7;
/// The record is an image's that is open for writing.
pub(super) const WRITTEN: u64 = 1;

/// One open image in the ledger. Its record stands there from before its first change to behind its close.
pub struct Book {
    ledger: Arc<Ledger>,
    image: u64,
    /// What has the number: the file, or the folder of a layered image.
    owner: Identity,
    file: Identity,
    /// Protects which record it has. A leaf; before the ledger's own.
    record: Mutex<Option<u32>>,
    /// What the daemon before has left of it.
    left: Option<Arc<FoundImage>>,
    /// Protects which slots of what is left have another holder. Before the ledger's own.
    adopted: Mutex<HashSet<u32>>,
    /// It has parts that no successor can go on with.
    beyond: AtomicBool,
}

impl Book {
    /// That of the image number `image` of `owner`, whose top is `file`. A record that the daemon before has left is this one's.
    pub fn of(ledger: &Arc<Ledger>, image: u64, owner: Identity, file: Identity) -> Book {
        let left = ledger.free().left.get(&image).cloned();
        Book {
            ledger: ledger.clone(),
            image,
            owner,
            file,
            record: Mutex::new(left.as_ref().map(|left| left.record)),
            left,
            adopted: Mutex::default(),
            beyond: AtomicBool::new(false),
        }
    }

    /// The image is about to be changed. One that finds no record ends the mount with the daemon. True: for the first time
    /// since it was opened.
    pub fn begin(&self) -> bool {
        let mut record = lock(&self.record);
        if record.is_some() {
            return false;
        }
        let Some(new) = self.ledger.free().images.take() else {
            self.ledger.beyond();
            return false;
        };
        self.ledger.uses(IMAGES, new);
        let words = self.ledger.record(self.ledger.layout.image(new));
        let beyond = u64::from(self.beyond.load(Ordering::Acquire));
        let values = [
            (ID, self.image),
            (DEV, self.file.0),
            (INO, self.file.1),
            (FAILED, 0),
            (BEYOND, beyond),
            (OWNER_DEV, self.owner.0),
            (OWNER_INO, self.owner.1),
        ];
        for (word, value) in values {
            words[word].store(value, Ordering::Relaxed);
        }
        words[STATE].store(WRITTEN, Ordering::Release);
        *record = Some(new);
        true
    }

    /// The image is closed, however that went: nothing of it is left to do. What was left of it and could not be rescued ends
    /// here, as all does that an image could not write before its end.
    pub fn end(&self) {
        self.rescued();
        if let Some(record) = lock(&self.record).take() {
            self.ledger.record(self.ledger.layout.image(record))[STATE].store(0, Ordering::Release);
            self.ledger.free().images.give_back(record);
        }
    }

    /// A sync of the image failed (L5, R7): before any thread hears of it.
    pub fn failed(&self) {
        self.set(FAILED);
    }

    /// No successor can go on with this image: with it open, the mount ends with the daemon.
    pub fn beyond(&self) {
        self.beyond.store(true, Ordering::Release);
        self.begin();
        self.set(BEYOND);
    }

    fn set(&self, word: usize) {
        if let Some(record) = *lock(&self.record) {
            self.ledger.record(self.ledger.layout.image(record))[word].store(1, Ordering::Release);
        }
    }

    /// Reserves a slot for a BAT page. None: all are taken.
    pub fn reserve(&self) -> Option<Slot> {
        self.ledger.reserve_page()
    }

    /// True when no slot is free.
    pub fn is_full(&self) -> bool {
        self.ledger.pages_are_full()
    }

    /// Puts the BAT page `number` into the slot, whole: its own entries as the next copy would write them.
    pub fn fill(&self, slot: &mut Slot, number: u32, page: &[u8]) {
        self.ledger.fill_page(slot, self.image, self.file, number, page);
    }

    /// True when a page stands in the slot.
    pub fn is_filled(&self, slot: &Slot) -> bool {
        slot.filled
    }

    /// Changes one entry of the page in the slot.
    pub fn change(&self, slot: &Slot, entry: usize, value: u32) {
        self.ledger.change_entry(slot, entry, value);
    }

    /// The page in the slot is durable; the slot stays reserved.
    pub fn empty(&self, slot: &mut Slot) {
        self.ledger.empty_page(slot);
    }

    /// The slot is needed no more.
    pub fn give_back(&self, slot: Slot) {
        self.ledger.give_page_back(slot);
    }

    /// The image's top.
    pub fn file(&self) -> Identity {
        self.file
    }

    /// What the daemon before has left of the image, until it is [`rescued`](Self::rescued).
    pub fn left(&self) -> Option<&FoundImage> {
        self.left.as_deref()
    }

    /// A BAT page of what was left, by its slot.
    pub fn left_page(&self, record: u32) -> Vec<u8> {
        let words = self.ledger.record(self.ledger.layout.page(record));
        words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
    }

    /// A BAT page of what was left is as dirty as it was: from now on its slot is its holder's to give back.
    pub fn adopt(&self, number: u64) -> Option<Slot> {
        let pages = &self.left.as_ref()?.pages;
        let (_, record) = pages.iter().find(|(page, _)| u64::from(*page) == number)?;
        lock(&self.adopted).insert(*record).then_some(Slot { record: *record, filled: true })
    }

    /// What was left is in the file, durably. Until then each open of the image rescues it again.
    pub fn rescued(&self) {
        if self.ledger.free().left.remove(&self.image).is_none() {
            return;
        }
        let adopted = lock(&self.adopted);
        let all = self.left.iter().flat_map(|left| &left.pages);
        for (_, record) in all.filter(|(_, record)| !adopted.contains(record)) {
            self.ledger.give_page_back(Slot { record: *record, filled: true });
        }
    }

    /// True where a successor cannot go on with the image.
    pub fn is_beyond(&self) -> bool {
        self.beyond.load(Ordering::Acquire)
    }
}
