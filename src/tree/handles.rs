//! The table of open files. Looked up once per read and write, so without a lock and without an allocation: a
//! handle is a place in an array that only grows, and the place holds what is open there.
//!
//! A handle is (how often its place was used) * 2^32 + place, so that a number is not given twice within four
//! thousand million opens of one place, and a stale one is recognised.
//!
//! **L3** A handle stands in the ledger before OPEN is answered; RELEASE takes it out of memory, then out of the
//! ledger, then answers. OPEN sent again with the same number gets the handle that it has; RELEASE of a handle that
//! is not known is done.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use crate::fuse::ops::{Handle, Ino};
use crate::ledger::{Ledger, Open};
use crate::rules::{Rule, broken};
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use crate::vdisk::Job;

/// Slots of the first segment; every further one doubles the table.
const FIRST: u32 = 64;
/// With 20 segments there is room for 64 * 2^20 open files, 64 times what a process may have descriptors for.
const SEGMENTS: usize = 20;

/// What is open under one handle.
struct Slot<T> {
    open: ArcSwapOption<(Handle, T)>,
}

/// Open files by handle.
pub(super) struct Handles<T> {
    segments: [OnceLock<Box<[Slot<T>]>>; SEGMENTS],
    /// Protects which places are free, and how often each was used. A leaf; only opens and releases take it.
    places: Mutex<Places>,
    /// Where a successor finds them. None: there will be none.
    ledger: Option<Arc<Ledger>>,
    /// Handles that a daemon before gave out, and of which files, by the request that asked for them.
    asked: HashMap<u64, (Handle, Ino)>,
    /// Protects which handles of a daemon before have no file yet, since it is being opened again, and what waits for each.
    /// Before `places`.
    returning: Mutex<HashMap<Handle, Returning>>,
    /// There is none. Copy of that for those who find no file.
    all_back: AtomicBool,
}

/// A handle whose file is being opened again.
struct Returning {
    node: Ino,
    waiting: Vec<Job>,
}

/// What a successor opens a file again by.
pub(super) struct Origin {
    pub(super) node: Ino,
    pub(super) flags: i32,
    pub(super) request: u64,
}

#[derive(Default)]
struct Places {
    free: Vec<u32>,
    uses: Vec<u32>,
}

/// Something that is open, kept from being dropped while it is looked at.
pub(super) struct Borrowed<T>(Guard<Option<Arc<(Handle, T)>>>);

impl<T> Borrowed<T> {
    /// What is open.
    pub(super) fn get(&self) -> Option<&T> {
        self.0.as_ref().map(|open| &open.1)
    }
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Handles::new(None)
    }
}

/// Segment and index in it of a place: segment 0 holds places 0 to 63, segment n the 64 * 2^(n-1) behind.
fn position(place: u32) -> (usize, usize) {
    let segment = (place / FIRST).checked_ilog2().map_or(0, |log| log as usize + 1);
    let first = if segment == 0 { 0 } else { FIRST << (segment - 1) };
    (segment, (place - first) as usize)
}

fn slots_of(segment: usize) -> usize {
    FIRST as usize * if segment == 0 { 1 } else { 1 << (segment - 1) }
}

impl<T> Handles<T> {
    /// A table in which the places of what a daemon before had open are taken ([`restore`](Self::restore)), and no handle of
    /// its is given again.
    pub(super) fn new(ledger: Option<Arc<Ledger>>) -> Handles<T> {
        let left = ledger.as_ref().map_or(&[][..], |ledger| &ledger.found().opens);
        let places = Places {
            uses: left.iter().map(|place| (place.handle >> 32) as u32).collect(),
            free: (0u32..)
                .zip(left)
                .filter(|(_, place)| place.open.is_none() && place.usable)
                .map(|(number, _)| number)
                .collect(),
        };
        let open = || left.iter().filter_map(|place| place.open);
        let asked = open().map(|open| (open.request, (open.handle, open.node))).collect();
        let returning: HashMap<Handle, Returning> =
            open().map(|open| (open.handle, Returning { node: open.node, waiting: Vec::new() })).collect();
        let all_back = AtomicBool::new(returning.is_empty());
        let segments = [const { OnceLock::new() }; SEGMENTS];
        let (places, returning) = (Mutex::new(places), Mutex::new(returning));
        Handles { segments, places, ledger, asked, returning, all_back }
    }

