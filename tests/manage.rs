//! `mount --manage`: images are made, grown, renamed, removed and cloned through the mount.

mod common;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Mount, Run, ok, read_at, text, until};

const MIB: u64 = 1 << 20;

fn managed(args: &[&str]) -> Mount {
    Mount::new(&[&["--manage"], args].concat())
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.expect_err("must be refused").raw_os_error()
}

/// The folder's names, but for our own.
fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).expect("readdir").flatten();
    let mut names: Vec<String> = names.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name != ".ploopfs" && name != ".snapshots");
    names.sort();
    names
}

fn xattr(path: &Path, name: &str) -> Option<String> {
    let mut value = vec![0; 4096];
    let len = rustix::fs::getxattr(path, CString::new(name).expect("a name").as_c_str(), &mut value).ok()?;
    Some(String::from_utf8(value[..len].to_vec()).expect("text"))
}

#[track_caller]
fn checks_clean(image: &Path) {
    let check = Run::ploopfs().args(["check", "--json"]).arg(image).ok();
    let check: serde_json::Value = serde_json::from_str(&check).expect("JSON");
    assert_eq!((check["errors"].as_u64(), check["leaks"].as_u64()), (Some(0), Some(0)), "{check}");
}

#[test]
fn truncate_of_a_new_file_makes_a_thin_image() {
    require!("fuse");
    let mut mount = managed(&[]);
    let new = mount.flat("new");
    ok("truncate", &["-s", "20G", text(&new)]);
    assert_eq!(fs::metadata(&new).expect("stat").len(), 20 << 30);
    assert!(fs::metadata(mount.delta("new")).expect("the file").blocks() * 512 < 4 * MIB, "it is thin");
    mount.open("new").write_all_at(b"there", 5 << 30).expect("a write");
    mount.umount();
    checks_clean(&mount.delta("new"));
    mount.start();
    assert_eq!(read_at(&mount.open("new"), 5 << 30, 5).expect("a read"), b"there");
}

#[test]
fn fallocate_of_a_new_file_makes_a_thin_image_and_its_handle_goes_on_with_it() {
    require!("fuse");
    let mount = managed(&[]);
    ok("fallocate", &["-l", "1G", text(&mount.flat("new"))]);
    assert_eq!(fs::metadata(mount.flat("new")).expect("stat").len(), 1 << 30);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(mount.flat("other")).expect("created");
    assert_eq!(errno(mount.open("other").write_all_at(b"x", 0)), Some(libc::ENOSPC), "it has no size yet");
    assert_eq!(file.read_at(&mut [0; 8], 0).expect("an empty file"), 0);
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 8 * MIB).expect("a size");
    file.write_all_at(b"mine", MIB).expect("a write through the same handle");
    file.sync_all().expect("a sync");
    assert_eq!(read_at(&file, MIB, 4).expect("a read"), b"mine");
    assert_eq!(read_at(&mount.open("other"), MIB, 4).expect("a read"), b"mine");
}

#[test]
fn a_new_file_is_an_empty_name_until_it_has_a_size_and_nothing_is_on_disk() {
    require!("fuse");
    let mut mount = managed(&[]);
    ok("touch", &[text(&mount.flat("later"))]);
    assert_eq!(names(mount.point()), ["later.img"]);
    assert_eq!(names(mount.images()), [""; 0]);
    let inode = fs::metadata(mount.flat("later")).expect("stat").ino();
    ok("mv", &[text(&mount.flat("later")), text(&mount.flat("soon"))]);
    ok("truncate", &["-s", "8M", text(&mount.flat("soon"))]);
    assert_eq!(fs::metadata(mount.flat("soon")).expect("stat").ino(), inode, "the inode stays");
    assert_eq!(names(mount.images()), ["soon.hds"]);
    ok("touch", &[text(&mount.flat("gone"))]);
    ok("rm", &[text(&mount.flat("gone"))]);
    ok("touch", &[text(&mount.flat("forgotten"))]);
    mount.umount();
    mount.start();
    assert_eq!(names(mount.point()), ["soon.img"]);
}

