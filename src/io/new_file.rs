//! A host file that appears under its name complete and durable, or not at all, whatever ends the program.
//!
//! Where the host has files without a name, nothing else is ever seen. Elsewhere (network file systems, mostly) the file has
//! a dot-name until then, which says whose it is, and a lock, which says that its program still runs: what a killed one left
//! goes with the next new file in that folder, or with its next mount ([`sweep`]).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, flock};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::io::rename::rename_new_file;

/// Owner alone: disks hold what their guests keep secret.
const MODE: u32 = 0o600;
/// Behind the dot-name of a file on its way: unlike anything that others make.
const ON_ITS_WAY: &[u8] = b".ploopfs-new";

/// A file without a name, or, where the host has no such files, with one that begins with a dot. Dropped, it goes.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    folder: OwnedFd,
    name: OsString,
    /// What it will be, for messages.
    path: PathBuf,
    /// Its name until then; None: it has none.
    temporary: Option<OsString>,
}

impl NewFile {
    /// Begins the file `path`, which must not be there; for its owner alone, since it holds what a disk holds.
    pub fn begin(path: &Path) -> Result<NewFile> {
        NewFile::begin_as(path, MODE)
    }

    /// The same with other permissions, of which the umask takes what it takes.
    pub fn begin_as(path: &Path, mode: u32) -> Result<NewFile> {
        let name = path.file_name().ok_or_else(|| Error::at(Kind::Invalid, path, "ends in no name"))?;
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = retry_on_intr(|| rustix::fs::open(parent, flags, Mode::empty()))
            .map_err(|e| Error::io(&e.into(), parent, "cannot open the folder"))?;
        let cannot = |e: Errno| Error::io(&e.into(), path, "cannot make the file");
        let (mode, flags) = (Mode::from_raw_mode(mode), OFlags::RDWR | OFlags::CLOEXEC);
        sweep(folder.as_fd(), parent);
        let nameless = retry_on_intr(|| rustix::fs::openat(&folder, ".", flags | OFlags::TMPFILE, mode));
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            // Hosts without nameless files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let (file, temporary) = named(folder.as_fd(), name, mode).map_err(cannot)?;
                (file, Some(temporary))
            }
            Err(e) => return Err(cannot(e)),
        };
        let file = File::from(file);
        Ok(NewFile { file, folder, name: name.to_owned(), path: path.to_owned(), temporary })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path under which other programs can open it as long as it is open here.
    pub fn open_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Gives it its name, which must be free: 1. its content is synced; 2. it is linked to its name, or renamed to it; 3. the
    /// folder is synced; 4. a nameless one is opened by its name and closed.
    ///
    /// 2 before 1: a power cut could leave the name on a file with holes where data was. Without 3 a power cut could take
    /// the name back after we said that it is there. 4, because what watches a folder takes a file that was created and not
    /// closed for one that is still being written.
    #[expect(clippy::disallowed_methods, reason = "the home of new files' names")]
    pub fn commit(mut self) -> Result<()> {
        let shown = self.path.clone();
        let cannot = |e: Errno, doing: &str| Error::io(&e.into(), &shown, doing);
        // 1.
        retry_on_intr(|| rustix::fs::fsync(&self.file)).map_err(|e| cannot(e, "cannot sync"))?;
        // 2.
        match &self.temporary {
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let (to, flags) = (&self.folder, AtFlags::SYMLINK_FOLLOW);
                retry_on_intr(|| rustix::fs::linkat(CWD, &own, to, &self.name, flags))
            }
            // A hard link, where the host cannot rename so, does not replace either.
            Some(temporary) => rename_new_file(self.folder.as_fd(), temporary, &self.name),
        }
        .map_err(|e| match e {
            Errno::EXIST => exists(&shown),
            e => cannot(e, "cannot give the file its name"),
        })?;
        // 3.
        retry_on_intr(|| rustix::fs::fsync(&self.folder)).map_err(|e| cannot(e, "cannot sync the folder"))?;
        // 4.
        if self.temporary.is_none() {
            let flags =
                OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            // Gone again already: then there is nothing to be seen either.
            let _ = rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty());
        }
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            // Renamed, mostly.
            let _ = rustix::fs::unlinkat(&self.folder, temporary, AtFlags::empty());
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        self.forget();
    }
}

/// A new file with a dot-name, locked.
fn named(folder: BorrowedFd<'_>, name: &OsStr, mode: Mode) -> rustix::io::Result<(OwnedFd, OsString)> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut attempt = 0;
    loop {
        let temporary = dot_name(name, attempt);
        attempt += 1;
        let made = retry_on_intr(|| rustix::fs::openat(folder, &temporary, flags, mode));
        let file = match made {
            // Of a killed process of our number, or of another thread of ours.
            Err(Errno::EXIST) if attempt < 100 => continue,
            other => other?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // A host without such locks: what is left there stays.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOLCK) => {}
            // It is just being swept.
            Err(_) => continue,
        }
        // Swept before it was locked: made anew.
        if rustix::fs::fstat(&file)?.st_nlink > 0 {
            return Ok((file, temporary));
        }
    }
}

/// Removes from the folder `dir` (`path`, for messages) what programs left that were killed on their way: files of our
/// sort of name, and with no program's lock on them.
pub fn sweep(dir: BorrowedFd<'_>, path: &Path) {
    let Ok(entries) = Dir::read_from(dir) else { return };
    for entry in entries.flatten() {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let ours = name.as_bytes().starts_with(b".") && name.as_bytes().ends_with(ON_ITS_WAY);
        // Locked until its name has gone: its maker, if it has just begun, then makes another.
        let Some(_locked) = ours.then(|| left_over(dir, name)).flatten() else { continue };
        let shown = path.join(name);
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) => log::info!("{}: removed; it was left of a file that was not finished", shown.display()),
            Err(e) => {
                log::warn!("{}: cannot remove what is left of an unfinished file: {e}", shown.display())
            }
        }
    }
}

