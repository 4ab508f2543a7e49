//! The images folder itself: one descriptor through which everything in it is reached, its lock, its space.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
pub use crate::image::kind::PRIVATE;
use crate::io::file::HostSpace;
use crate::io::folder_lock::{FolderLock, ServedLock};
use crate::io::foreign;
use crate::io::heirs::{Fixture, Heirs};
use crate::io::mounts;

/// An images folder, open and locked.
#[derive(Debug)]
pub(super) struct ImagesFolder {
    fd: OwnedFd,
    path: PathBuf,
    /// None on a folder that cannot be written.
    _lock: Option<FolderLock>,
    _served: ServedLock,
}

impl ImagesFolder {
    /// Locks the folder that `fd` has open and `path` names; `note` (the mount point) is shown to a process that finds it locked.
    /// A folder that cannot be written is used with the lock on the folder itself alone.
    ///
    /// Order: (1) the folder itself, whose lock nothing that is removed in it takes away; (2) the lock file, which says
    /// who serves it. The other way round, a lock file that was just made anew would let a second daemon write into it.
    /// Both outlive this process where `heirs` keep open files. The `fd` of a daemon before has its lock, which goes on.
    pub(super) fn of(fd: OwnedFd, path: &Path, note: &str, heirs: &Arc<Heirs>) -> Result<ImagesFolder> {
        if file_system_type(&fd).is_some_and(|kind| kind == mounts::OUR_TYPE) {
            let what = "lies on a ploopfs mount; name the folder that holds the images themselves";
            return Err(Error::at(Kind::Invalid, path, what));
        }
        let private = open_private(&fd, path)?;
        let served = ServedLock::acquire(&fd, private.as_ref(), path)?;
        heirs.keep_fixture(Fixture::Folder, &fd);
        let lock = match &private {
            Some(private) => match FolderLock::acquire(private, path, note, served.held(), heirs) {
                // A full host, too: the lock on the folder itself needs no space.
                Err(e)
                    if matches!(
                        e.errno(),
                        libc::EROFS | libc::EACCES | libc::EPERM | libc::ENOSPC | libc::EDQUOT
                    ) =>
                {
                    None
                }
                lock => Some(lock?),
            },
            None => None,
        };
        if !served.held() && !lock.as_ref().is_some_and(FolderLock::held) {
            log::warn!("{}: cannot be locked; do not mount it a second time", path.display());
        }
        Ok(ImagesFolder { fd, path: path.to_owned(), _lock: lock, _served: served })
    }

    /// The folder.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// As it was named.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// True when a folder on the way to `path` is this one.
    pub(super) fn is_around(&self, path: &Path) -> bool {
        let Ok(own) = rustix::fs::fstat(&self.fd) else { return false };
        let same = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino) == (own.st_dev, own.st_ino);
        path.ancestors().skip(1).any(|folder| rustix::fs::stat(folder).is_ok_and(same))
    }

    /// Space of the file system that holds it.
    pub(super) fn space(&self) -> Result<HostSpace> {
        let s = rustix::fs::fstatvfs(&self.fd)
            .map_err(|e| Error::io(&e.into(), &self.path, "cannot ask for free space"))?;
        Ok(HostSpace {
            total: s.f_blocks * s.f_frsize,
            free: s.f_bfree * s.f_frsize,
            available: s.f_bavail * s.f_frsize,
            files: s.f_files,
            files_free: s.f_ffree,
        })
    }
}

/// Opens the folder at `path`.
pub(super) fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .map_err(|e| Error::io(&e.into(), path, "cannot open the images folder"))
}

fn open_private(dir: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>> {
    let failed = |e: Errno| Error::io(&e.into(), path.join(PRIVATE), "cannot make or open our own folder");
    match rustix::fs::mkdirat(dir, PRIVATE, Mode::RWXU) {
        Ok(())
        | Err(Errno::EXIST | Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::NOSPC | Errno::DQUOT) => {}
        Err(e) => return Err(failed(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, PRIVATE, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::ACCESS) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// The type of the mount that `fd` lies on, by its number: a path may have been mounted over meanwhile.
fn file_system_type(fd: &OwnedFd) -> Option<OsString> {
    mounts::by_id(foreign::mount_id(fd).ok()?).ok()?.map(|mount| mount.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &Path, note: &str) -> Result<ImagesFolder> {
        ImagesFolder::of(open(path)?, path, note, &Arc::default())
    }

    #[test]
    fn a_folder_without_its_lock_file_is_still_locked() {
        let temp = tempfile::tempdir().expect("a folder");
        let first = opened(temp.path(), "/mnt/x").expect("opens");
        std::fs::remove_dir_all(temp.path().join(PRIVATE)).expect("removed");
        let second = opened(temp.path(), "/mnt/y").expect_err("locked");
        assert_eq!(second.kind(), Kind::InUse);
        drop(first);
        opened(temp.path(), "/mnt/y").expect("free again");
    }

    #[test]
    fn a_folder_is_locked_and_gets_a_private_folder() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().expect("a folder");
        let place = opened(temp.path(), "/mnt/x").expect("opens");
        let private = std::fs::metadata(temp.path().join(PRIVATE)).expect("made");
        assert_eq!(private.permissions().mode() & 0o777, 0o700);
        assert!(place.space().expect("asked").total > 0);
        let second = opened(temp.path(), "/mnt/y").expect_err("locked");
        assert_eq!(second.kind(), Kind::InUse);
        drop(place);
        opened(temp.path(), "/mnt/y").expect("free again");
    }
}
