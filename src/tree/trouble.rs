//! What the kernel gets when something fails, and what the log gets.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Kind};
use crate::fuse::ops::Errno;
use crate::io::holder;

/// Lines a second. A dead disk fails every request; the log must survive that, and the first lines say it all.
const PER_SECOND: u64 = 10;

/// Turns errors into errnos, and logs those that a person should hear of.
pub(super) struct Trouble {
    start: Instant,
    /// Lines of the current second, and in the upper half which second that is.
    lines: AtomicU64,
}

impl Trouble {
    /// Nothing has failed yet.
    pub(super) fn new() -> Trouble {
        Trouble { start: Instant::now(), lines: AtomicU64::new(0) }
    }

    /// The errno for `e`, which happened while `doing` something with `path`.
    pub(super) fn errno(&self, e: &Error, path: &Path, doing: &str) -> Errno {
        // The others are answers to the caller, or have an event of their own (a full host).
        let serious = matches!(e.kind(), Kind::Io | Kind::Damaged | Kind::InUse);
        // Logged with the name of who holds it, once that is known.
        let unnamed = holder::unnamed(e).is_some();
        if serious && !unnamed && self.may_log() {
            match e.file() {
                Some(file) if file == path => log::error!("{doing} failed: {e}"),
                _ => log::error!("{doing} failed: {}: {e}", path.display()),
            }
        }
        Errno::from(e)
    }

    /// The errno for a change that was refused or failed. Logged whatever it is: an errno alone does not say why.
    pub(super) fn refused(&self, e: &Error, doing: &str) -> Errno {
        if e.kind() != Kind::Unsupported && self.may_log() {
            log::warn!("cannot {doing}: {e}");
        }
        Errno::from(e)
    }

    fn may_log(&self) -> bool {
        let second = self.start.elapsed().as_secs() << 32;
        let count = |old: u64| if old >> 32 == second >> 32 { old + 1 } else { second + 1 };
        let old = self.lines.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(count(old)));
        count(old.unwrap_or(0)) & 0xFFFF_FFFF <= PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_takes_ten_lines_a_second() {
        let trouble = Trouble::new();
        let begun = Instant::now();
        let logged = (0..1000).filter(|_| trouble.may_log()).count();
        let seconds = begun.elapsed().as_secs() as usize + 2;
        assert!(logged >= 10 && logged <= 10 * seconds, "{logged}");
    }
}
