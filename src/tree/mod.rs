//! What the kernel sees: names, inodes, attributes, handles. No transport's types.
//!
//! ```text
//! NAME.img                     every served image
//! .snapshots/NAME/LABEL.img    each snapshot, read-only
//! .ploopfs/stats.json          live counters
//! .ploopfs/metrics             the same for Prometheus
//! ```

mod announce;
mod asking;
mod attrs;
mod data;
mod handles;
mod manage;
mod metrics;
mod names;
mod own;
mod restore;
mod snapshots;
mod stats;
mod text;
mod trouble;
mod unborn;
mod waiting;
mod xattrs;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::folder::{Entry, FOLDER, Folder, OpenImage};
use crate::fuse::ops::{
    Answer, Attr, Caller, Done, Errno, FileKind, FileSystem, Handle, Held, Ino, Name, Now, OpenFlags, Opened,
    SetAttr, Space, Whence,
};
use crate::io::buffers::Room;
use crate::io::planned::Planned;
use crate::vdisk::Engine;
pub use announce::announcer;
use asking::Question;
use attrs::Owner;
use data::OpenFile;
use handles::{Borrowed, Handles, Origin};
pub(crate) use names::SNAPSHOTS_NAME;
use names::{METRICS_NAME, Node, PRIVATE_NAME, STATS_NAME};
use own::OwnFile;
pub use restore::left_open;
use snapshots::Numbers;
pub use stats::{Document, ImageStats, MountInfo, Restarts, Sandbox, document};
use trouble::Trouble;
use unborn::Makers;
use waiting::{Waiting, Write};

/// The mount of one folder.
pub struct Tree {
    own: Weak<Tree>,
    folder: Arc<Folder>,
    engine: Arc<Engine>,
    info: MountInfo,
    owner: Owner,
    handles: Arc<Handles<OpenFile>>,
    trouble: Arc<Trouble>,
    numbers: Numbers,
    stats: OwnFile,
    metrics: OwnFile,
    /// Free space of the host.
    space: Arc<Question<Answer<Space>>>,
    /// The open handles that made images. A leaf.
    makers: Makers,
    /// Writes that wait for room in memory. A leaf.
    waiting: Waiting,
}

const NO_ENTRY: Errno = Errno(libc::ENOENT);
const BAD_HANDLE: Errno = Errno(libc::EBADF);
const NOT_PERMITTED: Errno = Errno(libc::EPERM);

