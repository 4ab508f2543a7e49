//! Pulling one lower level up into the top: every cluster that the image reads from there is copied, one at a time,
//! under its own lock, while I/O goes on. What the guest overwrites meanwhile needs no copy any more.

use crate::error::Result;
use crate::format::bat::{PAGE_SLOTS, cluster_of, slot_of};
use crate::progress::Progress;
use crate::vdisk::bat::cache::Lookup;
use crate::vdisk::bat::page::Place;
use crate::vdisk::locks::LockMode;
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::Stack;

/// What one attempt at a cluster came to.
enum Attempt {
    /// Copied: so many bytes.
    Copied(u64),
    /// The top has it, or no level has.
    Nothing,
    /// Something had to be waited for; it is there now.
    Again,
}

impl Operating<'_> {
    /// Copies what is read from level `index` into the top. Blocks; not for runners. The image is marked in use, and
    /// `index` is no longer read from when this returns.
    pub(in crate::vdisk) fn pull_up(&self, index: u16, progress: &Progress) -> Result<()> {
        let clusters = self.stack().geometry.clusters();
        let mut cluster = 0;
        while cluster < clusters {
            progress.check()?;
            for cluster in self.read_from(cluster, clusters, index)? {
                loop {
                    progress.check()?;
                    if self.is_closing() {
                        return Err(self.closed_error());
                    }
                    match self.pull_cluster(cluster, index)? {
                        Attempt::Again => continue,
                        Attempt::Nothing => break,
                        Attempt::Copied(bytes) => {
                            progress.add_while(bytes, || !self.is_closing());
                            break;
                        }
                    }
                }
                if self.flusher.is_over_bound() || self.engine.budget.dirty_full() {
                    self.flush_now()?;
                }
            }
            let (page, _) = slot_of(cluster);
            cluster = cluster_of(page + 1, 0).unwrap_or(clusters);
        }
        Ok(())
    }

    /// The clusters of the page of `first`, from there on, that are read from level `index`.
    fn read_from(&self, first: u64, clusters: u64, index: u16) -> Result<Vec<u64>> {
        let _inside = self.enter_and_wait()?;
        let stack = self.stack();
        let Some(bat) = &stack.bat else { return Ok(Vec::new()) };
        let (_, slot) = slot_of(first);
        let mut places = vec![Place::None; (PAGE_SLOTS - slot).min((clusters - first) as usize)];
        while !bat.lookup_run(first, &mut places) {
            self.load_and_wait(&stack, first)?;
        }
        let of_level = |(i, place): (usize, &Place)| match place {
            Place::At { level, .. } if *level == index => Some(first + i as u64),
            // Its copy fails and says why: a level that goes takes with it what could not be read.
            Place::Damaged => Some(first + i as u64),
            _ => None,
        };
        Ok(places.iter().enumerate().filter_map(of_level).collect())
    }

    /// One cluster, in the order of a copy on write (`write`), without a write.
    fn pull_cluster(&self, cluster: u64, index: u16) -> Result<Attempt> {
        let visit = self.enter_and_wait()?;
        self.lock_and_wait(cluster);
        let stack = self.stack();
        let attempt = self.pull_locked(&stack, cluster, index);
        self.unlock(cluster, LockMode::Exclusive);
        let Ok(Attempt::Again) = attempt else { return attempt };
        // Without the lock: a page, or space.
        self.load_and_wait(&stack, cluster)?;
        drop(visit);
        self.wait_for_space(None)?;
        Ok(Attempt::Again)
    }

    fn pull_locked(&self, stack: &Stack, cluster: u64, index: u16) -> Result<Attempt> {
        let (Some(bat), top) = (&stack.bat, stack.top_index()) else { return Ok(Attempt::Nothing) };
        let from = match bat.lookup_to_allocate(cluster, top) {
            Lookup::Miss => return Ok(Attempt::Again),
            Lookup::Found(Place::At { level, position }) if level == index => position,
            Lookup::Found(Place::At { level, .. }) if level == top => return Ok(Attempt::Nothing),
            Lookup::Found(Place::Damaged) => return Err(self.damaged_entry(cluster)),
            Lookup::Found(_) => {
                bat.unpin(cluster);
                return Ok(Attempt::Nothing);
            }
        };
        let len = self.cluster_len(cluster);
        // A hole of the base hides nothing, and need not become one of the top; a hole of any other level does.
        let base = stack.is_base(index);
        let skip = base.then(|| stack.is_hole(index, from, len)).transpose();
        if !matches!(skip, Ok(None | Some(false))) {
            bat.unpin(cluster);
            return skip.map(|_| Attempt::Nothing);
        }
        let Some(file_cluster) = stack.allocator().take_ready() else {
            bat.unpin(cluster);
            return Ok(Attempt::Again);
        };
        let to = stack.geometry.cluster_position(file_cluster);
        if let Err(e) = self.copy_cluster(stack, (index, from), to, len, 0..0) {
            bat.unpin(cluster);
            stack.allocator().give_back(file_cluster);
            return Err(self.copy_failed(stack, e));
        }
        self.touched(1);
        if bat.set(cluster, top, to) {
            self.bat_is_dirty();
        }
        Ok(Attempt::Copied(len))
    }
}
