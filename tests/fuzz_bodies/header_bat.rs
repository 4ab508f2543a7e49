//! Any bytes as header, BAT and data: an error or a valid image; nothing is written before the guest writes, and what it
//! writes is there afterwards.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use ploopfs::Kind;
use ploopfs::format::header::{Geometry, Header};
use ploopfs::image::check::check;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Image, Layout, Level};

use super::{folder, lazy_engine, not_internal};

/// Longest file in bytes; with a hole for its tail.
const LONGEST: u32 = 21;

/// The first byte says how long the file is: 0 to 0x7f as long as the rest, else at least two to the power of its low
/// bits.
pub fn header_bat(data: &[u8]) {
    let Some((length, bytes)) = data.split_first() else { return };
    let Ok(header) = Header::parse(bytes) else { return };
    assert_eq!(Header::parse(&header.encode()).as_ref(), Ok(&header), "what is written is what is read");
    sane(&header.geometry());
    if let Ok(grown) = header.grown(header.geometry().disk.saturating_add(1 << 20)) {
        assert!(grown.geometry().disk >= header.geometry().disk);
        sane(&grown.geometry());
    }

    let file = Arc::new(MemoryFile::from_bytes(bytes));
    if length & 0x80 != 0 {
        let len = 1 << u32::from(length & 0x7f).min(LONGEST);
        file.set_len(len.max(bytes.len() as u64)).expect("memory grows");
    }
    let before = file.to_bytes();
    let sound = is_sound(&before);
    let level = || {
        let file: Arc<dyn HostFile> = file.clone();
        Level { file, path: PathBuf::from("fuzz"), layout: Layout::Ploop(header) }
    };
    let image = match Image::open(lazy_engine(), "fuzz", vec![level()]) {
        Ok(image) => image,
        Err(e) => {
            assert!(!sound && e.kind() == Kind::Damaged, "{e}");
            return;
        }
    };
    let offsets = offsets(&image);
    for offset in &offsets {
        look(&image, *offset);
    }
    let writable = image.make_writable();
    assert!(file.to_bytes() == before, "bytes changed that nobody wrote");
    if let Err(e) = writable {
        assert!(!sound && e.kind() == Kind::Damaged, "{e}");
        return;
    }
    let all = live(&image, &offsets, header.geometry().file_clusters());
    image.close().expect("closes");
    if image.size() == 0 || !all {
        return;
    }
    let mut first = [0; 64];
    file.read_at(&mut first, 0).expect("memory reads");
    let header = Header::parse(&first).expect("what we wrote");
    assert!(!header.is_in_use());
    let again = Image::open(lazy_engine(), "fuzz", vec![Level { layout: Layout::Ploop(header), ..level() }]);
    let again = again.expect("what was closed opens");
    for (n, offset) in offsets.iter().enumerate().skip(1) {
        expect(&again, *offset, n as u8);
    }
    expect(&again, 0, 0);
    again.make_writable().expect("what was closed is sound");
}

fn sane(geometry: &Geometry) {
    assert!(geometry.first >= geometry.bat_end(), "data inside the BAT");
    assert!(geometry.entries >= geometry.clusters());
    assert!(geometry.file_clusters() > 0);
    let first = geometry.first / 512;
    for entry in [1, 2, 3, first as u32, 1 << 20, u32::MAX - 1, u32::MAX] {
        if let Some(position) = geometry.position(entry) {
            assert_eq!(geometry.entry(position), Some(entry));
            let file_cluster = geometry.file_cluster(position);
            assert_eq!(geometry.cluster_position(file_cluster), position);
        }
    }
}

/// What `check` says of these bytes.
fn is_sound(bytes: &[u8]) -> bool {
    let folder = folder();
    let path = folder.path().join("fuzz.hds");
    let file = std::fs::File::create(&path).expect("a file");
    // Zeroes at the end are left a hole.
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    file.write_all_at(&bytes[..end], 0).and_then(|()| file.set_len(bytes.len() as u64)).expect("space");
    match check(&path) {
        Ok(report) => {
            assert_eq!(report.is_damaged(), !report.findings.is_empty(), "{report:?}");
            !report.is_damaged()
        }
        Err(e) => {
            assert_eq!(e.kind(), Kind::Damaged, "{e}");
            false
        }
    }
}

/// The beginning of some sectors of the disk, none twice.
fn offsets(image: &Image) -> Vec<u64> {
    let (size, cluster) = (image.size(), image.cluster());
    let mut offsets = vec![0, cluster, size / 2, size.saturating_sub(512), size.saturating_sub(cluster)];
    offsets.iter_mut().for_each(|offset| *offset -= *offset % 512);
    offsets.sort_unstable();
    offsets.dedup();
    offsets.retain(|offset| offset + 512 <= size);
    offsets
}

fn look(image: &Arc<Image>, offset: u64) {
    match image.read_at(offset, 4096) {
        Ok(data) => assert_eq!(data.len() as u64, 4096.min(image.size() - offset)),
        Err(e) => {
            not_internal(&e);
            assert!(matches!(e.kind(), Kind::Damaged | Kind::Io), "{e}");
        }
    }
    for found in [image.seek_data(offset), image.seek_hole(offset).map(Some)] {
        match found {
            Ok(at) => assert!(at.is_none_or(|at| at >= offset && at <= image.size())),
            Err(e) => not_internal(&e),
        }
    }
}

/// Writes, and one discard of the first cluster. False: there are not `numbers` enough for all clusters.
fn live(image: &Arc<Image>, offsets: &[u64], numbers: u64) -> bool {
    if image.size() == 0 {
        return true;
    }
    for (n, offset) in offsets.iter().enumerate() {
        match image.write_at(*offset, &[n as u8; 512]) {
            // A first block so far out that there are not as many numbers for clusters behind it.
            Err(e) if e.kind() == Kind::NoSpace && numbers < offsets.len() as u64 => return false,
            done => done.expect("a sound image can be written"),
        }
    }
    image.flush_now().expect("memory syncs");
    // Less than a cluster where the next offset lies in it.
    let len = image.cluster().min(offsets.get(1).copied().unwrap_or(u64::MAX));
    image.discard_at(0, len).expect("a sound image can be discarded");
    for (n, offset) in offsets.iter().enumerate().skip(1) {
        expect(image, *offset, n as u8);
    }
    expect(image, 0, 0);
    true
}

fn expect(image: &Arc<Image>, offset: u64, stamp: u8) {
    if offset + 512 > image.size() {
        return;
    }
    let data = image.read_at(offset, 512).expect("a sound image can be read");
    assert!(data.iter().all(|byte| *byte == stamp), "offset {offset}: {} and not {stamp}", data[0]);
}
