//! `ploopfs import` and `export`, through the real binary, with qemu-img as the judge.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Finished, Folder, Loop, Mount, Rng, Run, allocated, ok, text, until};

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

/// qemu-img finds both alike; sizes may differ by what rounding adds in some formats.
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
            // A disk has whole sectors, and no more.
            assert_eq!(after.len() as u64, size.next_multiple_of(512), "{size}, {cluster}");
            assert_eq!(said.contains("24 zeroes stand behind them"), size == 1000, "{said}");
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
        // VMDK and VHD round a disk themselves.
        let exact = ["qcow2", "vhdx", "vdi"].contains(&format);
        let size = folder.ok(&["info", &image, "--json"]);
        assert!(!exact || size.contains(&format!("\"size\": {}", 17 * MIB + 512)), "{format}: {size}");
        assert!(allocated(&made) < 8 * MIB + allocated(&raw), "{format}: {}", allocated(&made));
        assert!(std::fs::read(&file).expect("read") == before, "{format}: the source was written");
        let out = format!("{image}.qcow2");
        folder.ok(&["export", &image, &out]);
        ok("qemu-img", &["check", "-q", "-f", "qcow2", text(&folder.path(&out))]);
        alike(("qcow2", &folder.path(&out)), ("parallels", &made));
    }
}

/// An interrupted copy of a qcow2 file was taken, with status 0: QEMU reads zeroes behind a file's end.
#[test]
fn what_is_missing_of_a_file_that_was_cut_off_is_not_taken_for_zeroes() {
    require!("qemu");
    let folder = Folder::new();
    std::fs::write(folder.path("in.raw"), vec![7; 3 * MIB as usize]).expect("write");
    for format in ["qcow2", "vmdk", "vdi", "qed", "qcow"] {
        let name = format!("d.{format}");
        let file = folder.path(&name);
        ok("qemu-img", &["convert", "-f", "raw", "-O", format, text(&folder.path("in.raw")), text(&file)]);
        folder.ok(&["import", &name, &format!("whole-{format}")]);
        let len = file.metadata().expect("made").len();
        let cut = std::fs::File::options().write(true).open(&file).expect("opens");
        // QEMU itself finds the larger part of a QED file, and of VHD and VHDX files all that is missing.
        for missing in [512, 2 * MIB].into_iter().filter(|missing| format != "qed" || *missing < MIB) {
            cut.set_len(len - missing).expect("cut");
            let said = folder.fails(3, &["import", &name, "vm"]);
            assert!(said.contains("was cut off"), "{format}: {said}");
        }
    }
    let over = ["create", "-q", "-f", "qcow2", "-b", "d.qcow2", "-F", "qcow2", "over.qcow2", "3M"];
    Run::new("qemu-img").args(over).in_folder(folder.0.path()).ok();
    for how in ["--with-backing", "--layers"] {
        let said = folder.fails(3, &["import", "over.qcow2", "vm", how]);
        assert!(said.contains("d.qcow2") && said.contains("cut off"), "{how}: {said}");
    }
    assert!(!folder.path("vm.hds").exists() && !folder.path("vm").exists());
}

/// qemu-img refuses it, too: the copy was made of two moments, with status 0.
#[test]
fn a_raw_image_that_is_being_written_is_not_imported() {
    require!("fuse");
    let (images, folder) = (Folder::new(), Folder::new());
    let raw = images.path("vm.raw");
    std::fs::write(&raw, vec![7; MIB as usize]).expect("write");
    let mount = Mount::over(images.0.path(), &[]);
    let writer = File::options().write(true).open(mount.flat("vm")).expect("opens");
    writer.write_all_at(&[8; 512], 0).expect("written");
    assert!(folder.fails(4, &["import", text(&raw), "copy"]).contains("in use by"));
    assert!(folder.names().is_empty());
    drop(writer);
    let closed =
        || Run::ploopfs().args(["import", text(&raw), "copy"]).in_folder(folder.0.path()).run().success();
    assert!(until(Duration::from_secs(20), closed), "the writer is gone");
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

/// Pieces of 4 KiB, one in each MiB: what QEMU's formats hold as whole clusters.
fn pieces(folder: &Folder, name: &str, size: u64) -> PathBuf {
    let path = folder.path(name);
    let file = File::create(&path).expect("create");
    file.set_len(size).expect("extend");
    let mut rng = Rng::new(57);
    for i in 0..size / MIB {
        file.write_all_at(&rng.bytes(4096), i * MIB + i * 37 % 256 * 4096).expect("write");
    }
    path
}

#[test]
fn an_import_through_qemu_takes_no_more_space_than_one_of_raw() {
    require!("qemu");
    let folder = Folder::new();
    let raw = pieces(&folder, "in.raw", 60 * MIB);
    folder.ok(&["import", "in.raw", "raw"]);
    let least = allocated(&folder.path("raw.hds"));
    for format in ["qcow2", "vmdk", "vhdx"] {
        let file = folder.path(&format!("d.{format}"));
        ok("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&file)]);
        folder.ok(&["import", text(&file), format]);
        let made = folder.path(&format!("{format}.hds"));
        assert!(allocated(&made) <= least * 3 / 2, "{format}: {} for {least}", allocated(&made));
        alike(("raw", &raw), ("parallels", &made));
    }
}

#[test]
fn imports_and_exports_through_qemu_keep_the_rate() {
    require!("qemu");
    let folder = Folder::new();
    std::fs::write(folder.path("in.raw"), Rng::new(58).bytes(8 << 20)).expect("write");
    ok(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&folder.path("in.raw")),
            text(&folder.path("in.qcow2")),
        ],
    );
    for args in [["import", "in.qcow2", "vm"], ["export", "vm", "out.qcow2"]] {
        let begun = std::time::Instant::now();
        folder.ok(&[&args[..], &["--rate", "8M"]].concat());
        // A second, without the first burst.
        assert!(begun.elapsed() > Duration::from_millis(800), "{args:?}: {:?}", begun.elapsed());
    }
    alike(("qcow2", &folder.path("in.qcow2")), ("qcow2", &folder.path("out.qcow2")));
}

