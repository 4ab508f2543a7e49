//! From the text of a descriptor's `File` to the folder and the name that are opened. No link is followed on the way,
//! and a path that leaves the folder around the image is refused unless that was allowed.
//!
//! The way is walked with descriptors that read nothing (O_PATH): a confined daemon may pass through folders whose
//! content it may not read.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result, is_passing};
use crate::format::descriptor::{Delta, Descriptor};
use crate::image::labels::is_plain_name;
use crate::io::real::{Access, RealFile};

/// Opens an image's folder, without following a link.
pub fn image_folder(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))
        .map_err(|e| Error::io(&e.into(), path, "cannot open the image's folder"))
}

/// Where a file lies: a folder that is open, and a name in it. What was judged of the way to it stays true, though the
/// owner of the folders on that way may rename them meanwhile.
#[derive(Debug)]
pub struct Located {
    folder: OwnedFd,
    name: OsString,
    /// For messages.
    pub shown: PathBuf,
}

impl Located {
    /// The file at `path`, as a user named it: links to folders on the way are his own choice.
    pub fn of(path: &Path) -> Result<Located> {
        let cannot = |e: Errno| Error::io(&e.into(), path, "cannot open");
        let name = path.file_name().ok_or_else(|| cannot(Errno::ISDIR))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = open_folder(CWD, parent.as_os_str(), OFlags::PATH).map_err(cannot)?;
        Ok(Located { folder, name: name.to_owned(), shown: path.to_owned() })
    }

    /// The file that the descriptor in `dir` (`path`, for messages) names `file`; see [`resolve`].
    pub fn named(dir: BorrowedFd<'_>, path: &Path, file: &str, allow_outside: bool) -> Result<Located> {
        let shown = shown(path, file);
        let (folder, name) = resolve(dir, Path::new(file), &shown, allow_outside)?;
        Ok(Located { folder, name, shown })
    }

    /// The path of its folder, as that is called now; where /proc does not tell, as it was named.
    pub fn folder_now(&self) -> Result<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.folder.as_raw_fd());
        let parent = self.shown.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let found = std::fs::read_link(link).or_else(|_| parent.canonicalize());
        found.map_err(|e| Error::io(&e, parent, "cannot resolve the path"))
    }

    /// Its name.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Opens it, and no link.
    pub fn open(&self, access: Access) -> Result<RealFile> {
        RealFile::open_as(&self.folder, &self.name, &self.shown, access)
    }

    /// Its folder, to make files in it and to sync it.
    pub fn around(&self) -> Result<OwnedFd> {
        let opened = open_folder(&self.folder, OsStr::new("."), OFlags::empty());
        opened.map_err(|e| Error::io(&e.into(), &self.shown, "cannot open the folder around it"))
    }
}

/// Opens the folder that holds `file`, and returns it with the file's name. `dir` is the image's folder, `shown` the
/// file for messages.
pub fn resolve(
    dir: BorrowedFd<'_>,
    file: &Path,
    shown: &Path,
    allow_outside: bool,
) -> Result<(OwnedFd, OsString)> {
    let Some(name) = file.file_name() else {
        return Err(Error::at(Kind::Damaged, shown, "File in the descriptor ends in no name"));
    };
    let folder = file.parent().unwrap_or(Path::new(""));
    let opened = if allow_outside {
        // The user who allows it trusts the descriptor; links on the way are then as good as anything else.
        let folder = if folder == Path::new("") { Path::new(".") } else { folder };
        open_folder(dir, folder.as_os_str(), OFlags::empty())
    } else {
        // Opened anew for reading: the caller may want to sync it.
        inside(dir, folder, shown)?.and_then(|at| open_folder(at, OsStr::new("."), OFlags::empty()))
    };
    let opened = opened.map_err(|e| match e {
        Errno::LOOP | Errno::NOTDIR => Error::at(
            Kind::NotPermitted,
            shown,
            "a part of its path is a link or no folder; links are followed with --allow-outside only",
        ),
        e => Error::io(&e.into(), shown, "cannot open the folder of this delta"),
    })?;
    Ok((opened, name.to_owned()))
}

