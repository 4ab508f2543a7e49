//! SEEK_DATA and SEEK_HOLE on the guest's disk: what the BAT maps, refined by the host file's own holes.

use super::Image;
use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::gate::Inside;
use super::stack::Stack;
use crate::error::{Error, Result};
use crate::sync::{Arc, mpsc};

/// A stay inside the gate, for threads that may wait.
pub(super) struct Visit<'a> {
    image: &'a Image,
    inside: Option<Inside>,
}

impl Visit<'_> {
    /// A place inside for work that this one starts and does not wait for.
    pub(super) fn companion(&self) -> Option<Inside> {
        self.inside.as_ref().map(|inside| self.image.gate.enter_with(inside))
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
    }
}

impl Image {
    /// First byte at or after `offset` that may hold data; None when only holes follow. Blocks: not for runners
    /// or transport threads.
    pub fn seek_data(self: &Arc<Self>, offset: u64) -> Result<Option<u64>> {
        let _inside = self.enter_and_wait()?;
        let stack = self.stack();
        let mut at = offset;
        while at < self.size() {
            let (begin, place) = self.place_at(&stack, at)?;
            let end = (begin + self.cluster).min(self.size());
            match place {
                Place::None => {}
                Place::Damaged => return Ok(Some(at)),
                Place::At { level, position } => {
                    let level = stack.level(level);
                    let from = position + (at - begin);
                    let found = level.file.seek_data(from).map_err(|e| self.seek_error(&e))?;
                    if let Some(data) = found.map(|d| begin + (d - position)).filter(|d| *d < end) {
                        return Ok(Some(data));
                    }
                }
            }
            at = end;
        }
        Ok(None)
    }

    /// First byte at or after `offset` that lies in a hole; the disk's end counts as one. Blocks.
    pub fn seek_hole(self: &Arc<Self>, offset: u64) -> Result<u64> {
        let _inside = self.enter_and_wait()?;
        let stack = self.stack();
        let mut at = offset;
        while at < self.size() {
            let (begin, place) = self.place_at(&stack, at)?;
            let end = (begin + self.cluster).min(self.size());
            match place {
                Place::None => return Ok(at),
                Place::Damaged => {}
                Place::At { level, position } => {
                    let level = stack.level(level);
                    let from = position + (at - begin);
                    let hole = level.file.seek_hole(from).map_err(|e| self.seek_error(&e))?;
                    // A raw base may end before the cluster does.
                    let hole = begin + (hole.max(from) - position);
                    if hole < end {
                        return Ok(hole);
                    }
                }
            }
            at = end;
        }
        Ok(self.size())
    }

    /// Enters the gate on a thread that may wait for it to open.
    pub(super) fn enter_and_wait(self: &Arc<Self>) -> Result<Visit<'_>> {
        loop {
            if let Some(inside) = self.gate.enter(1) {
                return Ok(Visit { image: self, inside: Some(inside) });
            }
            if self.is_closed() {
                return Err(self.closed_error());
            }
            let (tell, open) = mpsc::channel();
            self.outside(Box::new(move || {
                let _ = tell.send(());
            }));
            let _ = open.recv();
        }
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
