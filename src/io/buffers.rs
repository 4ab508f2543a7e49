//! Memory for the data of writes that wait: bounded in bytes, and given back to the system when they have ended.
//!
//! A write that does not end on the transport's thread waits: for a runner, a sync, space, or a host that stands still.
//! On /dev/fuse it is copied first; on rings its data stays in the memory of its entry. The kernel sends thousands of
//! them, each of up to 1 MiB, to a daemon whose memory is locked and which is the last to be killed for want of it. So
//! both kinds count in one bound, over all images of the process; more stays with the kernel, and so with the writers.
//!
//! Whose the next request is cannot be seen before it is taken. So a thread that waits for room for one image stops all,
//! and it waits only while that image goes on: where its host has completed nothing for [`HUNG`], a further large write is
//! refused. It was not acknowledged, and other disks go on.
//!
//! Large ones lie in mappings of their own: what the allocator has had it keeps, after a gigabyte of writes a gigabyte.

use std::collections::HashMap;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::mm::{MapFlags, ProtFlags};

use crate::sync::plain::{lock, wait_timeout};

/// Most that waits, in bytes: the whole queues of four loop devices, 128 requests of 1 MiB each, a few beside them, and
/// [`RESERVE`]. The daemon stays below 600 MiB with it. Each of these lies in its writer's memory as well, so that no small
/// machine comes to it.
pub const LIMIT: usize = 560 << 20;
/// Of it, what is kept for images that hold less than [`OWN`]: what one takes whose host hangs stops no other. Enough for
/// four that write at full speed.
pub const RESERVE: usize = 32 << 20;
/// What an image may take of [`RESERVE`]: 1 MiB for each of eight requests, with which a disk is busy.
pub const OWN: usize = 8 << 20;
/// An image of which nothing was completed for so long is not waited for: the kernel's time limit for a SCSI command.
pub const HUNG: Duration = Duration::from_secs(30);
/// How often a thread that waits for room looks whether the image goes on; a write that ends wakes it at once.
const LOOK: Duration = Duration::from_secs(1);
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
static ALL: Buffers = Buffers { state: Mutex::new(State::new()), freed: Condvar::new() };

/// Whose writes wait.
pub trait Writer {
    /// Its number in this process.
    fn id(&self) -> u64;
    /// How many of its changes were completed so far. Takes no lock.
    fn completed(&self) -> u64;
}

/// Whether there is room.
pub enum Asked {
    /// There was, and it is taken.
    Taken(Room),
    /// Not now.
    Full,
    /// Not now, and the image's host hangs.
    Hung(Hung),
}

/// Why a write is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hung {
    /// Bytes that wait for this image's host.
    pub held: usize,
    /// For so long nothing was completed.
    pub since: Duration,
    /// This is the first refusal since it went on.
    pub news: bool,
}

struct Buffers {
    /// A leaf.
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    /// Bytes that wait.
    out: usize,
    /// Threads that wait for room.
    waiting: usize,
    /// By number, those of which something large waits.
    images: Option<HashMap<u64, Account>>,
    spare: Vec<Mapping>,
}

/// What waits of one image, in large writes.
struct Account {
    /// Never 0.
    held: usize,
    /// When something of it was completed, as far as was seen, or this began.
    since: Instant,
    /// [`Writer::completed`], where it was looked at.
    completed: Option<u64>,
    /// A write was refused since then.
    said: bool,
}

/// True when a write of `len` bytes waits for no room.
pub fn is_small(len: usize) -> bool {
    len <= SMALL
}

/// Room for a small write, or one of no image that is known.
pub fn any_room(len: usize) -> Room {
    ALL.any(len)
}

/// Room for `len` bytes that wait for this image, if there is some. Never waits.
pub fn ask(of: &dyn Writer, len: usize) -> Asked {
    ALL.ask(of, len)
}

/// Room for `len` bytes that wait for this image. Waits while there is none: for transport threads that take requests one
/// after the other; a write that has been taken ends without a further request.
pub fn room(of: &dyn Writer, len: usize) -> Result<Room, Hung> {
    ALL.room(of, len)
}

/// True when no large write waits for this image's host.
pub fn holds_none(of: &dyn Writer) -> bool {
    !ALL.lock().images.as_ref().is_some_and(|images| images.contains_key(&of.id()))
}

/// Some when large writes wait for this image's host, and it hangs.
pub fn hung(of: &dyn Writer) -> Option<Hung> {
    ALL.lock().images.as_mut()?.get_mut(&of.id())?.hung(of)
}

impl State {
    const fn new() -> State {
        State { out: 0, waiting: 0, images: None, spare: Vec::new() }
    }

    /// What holds whenever the lock is free.
    fn is_sound(&self) -> bool {
        let mut held = self.images.iter().flat_map(HashMap::values).map(|account| account.held);
        let sum: usize = held.clone().sum();
        sum <= self.out && held.all(|held| held > 0)
    }

