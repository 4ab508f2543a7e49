//! Where what stands, in words of eight bytes (docs/restart.md#the-ledger). Fields are added in spare words, never moved.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Result, odd};

/// "ploopfsL", read as a number of the machine.
pub(super) const MAGIC: u64 = u64::from_ne_bytes(*b"ploopfsL");
/// What this file describes.
pub(super) const VERSION: u64 = 1;

/// Words of the header.
pub(super) const MAGIC_WORD: usize = 0;
pub(super) const VERSION_WORD: usize = 1;
/// How many daemons have had it.
pub(super) const GENERATION: usize = 2;
/// How many records there are of each kind.
pub(super) const SIZES: Range<usize> = 3..8;
/// The next number of an image.
pub(super) const NEXT_ID: usize = 8;
/// Not 0: the mount ends with its daemon.
pub(super) const BEYOND: usize = 9;
/// How many records of each kind were ever used, in the order of [`Sizes`]: no more are read, since a look at memory that
/// was never touched takes it.
pub(super) const USED: usize = 16;
/// The handshake: state, lengths, and two messages.
pub(super) const SESSION: usize = 64;
/// A page of the machine.
const PAGE: u64 = 512;

/// The kinds behind [`USED`].
pub(super) const NUMBERS: usize = 0;
pub(super) const OPENS: usize = 1;
pub(super) const IMAGES: usize = 2;
pub(super) const PAGES: usize = 3;
pub(super) const SNAPSHOTS: usize = 4;

/// Words of one record of each kind.
pub(super) const NUMBER: u64 = 40;
pub(super) const OPEN: u64 = 8;
pub(super) const IMAGE: u64 = 8;
pub(super) const PAGE_STATE: u64 = 8;
pub(super) const PAGE_DATA: u64 = 512;
pub(super) const SNAPSHOT: u64 = 4;

/// Threads that have a place for what they execute: more than a daemon has. One of 64 bytes each, so that threads do not
/// disturb each other.
pub(super) const THREADS: u32 = 512;
const THREAD: u64 = 8;
/// What was executed by daemons that died: first word, how many at most.
pub(super) const ALONE: u64 = 0;
pub(super) const APART: u64 = 1;
const SUSPECTS: u64 = 8;
const REFUSED: u64 = SUSPECTS + THREADS as u64;
/// How many may be refused; then the first is forgotten.
pub(super) const MOST_REFUSED: usize = 64;
const DEATHS: u64 = REFUSED + MOST_REFUSED as u64;

/// Most records of a kind: places are numbers of 32 bits, and a broken header must not make a length overflow.
const MOST: u64 = 1 << 24;

/// How many records of each kind there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Images that have a number.
    pub numbers: u32,
    /// Open files.
    pub opens: u32,
    /// Images that are open for writing.
    pub images: u32,
    /// BAT pages whose entries are not all durable.
    pub pages: u32,
    /// Snapshots that were looked at.
    pub snapshots: u32,
}

impl Sizes {
    pub(super) fn as_words(&self) -> [u64; 5] {
        [self.numbers, self.opens, self.images, self.pages, self.snapshots].map(u64::from)
    }

    /// Bytes of memory that a ledger of these sizes takes. None: there is no such ledger.
    pub fn bytes(self) -> Option<u64> {
        Some(Layout::of(self)?.words() * 8)
    }
}

/// Where each kind of record begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    sizes: Sizes,
    numbers: u64,
    opens: u64,
    images: u64,
    states: u64,
    pages: u64,
    snapshots: u64,
    threads: u64,
    deaths: u64,
    end: u64,
}

impl Layout {
    pub(super) fn of(sizes: Sizes) -> Option<Layout> {
        if sizes.as_words().iter().any(|size| *size > MOST) {
            return None;
        }
        let numbers = PAGE;
        let behind =
            |start: u64, count: u32, each: u64| start + (u64::from(count) * each).next_multiple_of(PAGE);
        let opens = behind(numbers, sizes.numbers, NUMBER);
        let images = behind(opens, sizes.opens, OPEN);
        let states = behind(images, sizes.images, IMAGE);
        let pages = behind(states, sizes.pages, PAGE_STATE);
        let snapshots = behind(pages, sizes.pages, PAGE_DATA);
        let threads = behind(snapshots, sizes.snapshots, SNAPSHOT);
        let deaths = behind(threads, THREADS, THREAD);
        let end = behind(deaths, 1, DEATHS);
        Some(Layout { sizes, numbers, opens, images, states, pages, snapshots, threads, deaths, end })
    }

