//! fsync as rounds, one round for all who wait (R6), and what a failed sync means (R7).
//!
//! **R6** fsync returns after data and BAT are durable, the data first wherever R3 asks for it. An fsync waits for the
//! first round that starts after it arrived; it never joins a running one; at most one running and one waiting round.
//! O_SYNC and O_DSYNC writes likewise (the kernel sends no fsync for them).
//!
//! A round, on a thread of its own:
//! 1. under each dirty page's lock, copy the top's own entries;
//! 2. fdatasync: the data of every copied entry, and every punched hole, is durable, and so is the file's length; left out
//!    where no copied entry needs it;
//! 3. write the copies (`bat::writeback`);
//! 4. fdatasync;
//! 5. pages are clean, freed clusters may be reused (R4), waiters are answered.
//!
//! 2 before 1 would let an entry into the copy whose data came after the sync: after a cut it points at zeroes or
//! old data (R3). Writing the live page in 3 would do the same. 5 before 4 would reuse a cluster that the entry
//! on disk still names.
//!
//! Step 2 is left out when all that has changed in the copied pages is allocations for clusters that no level maps (R3), in
//! a part of the file that was durably there before (R2, `alloc`). The space is known to be zero: an entry that is durable
//! alone says what was said before, zeroes, and 4 makes data and entries durable together. So an fsync of a disk that is
//! being filled is one flush of the host's disk, and not two.
//!
//! A round whose BAT write meets a full host, or fails, gives its thread back, since all images share those; who waits for
//! it waits for the next attempt, which the clock begins: a round anew, from step 1.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Image;
use super::Reply;
use super::bat::cache::{BatCache, Copy};
use super::pio::Pio;
use super::runner::Job;
use super::stack::Stack;
use crate::error::{Error, Kind, Result};
use crate::rules::{Rule, broken};
use crate::sync::{Arc, AtomicBool, AtomicU64, Bug, Condvar, Mutex, Ordering, lock, planted, thread, wait};

/// Unsynced bytes per image from which a round begins in the background (docs/design.md#bounds).
pub(crate) const BACKGROUND: u64 = 64 << 20;
/// Unsynced bytes beyond which writes wait for a round.
pub(crate) const BOUND: u64 = 256 << 20;

/// Rounds of one image.
#[derive(Default)]
pub(super) struct Flusher {
    /// Bytes written (or, for a punch, 1) since a round last took the count, before its first sync. Added to *after* the
    /// write, before its answer: an fsync that comes after the answer sees it, and a round that swapped it to 0 before the
    /// write ended leaves it for the next one.
    unsynced: AtomicU64,
    /// The deadline of the dirty pages is armed.
    timer: AtomicBool,
    /// Who waits for the next round. A leaf.
    state: Mutex<State>,
    /// The last round has ended; goes with `state`.
    ended: Condvar,
    /// Writes that wait for unsynced data to shrink. A leaf.
    throttled: Mutex<Vec<Job>>,
    /// While an operation watches: the BAT pages that rounds have copied since. A leaf.
    pub(super) watched: Mutex<Option<BTreeSet<u64>>>,
}

/// A watch over the BAT pages that are written; ends when dropped.
pub(super) struct PageWatch<'a>(&'a Flusher);

impl PageWatch<'_> {
    /// The pages that were written since the watch began.
    pub(super) fn pages(&self) -> BTreeSet<u64> {
        lock(&self.0.watched).clone().unwrap_or_default()
    }
}

impl Drop for PageWatch<'_> {
    fn drop(&mut self) {
        *lock(&self.0.watched) = None;
    }
}

#[derive(Default)]
struct State {
    running: bool,
    waiting: Vec<Reply<()>>,
    /// A round is wanted, and no requester waits for it.
    wanted: bool,
    /// Closed: no round begins any more.
    stopped: bool,
    /// A BAT write failed: the clock begins the next round.
    paused: bool,
    /// Since when BAT writes fail, and how long the next pause is.
    trouble: Option<(Instant, Duration)>,
}

