//! One writer at a time: ploopfs against itself, QEMU and the ploop tool, in both directions.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Holder, Mount, Run, ok, qemu_holds, qemu_reads, temp_dir, text, until};

/// What current ploop does before it touches an image (docs/format.md#locks): a POSIX write lock on bytes 200 to 204,
/// which an outsider's lock of any kind refuses. Debian's 1.15 is older and takes none, so perl stands in for it.
fn ploop_style_lock(delta: &Path) -> common::Finished {
    let script = r#"use Fcntl; open(my $f, "+<", $ARGV[0]) or die "open: $!";
        my $lock = pack("s s x4 q q i", F_WRLCK, 0, 200, 5, 0); fcntl($f, F_SETLK, $lock) or die "Already locked: $!\n";"#;
    Run::new("perl").args(["-e", script, text(delta)]).run()
}

#[test]
fn a_second_mount_of_the_folder_is_refused_and_names_the_process() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let mut second = Mount::prepare(mount.images(), &[]);
    let refused = second.try_start();
    assert_eq!(refused.code(), Some(4), "{refused}");
    assert!(refused.stderr.contains(&mount.pid().to_string()), "{refused}");
    assert!(!second.is_mounted());
}

#[test]
fn an_open_image_is_refused_to_qemu() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let open = mount.open("vm1");
    for command in ["write -q 0 512", "read -q 0 512"] {
        let refused =
            Run::new("qemu-io").args(["-f", "parallels", "-c", command]).arg(mount.delta("vm1")).run();
        assert!(!refused.success() && refused.output().contains("lock"), "{refused}");
    }
    drop(open);
}

#[test]
fn an_open_image_is_refused_to_the_ploop_tools_lock() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let open = mount.open("vm1");
    let refused = ploop_style_lock(&mount.delta("vm1"));
    assert!(!refused.success() && refused.stderr.contains("Already locked"), "{refused}");
    drop(open);
}

#[test]
fn a_written_image_that_is_open_looks_dirty_to_the_ploop_tool() {
    require!("fuse", "ploop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let open = mount.open("vm1");
    open.write_all_at(&[1; 4096], 0).expect("a write");
    let before = std::fs::read(mount.delta("vm1")).expect("the delta");
    let refused = Run::new("ploop").args(["check", "-r", text(&mount.delta("vm1"))]).run();
    assert!(!refused.success(), "{refused}");
    assert!(std::fs::read(mount.delta("vm1")).expect("the delta") == before);
}

#[test]
fn an_image_that_was_closed_again_is_free_for_everyone() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    drop(mount.open("vm1"));
    // The last close reaches the daemon a moment after close() has returned.
    let free = || ploop_style_lock(&mount.delta("vm1")).success();
    assert!(until(Duration::from_secs(10), free), "an idle image stays locked");
    ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 7 1M 4k", text(&mount.delta("vm1"))]);
    let data = common::read_at(&mount.open("vm1"), 1 << 20, 4096).expect("a read");
    assert_eq!(data, vec![7; 4096], "at each first open everything is read anew");
}

#[test]
fn an_image_that_qemu_holds_cannot_be_opened_and_info_names_qemu() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let holder = qemu_holds(&mount.delta("vm1"));
    let refused = File::options().read(true).write(true).open(mount.flat("vm1"));
    assert_eq!(refused.expect_err("QEMU holds it").raw_os_error(), Some(libc::EBUSY));
    let info = Run::ploopfs().arg("info").arg(mount.delta("vm1")).run();
    let pid = holder.pid().to_string();
    assert!(info.output().contains("qemu-io") || info.output().contains(&pid), "{info}");
    drop(holder);
    let open = || File::options().read(true).write(true).open(mount.flat("vm1")).is_ok();
    assert!(until(Duration::from_secs(10), open), "refused after QEMU is gone");
}