#[test]
fn only_names_of_images_can_be_made() {
    require!("fuse");
    let mount = managed(&["--create", "vm1=8M"]);
    for name in ["notes.txt", "vm2"] {
        assert_eq!(errno(File::create_new(mount.point().join(name))), Some(libc::EPERM), "{name}");
    }
    for name in ["..img", ".x.img", "a.hdd.img"] {
        let refused = errno(File::create_new(mount.point().join(name)));
        assert!(matches!(refused, Some(libc::EINVAL | libc::EPERM)), "{name}: {refused:?}");
    }
    assert_eq!(errno(fs::create_dir(mount.point().join("a.img"))), Some(libc::EPERM));
    assert_eq!(errno(File::create_new(mount.point().join(".snapshots/a.img"))), Some(libc::EPERM));
    // A damaged image is not shown, and its name is taken all the same.
    fs::write(mount.images().join("bad.hds"), "no image").expect("a file");
    assert_eq!(errno(File::create_new(mount.flat("bad"))), Some(libc::EEXIST));
}

#[test]
fn truncate_makes_a_disk_larger_and_never_smaller() {
    require!("fuse");
    let mut mount = managed(&["--create", "vm1=8M"]);
    mount.open("vm1").write_all_at(b"kept", 7 * MIB).expect("a write");
    ok("truncate", &["-s", "3G", text(&mount.flat("vm1"))]);
    let file = mount.open("vm1");
    assert_eq!(file.metadata().expect("stat").len(), 3 << 30);
    file.write_all_at(b"more", 2 << 30).expect("a write into the new part");
    for size in [0, MIB, (3 << 30) - 1] {
        assert_eq!(errno(file.set_len(size)), Some(libc::EPERM), "to {size} bytes");
    }
    assert_eq!(
        errno(OpenOptions::new().write(true).truncate(true).open(mount.flat("vm1"))),
        Some(libc::EPERM)
    );
    drop(file);
    mount.umount();
    let log = fs::read_to_string(mount.images().join(".ploopfs/log")).expect("the log");
    assert!(log.contains("would cut off what the guest keeps there"), "{log}");
    checks_clean(&mount.delta("vm1"));
    mount.set_args(&[]);
    mount.start();
    assert_eq!(read_at(&mount.open("vm1"), 7 * MIB, 4).expect("a read"), b"kept");
}

#[test]
fn mv_renames_an_image_and_never_replaces_one() {
    require!("fuse");
    let mut mount = managed(&["--create", "vm1=8M", "--create", "vm2=8M"]);
    mount.open("vm1").write_all_at(b"first", 0).expect("a write");
    let inode = fs::metadata(mount.flat("vm1")).expect("stat").ino();
    assert_eq!(errno(fs::rename(mount.flat("vm1"), mount.flat("vm2"))), Some(libc::EEXIST));
    ok("mv", &[text(&mount.flat("vm1")), text(&mount.flat("web"))]);
    assert_eq!(names(mount.point()), ["vm2.img", "web.img"]);
    assert_eq!(names(mount.images()), ["vm2.hds", "web.hds"]);
    assert_eq!(fs::metadata(mount.flat("web")).expect("stat").ino(), inode, "the inode stays");
    assert_eq!(read_at(&mount.open("web"), 0, 5).expect("a read"), b"first");
    // With snapshots it is a folder.
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("web")).arg("one").ok();
    ok("mv", &[text(&mount.flat("web")), text(&mount.flat("www"))]);
    assert_eq!(names(mount.images()), ["vm2.hds", "www"]);
    let snapshot = mount.point().join(".snapshots/www/one.img");
    assert_eq!(read_at(&File::open(snapshot).expect("the snapshot"), 0, 5).expect("a read"), b"first");
    mount.umount();
    checks_clean(&mount.images().join("www"));
}

