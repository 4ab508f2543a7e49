//! Snapshots, merges, switches, clones and growth of images that are in use: real kernel, loop devices, binary.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::{Finished, Guest, HostFs, Loop, Mount, Run, heavy, long, ok, read_at, temp_dir, text, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// `ploopfs WORDS`, whatever comes of it.
fn run(words: &[&str]) -> Finished {
    Run::ploopfs().args(words).limit(90).run()
}

/// `ploopfs WORDS`, which must succeed.
#[track_caller]
fn cli(words: &[&str]) -> String {
    Run::ploopfs().args(words).limit(90).ok()
}

/// A snapshot of the flat file of `image` as the mount shows it.
fn shown(mount: &Mount, image: &str, label: &str) -> PathBuf {
    mount.point().join(".snapshots").join(image).join(format!("{label}.img"))
}

/// The snapshots' names; the disk itself is left out.
#[track_caller]
fn names(image: &str) -> Vec<String> {
    let list: Value = serde_json::from_str(&cli(&["snapshot", "list", image, "--json"])).expect("JSON");
    let lines = list["snapshots"].as_array().expect("a list").iter();
    let names = lines.map(|line| line["name"].as_str().expect("a name").to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

#[track_caller]
fn sum(file: &Path) -> String {
    // A CRC is enough against chance, and a hash would take longer than all else here.
    let text = ok("cksum", &[text(file)]);
    text.split(' ').next().expect("a sum").to_owned()
}

/// `ploopfs check` of the image, and `qemu-img check` of each of its deltas.
#[track_caller]
fn sound(images: &Path, image: &str) {
    let folder = images.join(image);
    let said = cli(&["check", text(&folder)]);
    assert!(!said.contains("leak"), "{said}");
    for entry in fs::read_dir(&folder).expect("the image's folder") {
        let file = entry.expect("an entry").path();
        let mut magic = [0; 10];
        let open = File::open(&file).expect("open");
        if open.read_exact_at(&mut magic, 0).is_ok() && magic.starts_with(b"Withou") {
            ok("qemu-img", &["check", "-f", "parallels", text(&file)]);
        }
    }
}

/// Writes `count` MiB of `byte` at `mib`, and syncs.
#[track_caller]
fn fill(file: &Path, mib: u64, count: u64, byte: u8) {
    let open = OpenOptions::new().write(true).open(file).expect("the flat file opens");
    for at in mib..mib + count {
        open.write_all_at(&[byte; MIB as usize], at * MIB).expect("a write");
    }
    open.sync_all().expect("a sync");
}

#[track_caller]
fn byte_at(file: &Path, mib: u64) -> u8 {
    read_at(&File::open(file).expect("opens"), mib * MIB, 1).expect("reads")[0]
}

/// Memory that direct I/O takes: aligned to a block.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// Sets the flag when it goes, so that a thread that watches it ends even when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_snapshot_is_an_exact_cut() {
    require!("fuse", "loop");
    let _turn = heavy();
    let mount = Mount::new(&["--create", "vm1=256M"]);
    let flat = mount.flat("vm1");
    let device = Loop::attach(&flat, true);
    let blocks = 128 * MIB / BLOCK as u64;
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut cuts = Vec::new();
    std::thread::scope(|scope| {
        let stopper = Stop(&stop);
        scope.spawn(|| {
            let mut options = OpenOptions::new();
            let open = options.write(true).custom_flags(libc::O_DIRECT).open(device.device()).expect("opens");
            let mut block = Aligned([0; BLOCK]);
            // Places far apart, each once: 12289 is odd, and the number of blocks a power of two.
            for number in 1..blocks {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                block.0[..8].copy_from_slice(&number.to_le_bytes());
                let place = number * 12289 % blocks;
                open.write_all_at(&block.0, place * BLOCK as u64).expect("a write of the guest");
                written.store(number, Ordering::SeqCst);
            }
        });
        for n in 0..10 {
            let before = written.load(Ordering::SeqCst);
            assert!(until(Duration::from_secs(10), || written.load(Ordering::SeqCst) >= before + 100));
            let label = format!("cut{n}");
            let least = written.load(Ordering::SeqCst);
            cli(&["snapshot", "create", text(&flat), &label]);
            // The write under way when this is read may be in the snapshot too.
            cuts.push((label, least, written.load(Ordering::SeqCst) + 1));
        }
        drop(stopper);
    });
    for (label, least, most) in cuts {
        let data = fs::read(shown(&mount, "vm1", &label)).expect("the snapshot is read");
        let number = |n: u64| {
            let at = (n * 12289 % blocks) as usize * BLOCK;
            u64::from_le_bytes(data[at..at + 8].try_into().expect("eight bytes"))
        };
        let present = (1..blocks).take_while(|&n| number(n) == n).count() as u64;
        let later = (present + 1..blocks).find(|&n| number(n) != 0);
        assert_eq!(later, None, "{label} holds {present} in a row, and one later");
        assert!((least..=most).contains(&present), "{label}: {present} is not in {least}..={most}");
        println!("{label}: a prefix of {present}, acknowledged before it {least}");
    }
    device.detach();
}

/// A fio that verifies what it writes, in a file system; returns its longest write in milliseconds.
fn verified_load(folder: &Path, seconds: u64) -> f64 {
    let text = Run::new("fio")
        .args(["--name=guest", "--filename=load", "--size=48M", "--rw=randwrite", "--bsrange=4k-128k"])
        .args(["--direct=1", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1"])
        .args(["--verify_backlog=256", "--time_based=1", "--output-format=json", "--rate=40m"])
        .arg(format!("--runtime={seconds}"))
        .in_folder(folder)
        .limit(120)
        .ok();
    let json = text.find('{').map_or("", |at| &text[at..]);
    let json: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(json["jobs"][0]["error"], 0, "{text}");
    json["jobs"][0]["write"]["clat_ns"]["max"].as_f64().expect("a time") / 1e6
}

/// Live operations on an image that lies on `kind` and has a file system `inside`, under a fio that verifies.
fn under_fio(kind: &str, inside: &str) {
    // 50 snapshots in the long form, each with what was written meanwhile.
    let rounds = if long() { 50 } else { 12 };
    let host = HostFs::new(kind, if long() { 12 << 30 } else { 5 << 30 });
    let images = host.path().join("images");
    // The least that mkfs.xfs takes is 300 MiB.
    let mut mount = Mount::over(&images, &["--create", "vm1=320M"]);
    let flat = mount.flat("vm1");
    let name = text(&flat);
    let device = Loop::attach(&flat, true);
    let (mkfs, force) = if inside == "xfs" { ("mkfs.xfs", "-f") } else { ("mkfs.ext4", "-F") };
    ok(mkfs, &["-q", force, text(device.device())]);
    let guest = Guest::mount(device.device(), "noatime");
    let done = AtomicBool::new(false);
    let mut kept: Vec<(String, String)> = Vec::new();
    let mut cloned = None;
    let stall = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut stall: f64 = 0.0;
            while !done.load(Ordering::SeqCst) {
                stall = stall.max(verified_load(guest.path(), 5));
            }
            stall
        });
        let stopper = Stop(&done);
        assert!(until(Duration::from_secs(10), || guest.path().join("load").exists()));
        for n in 0..rounds {
            let label = format!("s{n}");
            cli(&["snapshot", "create", name, &label]);
            kept.push((label.clone(), sum(&shown(&mount, "vm1", &label))));
            if n == 6 {
                cloned = Some(kept[kept.len() - 1].1.clone());
            }
            match n {
                4 => drop(cli(&["resize", name, "352M"])),
                7 => drop(cli(&["clone", &format!("{name}@s6"), text(&images.join("copy"))])),
                9 => drop(cli(&["resize", name, "384M"])),
                // One of five is deleted, one of five merged.
                n if n % 5 == 3 => drop(cli(&["snapshot", "delete", name, &kept.remove(1).0])),
                n if n % 5 == 0 && n > 0 => drop(cli(&["merge", name, &kept.remove(0).0])),
                _ => {}
            }
        }
        drop(stopper);
        load.join().expect("fio")
    });
    println!("{inside} on {kind}: longest write {stall:.1} ms during {rounds} rounds");
    assert_eq!(ok("blockdev", &["--getsize64", text(device.device())]).trim(), (384 * MIB).to_string());
    for (label, then) in &kept {
        assert_eq!(&sum(&shown(&mount, "vm1", label)), then, "{label} has changed");
    }
    let copy = mount.flat("copy");
    assert!(until(Duration::from_secs(10), || copy.exists()), "the clone does not appear");
    assert_eq!(Some(sum(&copy)), cloned, "the clone is not what it was made from");
    assert_eq!(names(name), kept.iter().map(|(label, _)| label.as_str()).collect::<Vec<_>>());
    guest.umount();
    match inside {
        "xfs" => ok("xfs_repair", &["-n", text(device.device())]),
        _ => ok("fsck.ext4", &["-f", "-n", text(device.device())]),
    };
    device.detach();
    mount.umount();
    sound(&images, "vm1");
    sound(&images, "copy");
}

