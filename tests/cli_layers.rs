//! Snapshots, merge, switch, clone and resize with the real binary, offline; the control socket's long work; the guard
//! that freezes and thaws.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, Loop, Mount, Run, memory_dir, temp_dir, until};
use ploopfs::disk::open::OpenDisk;
use ploopfs::disk::work::carry_out;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;
use ploopfs::vdisk::Options;
use ploopfs::vdisk::live::Work;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with the image `vm`, 64 MiB.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder::at(temp_dir())
    }

    fn in_memory() -> Folder {
        Folder::at(memory_dir())
    }

    fn at(folder: TempDir) -> Folder {
        let folder = Folder(folder);
        folder.ok(&["create", "vm", "--size", "64M"]);
        folder
    }

    fn run(&self, args: &[&str]) -> common::Finished {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).run()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).ok()
    }

    #[track_caller]
    fn fails(&self, status: i32, args: &[&str]) -> String {
        let done = self.run(args);
        assert_eq!(done.code(), Some(status), "{done}");
        done.output()
    }

    fn names(&self, image: &str) -> Vec<String> {
        let text = self.ok(&["snapshot", "list", image, "--json"]);
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let lines = value["snapshots"].as_array().expect("a list");
        lines.iter().map(|line| line["name"].as_str().expect("a name").to_owned()).collect()
    }

    fn size(&self, image: &str) -> u64 {
        let value: Value = serde_json::from_str(&self.ok(&["info", image, "--json"])).expect("JSON");
        value["size"].as_u64().expect("a size")
    }
}

/// Writes to the image at `path`, at rest.
#[track_caller]
fn written(path: &Path, at: u64, bytes: &[u8]) {
    let opened = OpenDisk::open(path, None, Access::ReadWrite, Options::default()).expect("opens");
    opened.image.make_writable().and_then(|()| opened.image.write_at(at, bytes)).expect("written");
    opened.close().expect("closes");
}

#[test]
fn the_first_snapshot_turns_the_file_into_a_folder_that_its_old_name_still_finds() {
    let folder = Folder::new();
    assert_eq!(folder.ok(&["snapshot", "create", "vm", "monday"]).trim_end(), "monday");
    assert!(!folder.0.path().join("vm.hds").exists());
    assert!(folder.0.path().join("vm/DiskDescriptor.xml").exists());
    for name in ["vm", "vm.hds", "vm/DiskDescriptor.xml"] {
        assert_eq!(folder.names(name), ["monday", ""], "{name}");
        folder.ok(&["check", name]);
    }
}

#[test]
fn a_snapshot_without_a_name_is_named_by_the_time() {
    let folder = Folder::new();
    let name = folder.ok(&["snapshot", "create", "vm"]);
    let shape: String = name.trim_end().chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00.00.00");
}

#[test]
fn names_that_are_taken_or_illegal_are_refused_and_change_nothing() {
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "monday"]);
    for name in ["monday", "a/b", ".hidden", "", &"x".repeat(65)] {
        let done = folder.run(&["snapshot", "create", "vm", name]);
        assert!(!done.success(), "{done}");
    }
    assert_eq!(folder.names("vm"), ["monday", ""]);
}

#[test]
fn a_deleted_snapshot_goes_away_and_the_image_stays_sound() {
    let folder = Folder::new();
    for name in ["a", "b", "c"] {
        folder.ok(&["snapshot", "create", "vm", name]);
    }
    folder.ok(&["snapshot", "delete", "vm", "b"]);
    folder.ok(&["merge", "vm", "a"]);
    assert_eq!(folder.names("vm"), ["c", ""]);
    folder.ok(&["check", "vm"]);
    let said = folder.fails(1, &["snapshot", "delete", "vm", "b"]);
    assert!(said.contains("no snapshot b"), "{said}");
}

