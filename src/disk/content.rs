//! The content of an image or a snapshot at rest, for those who read all of it or ask what has changed in it. Nothing is
//! written.

use std::path::Path;
use std::sync::Arc;

use crate::disk::find::{Target, is_layered};
use crate::disk::open::{OpenDisk, no_snapshot};
use crate::disk::snapshots::{self, SnapshotLine};
use crate::error::{Error, Kind, Result};
use crate::format::header::SECTOR;
use crate::image::diff::{self, Diff};
use crate::image::layers::{Direct, Layers};
use crate::image::paths::image_folder;
use crate::io::real::Access;
use crate::vdisk::tracking::Changes;
use crate::vdisk::{Image, Options};
use crate::words::quoted;

/// An opened image or snapshot: its files are locked, and nothing takes the snapshot away.
pub struct Content {
    /// Which one: the line of `snapshot list`.
    pub line: SnapshotLine,
    /// Cluster size in bytes; None: a raw file has none.
    pub cluster: Option<u64>,
    opened: OpenDisk,
}

impl Content {
    /// Opens what was named.
    pub fn open(target: &Target) -> Result<Content> {
        let path = &target.path;
        let opened = OpenDisk::open(path, target.snapshot.as_deref(), Access::ReadOnly, Options::default())?;
        let line = line(target, snapshots::of(path, false)?)?;
        let cluster = match &opened.layers {
            Some(layers) => Some(u64::from(layers.store().descriptor().cluster_sectors) * SECTOR),
            None => opened.image.has_map().then(|| opened.image.cluster()),
        };
        Ok(Content { line, cluster, opened })
    }

    /// What can be read.
    pub fn image(&self) -> &Arc<Image> {
        &self.opened.image
    }

    /// What differs between an older snapshot (label or GUID) and this one.
    pub fn since(&self, from: &str) -> Result<Diff> {
        let Some(layers) = &self.opened.layers else {
            return Err(Error::new(
                Kind::NotFound,
                format!("there is no snapshot {from}: this image has none"),
            ));
        };
        Diff::whole(|start| diff::diff(layers, from, Some(&self.line.guid), start))
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        if let Err(e) = self.opened.image.close() {
            log::warn!("{e}");
        }
    }
}

/// The line of the snapshot that was named; without a name, of the live disk.
pub fn line(target: &Target, lines: Vec<SnapshotLine>) -> Result<SnapshotLine> {
    let named = |line: &SnapshotLine| match &target.snapshot {
        Some(name) => line.is(name) && !line.temporary,
        None => line.current,
    };
    let missing = || match &target.snapshot {
        Some(name) => {
            let list = quoted(&target.path);
            let what = format!("has no snapshot {name}; these are there: ploopfs snapshot list {list}");
            Error::at(Kind::NotFound, &target.path, what)
        }
        None => Error::at(Kind::Damaged, &target.path, "its descriptor has no live disk"),
    };
    lines.into_iter().find(named).ok_or_else(missing)
}

/// What differs between two snapshots of the image at `path`, or one and its live disk.
pub fn diff(path: &Path, from: &str, to: Option<&str>) -> Result<Diff> {
    if !is_layered(path) {
        return Err(no_snapshot(path, from));
    }
    // Two chains are compared; neither needs to be opened as a disk.
    let (layers, _) = Layers::open(image_folder(path)?, path, Arc::new(Direct(Access::ReadOnly)), false)?;
    Diff::whole(|start| diff::diff(&layers, from, to, start))
}

/// What has changed in the image at `path` since its tracking began.
pub fn changes(path: &Path) -> Result<Changes> {
    let opened = OpenDisk::open(path, None, Access::ReadOnly, Options::default())?;
    Changes::whole(|start| Ok(opened.image.changes(start)))
}
