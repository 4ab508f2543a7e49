//! While a daemon is missed its keeper holds what is the mount's: no other program gets in between, and commands wait for
//! the successor. What a death and a restart leave behind: core files, counters, events.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal};
use serde_json::Value;

use common::daemons::{daemons, kill, processes, succeeded};
use common::{Mount, Run, signal, temp_dir, text, until};

/// A loaded machine may take long for a start. Rings have no restart.
const RESTARTS: [&str; 2] = ["--restart-timeout=60", "--transport=fuse"];
/// No entry reaches the disk by itself.
const LATE: &str = "--bat-delay=600000";
/// For all that is awaited.
const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
fn mount(args: &[&str]) -> Mount {
    Mount::new(&[args, &RESTARTS].concat())
}

/// A mount whose daemon was killed, and whose successor stands still at the very beginning of its start; its process id.
fn miss(mount: &Mount) -> u32 {
    let before = daemons(mount);
    before.iter().for_each(|pid| signal(*pid, Signal::KILL));
    let successor = || daemons(mount).into_iter().find(|pid| !before.contains(pid));
    assert!(until(PATIENCE, || successor().is_some()), "no successor");
    let successor = successor().expect("it was there");
    signal(successor, Signal::STOP);
    successor
}

/// Lets a stopped process go on, however the test ends.
struct Stopped(u32);

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// An image with a snapshot: `vm1` lies in a folder, and has a descriptor.
fn layered(mount: &Mount) -> PathBuf {
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.flat("vm1")).arg("before").ok();
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
    mount.images().join("vm1")
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_folder_and_a_descriptor_are_at_no_moment_free_when_the_daemon_is_killed() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let folder = layered(&mount);
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 0).expect("written");
    let (ends, tries) = (AtomicBool::new(false), AtomicU32::new(0));
    let (images, own) = (mount.images().to_owned(), mount.images().join(".ploopfs/lock"));
    let whole = [images, folder.join("DiskDescriptor.xml.lck")];
    let held = |path: &Path| {
        let file = File::open(path).expect("opens");
        let taken = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(taken, Err(Errno::WOULDBLOCK), "{} was free", path.display());
    };
    let ranges_held = || {
        let file = File::options().write(true).open(&own).expect("opens");
        let taken = rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
        assert!(matches!(taken, Err(Errno::AGAIN | Errno::ACCESS)), "{} was free", own.display());
    };
    std::thread::scope(|scope| {
        // Also where a kill finds no successor: the thread would go on for ever.
        let over = Over(&ends);
        let thief = scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                whole.iter().for_each(|path| held(path));
                ranges_held();
                tries.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            kill(&mount, PATIENCE);
        }
        drop(over);
        thief.join().expect("none was ever free");
    });
    println!("TRIES {tries:?}");
    drop(disk);
    assert!(until(PATIENCE, || mount.mode("vm1") == "closed"));
    let descriptor = File::open(&whole[1]).expect("opens");
    rustix::fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive)
        .expect("of a closed image it is free");
    drop(descriptor);
    mount.umount();
    let images = File::open(mount.images()).expect("opens");
    rustix::fs::flock(&images, FlockOperation::NonBlockingLockExclusive).expect("free behind the end");
    Run::ploopfs().arg("check").arg(folder).status(0);
}

