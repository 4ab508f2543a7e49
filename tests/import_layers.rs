//! `ploopfs import --layers`, through the real binary: a backing chain becomes an image with snapshots, and qemu-img is the
//! judge of every level.

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Folder, Mount, Rng, Run, allocated, marked_in_use, ok, text, until};
use rustix::process::{Pid, Signal, kill_process};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Runs a line in the folder.
fn sh(folder: &Folder, line: &str) {
    Run::new("sh").args(["-ec", line]).in_folder(folder.0.path()).ok();
}

/// Does these things to a file with qemu-io.
fn io(folder: &Folder, format: &str, file: &str, commands: &[String]) {
    let mut run = Run::new("qemu-io").args(["-f", format]);
    for command in commands {
        run = run.args(["-c", command.as_str()]);
    }
    let said = run.arg(text(&folder.path(file))).in_folder(folder.0.path()).ok();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
}

/// Writes, zeroes and discards, here and there.
fn random(rng: &mut Rng, size: u64, zeroes: bool) -> Vec<String> {
    let mut place = |unit: u64, longest: u64| {
        let len = (1 + rng.below(longest)) * unit;
        (rng.below(1 + (size - len) / unit) * unit, len)
    };
    let mut commands = Vec::new();
    for n in 1..8 {
        let (at, len) = place(512, 600);
        commands.push(format!("write -P {n} {at} {len}"));
        if zeroes {
            let (at, len) = place(512, 600);
            commands.push(format!("write -z {at} {len}"));
            let (at, len) = place(64 * KIB, 6);
            commands.push(format!("discard {at} {len}"));
            let (at, len) = place(64 * KIB, 4);
            commands.push(format!("write -P 0 {at} {len}"));
        }
    }
    commands
}

/// The disk in a file as qemu-img shows it.
fn converted(folder: &Folder, format: &str, file: &str) -> Vec<u8> {
    let out = folder.path("converted");
    ok("qemu-img", &["convert", "-f", format, "-O", "raw", text(&folder.path(file)), text(&out)]);
    let bytes = std::fs::read(&out).expect("read");
    std::fs::remove_file(&out).expect("remove");
    bytes
}

/// The disk of an image or a snapshot as ploopfs exports it.
fn exported(folder: &Folder, image: &str) -> Vec<u8> {
    folder.ok(&["export", image, "exported"]);
    let out = folder.path("exported");
    let bytes = std::fs::read(&out).expect("read");
    std::fs::remove_file(&out).expect("remove");
    bytes
}

/// They hold the same; ours may be longer by what makes its last cluster whole.
#[track_caller]
fn same(ours: &[u8], theirs: &[u8], what: &str) {
    assert!(ours.len() >= theirs.len() && ours.len() - theirs.len() < 2 << 20, "{what}");
    let (begin, rest) = ours.split_at(theirs.len());
    let differs = begin.iter().zip(theirs).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first byte that differs");
    assert!(rest.iter().all(|byte| *byte == 0), "{what}");
}

/// The files of a layered image, the base first.
fn deltas(folder: &Folder, image: &str) -> Vec<PathBuf> {
    let xml = std::fs::read_to_string(folder.path(image).join("DiskDescriptor.xml")).expect("read");
    let files = xml.split("<File>").skip(1).filter_map(|rest| rest.split("</File>").next());
    files.map(|file| folder.path(image).join(file)).collect()
}

/// Nobody finds anything wrong with it, and nobody marks it in use.
#[track_caller]
fn sound(folder: &Folder, image: &str) {
    folder.ok(&["check", image]);
    for delta in deltas(folder, image) {
        assert!(!marked_in_use(&delta), "{}", delta.display());
        ok("qemu-img", &["check", "-f", "parallels", text(&delta)]);
    }
}

