//! What the folder tells the tree that shows it: names that went, disks that are not what they were. The kernel keeps names
//! and attributes for a second, and only this takes them back before.

use std::ffi::OsStr;
use std::sync::Arc;

use super::set::Folder;
use crate::vdisk::live::Work;

/// Hears of changes. All but [`settle`](Announce::settle) return at once, and may be called under any lock.
pub trait Announce: Send + Sync {
    /// `name` (without `.img`) is no image any more, or another one.
    fn name(&self, name: &OsStr);
    /// The disk of the image number `id` has another size, or took or gave back space.
    fn disk(&self, id: u64);
    /// The snapshot `name` of the image number `id` is gone.
    fn snapshot(&self, id: u64, name: &OsStr);
    /// Waits, but not for long, until the kernel has heard of what came before. Under no lock, and not on a thread
    /// that serves requests.
    fn settle(&self);
}

impl Folder {
    /// From now on `announce` hears what changes; only the first is taken.
    pub fn announce_to(&self, announce: Arc<dyn Announce>) {
        let _ = self.announce.set(announce);
    }

    /// Tells, where there is one who hears it.
    pub(super) fn tell(&self, what: impl FnOnce(&dyn Announce)) {
        if let Some(announce) = self.announce.get() {
            what(&**announce);
        }
    }

    /// Tells what `work` has changed, or may have before it failed: when its caller hears of the end, who looks sees it.
    /// `going`: the name of the snapshot that it took away.
    pub(super) fn tell_work(&self, id: u64, work: &Work, going: Option<&OsStr>) {
        self.tell(|announce| {
            announce.disk(id);
            if let (Work::Delete { .. } | Work::Merge { .. }, Some(name)) = (work, going) {
                announce.snapshot(id, name);
            }
            announce.settle();
        });
    }
}
