//! What is dumped is put back to the last byte, or refused.

use super::*;
use crate::format::header::Version;
use std::fs::{File, OpenOptions};

const CLUSTER: u64 = 32 << 10;

fn image(folder: &Path, entries: &[(u64, u64)]) -> std::path::PathBuf {
    let path = folder.join("vm.hds");
    let header = Header::new(Version::V2, 3000 * CLUSTER, CLUSTER).expect("legal");
    let geometry = header.geometry();
    let file = File::create_new(&path).expect("create");
    file.write_all_at(&header.encode(), 0).expect("write");
    for (cluster, place) in entries {
        let entry = geometry.entry(geometry.cluster_position(*place)).expect("fits");
        file.write_all_at(&entry.to_le_bytes(), HEADER_BYTES + 4 * cluster).expect("write");
    }
    file.set_len(geometry.cluster_position(3000)).expect("sparse");
    path
}

fn at(path: &Path) -> Located {
    Located::of(path).expect("a name in a folder")
}

fn text(path: &Path) -> String {
    let mut bytes = Vec::new();
    dump(&at(path), "vm.hds", &mut bytes).expect("dumped");
    String::from_utf8(bytes).expect("text")
}

#[test]
fn what_was_dumped_is_put_back_to_the_last_byte() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = image(folder.path(), &[(0, 5), (1, 6), (2, 7), (3, 4), (4, 3), (2999, 0)]);
    let (before, kept) = (std::fs::read(&path).expect("read"), text(&path));
    assert!(kept.contains("\nbat 0 3 6 1\nbat 3 1 5 0\nbat 4 1 4 0\nbat 2999 1 1 0\nend\n"), "{kept}");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|file| file.write_all_at(&[0xA5; 20_000], 0))
        .expect("damage");
    Restore::prepare(&parse(&kept).expect("a dump")[0], &at(&path))
        .and_then(Restore::carry_out)
        .expect("restored");
    let after = std::fs::read(&path).expect("read");
    let bat_end = HEADER_BYTES as usize + 4 * 3000;
    assert!(after[..bat_end] == before[..bat_end]);
    // What lies behind the BAT belongs to no entry, and is not touched.
    assert!(after[bat_end..20_000].iter().all(|byte| *byte == 0xA5));
}

#[test]
fn dumps_that_are_cut_changed_or_of_another_image_are_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = image(folder.path(), &[(0, 5)]);
    let (good, before) = (text(&path), std::fs::read(&path).expect("read"));
    parse(good.trim_end_matches("end\n")).expect_err("cut");
    parse("").expect_err("empty");
    parse(&good.replace("format 1", "format 2")).expect_err("another format");
    parse(&good.replace("m_Heads", "m_Hands")).expect_err("no such field");
    parse(&good.replace("m_Type 2\n", "")).expect_err("a field is missing");
    for (from, to) in
        [("m_Type 2", "m_Type 3"), ("bat 0 1 6 0", "bat 3000 1 6 0"), ("bat 0 1 6 0", "bat 0 1 9999 0")]
    {
        let changed = parse(&good.replace(from, to)).expect("well-formed");
        Restore::prepare(&changed[0], &at(&path)).and_then(Restore::carry_out).expect_err(to);
    }
    assert!(std::fs::read(&path).expect("read") == before);
}

#[test]
fn a_packed_image_has_the_map_and_the_length_and_no_data() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = image(folder.path(), &[(0, 5), (7, 1)]);
    let secret = |file: &Path| {
        let bytes = std::fs::read(file).expect("read");
        bytes.windows(6).any(|window| window == b"secret")
    };
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    file.write_all_at(b"secret", CLUSTER * 6).expect("data");
    assert!(secret(&path));
    let packed = folder.path().join("packed");
    pack(&at(&path), &packed).expect("packed");
    assert!(!secret(&packed));
    assert_eq!(packed.metadata().expect("stat").len(), path.metadata().expect("stat").len());
    assert_eq!(text(&packed), text(&path));
    pack(&at(&path), &packed).expect_err("never over a file");
    // A header that nothing proves: the BAT's end is not known, and data could lie where it seems to be.
    file.write_all_at(&[0xFF; 64], 0).expect("damage");
    let header_only = folder.path().join("header");
    assert_eq!(pack(&at(&path), &header_only).expect("packed"), HEADER_BYTES);
}

proptest::proptest! {
    #[test]
    fn any_map_is_dumped_and_read_back(map in proptest::collection::btree_map(0u64..3000, 0u64..2999, 0..200)) {
        let folder = tempfile::tempdir().expect("tmp");
        let entries: Vec<(u64, u64)> = map.into_iter().collect();
        let path = image(folder.path(), &entries);
        let meta = parse(&text(&path)).expect("a dump").remove(0);
        let mut read = vec![0; 3000];
        meta.fill(0, &mut read);
        let wanted = |cluster: u64| entries.iter().find(|(c, _)| *c == cluster).map_or(0, |(_, p)| *p as u32 + 1);
        proptest::prop_assert!((0..3000).all(|cluster| read[cluster as usize] == wanted(cluster)));
    }
}
