//! What an image is, and is not: a level of a layered image given as one is refused by whatever would change it, a refused
//! command changes nothing, and a look tells nothing of files that are none of the image's.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Finished, Guest, Mount, Run, temp_dir, text, until};
use ploopfs::format::descriptor::Descriptor;
use serde_json::Value;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

/// Every name below `folder` and, of files, the content. Without locks, which ploop makes, too, and a daemon's own folder.
fn look(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let meta = path.symlink_metadata().expect("stat");
            if path.extension().is_some_and(|e| e == "lck") || path.ends_with(".ploopfs") {
                continue;
            }
            if meta.is_dir() {
                folders.push(path.clone());
            }
            let content = if meta.is_file() { fs::read(&path).expect("read") } else { Vec::new() };
            found.insert(path, content);
        }
    }
    found
}

/// A folder with the layered image `vm`, 8 MiB, which has the snapshot `s1`.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(temp_dir());
        folder.ok(&["create", "vm", "--size", "8M"]);
        folder.ok(&["snapshot", "create", "vm", "s1"]);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Finished {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).run()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).ok()
    }

    /// The files of `vm`: its base, its top.
    fn levels(&self) -> [PathBuf; 2] {
        let top =
            fs::read_dir(self.path("vm")).expect("a folder").map(|entry| entry.expect("an entry").path());
        let top = top.into_iter().find(|path| text(path).contains(".{")).expect("a top");
        [self.path("vm/vm.hds"), top]
    }

    /// Runs a command that must refuse `level`, name `vm`, and change nothing.
    #[track_caller]
    fn refuses(&self, args: &[&str]) {
        let before = look(self.0.path());
        let done = self.run(args);
        assert_eq!(done.code(), Some(2), "{args:?}: {done}");
        let said = done.output();
        assert!(said.contains("the layered image") && said.contains("/vm"), "{args:?}: {said}");
        assert!(look(self.0.path()) == before, "{args:?} changed the folder");
    }
}

/// What changes an image; F is the image.
const CHANGES: [&[&str]; 13] = [
    &["snapshot", "create", "F", "x"],
    &["snapshot", "delete", "F", "s1"],
    &["snapshot", "switch", "F", "s1"],
    &["merge", "F", "s1"],
    &["clone", "F", "new"],
    &["backup", "F", "-o", "stream"],
    &["resize", "F", "16M"],
    &["compact", "F"],
    &["compact", "F", "--defrag"],
    &["cbt", "start", "F"],
    &["cbt", "stop", "F"],
    &["check", "F", "--repair"],
    &["meta", "restore", "dump", "F"],
];

fn with<'a>(change: &[&'a str], file: &'a str) -> Vec<&'a str> {
    change.iter().map(|word| if *word == "F" { file } else { word }).collect()
}

#[test]
fn a_level_given_as_an_image_is_refused_and_nothing_changes() {
    let folder = Folder::new();
    let dump = folder.ok(&["meta", "dump", "vm/vm.hds"]);
    fs::write(folder.path("dump"), dump).expect("written");
    for level in folder.levels() {
        for change in CHANGES {
            folder.refuses(&with(change, text(&level)));
        }
    }
    folder.ok(&["check", "vm"]);
    assert!(!folder.path("stream").exists());
}

#[test]
fn a_level_is_known_whatever_it_is_called_on_the_way() {
    let folder = Folder::new();
    let elsewhere = temp_dir();
    symlink(folder.path("vm"), elsewhere.path().join("link")).expect("a link");
    symlink(folder.0.path(), elsewhere.path().join("images")).expect("a link");
    let (by_link, by_folder) = (elsewhere.path().join("link/vm.hds"), elsewhere.path().join("images/vm/vm"));
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("other.hds")).expect("a second name");
    fs::create_dir_all(folder.path("deep/er")).expect("folders");
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("deep/er/third.raw")).expect("a third name");
    let names = ["vm/vm", "./vm/../vm/vm.hds", "other", "other.hds", "deep/er/third.raw"];
    for name in names.iter().copied().chain([text(&by_link), text(&by_folder)]) {
        folder.refuses(&["resize", name, "16M"]);
        folder.refuses(&["snapshot", "create", name, "x"]);
    }
    folder.ok(&["check", "vm"]);
}

