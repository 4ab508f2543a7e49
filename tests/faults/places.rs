//! Data lands where it belongs, files that are cut under us end a read, and slow extensions stop nobody else.

use std::sync::Arc;

use ploopfs::Kind;
use ploopfs::format::header::Version;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;

use super::rig::{Barrier, CLUSTER, Call, Rig, SECTOR, empty_header, options};

/// cloud-hypervisor 1dfb02aaf: data was written to the block's base instead of the sector's place.
#[test]
fn the_first_write_into_a_new_cluster_lands_at_every_sector_offset() {
    let sectors = CLUSTER / SECTOR;
    for version in [Version::V1, Version::V2] {
        let header = empty_header(version, 40);
        let file = MemoryFile::from_bytes(&header.encode());
        file.set_len(header.geometry().first).expect("memory grows");
        let rig = Rig::open(file, "", options()).expect("opens");
        let expected = |n: u64| -> Vec<u8> {
            (0..CLUSTER).map(|i| if i / SECTOR == n { 0xA0 + n as u8 } else { 0 }).collect()
        };
        for n in 0..sectors {
            let data = vec![0xA0 + n as u8; SECTOR as usize];
            rig.start_write(n * CLUSTER + n * SECTOR, data, false).answer().expect("writes");
            assert_eq!(rig.read(n * CLUSTER, CLUSTER).expect("reads"), expected(n));
        }
        rig.close();
        for n in 0..sectors {
            let place = rig.entry(n).expect("mapped") as usize;
            assert_eq!(rig.memory.to_bytes()[place..place + CLUSTER as usize], expected(n));
        }
    }
}

#[test]
fn a_delta_cut_inside_a_mapped_cluster_fails_the_read_of_its_tail_and_does_not_loop() {
    let rig = Rig::new(options());
    rig.fill(0, 1).expect("writes");
    rig.fill(1, 2).expect("writes");
    rig.flush().expect("syncs");
    let place = rig.entry(1).expect("mapped");
    rig.memory.set_len(place + 3 * SECTOR).expect("somebody cuts the file");
    assert_eq!(rig.read(CLUSTER, CLUSTER).expect_err("the tail is gone").kind(), Kind::Io);
    assert_eq!(rig.read(CLUSTER + 3 * SECTOR, SECTOR).expect_err("behind the end").kind(), Kind::Io);
    let mut buf = [0; 8 * SECTOR as usize];
    assert!(rig.image.try_read(CLUSTER, &mut buf).is_none_or(|r| r.is_err()), "nor by the fast path");
    assert_eq!(rig.read(CLUSTER, 3 * SECTOR).expect("what is there"), vec![2; 3 * SECTOR as usize]);
    assert_eq!(rig.byte(0), 1);
}

#[test]
fn a_slow_extension_blocks_neither_reads_nor_writes_in_place_nor_flushes() {
    let rig = Rig::new(options());
    rig.fill(0, 1).expect("writes");
    rig.flush().expect("syncs");
    let barrier = Arc::new(Barrier::default());
    let held = Arc::clone(&barrier);
    rig.file.rule(move |call| {
        if matches!(call, Call::SetLen(_)) {
            held.pass();
        }
        Ok(())
    });
    let allocations: Vec<_> = (10..30).map(|n| rig.start_fill(n, 9)).collect();
    barrier.wait_for(1);
    assert_eq!(rig.byte(0), 1);
    rig.fill(0, 2).expect("in place");
    rig.flush().expect("syncs");
    assert_eq!(rig.byte(0), 2);
    assert!(allocations.last().expect("some").waits(), "there is no room before the extension is durable");
    barrier.open();
    allocations.iter().for_each(|w| w.answer().expect("writes"));
    assert!((10..30).all(|n| rig.byte(n) == 9));
    rig.close();
}
