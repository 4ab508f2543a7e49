//! Discard and write-zeroes: the range reads as zero afterwards, and host space comes back.
//!
//! Whole clusters are unmapped and freed; a ragged end is punched in place. A long range goes in batches of
//! neighbours, one BAT page at most, and queues again behind other pios after each, so that it starves none of them.
//!
//! Where a lower level maps the cluster, unmapping would bring its data back: the top keeps (or gets) a mapped cluster
//! that is a hole in the file. A ragged end of a cluster that only a lower level maps is copied up without it.
//!
//! Order for whole clusters that only the top maps, under their exclusive locks:
//! 1. pin the BAT page;
//! 2. punch the file clusters, neighbours in one call;
//! 3. unmap the entries; the page remembers the file clusters as freed by its next durable copy;
//! 4. let the locks go.
//!
//! The clusters are reused only after that copy is durable (R4), so a crash between 2 and 3, or before the copy
//! is written, leaves an entry that names a hole: it reads as zero. 3 before 2 would let a failed punch leave
//! clusters that no entry names and no scrub finds. Punching after 4 would hit a cluster that is in use again.
//! A zero cluster over lower data is an allocation, in the order of `write`, without data.

use super::bat::page::Place;
use super::cow::Copied;
use super::gate::Inside;
use super::locks::LockMode;
use super::stack::Stack;
use super::{Image, Ready, Reply};
use crate::error::{Error, Result};
use crate::format::bat::{PAGE_SLOTS, slot_of};
use crate::io::file::write_zeroes;
use crate::ledger::deaths::Work;
use crate::ledger::running;
use crate::sync::Arc;

/// Clusters locked and punched at a time: bounds how long others wait, and is far below the lock stripes.
const BATCH: u64 = 128;

/// A running discard.
struct Discard {
    image: Arc<Image>,
    /// The transport's number of the request, for the ledger.
    number: Work,
    at: u64,
    end: u64,
    /// First cluster locked, and how many.
    held: (u64, u64),
    inside: Option<Inside>,
    reply: Option<Reply<()>>,
}

/// How far a batch came, in bytes of the disk.
enum Step {
    /// Done up to here.
    To(u64),
    /// Done up to here; what follows needs a file cluster.
    NeedsSpace(u64),
}

/// Begins; the range lies inside the disk.
pub(super) fn submit(image: &Arc<Image>, offset: u64, len: u64, reply: Reply<()>) {
    match image.gate.enter(1) {
        Some(inside) => {
            let (image, end) = (Arc::clone(image), offset + len);
            let held = (0, 0);
            let (number, inside) = (running::current(), Some(inside));
            Discard { image, number, at: offset, end, held, inside, reply: Some(reply) }.requeue();
        }
        None if image.is_closed() => reply(Err(image.closed_error())),
        None => {
            let again = Arc::clone(image);
            image.outside(Box::new(move || submit(&again, offset, len, reply)));
        }
    }
}

impl Discard {
    fn requeue(self) {
        let image = Arc::clone(&self.image);
        image.submit(Box::new(move || self.run()));
    }

    /// The next batch; holds no lock.
    fn run(mut self) {
        let _executing = running::begin(self.number);
        match self.image.ready() {
            Ready::No(e) => return self.finish(Err(e)),
            Ready::Unmarked => {
                let image = Arc::clone(&self.image);
                return image.mark_first(self, Discard::run, Discard::finish);
            }
            Ready::Yes => {}
        }
        if self.at >= self.end {
            // What waits for space waits for the round that frees these clusters (R4): not for the BAT's deadline.
            if self.image.space.is_full() {
                self.image.start_round();
            }
            return self.finish(Ok(()));
        }
        if self.image.gate.is_closed() {
            // A freeze waits for one batch, not for a whole disk.
            return self.start_over(|image, at, len, reply| submit(&image, at, len, reply));
        }
        let (image, cluster) = (Arc::clone(&self.image), self.at / self.image.cluster);
        image.with_cluster(cluster, LockMode::Exclusive, move || {
            let _executing = running::begin(self.number);
            self.held = (cluster, 1);
            self.locked();
        });
    }

    /// The first cluster is locked: takes what neighbours it can without waiting, and works.
    fn locked(mut self) {
        let image = Arc::clone(&self.image);
        let stack = image.stack();
        let first = self.held.0;
        // Only what is neither punched alone nor nothing dirties a page; which it is, the page knows.
        if stack.bat.as_ref().is_some_and(|bat| bat.crowded()) {
            return self.wait_for_clean_pages();
        }
        if let Some(bat) = &stack.bat
            && !bat.pin(first)
        {
            self.unlock();
            return image.with_page(first, self, Discard::run, Discard::finish); // 1
        }
        let whole = self.is_whole(first);
        if whole {
            while self.held.1 < BATCH && self.takes_next(&stack) {
                self.held.1 += 1;
            }
        }
        let result = if whole { self.whole_clusters(&stack) } else { self.part(&stack) };
        // Also where there was nothing to do, or a part was done: ext4 and XFS do so.
        image.stamp();
        if let Some(bat) = &stack.bat {
            bat.unpin(first);
        }
        self.unlock(); // 4
        match result {
            Err(e) => self.finish(Err(e)),
            Ok(Step::To(done)) => {
                self.at = done;
                self.requeue();
            }
            Ok(Step::NeedsSpace(done)) => {
                self.at = done;
                self.wait_for_space(&stack);
            }
        }
    }

