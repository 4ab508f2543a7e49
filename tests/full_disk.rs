//! The host is really full (docs/design.md#a-full-host): a small ext4 in a loop-mounted file.
//!
//! Where something else must work while a write is parked, the write goes through loop with direct I/O: a synchronous
//! write to the flat file holds the kernel's inode lock until it is answered, and fsync and fallocate wait for that
//! lock before they ever reach us.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{HostFs, Loop, Mount, Run, heavy, read_at, until};

const MIB: u64 = 1 << 20;

/// A mount on a small host file system with a filler file; the image could grow far past it. The mount is dropped
/// before its host.
struct Small {
    mount: Mount,
    filler: PathBuf,
    _host: HostFs,
}

fn small_host(options: &[&str]) -> Small {
    let host = HostFs::new("ext4", 256 * MIB);
    let filler = host.path().join("filler");
    let file = File::create(&filler).expect("the filler");
    file.write_all_at(&vec![1; 64 << 20], 0).expect("the filler");
    file.sync_all().expect("fsync");
    // A parked write cannot be killed: a test that fails gives it its space after this time, and so ends.
    let late = filler.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(100));
        let _ = std::fs::remove_file(late);
    });
    let args: Vec<&str> = ["--create", "vm1=1G"].iter().chain(options).copied().collect();
    let mount = Mount::over(&host.path().join("images"), &args);
    Small { mount, filler, _host: host }
}

/// Writes cluster after cluster until one fails; how many went, and the errno.
fn write_until_refused(file: &File) -> (u64, Option<i32>) {
    for cluster in 0..512 {
        if let Err(error) = file.write_all_at(&vec![cluster as u8 + 1; MIB as usize], cluster * MIB) {
            return (cluster, error.raw_os_error());
        }
    }
    (512, None)
}

/// Writes 200 clusters, numbered from 1, to a loop device past every cache; the writes of loop hold no lock of the
/// flat file.
fn write_through_loop(device: &Loop) -> common::Finished {
    let folder = common::memory_dir();
    let pattern = folder.path().join("pattern");
    let content: Vec<u8> = (1..=200).flat_map(|value: u8| vec![value; MIB as usize]).collect();
    std::fs::write(&pattern, content).expect("the pattern");
    let (from, to) = (format!("if={}", pattern.display()), format!("of={}", device.device().display()));
    Run::new("dd")
        .args([&from, &to])
        .args(["bs=1M", "oflag=direct", "conv=notrunc", "status=none"])
        .limit(200)
        .run()
}

fn first_bytes_are_right(file: &File, clusters: u64) {
    for cluster in 0..clusters {
        let data = read_at(file, cluster * MIB, MIB as usize).expect("a read");
        let wrong = |byte: &u8| *byte != cluster as u8 + 1;
        let first = data.iter().position(wrong);
        let last = data.iter().rposition(wrong);
        assert!(
            first.is_none(),
            "cluster {cluster} is not what was written: {first:?} to {last:?}, {:?}",
            first.map(|at| data[at])
        );
    }
}

#[test]
fn in_error_mode_a_write_that_finds_no_space_fails_at_once_with_enospc() {
    require!("fuse", "loop");
    let _turn = heavy();
    let small = small_host(&["--on-full", "error"]);
    let file = small.mount.open("vm1");
    let began = Instant::now();
    let (written, errno) = write_until_refused(&file);
    assert_eq!(errno, Some(libc::ENOSPC));
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    assert!(written > 50, "{written} MiB fitted");
    first_bytes_are_right(&file, written);
    file.sync_all().expect("fsync works on a full host");
    std::fs::remove_file(&small.filler).expect("the filler");
    let more = || file.write_all_at(&[9; 4096], 900 * MIB).is_ok();
    assert!(until(Duration::from_secs(10), more), "a write works again once there is space");
}

