//! `ploopfs backup` and `restore`, through the real binary: what comes back is what was there, byte for byte, and a stream
//! that is damaged, cut off or of another image leaves nothing.

mod common;

use std::fs::File;
use std::io::{Cursor, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Folder, Mount, Rng, Run, memory_dir, temp_dir, text, until};
use ploopfs::progress::Progress;
use ploopfs::transfer::restore::Stream;
use serde_json::Value;

impl Folder {
    /// A ploopfs that runs by itself, in its folder.
    fn start(&self, args: &[&str], stdin: Stdio, stdout: Stdio) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.args(args).current_dir(self.0.path()).stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        command.spawn().expect("ploopfs starts")
    }

    fn snapshots(&self, image: &str) -> Vec<String> {
        let value: Value =
            serde_json::from_str(&self.ok(&["snapshot", "list", image, "--json"])).expect("JSON");
        let lines = value["snapshots"].as_array().expect("a list").clone();
        lines.iter().map(|line| line["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// The content of an image or a snapshot that nobody serves.
    fn content(&self, image: &str) -> Vec<u8> {
        let file = self.path(".content");
        self.ok(&["export", image, text(&file)]);
        let bytes = std::fs::read(&file).expect("the exported file");
        std::fs::remove_file(file).expect("remove");
        bytes
    }

    /// Everything in a folder of it.
    fn files(&self, folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = self.path(folder).read_dir().expect("the folder").flatten();
        // The file of the lock appears with the first lock, and is empty.
        let entries = entries.filter(|e| e.path().extension().is_none_or(|suffix| suffix != "lck"));
        let mut all: Vec<_> =
            entries.map(|e| (e.path(), std::fs::read(e.path()).unwrap_or_default())).collect();
        all.sort();
        all
    }
}

fn signal(child: &Child) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a child's number");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our child");
}

/// Writes, discards and writes of zeroes somewhere in the live disk.
fn churn(disk: &Path, rng: &mut Rng) {
    let file = File::options().read(true).write(true).open(disk).expect("open");
    let size = file.metadata().expect("stat").len();
    for _ in 0..10 {
        let offset = rng.below(size / 512) * 512;
        let len = (512 + rng.below(300) * 512).min(size - offset);
        match rng.below(4) {
            0 => common::punch(&file, offset, len).expect("punch"),
            1 => file.write_all_at(&vec![0; len as usize], offset).expect("write"),
            _ => file.write_all_at(&rng.bytes(len as usize), offset).expect("write"),
        }
    }
}

#[test]
fn a_chain_of_full_and_incremental_backups_restores_every_snapshot_live_and_offline() {
    require!("fuse");
    for (seed, cluster) in [(1, "64K"), (2, "1M")] {
        let folder = Folder::new();
        folder.ok(&["create", "vm", "--size", "8M", "--cluster", cluster]);
        let (mut rng, names) = (Rng::new(seed), ["s0", "s1", "s2", "s3"]);
        let mut mount = Mount::over(folder.0.path(), &[]);
        let mut disks = Vec::new();
        let mut since: Option<&str> = None;
        let line = |name: &str, since: Option<&str>, how: &str| {
            let file = format!("{name}.{how}");
            let mut line = vec!["backup".to_owned(), format!("vm@{name}"), "-o".to_owned(), file];
            line.extend(since.map(|since| format!("--since={since}")));
            line
        };
        let backup = |line: Vec<String>| {
            folder.ok(&line.iter().map(String::as_str).collect::<Vec<_>>());
        };
        for name in names {
            churn(&mount.flat("vm"), &mut rng);
            if name == "s2" {
                folder.ok(&["resize", "vm", "9M"]);
                churn(&mount.flat("vm"), &mut rng);
            }
            folder.ok(&["snapshot", "create", "vm", name]);
            disks.push(std::fs::read(mount.flat("vm")).expect("the disk"));
            churn(&mount.flat("vm"), &mut rng);
            backup(line(name, since, "live"));
            since = Some(name);
        }
        mount.umount();
        since = None;
        for name in names {
            backup(line(name, since, "offline"));
            since = Some(name);
        }
        for how in ["live", "offline"] {
            let copy = format!("copy-{how}");
            for name in names {
                folder.ok(&["restore", &format!("{name}.{how}"), &copy]);
            }
            for (name, disk) in names.iter().zip(&disks) {
                assert!(folder.content(&format!("{copy}@{name}")) == *disk, "{how}, {name}");
            }
            assert!(folder.content(&copy) == disks[3], "{how}: the live disk");
            assert_eq!(folder.snapshots(&copy), ["s0", "s1", "s2", "s3", ""]);
            folder.ok(&["check", &copy]);
        }
    }
}

#[test]
fn a_backup_of_a_disk_in_use_takes_a_snapshot_and_keeps_it_as_the_next_base() {
    require!("fuse");
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "16M"]);
    let mut mount = Mount::over(folder.0.path(), &[]);
    let mut rng = Rng::new(3);
    churn(&mount.flat("vm"), &mut rng);
    let before = std::fs::read(mount.flat("vm")).expect("the disk");
    let held = File::options().read(true).write(true).open(mount.flat("vm")).expect("open");
    let done = folder.run(&["backup", "vm", "-o", "full"]);
    assert!(done.success() && done.stderr.contains("was taken and is kept"), "{done}");
    let first = folder.snapshots("vm").remove(0);
    churn(&mount.flat("vm"), &mut rng);
    let after = std::fs::read(mount.flat("vm")).expect("the disk");
    // Named as the mount shows it, and through a pipe.
    let stream =
        folder.start(&["backup", text(&mount.flat("vm")), "--since", &first], Stdio::null(), Stdio::piped());
    let mut bytes = Vec::new();
    let mut stream = stream;
    stream.stdout.take().expect("piped").read_to_end(&mut bytes).expect("the stream");
    assert!(stream.wait().expect("our child").success());
    drop(held);
    let restored = Run::ploopfs().args(["restore", "full", "copy"]).in_folder(folder.0.path()).ok();
    assert_eq!(restored, format!("created {}, 16 MiB\n", text(&folder.path("copy"))));
    // It is shown when the command returns.
    assert!(std::fs::read(mount.flat("copy")).expect("shown") == before);
    let apply = || Run::ploopfs().args(["restore", "-", "copy"]).in_folder(folder.0.path());
    // The daemon notices a moment later that nobody reads it any more.
    assert!(until(Duration::from_secs(20), || apply().input(bytes.clone()).run().success()));
    assert!(std::fs::read(mount.flat("copy")).expect("shown") == after);
    mount.umount();
    assert!(folder.content(&format!("copy@{first}")) == before);
    folder.ok(&["check", "copy"]);
}