#[test]
fn snapshots_deletes_merges_growth_and_a_clone_under_fio_in_an_xfs() {
    require!("fuse", "loop", "fio", "qemu", "ext4", "xfs");
    let _turn = heavy();
    under_fio("ext4", "xfs");
}

#[test]
fn snapshots_deletes_merges_growth_and_a_clone_under_fio_in_an_ext4() {
    require!("fuse", "loop", "fio", "qemu", "ext4", "xfs");
    let _turn = heavy();
    under_fio("xfs", "ext4");
}

#[test]
fn a_snapshot_is_mounted_read_only_by_loop_while_the_disk_goes_on() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=128M"]);
    let flat = mount.flat("vm1");
    let device = Loop::attach(&flat, true);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    let guest = Guest::mount(device.device(), "noatime");
    let file = guest.path().join("file");
    // In the caches only: --freeze must bring it out.
    fs::write(&file, "then").expect("a write");
    cli(&["snapshot", "create", "--freeze", text(&flat), "then"]);
    fs::write(&file, "now, and longer").expect("a write");
    File::open(&file).and_then(|file| file.sync_all()).expect("a sync");

    let snapshot = shown(&mount, "vm1", "then");
    let shown = ok("losetup", &["-r", "-f", "--show", text(&snapshot)]);
    // The guard detaches it; loops over the mount are detached at the mount's end anyway.
    let other = PathBuf::from(shown.trim());
    let past = Guest::mount(&other, "ro,noload");
    assert_eq!(fs::read_to_string(past.path().join("file")).expect("reads"), "then");
    fs::write(guest.path().join("more"), vec![7; MIB as usize]).expect("the disk goes on");
    ok("sync", &["-f", text(guest.path())]);
    assert_eq!(fs::read_to_string(past.path().join("file")).expect("reads"), "then");
    assert_eq!(fs::read_to_string(&file).expect("reads"), "now, and longer");
    past.umount();
    ok("fsck.ext4", &["-f", "-n", text(&other)]);
    ok("losetup", &["-d", text(&other)]);
    guest.umount();
    device.detach();
}

