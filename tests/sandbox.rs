//! The daemon's sandbox: what is active, that it holds, and that everything still works inside.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::{HostFs, Loop, Mount, Run, marked_in_use, text, until};
use ploopfs::format::descriptor::Descriptor;
use serde_json::{Value, json};

/// Long for a busy 2-core machine, short for a hang.
const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

fn log(mount: &Mount) -> String {
    fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default()
}

/// The log, which a thread of its own writes, comes to say so.
#[track_caller]
fn says(mount: &Mount, what: &str) {
    assert!(until(SOON, || log(mount).contains(what)), "{}", log(mount));
}

/// A field of /proc/PID/status, of every thread of the process.
fn of_threads(pid: u32, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a living process");
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).unwrap_or_default();
    let texts: Vec<String> = tasks.flatten().map(status).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    lines.filter_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned())).collect()
}

/// A number that all threads of a process have in their status. A container may give every process a filter.
fn of_all(pid: u32, field: &str) -> u64 {
    let numbers = of_threads(pid, field);
    assert!(!numbers.is_empty() && numbers.iter().all(|n| *n == numbers[0]), "{field}: {numbers:?}");
    numbers[0].parse().expect("a number")
}

/// The last line that the daemon answers to one request.
fn ask(mount: &Mount, request: &Value) -> Value {
    let mut stream = UnixStream::connect(mount.images().join(".ploopfs/control")).expect("the socket");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream.write_all(format!("{request}\n").as_bytes()).expect("asked");
    for line in BufReader::new(stream).lines() {
        let answer: Value = serde_json::from_str(&line.expect("an answer")).expect("JSON");
        if answer.get("progress").is_none() {
            return answer;
        }
    }
    panic!("no answer to {request}");
}

fn clone_request(to: &Path) -> Value {
    let work = json!({"work": "clone", "snapshot": null, "to": text(to), "copy": true});
    json!({"v": 1, "op": "work", "image": "vm1", "work": work})
}

#[test]
fn every_thread_of_the_daemon_is_confined_and_the_mount_says_so() {
    require!("fuse", "landlock");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    // Work for every sort of thread: transport, runners, syncers, control.
    let open = mount.open("vm1");
    open.write_all_at(&[7; 8 << 20], 0).expect("written");
    open.sync_all().expect("synced");
    Run::ploopfs().args(["list", text(mount.point())]).ok();
    let pid = mount.pid();
    assert!(of_threads(pid, "Name").len() > 5, "{:?}", of_threads(pid, "Name"));
    assert_eq!((of_all(pid, "NoNewPrivs"), of_all(pid, "Seccomp")), (1, 2));
    assert_eq!(of_all(pid, "Seccomp_filters"), of_all(std::process::id(), "Seccomp_filters") + 1);
    let active = json!({"no_new_privs": true, "landlock": true, "seccomp": true});
    assert_eq!(mount.stats()["sandbox"], active);
    let line = "sandbox: no new privileges, files of the images folder only (Landlock), listed system calls only \
                (seccomp)";
    says(&mount, line);
}

#[test]
fn no_sandbox_turns_it_off_and_the_mount_says_so() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M", "--no-sandbox"]);
    for field in ["NoNewPrivs", "Seccomp_filters"] {
        assert_eq!(of_all(mount.pid(), field), of_all(std::process::id(), field), "{field}");
    }
    let off = json!({"no_new_privs": false, "landlock": false, "seccomp": false});
    assert_eq!(mount.stats()["sandbox"], off);
    says(&mount, "sandbox: off");
}

#[test]
fn what_the_kernel_refuses_is_said_once_and_the_mount_goes_on_without_it() {
    require!("fuse", "strace");
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("vdisks"));
    let mut mount = Mount::adopt(&images, &point);
    // A kernel without either; -D: the tracer is not in the way of the command's end.
    let refuse = "inject=landlock_create_ruleset,seccomp:error=EOPNOTSUPP";
    let trace =
        ["-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=landlock_create_ruleset,seccomp", "-e", refuse];
    let ours = [env!("CARGO_BIN_EXE_ploopfs"), "mount", "--create", "vm1=64M", text(&images), text(&point)];
    let begun = Run::new("strace").args(trace).args(ours).limit(60).run();
    assert!(begun.success(), "{begun}");
    for part in ["Landlock", "seccomp"] {
        let lines = |text: &str| text.lines().filter(|l| l.contains("sandbox: ") && l.contains(part)).count();
        let logged = until(SOON, || lines(&log(&mount)) == 1);
        assert!(logged && lines(&begun.stderr) == 1, "{begun}{}", log(&mount));
    }
    mount.open("vm1").write_all_at(b"x", 0).expect("still served");
    let active = json!({"no_new_privs": true, "landlock": false, "seccomp": false});
    assert_eq!(mount.stats()["sandbox"], active);
    mount.umount();
}

