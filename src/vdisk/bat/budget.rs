//! The bound on the pages of the BAT caches of all images (`--bat-cache`): which page goes when another one comes.

use std::collections::VecDeque;

use super::page::Page;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, Weak, lock};

/// A cache, as the bound sees it.
pub(super) trait Evict: Send + Sync {
    /// Evicts a page if it is not needed; true when it is gone.
    fn drop_page(&self, number: u32) -> bool;
}

/// Pages of caches, the one that the hand is at first.
type Ring = VecDeque<(Weak<dyn Evict>, u32)>;

/// The bound on loaded pages, shared by all images of an engine.
pub struct Budget {
    pub(super) limit: u64,
    pub(super) loaded: AtomicU64,
    /// Dirty pages, without those that are `apart`.
    pub(super) dirty: AtomicU64,
    /// Dirty pages of images whose host has no room for them: they wait for that host, and no other image waits for them.
    pub(super) apart: AtomicU64,
    /// Loaded pages in the order of the second-chance hand. Touched by loads and evictions only, never by a hit.
    /// A leaf.
    ring: Mutex<Ring>,
}

impl Budget {
    /// A bound of `bytes`; at least 16 pages, so that one request always fits.
    pub fn new(bytes: u64) -> Budget {
        Budget {
            limit: (bytes / Page::COST).max(16),
            loaded: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            apart: AtomicU64::new(0),
            ring: Mutex::default(),
        }
    }

    /// True when as many pages are dirty as may be: half, so that reads always find room; half of the rest, where some are
    /// apart. One page may always be.
    pub fn dirty_full(&self) -> bool {
        let rest = self.limit.saturating_sub(self.apart.load(Ordering::Relaxed)).max(2);
        self.dirty.load(Ordering::Relaxed) * 2 >= rest
    }

    /// True when some page is dirty: its round will end, and whatever waits for clean pages looks again then.
    pub(super) fn some_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) + self.apart.load(Ordering::Relaxed) > 0
    }

    /// Pages loaded now.
    pub fn loaded(&self) -> u64 {
        self.loaded.load(Ordering::Relaxed)
    }

    /// No count was taken below zero: as one it is huge, and no image would get a page, or allocate, any more.
    pub(super) fn is_sound(&self) -> bool {
        let counts = [&self.loaded, &self.dirty, &self.apart];
        counts.iter().all(|count| i64::try_from(count.load(Ordering::Relaxed)).is_ok())
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        let ring = lock(&self.ring);
        debug_assert!(self.is_sound(), "the BAT cache's budget");
        ring
    }

    pub(super) fn count_loaded(&self, cache: Weak<dyn Evict>, page: u32) {
        // Counted before it can be found there: an eviction that came first would count below zero. And found there only when
        // room was made for it: where all others are pinned or dirty it would go itself, its loader would find it missing,
        // load it again, and so on until its stack was used up, and with it the process.
        let before = self.loaded.fetch_add(1, Ordering::Relaxed);
        if before >= self.limit {
            self.evict();
        }
        let mut ring = self.ring();
        // Entries of closed images go when the hand meets them; where it never moves, they go here.
        if ring.len() as u64 > 2 * self.loaded() + 64 {
            ring.retain(|(cache, _)| cache.strong_count() > 0);
        }
        ring.push_back((cache, page));
    }

    /// Drops pages until the bound holds. A page that was hit since the hand last passed gets another round;
    /// pinned, dirty and writing pages are skipped, and two rounds are enough to see every page unhit.
    fn evict(&self) {
        let mut tries = 2 * self.ring().len();
        while self.loaded.load(Ordering::Relaxed) > self.limit && tries > 0 {
            tries -= 1;
            let Some((cache, page)) = self.ring().pop_front() else { return };
            let Some(image) = cache.upgrade() else {
                continue; // The image is closed; its pages were counted out when it went.
            };
            if !image.drop_page(page) {
                self.ring().push_back((cache, page));
            }
        }
    }
}
