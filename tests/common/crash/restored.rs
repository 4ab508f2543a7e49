//! An incremental backup as the folder's histories restore it: some sectors with a stamp, one that became zero.

use std::io::Cursor;
use std::sync::Arc;

use ploopfs::format::descriptor::Guid;
use ploopfs::format::stream::{Encoder, Head, Tag};
use ploopfs::image::layers::Layers;
use ploopfs::progress::Progress;
use ploopfs::transfer::restore::Stream;
use ploopfs::vdisk::Level;

use super::power::{SECTOR, stamp};

/// Part of one cluster and all of the next.
const STAMPED: std::ops::Range<usize> = 1..4;
/// In a cluster that the base maps.
const ZEROED: usize = 5;

/// What the backup makes of the sectors of its base.
pub fn change(sectors: &mut [u32], value: u32) {
    sectors[STAMPED].fill(value);
    sectors[ZEROED] = 0;
}

/// The backup, on the snapshot `base`, of a disk of `size` bytes.
pub fn stream(base: Guid, name: &str, size: u64, value: u32) -> Vec<u8> {
    let head = Head {
        size,
        cluster: 0,
        guid: Guid::random(),
        base,
        made: 0,
        image: "vm".into(),
        name: name.into(),
        base_name: "base".into(),
    };
    let (head, data, sector) = (head.encode(), stamp(value).repeat(STAMPED.len()), SECTOR as u64);
    let (mut encoder, mut bytes) = (Encoder::default(), Encoder::preamble().to_vec());
    bytes.extend(encoder.record(Tag::Head, 0, 0, &head));
    bytes.extend(head);
    bytes.extend(encoder.record(Tag::Data, STAMPED.start as u64 * sector, data.len() as u64, &data));
    bytes.extend(data);
    bytes.extend(encoder.record(Tag::Zero, ZEROED as u64 * sector, sector, &[]));
    bytes.extend(encoder.end());
    bytes
}

/// Restores it.
pub fn apply(stream: Vec<u8>, layers: &Arc<Layers>, chain: &[Level]) -> Result<(), String> {
    let stream = Stream::begin(Box::new(Cursor::new(stream)), "the backup").map_err(|e| e.to_string())?;
    let done = stream.apply_on(layers, chain, &Progress::new()).map_err(|e| format!("restore: {e}"))?;
    done.1.map_or(Ok(()), Err)
}