/// A small image, and the stream of it.
fn small() -> (Folder, Vec<u8>) {
    let folder = Folder(memory_dir());
    std::fs::write(folder.path("vm.raw"), Rng::new(4).bytes(1024)).expect("write");
    folder.ok(&["snapshot", "create", "vm", "a"]);
    folder.ok(&["backup", "vm@a", "-o", "full"]);
    let full = std::fs::read(folder.path("full")).expect("a stream");
    (folder, full)
}

#[test]
fn every_byte_of_a_full_backup_flipped_once_or_cut_off_there_is_refused_and_leaves_nothing() {
    let (folder, full) = small();
    let place = Folder(memory_dir());
    let restore = |bytes: Vec<u8>| {
        let stream = Stream::begin(Box::new(Cursor::new(bytes)), "stream")?;
        stream.make_image(&place.path("new"), &Progress::new())
    };
    assert!(full.len() < 2000, "{}", full.len());
    for at in 0..full.len() {
        let mut bytes = full.clone();
        bytes[at] ^= 1 << (at % 8);
        restore(bytes).expect_err("a flipped byte");
        restore(full[..at].to_vec()).expect_err("cut off");
        assert!(place.names().is_empty(), "byte {at}: {:?}", place.names());
    }
    restore([&full[..], b"x"].concat()).expect_err("something behind it");
    assert!(place.names().is_empty());
    restore(full.clone()).expect("the stream itself");
    assert_eq!(place.content("new@a"), std::fs::read(folder.path("vm/vm.raw")).expect("the base"));
    // And some of them through the binary.
    for at in (0..full.len()).step_by(97) {
        let mut bytes = full.clone();
        bytes[at] ^= 0x80;
        std::fs::write(folder.path("bad"), bytes).expect("write");
        folder.fails(3, &["restore", "bad", "new"]);
        folder.fails(3, &["restore", "--check", "bad"]);
    }
    assert_eq!(folder.names(), ["bad", "full", "vm"]);
}

