//! Ends of a mount that something keeps, covers or stops: nothing is taken away before that is named, and no wait is
//! without a word or without a limit.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Finished, Guest, Loop, Mount, Run, Traced, kill_if_there, ok, signal, temp_dir, text, until};
use rustix::process::Signal;

/// How long an end may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

fn umount(mount: &Mount) -> Run {
    Run::ploopfs().arg("umount").arg(mount.point()).limit(60)
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// A field of /proc/PID/status.
fn field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    value.trim_start_matches(':').trim().to_owned()
}

fn keeper_of(pid: u32) -> u32 {
    field(pid, "PPid").parse().expect("a parent")
}

/// How many mounts of ours the folder has in our table.
fn mounts_of(mount: &Mount) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the table");
    let ours = format!(" - fuse.ploopfs {} ", text(mount.images()));
    table.lines().filter(|line| line.contains(&ours)).count()
}

/// A process in a mount namespace of its own, which keeps a copy of one mount; those of other tests are let go.
struct Namespace(Child);

/// Ends as `sleep`, with one mount of ploopfs left.
const KEEP_ONE: &str = r#"
awk '/ - fuse\.ploopfs / {print $5}' /proc/self/mountinfo | while read -r point; do
    [ "$point" = "$0" ] || umount -l "$point"
done
exec sleep 100"#;

impl Namespace {
    fn with(mount: &Mount) -> Namespace {
        let mut command = Command::new("unshare");
        let script = ["-m", "--propagation", "private", "sh", "-c", KEEP_ONE, text(mount.point())];
        let child = command.args(script).stdin(Stdio::null()).spawn().expect("unshare");
        let name = || fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap_or_default();
        assert!(until(SOON, || name().trim() == "sleep"));
        Namespace(child)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// A stopped process, which goes on at the end.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Stopped {
        signal(pid, Signal::STOP);
        assert!(until(SOON, || field(pid, "State").starts_with('T')));
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if is_alive(self.0) {
            signal(self.0, Signal::CONT);
        }
    }
}

fn bind(mount: &Mount, to: &Path) -> Guest {
    ok("mount", &["--bind", text(mount.point()), text(to)]);
    Guest::adopt(to)
}

fn names(done: &Finished, what: &str) {
    assert!(done.stderr.contains(what), "{what} is not named: {done}");
}

#[test]
fn umount_does_not_wait_for_a_bind_mount_but_names_it_and_changes_nothing() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let folder = temp_dir();
    let bound = bind(&mount, folder.path());
    let refused = umount(&mount).status(4);
    names(&refused, &format!("umount {}", text(folder.path())));
    assert!(mount.is_mounted() && mount.flat("vm1").exists());
    bound.umount();
    mount.umount();
}

#[test]
fn a_detached_mount_with_a_bind_mount_is_no_circle_of_advice() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let folder = temp_dir();
    let bound = bind(&mount, folder.path());
    let detached = umount(&mount).arg("--detach").status(0);
    names(&detached, "goes on");
    names(&detached, text(folder.path()));
    assert!(is_alive(pid) && !mount.is_mounted());
    let again = umount(&mount).status(4);
    names(&again, &format!("umount {}", text(folder.path())));
    names(&again, &format!("kill {pid}"));
    let refused = mount.try_start();
    assert_eq!(refused.code(), Some(4), "{refused}");
    names(&refused, text(folder.path()));
    assert!(!refused.stderr.contains(&format!("ploopfs umount {}", text(mount.point()))), "{refused}");
    bound.umount();
    assert!(until(SOON, || !is_alive(pid)), "the daemon goes on after the last mount of it");
    umount(&mount).status(0);
    mount.start();
    mount.umount();
}

#[test]
fn umount_names_the_process_whose_mount_namespace_keeps_the_mount() {
    require!("fuse", "loop");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let namespace = Namespace::with(&mount);
    let refused = umount(&mount).status(4);
    names(&refused, &format!("pid {}", namespace.pid()));
    assert!(mount.is_mounted() && mount.flat("vm1").exists());
    drop(namespace);
    assert!(until(SOON, || umount(&mount).run().success()), "after the namespace is gone");
    assert!(!mount.is_mounted());
    mount.start();
    mount.umount();
}

