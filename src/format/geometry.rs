//! Where BAT, clusters and entries lie in a file, in bytes: what follows from a header (docs/format.md#header).

use std::fmt;

/// Bytes of the header; the BAT begins right behind it.
pub const HEADER_BYTES: u64 = 64;
/// Everything on disk counts in sectors of 512 bytes.
pub const SECTOR: u64 = 512;

/// The two on-disk generations; they differ in the unit of a BAT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// Entries count sectors.
    V1,
    /// Entries count clusters.
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Version::V1 => "v1",
            Version::V2 => "v2",
        })
    }
}

/// What follows from a header; everything in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// v1 or v2.
    pub version: Version,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Number of BAT entries (may be more than the disk needs).
    pub entries: u64,
    /// Disk size in bytes.
    pub disk: u64,
    /// Position of the first data block in bytes; file cluster 0 of the holes bitmap.
    pub first: u64,
}

impl Geometry {
    /// Number of guest clusters; the last may be partial.
    pub fn clusters(&self) -> u64 {
        self.disk.div_ceil(self.cluster)
    }

    /// First byte behind the BAT.
    pub fn bat_end(&self) -> u64 {
        HEADER_BYTES + 4 * self.entries
    }

    /// The byte position a non-zero BAT entry stands for; None when it lies in the header or off the grid.
    pub fn position(&self, entry: u32) -> Option<u64> {
        let at = match self.version {
            Version::V1 => u64::from(entry) * SECTOR,
            Version::V2 => u64::from(entry) * self.cluster,
        };
        // u32::MAX never stands on disk (docs/format.md#bat-entries), and `entry` has no way back to it.
        let on_grid = at >= self.first && (at - self.first).is_multiple_of(self.cluster);
        (on_grid && entry != u32::MAX).then_some(at)
    }

    /// Bytes of guest cluster `cluster` that the disk has: the last cluster may be partial, and what lies behind the disk's
    /// end need not exist in the file.
    pub fn cluster_len(&self, cluster: u64) -> u64 {
        self.disk.saturating_sub(cluster.saturating_mul(self.cluster)).min(self.cluster)
    }

    /// True when a file of `len` bytes ends where a cluster ends, as every file does that was closed.
    pub fn is_whole(&self, len: u64) -> bool {
        len.checked_sub(self.first).is_some_and(|data| data.is_multiple_of(self.cluster))
    }

    /// The byte position of guest cluster `cluster`, whose entry is not 0, in a file of `len` bytes. None: the entry cannot
    /// be, or the file ends before the cluster does. What a copy that was broken off lacks is lost, and no zeroes; none of
    /// our own crashes leaves it so, since the file is extended before an entry names the place (R2).
    pub fn place(&self, cluster: u64, entry: u32, len: u64) -> Option<u64> {
        self.position(entry).filter(|at| *at < len && at + self.cluster_len(cluster) <= len)
    }

    /// The BAT entry for a byte position; None when the format has no number for it (ENOSPC, never truncated).
    pub fn entry(&self, position: u64) -> Option<u32> {
        let unit = match self.version {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster,
        };
        u32::try_from(position / unit).ok().filter(|e| *e != u32::MAX)
    }

    /// Number of file clusters that the format and the host can address.
    pub fn file_clusters(&self) -> u64 {
        let unit = match self.version {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster,
        };
        // The largest entry is u32::MAX - 1; offsets of a file are signed.
        let last = u64::from(u32::MAX - 1).saturating_mul(unit).min(i64::MAX as u64 - self.cluster);
        last.saturating_sub(self.first) / self.cluster + 1
    }

    /// Number of the file cluster at a byte position that [`position`](Self::position) returned.
    pub fn file_cluster(&self, position: u64) -> u64 {
        (position - self.first) / self.cluster
    }

    /// Byte position of a file cluster.
    pub fn cluster_position(&self, file_cluster: u64) -> u64 {
        self.first + file_cluster * self.cluster
    }
}