fn open_folder(dir: impl AsFd, name: &OsStr, more: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more;
    retry_on_intr(|| rustix::fs::openat(&dir, name, flags, Mode::empty()))
}

/// Walks to `folder` one part at a time. The folder around the image is the border.
fn inside(dir: BorrowedFd<'_>, folder: &Path, shown: &Path) -> Result<std::result::Result<OwnedFd, Errno>> {
    let leaves = || {
        let why = "File in the descriptor leaves the folder that the image lies in; if you trust it, mount it with \
                   --allow-outside";
        Error::at(Kind::NotPermitted, shown, why)
    };
    let step = |at: &OwnedFd, part: &OsStr| open_folder(at, part, OFlags::NOFOLLOW | OFlags::PATH);
    let own = match open_folder(dir, OsStr::new("."), OFlags::PATH) {
        Ok(own) => own,
        Err(e) => return Ok(Err(e)),
    };
    // Depth below the border: the image's own folder is 1. None: an absolute path that has not met it yet.
    let (mut at, mut depth) = (own, Some(1_u32));
    let mut border = None;
    if folder.is_absolute() {
        let status = open_folder(dir, OsStr::new(".."), OFlags::PATH).and_then(|fd| rustix::fs::fstat(&fd));
        let root = open_folder(CWD, OsStr::new("/"), OFlags::PATH);
        match (status, root) {
            (Ok(status), Ok(root)) => {
                border = Some((status.st_dev, status.st_ino));
                (at, depth) = (root, None);
            }
            (Err(e), _) | (_, Err(e)) => return Ok(Err(e)),
        }
    }
    let meets = |at: &OwnedFd| {
        rustix::fs::fstat(at).is_ok_and(|status| Some((status.st_dev, status.st_ino)) == border)
    };
    if depth.is_none() && meets(&at) {
        depth = Some(0);
    }
    for part in folder.components() {
        let (part, next) = match (part, depth) {
            (Component::CurDir | Component::RootDir | Component::Prefix(_), _) => continue,
            // Before the border an absolute path has no business going up; at it, no path has.
            (Component::ParentDir, None | Some(0)) => return Err(leaves()),
            (Component::ParentDir, Some(n)) => (OsStr::new(".."), Some(n - 1)),
            (Component::Normal(part), depth) => (part, depth.map(|n| n + 1)),
        };
        at = match step(&at, part) {
            Ok(next) => next,
            Err(e) => return Ok(Err(e)),
        };
        depth = next;
        if depth.is_none() && meets(&at) {
            depth = Some(0);
        }
    }
    match depth {
        Some(_) => Ok(Ok(at)),
        None => Err(leaves()),
    }
}

/// What the host says of a file that the descriptor names. Nothing is opened, no link is followed. None: it is missing,
/// and may be on its way. Err: it lies outside, or is no regular file; or the host has no answer at the moment. `dir` is the image's folder, `path` its name.
pub fn named(dir: BorrowedFd<'_>, path: &Path, file: &str, allow_outside: bool) -> Result<Option<Stat>> {
    let shown = shown(path, file);
    let stat = |dir: BorrowedFd<'_>, name: &OsStr| rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    let stat = if is_plain_name(file) {
        stat(dir, OsStr::new(file))
    } else {
        match resolve(dir, Path::new(file), &shown, allow_outside) {
            Ok((folder, name)) => stat(folder.as_fd(), &name),
            Err(e) if matches!(e.kind(), Kind::NotPermitted | Kind::Damaged) || e.is_passing() => {
                return Err(e);
            }
            Err(_) => return Ok(None),
        }
    };
    let stat = match stat {
        Ok(stat) => stat,
        Err(e) if is_passing(e.raw_os_error()) => {
            return Err(Error::io(&e.into(), shown, "cannot look at it"));
        }
        Err(_) => return Ok(None),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(stat)),
        FileType::Symlink => Err(Error::at(Kind::Invalid, shown, "is a link; links are not followed")),
        _ => Err(Error::at(Kind::Invalid, shown, "is not a regular file")),
    }
}

