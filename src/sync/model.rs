//! Stand-ins of the model checker shuttle for the types of `std`. Its threads are coroutines on one thread of the
//! system; at every operation on one of these types it chooses which goes on.
//!
//! What it does not see: relaxed orderings (every atomic is SeqCst), `arc_swap`, `OnceLock`, and rayon, whose threads
//! are real.

use std::cell::Cell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

pub use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
pub use shuttle::sync::{Arc, PoisonError, TryLockError, Weak, mpsc};
use shuttle::sync::{LockResult, TryLockResult};
pub use shuttle::thread;

use super::Bug;

/// Shuttle's mutex; its guard knows it, so that a wait with a time limit can give up.
#[derive(Default)]
pub struct Mutex<T: ?Sized>(shuttle::sync::Mutex<T>);

/// The guard of a [`Mutex`].
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    guard: shuttle::sync::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// A mutex around `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(shuttle::sync::Mutex::new(value))
    }
}

impl<T: ?Sized> Mutex<T> {
    /// As `std`'s.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        self.guarded(self.0.lock())
    }

    /// As `std`'s.
    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Ok(MutexGuard { mutex: self, guard }),
            Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
            Err(TryLockError::Poisoned(e)) => self.guarded(Err(e)).map_err(TryLockError::Poisoned),
        }
    }

    fn guarded<'a>(
        &'a self,
        result: LockResult<shuttle::sync::MutexGuard<'a, T>>,
    ) -> LockResult<MutexGuard<'a, T>> {
        match result {
            Ok(guard) => Ok(MutexGuard { mutex: self, guard }),
            Err(e) => Err(PoisonError::new(MutexGuard { mutex: self, guard: e.into_inner() })),
        }
    }
}

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // To look inside would be a step of the model.
        f.write_str("Mutex")
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// Shuttle's condition variable, with time limits.
#[derive(Debug, Default)]
pub struct Condvar(shuttle::sync::Condvar);

/// Whether a wait ended by its time limit.
#[derive(Clone, Copy, Debug)]
pub struct WaitTimeoutResult;

impl WaitTimeoutResult {
    /// Always.
    pub fn timed_out(&self) -> bool {
        true
    }
}

impl Condvar {
    /// As `std`'s.
    pub const fn new() -> Condvar {
        Condvar(shuttle::sync::Condvar::new())
    }

    /// As `std`'s.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        let MutexGuard { mutex, guard } = guard;
        mutex.guarded(self.0.wait(guard))
    }

    /// A model has no time: others may run meanwhile, and then the limit has passed.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        _: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let mutex = guard.mutex;
        drop(guard);
        thread::yield_now();
        match mutex.lock() {
            Ok(guard) => Ok((guard, WaitTimeoutResult)),
            Err(e) => Err(PoisonError::new((e.into_inner(), WaitTimeoutResult))),
        }
    }

    /// As `std`'s.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// As `std`'s.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// As [`plain::lock`](super::plain::lock).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`plain::wait`](super::plain::wait).
pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// As [`plain::wait_timeout`](super::plain::wait_timeout).
pub fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> (MutexGuard<'a, T>, WaitTimeoutResult) {
    condvar.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread's shard: by its number in the model, so that each execution begins alike.
pub fn thread_shard() -> usize {
    usize::from(thread::current().id()) % super::SHARDS
}

thread_local!(static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) });

/// True while `bug` is wanted.
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Runs `body` with one bug.
pub fn with_bug<T>(bug: Bug, body: impl FnOnce() -> T) -> T {
    PLANTED.set(Some(bug));
    let result = body();
    PLANTED.set(None);
    result
}
