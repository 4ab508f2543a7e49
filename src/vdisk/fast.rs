//! The fast path: what ends on the submitter's (transport) thread. It never waits, allocates no memory, and takes no
//! lock but the page's (for the look-up), the cluster's, and for a first write the allocator's. None means: use the queued
//! path, nothing was answered.

use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::gate::Inside;
use super::locks::LockMode;
use super::nowait::NoWaitReads;
use super::stack::Stack;
use super::zero::is_zero;
use super::{Image, Ready};
use crate::error::{Error, Result, is_full};
use crate::io::file::write_full;
use crate::sync::Arc;

/// Clusters looked up and locked together: a 1 MiB request over 32 KiB clusters has at most 33. Far below the
/// number of lock stripes, so that one request never meets itself.
const WINDOW: usize = 40;

/// Where the clusters of a [`Window`] are.
pub(super) type Places = [Place; WINDOW];
/// None of them looked up yet.
pub(super) const NOWHERE: Places = [Place::None; WINDOW];

/// Neighbouring pios that are one system call.
pub(super) struct Run {
    pub(super) place: Place,
    /// Bytes.
    pub(super) len: u64,
}

impl Image {
    /// NoWaitReads on the caller's thread: holes, and what the host has cached. Clipped at the disk's end.
    pub fn try_read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Option<Result<usize>> {
        let len = (buf.len() as u64).min(self.size().saturating_sub(offset));
        if len == 0 {
            return Some(Ok(0));
        }
        let inside = self.gate.enter(1)?;
        let done = self.read_windows(&self.stack(), offset, &mut buf[..len as usize]);
        self.gate.leave(inside);
        done.then(|| {
            self.count_read(len as usize);
            Ok(len as usize)
        })
    }

    fn read_windows(self: &Arc<Self>, stack: &Stack, offset: u64, buf: &mut [u8]) -> bool {
        let (mut done, mut places) = (0, NOWHERE);
        while done < buf.len() {
            let at = offset + done as u64;
            let window = Window::lock(self, stack, at, (buf.len() - done) as u64, &mut places);
            let Some(window) = window else { return false };
            let len = window.len as usize;
            if !window.all(|at, run| read_run(stack, run, &mut buf[done + at..done + at + run.len as usize]))
            {
                return false;
            }
            done += len;
        }
        true
    }

    /// Writes on the caller's thread: to clusters that the top maps, zeroes to holes, and for the first time to one
    /// cluster that no level maps. Only while the host file is unlikely to make us wait: below the bound of unsynced
    /// data, and no punch or extension running.
    pub fn try_write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Option<Result<()>> {
        if let Err(e) = self.check_range(offset, data.len() as u64) {
            return Some(Err(e));
        }
        if !matches!(self.ready(), Ready::Yes)
            || self.host.is_busy()
            || self.space.is_full()
            || (self.flusher.is_over_bound() && !self.stack().never_blocks)
        {
            return None;
        }
        if data.is_empty() {
            return Some(Ok(()));
        }
        let inside = self.gate.enter(1)?;
        // Inside: outside the gate it may be another.
        let stack = self.stack();
        let written = self.write_windows(&stack, offset, data);
        let result = written.or_else(|| self.write_first(&stack, offset, data));
        self.leave_written(inside, data.len(), &result);
        result
    }

    fn leave_written(&self, inside: Inside, len: usize, result: &Option<Result<()>>) {
        if matches!(result, Some(Ok(()))) {
            self.count_write(len);
        }
        self.gate.leave(inside);
    }

    fn write_windows(self: &Arc<Self>, stack: &Stack, offset: u64, data: &[u8]) -> Option<Result<()>> {
        let (mut done, mut places) = (0, NOWHERE);
        let mut failure = None;
        while done < data.len() {
            let at = offset + done as u64;
            let window = Window::lock(self, stack, at, (data.len() - done) as u64, &mut places)?;
            let len = window.len as usize;
            // Nothing is written before all of the window is known to be writable here.
            if !window.all(|at, run| match run.place {
                // A lower level's cluster is copied first: not here.
                Place::At { level, .. } => level == stack.top_index(),
                Place::None => is_zero(&data[done + at..done + at + run.len as usize]),
                Place::Damaged => false,
            }) {
                return None;
            }
            let top = stack.top();
            let ok = window.all(|inside, run| {
                let Place::At { position, .. } = run.place else { return true };
                let piece = &data[done + inside..done + inside + run.len as usize];
                self.changes_at(at + inside as u64, run.len);
                let written = write_full(&*top.file, piece, position);
                // Counted also when it failed: part of it may be there, and must be synced.
                self.touched(piece.len() as u64);
                match written {
                    Ok(()) => true,
                    // Full: the queued path does it again, and parks it.
                    Err(e) if is_full(&e) => false,
                    Err(e) => {
                        failure = Some(Error::io_at(&e, &top.path, "cannot write", position));
                        false
                    }
                }
            });
            if let Some(e) = failure {
                return Some(Err(e));
            }
            if !ok {
                return None;
            }
            done += len;
        }
        Some(Ok(()))
    }

