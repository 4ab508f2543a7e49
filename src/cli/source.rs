//! The content of an image or a snapshot, for the commands that read all of it: through the mount where a daemon serves
//! the image, else from its files under the same locks. Nothing is written.

use std::path::Path;

use crate::cli::served::{self, Daemon};
use crate::cli::target::Target;
use crate::disk::content::{Content, line};
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::image::diff::Diff;
use crate::transfer::disk::{FlatDisk, FlatFile};

/// An opened image or snapshot. As long as it is open, nothing takes the snapshot away.
pub enum DiskSource {
    /// What the daemon shows of it.
    Live {
        /// The line to the daemon.
        daemon: Box<Daemon>,
        /// The image's name.
        image: String,
        /// Which one: the line of `snapshot list`.
        line: SnapshotLine,
        /// The flat file.
        file: FlatFile,
    },
    /// Its files, locked.
    AtRest(Content),
}

impl DiskSource {
    /// Opens what was named.
    pub fn open(target: &Target) -> Result<DiskSource> {
        match served::serving(&target.path)? {
            Some((daemon, image)) => live(target, daemon, image.name),
            None => Content::open(target).map(DiskSource::AtRest),
        }
    }

    /// Which one: the line of `snapshot list`.
    pub fn line(&self) -> &SnapshotLine {
        match self {
            DiskSource::Live { line, .. } => line,
            DiskSource::AtRest(content) => &content.line,
        }
    }

    /// Cluster size in bytes; None: not known.
    pub fn cluster(&self) -> Option<u64> {
        match self {
            DiskSource::Live { .. } => None,
            DiskSource::AtRest(content) => content.cluster,
        }
    }

    /// Its content.
    pub fn disk(&self) -> &dyn FlatDisk {
        match self {
            DiskSource::Live { file, .. } => file,
            DiskSource::AtRest(content) => content.image(),
        }
    }

    /// The flat file that shows it; None: no daemon serves it.
    pub fn shown(&self) -> Option<&FlatFile> {
        match self {
            DiskSource::Live { file, .. } => Some(file),
            DiskSource::AtRest(_) => None,
        }
    }

    /// What differs between an older snapshot (label or GUID) and this one.
    pub fn since(&mut self, from: &str) -> Result<Diff> {
        match self {
            DiskSource::Live { daemon, image, line, .. } => {
                Diff::whole(|start| daemon.client.diff(image, from, Some(&line.guid), start))
            }
            DiskSource::AtRest(content) => content.since(from),
        }
    }
}

fn live(target: &Target, mut daemon: Daemon, image: String) -> Result<DiskSource> {
    let found = line(target, daemon.client.snapshots(&image)?)?;
    let file = daemon.open_shown(&image, (!found.current).then_some(&*found.name))?;
    // Now it stays: what was opened must be what was looked up.
    if line(target, daemon.client.snapshots(&image)?)?.guid != found.guid {
        let what = "was replaced by another snapshot of that name just now; try again";
        return Err(Error::at(Kind::Busy, file.path(), what));
    }
    Ok(DiskSource::Live { daemon: Box::new(daemon), image, line: found, file })
}

/// Shows what was just made in the images folder around `path` in its mount, before we return and not 2 s later.
pub fn show(path: &Path) -> Result<()> {
    if let Some(folder) = path.parent()
        && let Some(mut daemon) = served::of_folder(folder)?
    {
        daemon.client.take_in(path.file_name().unwrap_or_default())?;
    }
    Ok(())
}