/// FAULTS 70: it copied 200 MiB up for one that had changed, and the image was in the ploop format afterwards.
#[test]
fn deleting_the_only_snapshot_of_a_raw_image_copies_what_has_changed_and_the_image_is_raw_again() {
    let folder = Folder::new();
    let path = |name: &str| folder.0.path().join(name);
    // A size on no border but a sector's.
    let mut bytes: Vec<u8> = (0..(16u32 << 20) + 1536).map(|n| (n >> 9) as u8 | 1).collect();
    fs::write(path("r.raw"), &bytes).expect("written");
    fs::set_permissions(path("r.raw"), fs::Permissions::from_mode(0o640)).expect("its mode");
    let before = path("r.raw").metadata().expect("there");
    for (work, name) in [(&["snapshot", "delete"][..], "s1"), (&["merge"], "s2")] {
        folder.ok(&["snapshot", "create", "r", name]);
        let end = bytes.len() as u64;
        for (at, byte) in [(5 << 20, name.as_bytes()[1]), (end - 512, name.as_bytes()[0])] {
            written(&path("r"), at, &[byte; 512]);
            bytes[at as usize..][..512].fill(byte);
        }
        let said = Run::ploopfs().args(work).args(["r", name]).in_folder(folder.0.path()).run();
        assert!(said.success() && said.output().is_empty(), "{said}");
        assert!(!path("r").exists(), "{:?}", folder.0.path().read_dir());
        let after = path("r.raw").metadata().expect("a raw file again");
        assert_eq!((after.ino(), after.mode(), after.nlink()), (before.ino(), before.mode(), 1));
        assert!(fs::read(path("r.raw")).expect("read") == bytes, "another content after {name}");
        assert_eq!(folder.names("r"), [""]);
    }
}

/// It did so without a word. Where the snapshot's own file has less, it still goes up.
#[test]
fn deleting_a_snapshot_of_a_raw_image_that_is_copied_up_says_first_what_that_comes_to() {
    let folder = Folder::new();
    fs::write(folder.0.path().join("r.raw"), vec![5; 3 << 20]).expect("written");
    folder.ok(&["snapshot", "create", "r", "s1"]);
    written(&folder.0.path().join("r"), 0, &vec![6; 2 << 20]);
    let said = Run::ploopfs().args(["merge", "r", "s1"]).in_folder(folder.0.path()).run();
    assert!(said.success() && said.stderr.contains("3 MiB of it are copied"), "{said}");
    assert!(said.stderr.contains("ploop format afterwards\n"), "{said}");
    folder.ok(&["check", "r"]);
    folder.ok(&["export", "r", "out"]);
    let expected = [vec![6; 2 << 20], vec![5; 1 << 20]].concat();
    assert!(fs::read(folder.0.path().join("out")).expect("read") == expected);
}

#[test]
fn a_deleted_snapshot_goes_when_nothing_stands_on_it_any_more() {
    let folder = Folder::new();
    for args in [
        &["snapshot", "create", "vm", "ground"][..],
        &["snapshot", "create", "vm", "a"],
        &["snapshot", "create", "vm", "b"],
        &["snapshot", "switch", "vm", "a"],
        // Both b and the live disk stand on a: its data stays for now.
        &["snapshot", "delete", "vm", "a"],
        &["snapshot", "switch", "vm", "ground"],
        &["snapshot", "delete", "vm", "b"],
    ] {
        folder.ok(args);
    }
    assert_eq!(folder.names("vm"), ["ground", ""]);
    let said = folder.ok(&["check", "vm"]);
    let deltas = std::fs::read_dir(folder.0.path().join("vm")).expect("the image's folder");
    let deltas =
        deltas.filter(|entry| entry.as_ref().is_ok_and(|e| e.metadata().is_ok_and(|m| m.len() > 100_000)));
    assert_eq!(deltas.count(), 2, "{said}");
}

/// It was taken until another label was written.
#[test]
fn the_name_of_a_deleted_snapshot_is_free_also_where_nothing_stood_on_it() {
    let folder = Folder::new();
    for args in [["create", "vm", "a"], ["create", "vm", "b"], ["switch", "vm", "a"], ["delete", "vm", "b"]] {
        folder.ok(&[&["snapshot"], &args[..]].concat());
    }
    folder.ok(&["snapshot", "create", "vm", "b"]);
    assert_eq!(folder.names("vm"), ["a", "b", ""]);
}

#[test]
fn merging_a_snapshot_on_which_nothing_stands_is_refused_and_loses_nothing() {
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder.ok(&["snapshot", "create", "vm", "b"]);
    folder.ok(&["snapshot", "switch", "vm", "a"]);
    let said = folder.fails(2, &["merge", "vm", "b"]);
    assert!(said.contains("nothing stands on b") && said.contains("snapshot delete"), "{said}");
    assert_eq!(folder.names("vm"), ["a", "b", ""]);
}

#[test]
fn a_switch_goes_back_to_a_snapshot() {
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder.ok(&["snapshot", "create", "vm", "b"]);
    folder.ok(&["snapshot", "switch", "vm", "a"]);
    assert_eq!(folder.names("vm"), ["a", "b", ""]);
    folder.ok(&["check", "vm"]);
}

