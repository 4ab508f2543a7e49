//! What a keeper holds so that a daemon's death ends no disk, and how often it starts another one
//! (docs/restart.md#who-holds-what).

use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::FileType;

use super::child::Happening;
use super::orders::WithDescriptor;
use super::settings::Settings;
use super::wire::{self, Kept, Order};
use crate::error::{Error, Kind, Result};
use crate::io::handover::Receiving;
use crate::io::heirs::{Estate, Fixture, OpenFile, WITNESSES};
use crate::io::process::spawn_detached as spawn;
use crate::io::{connection, foreign, process, shared};
use crate::ledger;
use crate::sync::plain::lock;

/// How long to wait before each further start: one that dies at once must not take the machine.
const PAUSES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// A daemon that has served for so long is healthy, and the next death is the first.
const HEALTHY: Duration = Duration::from_secs(60);
/// The same of one that did not die by its own fault: whatever kills it (a person, a lack of memory) is not in a hurry.
const SERVED: Duration = Duration::from_secs(1);

/// Signals by which a daemon dies of what it did itself, and not of what is done to it.
const OWN_FAULT: [i32; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGABRT, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// Descriptors that the keeper should be able to have: four for each of some ten thousand images in use.
const OPEN_FILES: u64 = 65_536;

/// Of the descriptors that this process may have, those that no daemon's files take, beside the connection's: for its pipes, its
/// log and the next daemon.
const OWN_DESCRIPTORS: u64 = 256;

/// What outlives a daemon.
pub(super) struct Succession {
    ledger: OwnedFd,
    bounds: Bounds,
    /// Every descriptor of the connection that a daemon reads from, the mount's own first: the requests of one that were read
    /// and not answered end with its last holder.
    connections: Vec<OwnedFd>,
    device: (u32, u32),
    estate: Keepsakes,
    deaths: usize,
    /// So many in a row died by their own fault, without a healthy minute; and whether the last one did.
    faults: (u32, bool),
    /// When the next daemon is to be started.
    next: Option<Instant>,
    /// When a daemon last died whose successor does not serve yet.
    died: Option<Instant>,
    /// Since when the last one serves.
    serves: Option<Instant>,
    /// How many have gone on with the mount.
    restarts: u64,
    timeout: Duration,
}

impl Succession {
    /// None: the mount ends with its daemon.
    pub(super) fn prepare(settings: &Settings) -> Result<Option<Succession>> {
        let Some(timeout) = settings.restart_timeout() else { return Ok(None) };
        let failed = |why: String| Error::new(Kind::Io, format!("cannot make the ledger: {why}"));
        // For all that daemons have open, and as safe as they are: with this process the mount ends. A refusal is theirs to say,
        // who ask for the same.
        let _ = (process::raise_open_files(OPEN_FILES), process::lock_memory(), process::avoid_oom_killer());
        let sizes = settings.ledger();
        let len = sizes.bytes().ok_or_else(|| failed("it is too large".to_owned()))?;
        let memory = shared::make("ploopfs-ledger", len).map_err(|e| failed(e.to_string()))?;
        let mapped = shared::Shared::map(&memory).map_err(|e| failed(e.to_string()))?;
        ledger::format(&mapped, sizes)?;
        let images = foreign::resolved_folder(settings.images()).ok();
        Ok(Some(Succession {
            ledger: memory,
            bounds: Bounds {
                files: process::may_open().saturating_sub(OWN_DESCRIPTORS + settings.threads as u64)
                    / (1 + WITNESSES as u64),
                images: images
                    .and_then(|dir| rustix::fs::fstat(dir).ok())
                    .map(|stat| (stat.st_dev, stat.st_ino)),
            },
            connections: Vec::new(),
            device: (0, 0),
            estate: Keepsakes::default(),
            deaths: 0,
            faults: (0, false),
            next: None,
            died: None,
            serves: None,
            restarts: 0,
            timeout,
        }))
    }

    /// All that a daemon needs, in the order in which it gets it: the first one the ledger alone.
    pub(super) fn inheritance(&self) -> Result<Vec<WithDescriptor>> {
        let mut all = vec![(Order::Ledger, again(&self.ledger)?)];
        let estate = lock(&self.estate);
        for (what, fixture) in &estate.fixtures {
            all.push((Order::Fixture { what: *what }, again(fixture)?));
        }
        for (file, open) in &estate.files {
            let mut give = |witness: bool, fd: &OwnedFd| {
                all.push((Order::File { file: *file, witness }, again(fd)?));
                Result::Ok(())
            };
            if let Some(own) = &open.own {
                give(false, own)?;
            }
            open.witnesses.iter().try_for_each(|witness| give(true, witness))?;
        }
        drop(estate);
        if !self.connections.is_empty() {
            all.append(&mut self.connection()?);
        }
        Ok(all)
    }

    /// The connection, a descriptor for each of its threads.
    pub(super) fn connection(&self) -> Result<Vec<WithDescriptor>> {
        let [own, clones @ ..] = &self.connections[..] else {
            return Err(Error::new(Kind::Io, "there is no connection to the kernel"));
        };
        let mut all = Vec::with_capacity(self.connections.len());
        for clone in clones {
            all.push((Order::Thread, again(clone)?));
        }
        all.push((Order::Mounted { device: self.device }, again(own)?));
        Ok(all)
    }

    /// Hears what a daemon gives to be kept, until it has ended: then the channel does.
    pub(super) fn listen(&self, line: UnixStream, to_us: &Sender<Happening>) -> Result<Receiver<()>> {
        let (estate, (sender, over)) = (self.estate.clone(), bounded(0));
        let (bounds, to_us, mut is_said) = (self.bounds, to_us.clone(), false);
        spawn("keeper/files", move || {
            let _sender: Sender<()> = sender;
            let mut from = BufReader::new(Receiving::new(line));
            loop {
                match wire::get(&mut from) {
                    Ok(Some(said)) => {
                        let taken = lock(&estate).hear(said, from.get_mut().descriptor(), &bounds);
                        if !taken && !std::mem::replace(&mut is_said, true) {
                            let why = "an open file is not what was said of it, or one too many to be kept";
                            let _ = to_us.send(Happening::Odd(why.to_owned()));
                        }
                    }
                    Err(e) if wire::is_odd(&e) => {}
                    Ok(None) | Err(_) => return,
                }
            }
        })?;
        Ok(over)
    }

    /// Keeps the connection, with a descriptor for each of `threads`.
    pub(super) fn keep(
        &mut self,
        own: OwnedFd,
        device: (u32, u32),
        threads: usize,
        mut warn: impl FnMut(String),
    ) {
        self.device = device;
        while self.connections.len() + 1 < threads {
            match connection::another(own.as_fd()) {
                Ok(clone) => self.connections.push(clone),
                Err(e) => {
                    let what = connection::DEVICE;
                    warn(format!("{what}: {e}: the transport threads share one descriptor, which is slower"));
                    break;
                }
            }
        }
        self.connections.insert(0, own);
    }

    /// A daemon was killed by `signal`. True: the next one is started when its time
    /// [comes](Self::due).
    pub(super) fn died(&mut self, signal: i32) -> bool {
        if self.connections.is_empty() {
            return false;
        }
        let (own_fault, served) =
            (OWN_FAULT.contains(&signal), self.serves.take().map(|since| since.elapsed()));
        if served.is_some_and(|served| served >= HEALTHY) {
            self.faults.0 = 0;
        }
        self.faults = (self.faults.0 + u32::from(own_fault), own_fault);
        let healthy = if own_fault { HEALTHY } else { SERVED };
        if served.is_some_and(|served| served >= healthy) {
            self.deaths = 0;
        }
        let pause = PAUSES[self.deaths.min(PAUSES.len() - 1)];
        self.deaths += 1;
        let missed = self.died.get_or_insert_with(Instant::now).elapsed();
        self.next = (missed + pause < self.timeout).then(|| Instant::now() + pause);
        self.next.is_some()
    }

    /// So many daemons in a row died by their own fault, the last one included; 0: that one did not.
    pub(super) fn faults(&self) -> u32 {
        if self.faults.1 { self.faults.0 } else { 0 }
    }

    /// True while a daemon is missed.
    pub(super) fn is_missed(&self) -> bool {
        self.died.is_some()
    }

    /// When there is something to do: a daemon to be started, or none to be waited for any longer.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next.or_else(|| self.died.map(|since| since + self.timeout))
    }

    /// True when the next daemon is to be started: once for each death.
    pub(super) fn starts(&mut self) -> bool {
        self.next.take_if(|next| *next <= Instant::now()).is_some()
    }

    /// True when it was missed for too long.
    pub(super) fn is_over(&self) -> bool {
        self.died.is_some_and(|since| since.elapsed() >= self.timeout)
    }

    /// The successor serves. How many have by now, and how long there was none.
    pub(super) fn serves(&mut self) -> (u64, Duration) {
        self.serves = Some(Instant::now());
        self.restarts += 1;
        (self.restarts, self.died.take().map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// How many have gone on with the mount.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// Protects what a daemon gave to be kept. A leaf.
type Keepsakes = Arc<Mutex<Estate>>;

/// What is taken from a daemon, which may be anyone's by now: nothing but what it says it is, since the next daemon serves it,
/// and no more than leaves this process able to start that one.
#[derive(Clone, Copy)]
struct Bounds {
    /// How many files.
    files: u64,
    /// Which folder is served.
    images: Option<(u64, u64)>,
}

impl Bounds {
    fn allow(self, kept: &Estate, said: &Kept, given: &OwnedFd) -> bool {
        let Ok(stat) = rustix::fs::fstat(given) else { return false };
        let (kind, file) = (FileType::from_raw_mode(stat.st_mode), (stat.st_dev, stat.st_ino));
        match said {
            Kept::Keep { file: named, .. } => {
                let is_room = kept.files.contains_key(named) || (kept.files.len() as u64) < self.files;
                kind == FileType::RegularFile && file == *named && is_room
            }
            Kept::Fixture { what: Fixture::Folder } => Some(file) == self.images,
            Kept::Fixture { what: Fixture::Socket } => kind == FileType::Socket,
            Kept::Asks { .. } | Kept::LetGo { .. } => false,
        }
    }
}

impl Estate {
    /// What a daemon says of it; a `descriptor` comes with what it gives. False: that is not kept.
    fn hear(&mut self, said: Kept, descriptor: Option<OwnedFd>, bounds: &Bounds) -> bool {
        let descriptor = descriptor.filter(|given| bounds.allow(self, &said, given));
        match said {
            Kept::Keep { file, witness } => {
                let Some(descriptor) = descriptor else { return false };
                let open = self.files.entry(file).or_default();
                if witness {
                    open.witnesses.push(descriptor);
                } else {
                    *open = OpenFile { own: Some(descriptor), witnesses: Vec::new() };
                }
                if open.witnesses.len() > WITNESSES {
                    open.witnesses.remove(0);
                }
            }
            Kept::Fixture { what } => {
                let Some(descriptor) = descriptor else { return false };
                drop(self.fixtures.insert(what, descriptor));
            }
            Kept::Asks { file } => {
                if let Some(open) = self.files.get_mut(&file)
                    && !open.witnesses.is_empty()
                {
                    drop(open.witnesses.remove(0));
                }
            }
            Kept::LetGo { file } => drop(self.files.remove(&file)),
        }
        true
    }
}

fn again(descriptor: &OwnedFd) -> Result<OwnedFd> {
    descriptor
        .try_clone()
        .map_err(|e| Error::new(Kind::Io, format!("cannot hand on what the daemon had open: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn what_a_daemon_gives_is_kept_only_where_it_is_what_is_said_of_it() {
        let temp = tempfile::tempdir().expect("a folder");
        let identity =
            |of: &File| rustix::fs::fstat(of).map(|stat| (stat.st_dev, stat.st_ino)).expect("a status");
        let [folder, other] =
            [temp.path(), std::path::Path::new("/")].map(|at| File::open(at).expect("opens"));
        let [one, two] = [(), ()].map(|()| tempfile::tempfile_in(temp.path()).expect("a file"));
        let bounds = Bounds { files: 1, images: Some(identity(&folder)) };
        let mut estate = Estate::default();
        let mut give = |what: Kept, given: &File| {
            estate.hear(what, Some(given.try_clone().expect("again").into()), &bounds)
        };
        let own = |file| Kept::Keep { file, witness: false };
        assert!(!give(own(identity(&two)), &one), "another file");
        assert!(!give(own(identity(&folder)), &folder), "a folder");
        let null = File::open("/dev/null").expect("opens");
        assert!(!give(own(identity(&null)), &null), "a device");
        assert!(give(own(identity(&one)), &one));
        assert!(give(Kept::Keep { file: identity(&one), witness: true }, &one));
        assert!(!give(own(identity(&two)), &two), "one too many");
        assert!(give(Kept::LetGo { file: identity(&one) }, &one));
        assert!(give(own(identity(&two)), &two), "there is room again");
        let fixture = |what| Kept::Fixture { what };
        assert!(!give(fixture(Fixture::Folder), &other), "not the folder that is served");
        assert!(give(fixture(Fixture::Folder), &folder));
        assert!(!give(fixture(Fixture::Socket), &one), "no socket");
        assert_eq!((estate.files.len(), estate.fixtures.len()), (1, 1));
    }
}
