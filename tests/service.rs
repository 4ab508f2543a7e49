//! ploopfs under a service manager: the notification socket, and the unit of contrib.

mod common;

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use common::{Loop, Mount, Run, find_program, loops_in, marked_in_use, sh, temp_dir, text, until};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// The unit of contrib.
fn unit() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd/ploopfs@.service");
    std::fs::read_to_string(file).expect("the unit")
}

/// The value of a setting in the unit.
fn setting(name: &str) -> String {
    let unit = unit();
    let value = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("the unit has no {name}=")).to_owned()
}

/// A folder with an image, a socket in place of the manager's, and what cleans up however the test ends.
struct Manager {
    socket: UnixDatagram,
    guard: Mount,
    folder: TempDir,
}

impl Manager {
    fn new() -> Manager {
        let folder = temp_dir();
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        Manager::listening(folder, socket)
    }

    fn listening(folder: TempDir, socket: UnixDatagram) -> Manager {
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        let images = folder.path().join("images");
        std::fs::create_dir(&images).expect("a folder");
        Run::ploopfs().args(["create", "--size", "64M"]).arg(images.join("vm1")).ok();
        let guard = Mount::adopt(&images, &folder.path().join("vdisks"));
        Manager { socket, guard, folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("notify")
    }

    /// `ploopfs mount --foreground`, told of the socket.
    fn start(&self, socket: &str) -> Child {
        self.start_with(socket, &[])
    }

    /// The same with more in its environment.
    fn start_with(&self, socket: &str, more: &[(&str, &str)]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.args(["mount", "--foreground"]).arg(self.guard.images()).arg(self.guard.point());
        command.envs(more.iter().copied());
        command.env("NOTIFY_SOCKET", socket).stdin(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the binary under test")
    }

    /// The next message.
    #[track_caller]
    fn hear(&self) -> String {
        let mut message = [0; 4096];
        let len = self.socket.recv(&mut message).expect("a message");
        String::from_utf8(message[..len].to_vec()).expect("UTF-8")
    }

    /// Nothing more was said.
    #[track_caller]
    fn hears_nothing(&self) {
        self.socket.set_nonblocking(true).expect("a socket");
        let more = self.socket.recv(&mut [0; 4096]);
        assert_eq!(more.err().map(|e| e.kind()), Some(ErrorKind::WouldBlock));
    }
}

fn terminate(child: &Child) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, Signal::TERM).expect("our own child");
}

#[track_caller]
fn ended(child: &mut Child) -> ExitStatus {
    let mut status = None;
    until(SOON, || {
        status = child.try_wait().expect("our own child");
        status.is_some()
    });
    status.expect("it goes on and on")
}

#[test]
fn a_mount_in_front_says_when_it_works_and_when_it_begins_to_end() {
    require!("fuse");
    let manager = Manager::new();
    let mut child = manager.start(text(&manager.path()));
    let message = manager.hear();
    assert!(message.lines().any(|line| line == "READY=1"), "{message}");
    assert!(message.contains(&format!("STATUS={}", text(manager.guard.images()))), "{message}");
    assert!(manager.guard.is_mounted(), "ready is said when the mount works");
    terminate(&child);
    let message = manager.hear();
    assert!(message.lines().any(|line| line == "STOPPING=1"), "{message}");
    // 60 s for the users of images, which is the default of --stop-timeout, and a minute to close.
    assert!(message.lines().any(|line| line == "EXTEND_TIMEOUT_USEC=120000000"), "{message}");
    assert!(ended(&mut child).success());
    manager.hears_nothing();
    assert!(!manager.guard.is_mounted() && !marked_in_use(&manager.guard.delta("vm1")));
}

#[test]
fn the_watchdog_hears_that_the_daemon_answers_and_nothing_once_it_is_stopped() {
    require!("fuse");
    let manager = Manager::new();
    let mut child = manager.start_with(text(&manager.path()), &[("WATCHDOG_USEC", "400000")]);
    assert!(manager.hear().starts_with("READY=1"));
    for _ in 0..3 {
        assert_eq!(manager.hear(), "WATCHDOG=1");
    }
    let daemon = manager.guard.pid();
    common::signal(daemon, Signal::STOP);
    // What was said before; the greeting of a stopped daemon takes ten seconds to be given up, so that silence is seen.
    manager.socket.set_read_timeout(Some(std::time::Duration::from_secs(2))).expect("a timeout");
    let silent = until(SOON, || manager.socket.recv(&mut [0; 4096]).is_err());
    common::signal(daemon, Signal::CONT);
    assert!(silent, "a stopped daemon is said to answer");
    terminate(&child);
    assert!(ended(&mut child).success());
}

