//! What must hold between a daemon and its successor: the rules of docs/restart.md that no single process can keep, each
//! found when it is broken; a failed sync that only dead daemons heard; requests that end the daemon which serves them;
//! requests that wait; programs that are gone.
#![cfg(all(feature = "faults", feature = "break-rules"))]

mod common;
#[path = "common/sick.rs"]
mod sick;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::daemons::{daemons, kill, succeeded};
use common::{Mount, Run, long, make_v1, marked_in_use, signal, text, until};
use sick::{BAD, SLOW, SickHost};

/// No entry reaches the disk by itself. A loaded machine may take long for a start.
const ARGS: [&str; 3] = ["--bat-delay=600000", "--restart-timeout=60", "--transport=fuse"];
/// For all that is awaited.
const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
fn mount(images: Option<&Path>, args: &[&str], broken: Option<&str>) -> Mount {
    let own = common::temp_dir();
    let images = images.map_or_else(|| own.path().join("images"), Path::to_owned);
    let mut mount = Mount::prepare(&images, &[args, &ARGS].concat());
    if let Some(rule) = broken {
        mount.set_env("PLOOPFS_BREAK", rule);
    }
    mount.owns(own);
    mount.start();
    mount
}

fn block(fill: u64) -> Vec<u8> {
    (0..4096u32).map(|byte| (u64::from(byte) + 31 * fill + 1) as u8).collect()
}

fn read(disk: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, at).map(|()| found)
}

/// Runs `test` with nothing broken, then with the rule, which must show.
#[track_caller]
fn found(rule: &str, test: impl Fn(Option<&str>) -> Result<(), String>) -> String {
    if let Err(what) = test(None) {
        panic!("nothing is broken, and yet: {what}");
    }
    let what = test(Some(rule)).expect_err("it is broken, and nothing shows it");
    println!("{rule} broken: {what}");
    what
}

#[test]
fn l3_a_handle_that_no_successor_knows_is_caught() {
    require!("fuse");
    let what = found("L3", |broken| {
        let mount = mount(None, &["--create", "vm1=64M"], broken);
        let disk = mount.open("vm1");
        disk.write_all_at(&block(1), 0).expect("written");
        kill(&mount, PATIENCE);
        let found = read(&disk, 0).map_err(|e| format!("an open file is lost: {e}"))?;
        if found == block(1) { Ok(()) } else { Err("other data".to_owned()) }
    });
    assert!(what.contains("an open file is lost"), "{what}");
}

#[test]
fn l4_a_number_that_no_successor_knows_is_caught() {
    require!("fuse");
    found("L4", |broken| {
        let mount = mount(None, &["--create", "m=16M"], broken);
        // They sort before and behind it: a scan would number them in another order.
        for name in ["a", "z"] {
            Run::ploopfs().arg("create").arg(mount.delta(name)).args(["--size", "16M"]).ok();
        }
        assert!(until(PATIENCE, || mount.flat("a").exists() && mount.flat("z").exists()));
        let open = ["a", "m", "z"].map(|name| mount.open(name));
        for (fill, disk) in (1..).zip(&open) {
            disk.write_all_at(&block(fill), 0).expect("written");
        }
        kill(&mount, PATIENCE);
        for (fill, disk) in (1..).zip(&open) {
            match read(disk, 0) {
                Ok(found) if found == block(fill) => {}
                Ok(_) => return Err(format!("open file {fill} is another one")),
                Err(e) => return Err(format!("open file {fill} is lost: {e}")),
            }
        }
        Ok(())
    });
}

#[test]
fn l6_a_successor_beside_a_daemon_that_still_writes_is_caught() {
    require!("fuse", "loop", "ext4");
    let what = found("L6", |broken| {
        let host = SickHost::new(256 << 20);
        let mount = mount(Some(&host.path()), &["--create", "vm1=64M"], broken);
        let disk = mount.open("vm1");
        let mut slow = block(1);
        slow[..SLOW.len()].copy_from_slice(SLOW);
        disk.write_all_at(&slow, 0).expect("written");
        let before = daemons(&mount);
        std::thread::scope(|scope| {
            let sync = scope.spawn(|| disk.sync_all());
            assert!(until(PATIENCE, || host.holds()), "the sync reaches the disk");
            signal(before[0], rustix::process::Signal::KILL);
            // No program can end it before its disk answers.
            let other = || daemons(&mount).iter().any(|pid| !before.contains(pid));
            let early = until(Duration::from_secs(1), other);
            host.go_on();
            assert!(until(PATIENCE, other), "no successor");
            let synced = sync.join().expect("no panic");
            if early {
                return Err("two daemons of one mount at once".to_owned());
            }
            synced.map_err(|e| format!("the sync failed: {e}"))
        })
    });
    assert!(what.contains("at once"), "{what}");
}

