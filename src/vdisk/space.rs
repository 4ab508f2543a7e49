//! When the host is full: parked writes, the modes, the way back, and the low-water mark (docs/design.md#a-full-host).
//!
//! A pio parked for space holds no lock and is outside the gate: freeze, fsync and shutdown do not wait for it.
//! Every second, for as long as the image is full, the one that waits longest is tried again; when it gets through, all
//! others follow in order. Where nothing waits, the host itself is tried: a guest that only overwrites would never hear
//! that there is space again. Freed clusters wake what is parked at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Image;
use super::alloc::Alloc;
use super::engine::{Event, OnFull};
use super::pio::Pio;
use crate::error::{Error, Kind};
use crate::io::buffers::{PARKED, PARKED_OF_ONE};
use crate::io::file::write_zeroes;
use crate::sync::{Arc, AtomicBool, Mutex, MutexGuard, Ordering, lock};

/// How often the host is tried again: often enough that a person who frees space sees the guest go on at once.
const PROBE: Duration = Duration::from_secs(1);
/// Bytes for which room is looked for where no write asks: as large as writes are.
const LOOK: u64 = 1 << 20;

/// The space state of one image.
#[derive(Default)]
pub(super) struct Space {
    /// Copy of `State::full` for the fast path.
    full: AtomicBool,
    low: AtomicBool,
    /// A leaf.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    parked: VecDeque<Pio>,
    /// What they are to write, in bytes.
    bytes: u64,
    full: bool,
    /// The timeout has passed: writes fail until space is back.
    timed_out: bool,
    ticking: bool,
    /// A BAT write found no space, and none has worked since: data that finds some does not end the mode.
    bat: bool,
    /// Closed: nothing is parked any more.
    closed: bool,
}

impl State {
    /// What holds whenever the lock is free. `full`: the copy for the fast path.
    fn is_sound(&self, full: bool) -> bool {
        // The timeout looks at the head, and a wake-up begins there.
        let by_age = self.parked.iter().is_sorted_by_key(|pio| pio.parked);
        let bytes = self.bytes == self.parked.iter().map(Pio::bytes).sum::<u64>();
        // Each one is tried again by the clock, or fails with the close: else it waits for ever.
        let awaited = self.parked.is_empty() || self.ticking && !self.closed;
        by_age && bytes && awaited && self.full == full
    }
}

impl Space {
    fn state(&self) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        debug_assert!(state.is_sound(self.is_full()), "what is parked, and its counts");
        state
    }

    /// True while writes have failed for want of space since the last that worked.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// True when a full image fails writes instead of parking them.
    pub(super) fn fails(&self) -> bool {
        self.state().timed_out
    }

    /// Parked pios.
    pub(super) fn parked(&self) -> usize {
        self.state().parked.len()
    }
}

impl Image {
    /// The host, or the format's address range, has no room for `pio`: park it or fail it.
    pub(super) fn park(self: &Arc<Self>, mut pio: Pio) {
        pio.leave();
        let engine = &self.engine;
        let options = &engine.options;
        let mut state = self.space.state();
        let news = !state.full;
        state.full = true;
        self.space.full.store(true, Ordering::SeqCst);
        // At most a quarter of the connection's requests may be parked, a sixteenth per image, and their share of the memory
        // for what waits: the rest must stay free for reads and for other images.
        // One that was tried again in vain keeps its place, also where others came meanwhile.
        let bytes = pio.bytes();
        let fits = pio.parked.is_some()
            || state.parked.len() < (options.background / 16).max(1)
                && engine.parked.load(Ordering::SeqCst) < (options.background / 4).max(1)
                && state.bytes + bytes <= PARKED_OF_ONE
                && engine.parked_bytes.load(Ordering::SeqCst) + bytes <= PARKED;
        let queue = options.on_full == OnFull::Queue && !state.timed_out && !state.closed && fits;
        let tick = !state.ticking && !state.closed;
        state.ticking |= tick;
        let refused = if queue {
            engine.parked.fetch_add(1, Ordering::SeqCst);
            engine.parked_bytes.fetch_add(bytes, Ordering::SeqCst);
            state.bytes += bytes;
            match pio.parked {
                // Tried again in vain: back to its place. Many may come back at once, in any order, and the pio that
                // has waited longest must stay at the head: the timeout looks there.
                Some(since) => {
                    let place = state.parked.partition_point(|p| p.parked.is_some_and(|at| at <= since));
                    state.parked.insert(place, pio);
                }
                None => {
                    pio.parked = Some(Instant::now());
                    state.parked.push_back(pio);
                }
            }
            None
        } else {
            Some(pio)
        };
        drop(state);
        // Before the answer: who hears of it may ask for the reason.
        if news {
            engine.emit(Event::Full { image: self.name.clone() });
        }
        if let Some(pio) = refused {
            // What is not parked does not wait for a tick: the next write itself tries the host again.
            self.try_space_again();
            pio.finish(Err(self.no_space()));
        }
        if tick {
            self.tick_later();
        }
    }

