//! What a user sees in the mounted folder, and what he cannot break there.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Mount, Run, ok, read_at, temp_dir, text, until};

/// How long a folder change may take to show: 2 s of stillness (docs/design.md#what-is-an-image) and a busy machine.
const SHOWN: Duration = Duration::from_secs(15);

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.expect_err("must be refused").raw_os_error()
}

/// A mount whose vm1 holds a text at 1 MiB.
fn mount_with_text() -> Mount {
    let mount = Mount::new(&["--create", "vm1=64M"]);
    mount.open("vm1").write_all_at(b"precious", 1 << 20).expect("a write");
    mount
}

#[track_caller]
fn text_is_there(mount: &Mount) {
    let file = mount.open("vm1");
    assert_eq!(file.metadata().expect("stat").len(), 64 << 20);
    assert_eq!(read_at(&file, 1 << 20, 8).expect("a read"), b"precious");
}

#[test]
fn copying_over_an_image_is_refused_and_nothing_is_lost() {
    require!("fuse");
    let mount = mount_with_text();
    let done = Run::new("cp").args([Path::new("/etc/passwd"), &mount.flat("vm1")]).run();
    assert!(!done.success(), "{done}");
    assert!(done.stderr.contains("Operation not permitted"), "{done}");
    text_is_there(&mount);
}

#[test]
fn truncating_and_growing_are_refused_and_nothing_is_lost() {
    require!("fuse");
    let mount = mount_with_text();
    for size in [0, 4096, 65 << 20] {
        assert_eq!(errno(mount.open("vm1").set_len(size)), Some(libc::EPERM), "to {size} bytes");
    }
    let truncating = OpenOptions::new().write(true).truncate(true).open(mount.flat("vm1"));
    assert_eq!(errno(truncating), Some(libc::EPERM));
    let same_size = mount.open("vm1").set_len(64 << 20);
    assert!(same_size.is_ok(), "a change to the size it has is none");
    text_is_there(&mount);
}

#[test]
fn removing_renaming_and_linking_are_refused_and_nothing_is_lost() {
    require!("fuse");
    let mount = mount_with_text();
    let other = mount.point().join("vm2.img");
    assert_eq!(errno(fs::remove_file(mount.flat("vm1"))), Some(libc::EPERM));
    assert_eq!(errno(fs::rename(mount.flat("vm1"), &other)), Some(libc::EPERM));
    assert_eq!(errno(fs::hard_link(mount.flat("vm1"), &other)), Some(libc::EPERM));
    text_is_there(&mount);
}

#[test]
fn creating_files_folders_and_links_is_refused() {
    require!("fuse");
    let mount = mount_with_text();
    assert_eq!(errno(fs::File::create(mount.point().join("new"))), Some(libc::EPERM));
    assert_eq!(errno(fs::create_dir(mount.point().join("new"))), Some(libc::EPERM));
    assert_eq!(errno(std::os::unix::fs::symlink("/", mount.point().join("new"))), Some(libc::EPERM));
    assert!(!Run::new("touch").arg(mount.point().join("new")).run().success());
}

#[test]
fn changing_mode_or_owner_is_refused() {
    require!("fuse");
    let mount = mount_with_text();
    let other = fs::Permissions::from_mode(0o777);
    assert_eq!(errno(fs::set_permissions(mount.flat("vm1"), other)), Some(libc::EPERM));
    assert_eq!(errno(std::os::unix::fs::chown(mount.flat("vm1"), Some(1), None)), Some(libc::EPERM));
}

#[test]
fn owner_and_mode_are_those_of_the_delta() {
    require!("fuse");
    let mount = mount_with_text();
    let (shown, delta) = (fs::metadata(mount.flat("vm1")), fs::metadata(mount.delta("vm1")));
    let (shown, delta) = (shown.expect("stat"), delta.expect("stat"));
    assert_eq!(
        (shown.uid(), shown.gid(), shown.mode() & 0o7777),
        (delta.uid(), delta.gid(), delta.mode() & 0o7777)
    );
    assert!(shown.file_type().is_file());
}

#[test]
fn mtime_is_the_last_write_through_the_mount() {
    require!("fuse");
    let mount = mount_with_text();
    let before = fs::metadata(mount.flat("vm1")).expect("stat").modified().expect("mtime");
    std::thread::sleep(Duration::from_millis(1100)); // attributes are cached for a second
    mount.open("vm1").write_all_at(b"x", 5).expect("a write");
    let later =
        || fs::metadata(mount.flat("vm1")).and_then(|data| data.modified()).is_ok_and(|time| time > before);
    assert!(until(Duration::from_secs(5), later));
}