#[test]
fn every_byte_of_an_incremental_backup_flipped_once_leaves_its_image_as_it_was() {
    require!("fuse");
    let folder = Folder(memory_dir());
    let disk = |seed| Rng::new(seed).bytes(2048);
    std::fs::write(folder.path("vm.raw"), disk(6)).expect("write");
    folder.ok(&["import", "vm.raw", "src", "--cluster", "32K"]);
    folder.ok(&["snapshot", "create", "src", "a"]);
    folder.ok(&["backup", "src@a", "-o", "full"]);
    {
        let mut mount = Mount::over(folder.0.path(), &[]);
        let file = File::options().write(true).open(mount.flat("src")).expect("open");
        file.write_all_at(&disk(7)[..512], 512).expect("write");
        drop(file);
        folder.ok(&["snapshot", "create", "src", "b"]);
        mount.umount();
    }
    folder.ok(&["backup", "src@b", "--since", "a", "-o", "inc"]);
    folder.ok(&["restore", "full", "copy"]);
    // The data of one cluster is all of it; most of its bytes are alike.
    let inc = std::fs::read(folder.path("inc")).expect("a stream");
    let before = folder.files("copy");
    let apply = |bytes: Vec<u8>| {
        let stream = Stream::begin(Box::new(Cursor::new(bytes)), "stream")?;
        stream.apply(&folder.path("copy"), &Progress::new())
    };
    let edges = 300.min(inc.len());
    let places =
        (0..edges).chain((edges..inc.len() - edges).step_by(499)).chain(inc.len() - edges..inc.len());
    for at in places {
        let mut bytes = inc.clone();
        bytes[at] ^= 1 << (at % 8);
        apply(bytes).expect_err("a flipped byte");
        apply(inc[..at].to_vec()).expect_err("cut off");
    }
    folder.ok(&["check", "copy"]);
    let after = folder.files("copy");
    let content = |files: &[(PathBuf, Vec<u8>)]| -> Vec<(PathBuf, Vec<u8>)> {
        // The labels' file is written anew, and holds the same.
        files.iter().filter(|(path, _)| !path.ends_with("ploopfs.json")).cloned().collect()
    };
    assert!(content(&before) == content(&after), "the image changed");
    assert_eq!(folder.snapshots("copy"), ["a", ""]);
    apply(inc).expect("the stream itself");
    assert!(folder.content("copy") == folder.content("src@b"));
    assert!(folder.content("copy@a") == folder.content("src@a"));
}

/// The disk got the size of the backup, and lost what lies behind.
#[test]
fn an_incremental_backup_leaves_a_disk_that_has_grown_since_as_large_as_it_is() {
    require!("fuse");
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    for name in ["a", "b"] {
        folder.ok(&["snapshot", "create", "vm", name]);
    }
    folder.ok(&["backup", "vm@a", "-o", "full"]);
    folder.ok(&["backup", "vm@b", "--since", "a", "-o", "inc"]);
    folder.ok(&["restore", "full", "copy"]);
    folder.ok(&["resize", "copy", "9M"]);
    folder.ok(&["restore", "inc", "copy"]);
    let size = |image: &str| -> u64 {
        let value: Value = serde_json::from_str(&folder.ok(&["info", image, "--json"])).expect("JSON");
        value["size"].as_u64().expect("bytes")
    };
    assert_eq!((size("copy"), size("copy@b"), size("copy@a")), (9 << 20, 4 << 20, 4 << 20));
    folder.ok(&["check", "copy"]);
    let mut mount = Mount::over(folder.0.path(), &[]);
    let file = File::options().write(true).open(mount.flat("copy")).expect("open");
    file.write_all_at(&[7; 512], 8 << 20).expect("behind the old end");
    drop(file);
    mount.umount();
}

