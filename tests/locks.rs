//! One writer at a time: ploopfs against itself, QEMU and the ploop tool, in both directions.

mod common;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Holder, Mount, Run, ok, qemu_holds, temp_dir, text, until};

/// What current ploop does before it touches an image (FORMAT.md 3.2): a POSIX write lock on bytes 200 to 204, which
/// an outsider's lock of any kind refuses. Debian's 1.15 is older and takes none, so perl stands in for it.
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
    use std::os::unix::fs::FileExt;
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
