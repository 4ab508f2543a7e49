//! `mount --passthrough`: raw images that the kernel reads and writes in the daemon's place. Real kernel, real binary.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Guest, Loop, Mount, Run, allocated, ok, punch, read_at, signal, temp_dir, text, until};
use rustix::process::Signal;
use tempfile::TempDir;

/// Long for a busy 2-core machine, short for a hang.
const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// A folder with the raw image vm1 of 64 MiB and the thin image vm2, mounted with `args`.
struct Raw {
    mount: Mount,
    _folder: TempDir,
}

impl Raw {
    #[track_caller]
    fn new(args: &[&str]) -> Raw {
        let folder = temp_dir();
        let mount = Mount::over(&images(folder.path()), args);
        Raw { mount, _folder: folder }
    }

    fn host(&self) -> PathBuf {
        self.mount.images().join("vm1.raw")
    }

    fn flat(&self) -> PathBuf {
        self.mount.flat("vm1")
    }

    #[track_caller]
    fn open(&self) -> File {
        self.mount.open("vm1")
    }

    /// A live counter of an image.
    #[track_caller]
    fn counts(&self, name: &str, what: &str) -> u64 {
        self.mount.stats()["images"][name][what].as_u64().expect("a number")
    }

    #[track_caller]
    fn passes(&self, name: &str) -> bool {
        self.mount.stats()["images"][name]["passthrough"].as_bool().expect("true or false")
    }

    /// The image is open, and the kernel reads and writes it.
    #[track_caller]
    fn assert_passed(&self) {
        assert!(self.passes("vm1"), "{}", self.mount.stats());
        assert_eq!(
            (self.counts("vm1", "reads"), self.counts("vm1", "writes")),
            (0, 0),
            "it came to the daemon"
        );
    }

    fn closed(&self) {
        assert!(until(SOON, || self.mount.mode("vm1") == "closed"), "{}", self.mount.stats());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.mount.images().join(".ploopfs/log")).unwrap_or_default()
    }
}

/// The folder of images in `folder`.
fn images(folder: &Path) -> PathBuf {
    let images = folder.join("images");
    fs::create_dir(&images).expect("a folder");
    let create = |format: &str, name: &str| {
        Run::ploopfs().args(["create", "--size", "64M", "--format", format]).arg(images.join(name)).ok();
    };
    create("raw", "vm1");
    create("ploop", "vm2");
    images
}

/// Bytes that are nowhere else.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    common::Rng::new(seed).bytes(len)
}

fn terminate(pid: u32) {
    signal(pid, Signal::TERM);
}

#[test]
fn what_is_written_through_the_mount_is_in_the_file_of_the_host_and_the_reverse() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    let (there, back) = (pattern(MIB as usize + 77, 1), pattern(300_000, 2));
    file.write_all_at(&there, 4096 + 17).expect("written through the mount");
    let host = OpenOptions::new().read(true).write(true).open(raw.host()).expect("the host's file");
    assert!(read_at(&host, 4096 + 17, there.len()).expect("read") == there, "not in the host's file");
    host.write_all_at(&back, 9 * MIB + 1).expect("written on the host");
    assert!(read_at(&file, 9 * MIB + 1, back.len()).expect("read") == back, "not seen through the mount");
    raw.assert_passed();
    let said = |file: &Path| fs::metadata(file).map(|m| (m.len(), m.blocks(), m.mtime())).expect("stat");
    assert!(until(SOON, || said(&raw.flat()) == said(&raw.host())), "{:?}", said(&raw.flat()));
}

/// The kernel asked for the capabilities of the file before each write: 34k writes/s, not 420k.
#[test]
fn a_daemon_that_stands_still_holds_up_no_read_and_no_write() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    // What the kernel asks once, until somebody looks at the attributes.
    file.write_all_at(&pattern(4096, 1), 0).expect("written");
    raw.assert_passed();
    let (done, answer) = std::sync::mpsc::channel();
    // Asked for now: it could not answer later.
    let daemon = raw.mount.pid();
    signal(daemon, Signal::STOP);
    let thread = std::thread::spawn(move || {
        let written = file.write_all_at(&pattern(4096, 2), MIB);
        let _ = done.send(written.and_then(|()| read_at(&file, MIB, 4096)));
    });
    let answered = answer.recv_timeout(SOON);
    signal(daemon, Signal::CONT);
    thread.join().expect("no panic");
    assert_eq!(answered.expect("without the daemon").expect("no error"), pattern(4096, 2));
}

#[test]
fn an_image_that_is_not_raw_is_served_as_ever() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.mount.open("vm2");
    file.write_all_at(&pattern(8192, 3), 4096).expect("written");
    assert_eq!(read_at(&file, 4096, 8192).expect("read"), pattern(8192, 3));
    assert!(!raw.passes("vm2") && raw.counts("vm2", "writes") > 0 && raw.counts("vm2", "reads") > 0);
}