/// The powers that all threads of a process have (capabilities(7), as bits).
fn powers(pid: u32) -> u64 {
    let all = of_threads(pid, "CapPrm");
    assert!(!all.is_empty() && all.iter().all(|powers| *powers == all[0]), "{all:?}");
    assert_eq!(of_threads(pid, "CapEff"), all);
    u64::from_str_radix(&all[0], 16).expect("hexadecimal")
}

const CHOWN_DAC_OVERRIDE_FOWNER: u64 = 0b1011;
const IPC_LOCK: u64 = 1 << 14;
const SYS_ADMIN: u64 = 1 << 21;

#[test]
fn a_daemon_of_root_keeps_only_the_powers_that_serving_needs() {
    require!("fuse");
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: needs root, which has powers");
    }
    let images = common::temp_dir();
    // Images of a user, which root serves, snapshots and gives new files to.
    let theirs = |path: &Path| std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("given away");
    Run::ploopfs().args(["create", text(&images.path().join("vm1")), "--size", "64M"]).ok();
    fs::set_permissions(images.path().join("vm1.hds"), fs::Permissions::from_mode(0o4600)).expect("a mode");
    theirs(images.path());
    theirs(&images.path().join("vm1.hds"));
    let mount = Mount::over(images.path(), &[]);
    let own = powers(std::process::id());
    // The limit on locked memory may not be lifted here; then that power stays.
    assert_eq!(powers(mount.pid()) & !IPC_LOCK, own & CHOWN_DAC_OVERRIDE_FOWNER);
    mount.open("vm1").write_all_at(b"x", 0).expect("written");
    Run::ploopfs().args(["snapshot", "create", text(&images.path().join("vm1")), "s"]).ok();
    mount.open("vm1").write_all_at(b"y", 4096).expect("written");
    for file in fs::read_dir(images.path().join("vm1")).expect("layers").flatten() {
        let meta = file.metadata().expect("status");
        let layer = text(&file.path()).contains(".hds");
        assert!(!layer || meta.uid() == 65534, "{file:?} is of {}", meta.uid());
    }
    let passing = Mount::new(&["--create", "vm2=64M", "--passthrough"]);
    assert_eq!(powers(passing.pid()) & !IPC_LOCK, own & (CHOWN_DAC_OVERRIDE_FOWNER | SYS_ADMIN));
}

#[test]
fn sixty_four_images_are_served_under_a_limit_of_locked_memory_that_could_not_be_lifted() {
    require!("fuse");
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: needs root, to cut its own powers");
    }
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("vdisks"));
    let mut mount = Mount::adopt(&images, &point);
    let names: Vec<String> = (0..64).map(|n| format!("vm{n}")).collect();
    let create = names.iter().flat_map(|name| ["--create".to_owned(), format!("{name}=16M")]);
    let begun = Run::new("setpriv")
        .args(["--bounding-set=-sys_resource", "--inh-caps=-all", "prlimit", "--memlock=8388608:8388608"])
        .args([env!("CARGO_BIN_EXE_ploopfs"), "mount"])
        .args(create)
        .args([&images, &point])
        .limit(120)
        .run();
    assert!(begun.success(), "{begun}");
    assert_eq!(powers(mount.pid()) & IPC_LOCK, IPC_LOCK);
    let open: Vec<_> = names.iter().map(|name| mount.open(name)).collect();
    for (n, file) in open.iter().enumerate() {
        file.write_all_at(&[n as u8 + 1; 256 << 10], 1 << 20).expect("written");
    }
    for (n, file) in open.iter().enumerate() {
        file.sync_all().expect("synced");
        let mut byte = [0];
        file.read_exact_at(&mut byte, (1 << 20) + 7).expect("read");
        assert_eq!(byte[0], n as u8 + 1);
    }
    // More than the limit is locked, so the limit would have been met.
    let locked = of_threads(mount.pid(), "VmLck");
    let kib: u64 = locked[0].trim_end_matches(" kB").trim().parse().expect("a number");
    assert!(kib > 8 << 10, "{locked:?}");
    drop(open);
    mount.umount();
}

/// A folder of images with a link that leads out of it; asks the daemon to make a clone behind the link.
fn clone_through_a_link(args: &[&str]) -> (Value, bool) {
    let outside = common::temp_dir();
    let mut args = args.to_vec();
    args.extend(["--create", "vm1=64M"]);
    let mount = Mount::new(&args);
    symlink(outside.path(), mount.images().join("link")).expect("a link");
    let answer = ask(&mount, &clone_request(&mount.images().join("link/vm2")));
    let left = outside.path().read_dir().expect("the folder outside").next();
    (answer, left.is_some())
}

