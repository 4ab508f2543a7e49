//! The content of an image or a snapshot, for the commands that read all of it: through the mount where a daemon serves
//! the image, else from its files under the same locks. Nothing is written.

use std::path::Path;

use crate::cli::served::{self, Daemon};
use crate::cli::target::Target;
use crate::disk::content::{Content, line};
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::image::diff::Diff;
use crate::transfer::disk::{Disk, FlatFile};

/// An opened image or snapshot. As long as it is open, nothing takes the snapshot away.
pub enum Source {
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

impl Source {
    /// Opens what was named.
    pub fn open(target: &Target) -> Result<Source> {
        match served::serving(&target.path)? {
            Some((daemon, image)) => live(target, daemon, image.name),
            None => Content::open(target).map(Source::AtRest),
        }
    }

    /// Which one: the line of `snapshot list`.
    pub fn line(&self) -> &SnapshotLine {
        match self {
            Source::Live { line, .. } => line,
            Source::AtRest(content) => &content.line,
        }
    }

    /// Cluster size in bytes; None: not known.
    pub fn cluster(&self) -> Option<u64> {
        match self {
            Source::Live { .. } => None,
            Source::AtRest(content) => content.cluster,
        }
    }

    /// Its content.
    pub fn disk(&self) -> &dyn Disk {
        match self {
            Source::Live { file, .. } => file,
            Source::AtRest(content) => content.image(),
        }
    }

    /// The flat file that shows it; None: no daemon serves it.
    pub fn shown(&self) -> Option<&FlatFile> {
        match self {
            Source::Live { file, .. } => Some(file),
            Source::AtRest(_) => None,
        }
    }

    /// What differs between an older snapshot (label or GUID) and this one.
    pub fn since(&mut self, from: &str) -> Result<Diff> {
        match self {
            Source::Live { daemon, image, line, .. } => {
                Diff::whole(|start| daemon.client.diff(image, from, Some(&line.guid), start))
            }
            Source::AtRest(content) => content.since(from),
        }
    }
}

fn live(target: &Target, mut daemon: Daemon, image: String) -> Result<Source> {
    let found = line(target, daemon.client.snapshots(&image)?)?;
    let file = daemon.open_shown(&image, (!found.current).then_some(&*found.name))?;
    // Now it stays: what was opened must be what was looked up.
    if line(target, daemon.client.snapshots(&image)?)?.guid != found.guid {
        let what = "was replaced by another snapshot of that name just now; try again";
        return Err(Error::at(Kind::Busy, file.path(), what));
    }
    Ok(Source::Live { daemon: Box::new(daemon), image, line: found, file })
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
