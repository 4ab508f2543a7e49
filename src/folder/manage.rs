//! Making, growing, renaming, removing and cloning images from inside the mount (`mount --manage`). Everything goes
//! through the code that the commands use; what is done is durable when it is answered. All of it blocks: not for
//! threads of the engine or a transport.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use super::entry::Entry;
use super::scan::Source;
use super::set::Folder;
use super::{closing, locked};
use crate::error::{Error, Kind, Result};
use crate::image::create::{CreatePlan, create};
use crate::image::kind::in_text;
use crate::image::names;
use crate::progress::Progress;
use crate::vdisk::live::Work;

/// Ends "its image is being made" of a name, however that goes.
struct Making<'a> {
    folder: &'a Folder,
    id: u64,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        locked(&self.folder.names).set_busy(self.id, false);
    }
}

impl Folder {
    /// An empty file of this name (without `.img`): an image as soon as it has a size. Nothing is on disk until then.
    pub fn begin_image(&self, name: &OsStr) -> Result<u64> {
        self.check_writable(name)?;
        names::file_of_new(self.path(), name)?;
        let taken = || Error::at(Kind::Exists, self.path().join(name), "has this name already");
        if self.find_id(name).is_some() {
            return Err(taken());
        }
        let id = self.new_id();
        if locked(&self.names).add(name, id) {
            return Ok(id);
        }
        let why = "too many files without a size; give them one (truncate -s) or remove them";
        Err(Error::at(Kind::NoSpace, self.path().join(name), why))
    }

    /// The name of the file without a size that has this number.
    pub fn unborn(&self, id: u64) -> Option<OsString> {
        locked(&self.names).name(id)
    }

    /// All files without a size.
    pub fn all_unborn(&self) -> Vec<(OsString, u64)> {
        locked(&self.names).all()
    }

    /// A file without a size gets one, in bytes: a thin image.
    pub fn create_image(&self, id: u64, size: u64) -> Result<()> {
        let (name, _making) = self.begin_making(id)?;
        let file = names::file_of_new(self.path(), &name)?;
        self.check_path(&name)?;
        create(&self.path().join(&file), &CreatePlan::thin(size))?;
        self.has_come(&name, &file)
    }

    /// A file without a size becomes a clone of `source`, or of a snapshot of it.
    pub fn clone_image(&self, id: u64, source: &Entry, snapshot: Option<String>) -> Result<()> {
        let (name, _making) = self.begin_making(id)?;
        self.check_path(&name)?;
        let work = Work::Clone { snapshot, to: vec![self.path().join(&name)], copy: false };
        self.work(&in_text(source.name()), &work, &Progress::new())?;
        self.has_come(&name, &name)
    }

    /// What is made by the folder's path must not be made in another folder that has this path by now.
    fn check_path(&self, name: &OsStr) -> Result<()> {
        let path = self.path().join(name);
        if self.is_around(&path) {
            return Ok(());
        }
        let why = "cannot be made: the images folder was renamed or removed; umount it, and mount it by its new name";
        Err(Error::at(Kind::NotFound, path, why))
    }

    fn begin_making(&self, id: u64) -> Result<(OsString, Making<'_>)> {
        let name = locked(&self.names).set_busy(id, true);
        let gone = || Error::at(Kind::Busy, self.path(), "the file is gone, or is being made already");
        let name = name.ok_or_else(gone)?;
        self.check_writable(&name)?;
        Ok((name, Making { folder: self, id }))
    }

    /// An image of this name was made, in `file`: it is served from now on, under the number that was kept for it.
    fn has_come(&self, name: &OsStr, file: &OsStr) -> Result<()> {
        self.take_in(file)?;
        let left_out =
            || Error::at(Kind::Io, self.path().join(name), "was made, but is not served (see the log)");
        self.find(name).map(drop).ok_or_else(left_out)
    }

    /// Makes a disk larger. `size` in bytes.
    pub fn grow_image(&self, entry: &Entry, size: u64) -> Result<()> {
        let work = Work::Resize { size };
        self.work(&in_text(entry.name()), &work, &Progress::new()).map(drop)
    }

    /// Gives an image, or a file without a size, another name. Its number stays. Nothing is ever replaced.
    pub fn rename_image(&self, from: &OsStr, to: &OsStr) -> Result<()> {
        self.check_writable(from)?;
        if from == to {
            return Ok(());
        }
        names::file_of_new(self.path(), to)?;
        if self.find_id(to).is_some() {
            return Err(Error::at(
                Kind::Exists,
                self.path().join(to),
                "has this name already; nothing is replaced",
            ));
        }
        let Some(entry) = self.find(from) else {
            let mut names = locked(&self.names);
            let id = names.remove(from).ok_or_else(|| self.no_such(from))?;
            names.add(to, id);
            return Ok(());
        };
        let (old, new) = (from.to_owned(), to.to_owned());
        self.take_away(&entry, move |folder, entry| {
            locked(&folder.names).keep(&new, entry.id());
            let images = folder.shared.place.fd();
            let renamed = names::rename(images.as_fd(), folder.path(), &entry.file(), &old, &new);
            if renamed.is_err() {
                locked(&folder.names).take(&new);
            }
            renamed
        })?;
        log::info!("{}: renamed to {}", self.path().join(from).display(), to.display());
        self.has_come(to, to)
    }

