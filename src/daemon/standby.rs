//! The standby: a process that does nothing as long as the keeper lives. When that is killed, it waits for the end of the
//! daemon, and takes the mount away in the keeper's place: a confined daemon cannot, and what a daemon leaves mounted
//! answers ENOTCONN to all. A daemon that has started goes on meanwhile, because its disks are in use; one that was still
//! starting is ended, because what waits for the start hears nothing any more. A keeper that was stopped (SIGSTOP, Ctrl-Z)
//! when the daemon ends is not waited for either.
//!
//! It ends with the keeper, which kills it as the last thing it does; a keeper that ends otherwise was killed itself.

use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::own_mount::OwnMount;
use super::settings::Settings;
use super::{holders, log, siblings, wire};
use crate::control::place::ControlPlace;
use crate::error::{Error, Kind, Result};
use crate::io::handover::{self, Receiving};
use crate::io::process::spawn_detached;
use crate::io::{foreign, process};
use crate::sync::plain::lock;

/// How long the keeper has for the mount of a daemon that has ended, before it counts as stopped.
const KEEPERS_TURN: Duration = Duration::from_secs(5);

/// What the keeper sends it; the first line is the settings, and the daemon's pidfd with them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandbyNote {
    /// What is known of the mount.
    Mount(OwnMount),
    /// The start is over, and its outcome was reported.
    Started,
}

/// The keeper's end.
pub struct Standby {
    process: Child,
    line: UnixStream,
}

impl Standby {
    /// Starts it for a daemon that has not got its settings yet.
    pub fn start(settings: &Settings, daemon: &Child) -> Result<Standby> {
        let failed = |e: io::Error| Error::new(Kind::Io, format!("cannot start the standby: {e}"));
        let pid = i32::try_from(daemon.id()).ok().and_then(Pid::from_raw);
        // The keeper has not reaped it, so the number is still its own.
        let daemon = pid.ok_or_else(|| io::ErrorKind::NotFound.into());
        let daemon = daemon.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?)).map_err(failed)?;
        let (line, theirs) = UnixStream::pair().map_err(failed)?;
        // In the background the output goes to the command line, which by its end knows that the mount is gone, too. In front
        // it is the caller's.
        let (out, err) = match settings.foreground {
            true => (Stdio::null(), Stdio::inherit()),
            false => (Stdio::inherit(), Stdio::null()),
        };
        let mut command = siblings::command("standby", settings);
        let process = command.stdin(OwnedFd::from(theirs)).stdout(out).stderr(err).spawn().map_err(failed)?;
        let standby = Standby { process, line };
        let said = wire::line(settings);
        said.and_then(|said| handover::send(&standby.line, &said, Some(daemon.as_fd()))).map_err(failed)?;
        Ok(standby)
    }

    /// Sends it a note.
    pub fn send(&mut self, what: &StandbyNote) -> io::Result<()> {
        wire::put(&mut self.line, what)
    }

    /// Ends it: nothing is left to do for it.
    pub fn end(mut self) {
        // Killed and reaped; both can only fail when it has just ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The hidden command `standby`.
pub fn main() -> ExitCode {
    process::close_inherited();
    // A signal to all that is called ploopfs: it ends when the others have.
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        let _ = flag::register(signal, Arc::default());
    }
    let _ = process::name_this_thread("ploopfs-standby");
    let mut keeper = BufReader::new(Receiving::new(io::stdin()));
    let settings = wire::get::<Settings>(&mut keeper).ok().flatten();
    let (Some(settings), Some(daemon)) = (settings, keeper.get_mut().descriptor().map(Arc::new)) else {
        // Killed before it said a word, and before the daemon could have a mount; or we were started by hand.
        return ExitCode::from(Kind::Invalid.exit_status());
    };
    let images = foreign::resolved_folder(settings.images()).ok();
    let (known, mut started) = (Known::default(), false);
    loop {
        match wire::get(&mut keeper) {
            Ok(Some(StandbyNote::Mount(now))) => *lock(&known) = Some(now),
            Ok(Some(StandbyNote::Started)) => {
                started = true;
                siblings::let_go_of_output();
                stand_in(&settings, &daemon, &known);
            }
            Err(e) if wire::is_odd(&e) => {}
            Ok(None) | Err(_) => break,
        }
    }
    // The keeper was killed.
    if !started {
        // Gone already, where that fails.
        let _ = pidfd_send_signal(&daemon, Signal::TERM);
    }
    process::ends_before(&daemon, None);
    let mount = lock(&known).clone();
    if let Some(mount) = mount {
        clean_up(&settings, images.as_ref(), &mount);
    }
    ExitCode::SUCCESS
}

/// What the keeper said of the mount. A leaf.
type Known = Arc<Mutex<Option<OwnMount>>>;

/// Waits for the daemon's end, on a thread of its own, and takes the mount away where the keeper does not: it may be stopped.
/// What that still has to say and to do it finds done, or does, when it goes on.
fn stand_in(settings: &Settings, daemon: &Arc<OwnedFd>, known: &Known) {
    let (settings, daemon, known) = (settings.clone(), daemon.clone(), known.clone());
    // Without a thread a stopped keeper does it later.
    let _ = spawn_detached("standby/daemon", move || {
        process::ends_before(&daemon, None);
        // The keeper ends us when it has done it.
        sleep(KEEPERS_TURN);
        if let Some(mount) = lock(&known).as_ref() {
            mount.take_away(&settings, |_| {});
        }
    });
}

/// Takes the mount away, names what still has files open there, and says so in the log.
fn clean_up(settings: &Settings, images: Option<&OwnedFd>, mount: &OwnMount) {
    let left = mount.left(settings);
    if left.is_empty() {
        return;
    }
    let hanging = left.first().map(holders::of).unwrap_or_default();
    let place = images.and_then(|dir| ControlPlace::make(dir, settings.images()).ok());
    let logs = log::open(place.as_ref().filter(|_| !settings.foreground)).is_ok();
    let say = |line: &str| {
        if logs {
            ::log::error!("{line}");
        }
    };
    for holder in hanging {
        say(&format!("hanging on the dead mount: {holder}; end it with: {}", holder.remedy()));
    }
    mount.bury(settings, say);
    let point = settings.mountpoint().display();
    say(&format!("{point} is unmounted: its daemon has ended, and its keeper was killed before"));
}
