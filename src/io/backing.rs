//! FUSE passthrough (Linux 6.9): the kernel reads and writes a host file in the daemon's place, for each handle of one
//! file of a mount open.
//!
//! What the kernel asks for (fs/fuse/{backing,passthrough,iomode}.c of Linux 6.18):
//! - the host file is registered over the mount's own connection, by a process with CAP_SYS_ADMIN, and is a regular
//!   file on a file system that is not stacked higher than the handshake allowed;
//! - all who have one inode open have it open through the same registration, or none of them has: so whether it is passed
//!   through is decided once, by the first open, and holds until the last close;
//! - an open file goes on being read and written when the registration, or the daemon, is gone. It keeps the registered
//!   descriptor open, and with that its locks.
//!
//! Reads, writes and mappings are passed; fsync, fallocate, lseek and truncate still come to the daemon.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::file::HostFile;
use crate::error::words;
use crate::sync::plain::lock;

// linux/fuse.h: _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t).
/// The request that registers a file (FUSE_DEV_IOC_BACKING_OPEN).
pub const OPEN_REQUEST: u32 = 0x4010_e501;
/// The request that ends a registration (FUSE_DEV_IOC_BACKING_CLOSE).
pub const CLOSE_REQUEST: u32 = 0x4004_e502;

/// Smallest request of a guest or loop device, in bytes.
const SECTOR: u32 = 512;

/// How many file systems may be stacked under a mount that passes through: the one of the images folder, itself not
/// stacked. The kernel's limit of 2 leaves room for one on top of the mount.
pub const STACK_DEPTH: u32 = 1;

/// A file that is registered, in the transport's own type; dropping the last one ends it.
pub type Registration = Arc<dyn Any + Send + Sync>;

