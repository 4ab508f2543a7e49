//! A full host (docs/design.md#a-full-host): what an image does when it becomes full, while it is, and when there is space
//! again. What is parked, and the mode, is `space`.
//!
//! A pio parked for space holds no lock and is outside the gate: freeze, fsync and shutdown do not wait for it.
//! Every second, for as long as the image is full, the one that waits longest is tried again; when it gets through, all
//! others follow in order. Where nothing waits, the host itself is tried: a guest that only overwrites would never hear
//! that there is space again. Freed clusters wake what is parked at once.

use std::time::{Duration, Instant};

use super::Image;
use super::alloc::Alloc;
use super::engine::ImageEvent;
use super::pio::Pio;
use crate::error::{Error, Kind};
use crate::io::file::write_zeroes;
use crate::sync::Arc;

/// How often the host is tried again: often enough that a person who frees space sees the guest go on at once.
const PROBE: Duration = Duration::from_secs(1);
/// Bytes for which room is looked for where no write asks: as large as writes are.
const LOOK: u64 = 1 << 20;

impl Image {
    /// The host, or the format's address range, has no room for `pio`: park it or fail it.
    pub(super) fn park(self: &Arc<Self>, mut pio: Pio) {
        pio.leave();
        let parking = self.space.park(&self.engine, pio);
        // Before the answer: a requester that gets it may ask for the reason.
        if parking.news {
            self.engine.emit(ImageEvent::Full { image: self.name.clone() });
        }
        if let Some(pio) = parking.refused {
            // What is not parked does not wait for a tick: the next write itself tries the host again.
            self.try_space_again();
            pio.finish(Err(self.no_space()));
        }
        if parking.tick {
            self.tick_later();
        }
    }

    /// A BAT write found no space: the same mode as for data.
    pub(super) fn bat_is_full(self: &Arc<Self>) {
        let news = self.space.bat_is_full();
        // What is dirty waits for this host; no other image waits for it.
        if self.stack().bat.as_ref().is_some_and(|bat| bat.set_apart(true)) {
            self.engine.pages_are_clean();
        }
        if news {
            self.engine.emit(ImageEvent::Full { image: self.name.clone() });
            // Allocations that wait for this round would wait inside the gate: they park instead.
            self.engine.no_clean_pages(self.id);
        }
    }

    /// A BAT write has waited long enough: the mode turns, as for any other write.
    pub(super) fn bat_timed_out(&self) {
        self.space.time_out();
    }

    /// A BAT was written: ends the mode if want of space for it had begun or kept it.
    pub(super) fn bat_fits(self: &Arc<Self>) {
        if self.space.bat_fits() {
            if let Some(bat) = &self.stack().bat {
                bat.set_apart(false);
            }
            self.space_worked(true);
        }
    }

    /// The error of a write that finds no space.
    pub(super) fn no_space(&self) -> Error {
        Error::at(Kind::NoSpace, self.path(), "the host file system is full; free space there")
    }

    fn tick_later(self: &Arc<Self>) {
        let image = Arc::downgrade(self);
        let job = move || {
            if let Some(image) = image.upgrade() {
                image.tick();
            }
        };
        self.engine.clock.at(Instant::now() + PROBE, Box::new(job));
    }

    /// On the clock's thread: fails what has waited too long, tries the one that waits longest.
    fn tick(self: &Arc<Self>) {
        let tick = self.space.tick(&self.engine);
        self.try_space_again();
        for pio in tick.failed {
            // Not here: answering may block the clock.
            let e = self.no_space();
            self.submit(Box::new(move || pio.finish(Err(e))));
        }
        if let Some(pio) = tick.probe {
            pio.come_back();
        } else if tick.idle && tick.again {
            let image = Arc::clone(self);
            self.engine.syncers.submit(self.id, Box::new(move || image.try_host()));
        }
        if tick.again {
            self.tick_later();
        }
    }

    /// Nothing waits for space: does the host have room? It is asked as a first write asks it, since what statfs says is
    /// not what a quota allows. What is written goes at once. Blocks.
    fn try_host(self: &Arc<Self>) {
        // A freeze, or the close: the next tick looks again.
        let Some(inside) = self.gate.enter(1) else { return };
        let stack = self.stack();
        let top = stack.top();
        let fits = match stack.state.allocator.get() {
            None => top.file.space().is_ok_and(|space| space.available >= self.cluster),
            Some(alloc) => {
                let places = [(); 2].map(|()| Some(self.gate.enter_with(&inside)));
                match self.take_cluster(&stack, None, places, (), |()| Box::new(|| ())) {
                    Alloc::Wait | Alloc::Full(()) => false,
                    Alloc::Got(cluster, ()) => {
                        let at = stack.geometry.cluster_position(cluster);
                        let fits = write_zeroes(&*top.file, at, self.cluster.min(LOOK));
                        // Where this fails, the scrub before its next use tries again.
                        let _ = top.file.punch(at, self.cluster);
                        alloc.give_back(cluster);
                        self.touched(1);
                        fits.is_ok()
                    }
                }
            }
        };
        self.gate.leave(inside);
        if fits {
            self.space_worked(true);
        }
    }

    /// A write found space. `probed`: it says something about space (an allocation, or a parked one), so that
    /// the mode goes back and everyone parked comes back, in order.
    pub(super) fn space_worked(self: &Arc<Self>, probed: bool) {
        if !probed {
            return;
        }
        let Some(news) = self.space.fits() else { return };
        self.wake_parked(usize::MAX);
        if news {
            self.engine.emit(ImageEvent::Space { image: self.name.clone() });
        }
    }

    /// Clusters were freed: up to `count` of those parked, which have waited longest, try again. No more than there are
    /// clusters: they run side by side, and one that came later would take what the first was woken for. When one gets
    /// through, all others follow.
    pub(super) fn wake_parked(self: &Arc<Self>, count: usize) {
        self.space.take(&self.engine, count).into_iter().for_each(Pio::come_back);
    }

    /// Fails everything parked, and parks nothing from now on: the image closes or is read-only.
    pub(super) fn fail_parked(self: &Arc<Self>, error: &Error) {
        for pio in self.space.close(&self.engine) {
            pio.finish(Err(error.clone()));
        }
    }

    /// Raises the low-water event once when the host's free space is below the mark.
    pub(super) fn check_low_water(&self) {
        let Ok(space) = self.stack().top().file.space() else { return };
        let (free, total) = (space.available, space.total);
        if self.space.is_low_now(self.engine.options.low_water, space) {
            self.engine.emit(ImageEvent::LowWater { image: self.name.clone(), free, total });
        }
    }
}