/// The same of a file without which the image would not open: Err, also where it is missing or empty.
pub fn present(
    dir: BorrowedFd<'_>,
    path: &Path,
    descriptor: &Descriptor,
    delta: &Delta,
    allow_outside: bool,
) -> Result<Stat> {
    let damaged = |why: &str| Err(Error::at(Kind::Damaged, shown(path, &delta.file), why));
    match named(dir, path, &delta.file, allow_outside)? {
        None => damaged(MISSING),
        Some(stat) if stat.st_size == 0 && descriptor.disk_sectors > 0 => {
            damaged("is empty: its part of the image's data is gone")
        }
        Some(stat) => Ok(stat),
    }
}

/// What is said of a file that a descriptor names and that is not there.
pub const MISSING: &str = "is missing, and the descriptor names it: a part of the image's data";

/// The file for messages.
pub fn shown(folder: &Path, file: &str) -> PathBuf {
    folder.join(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn kind(image: &Path, file: &str, allow: bool) -> std::result::Result<OsString, Kind> {
        let dir = File::open(image).expect("open");
        let found = resolve(dir.as_fd(), Path::new(file), &image.join(file), allow);
        found.map(|(_, name)| name).map_err(|e| e.kind())
    }

    /// `check`, `check --repair` and `meta` resolved a delta's path, and then opened it by that path.
    #[test]
    fn a_file_that_was_located_is_opened_there_though_a_link_takes_the_place_of_its_folder() {
        use std::io::Read;
        let temp = tempfile::tempdir().expect("tmp");
        let images = temp.path().join("images");
        let (image, swapped) = (images.join("vm1"), images.join("vm1/sub"));
        for folder in [&swapped, &temp.path().join("secret")] {
            std::fs::create_dir_all(folder).expect("mkdir");
        }
        std::fs::write(swapped.join("f"), "ours").expect("write");
        std::fs::write(temp.path().join("secret/f"), "secret").expect("write");
        let dir = File::open(&image).expect("open");
        let ways = [
            Located::named(dir.as_fd(), &image, "sub/f", false).expect("inside"),
            Located::of(&swapped.join("f")).expect("there"),
        ];
        std::fs::rename(&swapped, images.join("away")).expect("rename");
        std::os::unix::fs::symlink(temp.path().join("secret"), &swapped).expect("link");
        for at in ways {
            let mut text = String::new();
            let file = at.open(Access::ReadOnly).expect("opens");
            File::from(file.as_fd().try_clone_to_owned().expect("cloned"))
                .read_to_string(&mut text)
                .expect("read");
            assert_eq!(text, "ours");
        }
        Located::named(dir.as_fd(), &image, "sub/f", false).expect_err("a link is on the way now");
    }

    #[test]
    fn paths_stay_within_the_folder_around_the_image_unless_that_is_allowed() {
        let root = tempfile::tempdir().expect("tmp");
        // macOS-style links in the temp path are not ours to test.
        let root = root.path().canonicalize().expect("real");
        for folder in ["images/vm1/sub", "images/vm2", "elsewhere"] {
            std::fs::create_dir_all(root.join(folder)).expect("mkdir");
        }
        std::os::unix::fs::symlink("../../elsewhere", root.join("images/vm1/link")).expect("link");
        let image = root.join("images/vm1");
        let absolute = |file: &str| root.join(file).to_str().expect("ASCII").to_owned();
        for good in ["f", "./f", "sub/f", "../f", "../vm2/f", "sub/../../vm2/f"] {
            assert_eq!(kind(&image, good, false), Ok("f".into()), "{good}");
        }
        assert_eq!(kind(&image, &absolute("images/vm2/f"), false), Ok("f".into()));
        for bad in ["../../f", "../../images/f", "/f", "/etc/f", "sub/../../../f", "../vm2/../../f", "link/f"]
        {
            assert_eq!(kind(&image, bad, false), Err(Kind::NotPermitted), "{bad}");
        }
        assert_eq!(kind(&image, &absolute("elsewhere/f"), false), Err(Kind::NotPermitted));
        for allowed in ["../../elsewhere/f", "link/f", &absolute("elsewhere/f")] {
            assert_eq!(kind(&image, allowed, true), Ok("f".into()), "{allowed}");
        }
        assert_eq!(kind(&image, "..", false), Err(Kind::Damaged));
        assert_eq!(kind(&image, "none/f", false), Err(Kind::NotFound));
    }
}
