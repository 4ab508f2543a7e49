//! What an image is while it is open.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;

use crate::image::layers::{Layers, Opened};
use crate::vdisk::Image;

/// An image while it is open.
pub(super) struct Live {
    pub(super) image: Arc<Image>,
    pub(super) can_write: bool,
    pub(super) never_blocks: bool,
    /// Its descriptor and files; None for a single file.
    pub(super) layers: ArcSwapOption<Layers>,
    /// Protects the end of a single file's lock: it is given back at the close itself and not when the last
    /// reader is gone. A leaf.
    pub(super) hold: Mutex<Option<Opened>>,
}
