//! What stat and statfs show.

use std::time::SystemTime;

use super::names::Node;
use crate::folder::Attributes;
use crate::fuse::ops::{Attr, FileKind, Space};
use crate::io::file::HostSpace;

/// What programs take as the size of a request: `cp` then sends 1 MiB at a time, not 128 KiB
/// (docs/kernel.md#what-programs-see).
const REQUEST: u32 = 1 << 20;
/// What punching gives back at the least, on every host that matters. Loop makes it the discard granularity; a
/// larger one would keep the guest's fstrim from asking for what can be had (docs/kernel.md#what-programs-see).
const BLOCK: u32 = 4096;

/// An image: owner, group, mode and space are those of its top delta.
pub(super) fn image(node: Node, attributes: &Attributes) -> Attr {
    Attr {
        ino: node.ino(),
        kind: FileKind::File,
        size: attributes.size,
        blocks: attributes.host.blocks,
        // Without setuid and the like: the kernel would try to take them away at every write, by a chmod.
        mode: (attributes.host.mode & 0o777) as u16,
        links: 1,
        uid: attributes.host.uid,
        gid: attributes.host.gid,
        block_size: REQUEST,
        mtime: attributes.mtime,
    }
}

/// A file that was created and has no size yet.
pub(super) fn unborn(node: Node, owner: &Owner) -> Attr {
    Attr { mode: 0o600, ..owner.file(node, 0) }
}

/// A snapshot: like an image, without permission to write.
pub(super) fn snapshot(node: Node, attributes: &Attributes) -> Attr {
    let attr = image(node, attributes);
    Attr { mode: attr.mode & 0o555, ..attr }
}

/// The owner of the mount's own folders and files: the user who runs it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the mount began.
    pub since: SystemTime,
}

impl Owner {
    /// A folder; nothing can be created in it.
    pub(super) fn folder(&self, node: Node) -> Attr {
        self.own(node, FileKind::Folder, 0, 0o755, 2)
    }

    /// A file; only its owner may read it.
    pub(super) fn file(&self, node: Node, size: u64) -> Attr {
        self.own(node, FileKind::File, size, 0o400, 1)
    }

    fn own(&self, node: Node, kind: FileKind, size: u64, mode: u16, links: u32) -> Attr {
        Attr {
            ino: node.ino(),
            kind,
            size,
            blocks: 0,
            mode,
            links,
            uid: self.uid,
            gid: self.gid,
            block_size: BLOCK,
            mtime: self.since,
        }
    }
}

/// The host's space, in blocks that can really be given back.
pub(super) fn space(host: &HostSpace) -> Space {
    let blocks = |bytes: u64| bytes / u64::from(BLOCK);
    Space {
        block_size: BLOCK,
        blocks: blocks(host.total),
        free: blocks(host.free),
        available: blocks(host.available),
        files: host.files,
        files_free: host.files_free,
    }
}
