//! The synchronisation types of `vdisk` and of what it stands on, as far as the models run it, in one place, so that a
//! model checker can stand in for them: with the feature `shuttle` they are the ones of `model`, and only the tests in
//! `vdisk::models` can run. Other rooms, and what models do not reach, use those of the standard library.
//!
//! No state under a mutex is left half-changed by a panic (every critical section is a few assignments), so a poisoned
//! mutex is simply taken: [`plain`].

#[cfg(feature = "shuttle")]
pub mod model;
pub mod plain;

#[cfg(feature = "shuttle")]
pub use model::{
    Arc, AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering,
    PoisonError, TryLockError, Weak, lock, mpsc, planted, thread, thread_shard, wait, wait_timeout,
};
#[cfg(not(feature = "shuttle"))]
pub use plain::{lock, wait, wait_timeout};
#[cfg(not(feature = "shuttle"))]
pub use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak, mpsc},
    thread,
};

/// One cache line for one value, so that threads that write neighbours do not disturb each other.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Padded<T>(pub T);

/// Number of shards of per-thread counters: more than transport threads (2..8) and runners (16) together that
/// are busy at once on common machines; a collision costs time only.
pub const SHARDS: usize = 16;

/// The calling thread's shard, 0..[`SHARDS`].
#[cfg(not(feature = "shuttle"))]
pub fn thread_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static SHARD: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
    SHARD.with(|s| *s)
}

/// Mistakes that the models must find, each made in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A cluster lock: no second try after the flag was set.
    NoSecondTry,
    /// The gate: who leaves last wakes the closer without its mutex.
    WakeWithoutMutex,
    /// The BAT cache: a page that was written is clean, whatever came meanwhile.
    CleanWhateverCame,
    /// The allocator: its state may change between the look and the place in the queue.
    LetGoBeforeWaiting,
    /// An fsync joins the round that runs already.
    JoinRunningRound,
}

/// True while a test of the models wants this mistake made; never in a real build.
#[cfg(not(feature = "shuttle"))]
pub const fn planted(_: Bug) -> bool {
    false
}
