//! Snapshots over a raw file, and what becomes of that file when they go: at rest, with the real binary, and under a mount.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Folder, HostFs, Mount, Run, read_at, signal, temp_dir, text, until};
use ploopfs::disk::open::OpenDisk;
use ploopfs::io::real::Access;
use ploopfs::vdisk::{Image, Options};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
/// Long for a busy 2-core machine, short for a hang.
const SOON: Duration = Duration::from_secs(20);

/// A folder with the raw image `r` of so many MiB, each of its own byte, and those bytes.
fn raw(mib: u64) -> (Folder, Vec<u8>) {
    let folder = Folder::new();
    let bytes: Vec<u8> = (1..=mib).flat_map(|n| vec![n as u8; MIB as usize]).collect();
    fs::write(folder.path("r.raw"), &bytes).expect("a raw image");
    (folder, bytes)
}

/// Changes the image at `path`, at rest.
#[track_caller]
fn change<T>(path: &Path, change: impl FnOnce(&std::sync::Arc<Image>) -> ploopfs::Result<T>) {
    let opened = OpenDisk::open(path, None, Access::ReadWrite, Options::default()).expect("opens");
    opened.image.make_writable().and_then(|()| change(&opened.image)).expect("changed");
    opened.close().expect("closes");
}

/// The content of the image, or of a snapshot of it.
#[track_caller]
fn content(folder: &Folder, image: &str) -> Vec<u8> {
    folder.ok(&["export", image, "out"]);
    let bytes = fs::read(folder.path("out")).expect("read");
    fs::remove_file(folder.path("out")).expect("removed");
    bytes
}

/// The image `r` is a folder, with so many files of deltas in it.
#[track_caller]
fn assert_folder(folder: &Folder, deltas: usize) {
    assert!(!folder.path("r.raw").exists());
    let names =
        folder.path("r").read_dir().expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    let found = names.iter().filter(|name| name.starts_with("r.")).count();
    assert_eq!(found, deltas, "{names:?}");
    folder.ok(&["check", "r"]);
}

#[test]
fn a_snapshot_below_another_goes_down_into_the_raw_file_which_is_the_other_s_then() {
    let (folder, mut bytes) = raw(8);
    for (n, name) in ["s1", "s2"].into_iter().enumerate() {
        folder.ok(&["snapshot", "create", "r", name]);
        change(&folder.path("r"), |image| image.write_at(n as u64 * MIB, &[0xe0 + n as u8; 4096]));
    }
    bytes[..4096].fill(0xe0);
    let then = bytes.clone();
    bytes[MIB as usize..][..4096].fill(0xe1);
    let said = folder.run(&["snapshot", "delete", "r", "s1"]);
    assert!(said.success() && said.output().is_empty(), "{said}");
    assert_folder(&folder, 2);
    assert!(fs::read(folder.path("r/r.raw")).expect("the base") == then, "not what s2 was");
    assert!(content(&folder, "r@s2") == then && content(&folder, "r") == bytes);
    folder.ok(&["snapshot", "delete", "r", "s2"]);
    assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes);
}

/// A cluster of the delta that is a hole hides what the base has there.
#[test]
fn what_was_discarded_since_the_snapshot_is_zero_in_the_raw_file() {
    let (folder, mut bytes) = raw(8);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    change(&folder.path("r"), |image| {
        image.discard_at(2 * MIB, MIB)?;
        image.discard_at(5 * MIB + 4096, 8192)?;
        image.write_at(7 * MIB, &[0xee; 512])
    });
    bytes[2 * MIB as usize..3 * MIB as usize].fill(0);
    bytes[5 * MIB as usize + 4096..][..8192].fill(0);
    bytes[7 * MIB as usize..][..512].fill(0xee);
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes);
    let taken = folder.path("r.raw").metadata().expect("there").blocks() * 512;
    assert!(taken <= 7 * MIB, "what was discarded still takes space: {taken} bytes");
}

