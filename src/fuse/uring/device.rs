//! /dev/fuse beside the rings: the handshake, what the kernel sends there only (forgotten look-ups, interrupts), and
//! what we notify it of on our own account.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Weak};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::answer::{self, OutHeader};
use super::wire;
use crate::fuse::capabilities::{CAPABILITIES, Capability};
use crate::fuse::ops::Ino;
use crate::fuse::{MAX_WRITE, congestion, handshake, notify};
use crate::io::backing::{self, STACK_DEPTH};

/// The version of the protocol whose structures we use: the first with rings.
const MAJOR: u32 = 7;
const MINOR: u32 = 42;

/// Bits of INIT that fuser asks for as well.
const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const MAX_PAGES: u64 = 1 << 22;
/// The second half of the bits is valid.
const INIT_EXT: u64 = 1 << 30;
const OVER_IO_URING: u64 = 1 << 41;
/// FUSE_PASSTHROUGH: answers to OPEN may name a host file.
const PASSTHROUGH: u64 = 1 << 37;

/// Codes of notifications.
const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;
const RETRIEVE: i32 = 5;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct InitIn {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    flags2: u32,
    unused: [u32; 11],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_granularity: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    request_timeout: u16,
    unused: [u16; 11],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalInode {
    ino: u64,
    offset: i64,
    len: i64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalEntry {
    parent: u64,
    name_len: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Retrieve {
    unique: u64,
    ino: u64,
    offset: u64,
    size: u32,
    padding: u32,
}

/// The connection to the kernel.
pub(super) struct Device(OwnedFd);

/// A host file that is registered for passthrough.
pub(super) struct Registered {
    device: Weak<Device>,
    /// As answers to OPEN name it.
    pub(super) id: i32,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // The connection takes its registrations with it.
        if let Some(device) = self.device.upgrade()
            && let Err(e) = backing::close(device.0.as_fd(), self.id)
        {
            log::warn!("the kernel did not give a file back that it passed through: {e}");
        }
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Device {
    /// Registers a host file for passthrough.
    pub(super) fn register(self: &Arc<Self>, file: BorrowedFd<'_>) -> io::Result<Registered> {
        let id = backing::open(self.0.as_fd(), file)?;
        Ok(Registered { device: Arc::downgrade(self), id })
    }

    /// A connection as mounting made it.
    pub(super) fn new(connection: OwnedFd) -> Device {
        Device(connection)
    }

    /// Answers the kernel's INIT. Afterwards the kernel waits until every queue has an entry. True: `passthrough` was asked
    /// for and is to be had.
    pub(super) fn handshake(&self, max_background: u16, passthrough: bool) -> io::Result<bool> {
        let message = handshake::offer(self.0.as_fd())?;
        let unsound = || io::Error::other("the kernel's first message is no handshake");
        let parts = wire::split(&message).map_err(|_| unsound())?;
        let header = wire::header(parts.header).map_err(|_| unsound())?;
        // Kernels before 7.36 send less, and have no rings either.
        let offer = InitIn::read_from_bytes(parts.operation)
            .map_err(|_| io::Error::other("the kernel's FUSE is older than 7.42"))?;
        let answer = accept(&offer, max_background, passthrough)?;
        self.write(header.unique, 0, &[answer.as_bytes()])?;
        Ok(answer.max_stack_depth > 0)
    }

    /// Has the kernel make a request on the calling thread's CPU: with nothing of the content of this file, which it knows.
    /// It comes as one that we do not know.
    pub(super) fn knock(&self, ino: Ino) -> io::Result<()> {
        // Even, and above the numbers that the kernel counts up to.
        let asked = Retrieve { unique: 1 << 62, ino, offset: 0, size: 0, padding: 0 };
        self.write(0, RETRIEVE, &[asked.as_bytes()])
    }

    pub(super) fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let len = rustix::io::read(&self.0, &mut *buffer)?;
        Ok(&buffer[..len])
    }

    pub(super) fn write(&self, unique: u64, error: i32, parts: &[&[u8]]) -> io::Result<()> {
        let len = answer::HEADER + parts.iter().map(|part| part.len()).sum::<usize>();
        let header = OutHeader { len: len as u32, error, unique };
        let mut all = vec![IoSlice::new(header.as_bytes())];
        all.extend(parts.iter().map(|part| IoSlice::new(part)));
        rustix::io::writev(&self.0, &all)?;
        Ok(())
    }
}

/// What we take of a kernel's offer; it must have rings.
fn accept(offer: &InitIn, max_background: u16, passthrough: bool) -> io::Result<InitOut> {
    let offered = u64::from(offer.flags) | u64::from(offer.flags2) << 32;
    if offer.major < MAJOR || offered & INIT_EXT == 0 || offered & OVER_IO_URING == 0 {
        return Err(io::Error::other(format!(
            "the kernel (FUSE {}.{}) offers no io_uring",
            offer.major, offer.minor
        )));
    }
    let mut flags = ASYNC_READ | BIG_WRITES | MAX_PAGES | INIT_EXT | OVER_IO_URING;
    for Capability { bit, name, loss } in CAPABILITIES {
        if offered & bit == 0 {
            log::warn!("the kernel (FUSE {}.{}) has no {name}: {loss}", offer.major, offer.minor);
        }
        flags |= bit & offered;
    }
    let passes = passthrough && offered & PASSTHROUGH != 0;
    if passes {
        flags |= PASSTHROUGH;
    }
    Ok(InitOut {
        major: MAJOR,
        minor: MINOR.min(offer.minor),
        max_readahead: offer.max_readahead,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        max_background,
        congestion_threshold: congestion(max_background),
        max_write: MAX_WRITE,
        // Entries have room for MAX_WRITE bytes, and the kernel counts their room in pages too.
        max_pages: (MAX_WRITE as usize / rustix::param::page_size()) as u16,
        max_stack_depth: if passes { STACK_DEPTH } else { 0 },
        time_granularity: 1,
        map_alignment: 0,
        request_timeout: 0,
        unused: [0; 11],
    })
}

/// The way for notifications.
pub(super) struct Kernel(pub(super) Arc<Device>);

impl notify::Sink for Kernel {
    fn inval_attributes(&self, ino: Ino) -> io::Result<()> {
        // A negative offset leaves the content in the cache.
        self.0.write(0, INVAL_INODE, &[InvalInode { ino, offset: -1, len: 0 }.as_bytes()])
    }

    fn inval_entry(&self, parent: Ino, name: &OsStr) -> io::Result<()> {
        let fields = InvalEntry { parent, name_len: name.len() as u32, flags: 0 };
        self.0.write(0, INVAL_ENTRY, &[fields.as_bytes(), name.as_bytes(), &[0]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(bits: u64) -> InitIn {
        let (flags, flags2) = (bits as u32, (bits >> 32) as u32);
        InitIn { major: 7, minor: 45, max_readahead: 131_072, flags, flags2, unused: [0; 11] }
    }

    #[test]
    fn structures_are_as_long_as_the_kernels() {
        assert_eq!((size_of::<InitIn>(), size_of::<InitOut>()), (64, 64));
        assert_eq!((size_of::<InvalInode>(), size_of::<InvalEntry>()), (24, 16));
    }

    #[test]
    fn a_kernel_without_rings_is_refused() {
        assert!(accept(&offer(!OVER_IO_URING), 16, false).is_err());
        assert!(accept(&offer(!INIT_EXT), 16, false).is_err());
        assert!(accept(&offer(u64::MAX), 16, false).is_ok());
    }

    #[test]
    fn nothing_is_accepted_that_was_not_offered_but_what_every_kernel_has() {
        let out = accept(&offer(INIT_EXT | OVER_IO_URING | 1 << 15), 100, false).expect("rings");
        let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
        assert_eq!(flags, ASYNC_READ | BIG_WRITES | MAX_PAGES | INIT_EXT | OVER_IO_URING | 1 << 15);
        assert_eq!((out.minor, out.max_background, out.congestion_threshold), (42, 100, 75));
    }
}
