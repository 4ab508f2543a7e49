//! One live image: requests in, pios through locks and BAT cache, bytes in the delta files.
//!
//! The way of a request: `gate` and `pio` (split, answer), `fast` (what ends on the caller's thread), `runner`
//! (the threads that do the rest), `locks`, `bat::cache` (where is it), then `read`, `write` or `discard`; `alloc` and
//! `extend` (space), `flush` and `bat::writeback` (durability), `mark` (in use), `space` and `full` (a
//! full host), `ends` (failed, closed), `tracking` (what has changed).
//!
//! An operation sees more of the image than a pio does: `operations` has the lock that lets one run at a time, and the
//! type that proves it. What only an operation may do (swap the stack, clear the mark, move clusters) are its methods.
//!
//! Lock order: docs/design.md#lock-order. Three locks are held across I/O: the operation's, a cluster's, the header's.
//!
//! # The states of a live image
//!
//! How far it is on its way to its first change, and back (`Stage`; the first and the last step are operations):
//!
//! ```text
//!                  make_writable               mark::mark
//!   open -> ReadOnly ----------> Unmarked --------------------> Marked --.
//!              |   scan finds      |      first write, discard,    |      | put_on_top, flip, grow, ...: a new stack,
//!              |   damage: stays   |      or work that changes     |      | frozen; the stage stays
//!              |                   |                               |<-----'
//!              '---------- close --+-------- close: round ---------'
//!                            v               mark::unmark_tracked
//!                          closed            (the next open begins anew)
//! ```
//!
//! What it can do meanwhile ([`Mode`]: of `ends`, the stage and `space`):
//!
//! ```text
//!   ReadOnly            stage ReadOnly, or failed
//!      ^ fail: a sync, a BAT write given up, a file that is another's (foreign), a rename of unknown end (commit)
//!      |
//!   Write --- park, bat_is_full ---> FullQueue --- tick past --full-timeout, bat_timed_out ---> FullError
//!     ^                                  |         (with --on-full error at once)                  |
//!     '------ space_worked, bat_fits ----+---------------------------------------------------------'
//! ```
//!
//! `failed` holds until the image is closed: rounds and writes answer the failure, reads go on. The end (`close`):
//!
//! ```text
//!   close: closing = true, parked pios fail, waits for the operation
//!     |-- ends in time ----> gate shut -> flush_now -> unmark_tracked -> stop_rounds -> closed = true
//!     |                         any of them fails: fail; the mark stays
//!     '-- does not end ----> close_beside_an_operation: a last sync, fail -> closed = true; the mark stays
//! ```
//!
//! `closing` ends operations, at their next cluster, and waits for space; after `closed` the answer to all is EIO.

pub mod alloc;
pub mod bat;
mod bits;
mod blocking;
mod changed;
mod clock;
mod close;
mod counters;
mod cow;
mod discard;
#[cfg(test)]
mod edges;
mod ends;
mod engine;
mod extend;
mod fast;
mod flush;
mod foreign;
mod full;
mod gate;
mod host;
pub mod latency;
pub mod live;
pub mod locks;
mod mark;
#[cfg(all(test, feature = "shuttle"))]
mod models;
mod nowait;
mod operations;
mod overlaid;
mod pio;
mod queued;
#[cfg(test)]
mod races;
mod ranges;
mod read;
mod rescue;
mod runner;
mod scan;
mod seek;
mod space;
mod stack;
pub mod tracking;
mod write;
mod zero;

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;

use crate::error::{Error, Kind, Result};
pub use crate::image::level::{Layout, Level};
use crate::io::backing::Backing;
use crate::io::file::HostStatus;
use crate::io::planned::Planned;
use crate::ledger::Book;
use crate::rules::{Rule, broken};
use crate::sync::{Arc, AtomicU64, Ordering, lock};
pub use counters::Stats;
pub use engine::{Engine, ImageEvent, OnFull, Options};
pub(crate) use flush::{BACKGROUND, BOUND};
use locks::{ClusterLocks, LockMode};
use mark::Stage;
use operations::{Operating, Operations};
pub use rescue::rescue;
pub use runner::Job;
pub(crate) use stack::MAX_LEVELS;
use stack::Stack;

