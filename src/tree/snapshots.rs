//! `.snapshots/NAME/LABEL.img`: what is shown of snapshots, and which number each has. A number is given at the first look
//! and never again, so that an inode is one snapshot for as long as the mount lives, whatever its label.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::data::OpenFile;
use super::handles::Origin;
use super::names::{self, Node};
use super::{NO_ENTRY, Tree, attrs, behind, keep, listed};
use crate::folder::{Entry, Snapshot};
use crate::format::descriptor::Guid;
use crate::fuse::ops::{Answer, Attr, Done, FileKind, Name, Opened};
use crate::ledger::Ledger;
use crate::sync::{Mutex, lock};

/// The numbers of all snapshots that were ever looked at.
pub(super) struct Numbers {
    /// Before the ledger's own.
    known: Mutex<Known>,
    /// Where a successor finds them. None: there will be none.
    ledger: Option<Arc<Ledger>>,
}

struct Known {
    numbers: HashMap<(u64, Guid), u64>,
    /// None: a daemon before has given the number, and to which is not known.
    snapshots: Vec<Option<(u64, Guid)>>,
}

impl Numbers {
    /// With those that a daemon before has given.
    pub(super) fn new(ledger: Option<Arc<Ledger>>) -> Numbers {
        let left = ledger.as_ref().map_or(&[][..], |ledger| &ledger.found().snapshots);
        let snapshots: Vec<_> =
            left.iter().map(|found| found.map(|(image, guid)| (image, Guid::from_bytes(guid)))).collect();
        let numbers = (0..).zip(&snapshots).filter_map(|(number, found)| Some(((*found)?, number))).collect();
        Numbers { known: Mutex::new(Known { numbers, snapshots }), ledger }
    }

    /// The number of a snapshot of the image number `image`.
    pub(super) fn number(&self, image: u64, guid: Guid) -> u64 {
        let mut known = lock(&self.known);
        if let Some(number) = known.numbers.get(&(image, guid)) {
            return *number;
        }
        let number = known.snapshots.len() as u64;
        // L4: before any answer names it.
        if let Some(ledger) = &self.ledger {
            ledger.snapshot(number, image, guid.to_bytes());
        }
        known.snapshots.push(Some((image, guid)));
        known.numbers.insert((image, guid), number);
        number
    }

    /// Image and snapshot of a number.
    pub(super) fn snapshot(&self, number: u64) -> Option<(u64, Guid)> {
        lock(&self.known).snapshots.get(usize::try_from(number).ok()?).copied()?
    }
}

impl Tree {
    /// What stat shows of a snapshot. Blocks.
    pub(super) fn snapshot_attr(&self, entry: &Entry, guid: Guid) -> Answer<Attr> {
        let node = Node::Snapshot(self.numbers.number(entry.id(), guid));
        let cannot = |e| self.trouble.errno(&e, &entry.path(), "look at a snapshot");
        entry.snapshot_attributes(guid).map(|known| attrs::snapshot(node, &known)).map_err(cannot)
    }

    /// Finds a snapshot by its name with `.img`.
    pub(super) fn find_snapshot(&self, id: u64, name: &OsStr, done: Done<Attr>) {
        let (Ok(entry), Some(label), Some(tree)) =
            (self.entry(id), names::image_of(name), self.own.upgrade())
        else {
            return done(Err(NO_ENTRY));
        };
        let label = label.as_bytes().to_owned();
        entry.ask(move |entry| {
            done(match entry.find_snapshot(&label) {
                Ok(Some(found)) => tree.snapshot_attr(entry, found.guid),
                Ok(None) => Err(NO_ENTRY),
                Err(e) => Err(tree.trouble.errno(&e, &entry.path(), "look for a snapshot")),
            });
        });
    }

    /// The snapshots of an image behind the place `after`.
    pub(super) fn list_snapshots(&self, id: u64, after: u64, most: usize, done: Done<Vec<Name>>) {
        let (Ok(entry), Some(tree)) = (self.entry(id), self.own.upgrade()) else {
            return done(Err(NO_ENTRY));
        };
        entry.ask(move |entry| {
            let cannot = |e| tree.trouble.errno(&e, &entry.path(), "list the snapshots");
            let name = |s: Snapshot| {
                let node = Node::Snapshot(tree.numbers.number(entry.id(), s.guid));
                listed(node, FileKind::File, names::shown(s.name.as_ref()))
            };
            let all = entry.snapshots().map_err(cannot);
            done(all.map(|all| behind(all.into_iter().map(name).collect(), after, most)));
        });
    }

    pub(super) fn open_snapshot(&self, number: u64, request: u64, done: Done<Opened>) {
        if let Some(handle) = self.handles.given_to(request, Node::Snapshot(number).ino()) {
            return done(Ok(Opened { handle, direct: true, backing: None }));
        }
        let found = self.numbers.snapshot(number).and_then(|(id, guid)| Some((self.folder.get(id)?, guid)));
        let (Some((entry, guid)), Some(tree)) = (found, self.own.upgrade()) else {
            return done(Err(NO_ENTRY));
        };
        self.engine.blocking(
            entry.id(),
            Box::new(move || match entry.open_snapshot(guid) {
                Ok(open) => {
                    let origin =
                        Origin { node: Node::Snapshot(number).ino(), flags: libc::O_RDONLY, request };
                    done(keep(&tree.handles, OpenFile::Snapshot(open), Some(origin)));
                }
                Err(e) => tree.cannot_open(&e, &entry.path(), "open a snapshot", done),
            }),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_keeps_its_number() {
        let (numbers, a, b) = (Numbers::new(None), Guid::random(), Guid::random());
        let first = numbers.number(1, a);
        assert_ne!(first, numbers.number(1, b));
        assert_ne!(first, numbers.number(2, a));
        assert_eq!((numbers.number(1, a), numbers.snapshot(first)), (first, Some((1, a))));
        assert_eq!(numbers.snapshot(99), None);
    }
}
