//! SIGKILL of the daemon under load, and SIGTERM: what was synced is there afterwards.

mod common;

use std::os::unix::fs::FileExt;

use common::churn::{Churn, contradictions};
use common::{Loop, Mount, Run, Shape, Workload, heavy, long, marked_in_use, ok, read_at, text, until};

#[test]
fn nothing_synced_is_lost_when_the_daemon_is_killed_under_load() {
    require!("fuse");
    let _turn = heavy();
    let rounds = if long() { 20 } else { 5 };
    let mut mount = Mount::new(&["--create", "vm1=1G"]);
    for round in 0..rounds {
        let shape = Shape { cluster: 1 << 20, clusters: 32, threads: 4, seed: 100 + round };
        let mut load = Workload::start(&mount.flat("vm1"), shape);
        load.wait_for_syncs(20);
        let durable = load.durable();
        mount.kill();
        assert!(!load.stop().is_empty(), "the load noticed nothing of the kill");
        assert!(!mount.is_mounted());

        Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
        mount.start();
        let verdict = load.verify(&mount.open("vm1"), &durable);
        assert!(verdict.problems.is_empty(), "round {round}:\n{}", verdict.problems.join("\n"));
        assert!(verdict.durable > 0, "nothing was durable, so the kill showed nothing");
    }
    println!("CRASH STATES {rounds}");
}

#[test]
fn nothing_synced_and_no_snapshot_is_lost_when_the_daemon_is_killed_amid_live_operations() {
    require!("fuse");
    let _turn = heavy();
    let rounds = if long() { 20 } else { 5 };
    for round in 0..rounds {
        let mut mount = Mount::new(&["--create", "vm1=256M"]);
        let shape = Shape { cluster: 1 << 20, clusters: 32, threads: 2, seed: 200 + round };
        let mut load = Workload::start(&mount.flat("vm1"), shape);
        let mut churn = Churn::start(&mount, &["vm1"]);
        // Far enough for merges; then any moment.
        let merged = || churn.kept().len() >= 4;
        assert!(until(std::time::Duration::from_secs(60), merged), "the live operations stand still");
        load.wait_for_syncs(5 + 7 * round);
        let (durable, mut kept) = (load.durable(), churn.kept());
        mount.kill();
        assert!(!load.stop().is_empty(), "the load noticed nothing of the kill");
        churn.stop().expect_err("the live operations noticed nothing of the kill");
        let still = churn.kept();
        kept.retain(|snapshot, _| still.contains_key(snapshot));
        mount.start();
        let mut problems = load.verify(&mount.open("vm1"), &durable).problems;
        problems.extend(contradictions(mount.point(), &kept));
        assert!(problems.is_empty(), "round {round}:\n{}", problems.join("\n"));
        mount.umount();
        Run::ploopfs().arg("check").arg(mount.images().join("vm1")).status(0);
        println!("round {round}: {} snapshots kept", kept.len());
    }
    println!("CRASH STATES {rounds}");
}

#[test]
fn a_mount_under_a_loop_device_can_be_served_again_after_a_kill() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=256M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    ok("blockdev", &["--flushbufs", text(device.device())]);
    mount.kill();
    drop(device);
    mount.start();
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("e2fsck", &["-f", "-n", text(device.device())]);
    device.detach();
    mount.umount();
}

#[test]
fn sigterm_with_nothing_open_ends_the_daemon_and_leaves_a_clean_image() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=256M"]);
    mount.open("vm1").write_all_at(&vec![4; 3 << 20], 1 << 20).expect("a write");
    let pid = i32::try_from(mount.pid()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own daemon");
    let gone = || !mount.is_mounted() && rustix::process::test_kill_process(pid).is_err();
    assert!(until(std::time::Duration::from_secs(20), gone), "SIGTERM did not end the daemon");
    assert!(!marked_in_use(&mount.delta("vm1")));
    ok("qemu-img", &["check", "-f", "parallels", text(&mount.delta("vm1"))]);
}

#[test]
fn sigterm_under_load_syncs_and_a_second_one_ends_the_daemon_with_nothing_acknowledged_lost() {
    require!("fuse");
    let _turn = heavy();
    let mut mount = Mount::new(&["--create", "vm1=1G"]);
    let shape = Shape { cluster: 1 << 20, clusters: 32, threads: 3, seed: 77 };
    let mut load = Workload::start(&mount.flat("vm1"), shape);
    load.wait_for_syncs(10);
    let pid = i32::try_from(mount.pid()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own daemon");
    // A file is open: the daemon goes on.
    load.wait_for_syncs(5);
    let durable = load.durable();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own daemon");
    let gone = || rustix::process::test_kill_process(pid).is_err();
    assert!(until(std::time::Duration::from_secs(30), gone), "the second SIGTERM did not end the daemon");
    assert!(!load.stop().is_empty(), "the load noticed nothing");
    assert!(!marked_in_use(&mount.delta("vm1")), "the second SIGTERM syncs and clears the marks");
    let _ = Run::ploopfs().arg("umount").arg(mount.point()).run();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
    mount.start();
    let verdict = load.verify(&mount.open("vm1"), &durable);
    assert!(verdict.problems.is_empty(), "{}", verdict.problems.join("\n"));
}

#[test]
fn umount_without_a_sync_before_it_loses_nothing() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=256M"]);
    mount.open("vm1").write_all_at(&vec![6; 5 << 20], 12345).expect("a write");
    mount.umount();
    mount.start();
    assert_eq!(read_at(&mount.open("vm1"), 12345, 5 << 20).expect("a read"), vec![6; 5 << 20]);
}
