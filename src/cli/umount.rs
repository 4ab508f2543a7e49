//! `ploopfs umount`.
//!
//! The end of a mount point is not the end of the mount: a bind mount, another mount namespace or an overlay may keep the
//! file system, a stopped process may never close its images. So all of that is looked for before anything is taken away,
//! and what is waited for afterwards (`daemon_end`) is said, and has a limit.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::daemon_end::{AskedDaemon, is_ending, processes_of, without_a_word};
use crate::cli::{Outcome, out, served};
use crate::daemon::holders::{self, Holder};
use crate::daemon::processes::{self, Pair};
use crate::error::{Error, Kind, Result};
use crate::io::loopdev;
use crate::io::mounts::{self, Mount};
use crate::io::unmount::unmount_this;
use crate::words::quoted;

/// How long the kernel may take to release a loop device that nothing uses: udev may be looking at it.
const LET_GO: Duration = Duration::from_secs(5);
/// How long a user that cannot be seen is waited for: a program that looks at other processes' open files (another `umount`,
/// lsof) holds the mount for as long as one look takes, and so does a file that has just been closed.
const UNSEEN: Duration = Duration::from_secs(2);
/// How often that is tried.
const AGAIN: Duration = Duration::from_millis(50);
/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the images are shown
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
    /// Detach idle loop devices first, and take the mount point away even while files are open
    ///
    /// With nothing open any more it returns when every image is closed, as without it. Else the daemon goes on until
    /// the last file is closed and the last other mount of it is gone, and what keeps it is said.
    #[arg(long)]
    detach: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let point = mounts::resolve(&args.mountpoint)?;
    let Some(mount) = mounts::at(&point)? else { return not_mounted(&point) };
    if !mount.is_ours() {
        return Err(not_ours(&mount)?.into());
    }
    let strange = mount.check_trusted().err();
    if let Some(e) = &strange {
        if !args.detach {
            let what = format!("{e}; to take it away: ploopfs umount --detach {}", quoted(&point));
            return Err(Error::new(e.kind(), what).into());
        }
        out::say(&e.to_string());
    }
    let pair = processes::behind(&mount.source, &mount.point);
    if let Some((who, pid)) = pair.as_ref().and_then(Pair::stopped) {
        if !args.detach {
            return Err(stopped(&point, who, pid).into());
        }
        let kept = holders::beyond(&mount);
        unmount_this(&mount, true)?;
        out::say(&format!(
            "{}: detached; {who} (process {pid}) is stopped, and closes the images when it goes on: kill -CONT {pid}",
            point.display()
        ));
        name_all(&kept);
        return Ok(Outcome::Done);
    }
    // Before the unmount: afterwards the socket may be gone.
    let daemon = match served::has_died(&mount) {
        // What another user says there is of no use, nor is what he does not say waited for.
        Ok(_) if strange.is_some() => None,
        Ok(true) => return take_dead_away(&mount),
        Ok(false) => served::of_mount(&mount)
            .ok()
            .flatten()
            .map(|(folder, client)| AskedDaemon::new(client, folder, pair.as_ref(), &mount))
            .transpose()?,
        // It would be waited for without an end.
        Err(e) if !args.detach && e.kind() == Kind::Io => return Err(e.with_kind(Kind::InUse).into()),
        // Another user answers in its place, who owns the folder: that must not keep a mount of ours from its end.
        Err(e) if args.detach || (e.kind() == Kind::Access && strange.is_none()) => {
            out::say(&e.to_string());
            None
        }
        Err(e) => return Err(e.into()),
    };
    // Held before the unmount: afterwards they may be gone, and their numbers be others'.
    let unseen =
        if daemon.is_none() { pair.as_ref().map(processes_of).unwrap_or_default() } else { Vec::new() };
    let mut kept = holders::beyond(&mount);
    if !kept.is_empty() && !args.detach {
        return Err(busy(&mount).into());
    }
    if args.detach {
        detach_idle_loops(&point);
    }
    if mounts::now(&mount)?.is_none() {
        // Another umount was faster, and its daemon may have ended before it was asked.
        return not_mounted(&point);
    }
    match unmount_idle(&mount) {
        Err(e) if e.kind() == Kind::Busy && args.detach => {
            // Before the name goes: afterwards it cannot be seen who uses it.
            kept = holders::of(&mount);
            unmount_this(&mount, true)?;
        }
        Err(e) if e.kind() == Kind::Busy => return Err(busy(&mount).into()),
        result => result?,
    }
    if !kept.is_empty() {
        let who: Vec<String> = kept.iter().map(ToString::to_string).collect();
        let pid = pair
            .map_or_else(|| "the daemon".to_owned(), |pair| format!("the daemon (process {})", pair.daemon));
        out::say(&format!(
            "{}: detached; {pid} goes on until this ends: {}",
            point.display(),
            who.join(", ")
        ));
        return Ok(Outcome::Done);
    }
    match daemon {
        Some(daemon) => daemon.end(),
        None => Err(without_a_word(&point, &unseen).into()),
    }
}

