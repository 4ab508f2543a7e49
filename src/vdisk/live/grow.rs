//! Making the disk larger: the BAT grows over the first data clusters, which are moved out of its way.

use crate::error::{Error, Kind, Result};
use crate::format::header::{Geometry, HEADER_BYTES, Header};
use crate::io::file::{read_full, write_full, write_zeroes};
use crate::progress::Progress;
use crate::sync::{Arc, lock};
use crate::vdisk::Image;
use crate::vdisk::bat::cache::Lookup;
use crate::vdisk::bat::page::Place;
use crate::vdisk::locks::LockMode;
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::{Stack, TopState};

/// Bytes of BAT read at a time.
const PIECE: u64 = 1 << 20;

impl Image {
    /// Grows the disk to `size` bytes, rounded up to a cluster (raw: to a sector). Returns the new size:
    /// 1. the file clusters that the longer BAT needs are taken out of circulation, and each pio that had got one of
    ///    them has finished;
    /// 2. each of them that is in use is copied elsewhere under its guest cluster's lock, and its entry changed;
    /// 3. the changed entries are durable;
    /// 4. the new BAT area is zeroed, all of it, and the old last cluster behind the old end of the disk; durable;
    /// 5. freeze;
    /// 6. the header says the new size; one sector, durable: the point of no return;
    /// 7. swap the stack, thaw. The caller then writes the descriptor.
    ///
    /// 4 before 3: a power cut would find old entries that name zeroed clusters. 6 before 4: old data would be read
    /// as entries. A crash before 6 leaves the old size and a few clusters in other places.
    ///
    /// Blocks; not for runners or transport threads.
    pub fn grow(self: &Arc<Self>, size: u64, progress: &Progress) -> Result<u64> {
        let operating = self.begin_operation()?;
        if size < self.size() {
            let context = format!(
                "the disk has {} bytes, and {size} would cut off what the guest keeps there; it is not made smaller",
                self.size()
            );
            return Err(Error::at(Kind::Invalid, self.shown(), context));
        }
        // As large as it is: also where that is no whole cluster.
        if size == self.size() {
            return Ok(size);
        }
        let unit = if self.has_map() { self.cluster } else { 512 };
        let too_large = || Error::at(Kind::Invalid, self.shown(), "the size is too large for this image");
        let size = size.checked_next_multiple_of(unit).ok_or_else(too_large)?;
        self.mark_and_wait()?;
        let stack = arc_swap::Guard::into_inner(self.stack());
        let old = stack.geometry;
        if stack.bat.is_none() {
            return operating.grow_raw(&stack, size);
        }
        if size == self.size() {
            return Ok(size);
        }
        let header = lock(&stack.state.header).ok_or_else(|| self.closed_error())?;
        let header = header.grown(size).map_err(|e| Error::at(Kind::Invalid, self.shown(), e.to_string()))?;
        let new = header.geometry();
        let reserved = (new.first - old.first) / self.cluster;
        stack.allocator().reserve(reserved); // 1
        operating.sync_until_little()?;
        self.freeze();
        self.thaw();
        operating.move_out(&stack, new.first, progress)?; // 2
        self.flush_now()?; // 3
        operating.prepare_area(&stack, &old, &new)?; // 4
        let frozen = operating.freeze_durably()?; // 5
        let header = {
            let mut current = lock(&stack.state.header);
            let h = current.as_mut().ok_or_else(|| self.closed_error())?;
            // As it is at this moment (R5), with the four fields of the size.
            let next = Header { in_use: h.in_use, flags: h.flags, extension: h.extension, ..header };
            let file = &*stack.top().file;
            write_full(file, &next.encode(), 0).and_then(|()| file.sync_data()).map_err(|e| {
                let e = Error::io(&e, &stack.top().path, "cannot write the new size");
                self.fail(&e);
                e
            })?; // 6
            *h = next;
            next
        };
        let state = TopState::default();
        *lock(&state.header) = Some(header);
        let moved = stack.allocator().moved_up(reserved, new.file_clusters());
        let _ = state.allocator.set(moved);
        operating.tracking_grows(size);
        frozen.swap(stack.grown(header, state, &self.engine.budget)); // 7
        self.stamp();
        Ok(size)
    }

    /// A write behind the end of a raw disk that the kernel passes through makes the file longer without a request to
    /// us: the disk is as long as that from now on. Blocks; not for runners or transport threads.
    pub fn follow_file(self: &Arc<Self>) -> Result<()> {
        let operating = self.wait_to_operate();
        if self.is_closing() {
            return Err(self.closed_error());
        }
        let stack = arc_swap::Guard::into_inner(self.stack());
        let len = self.host_status().map_err(|e| Error::io(&e, self.path(), "cannot look at the file"))?.len;
        if stack.bat.is_none() && len > self.size() {
            let frozen = operating.freeze_durably()?;
            frozen.swap(stack.grown_raw(len));
        }
        Ok(())
    }
}

