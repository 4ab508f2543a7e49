//! A cached BAT page: the merged entries of all levels for 1024 slots, and its write-back state.

use std::time::Instant;

use crate::format::bat::{PAGE_BYTES, PAGE_SLOTS, cluster_of};
use crate::format::header::{Geometry, MAX_CLUSTER_SECTORS, SECTOR};
use crate::ledger::Slot;
use crate::rules::{Rule, broken};

/// Where a guest cluster lies: a level and a byte position in that level's file, or nowhere.
///
/// v1, v2 and raw alike, so "none" cannot be 0: a raw base has data at byte 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// No level maps it: it reads as zero.
    None,
    /// Byte `position` of the file of delta number `level` (an index into the image's table of deltas).
    At {
        /// Index into the table of deltas.
        level: u16,
        /// Byte position of the cluster in that file.
        position: u64,
    },
    /// The entry contradicts the format or the file's length; reading it is EUCLEAN.
    Damaged,
}

/// Sectors take 52 bits, the level the 12 above. The largest position that [`Geometry::entry`] has a number for takes 49:
/// 2^32 clusters of 64 MiB, above which no header and no descriptor is taken.
const LEVEL_SHIFT: u32 = 52;
const _: () = assert!((MAX_CLUSTER_SECTORS as u64) << 32 < 1 << LEVEL_SHIFT);
const NONE: u64 = u64::MAX;
const DAMAGED: u64 = u64::MAX - 1;

/// A [`Place`] in eight bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Packed(u64);

impl Packed {
    fn pack(place: Place) -> Packed {
        Packed(match place {
            Place::None => NONE,
            Place::Damaged => DAMAGED,
            // Only a raw file could reach further: what does not fit must not be taken for another level's.
            Place::At { position, .. } if (position / SECTOR) >> LEVEL_SHIFT != 0 => DAMAGED,
            Place::At { level, position } => {
                debug_assert!(u64::from(level) >> (64 - LEVEL_SHIFT) == 0);
                (u64::from(level) << LEVEL_SHIFT) | (position / SECTOR)
            }
        })
    }

    fn unpack(self) -> Place {
        match self.0 {
            NONE => Place::None,
            DAMAGED => Place::Damaged,
            packed => Place::At {
                level: (packed >> LEVEL_SHIFT) as u16,
                position: (packed & ((1 << LEVEL_SHIFT) - 1)) * SECTOR,
            },
        }
    }
}

/// One loaded page. Its lock (the slot's mutex in `cache`) protects all of it together.
pub struct Page {
    entries: Box<[Packed]>,
    /// Holders that rely on the page staying loaded (an allocation between look-up and entry).
    pub pins: u32,
    /// When the oldest change came that no round has copied; None = nothing to write.
    pub dirty_since: Option<Instant>,
    /// A round has a copy under way.
    pub writing: bool,
    /// What has changed since the last copy is more than allocations for clusters that no level maps: what the entries name
    /// must be durable before them (R3).
    pub data_first: bool,
    /// File clusters whose unmapping the next copy will carry; they become free when it is durable (R4).
    pub freed: Vec<u64>,
    /// File clusters whose data lies elsewhere once the next copy is durable; then they are free, with what they hold (R4).
    pub moved: Vec<u64>,
    /// Where the ledger keeps what no durable copy has.
    pub slot: Option<Slot>,
    /// One bit per slot: some level below the one that the entry names maps the cluster as well, so that taking the
    /// entry away would bring old data back. May say so after a merge that took that level away: the cluster then
    /// stays mapped until the page is loaded anew, which costs a hole.
    hides: [u64; PAGE_SLOTS / 64],
}

impl Default for Page {
    fn default() -> Page {
        let entries = vec![Packed(NONE); PAGE_SLOTS].into_boxed_slice();
        let hides = [0; PAGE_SLOTS / 64];
        let (freed, moved) = (Vec::new(), Vec::new());
        Page {
            entries,
            pins: 0,
            dirty_since: None,
            writing: false,
            data_first: false,
            freed,
            moved,
            slot: None,
            hides,
        }
    }
}