#[test]
fn an_image_in_use_is_neither_renamed_nor_removed() {
    require!("fuse");
    let mount = managed(&["--create", "vm1=8M"]);
    let file = mount.open("vm1");
    file.write_all_at(b"used", 0).expect("a write");
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EBUSY));
    assert_eq!(errno(fs::rename(mount.flat("vm1"), mount.flat("vm2"))), Some(libc::EBUSY));
    file.write_all_at(b"goes on", 0).expect("a write");
    drop(file);
    assert_eq!(read_at(&mount.open("vm1"), 0, 7).expect("it is in service again"), b"goes on");
}

#[test]
fn an_image_whose_snapshot_is_open_or_on_which_another_stands_is_not_removed() {
    require!("fuse");
    let mount = managed(&["--create", "vm1=8M"]);
    mount.open("vm1").write_all_at(b"base", 0).expect("a write");
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("one").ok();
    let snapshot = File::open(mount.point().join(".snapshots/vm1/one.img")).expect("the snapshot");
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EBUSY));
    assert_eq!(read_at(&snapshot, 0, 4).expect("a read"), b"base");
    drop(snapshot);
    // Another image's descriptor names a file of this one.
    let other = mount.images().join("vm9");
    fs::create_dir(&other).expect("a folder");
    let xml = fs::read_to_string(mount.images().join("vm1/DiskDescriptor.xml")).expect("the descriptor");
    fs::write(other.join("DiskDescriptor.xml"), xml.replace("<File>", "<File>../vm1/"))
        .expect("a descriptor");
    Run::ploopfs().arg("mount").arg(mount.images()).arg(mount.point()).ok();
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EBUSY));
    fs::remove_dir_all(&other).expect("removed");
    Run::ploopfs().arg("mount").arg(mount.images()).arg(mount.point()).ok();
    assert!(
        until(Duration::from_secs(5), || fs::remove_file(mount.flat("vm1")).is_ok()),
        "nobody uses it now"
    );
    assert_eq!(names(mount.images()), [""; 0]);
}

#[test]
fn rm_removes_an_image_also_right_after_its_last_close() {
    require!("fuse");
    let mount = managed(&[]);
    for round in 0..10 {
        let flat = mount.flat("vm1");
        ok("truncate", &["-s", "8M", text(&flat)]);
        mount.open("vm1").write_all_at(&[round; 4096], 0).expect("a write");
        ok("rm", &[text(&flat)]);
        assert_eq!(names(mount.images()), [""; 0]);
    }
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::ENOENT));
}

#[test]
fn files_in_an_image_s_folder_that_are_not_its_own_keep_it_from_being_removed() {
    require!("fuse");
    let mount = managed(&["--create", "vm1=8M"]);
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("one").ok();
    let notes = mount.images().join("vm1/notes.txt");
    fs::write(&notes, "dear diary").expect("a file");
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EBUSY));
    assert_eq!(fs::read_to_string(&notes).expect("there"), "dear diary");
    fs::remove_file(&notes).expect("removed");
    ok("rm", &[text(&mount.flat("vm1"))]);
    assert_eq!(names(mount.images()), [""; 0]);
}

/// Where the image that is copied has data: more than 4 GiB lie between.
const WRITTEN: [u64; 4] = [0, 64 * MIB, (5 << 30) + 4096, (6 << 30) - 4096];

/// The image `vm1` with data at its begin, in the middle and at its end.
fn with_data() -> Mount {
    let mount = managed(&["--create", "vm1=6G"]);
    let file = mount.open("vm1");
    for at in WRITTEN {
        file.write_all_at(&[at as u8 | 7; 4096], at).expect("a write");
    }
    mount
}

/// Around all that `with_data` has written.
#[track_caller]
fn same_content(a: &Path, b: &Path) {
    let (a, b) = (File::open(a).expect("opens"), File::open(b).expect("opens"));
    assert_eq!(a.metadata().expect("stat").len(), b.metadata().expect("stat").len());
    for at in WRITTEN {
        let from = at.saturating_sub(MIB);
        let len = (2 * MIB).min((6 << 30) - from) as usize;
        let theirs = read_at(&b, from, len).expect("a read");
        assert!(read_at(&a, from, len).expect("a read") == theirs, "around byte {at}");
    }
}

