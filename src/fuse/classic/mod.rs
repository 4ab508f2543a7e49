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
use crate::fuse::settings::Settings;
use crate::io::{connection, process};

/// A mounted folder whose handshake is done; see [`fuse::session::Session`](crate::fuse::session::Session).
pub(super) struct Session {
    sessions: Vec<Made>,
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
    connect: impl FnOnce() -> Result<OwnedFd>,
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
    let sessions =
        shake_hands(connection, &bridge, settings).map_err(|e| handshake::failed(&e, mountpoint))?;
    // There is at least one.
    let kernel = Kernel(sessions[0].notifier());
    let passes_through = passthrough.is_some_and(|agreed| agreed.load(Ordering::Acquire));
    Ok(Begun { session: Session { sessions, fs }, kernel: Box::new(kernel), passes_through })
}

/// Makes a session for each thread, and answers INIT in the name of all.
///
/// The order: (1) INIT is read; (2) all sessions have had it, so that one that fails fails the mount; (3) the kernel is
/// answered, and sends requests from then on.
fn shake_hands(connection: OwnedFd, bridge: &Bridge, settings: &Settings) -> io::Result<Vec<Made>> {
    let connections = descriptors(connection, settings.threads)?;
    let init = handshake::offer(connections[0].as_fd())?; // 1
    let kernel = connections[0].try_clone()?;
    let mut config = fuser::Config::default();
    // A descriptor handed over, not a mount: fuser then never unmounts (see fuse/mount).
    config.acl = if settings.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(1);
    let mut sessions = Vec::new();
    let mut agreed: Option<Vec<u8>> = None;
    for connection in connections {
        let bridge = Bridge { door: Arc::<Door>::default(), quiet: agreed.is_some(), ..bridge.clone() };
        let (made, answer) = sessions::make(bridge, &init, connection, config.clone())?;
        debug_assert!(agreed.as_ref().is_none_or(|first| *first == answer), "all agree to the same");
        agreed.get_or_insert(answer);
        sessions.push(made);
    } // 2
    rustix::io::write(&kernel, &agreed.unwrap_or_default())?; // 3
    Ok(sessions)
}

/// A descriptor for each of `count` threads, the given one first.
fn descriptors(connection: OwnedFd, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut all = vec![connection];
    let mut cloned = true;
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
        let threads = sessions::start(self.sessions)?;
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
