//! The header against what QEMU, ploop and the kernel target write, and against garbage.

use super::*;

const MIB: u64 = 1 << 20;

/// 64 MiB with 1 MiB clusters, byte for byte as `qemu-img create -f parallels` of QEMU 10.0.2 writes it.
fn qemu_v2() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..16].copy_from_slice(b"WithouFreSpacExt");
    put(&mut bytes, 16, 2);
    put(&mut bytes, 20, 0x10);
    put(&mut bytes, 24, 0x100);
    put(&mut bytes, 28, 0x800);
    put(&mut bytes, 32, 0x40);
    put(&mut bytes, 36, 0x20000);
    put(&mut bytes, 48, 0x800);
    bytes
}

fn v1() -> [u8; 64] {
    let mut bytes = qemu_v2();
    bytes[..16].copy_from_slice(b"WithoutFreeSpace");
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Parses a header with one field changed and returns what the error names.
fn refused(base: [u8; 64], at: usize, value: u32) -> (&'static str, u64) {
    let mut bytes = base;
    put(&mut bytes, at, value);
    let bad = Header::parse(&bytes).expect_err("this header is bad");
    (bad.field, bad.offset)
}

#[test]
fn a_header_written_by_qemu_img_is_read() {
    let header = Header::parse(&qemu_v2()).expect("QEMU wrote it");
    assert_eq!((header.version, header.entries, header.disk_sectors), (Version::V2, 64, 0x20000));
    let geometry = header.geometry();
    assert_eq!((geometry.cluster, geometry.first, geometry.disk), (MIB, MIB, 64 * MIB));
    assert_eq!(header.encode(), qemu_v2());
}

#[test]
fn the_entry_that_has_no_way_back_is_no_position() {
    let geometry = Geometry { version: Version::V2, cluster: 512, entries: 8, disk: 4096, first: 512 };
    let last = geometry.position(u32::MAX - 1).expect("the largest entry");
    assert_eq!(geometry.entry(last), Some(u32::MAX - 1));
    assert_eq!(geometry.position(u32::MAX), None);
}

#[test]
fn iotest_076_catalogs_and_clusters_that_overflow_are_refused() {
    for base in [qemu_v2(), v1()] {
        assert_eq!(refused(base, 32, 0xffff_ffff), ("m_Size", 32));
        assert_eq!(refused(base, 32, 0x4000_0001), ("m_Size", 32));
        assert_eq!(refused(base, 32, MAX_ENTRIES + 1), ("m_Size", 32));
        assert_eq!(refused(base, 32, 63), ("m_Size", 32));
        assert_eq!(refused(base, 28, 0), ("m_Sectors", 28));
        assert_eq!(refused(base, 28, 0xffff_ffff), ("m_Sectors", 28));
        assert_eq!(refused(base, 28, MAX_CLUSTER_SECTORS + 1), ("m_Sectors", 28));
        assert_eq!(refused(base, 16, 1), ("m_Type", 16));
        assert_eq!(refused(base, 0, 0), ("m_Sig", 0));
    }
}

#[test]
fn the_largest_legal_numbers_do_not_overflow() {
    let mut bytes = qemu_v2();
    put(&mut bytes, 28, MAX_CLUSTER_SECTORS);
    put(&mut bytes, 32, MAX_ENTRIES);
    put(&mut bytes, 48, u32::MAX);
    let sectors = u64::from(MAX_CLUSTER_SECTORS) * u64::from(MAX_ENTRIES);
    bytes[36..44].copy_from_slice(&sectors.to_le_bytes());
    let geometry = Header::parse(&bytes).expect("legal").geometry();
    assert_eq!(geometry.disk, sectors * SECTOR);
    assert_eq!(geometry.clusters(), u64::from(MAX_ENTRIES));
    let last = geometry.position(u32::MAX - 1).expect("far above the first block");
    assert_eq!(last, u64::from(u32::MAX - 1) * geometry.cluster);
    assert_eq!(geometry.cluster_position(geometry.file_cluster(last)), last);
    bytes[36..44].copy_from_slice(&(sectors + 1).to_le_bytes());
    assert_eq!(Header::parse(&bytes).expect_err("one sector more").field, "m_Size");
}

#[test]
fn a_short_file_and_a_foreign_file_are_named_as_such() {
    assert_eq!(Header::parse(&qemu_v2()[..63]).expect_err("short").field, "header");
    assert_eq!(Header::parse(b"").expect_err("empty").value, 0);
    let bad = Header::parse(&[b'Q'; 64]).expect_err("foreign");
    assert!(bad.to_string().contains("m_Sig = 0x5151515151515151 at byte 0"), "{bad}");
}

#[test]
fn v1_counts_the_disk_in_32_bits_only() {
    let mut bytes = v1();
    put(&mut bytes, 40, 0xdead_beef);
    assert_eq!(Header::parse(&bytes).expect("the upper half is ignored").disk_sectors, 0x20000);
    let mut bytes = qemu_v2();
    put(&mut bytes, 40, 1);
    assert_eq!(Header::parse(&bytes).expect_err("v2 counts it").field, "m_Size");
}

#[test]
fn the_first_block_may_be_late_but_never_inside_the_bat() {
    assert_eq!(refused(qemu_v2(), 48, 0), ("m_FirstBlockOffset", 48));
    assert_eq!(refused(qemu_v2(), 48, 0x7ff), ("m_FirstBlockOffset", 48));
    // The one number that no entry can have, where clusters are sectors.
    let mut small = qemu_v2();
    put(&mut small, 28, 1);
    put(&mut small, 36, 64);
    put(&mut small, 48, u32::MAX - 1);
    assert_eq!(Header::parse(&small).expect("legal").geometry().file_clusters(), 1);
    assert_eq!(refused(small, 48, u32::MAX), ("m_FirstBlockOffset", 48));
    assert_eq!(refused(v1(), 48, u32::MAX), ("m_FirstBlockOffset", 48));
    // 64 entries end in byte 320: one sector, and v1 need not round it up to a cluster.
    for (value, first) in [(0, SECTOR), (1, SECTOR), (5, 5 * SECTOR), (0x1001, 0x1001 * SECTOR)] {
        let mut bytes = v1();
        put(&mut bytes, 48, value);
        assert_eq!(Header::parse(&bytes).expect("legal").geometry().first, first);
    }
    let mut bytes = v1();
    put(&mut bytes, 32, 1000);
    put(&mut bytes, 48, 7);
    assert_eq!(Header::parse(&bytes).expect_err("4064 bytes are 8 sectors").field, "m_FirstBlockOffset");
}

#[test]
fn odd_in_use_values_count_as_closed() {
    for (value, in_use) in
        [(IN_USE, true), (CLOSED, false), (CLOSED_V21, false), (1, false), (u32::MAX, false)]
    {
        let mut bytes = qemu_v2();
        put(&mut bytes, 44, value);
        let header = Header::parse(&bytes).expect("any value opens");
        assert_eq!(header.is_in_use(), in_use, "{value:#x}");
        assert_eq!(header.encode(), bytes);
    }
}

#[test]
fn a_file_whose_conversion_was_interrupted_is_refused() {
    assert_eq!(refused(qemu_v2(), 52, FLAG_CONVERSION), ("m_Flags", 52));
    assert_eq!(refused(qemu_v2(), 52, FLAG_CONVERSION | FLAG_EMPTY), ("m_Flags", 52));
}

#[test]
fn a_new_header_has_the_exact_first_block_that_the_kernel_target_demands() {
    for cluster in [32 << 10, 64 << 10, MIB, 64 * MIB] {
        // The last size whose BAT fits one cluster, and the first that needs two.
        let fits = (cluster - 64) / 4;
        for (entries, clusters) in [(1, 1), (fits, 1), (fits + 1, 2)] {
            let header = Header::new(Version::V2, entries * cluster, cluster).expect("in bounds");
            assert_eq!(u64::from(header.first_block) * SECTOR, clusters * cluster);
            assert_eq!(
                (u64::from(header.entries), header.flags, header.in_use),
                (entries, FLAG_EMPTY, CLOSED)
            );
            assert_eq!(Header::parse(&header.encode()).expect("readable"), header);
        }
    }
}

#[test]
fn a_new_header_refuses_what_the_format_cannot_hold() {
    let v1 = |bytes| Header::new(Version::V1, bytes, MIB);
    assert!(v1(u64::from(u32::MAX) * SECTOR).is_ok());
    assert_eq!(v1(2 << 40).expect_err("2 TiB").field, "m_SizeInSectors");
    assert_eq!(Header::new(Version::V2, u64::MAX, 32 << 10).expect_err("16 EiB").field, "m_Size");
    assert_eq!(Header::new(Version::V2, 1, 0).expect_err("no cluster").field, "m_Sectors");
    assert_eq!(Header::new(Version::V2, 1, 1000).expect_err("odd cluster").field, "m_Sectors");
    assert_eq!(Header::new(Version::V2, 0, MIB).expect("an empty disk is legal").entries, 0);
}

#[test]
fn chs_follows_ploop() {
    assert_eq!(chs(10 << 21), (16, 20_971_520 / 32 / 16));
    assert_eq!(chs(2 << 21), (16, 4_194_304 / 1008));
    assert_eq!(chs(0x20000), (16, 0x100));
    assert_eq!(chs(7), (1, 7));
    assert_eq!(chs(1 << 60), (16, u32::MAX));
}

#[test]
fn clusters_of_63_and_504_sectors_map_like_any_other() {
    for sectors in [63, 504] {
        let cluster = sectors * SECTOR;
        for version in [Version::V1, Version::V2] {
            let geometry = Header::new(version, 10 * MIB, cluster).expect("legal").geometry();
            assert_eq!(geometry.first, cluster);
            assert_eq!(geometry.clusters(), (10 * MIB).div_ceil(cluster));
            let at = geometry.cluster_position(5);
            assert_eq!(at, 6 * cluster);
            let entry = geometry.entry(at).expect("fits");
            assert_eq!(u64::from(entry), if version == Version::V1 { 6 * sectors } else { 6 });
            assert_eq!(geometry.position(entry), Some(at));
            assert_eq!(geometry.file_cluster(at), 5);
        }
    }
}

#[test]
fn positions_in_the_header_and_off_the_v1_grid_are_none() {
    let v2 = Header::new(Version::V2, 64 * MIB, MIB).expect("legal").geometry();
    assert_eq!((v2.position(0), v2.position(1)), (None, Some(MIB)));
    // A v1 file of old Parallels: the data begins right behind the BAT, on no multiple of the cluster.
    let mut header = Header::new(Version::V1, 63 * 512 * 100, 63 * 512).expect("legal");
    header.first_block = 0;
    let v1 = header.geometry();
    assert_eq!(v1.first, SECTOR);
    assert_eq!(v1.position(1), Some(SECTOR));
    assert_eq!(v1.position(64), Some(64 * SECTOR));
    assert_eq!((v1.position(63), v1.position(65)), (None, None));
    assert_eq!(v1.file_cluster(64 * SECTOR), 1);
}

#[test]
fn an_uneven_v2_first_block_is_rounded_down_to_the_cluster_grid_as_qemu_uses_it() {
    // As QEMU 10.0.2 leaves a 64 MiB image with clusters of 63 sectors: first block 65, data at sector 63.
    let mut header = Header::new(Version::V2, 64 * MIB, 63 * SECTOR).expect("legal");
    assert_eq!(header.first_block, 63);
    header.first_block = 65;
    let geometry = Header::parse(&header.encode()).expect("QEMU wrote it").geometry();
    assert_eq!((geometry.first, geometry.position(1)), (63 * SECTOR, Some(63 * SECTOR)));
    // Never into the BAT, wherever the value lies.
    for first_block in 0..300 {
        header.first_block = first_block;
        if let Ok(header) = Header::parse(&header.encode()) {
            assert!(header.geometry().first >= header.geometry().bat_end());
        }
    }
}

#[test]
fn an_entry_that_does_not_fit_32_bits_is_none_and_never_truncated() {
    let v1 = Header::new(Version::V1, 1 << 40, MIB).expect("legal").geometry();
    assert_eq!(v1.entry(2 << 40), None);
    assert_eq!(v1.entry((2 << 40) - MIB), Some(u32::MAX - 2047));
    let v2 = Header::new(Version::V2, 1 << 40, MIB).expect("legal").geometry();
    assert_eq!(v2.entry(2 << 40), Some(2 << 20));
    assert_eq!(v2.entry((1 << 52) - MIB), None, "0xFFFFFFFF is the kernel's word for none");
}

proptest::proptest! {
    #[test]
    fn any_64_bytes_parse_or_are_refused_and_geometry_never_overflows(
        mut bytes in proptest::array::uniform32(proptest::num::u8::ANY), more in proptest::array::uniform32(proptest::num::u8::ANY),
        v2 in proptest::bool::ANY, entry in proptest::num::u32::ANY,
    ) {
        bytes[..16].copy_from_slice(if v2 { MAGIC_V2 } else { MAGIC_V1 });
        bytes[16..20].copy_from_slice(&[2, 0, 0, 0]);
        // Keep the cluster small often enough that some headers pass.
        bytes[30..32].fill(0);
        let mut all = [bytes, more].concat();
        all[35] &= 0x3f;
        all[40..44].fill(0);
        if let Ok(header) = Header::parse(&all) {
            let geometry = header.geometry();
            proptest::prop_assert!(geometry.clusters() <= geometry.entries);
            if let Some(at) = geometry.position(entry) {
                proptest::prop_assert_eq!(geometry.cluster_position(geometry.file_cluster(at)), at);
            }
        }
    }
}
