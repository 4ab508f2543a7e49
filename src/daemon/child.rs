//! The daemon as its keeper has it: how it is started, and what is heard of it.

use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus, Stdio};

use crossbeam_channel::{Receiver, Sender};

use super::settings::Settings;
use super::siblings;
use super::standby::Standby;
use super::succession::Succession;
use super::wire::{self, Note};
use crate::error::{Error, Kind, Result};
use crate::io::process::spawn_detached as spawn;

/// What the keeper acts on.
pub(super) enum Happening {
    Said(Note),
    /// It is mounted, or cannot be.
    Mounted(Result<OwnedFd>),
    /// The daemon said what is no note: why.
    Odd(String),
    /// The daemon closed its end: it has ended, or is about to.
    Silent,
    Signal,
}

/// A daemon that has its settings.
pub(super) struct Started {
    pub(super) daemon: Child,
    /// Its standard input.
    pub(super) to: UnixStream,
    pub(super) standby: Result<Standby>,
}

/// The order: (1) the daemon, which does nothing before it has its settings; (2) the standby, which waits for the
/// daemon's end; (3) the settings, so that a daemon that can ask for its mount has a standby, whenever we are killed.
pub(super) fn start_daemon(settings: &Settings, to_us: &Sender<Happening>) -> Result<Started> {
    let failed = |e: &io::Error| cannot_start(settings, e);
    let mut command = siblings::command("daemon", settings);
    let err = if settings.foreground { Stdio::inherit() } else { Stdio::null() };
    let (mut to, theirs) = UnixStream::pair().map_err(|e| failed(&e))?;
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(err);
    let mut daemon = command.spawn().map_err(|e| failed(&e))?; // 1
    // It holds the daemon's end of the line, whose other end would not notice the daemon's death.
    drop(command);
    let Some(from) = daemon.stdout.take() else {
        return Err(failed(&io::ErrorKind::BrokenPipe.into()));
    };
    let standby = Standby::start(settings, &daemon); // 2
    match wire::put(&mut to, settings) {
        // It has died already, which is noticed by its silence.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        put => put.map_err(|e| failed(&e))?, // 3
    }
    #[cfg(feature = "break-rules")]
    if crate::rules::broken(crate::rules::Rule::L6) {
        hear_the_first_thread(daemon.id(), to_us)?;
    }
    let to_us = to_us.clone();
    spawn("keeper/daemon", move || listen(BufReader::new(from), &to_us))?;
    Ok(Started { daemon, to, standby })
}

/// Begins to hear what the daemon at the other end of `line` gives to be kept.
pub(super) fn listen_for_files(
    succession: Option<&Succession>,
    line: &UnixStream,
    to_us: &Sender<Happening>,
) -> Result<Option<Receiver<()>>> {
    let Some(succession) = succession else { return Ok(None) };
    let line = line.try_clone().map_err(|e| Error::new(Kind::Io, format!("the daemon's line: {e}")))?;
    Ok(Some(succession.listen(line, to_us)?))
}

pub(super) fn cannot_start(settings: &Settings, e: &io::Error) -> Error {
    Error::at(Kind::Io, settings.mountpoint(), format!("cannot start the daemon: {e}"))
}

/// How it ended, in words.
pub(super) fn spelled(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(e) => e.to_string(),
    }
}

fn listen(mut from: impl BufRead, to: &Sender<Happening>) {
    loop {
        let happening = match wire::get(&mut from) {
            Ok(Some(note)) => Happening::Said(note),
            Err(e) if wire::is_odd(&e) => Happening::Odd(e.to_string()),
            Ok(None) | Err(_) => break,
        };
        if to.send(happening).is_err() {
            return;
        }
    }
    // The keeper ends when the receiver is gone.
    let _ = to.send(Happening::Silent);
}

/// L6, broken: a daemon whose first thread has ended is taken for dead, whatever its others do. Its line is heard to its
/// end all the same, which is one death more.
#[cfg(feature = "break-rules")]
fn hear_the_first_thread(pid: u32, to: &Sender<Happening>) -> Result<()> {
    let to = to.clone();
    spawn("keeper/hasty", move || {
        let ended = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|rest| !rest.starts_with(['R', 'S', 'D', 'T']))
        };
        while !ended() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let _ = to.send(Happening::Silent);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;

    #[test]
    fn a_malformed_line_does_not_make_the_keeper_deaf() {
        let (sender, happenings) = bounded(8);
        listen(&b"{\"event\": 7}\n{\"unmount\": {\"detach\": true}}\n"[..], &sender);
        let happened: Vec<Happening> = happenings.try_iter().collect();
        let expected = Note::Unmount { detach: true };
        assert!(
            matches!(&happened[..], [Happening::Odd(_), Happening::Said(note), Happening::Silent] if *note == expected)
        );
    }
}
