//! Where an image comes from: one file, or a folder of layers. It can change while the image is open: the first
//! snapshot of a single file turns it into a folder.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};

use super::scan::{Identity, Source};
use crate::disk::snapshots::{self, SnapshotLine};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::image::paths;
use crate::image::store::Store;
use crate::io::file::HostStatus;

/// The source of one image.
#[derive(Clone, Debug)]
pub(super) struct Origin {
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
    pub(super) fn kind(&self) -> &'static str {
        match self.source {
            Source::File(kind) => kind.as_str(),
            Source::Layers => "layered",
        }
    }

    /// Opens the folder of a layered image, if it is still the one that was taken in.
    pub(super) fn folder(&self, images: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
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

    /// Its snapshots, by the descriptor of the images folder: that one's path may lead to another folder by now.
    pub(super) fn snapshots(
        &self,
        images: BorrowedFd<'_>,
        path: &Path,
        allow_outside: bool,
    ) -> Result<Vec<SnapshotLine>> {
        match self.source {
            Source::File(_) => {
                let gone = || Error::at(Kind::NotFound, path, "is gone from the folder");
                let status = self.status(images, path, allow_outside).ok_or_else(gone)?;
                // Counted in units of 512 bytes.
                Ok(snapshots::of_single(status.blocks * 512))
            }
            Source::Layers => {
                let dir = self.folder(images, path)?;
                snapshots::of_folder(dir.as_fd(), path, allow_outside)
            }
        }
    }

    /// What the host says of it without opening any delta: of a layered image, the top's owner, mode and time, and the
    /// space of its whole chain. None when it is gone, or its top is no file that it may have.
    pub(super) fn status(
        &self,
        images: BorrowedFd<'_>,
        path: &Path,
        allow_outside: bool,
    ) -> Option<HostStatus> {
        match self.source {
            Source::File(_) => {
                let stat = rustix::fs::statat(images, &self.file, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                ((stat.st_dev, stat.st_ino) == self.identity).then(|| stat.into())
            }
            Source::Layers => {
                let dir = self.folder(images, path).ok()?;
                let (descriptor, _) = Store::read(dir.as_fd(), path).ok()?;
                let chain = descriptor.chain(descriptor.top).ok()?;
                // A descriptor can name any file of the host, as well after the image was taken in.
                let status = |guid: &Guid| -> Option<HostStatus> {
                    let file = &descriptor.delta(*guid)?.file;
                    let stat = paths::named(dir.as_fd(), path, file, allow_outside).ok()??;
                    Some(stat.into())
                };
                let (top, below) = chain.split_last()?;
                let top = status(top)?;
                let below: u64 = below.iter().filter_map(status).map(|status| status.blocks).sum();
                Some(HostStatus { blocks: top.blocks + below, ..top })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::descriptor::Descriptor;
    use crate::image::kind::DESCRIPTOR;
    use std::fs::{self, File};

    /// stat of the image in the mount showed owner, mode, length and times of whatever file its descriptor named.
    #[test]
    fn a_descriptor_that_names_a_file_outside_shows_nothing_of_it() {
        let temp = tempfile::tempdir().expect("a folder");
        let images = temp.path().join("images");
        fs::create_dir_all(images.join("vm")).expect("folders");
        for secret in [temp.path().join("secret"), images.join("beside")] {
            fs::write(secret, [1; 5000]).expect("written");
        }
        let dir = File::open(&images).expect("opens");
        let stat = rustix::fs::statat(&dir, "vm", AtFlags::SYMLINK_NOFOLLOW).expect("there");
        let (file, identity) = (OsString::from("vm"), (stat.st_dev, stat.st_ino));
        let origin = Origin { name: file.clone(), file, source: Source::Layers, identity };
        let status = |named: &str| {
            let xml = Descriptor::new(2048, 2048, named, false).to_xml();
            fs::write(images.join("vm").join(DESCRIPTOR), xml).expect("written");
            origin.status(dir.as_fd(), &images.join("vm"), false)
        };
        assert_eq!(status("../beside").expect("it may have it").len, 5000);
        assert!(status("../../secret").is_none());
        assert!(status(temp.path().join("secret").to_str().expect("ASCII")).is_none());
        assert!(origin.status(dir.as_fd(), &images.join("vm"), true).is_some(), "with --allow-outside");
    }
}
