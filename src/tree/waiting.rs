//! Writes that wait for room in memory, or for the transport's (`io/buffers`), and the end of that where a host hangs.
//!
//! On /dev/fuse a transport thread waits for room, with the write in its buffer. On rings the data lies in an entry of the
//! kernel's queue, so that no thread has to wait: what is not lent to the image yet stands in a list, is tried again by the
//! clock, and can be answered at any moment. Its entry is then free for the requests of other images behind it.

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handles::Borrowed;
use super::{OpenFile, Tree};
use crate::error::{Error, Kind};
use crate::fuse::ops::{Answer, Done, Errno, FileSystem, Handle, Held, OpenFlags};
use crate::io::buffers::{self, Asked, Hung, Room};
use crate::sync::{Mutex, lock};
use crate::vdisk::Image;

/// How often those that wait are tried again: what the image holds already keeps its host busy for longer.
const AGAIN: Duration = Duration::from_millis(20);

/// The writes that wait, in the order in which they came.
#[derive(Default)]
pub(super) struct Waiting {
    /// A leaf.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// With the image that each is for.
    writes: VecDeque<(u64, Write)>,
    /// The clock will look again.
    ticking: bool,
    /// No operation follows: nothing waits any more.
    ended: bool,
}

/// A write that nothing was done about yet.
pub(super) struct Write {
    pub(super) handle: Handle,
    pub(super) offset: u64,
    pub(super) data: Box<dyn Held>,
    pub(super) flags: OpenFlags,
    pub(super) done: Done<usize>,
}

/// What becomes of a write.
enum Verdict {
    Goes(Room),
    Waits,
    Fails(Errno),
}

impl Tree {
    /// See [`FileSystem::room`].
    pub(super) fn room_for(&self, handle: Handle, len: usize) -> Answer<Room> {
        if buffers::is_small(len) {
            return Ok(buffers::any_room(len));
        }
        // Kept over the wait, as by the write itself.
        let Some((image, path)) = self.written(handle) else { return self.room_until_back(handle, len) };
        buffers::room(image.as_ref(), len).map_err(|hung| self.refusal(&hung, &path()))
    }

    /// The image behind a handle, and how its file is called.
    fn written(&self, handle: Handle) -> Option<(Arc<Image>, impl Fn() -> PathBuf + use<>)> {
        let borrowed = self.borrow(handle)?;
        let (image, entry) = borrowed.get().and_then(OpenFile::image)?;
        let entry = entry.clone();
        Some((image.clone(), move || entry.path()))
    }

    /// The errno of a write whose image holds all it may and completes nothing. Said once until it goes on.
    pub(super) fn refusal(&self, hung: &Hung, path: &Path) -> Errno {
        let e = Error::at(
            Kind::Io,
            path,
            format!(
                "its host has completed nothing for {} s while {} MiB of writes wait; until it does, further large \
                 ones fail, so that other disks go on",
                hung.since.as_secs(),
                hung.held >> 20
            ),
        );
        if hung.news { self.trouble.errno(&e, path, "write") } else { Errno::from(&e) }
    }

    /// Carries a write out, or lets it wait. Neither waits here.
    pub(super) fn write_or_wait(&self, write: Write) {
        let Some(id) = self.image_id(write.handle) else { return self.go(write, None) };
        let mut state = lock(&self.waiting.state);
        // Behind those that came before it.
        let behind = state.writes.iter().any(|(of, _)| *of == id);
        if !behind {
            drop(state);
            match self.judge(&write) {
                Verdict::Goes(room) => return self.go(write, Some(room)),
                Verdict::Fails(errno) => return (write.done)(Err(errno)),
                Verdict::Waits => {}
            }
            state = lock(&self.waiting.state);
        }
        if state.ended {
            drop(state);
            return (write.done)(Err(Errno(libc::EIO)));
        }
        state.writes.push_back((id, write));
        let tick = !std::mem::replace(&mut state.ticking, true);
        drop(state);
        if tick {
            self.tick_later();
        }
    }

    fn image_id(&self, handle: Handle) -> Option<u64> {
        let borrowed = self.borrow(handle);
        let (_, entry) = borrowed.as_ref().and_then(Borrowed::get).and_then(OpenFile::image)?;
        Some(entry.id())
    }

    fn judge(&self, write: &Write) -> Verdict {
        let Some((image, path)) = self.written(write.handle) else {
            // Not open any more: the write itself says so.
            return Verdict::Goes(buffers::any_room(write.data.len()));
        };
        // A closed one fails what comes, at once.
        let asked = if image.is_closed() {
            Asked::Taken(buffers::any_room(write.data.len()))
        } else if write.data.may_be_lent() || buffers::holds_none(image.as_ref()) {
            // One of each image always goes, or it would wait for the host of another.
            buffers::ask(image.as_ref(), write.data.len())
        } else {
            buffers::hung(image.as_ref()).map_or(Asked::Full, Asked::Hung)
        };
        match asked {
            Asked::Taken(room) => Verdict::Goes(room),
            Asked::Full => Verdict::Waits,
            Asked::Hung(hung) => Verdict::Fails(self.refusal(&hung, &path())),
        }
    }

    fn go(&self, write: Write, room: Option<Room>) {
        let Write { handle, offset, data, flags, done } = write;
        let room = room.unwrap_or_else(|| buffers::any_room(data.len()));
        self.write_later(handle, offset, room.keep(data.lend()), flags, done);
    }

    fn tick_later(&self) {
        let tree = self.own.clone();
        let tick = move || {
            if let Some(tree) = tree.upgrade() {
                tree.tick();
            }
        };
        self.engine.at(Instant::now() + AGAIN, Box::new(tick));
    }

    /// On the clock's thread: tries all that wait, those of one image in order.
    fn tick(&self) {
        let writes = std::mem::take(&mut lock(&self.waiting.state).writes);
        let (mut left, mut blocked) = (VecDeque::new(), HashSet::new());
        for (id, write) in writes {
            let verdict = if blocked.contains(&id) { Verdict::Waits } else { self.judge(&write) };
            match verdict {
                Verdict::Goes(room) => self.go(write, Some(room)),
                Verdict::Fails(errno) => (write.done)(Err(errno)),
                Verdict::Waits => {
                    blocked.insert(id);
                    left.push_back((id, write));
                }
            }
        }
        let mut state = lock(&self.waiting.state);
        // What came meanwhile came later.
        left.append(&mut state.writes);
        state.writes = left;
        state.ticking = !state.writes.is_empty();
        let (ended, ticking) = (state.ended, state.ticking);
        drop(state);
        if ended {
            self.end_waiting();
        } else if ticking {
            self.tick_later();
        }
    }

    /// The connection has ended: what waits fails.
    pub(super) fn end_waiting(&self) {
        let mut state = lock(&self.waiting.state);
        state.ended = true;
        let writes = std::mem::take(&mut state.writes);
        drop(state);
        writes.into_iter().for_each(|(_, write)| (write.done)(Err(Errno(libc::EIO))));
    }
}
