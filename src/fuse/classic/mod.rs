//! The `fuse` transport: /dev/fuse through fuser 0.18, several threads with a descriptor each, requests served on the
//! thread that read them (docs/kernel.md#hand-over: a hand-over costs half of a small request).

mod bridge;
mod convert;
mod door;
mod replies;
mod sessions;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{INodeNo, SessionACL};

use self::bridge::Bridge;
use self::door::Door;
use self::sessions::{Made, Threads};
use crate::error::Result;
use crate::fuse::handshake::{self, Begun};
use crate::fuse::lanes::Lanes;
use crate::fuse::notify;
use crate::fuse::ops::{FileSystem, Ino};
use crate::fuse::session::Connection;
use crate::fuse::settings::Settings;
use crate::io::{connection, process};
use crate::ledger::Handshake;

/// A mounted folder whose handshake is done; see [`fuse::session::Session`](crate::fuse::session::Session).
pub(super) struct Session {
    sessions: Vec<Made>,
    /// Some at a takeover: what the daemon before has read is asked for there.
    resend: Option<OwnedFd>,
    fs: Arc<dyn FileSystem>,
}

/// One that serves.
pub(super) struct Serving {
    threads: Threads,
    fs: Arc<dyn FileSystem>,
    sending: notify::Running,
}

/// Mounts, by `connect`, and answers the kernel's INIT. Opens all that the session needs, because a sandbox would not let
/// it later; starts no thread. Requests wait until [`Session::start`].
pub(super) fn begin(
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    settings: &Settings,
    connect: impl FnOnce() -> Result<Connection>,
) -> Result<Begun<Session>> {
    let connection = connect()?;
    // Each session has a buffer of 16 MiB, of which a request takes 1 MiB at most.
    process::give_memory_back();
    let passthrough = settings.passthrough.then(Arc::<AtomicBool>::default);
    let bridge = Bridge {
        fs: fs.clone(),
        lanes: Arc::new(Lanes::new(settings.threads)),
        door: Arc::default(),
        quiet: false,
        max_background: settings.max_background,
        passthrough: passthrough.clone(),
    };
    let (sessions, resend) =
        shake_hands(connection, &bridge, settings).map_err(|e| handshake::failed(&e, mountpoint))?;
    // There is at least one.
    let kernel = Kernel(sessions[0].notifier());
    let passes_through = passthrough.is_some_and(|agreed| agreed.load(Ordering::Acquire));
    Ok(Begun { session: Session { sessions, resend, fs }, kernel: Box::new(kernel), passes_through })
}

/// Makes a session for each thread, and answers INIT in the name of all.
///
/// The order: (1) INIT is read; (2) all sessions have had it, so that one that fails fails the mount; (3) the ledger has it;
/// (4) the kernel is answered, and sends requests from then on. 4 before 3: a successor could not take the mount over.
///
/// Where the ledger has a handshake, its INIT is the kernel's, and the answer must be the one that the kernel has had.
/// Returns the descriptor to ask for what another daemon had read, where there is one.
fn shake_hands(
    connection: Connection,
    bridge: &Bridge,
    settings: &Settings,
) -> io::Result<(Vec<Made>, Option<OwnedFd>)> {
    let Connection { descriptors: given, ledger } = connection;
    let connections = descriptors(given, settings.threads, ledger.is_some())?;
    let before = ledger.as_ref().and_then(|ledger| ledger.handshake());
    let init = match &before {
        Some(before) => before.init.clone(),
        None => handshake::offer(connections[0].as_fd())?, // 1
    };
    let kernel = connections[0].try_clone()?;
    let mut config = fuser::Config::default();
    // A descriptor handed over, not a mount: fuser then never unmounts (see fuse/mount).
    config.acl = if settings.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(1);
    let mut sessions = Vec::new();
    let mut agreed: Option<Vec<u8>> = None;
    for connection in connections {
        let bridge = Bridge { door: Arc::<Door>::default(), quiet: agreed.is_some(), ..bridge.clone() };
        let (made, answer) = sessions::make(bridge, &init, connection, config.clone(), ledger.is_some())?;
        debug_assert!(agreed.as_ref().is_none_or(|first| *first == answer), "all agree to the same");
        agreed.get_or_insert(answer);
        sessions.push(made);
    } // 2
    let answer = agreed.unwrap_or_default();
    if let Some(before) = before {
        return match before.answer == answer {
            true => Ok((sessions, Some(kernel))),
            false => Err(io::Error::other("this program cannot do what was agreed with the kernel")),
        };
    }
    if let Some(ledger) = ledger
        && !ledger.keep_handshake(&Handshake { init, answer: answer.clone() })
    {
        ledger.beyond();
    } // 3
    rustix::io::write(&kernel, &answer)?; // 4
    Ok((sessions, None))
}

/// A descriptor for each of `count` threads, the given ones first. `kept`: what is read from one that only this process has
/// would be lost with it, so none is made.
fn descriptors(mut all: Vec<OwnedFd>, count: usize, kept: bool) -> io::Result<Vec<OwnedFd>> {
    if all.is_empty() {
        return Err(io::Error::other("there is no connection to the kernel"));
    }
    all.truncate(count);
    let mut cloned = !kept;
    while all.len() < count {
        let next = cloned.then(|| connection::another(all[0].as_fd())).transpose();
        let next = next.unwrap_or_else(|e| {
            // An ordinary user may not be able to open it.
            let what = connection::DEVICE;
            log::warn!("{what}: {e}: the transport threads share one descriptor, which is slower");
            cloned = false;
            None
        });
        all.push(next.map_or_else(|| all[0].try_clone(), Ok)?);
    }
    Ok(all)
}

impl Session {
    /// Starts the session's threads; all there are, and requests are served, when it returns.
    pub(super) fn start(self, sending: notify::Running) -> Result<Serving> {
        let threads = sessions::start(self.sessions, self.resend)?;
        Ok(Serving { threads, fs: self.fs, sending })
    }
}

impl Serving {
    /// Returns when the connection has ended, and the file system knows.
    pub(super) fn wait(self) -> io::Result<()> {
        let Serving { threads, fs, sending } = self;
        let served = threads.wait();
        // The sink holds a descriptor of the connection: it goes first, so that a failure leaves a dead mount and not
        // one that hangs.
        drop(sending);
        fs.ended();
        served
    }
}

struct Kernel(fuser::Notifier);

impl notify::Sink for Kernel {
    fn inval_attributes(&self, ino: Ino) -> io::Result<()> {
        self.0.inval_inode(INodeNo(ino), -1, 0)
    }

    fn inval_entry(&self, parent: Ino, name: &OsStr) -> io::Result<()> {
        self.0.inval_entry(INodeNo(parent), name)
    }
}