#[test]
fn a_qcow2_export_lays_no_copy_as_long_as_the_disk_beside_it() {
    require!("qemu");
    let folder = Folder::new();
    folder.raw("in.raw", 20 * MIB);
    folder.ok(&["import", "in.raw", "vm"]);
    // No file on the host may be longer than a half of the disk.
    let line = format!("ulimit -f {}; exec \"$0\" export vm out.qcow2", 10 * 1024);
    Run::new("bash").args(["-c", &line, env!("CARGO_BIN_EXE_ploopfs")]).in_folder(folder.0.path()).ok();
    alike(("raw", &folder.path("in.raw")), ("qcow2", &folder.path("out.qcow2")));
}

/// Runs a line of shell in the folder, with `ploopfs` in it; it must succeed.
#[track_caller]
fn shell(folder: &Folder, line: &str) -> Finished {
    let line =
        format!("set -o pipefail; {}", line.replace("ploopfs ", concat!(env!("CARGO_BIN_EXE_ploopfs"), " ")));
    let done = Run::new("bash").args(["-c", &line]).in_folder(folder.0.path()).run();
    assert!(done.success(), "{done}");
    done
}

#[test]
fn a_minus_is_the_pipe_and_no_file_of_that_name() {
    let folder = Folder::new();
    let raw = std::fs::read(folder.raw("in.raw", 5 * MIB + 512)).expect("read");
    folder.ok(&["import", "in.raw", "vm"]);
    folder.ok(&["snapshot", "create", "vm", "s"]);
    let names = folder.names();
    for (from, to) in [("vm", "-"), ("vm@s", "-"), ("vm", "/dev/stdout"), ("vm@s", ">(cat > out; touch end)")]
    {
        let pipe =
            if to.starts_with('>') { "; until [ -e end ]; do sleep 0.01; done" } else { " | cat > out" };
        let done = shell(&folder, &format!("ploopfs export {from} {to}{pipe}"));
        assert_eq!(done.stdout, "", "{from} {to}");
        assert!(std::fs::read(folder.path("out")).expect("read") == raw, "{from} {to}");
        std::fs::remove_file(folder.path("out")).expect("remove");
        let _ = std::fs::remove_file(folder.path("end"));
        assert_eq!(folder.names(), names, "{from} {to}");
    }
    // A file that the shell made stays as thin as the disk.
    shell(&folder, "ploopfs export vm - > out; ploopfs export vm - >> out");
    let out = std::fs::read(folder.path("out")).expect("read");
    assert!(out == [&raw[..], &raw[..]].concat());
    for (to, line) in [
        ("a", "cat in.raw | ploopfs import - a"),
        ("b", "ploopfs import - b < in.raw"),
        ("c.raw", "ploopfs import <(cat in.raw) c.raw"),
        ("d", "cat in.raw | ploopfs import - d --cluster 32K"),
    ] {
        shell(&folder, line);
        folder.ok(&["export", to, "back"]);
        assert!(std::fs::read(folder.path("back")).expect("read") == raw, "{line}");
        std::fs::remove_file(folder.path("back")).expect("remove");
        if to != "c.raw" {
            folder.ok(&["check", to]);
        }
    }
    let done = shell(&folder, "head -c 3000000 in.raw | ploopfs import - part");
    assert!(done.stdout.contains("320 zeroes stand behind them"), "{done}");
    assert!(folder.ok(&["info", "part", "--json"]).contains("\"size\": 3000320"));
    let names = folder.names();
    assert!(folder.fails(1, &["import", "-", "none"]).contains("is empty"));
    assert!(folder.fails(2, &["export", "vm", "-", "--format", "qcow2"]).contains("only raw can go there"));
    assert_eq!(folder.names(), names);
}