#[test]
fn a_snapshot_that_is_open_below_dot_snapshots_is_not_deleted_until_it_is_closed() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    fill(&flat, 0, 2, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    fill(&flat, 1, 2, 2);
    let open = File::open(shown(&mount, "vm1", "monday")).expect("opens");
    let done = run(&["snapshot", "delete", text(&flat), "monday"]);
    assert_eq!(done.code(), Some(4), "{done}");
    assert!(done.stderr.contains("monday"), "{done}");
    assert_eq!(read_at(&open, MIB, 1).expect("reads"), [1]);
    drop(open);
    cli(&["snapshot", "delete", text(&flat), "monday"]);
    assert_eq!(names(text(&flat)), Vec::<String>::new());
    assert_eq!([0, 1, 2, 3].map(|mib| byte_at(&flat, mib)), [1, 2, 2, 0]);
}

#[test]
fn a_switch_is_refused_while_the_disk_is_open_and_works_after() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    fill(&flat, 0, 2, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    fill(&flat, 0, 1, 2);
    let open = mount.open("vm1");
    let done = run(&["snapshot", "switch", text(&flat), "monday"]);
    assert_eq!(done.code(), Some(4), "{done}");
    assert!(done.stderr.contains("open"), "{done}");
    assert_eq!(read_at(&open, 0, 1).expect("reads"), [2]);
    drop(open);
    cli(&["snapshot", "switch", text(&flat), "monday"]);
    assert_eq!([byte_at(&flat, 0), byte_at(&flat, 1)], [1, 1]);
    fill(&flat, 0, 1, 3);
    assert_eq!([byte_at(&flat, 0), byte_at(&shown(&mount, "vm1", "monday"), 0)], [3, 1]);
}

