//! Files that were opened before they were images (`mount --manage`).

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, Weak};

use crate::folder::OpenImage;
use crate::fuse::ops::{Answer, Errno};

/// Who makes which image. A leaf.
pub(super) type Makers = Mutex<HashMap<u64, Weak<Unborn>>>;

/// Which disk: an image's number, and the snapshot where it is one.
pub(super) type Disk = (u64, Option<String>);

/// A file that was opened before it was an image.
pub(super) struct Unborn {
    /// The number that its image will have.
    pub(super) id: u64,
    /// The handle may write.
    pub(super) writes: bool,
    /// This handle created the name.
    pub(super) made: bool,
    /// The image, once it is there and a caller asked for it; or why it cannot be opened.
    pub(super) image: OnceLock<Answer<OpenImage>>,
    /// What it was cloned from. A leaf.
    pub(super) cloned: Mutex<Option<Disk>>,
    /// One change of size at a time. Before the folder's locks; held across the change.
    pub(super) growing: Mutex<()>,
}

impl Unborn {
    /// The image, if it is there.
    pub(super) fn image(&self) -> Option<&OpenImage> {
        self.image.get()?.as_ref().ok()
    }

    /// Why a write does nothing: the image cannot be opened, or has no size yet.
    pub(super) fn refusal(&self) -> Errno {
        match self.image.get() {
            Some(Err(errno)) => *errno,
            _ => Errno(libc::ENOSPC),
        }
    }
}
