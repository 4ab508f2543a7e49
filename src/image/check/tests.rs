//! What a check finds, and what it passes over.

use super::used::WINDOW;
use super::*;
use crate::format::header::FLAG_EMPTY;

const CLUSTER: u64 = 32 << 10;

/// An image of 8 clusters with the given entries and a file of `file_clusters` data clusters.
struct Maker {
    header: Header,
    entries: Vec<(u64, u32)>,
    file_clusters: u64,
    cut: u64,
}

impl Maker {
    fn new(version: Version) -> Maker {
        let mut header = Header::new(version, 8 * CLUSTER, CLUSTER).expect("legal");
        header.flags &= !FLAG_EMPTY;
        Maker { header, entries: Vec::new(), file_clusters: 0, cut: 0 }
    }

    /// Guest cluster -> file cluster.
    fn map(mut self, cluster: u64, file_cluster: u64) -> Maker {
        let geometry = self.header.geometry();
        let entry = geometry.entry(geometry.cluster_position(file_cluster)).expect("fits");
        self.file_clusters = self.file_clusters.max(file_cluster + 1);
        self.raw_entry(cluster, entry)
    }

    fn raw_entry(mut self, cluster: u64, entry: u32) -> Maker {
        self.entries.push((cluster, entry));
        self
    }

    fn check(&self) -> CheckReport {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let geometry = self.header.geometry();
        let mut bytes = self.header.encode().to_vec();
        bytes.resize((geometry.cluster_position(self.file_clusters) - self.cut) as usize, 0);
        for (cluster, entry) in &self.entries {
            let at = (HEADER_BYTES + 4 * cluster) as usize;
            bytes[at..at + 4].copy_from_slice(&entry.to_le_bytes());
        }
        std::fs::write(&path, &bytes).expect("write");
        let report = check(&path).expect("readable");
        assert_eq!(std::fs::read(&path).expect("read"), bytes, "a check changes nothing");
        report
    }

    fn problems(&self) -> Vec<Problem> {
        self.check().findings.iter().map(|finding| finding.problem).collect()
    }
}

#[test]
fn a_good_image_has_nothing_to_report_in_either_version() {
    for version in [Version::V1, Version::V2] {
        let report = Maker::new(version).map(0, 1).map(7, 0).check();
        assert_eq!((report.errors, report.leaks, report.tail, report.mapped), (0, 0, 0, 2));
        assert!(!report.in_use && report.notes.is_empty(), "{report:?}");
    }
}

#[test]
fn every_kind_of_bad_entry_is_named() {
    let v2 = || Maker::new(Version::V2);
    assert_eq!(v2().map(0, 0).map(1, 0).problems(), [Problem::Double]);
    assert_eq!(v2().map(0, 0).raw_entry(1, 2).problems(), [Problem::PastEnd]);
    assert_eq!(v2().map(0, 0).raw_entry(1, u32::MAX).problems(), [Problem::PastEnd]);
    let mut late = v2();
    late.header.first_block *= 2;
    assert_eq!(late.map(0, 0).raw_entry(1, 1).problems(), [Problem::IntoHeader]);
    let v1 = Maker::new(Version::V1).map(0, 0);
    assert_eq!(v1.raw_entry(1, 3).raw_entry(2, 64 + 1).problems(), [Problem::IntoHeader, Problem::OffGrid]);
    let mut short = v2();
    short.header.disk_sectors -= CLUSTER / SECTOR;
    assert_eq!(short.map(6, 0).map(7, 1).problems(), [Problem::BeyondDisk]);
    let finding = &v2().map(0, 0).map(3, 0).check().findings[0];
    assert_eq!((finding.cluster, finding.offset), (Some(3), Some(76)));
    assert_eq!(finding.to_string(), "BAT entry 3 = 0x1 at byte 76: file cluster 0 is referred to twice");
}

