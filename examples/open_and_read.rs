//! Reads a part of an image through the library: no mount, and no root.
//!
//! `open_and_read IMAGES NAME [OFFSET [LENGTH]]` writes the bytes to standard output. NAME is the image's name in the
//! folder IMAGES, as a mount would show it, without `.img`; whatever lies behind it is read the same way: a thin file, a
//! raw one, a chain of snapshots. OFFSET and LENGTH are in bytes; without them the whole disk is read.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use ploopfs::folder::{Folder, FolderOptions};
use ploopfs::vdisk::{Engine, Options};

/// Bytes asked for at a time.
const PIECE: u64 = 1 << 20;

/// Write a part of an image to standard output.
#[derive(Parser)]
struct Arguments {
    /// The folder of images.
    images: PathBuf,
    /// The image.
    name: String,
    /// First byte.
    #[arg(default_value_t = 0)]
    offset: u64,
    /// Number of bytes.
    length: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // What all images of a process share: threads, the cache of allocation tables, a listener for events.
    let engine = Engine::new(Options::default(), Box::new(|event| eprintln!("{event}")));
    // Read-only: images are locked against writers while they are open, and nothing is changed.
    let options = FolderOptions { read_only: true, ..FolderOptions::default() };
    let folder = Folder::open(&arguments.images, &engine, options)?;
    let open = folder.open_image(&arguments.name, false)?;

    let size = open.image().size();
    let end = arguments.length.map_or(size, |length| arguments.offset.saturating_add(length).min(size));
    let mut at = arguments.offset;
    let mut out = std::io::stdout().lock();
    while at < end {
        let data = open.image().read_at(at, PIECE.min(end - at) as usize)?;
        out.write_all(&data)?;
        at += data.len() as u64;
    }
    out.flush()?;
    // The last user of an image closes it; here nothing can be left to write.
    open.release();
    Ok(())
}
