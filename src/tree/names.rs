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

/// The name of our own folder in the mount.
pub const PRIVATE_NAME: &str = ".ploopfs";
/// The name of the folder of snapshots in the mount.
pub const SNAPSHOTS_NAME: &str = ".snapshots";
/// The counters' name in it.
pub const STATS_NAME: &str = "stats.json";

/// The name of the same for Prometheus.
pub const METRICS_NAME: &str = "metrics";

/// What an inode stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
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
    pub fn of(ino: Ino) -> Option<Node> {
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
    pub fn ino(self) -> Ino {
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
}

/// The name an image is shown under.
pub fn shown(image: &OsStr) -> OsString {
    let mut name = image.as_bytes().to_vec();
    name.extend_from_slice(SHOWN_SUFFIX.as_bytes());
    OsString::from_vec(name)
}

/// The image that is shown under `name`; None: no image can be.
pub fn image_of(name: &OsStr) -> Option<&OsStr> {
    name.as_bytes().strip_suffix(SHOWN_SUFFIX.as_bytes()).map(OsStr::from_bytes)
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
    fn shown_names_end_in_img_and_lead_back() {
        assert_eq!(shown("vm1".as_ref()), "vm1.img");
        assert_eq!(image_of("vm1.img".as_ref()), Some("vm1".as_ref()));
        assert_eq!(image_of("a.img.img".as_ref()), Some("a.img".as_ref()));
        assert_eq!(image_of("vm1".as_ref()), None);
        let odd = OsStr::from_bytes(b"\xff");
        assert_eq!(image_of(&shown(odd)), Some(odd));
    }
}
