//! The in-use mark of the top (R1), and the cut of its free tail.
//!
//! **R1** The top is marked in use, durably, before its first change; a level below the top that a merge changes,
//! likewise. Clean close: BAT durable; file cut to its last used cluster; fsync; then the mark cleared, synced. A
//! running operation counts as a user. An in-use mark below the top at open means "finish the close", not "refuse".

use super::alloc::Allocator;
use super::blocking::wait_for;
use super::changed::Changed;
use super::scan::{self, Scan};
use super::stack::Stack;
use super::tracking::{self, uuid_text};
use super::{Image, Layout, Level, Operating, Ready, Reply};
use crate::error::{Error, Kind, Result};
use crate::format::header::{CLOSED, CLOSED_V21, FLAG_EMPTY, Geometry, Header};
use crate::io::file::write_full;
use crate::rules::{Rule, broken};
use crate::sync::{Arc, AtomicU8, Mutex, MutexGuard, Ordering, lock};
use crate::vdisk::runner::Job;

/// How far an image is on its way to its first change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    ReadOnly = 0,
    /// Scanned; the first change marks it in use.
    Unmarked = 1,
    Marked = 2,
}

/// The stage of an image, and the jobs that wait for the next one.
#[derive(Default)]
pub(super) struct UseMark {
    /// A [`Stage`]; it goes up by one, to `Marked` under `waiting`.
    stage: AtomicU8,
    /// None: no thread marks. Else one does, and these go on when it has ended. A leaf.
    waiting: Mutex<Option<Vec<Job>>>,
}

/// What a thread that wants the image marked does.
enum Marking<T> {
    /// It looks at the stage again.
    Over(T),
    /// Another thread marks; the token waits.
    Queued,
    /// It marks, and says how that ended: [`UseMark::end`].
    Ours(T),
}

impl UseMark {
    fn waiting(&self) -> MutexGuard<'_, Option<Vec<Job>>> {
        let waiting = lock(&self.waiting);
        debug_assert!(self.is_sound(&waiting), "what waits for the mark");
        waiting
    }

    /// What holds whenever the lock is free: a thread marks only what is scanned and not marked; what waits for it would
    /// else wait for ever, or the image be marked twice.
    fn is_sound(&self, waiting: &Option<Vec<Job>>) -> bool {
        waiting.is_none() || self.stage() == Stage::Unmarked
    }

    /// How far the image is.
    pub(super) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::SeqCst) {
            0 => Stage::ReadOnly,
            1 => Stage::Unmarked,
            _ => Stage::Marked,
        }
    }

    fn step(&self, from: Stage, to: Stage) {
        let _ = self.stage.compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The image was scanned.
    pub(super) fn may_be_written(&self) {
        self.step(Stage::ReadOnly, Stage::Unmarked);
    }

    /// Begins to mark, or keeps `job(token)` until it is done.
    fn begin<T>(&self, token: T, job: impl FnOnce(T) -> Job) -> Marking<T> {
        let mut waiting = self.waiting();
        if self.stage() != Stage::Unmarked {
            return Marking::Over(token);
        }
        match &mut *waiting {
            Some(queue) => {
                queue.push(job(token));
                Marking::Queued
            }
            None => {
                *waiting = Some(Vec::new());
                Marking::Ours(token)
            }
        }
    }

    /// The image is marked, durably; or it is not (`marked` false), and the next one tries. Returns what waited.
    fn end(&self, marked: bool) -> Vec<Job> {
        let mut waiting = self.waiting();
        if marked {
            self.step(Stage::Unmarked, Stage::Marked);
        }
        waiting.take().unwrap_or_default()
    }
}

impl Image {
    /// Marks the image in use if it is not, and waits for it. Not for runners.
    pub(super) fn mark_and_wait(self: &Arc<Self>) -> Result<()> {
        match self.ready() {
            Ready::Yes => Ok(()),
            Ready::No(e) => Err(e),
            Ready::Unmarked => {
                let inside = self.enter_and_wait()?;
                let done = wait_for(|reply: Reply<()>| {
                    self.mark_first(reply, |reply| reply(Ok(())), |reply, result| reply(result));
                });
                drop(inside);
                done
            }
        }
    }