/// The kernel tells us of a close after close() has returned: a power-cut test on uring met its own `cksum`.
#[test]
fn a_switch_and_a_delete_wait_for_a_close_that_is_on_its_way() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    fill(&flat, 0, 1, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    let while_closing = |open: File, command: &[&str]| {
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(open);
        });
        let done = run(command);
        late.join().expect("closed");
        assert!(done.success(), "{done}");
    };
    while_closing(mount.open("vm1"), &["snapshot", "switch", text(&flat), "monday"]);
    let snapshot = File::open(shown(&mount, "vm1", "monday")).expect("opens");
    while_closing(snapshot, &["snapshot", "delete", text(&flat), "monday"]);
    assert_eq!(names(text(&flat)), Vec::<String>::new());
}

#[test]
fn sigkill_in_the_middle_of_a_merge_loses_nothing() {
    require!("fuse", "qemu");
    let _turn = heavy();
    let mut mount = Mount::new(&["--create", "vm1=128M"]);
    let flat = mount.flat("vm1");
    let name = text(&flat);
    // Every level writes much of the disk, so that each merge has tens of clusters to move.
    for (n, label) in ["a", "b", "c", "d", "e"].iter().enumerate() {
        fill(&flat, 5 * n as u64, 48, n as u8 + 1);
        cli(&["snapshot", "create", name, label]);
    }
    fill(&flat, 40, 8, 99);
    let (disk, kept) = (sum(&flat), ["a", "e"].map(|label| (label, sum(&shown(&mount, "vm1", label)))));
    for label in ["c", "b", "d"] {
        let mut client = std::process::Command::new(env!("CARGO_BIN_EXE_ploopfs"))
            .args(["snapshot", "delete", "--rate", "4M", name, label])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("the client");
        // Long enough for some clusters; whole it takes more than 5 s at that rate where 20 MiB move.
        let ended = until(Duration::from_millis(900), || client.try_wait().expect("its state").is_some());
        mount.kill();
        let status = client.wait().expect("its end");
        println!(
            "{label}: the merge was {} when the daemon was killed",
            if ended { "over" } else { "under way" }
        );
        assert!(ended || !status.success(), "the client says done, and was killed");
        mount.start();
        assert_eq!(sum(&flat), disk, "the disk has changed after {label}");
        for (label, then) in &kept {
            assert_eq!(&sum(&shown(&mount, "vm1", label)), then, "{label} has changed");
        }
        // A deleted snapshot that is not merged yet is listed by its GUID.
        let pending = || names(name).into_iter().filter(|found| found.starts_with('{')).collect::<Vec<_>>();
        let merged = until(Duration::from_secs(15), || pending().is_empty());
        assert!(merged, "not merged in the background after {label}: {:?}", pending());
        assert!(!names(name).iter().any(|found| found == label), "{label} is still there");
        assert_eq!(sum(&flat), disk, "the disk has changed after {label} was merged");
        for (label, then) in &kept {
            assert_eq!(&sum(&shown(&mount, "vm1", label)), then, "{label} has changed");
        }
    }
    assert_eq!(names(name), ["a", "e"]);
    let images = mount.images().to_owned();
    mount.umount();
    sound(&images, "vm1");
}