impl Page {
    /// Memory of a loaded page in bytes, for the cache's bound.
    pub const COST: u64 = PAGE_SLOTS as u64 * 8 + 256;

    /// What holds whenever the page's lock is free: what a copy has to carry (R3, R4) waits for one that will come. On a
    /// page that no round takes, freed clusters would be lost, or an entry written before its data.
    pub(super) fn is_sound(&self) -> bool {
        let carries = self.data_first || !self.freed.is_empty() || !self.moved.is_empty();
        self.dirty_since.is_some() || !carries
    }

    /// The place in `slot`.
    pub fn get(&self, slot: usize) -> Place {
        self.entries[slot].unpack()
    }

    /// Changes the place in `slot`. The caller marks the page dirty. `hides`: a lower level maps the cluster too.
    pub fn set(&mut self, slot: usize, place: Place, hides: bool) {
        debug_assert!(place != Place::None || !hides, "a lower level maps the cluster, so it has a place");
        self.entries[slot] = Packed::pack(place);
        let bit = 1 << (slot % 64);
        if hides {
            self.hides[slot / 64] |= bit;
        } else {
            self.hides[slot / 64] &= !bit;
        }
    }

    /// True when a level below the one that `slot` names maps the cluster as well.
    pub fn hides(&self, slot: usize) -> bool {
        self.hides[slot / 64] & 1 << (slot % 64) != 0
    }

    /// Lays a raw base of `len` bytes under what is there: cluster i lies at i * `cluster`.
    pub fn merge_raw_under(&mut self, level: u16, first: (u64, usize), cluster: u64, len: u64) {
        let (first_cluster, first_slot) = first;
        for slot in first_slot..PAGE_SLOTS {
            let position = (first_cluster + (slot - first_slot) as u64) * cluster;
            if position >= len {
                break;
            }
            self.lay_under(slot, Packed::pack(Place::At { level, position }));
        }
    }

    /// What an upper level has set stays, and hides this.
    fn lay_under(&mut self, slot: usize, entry: Packed) {
        if self.entries[slot].0 == NONE {
            self.entries[slot] = entry;
        } else if entry.0 != NONE {
            self.hides[slot / 64] |= 1 << (slot % 64);
        }
    }

    /// Lays the entries of the page's bytes on disk (of delta `level`) under what is there already: a slot
    /// that an upper level has set stays. `number` is the page's, `slots` leaves out the header and what lies behind the
    /// BAT.
    pub fn merge_under(
        &mut self,
        level: u16,
        number: u64,
        bytes: &[u8],
        slots: std::ops::Range<usize>,
        of: &Geometry,
        len: u64,
    ) {
        for slot in slots {
            let at = slot * 4;
            let Some(&[a, b, c, d]) = bytes.get(at..at + 4) else { break };
            let entry = match u32::from_le_bytes([a, b, c, d]) {
                0 => Packed(NONE),
                // An entry never names a place that is not all in the file (R2), nor one in the header.
                entry => match cluster_of(number, slot).and_then(|cluster| of.place(cluster, entry, len)) {
                    Some(position) => Packed::pack(Place::At { level, position }),
                    None => Packed(DAMAGED),
                },
            };
            self.lay_under(slot, entry);
        }
    }

    /// The page as it goes to disk: the entries of delta `top` only (R5), everything else 0; slots of the
    /// header are 0 and filled in by the one writer of bytes 0 to 4095. With it the position of the last cluster in the file
    /// that is named, in bytes.
    pub fn own_entries(&self, top: u16, of: &Geometry) -> (Box<[u8]>, u64) {
        let mut bytes = vec![0; PAGE_BYTES as usize].into_boxed_slice();
        let mut last = 0;
        for (slot, packed) in self.entries.iter().enumerate() {
            if let Place::At { level, position } = packed.unpack()
                && (level == top || broken(Rule::R5))
            {
                let entry = of.entry(position).expect("an allocation checks that its entry fits the format");
                bytes[slot * 4..slot * 4 + 4].copy_from_slice(&entry.to_le_bytes());
                last = last.max(position);
            }
        }
        (bytes, last)
    }

