//! Who may use a delta.
//!
//! Byte-range locks that the ploop tool and QEMU heed as well (docs/format.md#locks). There are readers and one
//! writer ([`Use`]). A writer's read lock on bytes 200 to 204 is ploop's "in use"; the same bytes say to QEMU that no
//! permission of its own is shared, so that it refuses to open the file, for reading too. A reader leaves byte 200
//! ("reading is not shared") free: other readers and `qemu -r` pass, a writer of any of the three programs does not.
//! 300 to 304 is ploop's mark of a long operation.
//!
//! The locks belong to the open file (OFD), not to the process: closing another descriptor of the same file
//! does not lose them. But a second descriptor of ours looks foreign.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use super::file::HostFile;
pub use super::holder::Use;
use super::holder::{self, HeldLock};
use super::real::{Access, RealFile};
use crate::sync::plain::lock;
use crate::{Error, Result};

/// A range of bytes: first and length.
type Range = (i64, i64);

/// In use: ploop's ordinary range, QEMU's "permissions not shared".
const IN_USE: Range = (200, 5);
/// QEMU's "reading is not shared": what a writer holds of [`IN_USE`] and a reader does not.
const NO_READER: Range = (200, 1);
/// The rest of [`IN_USE`]: "writing, writing the same and resizing are not shared".
const NO_WRITER: Range = (201, 4);
/// QEMU's "I read, and what I read must not change".
const READS: Range = (100, 1);
/// A long operation (merge, check, convert) runs: ploop's second range, unknown to QEMU.
const LONG: Range = (300, 5);
/// QEMU's "write", "write unchanged" and "resize" in use. Tested only: a QEMU that writes but shares everything
/// (`share-rw=on`) locks nothing of [`IN_USE`]. Byte 100, "read", is left out: a reader with `-U` accepts
/// that the file changes under it.
const QEMU_WRITES: Range = (101, 3);
/// All that a [`DeltaLock`] may hold but for [`LONG`].
const ALL: [Range; 2] = [READS, IN_USE];
/// Two that lock at the same moment both lose, as with ploop. So many tries are then made, with a pause
/// that differs between processes.
const RACE_TRIES: u32 = 4;

impl Use {
    /// The use that goes with how a file is opened.
    pub fn of(access: Access) -> Use {
        match access {
            Access::ReadOnly => Use::Reader,
            Access::ReadWrite | Access::Widest => Use::Writer,
        }
    }

    /// The bytes that it holds.
    fn holds(self) -> &'static [Range] {
        match self {
            Use::Reader => &[READS, NO_WRITER],
            Use::Writer => &[IN_USE],
        }
    }

    /// The bytes of which another holder keeps it out. A reader passes over [`NO_WRITER`] of other readers; a ploop tool
    /// holds [`NO_READER`] too, whatever it does.
    fn heeds(self) -> &'static [Range] {
        match self {
            Use::Reader => &[LONG, NO_READER, QEMU_WRITES],
            Use::Writer => &[LONG, IN_USE, QEMU_WRITES],
        }
    }

    /// True when a lock on the bytes `first` to `last` keeps it out.
    pub(super) fn is_kept_out_by(self, first: i64, last: i64) -> bool {
        self.heeds().iter().any(|(at, len)| first < at + len && *at <= last)
    }
}

/// The hold on one delta, given back when dropped. Keeps the file open: the lock lives on its descriptor.
#[derive(Debug)]
pub struct DeltaLock {
    file: Arc<RealFile>,
    held: bool,
    /// Protects what the lock is for, and that one thread at a time changes it. A leaf; held across fcntl, which does
    /// not wait.
    used: Mutex<Use>,
}

impl DeltaLock {
    /// Takes the delta for this process, or says who has it ([`InUse`](crate::Kind::InUse)). Does not wait.
    pub fn acquire(file: Arc<RealFile>, used: Use) -> Result<DeltaLock> {
        let held = match take_repeatedly(&file, used.holds(), used)? {
            Taken::Yes => true,
            Taken::Unlocked => false,
            Taken::No(error) => return Err(error),
        };
        Ok(DeltaLock { file, held, used: Mutex::new(used) })
    }

    /// What the delta is locked for now.
    pub fn used(&self) -> Use {
        *self.lock_use()
    }

