//! A plan's faults come where it says, and as often.

use super::*;
use crate::io::file::{read_full, write_full};
use crate::io::memory::MemoryFile;
use std::time::Instant;

fn faulty(spec: &str) -> (FaultFile, Arc<FaultPlan>) {
    let plan = Arc::new(spec.parse::<FaultPlan>().expect("spec"));
    (FaultFile::new(Arc::new(MemoryFile::new()), Arc::clone(&plan)), plan)
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
    result.expect_err("planned").raw_os_error()
}

#[test]
fn the_nth_operation_of_a_kind_fails_once() {
    let (file, plan) = faulty("fail=write:2:EIO");
    file.write_at(b"a", 0).expect("first");
    file.sync_data().expect("another kind");
    assert_eq!(errno(file.write_at(b"b", 0)), Some(libc::EIO));
    file.write_at(b"c", 0).expect("third");
    assert_eq!(plan.counters(Op::Write), Counters { started: 3, running: 0, peak: 1 });
}

#[test]
fn forever_means_the_nth_and_all_later_ones_and_any_means_every_kind() {
    let (file, _) = faulty("fail=any:3:5:forever");
    file.punch(0, 1).expect("first");
    file.set_len(10).expect("second");
    assert_eq!(errno(file.sync_all()), Some(libc::EIO));
    assert_eq!(errno(file.read_at(&mut [0], 0)), Some(libc::EIO));
}

#[test]
fn short_counts_are_really_short_and_full_transfers_continue_them() {
    let (file, plan) = faulty("short=write:1,short=read:1:forever");
    assert_eq!(file.write_at(&[1; 100], 0).expect("short"), 50);
    write_full(&file, &[1; 100], 0).expect("write");
    let mut buf = [0; 100];
    assert_eq!(read_full(&file, &mut buf, 0).expect("read"), 100);
    assert_eq!(buf, [1; 100]);
    assert!(plan.counters(Op::Read).started > 5, "half, and half of the rest, and so on");
}

#[test]
fn an_operation_that_one_fault_ends_is_counted_by_all() {
    let (file, _) = faulty("fail=punch:1:EIO,fail=punch:2:ENOSPC");
    assert_eq!(errno(file.punch(0, 1)), Some(libc::EIO));
    assert_eq!(errno(file.punch(0, 1)), Some(libc::ENOSPC));
    file.punch(0, 1).expect("third");
}

#[test]
fn full_is_switched_on_and_off_at_run_time() {
    let (file, plan) = faulty("full");
    assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::ENOSPC));
    file.punch(0, 1).expect("punching needs no space");
    plan.set_full(false);
    file.write_at(b"x", 0).expect("space again");
}

#[test]
fn faults_with_a_trigger_are_active_only_while_its_file_exists() {
    let dir = tempfile::tempdir().expect("temp folder");
    let trigger = dir.path().join("trigger");
    let (file, _) = faulty(&format!("fail=write:2:EIO,trigger={}", trigger.display()));
    for _ in 0..5 {
        file.write_at(b"x", 0).expect("inactive, and not counted");
    }
    std::fs::write(&trigger, b"").expect("create");
    file.write_at(b"x", 0).expect("first");
    assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::EIO));
    std::fs::remove_file(&trigger).expect("remove");
    file.write_at(b"x", 0).expect("inactive again");
}

#[test]
fn delays_overlap_and_the_most_in_flight_is_counted() {
    let (file, plan) = faulty("delay=read:100");
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| file.read_at(&mut [0], 0));
        }
    });
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert!(plan.counters(Op::Read).peak >= 2, "{:?}", plan.counters(Op::Read));
    assert_eq!(plan.counters(Op::Read).running, 0);
}

#[test]
fn a_delayed_read_that_must_not_wait_says_eagain() {
    let (file, plan) = faulty("delay=read:100");
    assert_eq!(file.traits(), HostTraits { nowait_reads: true, never_blocks: false, device: 0 });
    assert_eq!(errno(file.read_at_nowait(&mut [0], 0)), Some(libc::EAGAIN));
    plan.set_delay(Op::Read, 0);
    assert_eq!(file.read_at_nowait(&mut [0], 0).expect("no delay"), 0);
}

#[test]
fn skipped_syncs_report_success_and_reach_nobody() {
    let below = Arc::new("fail=sync:1:EIO:forever".parse::<FaultPlan>().expect("spec"));
    let broken = Arc::new(FaultFile::new(Arc::new(MemoryFile::new()), Arc::clone(&below)));
    let plan = Arc::new("skip-sync".parse::<FaultPlan>().expect("spec"));
    let file = FaultFile::new(broken, plan);
    file.sync_data().expect("success is claimed");
    file.sync_all().expect("success is claimed");
    assert_eq!(below.counters(Op::Sync).started, 0);
}

#[test]
fn a_spec_that_means_nothing_is_refused_and_named() {
    for bad in ["fail=write:0:EIO", "fail=wrote:1:EIO", "fail=write:1:EWHAT", "delay=read:soon", "slow"]
        .into_iter()
        .chain(["short=sync:1", "fail=write:1:EIO:always", "trigger=", "full=1", "skip-sync=yes"])
    {
        let error = bad.parse::<FaultPlan>().expect_err(bad);
        assert!(error.contains(bad), "{error}");
    }
}