    /// Removes an image, or a file without a size. Only while neither it nor a snapshot of it is in use.
    pub fn remove_image(&self, name: &OsStr) -> Result<()> {
        self.check_writable(name)?;
        let Some(entry) = self.find(name) else {
            return locked(&self.names).remove(name).map(drop).ok_or_else(|| self.no_such(name));
        };
        self.take_away(&entry, |folder, entry| {
            names::remove(folder.shared.place.fd().as_fd(), folder.path(), &entry.file())
        })?;
        log::info!("{}: removed through the mount", entry.path().display());
        self.rescan_now()
    }

    /// Carries `act` out on an image that is out of service and locked against every other program:
    /// 1. it and its snapshots are opened no more; a close that is under way is waited for;
    /// 2. no other image stands on its files (R9);
    /// 3. its files are locked; 4. `act`. Where 2 to 4 fail it is in service again.
    ///
    /// On its strand, so that no open, close or switch is half done.
    fn take_away(
        &self,
        entry: &Arc<Entry>,
        act: impl FnOnce(&Folder, &Entry) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        // 1
        if !closing::wait(|| !entry.is_looked_at() && entry.retire()) {
            if entry.is_looked_at() {
                return Err(entry.looked_at());
            }
            let why =
                "is in use; close it, detach its loop device, or wait for the operation that is running";
            return Err(Error::at(Kind::Busy, entry.path(), why));
        }
        let (send, receive) = mpsc::channel();
        let (folder, taken) = (self.own.clone(), entry.clone());
        entry.strand.submit(Box::new(move || {
            let _ = send.send(folder.upgrade().map_or_else(
                || Err(Error::at(Kind::Io, taken.path(), "the mount has ended")),
                |folder| folder.act_on(&taken, act),
            ));
        }));
        let abandoned = || Err(Error::at(Kind::Io, entry.path(), "the change was abandoned"));
        receive.recv().unwrap_or_else(|_| abandoned())
    }

    fn act_on(&self, entry: &Arc<Entry>, act: impl FnOnce(&Folder, &Entry) -> Result<()>) -> Result<()> {
        // Only jobs of the strand lock it.
        let count = locked(&entry.count);
        let done = entry.close_views().and_then(|()| {
            let done = self.check_dependents(entry).and_then(|()| {
                // 3: dropped behind `act`.
                let _locks = match entry.origin().source {
                    Source::File(kind) => (Some(entry.open_file(kind)?), None),
                    Source::Layers => (None, Some(entry.open_layers()?)),
                };
                act(self, entry) // 4
            });
            entry.open_views();
            done
        });
        drop(count);
        if done.is_err() {
            entry.restore();
        }
        done
    }

    /// Step 2.
    fn check_dependents(&self, entry: &Entry) -> Result<()> {
        let images = self.shared.place.fd();
        for other in self.layered_files() {
            if other == entry.file() {
                continue;
            }
            let named = match names::names_a_part(images.as_fd(), self.path(), &other, &entry.file()) {
                // Only for the moment: it may well be one of those.
                Err(e) if e.is_passing() => return Err(e),
                // One that cannot be read says nothing, and is not served either.
                named => named.unwrap_or(false),
            };
            if named {
                let why = format!("the image {} stands on its files", other.display());
                return Err(Error::at(Kind::Busy, entry.path(), why));
            }
        }
        Ok(())
    }

    /// The folders of all layered images, served or not.
    fn layered_files(&self) -> Vec<OsString> {
        let known = locked(&self.known);
        let claims = known.values().filter_map(|seen| seen.claim.as_ref());
        claims.filter(|claim| claim.source == Source::Layers).map(|claim| claim.file.clone()).collect()
    }

    fn check_writable(&self, name: &OsStr) -> Result<()> {
        if self.shared.read_only {
            return Err(Error::at(Kind::ReadOnly, self.path().join(name), "the mount is read-only"));
        }
        Ok(())
    }

    fn no_such(&self, name: &OsStr) -> Error {
        Error::at(Kind::NotFound, self.path().join(name), "there is no such image, or it is just being made")
    }

    /// What a crash left of images that were removed, or not made to the end.
    pub(super) fn sweep(&self) {
        if !self.shared.read_only {
            names::sweep(self.shared.place.fd().as_fd(), self.path());
        }
    }
}
