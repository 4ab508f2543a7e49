//! Images from a stranger: whatever a folder names, nothing outside of the images folder is opened, read or written; the
//! image is left out and says why, the others are served, and the daemon stays small.

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Mount, Run, text, until};
use inotify::{Inotify, WatchMask};
use ploopfs::format::descriptor::Descriptor;

const MIB: u64 = 1 << 20;
/// What all the hostile images together may cost the daemon, in KiB: the largest descriptor, parsed.
const MEMORY: u64 = 64 << 10;
/// Long for a busy 2-core machine, short for a hang.
const SOON: Duration = Duration::from_secs(20);

/// A folder that nobody may touch, with a sound image in it, watched by inotify.
struct Outside {
    dir: tempfile::TempDir,
    watch: Inotify,
    before: Vec<u8>,
}

impl Outside {
    fn new() -> Outside {
        let dir = common::temp_dir();
        let secret = dir.path().join("secret.hds");
        Run::ploopfs().args(["create", text(&secret), "--size", "64M"]).ok();
        let before = fs::read(&secret).expect("the secret");
        let watch = Inotify::init().expect("inotify");
        let mask = WatchMask::OPEN
            | WatchMask::ACCESS
            | WatchMask::MODIFY
            | WatchMask::ATTRIB
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE;
        watch.watches().add(dir.path(), mask).expect("a watch");
        Outside { dir, watch, before }
    }

    fn secret(&self) -> PathBuf {
        self.dir.path().join("secret.hds")
    }

    /// What happened in the folder since the last question.
    fn touched(&mut self) -> Vec<String> {
        let mut buffer = vec![0; 64 << 10];
        match self.watch.read_events(&mut buffer) {
            Ok(events) => events.map(|event| format!("{:?} {:?}", event.mask, event.name)).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Vec::new(),
            Err(e) => panic!("inotify: {e}"),
        }
    }
}

/// A layered image of 64 MiB whose one file is `file`.
fn image_of(images: &Path, name: &str, file: &str) -> PathBuf {
    let folder = images.join(name);
    fs::create_dir(&folder).expect("a folder");
    let xml = Descriptor::new(64 * MIB / 512, 2048, file, false).to_xml();
    fs::write(folder.join("DiskDescriptor.xml"), xml).expect("a descriptor");
    folder
}

/// Fills a folder with hostile images; returns their names with a word of the reason.
fn fill(images: &Path, outside: &Outside) -> Vec<(&'static str, &'static str)> {
    let secret = outside.secret();
    let inside = |name: &str, file: &str| image_of(images, name, file);
    let folder = inside("a-link", "base.hds");
    symlink(&secret, folder.join("base.hds")).expect("a link");
    let steps = Path::new("../..").join(secret.strip_prefix("/").expect("absolute"));
    inside("dots", text(&Path::new("../../../../../../..").join(&steps)));
    inside("absolute", text(&secret));
    let folder = inside("folder-link", "sub/secret.hds");
    symlink(outside.dir.path(), folder.join("sub")).expect("a link");
    let folder = inside("pipe", "base.hds");
    common::ok("mkfifo", &[folder.join("base.hds")]);
    let folder = inside("folder", "base.hds");
    fs::create_dir(folder.join("base.hds")).expect("a folder");
    inside("itself", "..");
    let folder = images.join("deep");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("DiskDescriptor.xml"), "<a>".repeat(300_000)).expect("a descriptor");
    // As many elements as fit below the bound on a descriptor's length; and a file of 8 GiB.
    for (name, piece, count) in [("wide", "<a/>", 260_000), ("huge", "", 0)] {
        let folder = images.join(name);
        fs::create_dir(&folder).expect("a folder");
        let text = format!("<Parallels_disk_image>{}</Parallels_disk_image>", piece.repeat(count));
        fs::write(folder.join("DiskDescriptor.xml"), text).expect("a descriptor");
    }
    let huge = fs::OpenOptions::new().write(true).open(images.join("huge/DiskDescriptor.xml"));
    huge.and_then(|file| file.set_len(8 << 30)).expect("a sparse file");
    // What is no image at all.
    symlink(&secret, images.join("single-link.hds")).expect("a link");
    common::ok("mkfifo", &[images.join("single-pipe.raw")]);
    fs::create_dir(images.join("xml-link")).expect("a folder");
    symlink(&secret, images.join("xml-link/DiskDescriptor.xml")).expect("a link");
    symlink(outside.dir.path(), images.join("whole-link")).expect("a link");
    vec![
        ("a-link", "link"),
        ("dots", "leaves the folder"),
        ("absolute", "leaves the folder"),
        ("folder-link", "link"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("itself", "no name"),
        ("deep", "deep"),
        ("wide", ""),
        ("huge", ""),
    ]
}

