//! The tree of snapshots of an image at rest or in use, as `snapshot list` shows it. The descriptor is replaced in one
//! piece, so it can be read at any time.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::protocol::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::Labels;
use crate::image::paths::image_folder;
use crate::image::store::Store;

/// The snapshots of the image at `image`, the base first; a single file has none, but for the live disk.
pub fn of(image: &Path) -> Result<Vec<SnapshotLine>> {
    let meta = image.metadata().map_err(|e| Error::io(&e, image, "cannot read the image"))?;
    if meta.is_file() {
        let exclusive = meta.blocks() * 512;
        let guid = Guid::TOP.to_string();
        return Ok(vec![SnapshotLine { guid, exclusive, current: true, ..SnapshotLine::default() }]);
    }
    let (descriptor, labels) = read(image)?;
    let sizes: HashMap<Guid, (u64, i64)> = descriptor
        .deltas
        .iter()
        .filter_map(|delta| {
            let meta = image.join(&delta.file).symlink_metadata().ok()?;
            Some((delta.guid, (meta.blocks() * 512, meta.mtime())))
        })
        .collect();
    lines(&descriptor, &|guid| labels.name(guid), &sizes)
        .map_err(|bad| Error::at(Kind::Damaged, image.join(DESCRIPTOR), bad))
}

/// Descriptor and labels of the layered image in `folder`, without a lock.
pub fn read(folder: &Path) -> Result<(Descriptor, Labels)> {
    Store::read(image_folder(folder)?.as_fd(), folder)
}

/// Parents before children; `sizes` are bytes on the host and the time of the last change.
fn lines(
    descriptor: &Descriptor,
    name: &dyn Fn(Guid) -> String,
    sizes: &HashMap<Guid, (u64, i64)>,
) -> std::result::Result<Vec<SnapshotLine>, String> {
    let mut found = Vec::new();
    for shot in &descriptor.shots {
        let chain = descriptor.chain(shot.guid).map_err(|bad| bad.to_string())?;
        let size = |guid: &Guid| sizes.get(guid).map_or(0, |(bytes, _)| *bytes);
        let below = chain.split_last().map_or(&[][..], |(_, below)| below);
        let current = shot.guid == descriptor.top;
        let line = SnapshotLine {
            name: if current { String::new() } else { name(shot.guid) },
            guid: shot.guid.to_string(),
            parent: (shot.parent != Guid::NONE).then(|| shot.parent.to_string()),
            created: sizes.get(&shot.guid).filter(|_| !current).map(|(_, time)| *time),
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
    fn each_snapshot_has_its_own_file_and_shares_those_below() {
        let mut descriptor = Descriptor::new(1 << 20, 2048, "base.hds", false);
        let [a, b] = [1u8, 2]
            .map(|n| Guid::parse(&format!("0000000{n}-0000-4000-8000-000000000000")).expect("a GUID"));
        descriptor.add_snapshot(a, "second").expect("add");
        descriptor.add_snapshot(b, "third").expect("add");
        let sizes = HashMap::from([(a, (10, 1)), (b, (20, 2)), (Guid::TOP, (5, 3))]);
        let lines = lines(&descriptor, &|guid| guid.to_string(), &sizes).expect("a tree");
        let seen: Vec<_> =
            lines.iter().map(|l| (l.name.as_str(), l.exclusive, l.shared, l.current, l.created)).collect();
        let (a, b) = (a.to_string(), b.to_string());
        let expected = [(&*a, 10, 0, false, Some(1)), (&*b, 20, 10, false, Some(2)), ("", 5, 30, true, None)];
        assert_eq!(seen, expected);
        assert_eq!((&lines[0].parent, &lines[2].parent), (&None, &Some(b)));
    }
}