/// Issue 19: a tree of 200 checkpoints: a line of them, branches off every other one, and jumps to any.
#[test]
fn a_tree_of_two_hundred_checkpoints_can_be_jumped_about_in() {
    let folder = Folder::in_memory();
    let name = |n: usize| format!("c{n}");
    let vm = || folder.0.path().join("vm");
    let work = |path: &Path, work: Work| drop(carry_out(path, &work, &Progress::new()).expect("done"));
    let at = |n: usize| {
        let path = if n == 0 { vm().with_extension("hds") } else { vm() };
        written(&path, 0, &(n as u64).to_le_bytes());
        work(&path, Work::Snapshot { label: Some(name(n)) });
    };
    (0..60).for_each(at);
    for n in 60..200 {
        work(&vm(), Work::Switch { snapshot: name((n * 37) % 60) });
        at(n);
    }
    assert_eq!(folder.names("vm").len(), 201);
    let began = Instant::now();
    for n in [150, 3, 199, 59, 0, 120] {
        folder.ok(&["snapshot", "switch", "vm", &name(n)]);
        let opened = OpenDisk::open(&vm(), None, Access::ReadOnly, Options::default()).expect("opens");
        assert_eq!(*opened.image.read_at(0, 8).expect("read"), (n as u64).to_le_bytes());
        opened.close().expect("closes");
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    folder.ok(&["check", "vm"]);
}

/// Issue 19: each switch wrote the notes of what it makes and drops four times, and the open before it once more.
#[test]
fn a_switch_at_rest_takes_eleven_syncs() {
    require!("strace");
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "a"]);
    let calls = folder.0.path().join("calls");
    let calls = calls.to_str().expect("UTF-8");
    let traced =
        ["-f", "-qq", "-e", "trace=fsync,fdatasync,syncfs", "-o", calls, env!("CARGO_BIN_EXE_ploopfs")];
    let switch = ["snapshot", "switch", "vm", "a"];
    Run::new("strace").args(traced).args(switch).in_folder(folder.0.path()).limit(60).ok();
    let calls = fs::read_to_string(calls).expect("the calls");
    assert!(calls.lines().filter(|line| line.contains("sync(")).count() <= 11, "{calls}");
}

/// The tree has no limit of its own but the descriptor's; the chain has, and says what to do.
#[test]
fn a_chain_that_is_as_deep_as_it_gets_says_so_and_stays_as_it_is() {
    let folder = Folder::in_memory();
    let vm = folder.0.path().join("vm");
    let snapshot = |path: &Path, n: usize| {
        carry_out(path, &Work::Snapshot { label: Some(format!("c{n}")) }, &Progress::new())
    };
    snapshot(&vm.with_extension("hds"), 1).expect("the first");
    (2..250).for_each(|n| drop(snapshot(&vm, n).expect("one more")));
    let said = folder.fails(1, &["snapshot", "create", "vm", "c250"]);
    assert!(said.contains("250 levels already; delete a snapshot first"), "{said}");
    let names = folder.names("vm");
    assert_eq!(names.len(), 250);
    // A branch lower down is not deeper.
    folder.ok(&["snapshot", "switch", "vm", "c10"]);
    folder.ok(&["snapshot", "create", "vm", "c250"]);
    assert_eq!(folder.names("vm").len(), 251);
}

/// The fields of docs/recipes.md#for-programs, and no others.
#[test]
fn what_makes_or_changes_something_says_so_as_json_with_a_version_and_a_time() {
    let folder = Folder::new();
    let path = |name: &str| folder.0.path().join(name).to_str().expect("UTF-8").to_owned();
    let null = Value::Null;
    let none: [String; 0] = [];
    for (args, image, snapshot, images, size) in [
        (
            &["create", "new", "--size", "1G"][..],
            null.clone(),
            null.clone(),
            &[path("new.hds")][..],
            Some(1 << 30),
        ),
        (&["snapshot", "create", "vm", "a"], path("vm").into(), "a".into(), &none[..], None),
        (&["clone", "vm@a", "n1", "n2"], path("vm").into(), "a".into(), &[path("n1"), path("n2")], None),
        (&["clone", "vm", "n3"], path("vm").into(), null.clone(), &[path("n3")], None),
        (&["snapshot", "switch", "vm", "a"], path("vm").into(), "a".into(), &none, None),
        (&["snapshot", "delete", "vm", "a"], path("vm").into(), "a".into(), &none, None),
    ] {
        let said = folder.ok(&[args, &["--json"]].concat());
        let value: Value = serde_json::from_str(&said).expect("JSON");
        let fields = value.as_object().expect("an object");
        let mut wanted = vec!["command", "image", "images", "note", "snapshot", "time", "version"];
        wanted.extend(size.map(|_| "size"));
        wanted.sort_unstable();
        let mut found: Vec<&str> = fields.keys().map(String::as_str).collect();
        found.sort_unstable();
        assert_eq!(found, wanted, "{said}");
        let command = if args[0] == "snapshot" { args[..2].join(" ") } else { args[0].to_owned() };
        assert_eq!((&value["version"], &value["command"]), (&1.into(), &command.into()), "{said}");
        assert_eq!((&value["image"], &value["snapshot"]), (&image, &snapshot), "{said}");
        assert_eq!(value["images"], serde_json::json!(images), "{said}");
        assert_eq!(value.get("size").and_then(Value::as_u64), size, "{said}");
        let noted = value["note"].as_str().is_some_and(|note| note.contains("new snapshot"));
        assert_eq!(noted, args[..] == ["clone", "vm", "n3"], "{said}");
        let time = value["time"].as_str().expect("a time").as_bytes();
        let shape = b"0000-00-00T00:00:00Z";
        let alike = |(a, b): (&u8, &u8)| if *b == b'0' { a.is_ascii_digit() } else { a == b };
        assert!(time.len() == shape.len() && time.iter().zip(shape).all(alike), "{said}");
    }
}

