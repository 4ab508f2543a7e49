//! Freezing and thawing a file system (FIFREEZE, FITHAW): between the two it is on disk as it is, and whoever writes
//! waits.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

// linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

/// A mounted file system that can be frozen.
#[derive(Debug)]
pub struct FileSystem {
    root: File,
    point: PathBuf,
}

impl FileSystem {
    /// The file system mounted at `point`.
    pub fn open(point: &Path) -> Result<FileSystem> {
        let root = File::open(point).map_err(|e| Error::io(&e, point, "cannot open the mount point"))?;
        Ok(FileSystem { root, point: point.to_owned() })
    }

    /// Writes out what is dirty, then stops every write. Busy: somebody else froze it.
    pub fn freeze(&self) -> Result<()> {
        // Most of the work before anybody has to wait; what it cannot write the freeze will complain of.
        let _ = rustix::fs::syncfs(&self.root);
        fs_ioctl(self.root.as_fd(), FIFREEZE).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => Error::at(Kind::Busy, &self.point, "somebody else has frozen it (fsfreeze)"),
            Some(libc::EOPNOTSUPP) => {
                Error::at(Kind::Unsupported, &self.point, "this kind of file system cannot be frozen")
            }
            _ => Error::io(&e, &self.point, "cannot freeze the file system"),
        })
    }

    /// Lets writes go on. False: it was not frozen.
    pub fn thaw(&self) -> Result<bool> {
        match fs_ioctl(self.root.as_fd(), FITHAW) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(e) => {
                Err(Error::io(&e, &self.point, "cannot thaw the file system; try: fsfreeze --unfreeze"))
            }
        }
    }
}

fn fs_ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open; both requests ignore their argument.
        if unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