#[test]
fn a_level_is_known_through_a_bind_mount_of_its_folder_or_of_itself() {
    require!("loop");
    let folder = Folder::new();
    let elsewhere = temp_dir();
    let (beside, file) = (elsewhere.path().join("beside"), elsewhere.path().join("disk.hds"));
    fs::create_dir(&beside).expect("a folder");
    fs::write(&file, "").expect("a file");
    fs::create_dir(folder.path("bases")).expect("a folder");
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("bases/b.hds")).expect("a second name");
    let bind = |from: &Path, to: &Path| {
        common::ok("mount", &["--bind", text(from), text(to)]);
        Guest::adopt(to)
    };
    let _mounted = [bind(&folder.path("bases"), &beside), bind(&folder.path("vm/vm.hds"), &file)];
    folder.refuses(&["resize", text(&beside.join("b")), "16M"]);
    folder.refuses(&["snapshot", "create", text(&file), "x"]);
}

#[test]
fn a_folder_that_a_crash_left_before_it_got_its_name_makes_no_level_of_the_file() {
    let folder = Folder(temp_dir());
    folder.ok(&["create", "a", "--size", "8M"]);
    let left = folder.path(".a.new");
    fs::create_dir(&left).expect("a folder");
    fs::hard_link(folder.path("a.hds"), left.join("a.hds")).expect("a second name");
    let xml = Descriptor::new(8 << 11, 2048, "a.hds", false).to_xml();
    fs::write(left.join("DiskDescriptor.xml"), xml).expect("written");
    folder.ok(&["resize", "a", "16M"]);
    folder.ok(&["snapshot", "create", "a", "s"]);
    assert!(!left.exists());
}

#[test]
fn a_file_that_a_descriptor_of_another_folder_names_is_a_level_of_that_image() {
    let folder = Folder::new();
    fs::create_dir(folder.path("bases")).expect("a folder");
    fs::rename(folder.path("vm/vm.hds"), folder.path("bases/b.hds")).expect("moved");
    let xml = folder.path("vm/DiskDescriptor.xml");
    let named = fs::read_to_string(&xml).expect("read").replace("<File>vm.hds<", "<File>../bases/b.hds<");
    fs::write(&xml, named).expect("written");
    folder.ok(&["info", "vm@s1"]);
    folder.refuses(&["snapshot", "create", "bases/b", "x"]);
    folder.refuses(&["compact", "bases/b.hds"]);
    // A file beside the image's folder may be another image's too: a merge copies it, and leaves it as it is.
    let before = fs::read(folder.path("bases/b.hds")).expect("read");
    folder.ok(&["snapshot", "delete", "vm", "s1"]);
    assert!(fs::read(folder.path("bases/b.hds")).expect("there") == before, "the merge changed it");
    folder.ok(&["check", "vm"]);
}

/// A second name of a level, in a folder that neither is around the image nor in one that is.
#[test]
fn a_level_with_a_name_far_away_is_refused_where_its_image_is_served_and_named_elsewhere() {
    require!("fuse");
    let folder = Folder::new();
    let images = folder.0.path().join("here/images");
    let far = folder.0.path().join("far/away/of/it");
    [&images, &far].into_iter().for_each(|dir| fs::create_dir_all(dir).expect("folders"));
    fs::rename(folder.0.path().join("vm"), images.join("vm")).expect("moved");
    let far = far.join("x.hds");
    fs::hard_link(images.join("vm/vm.hds"), &far).expect("linked");
    let before = look(&images);
    let dry = Run::ploopfs().args(["check", "--repair", "--dry-run", text(&far)]).run();
    assert!(dry.success() && !dry.stderr.contains("hard links"), "{dry}");
    let warned = Run::ploopfs().args(["check", "--repair", text(&far)]).run();
    assert!(warned.stderr.contains("has 2 names") && warned.stderr.contains("-samefile"), "{warned}");
    let mount = Mount::over(&images, &[]);
    for args in [&["resize", "16M"][..], &["compact"], &["check", "--repair"], &["snapshot", "create"]] {
        let (first, rest) = args.split_at(if args[0] == "resize" { 1 } else { args.len() });
        let done = Run::ploopfs().args(first).arg(text(&far)).args(rest).run();
        assert_eq!(done.code(), Some(2), "{done}");
        assert!(done.stderr.contains(text(&images.join("vm"))), "{done}");
    }
    drop(mount);
    assert!(look(&images) == before && far.exists(), "changed");
}