#[test]
fn other_programs_are_refused_while_the_daemon_is_missed() {
    require!("fuse", "qemu");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 5 << 20).expect("written");
    let delta = mount.delta("vm1");
    let before = fs::read(&delta).expect("read");
    let successor = Stopped(miss(&mount));
    let elsewhere = temp_dir();
    let [point, copy] = ["point", "copy"].map(|name| elsewhere.path().join(name));
    // Should it get in, it ends with the test.
    let _second = Mount::adopt(mount.images(), &point);
    let second = || Run::ploopfs().arg("mount").args([mount.images(), &point]).limit(60).run();
    let other = |what: &str| Run::ploopfs().arg(what).arg(&delta).limit(60).run();
    std::thread::scope(|scope| {
        let all = [
            scope.spawn(second),
            scope.spawn(|| other("check")),
            scope.spawn(|| Run::ploopfs().args(["check", "--repair"]).arg(&delta).limit(60).run()),
            scope.spawn(|| Run::new("qemu-img").arg("convert").args([&delta, &copy]).limit(60).run()),
            scope.spawn(|| Run::new("qemu-img").args(["check", "-r", "all"]).arg(&delta).limit(60).run()),
        ];
        for done in all.map(|thread| thread.join().expect("it ended")) {
            println!("{done}");
            assert!(done.status.is_some(), "hung: {done}");
            assert!(!done.success(), "got in: {done}");
        }
    });
    assert!(fs::read(&delta).expect("read") == before, "the file was changed");
    let pid = successor.0;
    drop(successor);
    succeeded(&mount, 0, PATIENCE);
    assert_eq!(mount.pid(), pid);
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, 5 << 20).expect("read");
    assert!(found == [7; 4096]);
    drop(disk);
    mount.umount();
    Run::ploopfs().arg("check").arg(&delta).status(0);
}

#[test]
fn a_command_that_comes_while_the_daemon_is_missed_is_answered_by_the_successor() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 5 << 20).expect("written");
    let successor = Stopped(miss(&mount));
    std::thread::scope(|scope| {
        let list = scope.spawn(|| Run::ploopfs().args(["list", "--json"]).arg(mount.images()).limit(60).ok());
        // It has connected, or does so in a moment.
        std::thread::sleep(Duration::from_millis(300));
        assert!(!list.is_finished(), "without a daemon there is no answer");
        drop(successor);
        let listing: Value = serde_json::from_str(&list.join().expect("answered")).expect("JSON");
        assert_eq!((&listing["restarts"], &listing["images"][0]["mode"]), (&1.into(), &"write".into()));
    });
    // The mount's end as well.
    drop(disk);
    signal(daemons(&mount)[0], Signal::KILL);
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
    mount.start();
    let mut found = vec![0; 4096];
    mount.open("vm1").read_exact_at(&mut found, 5 << 20).expect("read");
    assert!(found == [7; 4096]);
    mount.umount();
}

#[test]
fn an_umount_while_no_daemon_runs_at_all_waits_for_the_next_one() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let mut killed = Vec::new();
    // The fourth death has a pause of 2 s behind it.
    assert!(until(PATIENCE, || {
        let new: Vec<u32> = daemons(&mount).into_iter().filter(|pid| !killed.contains(pid)).collect();
        new.iter().for_each(|pid| signal(*pid, Signal::KILL));
        killed.extend(new);
        killed.len() >= 4
    }));
    mount.umount();
    Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
}

#[test]
fn an_images_folder_that_was_renamed_is_gone_on_with() {
    require!("fuse");
    let above = temp_dir();
    let images = above.path().join("images");
    fs::create_dir(&images).expect("made");
    let mut mount = Mount::over(&images, &[&["--create", "vm1=64M"], &RESTARTS[..]].concat());
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 0).expect("written");
    fs::rename(&images, above.path().join("other")).expect("renamed");
    // Another folder has its name now.
    fs::create_dir(&images).expect("made");
    kill(&mount, PATIENCE);
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, 0).expect("read");
    assert!(found == [7; 4096]);
    disk.sync_all().expect("synced");
    drop(disk);
    mount.umount();
    Run::ploopfs().arg("check").arg(above.path().join("other/vm1.hds")).status(0);
    assert_eq!(fs::read_dir(&images).expect("there").count(), 0, "nothing was made in it");
}