/// FAULTS 89: the snapshot got the size of what it was put on.
#[test]
fn an_incremental_backup_makes_no_snapshot_of_another_size_than_its_own() {
    let folder = Folder::new();
    for (image, size) in [("vm", "4M"), ("other", "9M")] {
        folder.ok(&["create", image, "--size", size]);
        for name in ["a", "b"] {
            folder.ok(&["snapshot", "create", image, name]);
        }
    }
    folder.ok(&["backup", "vm@b", "--since", "a", "-o", "inc"]);
    // A larger disk whose newest snapshot says that it is the base.
    folder.ok(&["snapshot", "delete", "other", "b"]);
    let guid = |image: &str| -> String {
        let value: Value =
            serde_json::from_str(&folder.ok(&["snapshot", "list", image, "--json"])).expect("JSON");
        value["snapshots"][0]["guid"].as_str().expect("a GUID").to_owned()
    };
    let xml = folder.path("other/DiskDescriptor.xml");
    let text = std::fs::read_to_string(&xml).expect("read").replace(&guid("other"), &guid("vm"));
    std::fs::write(&xml, text).expect("write");
    let before = folder.files("other");
    let said = folder.fails(1, &["restore", "inc", "other"]);
    assert!(said.contains("has 9437184 bytes"), "{said}");
    assert_eq!(folder.snapshots("other").len(), 2);
    let deltas = |files: &[(PathBuf, Vec<u8>)]| {
        let is_delta = |(path, _): &&(PathBuf, Vec<u8>)| path.to_string_lossy().contains(".hds");
        files.iter().filter(is_delta).cloned().collect::<Vec<_>>()
    };
    assert!(deltas(&folder.files("other")) == deltas(&before));
}

#[test]
fn a_backup_goes_on_its_base_alone() {
    require!("fuse");
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    for name in ["a", "b", "c"] {
        folder.ok(&["snapshot", "create", "vm", name]);
    }
    folder.ok(&["backup", "vm@a", "-o", "full"]);
    for (to, since) in [("b", "a"), ("c", "b")] {
        folder.ok(&["backup", &format!("vm@{to}"), "--since", since, "-o", to]);
    }
    assert!(folder.fails(1, &["restore", "b", "copy"]).contains("restore its base, the snapshot a"));
    folder.ok(&["restore", "full", "copy"]);
    let before = folder.files("copy");
    let said = folder.fails(1, &["restore", "c", "copy"]);
    assert!(said.contains("newest snapshot is b") && said.contains("here that is a"), "{said}");
    assert!(folder.fails(1, &["restore", "full", "copy"]).contains("there is an image of this name"));
    assert!(folder.files("copy") == before);
    folder.ok(&["create", "single", "--size", "4M"]);
    assert!(folder.fails(1, &["restore", "b", "single"]).contains("has no snapshots"));
    // The source itself has the snapshot already.
    assert!(folder.fails(1, &["restore", "c", "vm"]).contains("has the snapshot c of this backup already"));
    // A disk that was written would lose that.
    let mut mount = Mount::over(folder.0.path(), &[]);
    std::fs::write(folder.path("x"), [1; 4096]).expect("write");
    let file = File::options().write(true).open(mount.flat("copy")).expect("open");
    assert!(folder.fails(4, &["restore", "b", "copy"]).contains("copy"));
    file.write_all_at(b"mine", 0).expect("write");
    drop(file);
    mount.umount();
    let said = folder.fails(1, &["restore", "b", "copy"]);
    assert!(said.contains("written since its snapshot a") && said.contains("snapshot switch"), "{said}");
    folder.ok(&["snapshot", "switch", "copy", "a"]);
    folder.ok(&["restore", "b", "copy"]);
    assert!(folder.fails(1, &["restore", "b", "copy"]).contains("already"));
    folder.ok(&["restore", "c", "copy"]);
    assert_eq!(folder.snapshots("copy"), ["a", "b", "c", ""]);
    let value: Value =
        serde_json::from_str(&folder.ok(&["restore", "--check", "c", "--json"])).expect("JSON");
    assert_eq!((&value["kind"], &value["base"]["name"]), (&"incremental".into(), &"b".into()));
    assert!(
        folder.ok(&["restore", "--check", "full"]).starts_with("whole and undamaged: full backup of vm@a")
    );
}

