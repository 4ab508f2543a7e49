//! Memory for the data of writes that wait: bounded in bytes, and given back to the system when they have ended.
//!
//! A write that does not end on the transport's thread is copied, and waits: for a runner, a sync, space, or a host that
//! stands still. The kernel sends thousands of them, each of up to 1 MiB, to a daemon whose memory is locked and which is
//! the last to be killed for want of it. So the next one is taken only while what waits is below `LIMIT`, over all images
//! of the process; more stays with the kernel, that is with who writes.
//!
//! Large ones lie in mappings of their own: what the allocator has had it keeps, after a gigabyte of writes a gigabyte.

use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Condvar, Mutex, MutexGuard};

use bytes::Bytes;
use rustix::mm::{MapFlags, ProtFlags};

use crate::sync::plain::{lock, wait};

/// Most that waits, in bytes: a queue of 128 requests of 1 MiB, as a loop device has, for each of three images, while a
/// machine with 1 GiB still lives.
const LIMIT: usize = 400 << 20;
/// Of it, what may wait for space on a full host, over all images: what is not parked never waits for what is.
pub const PARKED: u64 = 256 << 20;
/// The same for one image: a whole queue of a loop device.
pub const PARKED_OF_ONE: u64 = 128 << 20;
/// Up to this many bytes the allocator has them, and they do not wait: small requests of all images go on, and 4096 of
/// them (the kernel's bound) are 64 MiB.
const SMALL: usize = 16 << 10;
/// Bytes of a mapping: the largest write that the transports agree on.
const LARGE: usize = 1 << 20;
/// Mappings that are kept for the next write: taking a new one costs more than the copy into it.
const SPARE: usize = 32;

/// All of the process.
static ALL: Buffers =
    Buffers { state: Mutex::new(State { out: 0, spare: Vec::new() }), freed: Condvar::new() };

struct Buffers {
    /// A leaf.
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    /// Bytes that wait.
    out: usize,
    spare: Vec<Mapping>,
}

/// A copy of `data`, which is counted until its last holder drops it. Waits while too much waits already: for transport
/// threads that take requests one after the other; a write that has been taken ends without a further request.
pub fn copy(data: &[u8]) -> Bytes {
    ALL.copy(data)
}

impl Buffers {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn copy(&'static self, data: &[u8]) -> Bytes {
        let large = data.len() > SMALL;
        let mut state = self.lock();
        // One always goes, whatever its size.
        while large && state.out > 0 && state.out + data.len() > LIMIT {
            state = wait(&self.freed, state);
        }
        state.out += data.len();
        let mapped = large && data.len() <= LARGE;
        let spare = if mapped { state.spare.pop() } else { None };
        drop(state);
        let mapping = spare.or_else(|| mapped.then(Mapping::new).flatten());
        let memory = match mapping {
            Some(mut mapping) => {
                mapping.as_mut()[..data.len()].copy_from_slice(data);
                Memory::Mapped(mapping, data.len())
            }
            // Small, or the system has no mapping to give.
            None => Memory::Allocated(data.into()),
        };
        Bytes::from_owner(Copied { memory: Some(memory), len: data.len(), of: self })
    }
}

enum Memory {
    Mapped(Mapping, usize),
    Allocated(Box<[u8]>),
}

/// The copy of one write.
struct Copied {
    /// Some until it is dropped.
    memory: Option<Memory>,
    len: usize,
    of: &'static Buffers,
}

impl AsRef<[u8]> for Copied {
    fn as_ref(&self) -> &[u8] {
        match &self.memory {
            Some(Memory::Mapped(mapping, len)) => &mapping.as_ref()[..*len],
            Some(Memory::Allocated(bytes)) => bytes,
            None => &[],
        }
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let memory = self.memory.take();
        let mut state = self.of.lock();
        state.out -= self.len;
        let back = match memory {
            Some(Memory::Mapped(mapping, _)) if state.spare.len() < SPARE => {
                state.spare.push(mapping);
                None
            }
            other => other,
        };
        drop(state);
        self.of.freed.notify_one();
        // Given back outside the lock.
        drop(back);
    }
}

/// [`LARGE`] bytes of memory of their own.
struct Mapping(NonNull<u8>);

// SAFETY: the mapping belongs to this value alone, wherever it is, and to no thread.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference it is only read.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> Option<Mapping> {
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that is in use.
        let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), LARGE, access, kind) }.ok()?;
        NonNull::new(base.cast()).map(Mapping)
    }

    fn as_ref(&self) -> &[u8] {
        // SAFETY: LARGE bytes are mapped, readable, zeroed by the kernel or written by us, until the drop.
        unsafe { slice::from_raw_parts(self.0.as_ptr(), LARGE) }
    }

    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; writable, and nothing else refers to it while this is borrowed.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), LARGE) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference is left.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), LARGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    fn buffers() -> &'static Buffers {
        let state = Mutex::new(State { out: 0, spare: Vec::new() });
        Box::leak(Box::new(Buffers { state, freed: Condvar::new() }))
    }

    #[test]
    fn what_is_copied_is_the_same_whatever_its_size() {
        let buffers = buffers();
        for len in [0, 1, SMALL, SMALL + 1, LARGE, LARGE + 5] {
            let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let copy = buffers.copy(&data);
            assert_eq!(buffers.lock().out, len);
            assert!(copy == data, "{len} bytes");
        }
        let state = buffers.lock();
        assert_eq!((state.out, state.spare.len()), (0, 1), "one mapping served both");
    }

    #[test]
    fn large_writes_wait_while_too_much_waits_and_small_ones_do_not() {
        let buffers = buffers();
        let data = vec![1; LARGE];
        let mut held: Vec<Bytes> = (0..LIMIT / LARGE).map(|_| buffers.copy(&data)).collect();
        let small = buffers.copy(&data[..SMALL]);
        drop(small);
        let (send, taken) = mpsc::channel();
        std::thread::spawn(move || send.send(buffers.copy(&vec![2; LARGE])));
        assert!(taken.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
        held.pop();
        assert_eq!(taken.recv_timeout(Duration::from_secs(20)).expect("it goes on")[0], 2);
        drop(held);
        let state = buffers.lock();
        assert_eq!((state.out, state.spare.len()), (0, SPARE), "the others are given back");
    }
}
