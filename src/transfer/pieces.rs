//! A disk in pieces: where data is, what of it is zero, and several hands that work on it.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::FlatDisk;
use crate::error::Result;
use crate::format::stream::PIECE;
use crate::progress::Progress;
use crate::sync::plain::lock;

/// Threads that copy: one waits for the host while another compares and checksums; more than the host's queue of a disk
/// wants would only compete with its other users.
pub(super) const HANDS: usize = 4;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskPiece {
    /// At most [`PIECE`] bytes that may hold data: offset and length in bytes.
    Data(u64, usize),
    /// Nothing but zeroes: offset and length in bytes.
    Hole(u64, u64),
}

/// The pieces of some ranges of a disk, in order.
pub struct DiskPieces<'a> {
    disk: &'a dyn FlatDisk,
    /// Begin and length in bytes, ascending; those still to come.
    ranges: std::slice::Iter<'a, (u64, u64)>,
    /// What is left of the one that was begun.
    left: Range<u64>,
    /// Up to here there is data.
    data_end: u64,
}

impl<'a> DiskPieces<'a> {
    /// Of `ranges` (begin and length in bytes, ascending).
    pub fn new(disk: &'a dyn FlatDisk, ranges: &'a [(u64, u64)]) -> DiskPieces<'a> {
        DiskPieces { disk, ranges: ranges.iter(), left: 0..0, data_end: 0 }
    }

    fn step(&mut self) -> Result<Option<DiskPiece>> {
        while self.left.is_empty() {
            let Some((begin, len)) = self.ranges.next() else { return Ok(None) };
            self.left = *begin..(begin + len).min(self.disk.size());
            self.data_end = 0;
        }
        let (at, end) = (self.left.start, self.left.end);
        if at >= self.data_end {
            let (begin, data_end) = self.disk.data(at)?.unwrap_or((end, end));
            self.data_end = data_end;
            if begin > at {
                let hole = begin.min(end);
                self.left.start = hole;
                // Looked for anew behind a hole that ends with the range.
                self.data_end = if begin < end { data_end } else { 0 };
                return Ok(Some(DiskPiece::Hole(at, hole - at)));
            }
        }
        // On a grid, so that a piece lies in as few clusters as can be.
        let grid = (at / PIECE as u64 + 1) * PIECE as u64;
        let next = grid.min(self.data_end).min(end);
        self.left.start = next;
        Ok(Some(DiskPiece::Data(at, (next - at) as usize)))
    }
}

impl Iterator for DiskPieces<'_> {
    type Item = Result<DiskPiece>;

    fn next(&mut self) -> Option<Result<DiskPiece>> {
        self.step().transpose()
    }
}

/// The runs of `bytes` that are all zero or not, cut at multiples of `grain` bytes: offset inside, and whether it is zero.
pub fn runs(bytes: &[u8], grain: usize) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    for part in bytes.chunks(grain) {
        let zero = is_zero(part);
        match runs.last_mut() {
            Some((range, same)) if *same == zero => range.end += part.len(),
            _ => runs.push((at..at + part.len(), zero)),
        }
        at += part.len();
    }
    runs
}

/// True when there is nothing but zeroes.
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        // Equal to itself one byte on: a comparison that memcmp does at full speed.
        [0, rest @ ..] => rest == &bytes[..bytes.len() - 1],
        [] => true,
        _ => false,
    }
}

/// Copies pieces of `ranges` by several threads: `each` hears offset and bytes of what may hold data, in any order. The
/// first failure, or a cancel, ends all.
pub fn copy(
    disk: &dyn FlatDisk,
    ranges: &[(u64, u64)],
    progress: &Progress,
    each: &(dyn Fn(u64, &[u8]) -> Result<()> + Sync),
) -> Result<()> {
    copy_and_clear(disk, ranges, progress, each, &|_, _| Ok(()))
}

