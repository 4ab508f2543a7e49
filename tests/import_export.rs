//! `ploopfs import` and `export`, through the real binary, with qemu-img as the judge.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Finished, Folder, Mount, Rng, Run, allocated, ok, text, until};

const MIB: u64 = 1 << 20;

impl Folder {
    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.args(args).current_dir(self.0.path()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("ploopfs starts")
    }

    /// A sparse raw file of `size` bytes: data here and there, written zeroes, holes.
    fn raw(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("create");
        file.set_len(size).expect("extend");
        let mut rng = Rng::new(size);
        for _ in 0..6 {
            let len = (1 + rng.below(200_000)).min(size);
            file.write_all_at(&rng.bytes(len as usize), rng.below(size - len + 1)).expect("write");
        }
        file.write_all_at(&vec![0; (size / 4) as usize], size / 2).expect("write");
        path
    }
}

/// qemu-img finds both alike; sizes may differ by what rounding adds.
#[track_caller]
fn alike(a: (&str, &Path), b: (&str, &Path)) {
    let done: Finished =
        Run::new("qemu-img").args(["compare", "-f", a.0, "-F", b.0, text(a.1), text(b.1)]).run();
    assert!(done.success(), "{done}");
}

#[test]
fn raw_files_come_in_and_go_out_byte_for_byte_and_thin() {
    require!("qemu");
    for size in [512, 1000, MIB, 9 * MIB + 512, 40 * MIB] {
        let folder = Folder::new();
        let raw = folder.raw("in.raw", size);
        for cluster in ["32K", "1M"] {
            let (image, out) = (format!("vm{cluster}"), format!("out{cluster}"));
            let said = folder.ok(&["import", "in.raw", &image, "--cluster", cluster]);
            let made = folder.path(&format!("{image}.hds"));
            assert!(said.starts_with(&format!("created {}", text(&made))), "{said}");
            folder.ok(&["check", &image]);
            alike(("raw", &raw), ("parallels", &made));
            folder.ok(&["export", &image, &out]);
            let (mut before, after) =
                (std::fs::read(&raw).expect("read"), std::fs::read(folder.path(&out)).expect("read"));
            // A disk has whole clusters.
            before.resize(after.len(), 0);
            assert!(before == after, "{size}, {cluster}");
            // The zeroes in the middle take no space: not there, nor in the file that comes out.
            assert!(allocated(&folder.path(&out)) <= allocated(&raw), "{size}");
        }
        assert!(allocated(&folder.path("vm32K.hds")) <= allocated(&raw) + 8 * MIB, "{size}");
    }
}

#[test]
fn a_raw_image_is_made_where_the_name_says_so() {
    let folder = Folder::new();
    let raw = folder.raw("disk", 3 * MIB);
    folder.ok(&["import", "disk", "vm.raw"]);
    assert_eq!(std::fs::read(folder.path("vm.raw")).expect("read"), std::fs::read(raw).expect("read"));
}

