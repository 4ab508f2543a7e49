//! Which file clusters of the top are free, and which of them may be handed out (R2, R3, R4).
//!
//! - **R2** A BAT entry on disk never points past the end of the file. The file is extended ahead of need, sparse, and
//!   an entry is set only inside it; a round that writes an entry behind the length that is durably there syncs the
//!   file first. Header and BAT have their space from the beginning.
//! - **R3** A cluster's content is durable before its entry is written to the host file whenever anything could be read
//!   there before: copy on write, a whole-cluster overwrite of what a lower level maps, relocation, merge. Only an
//!   allocation for a guest cluster that no level maps, in space known to be zero, may have its entry written first.
//!   Space is known to be zero when it lies beyond the file's size at the first change (the free tail is cut off then,
//!   not trusted) and was not handed out since. All other free space, every cluster handed out and given back included,
//!   is punched, and the punch durable, before an entry names it.
//! - **R4** A freed cluster is reused only after: unmapped, punched, and its BAT page durable.
//!
//! So free space has three states here: *fresh* (behind `next`, never handed out), *stale* (free, content
//! unknown: must be scrubbed) and *clean* (punched, durable, its old entry durably gone). Only fresh space inside
//! the file and clean space is handed out; a request that finds neither waits for an extension or a scrub.
//!
//! R2: a round that has entries behind the length that the last round made durable syncs the file before it writes them
//! (`flush`, step 2). R3: a file that was cut, durably, ends there as at an open (`live::compact`).

pub use super::bits::Bits;
use crate::rules::{Rule, broken};
use crate::sync::{Bug, Mutex, MutexGuard, lock, planted};
use crate::vdisk::runner::Job;

/// Clusters scrubbed per round: bounds how long a scrub holds the host's inode lock.
const SCRUB_BATCH: usize = 256;

/// What an allocation got.
#[derive(Debug, PartialEq, Eq)]
pub enum Alloc<T> {
    /// This file cluster, known to be zero.
    Got(u64, T),
    /// Nothing yet: the job waits for the extension or scrub that is under way, and then tries again.
    Wait,
    /// Neither the format nor the host has more.
    Full(T),
}

/// Work that an allocation or a release found due; the caller starts it on a thread that may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Extend the file: [`Allocator::extension`].
    Extend,
    /// Punch stale clusters: [`Allocator::scrub_batch`].
    Scrub,
}

/// What [`Allocator::begin_scrub`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scrubbing {
    /// All free space is clean, or cannot be made so.
    Nothing,
    /// The caller scrubs a batch.
    Ours,
    /// Another thread does.
    Theirs,
}

/// A cut of the file's tail under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The file ends before this file cluster.
    pub end: u64,
    next: u64,
    file_end: u64,
}

/// Ends a [`hold`](Allocator::hold) when dropped.
pub struct HeldSpace<'a>(&'a Allocator);

impl HeldSpace<'_> {
    /// Holds on to the file clusters before `end` only.
    pub fn only_before(&self, end: u64) {
        // Not judged: a drop comes here, also while the panic over a wrong state unwinds.
        lock(&self.0.state).held = end;
    }
}

impl Drop for HeldSpace<'_> {
    fn drop(&mut self) {
        self.only_before(0);
    }
}

/// The allocator of one image's top.
pub struct Allocator {
    /// Protects everything below. Taken on allocation and release only; a leaf.
    state: Mutex<State>,
}

struct State {
    /// First file cluster that was never handed out and holds nothing.
    next: u64,
    /// File clusters before this one lie inside the file (R2).
    end: u64,
    /// File clusters before this one lie inside the file durably, or were never handed out. A sync since the free tail was
    /// cut off has made it so: what of them is known to be zero is so durably as well (R3).
    durable: u64,
    /// The same, once the sync of the round that is under way has ended well.
    syncing: u64,
    /// File clusters the format can address.
    limit: u64,
    /// Clusters per extension step.
    step: u64,
    clean: Bits,
    stale: Bits,
    /// File clusters before this one are out of circulation: the BAT grows over them.
    reserved: u64,
    /// Free file clusters before this one are kept for clusters that move there ([`Allocator::hold`]).
    held: u64,
    extending: bool,
    scrubbing: bool,
    /// Clusters of the next extension: `step`, but after a failure one (K6), and twice as many with each that works.
    pace: u64,
    /// Even one cluster failed: none is tried before [`Allocator::retry`].
    exhausted: bool,
    /// A scrub failed: none is tried before the next extension that works, or [`Allocator::retry`]. The file is extended
    /// all the same: a hole that cannot be punched says nothing of space.
    unscrubbed: bool,
    /// The file was made this long, in clusters, and not shorter since.
    made: u64,
    waiting: Vec<Job>,
}

