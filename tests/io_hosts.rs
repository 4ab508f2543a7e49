//! The host files and locks on the file systems that are home (docs/kernel.md#the-host): ext4, XFS, btrfs and tmpfs,
//! each mounted for the test.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ploopfs::Kind;
use ploopfs::io::file::{HostFile, read_full, write_full};
use ploopfs::io::lock::{DeltaLock, Use};
use ploopfs::io::loopdev::{self, LoopDevice};
use ploopfs::io::real::{Access, RealFile};
use ploopfs::io::unmount::unmount;

const MIB: u64 = 1 << 20;

/// A mounted file system in a file; unmounted and detached at the end, whatever happened.
struct Host {
    point: PathBuf,
    device: Option<LoopDevice>,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new(kind: &str) -> Host {
        let dir = tempfile::tempdir().expect("temp folder");
        let point = dir.path().join("host");
        fs::create_dir(&point).expect("mkdir");
        let mut host = Host { point, device: None, _dir: dir };
        if kind == "tmpfs" {
            run("mount", &["-t", "tmpfs", "none", text(&host.point)]);
            return host;
        }
        // XFS wants 300 MiB; sparse, so it costs what is written.
        let image = host._dir.path().join("image");
        File::create(&image).and_then(|file| file.set_len(400 * MIB)).expect("create");
        run(&format!("mkfs.{kind}"), &["-q", text(&image)]);
        let device = host.device.insert(loopdev::attach(&image, false).expect("attach"));
        run("mount", &[text(&device.dev), text(&host.point)]);
        host
    }

    fn open(&self, name: &str) -> RealFile {
        let path = self.point.join(name);
        File::create(&path).expect("create");
        RealFile::open(&path, Access::ReadWrite).expect("open")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = unmount(&self.point, false).or_else(|_| unmount(&self.point, true));
        if let Some(device) = &self.device {
            let _ = loopdev::detach(&device.dev, Duration::from_secs(10));
        }
    }
}

/// A child that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are ASCII")
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

/// What every home gives: holes that read zero and cost nothing, seeking, reserving, the length kept apart.
fn gives_what_a_delta_needs(kind: &str, nowait: bool, never_blocks: bool) {
    let host = Host::new(kind);
    let file = host.open("vm1.hds");
    let traits = file.traits();
    assert_eq!(traits.never_blocks, never_blocks, "{traits:?}");
    // Later kernels may give tmpfs NOWAIT reads; the homes on disks must have them.
    assert!(traits.nowait_reads || !nowait, "{traits:?}");

    file.set_len(8 * MIB).expect("set_len");
    write_full(&file, &vec![7; 4 * MIB as usize], 0).expect("write");
    file.sync_all().expect("fsync");
    let full = file.status().expect("status").blocks * 512;
    assert!(full >= 4 * MIB, "{full} bytes taken");

    file.punch(MIB, 2 * MIB).expect("punch");
    file.punch(7 * MIB, 4 * MIB).expect("a punch across the end of the file");
    file.sync_data().expect("fdatasync");
    let status = file.status().expect("status");
    assert_eq!(status.len, 8 * MIB, "the length stays");
    assert!(status.blocks * 512 <= full - 2 * MIB, "{} of {full} bytes still taken", status.blocks * 512);
    assert_eq!(file.seek_hole(0).expect("hole"), MIB);
    assert_eq!(file.seek_data(MIB).expect("data"), Some(3 * MIB));
    assert_eq!(file.seek_data(4 * MIB).expect("data"), None);

    // A ragged punch zeroes exactly its bytes.
    file.punch(100, 5000).expect("ragged punch");
    let mut buf = vec![1; 8192];
    assert_eq!(read_full(&file, &mut buf, 0).expect("read"), 8192);
    let expected = |at: usize| if (100..5100).contains(&at) { 0 } else { 7 };
    assert!(buf.iter().enumerate().all(|(at, byte)| *byte == expected(at)));

    file.sync_all().expect("fsync");
    file.drop_cache().expect("drop the cache");
    assert_eq!(read_full(&file, &mut buf, 3 * MIB).expect("read"), 8192);
    assert!(buf.iter().all(|byte| *byte == 7));
    let space = file.space().expect("space");
    assert!(space.total > 100 * MIB && space.available <= space.total, "{space:?}");
}

#[test]
fn ext4_gives_what_a_delta_needs() {
    gives_what_a_delta_needs("ext4", true, false);
}

#[test]
fn xfs_gives_what_a_delta_needs() {
    gives_what_a_delta_needs("xfs", true, false);
}

#[test]
fn btrfs_gives_what_a_delta_needs() {
    gives_what_a_delta_needs("btrfs", true, false);
}

#[test]
fn tmpfs_gives_what_a_delta_needs() {
    gives_what_a_delta_needs("tmpfs", false, true);
}

#[test]
fn a_holder_is_named_on_btrfs_where_locks_and_stat_disagree_about_the_device() {
    let host = Host::new("btrfs");
    let subvolume = host.point.join("images");
    run("btrfs", &["-q", "subvolume", "create", text(&subvolume)]);
    let path = subvolume.join("vm1.hds");
    run("qemu-img", &["create", "-q", "-f", "parallels", text(&path), "16M"]);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "parallels", text(&path)]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut qemu = Running(command.spawn().expect("qemu-io"));
    qemu.0.stdin.as_mut().expect("piped").write_all(b"length\n").expect("ask");
    let (mut seen, mut byte) = (String::new(), [0]);
    while !seen.contains("MiB") {
        assert_eq!(qemu.0.stdout.as_mut().expect("piped").read(&mut byte).expect("read"), 1, "{seen}");
        seen.push(char::from(byte[0]));
    }
    let file = Arc::new(RealFile::open(&path, Access::ReadOnly).expect("open"));
    let error = DeltaLock::acquire(Arc::clone(&file), Use::Writer).expect_err("in use");
    assert_eq!(error.kind(), Kind::InUse);
    assert!(error.to_string().contains(&format!("qemu-io (pid {}", qemu.0.id())), "{error}");
    drop(qemu);
    DeltaLock::acquire(file, Use::Writer).expect("free again");
}

#[test]
fn the_widest_access_of_a_file_on_a_read_only_mount_is_reading() {
    let host = Host::new("ext4");
    drop(host.open("vm1.hds"));
    run("mount", &["-o", "remount,ro", text(&host.point)]);
    let path = host.point.join("vm1.hds");
    let file = RealFile::open(&path, Access::Widest).expect("falls back to reading");
    assert!(!file.writable());
    let lock = DeltaLock::acquire(Arc::new(file), Use::Writer).expect("a read lock needs no more");
    assert!(lock.held());
    let error = RealFile::open(&path, Access::ReadWrite).expect_err("read-only");
    assert_eq!(error.kind(), Kind::ReadOnly);
}
