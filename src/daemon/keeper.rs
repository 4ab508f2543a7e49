//! The keeper: the small process between the command line and the daemon. It starts the daemon, reports whether the
//! mount works, and does what the daemon itself may not: mounting and unmounting, running `--on-event`, looking around in
//! /proc and /sys. However the daemon ends, it takes away what is left of the mount and names what still hangs on it.
//!
//! Without `--restart-timeout` it keeps no descriptor of the connection. The daemon's are then the last ones, so that all
//! who wait for an answer get an error in the moment of its death, whatever the keeper does just then (it may be stopped).
//! With it, `succession` and `heirs` go on.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::child::{Happening, Started, cannot_start, listen_for_files, spelled, start_daemon};
use super::holders::{self, Holder};
use super::orders::Orders;
use super::own_mount::{self, OwnMount};
use super::settings::Settings;
use super::standby::{Standby, StandbyNote};
use super::succession::Succession;
use super::wire::{self, Event, Note, Order};
use super::{events, log, notify, siblings};
use crate::control::place::ControlPlace;
use crate::error::{Error, Kind, Result};
use crate::io::process::spawn_detached as spawn;
use crate::io::{foreign, process};
use crate::words::quoted;

/// How often loop devices without direct I/O are looked for. A person who has just typed losetup reads the log
/// later than that.
const LOOK_AROUND: Duration = Duration::from_secs(5);

/// How long a mount that was begun may take after its daemon's end, and a daemon to end whose keeper was killed at the start.
/// A moment, unless the mount point hangs.
pub(super) const LAST_MOMENTS: Duration = Duration::from_secs(10);

