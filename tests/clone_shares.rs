//! A clone takes no space: shared extents where the host has them, hard links elsewhere. Many are made at once, with few
//! syncs, and all or none of them.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Folder, Guest, HostFs, Mount, Run, text, until};
use ploopfs::format::descriptor::Guid;
use ploopfs::image::clone::clone;
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::store::Replaced;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;

const MIB: u64 = 1 << 20;

/// An image with 64 MiB of data in its base and one snapshot, cloned. Returns the links of the clone's base, and the
/// space that the clone took.
fn cloned(images: &Path) -> (u64, u64) {
    let plan = CreatePlan { preallocate: true, ..CreatePlan::thin(64 * MIB) };
    create(&images.join("vm"), &plan).expect("created");
    let data = File::options().write(true).open(images.join("vm.hds")).expect("open");
    (1..65).for_each(|n| data.write_all_at(&[n as u8; MIB as usize], n * MIB).expect("write"));
    data.sync_all().expect("sync");
    let folder = File::open(images).expect("open");
    make_folder(folder.as_fd(), images, "vm.hds".as_ref(), None).expect("a folder");
    let dir = File::open(images.join("vm")).expect("open");
    let opener = Arc::new(Direct(Access::ReadWrite));
    let (layers, levels) = Layers::open(dir.into(), &images.join("vm"), opener, false).expect("opens");
    let mut next = layers.store().descriptor().clone();
    let mut header = levels[0]
        .geometry()
        .map(|g| ploopfs::format::header::Header::new(g.version, g.disk, g.cluster).expect("a header"));
    let (file, _) = layers.add_delta(&header.take().expect("a delta")).expect("made");
    let guid = Guid::random();
    next.add_snapshot(guid, &file).expect("fresh");
    layers.store().replace(next).and_then(Replaced::durable).expect("replaced");
    let free = || {
        let fs = rustix::fs::statvfs(images).expect("statvfs");
        fs.f_bfree * fs.f_frsize
    };
    let before = free();
    clone(&layers, guid, &[images.join("copy")], false, &Progress::new()).expect("cloned");
    folder.sync_all().expect("sync");
    let taken = before.saturating_sub(free());
    let base = images.join("copy/copy.hds");
    let same = std::fs::read(&base).expect("read") == std::fs::read(images.join("vm/vm.hds")).expect("read");
    assert!(same, "the clone differs");
    (base.metadata().expect("there").nlink(), taken)
}

#[test]
fn on_xfs_a_clone_shares_extents_and_no_file() {
    require!("loop", "xfs");
    let host = HostFs::new("xfs", 400 * MIB);
    let (links, taken) = cloned(host.path());
    assert_eq!(links, 1);
    assert!(taken < 8 * MIB, "the clone took {taken} bytes");
}

#[test]
fn on_ext4_a_clone_links_the_frozen_deltas() {
    require!("loop", "ext4");
    let host = HostFs::new("ext4", 400 * MIB);
    let (links, taken) = cloned(host.path());
    assert_eq!(links, 2);
    assert!(taken < 8 * MIB, "the clone took {taken} bytes");
}

/// FAULTS 72: overlayfs makes a file of its lower layer another one when it is linked, and the clone was refused because the
/// file "was replaced".
#[test]
fn on_overlayfs_files_of_the_lower_layer_are_cloned() {
    require!("loop", "ext4", "overlay");
    let lower = common::temp_dir();
    let run =
        |args: &[&str], folder: &Path| common::Run::ploopfs().args(args).in_folder(folder).limit(60).ok();
    run(&["create", "vm", "--size", "8M"], lower.path());
    run(&["snapshot", "create", "vm", "a"], lower.path());
    let host = HostFs::new("ext4", 128 * MIB);
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| host.path().join(name));
    [&upper, &work, &merged].iter().for_each(|path| std::fs::create_dir(path).expect("a folder"));
    let (lower_text, upper, work, point) =
        (common::text(lower.path()), common::text(&upper), common::text(&work), common::text(&merged));
    let options = format!("lowerdir={lower_text},upperdir={upper},workdir={work}");
    common::ok("mount", &["-t", "overlay", "-o", &options, "overlay", point]);
    let guest = Guest::adopt(&merged);
    for (new, more) in [("one", None), ("two", Some("--copy"))] {
        let args: Vec<&str> = ["clone", "vm@a", new].into_iter().chain(more).collect();
        run(&args, &merged);
        run(&["check", new], &merged);
    }
    guest.umount();
}

