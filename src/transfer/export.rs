//! A disk as a plain file, in a pipe, on a device, or as a qcow2 file.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::device::BlockDevice;
use super::disk::FlatDisk;
use super::pieces::{DiskPiece, DiskPieces, copy, copy_and_clear, runs};
use super::qemu;
use super::qemu_nbd::QemuNbd;
use crate::error::{Error, Kind, Result};
use crate::format::stream::PIECE;
use crate::io::new_file::NewFile;
use crate::progress::Progress;

/// A run of zeroes of this many bytes becomes a hole: more than any host's block and as much as a qcow2 file's cluster,
/// little enough that the file stays thin.
const GRAIN: usize = 64 << 10;

/// Writes the bytes of `disk` into the new, empty file `out`; what is zero stays a hole. `path` is for messages.
pub fn raw(disk: &dyn FlatDisk, out: &File, path: &Path, progress: &Progress) -> Result<()> {
    let cannot = |e: std::io::Error| Error::io(&e, path, "cannot write");
    progress.set_total(disk.size());
    out.set_len(disk.size()).map_err(cannot)?;
    copy(disk, &[(0, disk.size())], progress, &|offset, bytes| {
        filled(bytes)
            .try_for_each(|at| out.write_all_at(&bytes[at.clone()], offset + at.start as u64).map_err(cannot))
    })
}

/// Writes the bytes of `disk` to `out` in their order, zeroes and all. `name` is for messages.
pub fn pipe(disk: &dyn FlatDisk, out: &mut dyn Write, name: &Path, progress: &Progress) -> Result<()> {
    let cannot = |e: std::io::Error| {
        let kind = e.raw_os_error().map_or(Kind::Io, Kind::of_errno);
        Error::at(kind, name, format!("cannot write the disk: {}", crate::error::words(&e)))
    };
    progress.set_total(disk.size());
    let zeroes = vec![0; PIECE];
    let mut buf = vec![0; PIECE];
    for piece in DiskPieces::new(disk, &[(0, disk.size())]) {
        progress.check()?;
        match piece? {
            DiskPiece::Data(offset, len) => {
                disk.read(offset, &mut buf[..len])?;
                out.write_all(&buf[..len]).map_err(cannot)?;
                progress.add(len as u64);
            }
            DiskPiece::Hole(_, mut len) => {
                while len > 0 {
                    progress.check()?;
                    let part = len.min(PIECE as u64);
                    out.write_all(&zeroes[..part as usize]).map_err(cannot)?;
                    progress.add(part);
                    len -= part;
                }
            }
        }
    }
    out.flush().map_err(cannot)
}

/// Writes `disk` to the device, over whatever is there; durable when this returns.
pub fn device(disk: &dyn FlatDisk, to: &BlockDevice, progress: &Progress) -> Result<()> {
    progress.set_total(disk.size());
    let clear = |at, len| to.clear(at, len, progress);
    copy_and_clear(
        disk,
        &[(0, disk.size())],
        progress,
        &|offset, bytes| {
            runs(bytes, GRAIN).into_iter().try_for_each(|(range, zero)| {
                let at = offset + range.start as u64;
                if zero { clear(at, range.len() as u64) } else { to.write(at, &bytes[range]) }
            })
        },
        &clear,
    )?;
    to.sync()
}

/// Writes `disk` as a qcow2 file into the new, empty file `out`.
pub fn qcow2(disk: &dyn FlatDisk, out: &NewFile, progress: &Progress) -> Result<()> {
    const FORMAT: &str = "qcow2";
    progress.set_total(disk.size());
    let file = out.open_path();
    qemu::create(&file, FORMAT, disk.size(), out.path(), progress)?;
    let nbd = QemuNbd::writing(&file, FORMAT, out.path(), progress)?;
    copy(disk, &[(0, disk.size())], progress, &|offset, bytes| {
        filled(bytes).try_for_each(|at| nbd.write(offset + at.start as u64, &bytes[at]))
    })?;
    nbd.finish(progress)
}

/// Where `bytes` are not zero, by [`GRAIN`].
fn filled(bytes: &[u8]) -> impl Iterator<Item = std::ops::Range<usize>> {
    runs(bytes, GRAIN).into_iter().filter_map(|(range, zero)| (!zero).then_some(range))
}