impl Tree {
    /// A view of `folder`.
    pub fn new(folder: Arc<Folder>, engine: Arc<Engine>, info: MountInfo) -> Arc<Tree> {
        let owner = Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            since: SystemTime::now(),
        };
        let handles = Arc::new(Handles::new(folder.ledger().cloned()));
        let trouble = Arc::new(Trouble::new());
        let numbers = Numbers::new(folder.ledger().cloned());
        Arc::new_cyclic(|own| Tree {
            own: own.clone(),
            folder,
            engine,
            info,
            owner,
            handles,
            trouble,
            numbers,
            stats: OwnFile::new(&owner),
            metrics: OwnFile::new(&owner),
            space: Question::new(),
            makers: Makers::default(),
            waiting: Waiting::default(),
        })
    }

    fn node(&self, ino: Ino) -> Answer<Node> {
        Node::of(ino).ok_or(NO_ENTRY)
    }

    fn entry(&self, id: u64) -> Answer<Arc<Entry>> {
        self.folder.get(id).ok_or(NO_ENTRY)
    }

    /// What stat shows of a node; what the host must be asked for is asked elsewhere.
    fn attr(&self, node: Node, done: Done<Attr>) {
        match node {
            Node::Root | Node::Private | Node::Snapshots => done(Ok(self.owner.folder(node))),
            Node::SnapshotFolder(id) => done(self.entry(id).map(|_| self.owner.folder(node))),
            Node::Stats | Node::Metrics => done(Ok(self.own_attr(node))),
            Node::Image(id) => match self.folder.get(id) {
                Some(entry) => entry.attributes_later(move |known| done(Ok(attrs::image(node, &known)))),
                None => done(self.unborn_attr(id).ok_or(NO_ENTRY)),
            },
            Node::Snapshot(number) => {
                let found = self.numbers.snapshot(number);
                let entry = found.and_then(|(id, guid)| Some((self.folder.get(id)?, guid)));
                let (Some((entry, guid)), Some(tree)) = (entry, self.own.upgrade()) else {
                    return done(Err(NO_ENTRY));
                };
                entry.ask(move |entry| done(tree.snapshot_attr(entry, guid)));
            }
        }
    }

    /// The names of the mount's root behind the place `after`.
    fn list_images(&self, after: u64, most: usize) -> Vec<Name> {
        let mut all = vec![
            listed(Node::Private, FileKind::Folder, PRIVATE_NAME.into()),
            listed(Node::Snapshots, FileKind::Folder, SNAPSHOTS_NAME.into()),
        ];
        let entries = self.folder.entries_behind(names::image_before(after), most);
        let image = |e: &Arc<Entry>| listed(Node::Image(e.id()), FileKind::File, names::shown(e.name()));
        all.extend(entries.iter().map(image));
        let unborn = self.folder.all_unborn().into_iter();
        all.extend(unborn.map(|(of, id)| listed(Node::Image(id), FileKind::File, names::shown(&of))));
        behind(all, after, most)
    }

    /// Answers an open that failed. Who holds what is locked is looked for behind the answer.
    fn cannot_open<T>(&self, e: &Error, path: &Path, doing: &'static str, done: Done<T>) {
        done(Err(self.trouble.errno(e, path, doing)));
        self.folder.name_later(e, doing);
    }

    fn borrow(&self, handle: Handle) -> Option<Borrowed<OpenFile>> {
        self.handles.get(handle)
    }

    /// Does something with what is open under `handle`; without it, answers EBADF.
    fn with<T>(&self, handle: Handle, done: Done<T>, act: impl FnOnce(&OpenFile, Done<T>)) {
        let borrowed = self.borrow(handle);
        match borrowed.as_ref().and_then(Borrowed::get) {
            Some(open) => act(open, done),
            None => done(Err(BAD_HANDLE)),
        }
    }

    /// fallocate of what is open under `handle`, as long as it is known to be.
    fn allocate_open(&self, handle: Handle, offset: u64, len: u64, mode: i32, done: Done<()>) {
        self.with(handle, done, |open, done| match open {
            OpenFile::Unborn(unborn) if unborn.image().is_none() => {
                self.allocate_unborn(unborn, offset.checked_add(len), mode, done);
            }
            open => open.fallocate(&self.trouble, offset, len, mode, done),
        });
    }

    /// lseek in what is open under `handle`, as long as it is known to be.
    fn seek_open(&self, handle: Handle, offset: u64, whence: Whence, done: Done<u64>) {
        self.with(handle, done, |open, done| {
            open.lseek(&self.trouble, &self.engine, offset, whence, done);
        });
    }

    /// A write that the kernel passed through may have made the disk longer: `then` is called once we know. Else gives
    /// `done` back.
    fn catch_up<T: Send + 'static>(
        &self,
        handle: Handle,
        done: Done<T>,
        then: impl FnOnce(&Tree, Done<T>) + Send + 'static,
    ) -> Option<Done<T>> {
        let borrowed = self.borrow(handle);
        let open = borrowed.as_ref().and_then(Borrowed::get).and_then(OpenFile::image);
        let Some((image, entry)) = open.filter(|(image, _)| image.may_be_passed()) else { return Some(done) };
        let Some(tree) = self.own.upgrade() else { return Some(done) };
        let (image, entry) = (image.clone(), entry.clone());
        let follow = move || {
            let longer = image.host_status().is_ok_and(|status| status.len > image.size());
            match if longer { image.follow_file() } else { Ok(()) } {
                Ok(()) => then(&tree, done),
                Err(e) => done(Err(tree.trouble.errno(&e, &entry.path(), "follow the length of the file"))),
            }
        };
        self.engine.blocking(id_of(borrowed.as_ref()), Box::new(follow));
        None
    }

    /// Carries out what of a `setattr` is a change to what stat shows now. What is so already is done, so that `cp -p`,
    /// `tar` and `install` go on; times are taken and forgotten: what is shown is the last write
    /// (docs/design.md#what-is-an-image).
    fn change_attr(&self, node: Node, now: Attr, asked: &SetAttr, done: Done<Attr>) {
        let change = SetAttr {
            mode: asked.mode.map(|mode| mode & 0o7777).filter(|mode| *mode != u32::from(now.mode)),
            uid: asked.uid.filter(|uid| *uid != now.uid),
            gid: asked.gid.filter(|gid| *gid != now.gid),
            size: asked.size.filter(|size| *size != now.size),
            times: false,
        };
        match node {
            _ if change == SetAttr::default() => done(Ok(now)),
            Node::Stats | Node::Metrics => done(self.change_own(node, &change)),
            Node::Image(id) if self.info.manage => self.change_image(id, &now, change, done),
            _ => done(Err(NOT_PERMITTED)),
        }
    }

    fn open_image(&self, id: u64, request: u64, flags: OpenFlags, done: Done<Opened>) {
        if let Some(handle) = self.handles.given_to(request, Node::Image(id).ino()) {
            return done(Ok(Opened { handle, direct: true, backing: None }));
        }
        if let Some(answer) = self.open_unborn(id, flags) {
            return done(answer);
        }
        let entry = match self.entry(id) {
            Ok(entry) => entry,
            Err(errno) => return done(Err(errno)),
        };
        let (Some(tree), path) = (self.own.upgrade(), entry.path()) else { return done(Err(NO_ENTRY)) };
        let opened = move |result: Result<OpenImage>| {
            let open = match result {
                Ok(open) => open,
                Err(e) => return tree.cannot_open(&e, &path, "open", done),
            };
            let backing = open.backing().cloned();
            let origin = Origin { node: Node::Image(id).ino(), flags: flags.raw, request };
            done(
                keep(&tree.handles, OpenFile::Image(open), Some(origin))
                    .map(|kept| Opened { backing, ..kept }),
            );
        };
        entry.open_for_kernel(flags.writes(), Box::new(opened));
    }
}

