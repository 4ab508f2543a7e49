//! `ploopfs cbt` through the real binary: at rest, live, after a kill, with snapshots, and what QEMU and ploop make of the
//! bitmap.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Mount, Run, ok, punch, temp_dir, text, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PIECE: u64 = 64 << 10;
const NOTHING: [(u64, u64); 0] = [];

fn show(image: &Path) -> Value {
    serde_json::from_str(&Run::ploopfs().args(["cbt", "show", "--json"]).arg(image).ok()).expect("JSON")
}

fn ranges(shown: &Value) -> Vec<(u64, u64)> {
    let range = |r: &Value| (r["start"].as_u64().expect("a number"), r["length"].as_u64().expect("a number"));
    shown["ranges"].as_array().expect("a list").iter().map(range).collect()
}

/// Begins to track; the uuid.
fn start(image: &Path) -> String {
    Run::ploopfs().args(["cbt", "start"]).arg(image).ok().trim().to_owned()
}

/// A folder with the image vm1 of 64 MiB, unmounted.
fn image() -> Mount {
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    mount.umount();
    mount
}

fn header(file: &Path) -> (u32, u64) {
    let mut bytes = [0; 64];
    fs::File::open(file).and_then(|file| file.read_exact_at(&mut bytes, 0)).expect("the image");
    let in_use = u32::from_le_bytes(bytes[44..48].try_into().expect("four"));
    (in_use, u64::from_le_bytes(bytes[56..64].try_into().expect("eight")))
}

const V21: u32 = 0x312e_3276;

fn write(file: &fs::File, at: u64) {
    file.write_all_at(&[7; 4096], at).expect("a write");
}

#[test]
fn what_a_mount_changes_is_in_the_bitmap_and_nothing_else_is() {
    require!("fuse");
    let mut mount = image();
    let file = mount.delta("vm1");
    assert_eq!(show(&file)["tracked"], false);
    assert_eq!(ranges(&show(&file)), [(0, 64 * MIB)], "everything counts as changed");
    let uuid = start(&file);
    assert_eq!(uuid.len(), 36, "{uuid}");
    let shown = show(&file);
    assert_eq!((shown["uuid"].as_str(), ranges(&shown)), (Some(&*uuid), vec![]), "{shown}");
    assert_eq!(header(&file).0, V21);

    mount.start();
    let disk = mount.open("vm1");
    write(&disk, 0);
    write(&disk, 5 * MIB - 2048);
    write(&disk, 64 * MIB - 4096);
    disk.write_all_at(&vec![0; 4096], 40 * MIB).expect("zeroes, where nothing is");
    assert_eq!(header(&file), (0x746F_6E59, 0), "while it can be written, the file has no bitmap");
    let expected = [(0, PIECE), (5 * MIB - PIECE, 2 * PIECE), (64 * MIB - PIECE, PIECE)];
    assert_eq!(ranges(&show(&mount.flat("vm1"))), expected, "live");
    drop(disk);
    mount.umount();
    let shown = show(&file);
    assert_eq!((shown["uuid"].as_str(), ranges(&shown)), (Some(&*uuid), expected.to_vec()), "at rest");

    // It goes on; what is discarded has changed, where something was.
    mount.start();
    let disk = mount.open("vm1");
    write(&disk, 20 * MIB);
    punch(&disk, 0, 3 * MIB).expect("a hole");
    punch(&disk, 30 * MIB, MIB).expect("a hole where nothing is");
    drop(disk);
    mount.umount();
    let shown = show(&file);
    let expected = [(0, MIB), (5 * MIB - PIECE, 2 * PIECE), (20 * MIB, PIECE), (64 * MIB - PIECE, PIECE)];
    assert_eq!((shown["uuid"].as_str(), ranges(&shown)), (Some(&*uuid), expected.to_vec()));
    let said = Run::ploopfs().args(["cbt", "show"]).arg(&file).ok();
    assert!(said.lines().next().is_some_and(|line| line.contains(&uuid)), "{said}");
    assert_eq!(Run::ploopfs().arg("check").arg(&file).run().code(), Some(0));

    Run::ploopfs().args(["cbt", "stop"]).arg(&file).ok();
    assert_eq!((show(&file)["tracked"].as_bool(), header(&file)), (Some(false), (0, 0)));
    let done = Run::ploopfs().args(["cbt", "stop"]).arg(&file).status(1);
    assert!(done.stderr.contains("not tracked"), "{done}");
    let check: Value =
        serde_json::from_str(&Run::ploopfs().args(["check", "--json"]).arg(&file).ok()).expect("JSON");
    assert_eq!((check["errors"].as_u64(), check["leaks"].as_u64()), (Some(0), Some(0)), "{check}");
}