/// FAULTS 70: 200 MiB were copied for one that had changed, and the image stayed a folder.
#[test]
fn deleting_the_only_snapshot_of_an_idle_raw_image_makes_it_the_raw_file_that_it_was() {
    require!("fuse");
    let folder = temp_dir();
    let images = folder.path().join("images");
    fs::create_dir(&images).expect("a folder");
    fs::write(images.join("vm1.raw"), vec![1; 32 * MIB as usize]).expect("a raw image");
    let mut mount = Mount::over(&images, &[]);
    let flat = mount.flat("vm1");
    let ino = |file: &Path| file.metadata().expect("it is there").ino();
    let (shown, file) = (ino(&flat), ino(&images.join("vm1.raw")));
    for round in 2..4 {
        cli(&["snapshot", "create", text(&flat), "s1"]);
        assert!(images.join("vm1").is_dir());
        fill(&flat, 3, 1, round);
        let said = run(&["snapshot", "delete", text(&flat), "s1"]);
        assert!(said.success() && said.output().is_empty(), "{said}");
        assert_eq!((ino(&flat), ino(&images.join("vm1.raw"))), (shown, file));
        assert!(!images.join("vm1").exists());
        // A look at the folder finds nothing else.
        cli(&["create", text(&images.join(format!("new{round}"))), "--size", "1M"]);
        let list: Value = serde_json::from_str(&cli(&["list", text(&images), "--json"])).expect("JSON");
        let found = list["images"].as_array().expect("a list").iter().find(|image| image["name"] == "vm1");
        let found = found.expect("listed");
        assert_eq!((&found["kind"], &found["served"]), (&"raw".into(), &true.into()), "{found}");
        assert_eq!(ino(&flat), shown, "another file by now");
        assert_eq!([2, 3, 4].map(|mib| byte_at(&flat, mib)), [1, round, 1]);
        assert_eq!(names(text(&flat)), Vec::<String>::new());
    }
    fill(&flat, 4, 1, 9);
    mount.umount();
    let bytes = fs::read(images.join("vm1.raw")).expect("read");
    assert_eq!(bytes.len(), 32 * MIB as usize);
    assert_eq!([2, 3, 4, 5].map(|mib| bytes[mib * MIB as usize]), [1, 3, 9, 1]);
}

#[test]
fn a_read_only_mount_shows_the_snapshots_and_changes_nothing() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    fill(&flat, 0, 2, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    fill(&flat, 0, 1, 2);
    mount.umount();
    mount.set_args(&["--read-only"]);
    mount.start();
    let monday = shown(&mount, "vm1", "monday");
    assert_eq!([byte_at(&flat, 0), byte_at(&monday, 0), byte_at(&monday, 1)], [2, 1, 1]);
    assert_eq!(names(text(&flat)), ["monday"]);
    OpenOptions::new().write(true).open(&monday).expect_err("a snapshot is not written");
    for words in [
        &["snapshot", "create", text(&flat), "x"][..],
        &["snapshot", "delete", text(&flat), "monday"],
        &["snapshot", "switch", text(&flat), "monday"],
        &["resize", text(&flat), "128M"],
    ] {
        let done = run(words);
        assert!(!done.success() && !done.stderr.is_empty(), "{done}");
    }
    assert_eq!(names(text(&flat)), ["monday"]);
}

