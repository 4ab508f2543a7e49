//! **R7** Retried: a BAT write whose own system call failed before any sync of that file failed, for a bounded time.
//! Any failed fdatasync, fsync or O_DSYNC write: the image is read-only at once, all waiters and all later fsyncs fail
//! until it is closed, info and the log say so. A delta found in use at open has its page cache dropped before anything
//! of it is trusted.
//!
//! This file is the middle sentence, for one host file. The kernel reports a lost page once, marks it clean and
//! lets the next sync succeed; so the failure is remembered here, where no caller can get around it.

use std::io;
use std::os::fd::BorrowedFd;

use super::file::{HostFile, HostSpace, HostStatus, HostTraits, passed_on};
use crate::rules::{Rule, broken};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

/// A host file that, after one failed sync, changes nothing and syncs nothing until it is dropped. Reads go on.
#[derive(Debug)]
pub struct Poison {
    file: Arc<dyn HostFile>,
    /// A sync has failed. Set under `syncing`, read anywhere.
    failed: AtomicBool,
    /// Protects the pair "sync, then remember its failure": the kernel reports it to only one of two overlapping syncs,
    /// and the other must not report success in between. A leaf: nothing else is locked under it.
    syncing: Mutex<()>,
}

impl Poison {
    /// Watches over `file`.
    pub fn new(file: Arc<dyn HostFile>) -> Poison {
        Poison { file, failed: AtomicBool::new(false), syncing: Mutex::new(()) }
    }

    /// True once a sync has failed.
    pub fn poisoned(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn check(&self) -> io::Result<()> {
        if self.poisoned() { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn sync(&self, sync: impl Fn(&dyn HostFile) -> io::Result<()>) -> io::Result<()> {
        let _alone = lock(&self.syncing);
        self.check()?;
        sync(&*self.file).inspect_err(|_| self.failed.store(!broken(Rule::R7), Ordering::Release))
    }
}

impl HostFile for Poison {
    passed_on! {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
        fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
        fn queued_read(&self, offset: u64, len: usize) -> Option<BorrowedFd<'_>>;
        fn len(&self) -> io::Result<u64>;
        fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;
        fn seek_hole(&self, offset: u64) -> io::Result<u64>;
        fn status(&self) -> io::Result<HostStatus>;
        fn space(&self) -> io::Result<HostSpace>;
        fn drop_cache(&self) -> io::Result<()>;
        fn traits(&self) -> HostTraits;
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.check()?;
        self.file.write_at(data, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.file.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.file.punch(offset, len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.sync(|file| file.sync_data())
    }
    fn sync_all(&self) -> io::Result<()> {
        self.sync(|file| file.sync_all())
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        // Without one nothing is shared into it, and the copy meets `check`.
        if self.poisoned() { None } else { self.file.descriptor() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::fault::{FaultFile, FaultPlan};
    use crate::io::memory::MemoryFile;

    fn poison(spec: &str) -> Poison {
        let plan = Arc::new(spec.parse::<FaultPlan>().expect("spec"));
        Poison::new(Arc::new(FaultFile::new(Arc::new(MemoryFile::from_bytes(b"content")), plan)))
    }

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.expect_err("refused").raw_os_error()
    }

    #[test]
    fn failed_fdatasync_is_never_reported_as_success_later() {
        let file = poison("fail=sync:2:ENOSPC");
        file.sync_data().expect("the first works");
        assert!(!file.poisoned());
        assert_eq!(errno(file.sync_data()), Some(libc::ENOSPC), "the host's own errno, once");
        assert!(file.poisoned());
        for _ in 0..3 {
            assert_eq!(errno(file.sync_data()), Some(libc::EIO));
            assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        }
    }

    #[test]
    fn after_a_failed_fsync_nothing_changes_and_reads_go_on() {
        let file = poison("fail=sync:1:EIO");
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::EIO));
        assert_eq!(errno(file.punch(0, 4)), Some(libc::EIO));
        assert_eq!(errno(file.set_len(1)), Some(libc::EIO));
        let mut buf = [0; 7];
        assert_eq!(file.read_at(&mut buf, 0).expect("reads go on"), 7);
        assert_eq!(&buf, b"content");
    }

    #[test]
    fn a_failed_write_alone_poisons_nothing() {
        let file = poison("fail=write:1:ENOSPC");
        assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::ENOSPC));
        assert!(!file.poisoned());
        file.write_at(b"x", 0).expect("the second write works");
        file.sync_data().expect("and so does the sync");
    }

    #[test]
    fn no_sync_that_overlaps_a_failing_one_reports_success() {
        // The first sync takes 50 ms and then fails; the others arrive meanwhile and would succeed.
        let file = poison("delay=sync:50,fail=sync:1:EIO");
        std::thread::scope(|scope| {
            let first = scope.spawn(|| file.sync_data());
            while file.syncing.try_lock().is_ok() {
                assert!(!first.is_finished() || file.poisoned());
                if file.poisoned() {
                    break;
                }
                std::thread::yield_now();
            }
            let late: Vec<_> = (0..4).map(|_| scope.spawn(|| file.sync_data())).collect();
            assert!(first.join().expect("no panic").is_err());
            for sync in late {
                assert!(sync.join().expect("no panic").is_err());
            }
        });
    }
}
