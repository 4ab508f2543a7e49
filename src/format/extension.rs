//! The format extension cluster and the dirty bitmap in it (docs/format.md#format-extension).

use md5::{Digest, Md5};

/// Magic of the extension cluster.
pub const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
/// Bytes of the cluster that [`bitmap_sectors`] wants to see at most: an L1 table that needs more does not exist
/// (1 MiB of it describe 2 PiB at the smallest cluster).
pub const MAX_BYTES: usize = 1 << 20;

const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
/// Magic and MD5 in front of the first feature.
const FIRST_FEATURE: usize = 24;
const FEATURE_HEADER: usize = 24;
/// Flag of a feature: software that does not know it must not open the image.
const NECESSARY: u64 = 1;
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

/// One dirty bitmap: what it covers, and where its bits are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    /// Its uuid, in the order of its text.
    pub uuid: [u8; 16],
    /// Disk size in sectors.
    pub disk_sectors: u64,
    /// Sectors that one bit stands for, a power of two.
    pub granularity: u32,
    /// The L1 table: one entry for each cluster of bits.
    pub table: Vec<TableEntry>,
}

/// One entry of the L1 table: a cluster of bits, the lowest bit of a byte first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// All of them are clear.
    Clear,
    /// All of them are set.
    Set,
    /// They stand in the cluster that begins at this sector of the file.
    At(u64),
}

impl DirtyBitmap {
    /// Number of entries that a table must have for a disk of this size, in bytes as the granularity and the cluster.
    pub fn entries(disk: u64, granularity: u64, cluster: u64) -> u64 {
        disk.div_ceil(granularity).div_ceil(8).div_ceil(cluster)
    }

    /// The extension cluster with this bitmap alone; None where it does not fit into `cluster` bytes. Without flags:
    /// software that does not know the bitmap may open the image, and must drop it before a change.
    pub fn to_extension(&self, cluster: u64) -> Option<Vec<u8>> {
        let size = BITMAP_HEADER + 8 * self.table.len();
        // The list ends with an empty header.
        let needed = FIRST_FEATURE + FEATURE_HEADER + size + FEATURE_HEADER;
        let cluster = usize::try_from(cluster).ok().filter(|cluster| needed <= *cluster)?;
        let mut features = Vec::with_capacity(cluster - FIRST_FEATURE);
        features.extend(DIRTY_BITMAP.to_le_bytes());
        features.extend(0u64.to_le_bytes());
        features.extend(u32::try_from(size).ok()?.to_le_bytes());
        features.extend([0; 4]);
        features.extend(self.disk_sectors.to_le_bytes());
        features.extend(self.uuid);
        features.extend(self.granularity.to_le_bytes());
        features.extend(u32::try_from(self.table.len()).ok()?.to_le_bytes());
        let word = |entry: &TableEntry| match entry {
            TableEntry::Clear => 0,
            TableEntry::Set => 1,
            TableEntry::At(sector) => *sector,
        };
        features.extend(self.table.iter().flat_map(|entry| word(entry).to_le_bytes()));
        features.resize(cluster - FIRST_FEATURE, 0);
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(Md5::digest(&features));
        bytes.extend(features);
        Some(bytes)
    }

    /// The one dirty bitmap in `bytes`, a whole extension cluster, for a disk of this size. Err: why there is none that
    /// may be trusted.
    pub fn from_extension(bytes: &[u8], disk_sectors: u64) -> Result<DirtyBitmap, String> {
        if word(bytes, 0) != Some(MAGIC) {
            return Err("the format extension has no magic".into());
        }
        let features = bytes.get(FIRST_FEATURE..).unwrap_or_default();
        if bytes[8..].first_chunk() != Some(&<[u8; 16]>::from(Md5::digest(features))) {
            return Err("the checksum of the format extension is wrong".into());
        }
        let mut found = None;
        let mut at = FIRST_FEATURE;
        while let Some((magic, size)) = word(bytes, at).zip(half(bytes, at + 16)) {
            if magic == 0 {
                break;
            }
            let data = at + FEATURE_HEADER;
            let end = data.saturating_add(size as usize);
            let Some(content) = bytes.get(data..end) else {
                return Err("a feature of the format extension is cut off".into());
            };
            if magic == DIRTY_BITMAP {
                let bitmap = DirtyBitmap::parse(content, disk_sectors, bytes.len() as u64)?;
                if found.replace(bitmap).is_some() {
                    return Err(
                        "the format extension has several dirty bitmaps; one is kept, not more".into()
                    );
                }
            } else if word(bytes, at + 8).is_some_and(|flags| flags & NECESSARY != 0) {
                return Err(format!("the format extension needs a feature that is not known: {magic:#x}"));
            }
            at = end.next_multiple_of(8);
        }
        found.ok_or_else(|| "the format extension has no dirty bitmap".into())
    }