#[test]
fn a_clone_is_an_image_of_its_own_and_an_existing_name_is_refused_before_anything_is_done() {
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder.ok(&["clone", "vm@a", "new"]);
    folder.ok(&["check", "new"]);
    assert_eq!(folder.size("new"), folder.size("vm"));
    folder.fails(1, &["clone", "vm", "new"]);
    assert_eq!(folder.names("vm"), ["a", ""]);
}

#[test]
fn resizing_grows_files_and_layered_images_and_never_shrinks() {
    let folder = Folder::new();
    folder.ok(&["resize", "vm", "96M"]);
    assert_eq!(folder.size("vm"), 96 << 20);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder.ok(&["resize", "vm", "128M"]);
    assert_eq!((folder.size("vm"), folder.size("vm@a")), (128 << 20, 96 << 20));
    let said = folder.fails(2, &["resize", "vm", "1M"]);
    assert!(said.contains("smaller"), "{said}");
    folder.ok(&["check", "vm"]);
}

#[test]
fn a_single_file_has_no_snapshots_and_asking_for_one_changes_nothing() {
    let folder = Folder::new();
    for args in [["snapshot", "delete", "vm", "a"], ["snapshot", "switch", "vm", "a"]] {
        let said = folder.fails(1, &args);
        assert!(said.contains("has none"), "{said}");
    }
    folder.fails(1, &["clone", "vm@a", "new"]);
    folder.fails(1, &["info", "vm@a"]);
    assert!(folder.0.path().join("vm.hds").exists());
}

#[test]
fn check_finds_a_missing_file_and_one_outside_of_the_images_folder() {
    let folder = Folder::new();
    folder.ok(&["snapshot", "create", "vm", "a"]);
    let xml = folder.0.path().join("vm/DiskDescriptor.xml");
    let good = fs::read_to_string(&xml).expect("read");
    for file in ["gone.hds", "/etc/passwd", "../../../etc/passwd"] {
        fs::write(&xml, good.replace("<File>vm.hds</File>", &format!("<File>{file}</File>"))).expect("write");
        let said = folder.fails(3, &["check", "vm"]);
        assert!(
            said.contains("error: ") && said.contains(file.rsplit('/').next().expect("a name")),
            "{said}"
        );
    }
}

#[test]
fn hostile_lines_on_the_socket_are_refused_and_the_daemon_goes_on() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let socket = mount.images().join(".ploopfs/control");
    for line in [
        r#"{"v":1,"op":"work","image":"vm1"}"#,
        r#"{"v":1,"op":"work","image":"../../x","work":{"work":"resize","size":1}}"#,
        r#"{"v":1,"op":"work","image":"","work":{"work":"snapshot"},"rate":-1}"#,
        r#"{"v":1,"op":"snapshots","image":"/etc"}"#,
        r#"{"v":1,"op":"cancel","image":"vm1"}"#,
        r#"{"v":1,"op":"cancel"}"#,
    ] {
        let mut client = UnixStream::connect(&socket).expect("connect");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
        writeln!(client, "{line}").expect("send");
        let mut answer = String::new();
        BufReader::new(&client).read_line(&mut answer).expect("an answer");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(answer["ok"], false, "{line}: {answer}");
        assert!(answer["error"].as_str().is_some_and(|e| !e.is_empty()), "{line}: {answer}");
    }
    assert!(Run::ploopfs().args(["snapshot", "list"]).arg(mount.flat("vm1")).ok().contains("(the disk)"));
}

