//! When a new file is finished: closed or moved in, and still for two seconds. Pure; the clock is the caller's.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::time::{Duration, Instant};

use super::scan::Stamp;

/// How long a file must not change (docs/design.md#what-is-an-image): long enough for a tool that closes and reopens
/// what it makes, short enough for a person who waits.
pub(super) const STILL: Duration = Duration::from_secs(2);

/// Files that are watched until they are still.
#[derive(Default)]
pub(super) struct Settling {
    waiting: HashMap<OsString, (Stamp, Instant)>,
}

impl Settling {
    /// The file was closed, moved in or found: its time begins anew.
    pub(super) fn touch(&mut self, file: &OsStr, stamp: Stamp, now: Instant) {
        self.waiting.insert(file.to_owned(), (stamp, now + STILL));
    }

    /// The file is gone.
    pub(super) fn forget(&mut self, file: &OsStr) {
        self.waiting.remove(file);
    }

    /// True while its time runs.
    pub(super) fn contains(&self, file: &OsStr) -> bool {
        self.waiting.contains_key(file)
    }

    /// When to ask again; None: nothing is waiting.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.values().map(|(_, due)| *due).min()
    }

    /// Takes out every file that has been still for long enough; one that has changed waits anew.
    pub(super) fn ready(&mut self, now: Instant, stamp: impl Fn(&OsStr) -> Option<Stamp>) -> Vec<OsString> {
        let due: Vec<OsString> =
            self.waiting.iter().filter(|(_, (_, due))| *due <= now).map(|(file, _)| file.clone()).collect();
        let mut ready = Vec::new();
        for file in due {
            let Some((before, _)) = self.waiting.remove(&file) else { continue };
            match stamp(&file) {
                Some(after) if after == before => ready.push(file),
                Some(after) => self.touch(&file, after, now),
                None => {}
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(len: u64) -> Stamp {
        Stamp { identity: (1, 1), len, mtime: (0, 0), links: 1 }
    }

    #[test]
    fn a_still_file_is_ready_after_two_seconds_and_not_before() {
        let (mut settling, start) = (Settling::default(), Instant::now());
        settling.touch("a".as_ref(), stamp(1), start);
        assert_eq!(settling.next(), Some(start + STILL));
        assert!(settling.ready(start + STILL / 2, |_| Some(stamp(1))).is_empty());
        assert_eq!(settling.ready(start + STILL, |_| Some(stamp(1))), ["a"]);
        assert_eq!(settling.next(), None);
    }

    #[test]
    fn a_file_that_changed_waits_anew() {
        let (mut settling, start) = (Settling::default(), Instant::now());
        settling.touch("a".as_ref(), stamp(1), start);
        assert!(settling.ready(start + STILL, |_| Some(stamp(2))).is_empty());
        assert_eq!(settling.next(), Some(start + 2 * STILL));
        assert_eq!(settling.ready(start + 2 * STILL, |_| Some(stamp(2))), ["a"]);
    }

    #[test]
    fn a_file_that_went_is_forgotten() {
        let (mut settling, start) = (Settling::default(), Instant::now());
        settling.touch("a".as_ref(), stamp(1), start);
        assert!(settling.ready(start + STILL, |_| None).is_empty());
        settling.touch("b".as_ref(), stamp(1), start);
        settling.forget("b".as_ref());
        assert_eq!(settling.next(), None);
    }
}
