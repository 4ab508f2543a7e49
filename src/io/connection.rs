//! Descriptors of a FUSE connection: one for each thread that reads from it, and how one takes the place of another.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::DupFlags;

/// Where the kernel hands out connections.
pub const DEVICE: &str = "/dev/fuse";

/// linux/fuse.h, FUSE_DEV_IOC_CLONE: _IOR(229, 0, uint32_t).
const CLONE_REQUEST: u32 = 0x8004_e500;

/// One more descriptor of `connection`, with a list of its own of the requests that were read from it: threads that share
/// one descriptor share the lock of that list. Opens the device, so it belongs before the sandbox.
pub fn another(connection: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let number: u32 = connection.as_raw_fd().unsigned_abs();
    // SAFETY: both descriptors are open, and the kernel reads one number of 32 bits.
    let cloned = unsafe { libc::ioctl(device.as_raw_fd(), CLONE_REQUEST as libc::Ioctl, &raw const number) };
    if cloned < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}

/// linux/fuse.h, FUSE_NOTIFY_RESEND.
const RESEND: i32 = 7;

/// Has the kernel send again what was read from any descriptor of the connection and not answered (Linux 6.9). Of those who
/// read there must be none: what they read meanwhile is sent again, too.
pub fn resend(connection: BorrowedFd<'_>) -> io::Result<()> {
    // fuse_out_header: its length, the message in the place of an errno, and no request.
    let mut message = [0; 16];
    message[..4].copy_from_slice(&16u32.to_ne_bytes());
    message[4..8].copy_from_slice(&RESEND.to_ne_bytes());
    rustix::io::write(connection, &message)?;
    Ok(())
}

/// The number under which an owner that is not ours keeps an open file, for which another file may be put there.
#[derive(Debug)]
pub struct Slot {
    number: RawFd,
    /// The file itself, open as long as this: as long as it is, no other file has its identity.
    file: OwnedFd,
}

impl Slot {
    /// The place of `file`, whose owner agrees to have it changed.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Slot> {
        Ok(Slot { number: file.as_raw_fd(), file: file.try_clone_to_owned()? })
    }

    /// From now on the owner's descriptor is one of `new`. An error when the owner has closed it meanwhile.
    pub fn put(self, new: OwnedFd) -> io::Result<()> {
        // SAFETY: the number is looked at and nothing else; of one that is closed the kernel says EBADF.
        let there = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(self.number) })?;
        let ours = rustix::fs::fstat(&self.file)?;
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino) {
            return Err(io::Error::other("the descriptor belongs to another file by now"));
        }
        // SAFETY: never closed here; it is, as was just seen, the owner's, who gave it for this. The kernel exchanges the
        // file in one step: the number is open before, meanwhile and afterwards.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.number) });
        // Without CLOEXEC programs that we start would keep the connection open.
        Ok(rustix::io::dup3(new.as_fd(), &mut place, DupFlags::CLOEXEC)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    fn file_with(text: &str) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
        std::io::Seek::rewind(&mut file).expect("rewound");
        file
    }

    #[test]
    fn the_owner_reads_from_what_was_put_in_the_place_of_its_file() {
        let mut owner = file_with("old");
        Slot::of(owner.as_fd()).expect("a slot").put(file_with("new").into()).expect("put there");
        let mut text = String::new();
        owner.read_to_string(&mut text).expect("read");
        assert_eq!(text, "new");
        let flags = rustix::io::fcntl_getfd(&owner).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_number_that_another_file_has_by_now_is_left_alone() {
        let mut owner = file_with("first");
        let slot = Slot::of(owner.as_fd()).expect("a slot");
        Slot::of(owner.as_fd()).expect("another").put(file_with("second").into()).expect("put there");
        slot.put(file_with("third").into()).expect_err("not ours any more");
        let mut text = String::new();
        owner.read_to_string(&mut text).expect("read");
        assert_eq!(text, "second");
    }
}
