//! Discard and write-zeroes: the range reads as zero afterwards, and host space comes back.
//!
//! Whole clusters are unmapped and freed; a ragged end is punched in place. A long range goes in batches of
//! neighbours, one BAT page at most, and queues again behind other pios after each, so that it starves nobody.
//!
//! Order for whole clusters, under their exclusive locks:
//! 1. pin the BAT page;
//! 2. punch the file clusters, neighbours in one call;
//! 3. unmap the entries; the page remembers the file clusters as freed by its next durable copy;
//! 4. let the locks go.
//!
//! The clusters are reused only after that copy is durable (R4), so a crash between 2 and 3, or before the copy
//! is written, leaves an entry that names a hole: it reads as zero. 3 before 2 would let a failed punch leave
//! clusters that nobody names and nobody scrubs. Punching after 4 would hit a cluster that is in use again.

use super::bat::cache::Loading;
use super::bat::page::Place;
use super::gate::Inside;
use super::locks::Mode;
use super::{Image, Ready, Reply};
use crate::error::{Error, Result};
use crate::format::bat::{PAGE_SLOTS, slot_of};
use crate::io::file::write_zeroes;
use crate::sync::{Arc, Ordering};

/// Clusters locked and punched at a time: bounds how long others wait, and is far below the lock stripes.
const BATCH: u64 = 128;

/// A running discard.
struct Discard {
    image: Arc<Image>,
    at: u64,
    end: u64,
    /// First cluster locked, and how many.
    held: (u64, u64),
    inside: Option<Inside>,
    reply: Option<Reply<()>>,
}

