//! A disk in a file of another program's format, to be read: QEMU's programs know the format, and report where data is.

use std::path::Path;

use super::disk::FlatDisk;
use super::qemu::{self, BackingFile, Extent, Info, Reach};
use super::qemu_nbd::QemuNbd;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::MAX_CHAIN;
use crate::progress::Progress;

/// Such a disk. Its zeroes, and what is outside of what was asked for, are holes.
pub struct Foreign {
    nbd: QemuNbd,
    size: u64,
    /// Ascending.
    extents: Vec<Extent>,
}

impl Foreign {
    /// Opens `file` of `format`, of which `info` is known.
    pub fn open(
        file: &Path,
        format: &str,
        info: &Info,
        reach: Reach,
        progress: &Progress,
    ) -> Result<Foreign> {
        let (extents, size) = (qemu::map(file, format, info, reach, progress)?, info.size);
        if reach == Reach::Chain {
            refuse_cut_below(info, progress)?;
        }
        let nbd = QemuNbd::reading(file, format, progress)?;
        if nbd.size() != size {
            let what = format!(
                "became another just now: its disk has {} bytes and not {size}; try again",
                nbd.size()
            );
            return Err(Error::at(Kind::Busy, file, what));
        }
        Ok(Foreign { nbd, size, extents })
    }

    /// What reads as zero and was asked for, ascending.
    pub fn zeroes(&self) -> impl Iterator<Item = &Extent> {
        self.extents.iter().filter(|extent| extent.zero)
    }
}

/// Looks at the files on which one stands, as far as they say what they are.
fn refuse_cut_below(info: &Info, progress: &Progress) -> Result<()> {
    let mut next = info.backing.clone();
    for _ in 0..MAX_CHAIN {
        let Some(BackingFile { path, format: Some(format), .. }) = next else { return Ok(()) };
        let path = Path::new(&path);
        let info = qemu::info(path, &format)?;
        qemu::map(path, &format, &info, Reach::Own, progress)?;
        next = info.backing;
    }
    Ok(())
}

impl FlatDisk for Foreign {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.nbd.read(offset, buf)
    }

    fn data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let first = self.extents.partition_point(|extent| extent.end <= from);
        let data = self.extents[first..].iter().find(|extent| !extent.zero && extent.begin < self.size);
        Ok(data.map(|extent| (extent.begin.max(from), extent.end.min(self.size))))
    }
}
