//! `mount -t fuse.ploopfs`, a line of /etc/fstab, and umount(8), with the helpers of contrib.
//!
//! Each test has a mount namespace of its own, in which the helpers lie in /sbin, the binary under test in
//! /usr/local/bin and the test's lines in /etc/fstab: nothing of the machine is changed.

mod common;

use std::path::{Path, PathBuf};

use common::namespace::installed;
use common::{Finished, Mount, Run, marked_in_use, temp_dir, text};
use tempfile::TempDir;

/// A folder with an image, and what cleans up however the test ends.
struct Place {
    guard: Mount,
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = temp_dir();
        // A blank, because fstab and the mount table write it in another way.
        let images = folder.path().join("my images");
        std::fs::create_dir(&images).expect("a folder");
        Run::ploopfs().args(["create", "--size", "64M"]).arg(images.join("vm1")).ok();
        let guard = Mount::adopt(&images, &folder.path().join("vdisks"));
        Place { guard, folder }
    }

    fn run(&self, script: &str) -> Finished {
        let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib");
        installed(self.folder.path(), &contrib, Path::new(env!("CARGO_BIN_EXE_ploopfs")), script)
    }

    fn fstab(&self, options: &str) -> PathBuf {
        let escaped = |path: &Path| text(path).replace(' ', r"\040");
        let (images, point) = (escaped(self.guard.images()), escaped(self.guard.point()));
        let file = self.folder.path().join("fstab");
        std::fs::write(&file, format!("{images} {point} fuse.ploopfs {options} 0 0\n")).expect("fstab");
        file
    }
}

#[test]
fn mount_with_our_type_serves_the_folder_and_umount_returns_when_its_images_are_closed() {
    require!("fuse", "loop");
    let place = Place::new();
    let done = place.run(
        r#"
        mkdir vdisks
        mount -t fuse.ploopfs "my images" vdisks
        findmnt -n -o FSTYPE,SOURCE vdisks
        printf kept | dd of=vdisks/vm1.img conv=notrunc status=none
        daemon=$(grep -o '"pid": *[0-9]*' vdisks/.ploopfs/stats.json | grep -o '[0-9]*')
        umount vdisks
        [ ! -e /proc/$daemon ] && echo daemon gone
        mount -t fuse.ploopfs "my images" vdisks
        head -c 4 vdisks/vm1.img; echo
        umount vdisks"#,
    );
    assert!(done.success(), "{done}");
    let lines: Vec<&str> = done.stdout.lines().collect();
    let source = format!("fuse.ploopfs {}", text(place.guard.images()));
    assert_eq!(lines, [source.as_str(), "daemon gone", "kept"], "{done}");
    assert!(!marked_in_use(&place.guard.delta("vm1")));
}

#[test]
fn a_line_of_fstab_mounts_with_its_options_and_what_only_mount_understands_is_passed_over() {
    require!("fuse", "loop");
    let place = Place::new();
    place.fstab("ro,noauto,nofail,_netdev,allow_other,noexec,x-systemd.automount,create=vm2=32M,threads=2");
    let done = place.run(
        r#"
        mount -a
        mountpoint -q vdisks && echo noauto was not heeded
        mkdir -p vdisks
        mount vdisks
        ls vdisks
        findmnt -n -o OPTIONS vdisks | tr , '\n' | grep -x ro
        printf x 2>/dev/null >vdisks/vm1.img || echo refused
        umount vdisks"#,
    );
    assert!(done.success(), "{done}");
    assert_eq!(done.stdout.lines().collect::<Vec<_>>(), ["vm1.img", "vm2.img", "ro", "refused"], "{done}");
}

#[test]
fn options_that_mount_has_for_every_file_system_do_not_make_a_line_of_fstab_fail() {
    require!("fuse", "loop");
    let place = Place::new();
    place.fstab(
        "sync,dirsync,nosymfollow,strictatime,silent,iversion,mand,lazytime,diratime,owner,group,users,nofail,loud,async,sync",
    );
    let done = place.run(
        r#"
        mkdir -p vdisks
        mount vdisks
        findmnt -n -o OPTIONS vdisks | tr , '\n' | grep -xE 'sync|dirsync|nosymfollow' | sort
        printf written | dd of=vdisks/vm1.img conv=notrunc status=none
        head -c 7 vdisks/vm1.img
        umount vdisks"#,
    );
    assert!(done.success(), "{done}");
    assert_eq!(
        done.stdout.lines().collect::<Vec<_>>(),
        ["dirsync", "nosymfollow", "sync", "written"],
        "{done}"
    );
}

#[test]
fn mount_all_takes_a_line_of_fstab_once() {
    require!("fuse", "loop");
    let place = Place::new();
    let fstab = place.fstab("defaults,nofail");
    let all = format!("mount -a -T '{}'", text(&fstab));
    let done = place.run(&format!(
        "mkdir vdisks\n{all}\n{all}\nls vdisks\ngrep -c \" $W/vdisks fuse.ploopfs \" /proc/self/mounts\numount vdisks"
    ));
    assert!(done.success(), "{done}");
    assert_eq!(done.stdout.lines().collect::<Vec<_>>(), ["vm1.img", "1"], "{done}");
}

#[test]
fn a_wrong_option_and_a_remount_end_with_status_32_and_change_nothing() {
    require!("fuse", "loop");
    let place = Place::new();
    let done = place.run(
        r#"
        mkdir vdisks
        status=0; mount -t fuse.ploopfs -o shiny "my images" vdisks || status=$?
        echo $status
        mountpoint -q vdisks && echo mounted
        mount -t fuse.ploopfs "my images" vdisks
        status=0; mount -o remount,ro vdisks || status=$?
        echo $status
        findmnt -n -o OPTIONS vdisks | tr , '\n' | grep -x rw
        umount vdisks"#,
    );
    assert!(done.success(), "{done}");
    assert_eq!(done.stdout.lines().collect::<Vec<_>>(), ["32", "32", "rw"], "{done}");
    assert!(done.stderr.contains("shiny") && done.stderr.contains("mount it again"), "{done}");
}

#[test]
fn umount_of_a_busy_mount_names_the_user_and_a_lazy_one_lets_it_go_on() {
    require!("fuse", "loop");
    let place = Place::new();
    let done = place.run(
        r#"
        mkdir vdisks
        mount -t fuse.ploopfs "my images" vdisks
        exec 7<>vdisks/vm1.img
        daemon=$(grep -o '"pid": *[0-9]*' vdisks/.ploopfs/stats.json | grep -o '[0-9]*')
        status=0; umount vdisks || status=$?
        echo $status
        umount -l vdisks
        mountpoint -q vdisks || echo away
        printf late >&7 && echo still served
        exec 7>&-
        for i in $(seq 200); do [ -e /proc/$daemon ] || break; sleep 0.05; done
        [ -e /proc/$daemon ] || echo daemon gone"#,
    );
    assert!(done.success(), "{done}");
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(lines, ["32", "away", "still served", "daemon gone"], "{done}");
    assert!(done.stderr.contains("is busy") && done.stderr.contains("vm1.img"), "{done}");
    assert!(!marked_in_use(&place.guard.delta("vm1")));
}