#[test]
fn a_disk_that_has_grown_since_the_snapshot_keeps_its_size() {
    let (folder, mut bytes) = raw(4);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    folder.ok(&["resize", "r", "6M"]);
    change(&folder.path("r"), |image| image.write_at(6 * MIB - 512, &[0xee; 512]));
    bytes.resize(6 * MIB as usize, 0);
    bytes[6 * MIB as usize - 512..].fill(0xee);
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes);
}

/// R9: what has the file under another name must not see what was written since.
#[test]
fn a_raw_file_that_another_image_has_too_is_not_changed() {
    let (folder, mut bytes) = raw(4);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    fs::hard_link(folder.path("r/r.raw"), folder.path("other")).expect("a link");
    change(&folder.path("r"), |image| image.write_at(0, &[0xee; 4096]));
    let said = folder.run(&["snapshot", "delete", "r", "s1"]);
    assert!(said.success() && said.stderr.contains("are copied"), "{said}");
    assert!(fs::read(folder.path("other")).expect("the other's") == bytes, "changed under another image");
    assert_folder(&folder, 1);
    bytes[..4096].fill(0xee);
    assert!(content(&folder, "r") == bytes);
}

/// A raw file has no place for the bitmap.
#[test]
fn a_disk_whose_changes_are_tracked_goes_on_being_tracked() {
    let (folder, mut bytes) = raw(4);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    let name = folder.ok(&["cbt", "start", "r"]);
    change(&folder.path("r"), |image| image.write_at(0, &[0xee; 4096]));
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    bytes[..4096].fill(0xee);
    assert!(content(&folder, "r") == bytes);
    assert!(folder.ok(&["cbt", "show", "r"]).contains(name.trim_end()), "no longer tracked");
}

#[test]
fn a_file_in_the_way_of_the_raw_one_stays_and_the_image_stays_in_its_folder() {
    let (folder, mut bytes) = raw(4);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    change(&folder.path("r"), |image| image.write_at(0, &[0xee; 4096]));
    fs::write(folder.path("r.raw"), "another's").expect("written");
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    assert_eq!(fs::read(folder.path("r.raw")).expect("read"), b"another's");
    fs::remove_file(folder.path("r.raw")).expect("removed");
    assert_folder(&folder, 1);
    bytes[..4096].fill(0xee);
    assert!(content(&folder, "r") == bytes);
    // The next one finds the way free.
    folder.ok(&["snapshot", "create", "r", "s2"]);
    folder.ok(&["snapshot", "delete", "r", "s2"]);
    assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes);
}

/// A crash had left it beside the folder: the raw file counted as another image's, too, and was an image of the same name when
/// the folder had another file.
#[test]
fn a_second_name_that_an_interrupted_step_left_is_no_other_image() {
    let (folder, mut bytes) = raw(4);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    change(&folder.path("r"), |image| image.write_at(0, &[0xee; 4096]));
    fs::hard_link(folder.path("r/r.raw"), folder.path("r.raw")).expect("a link");
    fs::create_dir(folder.path(".r.removed")).expect("a folder");
    fs::hard_link(folder.path("r/r.raw"), folder.path(".r.removed/r.raw")).expect("a link");
    fs::write(folder.path(".r.removed/DiskDescriptor.xml"), "x").expect("written");
    folder.ok(&["snapshot", "create", "r", "s2"]);
    assert_eq!(folder.names(), ["r"]);
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    folder.ok(&["snapshot", "delete", "r", "s2"]);
    bytes[..4096].fill(0xee);
    assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes && !folder.path("r").exists());
}

/// The last step of the first snapshot was not done. Merged the other way, the file was an image beside the folder.
#[test]
fn a_second_name_that_an_interrupted_first_snapshot_left_goes_too() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    folder.ok(&["snapshot", "create", "vm", "s1"]);
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("vm.hds")).expect("a link");
    change(&folder.path("vm"), |image| image.write_at(0, &[0xee; 4096]));
    folder.ok(&["snapshot", "delete", "vm", "s1"]);
    assert_eq!(folder.names(), ["vm"]);
    assert_eq!(content(&folder, "vm")[..4097], [&[0xee; 4096][..], &[0]].concat());
}

