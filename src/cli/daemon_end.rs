//! The end of a daemon whose mount was taken away: waited for until its images are closed, with a word to the user and a
//! limit. It may be asked, or only watched.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cli::{Outcome, out};
use crate::control::client::{Client, WaitingClient};
use crate::control::protocol::Closed;
use crate::daemon::holders::{self, Holder};
use crate::daemon::processes::{self, Pair};
use crate::error::{Error, Kind, Result};
use crate::io::mounts::Mount;
use crate::io::process;

/// How often the wait for the end looks around.
const LOOK: Duration = Duration::from_millis(200);
/// After so long, and then each time so long again, it is said what is waited for.
const WORD: Duration = Duration::from_secs(4);
/// How long a daemon may take to notice that it was unmounted, or to end once its images are closed. It does so at once,
/// unless it was stopped, or something keeps the file system that could not be seen.
const NOTICE: Duration = Duration::from_secs(10);
/// How long a daemon may take to begin to close its images when another umount has just taken its mount away.
const LINGER: Duration = Duration::from_secs(2);
/// How long closing the images may take: everything unsynced of all of them goes to the disk.
const CLOSING: Duration = Duration::from_secs(600);

/// The daemon behind a mount, which was asked to report its end.
pub(super) struct AskedDaemon<'a> {
    mount: &'a Mount,
    /// The folder that it serves, as it is called now.
    folder: PathBuf,
    waiting: WaitingClient,
    /// Daemon, keeper and standby, held so that their numbers cannot become those of others.
    processes: Vec<(u32, OwnedFd)>,
}

/// What a daemon does that was unmounted and has not ended.
enum State {
    Closing,
    /// It has not noticed: the file system is alive.
    Serves {
        /// The images that are open.
        open: Vec<String>,
        /// What keeps it, as far as that can be seen.
        kept: Vec<Holder>,
    },
    /// A process of it does not run, or does not answer.
    Silent(String),
}

