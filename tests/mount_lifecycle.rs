//! How mounts begin and end, with the real binary and the real /dev/fuse.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::namespace::for_a_user;
use common::{Loop, Mount, Run, marked_in_use, signal, text, until};
use rustix::process::Signal;

/// How long an end may take on a busy machine.
const SOON: Duration = Duration::from_secs(15);

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn log(mount: &Mount) -> String {
    fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default()
}

fn umount(mount: &Mount) -> Run {
    Run::ploopfs().arg("umount").arg(mount.point()).limit(60)
}

/// The keeper of a daemon: its parent.
fn keeper_of(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a living daemon");
    let behind = stat.rsplit_once(") ").expect("a name in brackets").1;
    behind.split(' ').nth(1).and_then(|ppid| ppid.parse().ok()).expect("a parent")
}

#[test]
fn folder_and_mount_point_are_made_and_the_whole_line_works_twice() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let again = mount.try_start();
    assert!(again.success() && again.stdout.contains("already mounted"), "{again}");
    mount.umount();
}

/// A cgroup whose processes may have so many tasks; removed with all that is in it.
struct FewTasks(PathBuf);

impl FewTasks {
    /// None where none can be made.
    fn new() -> Option<FewTasks> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        let places = table.lines().filter(|line| line.contains(" - cgroup"));
        let points = places.filter_map(|line| line.split(' ').nth(4));
        points.map(|point| Path::new(point).join(format!("ploopfs-test-{}", std::process::id()))).find_map(
            |group| {
                fs::create_dir(&group).ok()?;
                let few = FewTasks(group);
                few.0.join("pids.max").exists().then_some(few)
            },
        )
    }

    fn allow(&self, tasks: &str) {
        fs::write(self.0.join("pids.max"), tasks).expect("a limit");
    }

    fn tasks(&self) -> usize {
        let current = fs::read_to_string(self.0.join("pids.current")).expect("the cgroup");
        current.trim().parse().expect("a number of tasks")
    }

    fn processes(&self) -> Vec<u32> {
        let list = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|pid| pid.parse().ok()).collect()
    }
}

impl Drop for FewTasks {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("pids.max"), "max");
        until(SOON, || {
            self.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL));
            !self.0.exists() || fs::remove_dir(&self.0).is_ok()
        });
    }
}

#[test]
fn where_threads_cannot_be_had_the_mount_works_or_is_refused_and_nothing_hangs() {
    require!("fuse");
    let Some(few) = FewTasks::new() else { return println!("SKIPPED few tasks: no pids cgroup can be made") };
    let folder = common::temp_dir();
    let images = folder.path().join("images");
    fs::create_dir(&images).expect("a folder");
    // Whose scan before the first write is spread over threads.
    Run::ploopfs().arg("create").arg(images.join("vm1")).args(["--size", "1T"]).ok();
    // How many it takes depends on the transport and on the number of CPUs: a mount without a limit shows it.
    let need = mount_with_few_tasks(&few, &images, "max").expect("a mount: there is no limit");
    let (mut outcomes, mut refused) = ([0, 0], String::new());
    // From "not even the keeper's" to "all but those that come with work", in about 24 steps, and some with these too.
    for tasks in [8, 16].into_iter().chain((20..need + 24).step_by(need.div_ceil(24))) {
        if outcomes[0] == 3 {
            break;
        }
        match mount_with_few_tasks(&few, &images, &tasks.to_string()) {
            Ok(_) => outcomes[0] += 1,
            Err(why) => (outcomes[1], refused) = (outcomes[1] + 1, why),
        }
    }
    assert!(
        outcomes.iter().all(|count| *count > 0),
        "mounted, refused: {outcomes:?}; unlimited: {need} tasks; last: {refused}"
    );
}

