//! Giving space back: zero clusters are freed, and the clusters at the end of the file move into free places in front, so
//! that it becomes shorter.
//!
//! One cluster at a time, under its lock, while I/O goes on. A zero cluster goes in the order of a discard. One that
//! moves:
//! 1. the BAT page is pinned, and a free, clean place in front is taken (`alloc`);
//! 2. the data is copied there;
//! 3. the entry is changed in the cache; the page remembers the old place;
//! 4. a round makes the data durable, then the entry (R3), and only then the old place is free, its content stale (R4);
//! 5. in the end, the file is cut off behind its last cluster in use, and that is made durable.
//!
//! 3 before 2 would show a reader the place before its data. To punch the old place before 4 would lose the cluster in a
//! power cut, which brings the old entry back. 5 before 4 would leave entries behind the end of the file (R2). Many
//! clusters share one round. A crash, a cancel or a close in between leaves some clusters in other places, and no more.
//!
//! Levels below the live disk may be other images' too (R9) and stay as they are.

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::format::header::HEADER_BYTES;
use crate::io::file::read_full;
use crate::progress::Progress;
use crate::sync::{Arc, thread};
use crate::vdisk::Image;
use crate::vdisk::alloc::{Allocator, Scrubbing};
use crate::vdisk::bat::cache::Lookup;
use crate::vdisk::bat::page::Place;
use crate::vdisk::live::order::FileOrder;
pub use crate::vdisk::live::survey::Gain;
use crate::vdisk::locks::LockMode;
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::Stack;

/// Bytes of BAT read at a time.
const BAT_PIECE: u64 = 1 << 20;
/// Looks at the file for clusters to move: a guest that allocates all the while makes new ones for ever.
const PASSES: u32 = 8;
/// How often an extension or a scrub under way is looked at; each takes a few milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// What came of one cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// To this file cluster.
    To(u64),
    /// It has been moved or discarded since.
    NotThere,
    /// There is no such free place.
    NoPlace,
}

impl Image {
    /// What [`compact`](Self::compact) would gain. Changes nothing. Blocks; not for runners or transport threads.
    pub fn compact_gain(self: &Arc<Self>, progress: &Progress) -> Result<Gain> {
        Ok(self.begin_operation()?.survey(progress, None)?.gain)
    }

    /// What [`defrag`](Self::defrag) would gain. Changes nothing. Blocks, too.
    pub fn defrag_gain(self: &Arc<Self>, progress: &Progress) -> Result<Gain> {
        Ok(self.begin_operation()?.survey(progress, Some(FileOrder::default()))?.gain)
    }

    /// Frees zero clusters, moves clusters from the end of the file to its front, and makes it shorter. Returns what that
    /// has gained. Blocks; not for runners or transport threads.
    pub fn compact(self: &Arc<Self>, progress: &Progress) -> Result<Gain> {
        self.begin_operation()?.compact_or_defrag(progress, false)
    }

    /// The same, and puts the live disk's clusters in the order of the disk, without gaps (`live::defrag`).
    pub fn defrag(self: &Arc<Self>, progress: &Progress) -> Result<Gain> {
        self.begin_operation()?.compact_or_defrag(progress, true)
    }
}