/// First pause after a BAT write that failed; doubled each time, up to a second.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// As often as parked writes are tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What a round came to that did not make everything durable.
pub(super) enum Unfinished {
    /// Its waiters hear of it.
    Failed(Error),
    /// They wait for the next attempt.
    Later(Error),
}

impl From<Error> for Unfinished {
    fn from(e: Error) -> Unfinished {
        Unfinished::Failed(e)
    }
}

impl Flusher {
    /// True when writes must wait for a round.
    pub(super) fn is_over_bound(&self) -> bool {
        self.unsynced.load(Ordering::Relaxed) >= BOUND
    }

    /// Arms the deadline of the dirty pages. False: it is.
    pub(super) fn arm(&self) -> bool {
        !self.timer.swap(true, Ordering::SeqCst)
    }

    /// The deadline has come.
    pub(super) fn disarm(&self) {
        self.timer.store(false, Ordering::SeqCst);
    }

    /// Keeps `job(token)` until the end of a round, or gives the token back when the bound holds by now.
    ///
    /// No pio is left behind: crossing `BACKGROUND` has asked for a round that swaps `unsynced` to 0 after that;
    /// a pio that still sees it over the bound, under the mutex, is drained at that round's end. Once the image has
    /// `failed`, rounds end before that swap and no other is asked for: no pio may wait for one.
    pub(super) fn throttle(
        &self,
        pio: Pio,
        failed: impl FnOnce() -> bool,
        job: impl FnOnce(Pio) -> Job,
    ) -> Option<Pio> {
        let mut throttled = lock(&self.throttled);
        if self.is_over_bound() && !failed() {
            throttled.push(job(pio));
            return None;
        }
        Some(pio)
    }

    /// Watches which BAT pages are written from now on. One watch at a time.
    pub(super) fn watch_pages(&self) -> PageWatch<'_> {
        *lock(&self.watched) = Some(BTreeSet::new());
        PageWatch(self)
    }

    /// Runs `change` while no round is under way, and lets none begin meanwhile. A round that finds nothing to do may
    /// still run in a freeze, after the flush that made everything durable was answered.
    pub(super) fn between_rounds<T>(&self, change: impl FnOnce() -> T) -> T {
        let mut state = lock(&self.state);
        while state.running {
            state = wait(&self.ended, state);
        }
        change()
    }

    /// A BAT write failed. Since when they do.
    pub(super) fn bat_fails_since(&self) -> Instant {
        let begun = || (Instant::now(), FIRST_PAUSE);
        lock(&self.state).trouble.get_or_insert_with(begun).0
    }

    /// A BAT write worked.
    pub(super) fn bat_works(&self) {
        lock(&self.state).trouble = None;
    }

    /// Bytes written (or punches made) since the last round began.
    pub(super) fn unsynced(&self) -> u64 {
        self.unsynced.load(Ordering::SeqCst)
    }

    /// Writes waiting here.
    pub(super) fn throttled(&self) -> usize {
        lock(&self.throttled).len()
    }
}

impl Image {
    /// Answers when everything acknowledged before is durable.
    pub fn flush(self: &Arc<Self>, reply: Reply<()>) {
        if let Some(e) = self.failure() {
            return reply(Err(e));
        }
        if self.may_be_passed() {
            // What the kernel wrote in our place is not counted.
            self.flusher.unsynced.fetch_add(1, Ordering::SeqCst);
        }
        let mut state = lock(&self.flusher.state);
        let clean = self.flusher.unsynced.load(Ordering::SeqCst) == 0 && self.dirty_pages() == 0;
        if clean && !state.running {
            drop(state);
            self.count_flush();
            return reply(Ok(()));
        }
        if state.stopped {
            drop(state);
            return reply(Err(self.closed_error()));
        }
        state.waiting.push(reply);
        self.begin(state);
    }

