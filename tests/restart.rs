//! A daemon is killed under live disks: its successor goes on with its work, and I/O only pauses.

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ploopfs::io::lock::{DeltaLock, Use};
use ploopfs::io::real::{Access, RealFile};

use common::daemons::{self, daemons, processes};
use common::{Guest, Loop, Mount, Run, heavy, long, marked_in_use, ok, signal, text, until};

/// No entry reaches the disk by itself.
const LATE: &str = "--bat-delay=600000";
/// A loaded machine may take long for a start. Rings have no restart.
const RESTARTS: [&str; 2] = ["--restart-timeout=60", "--transport=fuse"];
/// For all that is awaited.
const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
fn mount(args: &[&str]) -> Mount {
    Mount::new(&[args, &RESTARTS].concat())
}

/// Kills the daemon, and returns when another one serves: how long a look at the mount took.
#[track_caller]
fn kill(mount: &Mount) -> Duration {
    daemons::kill(mount, PATIENCE)
}

fn pattern(cluster: u64) -> Vec<u8> {
    (0..4096u32).map(|byte| (u64::from(byte) + 31 * cluster + 1) as u8).collect()
}

#[test]
fn acknowledged_first_writes_that_nothing_synced_are_there_after_the_daemon_was_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=2G", LATE]);
    let disk = mount.open("vm1");
    // Over two BAT pages, and page 0 with the header.
    for cluster in (0..100).chain(1020..1100) {
        disk.write_all_at(&pattern(cluster), (cluster << 20) + 8192).expect("written");
    }
    for round in 0..2 {
        kill(&mount);
        for cluster in (0..100).chain(1020..1100) {
            let mut found = vec![0; 4096];
            disk.read_exact_at(&mut found, (cluster << 20) + 8192).expect("read");
            assert!(found == pattern(cluster), "cluster {cluster} in round {round}");
        }
    }
    disk.sync_all().expect("synced");
    drop(disk);
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

/// The descriptors were sent one order each, of which so many fit into the line: the rest was dropped, the mount with them.
#[test]
fn a_mount_of_more_transport_threads_than_orders_fit_into_the_line_starts_and_restarts() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", "--threads=150", LATE]);
    let disk = mount.open("vm1");
    for round in 0..3 {
        disk.write_all_at(&pattern(round), round << 20).expect("written");
        let daemon = daemons(&mount)[0];
        let links = std::fs::read_dir(format!("/proc/{daemon}/fd")).expect("our own").flatten();
        let connection = links.filter_map(|link| std::fs::read_link(link.path()).ok());
        let count = connection.filter(|target| target.as_os_str() == "/dev/fuse").count();
        assert!(count >= 150, "{count} descriptors in round {round}");
        kill(&mount);
    }
    for cluster in 0..3 {
        let mut found = vec![0; 4096];
        disk.read_exact_at(&mut found, cluster << 20).expect("read");
        assert!(found == pattern(cluster), "cluster {cluster}");
    }
    drop(disk);
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn what_was_discarded_and_not_synced_stays_discarded_after_the_daemon_was_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let disk = mount.open("vm1");
    for cluster in 0..8 {
        disk.write_all_at(&vec![7; 1 << 20], cluster << 20).expect("written");
    }
    disk.sync_all().expect("synced");
    rustix::fs::fallocate(
        &disk,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        2 << 20,
        4 << 20,
    )
    .expect("punched");
    kill(&mount);
    disk.write_all_at(&pattern(20), 20 << 20).expect("what was given back is handed out");
    for cluster in 0..8u64 {
        let mut found = vec![1; 1 << 20];
        disk.read_exact_at(&mut found, cluster << 20).expect("read");
        let wanted = if (2..6).contains(&cluster) { 0 } else { 7 };
        assert!(found.iter().all(|byte| *byte == wanted), "cluster {cluster}");
    }
    drop(disk);
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

#[test]
fn a_disk_over_a_snapshot_only_pauses_when_the_daemon_is_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let disk = mount.open("vm1");
    for cluster in 0..8 {
        disk.write_all_at(&vec![7; 1 << 20], cluster << 20).expect("written");
    }
    drop(disk);
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg("before").ok();
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
    let disk = mount.open("vm1");
    for cluster in [1, 3, 20] {
        disk.write_all_at(&pattern(cluster), (cluster << 20) + 8192).expect("copied on write");
    }
    for _ in 0..3 {
        kill(&mount);
        for cluster in 0..8u64 {
            let mut found = vec![0; 1 << 20];
            disk.read_exact_at(&mut found, cluster << 20).expect("read");
            let mut wanted = vec![7; 1 << 20];
            if [1, 3].contains(&cluster) {
                wanted[8192..8192 + 4096].copy_from_slice(&pattern(cluster));
            }
            assert!(found == wanted, "cluster {cluster}");
        }
    }
    drop(disk);
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.images().join("vm1")).status(0);
}

