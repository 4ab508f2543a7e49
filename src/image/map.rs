//! Where the bytes of a disk lie: ranges, in the order of the disk. Pure; who walks is `vdisk::ranges`.

use std::path::PathBuf;

/// A part of the disk that lies in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where it is.
    pub at: At,
}

/// Where a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// No level maps it: it reads as zero.
    Nowhere,
    /// In the file of `level` (0 = base), from byte `offset` on; where `hole`, the file has a hole there and it reads as
    /// zero.
    File {
        /// Number of the level; 0 = base.
        level: u16,
        /// Byte position in the level's file.
        offset: u64,
        /// The host keeps nothing for it.
        hole: bool,
    },
    /// The entry contradicts the format or the file's length; reading it is an error.
    Damaged,
}

/// One level of what is mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapLevel {
    /// Its file.
    pub path: PathBuf,
    /// The file's length in bytes.
    pub length: u64,
}

/// A piece of a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// The levels, base first.
    pub levels: Vec<MapLevel>,
    /// Disk size in bytes.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Ranges without a gap, from where the piece was asked for.
    pub ranges: Vec<Range>,
    /// Where the next piece begins; the disk's size at its end.
    pub next: u64,
}

impl Piece {
    /// True when both name the same files, so that the level numbers of one are those of the other.
    pub fn same_levels(&self, other: &Piece) -> bool {
        let paths = |piece: &Piece| piece.levels.iter().map(|level| level.path.clone()).collect::<Vec<_>>();
        paths(self) == paths(other)
    }
}

impl Range {
    /// First byte behind it.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// True when `next`, which begins where this ends, goes on in the same place.
    fn goes_on(&self, next: &Range) -> bool {
        match (self.at, next.at) {
            (At::Nowhere, At::Nowhere) | (At::Damaged, At::Damaged) => true,
            (At::File { level, offset, hole }, At::File { level: l, offset: o, hole: h }) => {
                level == l && hole == h && offset + self.length == o
            }
            _ => false,
        }
    }
}

/// Joins neighbours that lie in one piece. Holds one range back.
#[derive(Debug, Default)]
pub struct Joiner(Option<Range>);

impl Joiner {
    /// Takes the next range, and gives one back that has ended.
    pub fn push(&mut self, range: Range) -> Option<Range> {
        match &mut self.0 {
            Some(last) if last.goes_on(&range) => {
                last.length += range.length;
                None
            }
            _ => self.0.replace(range),
        }
    }

    /// The last one.
    pub fn end(self) -> Option<Range> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(ranges: &[Range]) -> Vec<Range> {
        let mut joiner = Joiner::default();
        let mut all: Vec<Range> = ranges.iter().filter_map(|range| joiner.push(*range)).collect();
        all.extend(joiner.end());
        all
    }

    fn range(start: u64, length: u64, at: At) -> Range {
        Range { start, length, at }
    }

    #[test]
    fn neighbours_in_one_piece_are_joined_and_others_are_not() {
        let file = |level, offset, hole| At::File { level, offset, hole };
        let apart = [
            range(0, 10, file(0, 100, false)),
            range(10, 10, file(0, 120, false)),
            range(20, 10, file(1, 130, false)),
            range(30, 10, file(1, 140, true)),
            range(40, 10, At::Nowhere),
            range(50, 10, At::Damaged),
        ];
        assert_eq!(joined(&apart), apart);
        let whole = [range(0, 10, file(0, 100, false)), range(10, 5, file(0, 110, false))];
        assert_eq!(joined(&whole), [range(0, 15, file(0, 100, false))]);
        let holes = [range(0, 10, At::Nowhere), range(10, 5, At::Nowhere), range(15, 1, At::Nowhere)];
        assert_eq!(joined(&holes), [range(0, 16, At::Nowhere)]);
        assert_eq!(joined(&[]), []);
    }
}
