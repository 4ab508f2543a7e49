//! A plain file, or one of another program's format, as a single-file image.

use std::path::Path;

use super::disk::Disk;
use super::pieces::{copy, runs};
use super::{filled, qemu, writer};
use crate::error::Result;
use crate::image::create::Draft;
use crate::progress::Progress;

/// A run of zeroes of this many bytes is left out: a hole in the image's file.
const GRAIN: usize = 64 << 10;

/// Copies `disk` into the new image; it is durable when this returns, and still has no name.
pub fn raw(disk: &dyn Disk, draft: &Draft, progress: &Progress) -> Result<()> {
    progress.set_total(disk.size());
    let image = writer(&draft.path().to_string_lossy(), vec![draft.level()?])?;
    filled(&image, |image| {
        copy(disk, &[(0, disk.size())], progress, &|offset, bytes| {
            for (range, zero) in runs(bytes, GRAIN) {
                if !zero {
                    image.write_at(offset + range.start as u64, &bytes[range])?;
                }
            }
            Ok(())
        })
    })
}

/// The same for a file of a format that the qemu-img program reads.
pub fn other(file: &Path, format: &str, size: u64, draft: &Draft, progress: &Progress) -> Result<()> {
    let to = draft.file().open_path();
    // The file is new, so that zeroes need not be written; it is larger where the disk is no whole cluster.
    let kind = draft.kind().as_qemu();
    // Cleared before, since qemu-img writes the data and leaves the flag.
    draft.clear_empty_flag()?;
    qemu::convert(&["-n", "--target-is-zero"], (format, file), (kind, &to), size, progress)
}
