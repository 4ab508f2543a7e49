//! BAT write-back (R5): the issuer collects dirty pages into a round, the collector releases pages as their
//! copies are durable; what failed is reissued by a later round (`flush`).
//!
//! **R5** A BAT page on disk holds the top's own entries only. Bytes 0 to 4095 have one writer, a lock held across the
//! write; every attempt, retries included, is built from the header as it is at that moment.

use std::time::{Duration, Instant};

use super::cache::Copy;
use crate::error::{Error, Kind, is_full};
use crate::format::bat::PAGE_BYTES;
use crate::io::file::write_full;
use crate::sync::{Arc, lock};
use crate::vdisk::Image;
use crate::vdisk::engine::OnFull;
use crate::vdisk::flush::Unfinished;
use crate::vdisk::stack::Stack;

/// How long a failed BAT write is tried again before the image goes read-only: long enough for a path that comes
/// back, short enough that a guest's own timeout (30 s and more) has not fired.
const RETRY_FOR: Duration = Duration::from_secs(5);
/// Least time from a failed round to the next that no requester waits for; as often as parked writes are tried again.
const PAUSE: Duration = Duration::from_secs(1);

impl Image {
    /// The issuer: a page became dirty; its round starts when `--bat-delay` is over, or at once.
    pub(in crate::vdisk) fn bat_is_dirty(self: &Arc<Self>) {
        let delay = self.engine.options.bat_delay;
        if delay.is_zero() {
            return self.start_round();
        }
        self.start_round_in(delay);
    }

    fn start_round_in(self: &Arc<Self>, delay: Duration) {
        // One timer per image: the round it starts takes every dirty page, so that no page waits longer than
        // its own deadline, and one that is dirtied again and again is still written.
        if self.flusher.arm() {
            let image = Arc::downgrade(self);
            let job = move || {
                if let Some(image) = image.upgrade() {
                    image.flusher.disarm();
                    // A close runs the last round itself; after it, the file may be another process's.
                    if !image.is_closing() {
                        image.start_round();
                    }
                }
            };
            self.engine.clock.at(Instant::now() + delay, Box::new(job));
        }
    }

    /// Steps 3 to 5 of a round: the copies were made before the data was synced, where that was needed.
    /// `synced`: the data is.
    pub(in crate::vdisk) fn write_back(
        self: &Arc<Self>,
        stack: &Stack,
        copies: Vec<Copy>,
        synced: bool,
    ) -> std::result::Result<(), Unfinished> {
        if let Err(e) = self.write_copies(stack, &copies, synced) {
            self.bat_not_written(stack, copies);
            return Err(e);
        }
        if let Err(e) = self.sync_round(stack) {
            self.bat_not_written(stack, copies);
            return Err(e.into());
        }
        // The collector: each page is clean unless it changed meanwhile; what it unmapped is free (R4).
        let Some(bat) = &stack.bat else { return Ok(()) };
        let punched = self.host.can_punch();
        let mut freed = 0;
        for copy in copies {
            bat.written(copy.page);
            freed += copy.freed.len() + copy.moved.len();
            stack.allocator().freed(&copy.freed, punched);
            stack.allocator().freed(&copy.moved, false);
        }
        if freed > 0 && self.space.is_full() {
            self.try_space_again();
            self.wake_parked(freed);
        }
        Ok(())
    }

    /// Writes every copy, also where one fails before. Data that is not `synced` does not wait for space: it is counted as
    /// synced, and space may come late.
    fn write_copies(
        self: &Arc<Self>,
        stack: &Stack,
        copies: &[Copy],
        synced: bool,
    ) -> std::result::Result<(), Unfinished> {
        let mut failed = None;
        for copy in copies {
            if let Err(e) = self.write_page(stack, copy) {
                failed = Some((copy.page, e));
            }
        }
        let Some((page, e)) = failed else {
            self.flusher.bat_works();
            self.bat_fits();
            return Ok(());
        };
        let error = Error::io(&e, &stack.top().path, format!("cannot write BAT page {page}"));
        // Want of space is a mode, not a failure: it is waited out like any other write's.
        let full = is_full(&e);
        let options = &self.engine.options;
        let patience = match (full, options.on_full) {
            (false, _) => Some(RETRY_FOR),
            (true, OnFull::Queue) if !self.space.fails() => options.full_timeout,
            (true, _) => Some(Duration::ZERO),
        };
        if full {
            self.bat_is_full();
            if !synced {
                self.sync_round(stack)?;
            }
        }
        let since = self.flusher.bat_fails_since();
        let given_up = patience.is_some_and(|p| since.elapsed() >= p);
        if full && (given_up || self.is_closing()) {
            self.bat_timed_out();
            // Who comes next waits as long again, once the mode has ended.
            self.flusher.bat_works();
            return Err(Unfinished::Failed(error.with_kind(Kind::NoSpace)));
        }
        if given_up {
            self.fail(&error);
            return Err(Unfinished::Failed(error));
        }
        Err(Unfinished::Later(if full { error.with_kind(Kind::NoSpace) } else { error }))
    }

    /// One page, cut off at the BAT's end: what follows may be data.
    fn write_page(&self, stack: &Stack, copy: &Copy) -> std::io::Result<()> {
        let start = u64::from(copy.page) * PAGE_BYTES;
        let len = (stack.geometry.bat_end() - start).min(PAGE_BYTES) as usize;
        let file = &*stack.top().file;
        if copy.page != 0 {
            return write_full(file, &copy.bytes[..len], start);
        }
        // R5: the header as it is now, and no other thread writes it until this write has ended.
        let header = lock(&stack.state.header);
        let mut bytes = copy.bytes.clone();
        if let Some(header) = &*header {
            bytes[..64].copy_from_slice(&header.encode());
        }
        write_full(file, &bytes[..len], 0)
    }

    /// The round failed before its copies were durable.
    pub(in crate::vdisk) fn bat_not_written(self: &Arc<Self>, stack: &Stack, copies: Vec<Copy>) {
        let Some(bat) = &stack.bat else { return };
        if copies.is_empty() {
            return;
        }
        copies.into_iter().for_each(|copy| bat.not_written(copy));
        // Not at once: the host has just said no, and would be asked as fast as it can answer.
        if self.failure().is_none() && !self.is_closing() {
            self.start_round_in(self.engine.options.bat_delay.max(PAUSE));
        }
    }
}
