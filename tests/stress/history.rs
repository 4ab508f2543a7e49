//! What was written to each sector and when, and whether a read fits that.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub const SECTOR: u64 = 512;

/// One write of one sector: its stamp (0 is a discard), and the ticks at which it was asked for and answered.
#[derive(Clone, Copy, Debug)]
struct Entry {
    stamp: u64,
    begun: u64,
    ended: u64,
}

const NOT_YET: u64 = u64::MAX;

/// Every write that a read may still return, by sector.
pub struct History {
    /// One tick for each beginning and each end, so that "before" is a comparison.
    ticks: AtomicU64,
    judged: AtomicU64,
    sectors: Vec<Mutex<Vec<Entry>>>,
    /// When the read that each reader is at began; `NOT_YET`: it is at none.
    readers: Vec<AtomicU64>,
    /// The host's page cache copies a sector byte by byte: a read beside a write of the same sector may return the
    /// beginning of the one and the end of the other, as it may on the host's own files.
    may_tear: bool,
}

/// A write under way.
pub struct Write {
    first: u64,
    count: u64,
    stamp: u64,
    begun: u64,
}

impl Write {
    /// What is to be written: each sector full of the stamp and its own number, or zeroes.
    pub fn data(&self) -> Vec<u8> {
        (self.first..self.first + self.count).flat_map(|sector| block(self.stamp, sector)).collect()
    }
}

fn block(stamp: u64, sector: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; SECTOR as usize];
    }
    [stamp.to_le_bytes(), sector.to_le_bytes()].concat().repeat(SECTOR as usize / 16)
}

/// The stamp of a sector; None: it is torn, or another sector's.
fn stamp_of(data: &[u8], sector: u64) -> Option<u64> {
    let stamp = u64::from_le_bytes(data[..8].try_into().ok()?);
    (data == block(stamp, sector)).then_some(stamp)
}

/// Every byte is one of `legal`'s, of which one was under way when the read began or began later.
fn torn<'a>(legal: impl Iterator<Item = &'a Entry>, begun: u64, data: &[u8], sector: u64) -> bool {
    let legal: Vec<&Entry> = legal.collect();
    let blocks: Vec<Vec<u8>> = legal.iter().map(|entry| block(entry.stamp, sector)).collect();
    legal.iter().any(|entry| entry.ended > begun)
        && data.iter().enumerate().all(|(at, byte)| blocks.iter().any(|block| block[at] == *byte))
}

impl History {
    /// A disk of zeroes.
    pub fn new(sectors: u64, readers: usize) -> History {
        let zero = Entry { stamp: 0, begun: 0, ended: 0 };
        History {
            ticks: AtomicU64::new(1),
            judged: AtomicU64::new(0),
            sectors: (0..sectors).map(|_| Mutex::new(vec![zero])).collect(),
            readers: (0..readers).map(|_| AtomicU64::new(NOT_YET)).collect(),
            may_tear: false,
        }
    }

    /// The same of a disk whose files lie in the host's page cache.
    pub fn that_may_tear(self) -> History {
        History { may_tear: true, ..self }
    }