    /// Runs `then(token)` once the image is marked in use, marking it here if no other thread does; `fail(token)` on
    /// failure. For runners.
    pub(super) fn mark_first<T: Send + 'static>(
        self: &Arc<Self>,
        token: T,
        then: fn(T),
        fail: fn(T, Result<()>),
    ) {
        let token = match self.marker.begin(token, |token| Box::new(move || then(token))) {
            Marking::Over(token) => return then(token),
            Marking::Queued => return,
            Marking::Ours(token) => token,
        };
        let marked = self.mark();
        self.marker.end(marked.is_ok()).into_iter().for_each(|job| self.submit(job));
        match marked {
            Ok(()) => then(token),
            Err(e) => fail(token, Err(e)),
        }
    }

    /// Before the first change:
    /// 1. the header says in use, not empty, no extension; written in one sector;
    /// 2. fdatasync;
    /// 3. the file's free tail is cut off (R3: it is not trusted to be zero);
    /// 4. only then anything may be allocated or written.
    ///
    /// 3 before 2 would change the file of an image that still says "clean" and, closed as v2.1, "trust my bitmap".
    fn mark(self: &Arc<Self>) -> Result<()> {
        let stack = self.stack();
        let top = stack.top();
        if stack.bat.is_none() {
            return Ok(()); // Raw: there is no header, and nothing is allocated.
        }
        let scan = lock(&stack.state.scan).take();
        let Some(scan) = scan else {
            return Err(Error::at(Kind::ReadOnly, &top.path, "the image was not opened for writing"));
        };
        let result = (|| {
            self.still_ours(&stack)?;
            let mut header = lock(&stack.state.header);
            let Some(h) = &mut *header else { return Ok(()) };
            if h.in_use == CLOSED_V21 && h.extension != 0 {
                let path = top.path.display();
                match &*self.operations.changed() {
                    Some(of) => {
                        log::info!("{path}: changes since {} are tracked in memory", uuid_text(of.guid))
                    }
                    None => log::warn!("{path}: the format extension is dropped by this write"),
                }
            }
            let before = *h;
            *h = h.marked();
            if *h != before && !broken(Rule::R1) {
                write_full(&*top.file, &h.encode(), 0).map_err(|e| {
                    *h = before;
                    Error::io(&e, &top.path, "cannot mark the image in use")
                })?;
            }
            drop(header);
            if !broken(Rule::R1) {
                self.sync_data(&stack)?;
            }
            let end = stack.geometry.cluster_position(scan.end);
            top.file.set_len(end).map_err(|e| Error::io(&e, &top.path, "cannot cut off the free tail"))
        })();
        match result {
            Ok(()) => {
                let allocator = self.new_allocator(&stack.geometry, scan);
                if stack.state.allocator.set(allocator).is_err() {
                    unreachable!("the scan is taken once");
                }
                Ok(())
            }
            Err(e) => {
                *lock(&stack.state.scan) = Some(scan);
                Err(e)
            }
        }
    }

    /// The allocator of a top whose scan found this.
    pub(super) fn new_allocator(&self, geometry: &Geometry, scan: Scan) -> Allocator {
        let step = self.engine.options.extend / self.cluster;
        Allocator::new(scan.end, geometry.file_clusters(), step, scan.free)
    }
}

