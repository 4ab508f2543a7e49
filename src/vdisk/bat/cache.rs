//! The BAT cache: a fixed directory with one slot per BAT page, each with its own lock. No lock is shared between
//! pages on a look-up; what is loaded is bounded over all images by `--bat-cache` (second-chance eviction).
//!
//! A page is absent, loading, or loaded (clean, dirty, writing, or both: see `page`). One pio loads, others queue.
//! Lock order: a page's lock, then the dirty list or the loaded list, each a leaf.

use std::sync::OnceLock;
use std::time::Instant;

use super::budget::{Budget, Evict};
use super::kept::Kept;
use super::page::{Page, Place};
use crate::error::Result;
use crate::format::bat::{PAGE_SLOTS, pages, slot_of};
use crate::format::header::Geometry;
use crate::ledger;
use crate::sync::{Arc, AtomicBool, AtomicU64, Bug, Mutex, MutexGuard, Ordering, Weak, lock, planted};
use crate::vdisk::runner::Job;

#[derive(Default)]
enum State {
    #[default]
    Absent,
    Loading(Vec<Job>),
    Loaded(Box<Page>),
}

impl State {
    fn is_sound(&self) -> bool {
        !matches!(self, State::Loaded(page) if !page.is_sound())
    }
}

#[derive(Default)]
struct Slot {
    /// Protects the page: entries, levels and write-back state together. Held for a look-up only, never across I/O.
    /// Before the list of dirty pages.
    state: Mutex<State>,
    /// Hit since the eviction hand last passed.
    hot: AtomicBool,
}

/// What a look-up found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The page is not loaded: load it, then look again.
    Miss,
    /// Here it is.
    Found(Place),
}

/// What [`BatCache::load_or_queue`] did with the token.
pub enum Loading<T> {
    /// The page is loaded now.
    Loaded(T),
    /// The caller loads it: `BatCache::load`.
    Mine(T),
    /// Another thread does; the token waits.
    Queued,
}

#[derive(Default)]
struct Dirty {
    /// Pages that became dirty since the last round took the list.
    pages: Vec<u32>,
    /// The image failed or closed: what is dirty will never be written, and takes no share of the budget.
    given_up: bool,
}

/// The BAT of one image in memory.
pub struct BatCache {
    slots: Box<[Slot]>,
    budget: Arc<Budget>,
    me: Weak<BatCache>,
    /// Also protects the two counts of dirty pages, here and in the budget, against `given_up`. A leaf.
    dirty: Mutex<Dirty>,
    dirty_count: AtomicU64,
    /// The host has no room for what is dirty: it is counted apart. Changes under `dirty`.
    apart: AtomicBool,
    /// What a death must not take along. None: nothing is kept.
    kept: OnceLock<Kept>,
}

/// A page's own entries, copied under its lock by a round.
pub struct Copy {
    /// Page number.
    pub page: u32,
    /// 4 KiB; the header's slots of page 0 are zero.
    pub bytes: Box<[u8]>,
    /// The position, in bytes, of the last cluster in the file that it names.
    pub last: u64,
    /// What it names must be durable before it; else it may be written first, as far as the file is durably long enough.
    pub data_first: bool,
    /// File clusters that are free once this copy is durable.
    pub freed: Vec<u64>,
    /// The same, of clusters that were moved: they still hold their data.
    pub moved: Vec<u64>,
}

impl BatCache {
    /// An empty cache for a BAT of `entries` entries.
    pub fn new(budget: Arc<Budget>, entries: u64) -> Arc<BatCache> {
        Arc::new_cyclic(|me| BatCache {
            slots: (0..pages(entries)).map(|_| Slot::default()).collect(),
            budget,
            me: me.clone(),
            dirty: Mutex::default(),
            dirty_count: AtomicU64::new(0),
            apart: AtomicBool::new(false),
            kept: OnceLock::new(),
        })
    }

    /// Changes stand in the ledger from now on, before the first of them.
    pub(in crate::vdisk) fn keep(&self, kept: Kept) {
        let _ = self.kept.set(kept);
    }

    /// The image is closed: nothing of it is left in the ledger.
    pub(in crate::vdisk) fn leave_ledger(&self) {
        let Some(kept) = self.kept.get() else { return };
        for slot in &self.slots {
            if let State::Loaded(page) = &mut *lock(&slot.state) {
                kept.let_go(&mut page.slot);
            }
        }
    }