/// Mounts, writes and umounts. Returns how many tasks there were after the write, or how the mount was refused.
fn mount_with_few_tasks(few: &FewTasks, images: &Path, tasks: &str) -> Result<usize, String> {
    let mount = Mount::prepare(images, &[]);
    few.allow(tasks);
    let line = r#"echo $$ > "$0"; exec "$@""#;
    let begun = Run::new("sh")
        .args(["-c", line])
        .arg(few.0.join("cgroup.procs"))
        .arg(env!("CARGO_BIN_EXE_ploopfs"))
        .args(["mount", "--threads", "4"])
        .args([images, mount.point()])
        .limit(20)
        .run();
    assert!(begun.status.is_some(), "{tasks} tasks: {begun}");
    if !begun.success() {
        assert!(!begun.stderr.trim().is_empty(), "{tasks} tasks: {begun}");
        assert!(until(SOON, || !mount.is_mounted()), "{tasks} tasks: a dead mount is left: {begun}");
        assert!(until(SOON, || few.processes().is_empty()), "{tasks} tasks: processes are left: {begun}");
        return Err(begun.to_string());
    }
    let mut mount = Mount::adopt(images, mount.point());
    let written = Run::new("dd")
        .args(["if=/dev/zero", "bs=4k", "count=1", "conv=notrunc,fsync"])
        .arg(format!("of={}", text(&mount.flat("vm1"))))
        .limit(20)
        .run();
    assert!(written.success(), "{tasks} tasks: {written}");
    let need = few.tasks();
    mount.umount();
    Ok(need)
}

#[test]
fn a_second_umount_says_that_nothing_is_mounted_and_succeeds() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    mount.umount();
    let again = umount(&mount).status(0);
    assert!(again.stderr.contains("not mounted"), "{again}");
    let nowhere = Run::ploopfs().args(["umount", "/nonexistent/vdisks"]).status(1);
    assert!(nowhere.stderr.contains("/nonexistent/vdisks"), "{nowhere}");
}

#[test]
fn umount_while_a_process_has_an_image_open_names_it_and_changes_nothing() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let open = mount.open("vm1");
    let refused = umount(&mount).status(4);
    assert!(refused.stderr.contains(&format!("pid {}", std::process::id())), "{refused}");
    assert!(refused.stderr.contains("vm1.img"), "{refused}");
    open.write_all_at(b"still here", 0).expect("the mount goes on");
    drop(open);
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn umount_with_a_loop_device_attached_names_it_and_the_command_that_ends_it() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Run::ploopfs().arg("attach").arg(mount.delta("vm1")).ok().trim().to_owned();
    let refused = umount(&mount).status(4);
    assert!(refused.stderr.contains(&format!("ploopfs detach {device}")), "{refused}");
    Run::ploopfs().args(["detach", &device]).ok();
    assert!(common::loops_in(mount.point()).is_empty());
    // By its name: the device may be another test's by now.
    let again = Run::ploopfs().arg("detach").arg(mount.delta("vm1")).status(0);
    assert!(again.stderr.contains("not attached"), "{again}");
    mount.umount();
}

#[test]
fn umount_with_detach_goes_on_until_the_last_close_and_then_leaves_a_clean_image() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let open = mount.open("vm1");
    let detached = umount(&mount).arg("--detach").status(0);
    assert!(detached.stderr.contains("goes on") && !mount.is_mounted(), "{detached}");
    open.write_all_at(b"after the name is gone", 4096).expect("still served");
    assert!(is_alive(pid));
    drop(open);
    assert!(until(SOON, || !is_alive(pid)), "the daemon goes on after the last close");
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn umount_with_detach_takes_idle_loop_devices_along_and_leaves_a_clean_image() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let device = Loop::attach(&mount.flat("vm1"), true);
    common::sh(&format!("echo written > {}", text(device.device())));
    umount(&mount).arg("--detach").status(0);
    assert!(!is_alive(pid) && !mount.is_mounted());
    assert!(!marked_in_use(&mount.delta("vm1")));
    assert!(common::loops_in(mount.point()).is_empty());
}

#[test]
fn umount_by_anyone_else_ends_the_daemon_and_leaves_clean_images() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    mount.open("vm1").write_all_at(b"x", 0).expect("written");
    assert!(until(SOON, || Run::new("umount").arg(mount.point()).run().success()));
    assert!(until(SOON, || !is_alive(pid)));
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn sigterm_with_nothing_open_ends_the_mount() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid)));
    assert!(!mount.is_mounted());
}

#[test]
fn sigterm_with_a_file_open_says_who_refuses_new_opens_and_ends_with_the_last_close() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M", "--create", "vm2=64M"]);
    let pid = mount.pid();
    let open = mount.open("vm1");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || log(&mount).contains("held by")), "{}", log(&mount));
    assert!(log(&mount).contains(&format!("pid {}", std::process::id())), "{}", log(&mount));
    let refused = fs::File::open(mount.flat("vm2")).expect_err("no new opens");
    assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    open.write_all_at(b"until the end", 0).expect("still served");
    open.sync_all().expect("still served");
    drop(open);
    assert!(until(SOON, || !is_alive(pid)));
    assert!(!mount.is_mounted() && !marked_in_use(&mount.delta("vm1")));
}