#[test]
fn reading_a_tracked_disk_and_showing_its_changes_changes_no_byte() {
    require!("fuse");
    let mut mount = image();
    let file = mount.delta("vm1");
    start(&file);
    let before = fs::read(&file).expect("the image");
    show(&file);
    Run::ploopfs().args(["cbt", "show"]).arg(&file).ok();
    mount.start();
    // Open for writing, but not written.
    let disk = mount.open("vm1");
    disk.read_exact_at(&mut [0; 4096], 0).expect("a read");
    show(&file);
    drop(disk);
    mount.umount();
    assert!(before == fs::read(&file).expect("the image"), "the file was changed");
}

#[test]
fn a_disk_in_use_is_tracked_from_the_moment_that_start_returns_to_stop() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let disk = mount.open("vm1");
    write(&disk, 0);
    let flat = mount.flat("vm1");
    let uuid = start(&flat);
    let again = Run::ploopfs().args(["cbt", "start"]).arg(&flat).status(1);
    assert!(again.stderr.contains(&uuid), "{again}");
    write(&disk, 9 * MIB);
    assert_eq!(ranges(&show(&flat)), [(9 * MIB, PIECE)]);
    Run::ploopfs().args(["resize"]).arg(&flat).arg("66M").ok();
    write(&disk, 10 * MIB);
    let expected = [(9 * MIB, PIECE), (10 * MIB, PIECE), (64 * MIB, 2 * MIB)];
    assert_eq!(ranges(&show(&flat)), expected, "what a disk grew by has changed");
    drop(disk);
    mount.umount();
    assert_eq!(ranges(&show(&mount.delta("vm1"))), expected);
    mount.set_args(&[]);
    mount.start();
    let disk = mount.open("vm1");
    Run::ploopfs().args(["cbt", "stop"]).arg(&flat).ok();
    assert_eq!(show(&flat)["tracked"], false);
    drop(disk);
    mount.umount();
    assert_eq!(header(&mount.delta("vm1")), (0, 0));
}

#[test]
fn a_kill_loses_the_tracking_and_everything_counts_as_changed() {
    require!("fuse");
    let mut mount = image();
    let file = mount.delta("vm1");
    start(&file);
    mount.start();
    let disk = mount.open("vm1");
    write(&disk, MIB);
    mount.kill();
    drop(disk);
    let shown = show(&file);
    assert_eq!((shown["tracked"].as_bool(), ranges(&shown)), (Some(false), vec![(0, 64 * MIB)]));
    assert!(shown["reason"].as_str().is_some_and(|why| why.contains("not closed cleanly")), "{shown}");
    mount.start();
    write(&mount.open("vm1"), 2 * MIB);
    mount.umount();
    let shown = show(&file);
    assert_eq!((shown["tracked"].as_bool(), ranges(&shown)), (Some(false), vec![(0, 64 * MIB)]), "{shown}");
}

#[test]
fn the_tracking_goes_on_over_a_snapshot_and_a_merge() {
    require!("fuse");
    let mut mount = image();
    let file = mount.delta("vm1");
    let uuid = start(&file);
    mount.start();
    let disk = mount.open("vm1");
    write(&disk, MIB);
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg("monday").ok();
    write(&disk, 2 * MIB);
    drop(disk);
    mount.umount();
    let folder = mount.images().join("vm1");
    let expected = vec![(MIB, PIECE), (2 * MIB, PIECE)];
    let shown = show(&folder);
    assert_eq!((shown["uuid"].as_str(), ranges(&shown)), (Some(&*uuid), expected.clone()), "{shown}");
    // The first thing that is done to a closed image.
    Run::ploopfs().args(["snapshot", "create"]).arg(&folder).arg("tuesday").ok();
    Run::ploopfs().args(["snapshot", "delete"]).arg(&folder).arg("monday").ok();
    let shown = show(&folder);
    assert_eq!((shown["uuid"].as_str(), ranges(&shown)), (Some(&*uuid), expected), "{shown}");
    // A disk that goes back is another one.
    Run::ploopfs().args(["snapshot", "switch"]).arg(&folder).arg("tuesday").ok();
    assert_eq!(show(&folder)["tracked"], false);
}