/// What `cp` does where it copies with copy_file_range (coreutils 9.1: files without holes alone).
#[track_caller]
fn copy(from: &Path, to: &Path) {
    let source = File::open(from).expect("the source");
    let target = OpenOptions::new().write(true).create_new(true).open(to).expect("created");
    let len = source.metadata().expect("stat").len() as usize;
    while rustix::fs::copy_file_range(&source, None, &target, None, len).expect("copied") > 0 {}
}

#[test]
fn a_file_that_is_copied_in_becomes_an_image_as_large_as_it_is() {
    require!("fuse");
    let mut mount = with_data();
    // cp reads and writes where there are holes, if it is older.
    ok("cp", &[text(&mount.flat("vm1")), text(&mount.flat("vm2"))]);
    same_content(&mount.flat("vm1"), &mount.flat("vm2"));
    let aside = common::temp_dir();
    let outside = aside.path().join("disk");
    let file = File::create(&outside).expect("a file");
    file.write_all_at(&[5; 8192], 3 * MIB).expect("a write");
    // A hole at the end, which is no whole cluster.
    file.set_len(10 * MIB + 512).expect("a size");
    ok("cp", &[text(&outside), text(&mount.flat("vm3"))]);
    let shown = mount.open("vm3");
    assert_eq!(shown.metadata().expect("stat").len(), 11 * MIB);
    assert_eq!(read_at(&shown, 3 * MIB, 8192).expect("a read"), vec![5; 8192]);
    assert_eq!(errno(shown.write_all_at(b"x", 11 * MIB)), Some(libc::ENOSPC), "only the handle that made it");
    drop(shown);
    mount.umount();
    checks_clean(&mount.delta("vm3"));
}

#[test]
fn cp_makes_a_clone_in_no_time() {
    require!("fuse");
    let mut mount = with_data();
    copy(&mount.flat("vm1"), &mount.flat("vm2"));
    same_content(&mount.flat("vm1"), &mount.flat("vm2"));
    assert_eq!(
        xattr(&mount.flat("vm2"), "user.ploopfs.levels").as_deref(),
        Some("2"),
        "a clone stands on a frozen delta"
    );
    assert_eq!(mount.stats()["images"]["vm2"]["writes"].as_u64(), Some(0), "nothing was copied");
    // They are two disks.
    mount.open("vm2").write_all_at(b"only the clone", 0).expect("a write");
    assert_eq!(read_at(&mount.open("vm1"), 0, 4).expect("a read"), [7; 4]);
    let snapshot = fs::read_dir(mount.point().join(".snapshots/vm1")).expect("readdir").flatten().next();
    let snapshot: PathBuf = snapshot.expect("the clone stands on it").path();
    copy(&snapshot, &mount.flat("vm3"));
    same_content(&snapshot, &mount.flat("vm3"));
    mount.umount();
    for image in ["vm1", "vm2", "vm3"] {
        checks_clean(&mount.images().join(image));
    }
}

#[test]
fn a_copy_that_does_not_begin_at_0_or_goes_into_a_file_that_was_there_copies() {
    require!("fuse");
    let mount = with_data();
    let source = mount.open("vm1");
    // A file that somebody else has made.
    ok("touch", &[text(&mount.flat("vm2"))]);
    let target = mount.open("vm2");
    let copied = rustix::fs::copy_file_range(&source, None, &target, None, 8 << 20).expect("copied");
    assert!(copied > 0, "{copied} bytes");
    assert_eq!(xattr(&mount.flat("vm2"), "user.ploopfs.format").as_deref(), Some("ploop"), "no clone");
    assert_eq!(read_at(&target, 0, 4).expect("a read"), [7; 4]);
    assert_eq!(read_at(&target, 64 * MIB, 4).expect("a read"), [0; 4], "not asked for");
    // Not from the beginning.
    let target =
        OpenOptions::new().read(true).write(true).create_new(true).open(mount.flat("vm3")).expect("created");
    let (mut from, mut to) = (64 * MIB, 64 * MIB);
    rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), 4096).expect("copied");
    assert_eq!(read_at(&target, 64 * MIB, 4).expect("a read"), [(64 * MIB) as u8 | 7; 4]);
    assert_eq!(read_at(&target, 0, 4).expect("a read"), [0; 4], "not asked for");
    assert_eq!(target.metadata().expect("stat").len(), 6 << 30, "as large as what it is a copy of");
}