impl Operating<'_> {
    /// A raw disk is as long as its file.
    fn grow_raw(&self, stack: &Stack, size: u64) -> Result<u64> {
        if size == self.size() {
            return Ok(size);
        }
        let top = stack.top();
        let frozen = self.freeze_durably()?;
        top.file
            .set_len(size)
            .and_then(|()| top.file.sync_all())
            .map_err(|e| Error::io(&e, &top.path, "cannot make the file longer"))?;
        frozen.swap(stack.grown_raw(size));
        self.stamp();
        Ok(size)
    }

    /// Step 2: moves every cluster of the top that lies before byte `first` of its file.
    fn move_out(&self, stack: &Stack, first: u64, progress: &Progress) -> Result<()> {
        let top = stack.top();
        // What is in the cache only was allocated behind the reserved part, or is found by the look-up below.
        self.flush_now()?;
        let end = stack.geometry.bat_end();
        let mut at = HEADER_BYTES;
        while at < end {
            let mut bytes = vec![0; (end - at).min(PIECE) as usize];
            read_full(&*top.file, &mut bytes, at)
                .map_err(|e| Error::io_at(&e, &top.path, "cannot read the BAT", at))?;
            for (i, entry) in bytes.chunks_exact(4).enumerate() {
                let entry = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                let in_the_way = entry != 0 && stack.geometry.position(entry).is_some_and(|p| p < first);
                if in_the_way {
                    progress.check()?;
                    self.move_cluster((at - HEADER_BYTES) / 4 + i as u64, first)?;
                    progress.add_while(self.cluster, || !self.is_closing());
                }
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    fn move_cluster(&self, cluster: u64, first: u64) -> Result<()> {
        loop {
            if self.is_closing() {
                return Err(self.closed_error());
            }
            let visit = self.enter_and_wait()?;
            self.lock_and_wait(cluster);
            let stack = self.stack();
            let moved = self.move_locked(&stack, cluster, first);
            self.unlock(cluster, LockMode::Exclusive);
            if moved? {
                return Ok(());
            }
            self.load_and_wait(&stack, cluster)?;
            drop(visit);
            self.wait_for_space(None)?;
        }
    }

    /// False: the page or a file cluster is missing.
    fn move_locked(&self, stack: &Stack, cluster: u64, first: u64) -> Result<bool> {
        let Some(bat) = &stack.bat else { return Ok(true) };
        let top = stack.top_index();
        if !bat.pin(cluster) {
            return Ok(false);
        }
        let result = match bat.lookup(cluster) {
            Lookup::Found(Place::At { level, position }) if level == top && position < first => {
                let Some(free) = stack.allocator().take_ready() else {
                    bat.unpin(cluster);
                    return Ok(false);
                };
                let to = stack.geometry.cluster_position(free);
                match self.copy_cluster(stack, (top, position), to, self.cluster, 0..0) {
                    Ok(_) => {
                        self.touched(1);
                        if bat.relocate(cluster, top, to, &[]) {
                            self.bat_is_dirty();
                        }
                        Ok(true)
                    }
                    Err(e) => {
                        stack.allocator().give_back(free);
                        Err(self.copy_failed(stack, e))
                    }
                }
            }
            // Moved or discarded since.
            _ => Ok(true),
        };
        bat.unpin(cluster);
        result
    }

    /// Step 4.
    fn prepare_area(&self, stack: &Stack, old: &Geometry, new: &Geometry) -> Result<()> {
        let top = stack.top();
        let io = |e: std::io::Error| Error::io(&e, &top.path, "cannot prepare the longer BAT");
        let (from, to) = (old.bat_end(), new.first);
        if to > from {
            // Written, not punched: the BAT must never run out of space later (R2).
            write_zeroes(&*top.file, from, to - from).map_err(io)?;
        }
        let partial = old.disk % old.cluster;
        if partial != 0 {
            let last = old.disk / old.cluster;
            let visit = self.enter_and_wait()?;
            self.lock_and_wait(last);
            let zeroed = self.zero_behind(stack, last, partial);
            self.unlock(last, LockMode::Exclusive);
            drop(visit);
            zeroed?;
        }
        self.touched(1);
        self.flush_now()
    }

    /// Makes the last, partial cluster read as zero behind the old end of the disk.
    fn zero_behind(&self, stack: &Stack, last: u64, from: u64) -> Result<()> {
        let Some(bat) = &stack.bat else { return Ok(()) };
        let place = loop {
            match bat.lookup(last) {
                Lookup::Found(place) => break place,
                Lookup::Miss => self.load_and_wait(stack, last)?,
            }
        };
        if let Place::At { level, position } = place
            && level == stack.top_index()
        {
            let top = stack.top();
            write_zeroes(&*top.file, position + from, self.cluster - from)
                .map_err(|e| Error::io(&e, &top.path, "cannot clear the last cluster"))?;
        }
        Ok(())
    }
}