#[test]
fn without_the_option_a_raw_image_is_served_by_the_daemon() {
    require!("fuse");
    let raw = Raw::new(&[]);
    let file = raw.open();
    file.write_all_at(b"counted", 0).expect("written");
    assert!(!raw.passes("vm1") && raw.counts("vm1", "writes") == 1);
}

#[test]
fn every_fsync_syncs_the_file_of_the_host_though_the_daemon_saw_no_write() {
    require!("fuse", "passthrough", "strace");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    let trace = raw._folder.path().join("trace");
    let pid = raw.mount.pid().to_string();
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-e", "trace=fdatasync", "-y", "-p", &pid, "-o", text(&trace)])
        .stderr(Stdio::null())
        .spawn()
        .expect("strace");
    // All threads: who is not traced yet may start one that never is.
    let status = |task: &Path| fs::read_to_string(task.join("status")).unwrap_or_default();
    let is_traced =
        |task: &Path| status(task).lines().any(|l| l.starts_with("TracerPid:") && !l.ends_with("\t0"));
    let tasks = || fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten();
    let traced = until(SOON, || tasks().all(|task| is_traced(&task.path())));
    for block in 0..3 {
        file.write_all_at(&pattern(4096, block), block * MIB).expect("written");
        file.sync_data().expect("synced");
    }
    raw.assert_passed();
    let said = || fs::read_to_string(&trace).unwrap_or_default();
    let synced = until(SOON, || said().matches("vm1.raw").count() == 3);
    terminate(strace.id());
    let _ = strace.wait();
    assert!(traced && synced, "{}", said());
}

#[test]
fn a_punched_hole_is_seen_in_the_host_and_through_the_mount_and_can_be_written_again() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let mut file = raw.open();
    file.write_all_at(&vec![0xa5; 16 << 20], 0).expect("written");
    file.sync_all().expect("synced");
    let full = allocated(&raw.host());
    punch(&file, MIB + 1000, 9 * MIB).expect("a hole");
    let mut expected = vec![0xa5; 16 << 20];
    expected[MIB as usize + 1000..][..9 << 20].fill(0);
    assert!(read_at(&file, 0, 16 << 20).expect("read") == expected, "through the mount");
    assert!(fs::read(raw.host()).expect("read")[..16 << 20] == expected, "on the host");
    assert!(allocated(&raw.host()) <= full - 9 * MIB + 65536, "the space has not come back");
    let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).expect("a hole");
    assert!((MIB + 1000..2 * MIB).contains(&hole), "{hole}");
    file.seek(SeekFrom::Start(0)).expect("seek");
    file.write_all_at(b"again", 5 * MIB).expect("written");
    assert_eq!(read_at(&file, 5 * MIB, 5).expect("read"), b"again");
    assert_eq!(raw.counts("vm1", "discards"), 1);
    raw.assert_passed();
}

#[test]
fn several_opens_of_one_image_go_the_same_way_until_the_last_close() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let writer = raw.open();
    let reader = File::open(raw.flat()).expect("a reader");
    let direct =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(raw.flat()).expect("O_DIRECT");
    writer.write_all_at(b"one", 0).expect("written");
    assert_eq!(read_at(&reader, 0, 3).expect("read"), b"one");
    drop(writer);
    let second = raw.open();
    second.write_all_at(b"two", 0).expect("written");
    assert_eq!(read_at(&reader, 0, 3).expect("read"), b"two");
    raw.assert_passed();
    drop((second, reader, direct));
    raw.closed();
    // A new opening has a new registration.
    let again = raw.open();
    assert_eq!(read_at(&again, 0, 3).expect("read"), b"two");
    raw.assert_passed();
}