impl<'a> AskedDaemon<'a> {
    pub(super) fn new(
        client: Client,
        folder: PathBuf,
        pair: Option<&Pair>,
        mount: &'a Mount,
    ) -> Result<AskedDaemon<'a>> {
        let hello = client.hello();
        let standby = pair.filter(|pair| pair.daemon == hello.pid).and_then(processes::standby_of);
        let all = [hello.pid, hello.keeper].into_iter().chain(standby);
        let processes = all.filter_map(handle).collect();
        Ok(AskedDaemon { mount, folder, waiting: client.wait()?, processes })
    }

    /// Waits until the images are closed and the processes gone, so that what follows finds them clean.
    pub(super) fn end(self) -> anyhow::Result<Outcome> {
        self.wait()?;
        let point = &self.mount.point;
        let AskedDaemon { waiting, processes, .. } = self;
        let closed = waiting.end()?;
        let deadline = Instant::now() + NOTICE;
        for (pid, handle) in &processes {
            if !process::ends_before(handle, Some(deadline)) {
                let how = if processes::is_stopped(*pid) {
                    "is stopped: kill -CONT"
                } else {
                    "does not end: kill -9"
                };
                let what = format!("unmounted, but process {pid} {how} {pid}");
                return Err(Error::at(Kind::Io, point, what).into());
            }
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

    /// Until the daemon says how it ended, or is gone.
    fn wait(&self) -> Result<()> {
        let point = &self.mount.point;
        let (began, mut say_next) = (Instant::now(), Instant::now() + WORD);
        let mut unmoved = began;
        while !self.waiting.is_over(LOOK) {
            if Instant::now() < say_next {
                continue;
            }
            say_next = Instant::now() + WORD;
            let state = self.state();
            let given_up = match &state {
                State::Closing => {
                    unmoved = Instant::now();
                    began.elapsed() >= CLOSING
                }
                _ => unmoved.elapsed() >= NOTICE,
            };
            let (kind, what) = match state {
                State::Closing => (Kind::Io, "the images are still being closed".to_owned()),
                State::Silent(who) => (Kind::Io, who),
                State::Serves { open, kept } => {
                    let mut what = "its file system is still in use".to_owned();
                    if !open.is_empty() {
                        what += &format!(", open: {}", open.join(", "));
                    }
                    if kept.is_empty() {
                        what += ", by what cannot be seen from here (another mount namespace?)";
                    }
                    for holder in kept {
                        what += &format!(": {holder}; end it with: {}", holder.remedy());
                    }
                    (Kind::InUse, what)
                }
            };
            if given_up {
                let what = format!("unmounted, and its daemon (process {}) goes on: {what}", self.pid());
                return Err(Error::at(kind, point, what));
            }
            out::say(&format!("{}: unmounted; waiting for the end: {what}", point.display()));
        }
        Ok(())
    }

    fn pid(&self) -> u32 {
        self.processes.first().map_or(0, |(pid, _)| *pid)
    }

    fn state(&self) -> State {
        if let Some((pid, _)) = self.processes.iter().find(|(pid, _)| processes::is_stopped(*pid)) {
            return State::Silent(format!("process {pid} of it is stopped; let it go on: kill -CONT {pid}"));
        }
        match Client::find(&self.folder) {
            // Another has it by now.
            Ok(Some(client)) if client.hello().pid != self.pid() => State::Closing,
            Ok(Some(client)) if client.hello().closing => State::Closing,
            Ok(Some(mut client)) => {
                let images = client.list().unwrap_or_default().into_iter();
                let open = images.filter(|image| image.openers > 0).map(|image| image.name).collect();
                State::Serves { open, kept: holders::of_file_system(self.mount) }
            }
            // Just gone.
            Ok(None) => State::Closing,
            Err(e) => State::Silent(e.to_string()),
        }
    }
}

/// Waits for the end of a daemon that could not be asked (its folder was removed, or its socket is another's). Never a
/// success: how its images were closed is not known, and a script that goes on to copy them should know that.
pub(super) fn without_a_word(point: &Path, processes: &[(u32, OwnedFd)]) -> Error {
    let (began, mut say_next) = (Instant::now(), Instant::now() + WORD);
    for (pid, handle) in processes {
        while !process::ends_before(handle, Some(Instant::now() + LOOK)) {
            let waits = if processes::is_stopped(*pid) {
                format!("process {pid} of it is stopped; let it go on: kill -CONT {pid}")
            } else {
                format!("process {pid} of it, which cannot be asked, has not ended")
            };
            if began.elapsed() >= CLOSING {
                return Error::at(Kind::Io, point, format!("unmounted, but {waits}"));
            }
            if Instant::now() >= say_next {
                say_next = Instant::now() + WORD;
                out::say(&format!("{}: unmounted; waiting for the end: {waits}", point.display()));
            }
        }
    }
    let what = if processes.is_empty() {
        "unmounted, but its daemon did not answer and may still be closing images"
    } else {
        "unmounted, and its daemon has ended, but it could not be asked how it closed its images (was the images folder \
         removed?); its log and `ploopfs check` say that"
    };
    Error::at(Kind::Io, point, what)
}

/// Handles of all processes behind a mount, which keep their numbers from becoming those of others.
pub(super) fn processes_of(pair: &Pair) -> Vec<(u32, OwnedFd)> {
    let all = [Some(pair.daemon), pair.keeper, processes::standby_of(pair)];
    all.into_iter().flatten().filter_map(handle).collect()
}

fn handle(number: u32) -> Option<(u32, OwnedFd)> {
    let pid = i32::try_from(number).ok().and_then(Pid::from_raw)?;
    Some((number, pidfd_open(pid, PidfdFlags::empty()).ok()?))
}

/// Waits for the end of a daemon without its mount point: another umount may just have taken that away. False: it goes on.
pub(super) fn is_ending(point: &Path, pair: &Pair) -> bool {
    let processes = processes_of(pair);
    let (began, mut say_next) = (Instant::now(), Instant::now() + WORD);
    let ended = |(_, handle): &(u32, OwnedFd)| process::ends_before(handle, Some(Instant::now()));
    while pair.stopped().is_none() {
        let Some((_, handle)) = processes.iter().find(|process| !ended(process)) else { return true };
        process::ends_before(handle, Some(Instant::now() + LOOK));
        if began.elapsed() < LINGER {
            continue;
        }
        let client = Client::find(&pair.images).ok().flatten();
        let closing =
            client.is_some_and(|client| client.hello().closing && client.hello().pid == pair.daemon);
        if !closing || began.elapsed() >= CLOSING {
            break;
        }
        if Instant::now() >= say_next {
            say_next = Instant::now() + WORD;
            out::say(&format!("{}: unmounted; the images are still being closed", point.display()));
        }
    }
    processes.iter().all(ended)
}
