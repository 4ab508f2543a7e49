//! The tree of snapshots of an image at rest or in use, as `snapshot list` shows it. The descriptor is replaced in one
//! piece, so it can be read at any time.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::disk::find::is_layered;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::image::chain::Candidate;
use crate::image::kind::DESCRIPTOR;
use crate::image::paths::{self, image_folder};
use crate::image::store::Store;

/// One node of the tree of snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotLine {
    /// Its label, else its GUID; of the live disk, empty.
    pub name: String,
    /// Its GUID.
    pub guid: String,
    /// GUID of the one it stands on; None for the base.
    pub parent: Option<String>,
    /// When it was taken, in seconds since 1970. None for the live disk, and where another program took it.
    pub created: Option<i64>,
    /// Space taken on the host by its own file, in bytes.
    pub exclusive: u64,
    /// Space taken by the files below, which it shares with those it stands on, in bytes.
    pub shared: u64,
    /// The live disk itself.
    pub current: bool,
    /// Deleted, but not merged away yet.
    pub temporary: bool,
}

impl SnapshotLine {
    /// True when `name` is its name or its GUID, with or without braces.
    pub fn is(&self, name: &str) -> bool {
        let bare = |text: &str| text.trim_matches(['{', '}']).to_ascii_lowercase();
        !self.current && (self.name == name || bare(&self.guid) == bare(name))
    }
}

/// The snapshots of the image at `image`, the base first; a single file has none, but for the live disk.
pub fn of(image: &Path, allow_outside: bool) -> Result<Vec<SnapshotLine>> {
    if !is_layered(image) {
        let candidate = Candidate::open(image)?;
        candidate.kind()?;
        return Ok(of_single(candidate.extent().1));
    }
    of_folder(image_folder(image)?.as_fd(), image, allow_outside)
}

/// A single file has the live disk alone; `exclusive` in bytes.
pub fn of_single(exclusive: u64) -> Vec<SnapshotLine> {
    let guid = Guid::TOP.to_string();
    vec![SnapshotLine { guid, exclusive, current: true, ..SnapshotLine::default() }]
}

/// The snapshots of the layered image whose folder `dir` is; `image` is its path, for messages.
pub fn of_folder(dir: BorrowedFd<'_>, image: &Path, allow_outside: bool) -> Result<Vec<SnapshotLine>> {
    let (descriptor, labels) = Store::read(dir, image)?;
    let mut sizes = HashMap::new();
    for delta in &descriptor.deltas {
        // A file that the image may not have is not looked at.
        if let Some(stat) = paths::named(dir, image, &delta.file, allow_outside)? {
            // stat(2) counts units of 512 bytes.
            sizes.insert(delta.guid, stat.st_blocks as u64 * 512);
        }
    }
    lines(&descriptor, &|guid| (labels.name(guid), labels.taken(guid)), &sizes)
        .map_err(|bad| Error::at(Kind::Damaged, image.join(DESCRIPTOR), bad))
}

/// Parents before children; `said` is name and time of a snapshot, `sizes` are bytes on the host.
fn lines(
    descriptor: &Descriptor,
    said: &dyn Fn(Guid) -> (String, Option<i64>),
    sizes: &HashMap<Guid, u64>,
) -> std::result::Result<Vec<SnapshotLine>, String> {
    let mut found = Vec::new();
    for shot in &descriptor.shots {
        let chain = descriptor.chain(shot.guid).map_err(|bad| bad.to_string())?;
        let size = |guid: &Guid| sizes.get(guid).copied().unwrap_or(0);
        let below = chain.split_last().map_or(&[][..], |(_, below)| below);
        let current = shot.guid == descriptor.top;
        let (name, created) = if current { (String::new(), None) } else { said(shot.guid) };
        let line = SnapshotLine {
            name,
            guid: shot.guid.to_string(),
            parent: (shot.parent != Guid::NONE).then(|| shot.parent.to_string()),
            created,
            exclusive: size(&shot.guid),
            shared: below.iter().map(size).sum(),
            current,
            temporary: shot.marker.is_some(),
        };
        found.push((chain.len(), line));
    }
    found.sort_by_key(|(depth, _)| *depth);
    Ok(found.into_iter().map(|(_, line)| line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_known_by_name_and_by_guid_and_the_live_disk_is_none() {
        let mut one = SnapshotLine { name: "monday".into(), guid: "{ab}".into(), ..SnapshotLine::default() };
        assert!(one.is("monday") && one.is("{AB}") && one.is("ab") && !one.is("tuesday"));
        one.current = true;
        assert!(!one.is("monday"));
    }

    #[test]
    fn each_snapshot_has_its_own_file_and_shares_those_below() {
        let mut descriptor = Descriptor::new(1 << 20, 2048, "base.hds", false);
        let [a, b] = [1u8, 2]
            .map(|n| Guid::parse(&format!("0000000{n}-0000-4000-8000-000000000000")).expect("a GUID"));
        descriptor.add_snapshot(a, "second").expect("add");
        descriptor.add_snapshot(b, "third").expect("add");
        let sizes = HashMap::from([(a, 10), (b, 20), (Guid::TOP, 5)]);
        let lines =
            lines(&descriptor, &|guid| (guid.to_string(), (guid == a).then_some(1)), &sizes).expect("a tree");
        let seen: Vec<_> =
            lines.iter().map(|l| (l.name.as_str(), l.exclusive, l.shared, l.current, l.created)).collect();
        let (a, b) = (a.to_string(), b.to_string());
        let expected = [(&*a, 10, 0, false, Some(1)), (&*b, 20, 10, false, None), ("", 5, 30, true, None)];
        assert_eq!(seen, expected);
        assert_eq!((&lines[0].parent, &lines[2].parent), (&None, &Some(b)));
    }
}