/// A service manager that hears nothing kills the daemon, and with it all disks.
#[test]
fn the_watchdog_does_not_depend_on_the_folder_s_name_nor_on_clients() {
    require!("fuse");
    let manager = Manager::new();
    let mut child = manager.start_with(text(&manager.path()), &[("WATCHDOG_USEC", "400000")]);
    assert!(manager.hear().starts_with("READY=1"));
    let images = manager.guard.images();
    std::fs::rename(images, images.with_extension("renamed")).expect("renamed");
    // A few may be on their way.
    for _ in 0..8 {
        assert_eq!(manager.hear(), "WATCHDOG=1");
    }
    std::fs::rename(images.with_extension("renamed"), images).expect("renamed");
    terminate(&child);
    assert!(ended(&mut child).success());
}

#[test]
fn an_abstract_notification_socket_is_understood() {
    require!("fuse");
    let name = format!("ploopfs-test.{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let socket = UnixDatagram::bind_addr(&address).expect("a socket");
    let manager = Manager::listening(temp_dir(), socket);
    let mut child = manager.start(&format!("@{name}"));
    assert!(manager.hear().starts_with("READY=1"));
    terminate(&child);
    assert!(ended(&mut child).success());
}

#[test]
fn a_mount_that_cannot_be_had_is_never_called_ready() {
    let manager = Manager::new();
    std::fs::write(manager.guard.point(), "no folder").expect("a file in the way");
    let mut child = manager.start(text(&manager.path()));
    assert!(!ended(&mut child).success());
    manager.hears_nothing();
}

#[test]
fn a_mount_in_the_background_leaves_the_socket_of_who_called_it_alone() {
    require!("fuse");
    let mut manager = Manager::new();
    let socket = text(&manager.path()).to_owned();
    let mount = Run::ploopfs().arg("mount").arg(manager.guard.images()).arg(manager.guard.point());
    mount.env("NOTIFY_SOCKET", &socket).ok();
    manager.guard.umount();
    manager.hears_nothing();
}

/// The unit's own lines, with the powers that the unit leaves; what cannot be had here is a running systemd.
#[test]
fn the_lines_of_the_unit_start_a_mount_and_stop_it_with_its_loop_devices() {
    require!("fuse", "loop");
    let manager = Manager::new();
    let powers = setting("CapabilityBoundingSet").to_lowercase().replace("cap_", "+").replace(' ', ",");
    let line = |name: &str| setting(name).replace("/usr/bin/ploopfs", env!("CARGO_BIN_EXE_ploopfs"));
    let (start, stop) = (line("ExecStart"), line("ExecStop"));
    let with_powers = |line: &str| {
        let words = format!("exec setpriv --no-new-privs --bounding-set=-all,{powers} {line}");
        let mut command = Command::new("bash");
        command.args(["-c", &words]).env("NOTIFY_SOCKET", manager.path());
        command.env("IMAGES", manager.guard.images()).env("MOUNTPOINT", manager.guard.point());
        command.env("OPTIONS", "--create vm2=32M --bat-delay 10").stdin(Stdio::null());
        command.spawn().expect("bash")
    };
    let mut child = with_powers(&start);
    assert!(manager.hear().starts_with("READY=1"));
    let device = Loop::attach(&manager.guard.flat("vm2"), true);
    sh(&format!("echo written > {}", text(device.device())));
    assert!(ended(&mut with_powers(&stop)).success());
    assert!(ended(&mut child).success());
    assert!(!manager.guard.is_mounted() && loops_in(manager.guard.point()).is_empty());
    assert!(!marked_in_use(&manager.guard.delta("vm2")));
    assert_eq!(std::fs::read(manager.guard.delta("vm2")).map(|file| file.len() > 1 << 20).ok(), Some(true));
}

#[test]
fn systemd_finds_no_fault_with_the_unit() {
    let name = "systemd_finds_no_fault_with_the_unit";
    if find_program("systemd-analyze").is_none() {
        return println!("SKIPPED {name}: systemd-analyze is not installed");
    }
    let folder = temp_dir();
    let file = folder.path().join("ploopfs@vms.service");
    let unit = unit().replace("/usr/bin/ploopfs", env!("CARGO_BIN_EXE_ploopfs"));
    let verify = |unit: &str| {
        std::fs::write(&file, unit).expect("a unit");
        Run::new("systemd-analyze").args(["verify", "--man=no", text(&file)]).limit(60).run()
    };
    let done = verify(&unit);
    assert!(done.success(), "{done}");
    let about_us = |done: &str| done.lines().any(|line| line.contains("ploopfs"));
    assert!(!about_us(&done.stderr), "{done}");
    // What it would look like.
    let bad = verify(&unit.replace("KillMode=mixed", "KillMode=gently"));
    assert!(about_us(&bad.stderr), "{bad}");
}

#[test]
fn the_unit_keeps_the_mount_where_everybody_sees_it() {
    // Each of these gives the service a mount or user namespace of its own (systemd.exec(5)).
    let private = [
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateUsers",
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
        "ProcSubset",
        "ProtectHostname",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "BindPaths",
        "TemporaryFileSystem",
        "RootDirectory",
        "RootImage",
        "DynamicUser",
        "NoExecPaths",
        "MountFlags",
        "PrivateIPC",
    ];
    for line in unit().lines() {
        let name = line.split('=').next().unwrap_or_default();
        assert!(!private.contains(&name), "{line}");
    }
}
