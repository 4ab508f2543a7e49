//! A little space that is kept back in an images folder, for the commands that free space: on a host that is full to the
//! last block the new descriptor of `snapshot delete` could not be written. It is a file in the folder's private one, made
//! by a mount, given up when a small write finds no space, and made again when something was freed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::image::kind::PRIVATE;

/// Its name in the private folder.
const NAME: &str = "reserve";
/// Its length in bytes: the descriptor, the labels (twice) and the header of an empty delta take a block each; the largest
/// descriptor that we have made has 60 KiB.
const BYTES: u64 = 128 << 10;

/// Makes the reserve in the private folder of `images`, if that is there. What cannot be kept back is not missed until the
/// host is full.
pub fn keep(images: BorrowedFd<'_>) {
    if let Ok(private) = private(images) {
        // There already, or no space: the next one who frees some tries again.
        let _ = make(&private);
    }
}

/// The same, in the folder around the image's folder `dir`.
pub(super) fn keep_around(dir: BorrowedFd<'_>) {
    if let Ok(images) = around(dir) {
        keep(images.as_fd());
    }
}

/// Does a small write in the image's folder `dir`; where there is no space for it, gives the reserve up and does it again.
pub(super) fn with_reserve<T>(
    dir: BorrowedFd<'_>,
    mut write: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    match write() {
        Err(e) if is_full(&e) && give_up(dir).is_ok() => write(),
        done => done,
    }
}

/// True when the host, or the user's part of it, has no space left.
pub(super) fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

fn give_up(dir: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let private = private(around(dir)?.as_fd())?;
    rustix::fs::unlinkat(&private, NAME, AtFlags::empty())?;
    log::warn!("the host is full: the space that was kept back for this is used");
    // Some hosts give space back with their next commit only.
    let _ = retry_on_intr(|| rustix::fs::fsync(&private));
    Ok(())
}

fn around(dir: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    open_folder(dir, "..")
}

fn private(images: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    open_folder(images, PRIVATE)
}

fn open_folder(at: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry_on_intr(|| rustix::fs::openat(at, name, flags, Mode::empty()))
}

fn make(private: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        File::from(retry_on_intr(|| rustix::fs::openat(private, NAME, flags, Mode::from_raw_mode(0o600)))?);
    let filled = match retry_on_intr(|| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BYTES)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => io::Write::write_all(&mut &file, &vec![0; BYTES as usize]),
        other => other.map_err(Into::into),
    };
    if filled.is_err() {
        rustix::fs::unlinkat(private, NAME, AtFlags::empty())?;
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_finds_no_space_gets_the_reserve_once_and_no_link_is_followed_to_it() {
        let images = tempfile::tempdir().expect("tmp");
        let image = images.path().join("vm");
        std::fs::create_dir(&image).expect("a folder");
        let [outer, inner] = [images.path(), &image].map(|path| File::open(path).expect("open"));
        let reserve = images.path().join(PRIVATE).join(NAME);
        keep(outer.as_fd());
        assert!(!images.path().join(PRIVATE).exists(), "no folder is made for it");
        std::fs::create_dir(images.path().join(PRIVATE)).expect("a folder");
        keep_around(inner.as_fd());
        assert_eq!(reserve.metadata().expect("kept").len(), BYTES);
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let mut tries = 0;
        let write = || {
            tries += 1;
            if reserve.exists() { Err(full()) } else { Ok(()) }
        };
        with_reserve(inner.as_fd(), write).expect("the second time");
        assert_eq!(tries, 2);
        with_reserve(inner.as_fd(), || Err::<(), _>(full())).expect_err("nothing is left");
        std::fs::remove_dir(images.path().join(PRIVATE)).expect("empty");
        let elsewhere = tempfile::tempdir().expect("tmp");
        std::fs::write(elsewhere.path().join(NAME), "mine").expect("write");
        std::os::unix::fs::symlink(elsewhere.path(), images.path().join(PRIVATE)).expect("link");
        with_reserve(inner.as_fd(), || Err::<(), _>(full())).expect_err("not through a link");
        assert!(elsewhere.path().join(NAME).exists());
    }
}
