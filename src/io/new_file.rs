//! A host file that appears under its name complete and durable, or not at all, whatever ends the program.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};

/// Owner alone: disks hold what their guests keep secret.
const MODE: u32 = 0o600;

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
    /// Begins the file `path`, which must not be there.
    pub fn begin(path: &Path) -> Result<NewFile> {
        let name = path.file_name().ok_or_else(|| Error::at(Kind::Invalid, path, "ends in no name"))?;
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = retry_on_intr(|| rustix::fs::open(parent, flags, Mode::empty()))
            .map_err(|e| Error::io(&e.into(), parent, "cannot open the folder"))?;
        let cannot = |e: Errno| Error::io(&e.into(), path, "cannot make the file");
        let (mode, flags) = (Mode::from_raw_mode(MODE), OFlags::RDWR | OFlags::CLOEXEC);
        let nameless = retry_on_intr(|| rustix::fs::openat(&folder, ".", flags | OFlags::TMPFILE, mode));
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            // Hosts without nameless files: network file systems, mostly.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let temporary = dot_name(name);
                let flags = flags | OFlags::CREATE | OFlags::EXCL;
                let made = retry_on_intr(|| rustix::fs::openat(&folder, &temporary, flags, mode));
                (made.map_err(cannot)?, Some(temporary))
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

    /// Gives it its name: 1. its content is synced; 2. a nameless one gets its dot-name; 3. renamed to its name, which must
    /// be free; 4. the folder is synced.
    ///
    /// 3 before 1: a power cut could leave the name on a file with holes where data was. Without 4 a power cut could take
    /// the name back after we said that it is there. 2, because who watches a folder takes a file that was moved in for a
    /// finished one, and a new name of a nameless one for a file that is still being written.
    pub fn commit(mut self) -> Result<()> {
        let shown = self.path.clone();
        let cannot = |e: Errno, doing: &str| Error::io(&e.into(), &shown, doing);
        // 1.
        retry_on_intr(|| rustix::fs::fsync(&self.file)).map_err(|e| cannot(e, "cannot sync"))?;
        // 2.
        let temporary = match &self.temporary {
            Some(temporary) => temporary.clone(),
            None => self.link().map_err(|e| cannot(e, "cannot give the file a name"))?,
        };
        self.temporary = Some(temporary.clone());
        // 3.
        let (from, to) = (&self.folder, &self.folder);
        match rustix::fs::renameat_with(from, &temporary, to, &self.name, RenameFlags::NOREPLACE) {
            // A hard link does not replace either; the other name goes when this is dropped.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(from, &temporary, to, &self.name, AtFlags::empty())
            }
            other => other,
        }
        .map_err(|e| match e {
            Errno::EXIST => exists(&shown),
            e => cannot(e, "cannot give the file its name"),
        })?;
        // 4.
        retry_on_intr(|| rustix::fs::fsync(&self.folder)).map_err(|e| cannot(e, "cannot sync the folder"))?;
        self.forget();
        Ok(())
    }

    /// Gives a nameless file its dot-name.
    fn link(&self) -> rustix::io::Result<OsString> {
        let temporary = dot_name(&self.name);
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let link = || rustix::fs::linkat(CWD, &own, &self.folder, &temporary, AtFlags::SYMLINK_FOLLOW);
        match link() {
            // Left by a process of our number that was killed: the name carries it.
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(&self.folder, &temporary, AtFlags::empty())?;
                link()?;
            }
            other => other?,
        }
        Ok(temporary)
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

/// Names that begin with a dot are taken for no image.
fn dot_name(name: &OsStr) -> OsString {
    // 255 bytes are a name's limit.
    let bytes = name.as_bytes();
    let mut dotted = OsString::from(".");
    dotted.push(OsStr::from_bytes(&bytes[..bytes.len().min(200)]));
    dotted.push(format!(".{}.new", std::process::id()));
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
    fn nothing_is_ever_replaced() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("new");
        let file = NewFile::begin(&path).expect("begun");
        std::fs::write(&path, "somebody else's").expect("write");
        assert_eq!(file.commit().expect_err("taken").kind(), Kind::Exists);
        assert_eq!(NewFile::begin(&path).expect_err("taken").kind(), Kind::Exists);
        assert_eq!(std::fs::read(&path).expect("there"), b"somebody else's");
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
