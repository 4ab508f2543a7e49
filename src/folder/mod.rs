//! The live set: which files of a folder are images, which are open, and who holds them.

use std::sync::Arc;

use crate::io::file::HostFile;
use crate::sync::plain::{lock as locked, read, write};

mod bell;
mod changes;
mod claims;
mod closed;
mod closing;
mod counted;
mod deltas;
mod diff;
mod entry;
mod lease;
mod left;
mod live;
mod looks;
mod manage;
mod mounted;
mod names;
mod origin;
mod passed;
mod place;
mod rights;
mod scan;
mod set;
mod settle;
mod shared;
mod snapshots;
mod stage;
mod status;
mod strand;
mod views;
mod wanted;
mod watch;
mod work;

pub use changes::Announce;
pub use entry::{Attributes, Entry, OpenImage};
pub use place::PRIVATE;
pub use rights::Rights;
pub use set::{Folder, FolderOptions};
pub use shared::FOLDER;
pub use snapshots::Snapshot;
pub use status::ImageStatus;
pub use views::OpenSnapshot;

/// Puts something around an image's file (`mount --fault`).
pub type Wrap = Arc<dyn Fn(Arc<dyn HostFile>) -> Arc<dyn HostFile> + Send + Sync>;
