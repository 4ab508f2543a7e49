//! A layered image at rest, for those who look: its descriptor, and the files that it names. Nothing is written and
//! nothing is locked. Every file is reached through the image's folder, by the one rule of [`paths`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::Stat;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Delta, Descriptor, Guid, MAX_BYTES};
use crate::format::header::SECTOR;
use crate::image::chain::{AtRest, Candidate};
use crate::image::glance;
use crate::image::kind::{DESCRIPTOR, ImageKind};
use crate::image::labels::Labels;
use crate::image::paths::{self, Located};
use crate::image::store::Store;
use crate::io::file::{HostFile, read_full};
use crate::io::real::{Access, RealFile};
use crate::vdisk::live::lower;
use crate::words::quoted;

/// A merge of a raw base with the only delta on it.
#[derive(Clone, Copy, Debug)]
pub struct RawMerge {
    /// Bytes that the raw file takes on the host: so much is copied where it goes up into the delta.
    pub bytes: u64,
    /// What the delta holds goes down into the raw file, which costs less, unless the disk that is written is open.
    pub goes_down: bool,
    /// The delta is what the disk is written to.
    pub under_the_disk: bool,
}

/// An image with a descriptor.
pub struct Layered {
    folder: PathBuf,
    dir: OwnedFd,
    descriptor: Descriptor,
    labels: Labels,
}

impl Layered {
    /// Reads the descriptor in `folder`.
    pub fn read(folder: &Path) -> Result<Layered> {
        let dir = paths::image_folder(folder)?;
        let (descriptor, labels) = Store::read(dir.as_fd(), folder)?;
        Ok(Layered { folder: folder.to_owned(), dir, descriptor, labels })
    }

    /// The image's folder, as it was named.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The snapshots' names.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Disk size in bytes, as the descriptor has it.
    pub fn size(&self) -> u64 {
        self.descriptor.disk_sectors.saturating_mul(SECTOR)
    }

    /// Space that all files take on the host, in bytes. A file that is missing, or may not be had, takes none.
    pub fn allocated(&self) -> u64 {
        // stat(2) counts units of 512 bytes.
        self.stats().map(|stat| stat.st_blocks as u64 * 512).sum()
    }

    /// Its files, by device and inode. One that is missing, or may not be had, is none.
    pub fn files(&self) -> impl Iterator<Item = (u64, u64)> {
        self.stats().map(|stat| (stat.st_dev, stat.st_ino))
    }

    /// Device and inode of a delta's file; None: it is missing, or may not be had.
    pub fn identity(&self, delta: &Delta) -> Option<(u64, u64)> {
        let stat = paths::named(self.dir.as_fd(), &self.folder, &delta.file, false).ok()??;
        Some((stat.st_dev, stat.st_ino))
    }

    fn stats(&self) -> impl Iterator<Item = Stat> {
        let named = |delta: &Delta| paths::named(self.dir.as_fd(), &self.folder, &delta.file, false);
        self.descriptor.deltas.iter().filter_map(move |delta| named(delta).ok().flatten())
    }

    /// Where a delta's file lies. A descriptor comes from elsewhere, and must not make us read just any file: those of
    /// its folder and of the folder around it are enough.
    pub fn located(&self, delta: &Delta) -> Result<Located> {
        Located::named(self.dir.as_fd(), &self.folder, &delta.file, false)
    }

    /// The bytes of the file `name` in its folder, the descriptor or what lies beside it; None: it is not there. A link there
    /// may lead to a file that is not the image's, and is an error.
    pub fn beside(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let shown = self.folder.join(name);
        let cannot = |e: std::io::Error| Error::io(&e, &shown, "cannot read");
        let file = match RealFile::open_as(&self.dir, name, &shown, Access::ReadOnly) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            file => file?,
        };
        let len = file.len().map_err(cannot)?.min(MAX_BYTES as u64);
        let mut bytes = vec![0; len as usize];
        let got = read_full(&file, &mut bytes, 0).map_err(cannot)?;
        bytes.truncate(got);
        Ok(Some(bytes))
    }

    /// Why a mount would not serve it, or what a look finds of damage.
    pub fn glance(&self) -> Result<()> {
        glance::layers(self.dir.as_fd(), &self.folder, &self.descriptor, &self.labels, false)
    }

    /// Files of the folder that a crashed operation made or dropped and that no delta has.
    pub fn left_over(&self) -> Vec<String> {
        let there = |file: &&str| self.folder.join(file).symlink_metadata().is_ok();
        self.labels.noted(&self.descriptor).filter(there).map(str::to_owned).collect()
    }

    /// How a delta's file is stored.
    pub fn kind(&self, delta: &Delta) -> ImageKind {
        glance::kind(&self.descriptor, delta)
    }

    /// The snapshot of this name; None is the live disk.
    pub fn guid(&self, snapshot: Option<&str>) -> Result<Guid> {
        let Some(name) = snapshot else { return Ok(self.descriptor.top) };
        let what = format!(
            "has no snapshot {name}; these are there: ploopfs snapshot list {}",
            quoted(&self.folder)
        );
        let found = self.labels.find(&self.descriptor, name).filter(|guid| *guid != self.descriptor.top);
        found.ok_or_else(|| Error::at(Kind::NotFound, &self.folder, what))
    }

    /// What a merge of this snapshot comes to because it is a raw base. None: it is none, or has no single child.
    pub fn raw_merge(&self, guid: Guid) -> Option<RawMerge> {
        let delta = self.descriptor.delta(guid).filter(|delta| self.kind(delta) == ImageKind::Raw)?;
        let named = paths::named(self.dir.as_fd(), &self.folder, &delta.file, false).ok()??;
        let [child] = self.descriptor.children(guid)[..] else { return None };
        let above = self.descriptor.delta(child)?;
        let goes_down =
            || lower::is_cheaper(&self.open(delta)?.into_level(), &self.open(above)?.into_level());
        Some(RawMerge {
            // stat(2) counts units of 512 bytes.
            bytes: named.st_blocks as u64 * 512,
            // The work says what is wrong with them.
            goes_down: goes_down().unwrap_or(true),
            under_the_disk: child == self.descriptor.top,
        })
    }

    /// The levels of a snapshot or of the live disk, base first.
    pub fn chain(&self, guid: Guid) -> Result<Vec<&Delta>> {
        let damaged = |why: String| Error::at(Kind::Damaged, self.folder.join(DESCRIPTOR), why);
        let chain = self.descriptor.chain(guid).map_err(|e| damaged(e.to_string()))?;
        let delta =
            |guid| self.descriptor.delta(guid).ok_or_else(|| damaged(format!("has no file for {guid}")));
        chain.into_iter().map(delta).collect()
    }

    /// Opens the file of a delta, its header judged.
    pub fn open(&self, delta: &Delta) -> Result<AtRest> {
        Candidate::open_at(&self.located(delta)?)?.open_as(self.kind(delta))
    }
}
