//! Failed, slow and shared syncs; BAT writes that fail (R5, R6, R7).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ploopfs::Kind;
use ploopfs::format::header::{CLOSED_V21, IN_USE};
use ploopfs::io::fault::Op;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{ImageEvent, Mode, Options};

use super::rig::{
    Barrier, CLUSTER, Call, Rig, SECTOR, empty_file, errno, failing_at_once, header, options, until,
};

#[test]
fn a_failed_fdatasync_is_final_and_all_who_wait_hear_of_it() {
    let rig = Rig::new(options());
    rig.fill(0, 1).expect("writes");
    rig.flush().expect("syncs");
    rig.fill(1, 2).expect("writes");
    // The next sync fails, once: the host would say yes to every later one.
    let (barrier, first) = (Arc::new(Barrier::default()), AtomicBool::new(true));
    let held = Arc::clone(&barrier);
    rig.file.rule(move |call| {
        if call == Call::Sync && first.swap(false, Ordering::SeqCst) {
            held.pass();
            return errno(libc::EIO);
        }
        Ok(())
    });
    let waiting: Vec<_> = (0..3).map(|_| rig.start_flush()).collect();
    let durable = rig.start_write(0, vec![3; 512], true);
    barrier.wait_for(1);
    barrier.open();
    for flush in waiting {
        assert_eq!(flush.answer().expect_err("a waiter").kind(), Kind::Io);
    }
    assert_eq!(durable.answer().expect_err("a durable write waits like them").kind(), Kind::Io);
    assert_eq!(rig.image.mode(), Mode::ReadOnly);
    let calls = rig.file.log().len();
    rig.flush().expect_err("a later fsync");
    rig.fill(0, 9).expect_err("a write in place");
    rig.fill(7, 9).expect_err("an allocation");
    rig.discard(0, CLUSTER).expect_err("a discard");
    assert!(rig.image.try_write(0, &[9; 512]).is_none(), "no way around the queue");
    assert_eq!(rig.file.log().len(), calls, "none of them reached the host");
    assert_eq!(rig.byte(1), 2, "reads go on");
    let said = rig.events().iter().filter(|e| matches!(e, ImageEvent::ReadOnly { .. })).count();
    assert_eq!(said, 1);
    rig.image.close().expect_err("a close says so");
    assert_eq!(header(&rig.memory).in_use, IN_USE, "and the mark stays");
    let left = rig.reopened().read(0, CLUSTER).expect("reads");
    assert!(matches!(left[0], 1 | 3) && left[512..].iter().all(|b| *b == 1), "what was synced is there");
}

#[test]
fn a_failed_bat_write_frees_no_wrong_cluster_and_is_tried_again() {
    let rig = Rig::new(options());
    for n in 0..4 {
        rig.fill(10 + n, 10 + n as u8).expect("writes");
    }
    rig.flush().expect("syncs");
    // Guest clusters 0 to 3, so that their numbers as file clusters belong to others (K1).
    for n in 0..4 {
        rig.fill(n, 50 + n as u8).expect("writes");
    }
    let (is_bat, failures) = (rig.is_bat(), AtomicUsize::new(2));
    rig.file.rule(move |call| {
        let left = |n: usize| n.checked_sub(1);
        if is_bat(call) && failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok() {
            return errno(libc::EIO);
        }
        Ok(())
    });
    rig.flush().expect("written again");
    for n in 0..4 {
        assert!(rig.entry(n).is_some(), "nothing is lost");
        rig.fill(20 + n, 90 + n as u8).expect("writes more");
    }
    for n in 0..4 {
        assert_eq!(
            (rig.byte(n), rig.byte(10 + n), rig.byte(20 + n)),
            (50 + n as u8, 10 + n as u8, 90 + n as u8)
        );
    }
    rig.close();
    assert_eq!(rig.memory.len().expect("memory"), rig.geometry.first + 12 * CLUSTER, "no cluster leaked");
    let again = rig.reopened();
    for n in 0..4 {
        assert_eq!(
            (again.byte(n), again.byte(10 + n), again.byte(20 + n)),
            (50 + n as u8, 10 + n as u8, 90 + n as u8)
        );
    }
}

#[test]
fn a_bat_write_that_fails_for_good_makes_the_image_read_only_after_a_bounded_time() {
    let rig = Rig::new(options());
    rig.fill(0, 1).expect("writes");
    let is_bat = rig.is_bat();
    rig.file.rule(move |call| if is_bat(call) { errno(libc::EIO) } else { Ok(()) });
    let begun = Instant::now();
    rig.flush().expect_err("in vain");
    assert!((3..20).contains(&begun.elapsed().as_secs()), "tried for a while: {:?}", begun.elapsed());
    assert_eq!(rig.image.mode(), Mode::ReadOnly);
    assert_eq!(rig.byte(0), 1, "reads go on");
    rig.image.close().expect_err("closes with the error");
    assert_eq!(header(&rig.memory).in_use, IN_USE);
    drop(rig.reopened());
}

#[test]
fn every_attempt_at_bat_page_0_carries_the_header_as_it_is_then() {
    let rig = Rig::new(Options { bat_delay: Duration::ZERO, ..options() });
    let (is_bat, first) = (rig.is_bat(), AtomicBool::new(true));
    rig.file.rule(move |call| {
        if is_bat(call) && first.swap(false, Ordering::SeqCst) { errno(libc::EIO) } else { Ok(()) }
    });
    // The mark, and at once a round with page 0, whose first attempt fails.
    rig.fill(3, 1).expect("writes");
    rig.flush().expect("syncs");
    assert_eq!(header(&rig.memory).in_use, IN_USE, "page 0 did not bring the old header back");
    assert_eq!(header(&rig.memory).flags, 0);
    assert!(rig.entry(3).is_some());
    rig.close();
}

