//! One file of an image's stack, and what kind of file it is.

use std::path::PathBuf;

use crate::format::header::{Geometry, Header};
use crate::io::file::HostFile;
use crate::sync::Arc;

/// What one level's file is.
#[derive(Clone, Debug)]
pub enum Layout {
    /// A delta of the ploop format.
    Ploop(Header),
    /// Plain bytes; guest byte = file byte.
    Raw,
}

/// One level of the stack; 0 is the base.
#[derive(Clone, Debug)]
pub struct Level {
    /// The open file.
    pub file: Arc<dyn HostFile>,
    /// For messages.
    pub path: PathBuf,
    /// Its format.
    pub layout: Layout,
}

impl Level {
    /// The geometry of a delta; None for raw.
    pub fn geometry(&self) -> Option<Geometry> {
        match &self.layout {
            Layout::Ploop(header) => Some(header.geometry()),
            Layout::Raw => None,
        }
    }
}

/// The cluster by which a raw disk of `size` bytes is cut into pios, and which a delta over it has (FORMAT.md 3.9:
/// the largest of 32 KiB to 1 MiB that divides the size; else 1 MiB with a partial last one).
pub fn raw_cluster(size: u64) -> u64 {
    (15..=20).rev().map(|bits| 1 << bits).find(|cluster| size.is_multiple_of(*cluster)).unwrap_or(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_disk_is_cut_by_the_largest_cluster_that_divides_it() {
        assert_eq!(raw_cluster(10 << 20), 1 << 20);
        assert_eq!(raw_cluster((10 << 20) + (64 << 10)), 64 << 10);
        assert_eq!(raw_cluster(3 * 32768), 32768);
        assert_eq!(raw_cluster(1000), 1 << 20);
    }
}
