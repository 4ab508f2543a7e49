//! Punches that fail, that the host does not know, or that come late (R4).

use std::sync::Arc;

use ploopfs::Kind;
use ploopfs::vdisk::Options;

use super::rig::{Barrier, CLUSTER, Call, Rig, SECTOR, empty_file, errno, failing_at_once, options};

fn filled(spec: &str) -> Rig {
    // Enough runners for writes beside a punch that hangs.
    let rig = Rig::open(empty_file(40), spec, Options { runners: 8, ..options() }).expect("opens");
    for n in 0..8 {
        rig.fill(n, 1 + n as u8).expect("writes");
    }
    rig.flush().expect("syncs");
    rig
}

#[test]
fn a_failed_punch_is_reported_and_changes_no_mapping() {
    let rig = filled("fail=punch:1:EIO,fail=punch:2:EIO");
    let before: Vec<_> = (0..8).map(|n| rig.entry(n)).collect();
    assert_eq!(rig.discard(2 * CLUSTER, 3 * CLUSTER).expect_err("whole clusters").kind(), Kind::Io);
    assert_eq!(rig.discard(SECTOR, SECTOR).expect_err("a ragged end").kind(), Kind::Io);
    rig.flush().expect("syncs");
    assert_eq!((0..8).map(|n| rig.entry(n)).collect::<Vec<_>>(), before);
    for n in 0..8 {
        let byte = rig.byte(n);
        assert!(byte == 0 && (2..5).contains(&n) || byte == 1 + n as u8, "old data or zero, not {byte}");
    }
    rig.fill(20, 9).expect("goes on");
    rig.discard(2 * CLUSTER, 3 * CLUSTER).expect("works later");
    assert_eq!([2, 3, 4].map(|n| rig.byte(n)), [0; 3]);
    assert_eq!(rig.byte(20), 9);
    rig.close();
}

#[test]
fn where_the_host_cannot_punch_discards_read_as_zero_and_reused_clusters_are_zeroed() {
    let rig = filled("fail=punch:1:EOPNOTSUPP:forever");
    let freed: Vec<_> = (2..5).map(|n| rig.entry(n)).collect();
    rig.discard(2 * CLUSTER, 3 * CLUSTER).expect("whole clusters");
    rig.discard(6 * CLUSTER + SECTOR, SECTOR).expect("a ragged end");
    assert_eq!([2, 3, 4].map(|n| rig.byte(n)), [0; 3]);
    let cluster = rig.read(6 * CLUSTER, CLUSTER).expect("reads");
    assert!(cluster[512..1024].iter().all(|b| *b == 0) && cluster[..512].iter().all(|b| *b == 7));
    assert!(cluster[1024..].iter().all(|b| *b == 7));
    rig.flush().expect("syncs");
    // One sector into every cluster that is left: old content must not show around it.
    for n in 10..40 {
        rig.start_write(n * CLUSTER + SECTOR, vec![0xEE; 512], false).answer().expect("writes");
    }
    rig.flush().expect("syncs");
    let entries: Vec<_> = (10..40).map(|n| rig.entry(n)).collect();
    assert!(freed.iter().any(|place| entries.contains(place)), "freed clusters are in use again");
    for n in 10..40 {
        let cluster = rig.read(n * CLUSTER, CLUSTER).expect("reads");
        assert!(cluster[512..1024].iter().all(|b| *b == 0xEE));
        assert!(cluster[..512].iter().chain(&cluster[1024..]).all(|b| *b == 0), "zero around it");
    }
    rig.close();
}

