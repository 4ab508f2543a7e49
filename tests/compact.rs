//! `ploopfs compact`, offline and live: the file becomes shorter (with `--defrag` also in order), and the disk stays what it
//! was.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Mount, Run, ok, read_at, temp_dir, text, until};

const MIB: u64 = 1 << 20;
const CLUSTERS: u64 = 48;

fn block(cluster: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    block[..8].copy_from_slice(&(cluster + 1).to_le_bytes());
    block
}

fn discard(file: &File, offset: u64, len: u64) {
    use rustix::fs::FallocateFlags;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, len).expect("a hole");
}

/// Writes every cluster in order, syncs, then discards the first 30, and overwrites some of the rest with zeroes.
fn make_holes(file: &File) {
    for cluster in 0..CLUSTERS {
        file.write_all_at(&block(cluster), cluster * MIB + 8192).expect("a write");
    }
    file.sync_all().expect("a sync");
    discard(file, 0, 30 * MIB);
    for cluster in [33, 40] {
        file.write_all_at(&vec![0; MIB as usize], cluster * MIB).expect("zeroes");
    }
    file.sync_all().expect("a sync");
}

fn is_zero(cluster: u64) -> bool {
    cluster < 30 || cluster == 33 || cluster == 40
}

#[track_caller]
fn same_as_before(file: &File) {
    for cluster in 0..CLUSTERS {
        let wanted = if is_zero(cluster) { vec![0; 4096] } else { block(cluster) };
        assert_eq!(read_at(file, cluster * MIB + 8192, 4096).expect("a read"), wanted, "cluster {cluster}");
    }
}

/// An unmounted image with free places in front and clusters of zeroes.
fn with_holes() -> Mount {
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    make_holes(&mount.open("vm1"));
    mount.umount();
    mount
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").len()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn a_file_becomes_shorter_offline_and_the_disk_stays_the_same() {
    require!("fuse", "qemu");
    let mut mount = with_holes();
    let file = mount.delta("vm1");
    assert_eq!(len(&file), 49 * MIB, "the last cluster in use is the last that was written");
    let said = Run::ploopfs().arg("compact").arg(&file).ok();
    let titles = ["what it would gain:", "what it has gained:"].map(|title| said.matches(title).count());
    assert_eq!(titles, [1, 1], "{said}");
    // Header and BAT, and the 16 clusters that are not zero.
    assert_eq!(len(&file), 17 * MIB, "{said}");
    assert!(fs::metadata(&file).expect("stat").blocks() * 512 < 2 * MIB, "sparse as before");
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
    mount.start();
    same_as_before(&mount.open("vm1"));
    mount.umount();
    let again = json(&Run::ploopfs().args(["compact", "--json"]).arg(&file).ok());
    assert_eq!((again["moved_clusters"].as_u64(), again["zero_clusters"].as_u64()), (Some(0), Some(0)));
    assert_eq!(len(&file), 17 * MIB);
}

#[test]
fn a_dry_run_says_what_is_gained_and_changes_no_byte() {
    require!("fuse");
    let mount = with_holes();
    let file = mount.delta("vm1");
    let before = (fs::read(&file).expect("the file"), fs::metadata(&file).expect("stat").mtime_nsec());
    let said = json(&Run::ploopfs().args(["compact", "--dry-run", "--json"]).arg(&file).ok());
    assert_eq!(said["dry_run"].as_bool(), Some(true), "{said}");
    assert_eq!(said["length_after"].as_u64(), Some(17 * MIB), "{said}");
    assert_eq!(said["zero_clusters"].as_u64(), Some(2), "{said}");
    let after = (fs::read(&file).expect("the file"), fs::metadata(&file).expect("stat").mtime_nsec());
    assert!(before == after, "a dry run changed the file");
    let done = json(&Run::ploopfs().args(["compact", "--json"]).arg(&file).ok());
    assert_eq!(done["length_after"], said["length_after"], "it does what it says");
    assert_eq!(done["zero_clusters"], said["zero_clusters"]);
}

