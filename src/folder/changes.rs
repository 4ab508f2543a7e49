//! What the folder announces to the tree that shows it: names that went, disks that are not what they were. The kernel
//! keeps names and attributes for a second, and only this takes them back before.

use std::ffi::OsStr;

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