/// Reads and writes an image through a death of its daemon: what is at `cluster` must be `byte`.
#[track_caller]
fn goes_on(mount: &Mount, disk: &File, byte: u8) {
    kill(mount, PATIENCE);
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, 3 << 20).expect("read");
    assert!(found == [byte; 4096]);
    disk.write_all_at(&[byte + 1; 4096], 3 << 20).expect("written");
    disk.write_all_at(&[byte; 4096], u64::from(byte) << 20).expect("written anew");
    disk.sync_all().expect("synced");
}

#[test]
fn an_image_whose_file_was_removed_while_it_was_open_is_gone_on_with() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let raw = mount.images().join("vm2.raw");
    File::create(&raw).and_then(|file| file.set_len(64 << 20)).expect("made");
    assert!(until(PATIENCE, || mount.flat("vm2").exists()));
    let (disk, plain) = (mount.open("vm1"), mount.open("vm2"));
    disk.write_all_at(&[7; 4096], 3 << 20).expect("written");
    // The guest's first bytes make it look like another kind of image.
    plain.write_all_at(&fs::read(mount.delta("vm1")).expect("read")[..512], 0).expect("written");
    plain.write_all_at(&[17; 4096], 3 << 20).expect("written");
    fs::remove_file(mount.delta("vm1")).expect("removed");
    fs::remove_file(&raw).expect("removed");
    for round in 0..2 {
        goes_on(&mount, &disk, 7 + round);
        let listing = Run::ploopfs().arg("list").arg(mount.images()).ok();
        assert_eq!(listing.matches("is gone from the folder").count(), 2, "{listing}");
        let mut found = vec![0; 4096];
        plain.read_exact_at(&mut found, 3 << 20).expect("read");
        assert!(found == [17; 4096]);
        plain.write_all_at(&[17; 4096], 3 << 20).expect("written");
    }
    drop((disk, plain));
    let gone = || ["vm1", "vm2"].iter().all(|name| !mount.flat(name).exists());
    assert!(until(PATIENCE, gone), "served until it is closed");
    mount.umount();
}

#[test]
fn an_image_that_was_renamed_or_replaced_while_it_was_open_keeps_its_name_and_its_file() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", LATE]);
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 3 << 20).expect("written");
    let other = mount.delta("other");
    fs::rename(mount.delta("vm1"), &other).expect("renamed");
    goes_on(&mount, &disk, 7);
    // A newcomer has its old name.
    Run::ploopfs().arg("create").arg(mount.delta("vm1")).args(["--size", "16M"]).ok();
    goes_on(&mount, &disk, 8);
    assert_eq!(mount.flat("vm1").metadata().expect("it has its old name").len(), 64 << 20);
    assert!(!mount.flat("other").exists());
    drop(disk);
    let shown = |name: &str| mount.flat(name).metadata().map_or(0, |of| of.len());
    assert!(until(PATIENCE, || shown("other") == 64 << 20), "its file's name behind the last close");
    assert!(until(PATIENCE, || shown("vm1") == 16 << 20), "and the newcomer has its own");
    mount.umount();
    Run::ploopfs().arg("check").arg(&other).status(0);
}

#[test]
fn a_newcomer_with_the_name_of_a_served_image_is_left_out_by_a_successor_too() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M", "--create", "vm2=64M"]);
    // One is in use, one is not.
    let disk = mount.open("vm1");
    disk.write_all_at(&[7; 4096], 3 << 20).expect("written");
    for name in ["vm1", "vm2"] {
        let file = File::create(mount.images().join(format!("{name}.raw"))).expect("made");
        file.set_len(16 << 20).expect("a length");
    }
    goes_on(&mount, &disk, 7);
    for name in ["vm1", "vm2"] {
        assert_eq!(mount.flat(name).metadata().expect("still served").len(), 64 << 20);
    }
    drop(disk);
    mount.umount();
}

