//! What the daemon answers on its control socket.

use std::sync::Arc;

use super::settings::Settings;
use super::stop::Ending;
use crate::control::protocol::{Answer, Hello, ImageLine, Op};
use crate::control::server::Service;
use crate::folder::Folder;

/// The folder and its end, as clients see them.
pub struct Desk {
    settings: Settings,
    folder: Arc<Folder>,
    ending: Arc<Ending>,
    /// Process id of the keeper: our parent when we started.
    keeper: u32,
}

impl Desk {
    /// A desk for one served folder.
    pub fn new(settings: Settings, folder: Arc<Folder>, ending: Arc<Ending>, keeper: u32) -> Desk {
        Desk { settings, folder, ending, keeper }
    }

    fn hello(&self) -> Hello {
        Hello {
            pid: std::process::id(),
            keeper: self.keeper,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mountpoint: self.settings.mountpoint().to_string_lossy().into_owned(),
            images: self.settings.images().to_string_lossy().into_owned(),
            transport: "fuse".to_owned(),
            read_only: self.settings.read_only,
        }
    }

    fn images(&self) -> Vec<ImageLine> {
        let line = |image: crate::folder::ImageStatus| ImageLine {
            name: image.name.to_string_lossy().into_owned(),
            path: image.path.to_string_lossy().into_owned(),
            kind: image.kind.to_owned(),
            size: image.size,
            allocated: image.allocated,
            served: image.served,
            reason: image.reason,
            mode: image.mode.to_owned(),
            openers: image.openers.into(),
        };
        self.folder.images().into_iter().map(line).collect()
    }
}

impl Service for Desk {
    fn serve(&self, op: Op, gone: &dyn Fn() -> bool) -> Answer {
        match op {
            Op::Hello => Answer { hello: Some(self.hello()), ..Answer::done() },
            Op::List => Answer { images: Some(self.images()), ..Answer::done() },
            Op::Rescan => match self.folder.rescan_now() {
                Ok(()) => Answer::done(),
                Err(e) => Answer::failed(&e),
            },
            Op::Stop => {
                self.ending.request("stop");
                Answer::done()
            }
            Op::Wait => Answer { closed: self.ending.wait_closed(gone), ..Answer::done() },
        }
    }
}