#[test]
fn what_needs_to_stop_writes_is_refused_while_the_image_is_open_and_done_once_it_is_closed() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    file.write_all_at(b"before", 0).expect("written");
    let (vm1, to) = (raw.host(), raw.mount.images().join("vm3"));
    let stream = raw._folder.path().join("stream");
    let refused = |words: &[&str]| {
        let done = Run::ploopfs().args(words).limit(60).run();
        let clear =
            ["passthrough", "vm1.raw", "close the image"].iter().all(|part| done.stderr.contains(part));
        assert!(!done.success() && clear, "{words:?}: {done}");
    };
    refused(&["snapshot", "create", text(&vm1), "one"]);
    refused(&["clone", text(&vm1), text(&to)]);
    refused(&["resize", text(&vm1), "128M"]);
    refused(&["backup", text(&vm1), "-o", text(&stream)]);
    for words in [&["compact", text(&vm1)][..], &["cbt", "start", text(&vm1)]] {
        assert!(!Run::ploopfs().args(words).limit(60).run().success(), "{words:?}");
    }
    assert!(!stream.exists() && !to.exists());
    // What only looks is done.
    Run::ploopfs().args(["map", text(&vm1)]).ok();
    Run::ploopfs().args(["info", text(&vm1)]).ok();
    file.write_all_at(b"after", 100).expect("it goes on");
    raw.assert_passed();
    drop(file);
    raw.closed();
    Run::ploopfs().args(["snapshot", "create", text(&vm1), "one"]).limit(60).ok();
    let file = raw.open();
    assert!(!raw.passes("vm1"), "it has layers now");
    assert_eq!(read_at(&file, 0, 6).expect("read"), b"before");
    file.write_all_at(b"layer", 0).expect("written");
    let shown = raw.mount.point().join(".snapshots/vm1/one.img");
    assert_eq!(&fs::read(shown).expect("the snapshot")[..6], b"before");
}

#[test]
fn a_disk_does_not_grow_under_whoever_has_it_open_and_grows_once_it_is_closed() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough,manage"]);
    let file = raw.open();
    file.set_len(64 * MIB).expect("the same size");
    assert_eq!(file.set_len(96 * MIB).expect_err("refused").raw_os_error(), Some(libc::EBUSY));
    assert_eq!(fs::metadata(raw.host()).expect("stat").len(), 64 * MIB);
    raw.assert_passed();
    drop(file);
    raw.closed();
    Run::ploopfs().args(["resize", text(&raw.host()), "96M"]).ok();
    let file = raw.open();
    file.write_all_at(b"end", 96 * MIB - 3).expect("written");
    assert_eq!(fs::metadata(raw.host()).expect("stat").len(), 96 * MIB);
    raw.assert_passed();
}

#[test]
fn a_copy_inside_the_mount_of_an_image_that_is_passed_through_is_whole() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough,manage"]);
    let file = raw.open();
    let data = pattern(3 << 20, 7);
    file.write_all_at(&data, MIB).expect("written");
    ok("cp", &[text(&raw.flat()), text(&raw.mount.flat("vm4"))]);
    let copy = raw.mount.open("vm4");
    assert_eq!(copy.metadata().expect("stat").len(), 64 * MIB);
    assert!(read_at(&copy, MIB, data.len()).expect("read") == data);
}

#[test]
fn a_read_only_mount_passes_reads_through_and_refuses_writes() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough,ro"]);
    let file = File::open(raw.flat()).expect("a reader");
    assert_eq!(read_at(&file, 0, 4096).expect("read"), [0; 4096]);
    raw.assert_passed();
    let refused = OpenOptions::new().write(true).open(raw.flat()).expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn a_write_behind_the_end_makes_the_disk_longer_as_on_the_host() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    file.write_all_at(&[7; 4096], 65 * MIB).expect("written");
    let len = 65 * MIB + 4096;
    let shown = || fs::metadata(raw.flat()).expect("stat").len();
    assert!(until(SOON, || shown() == len), "{}", shown());
    // What the daemon does knows of it, too.
    punch(&file, 65 * MIB, 4096).expect("a hole");
    assert_eq!(read_at(&file, 65 * MIB, 4096).expect("read"), [0; 4096]);
    drop(file);
    raw.closed();
    assert_eq!(shown(), len);
    assert_eq!(raw.open().metadata().expect("stat").len(), len);
}

#[test]
fn a_loop_device_with_direct_io_works_and_is_detached_cleanly() {
    require!("fuse", "passthrough", "loop", "ext4");
    let mut raw = Raw::new(&["-o", "passthrough"]);
    let device = Loop::attach(&raw.flat(), true);
    ok("mkfs.ext4", &["-q", text(device.device())]);
    let guest = Guest::mount(device.device(), "discard");
    let data = pattern(5 << 20, 5);
    fs::write(guest.path().join("f"), &data).expect("written in the guest");
    ok("sync", &["-f", text(guest.path())]);
    ok("fstrim", &[text(guest.path())]);
    assert!(fs::read(guest.path().join("f")).expect("read") == data);
    raw.assert_passed();
    assert!(raw.counts("vm1", "discards") > 0 && raw.counts("vm1", "flushes") > 0);
    guest.umount();
    device.detach();
    raw.closed();
    raw.mount.umount();
    ok("e2fsck", &["-fn", text(&raw.host())]);
}

