//! Texts that are made up for those who open them: few for each user, since each takes memory that is locked.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::sync::{Mutex, lock};

/// Most that one user has open of one file. Each may hold a text of its own, of some 350 bytes an image.
const MOST_OPEN: u32 = 64;

/// How many each user has open. A leaf.
#[derive(Default)]
pub(super) struct Readers(Mutex<HashMap<u32, u32>>);

/// One text that a user has open; counted until it is dropped.
pub(super) struct Text {
    pub(super) bytes: Bytes,
    _seat: Seat,
}

/// Counts one text of a user until it is dropped.
pub(super) struct Seat {
    uid: u32,
    readers: Arc<Readers>,
}

impl Readers {
    pub(super) fn enter(self: &Arc<Self>, uid: u32) -> Option<Seat> {
        let mut open = lock(&self.0);
        let count = open.entry(uid).or_default();
        if *count == MOST_OPEN {
            return None;
        }
        *count += 1;
        Some(Seat { uid, readers: self.clone() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = lock(&self.readers.0);
        if let Some(count) = open.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.uid);
            }
        }
    }
}

impl Text {
    pub(super) fn new(bytes: Bytes, seat: Seat) -> Text {
        Text { bytes, _seat: seat }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cannot_keep_any_number_of_texts() {
        let readers = Arc::<Readers>::default();
        let mut seats: Vec<Seat> = (0..MOST_OPEN).map(|_| readers.enter(1000).expect("room")).collect();
        assert!(readers.enter(1000).is_none());
        assert!(readers.enter(1001).is_some(), "others have their own");
        seats.pop();
        assert!(readers.enter(1000).is_some());
        drop(seats);
        assert!(lock(&readers.0).is_empty());
    }
}