#[test]
fn a_snapshot_that_is_read_is_the_same_one_after_the_daemon_was_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    for (value, label) in [(1, "a"), (2, "b")] {
        let disk = mount.open("vm1");
        disk.write_all_at(&[value; 4096], 1 << 20).expect("written");
        drop(disk);
        assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
        Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg(label).ok();
    }
    let path = |label: &str| mount.point().join(format!(".snapshots/vm1/{label}.img"));
    // The second has the first number.
    let open = ["b", "a"].map(|label| (label, std::fs::File::open(path(label)).expect("opens")));
    let numbers = |labels: [&str; 2]| labels.map(|label| path(label).metadata().expect("there").ino());
    let before = numbers(["a", "b"]);
    for _ in 0..3 {
        kill(&mount);
        assert_eq!(numbers(["a", "b"]), before);
        for (label, file) in &open {
            let wanted = if *label == "a" { 1 } else { 2 };
            for file in [file, &std::fs::File::open(path(label)).expect("opens")] {
                let mut found = [0; 4096];
                file.read_exact_at(&mut found, 1 << 20).expect("read");
                assert!(found == [wanted; 4096], "{label} holds {}", found[0]);
            }
        }
    }
    drop(open);
    Run::ploopfs().args(["snapshot", "delete"]).arg(mount.flat("vm1")).arg("a").ok();
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.images().join("vm1")).status(0);
}

#[test]
fn a_file_of_figures_that_was_open_when_the_daemon_was_killed_is_read_whole_or_not_at_all() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let open = || std::fs::File::open(mount.point().join(".ploopfs/stats.json")).expect("opens");
    let (begun, fresh) = (open(), open());
    begun.read_exact_at(&mut [0; 10], 0).expect("read");
    kill(&mount);
    let error = begun.read_at(&mut [0; 10], 10).expect_err("a part of another text");
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    let mut text = vec![0; 1 << 20];
    let len = fresh.read_at(&mut text, 0).expect("read");
    let now: serde_json::Value = serde_json::from_slice(&text[..len]).expect("one text");
    assert_eq!(now["pid"].as_u64(), Some(u64::from(mount.pid())));
    drop((begun, fresh));
    mount.umount();
}

/// Its opening took as long as its host, and all others waited; what came for it meanwhile got EBADF.
#[cfg(feature = "faults")]
#[test]
fn an_image_that_opens_slowly_after_a_death_keeps_its_requests_waiting_and_no_others() {
    require!("fuse");
    let folder = common::temp_dir();
    let slow = folder.path().join("slow");
    let fault = format!("--fault=trigger={},delay=read:5000", slow.display());
    let mut mount = mount(&["--create", "vm1=64M", LATE, &fault]);
    let (disk, other) = (mount.open("vm1"), mount.open("vm1"));
    disk.write_all_at(&pattern(1), 1 << 20).expect("written");
    std::fs::write(&slow, "").expect("written");
    kill(&mount);
    // It is answered, and the image is not open: that takes several reads.
    assert_eq!(mount.mode("vm1"), "closed");
    // The kernel does not wait for the answer.
    drop(other);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_all_at(&pattern(2), 2 << 20));
        let large = scope.spawn(|| disk.write_all_at(&[3; 256 << 10], 3 << 20));
        let syncer = scope.spawn(|| disk.sync_all());
        std::fs::remove_file(&slow).expect("removed");
        let mut found = vec![0; 4096];
        disk.read_exact_at(&mut found, 1 << 20).expect("it waited");
        assert!(found == pattern(1));
        for waits in [writer, large, syncer] {
            waits.join().expect("no panic").expect("it waited");
        }
    });
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, 2 << 20).expect("read");
    assert!(found == pattern(2));
    drop(disk);
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"), "a handle is left over");
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