#[test]
fn umount_names_an_overlay_that_takes_files_from_the_mount() {
    require!("fuse", "loop", "overlay");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let (point, lower) = (temp_dir(), temp_dir());
    let options = format!("lowerdir={}:{}", text(mount.point()), text(lower.path()));
    let done = Run::new("mount").args(["-t", "overlay", "none", "-o", &options, text(point.path())]).run();
    if !done.success() {
        println!("SKIPPED: this kernel has no overlay over FUSE: {done}");
        return;
    }
    let overlay = Guest::adopt(point.path());
    let refused = umount(&mount).status(4);
    names(&refused, &format!("umount {}", text(point.path())));
    overlay.umount();
    mount.umount();
}

#[test]
fn umount_does_not_wait_for_a_stopped_keeper_or_daemon_but_names_it() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let daemon = mount.pid();
    for pid in [keeper_of(daemon), daemon] {
        let stopped = Stopped::new(pid);
        let refused = umount(&mount).limit(20).status(4);
        names(&refused, &format!("kill -CONT {pid}"));
        assert!(mount.is_mounted());
        drop(stopped);
    }
    mount.umount();
}

/// Other commands that look at open files hold the mount for a moment, too, and are not seen with it.
#[test]
fn umount_waits_a_moment_for_a_user_that_cannot_be_seen() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let file = fs::File::open(mount.flat("vm1")).expect("opened");
    // A file that a ring keeps is in no process's list of descriptors.
    let ring = io_uring::IoUring::new(2).expect("a ring");
    ring.submitter().register_files(&[std::os::fd::AsRawFd::as_raw_fd(&file)]).expect("registered");
    drop(file);
    let last = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(ring);
    });
    let done = umount(&mount).run();
    last.join().expect("the ring's end");
    assert!(done.success(), "{done}");
    assert!(!mount.is_mounted());
    mount.umount();
}

#[test]
fn a_moved_mount_is_found_where_it_is() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let folder = temp_dir();
    ok("mount", &["--move", text(mount.point()), text(folder.path())]);
    let moved = Guest::adopt(folder.path());
    let old = umount(&mount).status(4);
    names(&old, text(folder.path()));
    Run::ploopfs().arg("umount").arg(folder.path()).limit(60).status(0);
    assert!(!is_alive(pid) && mounts_of(&mount) == 0);
    drop(moved);
}

#[test]
fn sigterm_after_a_move_leaves_no_dead_mount() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    let folder = temp_dir();
    ok("mount", &["--move", text(mount.point()), text(folder.path())]);
    let _moved = Guest::adopt(folder.path());
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid) && mounts_of(&mount) == 0));
}

#[test]
fn sigterm_below_another_mount_leaves_no_dead_mount_once_that_is_gone() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    ok("mount", &["-t", "tmpfs", "none", text(mount.point())]);
    let over = Guest::adopt(mount.point());
    let refused = umount(&mount).status(4);
    names(&refused, "lies over");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid)));
    over.umount();
    assert!(until(SOON, || mounts_of(&mount) == 0), "the dead mount stays");
}

/// A confined daemon may not unmount: that is in tests/sandbox.rs.
#[test]
fn sigterm_without_a_keeper_takes_its_own_mount_away_and_nothing_else() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=64M", "--no-sandbox"]);
    let pid = mount.pid();
    let log = || fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default();
    signal(keeper_of(pid), Signal::KILL);
    assert!(until(SOON, || log().contains("keeper process is gone")));
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid) && mounts_of(&mount) == 0), "{}", log());
}

fn log_of(mount: &Mount) -> String {
    fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default()
}

/// A mount whose keeper was killed, and its daemon has noticed.
fn without_keeper() -> (Mount, u32) {
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let pid = mount.pid();
    signal(keeper_of(pid), Signal::KILL);
    assert!(until(SOON, || log_of(&mount).contains("keeper process is gone")));
    (mount, pid)
}

#[test]
fn a_daemon_that_is_killed_after_its_keeper_leaves_no_dead_mount_and_the_log_names_what_hangs_on_it() {
    require!("fuse", "loop");
    let (mount, pid) = without_keeper();
    let device = Loop::attach(&mount.flat("vm1"), true);
    signal(pid, Signal::KILL);
    assert!(until(SOON, || mounts_of(&mount) == 0), "a dead mount is left");
    let hanging = format!("ploopfs detach {}", text(device.device()));
    assert!(until(SOON, || log_of(&mount).contains(&hanging)), "{}", log_of(&mount));
    Run::ploopfs().args(["detach", text(device.device())]).ok();
}

