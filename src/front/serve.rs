//! A folder of images, mounted by this process.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, FolderOptions};
use crate::fuse::session::{self, Session, Settings, Transport};
use crate::io::mounts::{self, Mount};
use crate::io::unmount::unmount_this;
use crate::tree::{MountInfo, Tree};
use crate::vdisk::{Engine, Options};

/// A mounted folder of images: each is a flat file `NAME.img`, as with `ploopfs mount`, which adds a sandbox, a control
/// socket, a log, and a second process that cleans up when the first one dies.
///
/// ```no_run
/// let server = ploopfs::Server::mount("images", "/mnt/vdisks")?;
/// let stopper = server.stopper();
/// std::thread::spawn(move || {
///     std::thread::sleep(std::time::Duration::from_secs(3600));
///     stopper.stop()
/// });
/// server.run()?; // until it is unmounted, and the last file is closed
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Server {
    folder: Arc<Folder>,
    session: Session,
    mount: Mount,
}

/// Ends a [`Server`] from another thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    /// By its id: what is mounted there later is not ours.
    mount: Mount,
}

impl Server {
    /// Mounts the images of the folder `images` on the folder `mountpoint`. Requests wait until [`run`](Server::run).
    ///
    /// # Errors
    /// [`Kind::InUse`] where another mount serves the folder; [`Kind::NotFound`];
    /// what the mount fails with.
    pub fn mount(images: impl AsRef<Path>, mountpoint: impl AsRef<Path>) -> Result<Server> {
        let resolved =
            |path: &Path| path.canonicalize().map_err(|e| Error::io(&e, path, "cannot resolve the path"));
        let images = resolved(images.as_ref())?;
        let engine = Engine::new(Options::default(), Box::new(|event| log::warn!("{event}")));
        let folder = Folder::open(&images, &engine, FolderOptions::default())?;
        let transport = Transport::Fuse;
        let info = MountInfo {
            mountpoint: resolved(mountpoint.as_ref())?,
            transport: transport.name(),
            manage: false,
            sandbox: Arc::default(),
            restarts: Arc::default(),
        };
        let tree = Tree::new(folder.clone(), engine, info);
        let settings = Settings { fs_name: images.into(), ..Settings::default() };
        let session = session::mount(transport, tree, mountpoint.as_ref(), &settings)?;
        let missing = || Error::at(Kind::NotFound, session.mountpoint(), "was unmounted at once");
        let mount = mounts::at(session.mountpoint())?.ok_or_else(missing)?;
        Ok(Server { folder, session, mount })
    }

    /// The absolute path of the mount point.
    pub fn mountpoint(&self) -> &Path {
        self.session.mountpoint()
    }

    /// What ends it, from any thread.
    pub fn stopper(&self) -> Stopper {
        Stopper { mount: self.mount.clone() }
    }

    /// Serves until it is unmounted and the last file is closed. Every image is closed and durable when it returns.
    ///
    /// # Errors
    /// What the connection or the close of an image failed with.
    pub fn run(self) -> Result<()> {
        // Images that come and go in the folder come and go in the mount.
        self.folder.start_watch()?;
        let served = self.session.run();
        let mut closed = self.folder.close_all().into_iter();
        served.and_then(|()| closed.try_for_each(|(_, closed)| closed))
    }
}

impl Stopper {
    /// Takes the mount away from its place. Open files live on; [`Server::run`] returns when the last is closed.
    ///
    /// # Errors
    /// What umount(2) or fusermount3 fails with.
    pub fn stop(&self) -> Result<()> {
        unmount_this(&self.mount, true)
    }
}
