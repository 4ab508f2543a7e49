//! Texts that are made up for those who open them: few for each user, since each takes memory that is locked.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::fuse::ops::{Answer, Errno};
use crate::sync::{AtomicBool, Mutex, Ordering, lock};

/// Most that one user has open of one file. Each may hold a text of its own, of some 350 bytes an image.
const MOST_OPEN: u32 = 64;

/// How many each user has open. A leaf.
#[derive(Default)]
pub(super) struct Readers(Mutex<HashMap<u32, u32>>);

/// One text that a user has open; counted until it is dropped.
pub(super) struct Text {
    bytes: Bytes,
    /// A reader may have a part of another text: it gets nothing of this one behind its beginning.
    anew: AtomicBool,
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
        Text { bytes, anew: AtomicBool::new(false), _seat: seat }
    }

    /// One in the place of another, which a reader may have begun with.
    pub(super) fn anew(bytes: Bytes, seat: Seat) -> Text {
        Text { bytes, anew: AtomicBool::new(true), _seat: seat }
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Up to `len` bytes from `offset` on.
    pub(super) fn part(&self, offset: u64, len: usize) -> Answer<Bytes> {
        if offset > 0 && self.anew.load(Ordering::Relaxed) {
            return Err(Errno(libc::ESTALE));
        }
        self.anew.store(false, Ordering::Relaxed);
        let from = offset.min(self.len()) as usize;
        Ok(self.bytes.slice(from..from + len.min(self.bytes.len() - from)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat() -> Seat {
        Arc::<Readers>::default().enter(0).expect("room")
    }

    #[test]
    fn a_made_up_file_is_read_in_pieces_and_ends() {
        let text = Text::new(Bytes::from_static(b"hello"), seat());
        assert_eq!(text.part(0, 3), Ok(Bytes::from_static(b"hel")));
        assert_eq!(text.part(3, 30), Ok(Bytes::from_static(b"lo")));
        assert_eq!(text.part(5, 1), Ok(Bytes::new()));
        assert_eq!(text.part(u64::MAX, 1), Ok(Bytes::new()));
    }

    #[test]
    fn who_has_read_a_part_of_one_text_gets_no_other_part_of_its_successor() {
        let text = Text::anew(Bytes::from_static(b"hello"), seat());
        assert_eq!(text.part(3, 30), Err(Errno(libc::ESTALE)));
        assert_eq!(text.part(0, 3), Ok(Bytes::from_static(b"hel")));
        assert_eq!(text.part(3, 30), Ok(Bytes::from_static(b"lo")), "from its beginning on it is one");
    }

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
