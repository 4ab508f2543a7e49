//! One disk, opened by this process.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::open::OpenDisk;
use crate::error::{Error, Kind, Result};
use crate::front::target;
use crate::image::create::{self, CreatePlan};
use crate::io::real::Access;
use crate::progress::Progress;
use crate::transfer::{disk as flat, export};
use crate::vdisk::{Image, Options};
use crate::words::quoted;

/// Bytes of one request to the image, which holds a copy of them: what a guest's largest request has.
const PIECE: usize = 1 << 20;

/// Creates a thin image of `size` bytes, rounded up to a cluster (1 MiB). `path` names it with or without its ending;
/// what is returned is the file. The image is there complete and durable, or not at all.
///
/// # Errors
/// [`Kind::Exists`] where the name is taken; [`Kind::Invalid`] for a size of 0 or beyond the format.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// let file = ploopfs::create(folder.path().join("vm1"), 10 << 30)?;
/// assert!(file.ends_with("vm1.hds"));
/// assert_eq!(ploopfs::Disk::open(&file)?.size(), 10 << 30);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn create(path: impl AsRef<Path>, size: u64) -> Result<PathBuf> {
    create::create(path.as_ref(), &CreatePlan::thin(size)).map(|made| made.path)
}

/// The disk of an image at rest, or of one of its snapshots, under the locks that keep other programs off: a reader's
/// lets readers in, a writer's nothing. An image that a mount serves has its disk there, as a file.
///
/// All offsets and lengths are in bytes and need no alignment.
///
/// ```
/// use ploopfs::Disk;
///
/// # let folder = tempfile::tempdir()?;
/// # let image = folder.path().join("vm1");
/// ploopfs::create(&image, 1 << 30)?;
/// let disk = Disk::open_writable(&image)?;
/// disk.write_at(5 << 20, b"hello")?;
/// disk.close()?; // durable
///
/// let disk = Disk::open(&image)?;
/// let mut read = [0; 5];
/// disk.read_at(5 << 20, &mut read)?;
/// assert_eq!(&read, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Disk {
    path: PathBuf,
    image: Arc<Image>,
    /// Its locks; taken out by what closes it.
    opened: Option<OpenDisk>,
}