#[test]
fn a_second_sigterm_closes_images_under_their_users_who_get_eio() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let open = mount.open("vm1");
    open.write_all_at(b"acknowledged", 1 << 20).expect("written");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || log(&mount).contains("held by")));
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid)));
    assert!(open.write_all_at(b"too late", 0).is_err());
    assert!(until(SOON, || !mount.is_mounted()));
    assert!(!marked_in_use(&mount.delta("vm1")), "the mark must go: everything was synced");
    drop(open);
    let again = Mount::over(mount.images(), &[]);
    let mut there = [0; 12];
    again.open("vm1").read_exact_at(&mut there, 1 << 20).expect("readable");
    assert_eq!(&there, b"acknowledged");
}

#[test]
fn the_stop_timeout_forces_the_end_too() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M", "--stop-timeout", "1"]);
    let pid = mount.pid();
    let open = mount.open("vm1");
    open.write_all_at(b"x", 0).expect("written");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid)));
    drop(open);
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn a_killed_daemon_leaves_no_dead_mount_and_its_log_names_what_hangs_on_it() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    signal(mount.pid(), Signal::KILL);
    assert!(until(SOON, || !mount.is_mounted()));
    let hanging = format!("ploopfs detach {}", text(device.device()));
    assert!(until(SOON, || log(&mount).contains(&hanging)), "{}", log(&mount));
    Run::ploopfs().args(["detach", text(device.device())]).ok();
}

#[test]
fn a_dead_mount_is_cleaned_up_by_the_next_mount_which_names_what_hangs_on_it() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    let pid = mount.pid();
    // The standby and the keeper first: they would clean up.
    let standby = format!("ploopfs standby {} ", text(mount.images()));
    let standby = Run::new("pgrep").args(["-f", &standby]).ok();
    signal(standby.trim().parse().expect("one standby"), Signal::KILL);
    signal(keeper_of(pid), Signal::KILL);
    signal(pid, Signal::KILL);
    assert!(until(SOON, || !is_alive(pid)) && mount.is_mounted());
    let again = mount.try_start();
    assert!(again.success(), "{again}");
    assert!(again.stderr.contains(text(device.device())), "{again}");
    assert_eq!(fs::metadata(mount.flat("vm1")).expect("served again").len(), 64 << 20);
    Run::ploopfs().args(["detach", text(device.device())]).ok();
}

#[test]
fn a_stopped_daemon_is_named_with_the_command_that_wakes_it_instead_of_hanging_list() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    signal(pid, Signal::STOP);
    let list = Run::ploopfs().args(["list", text(mount.images())]).run();
    // Before anything is demanded: what cleans up needs it.
    signal(pid, Signal::CONT);
    assert!(!list.success() && list.stderr.contains("kill -CONT"), "{list}");
    Run::ploopfs().args(["list", text(mount.images())]).ok();
}

#[test]
fn a_dead_keeper_does_not_take_the_mount_with_it() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    signal(keeper_of(mount.pid()), Signal::KILL);
    assert!(until(SOON, || log(&mount).contains("keeper process is gone")));
    mount.open("vm1").write_all_at(b"x", 0).expect("still served");
    mount.umount();
    assert!(!marked_in_use(&mount.delta("vm1")));
}

#[test]
fn places_that_would_make_the_daemon_need_its_own_mount_are_refused() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let inside = mount.images().join("inside");
    let elsewhere = common::temp_dir();
    for (images, point) in [
        (mount.images(), inside.as_path()),
        (mount.images(), mount.images()),
        (inside.as_path(), mount.images()),
        (mount.point(), elsewhere.path()),
    ] {
        let refused = Run::ploopfs().arg("mount").args([images, point]).status(2);
        assert!(refused.stderr.contains("mount"), "{refused}");
    }
    assert!(elsewhere.path().read_dir().expect("readable").next().is_none());
}

#[test]
fn another_folder_on_a_mount_point_in_use_is_refused() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let other = common::temp_dir();
    let refused = Run::ploopfs().arg("mount").args([other.path(), mount.point()]).status(4);
    assert!(refused.stderr.contains(text(mount.images())), "{refused}");
}

