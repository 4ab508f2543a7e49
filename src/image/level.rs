//! One file of an image's stack, and what kind of file it is.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::format::header::{BadField, Geometry, HEADER_BYTES, Header};
use crate::io::file::{HostFile, read_full};
use crate::sync::Arc;

/// What one level's file is.
#[derive(Clone, Debug)]
pub enum Layout {
    /// A delta of the ploop format.
    Ploop(Header),
    /// Plain bytes; guest byte = file byte.
    Raw,
    /// The same, as the base of an image whose descriptor says by which cluster (in bytes) they are cut: that of every delta
    /// on them.
    Plain {
        /// Bytes.
        cluster: u64,
    },
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
            Layout::Raw | Layout::Plain { .. } => None,
        }
    }

    /// A delta found in use was not closed cleanly: what the page cache has of it may never have reached the disk. It is
    /// dropped before anything is trusted (R7), and the header read again. Only while no other user here writes the
    /// file.
    pub fn distrust(&mut self) -> Result<()> {
        let Layout::Ploop(header) = &mut self.layout else { return Ok(()) };
        if header.is_in_use() {
            let io = |e: std::io::Error, what: &str| Error::io(&e, &self.path, what);
            // Only clean pages can be dropped. A failure is an old one that was never reported: what is read from now
            // on is what the disk has.
            if let Err(e) = self.file.sync_data() {
                log::warn!("{}: an earlier write never reached the disk: {e}", self.path.display());
            }
            self.file.drop_cache().map_err(|e| io(e, "cannot drop the page cache"))?;
            *header = read_header(&*self.file, &self.path)?;
        }
        Ok(())
    }
}

/// Reads the header of a delta, and judges it. The one way to it: who reads it otherwise judges otherwise.
pub fn read_header(file: &dyn HostFile, path: &Path) -> Result<Header> {
    let cannot = |e| Error::io(&e, path, "cannot read the header");
    let mut head = [0; HEADER_BYTES as usize];
    let got = read_full(file, &mut head, 0).map_err(cannot)?;
    let len = file.len().map_err(cannot)?;
    judge_header(&head[..got], len).map_err(|bad| Error::at(Kind::Damaged, path, bad.to_string()))
}

/// The header in the first bytes of a file of `len` bytes: against the format, and against the file, which must reach its
/// first data block.
pub fn judge_header(head: &[u8], len: u64) -> std::result::Result<Header, BadField> {
    let header = Header::parse(head)?;
    let first = header.geometry().first;
    if first > len {
        let reason = format!("the first data block is at byte {first}, but the file ends at byte {len}");
        let value = header.first_block.into();
        return Err(BadField { field: "m_FirstBlockOffset", value, offset: 48, reason });
    }
    Ok(header)
}

/// The cluster by which a raw disk of `size` bytes is cut into pios, and which a delta over it has
/// (docs/format.md#raw-base: the largest of 32 KiB to 1 MiB that divides the size; else 1 MiB with a partial last one).
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
