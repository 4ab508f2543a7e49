//! Which parts of a disk may differ between two snapshots, without reading any data and without any preparation: what
//! a level maps that is not part of both chains was written after the chains parted. What such a level holds may happen
//! to be equal; what no such level maps is equal by construction.

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{HEADER_BYTES, SECTOR};
use crate::image::kind::DESCRIPTOR;
use crate::image::layers::Layers;
use crate::image::level::Level;
use crate::io::file::read_full;

/// Ranges in one answer: some MiB of JSON on the control socket, far below what it takes.
const MAX_RANGES: usize = 100_000;
/// Clusters looked at in one go: 1 MiB of each BAT.
const WINDOW: u64 = 1 << 18;

/// Begin and length in bytes.
pub type ByteRange = (u64, u64);

/// One of the two that are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// The snapshot's label, else its GUID; of the live disk, empty.
    pub name: String,
    /// Its GUID.
    pub guid: String,
    /// Disk size in bytes.
    pub size: u64,
}

/// The ranges that may differ, or the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// The older one, or whatever was named first.
    pub from: Side,
    /// The other one.
    pub to: Side,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// Ascending, none touching the next.
    pub ranges: Vec<ByteRange>,
    /// Where to go on, in bytes; None: these are all. The next range may touch the last one here.
    pub next: Option<u64>,
}

impl Diff {
    /// Asks for part after part.
    pub fn whole(mut part: impl FnMut(u64) -> Result<Diff>) -> Result<Diff> {
        let mut all = part(0)?;
        while let Some(next) = all.next {
            all.append(part(next)?);
        }
        Ok(all)
    }

    /// Takes in what comes behind it.
    pub fn append(&mut self, more: Diff) {
        for (begin, len) in more.ranges {
            match self.ranges.last_mut() {
                Some((last, length)) if *last + *length == begin => *length += len,
                _ => self.ranges.push((begin, len)),
            }
        }
        self.next = more.next;
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, len)| len).sum()
    }
}

/// Compares two snapshots, by label or GUID; `to` None, or the live top's GUID, is the live disk, whose map must be in its
/// file. From byte `start` on, at most `MAX_RANGES`. No operation runs meanwhile, so that no level changes its place.
pub fn diff(layers: &Layers, from: &str, to: Option<&str>, start: u64) -> Result<Diff> {
    let _alone = layers.begin_operation()?;
    let (from, from_name) = find(layers, Some(from))?;
    let (to, to_name) = find(layers, to)?;
    let descriptor = layers.store().descriptor().clone();
    let bad = |bad: crate::format::descriptor::BadXml| {
        Error::at(Kind::Damaged, layers.store().path().join(DESCRIPTOR), bad.to_string())
    };
    let guids = [descriptor.chain(from).map_err(bad)?, descriptor.chain(to).map_err(bad)?];
    let common = guids[0].iter().zip(&guids[1]).take_while(|(a, b)| a == b).count();
    let chains = [layers.chain(from)?, layers.chain(to)?];
    let sizes = [size(&chains[0])?, size(&chains[1])?];
    let apart: Vec<&Level> = chains.iter().flat_map(|chain| &chain[common..]).collect();
    let cluster = u64::from(descriptor.cluster_sectors) * SECTOR;
    let (ranges, next) = Search { levels: &apart, cluster, sizes }.from(start, MAX_RANGES)?;
    let side = |name, guid: Guid, size| Side { name, guid: guid.to_string(), size };
    Ok(Diff { from: side(from_name, from, sizes[0]), to: side(to_name, to, sizes[1]), cluster, ranges, next })
}

/// The snapshot of this name and what it is called; None is the live disk.
fn find(layers: &Layers, name: Option<&str>) -> Result<(Guid, String)> {
    let store = layers.store();
    let top = store.descriptor().top;
    match name {
        Some(name) if Guid::parse(name) != Some(top) => {
            let guid = store.find_snapshot(name)?;
            Ok((guid, store.labels().name(guid)))
        }
        _ => Ok((top, String::new())),
    }
}

/// Size in bytes of the disk that a chain shows. A raw file alone is as long as the disk was then, whatever it is now.
pub fn size(chain: &[Level]) -> Result<u64> {
    let Some(top) = chain.last() else { return Ok(0) };
    match top.geometry() {
        Some(geometry) => Ok(geometry.disk),
        None => top.file.len().map_err(|e| Error::io(&e, &top.path, "cannot read the length")),
    }
}

struct Search<'a> {
    /// Those that are not part of both chains.
    levels: &'a [&'a Level],
    cluster: u64,
    sizes: [u64; 2],
}

