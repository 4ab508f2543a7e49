//! The descriptor of a layered image on disk.
//!
//! **R8** Operations over several files: new file durable, descriptor written beside and renamed, folder synced, old
//! file removed last. Whatever the moment of a crash, the image opens with the old state or the new one.
//!
//! So that nothing is left lying about, either, the names of files that a step makes or drops are noted, durably,
//! before it begins ([`Store::note`]). At the next open a noted file that no delta has is removed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{BadXml, Descriptor, Guid, MAX_BYTES};
use crate::image::folder_files::{sync_folder, unlink, write_beside};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::{LABELS_NAME, Labels, is_plain_name};
use crate::image::reserve;
use crate::io::descriptor_lock::DescriptorLock;
use crate::io::heirs::Heirs;
use crate::io::lock::Use;
use crate::rules::{Rule, broken};

/// What came of [`Store::replace`], where the new descriptor is in place.
#[must_use]
#[derive(Debug)]
pub enum Replaced {
    /// It survives a power cut.
    Durable,
    /// The folder could not be synced: a power cut may bring the old one back. No file may be removed, and the image
    /// must become read-only.
    Unsynced(Error),
}

impl Replaced {
    /// The error, for callers with nothing more to make read-only.
    pub fn durable(self) -> Result<()> {
        match self {
            Replaced::Durable => Ok(()),
            Replaced::Unsynced(error) => Err(error),
        }
    }
}

/// A descriptor in use: locked, and the only way to change it.
#[derive(Debug)]
pub struct Store {
    dir: OwnedFd,
    /// The image's folder, for messages.
    path: PathBuf,
    descriptor: Descriptor,
    labels: Labels,
    lock: DescriptorLock,
    /// The last replacement could not be made durable.
    unsynced: bool,
}

impl Store {
    /// Opens the descriptor in the folder `dir` and keeps others from changing it; for a reader, others may read it
    /// too, and it is not changed here. `path` is the folder, for messages; for `heirs` the lock is kept.
    pub fn open(dir: OwnedFd, path: &Path, used: Use, heirs: &Arc<Heirs>) -> Result<Store> {
        // The lock first: what was read before it may be old.
        let lock = DescriptorLock::acquire(dir.as_fd(), &path.join(DESCRIPTOR), used, heirs)?;
        let (descriptor, labels) = Store::read(dir.as_fd(), path)?;
        Ok(Store { dir, path: path.to_owned(), descriptor, labels, lock, unsynced: false })
    }

    /// Reads descriptor and labels without any lock, for callers that only report.
    pub fn read(dir: BorrowedFd<'_>, path: &Path) -> Result<(Descriptor, Labels)> {
        let xml = path.join(DESCRIPTOR);
        let Some(bytes) = read_small(dir, DESCRIPTOR, &xml)? else {
            return Err(Error::at(Kind::NotFound, xml, "there is no descriptor; this is no layered image"));
        };
        let descriptor =
            Descriptor::parse(&bytes).map_err(|bad| Error::at(Kind::Damaged, &xml, bad.to_string()))?;
        let beside = path.join(LABELS_NAME);
        let labels = match read_small(dir, LABELS_NAME, &beside)? {
            None => Labels::default(),
            Some(bytes) => Labels::parse(&bytes).unwrap_or_else(|why| {
                // The disk is whole without its labels; the file is kept until the next change of a label.
                log::warn!(
                    "{}: the snapshots' names cannot be read ({why}); GUIDs are shown",
                    beside.display()
                );
                Labels::default()
            }),
        };
        Ok((descriptor, labels))
    }

    /// The descriptor as it is on disk.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The snapshots' names.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// The image's folder.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The snapshot of this label or GUID; one that was deleted is none.
    pub fn find_snapshot(&self, name: &str) -> Result<Guid> {
        let missing = |why: String| Err(Error::at(Kind::NotFound, &self.path, why));
        let Some(guid) = self.labels.find(&self.descriptor, name) else {
            let known: Vec<String> = self.snapshots().map(|guid| self.labels.name(guid)).collect();
            let there = if known.is_empty() { "none".into() } else { known.join(", ") };
            return missing(format!("there is no snapshot {name}; there is {there}"));
        };
        match self.descriptor.shot(guid) {
            Some(shot) if shot.marker.is_some() => missing(format!("the snapshot {name} is deleted already")),
            _ => Ok(guid),
        }
    }