/// cloud-hypervisor 64c1bb3bf: a punch on its way hits a cluster that was given to somebody else meanwhile.
#[test]
fn a_slow_punch_never_hits_a_cluster_that_was_allocated_again() {
    let rig = filled("");
    let freed: Vec<u64> = (0..4).filter_map(|n| rig.entry(n)).collect();
    let barrier = Arc::new(Barrier::default());
    let held = Arc::clone(&barrier);
    rig.file.rule(move |call| {
        if matches!(call, Call::Punch { .. }) {
            held.pass();
        }
        Ok(())
    });
    let discard = rig.start_discard(0, 4 * CLUSTER);
    barrier.wait_for(1);
    let late: Vec<_> = (0..12).map(|n| rig.start_fill(n, 0x80 + n as u8)).collect();
    late[8..].iter().for_each(|w| w.answer().expect("allocates while the punch hangs"));
    barrier.open();
    discard.answer().expect("discards");
    late[..8].iter().for_each(|w| w.answer().expect("writes"));
    assert!((0..12).all(|n| rig.byte(n) == 0x80 + n as u8));
    rig.flush().expect("syncs");
    for n in 0..12 {
        let place = rig.entry(n).expect("mapped");
        assert!(n >= 4 || !freed.contains(&place), "freed clusters wait for their round (R4)");
    }
    rig.file.heal();
    for n in 12..40 {
        rig.fill(n, 0x80 + n as u8).expect("writes");
    }
    rig.flush().expect("syncs");
    assert!((12..40).any(|n| rig.entry(n).is_some_and(|place| freed.contains(&place))), "reused by now");
    assert!((0..40).all(|n| rig.byte(n) == 0x80 + n as u8));
    rig.close();
}

#[test]
fn a_freed_cluster_is_not_reused_while_its_bat_page_cannot_be_written() {
    let rig = filled("");
    let freed: Vec<u64> = (0..8).filter_map(|n| rig.entry(n)).collect();
    let (is_bat, barrier) = (rig.is_bat(), Arc::new(Barrier::default()));
    let held = Arc::clone(&barrier);
    rig.file.rule(move |call| {
        if is_bat(call) {
            held.pass();
        }
        Ok(())
    });
    rig.discard(0, 8 * CLUSTER).expect("discards");
    let flush = rig.start_flush();
    barrier.wait_for(1);
    let calls = rig.file.log().len();
    for n in 8..20 {
        rig.fill(n, n as u8).expect("writes while the round hangs");
    }
    for (call, _) in &rig.file.log()[calls..] {
        if let Call::Write { at, .. } = call {
            assert!(!freed.contains(at), "the entry on disk still names it");
        }
    }
    barrier.open();
    flush.answer().expect("syncs");
    rig.close();
}

#[test]
fn a_discard_whose_bat_write_fails_frees_its_clusters_once_it_works() {
    let rig = filled("");
    let (is_bat, failing) = (rig.is_bat(), std::sync::atomic::AtomicBool::new(true));
    rig.file.rule(move |call| {
        let fails = is_bat(call) && failing.swap(false, std::sync::atomic::Ordering::SeqCst);
        if fails { errno(libc::EIO) } else { Ok(()) }
    });
    rig.discard(0, 8 * CLUSTER).expect("discards");
    rig.flush().expect("the second attempt works");
    assert!((0..8).all(|n| rig.entry(n).is_none()));
    rig.close();
    assert_eq!(rig.memory.to_bytes().len() as u64, rig.geometry.first, "nothing leaked");
}

#[test]
fn clusters_whose_round_failed_are_freed_by_the_next_one() {
    let rig = Rig::open(empty_file(40), "", failing_at_once()).expect("opens");
    for n in 0..8 {
        rig.fill(n, 1).expect("writes");
    }
    rig.flush().expect("syncs");
    let is_bat = rig.is_bat();
    rig.file.rule(move |call| if is_bat(call) { errno(libc::ENOSPC) } else { Ok(()) });
    rig.discard(4 * CLUSTER, 4 * CLUSTER).expect("discards");
    assert_eq!(rig.flush().expect_err("the BAT cannot be written").kind(), Kind::NoSpace);
    rig.file.heal();
    rig.flush().expect("syncs");
    rig.close();
    let length = rig.memory.to_bytes().len() as u64;
    assert_eq!(length, rig.geometry.first + 4 * CLUSTER, "nothing leaked");
}
