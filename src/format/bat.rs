//! Where a BAT entry stands: the BAT begins at byte 64, inside page 0, so that page 0 holds 1008 entries and
//! every further page 1024 (docs/format.md#layout-of-a-delta).

/// Bytes of a BAT page, the unit of caching and write-back.
pub const PAGE_BYTES: u64 = 4096;
/// u32 slots of a page.
pub const PAGE_SLOTS: usize = 1024;
/// Slots of page 0 that the header takes.
pub const HEADER_SLOTS: u64 = 16;

/// Page and slot in it of the entry for guest cluster `cluster`.
pub fn slot_of(cluster: u64) -> (u64, usize) {
    let slot = cluster + HEADER_SLOTS;
    (slot / PAGE_SLOTS as u64, (slot % PAGE_SLOTS as u64) as usize)
}

/// The guest cluster whose entry stands in `slot` of `page`; None for the header's slots.
pub fn cluster_of(page: u64, slot: usize) -> Option<u64> {
    (page * PAGE_SLOTS as u64 + slot as u64).checked_sub(HEADER_SLOTS)
}

/// Number of pages that `entries` BAT entries need.
pub fn pages(entries: u64) -> u64 {
    (entries + HEADER_SLOTS).div_ceil(PAGE_SLOTS as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_0_holds_1008_entries_and_every_further_page_1024() {
        assert_eq!(slot_of(0), (0, 16));
        assert_eq!(slot_of(1007), (0, 1023));
        assert_eq!(slot_of(1008), (1, 0));
        assert_eq!(slot_of(1008 + 1024), (2, 0));
    }

    #[test]
    fn cluster_of_is_the_reverse_of_slot_of_and_none_for_the_header() {
        for slot in 0..16 {
            assert_eq!(cluster_of(0, slot), None);
        }
        for cluster in (0..5000).chain([u64::from(u32::MAX)]) {
            let (page, slot) = slot_of(cluster);
            assert_eq!(cluster_of(page, slot), Some(cluster));
        }
    }

    #[test]
    fn an_entry_stands_at_byte_64_plus_four_times_its_number() {
        for cluster in [0, 1007, 1008, 2031, 2032, 123_456] {
            let (page, slot) = slot_of(cluster);
            assert_eq!(page * PAGE_BYTES + slot as u64 * 4, 64 + 4 * cluster);
        }
    }

    #[test]
    fn the_number_of_pages_covers_the_last_entry_and_no_more() {
        for entries in [1, 1008, 1009, 2032, 2033] {
            assert_eq!(pages(entries), slot_of(entries - 1).0 + 1);
        }
        assert_eq!(pages(0), 1, "the header's own page");
    }
}
