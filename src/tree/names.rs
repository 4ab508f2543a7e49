//! Which inode number is what. An image's number follows from its number in the folder, which is never reused: a
//! file that goes and comes back is a new inode.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::fuse::ops::Ino;
use crate::image::kind::SHOWN_SUFFIX;

/// The mount's root.
const ROOT: Ino = 1;
/// `.ploopfs`.
const PRIVATE: Ino = 2;
/// `.ploopfs/stats.json`.
const STATS: Ino = 3;
/// `.snapshots`.
const SNAPSHOTS: Ino = 4;
/// `.ploopfs/metrics`.
const METRICS: Ino = 5;
/// Image number 0. Below it there is room for more files of our own.
const IMAGES: Ino = 16;
/// The folder `.snapshots/NAME` of image number 0; images number far below 2^62.
const FOLDERS: Ino = 1 << 62;
/// Snapshot number 0.
const SNAPSHOT: Ino = 1 << 63;

/// Letters and digits that rsync puts behind the name of a file that is not whole yet.
const RSYNC: usize = 6;

/// Places of a listing up to here are those of `.` and `..`.
const FIRST_PLACE: u64 = 2;

/// The name of our own folder in the mount.
pub(super) const PRIVATE_NAME: &str = ".ploopfs";
/// The name of the folder of snapshots in the mount.
pub(crate) const SNAPSHOTS_NAME: &str = ".snapshots";
/// The counters' name in it.
pub(super) const STATS_NAME: &str = "stats.json";

/// The name of the same for Prometheus.
pub(super) const METRICS_NAME: &str = "metrics";

/// What an inode stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    /// The folder that is mounted.
    Root,
    /// `.ploopfs`.
    Private,
    /// `.ploopfs/stats.json`.
    Stats,
    /// `.ploopfs/metrics`.
    Metrics,
    /// The image of this number.
    Image(u64),
    /// `.snapshots`.
    Snapshots,
    /// `.snapshots/NAME`, for the image of this number.
    SnapshotFolder(u64),
    /// The snapshot of this number.
    Snapshot(u64),
}

impl Node {
    /// What `ino` stands for; None: nothing ever did.
    pub(super) fn of(ino: Ino) -> Option<Node> {
        match ino {
            ROOT => Some(Node::Root),
            PRIVATE => Some(Node::Private),
            STATS => Some(Node::Stats),
            METRICS => Some(Node::Metrics),
            SNAPSHOTS => Some(Node::Snapshots),
            SNAPSHOT.. => Some(Node::Snapshot(ino - SNAPSHOT)),
            FOLDERS..SNAPSHOT => Some(Node::SnapshotFolder(ino - FOLDERS)),
            _ => Some(Node::Image(ino.checked_sub(IMAGES)?)),
        }
    }

    /// Its inode number.
    pub(super) fn ino(self) -> Ino {
        match self {
            Node::Root => ROOT,
            Node::Private => PRIVATE,
            Node::Stats => STATS,
            Node::Metrics => METRICS,
            Node::Image(id) => IMAGES + id,
            Node::Snapshots => SNAPSHOTS,
            Node::SnapshotFolder(id) => FOLDERS + id,
            Node::Snapshot(number) => SNAPSHOT + number,
        }
    }

    /// Its place in the listing of its folder: as little as its number does it ever stand for another. Far below 2^63, where
    /// a program takes an offset for an error.
    pub(super) fn place(self) -> u64 {
        FIRST_PLACE
            + match self {
                Node::SnapshotFolder(id) => Node::Image(id).ino(),
                Node::Snapshot(number) => number + 1,
                node => node.ino(),
            }
    }
}

/// The number of an image such that exactly those with a greater one are listed behind the place `after`.
pub(super) fn image_before(after: u64) -> u64 {
    after.saturating_sub(IMAGES + FIRST_PLACE)
}

/// The name an image is shown under.
pub(super) fn shown(image: &OsStr) -> OsString {
    let mut name = image.as_bytes().to_vec();
    name.extend_from_slice(SHOWN_SUFFIX.as_bytes());
    OsString::from_vec(name)
}

/// The image that is shown under `name`; None: no image can be. What rsync calls a file until it is whole,
/// `.vm1.img.AbC123`, is the image `vm1.img.AbC123`: those names begin with no dot.
pub(super) fn image_of(name: &OsStr) -> Option<&OsStr> {
    let bytes = name.as_bytes();
    bytes.strip_suffix(SHOWN_SUFFIX.as_bytes()).or_else(|| unfinished(bytes)).map(OsStr::from_bytes)
}

fn unfinished(name: &[u8]) -> Option<&[u8]> {
    let image = name.strip_prefix(b".")?;
    let (front, random) = image.split_at_checked(image.len().checked_sub(RSYNC)?)?;
    let whole = front.strip_suffix(b".")?.strip_suffix(SHOWN_SUFFIX.as_bytes())?;
    (!whole.is_empty() && random.iter().all(u8::is_ascii_alphanumeric)).then_some(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_is_found_again_by_its_number() {
        let own = [Node::Root, Node::Private, Node::Stats, Node::Metrics, Node::Snapshots];
        let counted = [Node::Image(1), Node::Image(1 << 40), Node::SnapshotFolder(1), Node::Snapshot(0)];
        for node in own.into_iter().chain(counted) {
            assert_eq!(Node::of(node.ino()), Some(node));
        }
        assert_eq!(Node::of(0), None);
        assert_eq!(Node::of(15), None);
    }

    #[test]
    fn a_place_of_a_listing_is_behind_the_dots_and_leads_to_those_behind_it() {
        for node in [Node::Private, Node::Stats, Node::Snapshot(0), Node::SnapshotFolder(1), Node::Image(1)] {
            assert!(node.place() > 2, "{node:?}");
        }
        assert_eq!(image_before(Node::Image(7).place()), 7);
        assert_eq!(image_before(Node::SnapshotFolder(7).place()), 7);
        assert_eq!(image_before(Node::Snapshots.place()), 0);
    }

    #[test]
    fn shown_names_end_in_img_and_lead_back() {
        assert_eq!(shown("vm1".as_ref()), "vm1.img");
        assert_eq!(image_of("vm1.img".as_ref()), Some("vm1".as_ref()));
        assert_eq!(image_of("a.img.img".as_ref()), Some("a.img".as_ref()));
        for none in
            ["vm1", ".img.AbC123", "vm1.img.AbC123", ".vm1.img.AbC12", ".vm1.raw.AbC123", ".vm1.img.Ab.123"]
        {
            assert_eq!(image_of(none.as_ref()), None, "{none}");
        }
        assert_eq!(image_of(".vm1.img.AbC123".as_ref()), Some("vm1.img.AbC123".as_ref()));
        let odd = OsStr::from_bytes(b"\xff");
        assert_eq!(image_of(&shown(odd)), Some(odd));
    }
}