#[test]
fn a_clone_that_was_written_meanwhile_is_copied_on() {
    require!("fuse");
    let mount = with_data();
    let source = mount.open("vm1");
    let target =
        OpenOptions::new().read(true).write(true).create_new(true).open(mount.flat("vm2")).expect("created");
    let (mut from, mut to) = (0, 0);
    rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), 4096).expect("the clone");
    assert_eq!(xattr(&mount.flat("vm2"), "user.ploopfs.format").as_deref(), Some("layered"));
    mount.open("vm2").write_all_at(b"mine", 64 * MIB).expect("a write by somebody else");
    let (mut from, mut to) = (64 * MIB, 64 * MIB);
    rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), 4096).expect("copied");
    assert_eq!(read_at(&target, 64 * MIB, 4).expect("a read"), [(64 * MIB) as u8 | 7; 4]);
}

#[test]
fn extended_attributes_tell_what_an_image_is_and_cannot_be_changed() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    mount.open("vm1").write_all_at(&[1; 4096], 0).expect("a write");
    assert_eq!(xattr(&flat, "user.ploopfs.source").as_deref(), Some(text(&mount.delta("vm1"))));
    assert_eq!(xattr(&flat, "user.ploopfs.format").as_deref(), Some("ploop"));
    assert_eq!(xattr(&flat, "user.ploopfs.levels").as_deref(), Some("1"));
    let allocated: u64 = xattr(&flat, "user.ploopfs.allocated").expect("there").parse().expect("a number");
    assert!((4096..4 * MIB).contains(&allocated), "{allocated}");
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("one").ok();
    assert_eq!(xattr(&flat, "user.ploopfs.format").as_deref(), Some("layered"));
    assert_eq!(xattr(&flat, "user.ploopfs.levels").as_deref(), Some("2"));
    let snapshot = mount.point().join(".snapshots/vm1/one.img");
    assert_eq!(xattr(&snapshot, "user.ploopfs.levels").as_deref(), Some("1"));
    assert_eq!(xattr(&flat, "user.ploopfs.none"), None);
    assert_eq!(xattr(mount.point(), "user.ploopfs.format"), None);
    let mut list = vec![0; 4096];
    let len = rustix::fs::listxattr(&flat, &mut list).expect("a list");
    let list = String::from_utf8(list[..len].to_vec()).expect("text");
    assert_eq!(list.split_terminator('\0').count(), 4, "{list}");
    let name = CString::new("user.ploopfs.format").expect("a name");
    let path = CString::new(flat.as_os_str().as_bytes()).expect("a path");
    let set = rustix::fs::setxattr(&path, &name, b"raw", rustix::fs::XattrFlags::empty());
    assert!(set.is_err() && rustix::fs::removexattr(&path, &name).is_err());
}

