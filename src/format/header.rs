//! The 64-byte header, v1 and v2 (docs/format.md#header). What follows from it is its [`Geometry`].

use std::fmt;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use super::geometry::{Geometry, HEADER_BYTES, SECTOR, Version};

/// "Opened for writing, or not closed cleanly."
pub const IN_USE: u32 = 0x746F_6E59;
/// "Closed cleanly by 2.1 software": the format extension may be trusted.
pub const CLOSED_V21: u32 = 0x312e_3276;
/// Closed cleanly by all other writers; what we write.
pub const CLOSED: u32 = 0;
/// Flag: empty, nothing written. Never trusted (docs/format.md#flags).
pub const FLAG_EMPTY: u32 = 1;
/// Flag: a version conversion was interrupted; such a file is not opened.
pub const FLAG_CONVERSION: u32 = 2;

const MAGIC_V1: &[u8; 16] = b"WithoutFreeSpace";
const MAGIC_V2: &[u8; 16] = b"WithouFreSpacExt";
/// m_Type: the only legal value.
pub(crate) const TYPE: u32 = 2;
/// ploop's limit for the cluster, in sectors: 64 MiB. QEMU takes up to 2 GiB, but with 2^32 such clusters a file is longer
/// than any file can be, and a position takes more bits than a cached place has for it. No tool makes such images.
pub(crate) const MAX_CLUSTER_SECTORS: u32 = 64 << 11;
/// QEMU's limit for the number of BAT entries ("Catalog too large").
pub(crate) const MAX_ENTRIES: u32 = i32::MAX as u32 / 4;

/// A field that cannot be: its name, its value, where it stands, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadField {
    /// The field's name in docs/format.md#header.
    pub field: &'static str,
    /// The value found.
    pub value: u64,
    /// Byte offset in the file.
    pub offset: u64,
    /// Why it cannot be.
    pub reason: String,
}

impl fmt::Display for BadField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:#x} at byte {}: {}", self.field, self.value, self.offset, self.reason)
    }
}

/// The header as it lies on disk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: [u8; 16],
    kind: U32,
    heads: U32,
    cylinders: U32,
    cluster_sectors: U32,
    entries: U32,
    disk_sectors: U64,
    in_use: U32,
    first_block: U32,
    flags: U32,
    extension: U64,
}

/// The header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// v1 or v2.
    pub version: Version,
    /// CHS heads, informative.
    pub heads: u32,
    /// CHS cylinders, informative.
    pub cylinders: u32,
    /// Cluster size in sectors.
    pub cluster_sectors: u32,
    /// Number of BAT entries.
    pub entries: u32,
    /// Disk size in sectors.
    pub disk_sectors: u64,
    /// [`IN_USE`], [`CLOSED`], [`CLOSED_V21`], or something odd that counts as closed.
    pub in_use: u32,
    /// First data block in sectors, as written (a v1 file may say 0).
    pub first_block: u32,
    /// m_Flags.
    pub flags: u32,
    /// Format extension in sectors; 0 = none. May dangle (docs/format.md#format-extension).
    pub extension: u64,
}

/// Heads and cylinders as ploop computes them; no reader uses them (docs/format.md#sizes).
pub(crate) fn chs(disk_sectors: u64) -> (u32, u32) {
    let (heads, cylinders) = if disk_sectors > 1_032_192 && disk_sectors < 16_777_216 {
        (16, disk_sectors / 1008)
    } else {
        let divides = |of: u64| move |by: &u64| of.is_multiple_of(*by);
        let per_track = [63, 32, 16, 8].into_iter().find(divides(disk_sectors));
        let heads = per_track.and_then(|s| [16, 8, 4, 2].into_iter().find(divides(disk_sectors / s)));
        match (per_track, heads) {
            (Some(sectors), Some(heads)) => (heads as u32, disk_sectors / sectors / heads),
            _ => (1, disk_sectors),
        }
    };
    (heads, u32::try_from(cylinders).unwrap_or(u32::MAX))
}

/// True for a file that begins like an image of this format.
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC_V1) || bytes.starts_with(MAGIC_V2)
}