#[test]
fn a_backup_changes_no_byte_of_its_image_and_never_overwrites_a_file() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    let before = folder.files("vm");
    folder.ok(&["backup", "vm@a", "-o", "full"]);
    assert!(folder.files("vm") == before);
    let full = std::fs::read(folder.path("full")).expect("the stream");
    assert!(full.len() < 4096, "an empty disk takes {} bytes", full.len());
    assert!(folder.fails(1, &["backup", "vm@a", "-o", "full"]).contains("nothing is overwritten"));
    // Before a snapshot is taken for nothing.
    folder.fails(1, &["backup", "vm", "-o", "full"]);
    folder.fails(1, &["backup", "vm", "-o", "no/such/folder"]);
    folder.fails(1, &["backup", "vm", "--since", "nothing", "-o", "other"]);
    folder.fails(2, &["backup", "vm@a", "--since", "a", "-o", "other"]);
    folder.fails(1, &["backup", "vm@nothing", "-o", "other"]);
    folder.fails(1, &["backup", "nothing", "-o", "other"]);
    assert!(folder.files("vm") == before);
    assert_eq!(std::fs::read(folder.path("full")).expect("the stream"), full);
    assert_eq!(folder.names(), ["full", "vm"]);
}

#[test]
fn streams_that_are_none_are_named() {
    let folder = Folder::new();
    std::fs::write(folder.path("empty"), "").expect("write");
    std::fs::write(folder.path("notes"), "hello, this is no backup at all").expect("write");
    std::fs::create_dir(folder.path("dir")).expect("mkdir");
    assert!(folder.fails(3, &["restore", "empty", "new"]).contains("ends too early"));
    assert!(folder.fails(3, &["restore", "notes", "new"]).contains("is no backup of ploopfs"));
    assert!(folder.fails(1, &["restore", "dir", "new"]).contains("is a folder"));
    folder.fails(1, &["restore", "nothing", "new"]);
    folder.fails(2, &["restore", "empty"]);
    folder.fails(2, &["restore", "--check", "empty", "new"]);
    assert_eq!(folder.names(), ["dir", "empty", "notes"]);
}

#[test]
fn a_backup_does_not_go_to_a_terminal() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    let line = format!("{} backup vm", env!("CARGO_BIN_EXE_ploopfs"));
    let done = Run::new("script").args(["-qec", &line, "/dev/null"]).in_folder(folder.0.path()).run();
    assert!(done.code() == Some(2) && done.stdout.contains("not for a terminal"), "{done}");
    assert_eq!(folder.names(), ["vm.hds"], "no snapshot was taken");
}

/// An image with 8 MiB of data.
fn with_data() -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.path("disk.raw"), Rng::new(8).bytes(8 << 20)).expect("write");
    folder.ok(&["import", "disk.raw", "vm"]);
    folder
}

