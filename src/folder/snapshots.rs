//! What is known of the snapshots of images: their names as they were read last, and which of them are looked at.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::locked;
use crate::format::descriptor::Guid;

/// Most images whose snapshots' names are known: each has tens, of some 100 bytes.
const MOST: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");
/// How long they are taken for true where only one name is wanted: as long as the kernel does.
const FRESH: Duration = Duration::from_secs(1);

/// One snapshot, as the mount shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its identity.
    pub guid: Guid,
    /// Label, or GUID.
    pub name: String,
}

/// Which snapshots of one image are looked at.
#[derive(Default)]
pub(super) struct Views {
    pub(super) open: HashMap<Guid, u32>,
    /// About to be deleted or merged: no opener is let in any more.
    pub(super) going: HashSet<Guid>,
    /// The image itself goes, or changes its name.
    pub(super) image_goes: bool,
}

/// When they were read, and what they were.
type Read = (Instant, Arc<[Snapshot]>);

/// The names of snapshots that were read last, by image.
pub(super) struct KnownSnapshots {
    /// A leaf.
    lists: Mutex<LruCache<u64, Read>>,
}

impl Default for KnownSnapshots {
    fn default() -> KnownSnapshots {
        KnownSnapshots { lists: Mutex::new(LruCache::new(MOST)) }
    }
}

impl KnownSnapshots {
    pub(super) fn keep(&self, image: u64, read: Instant, list: &[Snapshot]) {
        locked(&self.lists).put(image, (read, list.into()));
    }

    pub(super) fn get(&self, image: u64) -> Option<Arc<[Snapshot]>> {
        let mut lists = locked(&self.lists);
        let (read, list) = lists.get(&image)?;
        (read.elapsed() < FRESH).then(|| list.clone())
    }

    /// They have changed.
    pub(super) fn forget(&self, image: u64) {
        locked(&self.lists).pop(&image);
    }
}
