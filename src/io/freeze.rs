//! Freezing and thawing a file system (FIFREEZE, FITHAW): between the two it is on disk as it is, and every write waits.
//!
//! The path of a mount point may lead to another file system by the time it is opened: one was mounted over it, or it was
//! moved. So what was opened is compared with what was meant, and only the descriptor is frozen and thawed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::foreign;
use super::mounts::Mount;
use crate::error::{Error, Kind, Result};

// linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

/// A mounted file system that can be frozen.
#[derive(Debug)]
pub struct HostFileSystem {
    root: File,
    point: PathBuf,
}

impl HostFileSystem {
    /// The file system of these `mounts` (of one file system), of which each lies on one of the `devices`: through the
    /// first of them that its mount point still leads to.
    pub fn open(mounts: &[Mount], devices: &[(u32, u32)]) -> Result<HostFileSystem> {
        let mut why = None;
        for mount in mounts {
            match HostFileSystem::of(mount, devices) {
                Ok(found) => return Ok(found),
                Err(e) => why = Some(e),
            }
        }
        Err(why.unwrap_or_else(|| Error::new(Kind::NotFound, "no file system to freeze was named")))
    }

    fn of(mount: &Mount, devices: &[(u32, u32)]) -> Result<HostFileSystem> {
        let point = &mount.point;
        let failed = |e: io::Error| Error::io(&e, point, "cannot open the mount point");
        let covered = || {
            let what = "leads to another file system now: something was mounted over it, or it was moved; so the one on \
                        the image cannot be reached to be frozen. umount what lies over it, or leave --freeze out";
            Error::at(Kind::Busy, point, what)
        };
        // Before it is opened for reading, which a file system that lies there now might not answer.
        if !mount.is_reached() {
            return Err(covered());
        }
        let root = File::open(point).map_err(failed)?;
        let number = root.metadata().map_err(failed)?.dev();
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        // The number of the mount says that it is the one from the table, and the device which file system that is.
        // btrfs and the like return a number without a device; of them the table knows the device.
        let same_mount = foreign::mount_id(&root).map_err(failed)? == mount.id;
        if !same_mount || !(devices.contains(&number) || number.0 == 0) {
            return Err(covered());
        }
        Ok(HostFileSystem { root, point: point.clone() })
    }

    /// A file system that another process of ours has open, by its descriptor's path in /proc; `point` is for messages.
    pub fn inherit(descriptor: &Path, point: &Path) -> Result<HostFileSystem> {
        let root = File::open(descriptor)
            .map_err(|e| Error::io(&e, point, "cannot take over the descriptor of the mount point"))?;
        Ok(HostFileSystem { root, point: point.to_owned() })
    }

    /// Where another process finds the descriptor, for [`inherit`](Self::inherit).
    pub fn descriptor(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.root.as_raw_fd()).into()
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Writes out what is dirty, then stops every write. Busy: it is frozen already.
    pub fn freeze(&self) -> Result<()> {
        // Most of the work before any writer has to wait; what it cannot write the freeze will complain of.
        let _ = rustix::fs::syncfs(&self.root);
        fs_ioctl(self.root.as_fd(), FIFREEZE).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => {
                Error::at(Kind::Busy, &self.point, "is frozen already, by another program (fsfreeze)")
            }
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
