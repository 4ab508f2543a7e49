//! The keeper: the small process between the command line and the daemon. It starts the daemon, reports whether the
//! mount works, and does what the daemon itself may not: unmounting, running `--on-event`, looking around in /proc
//! and /sys. When the daemon dies it takes the dead mount away and names what still hangs on it.

use std::collections::HashSet;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::holders::{self, Holder};
use super::own_mount::OwnMount;
use super::settings::Settings;
use super::wire::{self, Event, Note, Order};
use super::{events, log, notify};
use crate::control::client::Client;
use crate::control::place::Place;
use crate::error::{Error, Kind, Result};
use crate::io::process::spawn_detached as spawn;
use crate::io::{foreign, process};
use crate::words::quoted;

/// How often loop devices without direct I/O are looked for. A person who has just typed losetup reads the log
/// later than that.
const LOOK_AROUND: Duration = Duration::from_secs(5);

/// How a mount began.
#[derive(Clone, Debug)]
pub struct Begun {
    /// What was refused by the system, one sentence each.
    pub notes: Vec<String>,
}

/// Starts a keeper in the background and waits until the mount works or cannot be had.
pub fn launch(settings: &Settings) -> Result<Begun> {
    let failed =
        |e: &io::Error| Error::at(Kind::Io, settings.mountpoint(), format!("cannot start the daemon: {e}"));
    let before = OwnMount::before(settings);
    let mut child = ourselves("keeper", settings)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(&e))?;
    let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed(&io::ErrorKind::BrokenPipe.into()));
    };
    wire::put(&mut to, settings).map_err(|e| failed(&e))?;
    match wire::get(&mut BufReader::new(from)) {
        Ok(Some(Note::Ready { notes })) => Ok(Begun { notes }),
        Ok(Some(Note::Failed { text, status })) => Err(told(text, status)),
        other => {
            // It was killed; what it kept ends without it, and nothing else takes the mount away.
            before.take_dead_away(settings, LAST_MOMENTS);
            let why =
                other.err().map_or_else(|| "the keeper ended without a word".to_owned(), |e| e.to_string());
            Err(Error::at(Kind::Io, settings.mountpoint(), format!("cannot mount: {why}")))
        }
    }
}

/// How long a daemon whose keeper was killed at the start may take to notice it, and to end.
const LAST_MOMENTS: Duration = Duration::from_secs(10);

fn told(text: String, status: u8) -> Error {
    let kinds = [Kind::Invalid, Kind::Damaged, Kind::InUse];
    let kind = kinds.into_iter().find(|kind| kind.exit_status() == status).unwrap_or(Kind::Io);
    Error::new(kind, text)
}

fn ourselves(what: &str, settings: &Settings) -> Command {
    let mut command = process::daemon_command("ploopfs");
    // The two paths are for `ps`; what counts is the settings on standard input.
    command.arg(what).arg(&settings.images).arg(&settings.mountpoint).env_remove(notify::SOCKET);
    command
}

/// The hidden command `keeper`: a keeper in a session of its own, told its settings on standard input.
pub fn main() -> ExitCode {
    process::close_inherited();
    let begun = begin_in_background();
    let settings = match begun {
        Ok(settings) => settings,
        Err(e) => {
            // The command line may be gone; there is nobody else to tell.
            let _ = wire::put(&mut io::stdout(), &failure(&e));
            return ExitCode::from(e.kind().exit_status());
        }
    };
    run(&settings, &mut Background)
}

fn begin_in_background() -> Result<Settings> {
    let odd = |what: &str, e: &dyn std::fmt::Display| Error::new(Kind::Io, format!("{what}: {e}"));
    let settings: Option<Settings> =
        wire::get(&mut io::stdin().lock()).map_err(|e| odd("cannot read the settings", &e))?;
    let settings = settings.ok_or_else(|| {
        Error::new(Kind::Invalid, "this command is started by `ploopfs mount`, not by hand")
    })?;
    // A name for `ps`; without it we are called "exe".
    let _ = process::name_this_thread("ploopfs-keeper");
    Ok(settings)
}

/// A failed start in the words that go to the command line.
pub fn failure(e: &Error) -> Note {
    Note::Failed { text: e.to_string(), status: e.kind().exit_status() }
}

/// Who is told that the mount works.
pub trait Report {
    /// Passes the first note on. False: nobody listens any more.
    fn first(&mut self, note: &Note) -> bool;
    /// True when messages belong on stderr instead of in the log file.
    fn in_front(&self) -> bool;
}

/// Reports over standard output, then lets go of the command line's pipes.
struct Background;

impl Report for Background {
    fn first(&mut self, note: &Note) -> bool {
        let heard = wire::put(&mut io::stdout(), note).is_ok();
        if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
            // Should it fail, the pipe stays open, which only a shell that collects our output notices.
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
        }
        heard
    }

    fn in_front(&self) -> bool {
        false
    }
}

