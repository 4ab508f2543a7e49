//! A map that fits on a screen: the disk in some hundred cells, each file in some dozen. However large the disk, the memory
//! is that of the cells.

use super::source::MapSource;
use crate::image::map::{At, Range};

/// Cells of the disk: 64 columns, and 12 rows, which leave room for the rest in 24 lines.
pub(super) const COLUMNS: usize = 64;
/// Rows of the disk, at most.
pub(super) const ROWS: usize = 12;
/// Cells of a file.
const FILE_CELLS: usize = 64;

/// What a cell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CellLook {
    /// No level has anything.
    Nothing,
    /// Mapped, but a hole of the file.
    Hole,
    /// Most of what is there lies in this level.
    Level(u16),
    /// Something here is damaged.
    Damaged,
}

/// What one level has of the disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Share {
    /// Bytes that the guest finds there.
    pub data: u64,
    /// Bytes that read as zero because the file has a hole there.
    pub holes: u64,
    /// How often the disk, read from front to back, jumps in the file, and once for the beginning.
    pub pieces: u64,
    /// End of the last range in the file.
    last: Option<u64>,
    /// The file from front to back: the byte of the disk that most of the cell holds, and how many bytes those are.
    file: Vec<Option<(u64, u64)>>,
    /// Bytes of the file that a cell of it stands for.
    width: u64,
}

/// A map in cells.
pub(super) struct Drawing {
    /// Disk size in bytes.
    pub size: u64,
    /// Bytes of the disk that a cell stands for.
    pub width: u64,
    /// By level.
    pub shares: Vec<Share>,
    /// Bytes that nothing maps.
    pub nothing: u64,
    /// Bytes that cannot be read.
    pub damaged: u64,
    /// Bytes in each cell by what they are; few kinds meet in one.
    cells: Vec<Vec<(CellLook, u64)>>,
}

impl Drawing {
    /// Of nothing yet.
    pub(super) fn new(source: &MapSource) -> Drawing {
        let lengths: Vec<u64> = source.levels().iter().map(|level| level.length).collect();
        Drawing::of(source.size(), source.cluster(), &lengths)
    }

    fn of(size: u64, cluster: u64, lengths: &[u64]) -> Drawing {
        let share = |length: &u64| {
            let width = length.div_ceil(FILE_CELLS as u64).max(1);
            Share { width, file: vec![None; FILE_CELLS], ..Share::default() }
        };
        let cluster = cluster.max(1);
        let width = size.div_ceil((COLUMNS * ROWS) as u64).div_ceil(cluster).max(1).saturating_mul(cluster);
        Drawing {
            size,
            width,
            shares: lengths.iter().map(share).collect(),
            nothing: 0,
            damaged: 0,
            cells: vec![Vec::new(); size.div_ceil(width) as usize],
        }
    }

    /// Takes a range in; they come in the order of the disk.
    pub(super) fn add(&mut self, range: &Range) {
        let look = match range.at {
            At::Nowhere => CellLook::Nothing,
            At::Damaged => CellLook::Damaged,
            At::File { hole: true, .. } => CellLook::Hole,
            At::File { level, .. } => CellLook::Level(level),
        };
        match range.at {
            At::Nowhere => self.nothing += range.length,
            At::Damaged => self.damaged += range.length,
            At::File { level, offset, hole } => {
                if let Some(share) = self.shares.get_mut(usize::from(level)) {
                    share.add(range, offset, hole);
                }
            }
        }
        let mut at = range.start;
        while at < range.end() {
            let index = (at / self.width) as usize;
            let end = (at - at % self.width).saturating_add(self.width).min(range.end());
            let Some(cell) = self.cells.get_mut(index) else { return };
            match cell.iter_mut().find(|(known, _)| *known == look) {
                Some((_, bytes)) => *bytes += end - at,
                None => cell.push((look, end - at)),
            }
            at = end;
        }
    }