#[test]
fn df_shows_the_images_folder_and_its_file_system() {
    require!("fuse");
    let mount = mount_with_text();
    let space = |path: &Path| rustix::fs::statvfs(path).expect("statvfs");
    let (shown, host) = (space(mount.point()), space(mount.images()));
    assert_eq!(shown.f_bsize, 4096);
    assert_eq!(shown.f_blocks * shown.f_frsize, host.f_blocks * host.f_frsize);
    let free = |status: &rustix::fs::StatVfs| (status.f_bavail * status.f_frsize) as i64;
    assert!((free(&shown) - free(&host)).abs() < 4 << 30, "{} and {} bytes free", free(&shown), free(&host));
    let line = ok("df", &["--output=source,target", text(mount.point())]);
    assert!(line.contains(text(mount.images())), "{line}");
    let found = ok("findmnt", &["-n", "-o", "SOURCE,FSTYPE", text(mount.point())]);
    assert!(found.contains(text(mount.images())) && found.contains("fuse.ploopfs"), "{found}");
}

#[test]
fn stats_json_names_the_process_the_transport_and_every_image() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M", "--create", "vm2=64M"]);
    mount.open("vm1").write_all_at(&[1; 4096], 0).expect("a write");
    let stats = mount.stats();
    let name = fs::read_to_string(format!("/proc/{}/comm", mount.pid())).expect("the daemon lives");
    assert!(name.trim().starts_with("ploopfs"), "{name}");
    assert!(stats["transport"].is_string(), "{stats}");
    for image in ["vm1", "vm2"] {
        assert!(stats["images"][image]["mode"].is_string(), "{stats}");
        assert!(stats["images"][image]["dirty_pages"].is_u64(), "{stats}");
        assert!(stats["images"][image]["queued"].is_u64(), "{stats}");
    }
}

#[test]
fn the_folder_lists_images_and_nothing_else() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&folder.path().join("magic")), "8M"]);
    ok("qemu-img", &["create", "-q", "-f", "qcow2", text(&folder.path().join("other.qcow2")), "8M"]);
    fs::write(folder.path().join("plain.raw"), vec![3; 1 << 20]).expect("a raw image");
    fs::write(folder.path().join("notes.txt"), "text").expect("a file");
    fs::write(folder.path().join(".hidden.raw"), "text").expect("a file");
    fs::write(folder.path().join("x.{5fbaabe3-6958-40ff-92a7-860e329aab41}"), "text").expect("a file");
    std::os::unix::fs::symlink("plain.raw", folder.path().join("link.raw")).expect("a link");
    let mount = Mount::over(folder.path(), &[]);
    let shown = |path: &Path| {
        let names = fs::read_dir(path).expect("readdir").flatten();
        let mut names: Vec<String> =
            names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    };
    assert_eq!(shown(mount.point()), ["magic.img", "plain.img"]);
    let all = Run::ploopfs().args(["list", "--all"]).arg(folder.path()).ok();
    for left_out in ["notes.txt", "other.qcow2", "link.raw"] {
        assert!(all.contains(left_out), "list --all says nothing of {left_out}:\n{all}");
    }
}

#[test]
fn a_raw_image_is_written_in_place() {
    require!("fuse");
    let folder = temp_dir();
    let raw = folder.path().join("vm3.raw");
    fs::write(&raw, vec![3; 3 << 20]).expect("a raw image");
    let mut mount = Mount::over(folder.path(), &[]);
    mount.open("vm3").write_all_at(b"in place", 1 << 20).expect("a write");
    assert!(mount.open("vm3").write_all_at(b"x", 3 << 20).is_err(), "nothing lies behind the end");
    mount.umount();
    let content = fs::read(&raw).expect("the raw file");
    assert_eq!(content.len(), 3 << 20);
    assert_eq!(&content[1 << 20..(1 << 20) + 8], b"in place");
}

