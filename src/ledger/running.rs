//! What each thread executes stands in the ledger, so that a successor knows it. What ended daemons before is executed
//! apart from all else, or not at all (`deaths` says what).
//!
//! Without a ledger there is nothing of it. With one, a request costs one relaxed store when it begins and one when it
//! ends. Since when a thread executes it is seen by looking twice: a number comes back for no other request.
//!
//! While something is executed apart ([`Apart`]), each request and job takes a lock at its beginning and its end: those
//! few suspects wait until nothing else is executed, and all else waits meanwhile. No wait is longer than [`PATIENCE`]:
//! what is executed may hang on a host, and a suspect may need what waits. Then it is not alone, and not accused.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::Ledger;
use super::deaths::{Verdict, Work};
use crate::sync::plain::{lock, wait_timeout};

/// The longest wait of a suspect for all others, and of all others for a suspect: below what a guest waits for its disk.
const PATIENCE: Duration = Duration::from_secs(5);
/// A daemon that lives so long has not died of what it does apart; the next death is the first of a row for its keeper, too.
const HEALTHY: Duration = Duration::from_secs(60);
/// A thread that has no place: there are more threads than places, or no ledger.
const NONE: u32 = u32::MAX;

/// The process's; none without a ledger.
static WATCH: OnceLock<Watch> = OnceLock::new();

thread_local!(static HERE: Here = const { Here::new() });

/// What the calling thread does.
struct Here {
    /// Its place in the ledger.
    place: Cell<u32>,
    work: Cell<Work>,
    /// So often it is counted as executing something that is no suspect.
    counted: Cell<usize>,
    /// It executes a suspect, alone.
    alone: Cell<bool>,
}

impl Here {
    const fn new() -> Here {
        let (place, work) = (Cell::new(NONE), Cell::new(0));
        Here { place, work, counted: Cell::new(0), alone: Cell::new(false) }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        if let (Some(watch), true) = (WATCH.get(), self.place.get() != NONE) {
            watch.ledger.give_thread_back(self.place.get());
        }
    }
}

/// Writes down what threads execute.
pub(crate) struct Watch {
    ledger: Arc<Ledger>,
    refused: HashSet<Work>,
    suspects: HashSet<Work>,
    /// Suspects are executed apart.
    is_apart: AtomicBool,
    began: Instant,
    /// Protects who is executed while something is apart. A leaf; waits beside it hold whatever the executing thread does,
    /// for a bounded time.
    apart: Mutex<Apart>,
    changed: Condvar,
}

#[derive(Default)]
struct Apart {
    /// Executions of what is no suspect.
    running: usize,
    /// The suspect that is executed, and by how many threads.
    alone: Option<(Work, usize)>,
}

/// Something is executed until this is dropped, on the thread that began it.
#[must_use]
pub(crate) struct Executing<'a> {
    watch: Option<&'a Watch>,
    before: Work,
    entry: Entry,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// Nothing is apart, or it is a part of what is alone.
    Free,
    Counted,
    Alone,
}

/// From now on what this process executes stands in `ledger`. Once, before a thread executes anything.
pub(crate) fn watch(ledger: &Arc<Ledger>, verdict: Verdict) {
    let _ = WATCH.set(Watch::new(ledger, verdict));
}

/// The calling thread executes `work`. 0: nothing that could be accused.
pub(crate) fn begin(work: Work) -> Executing<'static> {
    match WATCH.get() {
        Some(watch) if work != 0 => watch.begin(work),
        _ => Executing { watch: None, before: 0, entry: Entry::Free },
    }
}

/// What the calling thread executes; 0: nothing.
pub(crate) fn current() -> Work {
    HERE.try_with(|here| here.work.get()).unwrap_or(0)
}

/// `work` has ended daemons and is not executed again.
pub(crate) fn refuses(work: Work) -> bool {
    WATCH.get().is_some_and(|watch| !watch.refused.is_empty() && watch.refused.contains(&work))
}

/// A job that is a part of what the calling thread executes.
pub(crate) fn part(job: Box<dyn FnOnce() + Send>) -> Box<dyn FnOnce() + Send> {
    let work = current();
    if work == 0 {
        return job;
    }
    Box::new(move || {
        let _executing = begin(work);
        job();
    })
}

