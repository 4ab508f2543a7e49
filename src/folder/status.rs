//! The images of a folder as `list` shows them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use super::entry::Entry;
use super::scan::{Claim, Source};
use super::set::Folder;

/// One image of the folder, as `list` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// The image's name, without `.img`.
    pub name: OsString,
    /// Its file or folder.
    pub path: PathBuf,
    /// "ploop", "raw" or "layered".
    pub kind: &'static str,
    /// Disk size in bytes; 0 when it is not known.
    pub size: u64,
    /// Space taken on the host in bytes.
    pub allocated: u64,
    /// Shown in the mount.
    pub served: bool,
    /// Why it is not served, or what a person should know.
    pub reason: Option<String>,
    /// "closed", "read-only", "write", "full-queue" or "full-error".
    pub mode: &'static str,
    /// How often it is open.
    pub openers: u32,
}

impl Folder {
    /// All images, served or left out, sorted by name.
    pub fn images(&self) -> Vec<ImageStatus> {
        self.look_at_all();
        let mut images: Vec<ImageStatus> = self.entries().iter().map(status).collect();
        let left_out = self.left_out();
        images.extend(left_out.into_iter().map(|(claim, reason)| self.left_out_status(&claim, reason)));
        images.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
        images
    }

    fn left_out_status(&self, claim: &Claim, reason: String) -> ImageStatus {
        let stat =
            rustix::fs::statat(self.shared.place.fd(), &claim.file, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
        ImageStatus {
            name: claim.name.clone(),
            path: self.path().join(&claim.file),
            kind: match claim.source {
                Source::File(kind) => kind.as_str(),
                Source::Layers => "layered",
            },
            size: claim.size,
            allocated: stat.map_or(0, |s| s.st_blocks as u64 * 512),
            served: false,
            reason: Some(reason),
            mode: "closed",
            openers: 0,
        }
    }
}

fn status(entry: &Arc<Entry>) -> ImageStatus {
    let attributes = entry.known_attributes();
    ImageStatus {
        name: entry.name().to_owned(),
        path: entry.shown_path(),
        kind: entry.kind(),
        size: attributes.size,
        allocated: attributes.host.blocks * 512,
        served: true,
        reason: entry.trouble(),
        mode: entry.mode(),
        openers: entry.openers(),
    }
}
