//! Who holds an image that could not be opened: looked for once the errno is answered, for the log and for commands.
//!
//! A look goes through all of /proc, or waits for the keeper. So it never comes before the answer of an open, and under no
//! lock that an open needs; there is one at a time, and what it found is remembered for a while: a loop of opens of a
//! locked image costs a look now and then, and may run for ever.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::locked;
use crate::error::Error;
use crate::io::holder::{self, HeldLock, Holder};

/// How long an answer is taken for true. A person who ends the holder and tries again is to read of the next one.
const REMEMBERED: Duration = Duration::from_secs(5);
/// Most locks that are remembered, and most that wait for a look: a folder has few images that others hold.
const MOST: NonZeroUsize = NonZeroUsize::new(64).expect("not 0");

/// The looks of one folder.
pub(super) struct Wanted {
    /// Protects what is known and what is still to be looked for. A leaf.
    state: Mutex<State>,
    /// One look at a time. Held across it; only those who wait for a name take it. Before `state`.
    looking: Mutex<()>,
}

struct State {
    known: LruCache<HeldLock, (Instant, Option<Holder>)>,
    queue: VecDeque<(HeldLock, &'static str, Error)>,
    /// A thread works on the queue.
    running: bool,
}

impl Default for Wanted {
    fn default() -> Wanted {
        let state = State { known: LruCache::new(MOST), queue: VecDeque::new(), running: false };
        Wanted { state: Mutex::new(state), looking: Mutex::default() }
    }
}

impl State {
    fn remembered(&mut self, held: HeldLock) -> Option<Option<Holder>> {
        let (at, holder) = self.known.get(&held)?;
        (at.elapsed() < REMEMBERED).then(|| holder.clone())
    }
}

impl Wanted {
    /// Looks, unless it is known. Blocks.
    pub(super) fn look(&self, held: HeldLock, look: &dyn Fn(HeldLock) -> Option<Holder>) -> Option<Holder> {
        let _one = locked(&self.looking);
        if let Some(known) = locked(&self.state).remembered(held) {
            return known;
        }
        let holder = look(held);
        locked(&self.state).known.put(held, (Instant::now(), holder.clone()));
        holder
    }

    /// Notes a look for later. True: no thread works on the queue yet.
    pub(super) fn enqueue(&self, held: HeldLock, doing: &'static str, error: &Error) -> bool {
        let mut state = locked(&self.state);
        // What is remembered was logged, and what is queued will be.
        let queued = state.queue.iter().any(|(other, ..)| *other == held);
        if queued || state.queue.len() >= MOST.get() || state.remembered(held).is_some() {
            return false;
        }
        state.queue.push_back((held, doing, error.clone()));
        !std::mem::replace(&mut state.running, true)
    }

    /// Works on the queue until it is empty. Blocks.
    pub(super) fn work(&self, look: &dyn Fn(HeldLock) -> Option<Holder>, log: &dyn Fn(&str, &Error)) {
        loop {
            let mut state = locked(&self.state);
            let Some((held, doing, error)) = state.queue.front().cloned() else {
                state.running = false;
                return;
            };
            drop(state);
            let holder = self.look(held, look);
            // Out of the queue only now that it is remembered: no second look is noted meanwhile.
            locked(&self.state).queue.pop_front();
            log(doing, &holder::named(&error, holder.as_ref()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::io::lock::Use;
    use std::cell::Cell;

    const LOCK: HeldLock = HeldLock::Delta { dev: 1, ino: 2, used: Use::Writer };

    fn in_use() -> Error {
        Error::at(Kind::InUse, "/images/a.hds", "is in use")
    }

    #[test]
    fn a_loop_of_opens_of_a_locked_image_costs_one_look_and_one_line() {
        let (wanted, looks, lines) = (Wanted::default(), Cell::new(0), Cell::new(0));
        let look = |_| {
            looks.set(looks.get() + 1);
            // An open that fails while the look goes on is covered by it.
            assert!(!wanted.enqueue(LOCK, "open", &in_use()));
            None
        };
        assert!(wanted.enqueue(LOCK, "open", &in_use()));
        for _ in 0..100 {
            wanted.work(&look, &|_, _| lines.set(lines.get() + 1));
            assert!(!wanted.enqueue(LOCK, "open", &in_use()));
        }
        assert_eq!((looks.get(), lines.get()), (1, 1));
    }

    #[test]
    fn what_waits_for_a_look_is_bounded() {
        let wanted = Wanted::default();
        for ino in 0..1000 {
            wanted.enqueue(HeldLock::Descriptor { ino }, "open", &in_use());
        }
        assert_eq!(locked(&wanted.state).queue.len(), MOST.get());
        wanted.work(&|_| None, &|_, _| {});
        let state = locked(&wanted.state);
        assert!(state.queue.is_empty() && !state.running && state.known.len() == MOST.get());
    }
}