    fn take(&mut self, id: u64, len: usize) {
        self.out += len;
        let new = || Account { held: 0, since: Instant::now(), completed: None, said: false };
        self.images.get_or_insert_default().entry(id).or_insert_with(new).held += len;
    }

    /// Takes room for a large write; else says why not. What an image holds that has nothing else waiting is not counted
    /// against it: with 1 MiB each it goes on, whatever others hold.
    fn ask(&mut self, of: &dyn Writer, len: usize) -> Result<(), Option<Hung>> {
        let account = self.images.as_mut().and_then(|images| images.get_mut(&of.id()));
        let Some(account) = account else {
            self.take(of.id(), len);
            return Ok(());
        };
        let full = self.out + len;
        if full <= LIMIT - RESERVE || full <= LIMIT && account.held + len <= OWN {
            self.take(of.id(), len);
            return Ok(());
        }
        Err(account.hung(of))
    }

    fn give(&mut self, id: Option<u64>, len: usize) {
        self.out -= len;
        let Some((images, id)) = self.images.as_mut().zip(id) else { return };
        let Some(account) = images.get_mut(&id) else { return };
        account.held -= len;
        (account.since, account.said) = (Instant::now(), false);
        if account.held == 0 {
            images.remove(&id);
        }
    }
}

impl Account {
    /// Some when its host hangs.
    fn hung(&mut self, of: &dyn Writer) -> Option<Hung> {
        let completed = Some(of.completed());
        if self.completed != completed {
            (self.completed, self.since, self.said) = (completed, Instant::now(), false);
        }
        let since = self.since.elapsed();
        (since >= HUNG).then(|| Hung {
            held: self.held,
            since,
            news: !std::mem::replace(&mut self.said, true),
        })
    }
}

impl Buffers {
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        debug_assert!(state.is_sound(), "what waits, and its sums");
        state
    }

    fn any(&'static self, len: usize) -> Room {
        self.lock().out += len;
        Room { len, of: None, memory: None, all: self }
    }

    fn ask(&'static self, of: &dyn Writer, len: usize) -> Asked {
        if is_small(len) {
            return Asked::Taken(self.any(len));
        }
        match self.lock().ask(of, len) {
            Ok(()) => Asked::Taken(Room { len, of: Some(of.id()), memory: None, all: self }),
            Err(None) => Asked::Full,
            Err(Some(hung)) => Asked::Hung(hung),
        }
    }

    fn room(&'static self, of: &dyn Writer, len: usize) -> Result<Room, Hung> {
        if is_small(len) {
            return Ok(self.any(len));
        }
        let mut state = self.lock();
        loop {
            match state.ask(of, len) {
                Ok(()) => return Ok(Room { len, of: Some(of.id()), memory: None, all: self }),
                Err(Some(hung)) => return Err(hung),
                Err(None) => {
                    state.waiting += 1;
                    state = wait_timeout(&self.freed, state, LOOK).0;
                    state.waiting -= 1;
                }
            }
        }
    }
}

/// Room for one write, which is given back when its last holder drops it.
pub struct Room {
    len: usize,
    /// The image, where it is large.
    of: Option<u64>,
    /// The copy, where there is one.
    memory: Option<Memory>,
    all: &'static Buffers,
}

impl Room {
    /// A copy of `data`, which has the length that was asked for.
    pub fn copy(mut self, data: &[u8]) -> Bytes {
        debug_assert_eq!(data.len(), self.len, "as was asked for");
        let mapped = !is_small(data.len()) && data.len() <= LARGE;
        let spare = if mapped { self.all.lock().spare.pop() } else { None };
        let mapping = spare.or_else(|| mapped.then(Mapping::new).flatten());
        self.memory = Some(match mapping {
            Some(mut mapping) => {
                mapping.as_mut()[..data.len()].copy_from_slice(data);
                Memory::Mapped(mapping)
            }
            // Small, or the system has no mapping to give.
            None => Memory::Allocated(data.into()),
        });
        Bytes::from_owner(self)
    }

    /// The same for data that lies where it may stay.
    pub fn keep(self, data: Bytes) -> Bytes {
        debug_assert_eq!(data.len(), self.len, "as was asked for");
        Bytes::from_owner(Kept { data, _room: self })
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        match &self.memory {
            Some(Memory::Mapped(mapping)) => &mapping.as_ref()[..self.len],
            Some(Memory::Allocated(bytes)) => bytes,
            None => &[],
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let memory = self.memory.take();
        let mut state = self.all.lock();
        state.give(self.of, self.len);
        let back = match memory {
            Some(Memory::Mapped(mapping)) if state.spare.len() < SPARE => {
                state.spare.push(mapping);
                None
            }
            other => other,
        };
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            // All: they wait for different images.
            self.all.freed.notify_all();
        }
        // Given back outside the lock.
        drop(back);
    }
}

/// Data that lies where it may stay, and its room. The data goes first.
struct Kept {
    data: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

enum Memory {
    Mapped(Mapping),
    Allocated(Box<[u8]>),
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
mod tests;