impl Operating<'_> {
    fn compact_or_defrag(&self, progress: &Progress, defrag: bool) -> Result<Gain> {
        let survey = self.survey(progress, defrag.then(FileOrder::default))?;
        self.mark_and_wait()?;
        let work = (survey.zero.len() as u64 + survey.gain.moved_clusters) * self.cluster;
        progress.set_total(progress.so_far().0 + work);
        let mut gain = Gain { zero_clusters: 0, moved_clusters: 0, ..survey.gain };
        let done = self
            .free_zeroes(&survey.zero, progress, &mut gain.zero_clusters)
            // What lies in the tail has its place in front, too: it moves there at once, not twice.
            .and_then(
                |()| if defrag { self.put_in_order(progress, &mut gain.moved_clusters) } else { Ok(()) },
            )
            .and_then(|()| self.move_tail(progress, &mut gain.moved_clusters));
        // What was done until a cancel is not lost, either.
        let cut = match &done {
            Err(e) if e.kind() != Kind::Cancelled => Ok(()),
            _ => self.flush_now().and_then(|()| self.scrub_all()).and_then(|()| self.cut_tail()),
        };
        done.and(cut)?;
        (gain.length_after, gain.allocated_after) = self.own_file()?;
        if let Some(pieces) = &mut gain.defrag {
            pieces.pieces_after = self.order(progress)?.pieces;
        }
        Ok(gain)
    }

    fn free_zeroes(&self, zero: &[u64], progress: &Progress, freed: &mut u64) -> Result<()> {
        for cluster in zero {
            self.stopped(progress)?;
            loop {
                let inside = self.enter_and_wait()?;
                self.lock_and_wait(*cluster);
                let stack = self.stack();
                let done = self.free_zero(&stack, *cluster);
                self.unlock(*cluster, LockMode::Exclusive);
                if let Some(done) = done? {
                    *freed += u64::from(done);
                    break;
                }
                self.load_and_wait(&stack, *cluster)?;
                drop(inside);
            }
            progress.add_while(self.cluster, || !self.is_closing());
            self.flush_if_much()?;
        }
        Ok(())
    }

    /// As a discard of the whole cluster, if it is still zero. None: the page is missing. The caller has its lock.
    fn free_zero(&self, stack: &Stack, cluster: u64) -> Result<Option<bool>> {
        let (Some(bat), top) = (&stack.bat, stack.top_index()) else { return Ok(Some(false)) };
        if !bat.pin(cluster) {
            return Ok(None);
        }
        let free = || {
            let Lookup::Found(Place::At { level, position }) = bat.lookup(cluster) else { return Ok(false) };
            if level != top || !self.reads_zero(stack, position, self.cluster_len(cluster))? {
                return Ok(false);
            }
            let mut hides = [false];
            bat.hidden_run(cluster, &mut hides);
            // Where a lower level would show through, it stays mapped, and is a hole.
            let stays = hides[0] || self.operations.lower_may_return();
            self.punch(stack, position, self.cluster, stays)?;
            if !stays {
                let first = stack.geometry.file_cluster(position);
                let freed = stack.allocator().unmapped(first..first + 1);
                if bat.unmap(cluster, 1, &freed) {
                    self.bat_is_dirty();
                }
            }
            Ok(true)
        };
        let done = free();
        bat.unpin(cluster);
        done.map(Some)
    }

    /// Moves what lies behind the place where the file could end.
    fn move_tail(&self, progress: &Progress, moved: &mut u64) -> Result<()> {
        for _ in 0..PASSES {
            // What was freed is free from here on, and the file's BAT is what the cache has.
            self.flush_now()?;
            self.scrub_all()?;
            let stack = arc_swap::Guard::into_inner(self.stack());
            let tail = self.tail(&stack, stack.geometry.cluster_position(stack.allocator().used()))?;
            let before = *moved;
            for (position, cluster) in tail {
                self.stopped(progress)?;
                let old = stack.geometry.file_cluster(position);
                match self.move_to(cluster, position, &|alloc| alloc.take_before(old))? {
                    Moved::To(_) => *moved += 1,
                    Moved::NotThere => continue,
                    Moved::NoPlace => break,
                }
                progress.add_while(self.cluster, || !self.is_closing());
                self.flush_if_much()?;
            }
            if *moved == before {
                break;
            }
        }
        Ok(())
    }

    /// The clusters that lie at or behind byte `end` of the top's file, the last one first: where, and which.
    fn tail(&self, stack: &Stack, end: u64) -> Result<Vec<(u64, u64)>> {
        let top = stack.top();
        let bat_end = stack.geometry.bat_end();
        let (mut at, mut tail) = (HEADER_BYTES, Vec::new());
        while at < bat_end {
            let mut bytes = vec![0; (bat_end - at).min(BAT_PIECE) as usize];
            read_full(&*top.file, &mut bytes, at)
                .map_err(|e| Error::io_at(&e, &top.path, "cannot read the BAT", at))?;
            for (i, entry) in bytes.chunks_exact(4).enumerate() {
                let entry = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                let position = if entry == 0 { None } else { stack.geometry.position(entry) };
                if let Some(position) = position.filter(|position| *position >= end) {
                    tail.push((position, (at - HEADER_BYTES) / 4 + i as u64));
                }
            }
            at += bytes.len() as u64;
        }
        tail.sort_unstable_by(|a, b| b.cmp(a));
        Ok(tail)
    }

    /// Moves `cluster`, if it lies at byte `from`, to the file cluster that `place` takes.
    pub(super) fn move_to(
        &self,
        cluster: u64,
        from: u64,
        place: &dyn Fn(&Allocator) -> Option<u64>,
    ) -> Result<Moved> {
        loop {
            let _inside = self.enter_and_wait()?;
            self.lock_and_wait(cluster);
            let stack = self.stack();
            let moved = self.move_locked_to(&stack, cluster, from, place);
            self.unlock(cluster, LockMode::Exclusive);
            match moved? {
                Some(moved) => return Ok(moved),
                None => self.load_and_wait(&stack, cluster)?,
            }
        }
    }

    /// Steps 1 to 3. None: the page is missing.
    fn move_locked_to(
        &self,
        stack: &Stack,
        cluster: u64,
        from: u64,
        place: &dyn Fn(&Allocator) -> Option<u64>,
    ) -> Result<Option<Moved>> {
        let (Some(bat), top) = (&stack.bat, stack.top_index()) else { return Ok(Some(Moved::NotThere)) };
        if !bat.pin(cluster) {
            return Ok(None); // 1
        }
        let moved = if bat.lookup(cluster) == Lookup::Found(Place::At { level: top, position: from }) {
            self.move_pinned_to(stack, cluster, from, place)
        } else {
            Ok(Moved::NotThere)
        };
        bat.unpin(cluster);
        moved.map(Some)
    }

    fn move_pinned_to(
        &self,
        stack: &Stack,
        cluster: u64,
        from: u64,
        place: &dyn Fn(&Allocator) -> Option<u64>,
    ) -> Result<Moved> {
        let (Some(bat), top, alloc) = (&stack.bat, stack.top_index(), stack.allocator()) else {
            return Ok(Moved::NotThere);
        };
        let old = stack.geometry.file_cluster(from);
        let Some(free) = place(alloc) else { return Ok(Moved::NoPlace) };
        let to = stack.geometry.cluster_position(free);
        if let Err(e) = self.copy_cluster(stack, (top, from), to, self.cluster, 0..0) {
            alloc.give_back(free);
            return Err(self.copy_failed(stack, e)); // 2
        }
        self.touched(1);
        if bat.relocate(cluster, top, to, &alloc.unmapped(old..old + 1)) {
            self.bat_is_dirty(); // 3
        }
        Ok(Moved::To(free))
    }

    /// As many changes as fit into one round.
    pub(super) fn flush_if_much(&self) -> Result<()> {
        if self.flusher.is_over_bound() || self.engine.budget.dirty_full() {
            self.flush_now()
        } else {
            Ok(())
        }
    }

    /// Punches all free space of unknown content.
    pub(super) fn scrub_all(&self) -> Result<()> {
        loop {
            let inside = self.enter_and_wait()?;
            match self.stack().allocator().begin_scrub() {
                Scrubbing::Nothing => return Ok(()),
                Scrubbing::Ours => self.scrub(),
                Scrubbing::Theirs => {
                    drop(inside);
                    thread::sleep(LOOK);
                }
            }
        }
    }

    /// Step 5. Meanwhile no extension begins: it could make the file longer before this makes it shorter.
    fn cut_tail(&self) -> Result<()> {
        let stack = arc_swap::Guard::into_inner(self.stack());
        let (alloc, top) = (stack.allocator(), stack.top());
        let cut = loop {
            if self.is_closing() {
                return Err(self.closed_error());
            }
            match alloc.begin_cut() {
                Some(cut) => break cut,
                None => thread::sleep(LOOK),
            }
        };
        let end = stack.geometry.cluster_position(cut.end);
        let shorter = self.host.during(|| top.file.set_len(end));
        // What is allocated behind it later is zero only if the cut survives.
        let (waiting, done) = match shorter {
            Ok(()) => (self.sync_data(&stack), None),
            Err(e) => (Ok(()), Some(Error::io(&e, &top.path, "cannot cut off the free tail"))),
        };
        let failed = waiting.err().or(done);
        alloc.end_cut(cut, failed.is_none()).into_iter().for_each(|job| self.submit(job));
        failed.map_or(Ok(()), Err)
    }
}
