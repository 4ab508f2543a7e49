//! `.snapshots/NAME/LABEL.img`: which number each snapshot has. A number is given at the first look and never again,
//! so that an inode is one snapshot for as long as the mount lives, whatever its label.

use std::collections::HashMap;

use crate::format::descriptor::Guid;
use crate::sync::{Mutex, lock};

/// The numbers of all snapshots that were ever looked at.
#[derive(Default)]
pub struct Numbers {
    /// A leaf.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    numbers: HashMap<(u64, Guid), u64>,
    snapshots: Vec<(u64, Guid)>,
}

impl Numbers {
    /// The number of a snapshot of the image number `image`.
    pub fn number(&self, image: u64, guid: Guid) -> u64 {
        let mut known = lock(&self.known);
        if let Some(number) = known.numbers.get(&(image, guid)) {
            return *number;
        }
        let number = known.snapshots.len() as u64;
        known.snapshots.push((image, guid));
        known.numbers.insert((image, guid), number);
        number
    }

    /// Image and snapshot of a number.
    pub fn snapshot(&self, number: u64) -> Option<(u64, Guid)> {
        lock(&self.known).snapshots.get(usize::try_from(number).ok()?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_keeps_its_number() {
        let (numbers, a, b) = (Numbers::default(), Guid::random(), Guid::random());
        let first = numbers.number(1, a);
        assert_ne!(first, numbers.number(1, b));
        assert_ne!(first, numbers.number(2, a));
        assert_eq!((numbers.number(1, a), numbers.snapshot(first)), (first, Some((1, a))));
        assert_eq!(numbers.snapshot(99), None);
    }
}