#[test]
fn a_live_disk_is_compacted_under_load() {
    require!("fuse", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    make_holes(&file);
    let end = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        // One writer in clusters that move, and one that allocates and discards behind them.
        let writer = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !end.load(Ordering::Relaxed) {
                rounds += 1;
                for cluster in 41..CLUSTERS {
                    file.write_all_at(&rounds.to_le_bytes(), cluster * MIB).expect("a write");
                    file.write_all_at(&rounds.to_le_bytes(), (cluster + 10) * MIB).expect("a write");
                    assert_eq!(read_at(&file, cluster * MIB, 8).expect("a read"), rounds.to_le_bytes());
                }
                discard(&file, 51 * MIB, 7 * MIB);
            }
            rounds
        });
        for _ in 0..3 {
            Run::ploopfs().arg("compact").arg(mount.flat("vm1")).ok();
        }
        end.store(true, Ordering::Relaxed);
        writer.join().expect("the writer")
    });
    for cluster in 41..CLUSTERS {
        assert_eq!(read_at(&file, cluster * MIB, 8).expect("a read"), rounds.to_le_bytes());
    }
    same_as_before(&file);
    let said = json(&Run::ploopfs().args(["compact", "--json"]).arg(mount.flat("vm1")).ok());
    assert!(len(&mount.delta("vm1")) <= 18 * MIB, "{said}");
    drop(file);
    mount.umount();
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&mount.delta("vm1"))]);
    mount.start();
    same_as_before(&mount.open("vm1"));
}

#[test]
fn zeroes_that_hide_a_snapshot_s_data_stay_zeroes_and_the_snapshot_stays() {
    require!("fuse", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    for cluster in 0..8 {
        file.write_all_at(&[9; 4096], cluster * MIB).expect("a write");
    }
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("one").ok();
    for cluster in 8..16 {
        file.write_all_at(&[8; 4096], cluster * MIB).expect("a write");
    }
    for cluster in 0..4 {
        file.write_all_at(&vec![0; MIB as usize], cluster * MIB).expect("zeroes");
    }
    discard(&file, 8 * MIB, 6 * MIB);
    file.sync_all().expect("a sync");
    Run::ploopfs().arg("compact").arg(mount.images().join("vm1")).ok();
    let all_is_there = |mount: &Mount| {
        let (disk, snapshot) = (mount.open("vm1"), File::open(mount.point().join(".snapshots/vm1/one.img")));
        let snapshot = snapshot.expect("the snapshot");
        for cluster in 0..16 {
            let of_disk = match cluster {
                0..4 | 8..14 => 0,
                4..8 => 9,
                _ => 8,
            };
            assert_eq!(read_at(&disk, cluster * MIB, 4096).expect("a read"), [of_disk; 4096], "{cluster}");
            let kept = if cluster < 8 { 9 } else { 0 };
            assert_eq!(read_at(&snapshot, cluster * MIB, 4096).expect("a read"), [kept; 4096], "{cluster}");
        }
    };
    all_is_there(&mount);
    drop(file);
    mount.umount();
    Run::ploopfs().arg("compact").arg(mount.images().join("vm1")).ok();
    let check = json(&Run::ploopfs().args(["check", "--json"]).arg(mount.images().join("vm1")).ok());
    assert_eq!((check["errors"].as_u64(), check["leaks"].as_u64()), (Some(0), Some(0)), "{check}");
    mount.start();
    all_is_there(&mount);
}

#[test]
fn ctrl_c_ends_it_and_what_was_done_stays() {
    require!("fuse", "qemu");
    let mut mount = with_holes();
    let file = mount.delta("vm1");
    let mut child = Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(["compact", "--rate", "2M"])
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    // It is at work as soon as the file is marked.
    let begun = || {
        let mut mark = [0; 4];
        File::open(&file).and_then(|file| file.read_exact_at(&mut mark, 44)).is_ok() && mark != [0; 4]
    };
    assert!(until(Duration::from_secs(20), begun), "it never began");
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our own child");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(1), "{status:?}");
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
    mount.start();
    same_as_before(&mount.open("vm1"));
    mount.umount();
    Run::ploopfs().arg("compact").arg(&file).ok();
    assert_eq!(len(&file), 17 * MIB, "the next one goes on");
}

/// Begins to compact `file`, and kills that after `wait` milliseconds.
#[track_caller]
fn kill_compact(options: &[&str], file: &Path, wait: u64) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .arg("compact")
        .args(options)
        .arg(file)
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    std::thread::sleep(Duration::from_millis(wait));
    child.kill().expect("our own child");
    child.wait().expect("it ends");
}