    /// The first write to a cluster that no level maps, where everything it needs is at hand. The order is that of
    /// `write`; what is missing, or being worked on, sends it there.
    fn write_first(self: &Arc<Self>, stack: &Stack, offset: u64, data: &[u8]) -> Option<Result<()>> {
        let cluster = offset / self.cluster;
        let bat = stack.bat.as_ref()?;
        let one = (offset + data.len() as u64 - 1) / self.cluster == cluster;
        if !one
            || self.engine.budget.dirty_full()
            || bat.is_unkeepable()
            || !matches!(bat.lookup(cluster), Lookup::Found(Place::None))
        {
            return None;
        }
        let _alone = Alone::lock(self, cluster)?;
        // 1. Again, under the lock.
        match bat.lookup_to_allocate(cluster, stack.top_index()) {
            Lookup::Found(Place::None) => {}
            Lookup::Found(Place::At { level, .. }) if level != stack.top_index() => {
                bat.unpin(cluster);
                return None;
            }
            _ => return None,
        }
        // 2.
        let alloc = stack.allocator();
        let Some(file_cluster) = alloc.take_in_hand() else {
            bat.unpin(cluster);
            return None;
        };
        // 3. Nothing lies below.
        let top = stack.top();
        let position = stack.geometry.cluster_position(file_cluster) + offset % self.cluster;
        self.changes_at(offset, data.len() as u64);
        let written = write_full(&*top.file, data, position);
        // Counted also when it failed: part of it may be there, and must be synced.
        self.touched(data.len() as u64);
        if let Err(e) = written {
            bat.unpin(cluster);
            alloc.give_back(file_cluster);
            let failed = || Error::io_at(&e, &top.path, "cannot write", position);
            // Full: the queued path does it again, and parks it.
            return (!is_full(&e)).then(|| Err(failed()));
        }
        // 4.
        if bat.set(cluster, stack.top_index(), stack.geometry.cluster_position(file_cluster)) {
            self.bat_is_dirty();
        }
        // 5. The lock goes with `_alone`.
        Some(Ok(()))
    }
}

/// One system call, without waiting. A short answer is never returned as it is: the runner reads again.
fn read_run(stack: &Stack, run: &Run, buf: &mut [u8]) -> bool {
    match run.place {
        Place::None => {
            buf.fill(0);
            true
        }
        Place::Damaged => false,
        Place::At { level: index, position } => {
            let level = stack.level(index);
            let got = match stack.reads_of(index) {
                NoWaitReads::Plain => level.file.read_at(buf, position),
                NoWaitReads::Nowait => level.file.read_at_nowait(buf, position),
                NoWaitReads::Wait => return false,
            };
            got.is_ok_and(|n| n == buf.len())
        }
    }
}

/// Some neighbouring clusters of a request, locked shared and looked up.
pub(super) struct Window<'a> {
    image: &'a Arc<Image>,
    first: u64,
    count: usize,
    /// Where the request begins inside the first cluster.
    start: u64,
    /// Bytes of the request in this window.
    len: u64,
    /// Of all clusters that it is to have.
    places: &'a [Place],
}

impl<'a> Window<'a> {
    /// Locks and looks up the beginning of `[offset, offset + len)`; None when anything is in the way. `places` is room for
    /// what is found, the caller's because moving it with the window was a quarter of a small read's instructions.
    pub(super) fn lock(
        image: &'a Arc<Image>,
        stack: &Stack,
        offset: u64,
        len: u64,
        places: &'a mut Places,
    ) -> Option<Window<'a>> {
        let first = offset / image.cluster;
        let start = offset - first * image.cluster;
        let count = ((start + len - 1) / image.cluster + 1).min(WINDOW as u64) as usize;
        let len = len.min(count as u64 * image.cluster - start);
        let places = &mut places[..count];
        let mut window = Window { image, first, count: 0, start, len, places: &[] };
        while window.count < count {
            if !image.locks.try_lock(first + window.count as u64, LockMode::Shared) {
                return None; // Drop gives back what was taken.
            }
            window.count += 1;
        }
        let found = match &stack.bat {
            Some(bat) => bat.lookup_run(first, places),
            None => {
                for (i, place) in places.iter_mut().enumerate() {
                    *place = stack.raw_place(first + i as u64);
                }
                true
            }
        };
        window.places = places;
        found.then_some(window)
    }

    /// Calls `each(offset in the window, run)` for runs of neighbours until one is refused.
    pub(super) fn all(&self, mut each: impl FnMut(usize, &Run) -> bool) -> bool {
        let cluster = self.image.cluster;
        let (mut i, mut at) = (0, 0);
        while i < self.count {
            let skip = if i == 0 { self.start } else { 0 };
            let mut run = Run { place: self.places[i], len: (cluster - skip).min(self.len - at) };
            let begin = run.place;
            let next = |place: Place, run_len: u64| match (begin, place) {
                (Place::None, Place::None) => true,
                (Place::At { level, position }, Place::At { level: l, position: p }) => {
                    l == level && p == position + skip + run_len
                }
                _ => false,
            };
            i += 1;
            while i < self.count && next(self.places[i], run.len) {
                run.len += cluster.min(self.len - at - run.len);
                i += 1;
            }
            if let Place::At { position, .. } = &mut run.place {
                *position += skip;
            }
            if !each(at as usize, &run) {
                return false;
            }
            at += run.len;
        }
        true
    }
}

impl Window<'_> {
    /// The clusters, first and count, whose locks the caller gives back from now on.
    pub(super) fn keep(mut self) -> (u64, usize) {
        (self.first, std::mem::take(&mut self.count))
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        for i in 0..self.count {
            self.image.unlock(self.first + i as u64, LockMode::Shared);
        }
    }
}

/// One cluster, locked exclusively.
struct Alone<'a> {
    image: &'a Arc<Image>,
    cluster: u64,
}

impl<'a> Alone<'a> {
    /// None: a pio is at work on it.
    fn lock(image: &'a Arc<Image>, cluster: u64) -> Option<Alone<'a>> {
        // Not then_some: what that made for nothing would give back another holder's lock.
        image.locks.try_lock(cluster, LockMode::Exclusive).then(|| Alone { image, cluster })
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.image.unlock(self.cluster, LockMode::Exclusive);
    }
}
