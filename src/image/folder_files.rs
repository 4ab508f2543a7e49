//! Single steps on the files of an image's folder: made, given away, written beside, removed, and their names made
//! durable. In which order a step over several files takes them is `store`'s to say (R8).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Result};
use crate::image::reserve::with_reserve;
use crate::io::file::HostStatus;
use crate::io::rename::rename_over;
use crate::rules::{Step, step};

/// Makes a file for reading and writing that was not there.
pub(super) fn make(dir: BorrowedFd<'_>, name: &str, mode: u32) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // Never wider than the owner's until its owner is right.
    let mode = Mode::from_raw_mode(mode & 0o600);
    let file = File::from(retry_on_intr(|| rustix::fs::openat(dir, name, flags, mode))?);
    step(Step::Names);
    Ok(file)
}

/// Gives `file` the owner and mode of `like`. Only root can give files away; for others it is their own.
pub(super) fn own(file: &File, like: &HostStatus) -> io::Result<()> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(like.uid), rustix::fs::Gid::from_raw(like.gid));
    match rustix::fs::fchown(file, Some(uid), Some(gid)) {
        Ok(()) | Err(Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(like.mode & 0o777))?)
}

/// Writes `bytes` beside the file `name` and renames it over it. The folder is not synced. Err: the old one is there.
pub(super) fn write_beside(dir: BorrowedFd<'_>, path: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let shown = path.join(name);
    let beside = format!(".{name}.new");
    let written = with_reserve(dir, || {
        // Left by a crash; we hold the descriptor's lock, so it has no user.
        unlink(dir, OsStr::new(&beside))?;
        let file = made_like(dir, &beside, name, bytes)?;
        // Before the rename: else a power cut could leave the name on an empty file.
        file.sync_all()?;
        step(Step::FileSynced(&path.join(&beside)));
        rename_over(dir, beside.as_ref(), name.as_ref())?;
        step(Step::Names);
        Ok(())
    });
    written.map_err(|e| {
        let _ = unlink(dir, OsStr::new(&beside));
        Error::io(&e, shown, "cannot write")
    })
}

/// Writes `bytes` as the new file `name`. Nothing is synced: the folder is made durable as a whole before it gets its name.
pub(super) fn write_new(dir: BorrowedFd<'_>, path: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let written = with_reserve(dir, || {
        // An attempt that found no space.
        unlink(dir, OsStr::new(name))?;
        made_like(dir, name, name, bytes)
    });
    written.map(drop).map_err(|e| Error::io(&e, path.join(name), "cannot write"))
}

/// A new file with this content, and the owner and mode of the file `like`. A first one of its sort gets the folder's owner,
/// and is readable like a descriptor of ploop's.
fn made_like(dir: BorrowedFd<'_>, name: &str, like: &str, bytes: &[u8]) -> io::Result<File> {
    let (old, mask) = match retry_on_intr(|| rustix::fs::statat(dir, like, AtFlags::SYMLINK_NOFOLLOW)) {
        Ok(old) => (old, 0o777),
        Err(_) => (rustix::fs::fstat(dir)?, 0o644),
    };
    let mut file = make(dir, name, 0o600)?;
    file.write_all(bytes)?;
    let mode = old.st_mode & mask;
    own(&file, &HostStatus { mode, uid: old.st_uid, gid: old.st_gid, ..HostStatus::default() })?;
    Ok(file)
}

/// Makes names in the folder durable.
pub(super) fn sync_folder(dir: BorrowedFd<'_>, path: &Path) -> Result<()> {
    retry_on_intr(|| rustix::fs::fsync(dir))
        .map_err(|e| Error::io(&e.into(), path, "cannot sync the folder"))?;
    step(Step::FolderSynced(path));
    Ok(())
}

/// Removes a name; false if it was not there.
pub(super) fn unlink(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<bool> {
    match retry_on_intr(|| rustix::fs::unlinkat(dir, name, AtFlags::empty())) {
        Ok(()) => {
            step(Step::Names);
            Ok(true)
        }
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
