//! The content of an image or a snapshot, for the commands that read all of it: through the mount where a daemon serves
//! the image, else from its files under the same locks. Nothing is written.

use std::path::Path;
use std::sync::Arc;

use crate::cli::served::{self, Daemon};
use crate::cli::target::Target;
use crate::cli::{diff as diff_cli, target};
use crate::control::protocol::SnapshotLine;
use crate::control::snapshots;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{Header, SECTOR};
use crate::image::chain::{Candidate, Form};
use crate::image::diff::{self, Diff};
use crate::image::kind::ImageKind;
use crate::image::layers::{Direct, Layers};
use crate::image::level::{Layout, Level};
use crate::image::paths::image_folder;
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::{Access, RealFile};
use crate::transfer::disk::{Disk, FlatFile};
use crate::vdisk::{Engine, Image, Options};
use crate::words::quoted;

/// An opened image or snapshot. As long as it is open, nobody takes the snapshot away.
pub struct Source {
    /// Which one: the line of `snapshot list`.
    pub line: SnapshotLine,
    /// Cluster size in bytes; None: not known.
    pub cluster: Option<u64>,
    place: Place,
}

enum Place {
    /// What the daemon shows of it.
    Live { daemon: Box<Daemon>, image: String, file: FlatFile },
    /// Its files, locked.
    Offline { image: Arc<Image>, layers: Option<Arc<Layers>>, _lock: Option<DeltaLock> },
}

impl Source {
    /// Opens what was named.
    pub fn open(target: &Target) -> Result<Source> {
        match served::serving(&target.path)? {
            Some((daemon, image)) => live(target, daemon, image.name),
            None if target::is_layered(&target.path) => layered(target),
            None => single(target),
        }
    }

    /// Its content.
    pub fn disk(&self) -> &dyn Disk {
        match &self.place {
            Place::Live { file, .. } => file,
            Place::Offline { image, .. } => image,
        }
    }

    /// The flat file that shows it; None: nobody serves it.
    pub fn shown(&self) -> Option<&FlatFile> {
        match &self.place {
            Place::Live { file, .. } => Some(file),
            Place::Offline { .. } => None,
        }
    }

    /// What differs between an older snapshot (label or GUID) and this one.
    pub fn since(&mut self, from: &str) -> Result<Diff> {
        let to = Some(&*self.line.guid);
        match &mut self.place {
            Place::Live { daemon, image, .. } => {
                diff_cli::all(|start| daemon.client.diff(image, from, to, start))
            }
            Place::Offline { layers: Some(layers), .. } => {
                diff_cli::all(|start| diff::diff(layers, from, to, start))
            }
            Place::Offline { layers: None, .. } => {
                Err(Error::new(Kind::NotFound, format!("there is no snapshot {from}: this image has none")))
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Place::Offline { image, .. } = &self.place
            && let Err(e) = image.close()
        {
            log::warn!("{e}");
        }
    }
}

/// The line of the snapshot that was named; without a name, of the live disk.
fn line(target: &Target, lines: Vec<SnapshotLine>) -> Result<SnapshotLine> {
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

fn live(target: &Target, mut daemon: Daemon, image: String) -> Result<Source> {
    let found = line(target, daemon.client.snapshots(&image)?)?;
    let file = daemon.open_shown(&image, (!found.current).then_some(&*found.name))?;
    // Now it stays: what was opened must be what was looked up.
    if line(target, daemon.client.snapshots(&image)?)?.guid != found.guid {
        let what = "was replaced by another snapshot of that name just now; try again";
        return Err(Error::at(Kind::Busy, file.path(), what));
    }
    Ok(Source { line: found, cluster: None, place: Place::Live { daemon: Box::new(daemon), image, file } })
}

fn layered(target: &Target) -> Result<Source> {
    let opener = Arc::new(Direct(Access::ReadOnly));
    let (layers, _) = Layers::open(image_folder(&target.path)?, &target.path, opener, false)?;
    let found = line(target, snapshots::of(&target.path)?)?;
    let missing = || Error::at(Kind::Damaged, &target.path, format!("{} is no GUID", found.guid));
    let levels = layers.chain(Guid::parse(&found.guid).ok_or_else(missing)?)?;
    let cluster = u64::from(layers.store().descriptor().cluster_sectors) * SECTOR;
    let image = Image::open(&engine(), &target.path.to_string_lossy(), levels)?;
    let place = Place::Offline { image, layers: Some(layers), _lock: None };
    Ok(Source { line: found, cluster: Some(cluster), place })
}

fn single(target: &Target) -> Result<Source> {
    let kind = Candidate::open(&target.path)?.kind()?;
    let found = line(target, snapshots::of(&target.path)?)?;
    let file = Arc::new(RealFile::open(&target.path, Access::ReadOnly)?);
    let lock = DeltaLock::acquire(file.clone(), Use::Reader)?;
    // Looked at again: what was read before the lock may be old.
    let form = Candidate::open(&target.path)?.open_as(kind)?.form;
    let layout = match (kind, form) {
        (ImageKind::Ploop, Form::Ploop(header)) => Layout::Ploop(header),
        _ => Layout::Raw,
    };
    let cluster = match &layout {
        Layout::Ploop(header) => Some(Header::geometry(header).cluster),
        Layout::Raw => None,
    };
    let level = Level { file, path: target.path.clone(), layout };
    let image = Image::open(&engine(), &target.path.to_string_lossy(), vec![level])?;
    Ok(Source { line: found, cluster, place: Place::Offline { image, layers: None, _lock: Some(lock) } })
}

fn engine() -> Arc<Engine> {
    Engine::new(Options::default(), Box::new(|event| log::warn!("{event}")))
}

/// Shows what was just made in the images folder around `path` in its mount, before we return and not 2 s later.
pub fn show(path: &Path) -> Result<()> {
    if let Some(folder) = path.parent()
        && let Some(mut daemon) = served::of_folder(folder)?
    {
        daemon.client.rescan()?;
    }
    Ok(())
}
