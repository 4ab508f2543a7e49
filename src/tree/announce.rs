//! Changes of the folder as the kernel knows them: by inode and name.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use super::names::{self, Node};
use crate::folder::Announce;
use crate::fuse::notify::Notifier;

/// How long a command may wait for the kernel to have heard. It takes microseconds, unless the kernel waits for an answer
/// of ours; then what it keeps is old for a second at most.
const SETTLE: Duration = Duration::from_secs(1);

/// Notifies the kernel.
struct Announcer(Notifier);

/// What notifies the kernel through `notifier`.
pub fn announcer(notifier: Notifier) -> Arc<dyn Announce> {
    Arc::new(Announcer(notifier))
}

impl Announce for Announcer {
    fn name(&self, name: &OsStr) {
        self.0.name_changed(Node::Root.ino(), &names::shown(name));
        self.0.name_changed(Node::Snapshots.ino(), name);
    }

    fn disk(&self, id: u64) {
        self.0.attributes_changed(Node::Image(id).ino());
    }

    fn snapshot(&self, id: u64, name: &OsStr) {
        self.0.name_changed(Node::SnapshotFolder(id).ino(), &names::shown(name));
    }

    fn settle(&self) {
        self.0.settle(SETTLE);
    }
}
