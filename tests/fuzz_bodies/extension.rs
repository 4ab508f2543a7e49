//! Any bytes as a format extension: the list of its clusters is bounded, no disk is damaged by them, and a bitmap in them
//! that proves itself goes on to tell the truth.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use ploopfs::format::extension::bitmap_sectors;
use ploopfs::format::header::{CLOSED_V21, Header, SECTOR, Version};
use ploopfs::image::check::check;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Image, Layout, Level};

use super::{folder, lazy_engine};

const CLUSTER: u64 = 4096;
/// File clusters behind the BAT: the extension's, one in use, two that nobody names.
const FILE_CLUSTERS: u64 = 4;

pub fn extension(data: &[u8]) {
    if let Some(sectors) = bitmap_sectors(data) {
        assert!(sectors.len() <= data.len() / 8);
        assert!(sectors.iter().all(|sector| *sector > 1));
    }
    let mut header = Header::new(Version::V2, 16 * CLUSTER, CLUSTER).expect("a legal size");
    let first = header.geometry().first;
    header.in_use = CLOSED_V21;
    header.extension = first / SECTOR;
    let mut bytes = header.encode().to_vec();
    bytes.resize((first + FILE_CLUSTERS * CLUSTER) as usize, 0);
    // Guest cluster 0 lies in file cluster 1.
    bytes[64..68].copy_from_slice(&(first as u32 / CLUSTER as u32 + 1).to_le_bytes());
    let n = data.len().min(CLUSTER as usize);
    bytes[first as usize..first as usize + n].copy_from_slice(&data[..n]);
    bytes[(first + CLUSTER) as usize..(first + 2 * CLUSTER) as usize].fill(7);

    let folder = folder();
    let path = folder.path().join("fuzz.hds");
    std::fs::File::create(&path).and_then(|file| file.write_all_at(&bytes, 0)).expect("space");
    let report = check(&path).expect("the image is readable");
    // The one thing that an extension can do: claim the cluster of the disk as well.
    assert!(report.errors <= 1, "{report:?}");

    // Its clusters are free space for a writer, who drops it, or holds its bitmap in memory.
    let file = Arc::new(MemoryFile::from_bytes(&bytes));
    let host: Arc<dyn HostFile> = file.clone();
    let level = Level { file: host, path: PathBuf::from("fuzz"), layout: Layout::Ploop(header) };
    let image = Image::open(lazy_engine(), "fuzz", vec![level]).expect("opens");
    image.make_writable().expect("the BAT is sound");
    for cluster in 1..4 {
        assert!(image.read_at(cluster * CLUSTER, 512).expect("reads").iter().all(|byte| *byte == 0));
        image.write_at(cluster * CLUSTER + 512, &[9; 512]).expect("writes");
        let data = image.read_at(cluster * CLUSTER, CLUSTER as usize).expect("reads");
        assert!(data[..512].iter().chain(&data[1024..]).all(|byte| *byte == 0), "old content shows");
    }
    assert!(image.read_at(0, CLUSTER as usize).expect("reads").iter().all(|byte| *byte == 7));
    image.close().expect("closes");
    let closed = Header::parse(&file.to_bytes()).expect("what we wrote");
    assert!(!closed.is_in_use());
    assert_eq!(closed.extension != 0, closed.in_use == CLOSED_V21, "{closed:?}");
    if closed.extension != 0 {
        let host: Arc<dyn HostFile> = file;
        let level = Level { file: host, path: PathBuf::from("fuzz"), layout: Layout::Ploop(closed) };
        let changes = Image::open(lazy_engine(), "fuzz", vec![level]).expect("opens").changes(0);
        assert!(changes.uuid.is_some(), "{changes:?}");
        for at in (1..4).map(|cluster| cluster * CLUSTER + 512) {
            let says = |(begin, len): &(u64, u64)| *begin <= at && at < begin + len;
            assert!(changes.ranges.iter().any(says), "byte {at} was written: {changes:?}");
        }
    }
}