    /// True when no file of a daemon before is being opened again.
    pub(super) fn all_are_back(&self) -> bool {
        self.all_back.load(Ordering::Acquire)
    }

    /// The inode whose handle this is, while its file is being opened again.
    pub(super) fn returning(&self, handle: Handle) -> Option<Ino> {
        if self.all_are_back() {
            return None;
        }
        lock(&self.returning).get(&handle).map(|returning| returning.node)
    }

    /// True while the file of this handle is being opened again.
    pub(super) fn returns(&self, handle: Handle) -> bool {
        self.returning(handle).is_some()
    }

    /// Keeps `job(token)` until the handle has its file again, or has lost it. Else gives the token back: what the handle has
    /// is to be looked at now.
    pub(super) fn wait_for<D>(&self, handle: Handle, token: D, job: impl FnOnce(D) -> Job) -> Option<D> {
        match lock(&self.returning).get_mut(&handle) {
            Some(returning) => {
                returning.waiting.push(job(token));
                None
            }
            None => Some(token),
        }
    }

    /// The handle waits no more; `then` under the lock, so that what comes afterwards finds how that ended. Returns what has
    /// waited; None: it did not wait.
    fn end_return(&self, handle: Handle, then: impl FnOnce()) -> Option<Vec<Job>> {
        if self.all_are_back() {
            return None;
        }
        let mut returning = lock(&self.returning);
        let waited = returning.remove(&handle)?.waiting;
        then();
        self.all_back.store(returning.is_empty(), Ordering::Release);
        Some(waited)
    }

    /// The handle that a daemon before gave to this very request, which was sent again because its answer was not heard.
    pub(super) fn given_to(&self, request: u64, node: Ino) -> Option<Handle> {
        let (handle, of) = *self.asked.get(&request)?;
        (of == node && (self.get(handle).is_some() || self.returns(handle))).then_some(handle)
    }

    /// Puts something in that a daemon before had open under `handle`, unless that was released meanwhile.
    pub(super) fn restore(&self, handle: Handle, open: T) {
        let waited = self.end_return(handle, || self.put(handle, open));
        waited.into_iter().flatten().for_each(|job| job());
    }

    /// What a daemon before had open under `handle` cannot be opened, or was released: its users hear so, and its place is
    /// free. False: it does not wait for that.
    pub(super) fn lose(&self, handle: Handle) -> bool {
        let waited = self.end_return(handle, || {
            let mut places = lock(&self.places);
            if let Some(ledger) = &self.ledger {
                ledger.released(handle);
            }
            places.free.push(handle as u32);
        });
        let did = waited.is_some();
        waited.into_iter().flatten().for_each(|job| job());
        did
    }

    /// Puts something in; None when the table is full. `origin`: a successor opens it again.
    pub(super) fn insert(&self, open: T, origin: Option<Origin>) -> Option<Handle> {
        let mut places = lock(&self.places);
        let place = match places.free.pop() {
            Some(place) => place,
            None => {
                let place = places.uses.len() as u32;
                if position(place).0 >= SEGMENTS {
                    return None;
                }
                places.uses.push(0);
                place
            }
        };
        let uses = &mut places.uses[place as usize];
        // Never 0: a handle 0 looks like "none" to people and to traces.
        *uses = uses.checked_add(1).unwrap_or(1);
        let handle = u64::from(*uses) << 32 | u64::from(place);
        drop(places);
        // L3: before any answer names it.
        match (&self.ledger, origin) {
            (None, _) => {}
            (Some(_), _) if broken(Rule::L3) => {}
            (Some(ledger), None) => ledger.handle_given(handle),
            (Some(ledger), Some(Origin { node, flags, request })) => {
                ledger.opened(&Open { handle, node, flags, request });
            }
        }
        self.put(handle, open);
        Some(handle)
    }

