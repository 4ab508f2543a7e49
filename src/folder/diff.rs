//! What differs between two snapshots of a served image.

use super::set::Folder;
use crate::error::{Error, Kind, Result};
use crate::image::diff::{self, Diff};

impl Folder {
    /// Compares two snapshots of the image `name` (without `.img`), or one with the live disk (`to` None), from byte
    /// `start` on. Blocks; not for threads of the engine or a transport.
    pub fn diff(&self, name: &str, from: &str, to: Option<&str>, start: u64) -> Result<Diff> {
        let open = self.open_image(name, false)?;
        let none =
            || Error::at(Kind::NotFound, open.entry().path(), "is a single file, and has no snapshots");
        let layers = open.entry().live_layers().ok_or_else(none)?;
        // The map in the file says all that was acknowledged until now. A snapshot's does so at any time.
        open.image().flush_now()?;
        diff::diff(&layers, from, to, start)
    }
}