#[test]
fn leaks_in_the_middle_and_in_the_tail_are_counted_and_are_no_damage() {
    let mut image = Maker::new(Version::V2).map(0, 2);
    image.file_clusters = 7;
    let report = image.check();
    assert_eq!((report.errors, report.leaks, report.tail, report.free), (0, 6, 4, 0));
    assert!(!report.is_damaged());
}

#[test]
fn holes_between_clusters_in_use_are_free_and_no_leaks() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = folder.path().join("vm.hds");
    let header = Header::new(Version::V2, 8 * CLUSTER, CLUSTER).expect("legal");
    let geometry = header.geometry();
    let file = std::fs::File::create_new(&path).expect("create");
    let write = |bytes: &[u8], at| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).expect("write");
    write(&header.encode(), 0);
    write(&7u32.to_le_bytes(), HEADER_BYTES);
    // File cluster 2 is leaked, 6 in use, 0, 1, 3, 4 and 5 are holes, 7 is a hole in the tail.
    write(&[1], geometry.cluster_position(2));
    write(&[1], geometry.cluster_position(6));
    file.set_len(geometry.cluster_position(8)).expect("extend");
    let report = check(&path).expect("readable");
    assert_eq!((report.errors, report.leaks, report.tail, report.free), (0, 2, 1, 5), "{report:?}");
}

#[test]
fn a_left_over_mark_is_said_and_is_no_damage() {
    let mut image = Maker::new(Version::V2).map(0, 0);
    image.header.in_use = IN_USE;
    let report = image.check();
    assert!(report.in_use && !report.is_damaged());
    image.header.in_use = 1;
    let report = image.check();
    assert!(!report.in_use && !report.is_damaged());
    assert!(report.notes[0].contains("m_DiskInUse = 0x1"), "{:?}", report.notes);
}

#[test]
fn a_file_cut_inside_a_mapped_cluster_is_damage_but_behind_the_disk_it_is_not() {
    let mut image = Maker::new(Version::V2).map(7, 0);
    image.cut = SECTOR;
    assert_eq!(image.problems(), [Problem::Cut]);
    // The disk ends one sector earlier: no read reaches what the file lacks.
    image.header.disk_sectors -= 1;
    let report = image.check();
    assert_eq!(report.errors, 0);
    assert!(report.notes[0].contains("inside a cluster"), "{:?}", report.notes);
}

#[test]
fn a_dangling_extension_and_a_dirty_padding_are_noted() {
    let mut image = Maker::new(Version::V2).map(0, 0);
    image.header.extension = 1 << 40;
    assert!(image.check().notes[0].contains("dangling"));
    image.header.extension = u64::MAX;
    assert!(image.check().notes[0].contains("dangling"));
    image.header.extension = CLUSTER / SECTOR;
    assert!(image.check().notes[0].contains("stale"));
    image.header.in_use = CLOSED_V21;
    assert!(image.check().notes[0].contains("no magic"));
    // Entry 8 of 8: behind the BAT.
    let report = Maker::new(Version::V2).map(0, 0).raw_entry(8, 1).check();
    assert_eq!(report.errors, 0);
    assert!(report.notes[0].contains("byte 96"), "{:?}", report.notes);
}

#[test]
fn a_trusted_extension_uses_its_clusters_and_they_are_no_leaks() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = folder.path().join("vm.hds");
    let mut header = Header::new(Version::V2, 8 * CLUSTER, CLUSTER).expect("legal");
    header.in_use = CLOSED_V21;
    header.extension = 2 * CLUSTER / SECTOR;
    let mut bytes = header.encode().to_vec();
    // File cluster 0: bitmap, 1: extension, 2: leaked.
    bytes.resize(4 * CLUSTER as usize, 0);
    let at = 2 * CLUSTER as usize;
    bytes[at..at + 8].copy_from_slice(&extension::MAGIC.to_le_bytes());
    bytes[at + 24..at + 32].copy_from_slice(&0x2038_5FAE_252C_B34A_u64.to_le_bytes());
    bytes[at + 40] = 40;
    bytes[at + 48 + 28] = 1;
    bytes[at + 48 + 32..at + 48 + 40].copy_from_slice(&(CLUSTER / SECTOR).to_le_bytes());
    std::fs::write(&path, &bytes).expect("write");
    let report = check(&path).expect("readable");
    assert_eq!((report.errors, report.leaks, report.tail), (0, 1, 1), "{report:?}");
}