impl Header {
    /// Decodes and checks the first 64 bytes.
    pub fn parse(bytes: &[u8]) -> Result<Header, BadField> {
        let bad = |field, value: u64, offset, reason: &str| {
            Err(BadField { field, value, offset, reason: reason.into() })
        };
        let Ok((raw, _)) = Raw::ref_from_prefix(bytes) else {
            return bad("header", bytes.len() as u64, 0, "the file is shorter than a header (64 bytes)");
        };
        let version = match &raw.magic {
            m if m == MAGIC_V1 => Version::V1,
            m if m == MAGIC_V2 => Version::V2,
            m => {
                let head = u64::from_le_bytes([m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]]);
                return bad("m_Sig", head, 0, "not a ploop/Parallels image");
            }
        };
        if raw.kind.get() != TYPE {
            return bad("m_Type", raw.kind.get().into(), 16, "must be 2");
        }
        // v1 counts the disk in 32 bits; the upper half is unused there (docs/format.md#header).
        let disk_sectors = match version {
            Version::V1 => raw.disk_sectors.get() & 0xFFFF_FFFF,
            Version::V2 => raw.disk_sectors.get(),
        };
        let cluster = raw.cluster_sectors.get();
        if cluster == 0 || cluster > MAX_CLUSTER_SECTORS {
            return bad(
                "m_Sectors",
                cluster.into(),
                28,
                "the cluster size must be 1 to 131072 sectors (64 MiB)",
            );
        }
        let entries = raw.entries.get();
        if entries > MAX_ENTRIES {
            return bad("m_Size", entries.into(), 32, "the BAT is too large");
        }
        if u64::from(entries) * u64::from(cluster) < disk_sectors {
            return bad("m_Size", entries.into(), 32, "the BAT is too short for the disk's size");
        }
        if raw.flags.get() != u32::MAX && raw.flags.get() & FLAG_CONVERSION != 0 {
            return bad(
                "m_Flags",
                raw.flags.get().into(),
                52,
                "a version conversion was interrupted; finish it with ploop",
            );
        }
        let header = Header {
            version,
            heads: raw.heads.get(),
            cylinders: raw.cylinders.get(),
            cluster_sectors: cluster,
            entries,
            disk_sectors,
            in_use: raw.in_use.get(),
            first_block: raw.first_block.get(),
            flags: raw.flags.get(),
            extension: raw.extension.get(),
        };
        let first = u64::from(header.first_block) * SECTOR;
        let least = header.least_first_block();
        if first < least && !(version == Version::V1 && first == 0) {
            return bad(
                "m_FirstBlockOffset",
                header.first_block.into(),
                48,
                "the first data block lies inside the BAT",
            );
        }
        let geometry = header.geometry();
        if geometry.entry(geometry.first).is_none() {
            let why = "the first data block lies where no BAT entry can point to";
            return bad("m_FirstBlockOffset", header.first_block.into(), 48, why);
        }
        Ok(header)
    }

    /// The header of a new, empty image that reads as `disk_bytes` zeroes: first block exactly where the kernel
    /// target demands it, flag Empty, closed. The disk is rounded up to a sector, not to a cluster.
    pub fn new(version: Version, disk_bytes: u64, cluster_bytes: u64) -> Result<Header, BadField> {
        let bad = |field, value, offset, reason: &str| {
            Err(BadField { field, value, offset, reason: reason.into() })
        };
        let cluster = cluster_bytes / SECTOR;
        if !cluster_bytes.is_multiple_of(SECTOR) || cluster == 0 || cluster > u64::from(MAX_CLUSTER_SECTORS) {
            return bad(
                "m_Sectors",
                cluster_bytes,
                28,
                "the cluster size must be 1 to 131072 whole sectors (64 MiB)",
            );
        }
        let disk_sectors = disk_bytes.div_ceil(SECTOR);
        if version == Version::V1 && disk_sectors > u64::from(u32::MAX) {
            return bad("m_SizeInSectors", disk_sectors, 36, "a v1 disk ends at 2 TiB");
        }
        let entries = disk_sectors.div_ceil(cluster);
        if entries > u64::from(MAX_ENTRIES) {
            return bad(
                "m_Size",
                entries,
                32,
                "the disk needs more clusters than the format has; use larger ones",
            );
        }
        let (heads, cylinders) = chs(disk_sectors);
        let first = (HEADER_BYTES + 4 * entries).next_multiple_of(cluster_bytes);
        Ok(Header {
            version,
            heads,
            cylinders,
            // Both fit: compared with 32-bit limits above.
            cluster_sectors: cluster as u32,
            entries: entries as u32,
            disk_sectors,
            in_use: CLOSED,
            // At most 2 GiB of BAT and 2 GiB of cluster: below 2^32 sectors.
            first_block: (first / SECTOR) as u32,
            flags: FLAG_EMPTY,
            extension: 0,
        })
    }

    /// This header for a disk of `disk_bytes`, which is not smaller: the first data block moves up by whole clusters,
    /// as far as the longer BAT needs; everything else stays.
    pub fn grown(&self, disk_bytes: u64) -> Result<Header, BadField> {
        let old = self.geometry();
        let fresh = Header::new(self.version, disk_bytes, old.cluster)?;
        let entries = fresh.entries.max(self.entries);
        let bat_end = HEADER_BYTES + 4 * u64::from(entries);
        let first = old.first + bat_end.saturating_sub(old.first).next_multiple_of(old.cluster);
        Ok(Header {
            heads: fresh.heads,
            cylinders: fresh.cylinders,
            entries,
            disk_sectors: fresh.disk_sectors,
            first_block: (first / SECTOR) as u32,
            ..*self
        })
    }

    /// The 64 bytes on disk.
    pub fn encode(&self) -> [u8; 64] {
        let magic = match self.version {
            Version::V1 => *MAGIC_V1,
            Version::V2 => *MAGIC_V2,
        };
        let raw = Raw {
            magic,
            kind: TYPE.into(),
            heads: self.heads.into(),
            cylinders: self.cylinders.into(),
            cluster_sectors: self.cluster_sectors.into(),
            entries: self.entries.into(),
            disk_sectors: self.disk_sectors.into(),
            in_use: self.in_use.into(),
            first_block: self.first_block.into(),
            flags: self.flags.into(),
            extension: self.extension.into(),
        };
        zerocopy::transmute!(raw)
    }

    /// The fields as they stand, whatever they say; None where there are no 64 bytes. In front, what only a legal magic
    /// says (else the header counts as v2), and the type.
    pub(crate) fn unchecked(bytes: &[u8]) -> Option<(Option<Version>, u32, Header)> {
        let (raw, _) = Raw::ref_from_prefix(bytes).ok()?;
        let version = match &raw.magic {
            m if m == MAGIC_V1 => Some(Version::V1),
            m if m == MAGIC_V2 => Some(Version::V2),
            _ => None,
        };
        let header = Header {
            version: version.unwrap_or(Version::V2),
            heads: raw.heads.get(),
            cylinders: raw.cylinders.get(),
            cluster_sectors: raw.cluster_sectors.get(),
            entries: raw.entries.get(),
            disk_sectors: raw.disk_sectors.get(),
            in_use: raw.in_use.get(),
            first_block: raw.first_block.get(),
            flags: raw.flags.get(),
            extension: raw.extension.get(),
        };
        Some((version, raw.kind.get(), header))
    }

    /// Lowest legal byte of the first data block: v2 the BAT's end rounded up to a cluster, v1 to a sector.
    pub(crate) fn least_first_block(&self) -> u64 {
        let end = HEADER_BYTES + 4 * u64::from(self.entries);
        match self.version {
            Version::V1 => end.next_multiple_of(SECTOR),
            Version::V2 => end.next_multiple_of(u64::from(self.cluster_sectors) * SECTOR),
        }
    }

    /// The geometry of a file with this header.
    pub fn geometry(&self) -> Geometry {
        let cluster = u64::from(self.cluster_sectors) * SECTOR;
        let written = u64::from(self.first_block) * SECTOR;
        let first = match self.version {
            // v1 positions are relative to the first block, wherever it is; 0 means "right behind the BAT".
            Version::V1 if written == 0 => self.least_first_block(),
            Version::V1 => written,
            // v2 positions are multiples of the cluster from the file's start. QEMU 10.0.2 writes a value that is
            // none where the cluster is no power of two (65 for 63 sectors: its ROUND_UP is for powers of two),
            // and puts data below it. Down is safe: the BAT's end, rounded up, lies at or below the result.
            Version::V2 => written - written % cluster,
        };
        Geometry {
            version: self.version,
            cluster,
            entries: u64::from(self.entries),
            disk: self.disk_sectors * SECTOR,
            first,
        }
    }

    /// This header as the first change leaves it: in use, not empty, and without the extension, whose bitmap that change
    /// makes untrue.
    pub fn marked(&self) -> Header {
        let flags = if self.flags == u32::MAX { 0 } else { self.flags & !FLAG_EMPTY };
        Header { in_use: IN_USE, flags, extension: 0, ..*self }
    }

    /// True when the file was not closed cleanly.
    pub fn is_in_use(&self) -> bool {
        self.in_use == IN_USE
    }
}

#[cfg(test)]
mod tests;
