//! Who may change a descriptor: `flock` on `DiskDescriptor.xml.lck`, which the ploop tool (1.15) takes, exclusively
//! and waiting, before it reads an XML that it is going to change or check. A reader takes it shared. Newer ones lock bytes of the base delta
//! instead, which [`DeltaLock`](super::lock::DeltaLock) does.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::heirs::{Heirs, KeptLock};
use super::holder::{self, HeldLock};
use super::lock::Use;
use crate::{Error, Result};

/// ploop's name for it. The file stays, as with ploop: removing it could take it from under a process that waits.
pub const LOCK_NAME: &str = "DiskDescriptor.xml.lck";

/// The hold on one descriptor, given back when dropped. First in the order of an image's locks: it is taken before
/// any delta's.
#[derive(Debug)]
pub struct DescriptorLock {
    file: Option<File>,
    used: Use,
    /// It outlives this process.
    _kept: Option<KeptLock>,
}

impl DescriptorLock {
    /// Takes the descriptor in the folder `dir`, or says who has it ([`InUse`](crate::Kind::InUse)). Does not wait. `path` is the
    /// descriptor, for messages. With `heirs` the lock of a daemon before goes on, and outlives this process.
    pub fn acquire(
        dir: BorrowedFd<'_>,
        path: &Path,
        used: Use,
        heirs: &Arc<Heirs>,
    ) -> Result<DescriptorLock> {
        let unlocked = || DescriptorLock { file: None, used, _kept: None };
        let failed = |e: Errno| Error::io(&e.into(), path, "cannot take the lock of this descriptor");
        let open = |flags: OFlags| {
            let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            retry_on_intr(|| rustix::fs::openat(dir, LOCK_NAME, flags, Mode::from_raw_mode(0o600)))
        };
        let opened = match open(OFlags::RDWR | OFlags::CREATE) {
            // No process can change a descriptor there, or we may not; a lock that others may have is still heeded.
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => open(OFlags::RDONLY),
            result => result,
        };
        let file = match opened {
            Ok(fd) => heirs.instead_of(File::from(fd)),
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::NOENT) => return Ok(unlocked()),
            Err(e) => return Err(failed(e)),
        };
        let operation = match used {
            Use::Reader => FlockOperation::NonBlockingLockShared,
            Use::Writer => FlockOperation::NonBlockingLockExclusive,
        };
        match retry_on_intr(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => {
                let kept = heirs.keep_locked(&file);
                Ok(DescriptorLock { file: Some(file), used, _kept: kept })
            }
            Err(Errno::WOULDBLOCK) => Err(in_use(&file, path)),
            Err(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(unlocked()),
            Err(e) => Err(failed(e)),
        }
    }

    /// What it was taken for.
    pub fn used(&self) -> Use {
        self.used
    }
}

impl Drop for DescriptorLock {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // Said, not left to the close: a child of ours between fork and exec still has the descriptor.
            let _ = rustix::fs::flock(file, FlockOperation::Unlock);
        }
    }
}

fn in_use(file: &impl AsFd, path: &Path) -> Error {
    let held = rustix::fs::fstat(file).ok().map(|stat| HeldLock::Descriptor { ino: stat.st_ino });
    holder::in_use(held, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn a_descriptor_has_one_user_who_is_named_until_it_lets_go() {
        let folder = tempfile::tempdir().expect("tmp");
        let dir = File::open(folder.path()).expect("open");
        let lock =
            DescriptorLock::acquire(dir.as_fd(), folder.path(), Use::Writer, &Arc::default()).expect("free");
        assert!(lock.file.is_some());
        let refused = DescriptorLock::acquire(dir.as_fd(), folder.path(), Use::Writer, &Arc::default())
            .expect_err("taken");
        assert_eq!(refused.kind(), Kind::InUse);
        assert!(refused.to_string().contains(&format!("(pid {}", std::process::id())), "{refused}");
        drop(lock);
        DescriptorLock::acquire(dir.as_fd(), folder.path(), Use::Writer, &Arc::default())
            .expect("free again");
        assert!(folder.path().join(LOCK_NAME).exists(), "the file stays");
    }

    #[test]
    fn a_link_in_the_locks_place_is_not_followed() {
        let folder = tempfile::tempdir().expect("tmp");
        let victim = folder.path().join("victim");
        std::os::unix::fs::symlink(&victim, folder.path().join(LOCK_NAME)).expect("link");
        let dir = File::open(folder.path()).expect("open");
        DescriptorLock::acquire(dir.as_fd(), folder.path(), Use::Writer, &Arc::default())
            .expect_err("a link");
        assert!(!victim.exists());
    }
}