    /// What each cell shows, in the order of the disk.
    pub(super) fn looks(&self) -> impl Iterator<Item = CellLook> {
        self.cells.iter().map(|cell| {
            // Damage is never hidden by what is beside it, and data not by the holes around it.
            let rank = |look: &CellLook| match look {
                CellLook::Damaged => 3,
                CellLook::Level(_) => 2,
                CellLook::Hole => 1,
                CellLook::Nothing => 0,
            };
            let most = cell.iter().max_by_key(|(look, bytes)| (rank(look), *bytes));
            most.map_or(CellLook::Nothing, |(look, _)| *look)
        })
    }
}

impl Share {
    fn add(&mut self, range: &Range, offset: u64, hole: bool) {
        if self.last != Some(offset) {
            self.pieces += 1;
        }
        self.last = Some(offset + range.length);
        if hole {
            self.holes += range.length;
            return;
        }
        self.data += range.length;
        let end = offset + range.length;
        let mut at = offset;
        while at < end {
            let stop = (at - at % self.width).saturating_add(self.width).min(end);
            // The file may have grown since its length was asked.
            let index = ((at / self.width) as usize).min(self.file.len() - 1);
            let (bytes, disk) = (stop - at, range.start + (at - offset));
            if self.file[index].is_none_or(|(_, most)| bytes > most) {
                self.file[index] = Some((disk, bytes));
            }
            at = stop;
        }
    }

    /// Which byte of the disk each cell of the file holds, front to back; None: nothing of this disk.
    pub(super) fn file(&self) -> impl Iterator<Item = Option<u64>> {
        self.file.iter().map(|cell| cell.map(|(disk, _)| disk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn data(start: u64, length: u64, level: u16, offset: u64) -> Range {
        Range { start, length, at: At::File { level, offset, hole: false } }
    }

    #[test]
    fn a_small_disk_has_a_cell_for_each_cluster_and_a_large_one_fits_all_the_same() {
        assert_eq!(Drawing::of(10 * MIB, MIB, &[]).looks().count(), 10);
        for size in [768 * MIB, 769 * MIB, 1 << 40, 16 << 40, 8 << 60] {
            let drawing = Drawing::of(size, MIB, &[]);
            let cells = drawing.looks().count();
            assert!((1..=COLUMNS * ROWS).contains(&cells), "{size}: {cells}");
            assert!(drawing.width.is_multiple_of(MIB));
        }
        assert_eq!(Drawing::of(0, MIB, &[0]).looks().count(), 0);
    }

    #[test]
    fn a_cell_shows_damage_before_data_and_data_before_holes() {
        let mut drawing = Drawing::of(768 * 4 * MIB, MIB, &[MIB, MIB]);
        drawing.add(&Range { start: 0, length: 3 * MIB, at: At::Nowhere });
        drawing.add(&data(3 * MIB, MIB, 1, 0));
        drawing.add(&data(4 * MIB, MIB, 0, 0));
        drawing.add(&data(5 * MIB, 3 * MIB, 1, 5 * MIB));
        drawing.add(&data(8 * MIB, 3 * MIB, 1, 8 * MIB));
        drawing.add(&Range { start: 11 * MIB, length: MIB, at: At::Damaged });
        let looks: Vec<CellLook> = drawing.looks().take(4).collect();
        assert_eq!(looks, [CellLook::Level(1), CellLook::Level(1), CellLook::Damaged, CellLook::Nothing]);
        assert_eq!((drawing.nothing, drawing.damaged), (3 * MIB, MIB));
        assert_eq!((drawing.shares[1].data, drawing.shares[1].pieces), (7 * MIB, 2));
    }

    #[test]
    fn a_file_in_order_is_one_piece_and_each_jump_is_one_more() {
        let mut drawing = Drawing::of(64 * MIB, MIB, &[65 * MIB]);
        drawing.add(&data(0, 2 * MIB, 0, MIB));
        drawing.add(&Range { start: 2 * MIB, length: MIB, at: At::Nowhere });
        drawing.add(&data(3 * MIB, MIB, 0, 3 * MIB));
        assert_eq!(drawing.shares[0].pieces, 1, "a hole of the disk is no jump in the file");
        drawing.add(&data(4 * MIB, MIB, 0, 9 * MIB));
        drawing.add(&data(5 * MIB, MIB, 0, 4 * MIB));
        assert_eq!(drawing.shares[0].pieces, 3);
    }
}
