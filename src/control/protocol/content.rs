//! What is answered about an image's content: snapshots, map, diff, changes. The types here are the protocol's own, as in
//! [`work`](super::work).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::snapshots::SnapshotLine;
use crate::image::diff::{Diff, Side};
use crate::image::map::{At, MapLevel, Piece, Range};
use crate::vdisk::tracking::Changes;

/// [`SnapshotLine`]: one node of the tree of snapshots. Also what `snapshot list --json` and `info --json` print.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotAnswer {
    /// Its label, else its GUID; of the live disk, empty.
    pub name: String,
    /// Its GUID.
    pub guid: String,
    /// GUID of the one it stands on; None for the base.
    pub parent: Option<String>,
    /// When it was taken, in seconds since 1970; None: not known.
    #[serde(default)]
    pub created: Option<i64>,
    /// Space taken on the host by its own file, in bytes.
    pub exclusive: u64,
    /// Space taken by the files below, in bytes.
    pub shared: u64,
    /// The live disk itself.
    pub current: bool,
    /// Deleted, but not merged away yet.
    pub temporary: bool,
}

impl From<SnapshotLine> for SnapshotAnswer {
    fn from(line: SnapshotLine) -> SnapshotAnswer {
        let SnapshotLine { name, guid, parent, created, exclusive, shared, current, temporary } = line;
        SnapshotAnswer { name, guid, parent, created, exclusive, shared, current, temporary }
    }
}

impl From<SnapshotAnswer> for SnapshotLine {
    fn from(line: SnapshotAnswer) -> SnapshotLine {
        let SnapshotAnswer { name, guid, parent, created, exclusive, shared, current, temporary } = line;
        SnapshotLine { name, guid, parent, created, exclusive, shared, current, temporary }
    }
}

/// [`Piece`] of a map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapAnswer {
    /// The levels, base first.
    pub levels: Vec<MapLevelAnswer>,
    /// Disk size in bytes.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Ranges without a gap, from where the piece was asked for.
    pub ranges: Vec<MapRangeAnswer>,
    /// Where the next piece begins; the disk's size at its end.
    pub next: u64,
}

impl From<Piece> for MapAnswer {
    fn from(Piece { levels, size, cluster, ranges, next }: Piece) -> MapAnswer {
        let levels = levels.into_iter().map(MapLevelAnswer::from).collect();
        let ranges = ranges.into_iter().map(MapRangeAnswer::from).collect();
        MapAnswer { levels, size, cluster, ranges, next }
    }
}

impl From<MapAnswer> for Piece {
    fn from(MapAnswer { levels, size, cluster, ranges, next }: MapAnswer) -> Piece {
        let levels = levels.into_iter().map(MapLevel::from).collect();
        let ranges = ranges.into_iter().map(Range::from).collect();
        Piece { levels, size, cluster, ranges, next }
    }
}

/// [`MapLevel`]: one level of what is mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapLevelAnswer {
    /// Its file. JSON is text: bytes of the path that are none have U+FFFD in their place.
    pub path: String,
    /// The file's length in bytes.
    pub length: u64,
}

impl From<MapLevel> for MapLevelAnswer {
    fn from(MapLevel { path, length }: MapLevel) -> MapLevelAnswer {
        MapLevelAnswer { path: path.to_string_lossy().into_owned(), length }
    }
}

impl From<MapLevelAnswer> for MapLevel {
    fn from(MapLevelAnswer { path, length }: MapLevelAnswer) -> MapLevel {
        MapLevel { path: PathBuf::from(path), length }
    }
}

/// [`Range`] of a map: a part of the disk that lies in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRangeAnswer {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where it is.
    pub at: MapAtAnswer,
}

impl From<Range> for MapRangeAnswer {
    fn from(Range { start, length, at }: Range) -> MapRangeAnswer {
        MapRangeAnswer { start, length, at: at.into() }
    }
}

impl From<MapRangeAnswer> for Range {
    fn from(MapRangeAnswer { start, length, at }: MapRangeAnswer) -> Range {
        Range { start, length, at: at.into() }
    }
}

/// [`At`]: where a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MapAtAnswer {
    /// No level maps it: it reads as zero.
    Nowhere,
    /// In a file.
    File {
        /// Number of the level; 0 = base.
        level: u16,
        /// Byte position in the level's file.
        offset: u64,
        /// The host keeps nothing for it: it reads as zero.
        hole: bool,
    },
    /// The entry contradicts the format or the file's length.
    Damaged,
}

impl From<At> for MapAtAnswer {
    fn from(at: At) -> MapAtAnswer {
        match at {
            At::Nowhere => MapAtAnswer::Nowhere,
            At::File { level, offset, hole } => MapAtAnswer::File { level, offset, hole },
            At::Damaged => MapAtAnswer::Damaged,
        }
    }
}

impl From<MapAtAnswer> for At {
    fn from(at: MapAtAnswer) -> At {
        match at {
            MapAtAnswer::Nowhere => At::Nowhere,
            MapAtAnswer::File { level, offset, hole } => At::File { level, offset, hole },
            MapAtAnswer::Damaged => At::Damaged,
        }
    }
}

/// [`Diff`]: the ranges in which two snapshots may differ, or the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffAnswer {
    /// The older one, or what was named first.
    pub from: DiffSideAnswer,
    /// The other one.
    pub to: DiffSideAnswer,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Begin and length in bytes; ascending, none touching the next.
    pub ranges: Vec<(u64, u64)>,
    /// Where to go on, in bytes; None: these are all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

impl From<Diff> for DiffAnswer {
    fn from(Diff { from, to, cluster, ranges, next }: Diff) -> DiffAnswer {
        DiffAnswer { from: from.into(), to: to.into(), cluster, ranges, next }
    }
}

impl From<DiffAnswer> for Diff {
    fn from(DiffAnswer { from, to, cluster, ranges, next }: DiffAnswer) -> Diff {
        Diff { from: from.into(), to: to.into(), cluster, ranges, next }
    }
}

/// [`Side`]: one of the two that are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffSideAnswer {
    /// The snapshot's label, else its GUID; of the live disk, empty.
    pub name: String,
    /// Its GUID.
    pub guid: String,
    /// Disk size in bytes.
    pub size: u64,
}

impl From<Side> for DiffSideAnswer {
    fn from(Side { name, guid, size }: Side) -> DiffSideAnswer {
        DiffSideAnswer { name, guid, size }
    }
}

impl From<DiffSideAnswer> for Side {
    fn from(DiffSideAnswer { name, guid, size }: DiffSideAnswer) -> Side {
        Side { name, guid, size }
    }
}

/// [`Changes`] since the tracking began, or the first part of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangesAnswer {
    /// Names the moment since when; None: the disk is not tracked, and all of it counts as changed.
    pub uuid: Option<String>,
    /// Why it is not tracked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Disk size in bytes.
    pub size: u64,
    /// Bytes of disk for each bit; 0 where it is not tracked.
    pub granularity: u64,
    /// Begin and length in bytes; ascending, none touching the next.
    pub ranges: Vec<(u64, u64)>,
    /// Where to go on, in bytes; None: these are all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

impl From<Changes> for ChangesAnswer {
    fn from(Changes { uuid, reason, size, granularity, ranges, next }: Changes) -> ChangesAnswer {
        ChangesAnswer { uuid, reason, size, granularity, ranges, next }
    }
}

impl From<ChangesAnswer> for Changes {
    fn from(ChangesAnswer { uuid, reason, size, granularity, ranges, next }: ChangesAnswer) -> Changes {
        Changes { uuid, reason, size, granularity, ranges, next }
    }
}