enum Happening {
    Said(Note),
    /// The daemon said what is no note: why.
    Odd(String),
    /// The daemon closed its end: it has ended, or is about to.
    Silent,
    Signal,
}

/// Keeps one daemon, from its start to its end. Returns the daemon's exit status.
pub fn run(settings: &Settings, report: &mut dyn Report) -> ExitCode {
    match Keeper::start(settings) {
        Ok(keeper) => keeper.keep(report),
        Err(e) => {
            report.first(&failure(&e));
            ExitCode::from(e.kind().exit_status())
        }
    }
}

/// Orders on their way to the daemon; more are dropped. A daemon that reads none must not keep its keeper from hearing a
/// signal, or its end.
const MAX_ORDERS: usize = 64;

/// The way to the daemon's standard input, through a thread that may wait for it.
#[derive(Clone)]
struct Orders(Sender<Order>);

impl Orders {
    fn start(mut to: ChildStdin) -> Result<Orders> {
        let (sender, orders) = bounded(MAX_ORDERS);
        // A daemon that is gone is noticed by its silence.
        spawn("keeper/orders", move || drop(orders.iter().try_for_each(|order| wire::put(&mut to, &order))))?;
        Ok(Orders(sender))
    }

    fn send(&self, order: Order) {
        let _ = self.0.try_send(order);
    }
}

struct Keeper<'a> {
    settings: &'a Settings,
    daemon: Child,
    orders: Orders,
    happenings: Receiver<Happening>,
    events: Option<Sender<Event>>,
    /// Our mount: nothing else on the same mount point is ever unmounted.
    mount: OwnMount,
    /// The images folder, as it was at the start: its path may mean another one at the end. None: it is gone already.
    images: Option<OwnedFd>,
    /// Loop devices that were warned of.
    slow_loops: HashSet<PathBuf>,
}

impl<'a> Keeper<'a> {
    fn start(settings: &'a Settings) -> Result<Keeper<'a>> {
        let failed = |e: &io::Error| {
            Error::at(Kind::Io, settings.mountpoint(), format!("cannot start the daemon: {e}"))
        };
        let (sender, happenings) = bounded(64);
        // Before the daemon exists, so that no signal is missed.
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| failed(&e))?;
        let on_signal = sender.clone();
        spawn("keeper/signals", move || {
            signals.forever().try_for_each(|_| on_signal.send(Happening::Signal)).unwrap_or(());
        })?;
        let mount = OwnMount::before(settings);
        let mut command = ourselves("daemon", settings);
        let err = if settings.foreground { Stdio::inherit() } else { Stdio::null() };
        let mut daemon = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(err)
            .spawn()
            .map_err(|e| failed(&e))?;
        let (Some(mut to), Some(from)) = (daemon.stdin.take(), daemon.stdout.take()) else {
            return Err(failed(&io::ErrorKind::BrokenPipe.into()));
        };
        wire::put(&mut to, settings).map_err(|e| failed(&e))?;
        let orders = Orders::start(to)?;
        spawn("keeper/daemon", move || listen(BufReader::new(from), &sender))?;
        let warn = orders.clone();
        let events = events::runner(settings, move |text| warn.send(Order::Warn(text)))?;
        let images = foreign::resolved_folder(settings.images()).ok();
        let slow_loops = HashSet::new();
        Ok(Keeper { settings, images, daemon, orders, happenings, events, mount, slow_loops })
    }

