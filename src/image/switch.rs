//! Going back to a snapshot: the live top is dropped, and a new, empty one lies on the snapshot.

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::image::kind::DESCRIPTOR;
use crate::image::layers::Layers;
use crate::image::levels::{disk_size, header_above};
use crate::image::store::Replaced;

/// Makes the live disk what the snapshot `to` is; the disk keeps its size. The image must not be open: what was
/// written since the last snapshot is lost. The image is to be opened anew afterwards.
///
/// 1. the new top, noted and durable; 2. the descriptor, durable: the point of no return; 3. the old top removed, last:
///    before 2 is durable a power cut could bring back the descriptor that names it. R9 holds by itself: nothing
///    depends on a top.
pub fn switch(layers: &Layers, to: Guid) -> Result<()> {
    let mut next = layers.store().descriptor().clone();
    let xml = layers.store().path().join(DESCRIPTOR);
    let not_now = |why: String| Error::at(Kind::Invalid, &xml, why);
    match next.shot(to) {
        None => return Err(Error::at(Kind::NotFound, &xml, format!("there is no snapshot {to}"))),
        Some(shot) if shot.marker.is_some() => {
            return Err(Error::at(Kind::NotFound, &xml, format!("the snapshot {to} was deleted")));
        }
        Some(_) => {}
    }
    let levels = layers.chain(next.top)?;
    let disk = disk_size(&levels, &next);
    let below = layers.chain(to)?;
    let header = header_above(&below, &next, disk)?;
    // 1. The old top's file is noted with it: 2 would have to do so by itself.
    let going = next.delta(next.top).map(|delta| delta.file.clone());
    let (file, level) = layers.add_delta_for(&header, going.as_deref())?;
    drop(level);
    let replaced = next
        .switch(to, &file)
        .map_err(|bad| not_now(bad.to_string()))
        // 2.
        .and_then(|old| Ok((old, layers.store().replace(next)?)));
    let old = match replaced {
        Ok((old, Replaced::Durable)) => old,
        Ok((_, Replaced::Unsynced(error))) => return Err(error),
        Err(error) => {
            // Not done: the old descriptor is in place. What cannot be removed goes at the next open.
            let _ = layers.remove(&file);
            return Err(error);
        }
    };
    // 3. Done already; a file that stays is noted, and goes at the next open.
    if let Err(error) = layers.remove(&old.file) {
        log::warn!("{error}; the next open tries again");
    }
    Ok(())
}