#[test]
fn restarts_and_the_last_pause_are_shown_wherever_a_mount_is_looked_at() {
    require!("fuse");
    let mut mount = mount(&["--create", "vm1=64M"]);
    let disk = mount.open("vm1");
    assert_eq!((&mount.stats()["restarts"], &mount.stats()["last_pause_ms"]), (&0.into(), &0.into()));
    for restarts in 1..=2 {
        kill(&mount, PATIENCE);
        // The keeper says it behind the successor's first answers; before that, a death is part of the same pause.
        assert!(until(PATIENCE, || mount.stats()["last_pause_ms"].as_u64() > Some(0)));
        assert_eq!(mount.stats()["restarts"], restarts);
    }
    let pause = mount.stats()["last_pause_ms"].clone();
    let metrics = fs::read_to_string(mount.point().join(".ploopfs/metrics")).expect("read");
    assert!(metrics.contains("\nploopfs_restarts_total 2\n"), "{metrics}");
    assert!(
        metrics.contains("\nploopfs_last_pause_seconds 0.") || metrics.contains("seconds 1"),
        "{metrics}"
    );
    let json = |run: Run| -> Value { serde_json::from_str(&run.ok()).expect("JSON") };
    let info = json(Run::ploopfs().args(["info", "--json"]).arg(mount.flat("vm1")));
    let list = json(Run::ploopfs().args(["list", "--json"]).arg(mount.images()));
    let top = json(Run::ploopfs().args(["top", "--json", "--interval=0.1"]).arg(mount.point()));
    for shown in [&info, &list, &top["mounts"][0]] {
        assert_eq!((&shown["restarts"], &shown["last_pause_ms"]), (&2.into(), &pause), "{shown}");
    }
    let text = Run::ploopfs().arg("info").arg(mount.flat("vm1")).ok();
    assert!(text.contains("restarted:   2 times; the last time requests waited for"), "{text}");
    drop(disk);
    mount.umount();
}

#[test]
fn a_restart_is_an_event_and_its_program_is_not_kept_from_the_oom_killer_as_the_keeper_is() {
    require!("fuse");
    let own = temp_dir();
    let (program, heard) = (own.path().join("program"), own.path().join("heard"));
    let score = "$(cat /proc/self/oom_score_adj)";
    let script = format!(
        "#!/bin/sh\nuntil [ {score} = 0 ]; do sleep 0.01; done\n\
         echo \"$1 [$2] $PLOOPFS_EVENT $PLOOPFS_RESTARTS $PLOOPFS_PAUSE_MS $PLOOPFS_MOUNTPOINT\" > {0}.new\n\
         mv {0}.new {0}\n",
        heard.display()
    );
    fs::write(&program, script).expect("written");
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a program");
    let mut mount = mount(&["--create", "vm1=64M", "--on-event", text(&program)]);
    let keeper = processes(&mount, "keeper")[0];
    let of_keeper = |what: &str| fs::read_to_string(format!("/proc/{keeper}/{what}")).expect("our own");
    let own_score = fs::read_to_string("/proc/self/oom_score_adj").expect("our own");
    assert_eq!(own_score.trim(), "0", "the program waits for it");
    // As far as this machine lets a process ask for it.
    let daemons = fs::read_to_string(format!("/proc/{}/oom_score_adj", daemons(&mount)[0])).expect("our own");
    assert_eq!(of_keeper("oom_score_adj"), daemons);
    let status = of_keeper("status");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("a figure");
    assert!(!locked.trim().starts_with("0 "), "{locked}");
    let disk = mount.open("vm1");
    kill(&mount, PATIENCE);
    assert!(until(PATIENCE, || heard.exists()), "the program was not run");
    let heard = fs::read_to_string(&heard).expect("read");
    let words: Vec<&str> = heard.split_whitespace().collect();
    let [first, image, event, restarts, pause, point] = words[..] else { panic!("{heard}") };
    assert_eq!(
        (first, image, event, restarts, point),
        ("restarted", "[]", "restarted", "1", text(mount.point()))
    );
    assert!(pause.parse::<u64>().expect("milliseconds") > 0);
    drop(disk);
    mount.umount();
}