/// It is opened by nothing, and a check found nothing.
#[test]
fn a_check_finds_two_levels_that_are_one_file() {
    let folder = Folder::new();
    let [base, top] = folder.levels();
    fs::remove_file(&base).and_then(|()| fs::hard_link(&top, &base)).expect("linked");
    let done = folder.run(&["check", "vm"]);
    assert_eq!(done.code(), Some(3), "{done}");
    assert!(done.output().contains("is the same file as"), "{done}");
}

#[test]
fn reading_commands_go_on_with_a_level() {
    let folder = Folder::new();
    for command in ["info", "check", "map"] {
        folder.ok(&[command, "vm/vm.hds"]);
    }
    folder.ok(&["compact", "vm/vm.hds", "--dry-run"]);
    folder.ok(&["export", "vm/vm.hds", "flat"]);
    folder.ok(&["meta", "dump", "vm/vm.hds"]);
}

#[test]
fn a_level_is_refused_while_a_mount_serves_its_image_and_nobody_has_it_open() {
    require!("fuse");
    let folder = Folder::new();
    let mut mount = Mount::over(folder.0.path(), &[]);
    for change in CHANGES.iter().filter(|change| change[0] != "meta") {
        folder.refuses(&with(change, "vm/vm.hds"));
    }
    mount.umount();
    folder.ok(&["check", "vm"]);
}

#[test]
fn a_mount_does_not_serve_a_second_name_of_a_level_as_an_image() {
    require!("fuse");
    let folder = Folder::new();
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("other.hds")).expect("a second name");
    let reason = |name: &str| {
        let listed: Value = serde_json::from_str(&folder.ok(&["list", ".", "--json"])).expect("JSON");
        let rows = listed["images"].as_array().expect("a list").clone();
        let row = rows.into_iter().find(|row| row["name"] == name).expect("a row");
        row["reason"].as_str().map(str::to_owned)
    };
    assert!(reason("other").is_some_and(|why| why.contains("a level of the layered image")));
    let mut mount = Mount::over(folder.0.path(), &[]);
    assert!(mount.flat("vm").exists() && !mount.flat("other").exists());
    assert!(reason("other").is_some_and(|why| why.contains("a level of the layered image")));
    // Of a name that comes later the same is true.
    fs::hard_link(folder.path("vm/vm.hds"), folder.path("late.hds")).expect("a third name");
    folder.ok(&["create", "new", "--size", "8M"]);
    assert!(until(SOON, || mount.flat("new").exists()));
    assert!(!mount.flat("late").exists());
    mount.umount();
}

#[test]
fn a_refused_command_leaves_a_cut_image_as_it_was() {
    for change in CHANGES.iter().filter(|change| !change.contains(&"--repair") && change[0] != "meta") {
        let folder = Folder(temp_dir());
        folder.ok(&["create", "a", "--size", "64M"]);
        let file = fs::OpenOptions::new().write(true).open(folder.path("a.hds"));
        file.and_then(|file| file.set_len(4096)).expect("cut");
        let before = look(folder.0.path());
        let done = folder.run(&with(change, "a"));
        assert!(!done.success(), "{done}");
        assert!(look(folder.0.path()) == before, "{change:?} changed the folder: {done}");
    }
}

#[test]
fn a_refused_first_snapshot_leaves_the_single_file() {
    let folder = Folder(temp_dir());
    folder.ok(&["create", "a", "--size", "64M"]);
    let before = look(folder.0.path());
    let same = || assert!(look(folder.0.path()) == before, "{:?}", look(folder.0.path()).keys());
    for name in ["a b", ".x", &"x".repeat(65)] {
        assert!(!folder.run(&["snapshot", "create", "a", name]).success());
        same();
    }
    // No folder for the clone; a host that shares nothing with ours.
    assert!(!folder.run(&["clone", "a", "none/such"]).success());
    same();
    let other = common::memory_dir();
    let device = |path: &Path| path.metadata().expect("stat").dev();
    if device(other.path()) != device(folder.0.path()) {
        let done = folder.run(&["clone", "a", text(&other.path().join("b"))]);
        assert!(done.output().contains("--copy"), "{done}");
        same();
        assert_eq!(fs::read_dir(other.path()).expect("a folder").count(), 0);
        folder.ok(&["clone", "a", text(&other.path().join("b")), "--copy"]);
    }
}