impl Search<'_> {
    /// The ranges from byte `start` on, at most `limit`, and where to go on.
    fn from(&self, start: u64, limit: usize) -> Result<(Vec<ByteRange>, Option<u64>)> {
        let [shorter, longer] = [self.sizes[0].min(self.sizes[1]), self.sizes[0].max(self.sizes[1])];
        // One of the two ends here. What lies behind is only in the other one; the cluster that holds the end counts to
        // it, since what the shorter disk has behind its end is not known to be zero.
        let tail = if shorter == longer { u64::MAX } else { shorter / self.cluster };
        let clusters = longer.div_ceil(self.cluster);
        let mut ranges: Vec<ByteRange> = Vec::new();
        let mut window = start / self.cluster;
        while window < clusters {
            let end = (window + WINDOW).min(clusters);
            let mapped = self.mapped(window, end)?;
            for (cluster, mapped) in (window..end).zip(mapped) {
                if !mapped && cluster < tail {
                    continue;
                }
                let begin = cluster * self.cluster;
                let len = self.cluster.min(longer - begin);
                let full = ranges.len() == limit;
                match ranges.last_mut() {
                    Some((last, length)) if *last + *length == begin => *length += len,
                    _ if full => return Ok((ranges, Some(begin))),
                    _ => ranges.push((begin, len)),
                }
            }
            window = end;
        }
        Ok((ranges, None))
    }

    /// For each of these clusters, whether a level maps it. An entry is not judged: whatever is not 0 was written.
    fn mapped(&self, begin: u64, end: u64) -> Result<Vec<bool>> {
        let mut mapped = vec![false; (end - begin) as usize];
        for level in self.levels {
            let cannot = |e| Error::io(&e, &level.path, "cannot read the BAT");
            let Some(geometry) = level.geometry() else {
                // Raw bytes are all there, as far as the file goes.
                let last = level.file.len().map_err(cannot)?.div_ceil(self.cluster).clamp(begin, end);
                mapped[..(last - begin) as usize].fill(true);
                continue;
            };
            let last = geometry.entries.clamp(begin, end);
            let mut bytes = vec![0; 4 * (last - begin) as usize];
            let got = read_full(&*level.file, &mut bytes, HEADER_BYTES + 4 * begin).map_err(cannot)?;
            if got < bytes.len() {
                let why = "the file ends inside the BAT; run `ploopfs check`";
                return Err(Error::at(Kind::Damaged, &level.path, why));
            }
            for (entry, mapped) in bytes.chunks_exact(4).zip(&mut mapped) {
                *mapped |= entry != [0; 4];
            }
        }
        Ok(mapped)
    }
}

/// True when a delta maps nothing.
pub fn is_empty(level: &Level) -> Result<bool> {
    let Some(geometry) = level.geometry() else { return Ok(false) };
    let search = Search { levels: &[level], cluster: geometry.cluster, sizes: [geometry.disk; 2] };
    Ok(search.from(0, 1)?.0.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::{Header, Version};
    use crate::image::level::Layout;
    use crate::io::file::{HostFile, write_full};
    use crate::io::memory::MemoryFile;
    use crate::sync::Arc;

    const CLUSTER: u64 = 32 << 10;

    /// A delta of this many bytes that maps `clusters`.
    fn delta(disk: u64, clusters: &[u64]) -> Level {
        let header = Header::new(Version::V2, disk, CLUSTER).expect("a header");
        let file = Arc::new(MemoryFile::new());
        file.set_len(header.geometry().first).expect("memory");
        write_full(&*file, &header.encode(), 0).expect("memory");
        for cluster in clusters {
            write_full(&*file, &[1, 0, 0, 0], HEADER_BYTES + 4 * cluster).expect("memory");
        }
        Level { file, path: "delta".into(), layout: Layout::Ploop(header) }
    }

    fn search(levels: &[&Level], sizes: [u64; 2]) -> Vec<(u64, u64)> {
        Search { levels, cluster: CLUSTER, sizes }.from(0, usize::MAX).expect("readable").0
    }

    #[test]
    fn what_either_side_maps_above_the_common_levels_may_differ() {
        let (a, b) = (delta(10 * CLUSTER, &[1, 2, 9]), delta(10 * CLUSTER, &[3, 5]));
        let expected = [(CLUSTER, 3 * CLUSTER), (5 * CLUSTER, CLUSTER), (9 * CLUSTER, CLUSTER)];
        assert_eq!(search(&[&a, &b], [10 * CLUSTER; 2]), expected);
        assert!(search(&[], [10 * CLUSTER; 2]).is_empty());
    }

    #[test]
    fn what_only_the_longer_disk_has_differs_and_so_does_the_cluster_with_the_end() {
        let short = delta(2 * CLUSTER + 512, &[]);
        let long = delta(4 * CLUSTER + 512, &[0]);
        let sizes = [2 * CLUSTER + 512, 4 * CLUSTER + 512];
        let expected = [(0, CLUSTER), (2 * CLUSTER, 2 * CLUSTER + 512)];
        assert_eq!(search(&[&short, &long], sizes), expected);
        assert_eq!(search(&[&long, &short], [sizes[1], sizes[0]]), expected);
    }

    #[test]
    fn a_long_list_comes_in_parts_that_make_the_same_list() {
        let clusters: Vec<u64> = (0..200).filter(|n| n % 3 != 2).collect();
        let level = delta(200 * CLUSTER, &clusters);
        let whole = search(&[&level], [200 * CLUSTER; 2]);
        let search = Search { levels: &[&level], cluster: CLUSTER, sizes: [200 * CLUSTER; 2] };
        let mut all = Diff { next: Some(0), ..Diff::default() };
        while let Some(next) = all.next {
            let (ranges, next) = search.from(next, 7).expect("readable");
            all.append(Diff { ranges, next, ..Diff::default() });
        }
        assert_eq!(all.ranges, whole);
        assert_eq!(all.bytes(), clusters.len() as u64 * CLUSTER);
    }

    #[test]
    fn a_delta_is_empty_until_it_maps_something() {
        assert!(is_empty(&delta(10 * CLUSTER, &[])).expect("readable"));
        assert!(!is_empty(&delta(10 * CLUSTER, &[9])).expect("readable"));
    }

    #[test]
    fn a_file_that_ends_inside_its_bat_is_damage_and_never_equal() {
        let level = delta(100_000 * CLUSTER, &[]);
        level.file.set_len(4096).expect("memory");
        let search = Search { levels: &[&level], cluster: CLUSTER, sizes: [100_000 * CLUSTER; 2] };
        assert_eq!(search.from(0, 10).expect_err("damaged").kind(), Kind::Damaged);
    }
}