#[test]
fn a_kill_in_the_middle_loses_nothing() {
    require!("fuse", "qemu");
    let mut mount = with_holes();
    let file = mount.delta("vm1");
    for wait in [100, 400, 900] {
        kill_compact(&["--rate", "8M"], &file, wait);
        mount.start();
        same_as_before(&mount.open("vm1"));
        mount.umount();
    }
    Run::ploopfs().arg("compact").arg(&file).ok();
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
    assert_eq!(len(&file), 17 * MIB);
}

/// Clusters of the disk that [`scatter`] writes; several rounds of 64 MiB move.
const SCATTERED: u64 = 200;

fn is_written(cluster: u64) -> bool {
    !cluster.is_multiple_of(7)
}

/// First writes far from the order of the disk, with gaps on it and in the file.
fn scatter(file: &File) {
    for cluster in (0..SCATTERED).map(|n| n * 73 % SCATTERED) {
        file.write_all_at(&block(cluster), cluster * MIB + 8192).expect("a write");
    }
    file.sync_all().expect("a sync");
    (0..SCATTERED).filter(|n| !is_written(*n)).for_each(|n| discard(file, n * MIB, MIB));
    file.sync_all().expect("a sync");
}

#[track_caller]
fn is_scattered(file: &File) {
    for cluster in 0..SCATTERED {
        let wanted = if is_written(cluster) { block(cluster) } else { vec![0; 4096] };
        assert_eq!(read_at(file, cluster * MIB + 8192, 4096).expect("a read"), wanted, "cluster {cluster}");
    }
}

fn pieces(delta: &Path) -> u64 {
    let info = json(&Run::ploopfs().args(["info", "--json"]).arg(delta).ok());
    info["levels"][0]["pieces"].as_u64().expect("a number")
}

