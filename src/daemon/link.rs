//! The daemon's end of the line to its keeper.

use std::io::{self, BufRead, BufReader, Stdin};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::settings::Settings;
use super::wire::{self, Event, Note, Order};
use crate::error::{Error, Kind, Result};
use crate::io::handover::Receiving;
use crate::io::heirs::Estate;
use crate::io::holder::{self, HeldLock, Holder};
use crate::io::mounts;
use crate::io::process::spawn_detached as spawn;
use crate::io::shared::Shared;
use crate::io::unmount::unmount_this;
use crate::ledger::Ledger;
use crate::sync::plain::lock;
use crate::tree::Restarts;
use crate::words::quoted;

/// Notes on their way to the keeper; more events are dropped, because no thread waits until a person has read one.
const MAX_NOTES: usize = 256;
/// How long the keeper may take; an unmount is the longest that it is asked for.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often a wait for an answer looks whether the keeper has ended: the end of a daemon seems prompt to a person.
const LOOK: Duration = Duration::from_millis(100);

/// What the keeper says, on standard input.
pub(super) type FromKeeper = BufReader<Receiving<Stdin>>;

/// Standard input, of which nothing else may read from now on.
pub(super) fn from_keeper() -> FromKeeper {
    BufReader::new(Receiving::new(io::stdin()))
}

/// What comes with a mount.
pub(super) struct Handed {
    /// Descriptors of the connection, the mount's own first.
    pub(super) connection: Vec<OwnedFd>,
    /// The number of its file system.
    pub(super) device: (u32, u32),
    /// What a daemon before has left.
    pub(super) estate: Estate,
}

/// Has the keeper mount, and returns the connection, and the device number of the file system. To be called before a thread
/// listens to the keeper; who waits too long ends the keeper, and so this.
pub(super) fn mounted(from_keeper: &mut FromKeeper) -> Result<Handed> {
    send(&Note::Mount).map_err(|e| gone(&e.to_string()))?;
    handed(from_keeper)
}

/// Waits for what comes with a mount; to a successor it comes by itself, behind the ledger.
pub(super) fn handed(from_keeper: &mut FromKeeper) -> Result<Handed> {
    let (mut connection, mut estate) = (Vec::new(), Estate::default());
    loop {
        match wire::get(from_keeper) {
            Ok(Some(Order::Mounted { device })) => {
                let without = || Error::new(Kind::Io, "the keeper has mounted, and sent no connection");
                connection.insert(0, from_keeper.get_mut().descriptor().ok_or_else(without)?);
                return Ok(Handed { connection, device, estate });
            }
            Ok(Some(Order::Thread)) => connection.extend(from_keeper.get_mut().descriptor()),
            Ok(Some(Order::File { file, witness })) => {
                let open = estate.files.entry(file).or_default();
                match from_keeper.get_mut().descriptor() {
                    came if !witness => open.own = came,
                    came => open.witnesses.extend(came),
                }
            }
            Ok(Some(Order::Fixture { what })) => {
                estate.fixtures.extend(from_keeper.get_mut().descriptor().map(|came| (what, came)));
            }
            Ok(Some(Order::NotMounted { text, status })) => return Err(wire::reported(text, status)),
            Ok(Some(order)) => said(order),
            Err(e) if wire::is_odd(&e) => log::warn!("the keeper said what is not understood: {e}"),
            Ok(None) => return Err(gone("it has closed the connection")),
            Err(e) => return Err(gone(&e.to_string())),
        }
    }
}

fn gone(why: &str) -> Error {
    Error::new(Kind::Io, format!("the keeper is gone: {why}"))
}

/// The ledger, which is the first that the keeper sends.
pub(super) fn ledger(from_keeper: &mut FromKeeper) -> Result<Arc<Ledger>> {
    let none = |why: &dyn std::fmt::Display| Error::new(Kind::Io, format!("there is no ledger: {why}"));
    match wire::get(from_keeper).map_err(|e| gone(&e.to_string()))? {
        Some(Order::Ledger) => {}
        other => return Err(none(&format!("{other:?}"))),
    }
    let memory = from_keeper.get_mut().descriptor().ok_or_else(|| none(&"no memory came with its line"))?;
    let memory = Shared::map(memory).map_err(|e| none(&e))?;
    Ok(Arc::new(Ledger::attach(Box::new(memory))?))
}

/// The line to the keeper.
pub(super) struct Link {
    /// Written by a thread of its own, which waits where the keeper reads nothing (it may be stopped): the line holds some
    /// hundred notes only, and the end of the daemon must not wait behind them.
    notes: (Sender<Note>, Receiver<Note>),
    answers: (Sender<Order>, Receiver<Order>),
    /// Held from a question to its answer, so that answers find their question. A leaf.
    asking: Mutex<()>,
    /// The sandbox forbids to unmount and to look around.
    confined: AtomicBool,
    /// The keeper has ended.
    gone: Arc<AtomicBool>,
    /// As the keeper says.
    restarts: Arc<Restarts>,
}