#[test]
fn an_io_uring_transport_that_is_switched_off_is_refused_with_the_switch_and_auto_goes_without() {
    require!("fuse");
    let switch = "/sys/module/fuse/parameters/enable_uring";
    if fs::read_to_string(switch).is_ok_and(|text| text.trim() == "Y") {
        println!("SKIPPED a refused transport: it is switched on here");
        return;
    }
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("i"), folder.path().join("m"));
    let refused = Run::ploopfs().args(["mount", "--transport", "uring"]).args([&images, &point]).status(1);
    let has_switch = Path::new(switch).exists();
    assert!(refused.stderr.contains(if has_switch { switch } else { "no FUSE over io_uring" }), "{refused}");
    assert!(!images.exists());
    let mount = Mount::new(&["--transport=auto", "--create", "vm1=64M"]);
    assert_eq!(mount.stats()["transport"], "fuse");
}

#[test]
fn options_behind_o_are_those_of_mount_and_an_unknown_one_is_named() {
    require!("fuse");
    let mut mount =
        Mount::new(&["--create", "vm1=64M", "-o", "ro,_netdev,nofail,x-systemd.automount,threads=3"]);
    assert!(fs::OpenOptions::new().write(true).open(mount.flat("vm1")).is_err());
    mount.umount();
    mount.set_args(&["-o", "rw,shiny=3"]);
    let refused = mount.try_start();
    assert_eq!(refused.code(), Some(2), "{refused}");
    assert!(refused.stderr.contains("shiny"), "{refused}");
}

#[test]
fn a_daemon_in_front_logs_to_stderr_and_ends_with_a_signal_to_its_keeper() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("i"), folder.path().join("m"));
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(["mount", "-f", "--create", "vm1=64M"])
        .args([&images, &point])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary under test");
    let up = until(SOON, || point.join("vm1.img").exists());
    signal(child.id(), Signal::INT);
    let ended = until(SOON, || matches!(child.try_wait(), Ok(Some(_))));
    if !ended {
        child.kill().expect("our own child");
    }
    let out = child.wait_with_output().expect("our own child");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(up && ended && out.status.success(), "{:?}: {said}", out.status);
    assert!(said.contains("sandbox: no new privileges") && said.contains("ended"), "{said}");
    assert!(!point.join("vm1.img").exists());
}

/// Talks to the control socket as nobody should; returns what came back.
fn say(images: &Path, what: &[u8]) -> String {
    let mut stream = UnixStream::connect(images.join(".ploopfs/control")).expect("the daemon's socket");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    // The daemon may hang up in the middle of it.
    let _ = stream.write_all(what);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn rubbish_on_the_control_socket_harms_nothing() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    assert!(say(mount.images(), b"\xff\x00{{{\n").contains("\"ok\":false"));
    assert!(say(mount.images(), b"{\"v\":7,\"op\":\"hello\"}\n").contains("speaks 1"));
    assert!(say(mount.images(), b"{\"v\":1,\"op\":\"explode\"}\n").contains("\"ok\":false"));
    say(mount.images(), &vec![b'x'; 1 << 20]);
    say(mount.images(), b"{\"v\":1,\"op\":\"hel");
    assert!(say(mount.images(), b"{\"v\":1,\"op\":\"hello\"}\n").contains("\"pid\""));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(mount.images().join(".ploopfs/control")).expect("the socket").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    mount.umount();
}

#[test]
fn silent_clients_keep_nobody_from_being_served() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let socket = mount.images().join(".ploopfs/control");
    let silent: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&socket).expect("connected")).collect();
    // Silence ends after ten seconds.
    let heard = || say(mount.images(), b"{\"v\":1,\"op\":\"hello\"}\n").contains("\"pid\"");
    assert!(until(Duration::from_secs(25), heard));
    drop(silent);
    assert!(until(SOON, heard));
}

#[test]
fn the_program_of_on_event_must_exist_at_the_start() {
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("i"), folder.path().join("m"));
    let refused =
        Run::ploopfs().args(["mount", "--on-event", "/nonexistent/tell"]).args([&images, &point]).run();
    assert!(!refused.success() && refused.stderr.contains("/nonexistent/tell"), "{refused}");
}