    /// Every snapshot that was not deleted, in the order of the descriptor.
    pub fn snapshots(&self) -> impl Iterator<Item = Guid> {
        let shots = self.descriptor.shots.iter();
        shots.filter(|s| s.guid != self.descriptor.top && s.marker.is_none()).map(|s| s.guid)
    }

    /// The image's folder, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `next` the descriptor.
    ///
    /// 1. the files that `next` does not name any more are noted, durably: after 2 and a crash nothing else would know
    ///    of them; 2. `next` is written beside and synced; 3. renamed over the old one: the point of no return; 4. the
    ///    folder is synced. Removing a file is the caller's, after 4: before it, a power cut could bring back a
    ///    descriptor that names the file. Err: the old descriptor is in place.
    pub fn replace(&mut self, next: Descriptor) -> Result<Replaced> {
        debug_assert_eq!(self.lock.used(), Use::Writer, "a reader changes no descriptor");
        let files = self.descriptor.deltas.iter().map(|delta| &*delta.file);
        let gone: Vec<String> =
            files.filter(|file| is_plain_name(file) && !next.names(file)).map(str::to_owned).collect();
        // 1.
        self.note(&gone.iter().map(String::as_str).collect::<Vec<_>>())?;
        // 2., 3. Read back first, so that what we write is never what we refuse to read.
        let cannot = |bad: BadXml| {
            Error::at(Kind::Invalid, self.path.join(DESCRIPTOR), format!("cannot be written: {bad}"))
        };
        let xml = next.written().map_err(cannot)?;
        write_beside(self.dir(), &self.path, DESCRIPTOR, &xml)?;
        self.descriptor = next;
        // 4.
        if broken(Rule::R8) {
            return Ok(Replaced::Durable);
        }
        let synced = sync_folder(self.dir(), &self.path);
        self.unsynced = synced.is_err();
        Ok(synced.map_or_else(Replaced::Unsynced, |()| Replaced::Durable))
    }

    /// Keeps the snapshot's name and when it was taken (in seconds since 1970), or takes both away, durably. Before the
    /// descriptor that has the snapshot: a crash between the two leaves a label without a snapshot, which is not shown, and
    /// not a snapshot without its name.
    pub fn set_label(&mut self, guid: Guid, label: Option<&str>, taken: Option<i64>) -> Result<()> {
        let mut labels = self.labels.clone();
        labels.prune(&self.descriptor, Some(guid));
        labels.set(guid, None);
        labels.set_taken(guid, taken);
        if let Some(label) = label {
            labels.check(label)?;
            labels.set(guid, Some(label.to_owned()));
        }
        self.write_labels(labels)
    }

    /// Whether `label` may be given to a snapshot. One that is gone needs its name no more, whenever that is written.
    pub fn check_label(&self, label: &str) -> Result<()> {
        let mut labels = self.labels.clone();
        labels.prune(&self.descriptor, None);
        labels.check(label)
    }

    /// Keeps how long the snapshot's raw file is, in bytes, durably. Before the descriptor that has the snapshot.
    pub fn set_length(&mut self, guid: Guid, length: u64) -> Result<()> {
        let mut labels = self.labels.clone();
        labels.prune(&self.descriptor, Some(guid));
        labels.set_length(guid, Some(length));
        self.write_labels(labels)
    }

    /// Takes the name of a snapshot away that was deleted, durably: it is free, and only a second delete means it.
    pub fn set_deleted(&mut self, guid: Guid) -> Result<()> {
        let mut labels = self.labels.clone();
        labels.prune(&self.descriptor, None);
        labels.set_deleted(guid);
        self.write_labels(labels)
    }

    /// Notes, durably, files of this folder that a step is about to make or to drop.
    pub fn note(&mut self, files: &[&str]) -> Result<()> {
        let fresh = |file: &&&str| is_plain_name(file) && !self.labels.passing.contains(**file);
        let fresh: Vec<String> = files.iter().filter(fresh).map(|file| (*file).to_owned()).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let mut labels = self.labels.clone();
        // What was made and is in use by now needs no note; the list stays short.
        labels.passing.retain(|file| !self.descriptor.names(file) || files.contains(&&**file));
        labels.passing.extend(fresh);
        self.write_labels(labels)
    }

