//! The images folder itself: one descriptor through which everything in it is reached, its lock, its space.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::io::file::HostSpace;
use crate::io::lock::FolderLock;

/// Our own folder inside the images folder: lock, log, control socket.
pub const PRIVATE: &str = ".ploopfs";
/// What the kernel calls our mounts.
const FS_TYPE: &str = "fuse.ploopfs";

/// An images folder, open and locked.
#[derive(Debug)]
pub struct Place {
    fd: OwnedFd,
    path: PathBuf,
    /// `.ploopfs`; None where it is not there and cannot be made.
    private: Option<OwnedFd>,
    /// None on a folder that cannot be written.
    _lock: Option<FolderLock>,
}

impl Place {
    /// Opens and locks the folder; `note` (the mount point) is shown to whoever finds it locked. A folder that
    /// cannot be written is used without a lock.
    pub fn open(path: &Path, note: &str) -> Result<Place> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())
            .map_err(|e| Error::io(&e.into(), path, "cannot open the images folder"))?;
        if file_system_type(&fd).as_deref() == Some(FS_TYPE) {
            let what = "lies on a ploopfs mount; name the folder that holds the images themselves";
            return Err(Error::at(Kind::Invalid, path, what));
        }
        let private = open_private(&fd, path)?;
        let lock = match &private {
            Some(private) => match FolderLock::acquire(private, path, note) {
                Err(e) if matches!(e.errno(), libc::EROFS | libc::EACCES | libc::EPERM) => None,
                lock => Some(lock?),
            },
            None => None,
        };
        if !lock.as_ref().is_some_and(FolderLock::held) {
            log::warn!("{}: cannot be locked; do not mount it a second time", path.display());
        }
        Ok(Place { fd, path: path.to_owned(), private, _lock: lock })
    }

    /// The folder.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// As it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder `.ploopfs` in it, if there is one.
    pub fn private(&self) -> Option<BorrowedFd<'_>> {
        self.private.as_ref().map(AsFd::as_fd)
    }

    /// Space of the file system that holds it.
    pub fn space(&self) -> Result<HostSpace> {
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

fn open_private(dir: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>> {
    let failed = |e: Errno| Error::io(&e.into(), path.join(PRIVATE), "cannot make or open our own folder");
    match rustix::fs::mkdirat(dir, PRIVATE, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST | Errno::ROFS | Errno::ACCESS | Errno::PERM) => {}
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
fn file_system_type(fd: &OwnedFd) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    type_in_mountinfo(&mounts, id).map(str::to_owned)
}

/// `36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/root rw`: the word behind the lone dash.
fn type_in_mountinfo<'a>(mounts: &'a str, id: &str) -> Option<&'a str> {
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(id))?;
    line.split(' ').skip_while(|word| *word != "-").nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_of_a_mount_stands_behind_the_dash() {
        let mounts = "3 1 0:1 / /proc rw - proc proc rw\n36 3 0:40 / /mnt rw,nosuid shared:9 master:1 - \
                      fuse.ploopfs images rw,user_id=0\n";
        assert_eq!(type_in_mountinfo(mounts, "36"), Some(FS_TYPE));
        assert_eq!(type_in_mountinfo(mounts, "3"), Some("proc"));
        assert_eq!(type_in_mountinfo(mounts, "6"), None);
    }

    #[test]
    fn a_folder_is_locked_and_gets_a_private_folder() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().expect("a folder");
        let place = Place::open(temp.path(), "/mnt/x").expect("opens");
        let private = fs::metadata(temp.path().join(PRIVATE)).expect("made");
        assert_eq!(private.permissions().mode() & 0o777, 0o700);
        assert!(place.private().is_some());
        assert!(place.space().expect("asked").total > 0);
        let second = Place::open(temp.path(), "/mnt/y").expect_err("locked");
        assert_eq!(second.kind(), Kind::InUse);
        drop(place);
        Place::open(temp.path(), "/mnt/y").expect("free again");
    }
}