/// Begins; the range lies inside the disk.
pub fn submit(image: &Arc<Image>, offset: u64, len: u64, reply: Reply<()>) {
    match image.gate.enter(1) {
        Some(inside) => {
            let (image, end) = (Arc::clone(image), offset + len);
            let held = (0, 0);
            Discard { image, at: offset, end, held, inside: Some(inside), reply: Some(reply) }.requeue();
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
    fn run(self) {
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
        let (image, cluster) = (Arc::clone(&self.image), self.at / self.image.cluster);
        let queued = move |mut discard: Discard| -> super::runner::Job {
            discard.held = (cluster, 1);
            Box::new(move || discard.locked())
        };
        if let Some(mut discard) = image.locks.lock_or_queue(cluster, Mode::Exclusive, self, queued) {
            discard.held = (cluster, 1);
            discard.locked();
        }
    }

    /// The first cluster is locked: takes what neighbours it can without waiting, and works.
    fn locked(mut self) {
        let image = Arc::clone(&self.image);
        let first = self.held.0;
        if image.bat.is_some() && self.is_whole(first) && image.engine.budget.dirty_full() {
            return self.wait_for_clean_pages();
        }
        if let Some(bat) = &image.bat
            && !bat.pin(first)
        {
            return self.load_page(); // 1
        }
        let (done, result) = if self.is_whole(first) {
            while self.held.1 < BATCH && self.takes_next() {
                self.held.1 += 1;
            }
            (((first + self.held.1) * image.cluster).min(self.end), self.whole_clusters())
        } else {
            let end = ((first + 1) * image.cluster).min(self.end);
            (end, self.part(end))
        };
        if let Some(bat) = &image.bat {
            bat.unpin(first);
        }
        self.unlock(); // 4
        match result {
            Err(e) => self.finish(Err(e)),
            Ok(()) => {
                self.at = done;
                self.requeue();
            }
        }
    }

    /// True when the range covers all of the cluster that belongs to the disk.
    fn is_whole(&self, cluster: u64) -> bool {
        let begin = cluster * self.image.cluster;
        self.at <= begin && (begin + self.image.cluster).min(self.image.size()) <= self.end
    }

    fn takes_next(&self) -> bool {
        let next = self.held.0 + self.held.1;
        let begin = next * self.image.cluster;
        begin < self.end
            && self.is_whole(next)
            && (self.image.bat.is_none() || slot_of(next).0 == slot_of(self.held.0).0)
            && self.image.locks.try_lock(next, Mode::Exclusive)
    }

    fn places(&self) -> Vec<Place> {
        let (first, count) = self.held;
        let image = &self.image;
        match &image.bat {
            Some(bat) => {
                let mut places = vec![Place::None; (count as usize).min(PAGE_SLOTS)];
                let found = bat.lookup_run(first, &mut places);
                debug_assert!(found, "the page is pinned");
                places
            }
            None => {
                (first..first + count).map(|c| Place::At { level: 0, position: c * image.cluster }).collect()
            }
        }
    }

    fn whole_clusters(&self) -> Result<()> {
        let image = &self.image;
        let places = self.places();
        let mut i = 0;
        while i < places.len() {
            let position = match places[i] {
                Place::None => {
                    i += 1;
                    continue;
                }
                Place::Damaged => return Err(image.damaged_entry(self.held.0 + i as u64)),
                Place::At { position, .. } => position,
            };
            let mut n = 1;
            while matches!(places.get(i + n), Some(Place::At { position: p, .. })
                if *p == position + n as u64 * image.cluster)
            {
                n += 1;
            }
            let mut len = n as u64 * image.cluster;
            if image.bat.is_none() {
                len = len.min(image.size() - position);
            }
            image.punch(position, len, image.bat.is_none())?; // 2
            if let Some(bat) = &image.bat {
                let first = image.geometry.file_cluster(position);
                let freed: Vec<u64> = (first..first + n as u64).collect();
                if bat.unmap(self.held.0 + i as u64, n, &freed) {
                    image.bat_is_dirty(); // 3
                }
                if image.space.is_full() {
                    image.start_round(); // Somebody may be parked for these clusters.
                }
            }
            i += n;
        }
        Ok(())
    }

    /// A ragged end, in a cluster that stays mapped.
    fn part(&self, end: u64) -> Result<()> {
        let image = &self.image;
        match self.places()[0] {
            Place::None => Ok(()),
            Place::Damaged => Err(image.damaged_entry(self.held.0)),
            Place::At { position, .. } => {
                image.punch(position + self.at % image.cluster, end - self.at, true)
            }
        }
    }

    /// Half of the BAT cache is dirty: what is left of the discard begins anew when there are clean pages. It waits
    /// outside the gate, like a write.
    fn wait_for_clean_pages(mut self) {
        self.unlock();
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
        let (image, at, len) = (Arc::clone(&self.image), self.at, self.end - self.at);
        let Some(reply) = self.reply.take() else { return };
        let waiter = move |clean: bool| {
            if clean { submit(&image, at, len, reply) } else { reply(Err(image.no_space())) }
        };
        self.image.wait_for_clean_pages(Box::new(waiter));
    }

    fn load_page(mut self) {
        self.unlock();
        let (image, cluster) = (Arc::clone(&self.image), self.at / self.image.cluster);
        let Some(bat) = &image.bat else { return self.run() };
        match bat.load_or_queue(cluster, self, |discard: Discard| Box::new(move || discard.run())) {
            Loading::Queued => {}
            Loading::Loaded(discard) => discard.run(),
            Loading::Mine(discard) => {
                let (waiting, loaded) = bat.load(cluster, &image.levels);
                waiting.into_iter().for_each(|job| image.submit(job));
                match loaded {
                    Ok(()) => discard.run(),
                    Err(e) => discard.finish(Err(e)),
                }
            }
        }
    }

    fn unlock(&mut self) {
        let (first, count) = std::mem::take(&mut self.held);
        for cluster in first..first + count {
            self.image.unlock(cluster, Mode::Exclusive);
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
    fn punch(self: &Arc<Self>, position: u64, len: u64, must_zero: bool) -> Result<()> {
        let top = self.top();
        let punched = if self.cannot_punch.load(Ordering::SeqCst) {
            Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP))
        } else {
            // Writers on transport threads would wait for the host's inode lock: they go to runners meanwhile.
            self.host_busy.fetch_add(1, Ordering::SeqCst);
            let punched = top.file.punch(position, len);
            self.host_busy.fetch_sub(1, Ordering::SeqCst);
            punched
        };
        let done = match punched {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                if !self.cannot_punch.swap(true, Ordering::SeqCst) {
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
        done.map_err(|e| Error::io(&e, &top.path, format!("cannot punch {len} bytes at byte {position}")))
    }
}
