//! Loop devices over images, and the file systems on them: found by what they are, not by a name.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use common::{Guest, Loop, Mount, Run, ok, temp_dir, text};

/// An image with an ext4, attached and mounted.
struct Disk {
    guest: Guest,
    device: Loop,
    mount: Mount,
}

impl Disk {
    fn new() -> Disk {
        let mount = Mount::new(&["--create", "vm1=64M"]);
        let device = Loop::attach(&mount.flat("vm1"), true);
        ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
        let guest = Guest::mount(device.device(), "noatime");
        Disk { guest, device, mount }
    }

    fn freeze(&self, name: &str) -> Run {
        let image = self.mount.images().join("vm1");
        Run::ploopfs().args(["snapshot", "create", "--freeze", text(&image), name]).limit(60)
    }
}

/// Another file system in a file, over `point`.
fn cover(folder: &Path, point: &Path) -> (Guest, Loop) {
    let file = folder.join("other");
    fs::File::create(&file).and_then(|f| f.set_len(32 << 20)).expect("a file");
    let device = Loop::attach(&file, false);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    ok("mount", &[text(device.device()), text(point)]);
    (Guest::adopt(point), device)
}

#[test]
fn freeze_does_not_take_what_was_mounted_over_the_guests_file_system_for_it() {
    require!("fuse", "loop");
    let disk = Disk::new();
    let folder = temp_dir();
    fs::write(disk.guest.path().join("report"), "in the caches only").expect("a write");
    let (over, device) = cover(folder.path(), disk.guest.path());
    let refused = disk.freeze("s1").status(1);
    assert!(
        refused.stderr.contains("another file system") && refused.stderr.contains("no snapshot"),
        "{refused}"
    );
    let image = disk.mount.images().join("vm1");
    let listed = Run::ploopfs().args(["snapshot", "list", text(&image)]).ok();
    assert!(!listed.contains("s1"), "{listed}");
    over.umount();
    device.detach();
    disk.freeze("s2").status(0);
}

#[test]
fn freeze_reaches_a_covered_file_system_through_its_other_mount() {
    require!("fuse", "loop");
    let disk = Disk::new();
    let folder = temp_dir();
    let second = Guest::mount(disk.device.device(), "noatime");
    let (over, device) = cover(folder.path(), disk.guest.path());
    fs::write(second.path().join("report"), "in the caches only").expect("a write");
    disk.freeze("s1").status(0);
    let shown = Loop::attach(&disk.mount.point().join(".snapshots/vm1/s1.img"), true);
    let past = Guest::mount(shown.device(), "ro,noload");
    assert_eq!(fs::read_to_string(past.path().join("report")).expect("frozen into it"), "in the caches only");
    past.umount();
    shown.detach();
    over.umount();
    device.detach();
}

