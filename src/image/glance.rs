//! What a look at an image at rest finds of damage, without a check: for lists, and for the folder before it serves an
//! image. A layered image is judged by its files, too, and not by its descriptor alone. Nothing is locked: a file may
//! be written meanwhile.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Delta, Descriptor, Guid};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::check::BatEntry;
use crate::image::kind::{DESCRIPTOR, ImageKind};
use crate::image::labels::Labels;
use crate::image::levels::{check_chain, check_raw_base, other_clusters};
use crate::image::paths;
use crate::io::real::{Access, RealFile};
use crate::sync::Arc;

/// A map up to this size is read, in bytes: that of a disk of 32 GiB in clusters of 1 MiB. It costs little beside the open,
/// and the host has most of it in memory after the header's first read. A longer one is read only where the file's length
/// says that it was cut.
const SHORT_MAP: u64 = 128 << 10;

impl AtRest {
    /// Refuses a file that ends before what its map names does (an interrupted copy), as far as a look finds that.
    pub fn glance(&self) -> Result<()> {
        let Form::Ploop(header) = &self.form else { return Ok(()) };
        let geometry = header.geometry();
        if geometry.bat_end() > SHORT_MAP && geometry.is_whole(self.len) {
            return Ok(());
        }
        let mut bad = Vec::new();
        self.for_each_entry(&geometry, |cluster, value| {
            if bad.is_empty() && geometry.place(cluster, value, self.len).is_none() {
                bad.push(BatEntry { cluster, value });
            }
        })?;
        let Some(entry) = bad.pop() else { return Ok(()) };
        // Of a file that is being written the length comes before the entries that need it (R2): asked again.
        let len = self.file.len().map_err(|e| Error::io(&e, &self.path, "cannot read the length"))?;
        match entry.judge(&geometry, len) {
            Ok(_) => Ok(()),
            Err((_, why)) => {
                let what = format!("BAT entry {}: {why}; run `ploopfs check`", entry.cluster);
                Err(Error::at(Kind::Damaged, &self.path, what))
            }
        }
    }
}

/// How a delta's file is stored: only a base can be raw, whatever the Type above it says.
pub fn kind(descriptor: &Descriptor, delta: &Delta) -> ImageKind {
    let is_base = descriptor.shot(delta.guid).is_some_and(|shot| shot.parent == Guid::NONE);
    if delta.plain && is_base { ImageKind::Raw } else { ImageKind::Ploop }
}

/// Refuses the layered image in the folder `dir` (`path`, for messages) if its descriptor, one of its files, or how the
/// files of the disk fit together says that it would not open, or is damaged. With `trusted` its files may lie anywhere.
pub fn layers(
    dir: BorrowedFd<'_>,
    path: &Path,
    descriptor: &Descriptor,
    labels: &Labels,
    trusted: bool,
) -> Result<()> {
    if let Some(why) = descriptor.refusal() {
        return Err(Error::at(Kind::Unsupported, path, why));
    }
    let chain = descriptor.chain(descriptor.top);
    let chain = chain.map_err(|bad| Error::at(Kind::Damaged, path.join(DESCRIPTOR), bad.to_string()))?;
    let mut levels = Vec::new();
    for delta in &descriptor.deltas {
        let shown = paths::shown(path, &delta.file);
        paths::present(dir, path, descriptor, delta, trusted)?;
        let (folder, name) = paths::resolve(dir, Path::new(&delta.file), &shown, trusted)?;
        let file = RealFile::open_as(&folder.as_fd(), Path::new(&name), &shown, Access::ReadOnly)?;
        let at_rest = Candidate::read(&shown, Arc::new(file))?.open_as(kind(descriptor, delta))?;
        at_rest.glance()?;
        if let Form::Ploop(header) = &at_rest.form
            && let Some(why) = other_clusters(descriptor, header)
        {
            return Err(Error::at(Kind::Damaged, &shown, why));
        }
        if let Some(height) = chain.iter().position(|guid| *guid == delta.guid) {
            levels.push((height, at_rest.into_level()));
        }
    }
    levels.sort_by_key(|(height, _)| *height);
    let levels: Vec<_> = levels.into_iter().map(|(_, level)| level).collect();
    if let (Some(guid), Some(base)) = (chain.first(), levels.first()) {
        check_raw_base(*guid, base, levels.get(1), descriptor, labels)?;
    }
    check_chain(&levels, descriptor)
}
