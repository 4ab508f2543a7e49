//! The front for library users: a short list, each item with an example, kept stable while the rooms behind it move.
//! Standing above every room, it adds no behaviour of its own: what is refused, locked and synced is decided below.

mod disk;
mod serve;
mod snapshots;

pub use disk::{Disk, create};
pub use serve::{Server, Stopper};
pub use snapshots::{Snapshot, delete_snapshot, diff, snapshot, snapshots};

use std::path::Path;

use crate::disk::find::{Target, find};
use crate::error::Result;

/// What a path names at rest. An image that a mount serves is found by its path in the images folder, and its open says
/// that it is in use.
fn target(path: &Path) -> Result<Target> {
    find(path, &|_| Ok(None))
}