#[test]
fn without_a_restart_the_keeper_is_what_it_was() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let disk = mount.open("vm1");
    let keeper = processes(&mount, "keeper")[0];
    let of_keeper = |what: &str| fs::read_to_string(format!("/proc/{keeper}/{what}")).expect("our own");
    assert_eq!(of_keeper("oom_score_adj"), fs::read_to_string("/proc/self/oom_score_adj").expect("our own"));
    assert!(of_keeper("status").contains("VmLck:\t       0 kB"));
    let links = fs::read_dir(format!("/proc/{keeper}/fd")).expect("our own").flatten();
    let open: Vec<PathBuf> = links.filter_map(|link| fs::read_link(link.path()).ok()).collect();
    let of_images = |path: &&PathBuf| path.starts_with(mount.images()) || path.ends_with("fuse");
    assert_eq!(open.iter().filter(of_images).count(), 1, "the folder alone: {open:?}");
    let filter = fs::read_to_string(format!("/proc/{}/coredump_filter", mount.pid())).expect("our own");
    assert_eq!(filter, fs::read_to_string("/proc/self/coredump_filter").expect("our own"));
    drop(disk);
    mount.umount();
}

/// Where the kernel writes core files of processes in "/"; None where a program takes them.
fn core_file() -> Option<PathBuf> {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("/proc");
    let (pattern, numbers) = (pattern.trim(), fs::read_to_string("/proc/sys/kernel/core_uses_pid"));
    let plain = !pattern.is_empty() && !pattern.starts_with(['|', '@']) && !pattern.contains('%');
    (plain && numbers.is_ok_and(|n| n.trim() == "0")).then(|| Path::new("/").join(pattern))
}

#[test]
fn a_core_file_of_a_daemon_has_no_sector_of_a_disk_and_keeps_its_successor_waiting_for_no_moment() {
    require!("fuse");
    let Some(core) = core_file() else {
        println!("SKIPPED: core files of this machine are not plain files");
        return;
    };
    // Confined, it cannot write one by itself.
    let mut mount = mount(&["--create", "vm1=256M", "--no-sandbox", LATE]);
    let disk = mount.open("vm1");
    let secret: Vec<u8> = (0..4096u32).map(|byte| (byte * byte / 7 + 13) as u8).collect();
    // By every way: what is copied, what is read, small and large, first writes, copies.
    for cluster in 0..32 {
        disk.write_all_at(&secret.repeat(256), cluster << 20).expect("written");
        disk.write_all_at(&secret[..512], (cluster << 20) + 8192).expect("written");
        disk.read_exact_at(&mut vec![0; 1 << 20], cluster << 20).expect("read");
    }
    let daemon = daemons(&mount)[0];
    let pid = rustix::process::Pid::from_raw(daemon as i32);
    let unlimited = Rlimit { current: None, maximum: None };
    rustix::process::prlimit(pid, Resource::Core, unlimited).expect("we are root");
    let _ = fs::remove_file(&core);
    // The first only takes the handler away that looks for an overflow of the stack.
    signal(daemon, Signal::SEGV);
    std::thread::sleep(Duration::from_millis(100));
    signal(daemon, Signal::SEGV);
    assert!(until(PATIENCE, || !daemons(&mount).contains(&daemon)), "it goes on");
    succeeded(&mount, daemon, PATIENCE);
    let dumped = fs::read(&core).expect("a core file");
    println!("CORE {} bytes", dumped.len());
    let _ = fs::remove_file(&core);
    let sector = &secret[..512];
    assert!(
        !dumped.windows(sector.len()).any(|window| window == sector),
        "data of a disk is in the core file"
    );
    assert!(dumped.len() < 32 << 20, "{} bytes took their time", dumped.len());
    let mut found = vec![0; 4096];
    disk.read_exact_at(&mut found, 31 << 20).expect("read");
    assert!(found == secret);
    drop(disk);
    mount.umount();
}
