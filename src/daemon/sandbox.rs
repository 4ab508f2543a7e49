//! The daemon's sandbox (docs/threat-model.md#the-sandbox): what the process gives up once its mount works, before its
//! first thread, because threads inherit it. An image that made it run foreign code would gain little: the images it
//! serves anyway.
//!
//! Each part may be missing, in the kernel or by the user's choice; the mount then goes on with the others, and says so. A
//! daemon of root also gives up what it does not need of root's powers.
//! What the daemon may no longer do, the keeper does (unmounting, /proc) or the command line (loop devices, freezing).

mod calls;

use std::fmt;
use std::os::fd::BorrowedFd;

use anyhow::Context;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use crate::error::{Error, Kind};
use crate::fuse::session::Transport;
use crate::io::process;
use crate::tree::Sandbox;

/// Which CPUs there are.
const CPUS: &str = "/sys/devices/system/cpu/online";

/// What a confined daemon may still reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Borders<'a> {
    /// The images folder that is served: its path may mean another one by now.
    pub images: BorrowedFd<'a>,
    /// The folder of log and socket, which lies under /run where the images folder cannot be written.
    pub own: BorrowedFd<'a>,
    /// Descriptors may name files anywhere: no border around the folder then.
    pub anywhere: bool,
    /// How requests arrive.
    pub transport: Transport,
    /// Host files are registered with the kernel, for passthrough.
    pub passthrough: bool,
}

/// Confines this process for good. To be called while it has one thread. Returns what is active, and one sentence for
/// each part that this system does not have. What it has and could not give now (no descriptor was left) is an error: the
/// mount would go on for months without it.
///
/// Order: (1) no new privileges, without which the kernel takes neither Landlock nor seccomp from an ordinary user; (2)
/// Landlock; (3) the powers of root, of which (1) and (2) need none; (4) seccomp, which has none of their calls on its list.
pub(super) fn enter(borders: Borders<'_>) -> crate::Result<(Sandbox, Vec<String>)> {
    let mut active = Sandbox::default();
    let mut missing = Vec::new();
    let mut part = |result: Result<(), Refusal>, consequence: &str| match result {
        Ok(()) => Ok(true),
        Err(Refusal { why, lasting: true }) => {
            missing.push(format!("sandbox: {why}: {consequence}"));
            Ok(false)
        }
        Err(Refusal { why, lasting: false }) => {
            let what = format!("sandbox: {why}; try again, or mount with --no-sandbox");
            Err(Error::new(Kind::Io, what))
        }
    };
    let no_new_privs = rustix::thread::set_no_new_privs(true);
    active.no_new_privs = part(
        no_new_privs.map_err(|e| Refusal::lasting(format!("no_new_privs was refused ({e})"))),
        "programs that the daemon were made to start could gain privileges",
    )?;
    let walls = part(
        restrict_files(borders),
        match borders.anywhere {
            false => "the daemon can open files outside of the images folder",
            true => "the daemon can look into other processes of its user",
        },
    )?;
    active.landlock = walls && !borders.anywhere;
    part(
        process::keep_powers(powers(borders))
            .map(drop)
            .map_err(|e| Refusal::lasting(format!("giving up powers was refused ({e})"))),
        "the daemon keeps all that root may do",
    )?;
    active.seccomp = part(restrict_calls(borders), "the daemon can make any system call")?;
    Ok((active, missing))
}

/// A part of the sandbox that was not to be had.
struct Refusal {
    why: String,
    /// This system does not have it, now and later.
    lasting: bool,
}

impl Refusal {
    fn lasting(why: String) -> Refusal {
        Refusal { why, lasting: true }
    }

    /// EPERM: what a container answers to a call that it does not know. `lacking`: what a kernel answers that does not have it.
    fn of(what: &str, e: &anyhow::Error, lacking: &[i32]) -> Refusal {
        let errno = e.chain().find_map(|e| e.downcast_ref::<std::io::Error>()?.raw_os_error());
        let lacks = |errno: i32| {
            [libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM].contains(&errno) || lacking.contains(&errno)
        };
        Refusal { why: format!("{what} was refused ({e:#})"), lasting: errno.is_some_and(lacks) }
    }
}

/// What a daemon of root keeps: files of all owners are its to read, write, make and give to their owners. Locked memory, as
/// long as only that power goes beyond a limit; passthrough, which the kernel gives to no less.
fn powers(borders: Borders<'_>) -> CapabilitySet {
    let mut kept = CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER;
    if !process::may_lock_all() {
        kept |= CapabilitySet::IPC_LOCK;
    }
    if borders.passthrough {
        kept |= CapabilitySet::SYS_ADMIN;
    }
    kept
}

/// What may be done below the images folder. Devices, pipes, sockets and links are never made there, and nothing is
/// ever executed.
fn in_images() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeDir | RemoveFile | RemoveDir | Refer
    })
}