/// A file that may not become longer than this is a host that has space for a folder, and none for a new top.
const LIMITED: &str = "--fsize=262144:";

fn single(names: &[&str]) -> TempDir {
    let folder = temp_dir();
    for name in names {
        // The map of 4 TiB takes 16 MiB.
        let file = folder.path().join(name);
        match name.strip_suffix(".raw") {
            Some(_) => fs::File::create(&file).and_then(|file| file.set_len(4 << 40)).expect("a raw file"),
            None => drop(Run::ploopfs().args(["create", text(&file), "--size", "4T"]).ok()),
        }
    }
    folder
}

/// The names in `folder` that are no dot files.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

#[test]
fn a_first_snapshot_or_clone_that_finds_no_space_leaves_no_folder() {
    let folder = single(&["a.hds", "b.raw"]);
    for image in ["a.hds", "b.raw"] {
        let path = folder.path().join(image);
        let inode = path.metadata().expect("there").ino();
        let copy = folder.path().join("copy");
        for what in [&["snapshot", "create", text(&path)][..], &["clone", text(&path), text(&copy)]] {
            let done = Run::new("prlimit").args([LIMITED, env!("CARGO_BIN_EXE_ploopfs")]).args(what).run();
            assert_eq!(done.code(), Some(1), "{done}");
            assert_eq!(names(folder.path()), ["a.hds", "b.raw"], "{done}");
            assert_eq!(path.metadata().expect("there").ino(), inode);
        }
    }
    let path = folder.path().join("a.hds");
    Run::ploopfs().args(["snapshot", "create", text(&path), "s1"]).ok();
    Run::ploopfs().args(["check", text(&folder.path().join("a"))]).ok();
}

/// The folder that was being made has a hard link to the image's file, which counts as shared with another image.
#[test]
fn a_command_that_runs_out_of_descriptors_leaves_no_folder_with_a_link() {
    let folder = Folder::new();
    folder.ok(&["create", "s", "--size", "8M"]);
    folder.ok(&["backup", "vm@s1", "-o", "stream"]);
    let (names, mut failed) = (names(folder.0.path()), 0);
    for limit in 5..=14 {
        let limit = format!("--nofile={limit}:");
        let commands: [&[&str]; 4] = [
            &["snapshot", "create", "s"],
            &["clone", "vm", "new"],
            &["clone", "s", "new"],
            &["restore", "stream", "new"],
        ];
        for args in commands {
            let run = Run::new("prlimit").args([&limit, env!("CARGO_BIN_EXE_ploopfs")]).args(args);
            let done = run.in_folder(folder.0.path()).run();
            if done.success() {
                return assert!(failed > 8, "{failed} failed before it worked");
            }
            failed += 1;
            let all = fs::read_dir(folder.0.path()).expect("a folder").flatten();
            let left: Vec<_> = all.filter(|e| e.file_name().to_string_lossy().starts_with('.')).collect();
            assert!(left.is_empty(), "{left:?}: {done}");
            assert_eq!(self::names(folder.0.path()), names, "{done}");
        }
    }
    panic!("it never had enough");
}

