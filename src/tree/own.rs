//! `.ploopfs/stats.json` and `.ploopfs/metrics`: who may read them, and how often they are made up.
//!
//! Making one up takes as long as there are images, and memory that is locked. So those who open it share what was made up
//! last, as long as that is young; a user has a few open at a time; and only the owner of the mount may,
//! until he says otherwise with chmod or chgrp.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::asking::Question;
use super::attrs::Owner;
use super::data::OpenFile;
use super::handles::Origin;
use super::names::Node;
use super::text::{Readers, Text};
use super::{NOT_PERMITTED, Tree, keep, metrics, stats};
use crate::folder::FOLDER;
use crate::fuse::ops::{Answer, Attr, Caller, Done, Errno, Opened, SetAttr};
use crate::ledger::Open;
use crate::sync::{Mutex, lock};

/// In a large folder what was made up holds for a second, so that it is made up once a second at most.
const HOLDS: Duration = Duration::from_secs(1);
/// Up to so many images it is made up for each that opens it, in a millisecond or two: what a program has just done is in
/// it.
const FEW: usize = 64;

/// One of the two files.
pub(super) struct OwnFile {
    text: Arc<Question<Bytes>>,
    /// Mode, owner and group. A leaf.
    rights: Mutex<Rights>,
    readers: Arc<Readers>,
}

struct Rights {
    mode: u16,
    uid: u32,
    gid: u32,
}

impl OwnFile {
    pub(super) fn new(owner: &Owner) -> OwnFile {
        let rights = Rights { mode: 0o400, uid: owner.uid, gid: owner.gid };
        OwnFile { text: Question::new(), rights: Mutex::new(rights), readers: Arc::default() }
    }
}

impl Tree {
    fn own_file(&self, node: Node) -> &OwnFile {
        if node == Node::Metrics { &self.metrics } else { &self.stats }
    }

    /// What stat shows. The length is that of what was made up last.
    pub(super) fn own_attr(&self, node: Node) -> Attr {
        let file = self.own_file(node);
        let size = file.text.last().map_or(0, |text| text.len() as u64);
        let rights = lock(&file.rights);
        Attr { mode: rights.mode, uid: rights.uid, gid: rights.gid, ..self.owner.file(node, size) }
    }

    /// chmod, chown and chgrp, until the mount ends. The kernel has seen that the caller may.
    pub(super) fn change_own(&self, node: Node, change: &SetAttr) -> Answer<Attr> {
        // Nothing but reading can be allowed.
        let mode = change.mode.unwrap_or(0);
        if change.size.is_some() || mode & !0o444 != 0 {
            return Err(NOT_PERMITTED);
        }
        let mut rights = lock(&self.own_file(node).rights);
        rights.mode = change.mode.map_or(rights.mode, |mode| mode as u16);
        rights.uid = change.uid.unwrap_or(rights.uid);
        rights.gid = change.gid.unwrap_or(rights.gid);
        drop(rights);
        Ok(self.own_attr(node))
    }

    pub(super) fn open_own(&self, caller: Caller, node: Node, done: Done<Opened>) {
        if let Some(handle) = self.handles.given_to(caller.request, node.ino()) {
            return done(Ok(Opened { handle, direct: true, backing: None }));
        }
        let Some(seat) = self.own_file(node).readers.enter(caller.uid) else {
            return done(Err(Errno(libc::EMFILE)));
        };
        let handles = self.handles.clone();
        let origin = Origin { node: node.ino(), flags: libc::O_RDONLY, request: caller.request };
        self.make_up(node, move |bytes| {
            done(keep(&handles, OpenFile::Text(Text::new(bytes, seat)), Some(origin)));
        });
    }

    /// Makes one up anew that was open under `open` when the daemon before ended.
    pub(super) fn restore_own(&self, node: Node, open: Open) {
        // Who opened it is not known; the owner's it may be.
        let Some(seat) = self.own_file(node).readers.enter(self.owner.uid) else {
            self.handles.lose(open.handle);
            return;
        };
        let handles = self.handles.clone();
        self.make_up(node, move |bytes| {
            handles.restore(open.handle, OpenFile::Text(Text::anew(bytes, seat)));
        });
    }

    fn make_up(&self, node: Node, then: impl FnOnce(Bytes) + Send + 'static) {
        let file = self.own_file(node);
        let (folder, engine, info) = (self.folder.clone(), self.engine.clone(), self.info.clone());
        let render = move || match node {
            Node::Metrics => metrics::render(&folder, &engine, &info),
            _ => stats::render(&folder, &info),
        };
        let holds = if self.folder.entries_behind(0, FEW + 1).len() > FEW { HOLDS } else { Duration::ZERO };
        file.text.ask(holds, |job| self.engine.blocking(FOLDER, job), render, then);
    }
}
