//! A start that goes wrong.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::host::temp_dir;
use super::run::{Run, until};
use super::text;

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// `ploopfs mount` of a new folder in the background, under strace, which does something to it. However the test ends,
/// nothing is left of it.
pub struct Traced {
    folder: tempfile::TempDir,
    child: Child,
}

impl Traced {
    /// Starts it with `args`; `tampering` is for strace.
    #[track_caller]
    pub fn start(tampering: &[&str], args: &[&str]) -> Traced {
        let mut command = Command::new("strace");
        command.args(["-D", "-f", "-qq", "-o", "/dev/null"]).args(tampering);
        Traced::run(command.arg(env!("CARGO_BIN_EXE_ploopfs")), args)
    }

    /// Starts it without strace.
    #[track_caller]
    pub fn plain(args: &[&str]) -> Traced {
        Traced::run(&mut Command::new(env!("CARGO_BIN_EXE_ploopfs")), args)
    }

    #[track_caller]
    fn run(command: &mut Command, args: &[&str]) -> Traced {
        let folder = temp_dir();
        command.args(["mount", "--create", "vm1=4M"]).args(args);
        command.args([folder.path().join("images"), folder.path().join("point")]);
        let said = std::fs::File::create(folder.path().join("said")).expect("a file");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn();
        Traced { folder, child: child.expect("started") }
    }

    /// The folder of images.
    pub fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    /// Where it is mounted.
    pub fn point(&self) -> PathBuf {
        self.folder.path().join("point")
    }

    /// A folder beside it, for what the test likes.
    pub fn beside(&self) -> PathBuf {
        self.folder.path().join("beside")
    }

    /// The command's process; with `-f` it is the keeper.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that serve it: keeper, daemon, standby.
    pub fn processes(&self) -> Vec<u32> {
        self.all("(keeper|daemon|standby)")
    }

    /// One of these.
    pub fn process(&self, what: &str) -> Option<u32> {
        self.all(what).first().copied()
    }

    fn all(&self, what: &str) -> Vec<u32> {
        let pattern = format!("ploopfs {what} {} ", text(&self.images()));
        let found = Run::new("pgrep").args(["-f", &pattern]).run().stdout;
        found.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// True while its folder is mounted, wherever.
    pub fn is_mounted(&self) -> bool {
        !self.mounts().is_empty()
    }

    fn mounts(&self) -> Vec<String> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("the table of mounts");
        let ours = format!(" - fuse.ploopfs {} ", text(&self.images()));
        let lines = table.lines().filter(|line| line.contains(&ours));
        lines.filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).collect()
    }

    /// Waits for the command: its status, and what it said.
    pub fn end(&mut self) -> (Option<i32>, String) {
        until(SOON * 2, || self.child.try_wait().is_ok_and(|status| status.is_some()));
        let said = std::fs::read_to_string(self.folder.path().join("said")).unwrap_or_default();
        (self.child.try_wait().ok().flatten().and_then(|status| status.code()), said)
    }

    /// Waits for a start that fails: when the command says so, nothing is mounted any more, and soon no process is left.
    /// Returns what it said.
    #[track_caller]
    pub fn fails(&mut self) -> String {
        let (status, said) = self.end();
        assert_eq!(status, Some(1), "{said}");
        assert!(!self.is_mounted(), "reported before it was taken away: {said}");
        assert!(until(SOON, || self.processes().is_empty()), "processes are left: {said}");
        said
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let gone = until(SOON, || {
            self.processes().into_iter().for_each(kill_if_there);
            self.processes().is_empty()
        });
        for point in self.mounts().into_iter().filter(|_| gone) {
            let _ = ploopfs::io::unmount::unmount(Path::new(&point), true);
        }
    }
}

/// SIGKILL, to what may have ended meanwhile.
pub fn kill_if_there(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
