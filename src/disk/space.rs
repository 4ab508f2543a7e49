//! What `info` says of an image's space: how its clusters are ordered in their files, what could be given back, and why
//! what could not, could not. Reads maps only, a bounded piece at a time.

use std::path::Path;

use crate::disk::examine::examine;
use crate::disk::find::is_layered;
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::format::header::{HEADER_BYTES, SECTOR};
use crate::image::chain::{AtRest, Form};
use crate::image::check::{CheckReport, check};

/// Bytes of two maps that are compared at a time.
const PIECE: usize = 64 << 10;

/// How the clusters of a level lie in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterOrder {
    /// Clusters with an entry.
    pub mapped: u64,
    /// How often the disk, read from front to back, jumps in the file, and once for the beginning.
    pub pieces: u64,
}

impl ClusterOrder {
    /// Of the level in `image`.
    pub fn of(image: &AtRest) -> Result<ClusterOrder> {
        let mut order = ClusterOrder::default();
        let Form::Ploop(header) = &image.form else { return Ok(order) };
        let geometry = header.geometry();
        let mut next = None;
        image.for_each_entry(&geometry, |_, entry| {
            let position = geometry.position(entry);
            order.mapped += 1;
            if position.is_none() || position != next {
                order.pieces += 1;
            }
            next = position.map(|position| position + geometry.cluster);
        })?;
        Ok(order)
    }

    /// Of all places where one cluster follows another, how many in a hundred are jumps.
    pub fn fragmentation(&self) -> f64 {
        let places = self.mapped.saturating_sub(1).max(1);
        // A tenth is fine enough to read.
        (self.pieces.saturating_sub(1) as f64 / places as f64 * 1000.0).round() / 10.0
    }
}

/// What could be given back.
#[derive(Clone, Debug, Default)]
pub struct Reclaimable {
    /// Bytes that nothing refers to; None: see `leaked_unknown`.
    pub leaked: Option<u64>,
    /// Why that is not known.
    pub leaked_unknown: Option<String>,
    /// What deleting each snapshot would give back.
    pub snapshots: Vec<Freed>,
}

/// What deleting one snapshot would give back.
#[derive(Clone, Debug)]
pub struct Freed {
    /// Its name.
    pub name: String,
    /// Space that its own file takes on the host, in bytes.
    pub exclusive: u64,
    /// Bytes that only it needs: the level above hides them.
    pub reclaimable: u64,
    /// Why nothing of it comes back.
    pub why_not: Option<String>,
}

impl Reclaimable {
    /// Finds what leaked in the image at `path`. `mounted`: a daemon serves it.
    pub fn leaks(path: &Path, mounted: bool) -> Reclaimable {
        let mut found = Reclaimable::default();
        if mounted {
            found.leaked_unknown = Some("a mount serves it; umount first".to_owned());
            return found;
        }
        let reports = if is_layered(path) {
            let examined = examine(path);
            examined.map(|examined| examined.reports.into_iter().map(|(_, report)| report).collect())
        } else {
            check(path).map(|report| vec![report])
        };
        match reports {
            Ok(reports) => {
                let bytes = |report: &CheckReport| {
                    let cluster = report.header.map_or(0, |h| u64::from(h.cluster_sectors) * SECTOR);
                    report.leaks.saturating_mul(cluster)
                };
                found.leaked = Some(reports.iter().map(bytes).sum());
            }
            Err(e) if e.kind() == Kind::InUse => {
                found.leaked_unknown = Some("another process has it open".to_owned());
            }
            // What else is to be said of the image is worth it.
            Err(e) => found.leaked_unknown = Some(e.to_string()),
        }
        found
    }

    /// Finds what each snapshot of a chain holds for itself alone. `levels`: base first, each with its GUID.
    pub fn add_snapshots(&mut self, levels: &[(&str, &AtRest)], lines: &[SnapshotLine]) -> Result<()> {
        for pair in levels.windows(2) {
            let [(guid, lower), (_, upper)] = pair else { continue };
            let Some(line) = lines.iter().find(|line| line.guid == **guid) else { continue };
            let children = lines.iter().filter(|other| other.parent.as_deref() == Some(*guid)).count();
            let (reclaimable, why_not) = if children > 1 {
                (0, Some(format!("{children} others stand on it")))
            } else {
                (hidden(lower, upper)?, None)
            };
            let (name, exclusive) = (line.name.clone(), line.exclusive);
            self.snapshots.push(Freed { name, exclusive, reclaimable, why_not });
        }
        Ok(())
    }
}

/// Bytes of `lower` that `upper`, right above it, hides.
fn hidden(lower: &AtRest, upper: &AtRest) -> Result<u64> {
    let Form::Ploop(above) = &upper.form else { return Ok(0) };
    let above = above.geometry();
    // A raw base has every cluster up to its end; it has no map to compare with.
    let (end, raw) = match &lower.form {
        Form::Ploop(header) => (header.geometry().bat_end().min(above.bat_end()), false),
        Form::Raw => {
            let clusters = lower.len.div_ceil(above.cluster);
            (clusters.saturating_mul(4).saturating_add(HEADER_BYTES).min(above.bat_end()), true)
        }
    };
    let short = |level: &AtRest| {
        Error::at(Kind::Damaged, &level.path, "the file ends inside its map; see ploopfs check")
    };
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut at, mut count) = (HEADER_BYTES, 0);
    while at < end {
        let want = (end - at).min(PIECE as u64) as usize;
        if upper.read(&mut a[..want], at)? < want {
            return Err(short(upper));
        }
        if !raw && lower.read(&mut b[..want], at)? < want {
            return Err(short(lower));
        }
        let set = |entry: &[u8]| entry.iter().any(|byte| *byte != 0);
        let both = a[..want].chunks_exact(4).zip(b[..want].chunks_exact(4));
        count += both.filter(|(upper, lower)| set(upper) && (raw || set(lower))).count() as u64;
        at += want as u64;
    }
    Ok(count.saturating_mul(above.cluster))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragmentation_is_the_share_of_jumps_between_clusters() {
        let of = |mapped, pieces| ClusterOrder { mapped, pieces };
        assert_eq!(of(0, 0).fragmentation(), 0.0);
        assert_eq!(of(1, 1).fragmentation(), 0.0);
        assert_eq!(of(101, 1).fragmentation(), 0.0);
        assert_eq!(of(101, 101).fragmentation(), 100.0);
        assert_eq!(of(101, 11).fragmentation(), 10.0);
    }
}