/// The images of `list --json`: name to served and reason.
fn listed(images: &Path) -> HashMap<String, (bool, String)> {
    let json = Run::ploopfs().args(["list", "--json", text(images)]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let rows = json["images"].as_array().expect("a list").iter().map(|row| {
        let word = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        (word("name"), (row["served"] == true, word("reason")))
    });
    rows.collect()
}

/// Most memory that the daemon has had, in KiB.
fn peak(mount: &Mount) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).expect("a living daemon");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().expect("KiB")
}

fn hostile_images_are_left_out(args: &[&str]) {
    let plain = Mount::new(&["--create", "good=64M"]);
    let usual = peak(&plain);
    drop(plain);
    let mut outside = Outside::new();
    let images = common::temp_dir();
    let expected = fill(images.path(), &outside);
    let mut all = args.to_vec();
    all.extend(["--create", "good=64M"]);
    let mut mount = Mount::over(images.path(), &all);
    let open = mount.open("good");
    open.write_all_at(&[7; 1 << 20], 0).expect("written");
    open.sync_all().expect("synced");
    let rows = listed(images.path());
    assert_eq!(rows.get("good").map(|(served, _)| *served), Some(true), "{rows:?}");
    for (name, word) in &expected {
        let (served, reason) = rows.get(*name).unwrap_or_else(|| panic!("{name} is not listed: {rows:?}"));
        assert!(!served && !reason.is_empty() && reason.contains(word), "{name}: {reason}");
        assert!(fs::File::open(mount.flat(name)).is_err(), "{name} opens");
    }
    for name in ["single-link", "single-pipe", "xml-link", "whole-link", "whole-link/secret"] {
        assert!(!mount.flat(name).exists(), "{name} is shown");
    }
    // The commands that look at files themselves hold to the same.
    for (name, _) in &expected {
        for command in ["info", "check"] {
            let path = images.path().join(name);
            let done = Run::ploopfs().args([command, text(&path)]).limit(20).run();
            assert!(done.code().is_some_and(|code| code != 0), "{done}");
        }
    }
    let cost = peak(&mount).saturating_sub(usual);
    println!("{} hostile images cost the daemon {cost} KiB at most", expected.len());
    assert!(cost < MEMORY, "{cost} KiB more than without them");
    drop(open);
    mount.umount();
    assert_eq!(outside.touched(), Vec::<String>::new());
    assert_eq!(fs::read(outside.secret()).expect("the secret"), outside.before);
}

#[test]
fn hostile_images_are_left_out_with_a_reason_and_nothing_outside_is_touched() {
    require!("fuse");
    let _turn = common::heavy();
    hostile_images_are_left_out(&[]);
}

#[test]
fn the_same_holds_without_the_sandbox_by_our_own_checks() {
    require!("fuse");
    let _turn = common::heavy();
    hostile_images_are_left_out(&["--no-sandbox"]);
}

#[test]
fn the_watch_on_the_folder_outside_sees_an_image_that_is_allowed_to_lie_there() {
    require!("fuse");
    let mut outside = Outside::new();
    let images = common::temp_dir();
    image_of(images.path(), "absolute", text(&outside.secret()));
    let mount = Mount::over(images.path(), &["--allow-outside"]);
    mount.open("absolute").write_all_at(b"x", 0).expect("written");
    drop(mount);
    assert!(!outside.touched().is_empty(), "the watch is blind");
}