/// `vm` in the folder, with the snapshot `a`.
fn with_snapshot(size: &str) -> Folder {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", size]);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder
}

/// The names n1, n2 and so on.
fn new_names(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("n{n}")).collect()
}

/// Issue 19: a hundred clones took a hundred calls, each with seven syncs.
#[test]
fn a_hundred_clones_of_one_call_share_one_sync_of_the_file_system() {
    require!("loop", "ext4", "strace");
    let host = HostFs::new("ext4", 256 * MIB);
    let run = |args: &[&str]| Run::ploopfs().args(args).in_folder(host.path()).limit(60).ok();
    run(&["create", "vm", "--size", "64M"]);
    run(&["snapshot", "create", "vm", "a"]);
    let names = new_names(100);
    let log = common::temp_dir();
    let calls = log.path().join("calls");
    let ploopfs = env!("CARGO_BIN_EXE_ploopfs");
    let strace = ["-f", "-qq", "-e", "trace=fsync,fdatasync,syncfs,sync", "-o", text(&calls), ploopfs];
    let said = Run::new("strace")
        .args(strace)
        .args(["clone", "vm@a"])
        .args(&names)
        .in_folder(host.path())
        .limit(120)
        .ok();
    assert_eq!(said.lines().filter(|line| line.starts_with("created ")).count(), 100, "{said}");
    let calls = std::fs::read_to_string(calls).expect("the calls");
    let count = |what: &str| calls.lines().filter(|line| line.contains(what)).count();
    assert_eq!(count("syncfs("), 1, "{calls}");
    // Those of the origin's own open and close, the folder behind the syncfs and behind the renames.
    assert!(count("sync(") <= 16, "{calls}");
    for name in [&names[0], &names[57], &names[99]] {
        run(&["check", name]);
    }
}

#[test]
fn clones_of_one_call_are_judged_before_the_first_is_made() {
    let folder = with_snapshot("8M");
    folder.ok(&["create", "single", "--size", "8M"]);
    folder.ok(&["create", "there", "--size", "8M"]);
    std::fs::create_dir(folder.path("other")).expect("a folder");
    let before = folder.names();
    let many = new_names(257);
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for image in ["vm@a", "vm", "single"] {
        for (status, new) in [
            (1, &["n1", "there", "n2"][..]),
            (1, &["n1", "there.hds"]),
            (2, &["n1", "n2", "n1"]),
            (2, &["n1", "./n1"]),
            // Shown under one name.
            (2, &["n1", "n1.hds"]),
            (2, &["n1", ".hidden"]),
            (2, &["n1", "other/n2"]),
            (2, &["n1", "n\u{1}2"]),
            (2, &many),
        ] {
            let args: Vec<&str> = ["clone", image].into_iter().chain(new.iter().copied()).collect();
            let said = folder.fails(status, &args);
            assert_eq!(folder.names(), before, "{args:?} changed something: {said}");
        }
    }
    let list = folder.ok(&["snapshot", "list", "vm"]);
    assert_eq!(list.lines().count(), 3, "a snapshot was taken for nothing: {list}");
}

#[test]
fn clones_of_a_live_disk_at_once_stand_on_one_new_snapshot_and_are_independent() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "8M"]);
    let said = folder.ok(&["clone", "vm", "n1", "n2", "n3"]);
    assert!(said.contains("the clones stand on the new snapshot "), "{said}");
    let list: serde_json::Value =
        serde_json::from_str(&folder.ok(&["snapshot", "list", "vm", "--json"])).expect("JSON");
    assert_eq!(list["snapshots"].as_array().expect("a list").len(), 2, "{list:#}");
    assert_eq!(folder.names(), ["n1", "n2", "n3", "vm"]);
    ["n1", "n2", "n3", "vm"].iter().for_each(|name| drop(folder.ok(&["check", name])));
}

