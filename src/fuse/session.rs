//! A mounted folder and its transport, whichever it is.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::fuse::handshake::Begun;
use crate::fuse::mount;
use crate::fuse::notify::{self, Notifier};
use crate::fuse::ops::FileSystem;
pub use crate::fuse::settings::Settings;
use crate::fuse::{classic, uring};
use crate::io::unmount::unmount;
use crate::ledger::Ledger;

/// The connection to the kernel.
pub struct Connection {
    /// The mount's own descriptor, and others of the same connection, as far as there are.
    pub descriptors: Vec<OwnedFd>,
    /// Where the handshake is kept. With one in it the mount has another daemon's requests: they are sent again, and the
    /// kernel is not answered.
    pub ledger: Option<Arc<Ledger>>,
}

impl From<OwnedFd> for Connection {
    fn from(only: OwnedFd) -> Connection {
        Connection { descriptors: vec![only], ledger: None }
    }
}

/// How requests arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// /dev/fuse.
    Fuse,
    /// Rings of io_uring, one for each CPU.
    Uring,
}

impl Transport {
    /// As the command line and the live counters call it.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Fuse => "fuse",
            Transport::Uring => "uring",
        }
    }

    /// The rings where this system has them; else /dev/fuse, and why.
    pub fn best() -> (Transport, Option<Error>) {
        match uring::available() {
            Ok(()) => (Transport::Uring, None),
            Err(why) => (Transport::Fuse, Some(why)),
        }
    }
}

/// A mounted folder whose handshake is done. Dropping it without [`start`](Session::start) closes the connection and
/// leaves a dead mount point: [`unmount`](crate::io::unmount::unmount) it.
pub struct Session {
    of: Of,
    notifier: Notifier,
    notifications: notify::Pending,
    mountpoint: PathBuf,
    passes_through: bool,
}

enum Of {
    Fuse(classic::Session),
    Uring(uring::Session),
}

/// A mounted folder that is served.
pub struct Serving {
    of: Served,
    mountpoint: PathBuf,
}

enum Served {
    Fuse(classic::Serving),
    Uring(uring::Serving),
}

impl Serving {
    /// Returns when the connection has ended (ENODEV: unmounted, and the last file closed; or aborted), and the file
    /// system knows.
    pub fn wait(self) -> Result<()> {
        let ended = match self.of {
            Served::Fuse(serving) => serving.wait(),
            Served::Uring(serving) => serving.wait(),
        };
        ended.map_err(|e| Error::io(&e, &self.mountpoint, "the connection to the kernel failed"))
    }
}

/// Mounts on `mountpoint` and answers the kernel's INIT. Starts no thread; requests wait until [`Session::start`].
pub fn mount(
    transport: Transport,
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    settings: &Settings,
) -> Result<Session> {
    // Before the mount: afterwards looking at the path would wait for ourselves.
    let mountpoint = mount::absolute(mountpoint)?;
    let options = mount::MountOptions {
        source: settings.fs_name.clone(),
        allow_other: settings.allow_other,
        read_only: settings.read_only,
        asked: settings.asked.clone(),
    };
    let mounted = Cell::new(false);
    let connect = || {
        let connection = mount::mount(&mountpoint, &options);
        mounted.set(connection.is_ok());
        connection.map(Connection::from)
    };
    let session = over(transport, fs, &mountpoint, settings, connect);
    if session.is_err()
        && mounted.get()
        && let Err(left) = unmount(&mountpoint, true)
    {
        log::error!("{left}");
    }
    session
}

/// The same over a connection that something else mounts on `mountpoint`, an absolute path, when `connect` is called; to
/// unmount after an error is its business, too. `connect` is called once all is there that may be refused before.
pub fn over(
    transport: Transport,
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    settings: &Settings,
    connect: impl FnOnce() -> Result<Connection>,
) -> Result<Session> {
    if settings.threads == 0 || settings.max_background == 0 {
        return Err(Error::new(
            Kind::Invalid,
            "a mount needs at least one thread and one background request",
        ));
    }
    let begun = match transport {
        Transport::Fuse => classic::begin(fs, mountpoint, settings, connect)?.map(Of::Fuse),
        Transport::Uring => uring::begin(fs, mountpoint, settings, connect)?.map(Of::Uring),
    };
    let Begun { session: of, kernel, passes_through } = begun;
    let (notifier, notifications) = notify::queue(kernel);
    Ok(Session { of, notifier, notifications, mountpoint: mountpoint.to_owned(), passes_through })
}

impl Session {
    /// Starts the session's threads. When it returns all of them exist and serve; an error is a thread that could not be
    /// had, and ends the session.
    pub fn start(self) -> Result<Serving> {
        // The first of them: a transport's own begin to serve at once, and may notify.
        let sending = self.notifications.start()?;
        let of = match self.of {
            Of::Fuse(session) => Served::Fuse(session.start(sending)?),
            Of::Uring(session) => Served::Uring(session.start(sending)?),
        };
        Ok(Serving { of, mountpoint: self.mountpoint })
    }

    /// [`start`](Session::start) and [`wait`](Serving::wait) in one.
    pub fn run(self) -> Result<()> {
        self.start()?.wait()
    }

    /// Announces changes to the kernel, from any thread, under any lock; also after the session has ended.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// True when passthrough was asked for and the kernel has it: answers to OPEN may then name a host file
    /// ([`Opened::backing`](crate::fuse::ops::Opened::backing)).
    pub fn passes_through(&self) -> bool {
        self.passes_through
    }

    /// The absolute path of the mount point, as it was before the mount.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}
