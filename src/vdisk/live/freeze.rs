//! The short moment in which an image stands still: everything durable, no pio inside, the stack may be swapped.

use std::time::Instant;

use super::super::operations::Operating;
use super::super::stack::Stack;
use super::super::{Image, Stage};
use crate::error::{Error, Result};
use crate::sync::{Arc, Ordering};

/// Unsynced bytes below which the freeze begins: the last sync, inside it, then takes a few milliseconds on any disk.
const LITTLE: u64 = 1 << 20;
/// Syncs before the freeze: a writer that is faster than the disk leaves as much after each, and is not waited for
/// for ever. From the second on, only what came during the last one is left.
const SYNCS: u32 = 6;

/// What a commit came to that did not succeed.
#[derive(Debug)]
pub enum Uncommitted {
    /// Nothing has changed.
    NotDone(Error),
    /// The rename happened, but whether it is durable is not known: the image may not go on being written (R8).
    Unknown(Error),
}

impl From<Error> for Uncommitted {
    fn from(e: Error) -> Uncommitted {
        Uncommitted::NotDone(e)
    }
}

/// An image that an operation has frozen; dropping it thaws.
pub(in crate::vdisk) struct Frozen<'a> {
    image: &'a Arc<Image>,
    since: Instant,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.image.thaw();
        // What a guest felt of the operation.
        log::info!("{}: stood still for {:.1} ms", self.image.name, self.since.elapsed().as_secs_f64() * 1e3);
    }
}

impl Frozen<'_> {
    /// Makes `next` the image's stack. Only while everything is durable. Returns the old one.
    pub(in crate::vdisk) fn swap(&self, next: Stack) -> Arc<Stack> {
        let image = self.image;
        // A round begun before would take what is written from now on for the old top's.
        image.flusher.between_rounds(|| {
            image.size.store(next.geometry.disk, Ordering::Release);
            image.stack.swap(Arc::new(next))
        })
    }
}

impl Operating<'_> {
    /// Freezes with everything durable:
    /// 1. outside the freeze: sync until little is left;
    /// 2. close the gate and wait for what is inside;
    /// 3. sync the rest: BAT pages and data.
    ///
    /// Without 1 the guest would stand still for as long as the disk needs for all unsynced data.
    pub(in crate::vdisk) fn freeze_durably(&self) -> Result<Frozen<'_>> {
        self.sync_until_little()?; // 1
        let since = Instant::now();
        self.freeze(); // 2
        let frozen = Frozen { image: self, since };
        if self.stage() != Stage::ReadOnly {
            self.flush_now()?; // 3
        }
        Ok(frozen)
    }

    /// Syncs until little is left to sync: what closes the gate behind this waits for no disk that is busy with the writes
    /// of the last minutes.
    pub(in crate::vdisk) fn sync_until_little(&self) -> Result<()> {
        for _ in 0..SYNCS {
            self.flush_now()?;
            if self.flusher.unsynced() < LITTLE {
                break;
            }
        }
        Ok(())
    }

    /// Carries out the point of no return of an operation; where it is not known what is on disk, the image is
    /// read-only from then on.
    pub(in crate::vdisk) fn commit(
        &self,
        commit: impl FnOnce() -> std::result::Result<(), Uncommitted>,
    ) -> Result<()> {
        commit().map_err(|e| match e {
            Uncommitted::NotDone(e) => e,
            Uncommitted::Unknown(e) => {
                self.fail(&e);
                e
            }
        })
    }
}