#[test]
fn a_device_is_written_to_if_it_is_large_enough_and_in_no_use() {
    require!("loop");
    let folder = Folder::new();
    let raw = std::fs::read(folder.raw("in.raw", 5 * MIB)).expect("read");
    folder.ok(&["import", "in.raw", "vm"]);
    for (name, size) in [("large", 6 * MIB), ("same", 5 * MIB), ("small", 5 * MIB - 512)] {
        std::fs::write(folder.path(name), vec![7; size as usize]).expect("write");
    }
    let device = Loop::attach(&folder.path("large"), false);
    let said = folder.ok(&["export", "vm", text(device.device())]);
    assert!(said.contains("has the disk of 5 MiB; the 1048576 bytes behind it are as they were"), "{said}");
    let read = std::fs::read(device.device()).expect("read");
    assert!(read[..raw.len()] == raw && read[raw.len()..].iter().all(|byte| *byte == 7));
    drop(device);
    let device = Loop::attach(&folder.path("same"), false);
    folder.ok(&["export", "vm", text(device.device())]);
    assert!(std::fs::read(device.device()).expect("read") == raw);
    // Held, as a mount holds it.
    let held =
        File::options().read(true).custom_flags(rustix::fs::OFlags::EXCL.bits() as i32).open(device.device());
    let held = held.expect("for us alone");
    assert!(folder.fails(4, &["export", "vm", text(device.device())]).contains("lsblk"));
    drop(held);
    drop(device);
    let device = Loop::attach(&folder.path("small"), false);
    assert!(folder.fails(2, &["export", "vm", text(device.device())]).contains("nothing was written"));
    assert!(std::fs::read(device.device()).expect("read").iter().all(|byte| *byte == 7));
}

#[test]
fn a_known_format_that_is_not_understood_is_refused_unless_it_is_said_to_be_raw() {
    let folder = Folder::new();
    let body = Rng::new(67).bytes(5000);
    let padded = |mark: &[u8]| [mark, &vec![0; 512 - mark.len()]].concat();
    std::fs::write(folder.path("mac.dmg"), [&body[..], &padded(b"koly\0\0\0\x04")].concat()).expect("write");
    std::fs::write(folder.path("live.img"), [&padded(b"#!/bin/sh\n#V2.0 Format\n")[..], &body].concat())
        .expect("write");
    std::fs::write(folder.path("bochs"), [&padded(b"Bochs Virtual HD Image")[..], &body].concat())
        .expect("write");
    std::fs::write(folder.path("fixed"), [&body[..], &padded(b"conectix")].concat()).expect("write");
    std::fs::write(folder.path("disk.img.gz"), [&b"\x1f\x8b\x08\0"[..], &body].concat()).expect("write");
    let names = folder.names();
    for (file, word) in [
        ("mac.dmg", "dmg"),
        ("live.img", "cloop"),
        ("bochs", "Bochs"),
        ("fixed", "--format vpc"),
        ("disk.img.gz", "gzip"),
    ] {
        let said = folder.fails(1, &["import", file, "vm"]);
        assert!(said.contains(word) && said.contains("--format raw"), "{said}");
        assert_eq!(folder.names(), names, "{file}");
        let piped = Run::new("bash")
            .args(["-c", &format!("cat {file} | {} import - vm", env!("CARGO_BIN_EXE_ploopfs"))]);
        let done = piped.in_folder(folder.0.path()).status(1);
        assert!(done.stderr.contains(word), "{done}");
        assert_eq!(folder.names(), names, "{file}");
        folder.ok(&["import", file, "vm", "--format", "raw"]);
        std::fs::remove_file(folder.path("vm.hds")).expect("remove");
    }
}

#[test]
fn an_encrypted_qcow2_is_refused_with_a_word() {
    require!("qemu");
    let folder = Folder::new();
    shell(
        &folder,
        "qemu-img create -q --object secret,id=s,data=x -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 e.qcow2 1M",
    );
    assert!(folder.fails(1, &["import", "e.qcow2", "vm"]).contains("is encrypted"));
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
    // What is an image in this folder, by its name, is shown, too.
    assert!(mount.flat("a").exists());
    // An import is shown when the command returns, by the name that the mount gives it.
    folder.ok(&["import", "disk", text(&mount.point().join("new"))]);
    assert!(mount.flat("new").exists());
    drop(file);
    mount.umount();
}

/// The kernel tells the daemon of a close after close(2) has returned, and `snapshot delete` closes with a sync: an export
/// right behind either was refused.
#[test]
fn an_export_right_behind_a_close_waits_for_it() {
    require!("fuse");
    let folder = Folder::new();
    let raw = folder.raw("disk", 5 * MIB);
    folder.ok(&["import", "disk", "vm"]);
    let mut mount = Mount::over(folder.0.path(), &[]);
    let file = File::options().read(true).write(true).open(mount.flat("vm")).expect("open");
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(file);
    });
    folder.ok(&["export", "vm", "out"]);
    late.join().expect("no panic");
    assert!(std::fs::read(&raw).expect("read") == std::fs::read(folder.path("out")).expect("read"));
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
