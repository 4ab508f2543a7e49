//! Where the daemon of an images folder keeps its socket and its log: `.ploopfs/` in the folder, or, where the
//! folder cannot be written or its file system is full, a folder under `/run` named by the device and inode of the images folder, so that
//! every command finds it by itself.

use std::fs::DirBuilder;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::folder::PRIVATE;
use crate::io::foreign;

/// Name of the control socket in it.
pub const SOCKET: &str = "control";
/// Name of the log in it; the older half is `log.1`.
pub const LOG: &str = "log";

/// The file that is made to see whether there is room, with a process id behind it.
const PROBE: &str = "probe";
/// How much is written to it: too much to fit into an inode or a tree's leaf beside it (btrfs), so that it takes a block.
const ROOM: usize = 16 << 10;

/// An opened place of one images folder.
#[derive(Debug)]
pub struct ControlPlace {
    fd: OwnedFd,
    path: PathBuf,
    inside: bool,
    /// It would be inside if the host were not full.
    full: bool,
}

impl ControlPlace {
    /// Opens the place of the folder `dir`, whose path is `images`, for its daemon and makes it where it is missing: in the
    /// folder, or, where nothing can be written there, under the run folder. A full host must be mountable: trimming guests
    /// is what makes room on it.
    pub fn make(dir: &impl AsFd, images: &Path) -> Result<ControlPlace> {
        const DOING: &str = "cannot make the folder for the control socket and the log";
        let mut full = false;
        match rustix::fs::mkdirat(dir, PRIVATE, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => match ControlPlace::open_inside(dir, images) {
                // It may be there on a file system that was since mounted read-only.
                Ok(place) if place.is_writable()? => match place.has_room() {
                    true => return Ok(place),
                    false => full = true,
                },
                Err(e) if e.errno() != libc::EACCES => return Err(e),
                _ => {}
            },
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => {}
            Err(Errno::NOSPC | Errno::DQUOT) => full = true,
            Err(e) => return Err(Error::io(&e.into(), images.join(PRIVATE), DOING)),
        }
        let outside = outside(dir, images)?;
        match DirBuilder::new().mode(0o700).recursive(true).create(&outside) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(Error::io(&e, &outside, DOING)),
            _ => Ok(ControlPlace { full, ..ControlPlace::open_outside(outside)? }),
        }
    }

    /// False where a file cannot be made here and filled: log, lock and socket will not fit then either.
    fn has_room(&self) -> bool {
        let name = format!("{PROBE}.{}", std::process::id());
        let made = foreign::own_file(&self.fd, &name, OFlags::WRONLY, true);
        let written = made.and_then(|mut file| file.write_all(&[0; ROOM]));
        // One that was not made is not there.
        let _ = rustix::fs::unlinkat(&self.fd, &name, AtFlags::empty());
        // Whatever else is wrong is met again, and said, where the files themselves are made.
        !written.is_err_and(|e| matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)))
    }

    /// The places in which the daemon of `images` may have its socket, likeliest first.
    pub fn candidates(images: &Path) -> Vec<ControlPlace> {
        let Ok(dir) = foreign::folder(images) else { return Vec::new() };
        let inside = ControlPlace::open_inside(&dir, images);
        let outside = outside(&dir, images).and_then(ControlPlace::open_outside);
        inside.into_iter().chain(outside).collect()
    }

    fn open_inside(dir: &impl AsFd, images: &Path) -> Result<ControlPlace> {
        let path = images.join(PRIVATE);
        let fd = foreign::folder_in(dir, PRIVATE).map_err(|e| cannot_open(&e, &path))?;
        Ok(ControlPlace { fd, path, inside: true, full: false })
    }

    /// Only where it is ours or root's: the folder around it may be any user's.
    fn open_outside(path: PathBuf) -> Result<ControlPlace> {
        let fd = foreign::folder_in(&rustix::fs::CWD, &path).map_err(|e| cannot_open(&e, &path))?;
        let owner = rustix::fs::fstat(&fd).map_err(|e| cannot_open(&e.into(), &path))?.st_uid;
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(Error::at(Kind::Access, &path, format!("belongs to user {owner}; remove it")));
        }
        Ok(ControlPlace { fd, path, inside: false, full: false })
    }

    fn is_writable(&self) -> Result<bool> {
        match rustix::fs::accessat(&self.fd, ".", Access::WRITE_OK, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => Ok(false),
            Err(e) => {
                Err(Error::io(&e.into(), &self.path, "cannot look at the folder of the control socket"))
            }
        }
    }

    /// True for `.ploopfs` in the images folder, whose lock the folder itself takes.
    pub fn is_inside(&self) -> bool {
        self.inside
    }

    /// Where socket, log and lock are, in words, if the host's want of space has brought them there.
    pub fn without_room(&self) -> Option<String> {
        let path = self.path.display();
        self.full.then(|| format!("space: the host is full; control socket, log and lock are in {path}"))
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

impl AsFd for ControlPlace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn cannot_open(e: &std::io::Error, path: &Path) -> Error {
    let what = match e.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR) => {
            return Error::at(Kind::Invalid, path, "is no folder, and this name is ours; move it away");
        }
        _ => "cannot open the folder of the control socket",
    };
    Error::io(e, path, what)
}

fn outside(dir: &impl AsFd, images: &Path) -> Result<PathBuf> {
    let stat =
        rustix::fs::fstat(dir).map_err(|e| Error::io(&e.into(), images, "cannot read the images folder"))?;
    Ok(run_folder()?.join(format!("{:x}-{:x}", stat.st_dev, stat.st_ino)))
}