/// A regular file that no program has locked, and we now have.
fn left_over(dir: BorrowedFd<'_>, name: &OsStr) -> Option<OwnedFd> {
    // For writing: a network file system locks no other.
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::empty()).ok()?;
    let is_file = FileType::from_raw_mode(rustix::fs::fstat(&file).ok()?.st_mode) == FileType::RegularFile;
    (is_file && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()).then_some(file)
}

/// Names that begin with a dot are taken for no image.
fn dot_name(name: &OsStr, attempt: u32) -> OsString {
    // 255 bytes are a name's limit.
    let bytes = name.as_bytes();
    let mut dotted = OsString::from(".");
    dotted.push(OsStr::from_bytes(&bytes[..bytes.len().min(200)]));
    dotted.push(format!(".{}-{attempt}", std::process::id()));
    dotted.push(OsStr::from_bytes(ON_ITS_WAY));
    dotted
}

fn exists(path: &Path) -> Error {
    Error::at(Kind::Exists, path, "is there already; nothing is overwritten, choose another name")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(folder: &Path) -> Vec<OsString> {
        folder.read_dir().expect("a folder").map(|entry| entry.expect("an entry").file_name()).collect()
    }

    #[test]
    fn it_appears_when_it_is_committed_and_leaves_nothing_when_it_is_not() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("new");
        let mut file = NewFile::begin(&path).expect("begun");
        file.file.write_all(b"some").expect("write");
        assert_eq!(std::fs::read(file.open_path()).expect("open here"), b"some");
        assert!(!path.exists());
        drop(file);
        assert!(names(folder.path()).is_empty());
        let mut file = NewFile::begin(&path).expect("begun");
        file.file.write_all(b"all").expect("write");
        file.commit().expect("committed");
        assert_eq!(std::fs::read(&path).expect("there"), b"all");
        assert_eq!(names(folder.path()), ["new"]);
    }

    #[test]
    fn a_nameless_file_never_has_another_name_than_its_own() {
        let folder = tempfile::tempdir().expect("tmp");
        let mut watch = inotify::Inotify::init().expect("inotify");
        let mask = inotify::WatchMask::CREATE | inotify::WatchMask::MOVE;
        watch.watches().add(folder.path(), mask).expect("watched");
        let mut file = NewFile::begin(&folder.path().join("new")).expect("begun");
        if file.temporary.is_some() {
            return println!("SKIPPED a_nameless_file: this host has none");
        }
        file.file.write_all(b"all").expect("write");
        file.commit().expect("committed");
        let mut buffer = [0; 4096];
        let events = watch.read_events(&mut buffer).expect("events");
        // Killed in between, another name would stay.
        let seen: Vec<_> = events.filter_map(|event| event.name.map(OsStr::to_owned)).collect();
        assert_eq!(seen, ["new"]);
    }

    #[test]
    fn where_every_file_has_a_name_a_killed_ones_goes_and_a_running_ones_stays() {
        let folder = tempfile::tempdir().expect("tmp");
        let dir = File::open(folder.path()).expect("a folder");
        let (running, running_name) =
            named(dir.as_fd(), "new".as_ref(), Mode::from_raw_mode(MODE)).expect("made");
        let (killed, killed_name) =
            named(dir.as_fd(), "new".as_ref(), Mode::from_raw_mode(MODE)).expect("made");
        assert_ne!(running_name, killed_name);
        drop(killed);
        std::fs::create_dir(folder.path().join(".folder.ploopfs-new")).expect("mkdir");
        for strangers in [".new.1.new", "x.ploopfs-new", ".ploopfs-new.x"] {
            std::fs::write(folder.path().join(strangers), "").expect("write");
        }
        NewFile::begin(&folder.path().join("other")).expect("begun");
        let left = names(folder.path());
        assert!(left.contains(&running_name) && !left.contains(&killed_name), "{left:?}");
        assert_eq!(left.len(), 5, "{left:?}");
        drop(running);
        sweep(dir.as_fd(), folder.path());
        assert!(!names(folder.path()).contains(&running_name));
    }

    #[test]
    fn a_file_with_a_dot_name_gets_its_own_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("new");
        let mut file = NewFile::begin(&path).expect("begun");
        let (named, temporary) =
            named(file.folder.as_fd(), "new".as_ref(), Mode::from_raw_mode(MODE)).expect("made");
        (file.file, file.temporary) = (File::from(named), Some(temporary));
        file.file.write_all(b"all").expect("write");
        file.commit().expect("committed");
        assert_eq!(std::fs::read(&path).expect("there"), b"all");
        assert_eq!(names(folder.path()), ["new"]);
    }

    #[test]
    fn nothing_is_ever_replaced() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("new");
        let file = NewFile::begin(&path).expect("begun");
        std::fs::write(&path, "another's").expect("write");
        assert_eq!(file.commit().expect_err("taken").kind(), Kind::Exists);
        assert_eq!(NewFile::begin(&path).expect_err("taken").kind(), Kind::Exists);
        assert_eq!(std::fs::read(&path).expect("there"), b"another's");
        assert_eq!(names(folder.path()), ["new"]);
    }

    #[test]
    fn a_missing_folder_and_a_path_without_a_name_are_named() {
        let folder = tempfile::tempdir().expect("tmp");
        let missing = NewFile::begin(&folder.path().join("no/new")).expect_err("no folder");
        assert_eq!(missing.kind(), Kind::NotFound);
        assert_eq!(NewFile::begin(Path::new("/")).expect_err("no name").kind(), Kind::Invalid);
    }
}