    /// The end of a close, whatever came of it: waits for the running round and lets none begin. A later one
    /// would write the old pages of a failed close into a file that is unlocked, and perhaps another process's.
    pub(super) fn stop_rounds(&self) {
        let mut state = lock(&self.flusher.state);
        state.stopped = true;
        while state.running {
            state = wait(&self.flusher.ended, state);
        }
    }

    /// Asks for a round without waiting for it.
    pub(super) fn start_round(self: &Arc<Self>) {
        let mut state = lock(&self.flusher.state);
        if state.stopped {
            return;
        }
        state.wanted = true;
        self.begin(state);
    }

    fn begin(self: &Arc<Self>, mut state: crate::sync::MutexGuard<'_, State>) {
        // Not at once: the host has just said no. A close has no time.
        if state.paused && !self.is_closing() {
            return;
        }
        if !std::mem::replace(&mut state.running, true) {
            drop(state);
            let rounds = Rounds(Arc::clone(self));
            self.engine.syncers.submit(self.id, Box::new(move || rounds.0.rounds()));
        }
    }

    /// Runs rounds until none is wanted.
    fn rounds(self: &Arc<Self>) {
        loop {
            let mut waiting = {
                let mut state = lock(&self.flusher.state);
                // Waiters are answered also when it stops; a round without one is left out then.
                if state.waiting.is_empty() && (!state.wanted || state.stopped) {
                    state.running = false;
                    self.flusher.ended.notify_all();
                    return;
                }
                state.wanted = false;
                // A requester that arrives from here on waits for the next round.
                std::mem::take(&mut state.waiting)
            };
            let result = match self.round() {
                Ok(()) => Ok(()),
                Err(Unfinished::Failed(e)) => Err(e),
                Err(Unfinished::Later(e)) => {
                    if self.try_later(waiting, &e) {
                        continue;
                    }
                    return;
                }
            };
            if broken(Rule::R6) || planted(Bug::JoinRunningRound) {
                waiting.append(&mut lock(&self.flusher.state).waiting);
            }
            let full = result.as_ref().is_err_and(|e| e.kind() == Kind::NoSpace);
            for reply in waiting {
                self.count_flush();
                reply(result.clone());
            }
            self.wake_throttled();
            // After a round that found no space nothing is cleaner: to look again at once would be to spin.
            if full { self.engine.no_clean_pages(self.id) } else { self.engine.pages_are_clean() }
        }
    }

    /// Puts `waiting` back, before those who came meanwhile, and has the clock begin the next attempt. While the image
    /// closes this thread sleeps, and true: it goes on. (At most for as long as a failing write is tried.)
    fn try_later(self: &Arc<Self>, mut waiting: Vec<Reply<()>>, e: &Error) -> bool {
        let closing = self.is_closing();
        let mut state = lock(&self.flusher.state);
        waiting.append(&mut state.waiting);
        state.waiting = waiting;
        state.wanted = true;
        let trouble = state.trouble.get_or_insert_with(|| (Instant::now(), FIRST_PAUSE));
        let pause = trouble.1;
        trouble.1 = (2 * pause).min(LONGEST_PAUSE);
        if !closing {
            state.paused = true;
            state.running = false;
            self.flusher.ended.notify_all();
        }
        drop(state);
        // Their data is synced; and allocations that wait for clean pages would wait for a host that is full.
        self.wake_throttled();
        if e.kind() == Kind::NoSpace {
            self.engine.no_clean_pages(self.id);
        }
        if closing {
            thread::sleep(pause);
            return true;
        }
        let image = Arc::downgrade(self);
        let job = move || {
            if let Some(image) = image.upgrade() {
                let mut state = lock(&image.flusher.state);
                state.paused = false;
                image.begin(state);
            }
        };
        self.engine.clock.at(Instant::now() + pause, Box::new(job));
        false
    }

    /// Writes that waited for unsynced data to shrink look again.
    pub(super) fn wake_throttled(&self) {
        let throttled = std::mem::take(&mut *lock(&self.flusher.throttled));
        throttled.into_iter().for_each(|job| self.submit(job));
    }