/// One name of a folder.
fn listed(node: Node, kind: FileKind, name: OsString) -> Name {
    Name { ino: node.ino(), kind, name, next: node.place() }
}

/// The names behind the place `after`, at most `most`, in the order of their places.
fn behind(mut names: Vec<Name>, after: u64, most: usize) -> Vec<Name> {
    names.retain(|name| name.next > after);
    names.sort_unstable_by_key(|name| name.next);
    names.truncate(most);
    names
}

/// The image that an open file is of, as a lane of jobs.
fn id_of(open: Option<&Borrowed<OpenFile>>) -> u64 {
    let image = open.and_then(Borrowed::get).and_then(OpenFile::image);
    image.map_or(FOLDER, |(_, entry)| entry.id())
}

/// Gives what was opened a handle. Always direct: an image has no second cache in front of it, and a made-up
/// file has no length to go by.
/// `origin`: a successor opens it again by that.
fn keep(handles: &Handles<OpenFile>, open: OpenFile, origin: Option<Origin>) -> Answer<Opened> {
    let handle = handles.insert(open, origin).ok_or(Errno(libc::ENFILE))?;
    Ok(Opened { handle, direct: true, backing: None })
}

impl FileSystem for Tree {
    fn lookup(&self, _caller: Caller, parent: Ino, name: &OsStr, done: Done<Attr>) {
        let node = match Node::of(parent) {
            None => Err(NO_ENTRY),
            Some(Node::Root) if name == PRIVATE_NAME => Ok(Node::Private),
            Some(Node::Root) if name == SNAPSHOTS_NAME => Ok(Node::Snapshots),
            Some(Node::Root) => {
                let image = names::image_of(name).and_then(|image| self.folder.find_id(image));
                image.map(Node::Image).ok_or(NO_ENTRY)
            }
            Some(Node::Private) if name == STATS_NAME => Ok(Node::Stats),
            Some(Node::Private) if name == METRICS_NAME => Ok(Node::Metrics),
            Some(Node::Private) => Err(NO_ENTRY),
            Some(Node::Snapshots) => {
                self.folder.find(name).map(|entry| Node::SnapshotFolder(entry.id())).ok_or(NO_ENTRY)
            }
            Some(Node::SnapshotFolder(id)) => return self.find_snapshot(id, name, done),
            Some(Node::Stats | Node::Metrics | Node::Image(_) | Node::Snapshot(_)) => {
                Err(Errno(libc::ENOTDIR))
            }
        };
        match node {
            Ok(node) => self.attr(node, done),
            Err(errno) => done(Err(errno)),
        }
    }

    /// Nothing is kept for the kernel's sake: a number leads to its image for as long as that is served.
    fn forget(&self, _ino: Ino, _count: u64) {}