#[test]
fn a_confined_daemon_opens_nothing_outside_of_the_images_folder() {
    require!("fuse", "landlock");
    // The same request does its harm where nothing confines the daemon: so it is the sandbox that stops it.
    let (answer, harm) = clone_through_a_link(&["--no-sandbox"]);
    assert!(harm, "{answer}");
    let (answer, harm) = clone_through_a_link(&[]);
    assert!(!harm, "{answer}");
    assert!(answer.to_string().contains("ermission denied"), "{answer}");
}

#[test]
fn a_clone_to_a_place_outside_is_refused_with_the_ways_out() {
    require!("fuse", "landlock");
    let outside = common::temp_dir();
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let to = outside.path().join("vm2");
    let refused = Run::ploopfs().args(["clone", "--copy", text(&mount.flat("vm1")), text(&to)]).status(1);
    assert!(refused.stderr.contains("--no-sandbox"), "{refused}");
    assert!(!to.exists());
}

#[test]
fn with_allow_outside_files_may_lie_anywhere_and_the_calls_are_still_listed() {
    require!("fuse");
    let outside = common::temp_dir();
    let images = common::temp_dir();
    let delta = outside.path().join("base.hds");
    Run::ploopfs().args(["create", text(&delta), "--size", "64M"]).ok();
    let xml = Descriptor::new(64 * MIB / 512, 2048, text(&delta), false);
    fs::create_dir(images.path().join("vm1")).expect("a folder");
    fs::write(images.path().join("vm1/DiskDescriptor.xml"), xml.to_xml()).expect("a descriptor");
    let mount = Mount::over(images.path(), &["--allow-outside"]);
    let open = mount.open("vm1");
    open.write_all_at(b"x", 0).expect("written");
    let active = json!({"no_new_privs": true, "landlock": false, "seccomp": true});
    assert_eq!(mount.stats()["sandbox"], active);
}

#[test]
fn a_confined_daemon_finds_a_file_of_the_folder_by_an_absolute_path_too() {
    require!("fuse");
    let images = common::temp_dir();
    let folder = images.path().join("vm1");
    let delta = folder.join("base.hds");
    fs::create_dir(&folder).expect("a folder");
    Run::ploopfs().args(["create", text(&delta), "--size", "64M"]).ok();
    let xml = Descriptor::new(64 * MIB / 512, 2048, text(&delta), false);
    fs::write(folder.join("DiskDescriptor.xml"), xml.to_xml()).expect("a descriptor");
    // The way there leads through folders that the daemon may not read.
    let mount = Mount::over(images.path(), &[]);
    mount.open("vm1").write_all_at(b"x", 0).expect("written");
}

/// What a disk holds at one place.
fn at(file: &Path, offset: u64) -> u8 {
    let open = fs::File::open(file).expect("opens");
    common::read_at(&open, offset, 1).expect("read")[0]
}

/// Every live operation, with the disk in use all the time but for the switch.
fn all_operations(images: &Path) {
    let run = |args: &[&str]| Run::ploopfs().args(args).limit(60).ok();
    let mut mount = Mount::over(images, &["--create", "vm1=64M"]);
    assert_eq!(mount.stats()["sandbox"]["seccomp"], true);
    let flat = mount.flat("vm1");
    let (vm1, vm2) = (mount.images().join("vm1"), mount.images().join("vm2"));
    let open = mount.open("vm1");
    let write = |value: u8, offset: u64| {
        open.write_all_at(&[value; 1 << 20], offset).expect("written");
        open.sync_all().expect("synced");
    };
    write(1, 0);
    // The single file becomes a folder under the open disk.
    run(&["snapshot", "create", text(&flat), "a"]);
    assert!(vm1.join("DiskDescriptor.xml").exists() && !mount.delta("vm1").exists());
    write(2, 0);
    common::punch(&open, MIB, MIB).expect("punched");
    run(&["snapshot", "create", text(&flat), "b"]);
    write(3, 0);
    let seen = |label: &str| at(&mount.point().join(".snapshots/vm1").join(format!("{label}.img")), 0);
    assert_eq!((seen("a"), seen("b")), (1, 2));
    let shown = run(&["snapshot", "list", text(&flat)]);
    assert!(shown.contains('a') && shown.contains('b'), "{shown}");
    run(&["clone", &format!("{}@a", text(&flat)), text(&vm2)]);
    assert_eq!(at(&mount.flat("vm2"), 0), 1);
    run(&["snapshot", "delete", text(&flat), "a"]);
    assert_eq!(at(&flat, 0), 3);
    run(&["resize", text(&flat), "128M"]);
    assert_eq!(fs::metadata(&flat).expect("served").len(), 128 * MIB);
    open.write_all_at(&[4; 4096], 127 * MIB).expect("the new part takes writes");
    open.sync_all().expect("synced");
    drop(open);
    run(&["snapshot", "switch", text(&flat), "b"]);
    assert_eq!((at(&flat, 0), at(&flat, 127 * MIB)), (2, 0));
    run(&["merge", text(&flat), "b"]);
    assert_eq!(at(&flat, 0), 2);
    // Images that come and go.
    run(&["create", text(&mount.images().join("vm3")), "--size", "8M"]);
    assert!(until(SOON, || mount.flat("vm3").exists()), "{}", log(&mount));
    fs::remove_file(mount.images().join("vm3.hds")).expect("removed");
    assert!(until(SOON, || !mount.flat("vm3").exists()), "{}", log(&mount));
    mount.umount();
    // What root is refused here at the start is another matter.
    let said: Vec<String> =
        log(&mount).lines().filter(|l| !l.contains("was refused")).map(Into::into).collect();
    let refused = |line: &&String| line.contains("not implemented") || line.contains("ermission denied");
    assert_eq!(said.iter().find(refused), None);
    for image in ["vm1", "vm2"] {
        run(&["check", text(&mount.images().join(image))]);
    }
}