#[test]
fn open_files_and_inode_numbers_are_the_same_after_the_daemon_was_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "b=16M"]);
    // Later ones sort before it: numbers in the order of a scan would be others.
    for name in ["a", "c"] {
        Run::ploopfs().arg("create").arg(mount.delta(name)).args(["--size", "16M"]).ok();
    }
    assert!(until(PATIENCE, || mount.flat("a").exists() && mount.flat("c").exists()));
    let open: Vec<_> = ["a", "b", "c"].map(|name| (name, mount.open(name))).into();
    let closed = mount.open("a");
    drop(closed);
    let numbers = || ["a", "b", "c"].map(|name| mount.flat(name).metadata().expect("there").ino());
    let before = numbers();
    for (at, (_, disk)) in open.iter().enumerate() {
        disk.write_all_at(&pattern(at as u64), 0).expect("written");
    }
    for _ in 0..3 {
        kill(&mount);
        assert_eq!(numbers(), before);
        for (at, (name, disk)) in open.iter().enumerate() {
            let mut found = vec![0; 4096];
            disk.read_exact_at(&mut found, 0).expect("read");
            assert!(found == pattern(at as u64), "{name}");
            assert_eq!(disk.metadata().expect("its own").ino(), before[at], "{name}");
            disk.write_all_at(&pattern(at as u64), 0).expect("written");
            disk.sync_all().expect("synced");
        }
        assert_eq!(mount.mode("a"), "write");
    }
    drop(open);
    assert!(until(PATIENCE, || mount.mode("a") == "closed"), "no handle is left over");
    mount.umount();
    assert!(!marked_in_use(&mount.delta("a")));
}

/// As on a machine with few CPUs.
#[test]
fn a_file_system_on_a_loop_device_only_pauses_when_the_daemon_is_killed() {
    under_load("--threads=2");
}

/// As on one with many: more requests are read and not answered, and more threads begin at once.
#[test]
fn a_file_system_on_a_loop_device_only_pauses_when_a_daemon_of_many_threads_is_killed() {
    under_load("--threads=32");
}

fn under_load(threads: &str) {
    require!("fuse", "loop", "fio", "ext4");
    let _turn = heavy();
    let kills = if long() { 20 } else { 3 };
    let mut mount = mount(&["--create", "vm1=1G", threads]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    let guest = Guest::mount(device.device(), "");
    let runtime = format!("--runtime={}", 2 * kills + 4);
    let job = ["--name=v", "--rw=randrw", "--bs=4k", "--size=256M", "--ioengine=libaio", "--direct=1"];
    let verify =
        ["--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=2048", "--fsync=64"];
    let mut pauses = Vec::new();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            Run::new("fio")
                .arg(format!("--directory={}", guest.path().display()))
                .args(job)
                .args(verify)
                .args(["--time_based=1", &runtime])
                .in_folder(&std::env::temp_dir())
                .limit(300)
                .ok();
        });
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(1500));
            pauses.push(kill(&mount));
        }
        load.join().expect("no request failed");
    });
    println!("PAUSES {pauses:?}");
    guest.umount();
    ok("e2fsck", &["-f", "-n", text(device.device())]);
    device.detach();
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_other_program_gets_an_image_while_its_daemon_is_missed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let disk = mount.open("vm1");
    disk.write_all_at(&pattern(1), 0).expect("written");
    let (ends, tries) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        // Also where a kill finds no successor: the thread would go on for ever.
        let over = Over(&ends);
        let thief = scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                let file = RealFile::open(mount.delta("vm1"), Access::ReadWrite).expect("opens");
                DeltaLock::acquire(Arc::new(file), Use::Writer).map(drop).expect_err("it is in use");
                tries.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..4 {
            kill(&mount);
        }
        drop(over);
        thief.join().expect("it was never free");
    });
    println!("TRIES {tries:?}");
    drop(disk);
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
    let file = RealFile::open(mount.delta("vm1"), Access::ReadWrite).expect("opens");
    let free = || DeltaLock::acquire(Arc::new(file), Use::Writer).map(drop);
    free().expect("a closed image is free");
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
}

