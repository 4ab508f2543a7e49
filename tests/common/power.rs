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
    pub pending: Vec<Change>,
}

impl Unsynced {
    /// The file was synced.
    pub fn sync(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            apply(&mut self.durable, &change);
        }
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { at, data } => {
            let end = *at as usize + data.len();
            assert!(end <= bytes.len(), "the product never writes past the file's end");
            bytes[*at as usize..end].copy_from_slice(data);
        }
        Change::Punch { at, len } => {
            let end = ((at + len) as usize).min(bytes.len());
            bytes[*at as usize..end].fill(0);
        }
        Change::SetLen(len) => bytes.resize(*len as usize, 0),
    }
}

impl Unsynced {
    /// One state that the cut could leave.
    pub fn state(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        // Size changes of one file are ordered by the host's journal: a prefix of them survives.
        let sizes: Vec<u64> = self
            .pending
            .iter()
            .filter_map(|c| if let Change::SetLen(n) = c { Some(*n) } else { None })
            .collect();
        let kept = rng.below(sizes.len() as u64 + 1) as usize;
        for len in &sizes[..kept] {
            bytes.resize(*len as usize, 0);
        }
        // What happened to each sector, in order.
        let mut sectors: BTreeMap<usize, Vec<Option<&[u8]>>> = BTreeMap::new();
        for change in &self.pending {
            match change {
                Change::Write { at, data } => {
                    // The header's 64 bytes and the BAT's end are parts of a sector; a part is as atomic as it.
                    for (sector, from, len) in split(*at, data.len()) {
                        sectors.entry(sector).or_default().push(Some(&data[from..from + len]));
                    }
                }
                Change::Punch { at, len } => {
                    for (sector, _, _) in split(*at, *len as usize) {
                        sectors.entry(sector).or_default().push(None);
                    }
                }
                Change::SetLen(_) => {}
            }
        }
        // Nothing, everything, or anything.
        let mood = rng.below(4);
        for (sector, history) in sectors {
            let n = match mood {
                0 => 0,
                1 => history.len(),
                _ => rng.below(history.len() as u64 + 1) as usize,
            };
            let start = sector * SECTOR;
            for data in &history[..n] {
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
    sector.chunks(4).all(|c| c == first).then(|| u32::from_le_bytes(first))
}

/// Only the last value is possible from now on.
pub fn collapse(values: &mut Vec<u32>) {
    let last = values.last().copied();
    values.clear();
    values.extend(last);
}
