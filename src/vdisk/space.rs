//! What waits for space on a full host, and the mode that this is: parked pios, their counts, the timeout, the low-water
//! mark. What follows from a change of it is the image's (`full`).

use std::collections::VecDeque;
use std::time::Instant;

use super::engine::{Engine, OnFull};
use super::pio::Pio;
use crate::io::buffers::{PARKED, PARKED_OF_ONE};
use crate::io::file::HostSpace;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, lock};

/// The space state of one image.
#[derive(Default)]
pub(super) struct SpaceState {
    /// Copy of `State::full` for the fast path.
    full: AtomicBool,
    /// The low-water event was raised.
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

    /// These are parked no longer.
    fn uncount<'a>(&mut self, engine: &Engine, pios: impl Iterator<Item = &'a Pio>) {
        let (count, bytes) = pios.fold((0, 0), |(count, bytes), pio| (count + 1, bytes + pio.bytes()));
        self.bytes -= bytes;
        let all = engine.parked.fetch_sub(count, Ordering::SeqCst);
        let all_bytes = engine.parked_bytes.fetch_sub(bytes, Ordering::SeqCst);
        // Below zero, no image would park a write any more.
        debug_assert!(all >= count && all_bytes >= bytes, "{count} of {all}, {bytes} of {all_bytes} bytes");
    }
}

/// What parking a pio came to.
pub(super) struct Parking {
    /// The image was not full before.
    pub news: bool,
    /// The clock is to come, and does not yet.
    pub tick: bool,
    /// The pio, where it may not wait.
    pub refused: Option<Pio>,
}

/// What is due when the clock has come.
pub(super) struct Tick {
    /// What has waited too long.
    pub failed: VecDeque<Pio>,
    /// The one that has waited longest, to be tried.
    pub probe: Option<Pio>,
    /// Nothing waits: the host itself is tried.
    pub idle: bool,
    /// The clock comes again.
    pub again: bool,
}

impl SpaceState {
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

    fn set_full(&self, state: &mut State, full: bool) -> bool {
        self.full.store(full, Ordering::SeqCst);
        std::mem::replace(&mut state.full, full)
    }

    /// Parks `pio`, which is outside the gate and holds no lock; the image is full from now on.
    pub(super) fn park(&self, engine: &Engine, mut pio: Pio) -> Parking {
        let options = &engine.options;
        let mut state = self.state();
        let news = !self.set_full(&mut state, true);
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
        Parking { news, tick, refused }
    }

    /// A BAT write found no space. True: the image was not full before.
    pub(super) fn bat_is_full(&self) -> bool {
        let mut state = self.state();
        state.bat = true;
        !self.set_full(&mut state, true)
    }

    /// A BAT was written. True: one had found no space.
    pub(super) fn bat_fits(&self) -> bool {
        self.is_full() && std::mem::take(&mut self.state().bat)
    }

    /// Writes fail from now on, until there is space.
    pub(super) fn time_out(&self) {
        self.state().timed_out = true;
    }

    /// Data found space. None: that ends no mode. Else true: one has ended.
    pub(super) fn fits(&self) -> Option<bool> {
        if !self.is_full() {
            return None;
        }
        let mut state = self.state();
        if state.bat {
            return None;
        }
        state.timed_out = false;
        Some(self.set_full(&mut state, false))
    }

    /// Takes out up to `count` of those parked that have waited longest.
    pub(super) fn take(&self, engine: &Engine, count: usize) -> Vec<Pio> {
        let mut state = self.state();
        let count = count.min(state.parked.len());
        let parked: Vec<Pio> = state.parked.drain(..count).collect();
        state.uncount(engine, parked.iter());
        parked
    }

    /// Parks nothing from now on; takes out all.
    pub(super) fn close(&self, engine: &Engine) -> VecDeque<Pio> {
        let mut state = self.state();
        state.closed = true;
        let parked = std::mem::take(&mut state.parked);
        state.uncount(engine, parked.iter());
        parked
    }

    /// The clock has come: what has waited too long is taken out, else the one that has waited longest.
    pub(super) fn tick(&self, engine: &Engine) -> Tick {
        let mut state = self.state();
        let timeout = engine.options.full_timeout;
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
        state.uncount(engine, failed.iter().chain(&probe));
        // A BAT that finds no space is tried again by its own rounds.
        let idle = state.full && !state.bat && probe.is_none();
        state.ticking = !state.parked.is_empty() || probe.is_some() || state.full && !state.closed;
        Tick { failed, probe, idle, again: state.ticking }
    }

    /// The host has so much free space. True: it is below `percent` of all now, and was not. Re-armed 2 % above it, so that a
    /// level at the mark does not raise the event again and again.
    pub(super) fn is_low_now(&self, percent: u8, space: HostSpace) -> bool {
        let (free, total) = (u128::from(space.available) * 100, u128::from(space.total));
        let percent = u128::from(percent);
        if free < total * percent {
            return !self.low.swap(true, Ordering::SeqCst);
        }
        if free > total * (percent + 2) {
            self.low.store(false, Ordering::SeqCst);
        }
        false
    }

    /// True while free space is below the low-water mark.
    pub(super) fn is_low(&self) -> bool {
        self.low.load(Ordering::SeqCst)
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