/// Kills every daemon that the keeper starts, until `over` says so.
fn kill_all(mount: &Mount, mut over: impl FnMut(usize) -> bool) -> usize {
    let mut killed = Vec::new();
    while !over(killed.len()) {
        for pid in daemons(mount) {
            if !killed.contains(&pid) {
                signal(pid, rustix::process::Signal::KILL);
                killed.push(pid);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.len()
}

#[test]
fn a_successor_that_dies_before_it_serves_has_one_as_well() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=256M", LATE]);
    let disk = mount.open("vm1");
    for cluster in 0..20 {
        disk.write_all_at(&pattern(cluster), cluster << 20).expect("written");
    }
    // Each at another step of its takeover. No more of them than there are witnesses but one: all might have asked.
    kill_all(&mount, |killed| killed == 3);
    for cluster in 0..20 {
        let mut found = vec![0; 4096];
        disk.read_exact_at(&mut found, cluster << 20).expect("read");
        assert!(found == pattern(cluster), "cluster {cluster}");
    }
    disk.sync_all().expect("no sync has failed");
    disk.write_all_at(&pattern(30), 30 << 20).expect("written");
    drop(disk);
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

#[test]
fn a_mount_whose_daemons_all_die_at_their_start_ends_when_its_time_is_over() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M", "--restart-timeout=3", "--transport=fuse"]);
    let disk = mount.open("vm1");
    disk.write_all_at(&pattern(1), 0).expect("written");
    let began = Instant::now();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            // The first ones find a daemon.
            let error = loop {
                if let Err(error) = disk.read_exact_at(&mut [0; 4096], 0) {
                    break error;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
        });
        let killed = kill_all(&mount, |_| reader.is_finished() || began.elapsed() > PATIENCE);
        let by_itself = reader.is_finished();
        if !by_itself {
            // The reader would wait for ever, and the test with it.
            for pid in processes(&mount, "keeper").into_iter().chain(daemons(&mount)) {
                signal(pid, rustix::process::Signal::KILL);
            }
        }
        assert!(by_itself, "the mount goes on");
        assert!((2..=8).contains(&killed), "{killed} starts, with pauses between them");
        reader.join().expect("an error of the connection");
    });
    // The longest pause that was not begun is 2 s.
    assert!(began.elapsed() >= Duration::from_secs(1), "its time was not over");
    assert!(until(PATIENCE, || !mount.is_mounted()), "what is dead is taken away");
    mount.start();
    // Not synced, and its entries are gone with the ledger: as after any death without a successor.
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

/// A mount whose daemon was killed and whose successor stands still, at whatever step: what is open is written, and in no
/// file. The successor's process id comes with it.
fn missed(mount: &Mount) -> (std::fs::File, u32) {
    let disk = mount.open("vm1");
    for cluster in 0..10 {
        disk.write_all_at(&pattern(cluster), cluster << 20).expect("written");
    }
    let before = daemons(mount);
    before.iter().for_each(|pid| signal(*pid, rustix::process::Signal::KILL));
    let successor = || daemons(mount).into_iter().find(|pid| !before.contains(pid));
    assert!(until(PATIENCE, || successor().is_some()), "no successor");
    let successor = successor().expect("it was there");
    signal(successor, rustix::process::Signal::STOP);
    (disk, successor)
}

#[track_caller]
fn ends_cleanly(mut mount: Mount) {
    let ended = || !mount.is_mounted() && processes(&mount, "keeper").is_empty();
    assert!(until(PATIENCE, ended), "it goes on");
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
    mount.start();
    for cluster in 0..10 {
        let mut found = vec![0; 4096];
        mount.open("vm1").read_exact_at(&mut found, cluster << 20).expect("read");
        assert!(found == pattern(cluster), "cluster {cluster}");
    }
    mount.umount();
}

#[test]
fn an_end_that_is_asked_for_while_the_daemon_is_missed_is_heard_by_its_successor() {
    require!("fuse");
    let mount = mount(&["--create", "vm1=64M", LATE]);
    let (disk, successor) = missed(&mount);
    signal(processes(&mount, "keeper")[0], rustix::process::Signal::TERM);
    signal(successor, rustix::process::Signal::CONT);
    drop(disk);
    ends_cleanly(mount);
}

#[test]
fn an_umount_while_the_daemon_is_missed_ends_as_any_other_once_its_successor_is_there() {
    require!("fuse");
    let mount = mount(&["--create", "vm1=64M", LATE]);
    let (disk, successor) = missed(&mount);
    rustix::mount::unmount(mount.point(), rustix::mount::UnmountFlags::DETACH).expect("unmounted");
    signal(successor, rustix::process::Signal::CONT);
    drop(disk);
    ends_cleanly(mount);
}

#[test]
fn a_mount_that_cannot_be_taken_over_ends_with_its_daemon() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let disk = mount.open("vm1");
    disk.write_all_at(&pattern(1), 0).expect("written");
    // Of what it changed the ledger has nothing, as long as the image is open.
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).ok();
    disk.sync_all().expect("synced");
    mount.kill();
    assert!(!mount.is_mounted());
    disk.sync_all().expect_err("the connection is gone");
    mount.set_args(&RESTARTS);
    mount.start();
    let mut found = vec![0; 4096];
    mount.open("vm1").read_exact_at(&mut found, 0).expect("read");
    assert!(found == pattern(1));
}