/// The snapshots' names, the oldest first.
fn snapshots(folder: &Folder, image: &str) -> Vec<String> {
    let said = folder.ok(&["snapshot", "list", image, "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let lines = said["snapshots"].as_array().or_else(|| said.as_array()).expect("a list");
    let names = lines.iter().map(|line| line["name"].as_str().expect("a name").to_owned());
    // The disk itself has none.
    names.filter(|name| !name.is_empty()).collect()
}

/// A raw file, a qcow2 over it, one over that, and the disk: each larger than the one below, and odd in size.
fn grown_chain(folder: &Folder, seed: u64) -> [(&'static str, &'static str); 4] {
    let files = [("raw", "base.raw"), ("qcow2", "one.qcow2"), ("qcow2", "two.qcow2"), ("qcow2", "top.qcow2")];
    let sizes = [3 * MIB + 512, 4 * MIB - 1536, 4 * MIB - 1536, 6 * MIB + 70 * KIB];
    let mut rng = Rng::new(seed);
    for (level, ((format, file), size)) in files.into_iter().zip(sizes).enumerate() {
        let below = match level {
            0 => String::new(),
            n => format!("-b {} -F {}", files[n - 1].1, files[n - 1].0),
        };
        sh(folder, &format!("qemu-img create -q -f {format} {below} {file} {size}"));
        io(folder, format, file, &random(&mut rng, size - 512, level > 0));
    }
    files
}

#[test]
fn every_snapshot_reads_as_the_file_of_its_level_whatever_the_cluster() {
    require!("qemu");
    for seed in 1..=3 {
        let folder = Folder::new();
        let chain = grown_chain(&folder, seed);
        let before: Vec<_> =
            chain.iter().map(|(_, file)| std::fs::read(folder.path(file)).expect("read")).collect();
        let disks = chain.map(|(format, file)| converted(&folder, format, file));
        for cluster in [None, Some("32K"), Some("1M")] {
            let image = format!("vm{}", cluster.unwrap_or_default());
            let mut args = vec!["import", "--layers", "top.qcow2", &image];
            cluster.into_iter().for_each(|cluster| args.extend(["--cluster", cluster]));
            let said = folder.ok(&args);
            assert!(said.starts_with("created ") && said.contains("\n  one  "), "{said}");
            sound(&folder, &image);
            assert_eq!(snapshots(&folder, &image), ["base", "one", "two"]);
            for (name, disk) in ["base", "one", "two"].iter().zip(&disks) {
                let what = format!("seed {seed}: {image}@{name}");
                same(&exported(&folder, &format!("{image}@{name}")), disk, &what);
            }
            same(&exported(&folder, &image), &disks[3], &format!("seed {seed}: {image}"));
        }
        for ((_, file), before) in chain.iter().zip(before) {
            assert!(std::fs::read(folder.path(file)).expect("read") == before, "{file} was written");
        }
    }
}

#[test]
fn a_level_takes_about_the_space_of_its_file() {
    require!("qemu");
    let folder = Folder::new();
    sh(&folder, "qemu-img create -q -f qcow2 base.qcow2 256M");
    let scattered = |from: u64, step: u64| {
        (0..40).map(|n| format!("write -P 7 {}k 64k", from + n * step)).collect::<Vec<_>>()
    };
    io(&folder, "qcow2", "base.qcow2", &["write -P 1 0 32M".to_owned()]);
    sh(&folder, "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 one.qcow2");
    io(&folder, "qcow2", "one.qcow2", &scattered(64, 512));
    sh(&folder, "qemu-img create -q -f qcow2 -b one.qcow2 -F qcow2 two.qcow2");
    io(&folder, "qcow2", "two.qcow2", &["write -z 0 24M".to_owned(), "write -P 3 100M 64k".to_owned()]);
    sh(&folder, "qemu-img create -q -f qcow2 -b two.qcow2 -F qcow2 top.qcow2");
    folder.ok(&["import", "--layers", "top.qcow2", "vm"]);
    sound(&folder, "vm");
    let files = ["base.qcow2", "one.qcow2", "two.qcow2", "top.qcow2"];
    let deltas = deltas(&folder, "vm");
    assert_eq!(deltas.len(), files.len());
    let data = [32 * MIB, 40 * 64 * KIB, 64 * KIB, 0];
    for ((delta, file), data) in deltas.iter().zip(files).zip(data) {
        let (ours, theirs) = (allocated(delta), allocated(&folder.path(file)));
        // Neither more than the file, nor less than its data; a map is what they differ by.
        assert!(ours >= data && ours <= theirs + 256 * KIB, "{file}: {ours} for {theirs}");
    }
    // Few clusters are as many as asked for; then the rest of each is copied up.
    folder.ok(&["import", "--layers", "top.qcow2", "large", "--cluster", "1M"]);
    let header = std::fs::read(&self::deltas(&folder, "large")[0]).expect("read");
    assert_eq!(header[28..32], 2048u32.to_le_bytes(), "sectors of a cluster");
}

#[test]
fn zeroes_over_data_read_as_zero_and_take_no_space() {
    require!("qemu");
    let folder = Folder::new();
    sh(&folder, "qemu-img create -q -f raw base.raw 16M");
    io(&folder, "raw", "base.raw", &["write -P 5 0 16M".to_owned()]);
    sh(&folder, "qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2");
    // Zero clusters with and without a place in the file, discarded ones, written zeroes, parts of a cluster.
    let commands =
        ["write -z 0 1M", "write -z -u 1M 1M", "discard 2M 1M", "write -P 0 3M 1M", "write -z 4100k 8k"];
    io(&folder, "qcow2", "top.qcow2", &commands.map(str::to_owned));
    for cluster in ["32K", "64K", "1M"] {
        let image = format!("vm{cluster}");
        folder.ok(&["import", "--layers", "top.qcow2", &image, "--cluster", cluster]);
        sound(&folder, &image);
        let disk = exported(&folder, &image);
        assert!(disk[..4 << 20].iter().all(|byte| *byte == 0), "{cluster}");
        same(&disk, &converted(&folder, "qcow2", "top.qcow2"), cluster);
        same(&exported(&folder, &format!("{image}@base")), &vec![5; 16 << 20], cluster);
        let top = &deltas(&folder, &image)[1];
        // What was written with zeroes in it is one cluster at most.
        assert!(allocated(top) <= 2 * MIB + 64 * KIB, "{cluster}: {}", allocated(top));
    }
}

#[test]
fn an_import_works_as_any_image_and_its_snapshots_can_be_merged() {
    require!("fuse", "qemu");
    let folder = Folder::new();
    let chain = grown_chain(&folder, 77);
    let disks = chain.map(|(format, file)| converted(&folder, format, file));
    let mut mount = Mount::over(folder.0.path(), &[]);
    // By the name that the mount gives it, and shown when the command returns.
    folder.ok(&["import", "--layers", "top.qcow2", text(&mount.point().join("vm.img"))]);
    same(&std::fs::read(mount.flat("vm")).expect("read"), &disks[3], "live");
    let snapshot = mount.point().join(".snapshots/vm/one.img");
    same(&std::fs::read(snapshot).expect("read"), &disks[1], "snapshot");
    for name in ["one", "base", "two"] {
        folder.ok(&["snapshot", "delete", "vm", name]);
    }
    same(&std::fs::read(mount.flat("vm")).expect("read"), &disks[3], "merged");
    mount.umount();
    sound(&folder, "vm");
}

#[test]
fn chains_of_vmdk_and_qed_come_in() {
    require!("qemu");
    for format in ["vmdk", "qed"] {
        let folder = Folder::new();
        sh(&folder, &format!("qemu-img create -q -f {format} base.{format} 8M"));
        io(&folder, format, &format!("base.{format}"), &["write -P 1 1M 3M".to_owned()]);
        // qemu-img wants to hear the format of what is below; a VMDK has no room to write it down.
        sh(&folder, &format!("qemu-img create -q -f {format} -b base.{format} -F {format} top.{format}"));
        io(&folder, format, &format!("top.{format}"), &["write -P 2 2M 64k".to_owned()]);
        folder.ok(&["import", "--layers", &format!("top.{format}"), "vm"]);
        sound(&folder, "vm");
        same(&exported(&folder, "vm@base"), &converted(&folder, format, &format!("base.{format}")), format);
        same(&exported(&folder, "vm"), &converted(&folder, format, &format!("top.{format}")), format);
    }
}

#[test]
fn compressed_data_and_extended_entries_come_in_and_a_backing_file_may_lie_elsewhere() {
    require!("qemu");
    let folder = Folder::new();
    std::fs::create_dir(folder.path("else where")).expect("mkdir");
    sh(&folder, "qemu-img create -q -f raw plain 8M");
    io(&folder, "raw", "plain", &["write -P 9 3M 2M".to_owned()]);
    sh(&folder, "qemu-img convert -c -f raw -O qcow2 plain 'else where/a,b.img'");
    sh(&folder, "qemu-img create -q -f qcow2 -o extended_l2=on -b 'else where/a,b.img' -F qcow2 top.qcow2");
    io(&folder, "qcow2", "top.qcow2", &["write -P 1 3073k 2k".to_owned(), "write -z 4M 4k".to_owned()]);
    folder.ok(&["import", "--layers", "top.qcow2", "vm"]);
    sound(&folder, "vm");
    assert_eq!(snapshots(&folder, "vm"), ["a-b"]);
    same(&exported(&folder, "vm@a-b"), &converted(&folder, "raw", "plain"), "base");
    same(&exported(&folder, "vm"), &converted(&folder, "qcow2", "top.qcow2"), "top");
}

#[test]
fn without_a_backing_file_there_are_no_snapshots_and_inner_ones_stay_behind_and_both_are_said() {
    require!("qemu");
    let folder = Folder::new();
    sh(&folder, "qemu-img create -q -f qcow2 disk.qcow2 1M; qemu-img snapshot -c inner disk.qcow2");
    sh(&folder, "qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2; truncate -s 1M plain");
    let said = folder.ok(&["import", "--layers", "disk.qcow2", "alone"]);
    assert!(said.contains("no snapshots: disk.qcow2 stands on no other file"), "{said}");
    assert!(said.contains("not taken along: the snapshots inside of disk.qcow2: inner"), "{said}");
    assert!(folder.path("alone.hds").is_file());
    let said = folder.ok(&["import", "--layers", "plain", "plain-one"]);
    assert!(said.contains("no snapshots: plain stands on no other file"), "{said}");
    let said = folder.ok(&["import", "--layers", "top.qcow2", "chain"]);
    assert!(said.contains("disk.qcow2: inner"), "{said}");
    assert!(folder.ok(&["import", "disk.qcow2", "again"]).contains("disk.qcow2: inner"));
}

#[test]
fn a_chain_that_is_broken_or_cannot_be_levels_is_refused_and_leaves_nothing() {
    require!("qemu");
    let folder = Folder::new();
    for line in [
        "qemu-img create -q -f raw base.raw 4M",
        "qemu-img create -q -f qcow2 -b base.raw -F raw small.qcow2 2M",
        "qemu-img create -q -f qcow2 -b base.raw -F raw good.qcow2",
        "qemu-img create -q -f qcow2 -b gone.raw -F raw -u gap.qcow2 4M",
        "qemu-img create -q -f qcow2 -b gap.qcow2 -F qcow2 -u deep.qcow2 4M",
        "qemu-img create -q -f qcow2 -b round.qcow2 -F qcow2 -u circle.qcow2 4M",
        "qemu-img create -q -f qcow2 -b circle.qcow2 -F qcow2 -u round.qcow2 4M",
        "qemu-img create -q -f qcow2 -b nbd://127.0.0.1:1/x -F raw -u far.qcow2 4M",
        "qemu-img create -q -f qcow2 -b noise -F qcow2 -u noisy.qcow2 4M",
        "qemu-img create -q -f qcow2 -o data_file=hidden data.qcow2 4M",
        "qemu-img create -q -f qcow2 -b data.qcow2 -F qcow2 over.qcow2 4M",
        "head -c 65536 /dev/urandom > noise; qemu-img create -q -f qcow -b base.raw -F raw old.qcow",
    ] {
        sh(&folder, line);
    }
    folder.ok(&["create", "taken", "--size", "1M"]);
    let names = folder.names();
    let refused = |file: &str| folder.fails(1, &["import", "--layers", file, "vm"]);
    for file in ["gap.qcow2", "deep.qcow2"] {
        let said = refused(file);
        assert!(said.contains("gap.qcow2: stands on ") && said.contains("gone.raw, without which"), "{said}");
    }
    let said = refused("small.qcow2");
    assert!(said.contains("disk of 2097152 bytes") && said.contains("can grow, not shrink"), "{said}");
    assert!(folder.fails(3, &["import", "--layers", "circle.qcow2", "vm"]).contains("on itself"));
    assert!(refused("old.qcow").contains("cannot say of which format the file base.raw is"));
    assert!(refused("far.qcow2").contains("which is no file here"));
    assert!(refused("noisy.qcow2").contains("noise"));
    assert!(refused("over.qcow2").contains("names the file hidden"));
    assert!(refused("gone.qcow2").contains("cannot open"));
    let taken = folder.fails(1, &["import", "--layers", "good.qcow2", "taken"]);
    assert!(taken.contains("an image of this name already"), "{taken}");
    let raw = folder.fails(2, &["import", "--layers", "good.qcow2", "vm.raw"]);
    assert!(raw.contains("a raw image has no snapshots"), "{raw}");
    folder.fails(2, &["import", "--layers", "good.qcow2", "vm", "--cluster", "3K"]);
    assert_eq!(folder.names(), names);
    folder.ok(&["import", "--layers", "--with-backing", "over.qcow2", "vm"]);
    folder.ok(&["import", "--layers", "good.qcow2", "vm2.hdd"]);
    assert!(folder.path("vm2").is_dir());
}

#[test]
fn a_format_that_is_not_said_is_not_guessed() {
    require!("qemu");
    let folder = Folder::new();
    // A raw disk in which a guest wrote what looks like a qcow2 that stands on a file of the host.
    sh(&folder, "echo secret > secret; truncate -s 1M secret");
    sh(&folder, "qemu-img create -q -f qcow2 -b secret -F raw guest.raw 1M");
    sh(&folder, "qemu-img create -q -f qcow2 -b guest.raw -F raw -u top.qcow2 1M");
    // The extension that says so becomes one that nobody knows.
    let mut file = std::fs::read(folder.path("top.qcow2")).expect("read");
    let at = file.windows(4).position(|bytes| bytes == [0xE2, 0x79, 0x2A, 0xCA]).expect("the extension");
    file[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(folder.path("top.qcow2"), file).expect("write");
    let names = folder.names();
    let said = folder.fails(1, &["import", "--layers", "top.qcow2", "vm"]);
    assert!(said.contains("does not say of which format the file guest.raw is"), "{said}");
    assert!(said.contains("qemu-img rebase -u -b guest.raw -F FORMAT"), "{said}");
    assert_eq!(folder.names(), names);
    // As it tells.
    sh(&folder, "qemu-img rebase -u -f qcow2 -b guest.raw -F raw top.qcow2");
    folder.ok(&["import", "--layers", "top.qcow2", "vm"]);
}

/// The numbers of the qemu programs that have something of this folder open or on their command line.
fn helpers(folder: &Path) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let line = |entry: std::fs::DirEntry| {
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        (words.starts_with("qemu-") && words.contains(text(folder))).then_some(words)
    };
    processes.filter_map(line).collect()
}

fn start(folder: &Folder, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
    command.args(args).current_dir(folder.0.path()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("ploopfs starts")
}

#[test]
fn an_interrupted_import_leaves_nothing_and_a_killed_one_is_no_image_and_goes_with_the_next() {
    require!("qemu");
    let folder = Folder::new();
    sh(&folder, "qemu-img create -q -f qcow2 base.qcow2 16M");
    io(&folder, "qcow2", "base.qcow2", &["write -P 1 0 8M".to_owned()]);
    sh(&folder, "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    io(&folder, "qcow2", "top.qcow2", &["write -P 2 0 8M".to_owned()]);
    let names = folder.names();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        // In the first level, and in the second.
        for files in [1, 2] {
            let args = ["import", "--layers", "top.qcow2", "vm", "--rate", ["1M", "8M"][files - 1]];
            let mut child = start(&folder, &args);
            let begun = || {
                let built = folder.path(".vm.new").read_dir().into_iter().flatten().flatten();
                let deltas = built.filter(|file| file.file_name().to_string_lossy().starts_with("vm.hds"));
                let filled = |file: &std::fs::DirEntry| file.metadata().is_ok_and(|m| m.blocks() > 300);
                deltas.filter(filled).count() == files
            };
            assert!(until(Duration::from_secs(20), begun), "{args:?}");
            assert!(!helpers(folder.0.path()).is_empty());
            let pid = Pid::from_raw(child.id() as i32).expect("a child's number");
            kill_process(pid, signal).expect("our child");
            assert!(!child.wait().expect("our child").success());
            let gone = until(Duration::from_secs(20), || helpers(folder.0.path()).is_empty());
            assert!(gone, "{:?}", helpers(folder.0.path()));
            if signal == Signal::KILL {
                let left: Vec<String> = folder.names().into_iter().filter(|n| !names.contains(n)).collect();
                assert_eq!(left, [".vm.new"]);
                assert!(!folder.ok(&["list", "."]).lines().any(|line| line.starts_with("vm")));
            } else {
                assert_eq!(folder.names(), names, "{signal:?} in level {files}");
            }
        }
    }
    folder.ok(&["import", "--layers", "top.qcow2", "vm"]);
    assert!(!folder.path(".vm.new").exists());
    assert!(folder.path("vm").read_dir().expect("a folder").flatten().all(|f| f.file_name() != ".nbd"));
    sound(&folder, "vm");
    same(&exported(&folder, "vm"), &converted(&folder, "qcow2", "top.qcow2"), "after all");
}

#[test]
fn without_the_programs_it_says_what_to_install() {
    require!("qemu");
    let folder = Folder::new();
    sh(&folder, "qemu-img create -q -f qcow2 base.qcow2 1M");
    sh(&folder, "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2; mkdir bin");
    let names = folder.names();
    let line = ["import", "--layers", "top.qcow2", "vm"];
    for programs in ["", "ln -s $(command -v qemu-img) bin"] {
        sh(&folder, programs);
        let done =
            Run::ploopfs().args(line).in_folder(folder.0.path()).env("PATH", text(&folder.path("bin")));
        let said = done.status(1).stderr;
        assert!(said.contains("is not installed") && said.contains("qemu-utils"), "{said}");
        assert_eq!(folder.names(), names);
    }
}
