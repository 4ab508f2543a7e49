//! A single-file image becomes a layered one: a folder with a descriptor (docs/design.md#what-is-an-image).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RawDir, SeekFrom, flock};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Descriptor;
use crate::format::header::SECTOR;
use crate::image::chain::{Candidate, Form};
use crate::image::folder_files::{sync_folder, unlink, write_beside};
use crate::image::kind::{Class, DESCRIPTOR};
use crate::image::labels::LABELS_NAME;
use crate::image::level::raw_cluster;
use crate::io::real::{Access, RealFile};
use crate::io::rename::{link, rename_new_folder};
use crate::rules::{Step, step};
use crate::sync::Arc;

/// Bytes of a folder that are read at once: all of an image's.
const READ: usize = 16 << 10;

/// Turns the image `file_name` of the folder `images` into a folder of the image's name, and returns that folder. The
/// caller holds the image's lock, and has judged its map: it is open for writing, say, which a damaged image never is.
/// `path` is the images folder, for messages. `held` is the device and inode of the file that the caller has locked: only
/// that one is taken.
///
/// 1. `.NAME.new/` with a hard link to the file and the descriptor; 2. both, then the folder itself, synced; 3. renamed
///    to `NAME`; 4. the images folder synced; 5. the file's old name removed, and that synced.
///
/// Before 3 the single file is the image; after it the folder is, which wins over its own file where both are found.
/// 5 before 4: a power cut could keep the removal and lose the folder. An attempt that failed in 4 or 5 left the folder
/// with the file in it; the next one goes on with 4.
pub fn make_folder(
    images: BorrowedFd<'_>,
    path: &Path,
    file_name: &OsStr,
    held: Option<(u64, u64)>,
) -> Result<OwnedFd> {
    let shown = path.join(file_name);
    let file = RealFile::open_as(&images, file_name, &shown, Access::ReadOnly)?;
    let candidate = Candidate::read(&shown, Arc::new(file))?;
    let found = (candidate.status().dev, candidate.status().ino);
    let another = || Error::at(Kind::Busy, &shown, "is another file by now; nothing was done, try again");
    if held.is_some_and(|held| held != found) {
        return Err(another());
    }
    let (name, xml) = describe(&candidate, file_name)?;
    let mut building = OsString::from(".");
    building.push(&name);
    building.push(".new");
    let built = path.join(&building);
    // 1.
    let folder = new_folder(images, &building, &built)?;
    let finish = || {
        let linked = link(images, file_name, folder.as_fd(), file_name);
        linked.map_err(|e| match e {
            Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK => Error::at(
                Kind::Unsupported,
                &shown,
                "this file system has no hard links, with which the image would move into a folder of its own",
            ),
            e => Error::io(&e.into(), &shown, "cannot link into the image's new folder"),
        })?;
        if stat_identity(folder.as_fd(), file_name) != Some(found) {
            return Err(another());
        }
        // 2. The descriptor is synced as it is written.
        write_beside(folder.as_fd(), &built, DESCRIPTOR, &xml)?;
        sync_folder(folder.as_fd(), &built)?;
        // 3.
        rename_new_folder(images, &building, &name).map_err(|e| match e {
            Errno::EXIST | Errno::NOTEMPTY => {
                Error::at(Kind::Exists, path.join(&name), "is in the way of the image's folder; rename it")
            }
            e => Error::io(&e.into(), &built, "cannot rename"),
        })
    };
    let finished = finish();
    if finished.is_err() {
        // Best effort; the next attempt begins with it.
        let _ = remove_opened(images, &building, folder.as_fd());
    }
    let folder = match finished {
        Ok(()) => folder,
        Err(error) if error.kind() == Kind::Exists => half_made(images, &name, file_name).ok_or(error)?,
        Err(error) => return Err(error),
    };
    // 4.
    sync_folder(images, path)?;
    // 5.
    unlink(images, file_name).map_err(|e| Error::io(&e, &shown, "cannot remove the file's old name"))?;
    sync_folder(images, path)?;
    Ok(folder)
}

/// The folder `name`, if it is one that an earlier attempt made of this very file.
fn half_made(images: BorrowedFd<'_>, name: &OsStr, file_name: &OsStr) -> Option<OwnedFd> {
    let folder = open_folder(images, name).ok()?;
    let ours = stat_identity(images, file_name)? == stat_identity(folder.as_fd(), file_name)?
        && stat_identity(folder.as_fd(), DESCRIPTOR.as_ref()).is_some();
    ours.then(|| folder.into())
}