    /// That of the ledger in `words`, which may be anything.
    pub(super) fn read(words: &[AtomicU64]) -> Result<Layout> {
        let word = |at: usize| words.get(at).map_or(0, |word| word.load(Ordering::Acquire));
        if word(MAGIC_WORD) != MAGIC {
            return Err(odd("it is none"));
        }
        if word(VERSION_WORD) != VERSION {
            return Err(odd(&format!("its version is {}, and {VERSION} is known", word(VERSION_WORD))));
        }
        let size = |at: usize| u32::try_from(word(SIZES.start + at)).unwrap_or(u32::MAX);
        let sizes = Sizes {
            numbers: size(NUMBERS),
            opens: size(OPENS),
            images: size(IMAGES),
            pages: size(PAGES),
            snapshots: size(SNAPSHOTS),
        };
        let layout = Layout::of(sizes).filter(|layout| layout.words() <= words.len() as u64);
        layout.ok_or_else(|| odd("it says that it is larger than it is"))
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// As many of each kind as were ever used.
    pub(super) fn used(&self, words: &[AtomicU64]) -> Sizes {
        let used = |kind: usize, most: u32| {
            u32::try_from(words[USED + kind].load(Ordering::Acquire)).map_or(most, |used| used.min(most))
        };
        let Sizes { numbers, opens, images, pages, snapshots } = self.sizes;
        Sizes {
            numbers: used(NUMBERS, numbers),
            opens: used(OPENS, opens),
            images: used(IMAGES, images),
            pages: used(PAGES, pages),
            snapshots: used(SNAPSHOTS, snapshots),
        }
    }

    /// Words of all of it.
    pub(super) fn words(&self) -> u64 {
        self.end
    }

    fn place(start: u64, each: u64, record: u32) -> (usize, usize) {
        ((start + u64::from(record) * each) as usize, each as usize)
    }

    pub(super) fn number(&self, record: u32) -> (usize, usize) {
        Layout::place(self.numbers, NUMBER, record)
    }

    pub(super) fn open(&self, record: u32) -> (usize, usize) {
        Layout::place(self.opens, OPEN, record)
    }

    pub(super) fn image(&self, record: u32) -> (usize, usize) {
        Layout::place(self.images, IMAGE, record)
    }

    pub(super) fn state(&self, record: u32) -> (usize, usize) {
        Layout::place(self.states, PAGE_STATE, record)
    }

    pub(super) fn page(&self, record: u32) -> (usize, usize) {
        Layout::place(self.pages, PAGE_DATA, record)
    }

    pub(super) fn snapshot(&self, record: u32) -> (usize, usize) {
        Layout::place(self.snapshots, SNAPSHOT, record)
    }

    /// What a thread executes.
    pub(super) fn thread(&self, place: u32) -> usize {
        Layout::place(self.threads, THREAD, place).0
    }

    /// One of [`ALONE`] and [`APART`].
    pub(super) fn death(&self, word: u64) -> usize {
        (self.deaths + word) as usize
    }

    pub(super) fn suspects(&self) -> Range<usize> {
        self.death(SUSPECTS)..self.death(REFUSED)
    }

    pub(super) fn refused(&self) -> Range<usize> {
        self.death(REFUSED)..self.death(DEATHS)
    }
}

/// Which records of a kind are free: those given back, the last first, then those never used, so that memory is touched
/// only as far as it was needed at once.
#[derive(Debug)]
pub struct Room {
    back: Vec<u32>,
    next: u32,
    count: u32,
}

impl Room {
    /// Room for `count` records, of which those in `used` are taken.
    pub fn without(count: u32, used: impl Iterator<Item = u32>) -> Room {
        let used: std::collections::HashSet<u32> = used.collect();
        let next = used.iter().max().map_or(0, |last| last + 1);
        let back = (0..next).rev().filter(|record| !used.contains(record)).collect();
        Room { back, next, count }
    }

    /// Takes one; None: all are taken.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(record) = self.back.pop() {
            return Some(record);
        }
        let record = self.next;
        (record < self.count).then(|| {
            self.next += 1;
            record
        })
    }

    /// Gives one back.
    pub fn give_back(&mut self, record: u32) {
        debug_assert!(record < self.next && !self.back.contains(&record), "record {record} was not taken");
        self.back.push(record);
    }
}