    /// The next tick.
    pub fn now(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// Sectors that were judged.
    pub fn judged(&self) -> u64 {
        self.judged.load(Ordering::Relaxed)
    }

    fn sector(&self, n: u64) -> MutexGuard<'_, Vec<Entry>> {
        self.sectors[n as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before the write is asked for.
    pub fn begin_write(&self, first: u64, count: u64) -> Write {
        let begun = self.now();
        self.begin(Write { first, count, stamp: begun, begun })
    }

    /// To be called before a discard is asked for.
    pub fn begin_zero(&self, first: u64, count: u64) -> Write {
        let begun = self.now();
        self.begin(Write { first, count, stamp: 0, begun })
    }

    fn begin(&self, write: Write) -> Write {
        let entry = Entry { stamp: write.stamp, begun: write.begun, ended: NOT_YET };
        (write.first..write.first + write.count).for_each(|n| self.sector(n).push(entry));
        write
    }

    /// To be called when it was answered.
    pub fn end_write(&self, write: Write) {
        let ended = self.now();
        // A reader that began before this may return what this write has just made old.
        let oldest = self.readers.iter().map(|begun| begun.load(Ordering::SeqCst)).min().unwrap_or(NOT_YET);
        for n in write.first..write.first + write.count {
            let mut entries = self.sector(n);
            for entry in entries.iter_mut().filter(|entry| entry.begun == write.begun) {
                entry.ended = ended;
            }
            // What nobody may read any more is forgotten.
            let newest = entries.iter().filter(|e| e.ended < oldest.min(ended)).map(|e| e.begun).max();
            if let Some(newest) = newest {
                entries.retain(|entry| entry.ended >= newest);
            }
        }
    }

    /// To be called before the read is asked for; returns its beginning.
    pub fn begin_read(&self, reader: usize) -> u64 {
        // Earlier than the tick itself, so that no writer in between takes the reader for one that has not begun.
        self.readers[reader].store(0, Ordering::SeqCst);
        let begun = self.now();
        self.readers[reader].store(begun, Ordering::SeqCst);
        begun
    }

    /// Panics when what was read cannot be.
    pub fn end_read(&self, reader: usize, begun: u64, first: u64, data: &[u8]) {
        self.judge(begun, self.now(), first, data);
        self.forget_read(reader);
    }

    /// The reader is at no read any more.
    pub fn forget_read(&self, reader: usize) {
        self.readers[reader].store(NOT_YET, Ordering::SeqCst);
    }

    /// Panics when a read from `begun` to `ended` cannot have returned `data`.
    pub fn judge(&self, begun: u64, ended: u64, first: u64, data: &[u8]) {
        for (n, data) in (first..).zip(data.chunks(SECTOR as usize)) {
            self.judged.fetch_add(1, Ordering::Relaxed);
            let stamp = stamp_of(data, n);
            let entries = self.sector(n);
            let may_be = |entry: &&Entry| {
                let hidden = |other: &Entry| other.begun > entry.ended && other.ended < begun;
                entry.begun < ended && !entries.iter().any(hidden)
            };
            let whole = entries.iter().filter(may_be).any(|entry| Some(entry.stamp) == stamp);
            assert!(
                whole || self.may_tear && torn(entries.iter().filter(may_be), begun, data, n),
                "sector {n} read from {begun} to {ended} holds {stamp:?}; it may hold one of {entries:?}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(history: &History, stamp: u64) -> bool {
        let begun = history.begin_read(0);
        let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            history.end_read(0, begun, 5, &block(stamp, 5));
        }));
        judged.is_ok()
    }

    #[test]
    fn a_read_that_is_older_than_the_last_answered_write_is_found() {
        let history = History::new(10, 1);
        let first = history.begin_write(5, 1);
        assert!(read(&history, 0) && read(&history, first.stamp), "either, while it is under way");
        let (old, again) = (first.stamp, history.begin_write(5, 1));
        history.end_write(first);
        assert!(!read(&history, 0), "older than what was answered");
        assert!(read(&history, old) && read(&history, again.stamp));
        let new = again.stamp;
        history.end_write(again);
        assert!(read(&history, old) && read(&history, new), "they ran side by side: either may be the last");
        let last = history.begin_zero(5, 1);
        history.end_write(last);
        assert!(!read(&history, old) && !read(&history, new) && read(&history, 0));
        assert!(!read(&history, 99), "from nowhere");
    }

    #[test]
    fn two_writes_in_one_sector_are_found_unless_one_is_under_way_and_the_host_may_tear_it() {
        let read = |history: &History, data: &[u8]| {
            let begun = history.begin_read(0);
            let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                history.end_read(0, begun, 5, data);
            }));
            judged.is_ok()
        };
        for may_tear in [false, true] {
            let history = History { may_tear, ..History::new(10, 1) };
            let old = history.begin_write(5, 1);
            let before = block(old.stamp, 5);
            history.end_write(old);
            let new = history.begin_write(5, 1);
            let mixed = [&before[..100], &block(new.stamp, 5)[100..]].concat();
            assert_eq!(read(&history, &mixed), may_tear);
            assert!(!read(&history, &[&before[..100], &block(99, 5)[100..]].concat()), "half from nowhere");
            history.end_write(new);
            assert!(!read(&history, &mixed), "it was answered");
        }
    }

    #[test]
    fn half_of_a_write_and_another_sector_s_data_are_found() {
        let mut torn = block(7, 5);
        torn[300] ^= 1;
        assert_eq!(stamp_of(&torn, 5), None);
        assert_eq!(stamp_of(&block(7, 6), 5), None);
        assert_eq!(stamp_of(&block(7, 5), 5), Some(7));
    }
}