#[test]
fn a_read_only_mount_makes_renames_and_removes_nothing() {
    require!("fuse");
    let mut mount = managed(&["--create", "vm1=8M"]);
    mount.umount();
    mount.set_args(&["--manage", "-r"]);
    mount.start();
    assert_eq!(errno(File::create_new(mount.flat("vm2"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EROFS));
    assert_eq!(errno(fs::rename(mount.flat("vm1"), mount.flat("vm2"))), Some(libc::EROFS));
    assert_eq!(names(mount.images()), ["vm1.hds"]);
}

#[test]
fn tools_that_keep_mode_and_owner_copy_a_disk_in_without_an_error() {
    require!("fuse");
    let mount = managed(&["--create", "vm1=4M"]);
    let work = common::temp_dir();
    let disk = work.path().join("disk.img");
    fs::write(&disk, vec![0xA5; 4 << 20]).expect("written");
    ok("chmod", &["640", text(&disk)]);
    let rights = |path: &Path| {
        let meta = fs::metadata(path).expect("stat");
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    let to = |name| text(&mount.flat(name)).to_owned();
    ok("cp", &["-p", text(&disk), &to("p")]);
    ok("cp", &["-a", text(&disk), &to("a")]);
    ok("install", &["-m", "604", text(&disk), &to("i")]);
    let tar = format!("tar -C {} -cf - disk.img | tar -C {} -xpf -", text(work.path()), text(mount.point()));
    common::sh(&tar);
    for name in ["p", "a", "disk"] {
        assert_eq!(rights(&mount.flat(name)).0, 0o640, "{name}");
        // They are those of the image's file, and so outlive the mount.
        assert_eq!(rights(&mount.delta(name)).0, 0o640, "{name}");
    }
    assert_eq!(rights(&mount.delta("i")).0, 0o604);
    for name in ["p", "a", "i", "disk"] {
        assert!(fs::read(&disk).expect("read") == fs::read(mount.flat(name)).expect("read"), "{name}");
    }
    if rustix::process::geteuid().is_root() {
        ok("chown", &["64055:106", &to("vm1")]);
        assert_eq!(rights(&mount.flat("vm1")), rights(&mount.delta("vm1")));
        assert_eq!((rights(&mount.flat("vm1")).1, rights(&mount.flat("vm1")).2), (64055, 106));
    }
    // Of an image with snapshots: its top file, and not those below.
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg("s1").ok();
    let below = rights(&mount.point().join(".snapshots/vm1/s1.img"));
    ok("chmod", &["600", &to("vm1")]);
    ok("chmod", &["644", &to("vm1")]);
    assert_eq!(rights(&mount.flat("vm1")).0, 0o644);
    assert_eq!(rights(&mount.point().join(".snapshots/vm1/s1.img")), below);
    let refused = Run::new("chmod").args(["4755", &to("vm1")]).run();
    assert!(!refused.success(), "{refused}");
}

#[test]
fn a_file_that_rsync_copies_in_has_its_name_when_it_is_whole() {
    require!("fuse");
    let mount = managed(&[]);
    let unfinished = mount.point().join(".new.img.AbC123");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&unfinished).expect("made");
    let data = vec![0x5A; 2 << 20];
    for (n, part) in data.chunks(256 << 10).enumerate() {
        file.write_all_at(part, (n as u64) * (256 << 10)).expect("a write");
    }
    drop(file);
    ok("chmod", &["640", text(&unfinished)]);
    fs::rename(&unfinished, mount.flat("new")).expect("renamed");
    assert!(fs::read(mount.flat("new")).expect("read") == data);
    assert_eq!(fs::metadata(mount.delta("new")).expect("stat").mode() & 0o777, 0o640);
    assert_eq!(names(mount.point()), ["new.img"]);
    // No other hidden name can be made.
    assert_eq!(errno(File::create(mount.point().join(".new.img.tmp"))), Some(libc::EPERM));
}

#[test]
fn an_image_is_made_also_while_other_files_come_and_go_in_the_folder() {
    require!("fuse");
    let mount = managed(&[]);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::SeqCst) {
                let notes = mount.images().join("notes");
                fs::write(&notes, "").and_then(|()| fs::remove_file(&notes)).expect("of our own");
            }
        });
        let made: Vec<_> = (0..20)
            .map(|n| Run::new("truncate").args(["-s", "1G"]).arg(mount.flat(&format!("n{n}"))).run())
            .collect();
        over.store(true, std::sync::atomic::Ordering::SeqCst);
        for made in made {
            assert!(made.success(), "{made}");
        }
    });
    assert_eq!(names(mount.point()).len(), 20);
}
