//! Version 1 images: qemu-img and ours create version 2 only, so the tests write the 64 bytes themselves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Makes an empty version 1 image of `size` bytes with clusters of `cluster` bytes (both multiples of 512).
/// `late` leaves one more cluster than needed before the first block.
pub fn make_v1(path: &Path, size: u64, cluster: u64, late: bool) {
    let sectors = size / 512;
    let per_cluster = u32::try_from(cluster / 512).expect("a sane cluster size");
    let entries = u32::try_from(size.div_ceil(cluster)).expect("a small disk");
    let first = (64 + 4 * u64::from(entries)).div_ceil(cluster) + u64::from(late);
    let mut header = Vec::with_capacity(64);
    header.extend_from_slice(b"WithoutFreeSpace");
    let cylinders = u32::try_from(sectors / 512).expect("a small disk");
    for field in [2, 16, cylinders, per_cluster, entries] {
        header.extend_from_slice(&field.to_le_bytes());
    }
    header.extend_from_slice(&sectors.to_le_bytes()); // the upper half is unused in version 1, and 0 here
    let first_sector = u32::try_from(first * cluster / 512).expect("a small disk");
    for field in [0, first_sector, 0] {
        header.extend_from_slice(&u32::to_le_bytes(field));
    }
    header.extend_from_slice(&0_u64.to_le_bytes());
    assert_eq!(header.len(), 64);
    let file = File::create_new(path).expect("a new image file");
    file.set_len(first * cluster).expect("a sparse file");
    file.write_all_at(&header, 0).expect("the header");
}