#[test]
fn an_event_runs_the_program_with_its_arguments_and_its_environment() {
    require!("fuse");
    let folder = common::temp_dir();
    let (program, told) = (folder.path().join("tell"), folder.path().join("told"));
    let script = format!(
        "#!/bin/sh\necho \"$1 $2 $PLOOPFS_EVENT $PLOOPFS_IMAGE $PLOOPFS_FREE $PLOOPFS_MOUNTPOINT\" >> {}\n",
        text(&told)
    );
    fs::write(&program, script).expect("a script");
    common::sh(&format!("chmod 755 {}", text(&program)));
    // Less than all of the host is free, so that the first allocation is below the mark.
    let mount = Mount::new(&["--create", "vm1=64M", "--low-water", "100", "--on-event", text(&program)]);
    let open = mount.open("vm1");
    open.write_all_at(&[7; 1 << 20], 0).expect("written");
    open.sync_all().expect("synced");
    let said = || fs::read_to_string(&told).unwrap_or_default();
    assert!(until(SOON, || said().contains('\n')), "nothing was told; the log: {}", log(&mount));
    let words: Vec<String> = said().split_whitespace().map(str::to_owned).collect();
    assert_eq!(words[..4], ["low-water", "vm1", "low-water", "vm1"], "{words:?}");
    assert!(words[4].parse::<u64>().is_ok() && words[5] == text(mount.point()), "{words:?}");
}

#[test]
fn the_log_names_a_loop_device_without_direct_io_and_the_line_that_switches_it_on() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), false);
    let line = format!("losetup --direct-io=on {}", text(device.device()));
    assert!(until(SOON, || log(&mount).contains(&line)), "{}", log(&mount));
    device.detach();
}

/// A bind mount of a folder, read-only, taken away at the end.
struct ReadOnly(tempfile::TempDir);

impl ReadOnly {
    fn of(folder: &Path) -> ReadOnly {
        let shown = common::temp_dir();
        common::ok("mount", &["--bind", text(folder), text(shown.path())]);
        let shown = ReadOnly(shown);
        common::ok("mount", &["-o", "remount,bind,ro", text(shown.0.path())]);
        shown
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        Run::new("umount").arg("-l").arg(self.0.path()).run();
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_served_with_its_socket_log_and_lock_under_run() {
    use std::os::unix::fs::MetadataExt;
    require!("fuse", "loop");
    let folder = common::temp_dir();
    Run::ploopfs().arg("create").arg(folder.path().join("vm1")).args(["--size", "64M"]).ok();
    let images = ReadOnly::of(folder.path());
    let meta = fs::metadata(images.0.path()).expect("there");
    let place = Path::new("/run/ploopfs").join(format!("{:x}-{:x}", meta.dev(), meta.ino()));
    let mut mount = Mount::over(images.0.path(), &["-r"]);
    assert!(place.join("control").exists() && place.join("log").exists());
    let mut nothing = [1; 512];
    fs::File::open(mount.flat("vm1")).expect("readable").read_exact(&mut nothing).expect("readable");
    assert_eq!(nothing, [0; 512]);
    let refused = Mount::prepare(images.0.path(), &["-r"]).try_start();
    assert_eq!(refused.code(), Some(4), "{refused}");
    let list = Run::ploopfs().args(["list", "--json"]).arg(images.0.path()).ok();
    assert!(list.contains("\"served\": true"), "{list}");
    mount.umount();
    fs::remove_dir_all(&place).expect("ours");
    assert!(!folder.path().join(".ploopfs").exists());
}

#[test]
fn a_user_without_root_can_mount_through_fusermount3_and_is_told_what_is_missing() {
    require!("fuse");
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/fusermount3").exists() {
        println!("SKIPPED: needs root (to become nobody) and fusermount3");
        return;
    }
    let folder = common::temp_dir();
    let here = text(folder.path());
    // The binary under test may lie where that user cannot reach it, and /dev/fuse may be closed to it.
    let (done, left) = for_a_user(
        folder.path(),
        env!("CARGO_BIN_EXE_ploopfs").as_ref(),
        &format!(
            "as_user {here}/ploopfs mount --create vm1=64M {here}/own/i {here}/own/m
             as_user dd if=/dev/zero of=own/m/vm1.img bs=64k count=1 conv=notrunc,fsync status=none
             as_user stat -c size=%s own/m/vm1.img
             as_user {here}/ploopfs umount {here}/own/m"
        ),
    );
    assert!(done.success() && !left, "{done}");
    assert!(done.stderr.contains("not running as root"), "{done}");
    assert!(done.stdout.contains(&format!("size={}", 64 << 20)), "{done}");
}

#[test]
fn allow_other_of_an_ordinary_user_is_not_swallowed() {
    require!("fuse");
    if !rustix::process::geteuid().is_root()
        || !["/usr/bin/fusermount3", "/etc/fuse.conf"].iter().all(|path| Path::new(path).exists())
    {
        println!("SKIPPED: needs root (to become nobody), fusermount3 and its /etc/fuse.conf");
        return;
    }
    let folder = common::temp_dir();
    let here = text(folder.path());
    let (done, _) = for_a_user(
        folder.path(),
        env!("CARGO_BIN_EXE_ploopfs").as_ref(),
        &format!(
            "echo user_allow_other > conf; mount --bind conf /etc/fuse.conf
             as_user {here}/ploopfs mount -o allow_other --create vm1=64M {here}/own/i {here}/own/m
             grep -c \" {here}/own/m .*allow_other\" /proc/self/mountinfo
             ls own/m
             as_user {here}/ploopfs umount {here}/own/m"
        ),
    );
    assert!(done.success() && done.stdout == "1\nvm1.img\n", "{done}");
}

/// 256 idle images took 47 MB instead of 28: one session's buffer of 16 MiB, in memory that is locked.
#[test]
fn a_mount_at_rest_has_no_buffer_of_a_session_in_memory() {
    require!("fuse");
    let mount = Mount::new(&["--transport", "fuse", "--create", "vm1=64M"]);
    fs::read(mount.point().join(".ploopfs/stats.json")).expect("it serves");
    let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).expect("a living daemon");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("memory of its own");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 12 << 10, "{kib} KiB");
}