    /// A file cluster is needed and none is ready: goes on when one is. It holds no lock; without space it fails.
    fn wait_for_space(self, stack: &Stack) {
        let image = Arc::clone(&self.image);
        let places = [self.companion(), self.companion()];
        image.when_space(stack, None, places, self, |discard, there| {
            if there {
                return discard.requeue();
            }
            let full = discard.image.no_space();
            discard.finish(Err(full));
        });
    }

    fn companion(&self) -> Option<Inside> {
        self.inside.as_ref().map(|inside| self.image.gate.enter_with(inside))
    }

    /// True when the range covers all of the cluster that belongs to the disk.
    fn is_whole(&self, cluster: u64) -> bool {
        let begin = cluster * self.image.cluster;
        self.at <= begin && (begin + self.image.cluster).min(self.image.size()) <= self.end
    }

    fn takes_next(&self, stack: &Stack) -> bool {
        let next = self.held.0 + self.held.1;
        let begin = next * self.image.cluster;
        begin < self.end
            && self.is_whole(next)
            && (stack.bat.is_none() || slot_of(next).0 == slot_of(self.held.0).0)
            && self.image.locks.try_lock(next, LockMode::Exclusive)
    }

    /// Where the held clusters lie, and which of them hide data of a lower level.
    fn places(&self, stack: &Stack) -> (Vec<Place>, Vec<bool>) {
        let (first, count) = self.held;
        let mut hides = vec![false; (count as usize).min(PAGE_SLOTS)];
        let places = match &stack.bat {
            Some(bat) => {
                let mut places = vec![Place::None; hides.len()];
                let found = bat.lookup_run(first, &mut places);
                debug_assert!(found, "the page is pinned");
                bat.hidden_run(first, &mut hides);
                // After the look-up: a page that was loaded from a level while it changed was loaded after this was set.
                if self.image.operations.lower_may_return() {
                    hides.fill(true);
                }
                places
            }
            None => (first..first + count).map(|c| stack.raw_place(c)).collect(),
        };
        (places, hides)
    }

    fn whole_clusters(&self, stack: &Stack) -> Result<Step> {
        let image = &self.image;
        let (first, top) = (self.held.0, stack.top_index());
        let (places, hides) = self.places(stack);
        let end_of = |i: usize| ((first + i as u64) * image.cluster).min(self.end);
        let mut i = 0;
        while i < places.len() {
            match places[i] {
                Place::None => i += 1,
                Place::Damaged => return Err(image.damaged_entry(first + i as u64)),
                Place::At { level, position } if level != top => {
                    let len = end_of(i + 1) - end_of(i);
                    image.changes_at(end_of(i), len);
                    if !stack.is_hole(level, position, len)? && !self.zero_cluster(stack, first + i as u64)? {
                        return Ok(Step::NeedsSpace(end_of(i).max(self.at)));
                    }
                    i += 1;
                }
                Place::At { position, .. } => {
                    let mut n = 1;
                    let next =
                        |n: usize| Place::At { level: top, position: position + n as u64 * image.cluster };
                    while places.get(i + n) == Some(&next(n)) && hides[i + n] == hides[i] {
                        n += 1;
                    }
                    self.own_clusters(stack, (first + i as u64, n), position, hides[i])?;
                    i += n;
                }
            }
        }
        Ok(Step::To(end_of(places.len())))
    }

    /// `run` = guest cluster and count, side by side in the top's file at `position`.
    fn own_clusters(&self, stack: &Stack, run: (u64, usize), position: u64, hides: bool) -> Result<()> {
        let image = &self.image;
        let mut len = run.1 as u64 * image.cluster;
        let begin = run.0 * image.cluster;
        image.changes_at(begin, len.min(image.size() - begin));
        if stack.bat.is_none() {
            len = len.min(image.size() - position);
        }
        let stays = stack.bat.is_none() || hides;
        image.punch(stack, position, len, stays)?; // 2
        if let Some(bat) = stack.bat.as_ref().filter(|_| !stays) {
            let first = stack.geometry.file_cluster(position);
            let freed = stack.allocator().unmapped(first..first + run.1 as u64);
            if bat.unmap(run.0, run.1, &freed) {
                image.bat_is_dirty(); // 3
            }
            if image.space.is_full() {
                image.start_round(); // A pio may be parked for these clusters.
            }
        }
        Ok(())
    }