    /// A BAT write found no space: the same mode as for data.
    pub(super) fn bat_is_full(self: &Arc<Self>) {
        let mut state = self.space.state();
        state.bat = true;
        let news = !std::mem::replace(&mut state.full, true);
        self.space.full.store(true, Ordering::SeqCst);
        drop(state);
        // What is dirty waits for this host; no other image waits for it.
        if self.stack().bat.as_ref().is_some_and(|bat| bat.set_apart(true)) {
            self.engine.pages_are_clean();
        }
        if news {
            self.engine.emit(Event::Full { image: self.name.clone() });
            // Allocations that wait for this round would wait inside the gate: they park instead.
            self.engine.no_clean_pages(self.id);
        }
    }

    /// A BAT write has waited long enough: the mode turns, as for any other write.
    pub(super) fn bat_timed_out(&self) {
        self.space.state().timed_out = true;
    }

    /// A BAT was written: ends the mode if want of space for it had begun or kept it.
    pub(super) fn bat_fits(self: &Arc<Self>) {
        if self.space.is_full() && std::mem::take(&mut self.space.state().bat) {
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
        let mut state = self.space.state();
        let timeout = self.engine.options.full_timeout;
        let late =
            |pio: &Pio| matches!((timeout, pio.parked), (Some(t), Some(since)) if since.elapsed() >= t);
        let mut failed = VecDeque::new();
        let mut probe = None;
        if state.parked.front().is_some_and(late) {
            // As dm-thin: the first timeout turns the mode, and everything queued fails with it.
            state.timed_out = true;
            failed = std::mem::take(&mut state.parked);
        } else {
            probe = state.parked.pop_front();
        }
        self.no_longer_parked(&mut state, failed.iter().chain(&probe));
        // A BAT that finds no space is tried again by its own rounds.
        let idle = state.full && !state.bat && probe.is_none();
        state.ticking = !state.parked.is_empty() || probe.is_some() || state.full && !state.closed;
        let again = state.ticking;
        drop(state);
        self.try_space_again();
        for pio in failed {
            // Not here: answering may block the clock.
            let e = self.no_space();
            self.submit(Box::new(move || pio.finish(Err(e))));
        }
        if let Some(pio) = probe {
            pio.come_back();
        } else if idle && again {
            let image = Arc::clone(self);
            self.engine.syncers.submit(self.id, Box::new(move || image.try_host()));
        }
        if again {
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
        if !probed || !self.space.is_full() {
            return;
        }
        let mut state = self.space.state();
        if state.bat {
            return;
        }
        let news = std::mem::take(&mut state.full);
        self.space.full.store(false, Ordering::SeqCst);
        state.timed_out = false;
        drop(state);
        self.wake_parked(usize::MAX);
        if news {
            self.engine.emit(Event::Space { image: self.name.clone() });
        }
    }

    /// Clusters were freed: up to `count` of those parked, who have waited longest, try again. No more than there are
    /// clusters: they run side by side, and one who came later would take what the first was woken for. When one gets
    /// through, all others follow.
    pub(super) fn wake_parked(self: &Arc<Self>, count: usize) {
        let parked: Vec<Pio> = {
            let mut state = self.space.state();
            let count = count.min(state.parked.len());
            let parked: Vec<Pio> = state.parked.drain(..count).collect();
            self.no_longer_parked(&mut state, parked.iter());
            parked
        };
        parked.into_iter().for_each(Pio::come_back);
    }

    fn no_longer_parked<'a>(&self, state: &mut State, pios: impl Iterator<Item = &'a Pio>) {
        let (count, bytes) = pios.fold((0, 0), |(count, bytes), pio| (count + 1, bytes + pio.bytes()));
        state.bytes -= bytes;
        let all = self.engine.parked.fetch_sub(count, Ordering::SeqCst);
        let all_bytes = self.engine.parked_bytes.fetch_sub(bytes, Ordering::SeqCst);
        // Below zero, no image would park a write any more.
        debug_assert!(all >= count && all_bytes >= bytes, "{count} of {all}, {bytes} of {all_bytes} bytes");
    }

    /// Fails everything parked, and parks nothing from now on: the image closes or is read-only.
    pub(super) fn fail_parked(self: &Arc<Self>, error: &Error) {
        let mut state = self.space.state();
        state.closed = true;
        let parked = std::mem::take(&mut state.parked);
        self.no_longer_parked(&mut state, parked.iter());
        drop(state);
        for pio in parked {
            pio.finish(Err(error.clone()));
        }
    }

    /// Raises the low-water event once when the host's free space is below the mark; re-armed 2 % above it, so
    /// that a level at the mark does not raise it again and again.
    pub(super) fn check_low_water(&self) {
        let percent = u128::from(self.engine.options.low_water);
        let Ok(space) = self.stack().top().file.space() else { return };
        let (free, total) = (u128::from(space.available) * 100, u128::from(space.total));
        if free < total * percent {
            if !self.space.low.swap(true, Ordering::SeqCst) {
                let (free, total) = (space.available, space.total);
                self.engine.emit(Event::LowWater { image: self.name.clone(), free, total });
            }
        } else if free > total * (percent + 2) {
            self.space.low.store(false, Ordering::SeqCst);
        }
    }

    /// True while free space is below the low-water mark.
    pub(super) fn is_low(&self) -> bool {
        self.space.low.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_do_not_fit_what_is_parked_are_not_sound() {
        assert!(State::default().is_sound(false));
        assert!(!State { bytes: 1, ..State::default() }.is_sound(false), "memory that stays taken for ever");
        assert!(
            !State { full: true, ..State::default() }.is_sound(false),
            "the fast path takes writes meanwhile"
        );
    }
}