#[test]
fn an_image_that_is_moved_into_the_folder_appears_and_disappears_again() {
    require!("fuse", "qemu");
    let mount = mount_with_text();
    let aside = temp_dir();
    let file = aside.path().join("late.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&file), "8M"]);
    ok("cp", &[text(&file), text(&mount.images().join("late.hds"))]);
    assert!(until(SHOWN, || mount.flat("late").exists()), "a new image appears");
    mount.open("late").write_all_at(&[1; 4096], 0).expect("a write to the newcomer");
    fs::remove_file(mount.images().join("late.hds")).expect("removal");
    assert!(until(SHOWN, || !mount.flat("late").exists()), "a removed image disappears");
    text_is_there(&mount);
}

#[test]
fn a_file_that_is_still_being_written_is_not_taken_in() {
    require!("fuse", "qemu");
    let mount = mount_with_text();
    let aside = temp_dir();
    let source = aside.path().join("slow.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&source), "8M"]);
    let content = fs::read(&source).expect("the image");
    let target = fs::File::create(mount.images().join("slow.hds")).expect("a new file");
    let began = Instant::now();
    let mut at = 0;
    // A copy that takes 4 s: longer than the stillness that is asked for, with pauses shorter than it.
    while began.elapsed() < Duration::from_secs(4) {
        let step = 4096.min(content.len() - at);
        target.write_all_at(&content[at..at + step], at as u64).expect("a part of the copy");
        at += step;
        assert!(!mount.flat("slow").exists(), "taken in while it is written");
        std::thread::sleep(Duration::from_millis(200));
    }
    target.write_all_at(&content[at..], at as u64).expect("the rest of the copy");
    drop(target);
    assert!(until(SHOWN, || mount.flat("slow").exists()));
}

#[test]
fn what_create_makes_is_shown_when_the_command_returns() {
    require!("fuse");
    let mount = mount_with_text();
    Run::ploopfs().arg("create").arg(mount.images().join("fresh")).args(["--size", "32M"]).ok();
    assert_eq!(fs::metadata(mount.flat("fresh")).expect("shown at once").len(), 32 << 20);
}

#[test]
fn stat_after_resize_has_returned_shows_the_new_size_and_not_what_the_kernel_kept() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let size = || fs::metadata(mount.flat("vm1")).expect("stat").len();
    for mib in [128, 192, 256, 320_u64] {
        // The kernel keeps this answer for a second.
        let before = size();
        Run::ploopfs().arg("resize").arg(mount.delta("vm1")).arg(format!("{mib}M")).ok();
        assert_eq!(size(), mib << 20, "it was {before}");
    }
}

#[test]
fn a_name_that_is_gone_in_the_folder_is_not_kept_by_the_kernel() {
    require!("fuse");
    let args: Vec<_> = (0..4).flat_map(|n| ["--create".to_owned(), format!("vm{n}=8M")]).collect();
    let mount = Mount::new(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let log = || fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default();
    let mut slow = Vec::new();
    for n in 0..4 {
        let name = format!("vm{n}");
        assert!(mount.flat(&name).exists(), "and the kernel keeps it for a second");
        match n % 2 {
            0 => fs::remove_file(mount.delta(&name)).expect("removed"),
            _ => fs::rename(mount.delta(&name), mount.delta(&format!("new{n}"))).expect("renamed"),
        }
        let left_out = format!("{name}.hds: no longer served");
        assert!(until(SHOWN, || log().contains(&left_out)));
        let since = Instant::now();
        assert!(until(SHOWN, || !mount.flat(&name).exists()));
        slow.push(since.elapsed());
    }
    // Without being told the kernel would have kept each for nearly a second.
    slow.sort();
    assert!(slow[1] < Duration::from_millis(300), "{slow:?}");
}

#[test]
fn a_deleted_snapshot_is_gone_from_the_mount_when_the_command_returns() {
    require!("fuse");
    let mount = mount_with_text();
    let image = mount.delta("vm1");
    Run::ploopfs().args(["snapshot", "create"]).arg(&image).arg("s1").ok();
    let shown = mount.point().join(".snapshots/vm1/s1.img");
    assert!(until(SHOWN, || shown.exists()));
    let folder = mount.images().join("vm1");
    Run::ploopfs().args(["snapshot", "delete"]).arg(&folder).arg("s1").ok();
    assert!(!shown.exists(), "the kernel kept the name");
}

#[test]
fn two_sources_of_one_name_are_both_left_out_and_both_named() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&folder.path().join("vm1.hds")), "8M"]);
    fs::write(folder.path().join("vm1.raw"), vec![0; 1 << 20]).expect("a raw image");
    fs::write(folder.path().join("vm2.raw"), vec![0; 1 << 20]).expect("a raw image");
    let mount = Mount::over(folder.path(), &[]);
    assert!(!mount.flat("vm1").exists());
    assert!(mount.flat("vm2").exists());
    let all = Run::ploopfs().args(["list", "--all"]).arg(folder.path()).ok();
    assert!(all.contains("vm1.hds") && all.contains("vm1.raw"), "{all}");
}