    /// True when the directory has a slot for each of `entries` entries, and no more.
    pub fn covers(&self, entries: u64) -> bool {
        self.slots.len() as u64 == pages(entries)
    }

    fn dirty(&self) -> MutexGuard<'_, Dirty> {
        let dirty = lock(&self.dirty);
        debug_assert!(self.is_sound(&dirty), "the dirty pages' list and counts");
        dirty
    }

    /// What holds whenever the lock of `dirty` is free: each page of the list is counted (those written are, and not
    /// listed), and what is counted here has its share of the budget until it is given up.
    fn is_sound(&self, dirty: &Dirty) -> bool {
        let count = self.dirty_pages();
        let shared = dirty.given_up || self.counted(dirty).load(Ordering::Relaxed) >= count;
        dirty.pages.len() as u64 <= count && shared && self.budget.is_sound()
    }

    fn loaded(&self, page: u64) -> (&Slot, MutexGuard<'_, State>) {
        let slot = &self.slots[page as usize];
        let state = lock(&slot.state);
        debug_assert!(state.is_sound(), "BAT page {page}");
        (slot, state)
    }

    /// Where guest cluster `cluster` lies.
    pub fn lookup(&self, cluster: u64) -> Lookup {
        let mut place = [Place::None];
        if self.lookup_run(cluster, &mut place) { Lookup::Found(place[0]) } else { Lookup::Miss }
    }

    /// Where `places.len()` clusters from `first` on lie; false when a page of theirs is not loaded.
    pub fn lookup_run(&self, first: u64, places: &mut [Place]) -> bool {
        let mut done = 0;
        while done < places.len() {
            let (page, from) = slot_of(first + done as u64);
            let (slot, state) = self.loaded(page);
            let State::Loaded(loaded) = &*state else { return false };
            if !slot.hot.load(Ordering::Relaxed) {
                slot.hot.store(true, Ordering::Relaxed);
            }
            let n = (PAGE_SLOTS - from).min(places.len() - done);
            for (i, place) in places[done..done + n].iter_mut().enumerate() {
                *place = loaded.get(from + i);
            }
            done += n;
        }
        true
    }

    /// Like [`lookup`](Self::lookup); where level `top` does not map the cluster, the page is pinned, so that the
    /// entry of an allocation can be [`set`](Self::set) later. The caller then calls `set` or [`unpin`](Self::unpin).
    pub fn lookup_to_allocate(&self, cluster: u64, top: u16) -> Lookup {
        let (page, slot) = slot_of(cluster);
        let (_, mut state) = self.loaded(page);
        let State::Loaded(loaded) = &mut *state else { return Lookup::Miss };
        let place = loaded.get(slot);
        if match place {
            Place::None => true,
            Place::At { level, .. } => level != top,
            Place::Damaged => false,
        } {
            loaded.pins += 1;
            self.reserve(loaded);
        }
        Lookup::Found(place)
    }

    /// Which of `places.len()` clusters from `first` on, all in one loaded page, hide the data of a lower level.
    pub fn hidden_run(&self, first: u64, hides: &mut [bool]) {
        let (page, slot) = slot_of(first);
        if let State::Loaded(page) = &*self.loaded(page).1 {
            hides.iter_mut().enumerate().for_each(|(i, hides)| *hides = page.hides(slot + i));
        }
    }

    /// Gives up an allocation.
    pub fn unpin(&self, cluster: u64) {
        if let State::Loaded(page) = &mut *self.loaded(slot_of(cluster).0).1 {
            page.pins -= 1;
            self.settle(page);
        }
    }

    fn reserve(&self, page: &mut Page) {
        if let Some(kept) = self.kept.get() {
            kept.reserve(page);
        }
    }

    fn enter(&self, number: u64, page: &mut Page, slots: std::ops::Range<usize>) {
        if let Some(kept) = self.kept.get() {
            kept.enter(number as u32, page, slots);
        }
    }

    fn settle(&self, page: &mut Page) {
        if let Some(kept) = self.kept.get() {
            kept.settle(page);
        }
    }

    /// Enters an allocation of level `top` and unpins the page. True when the page was clean: its deadline starts
    /// now.
    pub fn set(&self, cluster: u64, top: u16, position: u64) -> bool {
        let (page, slot) = slot_of(cluster);
        let (_, mut state) = self.loaded(page);
        let State::Loaded(loaded) = &mut *state else { unreachable!("a pinned page is never evicted") };
        loaded.pins -= 1;
        // What was there is a lower level's, and hidden from now on.
        let hides = loaded.get(slot) != Place::None;
        loaded.set(slot, Place::At { level: top, position }, hides);
        // Where nothing was, its entry alone reads as before: the space is known to be zero (R3).
        loaded.data_first |= hides;
        self.enter(page, loaded, slot..slot + 1);
        self.mark_dirty(page as u32, loaded)
    }

    /// Moves a cluster of level `top`: its entry names `position` from now on. The caller holds its lock exclusively,
    /// and has pinned the page. `old` is free, with what it holds, when that is durable; empty: the caller keeps the old
    /// file cluster out of circulation.
    pub fn relocate(&self, cluster: u64, top: u16, position: u64, old: &[u64]) -> bool {
        let (page, slot) = slot_of(cluster);
        let (_, mut state) = self.loaded(page);
        let State::Loaded(loaded) = &mut *state else { unreachable!("a pinned page is never evicted") };
        let hides = loaded.hides(slot);
        loaded.set(slot, Place::At { level: top, position }, hides);
        loaded.moved.extend_from_slice(old);
        loaded.data_first = true;
        self.enter(page, loaded, slot..slot + 1);
        self.mark_dirty(page as u32, loaded)
    }

    /// Unmaps `count` clusters from `first` on (all in one page; no lower level maps them) and remembers their file clusters as freed by
    /// the page's next durable copy. The caller holds their locks exclusively and has loaded and pinned the page.
    pub fn unmap(&self, first: u64, count: usize, freed: &[u64]) -> bool {
        let (page, slot) = slot_of(first);
        let (_, mut state) = self.loaded(page);
        let State::Loaded(loaded) = &mut *state else { unreachable!("a pinned page is never evicted") };
        for slot in slot..slot + count {
            loaded.set(slot, Place::None, false);
        }
        loaded.freed.extend_from_slice(freed);
        loaded.data_first = true;
        self.enter(page, loaded, slot..slot + count);
        self.mark_dirty(page as u32, loaded)
    }

    /// The page of `cluster`, which is pinned, is in no file as it was loaded, but in this slot of the ledger (`rescue`). `gone`:
    /// what is free, with what it holds, when it is durable.
    pub(in crate::vdisk) fn adopt(&self, cluster: u64, slot: ledger::Slot, gone: Vec<u64>) {
        let (number, _) = slot_of(cluster);
        if let State::Loaded(page) = &mut *self.loaded(number).1 {
            if let Some(kept) = self.kept.get() {
                kept.let_go(&mut page.slot);
            }
            page.slot = Some(slot);
            page.moved = gone;
            page.data_first = true;
            self.mark_dirty(number as u32, page);
        }
    }

    /// Keeps a loaded page loaded; false when it is not. Undone by [`unpin`](Self::unpin).
    pub fn pin(&self, cluster: u64) -> bool {
        match &mut *self.loaded(slot_of(cluster).0).1 {
            State::Loaded(page) => {
                page.pins += 1;
                self.reserve(page);
                true
            }
            _ => false,
        }
    }

    fn mark_dirty(&self, number: u32, page: &mut Page) -> bool {
        if page.dirty_since.is_some() {
            return false;
        }
        page.dirty_since = Some(Instant::now());
        let mut dirty = self.dirty();
        // A page that is being written is counted already, until its round ends.
        if !page.writing {
            self.counted(&dirty).fetch_add(u64::from(!dirty.given_up), Ordering::Relaxed);
            self.dirty_count.fetch_add(1, Ordering::SeqCst);
        }
        dirty.pages.push(number);
        true
    }

    /// The image failed or closed: its dirty pages no longer keep other images from allocating.
    pub fn give_up(&self) {
        // Not judged: a drop comes here, also while the panic over a wrong state unwinds.
        let mut dirty = lock(&self.dirty);
        if !std::mem::replace(&mut dirty.given_up, true) {
            self.counted(&dirty).fetch_sub(self.dirty_pages(), Ordering::Relaxed);
        }
    }

    /// Where its dirty pages are counted; under `dirty`.
    fn counted(&self, _: &Dirty) -> &AtomicU64 {
        if self.apart.load(Ordering::Relaxed) { &self.budget.apart } else { &self.budget.dirty }
    }

    /// The host has no room for its dirty pages, or has it again. True when that is news.
    pub fn set_apart(&self, apart: bool) -> bool {
        let dirty = self.dirty();
        let news = self.apart.load(Ordering::Relaxed) != apart;
        if news {
            let count = if dirty.given_up { 0 } else { self.dirty_pages() };
            self.counted(&dirty).fetch_sub(count, Ordering::Relaxed);
            self.apart.store(apart, Ordering::Relaxed);
            self.counted(&dirty).fetch_add(count, Ordering::Relaxed);
        }
        news
    }

    /// True when no further page of it may become dirty for now: as many are as may be, or, where it is apart, as all that
    /// are apart may have together. They cannot be written for as long as their hosts are full, nor evicted: were it half of
    /// the cache for each image, many of them would take many times what the cache may have.
    pub fn crowded(&self) -> bool {
        self.budget.dirty_full()
            || self.is_unkeepable()
            || self.apart.load(Ordering::Relaxed)
                && self.budget.apart.load(Ordering::Relaxed) * 2 >= self.budget.limit
    }

    /// True when the ledger has no slot for a further page. Not while no page is dirty: nothing would wake what waits.
    pub(in crate::vdisk) fn is_unkeepable(&self) -> bool {
        self.kept.get().is_some_and(|kept| kept.book.is_full()) && self.budget.some_dirty()
    }

    /// Pages not yet durable, those being written included.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty_count.load(Ordering::SeqCst)
    }

    /// Step 1 of a round: copies the entries of level `top` of every dirty page, each under its lock, in file order.
    pub fn copy_dirty(&self, top: u16, geometry: &Geometry) -> Vec<Copy> {
        let mut numbers = std::mem::take(&mut self.dirty().pages);
        numbers.sort_unstable();
        let mut copies = Vec::with_capacity(numbers.len());
        for number in numbers {
            let (_, mut state) = self.loaded(number.into());
            let State::Loaded(page) = &mut *state else { unreachable!("a dirty page is never evicted") };
            page.dirty_since = None;
            page.writing = true;
            let (bytes, last) = page.own_entries(top, geometry);
            let (freed, moved) = (std::mem::take(&mut page.freed), std::mem::take(&mut page.moved));
            let data_first = std::mem::take(&mut page.data_first);
            if let Some(kept) = self.kept.get() {
                kept.copied(page);
            }
            copies.push(Copy { page: number, bytes, last, data_first, freed, moved });
        }
        copies
    }

    /// The copy is durable: the page is clean, unless something was added meanwhile.
    pub fn written(&self, number: u32) {
        let (_, mut state) = self.loaded(number.into());
        let State::Loaded(page) = &mut *state else { unreachable!("a writing page is never evicted") };
        page.writing = false;
        if page.dirty_since.is_none() || planted(Bug::CleanWhateverCame) {
            let dirty = self.dirty();
            self.counted(&dirty).fetch_sub(u64::from(!dirty.given_up), Ordering::Relaxed);
            self.dirty_count.fetch_sub(1, Ordering::SeqCst);
        }
        self.settle(page);
    }

    /// The copy did not become durable: the page is dirty again, and what it would have freed waits on.
    pub fn not_written(&self, copy: Copy) {
        let (_, mut state) = self.loaded(copy.page.into());
        let State::Loaded(page) = &mut *state else { unreachable!("a writing page is never evicted") };
        page.freed.extend(copy.freed);
        page.moved.extend(copy.moved);
        page.data_first |= copy.data_first;
        if page.dirty_since.is_none() {
            page.dirty_since = Some(Instant::now());
            self.dirty().pages.push(copy.page);
        }
        page.writing = false;
    }

    /// Claims the loading of the page of `cluster`, or queues `token` behind who does.
    pub fn load_or_queue<T>(&self, cluster: u64, token: T, job: impl FnOnce(T) -> Job) -> Loading<T> {
        let (_, mut state) = self.loaded(slot_of(cluster).0);
        match &mut *state {
            State::Loaded(_) => Loading::Loaded(token),
            State::Loading(queue) => {
                queue.push(job(token));
                Loading::Queued
            }
            State::Absent => {
                *state = State::Loading(Vec::new());
                Loading::Mine(token)
            }
        }
    }

    /// Loads the page of `cluster` as `read` finds it by its number; that may block. Only after [`Loading::Mine`]. Returns
    /// those who waited, to be submitted: on failure each tries for itself.
    pub fn load(&self, cluster: u64, read: impl FnOnce(u64) -> Result<Box<Page>>) -> (Vec<Job>, Result<()>) {
        let number = slot_of(cluster).0;
        let read = read(number);
        let (slot, mut state) = self.loaded(number);
        let State::Loading(waiting) = std::mem::take(&mut *state) else {
            unreachable!("only the loader ends the loading")
        };
        match read {
            Err(e) => (waiting, Err(e)),
            Ok(page) => {
                *state = State::Loaded(page);
                slot.hot.store(true, Ordering::Relaxed);
                drop(state);
                self.budget.count_loaded(self.me.clone(), number as u32);
                (waiting, Ok(()))
            }
        }
    }
}

