//! An images folder that was renamed under its mount, with or without another folder in its place: commands given the
//! mount's path reach the folder that is mounted there, and no other.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Run};

/// A mount whose images folder was renamed, and another folder with an image of the same name has its path; what is
/// written in vm1 of the two is "old" and "new".
fn renamed_under_its_mount(args: &[&str]) -> (Mount, Mount) {
    let old = Mount::new(&[args, &["--create", "vm1=8M"]].concat());
    old.open("vm1").write_all_at(b"old", 0).expect("written");
    fs::rename(old.images(), old.images().with_extension("renamed")).expect("renamed");
    let new = Mount::over(old.images(), &["--create", "vm1=8M"]);
    new.open("vm1").write_all_at(b"new", 0).expect("written");
    (old, new)
}

#[test]
fn the_image_of_a_mount_is_not_looked_for_in_another_folder_that_has_the_path_of_its_own_by_now() {
    require!("fuse");
    let (mut old, mut new) = renamed_under_its_mount(&["--no-sandbox"]);
    let out = old.images().with_extension("raw");
    Run::ploopfs().arg("export").args([&old.flat("vm1"), &out]).ok();
    let content = fs::read(&out).expect("exported");
    assert!(content.starts_with(b"old"), "exported: {:?}", String::from_utf8_lossy(&content[..3]));
    Run::ploopfs().args(["snapshot", "create"]).arg(old.flat("vm1")).arg("of-old").ok();
    assert!(!new.images().join("vm1").exists(), "the snapshot was made in the other folder");
    let listed = |shown: &Path| Run::ploopfs().args(["snapshot", "list"]).arg(shown).ok();
    assert!(listed(&old.flat("vm1")).contains("of-old"));
    assert!(!listed(&new.flat("vm1")).contains("of-old"));
    for mount in [&mut old, &mut new] {
        let done = Run::ploopfs().arg("umount").arg(mount.point()).limit(60).run();
        assert!(done.success(), "{done}");
    }
}

#[test]
fn what_is_made_through_a_mount_is_not_made_in_another_folder_that_has_the_path_of_its_own_by_now() {
    require!("fuse");
    let (old, new) = renamed_under_its_mount(&["--no-sandbox", "--manage"]);
    let made = Run::new("truncate").args(["-s", "8M"]).arg(old.flat("vm2")).run();
    assert!(!made.success(), "{made}");
    assert!(!new.images().join("vm2.hds").exists(), "it was made in the other folder");
}

#[test]
fn a_mount_whose_images_folder_was_renamed_is_listed_and_unmounted_as_before() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=8M"]);
    fs::rename(mount.images(), mount.images().with_extension("renamed")).expect("renamed");
    let listed = Run::ploopfs().arg("list").arg(mount.point()).ok();
    assert!(listed.contains("vm1"), "{listed}");
    let done = Run::ploopfs().arg("umount").arg(mount.point()).limit(60).run();
    assert!(done.success(), "{done}");
}