#[test]
fn a_killed_keeper_ends_no_disk_that_is_in_use_and_a_forced_stop_leaves_no_dead_mount() {
    use std::os::unix::fs::FileExt;
    require!("fuse");
    let (mount, pid) = without_keeper();
    let open = mount.open("vm1");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || log_of(&mount).contains("still open: vm1")), "{}", log_of(&mount));
    open.write_all_at(b"still served", 0).expect("served to the end");
    open.sync_all().expect("served to the end");
    signal(pid, Signal::TERM);
    assert!(until(SOON, || !is_alive(pid) && mounts_of(&mount) == 0), "{}", log_of(&mount));
    open.write_all_at(b"x", 0).expect_err("its disk is gone");
}

/// As an ordinary user, whose mounts are made and taken away by fusermount3, in a mount namespace of its own.
#[test]
fn sigterm_without_a_keeper_leaves_no_dead_mount_of_an_ordinary_user() {
    require!("fuse");
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/fusermount3").exists() {
        println!("SKIPPED: needs root (to become nobody) and fusermount3");
        return;
    }
    let folder = temp_dir();
    let here = text(folder.path());
    let done = Run::new("unshare")
        .args(["--mount", "bash", "-euxc"])
        .arg(format!(
            "cp {program} {here}/ploopfs; chmod 755 {here} {here}/ploopfs; mkdir -m 777 {here}/own
             mknod {here}/fuse c 10 229; chmod 666 {here}/fuse; mount --bind {here}/fuse /dev/fuse
             runuser -u nobody -- {here}/ploopfs mount --create vm1=64M {here}/own/i {here}/own/m
             daemon=$(pgrep -f 'ploopfs [d]aemon {here}/')
             kill -KILL $(awk '/^PPid/ {{print $2}}' /proc/$daemon/status)
             for i in $(seq 300); do grep -q 'keeper process is gone' {here}/own/i/.ploopfs/log && break; sleep .1; done
             kill -TERM $daemon
             for i in $(seq 300); do pgrep -f 'ploopfs [ds](aemon|tandby) {here}/' >/dev/null || break; sleep .1; done
             grep -c ' {here}/own/m ' /proc/self/mountinfo || true",
            program = env!("CARGO_BIN_EXE_ploopfs"),
        ))
        .limit(90)
        .run();
    let left = Run::new("pgrep").args(["-f", &format!("ploopfs (keeper|daemon|standby) {here}/")]).run();
    left.stdout.lines().filter_map(|pid| pid.parse().ok()).for_each(kill_if_there);
    assert!(done.success() && left.stdout.is_empty(), "{done}");
    assert_eq!(done.stdout, "0\n", "a dead mount is left: {done}");
}

#[test]
fn umount_without_a_keeper_returns_when_all_processes_have_ended() {
    require!("fuse");
    let (mut mount, _) = without_keeper();
    // Which looks for processes itself.
    mount.umount();
}

#[test]
fn the_processes_of_a_mount_keep_no_descriptor_of_its_connection_but_the_daemon() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let has = |pid: u32| {
        let all = fs::read_dir(format!("/proc/{pid}/fd")).expect("a living process").flatten();
        all.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|file| file == Path::new("/dev/fuse"))
    };
    let standby = format!("ploopfs standby {} ", text(mount.images()));
    let standby = Run::new("pgrep").args(["-f", &standby]).ok();
    let standby = standby.trim().parse().expect("one standby");
    let pid = mount.pid();
    assert!(has(pid));
    assert!(until(SOON, || !has(keeper_of(pid)) && !has(standby)));
    // Who waits for an answer gets an error when the daemon dies, even if its keeper does nothing just then.
    let stopped = (Stopped::new(keeper_of(pid)), Stopped::new(standby));
    let open = mount.open("vm1");
    signal(pid, Signal::KILL);
    let mut byte = [0];
    let began = Instant::now();
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut byte, 0).expect_err("a dead mount");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(stopped);
    assert!(until(SOON, || mounts_of(&mount) == 0), "a dead mount is left");
    drop(open);
    mount.start();
    mount.umount();
}

/// What strace does to a start: after the mount, when the daemon confines itself.
fn when_confined(inject: &str) -> [String; 4] {
    let inject = format!("inject=landlock_create_ruleset:{inject}");
    ["-e".to_owned(), "trace=landlock_create_ruleset".to_owned(), "-e".to_owned(), inject]
}

fn traced(tampering: &[String], args: &[&str]) -> Traced {
    Traced::start(&tampering.iter().map(String::as_str).collect::<Vec<_>>(), args)
}

