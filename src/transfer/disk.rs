//! What can be read as a disk: a flat file (raw, a block device, or what a mount of ours shows) and an image at rest.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::RealFile;
use crate::vdisk::Image;

/// A disk that is only read.
pub trait FlatDisk: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Reads all of `buf` at byte `offset`; the range lies inside the disk.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Begin and end of the first range at or behind byte `from` that may hold something else than zeroes.
    fn data(&self, from: u64) -> Result<Option<(u64, u64)>>;
}

/// A file with the disk's bytes.
#[derive(Debug)]
pub struct FlatFile {
    file: File,
    path: PathBuf,
    size: u64,
    /// The host knows where holes are.
    finds_holes: bool,
}

impl FlatFile {
    /// Opens a regular file or a block device for reading.
    pub fn open(path: &Path) -> Result<FlatFile> {
        let cannot = |e: std::io::Error| Error::io(&e, path, "cannot open");
        // Looked at before it is opened: the open of a pipe waits for its other end.
        let kind = path.metadata().map_err(cannot)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a folder" } else { "neither a file nor a block device" };
            return Err(Error::at(Kind::Unsupported, path, format!("is {what}, not a disk")));
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(cannot)?;
        FlatFile::of(file, path)
    }

    /// Takes over an open file or block device; `path` is how messages name it.
    pub fn of(file: File, path: &Path) -> Result<FlatFile> {
        let finds_holes = file.metadata().is_ok_and(|meta| meta.is_file());
        let size = retry_on_intr(|| rustix::fs::seek(&file, SeekFrom::End(0)));
        let size = size.map_err(|e| Error::io(&e.into(), path, "cannot read its length"))?;
        Ok(FlatFile { file, path: path.to_owned(), size, finds_holes })
    }

    /// Keeps writers off a plain file while it is read, or says who has it; a device has no such locks. For a raw image, as
    /// every opener of one uses them: a copy made meanwhile would be mixed from two moments.
    pub fn lock(&self) -> Result<Option<DeltaLock>> {
        let cannot = |e: std::io::Error| Error::io(&e, &self.path, "cannot lock");
        if !self.file.metadata().map_err(cannot)?.is_file() {
            return Ok(None);
        }
        let file = RealFile::from_file(self.file.try_clone().map_err(cannot)?, &self.path)?;
        DeltaLock::acquire(Arc::new(file), Use::Reader).map(Some)
    }

    /// Refuses a file that has another length by now: what it lost would have been read as a hole, and of one that is still
    /// being made a part was read.
    pub fn refuse_changed(&self) -> Result<()> {
        let now = retry_on_intr(|| rustix::fs::seek(&self.file, SeekFrom::End(0)));
        let now = now.map_err(|e| Error::io(&e.into(), &self.path, "cannot read its length"))?;
        if now == self.size {
            return Ok(());
        }
        let what =
            format!("had {} bytes at first and {now} now: it was written while it was read", self.size);
        Err(Error::at(Kind::Busy, &self.path, what))
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FlatDisk for FlatFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::at(Kind::Io, &self.path, "became shorter while it was read")
            }
            _ => Error::io(&e, &self.path, format!("cannot read byte {offset}")),
        })
    }

    fn data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        if from >= self.size {
            return Ok(None);
        }
        if !self.finds_holes {
            return Ok(Some((from, self.size)));
        }
        // The descriptor's position moves, which nothing here uses.
        let seek = |to| retry_on_intr(|| rustix::fs::seek(&self.file, to));
        let cannot = |e: Errno| Error::io(&e.into(), &self.path, "cannot find holes");
        let begin = match seek(SeekFrom::Data(from)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => return Ok(None),
            // A host that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((from, self.size))),
            Err(e) => return Err(cannot(e)),
        };
        let end = seek(SeekFrom::Hole(begin)).map_err(cannot)?.clamp(begin, self.size);
        Ok((begin < end).then_some((begin, end)))
    }
}

impl FlatDisk for Arc<Image> {
    fn size(&self) -> u64 {
        Image::size(self)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.read_at(offset, buf.len())?;
        if bytes.len() < buf.len() {
            return Err(Error::new(Kind::Io, format!("{}: the disk ends at byte {offset}", self.name())));
        }
        buf.copy_from_slice(&bytes);
        Ok(())
    }

    fn data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        match self.seek_data(from)? {
            Some(begin) => Ok(Some((begin, self.seek_hole(begin)?.max(begin + 1).min(self.size())))),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a file had lost by then was a hole, and of a download that was still going on its first part was the disk.
    #[test]
    fn a_file_that_is_longer_or_shorter_by_now_was_not_read_as_it_is() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("disk");
        std::fs::write(&path, [7; 8192]).expect("written");
        let flat = FlatFile::open(&path).expect("opens");
        flat.refuse_changed().expect("as it was");
        for len in [4096, 12288] {
            OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(len)).expect("changed");
            assert_eq!(flat.refuse_changed().expect_err("another length").kind(), Kind::Busy);
        }
    }
}