impl Evict for BatCache {
    fn drop_page(&self, number: u32) -> bool {
        let (slot, mut state) = self.loaded(number.into());
        match &*state {
            State::Loaded(page) if page.evictable() && !slot.hot.swap(false, Ordering::Relaxed) => {
                *state = State::Absent;
                self.budget.loaded.fetch_sub(1, Ordering::Relaxed);
                true
            }
            State::Loaded(_) => false,
            _ => true,
        }
    }
}

impl Drop for BatCache {
    fn drop(&mut self) {
        let loaded = self.slots.iter().filter(|s| matches!(*lock(&s.state), State::Loaded(_))).count();
        self.budget.loaded.fetch_sub(loaded as u64, Ordering::Relaxed);
        // An image that was dropped without a close.
        self.give_up();
        self.leave_ledger();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(cache: &BatCache, page: u64) {
        let cluster = page * PAGE_SLOTS as u64;
        let loading = cache.load_or_queue(cluster, (), |()| Box::new(|| ()));
        assert!(matches!(loading, Loading::Mine(())));
        cache.load(cluster, |_| Ok(Box::default())).1.expect("loaded");
    }

    /// The daemon ended with a stack overflow, and all disks with it: a discard loaded its page again and again.
    #[test]
    fn a_page_is_not_evicted_before_its_loader_has_it_though_all_others_are_pinned() {
        let budget = Arc::new(Budget::new(0));
        let cache = BatCache::new(budget.clone(), 40 * PAGE_SLOTS as u64);
        for page in 1..=budget.limit {
            load(&cache, page);
            assert!(cache.pin(page * PAGE_SLOTS as u64));
        }
        for page in [30, 31] {
            load(&cache, page);
            assert_eq!(cache.lookup(page * PAGE_SLOTS as u64), Lookup::Found(Place::None));
        }
        assert_eq!(budget.loaded(), budget.limit + 1, "and it goes when the next one comes");
        cache.unpin(PAGE_SLOTS as u64);
        load(&cache, 32);
        assert_eq!(budget.loaded(), budget.limit);
    }

    #[test]
    fn dirty_pages_that_are_not_counted_are_not_sound() {
        let budget = Arc::new(Budget::new(0));
        let cache = BatCache::new(budget.clone(), PAGE_SLOTS as u64);
        let mut dirty = cache.dirty();
        assert!(cache.is_sound(&dirty));
        dirty.pages.push(0);
        assert!(!cache.is_sound(&dirty), "listed, and not counted");
        cache.dirty_count.store(1, Ordering::SeqCst);
        assert!(!cache.is_sound(&dirty), "counted, without a share of the budget");
        budget.dirty.store(1, Ordering::SeqCst);
        assert!(cache.is_sound(&dirty));
        cache.apart.store(true, Ordering::SeqCst);
        assert!(!cache.is_sound(&dirty), "the share is of the other kind");
        dirty.given_up = true;
        assert!(cache.is_sound(&dirty), "it needs none any more");
        budget.loaded.fetch_sub(1, Ordering::SeqCst);
        assert!(!cache.is_sound(&dirty) && !budget.is_sound(), "a page was counted out twice");
    }
}