#[test]
fn l7_requests_that_are_sent_again_while_others_are_executed_are_caught() {
    require!("fuse");
    let what = found("L7", |broken| {
        let mount = mount(None, &["--create", "vm1=64M", "--fault=delay=write:500"], broken);
        let disk = mount.open("vm1");
        let before = daemons(&mount)[0];
        // What comes now is read by its successor first.
        signal(before, rustix::process::Signal::STOP);
        std::thread::scope(|scope| {
            let writes = [1, 2, 3].map(|at: u64| {
                let disk = &disk;
                scope.spawn(move || disk.write_all_at(&block(at), at << 20))
            });
            signal(before, rustix::process::Signal::KILL);
            succeeded(&mount, before, PATIENCE);
            writes.into_iter().try_for_each(|write| write.join().expect("no panic"))
        })
        .map_err(|e| format!("a write failed: {e}"))?;
        disk.sync_all().expect("synced");
        let writes = mount.stats()["images"]["vm1"]["writes"].as_u64();
        if writes == Some(3) { Ok(()) } else { Err(format!("3 writes were executed {writes:?} times")) }
    });
    assert!(what.contains("were executed") || what.contains("failed"), "{what}");
}

/// The next sync of the daemon is the last thing that it does, and so with as many successors as there are more names.
fn deaths_at_syncs(images: &Path, count: usize) -> (String, Vec<std::path::PathBuf>) {
    let paths: Vec<_> = (0..count).map(|n| images.join(format!(".death{n}"))).collect();
    let items: Vec<_> = paths.iter().map(|path| format!("dies=SIGKILL:sync:{}", text(path))).collect();
    (format!("--fault={}", items.join(",")), paths)
}

/// A sync fails, and so many daemons die of having heard it; then the image is synced again.
fn heard_by_the_dead_alone(deaths: usize, broken: Option<&str>) -> Result<(), String> {
    let host = SickHost::new(256 << 20);
    let images = host.path();
    let (fault, paths) = deaths_at_syncs(&images, deaths);
    let mount = mount(Some(&images), &["--create", "vm1=64M", &fault], broken);
    let disk = mount.open("vm1");
    // Space and entries are there: what fails is data alone.
    disk.write_all_at(&[block(1), block(2)].concat(), 0).expect("written");
    disk.sync_all().expect("synced");
    let mut bad = block(3);
    bad[..BAD.len()].copy_from_slice(BAD);
    disk.write_all_at(&bad, 0).expect("written to the host's cache");
    // Its entry is in the ledger alone.
    disk.write_all_at(&block(4), 5 << 20).expect("written");
    for path in &paths {
        std::fs::write(path, "").expect("the folder");
    }
    let before = daemons(&mount)[0];
    let synced = disk.sync_all();
    succeeded(&mount, before, PATIENCE);
    assert!(paths.iter().all(|path| !path.exists()), "so many have died");
    host.heal();
    for (at, wanted) in [(0, &bad), (4096, &block(2)), (5 << 20, &block(4))] {
        let found = read(&disk, at).map_err(|e| format!("cannot be read: {e}"))?;
        if found != *wanted {
            return Err(format!("byte {at} holds {:?}", &found[..16]));
        }
    }
    let again = disk.sync_all();
    for (what, synced) in [("the sync that was sent again", synced), ("the next sync", again)] {
        if synced.as_ref().err().and_then(io::Error::raw_os_error) != Some(libc::EIO) {
            return Err(format!("{what} says {synced:?}"));
        }
    }
    if mount.mode("vm1") != "read-only" {
        return Err(format!("the image is {}", mount.mode("vm1")));
    }
    disk.write_all_at(&block(5), 0).map_or(Ok(()), |()| Err("it is written".to_owned()))
}

#[test]
fn a_failed_sync_that_only_the_dead_daemon_heard_makes_the_image_read_only() {
    require!("fuse", "loop", "ext4");
    let what = found("L5", |broken| heard_by_the_dead_alone(1, broken));
    assert!(what.contains("says Ok"), "{what}");
}

#[test]
fn a_failed_sync_that_a_successor_heard_and_died_of_makes_the_image_read_only() {
    require!("fuse", "loop", "ext4");
    heard_by_the_dead_alone(2, None).unwrap_or_else(|what| panic!("{what}"));
}

/// What ends a daemon that reads or writes it.
const DEADLY: &str = "deadly";

fn deadly(fill: u64) -> Vec<u8> {
    let mut data = block(fill);
    data[..DEADLY.len()].copy_from_slice(DEADLY.as_bytes());
    data
}

/// Reads and writes while `meanwhile` runs; each must work.
fn innocent(disk: &File, meanwhile: impl FnOnce()) -> usize {
    let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (over, rounds) = (&over, &rounds);
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::Relaxed) {
                    let at = (16 + 4 * thread + round % 4) << 20;
                    disk.write_all_at(&block(thread + round), at).expect("an innocent write");
                    let found = read(disk, at).expect("an innocent read");
                    assert!(found == block(thread + round), "thread {thread}, round {round}");
                    round += 1;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&over);
        meanwhile();
    });
    rounds.into_inner()
}

