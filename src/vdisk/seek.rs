//! SEEK_DATA and SEEK_HOLE on the guest's disk: what the BAT maps, refined by the host file's own holes.

use std::ops::Range;

use super::Image;
use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::locks::LockMode;
use super::stack::Stack;
use crate::error::{Error, Result};
use crate::format::bat::{PAGE_SLOTS, slot_of};
use crate::sync::Arc;

impl Image {
    /// First byte at or after `offset` that may hold data; None when only holes follow. Blocks: not for runners
    /// or transport threads.
    pub fn seek_data(self: &Arc<Self>, offset: u64) -> Result<Option<u64>> {
        self.walk(offset, |stack, at, cluster, place| {
            let (level, position) = match place {
                Place::None => return Ok(None),
                Place::Damaged => return Ok(Some(at)),
                Place::At { level, position } => (level, position),
            };
            let from = position + (at - cluster.start);
            let found = stack.level(level).file.seek_data(from).map_err(|e| self.seek_error(&e))?;
            Ok(found.map(|data| cluster.start + (data - position)).filter(|data| *data < cluster.end))
        })
    }

    /// First byte at or after `offset` that lies in a hole; the disk's end counts as one. Blocks.
    pub fn seek_hole(self: &Arc<Self>, offset: u64) -> Result<u64> {
        let found = self.walk(offset, |stack, at, cluster, place| {
            let (level, position) = match place {
                Place::None => return Ok(Some(at)),
                Place::Damaged => return Ok(None),
                Place::At { level, position } => (level, position),
            };
            let from = position + (at - cluster.start);
            let hole = stack.level(level).file.seek_hole(from).map_err(|e| self.seek_error(&e))?;
            // A raw base may end before the cluster does.
            Ok(Some(cluster.start + (hole.max(from) - position)).filter(|hole| *hole < cluster.end))
        })?;
        Ok(found.unwrap_or_else(|| self.size().max(offset)))
    }

    /// Asks `look` from `offset` on, cluster by cluster, until it finds something: it gets the first byte to look at, the
    /// bytes of the cluster, and its place. Leaves the gate after each BAT page, so that a freeze does not last as long
    /// as the disk is large; what it says of a page was so at one moment of the walk.
    fn walk(
        self: &Arc<Self>,
        offset: u64,
        look: impl Fn(&Stack, u64, Range<u64>, Place) -> Result<Option<u64>>,
    ) -> Result<Option<u64>> {
        let mut at = offset;
        while at < self.size() {
            let _inside = self.enter_and_wait()?;
            let stack = self.stack();
            // Inside the gate it does not change.
            let size = self.size();
            let Some(bat) = &stack.bat else {
                // One piece, and the host's walk.
                return look(&stack, at, 0..size, stack.raw_place(0));
            };
            let first = at / self.cluster;
            let (_, slot) = slot_of(first);
            let count = (PAGE_SLOTS - slot).min((size.div_ceil(self.cluster) - first) as usize);
            let mut places = vec![Place::None; count];
            while !bat.lookup_run(first, &mut places) {
                self.load_and_wait(&stack, first)?;
            }
            for (cluster, place) in (first..).zip(places) {
                let begin = cluster * self.cluster;
                let bytes = begin..(begin + self.cluster).min(size);
                at = at.max(begin);
                let found = match place {
                    Place::At { .. } => {
                        self.at_rest(&stack, cluster, |place| look(&stack, at, bytes.clone(), place))?
                    }
                    place => look(&stack, at, bytes.clone(), place)?,
                };
                if found.is_some() {
                    return Ok(found);
                }
                at = bytes.end;
            }
        }
        Ok(None)
    }

    /// Calls `look` with the place of a cluster that is not moved meanwhile: the place that it leaves becomes a hole.
    fn at_rest<T>(
        self: &Arc<Self>,
        stack: &Stack,
        cluster: u64,
        look: impl FnOnce(Place) -> Result<T>,
    ) -> Result<T> {
        let mode = if self.locks.try_lock(cluster, LockMode::Shared) {
            LockMode::Shared
        } else {
            self.lock_and_wait(cluster);
            LockMode::Exclusive
        };
        // A load waits for no cluster's lock.
        let result = self.place_at(stack, cluster * self.cluster).and_then(|(_, place)| look(place));
        self.unlock(cluster, mode);
        result
    }

    pub(super) fn seek_error(&self, e: &std::io::Error) -> Error {
        Error::io(e, self.path(), "cannot find holes")
    }

    /// First byte of the guest cluster that holds `at`, and its place; loads the BAT page when needed.
    pub(super) fn place_at(self: &Arc<Self>, stack: &Stack, at: u64) -> Result<(u64, Place)> {
        let cluster = at / self.cluster;
        loop {
            if let Lookup::Found(place) = stack.place(cluster) {
                return Ok((cluster * self.cluster, place));
            }
            self.load_and_wait(stack, cluster)?;
        }
    }
}
