//! Where the daemon of an images folder keeps its socket and its log: `.ploopfs/` in the folder, or, where the
//! folder cannot be written, a folder under `/run` named by the device and inode of the images folder, so that
//! every command finds it without being told.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::folder::PRIVATE;

/// Name of the control socket in it.
pub const SOCKET: &str = "control";
/// Name of the log in it; the older half is `log.1`.
pub const LOG: &str = "log";

/// An opened place of one images folder.
#[derive(Debug)]
pub struct Place {
    fd: OwnedFd,
    path: PathBuf,
    inside: bool,
}

impl Place {
    /// Opens the place of `images` for its daemon and makes it where it is missing: in the folder, or, where
    /// nothing can be written there, under the run folder.
    pub fn make(images: &Path) -> Result<Place> {
        let inside = images.join(PRIVATE);
        match make_private(&inside, false).and_then(|()| probe_write(&inside)) {
            Ok(()) => return Place::open(inside, true),
            Err(e) if read_only(&e) => {}
            Err(e) => {
                return Err(Error::io(
                    &e,
                    &inside,
                    "cannot make the folder for the control socket and the log",
                ));
            }
        }
        let outside = outside(images)?;
        make_private(&outside, true).map_err(|e| {
            Error::io(&e, &outside, "cannot make the folder for the control socket and the log")
        })?;
        Place::open(outside, false)
    }

    /// The places in which the daemon of `images` may have its socket, likeliest first.
    pub fn candidates(images: &Path) -> Vec<Place> {
        let outside = outside(images).ok();
        let places = std::iter::once((images.join(PRIVATE), true)).chain(outside.map(|path| (path, false)));
        places.filter_map(|(path, inside)| Place::open(path, inside).ok()).collect()
    }

    fn open(path: PathBuf, inside: bool) -> Result<Place> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let file: File = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path)
            .map_err(|e| Error::io(&e, &path, "cannot open the folder of the control socket"))?;
        Ok(Place { fd: file.into(), path, inside })
    }

    /// True for `.ploopfs` in the images folder, whose lock the folder itself takes.
    pub fn is_inside(&self) -> bool {
        self.inside
    }

    /// A file in the place, by a name that does not depend on the folder's path: socket paths hold 107 bytes only.
    pub fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// The path of a file in the place, for people.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// The folder that holds places outside of images folders: `/run/ploopfs` for root, the user's own run folder
/// for others.
fn run_folder() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/run/ploopfs"));
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_absolute() => Ok(Path::new(&dir).join("ploopfs")),
        _ => Err(Error::new(
            Kind::ReadOnly,
            "the images folder cannot be written and XDG_RUNTIME_DIR is not set: there is no place for the control \
             socket; set it to a folder of yours",
        )),
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn outside(images: &Path) -> Result<PathBuf> {
    let meta = fs::metadata(images).map_err(|e| Error::io(&e, images, "cannot read the images folder"))?;
    Ok(run_folder()?.join(format!("{:x}-{:x}", meta.dev(), meta.ino())))
}

/// Makes a folder that only we may enter; an existing one stays as it is.
fn make_private(path: &Path, parents: bool) -> std::io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(parents).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// An existing folder may lie on a file system that was since mounted read-only, so only writing tells.
fn probe_write(folder: &Path) -> std::io::Result<()> {
    rustix::fs::access(folder, rustix::fs::Access::WRITE_OK)?;
    Ok(())
}

fn read_only(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM))
}
