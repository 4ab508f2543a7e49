//! Serves a folder of images in the foreground: `serve IMAGES MOUNTPOINT`. Ends when it is unmounted, and on SIGTERM or
//! SIGINT, when the last file is closed; every image is on disk then.

use std::path::PathBuf;

use clap::Parser;

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
    // Before the mount, so that a signal never leaves one behind.
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    let server = ploopfs::Server::mount(&arguments.images, &arguments.mountpoint)?;
    let stopper = server.stopper();
    std::thread::spawn(move || {
        if signals.forever().next().is_some()
            && let Err(e) = stopper.stop()
        {
            log::error!("{e}");
        }
    });
    Ok(server.run()?)
}
