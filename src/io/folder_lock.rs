//! Who may serve a folder: the lock on the folder itself, and the file in its `.ploopfs` that says who has it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::foreign;
use super::heirs::{Heirs, KeptLock};
use super::holder::{self, HeldLock, Holder};
use super::lock::{no_locks_here, set, taken};
use crate::words::quoted;
use crate::{Error, Kind, Result};

/// Name of the lock file in `.ploopfs`.
const LOCK: &str = "lock";

/// The hold on an images folder itself. Its lock file may be removed, restored from a backup, or be another's; the folder
/// that is served stays the same.
#[derive(Debug)]
pub struct ServedLock {
    dir: OwnedFd,
    held: bool,
}

impl ServedLock {
    /// Takes the folder that `dir` has open for reading, or says who has it ([`Kind::InUse`]); `private` is its `.ploopfs`,
    /// whose lock file says at which mount point.
    pub fn acquire(dir: &impl AsFd, private: Option<&OwnedFd>, path: &Path) -> Result<ServedLock> {
        let failed = |e: io::Error| Error::io(&e, path, "cannot take the lock of this folder");
        let dir = dir.as_fd().try_clone_to_owned().map_err(failed)?;
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(ServedLock { dir, held: true }),
            Err(Errno::WOULDBLOCK) => {
                let file = private.and_then(|dir| foreign::own_file_there(dir, LOCK, OFlags::RDONLY).ok());
                Err(folder_in_use(file, Some(&dir), path))
            }
            // EBADF: NFS locks only what is open for writing, which a folder never is.
            Err(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF | Errno::INVAL) => {
                Ok(ServedLock { dir, held: false })
            }
            Err(e) => Err(failed(e.into())),
        }
    }

    /// False where the host file system has no locks on folders.
    pub fn held(&self) -> bool {
        self.held
    }
}

impl Drop for ServedLock {
    fn drop(&mut self) {
        if self.held {
            // Said, not left to the close: other descriptors of the same open folder live on.
            let _ = rustix::fs::flock(&self.dir, FlockOperation::Unlock);
        }
    }
}

/// The hold on the lock file of an images folder, which says who has it.
#[derive(Debug)]
pub struct FolderLock {
    file: File,
    held: bool,
    /// It outlives this process.
    _kept: Option<KeptLock>,
}

impl FolderLock {
    /// Takes the lock file in `dir` (the folder's `.ploopfs`, or what stands for it under /run); `path` is how messages name
    /// the folder. `note` (one line: the mount point) is shown to the process that is refused. What stands there and is no file of
    /// ours is taken away with `replace`: for a caller who knows by [`ServedLock`] that nothing serves the folder. With `heirs`
    /// the lock of a daemon before goes on, and outlives this process.
    pub fn acquire(
        dir: &impl AsFd,
        path: &Path,
        note: &str,
        replace: bool,
        heirs: &Arc<Heirs>,
    ) -> Result<FolderLock> {
        let failed = |e: io::Error| Error::io(&e, path, "cannot take the lock of this folder");
        let file = heirs.instead_of(foreign::own_file(dir, LOCK, OFlags::RDWR, replace).map_err(failed)?);
        // Length 0: to the end of the file, wherever that is.
        let held = match set(&file, libc::F_WRLCK, (0, 0)) {
            Ok(()) => true,
            Err(e) if taken(&e) => return Err(folder_in_use(Some(file), None, path)),
            Err(e) if no_locks_here(&e) => false,
            Err(e) => return Err(failed(e)),
        };
        let text = format!("{}\n{note}\n", std::process::id());
        // At the beginning: one that was inherited was written before.
        match file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0)) {
            // The lock holds; it only does not say whose it is.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => {}
            written => written.map_err(failed)?,
        }
        let kept = heirs.keep_locked(&file);
        Ok(FolderLock { file, held, _kept: kept })
    }

    /// False where the host file system has no locks.
    pub fn held(&self) -> bool {
        self.held
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // The file stays: removing it could take it from under a process that has just opened it. The text goes,
        // so that no old name is read; a crash leaves it, which is why readers test the lock first. The
        // lock is given back by name: a child of ours between fork and exec still has the descriptor.
        let _ = self.file.set_len(0);
        if self.held {
            let _ = set(&self.file, libc::F_UNLCK, (0, 0));
        }
    }
}

/// Who has the folder: its lock file says it, which must be one of ours, or /proc, of the lock on the folder `dir` itself.
fn folder_in_use(lock: Option<File>, dir: Option<&OwnedFd>, path: &Path) -> Error {
    let mut text = String::new();
    let _ = lock.map(|file| file.take(4096).read_to_string(&mut text));
    let mut lines = text.lines();
    let holder = lines.next().and_then(|pid| pid.parse().ok()).and_then(Holder::of);
    let what = match (holder, lines.next().filter(|note| !note.is_empty())) {
        (Some(Holder { pid, name, .. }), Some(note)) => {
            format!("is served by {name} (pid {pid}) at {note}; to end that: ploopfs umount {}", quoted(note))
        }
        (Some(holder), None) => format!("is in use by {holder}; end that first"),
        // Of a process that has left its lock to another: its keeper, mostly.
        (None, Some(note)) => {
            let point = quoted(note);
            format!("is in use, and was served at {note} last; to end that: ploopfs umount {point}")
        }
        (None, None) => match dir.and_then(|dir| rustix::fs::fstat(dir).ok()) {
            Some(stat) => holder::sentence(HeldLock::Descriptor { ino: stat.st_ino }.holder().as_ref()),
            None => "is in use by another process or another host; end that first".to_owned(),
        },
    };
    Error::at(Kind::InUse, path, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_folder_is_served_once_and_the_refusal_says_where() {
        let dir = tempfile::tempdir().expect("temp folder");
        let folder = File::open(dir.path()).expect("open");
        let lock =
            FolderLock::acquire(&folder, dir.path(), "/mnt/vdisks", false, &Arc::default()).expect("lock");
        assert!(lock.held());
        let error = FolderLock::acquire(&folder, dir.path(), "/mnt/other", false, &Arc::default())
            .expect_err("served");
        assert_eq!(error.kind(), Kind::InUse);
        let own = format!("(pid {}) at /mnt/vdisks", std::process::id());
        assert!(error.to_string().contains(&own), "{error}");
        assert!(error.to_string().contains("ploopfs umount /mnt/vdisks"), "{error}");
        drop(lock);
        let text = fs::read_to_string(dir.path().join("lock")).expect("the file stays");
        assert!(text.is_empty(), "an old name is not left behind");
        FolderLock::acquire(&folder, dir.path(), "/mnt/other", false, &Arc::default()).expect("free again");
    }
}