#[test]
fn a_reader_that_goes_away_ends_the_backup_and_its_snapshot() {
    let folder = with_data();
    let mut child = folder.start(&["backup", "vm"], Stdio::null(), Stdio::piped());
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("read");
    assert_eq!(child.wait().expect("our child").code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write the backup: Broken pipe"), "{stderr}");
    assert_eq!(folder.snapshots("vm"), [""]);
}

#[test]
fn an_interrupted_backup_or_restore_leaves_nothing() {
    let folder = with_data();
    let slow = ["--rate", "1M"];
    let mut child =
        folder.start(&["backup", "vm", "-o", "full", slow[0], slow[1]], Stdio::null(), Stdio::null());
    assert!(until(Duration::from_secs(20), || folder.path("vm/DiskDescriptor.xml").exists()));
    std::thread::sleep(Duration::from_millis(200));
    signal(&child);
    assert_eq!(child.wait().expect("our child").code(), Some(1));
    assert_eq!(folder.names(), ["disk.raw", "vm.hds"]);
    assert_eq!(folder.snapshots("vm"), [""]);
    folder.ok(&["backup", "vm", "-o", "full"]);
    let mut child = folder.start(&["restore", "full", "new", slow[0], slow[1]], Stdio::null(), Stdio::null());
    assert!(until(Duration::from_secs(20), || folder.names().contains(&".new.new".to_owned())));
    signal(&child);
    assert_eq!(child.wait().expect("our child").code(), Some(1));
    assert_eq!(folder.names(), ["disk.raw", "full", "vm"]);
    // Killed outright, a dot-folder is left, which nobody takes for an image and the next attempt removes.
    let mut child = folder.start(&["restore", "full", "new", slow[0], slow[1]], Stdio::null(), Stdio::null());
    assert!(until(Duration::from_secs(20), || folder.names().contains(&".new.new".to_owned())));
    child.kill().and_then(|()| child.wait()).expect("our child");
    folder.ok(&["restore", "full", "new"]);
    assert_eq!(folder.names(), ["disk.raw", "full", "new", "vm"]);
    assert!(folder.content("new") == std::fs::read(folder.path("disk.raw")).expect("the source"));
}

#[test]
fn a_hangup_leaves_as_little_as_a_ctrl_c_and_under_nohup_the_work_goes_on() {
    let folder = with_data();
    folder.ok(&["snapshot", "create", "vm", "s"]);
    folder.ok(&["backup", "vm@s", "-o", "full"]);
    let names = folder.names();
    let hang_up = |child: &Child| common::signal(child.id(), rustix::process::Signal::HUP);
    let restores = || folder.names().contains(&".new.new".to_owned());
    let slow = ["restore", "full", "new", "--rate", "1M"];
    let mut child = folder.start(&slow, Stdio::null(), Stdio::null());
    assert!(until(Duration::from_secs(20), restores));
    hang_up(&child);
    assert_eq!(child.wait().expect("our child").code(), Some(1));
    assert_eq!(folder.names(), names);
    // Of a disk without a snapshot of its own.
    let mut child = folder.start(&["backup", "vm", "-o", "b", "--rate", "1M"], Stdio::null(), Stdio::null());
    assert!(until(Duration::from_secs(20), || folder.snapshots("vm").len() == 3));
    hang_up(&child);
    assert_eq!(child.wait().expect("our child").code(), Some(1));
    assert_eq!((folder.names(), folder.snapshots("vm").len()), (names, 2));
    let mut command = Command::new("nohup");
    command.arg(env!("CARGO_BIN_EXE_ploopfs")).args(["restore", "full", "new", "--rate", "8M"]);
    command.current_dir(folder.0.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("nohup starts");
    assert!(until(Duration::from_secs(20), restores));
    hang_up(&child);
    assert!(child.wait().expect("our child").success(), "a signal that was to be ignored ended it");
    assert!(folder.content("new") == std::fs::read(folder.path("disk.raw")).expect("the source"));
}

#[test]
fn a_signal_is_heard_while_a_pipe_is_silent() {
    let folder = with_data();
    for args in [["restore", "-", "new"], ["import", "-", "new"]] {
        // Held open, and silent.
        let mut child = folder.start(&args, Stdio::piped(), Stdio::null());
        std::thread::sleep(Duration::from_millis(300));
        common::signal(child.id(), rustix::process::Signal::TERM);
        assert!(
            until(Duration::from_secs(20), || child.try_wait().expect("our child").is_some()),
            "{args:?}"
        );
        assert!(!child.wait().expect("our child").success());
        assert_eq!(folder.names(), ["disk.raw", "vm.hds"], "{args:?}");
    }
}

/// Bind-mounted read-only; undone when dropped.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn over(folder: &Path, point: PathBuf) -> ReadOnly {
        std::fs::create_dir(&point).expect("mkdir");
        common::ok("mount", &["--bind", text(folder), text(&point)]);
        let bound = ReadOnly(point);
        common::ok("mount", &["-o", "remount,bind,ro", text(&bound.0)]);
        bound
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        Run::new("umount").arg(&self.0).run();
    }
}

