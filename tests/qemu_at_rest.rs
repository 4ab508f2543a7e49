//! Files at rest against independent programs: what qemu-img writes is read and judged alike, what we create passes
//! qemu-img and Debian's ploop tool.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ploopfs::format::header::{Header, Version};
use serde_json::Value;
use tempfile::TempDir;

/// Clusters of 63 sectors: QEMU 10.0.2 rounds by a macro for powers of two, writes a first block that is no multiple
/// of the cluster, and then calls its own image damaged. It reads and writes the data all the same, and so must we.
const ODD: u64 = 63 * 512;
const CLUSTERS: [u64; 6] = [32 << 10, ODD, 64 << 10, 504 * 512, 1 << 20, 4 << 20];

fn folder() -> TempDir {
    TempDir::with_prefix("ploopfs-qemu-").expect("a temporary folder")
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().expect("the program starts")
}

fn ok(program: &str, args: &[&str]) -> Vec<u8> {
    let output = run(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// Our check: status and report.
fn our_check(path: &Path) -> (i32, Value) {
    let output = run(env!("CARGO_BIN_EXE_ploopfs"), &["check", "--json", text(path)]);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    (output.status.code().expect("not killed"), report)
}

/// QEMU's check: corruptions and leaks.
fn qemu_check(path: &Path) -> (u64, u64) {
    let output = run("qemu-img", &["check", "-f", "parallels", "--output=json", text(path)]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    let number = |field: &str| report[field].as_u64().unwrap_or(0);
    (number("corruptions"), number("leaks"))
}

fn qemu_create(path: &Path, size: u64, cluster: u64) {
    let options = format!("cluster_size={cluster}");
    ok("qemu-img", &["create", "-q", "-f", "parallels", "-o", &options, text(path), &size.to_string()]);
}

fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "parallels"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(path));
    ok("qemu-io", &args);
}

#[test]
fn images_that_qemu_wrote_are_read_and_found_good_at_every_cluster_size() {
    require!("qemu");
    let folder = folder();
    for cluster in CLUSTERS {
        // Not a multiple of any cluster: the last one is partial.
        for size in [64 << 20, 100_000_256] {
            let path = folder.path().join(format!("q{cluster}-{size}.hds"));
            qemu_create(&path, size, cluster);
            let last = format!("write -P 7 {} 512", size / 512 * 512 - 512);
            qemu_io(&path, &["write -P 5 1M 1M", "write -P 6 17M 64K", &last]);
            let (status, report) = our_check(&path);
            assert_eq!((status, &report["errors"]), (0, &0.into()), "{report}");
            if cluster != ODD {
                assert_eq!((&report["leaks"], qemu_check(&path)), (&0.into(), (0, 0)), "{report}");
                assert_eq!(report["notes"], Value::Array(Vec::new()), "{report}");
            }

            let info = ok(env!("CARGO_BIN_EXE_ploopfs"), &["info", "--json", text(&path)]);
            let ours: Value = serde_json::from_slice(&info).expect("valid JSON");
            let info = ok("qemu-img", &["info", "-f", "parallels", "--output=json", text(&path)]);
            let theirs: Value = serde_json::from_slice(&info).expect("valid JSON");
            assert_eq!(ours["size"], theirs["virtual-size"]);
            assert_eq!(ours["levels"][0]["cluster"], cluster);
        }
    }
}

#[test]
fn v1_images_that_qemu_wrote_are_found_good_with_any_first_block() {
    require!("qemu");
    let folder = folder();
    for cluster in CLUSTERS {
        let exact = Header::new(Version::V1, 64 << 20, cluster).expect("legal");
        let late = exact.first_block + exact.cluster_sectors;
        // Right behind the BAT on no multiple of the cluster, as old Parallels wrote it; 0 stands for the same.
        let tight = (64 + 4 * exact.entries).div_ceil(512);
        for first_block in [exact.first_block, late, tight, 0] {
            let path = folder.path().join(format!("v1-{cluster}-{first_block}.hds"));
            let header = Header { first_block, ..exact };
            // Guest cluster 0 is in use: given an empty v1 file with an uneven first block, QEMU 10.0.2 begins on one grid,
            // goes on with another, and overwrites its own data.
            let geometry = header.geometry();
            let mut bytes = header.encode().to_vec();
            bytes.extend(geometry.entry(geometry.first).expect("fits").to_le_bytes());
            bytes.resize((geometry.first + cluster) as usize, 0);
            fs::write(&path, bytes).expect("write");
            qemu_io(&path, &["read -P 0 0 64M", "write -P 5 1M 1M", "write -P 6 17M 64K"]);
            let (status, report) = our_check(&path);
            assert_eq!(
                (status, &report["errors"], qemu_check(&path)),
                (0, &0.into(), (0, 0)),
                "{header:?} {report}"
            );
            assert_eq!(
                (&report["leaks"], &report["notes"]),
                (&0.into(), &Value::Array(Vec::new())),
                "{report}"
            );
        }
    }
}

#[test]
fn an_image_that_qemu_left_open_is_in_use_and_leaks_exactly_what_qemu_says() {
    require!("qemu");
    let folder = folder();
    for cluster in CLUSTERS {
        let path = folder.path().join(format!("q{cluster}.hds"));
        qemu_create(&path, 64 << 20, cluster);
        let commands =
            ["-f", "parallels", "-c", "write -P 5 0 1M", "-c", "write 9M 64K", "-c", "abort", text(&path)];
        assert!(!run("qemu-io", &commands).status.success(), "abort kills it");
        let (corruptions, leaks) = qemu_check(&path);
        let (status, report) = our_check(&path);
        assert_eq!((status, &report["errors"], &report["in_use"]), (0, &0.into(), &true.into()), "{report}");
        if cluster != ODD {
            // QEMU counts the mark itself as a corruption.
            assert_eq!(corruptions, 1);
            assert_eq!((&report["leaks"], leaks > 0), (&leaks.into(), true), "{report}");
        }
    }
}

#[test]
fn damage_that_qemu_finds_is_found() {
    require!("qemu");
    let folder = folder();
    let path = folder.path().join("q.hds");
    let fresh = || {
        let _ = fs::remove_file(&path);
        qemu_create(&path, 8 << 20, 1 << 20);
        qemu_io(&path, &["write -P 5 0 1M", "write -P 6 3M 1M"]);
        fs::OpenOptions::new().write(true).open(&path).expect("open")
    };
    // parallels-checks: duplicate entry (the second cluster is leaked by it, and lies in the tail).
    let file = fresh();
    file.write_all_at(&1u32.to_le_bytes(), 64 + 4 * 3).expect("write");
    let (status, report) = our_check(&path);
    assert_eq!((status, &report["errors"], &report["leaks"]), (3, &1.into(), &1.into()), "{report}");
    let theirs = run("qemu-img", &["check", "-f", "parallels", text(&path)]);
    // Without -r it then fails with EBUSY.
    assert!(
        String::from_utf8_lossy(&theirs.stderr).contains("duplicate offset in BAT entry 3"),
        "{theirs:?}"
    );
    // parallels-checks: cluster out of image. QEMU 10.0.2 aborts here without -r.
    let file = fresh();
    file.write_all_at(&99u32.to_le_bytes(), 64 + 4 * 3).expect("write");
    let (status, report) = our_check(&path);
    assert_eq!((status, &report["findings"][0]["problem"]), (3, &"past-end".into()), "{report}");
    // A file cut inside its last cluster: QEMU calls it outside the image as well.
    let file = fresh();
    file.set_len((3 << 20) - 512).expect("cut");
    let (status, report) = our_check(&path);
    assert_eq!((status, &report["findings"][0]["problem"]), (3, &"cut".into()), "{report}");
    // parallels-checks: leak at the end of the file.
    let file = fresh();
    file.set_len(5 << 20).expect("extend");
    let (status, report) = our_check(&path);
    assert_eq!((status, &report["leaks"], qemu_check(&path)), (0, &2.into(), (0, 2)), "{report}");
    // parallels-checks: wrong data_off.
    let file = fresh();
    file.write_all_at(&0x1000_0000u32.to_le_bytes(), 48).expect("write");
    let (status, report) = our_check(&path);
    assert_eq!((status, &report["findings"][0]["problem"]), (3, &"header".into()), "{report}");
}

/// A file made by our `create`, in the memory file system where there is one: the ploop tool calls a sparse or
/// unwritten file on ext4 damaged.
fn created(folder: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = folder.join(name);
    let mut args = vec!["create", text(&path)];
    args.extend(options);
    ok(env!("CARGO_BIN_EXE_ploopfs"), &args);
    path
}

#[test]
fn what_we_create_passes_qemu_img_and_the_ploop_tool() {
    require!("qemu", "ploop");
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { TempDir::with_prefix_in("ploopfs-", memory) } else { TempDir::new() };
    let folder = folder.expect("a temporary folder");
    for (size, cluster) in
        [("64M", "32K"), ("1G", "32K"), ("64M", "64K"), ("10G", "1M"), ("3T", "1M"), ("1G", "64M")]
    {
        for full in [false, true] {
            let mut options = vec!["--size", size, "--cluster", cluster];
            if full {
                options.push("--preallocate");
            }
            // Preallocation takes memory here.
            if full && size != "64M" {
                continue;
            }
            let path = created(folder.path(), &format!("c{cluster}-{size}-{full}.hds"), &options);
            assert_eq!(qemu_check(&path), (0, 0), "{size} {cluster} {full}");
            let before = fs::read(&path).expect("read");
            let checked = run("ploop", &["check", "-f", "-c", text(&path)]);
            assert!(checked.status.success(), "{size} {cluster} {full}: {checked:?}");
            assert!(fs::read(&path).expect("read") == before, "the ploop tool found something to repair");
            let (status, report) = our_check(&path);
            assert_eq!((status, &report["errors"], &report["leaks"]), (0, &0.into(), &0.into()));
        }
    }
}

#[test]
fn qemu_reads_and_writes_what_we_create_and_it_stays_good() {
    require!("qemu");
    let folder = folder();
    for options in
        [&["--size", "64M"][..], &["--size", "64M", "--cluster", "32K"], &["--size", "64M", "--preallocate"]]
    {
        let path = created(folder.path(), "c.hds", options);
        qemu_io(&path, &["read -P 0 0 64M", "write -P 5 3M 1M", "read -P 5 3M 1M", "read -P 0 4M 60M"]);
        assert_eq!(qemu_check(&path), (0, 0));
        let (status, report) = our_check(&path);
        assert_eq!((status, &report["errors"], &report["leaks"]), (0, &0.into(), &0.into()), "{options:?}");
        fs::remove_file(&path).expect("remove");
    }
    let path = created(folder.path(), "r.raw", &["--size", "10M"]);
    ok("qemu-io", &["-f", "raw", "-c", "read -P 0 0 10M", text(&path)]);
}

/// Ends the process whatever happens.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_has_open_is_status_4_and_names_who() {
    require!("qemu");
    let folder = folder();
    let path = folder.path().join("q.hds");
    qemu_create(&path, 64 << 20, 1 << 20);
    // Waits for commands, with the image open, as long as its stdin is.
    let start = || {
        let mut qemu = Command::new("qemu-io");
        qemu.args(["-f", "parallels", text(&path)]).stdin(Stdio::piped());
        Killed(qemu.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("qemu-io starts"))
    };
    let mut qemu = start();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let output = run(env!("CARGO_BIN_EXE_ploopfs"), &["check", text(&path)]);
        if output.status.code() == Some(4) {
            let line = String::from_utf8_lossy(&output.stderr);
            assert!(line.contains("q.hds") && line.contains(&qemu.0.id().to_string()), "{line}");
            break;
        }
        assert!(Instant::now() < deadline, "never in use: {output:?}");
        // Our check may have held the lock at the very moment when QEMU asked for its own.
        if qemu.0.try_wait().expect("a child").is_some() {
            qemu = start();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Facts are shown all the same.
    ok(env!("CARGO_BIN_EXE_ploopfs"), &["info", text(&path)]);
}