    /// True when the page may be dropped from the cache.
    pub fn evictable(&self) -> bool {
        self.pins == 0 && self.dirty_since.is_none() && !self.writing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::Version;

    const GEOMETRY: Geometry =
        Geometry { version: Version::V2, cluster: 65536, entries: 4000, disk: 4000 * 65536, first: 65536 };

    #[test]
    fn places_survive_packing() {
        let far = Place::At { level: 253, position: (u64::from(u32::MAX) - 1) * (64 << 20) };
        for place in [Place::None, Place::Damaged, Place::At { level: 0, position: 0 }, far] {
            assert_eq!(Packed::pack(place).unpack(), place);
        }
    }

    /// FAULTS 6: the upper bits of a position were taken for the level, and another file was read and written.
    #[test]
    fn a_position_that_does_not_fit_is_damage_and_no_other_levels_place() {
        let last = ((1 << LEVEL_SHIFT) - 1) * SECTOR;
        let place = Place::At { level: 1, position: last };
        assert_eq!(Packed::pack(place).unpack(), place);
        assert_eq!(Packed::pack(Place::At { level: 0, position: last + SECTOR }).unpack(), Place::Damaged);
    }

    #[test]
    fn an_upper_entry_hides_a_lower_one_and_only_the_tops_own_are_written() {
        let mut top = vec![0; 4096];
        top[4..8].copy_from_slice(&3u32.to_le_bytes());
        let mut base = vec![0; 4096];
        base[4..8].copy_from_slice(&1u32.to_le_bytes());
        base[8..12].copy_from_slice(&2u32.to_le_bytes());
        let mut page = Page::default();
        page.merge_under(1, 1, &top, 0..1024, &GEOMETRY, 1 << 30);
        page.merge_under(0, 1, &base, 0..1024, &GEOMETRY, 1 << 30);
        assert_eq!(page.get(1), Place::At { level: 1, position: 3 * 65536 });
        assert_eq!(page.get(2), Place::At { level: 0, position: 2 * 65536 });
        assert_eq!(page.get(3), Place::None);
        assert_eq!((page.hides(1), page.hides(2), page.hides(3)), (true, false, false));
        assert_eq!(page.own_entries(1, &GEOMETRY), (top.into(), 3 * 65536));
    }

    #[test]
    fn a_raw_base_maps_every_cluster_up_to_its_end() {
        let mut page = Page::default();
        page.set(17, Place::At { level: 1, position: 65536 }, false);
        page.merge_raw_under(0, (0, 16), 65536, 3 * 65536 + 1);
        assert_eq!(page.get(16), Place::At { level: 0, position: 0 });
        assert!(page.hides(17));
        assert_eq!(page.get(19), Place::At { level: 0, position: 3 * 65536 });
        assert_eq!(page.get(20), Place::None);
    }

    #[test]
    fn entries_behind_the_end_or_in_the_header_are_damage() {
        let first_two_in_header = Geometry { first: 2 * 65536, ..GEOMETRY };
        let mut bytes = vec![0; 4096];
        bytes[0..4].copy_from_slice(&1u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&9u32.to_le_bytes());
        let mut page = Page::default();
        page.merge_under(0, 1, &bytes, 0..2, &first_two_in_header, 9 * 65536);
        assert_eq!((page.get(0), page.get(1)), (Place::Damaged, Place::Damaged));
    }

    #[test]
    fn what_a_clean_page_would_never_carry_is_not_sound() {
        let page = |change: fn(&mut Page)| {
            let mut page = Page::default();
            change(&mut page);
            let clean = page.is_sound();
            page.dirty_since = Some(Instant::now());
            assert!(page.is_sound());
            clean
        };
        assert!(page(|_| ()));
        assert!(!page(|page| page.freed.push(1)), "R4: never free again");
        assert!(!page(|page| page.moved.push(1)), "R4: never free again");
        assert!(!page(|page| page.data_first = true), "R3: the round has gone");
    }
}
