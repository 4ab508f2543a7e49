//! A daemon that serves the folder already: fine where its mount is the one that was asked for.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cli::{Outcome, out, served, umount};
use crate::control::client::Client;
use crate::daemon::processes;
use crate::error::{Error, Kind, Result};
use crate::io::mounts;
use crate::words::quoted;

/// How long the start of another command may take that mounts the same at the same time.
const OTHERS_START: Duration = Duration::from_secs(20);
/// How long a daemon that is mounted nowhere may take to mount or to end, as one does whose command was killed. One that
/// something else keeps takes longer.
const BETWEEN: Duration = Duration::from_secs(2);

/// What came of one attempt to mount.
pub(super) enum Attempt {
    /// Done, by this command or another.
    Over(Outcome),
    /// By another daemon, which is not there any more.
    Refused(Error),
}

/// Two commands mounted the folder at once, and the other was faster: fine where it is the mount that was asked for. It may
/// still be at it, or end as it was killed. `e`: what this one was refused with.
pub(super) fn made_meanwhile(e: Error, images: &Path, mountpoint: &Path) -> anyhow::Result<Attempt> {
    let deadline = Instant::now() + OTHERS_START;
    while Instant::now() < deadline {
        if let Some(client) = Client::find(images)?
            && is_at(&client, mountpoint)?
        {
            return already_served(client, images, mountpoint);
        }
        let Some(pair) = processes::serving(images) else { return Ok(Attempt::Refused(e)) };
        if pair.mountpoint != mountpoint || pair.stopped().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(e.into())
}

/// True when the daemon's mount is the one at `mountpoint`.
fn is_at(client: &Client, mountpoint: &Path) -> Result<bool> {
    let here = mounts::at(mountpoint)?.map(|mount| mount.device);
    Ok(here.is_some() && here == served::mount_of(client)?.map(|mount| mount.device))
}

/// A living daemon serves the folder: fine where it is the mount that was asked for.
pub(super) fn already_served(
    mut client: Client,
    images: &Path,
    mountpoint: &Path,
) -> anyhow::Result<Attempt> {
    let deadline = Instant::now() + BETWEEN;
    loop {
        if is_at(&client, mountpoint)? {
            client.rescan()?;
            out::remark(&format!("{}: already mounted\n", mountpoint.display()));
            return Ok(Attempt::Over(Outcome::Done));
        }
        let elsewhere = served::mount_of(&client)?.is_some_and(|mount| mount.point != mountpoint);
        let goes_on = processes::serving(images).is_some_and(|pair| pair.stopped().is_none());
        if elsewhere || !goes_on || Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        let Some(now) = Client::find(images)? else {
            let what = "was served by a daemon that has just ended; try again";
            return Ok(Attempt::Refused(Error::at(Kind::InUse, images, what)));
        };
        client = now;
    }
    let hello = client.hello();
    // By the kernel's table: an umount of a place where it is no more would lead nowhere.
    let shown = served::mount_of(&client)?;
    let pair = processes::serving(images);
    let may_be_gone = pair.is_none() && shown.is_none();
    let why = match (shown, pair) {
        (Some(mount), _) => {
            let (point, command) = (mount.point.display(), quoted(&mount.point));
            format!("is served on {point} by process {}; end that with: ploopfs umount {command}", hello.pid)
        }
        (None, Some(pair)) => format!("is mounted nowhere here, but {}", umount::goes_on(&pair)),
        (None, None) => format!("is served by process {0}; end that with: kill {0}", hello.pid),
    };
    let refused = Error::at(Kind::InUse, images, why);
    if may_be_gone { Ok(Attempt::Refused(refused)) } else { Err(refused.into()) }
}
