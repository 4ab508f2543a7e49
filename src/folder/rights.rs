//! Mode, owner and group of an image: those of its top file (docs/design.md#what-is-an-image).

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Gid, Mode, Uid};

use super::entry::Entry;
use super::scan::Source;
use crate::error::{Error, Kind, Result};
use crate::image::paths;
use crate::image::store::Store;
use crate::io::file::HostFile;
use crate::io::real::{Access, RealFile};

/// What is to change; None: stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

impl Entry {
    /// Gives the image's top file another mode, owner or group, durably. Blocks; not for threads of a transport.
    pub fn set_rights(&self, rights: &Rights) -> Result<()> {
        let (path, origin) = (self.path(), self.origin());
        if self.shared.read_only {
            return Err(Error::at(Kind::ReadOnly, path, "the mount is read-only"));
        }
        if rights.mode.is_some_and(|mode| mode & !0o777 != 0) {
            return Err(Error::at(Kind::NotPermitted, path, "a disk has no set-user-id or sticky bit"));
        }
        let images = self.shared.place.fd();
        let cannot = |e: std::io::Error| Error::io(&e, &path, "cannot change mode or owner");
        // Another descriptor of the file takes no lock and, closed, gives none back.
        let file = match origin.source {
            Source::File(_) => {
                let file = RealFile::open_at(images, &origin.file, Access::ReadOnly)?;
                let status = file.status().map_err(cannot)?;
                if (status.dev, status.ino) != origin.identity {
                    return Err(Error::at(Kind::NotFound, &path, "is another file now"));
                }
                file
            }
            Source::Layers => {
                let dir = origin.folder(images.as_fd(), &path)?;
                let (descriptor, _) = Store::read(dir.as_fd(), &path)?;
                let missing =
                    || Error::at(Kind::Damaged, &path, "its descriptor names no file for the live disk");
                let delta = descriptor.delta(descriptor.top).ok_or_else(missing)?;
                let (file, shown) = (Path::new(&delta.file), path.join(&delta.file));
                let (folder, name) = paths::resolve(dir.as_fd(), file, &shown, self.shared.allow_outside)?;
                RealFile::open_as(&folder, Path::new(&name), &shown, Access::ReadOnly)?
            }
        };
        // The owner first: a new one takes bits of the mode away.
        if rights.uid.is_some() || rights.gid.is_some() {
            let (uid, gid) = (rights.uid.map(Uid::from_raw), rights.gid.map(Gid::from_raw));
            rustix::fs::fchown(&file, uid, gid).map_err(|e| cannot(e.into()))?;
        }
        if let Some(mode) = rights.mode {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(|e| cannot(e.into()))?;
        }
        file.sync_all().map_err(cannot)
    }
}