/// The same, where something may be already: `hole` hears offset and length of what is known to be zero.
pub fn copy_and_clear(
    disk: &dyn FlatDisk,
    ranges: &[(u64, u64)],
    progress: &Progress,
    each: &(dyn Fn(u64, &[u8]) -> Result<()> + Sync),
    hole: &(dyn Fn(u64, u64) -> Result<()> + Sync),
) -> Result<()> {
    let pieces = Mutex::new(DiskPieces::new(disk, ranges));
    let failed = AtomicBool::new(false);
    let work = || -> Result<()> {
        let mut buf = vec![0; PIECE];
        while !failed.load(Ordering::Relaxed) {
            progress.check()?;
            // A statement of its own, so that the lock ends before the piece is copied.
            let piece = lock(&pieces).next();
            match piece {
                None => break,
                Some(piece) => match piece? {
                    DiskPiece::Hole(offset, len) => {
                        hole(offset, len)?;
                        progress.skip(len);
                    }
                    DiskPiece::Data(offset, len) => {
                        disk.read(offset, &mut buf[..len])?;
                        each(offset, &buf[..len])?;
                        progress.add(len as u64);
                    }
                },
            }
        }
        Ok(())
    };
    let hand = || {
        let result = work();
        if result.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        result
    };
    std::thread::scope(|scope| {
        // With fewer threads than that it takes longer, and with this one alone it ends, too.
        let more = || std::thread::Builder::new().name("ploopfs/copy".into()).spawn_scoped(scope, hand);
        let hands: Vec<_> = (1..HANDS).map_while(|_| more().ok()).collect();
        let own = hand();
        let others = hands.into_iter().map(|hand| {
            hand.join().unwrap_or_else(|_| {
                Err(crate::error::Error::new(crate::error::Kind::Io, "a thread that copied panicked"))
            })
        });
        others.fold(own, |first, other| first.and(other))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// Data in these ranges.
    struct Spots(u64, Vec<(u64, u64)>);

    impl FlatDisk for Spots {
        fn size(&self) -> u64 {
            self.0
        }

        fn read(&self, _: u64, buf: &mut [u8]) -> Result<()> {
            buf.fill(1);
            Ok(())
        }

        fn data(&self, from: u64) -> Result<Option<(u64, u64)>> {
            Ok(self.1.iter().find(|(_, end)| *end > from).map(|(begin, end)| ((*begin).max(from), *end)))
        }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_pieces_of_a_range_cover_it_once_and_lie_on_the_grid() {
        let disk =
            Spots(10 * MIB + 5, vec![(MIB / 2, 2 * MIB), (3 * MIB, 3 * MIB + 1), (10 * MIB, 10 * MIB + 5)]);
        let ranges = [(0, 4 * MIB), (5 * MIB, MIB), (9 * MIB + 7, 3 * MIB)];
        let pieces: Vec<DiskPiece> = DiskPieces::new(&disk, &ranges).map(|p| p.expect("readable")).collect();
        let (half, one) = (MIB / 2, PIECE);
        let expected = [
            DiskPiece::Hole(0, half),
            DiskPiece::Data(half, one / 2),
            DiskPiece::Data(MIB, one),
            DiskPiece::Hole(2 * MIB, MIB),
            DiskPiece::Data(3 * MIB, 1),
            DiskPiece::Hole(3 * MIB + 1, MIB - 1),
            DiskPiece::Hole(5 * MIB, MIB),
            DiskPiece::Hole(9 * MIB + 7, MIB - 7),
            DiskPiece::Data(10 * MIB, 5),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn zeroes_are_told_from_data() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        assert!(!is_zero(&[1]) && !is_zero(&[1; 4096]));
        for at in [0, 1, 4094, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
        let bytes = [&[0; 20][..], &[1; 5], &[0; 9]].concat();
        assert_eq!(runs(&bytes, 10), [(0..20, true), (20..30, false), (30..34, true)]);
    }

    #[test]
    fn several_hands_copy_every_byte_once_and_a_failure_ends_them() {
        let disk = Spots(100 * MIB, vec![(0, 30 * MIB), (50 * MIB, 80 * MIB)]);
        let (sum, progress) = (AtomicU64::new(0), Progress::new());
        let each = |_: u64, bytes: &[u8]| {
            sum.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Ok(())
        };
        copy(&disk, &[(0, 100 * MIB)], &progress, &each).expect("copied");
        assert_eq!((sum.load(Ordering::Relaxed), progress.so_far().0), (60 * MIB, 100 * MIB));
        let fails = |_: u64, _: &[u8]| Err(crate::error::Error::new(crate::error::Kind::NoSpace, "full"));
        let e = copy(&disk, &[(0, 100 * MIB)], &Progress::new(), &fails).expect_err("full");
        assert_eq!(e.kind(), crate::error::Kind::NoSpace);
    }
}
