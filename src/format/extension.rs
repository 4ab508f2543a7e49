//! The format extension cluster, as far as a reader must know it to say which file clusters it uses
//! (FORMAT.md 1.10). The dirty bitmaps themselves are not interpreted.

/// Magic of the extension cluster.
pub const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
/// Bytes of the cluster that [`bitmap_sectors`] wants to see at most: an L1 table that needs more does not exist
/// (1 MiB of it describe 2 PiB at the smallest cluster).
pub const MAX_BYTES: usize = 1 << 20;

const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
/// Magic and MD5 in front of the first feature.
const FIRST_FEATURE: usize = 24;
const FEATURE_HEADER: usize = 24;
/// Size, uuid, granularity and number of L1 entries in front of the L1 table.
const BITMAP_HEADER: usize = 32;

/// The sectors at which clusters of dirty bitmaps begin, read from the first bytes of an extension cluster; None when
/// these bytes are no extension. A feature that is cut off or makes no sense ends the list.
pub fn bitmap_sectors(bytes: &[u8]) -> Option<Vec<u64>> {
    if word(bytes, 0)? != MAGIC {
        return None;
    }
    let mut sectors = Vec::new();
    let mut at = FIRST_FEATURE;
    while let Some((magic, size)) = word(bytes, at).zip(half(bytes, at + 16)) {
        if magic == 0 {
            break;
        }
        let data = at + FEATURE_HEADER;
        let Some(end) = data.checked_add(size as usize).filter(|end| *end <= bytes.len()) else { break };
        if magic == DIRTY_BITMAP {
            let table = bytes.get(data + BITMAP_HEADER..end).unwrap_or_default();
            let entries = half(bytes, data + 28).unwrap_or(0) as usize;
            // 0 and 1 stand for "all clear" and "all set" and use no cluster.
            sectors.extend(
                table
                    .chunks_exact(8)
                    .take(entries)
                    .map(|e| u64::from_le_bytes([e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]]))
                    .filter(|sector| *sector > 1),
            );
        }
        at = end.next_multiple_of(8);
    }
    Some(sectors)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An extension with one dirty bitmap whose L1 table is `table`.
    fn extension(table: &[u64]) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend([0; 16]);
        bytes.extend(DIRTY_BITMAP.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend((BITMAP_HEADER as u32 + 8 * table.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend([0; 28]);
        bytes.extend((table.len() as u32).to_le_bytes());
        bytes.extend(table.iter().flat_map(|sector| sector.to_le_bytes()));
        bytes
    }

    #[test]
    fn clusters_of_the_bitmap_are_listed_and_the_words_for_all_clear_and_all_set_are_not() {
        let mut bytes = extension(&[2048, 0, 1, 4096]);
        bytes.extend([0; 24]);
        assert_eq!(bitmap_sectors(&bytes), Some(vec![2048, 4096]));
    }

    #[test]
    fn what_is_no_extension_is_none_and_a_cut_one_ends_the_list() {
        assert_eq!(bitmap_sectors(&[0; 4096]), None);
        assert_eq!(bitmap_sectors(b""), None);
        let bytes = extension(&[2048]);
        assert_eq!(bitmap_sectors(&bytes[..bytes.len() - 1]), Some(vec![]));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_behind_the_magic_end_without_a_panic(tail in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let mut bytes = extension(&[7]);
            bytes.extend(&tail);
            proptest::prop_assert!(bitmap_sectors(&bytes).is_some());
            bytes[24..].rotate_left(tail.len());
            bitmap_sectors(&bytes);
        }
    }
}