impl State {
    /// What holds whenever the lock is free.
    fn is_sound(&self) -> bool {
        let free = self.clean.len() + self.stale.len();
        // Only what lies in the file is handed out (R2), and no length is claimed that the file was not given.
        let in_file = self.next <= self.end && self.made <= self.end;
        // What is durable, or will be with the sync under way, is part of the file: a cut has taken the rest back (R3).
        let durable = self.durable.max(self.syncing) <= self.end;
        // What is free was handed out once, or was free from the beginning.
        let counted = self.reserved <= self.next && free <= self.next - self.reserved;
        // Each job in the queue waits for an extension, a scrub or a cut that will end: else it waits for ever.
        let awaited = self.waiting.is_empty() || self.extending || self.scrubbing;
        in_file && durable && counted && awaited && (1..=self.step).contains(&self.pace)
    }

    fn ready(&mut self) -> Option<u64> {
        self.ready_from(self.held).or_else(|| {
            // A guest's write goes before the order of the file.
            if self.can_extend() { None } else { self.clean.take_lowest() }
        })
    }

    fn ready_from(&mut self, from: u64) -> Option<u64> {
        self.clean.take_from(from).or_else(|| {
            let fresh = self.next < self.end;
            self.next += u64::from(fresh);
            fresh.then(|| self.next - 1)
        })
    }

    fn can_extend(&self) -> bool {
        self.end < self.limit && !self.exhausted
    }

    /// Clusters that may be handed out at once. What is held is no room.
    fn room(&self) -> u64 {
        let clean = if self.held == 0 { self.clean.len() } else { 0 };
        clean + (self.end - self.next)
    }

    fn used_end(&self) -> u64 {
        let mut end = self.next;
        while end > 0 && (self.clean.contains(end - 1) || self.stale.contains(end - 1)) {
            end -= 1;
        }
        end
    }

    /// `cluster` is free again: its content known to be zero, or not.
    fn put(&mut self, cluster: u64, zero: bool) {
        if cluster < self.reserved {
            return;
        }
        debug_assert!(cluster < self.next, "file cluster {cluster} was never handed out");
        // Freed twice it would be handed out twice, to two guest clusters.
        let free = self.clean.contains(cluster) || self.stale.contains(cluster);
        debug_assert!(!free, "file cluster {cluster} is free already");
        if zero {
            self.clean.insert(cluster)
        } else {
            self.stale.insert(cluster)
        };
    }
}

impl Allocator {
    /// `next`: the file's end in clusters after its free tail was cut off; `limit`: clusters the format can
    /// address; `step`: clusters per extension; `stale`: free clusters before `next`.
    pub fn new(next: u64, limit: u64, step: u64, stale: Bits) -> Allocator {
        let state = State {
            next,
            end: next,
            // Also what the file had before: its tail was cut off, and that is not synced yet.
            durable: 0,
            syncing: 0,
            limit,
            step: step.max(1),
            clean: Bits::default(),
            stale,
            reserved: 0,
            held: 0,
            extending: false,
            scrubbing: false,
            pace: step.max(1),
            exhausted: false,
            unscrubbed: false,
            made: next,
            waiting: Vec::new(),
        };
        Allocator { state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        debug_assert!(state.is_sound(), "the allocator's state");
        state
    }

    /// Takes a file cluster. On [`Alloc::Wait`] `job(token)` is kept and run later; else the token comes back.
    /// `due` is called with work to start.
    pub fn take<T>(&self, token: T, job: impl FnOnce(T) -> Job, due: impl FnMut(Due)) -> Alloc<T> {
        self.take_with(State::ready, token, job, due)
    }

    /// The same, of the file clusters from `from` on, whatever is held.
    pub fn take_from<T>(
        &self,
        from: u64,
        token: T,
        job: impl FnOnce(T) -> Job,
        due: impl FnMut(Due),
    ) -> Alloc<T> {
        self.take_with(|s| s.ready_from(from), token, job, due)
    }

    fn take_with<T>(
        &self,
        ready: impl FnOnce(&mut State) -> Option<u64>,
        token: T,
        job: impl FnOnce(T) -> Job,
        mut due: impl FnMut(Due),
    ) -> Alloc<T> {
        let mut s = self.state();
        let got = ready(&mut s);
        // Ahead of need: half a step in hand while the next is being made.
        let wanted = got.is_none() || s.pace >= s.step && s.room() < s.step.div_ceil(2);
        if wanted && s.can_extend() && !s.extending {
            s.extending = true;
            due(Due::Extend);
        }
        if (got.is_none() || s.clean.is_empty()) && !s.stale.is_empty() && !s.scrubbing && !s.unscrubbed {
            s.scrubbing = true;
            due(Due::Scrub);
        }
        match got {
            Some(cluster) => Alloc::Got(cluster, token),
            None if s.extending || s.scrubbing => {
                if planted(Bug::LetGoBeforeWaiting) {
                    drop(s);
                    s = self.state();
                }
                s.waiting.push(job(token));
                Alloc::Wait
            }
            None => Alloc::Full(token),
        }
    }

    /// Takes a file cluster where that makes no work due: for the fast path, which has nowhere to wait.
    pub fn take_in_hand(&self) -> Option<u64> {
        let mut s = self.state();
        let scrub_is_due = s.clean.is_empty() && !s.stale.is_empty();
        if scrub_is_due || s.pace < s.step || s.room() <= s.step.div_ceil(2) {
            return None;
        }
        s.ready()
    }

    /// Takes a file cluster if one is ready; starts nothing.
    pub fn take_ready(&self) -> Option<u64> {
        self.state().ready()
    }

    /// Takes a file cluster from `from` on if one is ready, whatever is held; starts nothing.
    pub fn take_ready_from(&self, from: u64) -> Option<u64> {
        self.state().ready_from(from)
    }

    /// Takes this file cluster if it is clean; starts nothing.
    pub fn take_this(&self, cluster: u64) -> Option<u64> {
        self.state().clean.remove(cluster).then_some(cluster)
    }

    /// Keeps all free file clusters for [`take_this`](Self::take_this), as long as others can be had by extending the
    /// file, until the guard is dropped. One at a time.
    pub fn hold(&self) -> HeldSpace<'_> {
        let held = HeldSpace(self);
        held.only_before(u64::MAX);
        held
    }