    fn put(&self, handle: Handle, open: T) {
        let (segment, index) = position(handle as u32);
        let slots = self.segments[segment]
            .get_or_init(|| (0..slots_of(segment)).map(|_| Slot { open: ArcSwapOption::empty() }).collect());
        slots[index].open.store(Some(Arc::new((handle, open))));
    }

    fn slot(&self, handle: Handle) -> Option<&Slot<T>> {
        let (segment, index) = position(handle as u32);
        self.segments.get(segment)?.get()?.get(index)
    }

    /// Looks a handle up. No lock, no allocation.
    pub(super) fn get(&self, handle: Handle) -> Option<Borrowed<T>> {
        let open = self.slot(handle)?.open.load();
        let valid = open.as_ref().is_some_and(|open| open.0 == handle);
        valid.then_some(Borrowed(open))
    }

    /// Takes a handle out. What was open is dropped when the last request that looks at it ends.
    pub(super) fn remove(&self, handle: Handle) -> bool {
        if self.lose(handle) {
            return true;
        }
        let Some(slot) = self.slot(handle) else { return false };
        let mut places = lock(&self.places);
        let open = slot.open.load_full().filter(|open| open.0 == handle);
        if open.is_none() {
            return false;
        }
        slot.open.store(None);
        // Before its place can be used again.
        if let Some(ledger) = &self.ledger {
            ledger.released(handle);
        }
        places.free.push(handle as u32);
        // What was open may do something when it is dropped, which is nothing to do under a leaf.
        drop(places);
        drop(open);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn places_fill_the_segments_without_a_gap() {
        assert_eq!(position(0), (0, 0));
        assert_eq!(position(63), (0, 63));
        assert_eq!(position(64), (1, 0));
        assert_eq!(position(127), (1, 63));
        assert_eq!(position(128), (2, 0));
        let mut next = 0u32;
        for segment in 0..10 {
            for index in 0..slots_of(segment) {
                assert_eq!(position(next), (segment, index));
                next += 1;
            }
        }
    }

    #[test]
    fn what_was_put_in_is_found_until_it_is_taken_out() {
        let handles = Handles::default();
        let all: Vec<Handle> = (0..1000).map(|i| handles.insert(i, None).expect("room")).collect();
        for (i, handle) in all.iter().enumerate() {
            assert_eq!(handles.get(*handle).expect("open").get(), Some(&i));
        }
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 1000);
        assert!(handles.remove(all[7]));
        assert!(!handles.remove(all[7]));
        assert!(handles.get(all[7]).is_none());
        assert!(handles.get(0).is_none());
        assert!(handles.get(u64::MAX).is_none());
    }

    #[test]
    fn a_place_used_again_has_another_handle() {
        let handles = Handles::default();
        let first = handles.insert(1, None).expect("room");
        assert!(handles.remove(first));
        let second = handles.insert(2, None).expect("room");
        assert_ne!(first, second);
        assert_eq!(first as u32, second as u32);
        assert!(handles.get(first).is_none());
        assert!(!handles.remove(first));
        assert!(handles.get(second).is_some());
    }

    #[test]
    fn what_is_looked_at_outlives_its_handle() {
        let handles = Handles::default();
        let object = Arc::new(());
        let handle = handles.insert(object.clone(), None).expect("room");
        let looking = handles.get(handle).expect("open");
        assert!(handles.remove(handle));
        assert_eq!(Arc::strong_count(&object), 2);
        assert!(looking.get().is_some());
        drop(looking);
        assert_eq!(Arc::strong_count(&object), 1);
    }

    #[test]
    fn lookups_that_race_with_opens_and_releases_never_see_a_stranger() {
        let handles = Handles::default();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let handles = &handles;
                scope.spawn(move || {
                    for i in 0..5000 {
                        let mine = thread << 32 | i;
                        let handle = handles.insert(mine, None).expect("room");
                        assert_eq!(handles.get(handle).expect("open").get(), Some(&mine));
                        assert!(handles.remove(handle));
                        assert!(handles.get(handle).is_none());
                    }
                });
            }
        });
    }
}