/// Device and inode of what `name` is in `dir`.
fn stat_identity(dir: BorrowedFd<'_>, name: &OsStr) -> Option<(u64, u64)> {
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// The image's name, and the descriptor's text of a disk with this file alone.
fn describe(file: &Candidate, file_name: &OsStr) -> Result<(OsString, Vec<u8>)> {
    let shown = &file.path;
    let invalid = |why: String| Error::at(Kind::Invalid, shown, why);
    let text =
        file_name.to_str().ok_or_else(|| invalid("a descriptor takes UTF-8 names only; rename it".into()))?;
    let (name, kind) = match file.class() {
        Class::Image { name, kind } => (name, kind),
        Class::NotAnImage { reason } => return Err(invalid(format!("not an image: {reason}"))),
    };
    let descriptor = match file.form(kind).map_err(|bad| Error::at(Kind::Damaged, shown, bad.to_string()))? {
        Form::Ploop(header) => Descriptor::new(header.disk_sectors, header.cluster_sectors, text, false),
        Form::Raw => {
            let (len, _) = file.extent();
            // At most 1 MiB.
            Descriptor::new(len.div_ceil(SECTOR), (raw_cluster(len) / SECTOR) as u32, text, true)
        }
    };
    // A file of this very name (no suffix) is where the folder must go; it cannot make room before it is safe.
    if name == file_name {
        let why = "the folder would have the file's own name; give the file the suffix .hds first";
        return Err(invalid(why.into()));
    }
    let xml = descriptor.written().map_err(|bad| {
        invalid(format!("the image cannot become a folder: {bad}; give the file another name first"))
    })?;
    Ok((name, xml))
}

/// A new, empty folder; what a crash left under that dot-name goes first. The folder's `flock` says that a process
/// builds in it: another process must neither empty it nor take it for its own.
pub(super) fn new_folder(parent: BorrowedFd<'_>, name: &OsStr, shown: &Path) -> Result<OwnedFd> {
    let cannot = |e: std::io::Error| Error::io(&e, shown, "cannot make the folder");
    let take = |folder: &File| retry_on_intr(|| flock(folder, FlockOperation::NonBlockingLockExclusive));
    let busy = || Error::at(Kind::Busy, shown, "another process makes an image of this name");
    if let Ok(left) = open_folder(parent, name) {
        if take(&left) == Err(Errno::WOULDBLOCK) {
            return Err(busy());
        }
        remove_folder(parent, name).map_err(cannot)?;
    }
    retry_on_intr(|| rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))).map_err(|e| match e {
        Errno::EXIST => busy(),
        e => cannot(e.into()),
    })?;
    let folder = open_folder(parent, name).map_err(|e| {
        let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
        cannot(e.into())
    })?;
    match take(&folder) {
        Err(Errno::WOULDBLOCK) => Err(busy()),
        // Hosts without such locks have no protection here; the rename still replaces nothing.
        _ => Ok(folder.into()),
    }
}

/// Removes the folder `.NAME.new` of an image that was being made, where its maker is gone; false: a process builds in
/// it, or it has files that no such folder has.
pub(super) fn remove_abandoned(
    parent: BorrowedFd<'_>,
    building: &OsStr,
    name: &OsStr,
) -> std::io::Result<bool> {
    let folder = open_folder(parent, building)?;
    if retry_on_intr(|| flock(&folder, FlockOperation::NonBlockingLockExclusive)).is_err() {
        return Ok(false);
    }
    // The deltas are named after the image; what write_beside leaves, and the socket of an import, begins with a dot.
    let ours = [name.as_bytes(), DESCRIPTOR.as_bytes(), LABELS_NAME.as_bytes(), b"."];
    for entry in rustix::fs::Dir::read_from(&folder)? {
        let entry = entry?;
        let file = entry.file_name().to_bytes();
        let is_file =
            rustix::fs::statat(&folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
                [FileType::RegularFile, FileType::Socket].contains(&FileType::from_raw_mode(stat.st_mode))
            });
        if file != b"." && file != b".." && !(is_file && ours.iter().any(|start| file.starts_with(start))) {
            return Ok(false);
        }
    }
    remove_folder(parent, building).map(|()| true)
}

fn open_folder(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry_on_intr(|| rustix::fs::openat(parent, name, flags, Mode::empty())).map(File::from)
}

/// Removes a folder of files. A missing one is no error; a folder in it is.
pub(super) fn remove_folder(parent: BorrowedFd<'_>, name: &OsStr) -> std::io::Result<()> {
    let folder = match open_folder(parent, name) {
        Ok(folder) => folder,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    remove_opened(parent, name, folder.as_fd())
}

/// The same of a folder that is open. It opens nothing: what is made there may have failed for want of descriptors.
pub(super) fn remove_opened(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    folder: BorrowedFd<'_>,
) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(READ);
    rustix::fs::seek(folder, SeekFrom::Start(0))?;
    let mut entries = RawDir::new(folder, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = OsStr::new(entry.file_name().to_str().unwrap_or(".."));
        if name != "." && name != ".." && name != DESCRIPTOR {
            unlink(folder, name)?;
        }
    }
    // Last, and after all others for certain: by it a folder that a crash left half-empty is known for an image's.
    retry_on_intr(|| rustix::fs::fsync(folder))?;
    step(Step::FolderSynced(Path::new(name)));
    match unlink(folder, DESCRIPTOR.as_ref()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    step(Step::Names);
    Ok(())
}