#[test]
fn a_scattered_file_is_put_in_order_as_a_dry_run_says_and_a_second_time_nothing_moves() {
    require!("fuse", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=256M"]);
    scatter(&mount.open("vm1"));
    mount.umount();
    let (file, used) = (mount.delta("vm1"), (0..SCATTERED).filter(|n| is_written(*n)).count() as u64);
    let before = (fs::read(&file).expect("the file"), fs::metadata(&file).expect("stat").mtime_nsec());
    let said = json(&Run::ploopfs().args(["compact", "--defrag", "--dry-run", "--json"]).arg(&file).ok());
    let after = (fs::read(&file).expect("the file"), fs::metadata(&file).expect("stat").mtime_nsec());
    assert!(before == after, "a dry run changed the file");
    let gain = &said["defrag"];
    assert_eq!(gain["pieces"].as_u64(), Some(pieces(&file)), "as info counts them: {said}");
    assert!(gain["pieces"].as_u64().expect("a number") > used / 2, "{said}");
    assert_eq!((gain["pieces_after"].as_u64(), gain["spare"].as_u64()), (Some(1), Some(64 * MIB)), "{said}");
    let text_said = Run::ploopfs().args(["compact", "--defrag"]).arg(&file).ok();
    let (would, has) = text_said.split_once("what it has gained:").expect("before and after");
    assert!(would.contains(&format!("pieces:      {} -> 1\n", gain["pieces"])), "{text_said}");
    assert!(would.contains("free space:  64 MiB needed meanwhile\n"), "{text_said}");
    assert!(
        has.contains(&format!("moves:       {} clusters moved\n", said["moved_clusters"])),
        "{text_said}"
    );
    assert!(text_said.lines().all(|line| line.len() <= 80 || line.contains(text(&file))), "{text_said}");
    assert_eq!((pieces(&file), len(&file)), (1, (1 + used) * MIB));
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
    mount.start();
    is_scattered(&mount.open("vm1"));
    mount.umount();
    let again = json(&Run::ploopfs().args(["compact", "--defrag", "--json"]).arg(&file).ok());
    assert_eq!((again["moved_clusters"].as_u64(), again["defrag"]["pieces"].as_u64()), (Some(0), Some(1)));
}

#[test]
fn a_live_disk_is_put_in_order_under_load() {
    require!("fuse", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=256M"]);
    let file = mount.open("vm1");
    scatter(&file);
    let end = AtomicBool::new(false);
    let image = mount.flat("vm1");
    let rounds = std::thread::scope(|scope| {
        // One writer in clusters that move, and one that allocates and discards.
        let writer = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !end.load(Ordering::Relaxed) {
                rounds += 1;
                for cluster in (0..SCATTERED).filter(|n| is_written(*n)).step_by(9) {
                    file.write_all_at(&rounds.to_le_bytes(), cluster * MIB).expect("a write");
                    file.write_all_at(&[7; 512], (SCATTERED + cluster % 40) * MIB).expect("a write");
                    assert_eq!(read_at(&file, cluster * MIB, 8).expect("a read"), rounds.to_le_bytes());
                }
                discard(&file, SCATTERED * MIB, 40 * MIB);
            }
            rounds
        });
        let said = json(&Run::ploopfs().args(["compact", "--defrag", "--json"]).arg(&image).ok());
        let gain = |field: &str| said["defrag"][field].as_u64().expect("a number");
        assert!(gain("pieces_after") * 2 < gain("pieces"), "{said}");
        end.store(true, Ordering::Relaxed);
        writer.join().expect("the writer")
    });
    is_scattered(&file);
    for cluster in (0..SCATTERED).filter(|n| is_written(*n)).step_by(9) {
        assert_eq!(read_at(&file, cluster * MIB, 8).expect("a read"), rounds.to_le_bytes());
    }
    let said = json(&Run::ploopfs().args(["compact", "--defrag", "--json"]).arg(&image).ok());
    assert_eq!(said["defrag"]["pieces_after"].as_u64(), Some(1), "{said}");
    is_scattered(&file);
    drop(file);
    mount.umount();
    assert_eq!(pieces(&mount.delta("vm1")), 1);
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&mount.delta("vm1"))]);
    mount.start();
    is_scattered(&mount.open("vm1"));
}

#[test]
fn a_kill_while_clusters_are_put_in_order_loses_nothing() {
    require!("fuse", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=256M"]);
    scatter(&mount.open("vm1"));
    mount.umount();
    let file = mount.delta("vm1");
    for wait in [100, 300, 700] {
        kill_compact(&["--defrag", "--rate", "100M"], &file, wait);
        mount.start();
        is_scattered(&mount.open("vm1"));
        mount.umount();
    }
    Run::ploopfs().args(["compact", "--defrag"]).arg(&file).ok();
    ok("qemu-img", &["check", "-q", "-f", "parallels", text(&file)]);
    assert_eq!(pieces(&file), 1);
}

#[test]
fn what_cannot_be_compacted_is_an_error_and_stays_untouched() {
    let folder = temp_dir();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("plain.raw"), vec![1; MIB as usize]).expect("a raw image");
    fs::write(path("empty.hds"), "").expect("a file");
    fs::write(path("short.hds"), "WithouFreSpacExt").expect("a file");
    fs::create_dir(path("folder")).expect("a folder");
    for name in ["plain.raw", "empty.hds", "short.hds", "folder", "missing"] {
        for more in [&[][..], &["--dry-run"], &["--defrag"], &["--defrag", "--dry-run"]] {
            let done = Run::ploopfs().arg("compact").args(more).arg(path(name)).run();
            assert!(!done.success() && !done.stderr.is_empty(), "{name}: {done}");
            assert!(!done.stderr.contains("panicked"), "{name}: {done}");
        }
    }
    assert_eq!(fs::read(path("plain.raw")).expect("there"), vec![1; MIB as usize]);
    assert_eq!(len(&path("empty.hds")), 0);
    let done = Run::ploopfs().args(["compact", "--no-such-option", "x"]).run();
    assert_eq!(done.code(), Some(2), "{done}");
    let help = Run::ploopfs().args(["compact", "--help"]).ok();
    assert!(help.contains("--dry-run") && help.contains("snapshots stay as they are"), "{help}");
}
