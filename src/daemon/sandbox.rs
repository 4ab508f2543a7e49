//! The daemon's sandbox (DESIGN.md 8): what the process gives up once its mount works, before its first thread, because
//! threads inherit it. An image that made it run foreign code would gain little: the images it serves anyway.
//!
//! Each part may be missing, in the kernel or by the user's choice; the mount then goes on with the others, and says so.
//! What the daemon may no longer do, the keeper does (unmounting, /proc) or the command line (loop devices, freezing).

mod calls;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use crate::fuse::mount::DEVICE;
use crate::fuse::session::Transport;
use crate::tree::Sandbox;

/// Which CPUs there are.
const CPUS: &str = "/sys/devices/system/cpu/online";

/// What a confined daemon may still reach.
#[derive(Clone, Copy, Debug)]
pub struct Borders<'a> {
    /// The images folder.
    pub images: &'a Path,
    /// The folder of log and socket, which lies under /run where the images folder cannot be written.
    pub own: BorrowedFd<'a>,
    /// Descriptors may name files anywhere: no border then.
    pub anywhere: bool,
    /// How requests arrive.
    pub transport: Transport,
    /// Host files are registered with the kernel, for passthrough.
    pub passthrough: bool,
}

/// Confines this process for good. To be called while it has one thread. Returns what is active, and one sentence for
/// each part that the system refused.
///
/// Order: (1) no new privileges, without which the kernel takes neither of the others from an ordinary user; (2)
/// Landlock, whose own calls are not on the list of (3) seccomp.
pub fn enter(borders: Borders<'_>) -> (Sandbox, Vec<String>) {
    let mut active = Sandbox::default();
    let mut missing = Vec::new();
    let mut part = |result: Result<(), String>, consequence: &str| {
        result.map_err(|why| missing.push(format!("sandbox: {why}: {consequence}"))).is_ok()
    };
    let no_new_privs = rustix::thread::set_no_new_privs(true);
    active.no_new_privs = part(
        no_new_privs.map_err(|e| format!("no_new_privs was refused ({e})")),
        "programs that the daemon were made to start could gain privileges",
    );
    if !borders.anywhere {
        active.landlock =
            part(restrict_files(borders), "the daemon can open files outside of the images folder");
    }
    active.seccomp = part(restrict_calls(borders), "the daemon can make any system call");
    (active, missing)
}

/// What may be done below the images folder. Devices, pipes, sockets and links are never made there, and nothing is
/// ever executed.
fn in_images() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeDir | RemoveFile | RemoveDir | Refer
    })
}

fn restrict_files(borders: Borders<'_>) -> Result<(), String> {
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
            .create()?
            .add_rule(PathBeneath::new(PathFd::new(borders.images)?, in_images()))?
            .add_rule(PathBeneath::new(borders.own, in_images()))?;
        let files = [
            // Each transport thread opens it for itself. An ordinary user may not even see it.
            (DEVICE, make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev})),
            // Where libc's malloc counts CPUs, to know how many arenas help.
            (CPUS, AccessFs::ReadFile.into()),
        ];
        for (file, access) in files {
            if let Ok(file) = PathFd::new(file) {
                rules = rules.add_rule(PathBeneath::new(file, access))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset)
    };
    match attempt() {
        Ok(RulesetStatus::NotEnforced) => {
            Err("Landlock is not to be had in this kernel (Linux 5.19, and `landlock` among its lsm=)".into())
        }
        Ok(_) => Ok(()),
        Err(e) => Err(format!("Landlock was refused ({e:#})")),
    }
}

fn restrict_calls(borders: Borders<'_>) -> Result<(), String> {
    let attempt = || -> anyhow::Result<()> {
        Ok(seccompiler::apply_filter(&calls::filter(borders.transport, borders.passthrough)?)?)
    };
    attempt().map_err(|e| format!("seccomp was refused ({e})"))
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
                images: &folder,
                own: own.as_fd(),
                anywhere,
                transport: Transport::Fuse,
                passthrough: false,
            });
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
}