    fn getattr(&self, ino: Ino, done: Done<Attr>) {
        match self.node(ino) {
            Ok(node) => self.attr(node, done),
            Err(errno) => done(Err(errno)),
        }
    }

    fn setattr(&self, _caller: Caller, ino: Ino, change: SetAttr, done: Done<Attr>) {
        let (Ok(node), Some(tree)) = (self.node(ino), self.own.upgrade()) else {
            return done(Err(NO_ENTRY));
        };
        let known = move |answer: Answer<Attr>| match answer {
            Ok(now) => tree.change_attr(node, now, &change, done),
            Err(errno) => done(Err(errno)),
        };
        self.attr(node, Box::new(known));
    }

    fn readdir(&self, ino: Ino, after: u64, most: usize, done: Done<Vec<Name>>) {
        match self.node(ino) {
            Ok(Node::Root) => done(Ok(self.list_images(after, most))),
            Ok(Node::Private) => {
                let own = vec![
                    listed(Node::Stats, FileKind::File, STATS_NAME.into()),
                    listed(Node::Metrics, FileKind::File, METRICS_NAME.into()),
                ];
                done(Ok(behind(own, after, most)));
            }
            Ok(Node::Snapshots) => {
                let entries = self.folder.entries_behind(names::image_before(after), most);
                let folder = |e: &Arc<Entry>| {
                    listed(Node::SnapshotFolder(e.id()), FileKind::Folder, e.name().to_owned())
                };
                done(Ok(entries.iter().map(folder).collect()));
            }
            Ok(Node::SnapshotFolder(id)) => self.list_snapshots(id, after, most, done),
            Ok(Node::Stats | Node::Metrics | Node::Image(_) | Node::Snapshot(_)) => {
                done(Err(Errno(libc::ENOTDIR)));
            }
            Err(errno) => done(Err(errno)),
        }
    }

    fn statfs(&self, _ino: Ino, done: Done<Space>) {
        let (folder, trouble) = (self.folder.clone(), self.trouble.clone());
        let find = move || {
            let space = folder.space();
            space.map(|s| attrs::space(&s)).map_err(|e| trouble.errno(&e, folder.path(), "statfs"))
        };
        self.space.ask(Duration::ZERO, |job| self.engine.blocking(FOLDER, job), find, done);
    }

    fn change_name(&self, _caller: Caller, _parent: Ino, _name: &OsStr) -> Answer<()> {
        Err(NOT_PERMITTED)
    }

    fn create(&self, _: Caller, parent: Ino, name: &OsStr, flags: OpenFlags, done: Done<(Attr, Opened)>) {
        self.create_file(parent, name, flags, done);
    }

    fn rename(&self, _: Caller, from: (Ino, &OsStr), to: (Ino, &OsStr), done: Done<()>) {
        self.rename_file(from, to, done);
    }

    fn unlink(&self, _: Caller, parent: Ino, name: &OsStr, done: Done<()>) {
        self.remove_file(parent, name, done);
    }

    fn copy_range(&self, from: (Handle, u64), to: (Handle, u64), len: u64, done: Done<u64>) {
        if !self.info.manage {
            return done(Err(Errno(libc::ENOSYS)));
        }
        if let Some(done) = self.adopt(from.0, done, move |tree, done| tree.copy_range(from, to, len, done))
            && let Some(done) = self.adopt(to.0, done, move |tree, done| tree.copy_range(from, to, len, done))
        {
            self.copy(from, to, len, done);
        }
    }

    fn getxattr(&self, ino: Ino, name: &OsStr, done: Done<Vec<u8>>) {
        match self.node(ino) {
            Ok(node) => self.attribute(node, name, done),
            Err(errno) => done(Err(errno)),
        }
    }

