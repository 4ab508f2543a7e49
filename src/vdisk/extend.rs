//! Making space ahead of need: extending the file (R2) and scrubbing free clusters of unknown content (R3).
//! Both run on sync threads and answer the allocations that wait for them.

use super::Image;
use super::alloc::{Alloc, Due};
use super::gate::Inside;
use super::runner::Job;
use super::stack::Stack;
use crate::io::file::write_zeroes;
use crate::rules::{Rule, broken};
use crate::sync::Arc;

impl Image {
    /// Takes a file cluster of the top for `token`, one from `from` on where that is given, or keeps `job(token)` until one
    /// may be had, and starts what is due. All that wait for space come here. `places` inside the gate are for an extension
    /// and a scrub; what is not used is given back.
    pub(super) fn take_cluster<T>(
        self: &Arc<Self>,
        stack: &Stack,
        from: Option<u64>,
        mut places: [Option<Inside>; 2],
        token: T,
        job: impl FnOnce(T) -> Job,
    ) -> Alloc<T> {
        let due = |due| {
            if let Some(inside) = places.iter_mut().find_map(Option::take) {
                self.start_due(due, inside);
            }
        };
        let taken = match from {
            None => stack.allocator().take(token, job, due),
            Some(from) => stack.allocator().take_from(from, token, job, due),
        };
        places.into_iter().flatten().for_each(|inside| self.gate.leave(inside));
        taken
    }

    /// Goes on with `then(token, true)` when a file cluster may be had, without one, or with false where the host is full:
    /// at once, or on a runner. The token holds no lock.
    pub(super) fn when_space<T: Send + 'static>(
        self: &Arc<Self>,
        stack: &Stack,
        from: Option<u64>,
        places: [Option<Inside>; 2],
        token: T,
        then: fn(T, bool),
    ) {
        match self.take_cluster(stack, from, places, token, |token| Box::new(move || then(token, true))) {
            Alloc::Wait => {}
            Alloc::Full(token) => {
                // No pio is parked, and nothing ticks: the next attempt must ask the host again.
                self.try_space_again();
                then(token, false);
            }
            Alloc::Got(cluster, token) => {
                stack.allocator().put_back(cluster);
                then(token, true);
            }
        }
    }

    /// Starts what the allocator found due. `inside`: it counts as running, so that no close, and no later opening,
    /// meets an extension or a punch of this one.
    fn start_due(self: &Arc<Self>, due: Due, inside: Inside) {
        let image = Arc::clone(self);
        let job = move || {
            match due {
                Due::Extend => image.extend(),
                Due::Scrub => image.scrub(),
            }
            image.gate.leave(inside);
        };
        self.engine.syncers.submit(self.id, Box::new(job));
    }

    /// Extends the file:
    /// 1. ftruncate, sparse;
    /// 2. only then the allocator hands out what lies inside.
    ///
    /// 2 before 1 could leave a durable BAT entry that points behind the end of the file (R2). The length is not synced here:
    /// an entry is set after 2, and the round that writes it first syncs the file, unless an earlier one has done so since
    /// (`flush`), which makes what came before durable, the length too. A sync of its own would write out the guest's data of
    /// all that time, again and again.
    fn extend(self: &Arc<Self>) {
        let stack = self.stack();
        let alloc = stack.allocator();
        loop {
            let (from, to) = alloc.extension();
            let end = stack.geometry.cluster_position(to);
            let longer = self.host.during(|| {
                if to > from && !broken(Rule::R2) { stack.top().file.set_len(end) } else { Ok(()) }
            }); // 1
            let waiting = match longer {
                Ok(()) => alloc.extended(to), // 2
                Err(e) => {
                    log::debug!("{}: cannot extend to {end} bytes: {e}", stack.top().path.display());
                    match alloc.extension_failed() {
                        (true, _) => continue,
                        (false, waiting) => waiting,
                    }
                }
            };
            waiting.into_iter().for_each(|job| self.submit(job));
            self.check_low_water();
            return;
        }
    }

    /// Makes a batch of free clusters fit for reuse:
    /// 1. punch them (or write zeroes);
    /// 2. fdatasync;
    /// 3. only then they are clean.
    ///
    /// 3 before 2: after a cut the old content could show through the new entry (R3).
    pub(super) fn scrub(self: &Arc<Self>) {
        let stack = self.stack();
        let alloc = stack.allocator();
        let batch = alloc.scrub_batch();
        let zeroed = batch.chunk_by(|a, b| a + 1 == *b).try_for_each(|run| {
            let (at, len) = (stack.geometry.cluster_position(run[0]), run.len() as u64 * self.cluster);
            let file = &*stack.top().file;
            let punched = self.host.during(|| file.punch(at, len));
            match punched {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => write_zeroes(file, at, len),
                other => other,
            }
        });
        if let Err(e) = &zeroed {
            log::warn!("{}: cannot clear freed clusters for reuse: {e}", stack.top().path.display());
        }
        let done = zeroed.is_ok() && self.sync_data(&stack).is_ok();
        alloc.scrubbed(&batch, done).into_iter().for_each(|job| self.submit(job));
    }

    /// Space may be back: extensions and scrubs are tried again.
    pub(super) fn try_space_again(&self) {
        if let Some(alloc) = self.stack().state.allocator.get() {
            alloc.retry();
        }
    }
}
