//! The kernel's first message, which every transport reads itself: it comes once. And what every transport has when it is
//! answered.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::io::Errno;

use super::uring::wire;
use crate::error::Error;
use crate::fuse::notify::Sink;

/// The major version of the protocol that we speak.
const MAJOR: u32 = 7;

/// Length of fuse_out_header and of fuse_init_out, in bytes.
const OUT_HEADER: usize = 16;
const INIT_OUT: usize = 64;

/// Room for the message: more than FUSE_MIN_READ_BUFFER (8 KiB), below which the kernel refuses to be read.
const ROOM: usize = 16 << 10;

/// A transport whose handshake is done; `session` is its own part.
pub(super) struct Begun<S> {
    /// Starts its threads.
    pub session: S,
    /// The way of notifications.
    pub kernel: Box<dyn Sink>,
    /// Passthrough was asked for, and the kernel has it.
    pub passes_through: bool,
}

impl<S> Begun<S> {
    /// The same with its own part as `of` makes it.
    pub(super) fn map<T>(self, of: impl FnOnce(S) -> T) -> Begun<T> {
        let Begun { session, kernel, passes_through } = self;
        Begun { session: of(session), kernel, passes_through }
    }
}

/// A handshake that failed, on the mount at `mountpoint`.
pub(super) fn failed(e: &io::Error, mountpoint: &Path) -> Error {
    Error::io(e, mountpoint, "the handshake with the kernel failed")
}

/// Reads the INIT whose major version is ours, or an older one's; it is not answered. A newer kernel hears our version,
/// and asks again with it.
pub(super) fn offer(connection: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let unsound = || io::Error::other("the kernel's first message is no handshake");
    let mut buffer = vec![0; ROOM];
    loop {
        let len = match rustix::io::read(connection, &mut buffer) {
            Ok(len) => len,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let message = &buffer[..len];
        let parts = wire::split(message).map_err(|_| unsound())?;
        let header = wire::header(parts.header).map_err(|_| unsound())?;
        if header.opcode != wire::INIT {
            return Err(unsound());
        }
        let major = parts.operation.first_chunk().copied().map(u32::from_ne_bytes).ok_or_else(unsound)?;
        if major <= MAJOR {
            return Ok(message.to_vec());
        }
        rustix::io::write(connection, &version(header.unique))?;
    }
}

/// The answer to a newer kernel: our version and nothing else.
fn version(unique: u64) -> [u8; OUT_HEADER + INIT_OUT] {
    let mut answer = [0; OUT_HEADER + INIT_OUT];
    let len = answer.len() as u32;
    answer[..4].copy_from_slice(&len.to_ne_bytes());
    answer[8..16].copy_from_slice(&unique.to_ne_bytes());
    answer[16..20].copy_from_slice(&MAJOR.to_ne_bytes());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsFd;

    fn init(unique: u64, major: u32, opcode: u32) -> Vec<u8> {
        let mut message = vec![0; 104];
        message[..4].copy_from_slice(&104u32.to_ne_bytes());
        message[4..8].copy_from_slice(&opcode.to_ne_bytes());
        message[8..16].copy_from_slice(&unique.to_ne_bytes());
        message[40..44].copy_from_slice(&major.to_ne_bytes());
        message
    }

    #[test]
    fn a_newer_kernel_is_told_our_version_and_its_second_offer_is_taken() {
        let (kernel, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("a pair");
        for message in [init(5, 8, wire::INIT), init(6, 7, wire::INIT)] {
            rustix::io::write(&kernel, &message).expect("sent");
        }
        assert_eq!(offer(ours.as_fd()).expect("an offer"), init(6, 7, wire::INIT));
        let mut answer = [0; 200];
        let len = rustix::io::read(&kernel, &mut answer).expect("an answer");
        assert_eq!((len, answer[8], answer[16]), (80, 5, 7));
    }

    #[test]
    fn what_is_no_handshake_is_an_error() {
        let (kernel, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("a pair");
        rustix::io::write(&kernel, &init(5, 7, 1)).expect("sent");
        offer(ours.as_fd()).expect_err("a LOOKUP");
        rustix::io::write(&kernel, &[1, 2, 3]).expect("sent");
        offer(ours.as_fd()).expect_err("three bytes");
    }
}