/// struct fuse_backing_map.
#[repr(C)]
struct Map {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// A host file that is, or may be, passed through, from the first open of an image to its last close.
pub struct Backing {
    file: Arc<dyn HostFile>,
    path: PathBuf,
    /// It was said that this mount does not pass through; shared by all images.
    said: Arc<AtomicBool>,
    /// Protects that one decision is made. Held across the system calls of the registration. A leaf.
    state: Mutex<State>,
}

enum State {
    /// The first open has not been answered yet.
    Undecided,
    Passed(Registration),
    Refused,
    /// Closed.
    Ended,
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backing").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Backing {
    /// Undecided. `path` is for messages; `said` is set when one of the images that share it was refused.
    pub fn new(file: Arc<dyn HostFile>, path: PathBuf, said: Arc<AtomicBool>) -> Backing {
        Backing { file, path, said, state: Mutex::new(State::Undecided) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// False once it is known that the daemon serves all reads and writes itself. True before the first open was
    /// answered, too: neither the one nor the other may be relied on then.
    pub fn may_pass(&self) -> bool {
        !matches!(*self.state(), State::Refused)
    }

    /// The registration; the first call makes it, `with` the transport. None: the kernel refused, which the log says, and
    /// the image is served as others are until its last user has closed it.
    pub fn register(
        &self,
        with: impl FnOnce(BorrowedFd<'_>) -> io::Result<Registration>,
    ) -> Option<Registration> {
        let mut state = self.state();
        match &*state {
            State::Passed(registration) => return Some(registration.clone()),
            State::Refused | State::Ended => return None,
            State::Undecided => {}
        }
        let registered = match self.file.descriptor() {
            Some(file) => check_direct(file).and_then(|()| with(file).map_err(|e| reason(&e))),
            None => Err("it has no descriptor of the host".to_owned()),
        };
        match registered {
            Ok(registration) => {
                *state = State::Passed(registration.clone());
                Some(registration)
            }
            Err(why) => {
                *state = State::Refused;
                let line = format!("{}: served without passthrough: {why}", self.path.display());
                // Once for a mount: the reason lies in the host, and the next image would have it too.
                if self.said.swap(true, Ordering::Relaxed) {
                    log::info!("{line}")
                } else {
                    log::warn!("{line}")
                }
                None
            }
        }
    }

    /// After the last close: the kernel releases the file with the last handle of it. True: it was passed
    /// through.
    pub fn end(&self) -> bool {
        matches!(std::mem::replace(&mut *self.state(), State::Ended), State::Passed(_))
    }

    /// True while the kernel reads and writes it in our place.
    pub fn passes(&self) -> bool {
        matches!(*self.state(), State::Passed(_))
    }
}

fn reason(e: &io::Error) -> String {
    match Errno::from_io_error(e) {
        Some(Errno::PERM) => {
            "the kernel allows it to root (CAP_SYS_ADMIN outside of every container) only".into()
        }
        Some(Errno::LOOP) => {
            "the images lie on a stacked file system (overlay, or a FUSE mount that passes through itself)"
                .into()
        }
        Some(Errno::NOTTY | Errno::INVAL | Errno::NOSYS) => {
            format!("the kernel cannot do it here ({})", words(e))
        }
        _ => format!("the kernel refused: {}", words(e)),
    }
}

/// Direct I/O on a file that is passed through is the host's. A loop device with `--direct-io=on` and
/// sectors of 512 bytes, and a guest with cache=none, work where the daemon serves, and have no way to ask FUSE for more:
/// a host that could not do that much would fail their requests.
fn check_direct(file: BorrowedFd<'_>) -> Result<(), String> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(stat) = stat
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align > SECTOR
    {
        let align = stat.stx_dio_offset_align;
        return Err(format!(
            "direct I/O of the host is in blocks of {align} bytes, and loop devices ask for {SECTOR}"
        ));
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, &*path, flags, Mode::empty()) {
        Ok(opened) => {
            drop(File::from(opened));
            Ok(())
        }
        Err(e) => Err(format!("the host has no direct I/O, which users of the image may ask for ({e})")),
    }
}

/// Registers `file` with the mount of this connection. The number is used in answers to OPEN, until [`close`].
pub fn open(connection: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<i32> {
    let map = Map { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: both descriptors are open, and the kernel reads one whole `fuse_backing_map`.
    let id = unsafe { libc::ioctl(connection.as_raw_fd(), OPEN_REQUEST as libc::Ioctl, &raw const map) };
    if id < 0 { Err(io::Error::last_os_error()) } else { Ok(id) }
}

/// Ends a registration. Who has the file open keeps it.
pub fn close(connection: BorrowedFd<'_>, id: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the kernel reads one number of 32 bits.
    let closed = unsafe { libc::ioctl(connection.as_raw_fd(), CLOSE_REQUEST as libc::Ioctl, &raw const id) };
    if closed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::real::{Access, RealFile};

    fn backing(folder: &tempfile::TempDir) -> Backing {
        let path = folder.path().join("vm1.raw");
        std::fs::write(&path, "x").expect("written");
        let file = Arc::new(RealFile::open(&path, Access::ReadWrite).expect("opens"));
        Backing::new(file, path, Arc::default())
    }

    #[test]
    fn the_first_open_decides_for_all_that_follow() {
        let folder = tempfile::tempdir().expect("a folder");
        let passed = backing(&folder);
        assert!(passed.may_pass() && !passed.passes(), "undecided");
        let first = passed.register(|_| Ok(Arc::new(7_i32))).expect("registered");
        let second = passed.register(|_| Err(io::Error::other("never asked"))).expect("the same");
        assert!(Arc::ptr_eq(&first, &second) && passed.passes());

        let refused = backing(&folder);
        assert!(refused.register(|_| Err(Errno::LOOP.into())).is_none());
        assert!(refused.register(|_| Ok(Arc::new(7_i32))).is_none(), "never asked again");
        assert!(!refused.may_pass() && !refused.end());
    }

    #[test]
    fn the_end_lets_the_registration_go() {
        let folder = tempfile::tempdir().expect("a folder");
        let backing = backing(&folder);
        let id = Arc::new(());
        drop(backing.register(|_| Ok(id.clone())));
        assert_eq!(Arc::strong_count(&id), 2);
        assert!(backing.end());
        assert_eq!(Arc::strong_count(&id), 1);
    }

    #[test]
    fn a_descriptor_that_is_no_fuse_connection_registers_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = File::create(folder.path().join("f")).expect("a file");
        use std::os::fd::AsFd;
        assert!(open(file.as_fd(), file.as_fd()).is_err());
        assert!(close(file.as_fd(), 1).is_err());
    }
}
