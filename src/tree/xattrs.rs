//! Extended attributes: what an image is, for programs that only have the flat file. Read-only.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::Tree;
use super::names::Node;
use crate::error::Result;
use crate::folder::Entry;
use crate::format::descriptor::Guid;
use crate::fuse::ops::{Done, Errno};

const NO_SUCH: Errno = Errno(libc::ENODATA);
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
    pub(super) fn attribute(&self, node: Node, name: &OsStr, done: Done<Vec<u8>>) {
        let known = ALL.into_iter().find(|known| name.as_bytes() == known.as_bytes());
        let (id, snapshot) = match node {
            Node::Image(id) => (Some(id), None),
            Node::Snapshot(number) => self.numbers.snapshot(number).unzip(),
            _ => (None, None),
        };
        let entry = id.and_then(|id| self.folder.get(id));
        let (Some(name), Some(entry), Some(tree)) = (known, entry, self.own.upgrade()) else {
            return done(Err(NO_SUCH));
        };
        match name {
            SOURCE => done(Ok(entry.path().as_os_str().as_bytes().to_vec())),
            FORMAT => done(Ok(entry.kind().as_bytes().to_vec())),
            // The host knows.
            _ => entry.ask(move |entry| {
                let number = asked(entry, name, snapshot);
                let cannot = |e| tree.trouble.errno(&e, &entry.path(), "look at it");
                done(number.map(|number| number.to_string().into_bytes()).map_err(cannot));
            }),
        }
    }
}

/// One that is a number. Blocks.
fn asked(entry: &Entry, name: &str, snapshot: Option<Guid>) -> Result<u64> {
    if name == LEVELS {
        return Ok(entry.levels(snapshot)? as u64);
    }
    let attributes = match snapshot {
        None => entry.attributes(),
        Some(guid) => entry.snapshot_attributes(guid)?,
    };
    Ok(attributes.host.blocks * 512)
}
