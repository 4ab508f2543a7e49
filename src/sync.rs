//! The synchronisation types of the whole library, in one place, so that a model checker can stand in for them.
//!
//! No state here is left half-changed by a panic (every critical section is a few assignments), so a poisoned
//! mutex is simply taken.

pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

/// Locks `mutex`, poisoned or not.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One cache line for one value, so that threads that write neighbours do not disturb each other.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Padded<T>(pub T);

/// Number of shards of per-thread counters: more than transport threads (2..8) and runners (16) together that
/// are busy at once on common machines; a collision costs time only.
pub const SHARDS: usize = 16;

/// The calling thread's shard, 0..[`SHARDS`].
pub fn thread_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static SHARD: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
    SHARD.with(|s| *s)
}