impl Link {
    /// A line on standard input and output. No thread is started yet.
    pub(super) fn new(restarts: Arc<Restarts>) -> Link {
        let (confined, gone) = (AtomicBool::new(false), Arc::default());
        Link {
            notes: bounded(MAX_NOTES),
            answers: bounded(4),
            asking: Mutex::new(()),
            confined,
            gone,
            restarts,
        }
    }

    /// What the engine calls with its events; never blocks.
    pub(super) fn listener(&self) -> Box<dyn Fn(crate::vdisk::ImageEvent) + Send + Sync> {
        let notes = self.notes.0.clone();
        Box::new(move |event| {
            let event = Event::from(event);
            log::warn!("{}", event.sentence());
            // Full: the keeper is stuck in earlier ones, and the log has this one too.
            let _ = notes.try_send(Note::Event(event));
        })
    }

    /// Starts listening to the keeper and passing events on.
    pub(super) fn start(&self, from_keeper: FromKeeper) -> Result<()> {
        let (answers, notes, gone) = (self.answers.0.clone(), self.notes.0.clone(), self.gone.clone());
        let restarts = self.restarts.clone();
        spawn("ploopfs/keeper", move || {
            listen(from_keeper, &answers, &notes, &restarts);
            gone.store(true, Ordering::Relaxed);
        })?;
        let notes = self.notes.1.clone();
        // Without a keeper they are taken and thrown away.
        spawn("ploopfs/events", move || notes.iter().for_each(|note| drop(send(&note))))
    }

    /// From now on the keeper is asked for what the sandbox forbids: who holds a lock, too.
    pub(super) fn confine(self: &Arc<Self>) {
        self.confined.store(true, Ordering::Relaxed);
        let link = self.clone();
        holder::ask_instead(Box::new(move |held| link.holder(held)));
    }

    /// Unmounts through the keeper, or ourselves when it is gone and the sandbox is off.
    pub(super) fn unmount(&self, settings: &Settings, detach: bool) -> Result<()> {
        match self.ask(Note::Unmount { detach }) {
            Some(Order::Unmounted { error: None }) => Ok(()),
            Some(Order::Unmounted { error: Some(why) }) => Err(Error::new(Kind::Busy, why)),
            _ if self.confined.load(Ordering::Relaxed) => {
                let keeper = if self.is_gone() { "is gone" } else { "does not answer (was it stopped?)" };
                let what = format!(
                    "the keeper process {keeper}, and the daemon's sandbox forbids it to unmount; the standby takes the mount \
                     away at the end; should it stay, run: ploopfs umount {}",
                    quoted(settings.mountpoint())
                );
                Err(Error::at(Kind::NotPermitted, settings.mountpoint(), what))
            }
            // Only what is ours: something else may lie there by now.
            _ => match mounts::at(settings.mountpoint())? {
                Some(mount) if mount.is_ours() && mount.source == settings.images() => {
                    unmount_this(&mount, detach)
                }
                _ => Ok(()),
            },
        }
    }

    /// Who holds files of the mount open, in words; empty where the keeper does not answer.
    pub(super) fn holders(&self) -> Vec<String> {
        match self.ask(Note::Holders) {
            Some(Order::Holders(who)) => who,
            _ => Vec::new(),
        }
    }

    fn holder(&self, held: HeldLock) -> Option<Holder> {
        match self.ask(Note::Holder(held)) {
            Some(Order::Holder(holder)) => holder,
            _ => None,
        }
    }

    fn ask(&self, question: Note) -> Option<Order> {
        let _asking = lock(&self.asking);
        // An answer that came too late for its question is not ours.
        while self.answers.1.try_recv().is_ok() {}
        let deadline = Instant::now() + PATIENCE;
        if !self.is_gone() {
            self.notes.0.send_deadline(question, deadline).ok()?;
        }
        while !self.is_gone() && Instant::now() < deadline {
            if let Ok(answer) = self.answers.1.recv_timeout(LOOK) {
                return Some(answer);
            }
        }
        None
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// What was said and not asked for.
fn said(order: Order) {
    match order {
        Order::Warn(text) => log::warn!("{text}"),
        other => log::warn!("the keeper answers what it was not asked: {other:?}"),
    }
}

/// Says something to the keeper; standard output locks itself, so lines stay whole.
pub(super) fn send(note: &Note) -> io::Result<()> {
    wire::put(&mut io::stdout().lock(), note)
}

fn listen(mut from_keeper: impl BufRead, answers: &Sender<Order>, notes: &Sender<Note>, restarts: &Restarts) {
    loop {
        match wire::get(&mut from_keeper) {
            Ok(Some(order @ Order::Warn(_))) => said(order),
            Ok(Some(Order::Restarted { restarts: count, pause_ms })) => restarts.set(count, pause_ms),
            // Full: it does not listen.
            Ok(Some(Order::Answer)) => drop(notes.try_send(Note::Alive)),
            // Full: nothing waits for these answers any more.
            Ok(Some(order)) => drop(answers.try_send(order)),
            Err(e) if wire::is_odd(&e) => log::warn!("the keeper said what is not understood: {e}"),
            Ok(None) | Err(_) => {
                log::warn!("the keeper process is gone: the mount goes on, but --on-event is no longer run");
                return;
            }
        }
    }
}
