//! A mounted folder and its transport, whichever it is.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::fuse::mount::Asked;
use crate::fuse::notify::Notifier;
use crate::fuse::ops::FileSystem;
use crate::fuse::{classic, uring};

/// How a folder is mounted and served.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Transport threads, at least 1. More let more requests wait on the host at once, but each wakes cache-cold.
    pub threads: usize,
    /// Let users other than the mounting one in. Ordinary users need `user_allow_other` in /etc/fuse.conf for it.
    pub allow_other: bool,
    /// Refuse every change.
    pub read_only: bool,
    /// The source shown by findmnt: the images folder.
    pub fs_name: OsString,
    /// How many asynchronous requests the kernel may have outstanding, over all images of the mount: the true
    /// queue depth of loop devices and libaio. The kernel holds ordinary users to fs/fuse's max_user_bgreq.
    pub max_background: u16,
    /// Agree with the kernel on passthrough, where it has it: see [`Session::passes_through`].
    pub passthrough: bool,
    /// What was asked of mount(8).
    pub asked: Asked,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            // One per CPU; below 2 a single slow write would stop the mount, above 8 they only share a queue lock.
            threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
            allow_other: rustix::process::geteuid().is_root(),
            read_only: false,
            fs_name: "ploopfs".into(),
            // 256 for each of 16 busy loop devices.
            max_background: 4096,
            passthrough: false,
            asked: Asked::default(),
        }
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
pub struct Session(Of);

enum Of {
    Fuse(classic::Session),
    Uring(uring::Session),
}

/// A mounted folder that is served.
pub struct Serving(Served);

enum Served {
    Fuse(classic::Serving),
    Uring(uring::Serving),
}

impl Serving {
    /// Returns when the connection has ended (ENODEV: unmounted, and the last file closed; or aborted), and the file
    /// system knows.
    pub fn wait(self) -> Result<()> {
        match self.0 {
            Served::Fuse(serving) => serving.wait(),
            Served::Uring(serving) => serving.wait(),
        }
    }
}

/// Mounts on `mountpoint` and answers the kernel's INIT. Starts no thread; requests wait until [`Session::start`].
pub fn mount(
    transport: Transport,
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    settings: &Settings,
) -> Result<Session> {
    if settings.threads == 0 || settings.max_background == 0 {
        return Err(Error::new(
            Kind::Invalid,
            "a mount needs at least one thread and one background request",
        ));
    }
    Ok(Session(match transport {
        Transport::Fuse => Of::Fuse(classic::mount(fs, mountpoint, settings)?),
        Transport::Uring => Of::Uring(uring::mount(fs, mountpoint, settings)?),
    }))
}

impl Session {
    /// Starts the session's threads. When it returns all of them exist and serve; an error is a thread that could not be
    /// had, and ends the session.
    pub fn start(self) -> Result<Serving> {
        Ok(Serving(match self.0 {
            Of::Fuse(session) => Served::Fuse(session.start()?),
            Of::Uring(session) => Served::Uring(session.start()?),
        }))
    }

    /// [`start`](Session::start) and [`wait`](Serving::wait) in one.
    pub fn run(self) -> Result<()> {
        self.start()?.wait()
    }

    /// Announces changes to the kernel, from any thread, under any lock; also after the session has ended.
    pub fn notifier(&self) -> Notifier {
        match &self.0 {
            Of::Fuse(session) => session.notifier(),
            Of::Uring(session) => session.notifier(),
        }
    }

    /// True when passthrough was asked for and the kernel has it: answers to OPEN may then name a host file
    /// ([`Opened::backing`](crate::fuse::ops::Opened::backing)).
    pub fn passes_through(&self) -> bool {
        match &self.0 {
            Of::Fuse(session) => session.passes_through(),
            Of::Uring(session) => session.passes_through(),
        }
    }

    /// The absolute path of the mount point, as it was before the mount.
    pub fn mountpoint(&self) -> &Path {
        match &self.0 {
            Of::Fuse(session) => session.mountpoint(),
            Of::Uring(session) => session.mountpoint(),
        }
    }
}