#[test]
fn a_bitmap_of_many_pieces_comes_back_as_it_was() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=2G"]);
    mount.umount();
    let file = mount.delta("vm1");
    // 4 Mi bits: half a cluster of them.
    Run::ploopfs().args(["cbt", "start", "--granularity", "512"]).arg(&file).ok();
    mount.start();
    let disk = mount.open("vm1");
    let at = |n: u64| n * 97 * 4096 % (2048 * MIB);
    let mut expected: Vec<(u64, u64)> = (0..400).map(|n| (at(n), 512)).collect();
    for (begin, _) in &expected {
        disk.write_all_at(&[1; 512], *begin).expect("a write");
    }
    drop(disk);
    mount.umount();
    expected.sort_unstable();
    assert_eq!(ranges(&show(&file)), expected);
    let extension = header(&file).1 * 512;
    assert_eq!(
        fs::metadata(&file).expect("stat").len(),
        extension + MIB,
        "the extension is the last cluster"
    );
}

#[test]
fn what_cannot_be_tracked_is_refused_and_left_as_it_is() {
    let folder = temp_dir();
    let at = |name: &str| folder.path().join(name);
    let cbt = |what: &str, file: &Path| Run::ploopfs().args(["cbt", what]).arg(file);
    Run::ploopfs().arg("create").arg(at("vm1")).args(["--size", "1G"]).ok();
    Run::ploopfs().arg("create").arg(at("vm2")).args(["--size", "8M", "--format", "raw"]).ok();
    fs::write(at("empty.hds"), "").expect("write");
    fs::write(at("cut.hds"), &fs::read(at("vm1.hds")).expect("it")[..3000]).expect("write");
    fs::create_dir(at("folder")).expect("mkdir");
    for what in ["start", "stop", "show"] {
        cbt(what, &at("empty.hds")).status(3);
        cbt(what, &at("cut.hds")).status(3);
        cbt(what, &at("missing.hds")).status(1);
        cbt(what, &at("folder")).status(1);
        assert!(Run::ploopfs().args(["cbt", what, "--help"]).ok().contains("IMAGE"));
    }
    let raw = cbt("start", &at("vm2.raw")).status(1);
    assert!(raw.stderr.contains("raw"), "{raw}");
    assert_eq!(show(&at("vm2.raw"))["tracked"], false);
    for wrong in ["100000", "256", "0", "4T"] {
        let done = cbt("start", &at("vm1.hds")).args(["--granularity", wrong]).status(2);
        assert!(done.stderr.contains("granularity"), "{done}");
    }
    assert_eq!(header(&at("vm1.hds")), (0, 0), "untouched");
    assert_eq!(fs::metadata(at("cut.hds")).expect("stat").len(), 3000);
}

#[test]
fn an_image_that_somebody_else_has_is_in_use() {
    require!("fuse", "qemu");
    let mount = image();
    let file = mount.delta("vm1");
    let qemu = Nbd::serve(&["-f", "parallels"], &file, mount.images());
    Run::ploopfs().args(["cbt", "start"]).arg(&file).status(4);
    Run::ploopfs().args(["cbt", "show"]).arg(&file).status(4);
    drop(qemu);
    start(&file);
}

/// QEMU serving a file; ended with the test.
struct Nbd {
    child: Child,
    socket: std::path::PathBuf,
}