#[test]
fn a_snapshot_that_is_opened_just_as_its_last_user_lets_go_is_not_in_use() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let flat = mount.flat("vm1");
    fill(&flat, 0, 1, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    let monday = shown(&mount, "vm1", "monday");
    thread::scope(|scope| {
        for file in [&monday, &monday, &flat] {
            scope.spawn(move || (0..400).for_each(|_| drop(File::open(file).expect("nobody else has it"))));
        }
    });
    mount.umount();
}

#[test]
fn a_layered_folder_moved_in_appears() {
    require!("fuse");
    let outside = temp_dir();
    let vm = outside.path().join("vm");
    cli(&["create", text(&vm), "--size", "64M"]);
    cli(&["snapshot", "create", text(&vm), "monday"]);
    let images = outside.path().join("images");
    fs::create_dir(&images).expect("a folder");
    let mount = Mount::over(&images, &[]);
    fs::rename(&vm, images.join("vm")).expect("moved in");
    let flat = mount.flat("vm");
    assert!(until(Duration::from_secs(10), || flat.exists()), "it does not appear");
    fill(&flat, 3, 1, 5);
    assert_eq!([byte_at(&flat, 3), byte_at(&shown(&mount, "vm", "monday"), 3)], [5, 0]);
    fs::rename(images.join("vm"), outside.path().join("gone")).expect("moved out");
    assert!(until(Duration::from_secs(10), || !flat.exists()), "it does not go");
}

#[test]
fn a_hard_linked_clone_and_its_origin_are_served_together() {
    require!("fuse", "loop");
    let host = HostFs::new("ext4", 1 << 30);
    let images = host.path().join("images");
    let mut mount = Mount::over(&images, &["--create", "vm1=64M"]);
    let (flat, copy) = (mount.flat("vm1"), mount.flat("copy"));
    fill(&flat, 0, 8, 1);
    cli(&["snapshot", "create", text(&flat), "monday"]);
    cli(&["clone", &format!("{}@monday", text(&flat)), text(&images.join("copy"))]);
    assert!(until(Duration::from_secs(10), || copy.exists()), "the clone does not appear");
    let base = images.join("vm1/vm1.hds");
    let meta = base.metadata().expect("the frozen delta");
    assert_eq!(meta.nlink(), 2, "the clone is no hard link");
    let before = sum(&base);
    // Both open at once, and both written.
    let (one, two) = (mount.open("vm1"), mount.open("copy"));
    for mib in 0..6 {
        one.write_all_at(&[2; 4096], mib * MIB).expect("a write to the origin");
        two.write_all_at(&[3; 4096], (mib + 2) * MIB).expect("a write to the clone");
    }
    one.sync_all().and_then(|()| two.sync_all()).expect("syncs");
    let bytes =
        |file: &File| (0..9).map(|mib| read_at(file, mib * MIB, 1).expect("reads")[0]).collect::<Vec<_>>();
    assert_eq!(bytes(&one), [2, 2, 2, 2, 2, 2, 1, 1, 0]);
    assert_eq!(bytes(&two), [1, 1, 3, 3, 3, 3, 3, 3, 0]);
    drop((one, two));
    // A delete in the origin leaves the file that the clone stands on.
    cli(&["snapshot", "delete", text(&flat), "monday"]);
    let (one, two) = (mount.open("vm1"), mount.open("copy"));
    assert_eq!(bytes(&one), [2, 2, 2, 2, 2, 2, 1, 1, 0]);
    assert_eq!(bytes(&two), [1, 1, 3, 3, 3, 3, 3, 3, 0]);
    drop((one, two));
    mount.umount();
    let shared = fs::read_dir(images.join("copy")).expect("the clone's folder").filter_map(Result::ok);
    let shared =
        shared.map(|entry| entry.path()).filter(|path| path.metadata().is_ok_and(|m| m.ino() == meta.ino()));
    assert_eq!(shared.map(|path| sum(&path)).collect::<Vec<_>>(), [before], "the shared delta was touched");
    for image in ["vm1", "copy"] {
        cli(&["check", text(&images.join(image))]);
    }
}