    /// One round: the steps at the head of this file.
    fn round(self: &Arc<Self>) -> std::result::Result<(), Unfinished> {
        if let Some(e) = self.failure() {
            return Err(e.into());
        }
        if self.is_closed() {
            return Err(self.closed_error().into()); // A close that failed left pages dirty; the file is not ours any more.
        }
        // One stack for all of it: a swap comes only between rounds.
        let stack = self.stack();
        let dirty = |bat: &Arc<BatCache>| bat.copy_dirty(stack.top_index(), &stack.geometry);
        let copies = stack.bat.as_ref().map(dirty).unwrap_or_default(); // 1
        if let Some(watched) = &mut *lock(&self.flusher.watched) {
            watched.extend(copies.iter().map(|copy| u64::from(copy.page)));
        }
        let unsynced = self.flusher.unsynced.swap(0, Ordering::SeqCst);
        if unsynced == 0 && copies.is_empty() {
            return Ok(());
        }
        // Before anything is written into a file that is another's by now, and before an answer says that it is durable.
        if let Err(e) = self.still_ours(&stack) {
            self.bat_not_written(&stack, copies);
            return Err(e.into());
        }
        let synced = copies.is_empty() || needs_data_first(&stack, &copies);
        if synced
            && !broken(Rule::R3)
            && let Err(e) = self.sync_round(&stack)
        {
            self.bat_not_written(&stack, copies);
            return Err(e.into()); // 2
        }
        if !copies.is_empty() {
            self.write_back(&stack, copies, synced)?; // 3, 4, 5
        }
        self.check_low_water();
        Ok(())
    }

    /// The sync of a round: what the file has grown by is durable too.
    pub(super) fn sync_round(self: &Arc<Self>, stack: &Stack) -> Result<()> {
        let alloc = stack.state.allocator.get();
        if let Some(alloc) = alloc {
            alloc.begin_sync();
        }
        self.sync_data(stack)?;
        if let Some(alloc) = alloc {
            alloc.synced();
        }
        Ok(())
    }

    /// fdatasync of the top. A failure is final (R7): the image is read-only at once, and every later fsync fails.
    pub(super) fn sync_data(self: &Arc<Self>, stack: &Stack) -> Result<()> {
        stack.top().file.sync_data().map_err(|e| {
            let e = Error::io(
                &e,
                &stack.top().path,
                "fdatasync failed; what was written since the last sync may be lost",
            );
            if !broken(Rule::R7) {
                self.fail(&e);
            }
            e
        })
    }

    /// `bytes` were written (1 for a punch) and are not yet synced.
    pub(super) fn touched(self: &Arc<Self>, bytes: u64) {
        let before = self.flusher.unsynced.fetch_add(bytes, Ordering::SeqCst);
        if before < BACKGROUND && before + bytes >= BACKGROUND {
            self.start_round();
        }
    }
}

/// Whether step 2 is needed.
fn needs_data_first(stack: &Stack, copies: &[Copy]) -> bool {
    let Some(alloc) = stack.state.allocator.get() else { return true };
    let durable = stack.geometry.cluster_position(alloc.durable_end());
    copies.iter().any(|copy| copy.data_first || copy.last >= durable)
}

/// The running rounds of an image.
struct Rounds(Arc<Image>);

impl Drop for Rounds {
    /// After a panic in a round. Which pages it wrote is not known, so that no later
    /// round may say that all is durable.
    fn drop(&mut self) {
        let image = &self.0;
        if !std::thread::panicking() {
            return;
        }
        let e = Error::at(Kind::Io, image.path(), "internal error: a sync round broke off");
        image.fail(&e);
        let mut state = lock(&image.flusher.state);
        state.running = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        image.flusher.ended.notify_all();
        waiting.into_iter().for_each(|reply| reply(Err(e.clone())));
    }
}
