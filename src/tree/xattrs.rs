//! Extended attributes: what an image is, for programs that only have the flat file. Read-only.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::Tree;
use super::names::Node;
use crate::fuse::ops::{Answer, Errno};

const NO_SUCH: Errno = Errno(libc::ENODATA);
/// What every attribute of ours begins with.
const OURS: &[u8] = b"user.ploopfs.";

/// The file or folder that the image is in.
const SOURCE: &str = "user.ploopfs.source";
/// ploop, raw or layered.
const FORMAT: &str = "user.ploopfs.format";
/// Files that the disk is made of.
const LEVELS: &str = "user.ploopfs.levels";
/// Bytes on the host, of all levels.
const ALLOCATED: &str = "user.ploopfs.allocated";

/// In the order in which they are listed.
const ALL: [&str; 4] = [SOURCE, FORMAT, LEVELS, ALLOCATED];

impl Tree {
    /// The names of what `node` has.
    pub(super) fn attribute_names(&self, node: Node) -> Vec<&'static str> {
        let shown = match node {
            Node::Image(id) => self.folder.get(id).is_some(),
            Node::Snapshot(_) => true,
            _ => false,
        };
        if shown { ALL.to_vec() } else { Vec::new() }
    }

    /// One of them. The kernel asks for others as well, such as security.capability before each punch: those cost nothing.
    pub(super) fn attribute(&self, node: Node, name: &OsStr) -> Answer<Vec<u8>> {
        if !name.as_bytes().starts_with(OURS) {
            return Err(NO_SUCH);
        }
        let (id, snapshot) = match node {
            Node::Image(id) => (id, None),
            Node::Snapshot(number) => {
                let (id, guid) = self.numbers.snapshot(number).ok_or(NO_SUCH)?;
                (id, Some(guid))
            }
            _ => return Err(NO_SUCH),
        };
        let entry = self.folder.get(id).ok_or(NO_SUCH)?;
        let number = |n: u64| n.to_string().into_bytes();
        match name.to_str() {
            Some(SOURCE) => Ok(entry.path().as_os_str().as_bytes().to_vec()),
            Some(FORMAT) => Ok(entry.kind().as_bytes().to_vec()),
            Some(LEVELS) => entry.levels(snapshot).map(|n| number(n as u64)).ok_or(NO_SUCH),
            Some(ALLOCATED) => {
                let attributes = match snapshot {
                    None => Some(entry.attributes()),
                    Some(guid) => entry.snapshot_attributes(guid),
                };
                attributes.map(|attributes| number(attributes.host.blocks * 512)).ok_or(NO_SUCH)
            }
            _ => Err(NO_SUCH),
        }
    }
}