/// Called once with the answer, from any thread.
pub type Reply<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// What the image can do at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reads and writes.
    Write,
    /// Out of space, writes are parked.
    FullQueue,
    /// Out of space, writes fail.
    FullError,
    /// Reads only: opened so, damaged, or a sync failed.
    ReadOnly,
}

/// May a write begin?
enum Ready {
    Yes,
    /// Once the image is marked in use.
    Unmarked,
    No(Error),
}

/// One open image.
pub struct Image {
    id: u64,
    name: String,
    engine: Arc<Engine>,
    /// Changes only in an operation, while the gate is closed and nothing is inside (`live::freeze`).
    stack: ArcSwap<Stack>,
    /// Cluster size in bytes.
    cluster: u64,
    /// Disk size in bytes; grows with the stack.
    size: AtomicU64,
    gate: gate::Gate,
    locks: ClusterLocks,
    marker: mark::UseMark,
    operations: Operations,
    flusher: flush::Flusher,
    space: space::SpaceState,
    host: host::Host,
    ends: ends::Ends,
    counters: counters::ImageCounters,
    /// The file that the kernel may read and write in our place.
    backing: std::sync::OnceLock<std::sync::Arc<Backing>>,
    /// What the ledger has of it. None: it is lost with the process.
    book: std::sync::OnceLock<std::sync::Arc<Book>>,
    /// The locks of its files, after a close that waited for no operation ([`keep`](Self::keep)). Behind the files.
    kept: std::sync::OnceLock<Box<dyn std::any::Any + Send + Sync>>,
}

impl Image {
    /// Opens over `levels` (base first), read-only. Blocks. A delta found in use has its page cache dropped before
    /// anything of it is trusted (R7).
    pub fn open(engine: &Arc<Engine>, name: &str, mut levels: Vec<Level>) -> Result<Arc<Image>> {
        levels.iter_mut().try_for_each(Level::distrust)?;
        Image::open_whole_or_part(engine, name, levels, false)
    }

    /// The same to read from files that another user in this process may be writing. They are taken as they are: what
    /// opened them has looked, and a sync here could hear of a failed write in the writer's place (R7).
    pub fn open_beside(engine: &Arc<Engine>, name: &str, levels: Vec<Level>) -> Result<Arc<Image>> {
        Image::open_whole_or_part(engine, name, levels, false)
    }

    /// Opens some levels out of the middle of a chain, to merge them: what they do not map lies below.
    pub(in crate::vdisk) fn open_part(
        engine: &Arc<Engine>,
        name: &str,
        mut levels: Vec<Level>,
    ) -> Result<Arc<Image>> {
        levels.iter_mut().try_for_each(Level::distrust)?;
        Image::open_whole_or_part(engine, name, levels, true)
    }

    fn open_whole_or_part(
        engine: &Arc<Engine>,
        name: &str,
        levels: Vec<Level>,
        part: bool,
    ) -> Result<Arc<Image>> {
        // Under the model checker threads come with the first work: one that only waits is a step more to try out.
        #[cfg(not(feature = "shuttle"))]
        engine.start()?;
        let stack = Stack::new(levels, &engine.budget)?;
        let stack = if part { stack.into_part() } else { stack };
        Ok(Arc::new(Image {
            id: engine.new_id(),
            name: name.into(),
            engine: Arc::clone(engine),
            cluster: stack.geometry.cluster,
            size: AtomicU64::new(stack.geometry.disk),
            stack: ArcSwap::from_pointee(stack),
            gate: gate::Gate::default(),
            locks: ClusterLocks::default(),
            marker: mark::UseMark::default(),
            operations: Operations::default(),
            flusher: flush::Flusher::default(),
            space: space::SpaceState::default(),
            host: host::Host::default(),
            ends: ends::Ends::default(),
            counters: counters::ImageCounters::default(),
            backing: std::sync::OnceLock::new(),
            book: std::sync::OnceLock::new(),
            kept: std::sync::OnceLock::new(),
        }))
    }