#[test]
fn a_start_in_front_whose_keeper_is_killed_leaves_no_dead_mount() {
    require!("fuse", "landlock", "strace");
    let mut mount = traced(&when_confined("delay_enter=2s"), &["-f"]);
    assert!(until(SOON, || mount.is_mounted()), "not mounted");
    // In front it is the command itself.
    signal(mount.pid(), Signal::KILL);
    let (_, said) = mount.end();
    assert!(until(SOON, || !mount.is_mounted()), "a dead mount is left: {said}");
    assert!(until(SOON, || mount.processes().is_empty()));
}

#[test]
fn a_failed_start_takes_its_mount_away_wherever_it_was_moved() {
    require!("fuse", "landlock", "strace");
    // The first call only asks for the version.
    let mut mount = traced(&when_confined("error=EMFILE:delay_enter=2s:when=2+"), &[]);
    assert!(until(SOON, || mount.is_mounted()), "not mounted");
    fs::create_dir(mount.beside()).expect("a folder");
    let moved = Run::new("mount").args(["--move", text(&mount.point()), text(&mount.beside())]).run();
    let said = mount.fails();
    assert!(moved.success(), "{moved} {said}");
}

#[test]
fn a_mount_that_is_moved_before_its_keeper_has_seen_it_is_found() {
    require!("fuse", "landlock", "strace");
    // Once mounted, all that keeper and daemon do waits.
    let inject = "inject=mount:delay_exit=2s";
    let tampering = ["-e", "trace=mount,landlock_create_ruleset", "-e", inject];
    let fails = ["-e", "inject=landlock_create_ruleset:error=EMFILE:when=2+"];
    let mut mount = Traced::start(&[&tampering[..], &fails[..]].concat(), &[]);
    assert!(until(SOON, || mount.is_mounted()), "not mounted");
    fs::create_dir(mount.beside()).expect("a folder");
    let moved = Run::new("mount").args(["--move", text(&mount.point()), text(&mount.beside())]).run();
    let said = mount.fails();
    assert!(moved.success(), "{moved} {said}");
    assert!(said.contains("sandbox"), "it goes on to what fails: {said}");
}

#[test]
fn a_handshake_that_fails_leaves_no_mount() {
    require!("fuse", "strace");
    // /dev/fuse is read by the daemon alone, and INIT is the first that it reads.
    let tampering = ["-P", "/dev/fuse", "-e", "trace=read,io_uring_enter", "-e", "inject=read:error=EIO"];
    let mut mount = Traced::start(&tampering, &["--transport", "fuse"]);
    let said = mount.fails();
    assert!(said.contains("handshake"), "{said}");
}

#[test]
fn a_folder_that_cannot_be_mounted_on_is_named_as_before_and_nothing_is_left() {
    require!("fuse", "strace");
    let mut mount = Traced::start(&["-e", "trace=mount", "-e", "inject=mount:error=EPERM"], &[]);
    let said = mount.fails();
    assert!(said.contains("cannot mount here") && said.contains(text(&mount.point())), "{said}");
}

/// Daemon or keeper are killed before the mount is made, before it is served, and after the start, which strace makes longer.
#[test]
fn a_start_that_is_killed_at_any_moment_leaves_no_mount_and_no_process() {
    require!("fuse", "landlock", "strace");
    let mut failed = 0;
    for round in 0..20 {
        let what = ["daemon", "keeper"][round % 2];
        // Twice so long, once the mount is made.
        let [what_is_traced @ .., inject] = when_confined("delay_enter=100ms");
        let mut mount = traced(&[&what_is_traced[..], &[inject, "--seccomp-bpf".to_owned()]].concat(), &[]);
        let mut victim = None;
        assert!(until(SOON, || {
            victim = mount.process(what);
            victim.is_some()
        }));
        std::thread::sleep(Duration::from_millis(round as u64 / 2 * 30));
        victim.into_iter().for_each(kill_if_there);
        let (status, said) = mount.end();
        failed += u32::from(status != Some(0));
        // A keeper that is killed after the start does not take the mount with it.
        let lives = status == Some(0) && what == "keeper";
        if lives {
            // Killed, it may be held by strace for a moment.
            let umount = || Run::ploopfs().arg("umount").arg(mount.point()).limit(60).run();
            assert!(until(SOON, || umount().success()), "{}", umount());
        }
        let clean = || !mount.is_mounted() && mount.processes().is_empty();
        assert!(until(SOON, clean), "round {round}, {what}: a dead mount or a process is left: {said}");
    }
    assert!(failed > 0, "each start was over before the kill");
}

