//! What a power cut leaves of one file, and the stamps that tell which write a sector came from.
//!
//! A cut keeps, for every 512-byte sector on its own, any prefix of the unsynced writes and punches that touched it,
//! and any prefix of the size changes.

use std::collections::BTreeMap;

/// The few random choices a history and a cut need (SplitMix64): the same seed makes the same choices.
pub struct Rng(pub u64);

impl Rng {
    /// A number in `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n.max(1)
    }
}

pub const SECTOR: usize = 512;

#[derive(Clone, Debug)]
pub enum Change {
    Write { at: u64, data: Vec<u8> },
    Punch { at: u64, len: u64 },
    SetLen(u64),
}

/// One file: what is durable, and what came after its last sync.
#[derive(Clone, Debug, Default)]
pub struct Unsynced {
    pub durable: Vec<u8>,
    pending: Vec<Change>,
    /// Changes that were synced so far.
    synced: u64,
}

/// What a cut keeps of the unsynced changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Everything,
    /// The size changes, and no content.
    Sizes,
    /// The content inside the old size, and no size change.
    Content,
    /// This change alone of all (overtaken by what came before it on the same sectors, which it covers).
    Only(usize),
    /// Nothing, everything, or any prefix for each sector on its own.
    Random,
}

/// What happened to one sector, in order: the number of the change, and what it wrote; None: it was punched.
type SectorHistory<'a> = Vec<(usize, Option<&'a [u8]>)>;

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { at, data } => {
            let end = *at as usize + data.len();
            // Longer than the file: a change of its size that came before has been undone by a later one.
            let inside = end.min(bytes.len()).saturating_sub(*at as usize);
            if inside > 0 {
                bytes[*at as usize..][..inside].copy_from_slice(&data[..inside]);
            }
        }
        Change::Punch { at, len } => {
            let end = ((at + len) as usize).min(bytes.len());
            bytes[(*at as usize).min(end)..end].fill(0);
        }
        Change::SetLen(len) => bytes.resize(*len as usize, 0),
    }
}

impl Unsynced {
    /// A file with this content, all of it durable.
    pub fn new(durable: Vec<u8>) -> Unsynced {
        Unsynced { durable, ..Unsynced::default() }
    }

    /// A change.
    pub fn push(&mut self, change: Change) {
        self.pending.push(change);
    }

    /// Changes that are not durable.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// What a sync that begins now will cover.
    pub fn mark(&self) -> u64 {
        self.synced + self.pending.len() as u64
    }

    /// A sync that began at `mark` has ended.
    pub fn sync(&mut self, mark: u64) {
        let covered = mark.saturating_sub(self.synced) as usize;
        for change in self.pending.drain(..covered) {
            apply(&mut self.durable, &change);
        }
        self.synced = self.synced.max(mark);
    }

    /// Everything is durable.
    pub fn sync_all(&mut self) {
        self.sync(self.mark());
    }

    /// A sync failed: what was to be saved is saved in part and forgotten.
    pub fn lose(&mut self, rng: &mut Rng) {
        self.durable = self.state(Keep::Random, rng);
        self.synced = self.mark();
        self.pending.clear();
    }

    /// One state that a cut could leave.
    pub fn state(&self, keep: Keep, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let is_size = |c: &Change| matches!(c, Change::SetLen(_));
        // Size changes of one file are ordered by the host's journal: a prefix of them survives.
        let sizes = self.pending.iter().filter(|c| is_size(c)).count();
        let kept = match keep {
            Keep::Everything | Keep::Sizes => sizes,
            Keep::Nothing | Keep::Content => 0,
            Keep::Only(n) if self.pending.get(n).is_some_and(is_size) => {
                self.pending[..=n].iter().filter(|c| is_size(c)).count()
            }
            Keep::Only(_) => 0,
            Keep::Random => rng.below(sizes as u64 + 1) as usize,
        };
        self.pending.iter().filter(|c| is_size(c)).take(kept).for_each(|size| apply(&mut bytes, size));
        let mut sectors: BTreeMap<usize, SectorHistory<'_>> = BTreeMap::new();
        for (n, change) in self.pending.iter().enumerate() {
            match change {
                Change::Write { at, data } => {
                    // The file's end may be part of a sector; a part is as atomic as it.
                    for (sector, from, len) in split(*at, data.len()) {
                        sectors.entry(sector).or_default().push((n, Some(&data[from..from + len])));
                    }
                }
                Change::Punch { at, len } => {
                    for (sector, _, _) in split(*at, *len as usize) {
                        sectors.entry(sector).or_default().push((n, None));
                    }
                }
                Change::SetLen(_) => {}
            }
        }
        let mood = if keep == Keep::Random { rng.below(4) } else { 0 };
        for (sector, history) in sectors {
            let n = match (keep, mood) {
                (Keep::Everything | Keep::Content, _) | (Keep::Random, 1) => history.len(),
                (Keep::Only(only), _) => history.iter().position(|(n, _)| *n == only).map_or(0, |at| at + 1),
                (Keep::Random, 2..) => rng.below(history.len() as u64 + 1) as usize,
                _ => 0,
            };
            let start = sector * SECTOR;
            for (_, data) in &history[..n] {
                if start >= bytes.len() {
                    continue;
                }
                match data {
                    Some(data) => {
                        let end = (start + data.len()).min(bytes.len());
                        bytes[start..end].copy_from_slice(&data[..end - start]);
                    }
                    None => {
                        let end = (start + SECTOR).min(bytes.len());
                        bytes[start..end].fill(0);
                    }
                }
            }
        }
        bytes
    }
}

/// The sectors of `[at, at + len)`: number, first byte in the data, bytes. All changes begin on a sector.
fn split(at: u64, len: usize) -> Vec<(usize, usize, usize)> {
    assert_eq!(at as usize % SECTOR, 0, "changes begin on a sector");
    (0..len.div_ceil(SECTOR))
        .map(|i| (at as usize / SECTOR + i, i * SECTOR, (len - i * SECTOR).min(SECTOR)))
        .collect()
}

/// A sector full of one stamp.
pub fn stamp(value: u32) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR / 4)
}

/// The stamp a sector holds; a mixture is a torn sector.
pub fn read_stamp(sector: &[u8]) -> Option<u32> {
    let first: [u8; 4] = sector[..4].try_into().ok()?;
    // Every four bytes are those before them: one comparison of memory, not 127.
    (sector[4..] == sector[..sector.len() - 4]).then(|| u32::from_le_bytes(first))
}

/// Only the last value is possible from now on.
pub fn collapse(values: &mut Vec<u32>) {
    let last = values.last().copied();
    values.clear();
    values.extend(last);
}
