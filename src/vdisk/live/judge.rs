//! Whether work can be done at all. Asked before anything is changed for it, so that a refused command leaves the image as
//! it was: above all before a single file becomes a folder for its first snapshot.

use std::fs::File;

use super::Work;
use crate::error::{Error, Kind, Result};
use crate::image::clone;
use crate::image::labels::Labels;
use crate::image::layers::Layers;
use crate::vdisk::Image;

/// Refuses what cannot be done with the open image, whose descriptor and files are `layers`; None: it is a single file.
/// What passes may still fail: on the host, or because another process was faster.
pub fn judge(image: &Image, layers: Option<&Layers>, work: &Work) -> Result<()> {
    match work {
        Work::Snapshot { label: Some(label) } => match layers {
            Some(layers) => layers.store().labels().check(label),
            None => Labels::default().check(label),
        },
        Work::Delete { snapshot } | Work::Merge { snapshot } | Work::Switch { snapshot } => {
            known(image, layers, snapshot)
        }
        Work::Clone { snapshot, to, copy } => {
            if let Some(snapshot) = snapshot {
                known(image, layers, snapshot)?;
            }
            let place = clone::Place::of(to)?;
            if *copy { Ok(()) } else { can_share(image, &place.around) }
        }
        // These judge by themselves, before their first change.
        Work::Snapshot { label: None }
        | Work::Resize { .. }
        | Work::Compact { .. }
        | Work::Track { .. }
        | Work::Untrack
        | Work::Finish => Ok(()),
    }
}

/// The image has this snapshot.
fn known(image: &Image, layers: Option<&Layers>, snapshot: &str) -> Result<()> {
    match layers {
        Some(layers) => layers.store().find_snapshot(snapshot).map(drop),
        None => {
            let what = format!("there is no snapshot {snapshot}: this image has none");
            Err(Error::at(Kind::NotFound, image.shown(), what))
        }
    }
}

/// A clone in the folder `around` can share the file of the live disk. Where it is the file's own file system, a hard link
/// is made at worst; elsewhere only shared extents will do, which a file without a name shows.
fn can_share(image: &Image, around: &File) -> Result<()> {
    let stack = image.stack();
    let top = stack.top();
    let cannot = |e: std::io::Error| Error::io(&e, &top.path, "cannot look at it");
    if clone::shares(&*top.file, around).map_err(cannot)? {
        return Ok(());
    }
    let why = "the clone cannot share this file: it is to lie on another file system; --copy copies it";
    Err(Error::at(Kind::Unsupported, &top.path, why))
}