    fn lock_use(&self) -> MutexGuard<'_, Use> {
        lock(&self.used)
    }

    /// Makes a reader the writer, or says who else has the delta ([`InUse`](crate::Kind::InUse)): then it stays a reader. Does not
    /// wait: two readers that both want to write are both refused.
    ///
    /// The reader's bytes are held all the while, so that no other writer comes between.
    pub fn begin_writing(&self) -> Result<()> {
        let mut used = self.lock_use();
        if *used == Use::Reader && self.held {
            if let Taken::No(error) = take_repeatedly(&self.file, &[NO_READER], Use::Writer)? {
                return Err(error);
            }
            // Not a writer's byte; should it stay, it keeps out only what would not share reading.
            let _ = set(&*self.file, libc::F_UNLCK, READS);
        }
        *used = Use::Writer;
        Ok(())
    }

    /// Makes the writer a reader: the delta is not changed from here on.
    pub fn end_writing(&self) {
        let mut used = self.lock_use();
        if *used == Use::Writer && self.held {
            // What fails leaves a stronger lock than is needed.
            let _ = set(&*self.file, libc::F_RDLCK, READS);
            let _ = set(&*self.file, libc::F_UNLCK, NO_READER);
        }
        *used = Use::Reader;
    }

    /// False where the host file system has no locks: nothing is kept out, and the mount should say so once.
    pub fn held(&self) -> bool {
        self.held
    }

    /// Marks a long operation on the delta, until the guard is dropped. For writers: the mark keeps readers out.
    pub fn begin_long(&self) -> Result<LongLock> {
        debug_assert_eq!(self.used(), Use::Writer, "a long operation changes the file");
        let file = Arc::clone(&self.file);
        if !self.held {
            return Ok(LongLock { file, held: false });
        }
        match take(&*file, &[LONG], &[LONG]) {
            Ok(Attempt::Got) => Ok(LongLock { file, held: true }),
            Ok(_) => Err(in_use(&file, Use::Writer)),
            Err(e) => Err(Error::io(&e, file.path(), "cannot lock for a long operation")),
        }
    }
}

impl Drop for DeltaLock {
    fn drop(&mut self) {
        if self.held {
            // Said, not left to the close: a child of ours between fork and exec still has the descriptor.
            for range in ALL {
                let _ = set(&*self.file, libc::F_UNLCK, range);
            }
        }
    }
}

/// The mark of a long operation, taken away when dropped.
#[derive(Debug)]
pub struct LongLock {
    file: Arc<RealFile>,
    held: bool,
}

impl Drop for LongLock {
    fn drop(&mut self) {
        if self.held {
            // Should it fail, the lock goes with the descriptor.
            let _ = set(&*self.file, libc::F_UNLCK, LONG);
        }
    }
}

/// What came of all attempts.
#[derive(Debug)]
enum Taken {
    Yes,
    /// The host has no locks.
    Unlocked,
    /// Another process has it; the error names it.
    No(Error),
}

/// What came of one attempt.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    Got,
    /// Another process had it before.
    HeldLock,
    /// Another one came at the same moment.
    Race,
}

/// Takes `ranges` unless another process holds what `used` heeds; a race is run again, a few times.
fn take_repeatedly(file: &RealFile, ranges: &[Range], used: Use) -> Result<Taken> {
    let mut attempt = 1;
    loop {
        match take(file, ranges, used.heeds()) {
            Ok(Attempt::Got) => return Ok(Taken::Yes),
            Ok(Attempt::Race) if attempt < RACE_TRIES => race_pause(attempt),
            Ok(_) => return Ok(Taken::No(in_use(file, used))),
            Err(e) if no_locks_here(&e) => return Ok(Taken::Unlocked),
            Err(e) => return Err(Error::io(&e, file.path(), "cannot lock")),
        }
        attempt += 1;
    }
}

/// Sets read locks on `ranges` if no other open file holds anything of `tested`.
///
/// Order: (1) test as a writer: whatever lock another holder has, a read lock too, is "in use"; (2) set our read
/// locks, for which reading access is enough; (3) test again. Without (1) a refused attempt would for a moment
/// look like a user to others; without (3) two that pass (1) together would both go on.
fn take(file: &impl AsFd, ranges: &[Range], tested: &[Range]) -> io::Result<Attempt> {
    if held_by_another(file, tested)? {
        return Ok(Attempt::HeldLock);
    }
    let give_back = || ranges.iter().try_for_each(|range| set(file, libc::F_UNLCK, *range));
    for range in ranges {
        if let Err(e) = set(file, libc::F_RDLCK, *range) {
            give_back()?;
            return if taken(&e) { Ok(Attempt::HeldLock) } else { Err(e) };
        }
    }
    match held_by_another(file, tested) {
        Ok(false) => Ok(Attempt::Got),
        result => {
            give_back()?;
            result.map(|_| Attempt::Race)
        }
    }
}

fn held_by_another(file: &impl AsFd, ranges: &[Range]) -> io::Result<bool> {
    for range in ranges {
        let mut lock = flock(libc::F_WRLCK, *range);
        fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) fn set(file: &impl AsFd, kind: i32, range: Range) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut flock(kind, range))
}

fn flock(kind: i32, (start, len): Range) -> libc::flock {
    libc::flock {
        // Three small constants that the kernel's struct keeps in 16 bits.
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        // Must be 0 for OFD locks.
        l_pid: 0,
    }
}

fn fcntl(file: &impl AsFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    loop {
        // SAFETY: the descriptor is borrowed for the call, and the kernel reads and writes one whole `flock`.
        if unsafe { libc::fcntl(fd, command, std::ptr::from_mut(lock)) } != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

pub(super) fn taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// What file systems without byte-range locks answer (some NFS and FUSE mounts).
pub(super) fn no_locks_here(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP))
}

fn race_pause(attempt: u32) {
    let own = u64::from(std::process::id() % 16);
    thread::sleep(Duration::from_millis(u64::from(attempt) * (5 + own)));
}

fn in_use(file: &RealFile, used: Use) -> Error {
    let held = file.status().ok().map(|s| HeldLock::Delta { dev: s.dev, ino: s.ino, used });
    holder::in_use(held, file.path())
}

#[cfg(test)]
mod tests;