    /// Puts a hole of the top over what a lower level maps. False: no file cluster is ready.
    fn zero_cluster(&self, stack: &Stack, cluster: u64) -> Result<bool> {
        let Some(position) = self.file_cluster(stack) else { return Ok(false) };
        self.enter(stack, cluster, position);
        Ok(true)
    }

    /// A file cluster that is known to be zero, if one is ready.
    fn file_cluster(&self, stack: &Stack) -> Option<u64> {
        stack.allocator().take_ready().map(|cluster| stack.geometry.cluster_position(cluster))
    }

    fn enter(&self, stack: &Stack, cluster: u64, position: u64) {
        let Some(bat) = &stack.bat else { unreachable!("a raw top has nothing below") };
        // The page is pinned by the batch; `set` takes one pin back.
        bat.pin(cluster);
        if bat.set(cluster, stack.top_index(), position) {
            self.image.bat_is_dirty();
        }
    }

    /// A ragged end, or a part of one cluster.
    fn part(&self, stack: &Stack) -> Result<Step> {
        let image = &self.image;
        let (cluster, begin) = (self.held.0, self.held.0 * image.cluster);
        let end = (begin + image.cluster).min(self.end);
        let (from, len) = (self.at - begin, end - self.at);
        let place = self.places(stack).0[0];
        if place != Place::None {
            image.changes_at(self.at, len);
        }
        match place {
            Place::None => {}
            Place::Damaged => return Err(image.damaged_entry(cluster)),
            Place::At { level, position } if level == stack.top_index() => {
                image.punch(stack, position + from, len, true)?;
            }
            Place::At { level, position } => {
                let Some(to) = self.file_cluster(stack) else { return Ok(Step::NeedsSpace(self.at)) };
                let cut = from..from + len;
                let copied =
                    image.copy_cluster(stack, (level, position), to, image.cluster_len(cluster), cut);
                let done = match copied {
                    Ok(Copied::Rest) => Ok(()),
                    Ok(Copied::Whole) => image.punch(stack, to + from, len, true),
                    Err(e) => Err(image.copy_failed(stack, e)),
                };
                if let Err(e) = done {
                    stack.allocator().give_back(stack.geometry.file_cluster(to));
                    return Err(e);
                }
                image.touched(1);
                self.enter(stack, cluster, to);
            }
        }
        Ok(Step::To(end))
    }

    /// Half of the BAT cache is dirty: what is left of the discard begins anew when there are clean pages. It waits
    /// outside the gate, like a write.
    fn wait_for_clean_pages(self) {
        self.start_over(|image, at, len, reply| {
            let again = Arc::clone(&image);
            let waiter = move |clean: bool| {
                if clean { submit(&again, at, len, reply) } else { reply(Err(again.no_space())) }
            };
            image.when_pages_are_clean(Box::new(waiter));
        });
    }

    /// Leaves, and calls `then` with what is left to do.
    fn start_over(mut self, then: impl FnOnce(Arc<Image>, u64, u64, Reply<()>)) {
        self.unlock();
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
        if let Some(reply) = self.reply.take() {
            then(Arc::clone(&self.image), self.at, self.end - self.at, reply);
        }
    }

    fn unlock(&mut self) {
        let (first, count) = std::mem::take(&mut self.held);
        for cluster in first..first + count {
            self.image.unlock(cluster, LockMode::Exclusive);
        }
    }

    fn finish(mut self, result: Result<()>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<()>) {
        self.unlock();
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
        if let Some(reply) = self.reply.take() {
            self.image.count_discard();
            reply(result);
        }
    }
}

impl Drop for Discard {
    /// Dropped unfinished (its runner panicked): answers EIO and keeps no lock.
    fn drop(&mut self) {
        self.end(Err(Error::new(crate::Kind::Io, "internal error: the request was dropped")));
    }
}

impl Image {
    /// Makes a range of the top's file read as zero. Where the host cannot punch: writes zeroes when `must_zero`,
    /// else leaves the content, which is then scrubbed before it is reused.
    pub(super) fn punch(
        self: &Arc<Self>,
        stack: &Stack,
        position: u64,
        len: u64,
        must_zero: bool,
    ) -> Result<()> {
        let top = stack.top();
        let punched = if self.host.can_punch() {
            self.host.during(|| top.file.punch(position, len))
        } else {
            Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP))
        };
        let done = match punched {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                if self.host.refuses_punches() {
                    log::warn!(
                        "{}: the host file system cannot punch holes; zeroes are written instead",
                        top.path.display()
                    );
                }
                if must_zero { write_zeroes(&*top.file, position, len) } else { Ok(()) }
            }
            other => other,
        };
        self.touched(1);
        done.map_err(|e| Error::io_at(&e, &top.path, format!("cannot punch {len} bytes"), position))
    }
}