impl Disk {
    /// Opens `IMAGE` or `IMAGE@SNAPSHOT` for reading.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::InUse`] where a writer holds it, [`Kind::Damaged`], [`Kind::Unsupported`] for what
    /// is no image.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let image = folder.path().join("vm1");
    /// # ploopfs::create(&image, 1 << 20)?;
    /// let [one, two] = [ploopfs::Disk::open(&image)?, ploopfs::Disk::open(&image)?];
    /// let refused = ploopfs::Disk::open_writable(&image).map(drop);
    /// assert_eq!(refused.unwrap_err().kind(), ploopfs::Kind::InUse);
    /// # drop((one, two));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Disk> {
        let target = target(path.as_ref())?;
        let access = Access::ReadOnly;
        let opened = OpenDisk::open(&target.path, target.snapshot.as_deref(), access, Options::default())?;
        Ok(Disk::of(target.path, opened))
    }

    /// Opens the live disk of `IMAGE` for reading and writing. What an earlier crash left is settled first.
    ///
    /// # Errors
    /// As [`open`](Disk::open); also [`Kind::InUse`] where a reader holds it, and [`Kind::ReadOnly`] for a snapshot.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let image = folder.path().join("vm1");
    /// # ploopfs::create(&image, 1 << 30)?;
    /// let disk = ploopfs::Disk::open_writable(&image)?;
    /// disk.write_at(0, &[7; 4096])?;
    /// disk.flush()?; // what was written is durable from here on
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_writable(path: impl AsRef<Path>) -> Result<Disk> {
        let target = target(path.as_ref())?;
        if target.snapshot.is_some() {
            let copy = format!("ploopfs clone {} NAME", quoted(path.as_ref()));
            let what = format!("a snapshot is never written; make an image of it: {copy}");
            return Err(Error::at(Kind::ReadOnly, path.as_ref(), what));
        }
        let opened = OpenDisk::open(&target.path, None, Access::ReadWrite, Options::default())?;
        let disk = Disk::of(target.path, opened);
        disk.image.make_writable()?;
        Ok(disk)
    }

    fn of(path: PathBuf, opened: OpenDisk) -> Disk {
        Disk { path, image: opened.image.clone(), opened: Some(opened) }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Fills `buffer` from byte `offset` on; what was never written is zeroes.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a range that is not in the disk; [`Kind::Damaged`], [`Kind::Io`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.inside(offset, buffer.len() as u64)?;
        buffer.chunks_mut(PIECE).enumerate().try_for_each(|(number, piece)| {
            flat::FlatDisk::read(&self.image, offset + (number * PIECE) as u64, piece)
        })
    }

    /// Writes `data` at byte `offset`. Durable after [`flush`](Disk::flush) or [`close`](Disk::close), not before.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a range that is not in the disk; [`Kind::ReadOnly`] for a disk opened to be read;
    /// [`Kind::NoSpace`], [`Kind::Io`].
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.inside(offset, data.len() as u64)?;
        data.chunks(PIECE)
            .enumerate()
            .try_for_each(|(number, piece)| self.image.write_at(offset + (number * PIECE) as u64, piece))
    }

    /// Gives the host back what `len` bytes from `offset` on take; they read as zeroes.
    ///
    /// # Errors
    /// As [`write_at`](Disk::write_at).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let image = folder.path().join("vm1");
    /// # ploopfs::create(&image, 1 << 30)?;
    /// let disk = ploopfs::Disk::open_writable(&image)?;
    /// disk.write_at(8 << 20, &[7; 2 << 20])?;
    /// assert_eq!(disk.data_behind(0)?, Some(8 << 20..10 << 20));
    /// disk.discard_at(0, disk.size())?;
    /// assert_eq!(disk.data_behind(0)?, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.inside(offset, len)?;
        self.image.discard_at(offset, len)
    }

    /// The first range at or behind byte `from` that may hold something else than zeroes.
    ///
    /// # Errors
    /// [`Kind::Damaged`], [`Kind::Io`].
    pub fn data_behind(&self, from: u64) -> Result<Option<Range<u64>>> {
        Ok(flat::FlatDisk::data(&self.image, from)?.map(|(begin, end)| begin..end))
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// [`Kind::Io`]: what was written since the last flush may be lost, and the disk takes no more writes.
    pub fn flush(&self) -> Result<()> {
        self.image.flush_now()
    }

    /// Writes the whole disk into the new, empty file `out`; what is zero stays a hole. `out` is not synced.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] through `progress`; what a read or a write of the host's file fails with.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let image = folder.path().join("vm1");
    /// # ploopfs::create(&image, 1 << 30)?;
    /// let (out, progress) = (tempfile::tempfile()?, ploopfs::Progress::new());
    /// ploopfs::Disk::open(&image)?.copy_to(&out, &progress)?;
    /// assert_eq!(out.metadata()?.len(), 1 << 30);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn copy_to(&self, out: &File, progress: &Progress) -> Result<()> {
        export::raw(&self.image, out, &self.path, progress)
    }

    /// Makes durable what was written, and closes the image. A drop does so too, but has no way to report a failure.
    ///
    /// # Errors
    /// [`Kind::Io`], as [`flush`](Disk::flush).
    pub fn close(mut self) -> Result<()> {
        self.opened.take().map_or(Ok(()), OpenDisk::close)
    }

    fn inside(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => {
                let what = format!("{len} bytes at byte {offset} are not in a disk of {size} bytes");
                Err(Error::at(Kind::Invalid, &self.path, what))
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(opened) = self.opened.take()
            && let Err(e) = opened.close()
        {
            log::error!("{e}");
        }
    }
}