/// "Bad file descriptor" was all that was said.
#[test]
fn what_a_layered_disk_on_a_read_only_host_refuses_says_why() {
    require!("loop");
    let (folder, around) = (Folder::new(), temp_dir());
    folder.ok(&["create", "vm", "--size", "8M"]);
    folder.ok(&["snapshot", "create", "vm", "a"]);
    let bound = ReadOnly::over(folder.0.path(), around.path().join("ro"));
    let vm = bound.0.join("vm");
    for args in [&["resize", text(&vm), "16M"][..], &["cbt", "start", text(&vm)], &["compact", text(&vm)]] {
        let said = folder.fails(1, args);
        assert!(said.contains("read-only") && !said.contains("descriptor"), "{args:?}: {said}");
    }
}

#[test]
fn a_disk_on_a_read_only_host_is_backed_up_as_it_stands() {
    require!("loop");
    let folder = with_data();
    folder.ok(&["import", "disk.raw", "layered"]);
    folder.ok(&["snapshot", "create", "layered", "s"]);
    let around = temp_dir();
    let bound = ReadOnly::over(folder.0.path(), around.path().join("ro"));
    for (image, options) in [("vm", &[][..]), ("layered", &[]), ("layered", &["--since", "s"])] {
        let stream = around.path().join("stream");
        let done =
            Run::ploopfs().arg("backup").arg(bound.0.join(image)).arg("-o").arg(&stream).args(options).run();
        assert!(done.success() && done.stderr.contains("as it stands"), "{done}");
        let said = Run::ploopfs().args(["restore", "--check"]).arg(&stream).ok();
        assert!(said.contains("whole and undamaged"), "{said}");
        if options.is_empty() {
            folder.ok(&["restore", text(&stream), "back"]);
            assert!(folder.content("back") == std::fs::read(folder.path("disk.raw")).expect("the source"));
            assert_eq!(folder.snapshots("back").len(), 2, "the restored one has a snapshot");
            std::fs::remove_dir_all(folder.path("back")).expect("remove");
        }
        std::fs::remove_file(stream).expect("remove");
    }
    assert_eq!(folder.snapshots("layered"), ["s", ""]);
}

#[test]
fn a_backup_to_a_minus_goes_to_the_pipe() {
    let folder = with_data();
    folder.ok(&["snapshot", "create", "vm", "s"]);
    let names = folder.names();
    let line = format!("{0} backup vm@s -o - | {0} restore --check -", env!("CARGO_BIN_EXE_ploopfs"));
    let said = Run::new("bash").args(["-c", &line]).in_folder(folder.0.path()).ok();
    assert!(said.contains("whole and undamaged"), "{said}");
    assert_eq!(folder.names(), names);
}

/// What was taken for a backup that failed, and is in use by then, was only said to be left.
#[test]
fn a_failed_backup_names_the_snapshot_that_it_has_to_leave_and_what_removes_it() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm=64M"]);
    mount.open("vm").write_all_at(&vec![7; 32 << 20], 0).expect("written");
    let image = mount.images().join("vm");
    // Nothing reads its pipe: it waits, with its snapshot.
    let mut backup = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
    backup.args(["backup", text(&image)]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut backup = backup.spawn().expect("ploopfs starts");
    let taken = || {
        let list = Run::ploopfs().args(["snapshot", "list", text(&image), "--json"]).run();
        let value: Value = serde_json::from_str(&list.stdout).ok()?;
        value["snapshots"][0]["name"].as_str().filter(|name| !name.is_empty()).map(str::to_owned)
    };
    assert!(until(Duration::from_secs(30), || taken().is_some()));
    let name = taken().expect("a snapshot");
    let user = File::open(mount.flat(&format!(".snapshots/vm/{name}"))).expect("opens");
    // It fails: the pipe has no reader any more.
    drop(backup.stdout.take());
    let mut said = String::new();
    backup.stderr.take().expect("a pipe").read_to_string(&mut said).expect("words");
    assert_eq!(backup.wait().expect("ended").code(), Some(1), "{said}");
    let remedy = format!("ploopfs snapshot delete {} {name}", text(&mount.images().join("vm")));
    assert!(said.contains(&remedy), "{said}");
    drop(user);
    let removes = || {
        Run::new("sh")
            .args(["-c", &remedy.replacen("ploopfs", env!("CARGO_BIN_EXE_ploopfs"), 1)])
            .run()
            .success()
    };
    assert!(until(Duration::from_secs(20), removes), "it is what removes it");
    assert_eq!(taken(), None);
}