    /// Takes the lowest clean file cluster if it lies before `before`; starts nothing.
    pub fn take_before(&self, before: u64) -> Option<u64> {
        let mut s = self.state();
        let lowest = s.clean.take_lowest()?;
        if lowest >= before {
            s.clean.insert(lowest);
            return None;
        }
        Some(lowest)
    }

    /// Claims a scrub that no pio waits for.
    pub fn begin_scrub(&self) -> Scrubbing {
        let mut s = self.state();
        if s.scrubbing {
            return Scrubbing::Theirs;
        }
        s.scrubbing = !s.stale.is_empty() && !s.unscrubbed;
        if s.scrubbing { Scrubbing::Ours } else { Scrubbing::Nothing }
    }

    /// Begins to cut off the file behind the last cluster in use. None: an extension or a scrub is under way. Until
    /// [`end_cut`](Self::end_cut) no other begins, and nothing behind that end is handed out.
    pub fn begin_cut(&self) -> Option<Cut> {
        let mut s = self.state();
        if s.extending || s.scrubbing {
            return None;
        }
        let cut = Cut { end: s.used_end(), next: s.next, file_end: s.end };
        s.clean.remove_from(cut.end);
        s.stale.remove_from(cut.end);
        (s.next, s.end) = (cut.end, cut.end);
        s.made = s.made.min(cut.end);
        // Also for a sync that is under way: it may have ended before the file is cut.
        (s.durable, s.syncing) = (s.durable.min(cut.end), s.syncing.min(cut.end));
        (s.extending, s.scrubbing) = (true, true);
        Some(cut)
    }

    /// The file ends there, durably; or (`done` false) it may be as long as before, and what was free in its tail is of
    /// unknown content. Returns who waited.
    pub fn end_cut(&self, cut: Cut, done: bool) -> Vec<Job> {
        let mut s = self.state();
        (s.extending, s.scrubbing) = (false, false);
        if !done {
            // A failed cut has left the file as it was, or ended the image.
            (s.next, s.end) = (cut.next, cut.file_end);
            (cut.end..cut.next).for_each(|cluster| s.put(cluster, false));
        }
        std::mem::take(&mut s.waiting)
    }

    /// Takes the file clusters before `count` out of circulation, those included that are freed later: the BAT will grow
    /// over them. What was handed out before is the caller's to move.
    pub fn reserve(&self, count: u64) {
        let mut s = self.state();
        s.clean.remove_below(count);
        s.stale.remove_below(count);
        s.reserved = s.reserved.max(count);
        s.next = s.next.max(count);
        s.end = s.end.max(s.next);
    }

