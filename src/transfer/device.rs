//! A block device as the place for a disk.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// Bytes that are cleared between two looks at the progress: a device that cannot forget writes them.
const STRIDE: u64 = 64 << 20;

/// A device that is open for us alone: what mounts it, or makes it a part of something, is refused meanwhile.
#[derive(Debug)]
pub struct BlockDevice {
    file: File,
    path: PathBuf,
    /// Bytes in it.
    size: u64,
}

impl BlockDevice {
    /// True for the path of a block device, also by way of a link.
    pub fn is_at(path: &Path) -> bool {
        path.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
    }

    /// Opens the device at `path` for a disk of `disk` bytes. One that is mounted or a part of something is refused, and
    /// one that is too small.
    pub fn open(path: &Path, disk: u64) -> Result<BlockDevice> {
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOCTTY;
        let opened = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(|e| match e {
            Errno::BUSY => {
                let what = "is mounted, or a part of something that is in use (lsblk shows it); nothing is written to it";
                Error::at(Kind::InUse, path, what)
            }
            e => Error::io(&e.into(), path, "cannot open the device for writing"),
        })?;
        let file = File::from(opened);
        let cannot = |e: std::io::Error| Error::io(&e, path, "cannot look at the device");
        if !file.metadata().map_err(cannot)?.file_type().is_block_device() {
            return Err(Error::at(Kind::Exists, path, "is no block device, and there already"));
        }
        let size =
            retry_on_intr(|| rustix::fs::seek(&file, SeekFrom::End(0))).map_err(|e| cannot(e.into()))?;
        if size < disk {
            let what = format!("has {size} bytes, and the disk has {disk}; nothing was written");
            return Err(Error::at(Kind::Invalid, path, what));
        }
        Ok(BlockDevice { file, path: path.to_owned(), size })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes all of `bytes` at byte `at`.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(|e| self.cannot(&e))
    }

    /// Makes a range zero, without taking space for it where the device knows how.
    pub fn clear(&self, at: u64, len: u64, progress: &Progress) -> Result<()> {
        let (mut at, end) = (at, at + len);
        while at < end {
            progress.check()?;
            let part = (end - at).min(STRIDE);
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, at, part) {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                // Not whole blocks of it, or it cannot.
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    let zeroes = vec![0; part.min(1 << 20) as usize];
                    let mut done = 0;
                    while done < part {
                        let now = (part - done).min(zeroes.len() as u64);
                        self.write(at + done, &zeroes[..now as usize])?;
                        done += now;
                    }
                }
                Err(e) => return Err(self.cannot(&e.into())),
            }
            at += part;
        }
        Ok(())
    }

    /// Makes durable what was written.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(&e, &self.path, "cannot sync the device"))
    }

    fn cannot(&self, e: &std::io::Error) -> Error {
        Error::io(e, &self.path, "cannot write to the device, on which a part of the disk is now")
    }
}