#[test]
fn in_queue_mode_a_write_waits_and_goes_on_when_space_returns() {
    require!("fuse", "loop");
    let _turn = heavy();
    let small = small_host(&["--full-timeout", "0"]);
    let file = small.mount.open("vm1");
    let waiting = || small.mount.mode("vm1").to_lowercase().contains("full");
    let device = Loop::attach(&small.mount.flat("vm1"), true);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_through_loop(&device));
        assert!(
            until(Duration::from_secs(60), waiting),
            "200 MiB fitted into less: mode {}",
            small.mount.mode("vm1")
        );
        assert!(!writer.is_finished(), "the write waits");
        // Meanwhile reads and fsync work, and do not wait for the parked write.
        let began = Instant::now();
        let other = small.mount.open("vm1");
        first_bytes_are_right(&other, 20);
        other.sync_all().expect("fsync while a write is parked");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(!writer.is_finished(), "the write still waits");
        std::fs::remove_file(&small.filler).expect("the filler");
        writer.join().expect("the writer")
    });
    assert!(written.success(), "the write did not go on when space returned: {written}");
    device.detach();
    file.sync_all().expect("fsync");
    first_bytes_are_right(&file, 200);
    assert!(until(Duration::from_secs(10), || !waiting()), "mode {}", small.mount.mode("vm1"));
}

#[test]
fn in_queue_mode_the_space_that_a_discard_frees_wakes_the_queue() {
    require!("fuse", "loop");
    let _turn = heavy();
    let small = small_host(&["--full-timeout", "0"]);
    let device = Loop::attach(&small.mount.flat("vm1"), true);
    let waiting = || small.mount.mode("vm1").to_lowercase().contains("full");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_through_loop(&device));
        assert!(until(Duration::from_secs(60), waiting), "never full");
        common::punch(&small.mount.open("vm1"), 0, 60 * MIB).expect("a discard on a full host");
        let done = until(Duration::from_secs(60), || writer.is_finished());
        if !done {
            std::fs::remove_file(&small.filler).expect("the filler");
        }
        let written = writer.join().expect("the writer");
        assert!(written.success(), "{written}");
        assert!(done, "the discard did not wake the queue");
    });
    device.detach();
}

#[test]
fn the_full_timeout_ends_the_wait_with_enospc() {
    require!("fuse", "loop");
    let _turn = heavy();
    let small = small_host(&["--full-timeout", "3"]);
    let file = small.mount.open("vm1");
    let began = Instant::now();
    let (written, errno) = write_until_refused(&file);
    assert_eq!(errno, Some(libc::ENOSPC));
    assert!(began.elapsed() >= Duration::from_millis(2500), "it did not wait: {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    first_bytes_are_right(&file, written);
    file.sync_all().expect("fsync on a full host");
}

#[test]
fn an_image_that_filled_its_host_is_undamaged_after_umount() {
    require!("fuse", "loop", "qemu");
    let _turn = heavy();
    let mut small = small_host(&["--on-full", "error"]);
    let (written, errno) = write_until_refused(&small.mount.open("vm1"));
    assert_eq!(errno, Some(libc::ENOSPC));
    small.mount.umount();
    Run::ploopfs().arg("check").arg(small.mount.delta("vm1")).status(0);
    Run::new("qemu-img").args(["check", "-f", "parallels"]).arg(small.mount.delta("vm1")).ok();
    small.mount.start();
    first_bytes_are_right(&small.mount.open("vm1"), written);
}

#[test]
fn umount_does_not_wait_for_a_write_that_waits_for_space() {
    require!("fuse", "loop");
    let _turn = heavy();
    let small = small_host(&["--full-timeout", "0"]);
    let file = small.mount.open("vm1");
    let pid =
        i32::try_from(small.mount.pid()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_refused(&file));
        let waiting = || small.mount.mode("vm1").to_lowercase().contains("full");
        assert!(until(Duration::from_secs(60), waiting), "never full");
        // Twice: the first goes on because a file is open, the second ends (docs/design.md#ends).
        for _ in 0..2 {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own daemon");
            std::thread::sleep(Duration::from_millis(300));
        }
        let ended = until(Duration::from_secs(30), || writer.is_finished());
        if !ended {
            std::fs::remove_file(&small.filler).expect("the filler");
        }
        let (_, errno) = writer.join().expect("the writer");
        assert!(ended, "shutdown fails what is parked");
        assert!(errno.is_some());
    });
}

