//! Snapshots of images at rest.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::disk::content;
use crate::disk::snapshots::{self, SnapshotLine};
use crate::disk::work::carry_out;
use crate::error::Result;
use crate::front::target;
use crate::progress::Progress;
use crate::vdisk::live::Work;

/// A snapshot of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its name; its GUID where another program gave it none.
    pub name: String,
    /// Its GUID, which never changes.
    pub guid: String,
    /// GUID of the snapshot it stands on; None for the first.
    pub parent: Option<String>,
    /// When it was taken; None where another program took it.
    pub created: Option<SystemTime>,
    /// Space on the host that it does not share with the snapshots below it, in bytes.
    pub exclusive: u64,
}

impl From<SnapshotLine> for Snapshot {
    fn from(line: SnapshotLine) -> Snapshot {
        let seconds = line.created.and_then(|at| u64::try_from(at).ok());
        Snapshot {
            name: line.name,
            guid: line.guid,
            parent: line.parent,
            created: seconds.and_then(|at| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(at))),
            exclusive: line.exclusive,
        }
    }
}

/// Freezes what the image at `path` holds as the snapshot `name`; later writes go into a new file. An image that is one file
/// becomes a folder. Durable when it returns.
///
/// # Errors
/// [`Kind::Exists`](crate::Kind::Exists) where the image has a snapshot of that name;
/// [`Kind::InUse`](crate::Kind::InUse) where another program holds it: a mount's images are snapshotted by
/// `ploopfs snapshot create`.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("vm1");
/// # ploopfs::create(&image, 1 << 30)?;
/// ploopfs::snapshot(&image, "monday")?;
/// let there = ploopfs::snapshots(&image)?;
/// assert_eq!(there[0].name, "monday");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn snapshot(path: impl AsRef<Path>, name: &str) -> Result<()> {
    work(path.as_ref(), &Work::Snapshot { label: Some(name.to_owned()) }, &Progress::new())
}

/// Deletes the snapshot `name`: its data is merged with what stands on it, which takes as long as the smaller of the two
/// is large. What was deleted while others stand on it goes when they do.
///
/// # Errors
/// [`Kind::NotFound`](crate::Kind::NotFound), [`Kind::InUse`](crate::Kind::InUse),
/// [`Kind::Cancelled`](crate::Kind::Cancelled) through `progress`: the next open goes on with it.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("vm1");
/// # ploopfs::create(&image, 1 << 30)?;
/// ploopfs::snapshot(&image, "monday")?;
/// ploopfs::delete_snapshot(&image, "monday", &ploopfs::Progress::new())?;
/// assert!(ploopfs::snapshots(&image)?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn delete_snapshot(path: impl AsRef<Path>, name: &str, progress: &Progress) -> Result<()> {
    work(path.as_ref(), &Work::Delete { snapshot: name.to_owned() }, progress)
}

fn work(path: &Path, work: &Work, progress: &Progress) -> Result<()> {
    carry_out(&target(path)?.path, work, progress).map(drop)
}

/// The snapshots of the image at `path`, each behind the one it stands on. Takes no lock: also while a mount serves it.
///
/// # Errors
/// [`Kind::NotFound`](crate::Kind::NotFound), [`Kind::Damaged`](crate::Kind::Damaged).
pub fn snapshots(path: impl AsRef<Path>) -> Result<Vec<Snapshot>> {
    let lines = snapshots::of(&target(path.as_ref())?.path, false)?;
    Ok(lines.into_iter().filter(|line| !line.current && !line.temporary).map(Snapshot::from).collect())
}

/// The ranges of bytes that may differ between the snapshot `from` and the snapshot `to`, or the live disk: ascending, none
/// touching the next. No data is read; what is in no range is equal.
///
/// # Errors
/// [`Kind::NotFound`](crate::Kind::NotFound), [`Kind::InUse`](crate::Kind::InUse),
/// [`Kind::Damaged`](crate::Kind::Damaged).
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("vm1");
/// # ploopfs::create(&image, 1 << 30)?;
/// ploopfs::snapshot(&image, "monday")?;
/// let disk = ploopfs::Disk::open_writable(&image)?;
/// disk.write_at(5 << 20, b"hello")?;
/// disk.close()?;
/// // Whole clusters of 1 MiB.
/// assert_eq!(ploopfs::diff(&image, "monday", None)?, [5 << 20..6 << 20]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn diff(path: impl AsRef<Path>, from: &str, to: Option<&str>) -> Result<Vec<Range<u64>>> {
    let diff = content::diff(&target(path.as_ref())?.path, from, to)?;
    Ok(diff.ranges.into_iter().map(|(begin, len)| begin..begin.saturating_add(len)).collect())
}
