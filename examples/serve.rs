//! Serves a folder of images through the library, in the foreground: `serve IMAGES MOUNTPOINT`. Ends when it is unmounted,
//! and on SIGTERM or SIGINT, when the last file is closed; every image is on disk then. `ploopfs mount` does the same
//! with a sandbox, a control socket, a log, and a second process that cleans up when the first one dies.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use ploopfs::folder::{Folder, FolderOptions};
use ploopfs::fuse::session::{self, Settings, Transport};
use ploopfs::io::unmount::unmount;
use ploopfs::tree::{MountInfo, Tree};
use ploopfs::vdisk::{Engine, Options};

/// Serve the images of a folder as flat files.
#[derive(Parser)]
struct Arguments {
    /// The folder of images.
    images: PathBuf,
    /// Where to show them.
    mountpoint: PathBuf,
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    let arguments = Arguments::parse();
    let images = std::fs::canonicalize(&arguments.images)?;
    // Before the mount, so that a signal never leaves one behind.
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;

    let engine = Engine::new(Options::default(), Box::new(|event| log::warn!("{event}")));
    let folder = Folder::open(&images, &engine, FolderOptions::default())?;
    let info = MountInfo {
        mountpoint: std::fs::canonicalize(&arguments.mountpoint)?,
        transport: Transport::Fuse.name(),
        manage: false,
        sandbox: Arc::default(),
    };
    let tree = Tree::new(folder.clone(), engine, info);
    let settings = Settings { fs_name: images.into(), ..Settings::default() };
    let session = session::mount(Transport::Fuse, tree, &arguments.mountpoint, &settings)?;
    // Images that come and go in the folder come and go in the mount.
    folder.start_watch()?;

    let mountpoint = session.mountpoint().to_owned();
    let stop = signals.handle();
    let ender = std::thread::spawn(move || {
        if signals.forever().next().is_some()
            && let Err(e) = unmount(&mountpoint, true)
        {
            log::error!("{e}");
        }
    });
    let served = session.run();
    stop.close();
    // Durable, marked as closed, and free for others.
    for (name, result) in folder.close_all() {
        result.map_err(|e| anyhow::anyhow!("{name}: not closed cleanly: {e}"))?;
    }
    if ender.join().is_err() {
        log::error!("the signal thread panicked");
    }
    Ok(served?)
}