/// Writes until nothing more fits, in ever smaller pieces.
fn fill_up(host: &HostFs) {
    for size in [1 << 20, 64 << 10, 4096, 512] {
        let path = host.path().join(format!("fill.{size}"));
        let mut file = File::create(&path).ok();
        let piece = vec![0xAB; size];
        while file.as_mut().is_some_and(|file| std::io::Write::write_all(file, &piece).is_ok()) {}
        // Delayed allocation: what was promised and is not needed comes back.
        let _ = Run::new("sync").arg("-f").arg(host.path()).run();
    }
}

fn a_full_host_is_mounted(kind: &str) {
    for before in [false, true] {
        let host = HostFs::new(kind, 320 * MIB);
        let images = host.path().join("images");
        std::fs::create_dir(&images).expect("a folder");
        Run::ploopfs().args(["create", "--size", "16M"]).arg(images.join("vm1")).ok();
        if before {
            Mount::over(&images, &[]).umount();
        }
        fill_up(&host);
        for args in [&["-r"][..], &[]] {
            let mut mount = Mount::prepare(&images, args);
            let done = mount.try_start();
            assert!(done.success(), "{kind}, mounted before: {before}, {args:?}: {done}");
            let mut first = [1; 4096];
            File::open(mount.flat("vm1")).and_then(|file| file.read_exact_at(&mut first, 0)).expect("read");
            assert_eq!(first, [0; 4096]);
            let listed = Run::ploopfs().arg("list").arg(&images).ok();
            assert!(listed.contains("closed"), "no answer of its daemon: {listed}");
            mount.umount();
        }
    }
}

#[test]
fn a_full_ext4_is_mounted_with_its_socket_elsewhere() {
    require!("fuse", "loop", "ext4");
    a_full_host_is_mounted("ext4");
}

#[test]
fn a_full_xfs_is_mounted_with_its_socket_elsewhere() {
    require!("fuse", "loop", "xfs");
    a_full_host_is_mounted("xfs");
}

#[test]
fn a_full_btrfs_is_mounted_with_its_socket_elsewhere() {
    require!("fuse", "loop", "btrfs");
    a_full_host_is_mounted("btrfs");
}

/// The header had the new size, and the command said that nothing could be written, with status 1.
#[test]
fn a_resize_that_has_happened_is_no_failure_because_the_host_is_full() {
    require!("loop", "ext4");
    let host = HostFs::new("ext4", 32 << 20);
    let run = |args: &[&str]| Run::ploopfs().args(args).in_folder(host.path()).limit(60).run();
    assert!(run(&["create", "vm", "--size", "8M"]).success());
    assert!(run(&["snapshot", "create", "vm", "a"]).success());
    let filler = File::create(host.path().join("filler")).expect("the filler");
    let mut at = 0;
    for piece in [1 << 20, 4096, 512] {
        while filler.write_all_at(&vec![7; piece], at).is_ok() {
            at += piece as u64;
        }
    }
    drop(filler);
    let said = run(&["resize", "vm", "16M"]);
    assert!(said.success(), "{said}");
    let size = |said: String| assert!(said.contains("16777216"), "{said}");
    size(run(&["info", "vm"]).stdout);
    fs::remove_file(host.path().join("filler")).expect("space");
    assert!(run(&["snapshot", "create", "vm", "b"]).success());
    assert!(
        fs::read_to_string(host.path().join("vm/DiskDescriptor.xml"))
            .expect("read")
            .contains("<Disk_size>32768<")
    );
}