    /// Makes durable what was read: a crash may have come between a rename and the sync behind it, of the descriptor or
    /// of the image's folder. What is written to the files it names, or removed because it does not name it, would not
    /// survive a power cut that brings the old one back.
    pub fn make_durable(&self) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let around = retry_on_intr(|| rustix::fs::openat(self.dir(), "..", flags, Mode::empty()));
        let synced = retry_on_intr(|| rustix::fs::fsync(self.dir()))
            .and_then(|()| retry_on_intr(|| rustix::fs::fsync(around.as_ref().map_err(|e| *e)?)));
        // A host that syncs no folders, or lets us see nothing but this one, has no more to give.
        match synced {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::ACCESS | Errno::PERM) => Ok(()),
            Err(e) => Err(Error::io(&e.into(), &self.path, "cannot sync the folder")),
        }
    }

    /// Writes the descriptor anew if its last sync failed: one that succeeds later would say nothing of it. Before
    /// anything is done that depends on it: writes to the files it names, merges of what it says is deleted.
    pub fn redo_unsynced(&mut self) -> Result<()> {
        if self.unsynced { self.replace(self.descriptor.clone())?.durable() } else { Ok(()) }
    }

    /// Removes what a crash left: noted files that no delta has. To be called with every delta of the image locked.
    pub fn clean_up(&mut self) -> Result<()> {
        let descriptor = &self.descriptor;
        // What is in use by now needs no note, nor is it worth the syncs: the next note drops it.
        if self.labels.passing.iter().all(|file| descriptor.names(file)) {
            return Ok(());
        }
        for file in self.labels.passing.iter().filter(|file| !descriptor.names(file)) {
            match unlink(self.dir(), OsStr::new(file)) {
                Ok(true) => {
                    log::info!("{}: removed; an operation did not end", self.path.join(file).display())
                }
                Ok(false) => {}
                Err(e) => return Err(Error::io(&e, self.path.join(file), "cannot remove what a crash left")),
            }
        }
        // The removals first: a note that is gone before its file is a file for ever.
        sync_folder(self.dir(), &self.path)?;
        let mut labels = self.labels.clone();
        labels.passing.clear();
        self.write_labels(labels)
    }

    /// Removes a file that the descriptor does not name (any more). A missing one is no error.
    pub fn remove(&mut self, file: &str) -> Result<()> {
        let path = self.path.join(file);
        if self.descriptor.names(file) {
            return Err(Error::at(Kind::Busy, path, "the descriptor names this file; it is not removed"));
        }
        if !is_plain_name(file) {
            let why =
                "lies outside the image's folder and is left there; remove it by hand if it is not needed";
            log::warn!("{}: {why}", path.display());
            return Ok(());
        }
        unlink(self.dir(), OsStr::new(file)).map_err(|e| Error::io(&e, &path, "cannot remove"))?;
        reserve::keep_around(self.dir());
        if !self.labels.passing.contains(file) {
            return Ok(());
        }
        // The note goes too, after the file: a note that stayed would remove a later file of this name.
        sync_folder(self.dir(), &self.path)?;
        let mut labels = self.labels.clone();
        labels.passing.remove(file);
        self.write_labels(labels)
    }

    fn write_labels(&mut self, labels: Labels) -> Result<()> {
        debug_assert_eq!(self.lock.used(), Use::Writer, "a reader changes no labels");
        write_beside(self.dir(), &self.path, LABELS_NAME, &labels.to_bytes())?;
        sync_folder(self.dir(), &self.path)?;
        self.labels = labels;
        Ok(())
    }
}

/// The whole of a small regular file; None if it is missing.
fn read_small(dir: BorrowedFd<'_>, name: &str, shown: &Path) -> Result<Option<Vec<u8>>> {
    let cannot = |e: io::Error| Error::io(&e, shown, "cannot read");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match retry_on_intr(|| rustix::fs::openat(dir, name, flags, Mode::empty())) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(Error::at(Kind::Invalid, shown, "is a link; links are not followed")),
        Err(e) => return Err(cannot(e.into())),
    };
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(Error::at(Kind::Invalid, shown, "is not a regular file"));
    }
    let mut bytes = Vec::new();
    // One more than is accepted, so that a longer file is refused and not cut.
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(cannot)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
