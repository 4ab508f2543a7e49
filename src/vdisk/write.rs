//! A write pio: in place under the shared lock, or an allocation or a copy on write (`cow`) under the exclusive one.
//!
//! Order of an allocation, all under the exclusive cluster lock:
//! 1. look up and pin the BAT page: the entry can be set later without loading anything;
//! 2. take a file cluster that is known to be zero and lies inside the file (R2, R3: `alloc`);
//! 3. copy into it what a lower level has and the write leaves, then write the data;
//! 4. set the entry in the cache, which makes the cluster visible;
//! 5. let the lock go, answer.
//!
//! 4 before 3 would let a round publish the entry of a cluster whose data write then fails, and a reader see it.
//! 5 before 4 would let a read after the answer see zeroes, and a second write allocate a second cluster.
//! The entry reaches the disk in a later round, which syncs the data first where R3 asks for it.

use super::alloc::Alloc;
use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::cow::{Copied, CopyError};
use super::engine::CleanWaiter;
use super::locks::LockMode;
use super::pio::{Body, Pio};
use super::stack::Stack;
use super::zero::is_zero;
use super::{Image, Ready};
use crate::error::{Error, Kind, Result, is_full};
use crate::io::file::write_full;
use crate::sync::Arc;

/// Runs a write pio; it holds no lock. May block on the host: for runners only.
pub(super) fn run(pio: Pio) {
    let image = pio.image.clone();
    match image.ready() {
        Ready::No(e) => return pio.finish(Err(e)),
        Ready::Unmarked => return image.mark_first(pio, Pio::run, not_marked),
        Ready::Yes => {}
    }
    if let Some(pio) = image.throttle(pio) {
        pio.with_lock(LockMode::Shared, in_place);
    }
}

/// Any write may meet ENOSPC, that of the mark included (a host that copies on write).
fn not_marked(pio: Pio, result: Result<()>) {
    match &result {
        Err(e) if e.kind() == Kind::NoSpace => pio.image.clone().park(pio),
        _ => pio.finish(result),
    }
}

fn in_place(mut pio: Pio) {
    let image = pio.image.clone();
    let stack = image.stack();
    match stack.place(pio.cluster) {
        Lookup::Miss => pio.run_with_page(),
        Lookup::Found(Place::Damaged) => {
            let e = image.damaged_entry(pio.cluster);
            pio.finish(Err(e));
        }
        Lookup::Found(Place::At { level, position }) if level == stack.top_index() => {
            write_mapped(pio, &stack, position);
        }
        Lookup::Found(Place::None) if is_zero(data(&pio)) => {
            image.count_write(0);
            pio.finish(Ok(()));
        }
        Lookup::Found(Place::None | Place::At { .. }) => {
            // No upgrade: release, queue for exclusive, look up again.
            pio.unlock();
            pio.with_lock(LockMode::Exclusive, allocate);
        }
    }
}

fn data(pio: &Pio) -> &[u8] {
    match &pio.body {
        Body::Write(data) => data,
        Body::Read(_) => unreachable!("only writes come here"),
    }
}

/// What it writes counts as changed, also when only a part of it is written.
fn pio_changes(pio: &Pio) {
    pio.image.changes_at(pio.cluster * pio.image.cluster + pio.start, data(pio).len() as u64);
}

/// Writes into a cluster that the top maps. Even here the host may be full: sparse, punched and shared extents.
fn write_mapped(pio: Pio, stack: &Stack, position: u64) {
    let at = position + pio.start;
    pio_changes(&pio);
    match write_full(&*stack.top().file, data(&pio), at) {
        Ok(()) => {
            let image = pio.image.clone();
            image.wrote(data(&pio).len());
            image.space_worked(pio.parked.is_some());
            pio.finish(Ok(()));
        }
        Err(e) => failed(pio, stack, &e, at),
    }
}

/// ENOSPC parks the pio; anything else is the caller's error.
fn failed(pio: Pio, stack: &Stack, e: &std::io::Error, at: u64) {
    let image = pio.image.clone();
    // What was written before the failure must be synced like any other data.
    image.touched(1);
    if is_full(e) {
        return image.park(pio);
    }
    pio.finish(Err(Error::io_at(e, &stack.top().path, "cannot write", at)));
}