impl Watch {
    fn new(ledger: &Arc<Ledger>, verdict: Verdict) -> Watch {
        Watch {
            ledger: ledger.clone(),
            refused: verdict.refused.into_iter().collect(),
            is_apart: AtomicBool::new(verdict.apart),
            suspects: verdict.suspects,
            began: Instant::now(),
            apart: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn begin(&self, work: Work) -> Executing<'_> {
        let nothing = Executing { watch: None, before: 0, entry: Entry::Free };
        // A thread that is about to end executes no request.
        HERE.try_with(|here| {
            let before = here.work.get();
            if before == work {
                return Executing { watch: None, before, entry: Entry::Free };
            }
            let entry =
                if self.is_apart.load(Ordering::Relaxed) { self.enter(work, here) } else { Entry::Free };
            self.put(here, work);
            Executing { watch: Some(self), before, entry }
        })
        .unwrap_or(nothing)
    }

    fn put(&self, here: &Here, work: Work) {
        here.work.set(work);
        if here.place.get() == NONE {
            let Some(place) = self.ledger.take_thread() else { return };
            here.place.set(place);
        }
        self.ledger.executes(here.place.get(), work);
        // What is executed comes behind it, also for the compiler: the processor keeps the order of one thread anyway.
        compiler_fence(Ordering::SeqCst);
    }

    fn enter(&self, work: Work, here: &Here) -> Entry {
        if here.alone.get() {
            return Entry::Free;
        }
        if self.began.elapsed() >= HEALTHY {
            self.is_apart.store(false, Ordering::Relaxed);
            self.ledger.end_apart();
            return Entry::Free;
        }
        let deadline = Instant::now() + PATIENCE;
        let (is_suspect, mine) = (self.suspects.contains(&work), here.counted.get());
        let mut apart = lock(&self.apart);
        // What it is a part of is not executed while it waits.
        apart.running -= mine;
        self.changed.notify_all();
        let free = |apart: &Apart| apart.alone.is_none_or(|(other, _)| is_suspect && other == work);
        while !free(&apart) && Instant::now() < deadline {
            apart = wait_timeout(&self.changed, apart, deadline.saturating_duration_since(Instant::now())).0;
        }
        if !is_suspect || !free(&apart) {
            apart.running += mine + 1;
            here.counted.set(mine + 1);
            return Entry::Counted;
        }
        let threads = apart.alone.map_or(0, |(_, threads)| threads);
        apart.alone = Some((work, threads + 1));
        while apart.running > 0 && Instant::now() < deadline {
            apart = wait_timeout(&self.changed, apart, deadline.saturating_duration_since(Instant::now())).0;
        }
        if apart.running == 0 {
            self.ledger.alone(work);
        }
        apart.running += mine;
        here.alone.set(true);
        Entry::Alone
    }

    fn leave(&self, entry: Entry, here: &Here) {
        if entry == Entry::Free {
            return;
        }
        let mut apart = lock(&self.apart);
        match entry {
            Entry::Counted => {
                apart.running -= 1;
                here.counted.set(here.counted.get() - 1);
            }
            _ => {
                here.alone.set(false);
                apart.alone = apart.alone.filter(|(_, threads)| *threads > 1).map(|(work, n)| (work, n - 1));
                if apart.alone.is_none() {
                    self.ledger.alone(0);
                }
            }
        }
        self.changed.notify_all();
    }
}

impl Drop for Executing<'_> {
    fn drop(&mut self) {
        let Some(watch) = self.watch else { return };
        let _ = HERE.try_with(|here| {
            watch.put(here, self.before);
            watch.leave(self.entry, here);
        });
    }
}

impl Ledger {
    fn take_thread(&self) -> Option<u32> {
        self.free().threads.take()
    }

    fn give_thread_back(&self, place: u32) {
        self.executes(place, 0);
        self.free().threads.give_back(place);
    }

    fn executes(&self, place: u32, work: Work) {
        self.word(self.layout.thread(place)).store(work, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Sizes, format};
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;
    use std::thread;

    fn watch_over(suspects: &[Work]) -> Watch {
        let sizes = Sizes { numbers: 1, opens: 1, images: 1, pages: 1, snapshots: 1 };
        let words = sizes.bytes().expect("small") / 8;
        let memory: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
        format(&memory, sizes).expect("room");
        let ledger = Arc::new(Ledger::attach(Box::new(memory)).expect("a ledger"));
        let suspects: HashSet<Work> = suspects.iter().copied().collect();
        Watch::new(&ledger, Verdict { apart: !suspects.is_empty(), suspects, ..Verdict::default() })
    }

    fn executed(watch: &Watch) -> Vec<Work> {
        // A copy: what stands there is judged by a successor.
        watch.ledger.judge_deaths(1).suspects.into_iter().collect()
    }

    #[test]
    fn what_is_executed_stands_there_until_its_end_and_then_what_it_is_a_part_of() {
        let watch = watch_over(&[]);
        let outer = watch.begin(7);
        let inner = watch.begin(8);
        assert_eq!(executed(&watch), [8]);
        drop(inner);
        assert_eq!((current(), executed(&watch)), (7, vec![7]));
        drop(outer);
        assert_eq!((current(), executed(&watch)), (0, vec![]));
    }

    #[test]
    fn a_suspect_waits_for_what_is_executed_and_all_else_for_it() {
        let watch = watch_over(&[66]);
        let innocent = watch.begin(7);
        thread::scope(|scope| {
            let (say, said) = mpsc::channel();
            let (end, ended) = mpsc::channel::<()>();
            let watch = &watch;
            scope.spawn(move || {
                let _suspect = watch.begin(66);
                say.send("suspect").expect("heard");
                ended.recv().expect("the word");
                say.send("its end").expect("heard");
            });
            assert!(said.recv_timeout(Duration::from_millis(50)).is_err(), "not beside another one");
            drop(innocent);
            assert_eq!(said.recv(), Ok("suspect"));
            let (say, late) = mpsc::channel();
            scope.spawn(move || {
                let _other = watch.begin(9);
                say.send(()).expect("heard");
            });
            assert!(late.recv_timeout(Duration::from_millis(50)).is_err(), "the suspect is alone");
            end.send(()).expect("heard");
            late.recv().expect("it goes on");
            assert_eq!(said.recv(), Ok("its end"));
        });
    }

    #[test]
    fn two_suspects_inside_of_other_work_do_not_wait_for_each_other() {
        let watch = watch_over(&[66, 67]);
        let began = Instant::now();
        thread::scope(|scope| {
            for (outer, inner) in [(1, 66), (2, 67)] {
                let watch = &watch;
                scope.spawn(move || {
                    let _outer = watch.begin(outer);
                    thread::sleep(Duration::from_millis(20));
                    let _inner = watch.begin(inner);
                    let _part = watch.begin(outer);
                });
            }
        });
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        assert_eq!(watch.apart.lock().expect("no panic").running, 0);
    }
}
