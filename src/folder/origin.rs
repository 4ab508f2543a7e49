//! Where an image comes from: one file, or a folder of layers. It can change while the image is open: the first
//! snapshot of a single file turns it into a folder.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};

use super::scan::{Identity, Source};
use crate::error::{Error, Kind, Result};
use crate::image::store::Store;
use crate::io::file::HostStatus;

/// The source of one image.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its name in the images folder.
    pub file: OsString,
    /// The image's name by that; another one than it is served under where the file was renamed meanwhile. What the folder
    /// is called that a single file becomes.
    pub name: OsString,
    /// What it is.
    pub source: Source,
    /// Device and inode of the file or folder.
    pub identity: Identity,
}

impl Origin {
    /// "ploop", "raw" or "layered".
    pub fn kind(&self) -> &'static str {
        match self.source {
            Source::File(kind) => kind.as_str(),
            Source::Layers => "layered",
        }
    }

    /// Opens the folder of a layered image, if it is still the one that was taken in.
    pub fn folder(&self, images: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let cannot = |e: rustix::io::Errno| Error::io(&e.into(), path, "cannot open the image's folder");
        let dir = rustix::fs::openat(images, &self.file, flags, Mode::empty()).map_err(cannot)?;
        let stat = rustix::fs::fstat(&dir).map_err(cannot)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            let why = "is another folder now; it will be taken in anew";
            return Err(Error::at(Kind::NotFound, path, why));
        }
        Ok(dir)
    }

    /// What the host says of it without opening any delta: of a layered image, the top's owner, mode and time, and the
    /// space of its whole chain. None when it is gone.
    pub fn status(&self, images: BorrowedFd<'_>, path: &Path) -> Option<HostStatus> {
        match self.source {
            Source::File(_) => {
                let status = status_of(images, &self.file)?;
                ((status.dev, status.ino) == self.identity).then_some(status)
            }
            Source::Layers => {
                let dir = self.folder(images, path).ok()?;
                let (descriptor, _) = Store::read(dir.as_fd(), path).ok()?;
                let chain = descriptor.chain(descriptor.top).ok()?;
                let files = chain.iter().filter_map(|guid| descriptor.delta(*guid));
                let all: Vec<HostStatus> =
                    files.filter_map(|delta| status_of(dir.as_fd(), delta.file.as_ref())).collect();
                let blocks = all.iter().map(|status| status.blocks).sum();
                all.last().map(|top| HostStatus { blocks, ..*top })
            }
        }
    }
}

fn status_of(dir: BorrowedFd<'_>, file: &std::ffi::OsStr) -> Option<HostStatus> {
    Some(HostStatus::from(rustix::fs::statat(dir, file, AtFlags::SYMLINK_NOFOLLOW).ok()?))
}