/// The snapshot that it takes makes a folder of a single file, and so did one of which nothing came.
#[test]
fn a_failed_backup_of_a_single_file_leaves_a_single_file() {
    let folder = temp_dir();
    let path = |name: &str| folder.path().join(name);
    Run::ploopfs().args(["create", text(&path("a.hds")), "--size", "8M"]).ok();
    fs::write(path("b.raw"), vec![7; 8 << 20]).expect("a raw file");
    fs::write(path("content"), [&[7; 3 << 20][..], &vec![0; 5 << 20]].concat()).expect("a disk");
    Run::ploopfs().args(["import", text(&path("content")), text(&path("c.hds"))]).ok();
    for image in ["a.hds", "b.raw", "c.hds"] {
        let line = format!("{} backup {} > /dev/full", env!("CARGO_BIN_EXE_ploopfs"), text(&path(image)));
        let done = Run::new("sh").args(["-c", &line]).run();
        assert_eq!(done.code(), Some(1), "{done}");
        assert_eq!(names(folder.path()), ["a.hds", "b.raw", "c.hds", "content"], "{image}: {done}");
        Run::ploopfs().args(["check", text(&path(image))]).ok();
    }
    Run::ploopfs().args(["export", text(&path("c.hds")), text(&path("back"))]).ok();
    assert!(fs::read(path("back")).expect("read") == fs::read(path("content")).expect("read"));
}

#[test]
fn a_first_snapshot_that_finds_no_space_leaves_no_folder_under_a_disk_in_use() {
    require!("fuse");
    let folder = single(&["a.hds", "b.raw"]);
    let mount = Mount::over(folder.path(), &["--on-full", "error"]);
    let pid = mount.pid().to_string();
    let limit = |limit: &str| drop(Run::new("prlimit").args(["--pid", &pid, limit]).ok());
    for image in ["a", "b"] {
        let open = mount.open(image);
        open.write_all_at(b"before", 0).expect("written");
        open.sync_all().expect("synced");
        limit(LIMITED);
        for name in ["s1", "s2"] {
            let done =
                Run::ploopfs().args(["snapshot", "create", text(&folder.path().join(image)), name]).run();
            assert_eq!(done.code(), Some(1), "{done}");
            assert_eq!(names(folder.path()), ["a.hds", "b.raw"], "{done}");
        }
        limit("--fsize=unlimited:");
        open.write_all_at(b"behind", 4096).expect("written");
        open.sync_all().expect("synced");
        // Nothing else may have it: the lock is what it was.
        let file = folder.path().join(if image == "a" { "a.hds" } else { "b.raw" });
        let other = Run::ploopfs().args(["check", text(&file)]).run();
        assert_eq!(other.code(), Some(4), "{other}");
        drop(open);
        let mut read = [0; 6];
        mount.open(image).read_exact_at(&mut read, 4096).expect("read");
        assert_eq!(&read, b"behind");
    }
    let open = mount.open("a");
    Run::ploopfs().args(["snapshot", "create", text(&folder.path().join("a.hds")), "s3"]).ok();
    open.write_all_at(b"later!", 0).expect("written");
    let mut read = [0; 6];
    fs::File::open(mount.flat(".snapshots/a/s3")).expect("opens").read_exact_at(&mut read, 0).expect("read");
    assert_eq!(&read, b"before");
    drop((open, mount));
    Run::ploopfs().args(["check", text(&folder.path().join("a"))]).ok();
}

#[test]
fn snapshot_list_tells_nothing_of_a_file_outside_of_the_images_folder() {
    let folder = Folder::new();
    let outside = temp_dir();
    let secret = outside.path().join("secret");
    fs::write(&secret, vec![7; 3 << 20]).expect("written");
    let xml = folder.path("vm/DiskDescriptor.xml");
    let good = fs::read_to_string(&xml).expect("read");
    let steps = Path::new("../../../../../..").join(secret.strip_prefix("/").expect("absolute"));
    for named in [text(&secret), text(&steps)] {
        fs::write(&xml, good.replace("<File>vm.hds<", &format!("<File>{named}<"))).expect("written");
        let done = folder.run(&["snapshot", "list", "vm", "--json"]);
        assert!(!done.success() && done.output().contains("File in the descriptor"), "{done}");
        assert!(!done.output().contains("exclusive"), "{done}");
    }
}

#[test]
fn snapshot_list_of_what_is_no_image_is_refused() {
    let folder = Folder::new();
    fs::write(folder.path("notes.txt"), "milk, eggs").expect("written");
    fs::create_dir(folder.path("folder")).expect("a folder");
    for name in ["notes.txt", "folder"] {
        let done = folder.run(&["snapshot", "list", name]);
        assert!(!done.success(), "{done}");
    }
    folder.ok(&["create", "single", "--size", "8M"]);
    assert!(folder.ok(&["snapshot", "list", "single"]).contains("(the disk)"));
}
