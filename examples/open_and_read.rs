//! Reads a part of a disk through the library: no mount, and no root.
//!
//! `open_and_read IMAGE[@SNAPSHOT] [OFFSET [LENGTH]]` writes the bytes to standard output; whatever the image is, it is read
//! the same way: a thin file, a raw one, a chain of snapshots. OFFSET and LENGTH are in bytes; without them the whole
//! disk is read.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use ploopfs::Disk;

/// Bytes asked for at a time.
const PIECE: u64 = 1 << 20;

/// Write a part of a disk to standard output.
#[derive(Parser)]
struct Arguments {
    /// The image, as it lies in its folder.
    image: PathBuf,
    /// First byte.
    #[arg(default_value_t = 0)]
    offset: u64,
    /// Number of bytes.
    length: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // For reading: locked against writers while it is open, and nothing is changed.
    let disk = Disk::open(&arguments.image)?;
    let length = arguments.length.unwrap_or(u64::MAX);
    let end = arguments.offset.saturating_add(length).min(disk.size());
    let (mut at, mut buffer) = (arguments.offset, vec![0; PIECE as usize]);
    let mut out = std::io::stdout().lock();
    while at < end {
        let piece = &mut buffer[..PIECE.min(end - at) as usize];
        disk.read_at(at, piece)?;
        out.write_all(piece)?;
        at += piece.len() as u64;
    }
    out.flush()?;
    Ok(disk.close()?)
}
