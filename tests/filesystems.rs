//! The main job: a file system on a loop device over an image, with a real tree in it, and QEMU's verdict at the end.

mod common;

use std::path::Path;

use common::{Guest, Loop, Mount, Run, heavy, ok, temp_dir, text};

/// The tree that is copied: what this repository and the system have, real names, links, modes and sizes.
fn make_tree(folder: &Path) {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (number, source) in [own.join("src"), own.join("tests"), "/etc".into(), "/usr/lib/git-core".into()]
        .iter()
        .filter(|source| source.is_dir())
        .enumerate()
    {
        ok("cp", &["-a", text(source), text(&folder.join(number.to_string()))]);
    }
    ok("cp", &[env!("CARGO_BIN_EXE_ploopfs"), text(&folder.join("binary"))]);
    // Holes and odd tails too.
    let sparse = std::fs::File::create(folder.join("sparse")).expect("a file");
    sparse.set_len(40_000_001).expect("a sparse file");
}

fn a_file_system_holds_a_tree(kind: &str, direct: bool) {
    let _turn = heavy();
    let tree = temp_dir();
    make_tree(tree.path());
    let mut mount = Mount::new(&["--create", "vm1=2G"]);
    let device = Loop::attach(&mount.flat("vm1"), direct);
    let force = if kind == "ext4" { "-F" } else { "-f" };
    Run::new(format!("mkfs.{kind}")).args(["-q", force]).arg(device.device()).ok();

    let guest = Guest::mount(device.device(), "noatime");
    ok("cp", &["-a", text(tree.path()), text(&guest.path().join("copy"))]);
    guest.umount();
    device.detach();

    // A fresh loop device has nothing cached: what is compared comes from the image.
    let device = Loop::attach(&mount.flat("vm1"), direct);
    let guest = Guest::mount(device.device(), "noatime");
    // Sockets and the like in /etc are no files to compare.
    let differences = Run::new("diff").args(["-r", "--no-dereference"]).arg(tree.path());
    differences.arg(guest.path().join("copy")).limit(300).ok();
    guest.umount();
    match kind {
        "ext4" => Run::new("e2fsck").args(["-f", "-n"]).arg(device.device()).ok(),
        "xfs" => Run::new("xfs_repair").arg("-n").arg(device.device()).ok(),
        _ => Run::new("btrfs").args(["check", "--readonly"]).arg(device.device()).ok(),
    };
    device.detach();
    mount.umount();

    // 3 would be leaks: an image closed by us has none.
    let delta = mount.delta("vm1");
    let verdict = Run::new("qemu-img").args(["check", "-f", "parallels"]).arg(&delta).ok();
    assert!(verdict.contains("No errors were found"), "{verdict}");
    assert!(!common::marked_in_use(&delta));
    assert!(common::allocated(&delta) < 1 << 30, "a thin image takes what was written, not its size");
}

#[test]
fn ext4_with_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu");
    a_file_system_holds_a_tree("ext4", true);
}

#[test]
fn ext4_without_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu");
    a_file_system_holds_a_tree("ext4", false);
}

#[test]
fn xfs_with_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu", "xfs");
    a_file_system_holds_a_tree("xfs", true);
}

#[test]
fn xfs_without_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu", "xfs");
    a_file_system_holds_a_tree("xfs", false);
}

#[test]
fn btrfs_with_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu", "btrfs");
    a_file_system_holds_a_tree("btrfs", true);
}

#[test]
fn btrfs_without_direct_io_holds_a_tree_and_qemu_finds_no_leak() {
    require!("fuse", "loop", "qemu", "btrfs");
    a_file_system_holds_a_tree("btrfs", false);
}