#[test]
fn other_files_in_the_image_s_folder_keep_it() {
    let (folder, bytes) = raw(2);
    folder.ok(&["snapshot", "create", "r", "s1"]);
    fs::write(folder.path("r/notes"), "mine").expect("written");
    folder.ok(&["snapshot", "delete", "r", "s1"]);
    assert_eq!(fs::read(folder.path("r/notes")).expect("read"), b"mine");
    assert!(content(&folder, "r") == bytes);
}

/// `snapshot delete r s1`, slowly; nothing of it is shown.
fn slowly(image: &Path, rate: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
    command.args(["snapshot", "delete", "--rate", rate]).arg(image).arg("s1");
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("ploopfs")
}

/// True when the raw file `base` has begun to take the delta's data.
fn has_begun(base: &Path) -> bool {
    until(SOON, || fs::File::open(base).is_ok_and(|file| read_at(&file, 0, 1).is_ok_and(|b| b == [0xee])))
}

/// The name was gone, so that nothing but a mount went on with it; and it was said that all was merged.
#[test]
fn a_merge_that_was_interrupted_or_killed_goes_on_when_the_command_is_given_again() {
    for how in [Signal::INT, Signal::KILL] {
        let (folder, mut bytes) = raw(16);
        folder.ok(&["snapshot", "create", "r", "s1"]);
        change(&folder.path("r"), |image| image.write_at(0, &vec![0xee; 6 * MIB as usize]));
        bytes[..6 * MIB as usize].fill(0xee);
        let client = slowly(&folder.path("r"), "512K");
        assert!(has_begun(&folder.path("r/r.raw")), "nothing is copied");
        signal(client.id(), how);
        let done = client.wait_with_output().expect("its end");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success(), "{said}");
        assert!(how == Signal::KILL || said.contains("snapshot delete") && said.contains("s1"), "{said}");
        assert!(content(&folder, "r") == bytes, "the disk has changed");
        folder.fails(1, &["export", "r@s1", "out"]);
        folder.ok(&["snapshot", "delete", "r", "s1"]);
        assert!(fs::read(folder.path("r.raw")).expect("a raw file again") == bytes);
        folder.fails(1, &["snapshot", "delete", "r", "s1"]);
    }
}

#[test]
fn a_host_that_is_full_in_the_middle_loses_nothing_and_the_next_attempt_goes_on() {
    require!("loop", "ext4");
    let host = HostFs::new("ext4", 96 * MIB);
    let path = |name: &str| host.path().join(name);
    let run = |args: &[&str]| Run::ploopfs().args(args).in_folder(host.path()).limit(60).run();
    // Holes where the delta has its data: the raw file needs as much again.
    let mut bytes = vec![0; 40 << 20];
    bytes[24 << 20..].fill(7);
    let file = fs::File::create(path("r.raw")).expect("a raw image");
    file.set_len(40 * MIB).and_then(|()| file.write_all_at(&bytes[24 << 20..], 24 * MIB)).expect("written");
    drop(file);
    assert!(run(&["snapshot", "create", "r", "s1"]).success());
    change(&path("r"), |image| image.write_at(0, &vec![0xee; 12 << 20]));
    bytes[..12 << 20].fill(0xee);
    let free = || rustix::fs::statvfs(host.path()).map(|s| s.f_bavail * s.f_frsize).expect("statvfs");
    let filler = fs::File::create(path("filler")).expect("the filler");
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, free() - 4 * MIB).expect("filled");
    let said = run(&["snapshot", "delete", "r", "s1"]);
    assert!(!said.success() && said.stderr.contains("No space"), "{said}");
    drop(filler);
    fs::remove_file(path("filler")).expect("space");
    let elsewhere = temp_dir();
    let out = elsewhere.path().join("out");
    assert!(run(&["export", "r", text(&out)]).success());
    assert!(fs::read(out).expect("read") == bytes, "the disk has changed");
    let said = run(&["snapshot", "delete", "r", "s1"]);
    assert!(said.success(), "{said}");
    assert!(fs::read(path("r.raw")).expect("a raw file again") == bytes);
}

