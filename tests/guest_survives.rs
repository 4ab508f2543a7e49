//! A real file system on loop, written all the time, and the ways a daemon ends: SIGKILL, SIGTERM twice, and umount
//! under it. What the guest synced is there afterwards, and its journal replays.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Guest, Loop, Mount, Rng, Run, heavy, long, marked_in_use, ok, text, until};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const SOON: Duration = Duration::from_secs(60);

fn rounds() -> u64 {
    if long() { 20 } else { 3 }
}

fn pid(mount: &Mount) -> Pid {
    i32::try_from(mount.pid()).ok().and_then(Pid::from_raw).expect("a process id")
}

/// A file of the guest: which one it is can be told from its content.
fn content(number: u64) -> Vec<u8> {
    Rng::new(number).bytes(300_000)
}

/// Writes files until told or until one fails: each is synced, with its folder, before `synced` counts it; between them
/// lies data that nobody syncs.
fn write_files(guest: &Path, stop: &AtomicBool, synced: &AtomicU64) {
    let folder = File::open(guest).expect("the guest's root");
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let write = || -> std::io::Result<()> {
            fs::write(guest.join(format!("loose{}", number % 4)), content(number + 1_000_000))?;
            let mut file = File::create(guest.join(format!("synced{}", number % 16)))?;
            file.write_all(&number.to_le_bytes())?;
            file.write_all(&content(number))?;
            file.sync_all()?;
            folder.sync_all()
        };
        if write().is_err() {
            return;
        }
        synced.store(number + 1, Ordering::SeqCst);
    }
}

/// The guest on a daemon that `end` ends, or lets go on; then the same image served anew.
fn survives(end: impl Fn(&mut Mount)) {
    let _turn = heavy();
    for round in 0..rounds() {
        let mut mount = Mount::new(&["--create", "vm1=256M"]);
        let daemon = pid(&mount);
        let device = Loop::attach(&mount.flat("vm1"), true);
        ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
        let guest = Guest::mount(device.device(), "noatime");
        let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
        let before = std::thread::scope(|scope| {
            let load = scope.spawn(|| write_files(guest.path(), &stop, &synced));
            let goal = 5 + 3 * (round % 7);
            let reached = until(SOON, || synced.load(Ordering::SeqCst) >= goal);
            assert!(reached, "the guest stands still");
            end(&mut mount);
            let before = synced.load(Ordering::SeqCst);
            stop.store(true, Ordering::SeqCst);
            load.join().expect("the guest's writer panicked");
            before
        });
        drop(guest);
        drop(device);
        // It ends with its last user, and only then is the folder free for the next.
        assert!(until(SOON, || test_kill_process(daemon).is_err()), "the daemon has no users, and goes on");
        assert!(!mount.is_mounted());
        Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
        mount.start();
        let device = Loop::attach(&mount.flat("vm1"), true);
        // 1: the journal was replayed, and all is well.
        let fsck = Run::new("e2fsck").args(["-f", "-p"]).arg(device.device()).limit(60).run();
        assert!(matches!(fsck.code(), Some(0 | 1)), "round {round}: {fsck}");
        let guest = Guest::mount(device.device(), "noatime");
        assert!(before > 0);
        // Files are written over after 16 others; how many the guest began behind `before` is known.
        let begun = synced.load(Ordering::SeqCst) + 1;
        for number in begun.saturating_sub(16)..before {
            let found = fs::read(guest.path().join(format!("synced{}", number % 16))).expect("a synced file");
            let whole = |n: u64| found.len() > 8 && found[8..] == content(n) && found[..8] == n.to_le_bytes();
            assert!(whole(number), "round {round}: file {number} is not what was synced");
        }
        guest.umount();
        device.detach();
        mount.umount();
    }
}

#[test]
fn a_guest_survives_sigkill_of_the_daemon_under_load() {
    require!("fuse", "loop");
    survives(|mount| mount.kill());
}

#[test]
fn a_guest_survives_two_sigterms_under_load() {
    require!("fuse", "loop");
    survives(|mount| {
        let pid = pid(mount);
        kill_process(pid, Signal::TERM).expect("our own daemon");
        std::thread::sleep(Duration::from_millis(50));
        kill_process(pid, Signal::TERM).expect("our own daemon");
        assert!(until(SOON, || test_kill_process(pid).is_err()), "two SIGTERMs did not end the daemon");
        assert!(!marked_in_use(&mount.delta("vm1")), "the second SIGTERM syncs and clears the marks");
        let _ = Run::ploopfs().arg("umount").arg(mount.point()).run();
    });
}

#[test]
fn a_guest_goes_on_after_umount_detach_under_load_until_it_ends_by_itself() {
    require!("fuse", "loop");
    survives(|mount| {
        Run::ploopfs().args(["umount", "--detach"]).arg(mount.point()).limit(60).status(0);
        assert!(!mount.is_mounted());
    });
}
