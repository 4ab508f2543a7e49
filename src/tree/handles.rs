//! The table of open files. Looked up once per read and write, so without a lock and without an allocation: a
//! handle is a place in an array that only grows, and the place holds what is open there.
//!
//! A handle is (how often its place was used) * 2^32 + place, so that a number is not given twice within four
//! thousand million opens of one place, and a stale one is recognised.

use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use crate::fuse::ops::Handle;
use crate::sync::{Mutex, lock};

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
        Handles { segments: [const { OnceLock::new() }; SEGMENTS], places: Mutex::default() }
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
    /// Puts something in; None when the table is full.
    pub(super) fn insert(&self, open: T) -> Option<Handle> {
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
        let (segment, index) = position(place);
        let slots = self.segments[segment]
            .get_or_init(|| (0..slots_of(segment)).map(|_| Slot { open: ArcSwapOption::empty() }).collect());
        slots[index].open.store(Some(Arc::new((handle, open))));
        Some(handle)
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
        let Some(slot) = self.slot(handle) else { return false };
        let mut places = lock(&self.places);
        let open = slot.open.load_full().filter(|open| open.0 == handle);
        if open.is_none() {
            return false;
        }
        slot.open.store(None);
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
        let all: Vec<Handle> = (0..1000).map(|i| handles.insert(i).expect("room")).collect();
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
        let first = handles.insert(1).expect("room");
        assert!(handles.remove(first));
        let second = handles.insert(2).expect("room");
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
        let handle = handles.insert(object.clone()).expect("room");
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
                        let handle = handles.insert(mine).expect("room");
                        assert_eq!(handles.get(handle).expect("open").get(), Some(&mine));
                        assert!(handles.remove(handle));
                        assert!(handles.get(handle).is_none());
                    }
                });
            }
        });
    }
}