    fn listxattr(&self, ino: Ino) -> Answer<Vec<&'static str>> {
        Ok(self.attribute_names(self.node(ino)?))
    }

    fn open(&self, caller: Caller, ino: Ino, flags: OpenFlags, done: Done<Opened>) {
        match self.node(ino) {
            Ok(Node::Image(id)) => self.open_image(id, caller.request, flags, done),
            Ok(Node::Stats | Node::Metrics) if flags.writes() => done(Err(NOT_PERMITTED)),
            Ok(node @ (Node::Stats | Node::Metrics)) => self.open_own(caller, node, done),
            Ok(Node::Snapshot(_)) if flags.writes() => done(Err(Errno(libc::EROFS))),
            Ok(Node::Snapshot(number)) => self.open_snapshot(number, caller.request, done),
            Ok(Node::Root | Node::Private | Node::Snapshots | Node::SnapshotFolder(_)) => {
                done(Err(Errno(libc::EISDIR)));
            }
            Err(errno) => done(Err(errno)),
        }
    }

    fn release(&self, handle: Handle) {
        if !self.handles.remove(handle) {
            log::warn!("the kernel released handle {handle:#x}, which is not open");
        }
    }

    fn read_now(&self, handle: Handle, offset: u64, buf: &mut [u8]) -> Now<usize> {
        let borrowed = self.borrow(handle);
        match borrowed.as_ref().and_then(Borrowed::get) {
            Some(open) => open.read_now(&self.trouble, offset, buf),
            None if self.handles.returns(handle) => Now::Later,
            None => Now::Done(Err(BAD_HANDLE)),
        }
    }

    fn plan_read(&self, handle: Handle, offset: u64, len: usize) -> Option<Planned> {
        let borrowed = self.borrow(handle);
        borrowed.as_ref().and_then(Borrowed::get)?.plan_read(offset, len)
    }

    fn read_later(&self, handle: Handle, offset: u64, len: usize, done: Done<Bytes>) {
        let again = move |tree: &Tree, done| tree.read_later(handle, offset, len, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        self.with(handle, done, |open, done| open.read_later(&self.trouble, offset, len, done));
    }

    fn write_now(&self, handle: Handle, offset: u64, data: &[u8], flags: OpenFlags) -> Now<usize> {
        let borrowed = self.borrow(handle);
        match borrowed.as_ref().and_then(Borrowed::get) {
            Some(open) => open.write_now(&self.trouble, offset, data, flags),
            None if self.handles.returns(handle) => Now::Later,
            None => Now::Done(Err(BAD_HANDLE)),
        }
    }

    fn room(&self, handle: Handle, len: usize) -> Answer<Room> {
        self.room_for(handle, len)
    }

    fn write_held(
        &self,
        handle: Handle,
        offset: u64,
        data: Box<dyn Held>,
        flags: OpenFlags,
        done: Done<usize>,
    ) {
        self.write_or_wait(Write { handle, offset, data, flags, done });
    }

    fn ended(&self) {
        self.end_waiting();
    }

    fn writes_may_block(&self, handle: Handle) -> bool {
        let borrowed = self.borrow(handle);
        borrowed.as_ref().and_then(Borrowed::get).is_some_and(OpenFile::writes_may_block)
    }

    fn write_later(&self, handle: Handle, offset: u64, data: Bytes, flags: OpenFlags, done: Done<usize>) {
        let (end, copy) = (offset.checked_add(data.len() as u64), data.clone());
        let again = move |tree: &Tree, done| tree.write_later(handle, offset, copy, flags, done);
        let Some(done) = self.lengthen(handle, end, done, again) else { return };
        let copy = data.clone();
        let again = move |tree: &Tree, done| tree.write_later(handle, offset, copy, flags, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        self.with(handle, done, |open, done| open.write_later(&self.trouble, offset, data, flags, done));
    }

    fn fsync(&self, handle: Handle, done: Done<()>) {
        let again = move |tree: &Tree, done| tree.fsync(handle, done);
        let Some(done) = self.returned(handle, done, again) else { return };
        self.with(handle, done, |open, done| open.fsync(&self.trouble, done));
    }

    fn fallocate(&self, handle: Handle, offset: u64, len: u64, mode: i32, done: Done<()>) {
        let again = move |tree: &Tree, done| tree.fallocate(handle, offset, len, mode, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        let then = move |tree: &Tree, done| tree.allocate_open(handle, offset, len, mode, done);
        let Some(done) = self.catch_up(handle, done, then) else { return };
        self.allocate_open(handle, offset, len, mode, done);
    }

    fn lseek(&self, handle: Handle, offset: u64, whence: Whence, done: Done<u64>) {
        let again = move |tree: &Tree, done| tree.lseek(handle, offset, whence, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        let then = move |tree: &Tree, done| tree.seek_open(handle, offset, whence, done);
        let Some(done) = self.catch_up(handle, done, then) else { return };
        self.seek_open(handle, offset, whence, done);
    }
}