/// Issue 19: each clone of a served folder cost a look at all of it, and was seen two seconds later by others.
#[test]
fn clones_of_one_call_are_all_shown_when_it_returns_and_no_write_to_one_is_seen_in_another() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm=8M"]);
    mount.open("vm").write_all_at(&[7; 4096], MIB).expect("written");
    let flat = mount.flat("vm");
    Run::ploopfs().args(["snapshot", "create", text(&flat), "a"]).ok();
    let names = new_names(40);
    let new: Vec<String> = names.iter().map(|name| text(&mount.flat(name)).to_owned()).collect();
    let said = Run::ploopfs().args(["clone", &format!("{}@a", text(&flat))]).args(&new).limit(60).ok();
    assert!(names.iter().all(|name| mount.flat(name).exists()), "{said}");
    assert_eq!(said.lines().count(), 40, "{said}");
    for (n, name) in names.iter().enumerate().take(4) {
        mount.open(name).write_all_at(&[10 + n as u8; 4096], 0).expect("written");
    }
    for (n, name) in names.iter().enumerate().take(5) {
        let wanted = if n < 4 { 10 + n as u8 } else { 0 };
        let byte = |at| common::read_at(&mount.open(name), at, 1).expect("read")[0];
        assert_eq!((byte(0), byte(MIB)), (wanted, 7), "{name}");
    }
    mount.umount();
    for name in &names[..2] {
        Run::ploopfs().args(["check", text(&mount.images().join(name))]).ok();
    }
}

#[test]
fn a_cancel_while_clones_are_copied_leaves_none_and_says_so() {
    require!("loop", "ext4");
    let folder = Folder::new();
    std::fs::write(folder.path("data.raw"), vec![0xA5; 4 * MIB as usize]).expect("data");
    folder.ok(&["import", "data.raw", "vm", "--format", "raw"]);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    // Neither extents nor links are shared between two file systems.
    let host = HostFs::new("ext4", 256 * MIB);
    let child = Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(["clone", "--copy", "--rate", "2M", "vm@a"])
        .args(["n1", "n2", "n3"].map(|name| host.path().join(name)))
        .current_dir(folder.0.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let begun = || host.path().join(".n2.new/n2.hds").exists();
    assert!(until(Duration::from_secs(30), begun), "it never came to the second");
    common::signal(child.id(), rustix::process::Signal::INT);
    let done = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("none of 3 images was made"), "{said}");
    let left = host.path().read_dir().expect("the folder").flatten().map(|entry| entry.file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["lost+found"]);
    folder.ok(&["check", "vm"]);
}

/// A bound of the rate is of what is copied: a clone that shares its extents, or a link, waited as long as a copy.
#[test]
fn a_clone_that_copies_nothing_is_not_held_up_by_a_rate() {
    let folder = with_snapshot("64M");
    let began = std::time::Instant::now();
    folder.ok(&["clone", "--rate", "10K", "vm@a", "n1", "n2"]);
    // The base's file alone has a cluster of 1 MiB: 100 s.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn a_template_has_small_clusters_and_a_map_that_stays_small() {
    let folder = Folder::new();
    let cluster = |name: &str| {
        let info: serde_json::Value =
            serde_json::from_str(&folder.ok(&["info", name, "--json"])).expect("JSON");
        info["levels"][0]["cluster"].as_u64().expect("a size")
    };
    for (name, size, wanted) in
        [("a", "10G", 64 << 10), ("b", "64G", 64 << 10), ("c", "65G", 128 << 10), ("d", "4T", 1 << 20)]
    {
        folder.ok(&["create", name, "--size", size, "--template"]);
        assert_eq!(cluster(name), wanted, "{size}");
    }
    std::fs::write(folder.path("data.raw"), vec![0xA5; 100_000]).expect("data");
    folder.ok(&["import", "--template", "data.raw", "e", "--format", "raw"]);
    assert_eq!(cluster("e"), 64 << 10);
    folder.fails(2, &["create", "f", "--size", "1G", "--template", "--cluster", "1M"]);
}