#[test]
fn a_request_that_ends_the_daemon_gets_eio_and_those_beside_it_go_on() {
    require!("fuse");
    for name in ["SIGSEGV", "SIGABRT"] {
        let fault = format!("--fault=ends={name}:{DEADLY}");
        let mut mount = mount(None, &["--create", "vm1=64M", &fault], None);
        let disk = mount.open("vm1");
        // One in place, on a transport thread; one that allocates, on a runner.
        disk.write_all_at(&block(1), 0).expect("written");
        let rounds = innocent(&disk, || {
            for at in [0, 8 << 20] {
                let before = daemons(&mount)[0];
                let error = disk.write_all_at(&deadly(9), at).expect_err("it ends all that serve it");
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name} at {at}");
                succeeded(&mount, before, PATIENCE);
                disk.write_all_at(&block(2), at).expect("its place is as before");
            }
        });
        println!("ROUNDS {rounds}");
        disk.sync_all().expect("synced");
        assert_eq!(read(&disk, 8 << 20).expect("read"), block(2));
        drop(disk);
        mount.umount();
        assert!(!marked_in_use(&mount.delta("vm1")));
        Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
    }
}

#[test]
fn an_image_whose_opening_ends_the_daemon_stays_closed_and_the_others_go_on() {
    require!("fuse");
    let folder = common::temp_dir();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("a folder");
    make_v1(&images.join("bad.hds"), 64 << 20, 1 << 20, false);
    let mount = mount(Some(&images), &["--create", "vm1=64M", "--fault=ends=SIGABRT:WithoutFreeSpace"], None);
    let disk = mount.open("vm1");
    innocent(&disk, || {
        let error = File::open(mount.flat("bad")).expect_err("it ends all that open it");
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let pid = daemons(&mount);
        for _ in 0..3 {
            let error = File::open(mount.flat("bad")).expect_err("it stays closed");
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
        assert_eq!(daemons(&mount), pid, "it was not tried again");
    });
    // Nor by a successor that does not know it yet.
    kill(&mount, PATIENCE);
    let pid = daemons(&mount);
    File::open(mount.flat("bad")).expect_err("it stays closed");
    assert_eq!(daemons(&mount), pid);
}

#[test]
fn writes_that_wait_for_space_wait_on_after_the_daemon_was_killed() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, full) = (folder.path().join("images"), folder.path().join("full"));
    let fault = format!("--fault=full,trigger={}", text(&full));
    let args = ["--create", "vm1=64M", "--full-timeout=0", &fault];
    let mut mount = mount(Some(&images), &args, None);
    let disk = mount.open("vm1");
    disk.write_all_at(&block(1), 0).expect("written");
    std::fs::write(&full, "").expect("the folder");
    let parked = || mount.mode("vm1") == "full-queue";
    std::thread::scope(|scope| {
        let writes = [1, 2, 3].map(|at: u64| {
            (
                at,
                scope.spawn({
                    let disk = &disk;
                    move || disk.write_all_at(&block(at), at << 20)
                }),
            )
        });
        // A program that is killed meanwhile must not stay for ever, nor its file.
        let mut program = std::process::Command::new("dd")
            .args(["if=/dev/zero", "bs=4k", "count=1", "seek=4096", "oflag=direct", "conv=notrunc"])
            .arg(format!("of={}", text(&mount.flat("vm1"))))
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("dd");
        assert!(until(PATIENCE, parked), "they wait: {}", mount.mode("vm1"));
        for round in 0..2 {
            kill(&mount, PATIENCE);
            assert!(until(PATIENCE, parked), "they wait again: {}", mount.mode("vm1"));
            if round == 0 {
                program.kill().expect("our own child");
            }
        }
        assert!(writes.iter().all(|(_, write)| !write.is_finished()), "none was answered");
        std::fs::remove_file(&full).expect("there is space");
        for (at, write) in writes {
            write.join().expect("no panic").unwrap_or_else(|e| panic!("write {at}: {e}"));
            assert_eq!(read(&disk, at << 20).expect("read"), block(at));
        }
        assert!(until(PATIENCE, || program.try_wait().expect("our own child").is_some()), "it hangs");
    });
    drop(disk);
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"), "a handle is left over");
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

#[test]
fn files_that_are_opened_and_closed_under_kills_leave_no_handle() {
    require!("fuse");
    let mut mount = mount(None, &["--create", "vm1=64M"], None);
    let (over, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    let inode = mount.flat("vm1").metadata().expect("there").ino();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (mount, over, opened) = (&mount, &over, &opened);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let disk = mount.open("vm1");
                    disk.write_all_at(&block(thread), thread << 20).expect("written");
                    assert_eq!(disk.metadata().expect("its own").ino(), inode);
                    // RELEASE is sent behind the close, which waits for nothing.
                    drop(disk);
                    opened.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&over);
        for round in 0..if long() { 1000 } else { 8 } {
            // Of one that has served for a second the next comes at once.
            if round > 0 {
                std::thread::sleep(Duration::from_millis(1100));
            }
            kill(&mount, PATIENCE);
        }
    });
    println!("OPENED {opened:?}");
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"), "a handle is left over");
    assert!(!marked_in_use(&mount.delta("vm1")));
    let disk = mount.open("vm1");
    (0..4).for_each(|thread| assert_eq!(read(&disk, thread << 20).expect("read"), block(thread)));
    drop(disk);
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}
