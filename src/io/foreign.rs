//! Files in folders that others may own: their owner can put a link, a pipe or a second name where a file of ours is
//! looked for, and can swap it between a look and an open. So everything is reached from a descriptor of the folder, no link
//! is followed, no open waits, and what was opened is judged by its descriptor and not by its name.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags};
use rustix::io::{Errno, retry_on_intr};

/// What every open here has: a pipe does not wait for its other end, a terminal does not become ours.
const WARY: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// The folder at `path`, without its permission to read it. Links in the path are the caller's own choice.
pub fn folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The folder at an absolute path that was resolved before, for reading. A link in it now was put there meanwhile, and is an
/// error (ELOOP).
pub fn resolved_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match retry_on_intr(|| rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)) {
        // Before Linux 5.6, and in containers that do not know the call: the last name at least is none.
        Err(Errno::NOSYS | Errno::PERM) => {
            Ok(rustix::fs::openat(CWD, path, flags | OFlags::NOFOLLOW, Mode::empty())?)
        }
        result => Ok(result?),
    }
}

/// The folder `name` in `dir`; a link is none.
pub fn folder_in(dir: &impl AsFd, name: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | WARY;
    Ok(rustix::fs::openat(dir, name.as_ref(), flags, Mode::empty())?)
}

/// The kernel's number of the mount that `fd` lies on. Its file system is asked for nothing, so a dead mount does not hold
/// it up; nor is /proc, which a confined process may not read, where the kernel returns it (Linux 5.8).
pub fn mount_id(fd: &impl AsFd) -> io::Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    match rustix::fs::statx(fd, "", flags, StatxFlags::MNT_ID) {
        Ok(stat) if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 => Ok(stat.stx_mnt_id),
        _ => listed_mount_id(fd),
    }
}

/// The same, for kernels that have it in /proc only.
fn listed_mount_id(fd: &impl AsFd) -> io::Result<u64> {
    let info = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()))?;
    mount_id_in(&info).ok_or_else(|| io::Error::other("the kernel names no mount in /proc/self/fdinfo"))
}

/// The number of the mount in a file of `/proc/PID/fdinfo`.
pub fn mount_id_in(info: &[u8]) -> Option<u64> {
    let line = info.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"mnt_id:"))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// Opens the regular file `path` below the folder `root`, on the same mount; a link or a mount anywhere in it is an error
/// (ELOOP, EXDEV).
pub fn open_beneath(root: &impl AsFd, path: &Path, flags: OFlags) -> io::Result<File> {
    let file = find_beneath(root, path, flags)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    // Only the open was not to wait.
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

fn find_beneath(root: &impl AsFd, path: &Path, flags: OFlags) -> io::Result<File> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_XDEV
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS;
    match retry_on_intr(|| rustix::fs::openat2(root, path, flags | WARY, Mode::empty(), resolve)) {
        Ok(fd) => Ok(File::from(fd)),
        // Before Linux 5.6, and in containers that do not know the call.
        Err(Errno::NOSYS | Errno::PERM) => step_beneath(root, path, flags),
        Err(e) => Err(e.into()),
    }
}

/// The same step by step: no part of the path is a link, and where it ended is on the mount where it began.
fn step_beneath(root: &impl AsFd, path: &Path, flags: OFlags) -> io::Result<File> {
    let mut parts: Vec<_> = path.components().collect();
    if !parts.iter().all(|part| matches!(part, std::path::Component::Normal(_))) {
        return Err(Errno::XDEV.into());
    }
    let last = parts.pop().ok_or(Errno::NOENT)?;
    let mut dir: Option<OwnedFd> = None;
    for part in parts {
        let from = dir.as_ref().map_or(root.as_fd(), AsFd::as_fd);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = Some(rustix::fs::openat(from, part.as_os_str(), flags, Mode::empty())?);
    }
    let from = dir.as_ref().map_or(root.as_fd(), AsFd::as_fd);
    let file = File::from(rustix::fs::openat(from, last.as_os_str(), flags | WARY, Mode::empty())?);
    if mount_id(&file)? != mount_id(root)? {
        return Err(Errno::XDEV.into());
    }
    Ok(file)
}

/// The socket `name` in `dir`, held by a descriptor that cannot be read or written: it is connected to through
/// /proc/self/fd. ENOTSOCK for whatever else stands there.
pub fn socket_in(dir: &impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let fd = rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::Socket => Ok(fd),
        _ => Err(Errno::NOTSOCK.into()),
    }
}

/// Opens our file `name` in `dir` with `flags`, and makes it where it is missing. What is no file of ours (a link, a pipe, a
/// file with a second name or of another owner) is neither read nor written: with `replace` it loses its name here, else it
/// is an error (EEXIST), as a folder of that name always is.
///
/// Order: (1) look at what is there, through a descriptor; (2) take away the name of what is not ours; (3) make it anew,
/// only where nothing is. Who puts something there between (2) and (3) is noticed by (3), and begins a next round.
pub fn own_file(dir: &impl AsFd, name: &str, flags: OFlags, replace: bool) -> io::Result<File> {
    /// The owner of the folder may go on putting things there; then he has no mount.
    const ROUNDS: u32 = 16;
    for _ in 0..ROUNDS {
        match own_file_there(dir, name, flags) {
            Ok(file) => return Ok(file),
            // ELOOP: a link. ENXIO: a pipe that nothing reads, or a socket. EACCES: another's.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EEXIST | libc::ELOOP | libc::ENXIO | libc::EACCES)
                ) =>
            {
                if !replace {
                    return Err(Errno::EXIST.into());
                }
                match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => return Err(e),
        }
        let new = flags | WARY | OFlags::CREATE | OFlags::EXCL;
        match retry_on_intr(|| rustix::fs::openat(dir, name, new, Mode::RUSR | Mode::WUSR)) {
            Err(Errno::EXIST) => {}
            result => return Ok(File::from(result?)),
        }
    }
    Err(Errno::BUSY.into())
}

