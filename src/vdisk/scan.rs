//! The scan before an image's first write: which file clusters are in use, and whether the BAT can be trusted.
//! Runs outside every lock, in parallel, in pieces: memory is one bit per file cluster, bounded by the file's
//! length, never by a number in the header.

// Not `crate::sync`: rayon's threads are real, whatever a model checker says.
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::alloc::Bits;
use crate::error::{Error, Kind, Result};
use crate::format::header::{Geometry, HEADER_BYTES};
use crate::image::level::Level;
use crate::io::file::read_full;

/// Bytes of BAT per piece: large enough for sequential reads, small enough to spread over threads.
const PIECE: u64 = 1 << 20;

/// A map up to this size is looked through in a level below the top, too, before the first write: that of a disk of 256 GiB
/// in clusters of 1 MiB. It is one read of what the host mostly has in memory.
const SHORT: u64 = 1 << 20;

/// What a scan found. By default: an empty delta.
#[derive(Default)]
pub(super) struct Scan {
    /// File clusters up to the last one in use.
    pub end: u64,
    /// Free file clusters before it; their content is unknown.
    pub free: Bits,
}

impl Scan {
    /// True when no entry names this file cluster.
    pub(super) fn is_free(&self, cluster: u64) -> bool {
        cluster >= self.end || self.free.contains(cluster)
    }

    /// What is free after either of two scans, as long as a power cut may leave what one of them saw.
    pub(super) fn and(&self, other: &Scan) -> Scan {
        let (longer, shorter) = if self.end >= other.end { (self, other) } else { (other, self) };
        let mut free = Bits::default();
        longer.free.iter().filter(|cluster| shorter.is_free(*cluster)).for_each(|cluster| {
            free.insert(cluster);
        });
        Scan { end: longer.end, free }
    }
}

/// Refuses a level below the top whose file ends before or inside a cluster that an entry names: such a file was cut off.
/// Where its map is long, that costs no more than a look at the length: copies end anywhere, but most files that were
/// closed end with a cluster.
pub(super) fn refuse_cut(level: &Level) -> Result<()> {
    let Some(geometry) = level.geometry() else { return Ok(()) };
    let len = level.file.len().map_err(|e| Error::io(&e, &level.path, "cannot read the length"))?;
    if geometry.bat_end() > SHORT && geometry.is_whole(len) {
        Ok(())
    } else {
        scan(level, &geometry).map(drop)
    }
}

/// Scans the BAT of `level`. An entry out of range, off the grid or used twice is an error that names it.
pub(super) fn scan(level: &Level, geometry: &Geometry) -> Result<Scan> {
    let io = |e: std::io::Error, what: &str| Error::io(&e, &level.path, what);
    let len = level.file.len().map_err(|e| io(e, "cannot read the length"))?;
    let bat = geometry.bat_end();
    if len < bat {
        let context = format!("the file ends at byte {len}, inside the BAT, which ends at byte {bat}");
        return Err(Error::at(Kind::Damaged, &level.path, context));
    }
    // The disk's last cluster, which may be partial, may lie only partly in the file: the cut makes it whole.
    // Nor can an entry reach further than the format counts: a sparse file may be as long as 8 EiB.
    let clusters =
        len.saturating_sub(geometry.first).div_ceil(geometry.cluster).min(geometry.file_clusters());
    let used: Vec<AtomicU64> = (0..clusters.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    let pieces = (bat - HEADER_BYTES).div_ceil(PIECE);
    let scan_piece = |piece: u64| {
        let start = HEADER_BYTES + piece * PIECE;
        let want = (bat - start).min(PIECE) as usize;
        let mut bytes = vec![0; want];
        let got = read_full(&*level.file, &mut bytes, start).map_err(|e| io(e, "cannot read the BAT"))?;
        if got < want {
            return Err(Error::at(
                Kind::Damaged,
                &level.path,
                "the file became shorter while it was scanned",
            ));
        }
        for (i, entry) in bytes.chunks_exact(4).enumerate() {
            let entry = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            if entry == 0 {
                continue;
            }
            let at = start + 4 * i as u64;
            let guest = (at - HEADER_BYTES) / 4;
            let damaged = |reason: &str| {
                let context =
                    format!("BAT entry {guest} = {entry:#x} at byte {at}: {reason}; run `ploopfs check`");
                Error::at(Kind::Damaged, &level.path, context)
            };
            let position = geometry
                .position(entry)
                .ok_or_else(|| damaged("points into the header, the BAT, or between clusters"))?;
            let cluster = geometry.file_cluster(position);
            if cluster >= clusters {
                return Err(damaged("points behind the end of the file"));
            }
            if geometry.place(guest, entry, len).is_none() {
                return Err(damaged("the file ends inside its cluster"));
            }
            let bit = 1 << (cluster % 64);
            if used[(cluster / 64) as usize].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
                return Err(damaged("its cluster is used twice"));
            }
        }
        Ok(())
    };
    // Below 256 GiB, with the usual clusters, there is one piece, and threads would only cost.
    let workers = if pieces > 1 { workers() } else { None };
    match workers {
        Some(workers) => workers.install(|| (0..pieces).into_par_iter().try_for_each(scan_piece))?,
        None => (0..pieces).try_for_each(scan_piece)?,
    }
    let used: Vec<u64> = used.into_iter().map(AtomicU64::into_inner).collect();
    Ok(free_before_the_end(&used))
}

/// Threads for the pieces of a large BAT, one for each CPU. None can be had: the pieces are scanned one after the other.
/// rayon's own pool would panic then, at each scan again.
fn workers() -> Option<&'static ThreadPool> {
    static WORKERS: OnceLock<ThreadPool> = OnceLock::new();
    WORKERS.get().or_else(|| {
        match ThreadPoolBuilder::new().thread_name(|number| format!("ploopfs/scan{number}")).build() {
            Ok(workers) => Some(WORKERS.get_or_init(|| workers)),
            Err(e) => {
                log::warn!("no threads for a scan, which takes longer without: {e}");
                None
            }
        }
    })
}

fn free_before_the_end(used: &[u64]) -> Scan {
    let end = used
        .iter()
        .rposition(|w| *w != 0)
        .map_or(0, |i| i as u64 * 64 + 64 - u64::from(used[i].leading_zeros()));
    let mut free = Bits::default();
    for (i, word) in used.iter().enumerate() {
        let mut holes = !word;
        while holes != 0 {
            let n = i as u64 * 64 + u64::from(holes.trailing_zeros());
            if n >= end {
                break;
            }
            free.insert(n);
            holes &= holes - 1;
        }
    }
    Scan { end, free }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_of_two_scans_has_in_use_is_in_use() {
        let both = free_before_the_end(&[0b10011]).and(&free_before_the_end(&[0b101]));
        assert_eq!((both.end, both.free.iter().collect::<Vec<_>>()), (5, vec![3]));
    }

    #[test]
    fn free_clusters_are_those_before_the_last_used_one() {
        let scan = free_before_the_end(&[0b1011, 1]);
        assert_eq!(scan.end, 65);
        assert_eq!(scan.free.len(), 61);
        assert!(scan.free.contains(2) && !scan.free.contains(3) && !scan.free.contains(65));
        assert_eq!(free_before_the_end(&[0, 0]).end, 0);
    }
}