#[test]
fn umount_names_who_has_it_open_and_detached_it_goes_on_until_the_last_close() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let (file, pid) = (raw.open(), raw.mount.pid());
    let umount = || Run::ploopfs().arg("umount").arg(raw.mount.point()).limit(60);
    let refused = umount().status(4);
    assert!(refused.stderr.contains("vm1.img"), "{refused}");
    umount().arg("--detach").status(0);
    file.write_all_at(b"after the name is gone", 4096).expect("still there");
    file.sync_all().expect("still served");
    drop(file);
    let gone = || !Path::new(&format!("/proc/{pid}")).exists();
    assert!(until(SOON, gone), "the daemon goes on after the last close");
    assert_eq!(&fs::read(raw.host()).expect("read")[4096..][..5], b"after");
}

#[test]
fn sigterm_waits_for_the_last_close() {
    require!("fuse", "passthrough");
    let raw = Raw::new(&["-o", "passthrough"]);
    let (file, pid) = (raw.open(), raw.mount.pid());
    terminate(pid);
    assert!(until(SOON, || raw.log().contains("still open: vm1")), "{}", raw.log());
    file.write_all_at(b"late", 0).expect("it goes on");
    drop(file);
    assert!(until(SOON, || !Path::new(&format!("/proc/{pid}")).exists()), "the daemon goes on");
    assert_eq!(&fs::read(raw.host()).expect("read")[..4], b"late");
}

/// However the daemon went, `file` goes on, and nobody else gets the image until it is closed.
#[track_caller]
fn locked_until_closed(raw: &mut Raw, file: File) {
    file.write_all_at(b"without a daemon", 8192).expect("the kernel goes on");
    assert!(file.sync_all().is_err(), "nobody is there to sync");
    raw.mount.start();
    let refused = File::open(raw.flat()).expect_err("somebody else writes it");
    assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    drop(file);
    assert!(until(SOON, || File::open(raw.flat()).is_ok()), "{}", raw.log());
    assert_eq!(read_at(&raw.open(), 8192, 16).expect("read"), b"without a daemon");
}

#[test]
fn after_a_forced_end_the_image_stays_locked_until_its_users_close_it() {
    require!("fuse", "passthrough");
    let mut raw = Raw::new(&["-o", "passthrough", "--stop-timeout", "0"]);
    let (file, pid) = (raw.open(), raw.mount.pid());
    terminate(pid);
    assert!(until(SOON, || !Path::new(&format!("/proc/{pid}")).exists()), "the daemon goes on");
    assert!(until(SOON, || !raw.mount.is_mounted()));
    assert!(raw.log().contains("it stays locked until they have closed it"), "{}", raw.log());
    locked_until_closed(&mut raw, file);
}

#[test]
fn after_a_killed_daemon_the_image_stays_locked_until_its_users_close_it() {
    require!("fuse", "passthrough");
    let mut raw = Raw::new(&["-o", "passthrough"]);
    let file = raw.open();
    raw.mount.kill();
    locked_until_closed(&mut raw, file);
}

#[test]
fn on_a_stacked_host_the_log_says_once_why_and_the_daemon_serves() {
    require!("fuse", "passthrough", "overlay");
    let folder = temp_dir();
    let dirs = ["lower", "upper", "work", "merged"].map(|name| folder.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).expect("a folder"));
    let [lower, upper, work, merged] = dirs.map(|dir| text(&dir).to_owned());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    ok("mount", &["-t", "overlay", "-o", &options, "overlay", &merged]);
    let host = Guest::adopt(Path::new(&merged));
    let images = images(host.path());
    Run::ploopfs().args(["create", "--size", "64M", "--format", "raw"]).arg(images.join("vm5")).ok();
    let mut raw = Raw { mount: Mount::over(&images, &["-o", "passthrough"]), _folder: temp_dir() };
    let (file, other) = (raw.open(), raw.mount.open("vm5"));
    file.write_all_at(b"served", 0).expect("written");
    assert_eq!(read_at(&file, 0, 6).expect("read"), b"served");
    assert!(!raw.passes("vm1") && !raw.passes("vm5") && raw.counts("vm1", "writes") == 1);
    let warnings = || raw.log().lines().filter(|l| l.contains("WARN") && l.contains("stacked")).count();
    assert!(until(SOON, || warnings() == 1), "{}", raw.log());
    // Nothing is refused that only passthrough cannot have.
    drop(other);
    Run::ploopfs().args(["snapshot", "create", text(&images.join("vm1.raw")), "one"]).limit(60).ok();
    drop(file);
    raw.mount.umount();
    host.umount();
}

#[test]
fn together_with_cache_direct_it_is_refused_with_the_reason() {
    let folder = temp_dir();
    let images = images(folder.path());
    let mut mount = Mount::prepare(&images, &["-o", "passthrough,cache=direct"]);
    let refused = mount.try_start();
    assert_eq!(refused.code(), Some(2), "{refused}");
    assert!(refused.stderr.contains("--cache direct cannot hold"), "{refused}");
}
