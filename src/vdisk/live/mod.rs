//! Operations on a live image: snapshot, merge, switch, grow, clone. Each in the same parts: prepare, freeze, swap,
//! thaw, clean up (R8, R9).

pub mod compact;
mod defrag;
#[cfg(test)]
mod failures;
pub mod freeze;
mod grow;
mod judge;
pub mod lower;
pub mod merge;
pub mod order;
mod pull;
pub mod snapshot;
mod survey;
mod work;

pub use judge::judge;
pub use work::{carry_out, carry_out_before_close};

use std::path::PathBuf;

/// What is to be done with an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Freeze what is there as a snapshot; writes go to a new top.
    Snapshot {
        /// Its name; None: named by the time.
        label: Option<String>,
    },
    /// Delete a snapshot: merged into its only child, or later when it has several.
    Delete {
        /// Label or GUID.
        snapshot: String,
    },
    /// Merge a snapshot's data with its only child's, as `Delete` does with a snapshot that was kept.
    Merge {
        /// Label or GUID.
        snapshot: String,
    },
    /// Go back to a snapshot; what came after it in the live disk is dropped.
    Switch {
        /// Label or GUID.
        snapshot: String,
    },
    /// New images with the same content.
    Clone {
        /// Of which snapshot; None: of the live disk.
        snapshot: Option<String>,
        /// Their folders, side by side.
        to: Vec<PathBuf>,
        /// Copy where the host can neither share extents nor link.
        copy: bool,
    },
    /// Go on with what a crash or a cancel left: merge every deleted snapshot that has one child.
    Finish,
    /// Free zero clusters, and make the live disk's file shorter.
    Compact {
        /// Only say what that would gain.
        dry_run: bool,
        /// Put what stays in the order of the disk.
        defrag: bool,
    },
    /// Begin to track which parts of the disk change.
    Track {
        /// Bytes of disk for each bit; None: as fits.
        granularity: Option<u64>,
    },
    /// Track no more.
    Untrack,
    /// Make the disk larger.
    Resize {
        /// The new size in bytes.
        size: u64,
    },
}

impl Work {
    /// True for work that changes nothing: it needs no writable image.
    pub fn only_looks(&self) -> bool {
        matches!(self, Work::Compact { dry_run: true, .. })
    }

    /// True for work that makes a snapshot of the live disk: a single file becomes a folder for it first.
    pub fn needs_folder(&self) -> bool {
        matches!(self, Work::Snapshot { .. } | Work::Clone { snapshot: None, .. })
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The name of what was made.
    pub name: Option<String>,
    /// The disk's new size in bytes.
    pub size: Option<u64>,
    /// What was gained, or would be.
    pub gain: Option<compact::Gain>,
    /// What a person should know.
    pub note: Option<String>,
}
