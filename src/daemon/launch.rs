//! A start in the background, as the command line sees it: it starts the keeper, and waits until the mount works or cannot be
//! had.

use std::io::{self, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::keeper::LAST_MOMENTS;
use super::own_mount::OwnMount;
use super::settings::Settings;
use super::wire::{self, Note};
use super::{processes, siblings};
use crate::error::{Error, Kind, Result};
use crate::io::process::spawn_detached as spawn;

/// How often it is said what a start waits for: one takes a moment, and a person waits no longer without a word.
const WORD: Duration = Duration::from_secs(4);
/// How long a start may take: each image of a large folder on a slow host is looked at.
const START: Duration = Duration::from_secs(600);
/// How long a process that was stopped may hold it up.
const STOPPED: Duration = Duration::from_secs(20);

/// How a mount began.
#[derive(Clone, Debug)]
pub struct Launched {
    /// What was refused by the system, one sentence each.
    pub notes: Vec<String>,
}

/// Starts a keeper in the background and waits until the mount works or cannot be had.
///
/// Neither of them may run (stopped, or its folder or its mount point hangs), so `say` hears what is waited for, and there is
/// an end to it. A keeper that no command waits for any more ends its daemon.
pub fn launch(settings: &Settings, say: &mut dyn FnMut(&str)) -> Result<Launched> {
    let failed =
        |e: &io::Error| Error::at(Kind::Io, settings.mountpoint(), format!("cannot start the daemon: {e}"));
    let before = OwnMount::before(settings);
    let mut child = siblings::command("keeper", settings)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(&e))?;
    let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed(&io::ErrorKind::BrokenPipe.into()));
    };
    wire::put(&mut to, settings).map_err(|e| failed(&e))?;
    let (heard, answer) = bounded(1);
    spawn("mount/keeper", move || drop(heard.send(wire::get(&mut BufReader::new(from)))))?;
    let began = Instant::now();
    let said = loop {
        match answer.recv_timeout(WORD) {
            Ok(said) => break said,
            // The thread says something, however it ends.
            Err(RecvTimeoutError::Disconnected) => break Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                let (waits, patience) = starting(settings, child.id());
                if began.elapsed() >= patience {
                    return Err(Error::at(Kind::Io, settings.mountpoint(), format!("cannot mount: {waits}")));
                }
                say(&format!("{}: waiting for the start: {waits}", settings.mountpoint().display()));
            }
        }
    };
    match said {
        Ok(Some(Note::Ready { notes })) => Ok(Launched { notes }),
        Ok(Some(Note::Failed { text, status })) => Err(wire::reported(text, status)),
        other => {
            // It was killed, and its standby is gone, too; what it kept ends without it.
            before.take_dead_away(settings, LAST_MOMENTS);
            let why =
                other.err().map_or_else(|| "the keeper ended without a word".to_owned(), |e| e.to_string());
            Err(Error::at(Kind::Io, settings.mountpoint(), format!("cannot mount: {why}")))
        }
    }
}

/// What a start waits for that has not ended, and how long it may.
fn starting(settings: &Settings, keeper: u32) -> (String, Duration) {
    let pair = processes::behind(settings.images(), settings.mountpoint());
    let daemon = pair.filter(|pair| pair.keeper == Some(keeper)).map(|pair| pair.daemon);
    let stopped = [Some(keeper), daemon].into_iter().flatten().find(|pid| processes::is_stopped(*pid));
    match stopped {
        Some(pid) => (
            format!("process {pid} is stopped; let it go on: kill -CONT {pid}; or give it up: kill -9 {pid}"),
            STOPPED,
        ),
        None => {
            let pid = daemon.unwrap_or(keeper);
            (format!("process {pid} is at it; the images folder or the mount point may hang"), START)
        }
    }
}