#[test]
fn a_newcomer_with_the_name_of_a_served_image_is_left_out() {
    require!("fuse");
    let mount = mount_with_text();
    fs::write(mount.images().join("vm1.raw"), vec![0; 1 << 20]).expect("a raw image");
    fs::write(mount.images().join("after.raw"), vec![0; 1 << 20]).expect("a raw image");
    assert!(until(SHOWN, || mount.flat("after").exists()));
    text_is_there(&mount);
}

#[test]
fn a_damaged_image_is_left_out_with_its_reason_and_the_mount_works() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let bad = folder.path().join("bad.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&bad), "8M"]);
    // Clusters of zero sectors: nothing can be served.
    OpenOptions::new()
        .write(true)
        .open(&bad)
        .and_then(|file| file.write_all_at(&[0; 4], 28))
        .expect("damage");
    let mount = Mount::over(folder.path(), &["--create", "good=8M"]);
    assert!(!mount.flat("bad").exists());
    mount.open("good").write_all_at(&[1; 4096], 0).expect("a write to the good one");
    let list = Run::ploopfs().args(["list", "--json"]).arg(folder.path()).ok();
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let images = list["images"].as_array().expect("a list of images");
    let bad = images.iter().find(|image| image["name"] == "bad").expect("the damaged image is listed");
    assert!(bad["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{bad}");
}

#[test]
fn odd_names_are_served() {
    require!("fuse");
    let folder = temp_dir();
    let long = "n".repeat(240);
    for name in ["with space", "umlaut-\u{e4}\u{f6}", "dots.in.name", "-dash", "q'uote\"s", long.as_str()] {
        fs::write(folder.path().join(format!("{name}.raw")), vec![5; 8192]).expect("a raw image");
    }
    let mount = Mount::over(folder.path(), &[]);
    for name in ["with space", "umlaut-\u{e4}\u{f6}", "dots.in.name", "-dash", "q'uote\"s", long.as_str()] {
        assert_eq!(read_at(&mount.open(name), 0, 8192).expect("a read"), vec![5; 8192], "{name}");
    }
}

#[test]
fn a_read_only_mount_refuses_writing() {
    require!("fuse");
    let mut mount = mount_with_text();
    mount.umount();
    mount.set_args(&["-r"]);
    mount.start();
    let open = OpenOptions::new().write(true).open(mount.flat("vm1"));
    assert!(open.is_err_and(|error| matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES))));
    let file = fs::File::open(mount.flat("vm1")).expect("reading is allowed");
    assert_eq!(read_at(&file, 1 << 20, 8).expect("a read"), b"precious");
}

#[test]
fn an_image_nobody_writes_is_not_changed() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = folder.path().join("vm1.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&delta), "64M"]);
    ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 5 1M 2M", text(&delta)]);
    let before = fs::read(&delta).expect("the delta");
    let mut mount = Mount::over(folder.path(), &[]);
    let file = mount.open("vm1");
    assert_eq!(read_at(&file, 1 << 20, 4096).expect("a read"), vec![5; 4096]);
    file.sync_all().expect("fsync of what nobody changed");
    drop(file);
    mount.umount();
    assert!(fs::read(&delta).expect("the delta") == before, "opening for writing alone changed the file");
}

#[test]
fn create_of_an_existing_image_uses_it_and_another_size_is_an_error_that_touches_nothing() {
    require!("fuse");
    let mut mount = mount_with_text();
    mount.umount();
    let before = fs::read(mount.delta("vm1")).expect("the delta");
    mount.set_args(&["--create", "vm1=128M"]);
    let refused = mount.try_start();
    assert!(!refused.success() && refused.stderr.contains("vm1"), "{refused}");
    assert!(!mount.is_mounted());
    assert!(fs::read(mount.delta("vm1")).expect("the delta") == before);
    mount.set_args(&["--create", "vm1=64M"]);
    mount.start();
    text_is_there(&mount);
}

