//! The `fuse` transport: /dev/fuse through fuser 0.18, several threads with a cloned descriptor each, requests
//! served on the thread that read them (FUSE.md 0: a hand-over costs half of a small request).

mod bridge;
mod convert;
mod replies;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{INodeNo, SessionACL};

use self::bridge::Bridge;
use crate::error::{Error, Result};
use crate::fuse::lanes::Lanes;
use crate::fuse::mount::{self, DEVICE};
use crate::fuse::notify::{self, Notifier};
use crate::fuse::ops::{FileSystem, Ino};
use crate::fuse::session::Settings;
use crate::io::unmount::unmount;

/// A mounted folder whose handshake is done. Dropping it without [`run`](Session::run) closes the connection and
/// leaves a dead mount point: [`unmount`] it.
pub struct Session {
    fuser: fuser::Session<Bridge>,
    fs: Arc<dyn FileSystem>,
    lanes: Arc<Lanes>,
    notifier: Notifier,
    notifications: notify::Pending,
    mountpoint: PathBuf,
    passes_through: bool,
}

/// Mounts on `mountpoint` and answers the kernel's INIT. Starts no thread; requests wait until [`Session::run`].
pub fn mount(fs: Arc<dyn FileSystem>, mountpoint: &Path, settings: &Settings) -> Result<Session> {
    // Before the mount: afterwards looking at the path would wait for ourselves.
    let mountpoint = mount::absolute(mountpoint)?;
    let (allow_other, read_only) = (settings.allow_other, settings.read_only);
    let options = mount::Options {
        source: settings.fs_name.clone(),
        allow_other,
        read_only,
        asked: settings.asked.clone(),
    };
    let connection = mount::mount(&mountpoint, &options)?;

    let lanes = Arc::new(Lanes::new(settings.threads));
    let passthrough = settings.passthrough.then(Arc::<AtomicBool>::default);
    let bridge = Bridge {
        fs: fs.clone(),
        lanes: lanes.clone(),
        max_background: settings.max_background,
        passthrough: passthrough.clone(),
    };
    // A descriptor handed over, not a mount: fuser then never unmounts (see fuse/mount).
    let mut config = fuser::Config::default();
    config.acl = if allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(settings.threads);
    config.clone_fd = settings.threads > 1 && device_opens();
    let fuser = fuser::Session::from_fd(bridge, connection, config.acl, config).map_err(|e| {
        if let Err(left) = unmount(&mountpoint, true) {
            log::error!("{left}");
        }
        Error::io(&e, &mountpoint, "the handshake with the kernel failed")
    })?;
    let (notifier, notifications) = notify::queue(Box::new(Kernel(fuser.notifier())));
    let passes_through = passthrough.is_some_and(|agreed| agreed.load(Ordering::Acquire));
    Ok(Session { fuser, fs, lanes, notifier, notifications, mountpoint, passes_through })
}

/// Cloning needs /dev/fuse itself, which an ordinary user may not be able to open; threads then share one
/// descriptor.
fn device_opens() -> bool {
    match std::fs::File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => true,
        Err(e) => {
            log::warn!("{DEVICE}: {e}: the transport threads share one descriptor, which is slower");
            false
        }
    }
}

impl Session {
    /// Serves on the session's threads until the connection has ended (ENODEV: unmounted, and the last file
    /// closed; or aborted), then tells the file system. Opens /dev/fuse once per thread: a sandbox must allow it.
    pub fn run(self) -> Result<()> {
        let Session { fuser, fs, lanes, notifier: _, notifications, mountpoint, passes_through: _ } = self;
        let sending = notifications.start()?;
        let served = fuser.run();
        // The sink holds a descriptor of the connection: it goes first, so that a failed `run` leaves a dead mount
        // and not one that hangs.
        drop(sending);
        lanes.close();
        fs.ended();
        match served {
            Ok(()) => Ok(()),
            // The administrator's abort; fuser takes it for an error.
            Err(e) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            Err(e) => Err(Error::io(&e, &mountpoint, "the connection to the kernel failed")),
        }
    }

    /// Announces changes to the kernel, from any thread, under any lock; also after the session has ended.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// See [`fuse::session::Session::passes_through`](crate::fuse::session::Session::passes_through).
    pub fn passes_through(&self) -> bool {
        self.passes_through
    }

    /// The absolute path of the mount point, as it was before the mount.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}

struct Kernel(fuser::Notifier);

impl notify::Sink for Kernel {
    fn inval_inode(&self, ino: Ino, offset: i64, len: i64) -> io::Result<()> {
        self.0.inval_inode(INodeNo(ino), offset, len)
    }

    fn inval_entry(&self, parent: Ino, name: &OsStr) -> io::Result<()> {
        self.0.inval_entry(INodeNo(parent), name)
    }
}
