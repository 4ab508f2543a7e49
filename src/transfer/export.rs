//! A disk as a plain file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::disk::Disk;
use super::pieces::{copy, runs};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// A run of zeroes of this many bytes becomes a hole: more than any host's block, little enough that the file stays thin.
const GRAIN: usize = 64 << 10;

/// Writes the bytes of `disk` into the new, empty file `out`; what is zero stays a hole. `path` is for messages.
pub fn raw(disk: &dyn Disk, out: &File, path: &Path, progress: &Progress) -> Result<()> {
    let cannot = |e: std::io::Error| Error::io(&e, path, "cannot write");
    progress.set_total(disk.size());
    out.set_len(disk.size()).map_err(cannot)?;
    copy(disk, &[(0, disk.size())], progress, &|offset, bytes| {
        for (range, zero) in runs(bytes, GRAIN) {
            if !zero {
                out.write_all_at(&bytes[range.clone()], offset + range.start as u64).map_err(cannot)?;
            }
        }
        Ok(())
    })
}