#[test]
fn mounting_again_on_the_same_place_says_already_mounted_and_succeeds() {
    require!("fuse");
    let mut mount = mount_with_text();
    let again = mount.try_start();
    assert!(again.success(), "{again}");
    assert!(again.output().contains("already mounted"), "{again}");
    text_is_there(&mount);
}

#[test]
fn attach_prints_the_device_alone_and_refuses_a_second_one() {
    require!("fuse", "loop");
    let mount = mount_with_text();
    let device = Run::ploopfs().arg("attach").arg(mount.flat("vm1")).ok();
    let device = device.trim();
    assert!(device.starts_with("/dev/loop") && !device.contains(char::is_whitespace), "{device:?}");
    let direct = format!("/sys/block/{}/loop/dio", device.trim_start_matches("/dev/"));
    assert_eq!(fs::read_to_string(direct).expect("the loop device's flag").trim(), "1");
    let again = Run::ploopfs().arg("attach").arg(mount.flat("vm1")).run();
    assert!(!again.success() && again.stderr.contains(device), "{again}");
    Run::ploopfs().args(["detach", device]).ok();
    assert!(common::loops_in(mount.point()).is_empty(), "detach returned before the device was gone");
}

#[test]
fn list_without_a_folder_shows_every_mount_and_what_it_serves() {
    require!("fuse");
    let (folder, elsewhere) = (temp_dir(), temp_dir());
    let mut mount = Mount::over(folder.path(), &["--create", "vm1=8M"]);
    for (run, from) in [(elsewhere.path(), "elsewhere"), (folder.path(), "in its folder")] {
        let list = Run::ploopfs().args(["list", "--json"]).in_folder(run).ok();
        let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
        let mounts = list["mounts"].as_array().expect("a list of mounts");
        let ours: Vec<_> = mounts.iter().filter(|m| m["mountpoint"] == text(mount.point())).collect();
        assert_eq!(ours.len(), 1, "{from}: {list}");
        assert_eq!(ours[0]["images"][0]["name"], "vm1", "{from}: {list}");
        assert_eq!(ours[0]["images"][0]["served"], true, "{from}: {list}");
        let text = Run::ploopfs().arg("list").in_folder(run).ok();
        assert_eq!(text.matches(&format!("mounted on {}\n", mount.point().display())).count(), 1, "{text}");
    }
    mount.umount();
    let text = Run::ploopfs().arg("list").in_folder(elsewhere.path()).run().output();
    assert!(!text.contains(&mount.point().display().to_string()), "{text}");
}

#[test]
fn list_names_a_loop_device_without_direct_io_and_the_line_that_switches_it_on() {
    require!("fuse", "loop");
    let mount = mount_with_text();
    let device = common::Loop::attach(&mount.flat("vm1"), false);
    let list = Run::ploopfs().arg("list").arg(mount.point()).run();
    let said = list.output();
    assert!(said.contains(text(device.device())) && said.contains("losetup --direct-io=on"), "{list}");
    device.detach();
}

/// A copy that goes by size and time (`rsync --modify-window=-1`, borg, restic) must see each change, also those of one
/// second. rsync by itself compares whole seconds: what changes within the second of its last look it does not see, on any
/// file system.
#[test]
fn every_change_within_one_second_has_a_time_of_its_own_that_is_seen_at_once() {
    require!("fuse");
    let mount = mount_with_text();
    let file = mount.open("vm1");
    file.write_all_at(&[7; 1 << 20], 0).expect("written");
    let time = || {
        let status = fs::metadata(mount.flat("vm1")).expect("stat");
        (status.mtime(), status.mtime_nsec(), status.ctime(), status.ctime_nsec())
    };
    let mut before = time();
    for round in 0..40 {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        match round % 2 {
            0 => rustix::fs::fallocate(&file, flags, round * 4096, 4096).expect("punched"),
            _ => file.write_all_at(&[round as u8; 512], round * 4096).expect("written"),
        }
        let after = time();
        assert!(
            after.0 > before.0 || after.0 == before.0 && after.1 > before.1,
            "{round}: {before:?} {after:?}"
        );
        assert!((after.2, after.3) > (before.2, before.3), "{round}: {before:?} {after:?}");
        before = after;
    }
}