#[test]
fn other_formats_come_in_through_qemu_img_and_qcow2_goes_out() {
    require!("qemu");
    let folder = Folder::new();
    let raw = folder.raw("in.raw", 17 * MIB + 512);
    for (format, name) in
        [("qcow2", "d.qcow2"), ("vmdk", "d.vmdk"), ("vhdx", "d.vhdx"), ("vpc", "d.vhd"), ("vdi", "d.vdi")]
    {
        let file = folder.path(name);
        ok("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&file)]);
        let before = std::fs::read(&file).expect("read");
        let image = format!("from-{format}");
        folder.ok(&["import", name, &image]);
        folder.ok(&["check", &image]);
        let made = folder.path(&format!("{image}.hds"));
        alike((format, &file), ("parallels", &made));
        assert!(allocated(&made) < 8 * MIB + allocated(&raw), "{format}: {}", allocated(&made));
        assert!(std::fs::read(&file).expect("read") == before, "{format}: the source was written");
        let out = format!("{image}.qcow2");
        folder.ok(&["export", &image, &out]);
        ok("qemu-img", &["check", "-q", "-f", "qcow2", text(&folder.path(&out))]);
        alike(("qcow2", &folder.path(&out)), ("parallels", &made));
    }
}

#[test]
fn a_file_that_looks_like_another_format_or_stands_on_others_is_not_taken_without_a_word() {
    require!("qemu");
    let folder = Folder::new();
    folder.raw("base.raw", MIB);
    for line in [
        "qemu-img create -q -f qcow2 cloud.img 1M",
        "qemu-img create -q -f qcow2 -b base.raw -F raw over.qcow2",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat two.vmdk 1M",
        "qemu-img create -q -f qcow2 -o data_file=hidden.raw data.qcow2 1M",
        "ploopfs create ours --size 1M",
    ] {
        let line = line.replace("ploopfs", env!("CARGO_BIN_EXE_ploopfs"));
        Run::new("sh").args(["-c", &line]).in_folder(folder.0.path()).ok();
    }
    assert!(folder.fails(1, &["import", "cloud.img", "vm"]).contains("--format qcow2, or --format raw"));
    assert!(folder.fails(1, &["import", "ours.hds", "vm"]).contains("ploopfs clone"));
    assert!(folder.fails(1, &["import", "over.qcow2", "vm"]).contains("names the file base.raw"));
    assert!(folder.fails(1, &["import", "two.vmdk", "vm"]).contains("two-flat.vmdk"));
    assert!(folder.fails(1, &["import", "data.qcow2", "vm"]).contains("names the file hidden.raw"));
    folder.ok(&["import", "cloud.img", "vm", "--format", "qcow2"]);
    folder.ok(&["import", "over.qcow2", "over", "--with-backing"]);
    alike(("raw", &folder.path("base.raw")), ("parallels", &folder.path("over.hds")));
}

#[test]
fn what_is_no_disk_is_named_and_nothing_is_made_or_replaced() {
    require!("qemu");
    let folder = Folder::new();
    std::fs::write(folder.path("empty"), "").expect("write");
    std::fs::write(folder.path("cut.qcow2"), b"QFI\xfb\0\0\0\x03").expect("write");
    std::fs::create_dir(folder.path("dir")).expect("mkdir");
    folder.raw("good", MIB);
    folder.ok(&["import", "good", "vm"]);
    let names = folder.names();
    assert!(folder.fails(1, &["import", "empty", "new"]).contains("is empty"));
    assert!(folder.fails(1, &["import", "cut.qcow2", "new"]).contains("qemu-img failed"));
    assert!(folder.fails(1, &["import", "dir", "new"]).contains("is a folder"));
    folder.fails(1, &["import", "nothing", "new"]);
    folder.fails(2, &["import", "good", "new", "--cluster", "3K"]);
    folder.fails(2, &["import", "good"]);
    folder.fails(2, &["export", "vm"]);
    folder.fails(2, &["export", "vm", "new", "--format", "vmdk"]);
    assert!(folder.fails(1, &["import", "good", "vm"]).contains("there is an image named vm already"));
    assert!(folder.fails(1, &["export", "vm", "good"]).contains("nothing is overwritten"));
    folder.fails(1, &["export", "nothing", "new"]);
    folder.fails(1, &["export", "vm@nothing", "new"]);
    folder.fails(1, &["export", "dir", "new"]);
    assert!(folder.fails(1, &["export", "vm", "no/new"]).contains("cannot open the folder"));
    for length in [0, 10, 100] {
        std::fs::write(folder.path("cut.hds"), vec![0; length]).expect("write");
        folder.fails(3, &["export", "cut", "new"]);
        std::fs::remove_file(folder.path("cut.hds")).expect("remove");
    }
    assert_eq!(folder.names(), names);
    // Without the program.
    std::fs::write(folder.path("d.vdi"), "x").expect("write");
    for args in [&["import", "d.vdi", "new"][..], &["export", "vm", "new.qcow2"]] {
        let done = Run::ploopfs().args(args).in_folder(folder.0.path()).env("PATH", "/nowhere").status(1);
        assert!(done.stderr.contains("qemu-img is not installed"), "{done}");
    }
    assert!(!folder.path("new.qcow2").exists());
}

#[test]
fn exports_change_no_byte_of_the_image() {
    let folder = Folder::new();
    folder.raw("good", MIB);
    folder.ok(&["import", "good", "vm"]);
    let state = || {
        let meta = std::fs::metadata(folder.path("vm.hds")).expect("stat");
        (std::fs::read(folder.path("vm.hds")).expect("read"), meta.modified().expect("mtime"))
    };
    let before = state();
    folder.ok(&["export", "vm", "out"]);
    assert!(state() == before);
}

#[test]
fn a_snapshot_is_exported_from_a_disk_in_use_and_the_disk_itself_is_not() {
    require!("fuse", "qemu");
    let folder = Folder::new();
    let raw = folder.raw("disk", 5 * MIB);
    folder.ok(&["import", "disk", "vm"]);
    let mut mount = Mount::over(folder.0.path(), &[]);
    folder.ok(&["export", text(&mount.flat("vm")), "closed"]);
    alike(("raw", &raw), ("raw", &folder.path("closed")));
    let file = File::options().read(true).write(true).open(mount.flat("vm")).expect("open");
    let said = folder.fails(4, &["export", "vm", "open"]);
    assert!(said.contains("is open for writing; take a snapshot"), "{said}");
    folder.ok(&["snapshot", "create", "vm", "a"]);
    file.write_all_at(&[0xaa; 4096], 0).expect("write");
    folder.ok(&["export", "vm@a", "a.raw"]);
    folder.ok(&["export", "vm@a", "a.qcow2"]);
    alike(("raw", &raw), ("raw", &folder.path("a.raw")));
    alike(("raw", &raw), ("qcow2", &folder.path("a.qcow2")));
    // An import is shown when the command returns, by the name that the mount gives it.
    folder.ok(&["import", "disk", text(&mount.point().join("new"))]);
    assert!(mount.flat("new").exists());
    drop(file);
    mount.umount();
}

#[test]
fn an_interrupted_or_killed_copy_leaves_nothing() {
    let folder = Folder::new();
    std::fs::write(folder.path("disk"), Rng::new(9).bytes(8 << 20)).expect("write");
    folder.ok(&["import", "disk", "vm"]);
    let names = folder.names();
    for args in [["import", "disk", "new"], ["export", "vm", "new"]] {
        for kill in [false, true] {
            let mut child = folder.start(&[&args[..], &["--rate", "1M"]].concat());
            let fds = PathBuf::from(format!("/proc/{}/fd", child.id()));
            let begun = || {
                let open = std::fs::read_dir(&fds).into_iter().flatten().flatten();
                let mut links = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
                links.any(|link| text(&link).contains("(deleted)"))
            };
            assert!(until(Duration::from_secs(20), begun), "{args:?}");
            let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a child's number");
            let signal = if kill { rustix::process::Signal::KILL } else { rustix::process::Signal::INT };
            rustix::process::kill_process(pid, signal).expect("our child");
            assert!(!child.wait().expect("our child").success());
            assert_eq!(folder.names(), names, "{args:?}, killed: {kill}");
        }
    }
}