/// The hidden command `keeper`: a keeper in a session of its own; its settings come on standard input.
pub fn main() -> ExitCode {
    process::close_inherited();
    let begun = begin_in_background();
    let settings = match begun {
        Ok(settings) => settings,
        Err(e) => {
            // The command line may be gone; no other process waits for the outcome.
            let _ = wire::put(&mut io::stdout(), &wire::failure(&e));
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

/// Where the outcome of the start goes.
pub trait Report {
    /// Passes the first note on. False: the reader has gone.
    fn first(&mut self, note: &Note) -> bool;
    /// True when messages belong on stderr instead of in the log file.
    fn in_front(&self) -> bool;
}

/// Reports over standard output, then closes the command line's pipes.
struct Background;

impl Report for Background {
    fn first(&mut self, note: &Note) -> bool {
        let heard = wire::put(&mut io::stdout(), note).is_ok();
        siblings::let_go_of_input();
        siblings::let_go_of_output();
        heard
    }

    fn in_front(&self) -> bool {
        false
    }
}

/// Keeps one daemon, from its start to its end. Returns the daemon's exit status.
pub fn run(settings: &Settings, report: &mut dyn Report) -> ExitCode {
    match Keeper::start(settings) {
        Ok(keeper) => keeper.keep(report),
        Err(e) => {
            report.first(&wire::failure(&e));
            ExitCode::from(e.kind().exit_status())
        }
    }
}

pub(super) struct Keeper<'a> {
    pub(super) settings: &'a Settings,
    pub(super) daemon: Child,
    pub(super) orders: Orders,
    pub(super) happenings: (Sender<Happening>, Receiver<Happening>),
    events: Option<Sender<Event>>,
    /// Our mount: nothing else on the same mount point is ever unmounted. None: the daemon has not asked for it.
    pub(super) mount: Option<OwnMount>,
    /// Since then it is being made, on a thread that has not said how that ended.
    mounting: Option<Instant>,
    /// None: it could not be had.
    pub(super) standby: Option<Standby>,
    /// The images folder, as it was at the start: its path may mean another one at the end. None: it is gone already.
    pub(super) images: Option<OwnedFd>,
    /// Loop devices that were warned of.
    slow_loops: HashSet<PathBuf>,
    /// None: the mount ends with its daemon.
    pub(super) succession: Option<Succession>,
    /// The end was asked for while there was no daemon to hear it.
    pub(super) stops: bool,
    /// Ends when all is here that the daemon has given to be kept.
    pub(super) gives: Option<Receiver<()>>,
    /// The log is open for us, or cannot be; None: it was not needed yet.
    logs: Option<bool>,
}

impl<'a> Keeper<'a> {
    fn start(settings: &'a Settings) -> Result<Keeper<'a>> {
        let failed = |e: &io::Error| cannot_start(settings, e);
        let (sender, happenings) = bounded(64);
        // Before the daemon exists, so that no signal is missed.
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| failed(&e))?;
        let on_signal = sender.clone();
        spawn("keeper/signals", move || {
            signals.forever().try_for_each(|_| on_signal.send(Happening::Signal)).unwrap_or(());
        })?;
        let oom_score = process::oom_score();
        let succession = Succession::prepare(settings)?;
        let Started { daemon, to, standby } = start_daemon(settings, &sender)?;
        let gives = listen_for_files(succession.as_ref(), &to, &sender)?;
        let first = succession.as_ref().map(Succession::inheritance).transpose()?;
        let orders = Orders::start(to, first.unwrap_or_default())?;
        let standby = standby.map_err(|e| orders.send(Order::Warn(without_standby(&e)))).ok();
        let warn = orders.clone();
        let oom_score = oom_score.filter(|_| succession.is_some());
        let events = events::runner(settings, oom_score, move |text| warn.send(Order::Warn(text)))?;
        let images = foreign::resolved_folder(settings.images()).ok();
        let (happenings, slow_loops) = ((sender, happenings), HashSet::new());
        let (mount, mounting) = (None, None);
        Ok(Keeper {
            settings,
            images,
            daemon,
            orders,
            happenings,
            events,
            mount,
            mounting,
            standby,
            slow_loops,
            succession,
            stops: false,
            gives,
            logs: None,
        })
    }

    /// Runs the program of `--on-event`.
    pub(super) fn run_for(&self, event: Event) {
        if let Some(events) = &self.events {
            // Full: the program hangs, and the log has the event.
            let _ = events.try_send(event);
        }
    }

    /// From the start to the end.
    fn keep(mut self, report: &mut dyn Report) -> ExitCode {
        let mut reported = false;
        // A failed start is reported when nothing is left of it.
        let mut failed = None;
        let mut look_next = Instant::now() + LOOK_AROUND;
        loop {
            // While a daemon is missed nothing else is looked at.
            let due = self.succession.as_ref().and_then(Succession::due);
            match self.happenings.1.recv_deadline(due.unwrap_or(look_next)) {
                Ok(Happening::Said(Note::Ready { notes })) if self.is_missed() => self.succeeded(&notes),
                Ok(Happening::Said(Note::Failed { text, .. })) if self.is_missed() => {
                    self.log(&text);
                }
                Ok(Happening::Said(Note::Ready { .. } | Note::Failed { .. }))
                    if reported || failed.is_some() =>
                {
                    self.orders.send(Order::Warn("the daemon has reported its start already".to_owned()));
                }
                Ok(Happening::Said(note @ Note::Failed { .. })) => {
                    failed = Some(note);
                    // So long it may take to end.
                    look_next = Instant::now() + LOOK_AROUND;
                }
                Ok(Happening::Said(note @ Note::Ready { .. })) => {
                    if report.in_front() {
                        let (images, point) = (self.settings.images(), self.settings.mountpoint());
                        notify::ready(&format!("{} on {}", images.display(), point.display()));
                        self.start_watchdog();
                    }
                    let heard = report.first(&note);
                    reported = true;
                    // Behind the report: killed between the two, we leave a mount that ends, and not one that goes on though
                    // it was reported as failed.
                    self.send_standby(&StandbyNote::Started);
                    if !heard {
                        // The command that asked for this mount is gone.
                        self.signal_daemon();
                    }
                }
                Ok(Happening::Said(Note::Mount)) => self.begin_mount(),
                Ok(Happening::Mounted(made)) => self.hand_over(made),
                Ok(Happening::Said(Note::Unmount { detach })) => {
                    let done = self
                        .mount
                        .as_ref()
                        .map_or(Ok(()), |mount| mount.unmount(self.settings.images(), detach));
                    let error = done.err().map(|e| e.to_string());
                    self.orders.send(Order::Unmounted { error });
                }
                Ok(Happening::Said(Note::Holders)) => {
                    let mount = self.mount.as_ref().and_then(|mount| mount.current(self.settings.images()));
                    let who = mount.map(|mount| holders::of(&mount)).unwrap_or_default();
                    let who = who.iter().take(wire::MAX_HOLDERS).map(ToString::to_string).collect();
                    self.orders.send(Order::Holders(who));
                }
                Ok(Happening::Said(Note::Holder(held))) => {
                    self.orders.send(Order::Holder(held.look_up(self.daemon.id())));
                }
                Ok(Happening::Said(Note::Alive)) => {
                    if report.in_front() && notify::watchdog().is_some() {
                        notify::alive();
                    }
                }
                Ok(Happening::Said(Note::Event(event))) => match event.objection() {
                    Some(why) => {
                        let text = format!("an event was passed over: {:?} {why}", event.image);
                        self.orders.send(Order::Warn(text));
                    }
                    None => self.run_for(event),
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
                Ok(Happening::Silent) if reported && failed.is_none() && self.succeed() => {}
                Ok(Happening::Silent) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if self.is_missed() => {
                    if self.succession.as_ref().is_some_and(Succession::is_over) {
                        self.give_up_successor();
                    } else if !self.go_on() {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(note) = failed.take() {
                        // It says so, and does not end: its host hangs. What is left goes with it.
                        report.first(&note);
                        reported = true;
                    }
                    if self.mounting.is_some_and(|since| since.elapsed() >= LOOK_AROUND) {
                        self.orders
                            .send(Order::Warn("mounting takes long: the mount point hangs".to_owned()));
                    }
                    self.look_around();
                    look_next = Instant::now() + LOOK_AROUND;
                }
            }
        }
        self.end(report, (!reported).then_some(failed))
    }

    /// After the daemon's last word: its mount goes, however it ended. `failed`: the start did not succeed, and what the daemon
    /// said of it; that is reported here. Returns the daemon's exit status.
    fn end(mut self, report: &mut dyn Report, failed: Option<Option<Note>>) -> ExitCode {
        let status = self.daemon.wait();
        // With it goes what keeps requests waiting.
        self.succession = None;
        let code = status.as_ref().ok().and_then(ExitStatus::code);
        if let Some(said) = failed {
            self.await_mount();
            let why = format!("the daemon ended before the mount worked: {}", spelled(&status));
            let ended = || wire::failure(&Error::at(Kind::Io, self.settings.mountpoint(), why));
            let note = said.unwrap_or_else(ended);
            let covered = self.mount.as_ref().and_then(|mount| mount.take_away(self.settings, |_| {}));
            report.first(&note);
            if let (Some(mount), Some(_)) = (&self.mount, covered) {
                mount.bury(self.settings, |_| {});
            }
        } else if code.is_none() || self.mount.as_ref().is_some_and(|mount| mount.is_dead(self.settings)) {
            self.clean_up(&spelled(&status));
        }
        if let Some(standby) = self.standby {
            standby.end();
        }
        ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
    }

    /// Mounts, on a thread that may wait for the mount point, because signals are heard meanwhile.
    ///
    /// The order, here and in [`hand_over`](Self::hand_over): (1) the standby learns what was mounted before; (2) the mount;
    /// (3) the standby learns which it is; (4) the daemon gets the connection. Whenever we are killed, the standby knows the
    /// mount: 2 before 1, and it would not; 4 before 3, and one that serves already might be taken for none.
    fn begin_mount(&mut self) {
        if self.mount.is_some() {
            return self.orders.send(Order::Warn("the daemon has asked for its mount already".to_owned()));
        }
        let before = OwnMount::before(self.settings);
        self.send_standby(&StandbyNote::Mount(before.clone())); // 1
        self.mount = Some(before);
        let (settings, done) = (self.settings.clone(), self.happenings.0.clone());
        let body = move || drop(done.send(Happening::Mounted(own_mount::make(&settings)))); // 2
        match spawn("keeper/mount", body) {
            Ok(()) => self.mounting = Some(Instant::now()),
            Err(e) => self.hand_over(Err(e)),
        }
    }

    /// Passes on what came of the mount.
    fn hand_over(&mut self, made: Result<OwnedFd>) {
        self.mounting = None;
        match made.and_then(|connection| self.note_mount().map(|device| (connection, device))) {
            Ok((connection, device)) => self.send_connection(connection, device), // 4
            Err(e) => {
                self.orders.send(Order::NotMounted { text: e.to_string(), status: e.kind().exit_status() })
            }
        }
    }

    /// Knows which mount it is, from now on; returns the device number of its file system.
    fn note_mount(&mut self) -> Result<(u32, u32)> {
        let unasked = || Error::at(Kind::Io, self.settings.mountpoint(), "was mounted, and not asked for");
        let mount = self.mount.as_mut().ok_or_else(unasked)?;
        let device = mount.is_made(self.settings)?;
        let known = StandbyNote::Mount(mount.clone());
        self.send_standby(&known); // 3
        Ok(device)
    }

    pub(super) fn send_standby(&mut self, what: &StandbyNote) {
        if let Some(standby) = &mut self.standby
            && let Err(e) = standby.send(what)
        {
            self.standby = None;
            self.orders.send(Order::Warn(without_standby(&e)));
        }
    }

    /// After the daemon's end: the mount that it asked for may still be on its way.
    fn await_mount(&mut self) {
        let deadline = Instant::now() + LAST_MOMENTS;
        while self.mounting.is_some() {
            match self.happenings.1.recv_deadline(deadline) {
                Ok(Happening::Mounted(made)) => {
                    self.mounting = None;
                    // Nothing serves it: it is known, so that it goes, and the connection is closed.
                    drop(made.and_then(|_connection| self.note_mount()));
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    pub(super) fn signal_daemon(&mut self) {
        if self.is_missed() {
            // The successor hears it when it serves: before, it would just die.
            self.stops = true;
            return;
        }
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

    /// Has the daemon asked whether it answers, for a service manager that wants to know (WatchdogSec=). Over our own line: the
    /// socket has a name in a folder that may be renamed, or be another's, and clients that keep it busy, and a manager that
    /// hears nothing ends all disks. The answer needs no file and no lock, so a slow disk does not count as a daemon that
    /// hangs.
    fn start_watchdog(&self) {
        let Some(interval) = notify::watchdog() else { return };
        let orders = self.orders.clone();
        let body = move || {
            loop {
                orders.send(Order::Answer);
                std::thread::sleep(interval);
            }
        };
        if let Err(e) = spawn("keeper/watchdog", body) {
            self.orders.send(Order::Warn(e.to_string()));
        }
    }

    /// Opens the log, once; false: it cannot be had. Written only while no daemon serves.
    pub(super) fn logs(&mut self) -> bool {
        let (images, settings) = (&self.images, self.settings);
        *self.logs.get_or_insert_with(|| {
            let place = images.as_ref().and_then(|dir| ControlPlace::make(dir, settings.images()).ok());
            log::open(place.as_ref().filter(|_| !settings.foreground)).is_ok()
        })
    }

    /// After the daemon's end: every look at the mount point gets ENOTCONN, so it goes away, and what still has files open
    /// there is named, because no other process names it.
    fn clean_up(&mut self, how: &str) {
        let left = self.mount.as_ref().map(|mount| mount.left(self.settings)).unwrap_or_default();
        let hanging: Vec<Holder> = left.first().map(holders::of).unwrap_or_default();
        let logs = self.logs();
        let point = self.settings.mountpoint().display();
        if logs {
            ::log::error!(
                "the daemon of {point} ended ({how}) before its mount; every open file gives EIO now"
            );
            for holder in hanging {
                ::log::error!("hanging on the dead mount: {holder}; end it with: {}", holder.remedy());
            }
        }
        if let Some(mount) = &self.mount {
            mount.bury(self.settings, |line| {
                if logs {
                    ::log::error!("{line}");
                }
            });
        }
        if logs && !left.is_empty() {
            ::log::error!("{point} is unmounted; mount it again with: {}", mount_line(self.settings));
        }
    }
}

fn without_standby(why: &dyn std::fmt::Display) -> String {
    format!("{why}; should the keeper be killed, the mount stays behind when the daemon ends")
}

fn mount_line(settings: &Settings) -> String {
    format!("ploopfs mount {} {}", quoted(settings.images()), quoted(settings.mountpoint()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_daemon_that_asks_for_a_second_mount_gets_none() {
        let path = |path: &str| serde_json::json!({"Unix": path.as_bytes()});
        let asked = serde_json::json!({"sync": false, "dirsync": false, "nosymfollow": false, "labels": []});
        let settings: Settings = serde_json::from_value(serde_json::json!({
            "images": path("/nonexistent/images"), "mountpoint": path("/nonexistent/point"), "asked": asked,
            "foreground": false, "read_only": false, "allow_other": false, "allow_outside": false, "direct": false,
            "manage": false, "passthrough": false, "sandbox": true, "transport": "Fuse", "threads": 2, "runners": 2,
            "bat_cache": 1 << 20, "bat_delay_ms": 0, "queue_when_full": true, "full_timeout_s": 0, "low_water": 10,
            "on_event": null, "stop_timeout_s": 1, "restart_timeout_s": 0, "no_restart": null,
            "takes_over": false, "restarts": 0, "fault": null,
        }))
        .expect("settings");
        let (ours, daemons) = UnixStream::pair().expect("a pair");
        let mut keeper = Keeper {
            settings: &settings,
            daemon: std::process::Command::new("true").spawn().expect("a process"),
            orders: Orders::start(ours, Vec::new()).expect("a thread"),
            happenings: bounded(8),
            events: None,
            mount: None,
            mounting: None,
            standby: None,
            images: None,
            slow_loops: HashSet::new(),
            succession: None,
            stops: false,
            gives: None,
            logs: None,
        };
        keeper.begin_mount();
        keeper.begin_mount();
        keeper.await_mount();
        keeper.begin_mount();
        assert!(keeper.happenings.1.is_empty(), "one mount was tried, and no more");
        keeper.daemon.wait().expect("our own child");
        drop(keeper);
        let mut from = BufReader::new(daemons);
        let heard: Vec<Order> = std::iter::from_fn(|| wire::get(&mut from).expect("lines")).collect();
        assert!(
            matches!(&heard[..], [Order::Warn(one), Order::Warn(other)] if one.contains("already") && one == other),
            "{heard:?}"
        );
    }
}