#[test]
fn check_of_an_image_that_qemu_holds_is_refused_with_status_4_and_names_it() {
    require!("qemu");
    let folder = temp_dir();
    let delta = folder.path().join("vm1.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&delta), "64M"]);
    let holder = qemu_holds(&delta);
    let refused = Run::ploopfs().arg("check").arg(&delta).status(4);
    let pid = holder.pid().to_string();
    assert!(refused.stderr.contains("qemu-io") || refused.stderr.contains(&pid), "{refused}");
}

#[test]
fn a_ploop_tool_that_works_on_an_image_keeps_us_out() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let script = r#"use Fcntl; $| = 1; open(my $f, "<", $ARGV[0]) or die "open: $!";
        my $lock = pack("s s x4 q q i", F_RDLCK, 0, 200, 5, 0); fcntl($f, F_SETLK, $lock) or die "lock: $!"; print "held\n"; sleep 60;"#;
    let mut child = Command::new("perl")
        .args(["-e", script])
        .arg(mount.delta("vm1"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("perl");
    let mut said = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().expect("a pipe"), &mut said).expect("perl's word");
    let holder = Holder(child);
    let refused = File::options().read(true).write(true).open(mount.flat("vm1"));
    assert_eq!(refused.expect_err("ploop holds it").raw_os_error(), Some(libc::EBUSY));
    drop(holder);
    let open = || File::options().read(true).write(true).open(mount.flat("vm1")).is_ok();
    assert!(until(Duration::from_secs(10), open));
}

/// Reading an image at rest took the lock of a writer: a check during a nightly export failed, and was advised to
/// `umount` what has no mount.
#[test]
fn readers_of_one_image_excluded_each_other() {
    let folder = temp_dir();
    let image = folder.path().join("vm");
    std::fs::write(folder.path().join("raw"), vec![7; 8 << 20]).expect("written");
    Run::ploopfs().args(["import", text(&folder.path().join("raw")), text(&image)]).ok();
    for layered in [false, true] {
        if layered {
            Run::ploopfs().args(["snapshot", "create", text(&image), "s1"]).ok();
        }
        let out = folder.path().join(format!("out.{layered}"));
        let mut export = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        export.args(["export", text(&image), text(&out), "--rate", "1M"]);
        let export = Holder(export.stdout(Stdio::null()).spawn().expect("starts"));
        let pid = export.pid().to_string();
        let holds = || Run::ploopfs().args(["info", text(&image)]).ok().contains(&format!("(pid {pid}"));
        assert!(until(Duration::from_secs(10), holds), "info names the export");
        let resize = || Run::ploopfs().args(["resize", text(&image), "64M"]).run();
        let refused = resize();
        assert_eq!(refused.code(), Some(4), "{refused}");
        assert!(refused.stderr.contains(&pid), "{refused}");
        assert!(!refused.stderr.contains("umount"), "an export has no mount: {refused}");
        for reader in [&["check"][..], &["map"], &["info"], &["compact", "--dry-run"], &["snapshot", "list"]]
        {
            Run::ploopfs().args(reader).arg(&image).ok();
        }
        Run::ploopfs().args(["export", text(&image), text(&folder.path().join("beside"))]).ok();
        std::fs::remove_file(folder.path().join("beside")).expect("removed");
        drop(export);
        assert!(until(Duration::from_secs(5), || resize().success()), "free again");
    }
}

/// A clone on a host without shared extents has hard links to the frozen files of its origin.
#[test]
fn a_clone_in_another_folder_was_locked_by_its_open_origin() {
    require!("fuse", "loop", "ext4");
    let host = common::HostFs::new("ext4", 256 << 20);
    let (a, b) = (host.path().join("a"), host.path().join("b"));
    for folder in [&a, &b] {
        std::fs::create_dir(folder).expect("made");
    }
    let mut origin = Mount::over(&a, &["--create", "vm1=64M"]);
    origin.open("vm1").write_all_at(&[1; 4096], 0).expect("written");
    origin.umount();
    Run::ploopfs().args(["snapshot", "create", text(&a.join("vm1")), "s1"]).ok();
    Run::ploopfs().args(["clone", &format!("{}@s1", text(&a.join("vm1"))), text(&b.join("vm2"))]).ok();
    let linked = std::fs::read_dir(b.join("vm2")).expect("a folder").flatten();
    assert!(linked.into_iter().any(|f| f.metadata().is_ok_and(|m| m.nlink() > 1)), "no file is shared");

    let mut origin = Mount::over(&a, &[]);
    let open = origin.open("vm1");
    let clone = b.join("vm2");
    Run::ploopfs().args(["check", text(&clone)]).ok();
    Run::ploopfs().args(["export", text(&clone), text(&host.path().join("out"))]).ok();
    Run::ploopfs().args(["snapshot", "create", text(&clone), "t"]).ok();
    let mut other = Mount::over(&b, &[]);
    let theirs = other.open("vm2");
    assert_eq!(common::read_at(&theirs, 0, 4096).expect("read"), vec![1; 4096]);
    open.write_all_at(&[2; 4096], 0).expect("written");
    theirs.write_all_at(&[3; 4096], 0).expect("written");
    open.sync_all().and_then(|()| theirs.sync_all()).expect("synced");
    assert_eq!(common::read_at(&open, 0, 4096).expect("read"), vec![2; 4096]);
    assert_eq!(common::read_at(&theirs, 0, 4096).expect("read"), vec![3; 4096]);
    drop((open, theirs));
    other.umount();
    origin.umount();
}

/// Frozen levels are a reader's in the daemon, so that others may read them; a merge changes them, and asks first.
#[test]
fn a_merge_is_refused_while_another_program_reads_the_frozen_level_and_names_it() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let open = mount.open("vm1");
    open.write_all_at(&[1; 4096], 0).expect("written");
    let image = mount.images().join("vm1");
    Run::ploopfs().args(["snapshot", "create", text(&image), "s1"]).ok();
    open.write_all_at(&[2; 4096], 1 << 20).expect("written");
    let frozen = mount.images().join("vm1/vm1.hds");
    let reader = qemu_reads(&frozen);
    let refused = Run::ploopfs().args(["merge", text(&image), "s1"]).status(4);
    assert!(refused.stderr.contains(&format!("qemu-io (pid {}", reader.pid())), "{refused}");
    drop(reader);
    let written = Run::new("qemu-io").args(["-f", "parallels", "-c", "write -q 0 512"]).arg(&frozen).run();
    assert!(!written.success() && written.output().contains("lock"), "a frozen level is kept: {written}");
    Run::ploopfs().args(["merge", text(&image), "s1"]).ok();
    assert_eq!(common::read_at(&open, 0, 4096).expect("read"), vec![1; 4096]);
    assert_eq!(common::read_at(&open, 1 << 20, 4096).expect("read"), vec![2; 4096]);
}
