//! What the daemon answers on its control socket.

use std::ffi::OsStr;
use std::sync::Arc;

use super::settings::Settings;
use super::stop::Ending;
use super::works::Works;
use crate::control::protocol::content::SnapshotAnswer;
use crate::control::protocol::{Answer, Hello, ImageLine, Op};
use crate::control::server::{Peer, Service};
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::fuse::session::Transport;
use crate::image::kind::in_text;
use crate::tree::{Document, MountInfo, Restarts, Sandbox, document};
use crate::vdisk::live::Work;

/// What distinguishes this daemon and its mount from others.
#[derive(Clone, Debug)]
pub(super) struct DaemonIdentity {
    /// Process id of the keeper: our parent when we started.
    pub keeper: u32,
    /// Of the mount's file system.
    pub device: Option<(u32, u32)>,
    /// How often a daemon of the mount was replaced.
    pub restarts: Arc<Restarts>,
}

/// The folder and its end, as clients see them.
pub(super) struct Desk {
    settings: Settings,
    folder: Arc<Folder>,
    ending: Arc<Ending>,
    identity: DaemonIdentity,
    sandbox: Sandbox,
    transport: Transport,
    works: Works,
}

impl Desk {
    /// A desk for one served folder.
    pub(super) fn new(
        settings: Settings,
        folder: Arc<Folder>,
        ending: Arc<Ending>,
        identity: DaemonIdentity,
        sandbox: Sandbox,
        transport: Transport,
    ) -> Desk {
        let works = Works::in_folder(folder.clone());
        Desk { settings, folder, ending, identity, sandbox, transport, works }
    }

    fn hello(&self) -> Hello {
        Hello {
            pid: std::process::id(),
            keeper: self.identity.keeper,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mountpoint: self.settings.mountpoint().to_string_lossy().into_owned(),
            images: self.settings.images().to_string_lossy().into_owned(),
            transport: self.transport.name().to_owned(),
            read_only: self.settings.read_only,
            closing: self.ending.is_closing(),
            device: self.identity.device,
            restarts: self.identity.restarts.count(),
            last_pause_ms: self.identity.restarts.last_pause_ms(),
        }
    }

    fn stats(&self) -> Document {
        let mountpoint = self.settings.mountpoint().to_owned();
        let info = MountInfo {
            mountpoint,
            transport: self.transport.name(),
            sandbox: Arc::new(self.sandbox.into()),
            manage: self.settings.manage,
            restarts: self.identity.restarts.clone(),
        };
        document(&self.folder, &info)
    }

    fn images(&self) -> Vec<ImageLine> {
        let line = |image: crate::folder::ImageStatus| ImageLine {
            name: in_text(&image.name),
            path: in_text(image.path.as_os_str()),
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

    /// Says at once, and in words, what the sandbox would only answer with EACCES.
    fn refuse_outside(&self, work: &Work) -> Result<()> {
        match work {
            Work::Clone { to, .. } if self.sandbox.landlock => {
                let Some(to) = to.iter().find(|to| !self.folder.is_around(to)) else { return Ok(()) };
                let why = "lies outside of the images folder, to which the daemon is confined; clone it into the images \
                           folder, unmount it first, or mount it with --no-sandbox";
                Err(Error::at(Kind::NotPermitted, to, why))
            }
            _ => Ok(()),
        }
    }

    /// Who holds what is in use is named: the command waits for it, and nothing else does.
    fn answer<T>(&self, result: Result<T>, filled: impl FnOnce(T) -> Answer) -> Answer {
        result.map_or_else(|e| Answer::failed(&self.folder.named(e)), filled)
    }

    fn snapshots(&self, image: &str) -> Result<Vec<SnapshotLine>> {
        let missing = || Error::at(Kind::NotFound, self.folder.path().join(image), "no such image is served");
        let entry = self.folder.find_text(image).ok_or_else(missing)?;
        entry.snapshot_lines()
    }
}

impl Service for Desk {
    fn serve(&self, op: Op, caller: &dyn Peer) -> Answer {
        match op {
            Op::Hello => Answer { hello: Some(self.hello()), ..Answer::done() },
            Op::List => Answer { images: Some(self.images()), ..Answer::done() },
            Op::Rescan { made: None } => self.answer(self.folder.rescan_now(), |()| Answer::done()),
            Op::Rescan { made: Some(file) } => {
                self.answer(self.folder.take_in(OsStr::new(&file)), |()| Answer::done())
            }
            Op::Stop => {
                self.ending.request("stop");
                Answer::done()
            }
            Op::Wait => Answer { closed: self.ending.wait_closed(&|| caller.gone()), ..Answer::done() },
            Op::Work { image, work, rate } => {
                let work = Work::from(work);
                if let Err(e) = self.refuse_outside(&work) {
                    return Answer::failed(&e);
                }
                match self.works.carry_out(&image, work, rate, caller) {
                    Some(result) => {
                        self.answer(result, |done| Answer { done: Some(done.into()), ..Answer::done() })
                    }
                    // The client is gone.
                    None => Answer::done(),
                }
            }
            Op::Cancel { image } => self.answer(self.works.cancel(&image), |()| Answer::done()),
            Op::Stats => Answer { stats: Some(self.stats().into()), ..Answer::done() },
            Op::Map { image, snapshot, offset } => {
                let piece = self.folder.map_piece(&image, snapshot.as_deref(), offset);
                self.answer(piece, |piece| Answer { map: Some(piece.into()), ..Answer::done() })
            }
            Op::Changes { image, start } => self.answer(self.folder.changes(&image, start), |changes| {
                Answer { changes: Some(changes.into()), ..Answer::done() }
            }),
            Op::Diff { image, from, to, start } => {
                let diff = self.folder.diff(&image, &from, to.as_deref(), start);
                self.answer(diff, |diff| Answer { diff: Some(diff.into()), ..Answer::done() })
            }
            Op::Snapshots { image } => self.answer(self.snapshots(&image), |found| {
                let lines = found.into_iter().map(SnapshotAnswer::from).collect();
                Answer { snapshots: Some(lines), ..Answer::done() }
            }),
        }
    }
}
