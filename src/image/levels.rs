//! The levels of a chain beside each other: what must hold between them, and what follows for a top above them.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::format::header::{Header, SECTOR, Version};
use crate::image::labels::Labels;
use crate::image::level::{Layout, Level, read_header};
use crate::words::quoted;

/// What must hold between the levels of a chain (docs/format.md#bat-entries).
pub(super) fn check_chain(levels: &[Level], descriptor: &Descriptor) -> Result<()> {
    let mut below: Option<(&Header, &PathBuf)> = None;
    // The host is asked once for each: a chain may have 250.
    let mut known: HashMap<(u64, u64), &PathBuf> = HashMap::with_capacity(levels.len());
    for (index, level) in levels.iter().enumerate() {
        let refuse = |why: String| Err(Error::at(Kind::Damaged, &level.path, why));
        if let Ok(status) = level.file.status()
            && status.ino != 0
            && let Some(other) = known.insert((status.dev, status.ino), &level.path)
        {
            return refuse(format!("is the same file as {}, another delta of the chain", other.display()));
        }
        let Layout::Ploop(header) = &level.layout else { continue };
        if let Some(why) = other_clusters(descriptor, header) {
            return refuse(why);
        }
        match below {
            Some((lower, path)) if lower.version != header.version => {
                return refuse(format!(
                    "is {}, but {} below it is {}; a chain has one version",
                    header.version,
                    path.display(),
                    lower.version
                ));
            }
            Some((lower, path)) if lower.geometry().clusters() > header.geometry().clusters() => {
                return refuse(format!(
                    "its disk ({} sectors) is shorter than that of {} below it ({} sectors)",
                    header.disk_sectors,
                    path.display(),
                    lower.disk_sectors
                ));
            }
            None if index > 0 && header.version != Version::V2 => {
                return refuse("is v1, but lies on a raw base; only v2 can".into());
            }
            _ => {}
        }
        below = Some((header, &level.path));
    }
    Ok(())
}

/// Refuses a raw base that is shorter than it was when its snapshot was taken (an interrupted copy), or that is no raw file.
/// Both would be read as if nothing were wrong: a raw file has no map, and what is behind its end is zero.
///
/// A guest may write what it likes into a raw disk, the header of a ploop file too. But it does not make its file shorter
/// or longer than the disk; a ploop file as long as its disk does not occur but by chance.
pub fn check_raw_base(
    guid: Guid,
    level: &Level,
    above: Option<&Level>,
    descriptor: &Descriptor,
    labels: &Labels,
) -> Result<()> {
    if level.geometry().is_some() {
        return Ok(());
    }
    let refuse = |why: String| Err(Error::at(Kind::Damaged, &level.path, why));
    let len = level.file.len().map_err(|e| Error::io(&e, &level.path, "cannot read the length"))?;
    if let Some(was) = labels.length(guid).filter(|was| len < *was) {
        return refuse(format!(
            "was cut off: it ends at byte {len}, and had {was} bytes when its snapshot was taken; copy it anew from where \
             it came, or, for zeroes instead of what is lost: truncate -s {was} {}",
            quoted(&level.path)
        ));
    }
    let disk = above
        .and_then(Level::geometry)
        .map_or(descriptor.disk_sectors.saturating_mul(SECTOR), |geometry| geometry.disk);
    let is_ploop =
        || read_header(&*level.file, &level.path).is_ok_and(|header| header.geometry().disk == disk);
    if len != disk && is_ploop() {
        return refuse("is a ploop file, but its Type in the descriptor is Plain, and not Compressed".into());
    }
    Ok(())
}

/// What is wrong where a delta has other clusters than its descriptor says.
pub fn other_clusters(descriptor: &Descriptor, header: &Header) -> Option<String> {
    (header.cluster_sectors != descriptor.cluster_sectors).then(|| {
        format!(
            "its clusters have {} sectors, but Blocksize in the descriptor is {}",
            header.cluster_sectors, descriptor.cluster_sectors
        )
    })
}

/// The header of a new top on this chain: same version and clusters (v2 over raw), and a disk of `disk` bytes.
pub fn header_above(levels: &[Level], descriptor: &Descriptor, disk: u64) -> Result<Header> {
    let version = levels.iter().find_map(Level::geometry).map_or(Version::V2, |geometry| geometry.version);
    let cluster = u64::from(descriptor.cluster_sectors) * SECTOR;
    let path = levels.last().map(|level| level.path.clone()).unwrap_or_default();
    Header::new(version, disk, cluster).map_err(|bad| Error::at(Kind::Invalid, path, bad.to_string()))
}

/// Size in bytes of the disk that a chain shows.
pub fn disk_size(levels: &[Level], descriptor: &Descriptor) -> u64 {
    match levels.last().and_then(Level::geometry) {
        Some(geometry) => geometry.disk,
        None => descriptor.disk_sectors * SECTOR,
    }
}