impl Operating<'_> {
    /// Lower levels that still say "in use": a crash came between a snapshot or a merge and the end of its last step. All
    /// that their BATs name was durable before; what is left is their own clean close: the free tail cut off, and then
    /// the mark cleared. One that is shared with a clone, or cannot be written, stays as it is (R9).
    pub(super) fn settle_lower(&self, stack: &Stack) {
        for (_, level) in stack.top_down().skip(1) {
            let Layout::Ploop(header) = &level.layout else { continue };
            let shared = level.file.status().map_or(true, |status| status.links > 1);
            if !header.is_in_use() || shared {
                continue;
            }
            match close_lower(level, header) {
                Ok(()) => log::info!("{}: closed; a crash had left it in use", level.path.display()),
                Err(e) => log::warn!("{e}; its in-use mark stays"),
            }
        }
    }

    /// The clean close of the image: [`unmark`](Self::unmark) of its top, with the changes that were tracked.
    pub(super) fn unmark_tracked(&self) -> Result<()> {
        self.unmark(&self.stack(), self.operations.changed().as_deref())
    }

    /// The clean close of a marked top, after its last round:
    /// 1. cut the file to its last used cluster; put what has changed behind it, where that was tracked;
    /// 2. fsync;
    /// 3. the header says closed (and empty, when nothing is mapped), and where the extension is; written in one sector;
    /// 4. fsync.
    ///
    /// 3 before 2 could leave a file that says "clean" and is longer or shorter than its BAT knows, or one that says "trust
    /// my bitmap" and has only a part of it.
    pub(super) fn unmark(&self, stack: &Stack, changed: Option<&Changed>) -> Result<()> {
        let top = stack.top();
        let sync = || {
            top.file
                .sync_all()
                .map_err(|e| Error::io(&e, &top.path, "fsync failed; the file keeps its in-use mark"))
        };
        let Some(allocator) = stack.state.allocator.get() else {
            return sync(); // Raw.
        };
        self.still_ours(stack)?;
        let end = stack.geometry.cluster_position(allocator.used_end());
        let cut =
            || top.file.set_len(end).map_err(|e| Error::io(&e, &top.path, "cannot cut off the free tail"));
        cut()?;
        let mut extension = 0;
        if let Some(changed) = changed {
            match tracking::write(changed, stack, end) {
                Ok(sector) => extension = sector,
                Err(e) => {
                    log::warn!("{e}: it is lost, and everything counts as changed");
                    cut()?;
                }
            }
        }
        sync()?;
        let mut header = lock(&stack.state.header);
        if let Some(h) = &mut *header {
            let closed = closed(h, allocator.used() == 0, extension);
            write_full(&*top.file, &closed.encode(), 0)
                .map_err(|e| Error::io(&e, &top.path, "cannot clear the in-use mark"))?;
            *h = closed;
        }
        drop(header);
        sync()
    }
}

/// The clean close of a level below the top that is marked in use and whose BAT is durable; the order is that of
/// [`Operating::unmark`].
pub(super) fn close_lower(level: &Level, header: &Header) -> Result<()> {
    let found = scan::scan(level, &header.geometry())?;
    let end = header.geometry().cluster_position(found.end);
    let closed = closed(header, found.end == 0, 0);
    let io = |e: std::io::Error| Error::io(&e, &level.path, "cannot clear the in-use mark");
    level.file.set_len(end).and_then(|()| level.file.sync_all()).map_err(io)?;
    write_full(&*level.file, &closed.encode(), 0).and_then(|()| level.file.sync_all()).map_err(io)
}

/// A header as it is after a clean close; `extension` is the sector of the format extension, or 0.
fn closed(header: &Header, empty: bool, extension: u64) -> Header {
    let flags = if empty { header.flags | FLAG_EMPTY } else { header.flags & !FLAG_EMPTY };
    let in_use = if extension == 0 { CLOSED } else { CLOSED_V21 };
    Header { in_use, flags, extension, ..*header }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job((): ()) -> Job {
        Box::new(|| ())
    }

    #[test]
    fn one_thread_marks_and_the_others_go_on_when_it_has_ended() {
        let marker = UseMark::default();
        assert!(matches!(marker.begin((), job), Marking::Over(())), "nothing is scanned");
        marker.may_be_written();
        assert!(matches!(marker.begin((), job), Marking::Ours(())));
        assert!(matches!(marker.begin((), job), Marking::Queued));
        assert_eq!((marker.end(false).len(), marker.stage()), (1, Stage::Unmarked));
        assert!(matches!(marker.begin((), job), Marking::Ours(())), "the next one tries");
        assert_eq!((marker.end(true).len(), marker.stage()), (0, Stage::Marked));
        assert!(matches!(marker.begin((), job), Marking::Over(())));
    }

    #[test]
    fn a_job_that_waits_for_the_mark_of_a_marked_image_is_not_sound() {
        let marker = UseMark::default();
        let waiting = Some(Vec::new());
        assert!(!marker.is_sound(&waiting), "nothing is scanned");
        marker.may_be_written();
        assert!(marker.is_sound(&waiting));
        marker.step(Stage::Unmarked, Stage::Marked);
        assert!(!marker.is_sound(&waiting) && marker.is_sound(&None));
    }
}