impl Nbd {
    fn serve(args: &[&str], file: &Path, folder: &Path) -> Nbd {
        let socket = folder.join(".nbd");
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-x", "e", "-k", text(&socket)]).args(args).arg(file);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("qemu-nbd");
        let nbd = Nbd { child, socket };
        assert!(until(Duration::from_secs(20), || nbd.socket.exists()), "qemu-nbd does not serve {file:?}");
        nbd
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// The ranges that QEMU finds dirty in the bitmap `uuid` of the image `file`.
fn dirty_in_qemu(file: &Path, uuid: &str, folder: &Path) -> Vec<(u64, u64)> {
    let nbd = Nbd::serve(&["-r", "-f", "parallels", "-B", uuid], file, folder);
    let options = format!(
        "driver=nbd,export=e,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{uuid}",
        text(&nbd.socket)
    );
    let map = ok("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let map: Vec<Value> = serde_json::from_str(&map).expect("JSON");
    // This client shows a dirty range as one that has no data.
    let dirty = map.iter().filter(|range| range["data"] == false);
    dirty.map(|r| (r["start"].as_u64().expect("start"), r["length"].as_u64().expect("length"))).collect()
}

#[test]
fn qemu_reads_the_bitmap_that_we_wrote() {
    require!("fuse", "qemu");
    let mut mount = image();
    let file = mount.delta("vm1");
    let uuid = start(&file);
    assert_eq!(dirty_in_qemu(&file, &uuid, mount.images()), NOTHING, "nothing has changed");
    mount.start();
    let disk = mount.open("vm1");
    write(&disk, 0);
    write(&disk, 5 * MIB - 2048);
    write(&disk, 64 * MIB - 4096);
    drop(disk);
    mount.umount();
    let ours = ranges(&show(&file));
    assert_eq!(ours.len(), 3);
    assert_eq!(dirty_in_qemu(&file, &uuid, mount.images()), ours);
    // The extension is no damage; QEMU's check counts its clusters, which no entry names, as leaks.
    let check = Run::new("qemu-img").args(["check", "-f", "parallels", "--output=json"]).arg(&file).run();
    let found: Value = serde_json::from_str(&check.stdout).expect("JSON");
    assert_eq!((found["corruptions"].as_u64(), found["check-errors"].as_u64()), (None, Some(0)), "{check}");
    assert_eq!(found["leaks"].as_u64(), Some(2), "one cluster of bits, one of the extension: {check}");

    // All of it: no cluster of bits at all.
    mount.start();
    let disk = mount.open("vm1");
    (0..64).for_each(|cluster| disk.write_all_at(&vec![1; MIB as usize], cluster * MIB).expect("a write"));
    drop(disk);
    mount.umount();
    assert_eq!(ranges(&show(&file)), [(0, 64 * MIB)]);
    assert_eq!(dirty_in_qemu(&file, &uuid, mount.images()), [(0, 64 * MIB)]);
}

#[test]
fn a_write_by_qemu_ends_the_tracking() {
    require!("fuse", "qemu");
    let mount = image();
    let file = mount.delta("vm1");
    start(&file);
    ok("qemu-io", &["-f", "parallels", "-c", "write -P 3 7M 64k", text(&file)]);
    let shown = show(&file);
    assert_eq!((shown["tracked"].as_bool(), ranges(&shown)), (Some(false), vec![(0, 64 * MIB)]));
    let why = shown["reason"].as_str().expect("a reason");
    assert!(why.contains("another program"), "{why}");
    // It can begin anew.
    start(&file);
    assert_eq!(ranges(&show(&file)), NOTHING);
}

#[test]
fn a_ploop_that_knows_no_bitmaps_may_cut_it_off_and_then_everything_counts_as_changed() {
    require!("fuse", "ploop");
    let mut mount = Mount::in_memory(&["--create", "vm1=64M"]);
    let file = mount.delta("vm1");
    write(&mount.open("vm1"), 3 * MIB);
    mount.umount();
    start(&file);
    // Debian's ploop 1.15 takes what is neither closed nor "in use" for dirty, and the bitmap for a leak.
    let done = Run::new("ploop").args(["check", "-f"]).arg(&file).run();
    println!("{done}");
    let shown = show(&file);
    assert_eq!((shown["tracked"].as_bool(), ranges(&shown)), (Some(false), vec![(0, 64 * MIB)]), "{shown}");
    Run::ploopfs().arg("check").arg(&file).ok();
    mount.start();
    let disk = mount.open("vm1");
    let mut read = [0; 4096];
    disk.read_exact_at(&mut read, 3 * MIB).expect("a read");
    assert!(read.iter().all(|byte| *byte == 7), "the disk is what it was");
}