    fn keep(mut self, report: &mut dyn Report) -> ExitCode {
        let mut reported = false;
        let mut look_next = Instant::now() + LOOK_AROUND;
        loop {
            match self.happenings.recv_deadline(look_next) {
                Ok(Happening::Said(Note::Ready { .. } | Note::Failed { .. })) if reported => {
                    self.orders.send(Order::Warn("the daemon has reported its start already".to_owned()));
                }
                Ok(Happening::Said(note @ (Note::Ready { .. } | Note::Failed { .. }))) => {
                    if matches!(note, Note::Ready { .. }) {
                        self.mount.works(self.settings);
                    }
                    if report.in_front() && matches!(note, Note::Ready { .. }) {
                        let (images, point) = (self.settings.images(), self.settings.mountpoint());
                        notify::ready(&format!("{} on {}", images.display(), point.display()));
                        self.start_watchdog();
                    }
                    let heard = report.first(&note);
                    reported = true;
                    if !heard {
                        // Nobody waits for this mount any more.
                        self.signal_daemon();
                    }
                }
                Ok(Happening::Said(Note::Unmount { detach })) => {
                    let error = self.mount.unmount(self.settings, detach).err().map(|e| e.to_string());
                    self.orders.send(Order::Unmounted { error });
                }
                Ok(Happening::Said(Note::Holders)) => {
                    let mount = self.mount.current(self.settings);
                    let who = mount.map(|mount| holders::of(&mount)).unwrap_or_default();
                    let who = who.iter().take(wire::MAX_HOLDERS).map(ToString::to_string).collect();
                    self.orders.send(Order::Holders(who));
                }
                Ok(Happening::Said(Note::Holder(held))) => {
                    self.orders.send(Order::Holder(held.look_up(self.daemon.id())));
                }
                Ok(Happening::Said(Note::Event(event))) => match (event.objection(), &self.events) {
                    (Some(why), _) => {
                        let text = format!("an event was passed over: {:?} {why}", event.image);
                        self.orders.send(Order::Warn(text));
                    }
                    // Full: the program hangs, and the log has the event.
                    (None, Some(events)) => drop(events.try_send(event)),
                    (None, None) => {}
                },
                Ok(Happening::Odd(why)) => {
                    let text = format!("the keeper passed over what it did not understand: {why}");
                    self.orders.send(Order::Warn(text));
                }
                Ok(Happening::Signal) => {
                    if report.in_front() {
                        notify::stopping(self.settings.stop_timeout());
                    }
                    self.signal_daemon();
                }
                Ok(Happening::Silent) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    self.look_around();
                    look_next = Instant::now() + LOOK_AROUND;
                }
            }
        }
        let status = self.daemon.wait();
        if !reported {
            let why = format!("the daemon ended before the mount worked: {}", spelled(&status));
            report.first(&failure(&Error::at(Kind::Io, self.settings.mountpoint(), why)));
        }
        let code = status.as_ref().ok().and_then(ExitStatus::code);
        if !self.mount.has_worked() {
            // It never worked; by its number it is not known.
            self.mount.take_dead_away(self.settings, Duration::ZERO);
        } else if code.is_none() || self.mount.is_dead() {
            self.clean_up(&spelled(&status), report.in_front());
        }
        ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
    }

    fn signal_daemon(&self) {
        if let Some(pid) = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw) {
            // It is not reaped yet, so the number is still its own; a daemon that ended needs no signal.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Names loop devices without direct I/O, once each.
    fn look_around(&mut self) {
        let slow = holders::without_direct_io(self.settings.mountpoint());
        let names: HashSet<PathBuf> = slow.iter().map(|device| device.dev.clone()).collect();
        for device in &slow {
            if !self.slow_loops.contains(&device.dev.clone()) {
                self.orders.send(Order::Warn(holders::direct_io_advice(device)));
            }
        }
        self.slow_loops = names;
    }

    /// Tells a service manager that wants it (WatchdogSec=) that the daemon answers, as long as it does. The greeting needs no
    /// file and no lock, so a slow disk does not count as a daemon that hangs.
    fn start_watchdog(&self) {
        let Some(interval) = notify::watchdog() else { return };
        let images = self.settings.images().to_owned();
        let body = move || {
            loop {
                if Client::find(&images).is_ok_and(|daemon| daemon.is_some()) {
                    notify::alive();
                }
                std::thread::sleep(interval);
            }
        };
        if let Err(e) = spawn("keeper/watchdog", body) {
            self.orders.send(Order::Warn(e.to_string()));
        }
    }

    /// After the daemon's end: every look at the mount point gets ENOTCONN, so it goes away, and what still has files open
    /// there is named, because nothing else will tell.
    fn clean_up(&self, how: &str, in_front: bool) {
        let left = self.mount.left();
        let hanging: Vec<Holder> = left.first().map(holders::of).unwrap_or_default();
        let place = self.images.as_ref().and_then(|dir| Place::make(dir, self.settings.images()).ok());
        let logs = log::open(place.as_ref().filter(|_| !in_front)).is_ok();
        let point = self.settings.mountpoint().display();
        if logs {
            ::log::error!(
                "the daemon of {point} ended ({how}) before its mount; every open file gives EIO now"
            );
            for holder in hanging {
                ::log::error!("hanging on the dead mount: {holder}; end it with: {}", holder.remedy());
            }
        }
        self.mount.bury(|line| {
            if logs {
                ::log::error!("{line}");
            }
        });
        if logs && !left.is_empty() {
            ::log::error!("{point} is unmounted; mount it again with: {}", mount_line(self.settings));
        }
    }
}

fn mount_line(settings: &Settings) -> String {
    format!("ploopfs mount {} {}", quoted(settings.images()), quoted(settings.mountpoint()))
}

fn spelled(status: &io::Result<ExitStatus>) -> String {
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
    // The keeper ends when nobody receives any more.
    let _ = to.send(Happening::Silent);
}

#[cfg(test)]
mod tests {
    use super::*;

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