/// Opens our file `name` in `dir`, if it is there; EEXIST: something else is.
pub fn own_file_there(dir: &impl AsFd, name: &str, flags: OFlags) -> io::Result<File> {
    let fd = retry_on_intr(|| rustix::fs::openat(dir, name, flags | WARY, Mode::empty()))?;
    if is_own(&rustix::fs::fstat(&fd)?) { Ok(File::from(fd)) } else { Err(Errno::EXIST.into()) }
}

/// A regular file with one name, of ours or of root's.
fn is_own(stat: &Stat) -> bool {
    let own = rustix::process::geteuid().as_raw();
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_nlink == 1
        && (stat.st_uid == own || stat.st_uid == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, symlink};

    const APPEND: OFlags = OFlags::WRONLY.union(OFlags::APPEND);

    #[test]
    fn a_mount_has_one_number_whichever_way_it_is_asked_for() {
        for path in ["/", "/proc", "/dev"] {
            let dir = folder(Path::new(path)).expect("opens");
            assert_eq!(mount_id(&dir).expect("a number"), listed_mount_id(&dir).expect("a number"), "{path}");
        }
    }

    #[test]
    fn what_is_no_file_of_ours_loses_its_name_and_is_not_written() {
        let temp = tempfile::tempdir().expect("a folder");
        let dir = folder(temp.path()).expect("opens");
        let other = temp.path().join("other");
        let at = temp.path().join("log");
        type Make<'a> = &'a dyn Fn();
        let pipe = || rustix::fs::mknodat(&dir, "log", FileType::Fifo, Mode::RWXU, 0).expect("a pipe");
        let cases: [(&str, Make); 4] = [
            ("a pipe", &pipe),
            ("a link", &|| symlink(&other, &at).expect("a link")),
            ("a dangling link", &|| symlink("nowhere", &at).expect("a link")),
            ("a second name", &|| fs::hard_link(&other, &at).expect("a second name")),
        ];
        for (what, make) in cases {
            fs::write(&other, "precious").expect("written");
            let _ = fs::remove_file(&at);
            make();
            own_file(&dir, "log", APPEND, false).expect_err("left as it is");
            own_file(&dir, "log", APPEND, true).expect(what).write_all(b"line").expect("written");
            assert_eq!(fs::read(&other).expect("there"), b"precious", "{what}");
            let status = at.symlink_metadata().expect("made anew");
            assert!(status.is_file() && status.nlink() == 1, "{what}");
            own_file(&dir, "log", APPEND, true).expect("ours").write_all(b"!").expect("written");
            assert_eq!(fs::read(&at).expect("there"), b"line!", "{what}");
        }
        fs::remove_file(&at).expect("removed");
        fs::create_dir(&at).expect("a folder");
        own_file(&dir, "log", APPEND, true).expect_err("a folder is no log");
    }

    #[test]
    fn a_file_of_another_user_is_not_ours() {
        if !rustix::process::geteuid().is_root() {
            return println!("SKIPPED: needs root, to give a file away");
        }
        let temp = tempfile::tempdir().expect("a folder");
        let at = temp.path().join("log");
        fs::write(&at, "theirs").expect("written");
        std::os::unix::fs::chown(&at, Some(65534), None).expect("given away");
        let dir = folder(temp.path()).expect("opens");
        let ours = own_file(&dir, "log", APPEND, true).expect("made anew");
        assert_eq!((ours.metadata().expect("status").uid(), fs::read(&at).expect("there")), (0, vec![]));
    }

    #[test]
    fn below_a_folder_no_link_is_followed_and_nothing_lies_outside() {
        let temp = tempfile::tempdir().expect("a folder");
        let root = temp.path().join("root");
        fs::create_dir_all(root.join("a")).expect("folders");
        fs::write(root.join("a/file"), "x").expect("written");
        fs::write(temp.path().join("secret"), "s").expect("written");
        symlink("../../secret", root.join("a/link")).expect("a link");
        symlink("a", root.join("b")).expect("a link");
        let dir = folder(&root).expect("opens");
        type Open = fn(&OwnedFd, &Path, OFlags) -> io::Result<File>;
        let ways: [(&str, Open); 2] = [("openat2", find_beneath), ("steps", step_beneath)];
        for (way, open) in ways {
            open(&dir, Path::new("a/file"), OFlags::RDONLY).expect(way);
            for path in ["a/link", "b/file", "../secret", "a/../../secret", "/etc/passwd"] {
                open(&dir, Path::new(path), OFlags::RDONLY).expect_err(path);
            }
        }
    }

    #[test]
    fn another_mount_below_a_folder_is_not_entered() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::create_dir(temp.path().join("m")).expect("a folder");
        let flags = rustix::mount::MountFlags::empty();
        if let Err(e) = rustix::mount::mount("none", temp.path().join("m"), "tmpfs", flags, None) {
            return println!("SKIPPED: cannot mount: {e}");
        }
        fs::write(temp.path().join("m/file"), "x").expect("written");
        let dir = folder(temp.path()).expect("opens");
        let path = Path::new("m/file");
        let found = [find_beneath(&dir, path, OFlags::RDONLY), step_beneath(&dir, path, OFlags::RDONLY)];
        crate::io::unmount::unmount(&temp.path().join("m"), true).expect("unmounted");
        for way in found {
            assert_eq!(way.expect_err("elsewhere").raw_os_error(), Some(libc::EXDEV));
        }
    }
}
