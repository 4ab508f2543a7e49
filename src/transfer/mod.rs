//! Disks in and out of images: backup and restore, export and import. What is read is a [`disk::Disk`], served
//! or at rest; what is written is a live image without a transport, in files that get their names when they are
//! complete.

pub mod backup;
pub mod device;
pub mod disk;
pub mod export;
pub mod foreign;
pub mod import;
pub mod known;
pub mod layers;
mod nbd;
pub mod pieces;
pub mod qemu;
mod qemu_nbd;
pub mod restore;

use std::sync::Arc;

use crate::error::Result;
use crate::image::level::Level;
use crate::vdisk::{Engine, Image, OnFull, Options};

/// Opens `levels` for writing into the top, which has no other user yet. Where the host is full, writes fail at once:
/// a person or a script waits for this command.
fn writer(name: &str, levels: Vec<Level>) -> Result<Arc<Image>> {
    let mut options = Options { on_full: OnFull::Error, ..Options::default() };
    if let Some(geometry) = levels.last().and_then(Level::geometry) {
        // A disk that is smaller than a step needs no more.
        options.extend = options.extend.min(geometry.disk.next_multiple_of(geometry.cluster));
    }
    let engine = Engine::new(options, Box::new(|event| log::debug!("{event}")));
    let image = Image::open(&engine, name, levels)?;
    image.make_writable()?;
    Ok(image)
}

/// Fills an image and closes it, which makes it durable and clears its mark, also after a failure.
fn filled<T>(image: &Arc<Image>, fill: impl FnOnce(&Arc<Image>) -> Result<T>) -> Result<T> {
    let result = fill(image);
    let closed = image.close();
    let value = result?;
    closed.map(|()| value)
}
