//! What all images of a folder have in common.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::deltas::Deltas;
use super::mounted::Silent;
use super::place::ImagesFolder;
use super::snapshots::KnownSnapshots;
use super::strand::Spawn;
use crate::ledger::Ledger;
use crate::vdisk::Engine;

/// The lane of jobs that are about no single image: images count from 1.
pub const FOLDER: u64 = 0;

/// Made once, when the folder is opened.
pub(super) struct Shared {
    pub(super) place: ImagesFolder,
    pub(super) engine: Arc<Engine>,
    pub(super) spawn: Spawn,
    pub(super) deltas: Arc<Deltas>,
    pub(super) read_only: bool,
    /// Deltas may lie anywhere.
    pub(super) allow_outside: bool,
    /// No image is opened any more.
    pub(super) refusing: AtomicBool,
    /// The kernel may read and write raw images in our place.
    pub(super) passthrough: AtomicBool,
    /// It was said that it does not.
    pub(super) passthrough_said: Arc<AtomicBool>,
    pub(super) snapshots: KnownSnapshots,
    /// Where what a successor needs is kept. None: there will be none.
    pub(super) ledger: Option<Arc<Ledger>>,
    pub(super) silent: Silent,
}

impl Shared {
    /// Runs jobs of the image number `id` on threads that may block, of which one image has few.
    pub(super) fn spawn_for(&self, id: u64) -> Spawn {
        let engine = self.engine.clone();
        Arc::new(move |job| engine.blocking(id, job))
    }
}

/// The folder, as its images know it.
pub(super) trait Around: Send + Sync {
    /// Looks at the folder again without taking in anything new.
    fn look_again(&self);
    /// Goes on with what a crash interrupted in the image `name`, if there is anything left to do. Blocks.
    fn finish(&self, name: &str);
}
