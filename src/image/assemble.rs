//! A layered image that is put together out of nothing: a snapshot's file, filled by the caller, and an empty top.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::format::header::Header;
use crate::image::create;
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::{LABELS_NAME, Labels};
use crate::image::level::{Layout, Level};
use crate::image::make_folder::{new_folder, remove_folder, rename_new};
use crate::image::store::{create_delta, sync_folder, write_beside};
use crate::io::file::HostStatus;
use crate::sync::Arc;

/// The image on its way. Dropped before [`finish`](Self::finish), nothing is left of it; killed, a dot-folder is, which the
/// next attempt removes.
#[derive(Debug)]
pub struct Assembly {
    around: File,
    parent: PathBuf,
    folder: OwnedFd,
    building: OsString,
    to: PathBuf,
    name: String,
    done: bool,
}

impl Assembly {
    /// Begins the image `to`, a folder, which must not be there.
    pub fn begin(to: &Path) -> Result<Assembly> {
        if let Some(taken) = create::taken_by(to)? {
            let why = "there is an image of this name already; choose another";
            return Err(Error::at(Kind::Exists, taken, why));
        }
        let name = to.file_name().ok_or_else(|| Error::at(Kind::Invalid, to, "ends in no name"))?;
        let name = name.to_str().ok_or_else(|| Error::at(Kind::Invalid, to, "must be UTF-8"))?.to_owned();
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        let around = File::open(&parent).map_err(|e| Error::io(&e, &parent, "cannot open the folder"))?;
        let building = OsString::from(format!(".{name}.new"));
        let folder = new_folder(around.as_fd(), &building, &parent.join(&building))?;
        Ok(Assembly { around, parent, folder, building, to: to.to_owned(), name, done: false })
    }

    /// Makes the snapshot's file, empty.
    pub fn base(&self, header: &Header) -> Result<Level> {
        let (shown, name) = (self.parent.join(&self.building), format!("{}.hds", self.name));
        let file = create_delta(self.folder.as_fd(), &shown, &name, header, &ours())?;
        Ok(Level { file: Arc::new(file), path: shown.join(name), layout: Layout::Ploop(*header) })
    }

    /// Makes it an image, once the snapshot's file is durable:
    ///
    /// 1. an empty top beside it, synced; 2. the labels, then the descriptor, synced; 3. the folder synced; 4. renamed to
    ///    its name, which must be free; 5. the folder around it synced.
    ///
    /// Until 4 there is no image. 4 before 3: a power cut could leave an image without a file.
    pub fn finish(mut self, guid: Guid, label: Option<&str>, header: &Header) -> Result<()> {
        let built = self.parent.join(&self.building);
        let dir = self.folder.as_fd();
        // 1.
        let top = format!("{}.hds.{}", self.name, Guid::random());
        create_delta(dir, &built, &top, header, &ours())?;
        // 2.
        let base = format!("{}.hds", self.name);
        let mut descriptor = Descriptor::new(header.disk_sectors, header.cluster_sectors, &base, false);
        descriptor
            .add_snapshot(guid, &top)
            .map_err(|bad| Error::at(Kind::Invalid, &self.to, bad.to_string()))?;
        let mut labels = Labels::default();
        labels.set(guid, label.map(str::to_owned));
        write_beside(dir, &built, LABELS_NAME, &labels.to_bytes())?;
        write_beside(dir, &built, DESCRIPTOR, &descriptor.to_xml())?;
        // 3.
        sync_folder(dir, &built)?;
        // 4.
        rename_new(self.around.as_fd(), &self.building, self.name.as_ref()).map_err(|e| match e {
            Errno::EXIST | Errno::NOTEMPTY => {
                Error::at(Kind::Exists, &self.to, "has just been made by another")
            }
            e => Error::io(&e.into(), &self.to, "cannot give the image its name"),
        })?;
        self.done = true;
        // 5.
        sync_folder(self.around.as_fd(), &self.parent)
    }
}

impl Drop for Assembly {
    fn drop(&mut self) {
        if !self.done {
            // Best effort; nobody takes a dot-folder for an image.
            let _ = remove_folder(self.around.as_fd(), &self.building);
        }
    }
}

/// The owner and mode of a new file of ours.
fn ours() -> HostStatus {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    HostStatus { mode: 0o600, uid, gid, ..HostStatus::default() }
}