/// An ext4 that is frozen by the guard; thawed, whatever happens.
struct Frozen {
    guard: Child,
    says: BufReader<std::process::ChildStdout>,
    point: PathBuf,
}

impl Frozen {
    fn new(point: &Path) -> Frozen {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.arg("thaw-guard").args([point, point]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guard = command.spawn().expect("the guard");
        let says = BufReader::new(guard.stdout.take().expect("its output"));
        let mut frozen = Frozen { guard, says, point: point.to_owned() };
        assert_eq!(frozen.line(), "frozen");
        frozen
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    /// A process that writes to the file system.
    fn writer(&self) -> Child {
        let script = format!("echo x > '{}/file' && sync -f '{0}'", self.point.display());
        Command::new("sh").args(["-c", &script]).spawn().expect("sh")
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.point).stderr(Stdio::null()).status();
        let _ = self.guard.wait();
    }
}

fn ext4(folder: &Path) -> (Loop, Guest) {
    let file = folder.join("disk");
    fs::File::create(&file).and_then(|f| f.set_len(64 << 20)).expect("a file");
    let device = Loop::attach(&file, false);
    common::ok("mkfs.ext4", &["-q", common::text(device.device())]);
    let guest = Guest::mount(device.device(), "rw");
    (device, guest)
}

fn ended(child: &mut Child, limit: Duration) -> bool {
    until(limit, || child.try_wait().expect("its state").is_some())
}

#[test]
fn the_guard_freezes_a_file_system_until_the_command_is_done_or_dies() {
    require!("loop");
    let folder = temp_dir();
    let (_device, guest) = ext4(folder.path());
    let mut frozen = Frozen::new(guest.path());
    let mut writer = frozen.writer();
    assert!(!ended(&mut writer, Duration::from_millis(500)), "a write went through while frozen");
    // What the death of the command looks like to the guard, SIGKILL included.
    drop(frozen.guard.stdin.take());
    assert_eq!(frozen.line(), "thawed");
    assert!(ended(&mut writer, Duration::from_secs(20)), "still frozen");
}

#[test]
fn the_guard_thaws_by_itself_after_ten_seconds_and_says_that_it_was_late() {
    require!("loop");
    let folder = temp_dir();
    let (_device, guest) = ext4(folder.path());
    let begun = Instant::now();
    let mut frozen = Frozen::new(guest.path());
    let mut writer = frozen.writer();
    assert_eq!(frozen.line(), "late");
    assert!((9..20).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert!(ended(&mut writer, Duration::from_secs(20)), "still frozen");
}

/// FAULTS 73: TAKEN was the time of the last write to a file, which copies, merges and writes move.
#[test]
fn a_snapshot_was_taken_when_it_was_taken_whatever_becomes_of_its_file() {
    let folder = Folder::new();
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_577_836_800);
    let age = |file: &Path| {
        fs::File::options().write(true).open(file).and_then(|f| f.set_modified(old)).expect("aged")
    };
    age(&folder.0.path().join("vm.hds"));
    let begun = now();
    for name in ["a", "b", "c"] {
        folder.ok(&["snapshot", "create", "vm", name]);
    }
    let ended = now();
    let taken = |image: &str| -> Vec<(String, u64)> {
        let value: Value =
            serde_json::from_str(&folder.ok(&["snapshot", "list", image, "--json"])).expect("JSON");
        let lines = value["snapshots"].as_array().expect("lines").clone();
        let of = |line: &Value| Some((line["name"].as_str()?.to_owned(), line["created"].as_u64()?));
        lines.iter().filter_map(of).collect()
    };
    let first = taken("vm");
    assert_eq!(first.len(), 3);
    assert!(first.iter().all(|(_, time)| (begun..=ended).contains(time)), "{begun} {first:?} {ended}");
    // A copy, a neighbour that goes, a file that was touched.
    common::ok(
        "cp",
        &["-r", common::text(&folder.0.path().join("vm")), common::text(&folder.0.path().join("copy"))],
    );
    folder.ok(&["snapshot", "delete", "copy", "a"]);
    for file in folder.0.path().join("copy").read_dir().expect("the folder") {
        age(&file.expect("an entry").path());
    }
    assert_eq!(taken("copy"), first[1..]);
    folder.ok(&["clone", "vm@b", "new"]);
    assert_eq!(taken("new"), first[..2]);
    let table = folder.ok(&["snapshot", "list", "vm"]);
    assert!(table.lines().all(|line| line.len() <= 80), "{table}");
    // What another program took has no time that we know.
    fs::remove_file(folder.0.path().join("copy/ploopfs.json")).expect("remove");
    assert!(taken("copy").is_empty());
}