fn restrict_files(borders: Borders<'_>) -> Result<(), Refusal> {
    // What this knows of; kernels that know less restrict less.
    let abi = ABI::V6;
    let attempt = || -> anyhow::Result<RulesetStatus> {
        let mut rules = Ruleset::default()
            // Before Linux 5.19 nothing could move between two folders: no first snapshot, no clone. All or nothing.
            .set_compatibility(CompatLevel::SoftRequirement)
            .handle_access(AccessFs::Refer)?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        if borders.anywhere {
            // No border; but a process behind one looks into none outside, its keeper's memory for one.
            rules = rules.add_rule(PathBeneath::new(PathFd::new("/")?, in_images()))?;
        } else {
            rules = rules
                .add_rule(PathBeneath::new(borders.images, in_images()))?
                .add_rule(PathBeneath::new(borders.own, in_images()))?;
        }
        // Where libc's malloc counts CPUs, to know how many arenas help.
        match rustix::fs::open(CPUS, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => rules = rules.add_rule(PathBeneath::new(file, AccessFs::ReadFile))?,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
            Err(e) => Err(std::io::Error::from(e)).context(CPUS)?,
        }
        Ok(rules.restrict_self()?.ruleset)
    };
    match attempt() {
        Ok(RulesetStatus::NotEnforced) => {
            let why = "Landlock is not to be had in this kernel (Linux 5.19, and `landlock` among its lsm=)";
            Err(Refusal::lasting(why.to_owned()))
        }
        Ok(_) => Ok(()),
        Err(e) => Err(Refusal::of("Landlock", &e, &[])),
    }
}

