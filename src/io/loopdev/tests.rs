//! Loop devices over files of the host.

use super::*;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

const WAIT: Duration = Duration::from_secs(10);

/// A 16 MiB file with a loop device, both gone at the end.
struct Attached {
    dir: tempfile::TempDir,
    path: PathBuf,
    device: LoopDevice,
}

impl Attached {
    fn new(read_only: bool) -> Attached {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("disk.img");
        File::create(&path).and_then(|f| f.set_len(16 << 20)).expect("create");
        let device = attach(&path, read_only).expect("attach");
        Attached { dir, path, device }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if describe(self.device.number).is_some_and(|d| d.backing == self.path) {
            let _ = detach(&self.device.dev, WAIT);
        }
    }
}

/// A mount point whose mount is gone at the end.
struct Mounted(PathBuf);

impl Mounted {
    fn of(device: &LoopDevice, point: &Path) -> Mounted {
        run("mount", &[&device.dev, point]);
        Mounted(point.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn run(program: &str, args: &[&Path]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program}: {output:?}");
}

#[test]
fn an_attached_file_is_written_through_its_device_with_direct_io() {
    let a = Attached::new(false);
    assert!(a.device.direct_io && !a.device.read_only && !a.device.deleted, "{:?}", a.device);
    assert_eq!((&a.device.backing, a.device.offset), (&a.path, 0));
    let dev = OpenOptions::new().write(true).open(&a.device.dev).expect("open device");
    dev.write_all_at(&[7; 4096], 8192).expect("write");
    dev.sync_all().expect("sync");
    let mut buf = [0; 4096];
    File::open(&a.path).expect("open").read_exact_at(&mut buf, 8192).expect("read");
    assert_eq!(buf, [7; 4096]);
}

#[test]
fn the_list_names_the_file_and_the_ioctl_its_inode() {
    let a = Attached::new(true);
    let listed = list().expect("list");
    let found = listed.iter().find(|d| d.dev == a.device.dev).expect("listed");
    assert_eq!((found, found.read_only), (&a.device, true));
    let meta = fs::metadata(&a.path).expect("stat");
    assert_eq!(found.backing_identity().expect("status"), (meta.dev(), meta.ino()));
    let dev = OpenOptions::new().write(true).open(&a.device.dev);
    dev.and_then(|dev| dev.write_all_at(&[1; 512], 0)).expect_err("read-only");
}

#[test]
fn a_detached_device_is_gone_when_detach_returns() {
    let a = Attached::new(false);
    detach(&a.device.dev, WAIT).expect("detach");
    assert_ne!(describe(a.device.number).map(|d| d.backing), Some(a.path.clone()));
}

#[test]
fn a_mounted_device_is_not_detached_and_the_mount_point_is_named() {
    let a = Attached::new(false);
    run("mkfs.ext4", &[Path::new("-q"), &a.device.dev]);
    let point = a.dir.path().join("a point");
    fs::create_dir(&point).expect("mkdir");
    let mounted = Mounted::of(&a.device, &point);
    let error = detach(&a.device.dev, WAIT).expect_err("mounted");
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains(&format!("mounted at {}", point.display())), "{error}");
    assert!(describe(a.device.number).is_some(), "nothing was done");
    run("umount", &[&point]);
    drop(mounted);
    assert!(describe(a.device.number).is_some(), "and it is not marked to go");
    detach(&a.device.dev, WAIT).expect("detach");
}

#[test]
fn a_device_that_somebody_has_open_is_waited_for_and_the_opener_named() {
    let a = Attached::new(false);
    let opener = File::open(&a.device.dev).expect("open device");
    let error = detach(&a.device.dev, Duration::from_millis(100)).expect_err("open");
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
    drop(opener);
    let deadline = Instant::now() + WAIT;
    while describe(a.device.number).is_some_and(|d| d.backing == a.path) {
        assert!(Instant::now() < deadline, "it goes away by itself");
        thread::sleep(POLL);
    }
}

#[test]
fn many_that_attach_at_once_each_get_a_device_of_their_own() {
    let all: Vec<Attached> = thread::scope(|scope| {
        let each: Vec<_> = (0..6).map(|_| scope.spawn(|| Attached::new(false))).collect();
        each.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    let mut numbers: Vec<u32> = all.iter().map(|a| a.device.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), all.len());
    assert!(all.iter().all(|a| a.device.backing == a.path));
}

#[test]
fn direct_io_is_switched_off_and_on() {
    let a = Attached::new(false);
    set_direct_io(&a.device.dev, false).expect("off");
    assert!(!describe(a.device.number).expect("attached").direct_io);
    set_direct_io(&a.device.dev, true).expect("on");
    assert!(describe(a.device.number).expect("attached").direct_io);
}

#[test]
fn a_device_over_a_file_that_grew_is_as_large_as_it_once_it_is_told() {
    let a = Attached::new(false);
    let sectors = || {
        let text = fs::read_to_string(format!("/sys/block/loop{}/size", a.device.number)).expect("size");
        text.trim_end().parse::<u64>().expect("a number")
    };
    OpenOptions::new().write(true).open(&a.path).and_then(|f| f.set_len(32 << 20)).expect("grow");
    assert_eq!(sectors() * 512, 16 << 20);
    update_size(&a.device.dev).expect("updated");
    assert_eq!(sectors() * 512, 32 << 20);
}

#[test]
fn a_file_system_is_named_once_however_often_it_is_mounted() {
    let a = Attached::new(false);
    run("mkfs.ext4", &[Path::new("-q"), &a.device.dev]);
    assert!(mounted_on(&a.device).expect("looked").is_empty());
    let points = ["one", "other"].map(|name| a.dir.path().join(name));
    points.iter().for_each(|point| fs::create_dir(point).expect("mkdir"));
    let mounted = points.each_ref().map(|point| Mounted::of(&a.device, point));
    let found = mounted_on(&a.device).expect("looked");
    let found: Vec<Vec<PathBuf>> =
        found.into_iter().map(|one| one.into_iter().map(|mount| mount.point).collect()).collect();
    assert_eq!(found, [points.to_vec()]);
    drop(mounted);
}

#[test]
fn what_is_no_loop_device_or_has_no_file_is_refused() {
    assert_eq!(detach(Path::new("/dev/null"), WAIT).expect_err("null").kind(), Kind::Invalid);
    assert_eq!(detach(Path::new("/dev/loop99999"), WAIT).expect_err("none").kind(), Kind::NotFound);
}

/// A partition table with one partition, from the second MiB on.
fn with_a_partition(path: &Path) {
    let mut table = [0u8; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&4096_u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.write_all_at(&table, 0).and_then(|()| file.sync_all()).expect("written");
}

#[test]
fn partitions_made_by_partx_go_with_the_file() {
    let a = Attached::new(false);
    with_a_partition(&a.path);
    run("partx", &[Path::new("-a"), &a.device.dev]);
    assert_eq!(partitions(a.device.number).len(), 1, "partx made one");
    let part = PathBuf::from(format!("{}p1", a.device.dev.display()));
    if let Ok(open) = File::open(&part) {
        let error = detach(&a.device.dev, WAIT).expect_err("open");
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        assert!(describe(a.device.number).is_some(), "it stays, and is not marked to go");
        drop(open);
    }
    // Another test's child may have a copy of the descriptor until its exec.
    let deadline = Instant::now() + WAIT;
    while let Err(e) = detach(&a.device.dev, WAIT) {
        assert!(e.kind() == Kind::Busy && Instant::now() < deadline, "{e}");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(
        describe(a.device.number).is_some_and(|d| d.backing != a.path)
            || partitions(a.device.number).is_empty()
    );
}

#[test]
fn partitions_left_by_another_tool_do_not_lie_over_the_next_file() {
    let a = Attached::new(false);
    with_a_partition(&a.path);
    run("partx", &[Path::new("-a"), &a.device.dev]);
    run("losetup", &[Path::new("-d"), &a.device.dev]);
    let deadline = Instant::now() + WAIT;
    while describe(a.device.number).is_some_and(|d| d.backing == a.path) {
        assert!(Instant::now() < deadline, "losetup detaches it");
        thread::sleep(POLL);
    }
    // The kernel gives the lowest free device, and others may be faster: what counts is that none lies over ours.
    let next = Attached::new(false);
    assert!(partitions(next.device.number).is_empty(), "{:?}", next.device);
    let file = File::open(format!("/dev/loop{}", a.device.number)).expect("open device");
    let _ = drop_partitions(&file, a.device.number);
}

#[test]
fn a_device_that_may_not_be_opened_is_no_matter_of_a_missing_module() {
    let said = |errno| no_control(&io::Error::from_raw_os_error(errno)).to_string();
    assert!(said(libc::ENOENT).contains("modprobe loop"));
    assert!(!said(libc::EACCES).contains("modprobe") && said(libc::EACCES).contains("for root"));
}