/// A mounted raw image of 16 MiB with the snapshot s1, of which 6 MiB have changed since; and its content.
fn mounted(folder: &Path) -> (Mount, PathBuf, Vec<u8>) {
    let images = folder.join("images");
    fs::create_dir(&images).expect("a folder");
    let mut bytes: Vec<u8> = (1..=16u8).flat_map(|n| vec![n; MIB as usize]).collect();
    fs::write(images.join("vm1.raw"), &bytes).expect("a raw image");
    let mount = Mount::over(&images, &[]);
    Run::ploopfs().args(["snapshot", "create", text(&mount.flat("vm1")), "s1"]).ok();
    bytes[..6 * MIB as usize].fill(0xee);
    let open = mount.open("vm1");
    open.write_all_at(&bytes[..6 * MIB as usize], 0).and_then(|()| open.sync_all()).expect("written");
    (mount, images, bytes)
}

#[test]
fn who_opens_the_disk_during_the_merge_waits_little_and_finds_it_whole() {
    require!("fuse");
    let folder = temp_dir();
    let (mount, images, bytes) = mounted(folder.path());
    // Whole, it would take a minute.
    let mut client = slowly(&images.join("vm1"), "100K");
    assert!(has_begun(&images.join("vm1/vm1.raw")), "nothing is copied");
    let begun = std::time::Instant::now();
    let open = mount.open("vm1");
    assert!(begun.elapsed() < SOON, "the open waited for {:?}", begun.elapsed());
    open.write_all_at(&[0xdd; 512], 8 * MIB).expect("a write");
    assert_eq!(read_at(&open, 0, 6 * MIB as usize).expect("reads"), bytes[..6 * MIB as usize]);
    assert_eq!(read_at(&open, 8 * MIB, 513).expect("reads")[511..], [0xdd, 9]);
    drop(open);
    signal(client.id(), Signal::INT);
    client.wait().expect("the client");
}

#[test]
fn deleting_under_an_open_disk_says_what_would_be_cheaper() {
    require!("fuse");
    let folder = temp_dir();
    let (mount, images, bytes) = mounted(folder.path());
    let open = mount.open("vm1");
    let said = Run::ploopfs().args(["snapshot", "delete", text(&images.join("vm1")), "s1"]).run();
    assert!(said.success() && said.stderr.contains("close it"), "{said}");
    assert_eq!(read_at(&open, 0, bytes.len()).expect("reads"), bytes);
    assert!(images.join("vm1/DiskDescriptor.xml").exists());
}

#[test]
fn sigkill_in_the_middle_of_a_merge_into_a_raw_file_loses_nothing_and_the_next_mount_finishes_it() {
    require!("fuse");
    let folder = temp_dir();
    let (mut mount, images, bytes) = mounted(folder.path());
    let mut client = slowly(&images.join("vm1"), "512K");
    assert!(has_begun(&images.join("vm1/vm1.raw")), "nothing is copied");
    mount.kill();
    client.wait().expect("its end");
    mount.start();
    assert!(until(SOON, || images.join("vm1.raw").exists() && !images.join("vm1").exists()), "not finished");
    assert!(fs::read(mount.flat("vm1")).expect("read") == bytes, "the disk has changed");
    mount.umount();
    assert!(fs::read(images.join("vm1.raw")).expect("read") == bytes);
}

