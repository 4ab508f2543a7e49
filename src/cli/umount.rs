//! `ploopfs umount`.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cli::{Outcome, out, served};
use crate::control::client::{Client, Waiting};
use crate::control::protocol::Closed;
use crate::daemon::mounts::Mount;
use crate::daemon::{holders, mounts};
use crate::error::{Error, Kind, Result};
use crate::io::loopdev;
use crate::io::unmount::unmount;
use crate::words::quoted;

/// How long the kernel may take to let go of a loop device that nobody uses: udev may be looking at it.
const LET_GO: Duration = Duration::from_secs(5);

/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the images are shown
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
    /// Detach idle loop devices first, and take the mount point away even while files are open
    ///
    /// With nothing open any more it returns when every image is closed, as without it. Else the daemon goes on until
    /// the last file is closed, and who has it open is said.
    #[arg(long)]
    detach: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let point = mounts::resolve(&args.mountpoint)?;
    let Some(mount) = mounts::at(&point)? else { return not_mounted(&point) };
    if !mount.is_ours() {
        let what = format!("is a mount of type {}, not of ploopfs; use umount", mount.kind.display());
        return Err(Error::at(Kind::Invalid, &point, what).into());
    }
    // Before the unmount: afterwards the socket may be gone. A daemon that does not answer is unmounted all the same.
    let daemon = match served::has_died(&mount) {
        Ok(true) => return take_dead_away(&mount),
        Ok(false) => Client::find(&mount.source).ok().flatten().map(Daemon::new).transpose()?,
        Err(e) => {
            say(&e.to_string());
            None
        }
    };
    if args.detach {
        detach_idle_loops(&point);
    }
    let mut open = Vec::new();
    match unmount(&point, false) {
        Err(e) if e.kind() == Kind::Busy && args.detach => {
            // Before the name goes: afterwards nobody can tell who uses it.
            open = holders::of(&mount);
            unmount(&point, true)?;
        }
        Err(e) if e.kind() == Kind::Busy => return Err(busy(&mount).into()),
        result => result?,
    }
    if !open.is_empty() {
        let who: Vec<String> = open.iter().map(ToString::to_string).collect();
        let pid =
            daemon.map_or_else(|| "the daemon".to_owned(), |d| format!("the daemon (process {})", d.pid));
        say(&format!("{}: detached; {pid} goes on until this ends: {}", point.display(), who.join(", ")));
        return Ok(Outcome::Done);
    }
    match daemon {
        Some(daemon) => daemon.end(&point),
        None => {
            // No success: a script that goes on to copy the images would copy them in the middle of something.
            let what = "unmounted, but its daemon did not answer and may still be closing images";
            Err(Error::at(Kind::Io, &point, what).into())
        }
    }
}

/// Takes away the loop devices that nobody uses. One that is mounted, or open, is said with the others that hold on.
fn detach_idle_loops(point: &Path) {
    for device in holders::loops_below(point) {
        if let Err(e) = loopdev::detach(&device.dev, LET_GO) {
            say(&e.to_string());
        }
    }
}

fn not_mounted(point: &Path) -> anyhow::Result<Outcome> {
    if let Err(e) = point.symlink_metadata() {
        return Err(Error::io(&e, point, "no such mount point").into());
    }
    say(&format!("{}: not mounted", point.display()));
    Ok(Outcome::Done)
}

fn take_dead_away(mount: &Mount) -> anyhow::Result<Outcome> {
    let hanging = holders::of(mount);
    unmount(&mount.point, true)?;
    say(&format!("{}: its daemon had died; unmounted", mount.point.display()));
    for holder in hanging {
        say(&format!("still hanging on the dead mount: {holder}; end it with: {}", holder.remedy()));
    }
    Ok(Outcome::Done)
}

/// EBUSY, with who it is and how to end it.
fn busy(mount: &Mount) -> Error {
    let point = quoted(&mount.point);
    let found = holders::of(mount);
    if found.is_empty() {
        let what = format!(
            "is busy, but who uses it cannot be seen; or take it away with: ploopfs umount --detach {point}"
        );
        return Error::at(Kind::InUse, &mount.point, what);
    }
    let mut what = "is busy:".to_owned();
    for holder in found {
        what += &format!("\n  {holder}; end it with: {}", holder.remedy());
    }
    Error::at(
        Kind::InUse,
        &mount.point,
        what + &format!("\nor take it away with: ploopfs umount --detach {point}"),
    )
}

/// The daemon behind a mount, asked to tell its end.
struct Daemon {
    pid: u32,
    waiting: Waiting,
    /// Daemon and keeper, held so that their numbers cannot become someone else's.
    processes: Vec<OwnedFd>,
}

impl Daemon {
    fn new(client: Client) -> Result<Daemon> {
        let hello = client.hello();
        let pid = hello.pid;
        let handle = |pid: u32| {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
            pidfd_open(pid, PidfdFlags::empty()).ok()
        };
        let processes = [hello.pid, hello.keeper].into_iter().filter_map(handle).collect();
        Ok(Daemon { pid, waiting: client.wait()?, processes })
    }

    /// Waits until the images are closed and the processes gone, so that what follows finds them clean.
    fn end(self, point: &Path) -> anyhow::Result<Outcome> {
        let closed = self.waiting.end()?;
        for process in &self.processes {
            let mut fds = [PollFd::new(process, PollFlags::IN)];
            while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
        }
        let Some(closed) = closed else {
            let what =
                "unmounted, but the daemon died while closing its images; `ploopfs check` says how they are";
            return Err(Error::at(Kind::Io, point, what).into());
        };
        let failed = |image: Closed| image.error.map(|why| format!("\n  {}: {why}", image.name));
        let failed: String = closed.into_iter().filter_map(failed).collect();
        if failed.is_empty() {
            return Ok(Outcome::Done);
        }
        Err(Error::at(Kind::Io, point, format!("unmounted, but not every image was closed cleanly:{failed}"))
            .into())
    }
}

fn say(line: &str) {
    // Nobody is left to hear it where stderr is closed.
    let _ = writeln!(std::io::stderr(), "ploopfs: {}", out::printable(line));
}