    /// Makes the image writable: scans the BAT for ranges and doubles. Blocks. No byte of the top changes before the first
    /// write. Damage: `Kind::Damaged`, and the image stays readable.
    pub fn make_writable(self: &Arc<Self>) -> Result<()> {
        // Looked at first, so that no opener waits here for a long operation: that has made the image writable itself.
        if self.stage() != Stage::ReadOnly {
            return Ok(());
        }
        let operating = self.wait_to_operate();
        if self.stage() != Stage::ReadOnly {
            return Ok(());
        }
        let stack = self.stack();
        if stack.bat.is_some() {
            let found = scan::scan(stack.top(), &stack.geometry)?;
            // A base that was cut off is damage of the disk like any other, and no write may hide a part of it.
            stack.top_down().skip(1).try_for_each(|(_, level)| scan::refuse_cut(level))?;
            *lock(&stack.state.scan) = Some(found);
            operating.settle_lower(&stack);
            if let Err(why) = operating.load_tracking(&stack) {
                log::warn!("{}: {why}; the changes are not tracked any more", stack.top().path.display());
            }
        }
        self.marker.may_be_written();
        Ok(())
    }

    /// Disk size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// False for a raw disk, whose bytes lie in its file as they are.
    pub fn has_map(&self) -> bool {
        self.stack().bat.is_some()
    }

    /// Cluster size in bytes.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The name it was opened under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads; `reply` is called from any thread. Clipped at the disk's end.
    pub fn read(self: &Arc<Self>, offset: u64, len: usize, reply: Reply<Bytes>) {
        let len = (len as u64).min(self.size().saturating_sub(offset)) as usize;
        if len == 0 {
            return reply(Ok(Bytes::new()));
        }
        queued::read(self, offset, len, reply);
    }

    /// A read for a transport that carries it out without a thread of ours (see [`Planned`]); `end` hears of its end.
    /// None: use [`read`](Self::read). Clipped at the disk's end.
    pub fn plan_read(
        self: &Arc<Self>,
        offset: u64,
        len: usize,
        end: impl FnOnce(bool) + Send + 'static,
    ) -> Option<Planned> {
        let len = (len as u64).min(self.size().saturating_sub(offset)) as usize;
        if len == 0 { None } else { queued::plan(self, offset, len, end) }
    }

    /// Writes; `durable` = O_DSYNC. A range that passes the disk's end is `Kind::NoSpace`, and nothing is written.
    pub fn write(self: &Arc<Self>, offset: u64, data: Bytes, durable: bool, reply: Reply<()>) {
        match self.check_range(offset, data.len() as u64) {
            Err(e) => reply(Err(e)),
            Ok(()) if data.is_empty() => reply(Ok(())),
            Ok(()) => pio::submit_write(self, offset, data, durable, reply),
        }
    }

    /// Makes a range read as zero and gives space back (discard and write-zeroes). Clipped at the disk's end.
    pub fn discard(self: &Arc<Self>, offset: u64, len: u64, reply: Reply<()>) {
        let len = len.min(self.size().saturating_sub(offset));
        if len == 0 {
            return reply(Ok(()));
        }
        discard::submit(self, offset, len, reply);
    }

    /// What it can do at the moment.
    pub fn mode(&self) -> Mode {
        if self.ends.has_failed() || self.stage() == Stage::ReadOnly {
            Mode::ReadOnly
        } else if !self.space.is_full() {
            Mode::Write
        } else if self.space.fails() || self.engine.options.on_full == OnFull::Error {
            Mode::FullError
        } else {
            Mode::FullQueue
        }
    }

    /// What the host says of the top's file, with the space of all levels.
    pub fn host_status(&self) -> std::io::Result<HostStatus> {
        let stack = self.stack();
        let top = stack.top().file.status()?;
        let below = stack.top_down().skip(1).filter_map(|(_, level)| level.file.status().ok());
        Ok(HostStatus { blocks: top.blocks + below.map(|status| status.blocks).sum::<u64>(), ..top })
    }

    /// From here on the kernel may read and write the file of this raw image in our place. Nothing that is counted or
    /// remembered of writes is the whole truth then: a sync always syncs, and the disk is as long as the file.
    pub fn pass_through(&self, backing: std::sync::Arc<Backing>) {
        let _ = self.backing.set(backing);
    }

    /// The file that the kernel may read and write in our place.
    pub fn backing(&self) -> Option<&std::sync::Arc<Backing>> {
        self.backing.get()
    }

    /// True while reads and writes may go past us.
    pub fn may_be_passed(&self) -> bool {
        self.backing.get().is_some_and(|backing| backing.may_pass())
    }