    fn parse(content: &[u8], disk_sectors: u64, cluster: u64) -> Result<DirtyBitmap, String> {
        let wrong = |field: &str, value: u64| Err(format!("the dirty bitmap's {field} = {value} is wrong"));
        let fields = (word(content, 0), half(content, 24), half(content, 28));
        let (Some(disk), Some(granularity), Some(entries)) = fields else {
            return Err("the dirty bitmap is cut off".into());
        };
        let Some(uuid) = content.get(8..24).and_then(|uuid| uuid.try_into().ok()) else {
            return Err("the dirty bitmap is cut off".into());
        };
        if disk != disk_sectors {
            return wrong("disk size in sectors", disk);
        }
        if !granularity.is_power_of_two() {
            return wrong("granularity in sectors", granularity.into());
        }
        let needed = DirtyBitmap::entries(disk, granularity.into(), cluster);
        if u64::from(entries) != needed || (content.len() as u64 - BITMAP_HEADER as u64) / 8 < needed {
            return wrong("number of L1 entries", entries.into());
        }
        let entry = |at: u64| match at {
            0 => TableEntry::Clear,
            1 => TableEntry::Set,
            sector => TableEntry::At(sector),
        };
        let table = (0..entries as usize).filter_map(|i| word(content, BITMAP_HEADER + 8 * i)).map(entry);
        Ok(DirtyBitmap { uuid, disk_sectors, granularity, table: table.collect() })
    }
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

    fn bitmap() -> DirtyBitmap {
        // 3 clusters of bits: 4096 bytes of 8 bits of 128 sectors each.
        let table = vec![TableEntry::Clear, TableEntry::At(2048), TableEntry::Set];
        DirtyBitmap {
            uuid: *b"sixteen of them.",
            disk_sectors: 2 * (4096 * 8 * 128) + 1,
            granularity: 128,
            table,
        }
    }

    #[test]
    fn a_bitmap_is_read_as_it_was_written_and_its_clusters_are_listed() {
        let bytes = bitmap().to_extension(4096).expect("it fits");
        assert_eq!(bytes.len(), 4096);
        assert_eq!(DirtyBitmap::from_extension(&bytes, bitmap().disk_sectors), Ok(bitmap()));
        assert_eq!(bitmap_sectors(&bytes), Some(vec![2048]));
        let long = DirtyBitmap { table: vec![TableEntry::Clear; 500], ..bitmap() };
        assert_eq!(long.to_extension(4096), None, "500 entries are 4000 bytes");
    }

    #[test]
    fn a_bitmap_that_does_not_prove_itself_is_refused_with_the_reason() {
        let disk = bitmap().disk_sectors;
        let good = bitmap().to_extension(4096).expect("it fits");
        let reason = |bytes: &[u8], disk| DirtyBitmap::from_extension(bytes, disk).expect_err("not trusted");
        assert!(reason(&good, disk + 1).contains("disk size"), "of another disk");
        assert!(reason(&good[..4095], disk).contains("checksum"), "cut");
        assert!(reason(&[0; 4096], disk).contains("magic"));
        assert!(reason(b"", disk).contains("magic"));
        // What follows is under a right checksum.
        let sealed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            let sum = Md5::digest(&bytes[24..]);
            bytes[8..24].copy_from_slice(&sum);
            reason(&bytes, disk)
        };
        let feature = FIRST_FEATURE;
        let data = feature + FEATURE_HEADER;
        assert!(sealed(&|b| b[data + 24] = 127).contains("granularity"));
        assert!(sealed(&|b| b[data + 28] = 2).contains("L1"));
        assert!(sealed(&|b| b[feature + 16] = 40).contains("L1"), "a table that is cut");
        assert!(sealed(&|b| b[feature + 16..feature + 20].fill(255)).contains("cut off"));
        assert!(sealed(&|b| b[feature] ^= 1).contains("no dirty bitmap"));
        let needs = |b: &mut Vec<u8>| {
            b[feature] ^= 1;
            b[feature + 8] = NECESSARY as u8;
        };
        assert!(sealed(&needs).contains("not known"));
        let twice = |b: &mut Vec<u8>| {
            let end = data + BITMAP_HEADER + 24;
            b.copy_within(feature..end, end);
        };
        assert!(sealed(&twice).contains("several"));
    }

    proptest::proptest! {
        #[test]
        fn any_features_under_a_right_checksum_end_without_a_panic(tail in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let mut bytes = extension(&[7]);
            bytes.extend(&tail);
            bytes[24..].rotate_left(tail.len());
            let sum = Md5::digest(&bytes[24..]);
            bytes[8..24].copy_from_slice(&sum);
            let _ = DirtyBitmap::from_extension(&bytes, 0);
        }

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
