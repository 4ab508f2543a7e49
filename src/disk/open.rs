//! An image at rest is opened: its locks, its levels, its live code without a transport (docs/design.md#at-rest).

use std::path::Path;
use std::sync::Arc;

use crate::disk::find::is_layered;
use crate::disk::owner::refuse_opened;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Candidate;
use crate::image::layers::{Direct, Layers};
use crate::image::paths::{Located, image_folder};
use crate::io::lock::DeltaLock;
use crate::io::real::Access;
use crate::vdisk::{Engine, Image, Options};

/// An image that this process has opened for itself. Nothing of it is written before
/// [`make_writable`](Image::make_writable); [`close`](OpenDisk::close) makes durable what was.
pub struct OpenDisk {
    /// The image.
    pub image: Arc<Image>,
    /// Its descriptor and files; None for a single file. Behind `image`: the locks are dropped last.
    pub layers: Option<Arc<Layers>>,
    /// Of a single file; and where that was found.
    lock: Option<(DeltaLock, Located)>,
}

impl OpenDisk {
    /// Opens the image at `path`, or a snapshot of it (label or GUID), under its locks. Order: (1) what it is, since a
    /// folder or a link has no lock; (2) the locks; (3) of a file that is to be changed, whether it is a level of another image;
    /// (4) everything is read anew, so that nothing that is known is old. 3 before 2, and another file could be there by then.
    pub fn open(path: &Path, snapshot: Option<&str>, access: Access, options: Options) -> Result<OpenDisk> {
        let engine = Engine::new(options, Box::new(|event| log::warn!("{event}")));
        let name = path.to_string_lossy();
        if is_layered(path) {
            // What is needed of a chain is written to its top alone; files below it may be read-only.
            let access = if access == Access::ReadWrite { Access::Widest } else { access };
            let (layers, live) = Layers::open(image_folder(path)?, path, Arc::new(Direct(access)), false)?;
            let levels = match snapshot {
                None => live,
                Some(name) => {
                    let guid = layers.store().find_snapshot(name)?;
                    layers.chain(guid)?
                }
            };
            let image = Image::open(&engine, &name, levels)?;
            return Ok(OpenDisk { image, layers: Some(layers), lock: None });
        }
        let at = Located::of(path)?;
        Candidate::open_at(&at)?.kind()?; // 1
        if let Some(snapshot) = snapshot {
            return Err(no_snapshot(path, snapshot));
        }
        let (candidate, lock) = Candidate::open_locked_at(&at, access)?; // 2
        if access != Access::ReadOnly {
            refuse_opened(&at, candidate.status())?; // 3
        }
        let kind = candidate.kind()?; // 4
        let image = Image::open(&engine, &name, vec![candidate.open_as(kind)?.into_level()])?;
        Ok(OpenDisk { image, layers: None, lock: Some((lock, at)) })
    }

    /// Of a single file, where that was found.
    pub(super) fn place(&self) -> Option<&Located> {
        self.lock.as_ref().map(|(_, at)| at)
    }

    /// Closes it: what was written is durable and the mark cleared, before the locks end.
    pub fn close(self) -> Result<()> {
        let closed = self.image.close();
        drop((self.layers, self.lock));
        closed
    }
}

/// What is said of a snapshot of an image that is one file.
pub fn no_snapshot(path: &Path, name: &str) -> Error {
    Error::at(Kind::NotFound, path, format!("there is no snapshot {name}: this image has none"))
}