    /// Waits for what runs and lets nothing new begin; what arrives waits for [`thaw`](Self::thaw). Blocks; not
    /// for runners. Pios parked for space do not count as running.
    pub fn freeze(&self) {
        self.gate.close();
    }

    /// Ends a [`freeze`](Self::freeze).
    pub fn thaw(&self) {
        self.gate.open().into_iter().for_each(|job| self.submit(job));
    }

    // What the files of this room share.

    /// The levels as they are now. Inside the gate they stay so; outside, they are those of this moment.
    fn stack(&self) -> Guard<Arc<Stack>> {
        self.stack.load()
    }

    /// The writable level's file, for messages.
    fn path(&self) -> std::path::PathBuf {
        self.stack().top().path.clone()
    }

    /// The disk, for messages: its file where it has no other, else the image's name and not that of its newest file.
    fn shown(&self) -> std::path::PathBuf {
        let stack = self.stack();
        if stack.top_down().nth(1).is_none() { stack.top().path.clone() } else { self.name.clone().into() }
    }

    fn dirty_pages(&self) -> u64 {
        self.stack().bat.as_ref().map_or(0, |bat| bat.dirty_pages())
    }

    fn submit(&self, job: runner::Job) {
        self.engine.runners.submit(self.id, job);
    }

    /// Goes on with `then` once the cluster is locked: at once, or on the runner that is handed the lock. All that wait for
    /// a cluster come here; the caller holds no other.
    fn with_cluster(&self, cluster: u64, mode: LockMode, then: impl FnOnce() + Send + 'static) {
        let queued = |then| -> runner::Job { Box::new(then) };
        if let Some(then) = self.locks.lock_or_queue(cluster, mode, then, queued) {
            then();
        }
    }

    fn unlock(&self, cluster: u64, mode: LockMode) {
        self.locks.unlock(cluster, mode, |job| self.submit(job));
    }

    /// Runs `job` when the gate opens, or now when it has.
    fn outside(&self, job: runner::Job) {
        if let Some(job) = self.gate.wait(job) {
            self.submit(job);
        }
        // `close` may have looked for the last time just before the job came.
        if self.is_closed() {
            self.gate.take_outside().into_iter().for_each(|job| self.submit(job));
        }
    }

    fn stage(&self) -> Stage {
        self.marker.stage()
    }

    fn ready(&self) -> Ready {
        if self.ends.has_failed() {
            return Ready::No(self.failure().unwrap_or_else(|| self.closed_error()));
        }
        match self.stage() {
            Stage::Marked => Ready::Yes,
            Stage::Unmarked => Ready::Unmarked,
            Stage::ReadOnly => {
                Ready::No(Error::at(Kind::ReadOnly, self.path(), "the image was opened read-only"))
            }
        }
    }

    fn is_closing(&self) -> bool {
        self.ends.is_closing()
    }

    /// Whatever comes fails at once.
    pub fn is_closed(&self) -> bool {
        self.ends.is_closed()
    }

    fn closed_error(&self) -> Error {
        Error::at(Kind::Io, self.path(), "the image is closed")
    }

    /// Why the image turned read-only after it was opened.
    pub fn failure(&self) -> Option<Error> {
        self.ends.failure()
    }

    /// Read-only from now on (R7): every waiter and every later fsync fails until the image is closed.
    fn fail(self: &Arc<Self>, error: &Error) {
        // Before any thread hears of it (L5).
        if let Some(book) = self.book.get()
            && !broken(Rule::L5)
        {
            book.failed();
        }
        if !self.ends.fail(error) {
            return;
        }
        self.engine.emit(ImageEvent::ReadOnly { image: self.name.clone(), reason: error.to_string() });
        // Not here: this may be a thread that holds the header or a cluster.
        let (image, error) = (Arc::clone(self), error.clone());
        self.submit(Box::new(move || {
            image.give_up_pages();
            image.fail_parked(&error);
            image.wake_throttled();
        }));
    }

    /// Dirty pages that will never be written keep no pio waiting.
    fn give_up_pages(&self) {
        if let Some(bat) = &self.stack().bat {
            bat.give_up();
            self.engine.pages_are_clean();
        }
    }
}