#[test]
fn a_mount_that_ends_does_not_wait_for_the_merge() {
    require!("fuse");
    let folder = temp_dir();
    let (mut mount, images, bytes) = mounted(folder.path());
    let mut client = slowly(&images.join("vm1"), "100K");
    assert!(has_begun(&images.join("vm1/vm1.raw")), "nothing is copied");
    let begun = std::time::Instant::now();
    mount.umount();
    assert!(begun.elapsed() < SOON, "the end waited for {:?}", begun.elapsed());
    client.wait().expect("its end");
    mount.start();
    assert!(until(SOON, || images.join("vm1.raw").exists() && !images.join("vm1").exists()), "not finished");
    assert!(fs::read(mount.flat("vm1")).expect("read") == bytes, "the disk has changed");
}

/// Every name and all bytes of the image `r`.
fn state(folder: &Folder) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = folder.path("r").read_dir().expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).expect("read"))).collect();
    files.sort();
    files
}

/// What was missing of the file was read as zeroes: by export and backup with status 0, and check found nothing.
#[test]
fn a_raw_base_that_was_cut_off_is_damage_and_not_zeroes() {
    let (folder, bytes) = raw(3);
    folder.ok(&["snapshot", "create", "r", "a"]);
    folder.ok(&["snapshot", "create", "r", "b"]);
    change(&folder.path("r"), |image| image.write_at(0, &[9; 512]));
    let cut_to = |len: u64| {
        let base = fs::File::options().write(true).open(folder.path("r/r.raw"));
        base.and_then(|file| file.set_len(len)).expect("cut");
    };
    for len in [0, MIB, 3 * MIB - 1] {
        cut_to(len);
        let before = state(&folder);
        for args in [
            &["export", "r", "out"][..],
            &["export", "r@a", "out"],
            &["backup", "r", "-o", "out"],
            &["clone", "r", "c"],
            &["clone", "r@a", "c"],
            &["snapshot", "create", "r"],
            &["snapshot", "delete", "r", "a"],
            &["snapshot", "switch", "r", "a"],
            &["compact", "r"],
            &["resize", "r", "8M"],
        ] {
            let said = folder.fails(3, args);
            assert!(said.contains("was cut off") && said.contains("truncate -s 3145728"), "{args:?}: {said}");
        }
        folder.fails(3, &["check", "r"]);
        assert!(folder.ok(&["list", ".", "--json"]).contains("damaged"));
        assert!(state(&folder) == before, "{len}");
    }
    fs::write(folder.path("r/r.raw"), &bytes).expect("whole again");
    assert!(content(&folder, "r@a") == bytes);
    // Neither a clone nor a merge that gives the file to another snapshot forgets how long it was.
    folder.ok(&["clone", "r@b", "c"]);
    // Where the host links, it is the same file.
    fs::remove_file(folder.path("c/c.raw")).expect("removed");
    fs::write(folder.path("c/c.raw"), &bytes[..MIB as usize]).expect("cut");
    folder.fails(3, &["export", "c", "out"]);
    folder.ok(&["snapshot", "delete", "r", "a"]);
    folder.ok(&["resize", "r", "8M"]);
    assert!(content(&folder, "r@b") == bytes);
    cut_to(MIB);
    folder.fails(3, &["export", "r@b", "out"]);
}

/// The header and the map were shown to the guest as the beginning of its disk.
#[test]
fn a_ploop_file_that_the_descriptor_calls_plain_is_not_read_as_a_raw_disk() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "8M", "--cluster", "64K"]);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    let xml = folder.path("vm/DiskDescriptor.xml");
    let plain = fs::read_to_string(&xml).expect("read").replace("Compressed", "Plain");
    fs::write(&xml, plain).expect("written");
    folder.fails(3, &["check", "vm"]);
    for args in [&["export", "vm", "out"][..], &["snapshot", "create", "vm"], &["compact", "vm"]] {
        assert!(folder.fails(3, args).contains("is a ploop file"), "{args:?}");
    }
    assert!(folder.ok(&["list", ".", "--json"]).contains("damaged"));
}
