//! Which parts of a disk have changed since the tracking began: one bit for each piece of it, in memory. Setting bits
//! takes no lock and allocates nothing.
//!
//! Relaxed is enough: bits are set inside the gate, and what must see all of them (the close, the end of a freeze) has
//! closed the gate before.

use crate::format::descriptor::Guid;
use crate::image::diff::ByteRange;
use crate::sync::{AtomicU64, Ordering};

/// Bytes of bits that a new tracking takes at most, unless a granularity is asked for: 8 TiB of disk at the default.
const USUAL_BYTES: u64 = 16 << 20;
/// ploop's and QEMU's default, in bytes (docs/format.md#format-extension).
const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// Bytes of bits that are held in memory at most.
pub(super) const MAX_BYTES: u64 = 256 << 20;

/// The changes of one disk since one moment.
#[derive(Debug)]
pub(super) struct Changed {
    /// Names the moment.
    pub guid: Guid,
    /// Bytes of disk for each bit, a power of two.
    pub granularity: u64,
    /// Disk size in bytes.
    pub disk: u64,
    words: Vec<AtomicU64>,
}

impl Changed {
    /// Nothing has changed yet.
    pub(super) fn new(guid: Guid, disk: u64, granularity: u64) -> Changed {
        let words = disk.div_ceil(granularity).div_ceil(64);
        Changed { guid, granularity, disk, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A granularity for a disk of this size, in bytes, whose bits are not many.
    pub(super) fn usual_granularity(disk: u64) -> u64 {
        let mut granularity = DEFAULT_GRANULARITY;
        while Changed::bytes(disk, granularity) > USUAL_BYTES {
            granularity *= 2;
        }
        granularity
    }

    /// Bytes that the bits of such a disk take.
    pub(super) fn bytes(disk: u64, granularity: u64) -> u64 {
        disk.div_ceil(granularity).div_ceil(8)
    }

    /// The bytes `[offset, offset + len)` of the disk change; they lie inside it.
    pub(super) fn set(&self, offset: u64, len: u64) {
        if len > 0 {
            self.set_bits(offset / self.granularity, (offset + len - 1) / self.granularity);
        }
    }

    fn set_bits(&self, first: u64, last: u64) {
        for word in first / 64..=last / 64 {
            let from = first.max(word * 64) % 64;
            let to = last.min(word * 64 + 63) % 64;
            let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
            let Some(bits) = self.words.get(word as usize) else { return };
            // A cache line that is not written stays with all CPUs.
            if bits.load(Ordering::Relaxed) & mask != mask {
                bits.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Takes in the bits `bytes` (lowest bit of a byte first), of which the first is bit `8 * at`. Bits behind the end of
    /// the disk have no meaning.
    pub(super) fn load(&self, at: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                let bit = 8 * (at + i as u64) + bit;
                if bit * self.granularity < self.disk {
                    self.set_bits(bit, bit);
                }
            }
        }
    }

    /// The bits from `8 * at` on, as [`load`](Self::load) takes them; as many bytes as `bytes` has, or there are.
    pub(super) fn store(&self, at: u64, bytes: &mut [u8]) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = at as usize + i;
            let word = self.words.get(at / 8).map_or(0, |word| word.load(Ordering::Relaxed));
            *byte = (word >> (8 * (at % 8))) as u8;
        }
    }

    /// The byte at `at` where everything has changed.
    pub(super) fn full_byte(&self, at: u64) -> u8 {
        let bits = self.disk.div_ceil(self.granularity).saturating_sub(8 * at).min(8);
        ((1u16 << bits) - 1) as u8
    }

    /// The same changes on a disk that has become larger; what is new has changed.
    pub(super) fn grown(&self, disk: u64) -> Changed {
        let grown = Changed::new(self.guid, disk, self.granularity);
        for (new, old) in grown.words.iter().zip(&self.words) {
            new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        grown.set(self.disk, disk.saturating_sub(self.disk));
        grown
    }

    /// The ranges that have changed, from byte `start` on, at most `most`; and where to go on, in bytes.
    pub(super) fn ranges(&self, start: u64, most: usize) -> (Vec<ByteRange>, Option<u64>) {
        let bits = self.disk.div_ceil(self.granularity);
        let mut ranges: Vec<ByteRange> = Vec::new();
        let mut bit = start.div_ceil(self.granularity);
        while bit < bits {
            let word = self.words[(bit / 64) as usize].load(Ordering::Relaxed) >> (bit % 64);
            if word == 0 {
                bit = (bit / 64 + 1) * 64;
                continue;
            }
            bit += u64::from(word.trailing_zeros());
            let run = u64::from((!(word >> word.trailing_zeros())).trailing_zeros()).min(64 - bit % 64);
            let (begin, end) = (bit * self.granularity, ((bit + run) * self.granularity).min(self.disk));
            match ranges.pop() {
                Some((last, len)) if last + len == begin => ranges.push((last, end - last)),
                Some(last) if ranges.len() + 1 == most => {
                    ranges.push(last);
                    return (ranges, Some(begin));
                }
                last => {
                    ranges.extend(last);
                    ranges.push((begin, end - begin));
                }
            }
            bit += run;
        }
        (ranges, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(disk: u64) -> Changed {
        Changed::new(Guid::NONE, disk, 512)
    }

    fn all(changed: &Changed) -> Vec<ByteRange> {
        let mut all = Vec::new();
        let mut start = Some(0);
        while let Some(at) = start {
            let (ranges, next) = changed.ranges(at, 2);
            assert!(ranges.len() <= 2);
            all.extend(ranges);
            start = next;
        }
        all
    }

    #[test]
    fn a_change_sets_every_piece_that_it_touches_and_no_other() {
        let c = changed(1000 * 512 - 1);
        c.set(0, 0);
        assert_eq!(all(&c), Vec::<ByteRange>::new());
        c.set(511, 2);
        c.set(63 * 512, 512 * 66);
        c.set(200 * 512 + 7, 1);
        c.set(998 * 512, 2 * 512 - 1);
        let expected = [(0, 1024), (63 * 512, 66 * 512), (200 * 512, 512), (998 * 512, 1023)];
        assert_eq!(all(&c), expected, "the last piece ends with the disk");
    }

    #[test]
    fn bits_are_the_same_after_they_were_stored_and_loaded() {
        let c = changed(1000 * 512);
        c.set(0, 512);
        c.set(77 * 512, 300 * 512);
        let mut bytes = [0; 200];
        c.store(0, &mut bytes[..40]);
        c.store(40, &mut bytes[40..]);
        let again = changed(1000 * 512);
        again.load(0, &bytes[..9]);
        again.load(9, &bytes[9..]);
        assert_eq!(all(&again), all(&c));
        again.load(0, &[255; 200]);
        again.store(0, &mut bytes);
        assert!((0..200).all(|at| bytes[at] == again.full_byte(at as u64)), "all set: {bytes:?}");
        assert_eq!(all(&again), [(0, 1000 * 512)], "nothing behind the disk's end");
    }

    #[test]
    fn what_a_disk_has_grown_by_has_changed() {
        let c = changed(1000 * 512 - 100);
        c.set(0, 1);
        assert_eq!(all(&c.grown(2000 * 512)), [(0, 512), (999 * 512, 1001 * 512)]);
    }

    #[test]
    fn the_bits_of_a_large_disk_are_coarser() {
        assert_eq!(Changed::usual_granularity(8 << 40), 64 << 10);
        assert_eq!(Changed::usual_granularity((8 << 40) + 1), 128 << 10);
        assert_eq!(Changed::usual_granularity(512 << 40), 4 << 20);
    }

    #[test]
    fn writers_side_by_side_lose_no_bit() {
        let c = changed(64 * 512);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let c = &c;
                scope.spawn(move || (thread..64).step_by(4).for_each(|bit| c.set(bit * 512, 512)));
            }
        });
        assert_eq!(all(&c), [(0, 64 * 512)]);
    }
}
