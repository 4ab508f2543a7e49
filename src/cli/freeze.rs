//! `snapshot create --freeze`: the file systems that are mounted from an image through loop devices are frozen while
//! the snapshot is taken. A guard, a process of its own, does it, so that they thaw whatever becomes of the command.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::Outcome;
use crate::error::{Error, Kind, Result};
use crate::io::freeze::HostFileSystem;
use crate::io::loopdev::{self, LoopDevice};
use crate::io::process;

/// How long a guest waits at most (docs/design.md#live-operations). A snapshot takes milliseconds.
pub(crate) const LONGEST: Duration = Duration::from_secs(10);

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// For each file system the path of our caller's descriptor, and its mount point
    paths: Vec<PathBuf>,
}

/// The guard: freezes, says so, and thaws when its standard input ends (the command is done, or was killed) or after
/// ten seconds. Says "thawed" when it was asked in time, "late" when not.
pub fn guard(args: Args) -> anyhow::Result<Outcome> {
    let _ = process::name_this_thread("ploopfs/thaw");
    let mut say = std::io::stdout().lock();
    let mut held = HeldFileSystems(Vec::new());
    for pair in args.paths.chunks_exact(2) {
        let frozen = HostFileSystem::inherit(&pair[0], &pair[1]).and_then(|fs| fs.freeze().map(|()| fs));
        match frozen {
            Ok(fs) => held.0.push(fs),
            Err(e) => {
                writeln!(say, "{e}")?;
                return Ok(Outcome::Done);
            }
        }
    }
    let _ = writeln!(say, "frozen").and_then(|()| say.flush());
    let asked = input_ends_within(LONGEST);
    let mut in_time = asked;
    for fs in held.0.drain(..) {
        // Another program thawed it before us: then it was not frozen all the time.
        in_time &= fs.thaw().unwrap_or(false);
    }
    // The command may be gone.
    let _ = writeln!(say, "{}", if in_time { "thawed" } else { "late" });
    Ok(Outcome::Done)
}

/// Thaws what is frozen when the guard leaves early.
struct HeldFileSystems(Vec<HostFileSystem>);

impl Drop for HeldFileSystems {
    fn drop(&mut self) {
        for fs in self.0.drain(..) {
            let _ = fs.thaw();
        }
    }
}

fn input_ends_within(limit: Duration) -> bool {
    let input = std::io::stdin();
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let wait = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        // No program writes there: readable means that the other end is gone.
        let mut fds = [PollFd::new(&input, PollFlags::IN)];
        if poll(&mut fds, Some(&wait)).is_ok_and(|ready| ready > 0) {
            return true;
        }
    }
}

/// File systems that stay frozen until [`thaw`](FrozenFileSystems::thaw), the end of this process, or ten seconds are over.
#[derive(Debug)]
pub struct FrozenFileSystems {
    guard: Child,
    says: BufReader<ChildStdout>,
    /// Held open, so that they can be thawed should the guard be killed.
    file_systems: Vec<HostFileSystem>,
}

impl FrozenFileSystems {
    /// Freezes every file system that is mounted from one of `devices`.
    pub fn new(image: &Path, devices: &[LoopDevice]) -> Result<FrozenFileSystems> {
        let mut file_systems = Vec::new();
        for device in devices {
            let numbers = loopdev::numbers(device.number);
            for mounts in loopdev::mounted_on(device)? {
                let found = HostFileSystem::open(&mounts, &numbers).map_err(|e| nothing_done(&e))?;
                file_systems.push(found);
            }
        }
        if file_systems.is_empty() {
            let what = "no file system of it is mounted through a loop device here; --freeze is for those";
            return Err(Error::at(Kind::Invalid, image, what));
        }
        let failed = |e: &std::io::Error| Error::io(e, image, "cannot start the guard that thaws");
        let mut command = process::daemon_command("ploopfs");
        command.arg("thaw-guard");
        for one in &file_systems {
            command.arg(one.descriptor()).arg(one.point());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guard = command.spawn().map_err(|e| failed(&e))?;
        let out = guard.stdout.take().ok_or_else(|| failed(&std::io::ErrorKind::BrokenPipe.into()))?;
        let mut frozen = FrozenFileSystems { guard, says: BufReader::new(out), file_systems };
        match &*frozen.line() {
            "frozen" => Ok(frozen),
            "" => Err(Error::at(Kind::Io, image, "the guard that freezes and thaws died; nothing was done")),
            why => Err(nothing_done(&Error::new(Kind::Io, why))),
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        // A guard that is gone says nothing.
        let _ = self.says.read_line(&mut line);
        line.trim_end().to_owned()
    }

    /// Thaws. False: they were not frozen up to now.
    pub fn thaw(mut self) -> bool {
        drop(self.guard.stdin.take());
        self.line() == "thawed"
    }
}

impl Drop for FrozenFileSystems {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let ended = self.guard.wait();
        if ended.is_ok_and(|status| status.success()) {
            return;
        }
        // The guard was killed: then this is on us.
        for fs in &self.file_systems {
            let _ = fs.thaw();
        }
    }
}

fn nothing_done(why: &Error) -> Error {
    Error::new(why.kind(), format!("{why}; no snapshot was made"))
}