#[test]
fn every_live_operation_works_inside_on_ext4_where_clones_are_links() {
    require!("fuse", "loop", "ext4");
    let _turn = common::heavy();
    let host = HostFs::new("ext4", 512 * MIB);
    all_operations(&host.path().join("images"));
}

#[test]
fn every_live_operation_works_inside_on_xfs_where_extents_are_shared() {
    require!("fuse", "loop", "xfs");
    let _turn = common::heavy();
    let host = HostFs::new("xfs", 512 * MIB);
    all_operations(&host.path().join("images"));
}

#[test]
fn a_loop_device_is_frozen_resized_and_detached_by_the_client() {
    require!("fuse", "loop", "ext4");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    common::ok("mkfs.ext4", &["-q", text(device.device())]);
    let guest = common::Guest::mount(device.device(), "defaults");
    fs::write(guest.path().join("f"), "kept").expect("written");
    Run::ploopfs().args(["snapshot", "create", "--freeze", text(&mount.flat("vm1")), "frozen"]).ok();
    Run::ploopfs().args(["resize", text(&mount.flat("vm1")), "96M"]).ok();
    let size = common::ok("blockdev", &["--getsize64", text(device.device())]);
    assert_eq!(size.trim(), (96 * MIB).to_string());
    let busy = Run::ploopfs().args(["umount", text(mount.point())]).status(4);
    assert!(busy.stderr.contains(text(device.device())), "{busy}");
    guest.umount();
    Run::ploopfs().args(["detach", text(device.device())]).ok();
    mount.umount();
}

#[test]
fn a_confined_daemon_still_names_who_has_an_image() {
    require!("fuse", "qemu", "landlock");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let mut qemu = std::process::Command::new("qemu-io")
        .args(["-f", "parallels", text(&mount.delta("vm1"))])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("qemu-io");
    // An open that comes first would keep it out.
    let inode = format!(":{} ", fs::metadata(mount.delta("vm1")).expect("the delta").ino());
    let has_it = || fs::read_to_string("/proc/locks").is_ok_and(|locks| locks.contains(&inode));
    assert!(until(SOON, has_it), "qemu-io takes no lock");
    let refused = until(SOON, || fs::File::open(mount.flat("vm1")).is_err());
    let name = format!("qemu-io (pid {}", qemu.id());
    let named = until(SOON, || log(&mount).contains(&name));
    // Its input ends, and so does it.
    drop(qemu.stdin.take());
    qemu.wait().expect("our own child");
    assert!(refused && named, "{}", log(&mount));
}

#[test]
fn a_signal_ends_a_confined_daemon_whose_keeper_is_gone_and_no_dead_mount_is_left() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    mount.open("vm1").write_all_at(b"x", 0).expect("written");
    let pid = mount.pid();
    let parent = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a living process");
    let keeper = parent.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)).expect("a parent");
    common::ok("kill", &["-KILL", keeper]);
    says(&mount, "keeper process is gone");
    common::ok("kill", &[pid.to_string()]);
    assert!(until(SOON, || !Path::new(&format!("/proc/{pid}")).exists()), "{}", log(&mount));
    says(&mount, "run: ploopfs umount");
    assert!(until(SOON, || !mount.is_mounted()), "a dead mount is left: {}", log(&mount));
    says(&mount, "is unmounted: its daemon has ended");
    assert!(!marked_in_use(&mount.delta("vm1")));
    Run::ploopfs().args(["umount", text(mount.point())]).ok();
    // What it left under the name of the mount does not hinder the next.
    mount.start();
    mount.umount();
}
