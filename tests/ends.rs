//! Ends of a mount that something keeps, covers or stops: nothing is taken away before that is named, and no wait is
//! without a word or without a limit.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Finished, Guest, Mount, Run, ok, signal, temp_dir, text, until};
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

/// A confined daemon may not unmount; what it leaves is in tests/sandbox.rs.
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