    /// The same space, counted from a first data block that has moved up by `reserved` clusters. No pio waits here.
    pub fn moved_up(&self, reserved: u64, limit: u64) -> Allocator {
        let s = self.state();
        let state = State {
            next: s.next - reserved,
            end: s.end - reserved,
            durable: 0,
            syncing: 0,
            limit,
            step: s.step,
            clean: s.clean.moved_down(reserved),
            stale: s.stale.moved_down(reserved),
            reserved: 0,
            held: 0,
            extending: false,
            scrubbing: false,
            pace: s.pace,
            exhausted: s.exhausted,
            unscrubbed: s.unscrubbed,
            made: s.made.saturating_sub(reserved),
            waiting: Vec::new(),
        };
        Allocator { state: Mutex::new(state) }
    }

    /// Gives back a cluster that nothing was written to: it is as it was.
    pub fn put_back(&self, cluster: u64) {
        self.state().put(cluster, true);
    }

    /// Gives back a cluster whose data write failed: handed out once, so no longer known to be zero.
    pub fn give_back(&self, cluster: u64) {
        self.state().put(cluster, false);
    }

    /// Clusters that were punched and unmapped, but not durably: which of them must wait for [`freed`](Self::freed).
    pub fn unmapped(&self, clusters: std::ops::Range<u64>) -> Vec<u64> {
        let waiting: Vec<u64> = clusters.collect();
        if broken(Rule::R4) {
            self.freed(&waiting, true);
            return Vec::new();
        }
        waiting
    }

    /// Clusters whose unmapping is durable (R4). `punched`: the hole is durable too; else they need a scrub.
    pub fn freed(&self, clusters: &[u64], punched: bool) {
        let mut s = self.state();
        clusters.iter().for_each(|cluster| s.put(*cluster, punched));
    }

    /// The extension to make: from and to, in file clusters. Only after [`Due::Extend`].
    pub fn extension(&self) -> (u64, u64) {
        let s = self.state();
        (s.end, (s.end + s.pace).min(s.limit))
    }

    /// The file reaches up to `to`. Returns who waited.
    pub fn extended(&self, to: u64) -> Vec<Job> {
        let mut s = self.state();
        s.extending = false;
        s.end = s.end.max(to);
        s.made = s.made.max(to);
        s.unscrubbed = false;
        s.pace = (2 * s.pace).min(s.step);
        std::mem::take(&mut s.waiting)
    }

    /// The extension failed. True: try again at once with one cluster. False: those returned must find out for
    /// themselves that there is no space.
    pub fn extension_failed(&self) -> (bool, Vec<Job>) {
        let mut s = self.state();
        if s.pace > 1 {
            s.pace = 1;
            return (true, Vec::new());
        }
        s.extending = false;
        s.exhausted = true;
        (false, std::mem::take(&mut s.waiting))
    }

    /// Up to a batch of stale clusters to scrub, lowest first. Only after [`Due::Scrub`].
    pub fn scrub_batch(&self) -> Vec<u64> {
        let mut s = self.state();
        let mut batch = Vec::with_capacity(SCRUB_BATCH);
        while batch.len() < SCRUB_BATCH {
            match s.stale.take_lowest() {
                Some(cluster) => batch.push(cluster),
                None => break,
            }
        }
        batch
    }

    /// The batch reads as zero, durably; or (`done` false) nothing is known of it. Returns who waited.
    pub fn scrubbed(&self, batch: &[u64], done: bool) -> Vec<Job> {
        let mut s = self.state();
        s.scrubbing = false;
        s.unscrubbed |= !done;
        batch.iter().for_each(|cluster| s.put(*cluster, done));
        std::mem::take(&mut s.waiting)
    }

    /// Forgets that space was short: the host may have some again.
    pub fn retry(&self) {
        let mut s = self.state();
        s.pace = s.step;
        s.exhausted = false;
        s.unscrubbed = false;
    }

    /// A round is about to sync the file. Rounds come one at a time.
    pub fn begin_sync(&self) {
        let mut s = self.state();
        s.syncing = s.end;
    }

    /// That sync has ended well.
    pub fn synced(&self) {
        let mut s = self.state();
        s.durable = s.durable.max(s.syncing);
    }

    /// File clusters before this one may be named by an entry on disk before their data is there: the file is durably
    /// longer (R2), and they are durably zero (R3).
    pub fn durable_end(&self) -> u64 {
        self.state().durable
    }

    /// The file is at least this long, in clusters, unless another program has cut it.
    pub fn made(&self) -> u64 {
        self.state().made
    }

    /// Where the file may end when it is closed: behind the last cluster that is not free. A cluster whose unmapping is
    /// not durable is not free yet ([`freed`](Self::freed)), and so stays inside.
    pub fn used_end(&self) -> u64 {
        self.state().used_end()
    }

    /// File clusters in use.
    pub fn used(&self) -> u64 {
        let s = self.state();
        s.next - s.clean.len() - s.stale.len()
    }
}

#[cfg(test)]
mod tests;