#[test]
fn an_o_dsync_write_is_durable_when_it_is_answered() {
    let rig = Rig::new(options());
    let (is_data, is_bat) = (rig.is_data(), rig.is_bat());
    // An allocation: data, sync, BAT, sync, in this order.
    rig.start_write(5 * CLUSTER, vec![7; 512], true).answer().expect("writes");
    let log: Vec<Call> = rig.file.log().into_iter().map(|(call, _)| call).collect();
    let data = log.iter().position(|c| is_data(*c)).expect("data is written");
    let bat = log.iter().position(|c| is_bat(*c)).expect("the BAT is written");
    assert!(log[data..bat].contains(&Call::Sync), "the data is durable before its entry is written");
    assert!(log[bat..].contains(&Call::Sync), "the entry is durable before the answer");
    // In place.
    rig.start_write(5 * CLUSTER, vec![8; 512], true).answer().expect("writes");
    let log: Vec<Call> = rig.file.log().into_iter().map(|(call, _)| call).collect();
    let data = log.iter().rposition(|c| is_data(*c)).expect("data is written");
    assert!(log[data..].contains(&Call::Sync));
    rig.close();
}

#[test]
fn a_hundred_flushes_at_once_share_a_few_syncs() {
    let rig = Rig::new(Options { runners: 16, ..options() });
    for n in 0..40 {
        rig.fill(n, 1).expect("writes");
    }
    rig.flush().expect("syncs");
    rig.plan.set_delay(Op::Sync, 30);
    let before = rig.plan.counters(Op::Sync).started;
    let writes: Vec<_> = (0..40).map(|n| rig.start_fill(n, 2)).collect();
    writes.iter().for_each(|w| w.answer().expect("writes"));
    let flushes: Vec<_> = (0..100).map(|_| rig.start_flush()).collect();
    flushes.iter().for_each(|f| f.answer().expect("syncs"));
    let syncs = rig.plan.counters(Op::Sync).started - before;
    assert!((1..=4).contains(&syncs), "one round runs, one waits; {syncs} syncs");
    rig.close();
}

#[test]
fn a_flush_that_comes_during_a_round_waits_for_the_next_one() {
    let rig = Rig::new(options());
    rig.fill(0, 1).expect("writes");
    rig.flush().expect("syncs");
    rig.fill(0, 2).expect("writes in place");
    let barriers = Arc::new([Barrier::default(), Barrier::default()]);
    let (held, syncs) = (Arc::clone(&barriers), AtomicUsize::new(0));
    rig.file.rule(move |call| {
        if call == Call::Sync
            && let Some(barrier) = held.get(syncs.fetch_add(1, Ordering::SeqCst))
        {
            barrier.pass();
        }
        Ok(())
    });
    let first = rig.start_flush();
    barriers[0].wait_for(1);
    rig.fill(0, 3).expect("writes in place, while the sync runs");
    let second = rig.start_flush();
    barriers[0].open();
    first.answer().expect("its round has ended");
    barriers[1].wait_for(1);
    assert!(second.waits(), "its write may have missed the first sync");
    barriers[1].open();
    second.answer().expect("the second round has ended");
    rig.close();
}

#[test]
fn a_bat_page_dirtied_again_and_again_is_still_written_within_the_delay() {
    let clusters = 900;
    let delayed = Options { bat_delay: Duration::from_millis(100), extend: 64 << 20, ..options() };
    let rig = Rig::open(empty_file(clusters), "", delayed).expect("opens");
    let begun = Instant::now();
    let mut n = 0;
    while begun.elapsed() < Duration::from_secs(1) && n < clusters {
        rig.fill(n, 1).expect("writes");
        n += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    let writes = rig.file.count(rig.is_bat());
    assert!(writes >= 2, "written while it was dirtied: {writes}");
    assert!(writes <= 15, "and not at every change: {writes}");
    until("the last entry", || rig.entry(n - 1).is_some());
    until("a clean BAT", || rig.image.stats().dirty_pages == 0);
    rig.close();
}

#[test]
fn the_first_change_of_an_image_closed_as_v2_1_drops_mark_and_extension_in_one_write() {
    let file = empty_file(40);
    let mut h = header(&file);
    h.in_use = CLOSED_V21;
    h.extension = h.geometry().first / SECTOR;
    file.set_len(h.geometry().first + CLUSTER).expect("memory grows");
    file.write_at(&h.encode(), 0).expect("memory writes");
    let rig = Rig::open(MemoryFile::from_bytes(&file.to_bytes()), "", options()).expect("opens");
    assert_eq!(header(&rig.memory), h, "opening changes nothing");
    rig.fill(0, 1).expect("writes");
    let log: Vec<Call> = rig.file.log().into_iter().map(|(call, _)| call).collect();
    let changes: Vec<Call> = log.into_iter().filter(|c| !matches!(c, Call::Read { .. })).collect();
    assert_eq!(changes[..2], [Call::Write { at: 0, len: 64 }, Call::Sync], "before anything else");
    assert_eq!((header(&rig.memory).in_use, header(&rig.memory).extension), (IN_USE, 0));
    rig.close();
}

#[test]
fn nothing_is_written_once_a_close_that_failed_has_answered() {
    let rig = Rig::new(Options { bat_delay: Duration::ZERO, ..failing_at_once() });
    let is_bat = rig.is_bat();
    rig.file.rule(move |call| if is_bat(call) { errno(libc::ENOSPC) } else { Ok(()) });
    rig.fill(0, 1).expect("writes");
    rig.image.close().expect_err("the BAT cannot be written");
    let calls = rig.file.log().len();
    rig.flush().expect_err("the image is closed");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.file.log().len(), calls, "another opening may have the file by now");
}