fn stopped(point: &Path, who: &str, pid: u32) -> Error {
    let what = format!(
        "{who} (process {pid}) is stopped, and nothing can end before it goes on; nothing was done. Let it go on: kill -CONT \
         {pid}; or give it up: kill -9 {pid}"
    );
    Error::at(Kind::InUse, point, what)
}

/// Another file system lies uppermost; below it there may be one of ours.
fn not_ours(mount: &Mount) -> Result<Error> {
    let (point, kind) = (&mount.point, mount.kind.display());
    let ours = mounts::all()?.into_iter().any(|below| below.point == *point && below.is_ours());
    Ok(if ours {
        let what =
            format!("a mount of type {kind} lies over the one of ploopfs; first: umount {}", quoted(point));
        Error::at(Kind::InUse, point, what)
    } else {
        Error::at(Kind::Invalid, point, format!("is a mount of type {kind}, not of ploopfs; use umount"))
    })
}

/// Takes away the loop devices that nothing uses. One that is mounted, or open, is said with the others that hold on.
fn detach_idle_loops(point: &Path) {
    for device in holders::loops_below(point) {
        if let Err(e) = loopdev::detach(&device.dev, LET_GO) {
            out::say(&e.to_string());
        }
    }
}

/// Nothing is mounted there. Its daemon may live all the same: it was moved, or detached, and something keeps it.
fn not_mounted(point: &Path) -> anyhow::Result<Outcome> {
    if let Err(e) = point.symlink_metadata() {
        return Err(Error::io(&e, point, "no such mount point").into());
    }
    let Some(pair) = processes::mounted_at(point).filter(|pair| !is_ending(point, pair)) else {
        out::say(&format!("{}: not mounted", point.display()));
        return Ok(Outcome::Done);
    };
    Err(Error::at(Kind::InUse, point, format!("is not mounted here any more, but {}", goes_on(&pair))).into())
}

/// That a daemon without its mount point goes on, why, and what ends it.
pub fn goes_on(pair: &Pair) -> String {
    let pid = pair.daemon;
    let mut what = format!("its daemon (process {pid}) still serves {}", pair.images.display());
    if let Some((who, stopped)) = pair.stopped() {
        what += &format!(":\n  {who} (process {stopped}) is stopped; let it go on: kill -CONT {stopped}");
    }
    let kept = holders::of_folder(&pair.images);
    what += if kept.is_empty() { "; files of it are open" } else { ":" };
    for holder in &kept {
        what += &format!("\n  {holder}; end it with: {}", holder.remedy());
    }
    what + &format!("\nor end the daemon, which closes its images in order: kill {pid}")
}

fn take_dead_away(mount: &Mount) -> anyhow::Result<Outcome> {
    let hanging = holders::of(mount);
    unmount_this(mount, true)?;
    out::say(&format!("{}: its daemon had died; unmounted", mount.point.display()));
    for holder in hanging {
        out::say(&format!("still hanging on the dead mount: {holder}; end it with: {}", holder.remedy()));
    }
    Ok(Outcome::Done)
}

/// Unmounts; [`Kind::Busy`] while something is open, at once if it can be seen.
fn unmount_idle(mount: &Mount) -> Result<()> {
    let end = Instant::now() + UNSEEN;
    loop {
        match unmount_this(mount, false) {
            Err(e) if e.kind() == Kind::Busy && Instant::now() < end && holders::of(mount).is_empty() => {
                std::thread::sleep(AGAIN);
            }
            result => return result,
        }
    }
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

fn name_all(kept: &[Holder]) {
    for holder in kept {
        out::say(&format!("it stays in use: {holder}; end it with: {}", holder.remedy()));
    }
}