#[test]
fn an_image_that_turns_hostile_while_it_is_closed_is_left_out() {
    require!("fuse");
    let mut outside = Outside::new();
    let images = common::temp_dir();
    let folder = image_of(images.path(), "vm1", "base.hds");
    Run::ploopfs().args(["create", text(&folder.join("base.hds")), "--size", "64M"]).ok();
    let mount = Mount::over(images.path(), &[]);
    drop(mount.open("vm1"));
    fs::remove_file(folder.join("base.hds")).expect("removed");
    symlink(outside.secret(), folder.join("base.hds")).expect("a link");
    assert!(fs::File::open(mount.flat("vm1")).is_err(), "opens behind a link");
    Run::ploopfs().args(["list", text(mount.point())]).ok();
    fs::write(images.path().join("nudge"), "x").expect("a file that makes the daemon look");
    let out =
        || listed(images.path()).get("vm1").is_some_and(|(served, why)| !served && why.contains("link"));
    assert!(until(SOON, out), "{:?}", listed(images.path()));
    assert_eq!(outside.touched(), Vec::<String>::new());
}

#[test]
fn a_frozen_delta_that_is_a_hard_link_to_something_outside_is_never_written() {
    require!("fuse");
    let images = common::temp_dir();
    let outside = tempfile::tempdir_in(images.path().parent().expect("a parent")).expect("beside it");
    let victim = outside.path().join("victim");
    fs::write(&victim, vec![9; 4 << 20]).expect("written");
    fs::hard_link(&victim, images.path().join("vm1.raw")).expect("a link");
    Run::ploopfs().args(["snapshot", "create", text(&images.path().join("vm1.raw")), "a"]).ok();
    let mut mount = Mount::over(images.path(), &[]);
    let open = mount.open("vm1");
    open.write_all_at(&[1; 1 << 20], 0).expect("written");
    common::punch(&open, MIB, MIB).expect("punched");
    open.sync_all().expect("synced");
    Run::ploopfs().args(["snapshot", "delete", text(&mount.flat("vm1")), "a"]).ok();
    assert_eq!(common::read_at(&open, 0, 1).expect("read"), [1]);
    drop(open);
    mount.umount();
    assert!(fs::read(&victim).expect("read").iter().all(|byte| *byte == 9), "the file outside was changed");
}

/// What is packed goes to strangers, with a report of a bug.
#[test]
fn a_pack_of_metadata_takes_no_file_to_which_a_link_in_the_images_folder_leads() {
    let temp = common::temp_dir();
    let (image, packed) = (temp.path().join("vm1"), temp.path().join("packed"));
    Run::ploopfs().args(["create", text(&image), "--size", "64M"]).ok();
    Run::ploopfs().args(["snapshot", "create", text(&image), "one"]).ok();
    let secret = temp.path().join("secret");
    fs::write(&secret, "the secret").expect("written");
    for name in ["ploopfs.json", "DiskDescriptor.xml"] {
        let (own, kept) = (image.join(name), temp.path().join("kept"));
        fs::rename(&own, &kept).expect("renamed");
        symlink(&secret, &own).expect("a link");
        let done = Run::ploopfs().args(["meta", "pack", text(&image), text(&packed)]).run();
        assert!(!done.success(), "{done}");
        let taken = fs::read(packed.join(name)).unwrap_or_default();
        assert!(taken.is_empty(), "{name}: {}", String::from_utf8_lossy(&taken));
        let _ = fs::remove_dir_all(&packed);
        fs::rename(&kept, &own).expect("renamed back");
    }
    Run::ploopfs().args(["meta", "pack", text(&image), text(&packed)]).ok();
    for name in ["ploopfs.json", "DiskDescriptor.xml"] {
        assert!(fs::read(packed.join(name)).expect("packed") == fs::read(image.join(name)).expect("there"));
    }
}
