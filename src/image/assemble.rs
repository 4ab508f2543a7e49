//! A layered image that is put together out of nothing: its files, filled by the caller, become a chain.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::format::header::Header;
use crate::image::clone::Destination;
use crate::image::folder_files::{sync_folder, write_beside};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::{LABELS_NAME, Labels};
use crate::image::level::{Layout, Level};
use crate::image::make_folder::{new_folder, remove_opened};
use crate::image::new_delta::create_delta;
use crate::io::file::HostStatus;
use crate::io::rename::rename_new_folder;
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
    /// Those made so far, the base first.
    files: Vec<(String, Header)>,
    done: bool,
}

impl Assembly {
    /// Begins the image `to`, a folder, which must not be there.
    pub fn begin(to: &Path) -> Result<Assembly> {
        let Destination { name, around, parent } = Destination::of(to)?;
        let building = OsString::from(format!(".{name}.new"));
        let folder = new_folder(around.as_fd(), &building, &parent.join(&building))?;
        Ok(Assembly {
            around,
            parent,
            folder,
            building,
            to: to.to_owned(),
            name,
            files: Vec::new(),
            done: false,
        })
    }

    /// Makes one more file on top of those that are there, empty and durable.
    pub fn delta(&mut self, header: &Header) -> Result<Level> {
        let shown = self.parent.join(&self.building);
        let name = match self.files.is_empty() {
            true => format!("{}.hds", self.name),
            false => format!("{}.hds.{}", self.name, Guid::random()),
        };
        let file = create_delta(self.folder.as_fd(), &shown, &name, header, &ours())?;
        let path = shown.join(&name);
        self.files.push((name, *header));
        Ok(Level { file: Arc::new(file), path, layout: Layout::Ploop(*header) })
    }

    /// Makes it an image, once every file is durable. The last file is the live top, each of the others a snapshot:
    /// `snapshots` has the identity and the name of each, and when it was taken (in seconds since 1970).
    ///
    /// 1. the labels, then the descriptor, synced; 2. the folder synced; 3. renamed to its name, which must be free; 4. the
    ///    folder around it synced.
    ///
    /// Until 3 there is no image. 3 before 2: a power cut could leave an image without a file.
    pub fn finish(mut self, snapshots: &[(Guid, Option<String>, Option<i64>)]) -> Result<()> {
        let built = self.parent.join(&self.building);
        let dir = self.folder.as_fd();
        let invalid = |what: String| Error::at(Kind::Invalid, &self.to, what);
        // 1.
        let ([(base, bottom), above @ ..], Some((_, top))) = (&self.files[..], self.files.last()) else {
            return Err(invalid("an image has a file at least".into()));
        };
        if snapshots.len() != above.len() {
            return Err(invalid("every file but the last is a snapshot".into()));
        }
        let mut descriptor = Descriptor::new(bottom.disk_sectors, bottom.cluster_sectors, base, false);
        let mut labels = Labels::default();
        for ((guid, label, taken), (file, _)) in snapshots.iter().zip(above) {
            descriptor.add_snapshot(*guid, file).map_err(|bad| invalid(bad.to_string()))?;
            labels.set(*guid, label.clone());
            labels.set_taken(*guid, *taken);
        }
        descriptor.set_size(top.disk_sectors);
        write_beside(dir, &built, LABELS_NAME, &labels.to_bytes())?;
        let xml = descriptor.written().map_err(|bad| invalid(bad.to_string()))?;
        write_beside(dir, &built, DESCRIPTOR, &xml)?;
        // 2.
        sync_folder(dir, &built)?;
        // 3.
        rename_new_folder(self.around.as_fd(), &self.building, self.name.as_ref()).map_err(|e| match e {
            Errno::EXIST | Errno::NOTEMPTY => {
                Error::at(Kind::Exists, &self.to, "has just been made by another")
            }
            e => Error::io(&e.into(), &self.to, "cannot give the image its name"),
        })?;
        self.done = true;
        // 4.
        sync_folder(self.around.as_fd(), &self.parent)
    }
}

impl Drop for Assembly {
    fn drop(&mut self) {
        if !self.done {
            // Best effort; a dot-folder is never taken for an image.
            let _ = remove_opened(self.around.as_fd(), &self.building, self.folder.as_fd());
        }
    }
}

/// The owner and mode of a new file of ours.
fn ours() -> HostStatus {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    HostStatus { mode: 0o600, uid, gid, ..HostStatus::default() }
}
