//! What the file of the top is busy with on the host, and what the host cannot do.

use crate::sync::{AtomicBool, AtomicU32, Ordering};

/// What is known of the host.
#[derive(Default)]
pub(super) struct Host {
    /// Punches, extensions and cuts running.
    busy: AtomicU32,
    /// It answered EOPNOTSUPP to a punch.
    cannot_punch: AtomicBool,
}

impl Host {
    /// Runs `call`, which holds the host's inode lock: writers on transport threads would wait for it, and go to runners
    /// meanwhile.
    pub(super) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.busy.fetch_add(1, Ordering::SeqCst);
        let done = call();
        self.busy.fetch_sub(1, Ordering::SeqCst);
        done
    }

    /// True while an inline write might wait for the inode lock.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    /// True until a punch was refused.
    pub(super) fn can_punch(&self) -> bool {
        !self.cannot_punch.load(Ordering::SeqCst)
    }

    /// A punch was refused. True: the first one.
    pub(super) fn refuses_punches(&self) -> bool {
        !self.cannot_punch.swap(true, Ordering::SeqCst)
    }
}