fn allocate(pio: Pio) {
    let image = pio.image.clone();
    let stack = image.stack();
    let Some(bat) = &stack.bat else { unreachable!("every cluster of a raw image is mapped") };
    let top = stack.top_index();
    let below = match bat.lookup_to_allocate(pio.cluster, top) {
        Lookup::Miss => return pio.run_with_page(),
        // Another pio allocated it while we queued.
        Lookup::Found(Place::At { level, position }) if level == top => {
            return write_mapped(pio, &stack, position);
        }
        Lookup::Found(Place::Damaged) => {
            let e = image.damaged_entry(pio.cluster);
            return pio.finish(Err(e));
        }
        Lookup::Found(Place::None) => None,
        Lookup::Found(Place::At { level, position }) => Some((level, position)),
    };
    let cluster = pio.cluster;
    if bat.crowded() {
        bat.unpin(cluster);
        return wait_for_clean_pages(pio);
    }
    // A pio that waits holds no lock: an extension may take long.
    let unlocked = |mut pio: Pio| -> super::runner::Job {
        pio.unlock();
        Box::new(move || pio.run())
    };
    let alloc = stack.allocator();
    let places = [pio.companion(), pio.companion()];
    match image.take_cluster(&stack, None, places, pio, unlocked) {
        Alloc::Wait => bat.unpin(cluster),
        Alloc::Full(pio) => {
            bat.unpin(cluster);
            image.park(pio);
        }
        Alloc::Got(file_cluster, pio) => {
            let pio_start = pio.start;
            let position = stack.geometry.cluster_position(file_cluster);
            if let Err(e) = fill(&pio, &stack, below, position) {
                bat.unpin(cluster);
                alloc.give_back(file_cluster);
                return match e {
                    CopyError::Read(e) => pio.finish(Err(e)),
                    CopyError::Write(e) => failed(pio, &stack, &e, position + pio_start),
                };
            }
            image.wrote(data(&pio).len());
            if bat.set(cluster, top, position) {
                image.bat_is_dirty();
            }
            image.space_worked(true);
            pio.finish(Ok(()));
        }
    }
}

/// Step 3: what a lower level has and the write leaves, then the data.
fn fill(
    pio: &Pio,
    stack: &Stack,
    below: Option<(u16, u64)>,
    position: u64,
) -> std::result::Result<(), CopyError> {
    let image = &pio.image;
    let data = data(pio);
    pio_changes(pio);
    let mut blank = true;
    if let Some(from) = below {
        let len = image.cluster_len(pio.cluster);
        let skip = pio.start..pio.start + data.len() as u64;
        blank = matches!(image.copy_cluster(stack, from, position, len, skip)?, Copied::Rest);
    }
    if blank && below.is_some() && is_zero(data) {
        return Ok(()); // A zero cluster: a hole that hides what lies below.
    }
    write_full(&*stack.top().file, data, position + pio.start).map_err(CopyError::Write)
}

/// Half of the BAT cache is dirty: `pio` waits as if parked for space, outside the gate, so that no freeze or close
/// of this image waits for the pages of another one.
fn wait_for_clean_pages(mut pio: Pio) {
    pio.leave();
    let image = pio.image.clone();
    let waiter = move |clean: bool| {
        let image = pio.image.clone();
        if clean { pio.come_back() } else { image.park(pio) }
    };
    image.when_pages_are_clean(Box::new(waiter));
}

impl Image {
    /// Parks `pio` until unsynced data is below the upper bound (docs/design.md#bounds), or gives it back. It waits
    /// outside the gate: a freeze does not wait for the disk in its place.
    fn throttle(&self, mut pio: Pio) -> Option<Pio> {
        if !self.flusher.is_over_bound() || self.stack().never_blocks {
            return Some(pio);
        }
        pio.leave();
        let failed = || self.ends.has_failed();
        if let Some(pio) = self.flusher.throttle(pio, failed, |pio| Box::new(move || pio.come_back())) {
            pio.come_back();
        }
        None
    }

    /// Calls `waiter` when fewer BAT pages are dirty. It holds no lock and is outside the gate meanwhile.
    pub(super) fn when_pages_are_clean(self: &Arc<Self>, waiter: CleanWaiter) {
        let closing = || self.is_closing();
        let crowded = || self.stack().bat.as_ref().is_some_and(|bat| bat.crowded());
        let queued = self.engine.when_pages_are_clean(self.id, closing, crowded, waiter);
        // Pages of any image may be the dirty ones: ours go now, others' at their deadline. Without any of our own
        // a round would end at once, and wake all waiters for nothing, again and again.
        if queued && self.dirty_pages() > 0 {
            self.start_round();
        }
    }

    /// Bytes of a guest cluster that belong to the disk: the last one may be partial.
    pub(super) fn cluster_len(&self, cluster: u64) -> u64 {
        (self.size() - cluster * self.cluster).min(self.cluster)
    }

    /// Checks the range of a write: a disk has a fixed size, and a short write would lose its tail silently.
    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => {
                let context = format!(
                    "a write of {len} bytes at byte {offset} passes the disk's end at {}",
                    self.size()
                );
                Err(Error::at(Kind::NoSpace, self.path(), context))
            }
        }
    }
}
