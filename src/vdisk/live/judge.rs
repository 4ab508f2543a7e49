//! Whether work can be done at all. Asked before anything is changed for it, so that a refused command leaves the image as
//! it was: above all before a single file becomes a folder for its first snapshot.

use std::fs::File;

use super::Work;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::image::clone;
use crate::image::labels::Labels;
use crate::image::layers::Layers;
use crate::vdisk::{Image, Level, scan};

/// Refuses what cannot be done with the open image, whose descriptor and files are `layers`; None: it is a single file.
/// What passes may still fail: on the host, or because another process was faster.
pub fn judge(image: &Image, layers: Option<&Layers>, work: &Work) -> Result<()> {
    match work {
        Work::Snapshot { label: Some(label) } => match layers {
            Some(layers) => layers.store().check_label(label),
            None => Labels::default().check(label),
        },
        Work::Switch { snapshot } => known(image, layers, snapshot),
        Work::Delete { snapshot } | Work::Merge { snapshot }
            if layers.is_some_and(|layers| is_unfinished(layers, snapshot)) =>
        {
            Ok(())
        }
        Work::Delete { snapshot } | Work::Merge { snapshot } => {
            known(image, layers, snapshot)?;
            layers.map_or(Ok(()), |layers| {
                let guid = layers.store().find_snapshot(snapshot)?;
                let descriptor = layers.store().descriptor().clone();
                match descriptor.children(guid)[..] {
                    [child] => [guid, child].into_iter().try_for_each(|guid| sound(layers, guid)),
                    _ => Ok(()),
                }
            })
        }
        Work::Clone { snapshot, to, copy } => {
            if let Some(snapshot) = snapshot {
                known(image, layers, snapshot)?;
            }
            if let Some(layers) = layers {
                let (of, top) = {
                    let store = layers.store();
                    let of = snapshot.as_deref().map(|name| store.find_snapshot(name)).transpose()?;
                    (of.unwrap_or(store.descriptor().top), store.descriptor().top)
                };
                let mut levels = layers.chain(of)?;
                if of == top {
                    levels.pop();
                }
                levels.iter().try_for_each(sound_level)?;
            }
            let place = clone::Destinations::of(to)?;
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

/// Refuses a damaged level before anything is changed: a merge would bury an entry that names nothing, a clone would spread
/// it, and `check` might find no fault afterwards. The live top is being written, and was scanned before its first write.
pub(super) fn sound(layers: &Layers, guid: Guid) -> Result<()> {
    if guid == layers.store().descriptor().top {
        return Ok(());
    }
    sound_level(&layers.level_of(guid)?)
}

fn sound_level(level: &Level) -> Result<()> {
    level.geometry().map_or(Ok(()), |geometry| scan::scan(level, &geometry).map(drop))
}

/// There is no snapshot of this name, but one was deleted whose data can be merged.
pub(super) fn is_unfinished(layers: &Layers, name: &str) -> bool {
    let store = layers.store();
    store.find_snapshot(name).is_err() && store.labels().find_deleted(store.descriptor(), name).is_some()
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