fn restrict_calls(borders: Borders<'_>) -> Result<(), Refusal> {
    let attempt = || -> anyhow::Result<()> {
        Ok(seccompiler::apply_filter(&calls::filter(borders.transport, borders.passthrough)?)?)
    };
    // EINVAL: prctl of a kernel that was made without it. EACCES: without no_new_privs, and without root's powers.
    attempt().map_err(|e| Refusal::of("seccomp", &e, &[libc::EINVAL, libc::EACCES]))
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.no_new_privs, "no new privileges"),
            (self.landlock, "files of the images folder only (Landlock)"),
            (self.seccomp, "listed system calls only (seccomp)"),
        ];
        let active: Vec<&str> = parts.into_iter().filter_map(|(is, what)| is.then_some(what)).collect();
        if active.is_empty() { f.write_str("off") } else { f.write_str(&active.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::net::TcpStream;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    /// Set in a copy of the test program that runs one test alone: a sandbox has no way out.
    const ALONE: &str = "PLOOPFS_TEST_ALONE";

    /// In a copy of the test program, confined to a new folder: the folder, and what is active; None where this system
    /// has not all of it. In the original: runs the test `name` in such a copy, and None.
    fn confined(name: &str, anywhere: bool) -> Option<(std::path::PathBuf, Sandbox)> {
        if let Some(folder) = std::env::var_os(ALONE) {
            let folder = std::path::PathBuf::from(folder);
            let own = File::open(&folder).expect("the folder");
            let (active, missing) = enter(Borders {
                images: own.as_fd(),
                own: own.as_fd(),
                anywhere,
                transport: Transport::Fuse,
                passthrough: false,
            })
            .expect("confined, or not to be had");
            if missing.is_empty() {
                return Some((folder, active));
            }
            println!("SKIPPED {name}: {missing:?}");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let own = std::env::current_exe().expect("own path");
        let test = format!("daemon::sandbox::tests::{name}");
        let mut command = Command::new(own);
        command.args(["--exact", &test, "--test-threads=1", "--nocapture"]).env(ALONE, folder.path());
        let output = command.output().expect("run");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        said.lines().filter(|line| line.contains("SKIPPED")).for_each(|line| println!("{line}"));
        None
    }

    fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn a_confined_process_works_in_its_folder_and_opens_nothing_outside_of_it() {
        let name = "a_confined_process_works_in_its_folder_and_opens_nothing_outside_of_it";
        let Some((folder, active)) = confined(name, false) else { return };
        assert_eq!(active, Sandbox { no_new_privs: true, landlock: true, seccomp: true });
        fs::create_dir(folder.join("a")).expect("a folder");
        fs::write(folder.join("a/f"), "x").expect("a file");
        fs::hard_link(folder.join("a/f"), folder.join("g")).expect("a link into another folder");
        fs::rename(folder.join("g"), folder.join("a/g")).expect("a move");
        fs::remove_file(folder.join("a/f")).expect("a removal");
        assert_eq!(fs::read(folder.join("a/g")).expect("read"), b"x");
        assert_eq!(errno(File::open("/etc/passwd")), Some(libc::EACCES));
        assert!(
            errno(File::open("/dev/fuse")).is_some(),
            "each transport thread has its descriptor from before"
        );
        assert_eq!(errno(fs::read_dir("/")), Some(libc::EACCES));
        assert_eq!(errno(File::create("/tmp/ploopfs-outside")), Some(libc::EACCES));
        assert_eq!(errno(fs::hard_link("/etc/passwd", folder.join("p"))), Some(libc::EXDEV));
        assert_eq!(errno(std::os::unix::fs::symlink("x", folder.join("l"))), Some(libc::ENOSYS));
    }

    #[test]
    fn a_confined_process_starts_threads_and_no_programs_and_talks_to_no_network() {
        let name = "a_confined_process_starts_threads_and_no_programs_and_talks_to_no_network";
        let Some((_, active)) = confined(name, true) else { return };
        assert_eq!(active, Sandbox { no_new_privs: true, landlock: false, seccomp: true });
        File::open("/etc/passwd").expect("files may lie anywhere here");
        assert_eq!(std::thread::spawn(|| 7).join().expect("a thread"), 7);
        UnixStream::pair().expect("a pair of sockets");
        assert!(Command::new("/bin/true").spawn().is_err());
        assert_eq!(errno(TcpStream::connect("127.0.0.1:1")), Some(libc::ENOSYS));
        assert_eq!(errno(UnixStream::connect("/run/none")), Some(libc::ENOSYS));
        let unmounted = rustix::mount::unmount("/none", rustix::mount::UnmountFlags::empty());
        assert_eq!(unmounted, Err(rustix::io::Errno::NOSYS));
        let own = rustix::process::getpid();
        assert_eq!(
            rustix::process::kill_process(own, rustix::process::Signal::CONT),
            Err(rustix::io::Errno::NOSYS)
        );
    }

    #[test]
    fn a_confined_process_lends_nobody_its_powers() {
        use rustix::fs::{Mode, OFlags, fchmod, mkdirat, openat};
        let Some((folder, _)) = confined("a_confined_process_lends_nobody_its_powers", false) else { return };
        let dir = File::open(&folder).expect("the folder");
        let make = |name: &str, mode: u32| {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(&dir, name, flags, Mode::from_raw_mode(mode)).map(File::from)
        };
        let file = make("plain", 0o755).expect("a program like any");
        for mode in [0o4755, 0o2755, 0o6711] {
            assert_eq!(make("lent", mode).err(), Some(Errno::NOSYS), "{mode:o}");
            assert_eq!(fchmod(&file, Mode::from_raw_mode(mode)), Err(Errno::NOSYS), "{mode:o}");
            assert_eq!(mkdirat(&dir, "sub", Mode::from_raw_mode(mode)), Err(Errno::NOSYS), "{mode:o}");
        }
        fchmod(&file, Mode::from_raw_mode(0o644)).expect("a mode like any");
        mkdirat(&dir, "sub", Mode::from_raw_mode(0o755)).expect("a folder like any");
        let all = CapabilitySet::all();
        let more = rustix::thread::CapabilitySets { effective: all, permitted: all, inheritable: all };
        assert_eq!(rustix::thread::set_capabilities(None, more), Err(Errno::NOSYS));
    }

    #[test]
    fn a_confined_process_reaches_no_other_process_and_no_socket_by_its_name() {
        use std::os::unix::net::UnixDatagram;
        let name = "a_confined_process_reaches_no_other_process_and_no_socket_by_its_name";
        // The strange socket: made before, as one that was inherited.
        let stray = UnixDatagram::unbound().expect("a socket");
        let folder = tempfile::tempdir().expect("a folder");
        let heard = UnixDatagram::bind(folder.path().join("s")).expect("bound");
        let Some(_) = confined(name, true) else { return };
        let sent = stray.send_to(b"READY=1", folder.path().join("s"));
        assert_eq!(errno(sent), Some(libc::ENOSYS));
        drop(heard);
        assert_eq!(errno(UnixDatagram::pair()), Some(libc::ENOSYS));
        let (one, other) = UnixStream::pair().expect("a pair of connections");
        one.set_read_timeout(Some(std::time::Duration::from_secs(1))).expect("a timeout");
        rustix::net::send(&one, b"x", rustix::net::SendFlags::NOSIGNAL).expect("said on a connection");
        assert_eq!(rustix::net::sockopt::set_socket_broadcast(&other, true), Err(Errno::NOSYS));
        let parent = rustix::process::getppid().expect("the original");
        let memory = File::open(format!("/proc/{}/mem", parent.as_raw_nonzero()));
        assert_eq!(errno(memory), Some(libc::EACCES));
        assert!(inotify::Inotify::init().is_err());
        let file = File::open(folder.path()).expect("anywhere");
        let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
        rustix::fs::fcntl_lock(&file, shared).expect("locks are what it works with");
    }
}
