//! A daemon was killed: the keeper starts its successor, once `wait` has returned.
//!
//! The order: (1) `wait` has returned, so that no thread of the dead one writes any more; (2) the successor is started;
//! (3) it gets the settings, the ledger and the connection. 2 before 1: two writers on one file.
//!
//! **L6** One daemon at a time: the successor starts when `wait` has returned, and all data writes are synchronous
//! calls.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use super::child::{Started, listen_for_files, spelled, start_daemon};
use super::keeper::Keeper;
use super::settings::Settings;
use super::standby::StandbyNote;
use super::succession::Succession;
use super::wire::{Event, Order, What};
use crate::error::Result;
use crate::rules::{Rule, broken};

/// How long the last files of a dead daemon may take to be here.
const LAST_FILES: Duration = Duration::from_secs(1);

impl Keeper<'_> {
    /// The connection goes to the daemon; where there may be another one, it stays here, too.
    pub(super) fn send_connection(&mut self, connection: OwnedFd, device: (u32, u32)) {
        let Some(succession) = &mut self.succession else {
            return self.orders.send_all(vec![(Order::Mounted { device }, connection)]);
        };
        let orders = self.orders.clone();
        succession.keep(connection, device, self.settings.threads, |text| orders.send(Order::Warn(text)));
        match succession.connection() {
            Ok(all) => self.orders.send_all(all),
            Err(e) => {
                self.orders.send(Order::NotMounted { text: e.to_string(), status: e.kind().exit_status() })
            }
        }
    }

    /// True while a daemon has died whose successor does not serve yet.
    pub(super) fn is_missed(&self) -> bool {
        self.succession.as_ref().is_some_and(|succession| succession.is_missed())
    }

    /// The daemon has closed its line. Starts another one where it was killed; false: the mount ends with it.
    pub(super) fn succeed(&mut self) -> bool {
        // 1
        let status = if broken(Rule::L6) {
            // Of a thread of it that still writes nothing is heard.
            Ok(ExitStatus::from_raw(libc::SIGKILL))
        } else {
            self.daemon.wait()
        };
        // One that has ended by itself has ended its mount, or says why it cannot take it over.
        if status.as_ref().map_or(true, |status| status.code().is_some()) {
            return false;
        }
        let signal = status.as_ref().ok().and_then(ExitStatusExt::signal).unwrap_or_default();
        if !self.succession.as_mut().is_some_and(|succession| succession.died(signal)) {
            return false;
        }
        self.log(&format!("the daemon ended ({}); the next one goes on with its work", spelled(&status)));
        self.go_on()
    }

    /// Starts the next daemon, where its time has come. False: it could not be started.
    pub(super) fn go_on(&mut self) -> bool {
        if !self.succession.as_mut().is_some_and(|succession| succession.starts()) {
            return true;
        }
        self.start_successor().map_err(|e| self.log(&e.to_string())).is_ok()
    }

    fn start_successor(&mut self) -> Result<()> {
        let restarts = self.succession.as_ref().map_or(0, Succession::restarts);
        let faults = self.succession.as_ref().map_or(0, Succession::faults);
        let restarts = restarts + 1;
        let settings = Settings { takes_over: true, restarts, faults, ..self.settings.clone() };
        let Started { daemon, to, standby } = start_daemon(&settings, &self.happenings.0)?; // 2
        self.daemon = daemon;
        if let Some(gives) = self.gives.take() {
            // What the dead one has sent is all there, and read in a moment.
            let _ = gives.recv_timeout(LAST_FILES);
        }
        let Some(succession) = &mut self.succession else { return Ok(()) };
        let estate = succession.inheritance()?;
        self.gives = listen_for_files(Some(succession), &to, &self.happenings.0)?;
        self.orders.renew(to, estate)?; // 3
        if let Some(before) = std::mem::replace(&mut self.standby, standby.ok()) {
            before.end();
        }
        if let Some(mount) = self.mount.clone() {
            self.send_standby(&StandbyNote::Mount(mount));
        }
        // Its disks are in use: should we be killed, it goes on.
        self.send_standby(&StandbyNote::Started);
        Ok(())
    }

    /// The successor serves.
    pub(super) fn succeeded(&mut self, notes: &[String]) {
        let (restarts, pause) = self.succession.as_mut().map(Succession::serves).unwrap_or_default();
        let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let event = Event { image: String::new(), what: What::Restarted { restarts, pause_ms } };
        self.orders.send(Order::Warn(event.sentence()));
        self.orders.send(Order::Restarted { restarts, pause_ms });
        self.run_for(event);
        notes.iter().for_each(|note| self.orders.send(Order::Warn(note.clone())));
        if std::mem::take(&mut self.stops) {
            self.signal_daemon();
        }
    }

    /// No daemon serves for too long: the last one started goes, and the mount with it.
    pub(super) fn give_up_successor(&mut self) {
        self.log("no daemon could go on with the mount in time: it ends");
        self.succession = None;
        // It may have ended just now.
        let _ = self.daemon.kill();
    }

    /// Says something while there is no daemon to say it.
    pub(super) fn log(&mut self, text: &str) {
        if self.logs() {
            ::log::warn!("{}: {text}", self.settings.mountpoint().display());
        }
    }
}