#[test]
fn a_bad_header_is_one_error_that_names_the_field() {
    let mut image = Maker::new(Version::V2);
    image.header.first_block *= 3;
    image.cut = CLUSTER;
    let report = image.check();
    assert_eq!((report.errors, report.findings[0].problem), (1, Problem::Header));
    assert!(report.findings[0].message.starts_with("m_FirstBlockOffset = 0xc0 at byte 48"), "{report:?}");
}

#[test]
fn garbage_in_a_large_bat_keeps_a_bounded_number_of_findings() {
    let folder = tempfile::tempdir().expect("tmp");
    let path = folder.path().join("vm.hds");
    let header = Header::new(Version::V2, 100_000 * CLUSTER, CLUSTER).expect("legal");
    let mut bytes = header.encode().to_vec();
    bytes.resize(header.geometry().bat_end() as usize, 0xff);
    bytes.resize(header.geometry().first as usize, 0);
    std::fs::write(&path, bytes).expect("write");
    let report = check(&path).expect("readable");
    assert_eq!((report.errors, report.findings.len()), (100_000, MAX_FINDINGS));
}

#[test]
fn doubles_and_leaks_are_seen_across_windows() {
    // One-sector clusters in a sparse file of 2^28 + 100 clusters: the second window holds the last 100.
    let folder = tempfile::tempdir().expect("tmp");
    let path = folder.path().join("vm.hds");
    let header = Header::new(Version::V2, 100 * SECTOR, SECTOR).expect("legal");
    let geometry = header.geometry();
    let total = WINDOW + 100;
    let entry = |file_cluster| geometry.entry(geometry.cluster_position(file_cluster)).expect("fits");
    let mut bytes = header.encode().to_vec();
    for value in [entry(5), entry(total - 1), entry(total - 1), entry(total - 2)] {
        bytes.extend(value.to_le_bytes());
    }
    std::fs::write(&path, bytes).expect("write");
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("open");
    file.set_len(geometry.cluster_position(total)).expect("sparse");
    let report = check(&path).expect("readable");
    assert_eq!((report.errors, report.mapped, report.tail), (1, 4, 0));
    // Some free clusters share a host block with one in use, and so take space.
    assert_eq!(report.leaks + report.free, total - 3);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn any_bytes_behind_the_magic_are_checked_without_a_panic(
        fields in proptest::collection::vec(proptest::num::u32::ANY, 12), bat in proptest::collection::vec(0u32..40, 0..600),
        small in proptest::bool::ANY, len in 0u64..1 << 42,
    ) {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let mut bytes = b"WithouFreSpacExt\x02\0\0\0".to_vec();
        let mut fields = fields;
        if small {
            // Plausible numbers, so that the BAT is reached.
            (fields[2], fields[3], fields[4], fields[5], fields[7]) = (fields[2] % 70 + 1, fields[3] % 600, 1, 0, 70);
            fields[8] = 0;
        }
        bytes.extend(fields[..11].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(bat.iter().flat_map(|entry| entry.to_le_bytes()));
        std::fs::write(&path, bytes).expect("write");
        std::fs::OpenOptions::new().write(true).open(&path).expect("open").set_len(len % (1 << (len % 43))).expect("sparse");
        let report = check(&path).expect("readable");
        proptest::prop_assert!(report.findings.len() <= MAX_FINDINGS);
        proptest::prop_assert!(report.tail <= report.leaks);
    }
}