#[test]
fn a_missing_proc_or_sys_is_named() {
    require!("fuse", "loop");
    let folder = common::temp_dir();
    let run = |gone: &str, words: &str| {
        let script = format!("umount -l {gone} && exec '{}' {words}", env!("CARGO_BIN_EXE_ploopfs"));
        Run::new("unshare").args(["--mount", "sh", "-c", &script]).run()
    };
    let (images, point) = (folder.path().join("i"), folder.path().join("m"));
    let uring = run("/sys", &format!("mount --transport uring {} {}", text(&images), text(&point)));
    assert!(uring.stderr.contains("/sys is not mounted"), "{uring}");
    let detach = run("/sys", "detach /dev/loop0");
    assert!(detach.stderr.contains("/sys: is not mounted"), "{detach}");
    let mount = run("/proc", &format!("mount {} {}", text(&images), text(&point)));
    assert!(!mount.success() && mount.stderr.contains("/proc: is not mounted"), "{mount}");
}

/// All three killed at once: nothing is left that could take the mount away.
#[test]
fn a_dead_mount_is_named_with_what_is_on_it_and_the_command_that_clears_it() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), false);
    let pattern = format!("ploopfs (daemon|keeper|standby) {} ", text(mount.images()));
    let pids = Run::new("pgrep").args(["-f", &pattern]).ok();
    let pids: Vec<&str> = pids.split_whitespace().collect();
    assert_eq!(pids.len(), 3, "{pids:?}");
    Run::new("kill").arg("-9").args(&pids).ok();
    let clears = format!("ploopfs umount {}", text(mount.point()));
    let detaches = format!("ploopfs detach {}", text(device.device()));
    let (images, point, flat) = (mount.images(), mount.point(), mount.flat("vm1"));
    let asks: [(&[&str], i32); 6] = [
        (&["list"], 0),
        (&["list", text(images)], 0),
        (&["list", text(point)], 0),
        (&["info", text(&flat)], 1),
        (&["attach", text(&flat)], 1),
        (&["top", "--once", text(point)], 1),
    ];
    for (args, status) in asks {
        let done = Run::ploopfs().args(args).limit(60).run();
        assert_eq!(done.code(), Some(status), "{done}");
        let said = done.output();
        assert!(said.contains("its daemon has died") && said.contains(&clears), "{done}");
        assert!(said.contains(&detaches), "{done}");
    }
    Run::new("sh").args(["-c", &clears.replacen("ploopfs", env!("CARGO_BIN_EXE_ploopfs"), 1)]).ok();
    assert!(!mount.is_mounted());
}

/// A `mount` that was killed takes its daemon along, a moment later; the next one met that and gave up, and advised to end what
/// was ending by itself.
#[test]
fn a_mount_right_after_one_that_was_killed_mounts() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("point"));
    let _mount = Mount::adopt(&images, &point);
    for pause in (0..60).step_by(3).map(Duration::from_millis) {
        let mut first = std::process::Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        first.args(["mount", text(&images), text(&point)]);
        first.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut first = first.spawn().expect("starts");
        std::thread::sleep(pause);
        first.kill().and_then(|()| first.wait()).expect("killed");
        Run::ploopfs().args(["mount", text(&images), text(&point)]).limit(60).ok();
        // It may have found the one that ends just then.
        Run::ploopfs().args(["umount", "--detach", text(&point)]).limit(60).run();
    }
}