#[test]
fn of_two_mounts_at_once_the_slower_says_that_it_is_mounted_already() {
    require!("fuse");
    let folder = temp_dir();
    let mut mount = Mount::prepare(&folder.path().join("images"), &[]);
    fs::create_dir_all(mount.images()).expect("a folder");
    let start = || Run::ploopfs().arg("mount").args([mount.images(), mount.point()]).limit(60).run();
    let all: Vec<Finished> = std::thread::scope(|scope| {
        let each: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        each.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    for done in &all {
        assert!(done.success(), "{done}");
    }
    let first = all.iter().filter(|done| !done.stdout.contains("already mounted")).count();
    assert_eq!((first, mounts_of(&mount)), (1, 1));
    // Takes it over for the end.
    mount.start();
    mount.umount();
}

#[cfg(feature = "faults")]
#[test]
fn a_forced_end_does_not_wait_for_a_host_that_hangs() {
    use std::os::unix::fs::FileExt;
    require!("fuse");
    let folder = temp_dir();
    let hangs = folder.path().join("hangs");
    let fault = format!("delay=sync:600000,trigger={}", text(&hangs));
    let mount = Mount::new(&["--create", "vm1=64M", "--no-sandbox", "--fault", &fault]);
    let pid = mount.pid();
    let open = mount.open("vm1");
    open.write_all_at(b"not synced", 0).expect("written");
    fs::write(&hangs, "").expect("the trigger");
    let log = || fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default();
    // The first begins the end, the second forces it, the third gives up what hangs. Signals of one kind that come
    // together are one.
    signal(pid, Signal::TERM);
    assert!(until(SOON, || log().contains("ending")));
    signal(pid, Signal::TERM);
    assert!(until(SOON, || log().contains("again: closing images")), "{}", log());
    assert!(until(SOON, || {
        // It may be gone already.
        let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
        let _ = rustix::process::kill_process(number, Signal::TERM);
        std::thread::sleep(Duration::from_millis(200));
        !is_alive(pid)
    }));
    assert!(log().contains("cannot be closed"), "{}", log());
    assert!(until(SOON, || mounts_of(&mount) == 0), "a dead mount is left");
    drop(open);
}

#[test]
fn umount_waits_for_a_daemon_that_cannot_be_asked() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=8M"]);
    let daemon = mount.pid();
    let keeper = keeper_of(daemon);
    fs::remove_dir_all(mount.images()).expect("removed");
    let stopped = Stopped::new(keeper);
    // A stopped keeper is named before anything is done.
    let refused = umount(&mount).status(4);
    names(&refused, &format!("kill -CONT {keeper}"));
    drop(stopped);
    let done = umount(&mount).status(1);
    names(&done, "its daemon has ended");
    assert!(!is_alive(daemon) && !is_alive(keeper), "{done}");
}

#[test]
fn a_stopped_keeper_that_reads_nothing_does_not_keep_the_daemon_from_ending() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=8M", "--stop-timeout", "1"]);
    let daemon = mount.pid();
    let keeper = keeper_of(daemon);
    let _stopped = Stopped::new(keeper);
    // As many notes as the line holds.
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
    let line = rustix::fs::open(format!("/proc/{daemon}/fd/1"), flags, rustix::fs::Mode::empty());
    let line = line.expect("the daemon's line to its keeper");
    for note in [&[b'\n'; 4096][..], b"\n"] {
        while rustix::io::write(&line, note).is_ok() {}
    }
    signal(daemon, Signal::TERM);
    assert!(until(Duration::from_secs(60), || !is_alive(daemon)), "it waits for its keeper for ever");
    assert!(
        until(SOON, || mounts_of(&mount) == 0),
        "it leaves a dead mount as long as its keeper is stopped"
    );
}

#[test]
fn of_many_umounts_at_once_none_is_refused() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=8M"]);
    for _ in 0..5 {
        let end = || umount(&mount).run();
        let all: Vec<Finished> = std::thread::scope(|scope| {
            let each: Vec<_> = (0..8).map(|_| scope.spawn(end)).collect();
            each.into_iter().map(|one| one.join().expect("no panic")).collect()
        });
        for done in &all {
            assert!(done.success(), "{done}");
        }
        mount.start();
    }
    mount.umount();
}