#[test]
fn freeze_finds_a_btrfs_whose_stat_names_no_device() {
    require!("fuse", "loop", "btrfs");
    let mount = Mount::new(&["--create", "vm1=256M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("mkfs.btrfs", &["-q", "-f", text(device.device())]);
    let guest = Guest::mount(device.device(), "noatime");
    fs::write(guest.path().join("report"), "in the caches only").expect("a write");
    let image = mount.images().join("vm1");
    Run::ploopfs().args(["snapshot", "create", "--freeze", text(&image), "s1"]).ok();
    guest.umount();
    device.detach();
}

#[test]
fn a_device_that_came_through_a_bind_mount_is_one_over_the_image_too() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let folder = temp_dir();
    ok("mount", &["--bind", text(mount.point()), text(folder.path())]);
    let bound = Guest::adopt(folder.path());
    let device = Loop::attach(&folder.path().join("vm1.img"), true);
    let second = Run::ploopfs().arg("attach").arg(mount.flat("vm1")).status(4);
    assert!(second.stderr.contains(text(device.device())), "{second}");
    let info = Run::ploopfs().arg("info").arg(mount.flat("vm1")).ok();
    assert!(info.contains(text(device.device())), "{info}");
    let list = Run::ploopfs().arg("list").arg(mount.images()).ok();
    assert!(list.contains(text(device.device())), "{list}");
    Run::ploopfs().arg("detach").arg(mount.flat("vm1")).ok();
    drop(device);
    bound.umount();
}

#[test]
fn an_image_whose_name_is_no_utf8_is_attached_and_detached() {
    require!("fuse", "loop");
    let name = |ending: &[u8]| PathBuf::from(OsStr::from_bytes(&[&b"caf\xe9"[..], ending].concat()));
    let mut mount = Mount::new(&[]);
    Run::ploopfs().arg("create").arg(mount.images().join(name(b""))).args(["--size", "16M"]).ok();
    let flat = mount.point().join(name(b".img"));
    assert!(common::until(std::time::Duration::from_secs(10), || flat.exists()), "shown");
    let device = PathBuf::from(Run::ploopfs().arg("attach").arg(&flat).ok().trim());
    let busy = Run::ploopfs().arg("umount").arg(mount.point()).status(4);
    assert!(busy.stderr.contains(text(&device)), "{busy}");
    let again = Run::ploopfs().arg("attach").arg(&flat).status(4);
    assert!(again.stderr.contains(text(&device)), "{again}");
    Run::ploopfs().arg("detach").arg(&flat).ok();
    mount.umount();
}

/// Waits until `list` of the folder says `what`.
#[track_caller]
fn lists(mount: &Mount, what: &str) {
    let mut listed = String::new();
    let said = common::until(std::time::Duration::from_secs(20), || {
        listed = Run::ploopfs().arg("list").arg(mount.images()).ok();
        listed.contains(what)
    });
    assert!(said, "{what}: {listed}");
}

#[test]
fn an_open_image_whose_file_was_renamed_is_reached_by_both_names() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    fs::rename(mount.delta("vm1"), mount.delta("web")).expect("renamed");
    lists(&mount, "was renamed to web.hds");
    let web = mount.images().join("web");
    for (image, name) in [(mount.flat("vm1"), "s1"), (web.clone(), "s2")] {
        Run::ploopfs().args(["snapshot", "create"]).arg(&image).arg(name).ok();
        let listed = Run::ploopfs().args(["snapshot", "list"]).arg(&image).ok();
        assert!(listed.contains(name), "{listed}");
    }
    let info = Run::ploopfs().arg("info").arg(mount.flat("vm1")).ok();
    assert!(info.contains(text(device.device())), "{info}");
    // With the last close the new name is the image's.
    device.detach();
    let followed = || mount.flat("web").exists() && !mount.flat("vm1").exists();
    assert!(common::until(std::time::Duration::from_secs(20), followed));
    mount.umount();
    Run::ploopfs().arg("check").arg(web).ok();
}

#[test]
fn an_open_image_whose_file_was_removed_is_listed_and_never_taken_for_the_next_of_its_name() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M", "--create", "vm2=32M"]);
    let (first, second) = (Loop::attach(&mount.flat("vm1"), true), Loop::attach(&mount.flat("vm2"), true));
    fs::remove_file(mount.delta("vm1")).expect("removed");
    lists(&mount, "gone from the folder");
    let info = Run::ploopfs().arg("info").arg(mount.flat("vm1")).ok();
    assert!(info.contains("gone from the folder") && info.contains(text(first.device())), "{info}");
    // Another image takes its file's name.
    fs::rename(mount.delta("vm2"), mount.delta("vm1")).expect("renamed");
    lists(&mount, "was renamed to vm1.hds");
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("s1").ok();
    assert!(mount.point().join(".snapshots/vm2/s1.img").exists(), "taken of the file that is there");
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg("s2").status(1);
    assert!(!mount.point().join(".snapshots/vm2/s2.img").exists(), "of the wrong image");
    first.detach();
    second.detach();
    mount.umount();
}
