//! What the kernel sees: names, inodes, attributes, handles. No transport's types.
//!
//! ```text
//! NAME.img                     every served image
//! .snapshots/NAME/LABEL.img    each snapshot, read-only
//! .ploopfs/stats.json          live counters
//! .ploopfs/metrics             the same for Prometheus
//! ```

mod attrs;
mod data;
mod handles;
mod manage;
mod metrics;
mod names;
mod snapshots;
mod stats;
mod trouble;
mod xattrs;

use std::ffi::OsStr;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use bytes::Bytes;

use crate::error::Result;
use crate::folder::{Entry, Folder, OpenImage, Snapshot};
use crate::fuse::ops::{
    Answer, Attr, Caller, Done, Errno, FileKind, FileSystem, Handle, Ino, Name, Now, OpenFlags, Opened,
    SetAttr, Space, Whence,
};
use crate::io::planned::Planned;
use crate::vdisk::Engine;
use attrs::Owner;
use data::OpenFile;
use handles::{Borrowed, Handles};
use names::{METRICS_NAME, Node, PRIVATE_NAME, SNAPSHOTS_NAME, STATS_NAME};
use snapshots::Numbers;
pub use stats::{Document, Image as ImageStats, MountInfo, Sandbox, document};
use trouble::Trouble;

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
    /// The open handles that made images. A leaf.
    makers: manage::Makers,
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
        let (handles, trouble) = (Arc::default(), Arc::new(Trouble::new()));
        let numbers = Numbers::default();
        Arc::new_cyclic(|own| Tree {
            own: own.clone(),
            folder,
            engine,
            info,
            owner,
            handles,
            trouble,
            numbers,
            makers: manage::Makers::default(),
        })
    }

    fn node(&self, ino: Ino) -> Answer<Node> {
        Node::of(ino).ok_or(NO_ENTRY)
    }

    fn entry(&self, id: u64) -> Answer<Arc<Entry>> {
        self.folder.get(id).ok_or(NO_ENTRY)
    }

    fn attr(&self, node: Node) -> Answer<Attr> {
        Ok(match node {
            Node::Root | Node::Private | Node::Snapshots => self.owner.folder(node),
            Node::SnapshotFolder(id) => {
                self.entry(id)?;
                self.owner.folder(node)
            }
            Node::Snapshot(number) => {
                let (id, guid) = self.numbers.snapshot(number).ok_or(NO_ENTRY)?;
                let attributes = self.entry(id)?.snapshot_attributes(guid).ok_or(NO_ENTRY)?;
                attrs::snapshot(node, &attributes)
            }
            Node::Stats | Node::Metrics => {
                self.owner.file(node, self.text(node).map_or(0, |text| text.len() as u64))
            }
            Node::Image(id) => match self.folder.get(id) {
                Some(entry) => attrs::image(node, &entry.attributes()),
                None => self.unborn_attr(id).ok_or(NO_ENTRY)?,
            },
        })
    }

    /// What a file of our own has in it at this moment.
    fn text(&self, node: Node) -> Option<Bytes> {
        match node {
            Node::Stats => Some(stats::render(&self.folder, &self.info)),
            Node::Metrics => Some(metrics::render(&self.folder, &self.engine, &self.info)),
            _ => None,
        }
    }

    /// The snapshots of an image, with their nodes.
    fn snapshots(&self, entry: &Arc<Entry>) -> impl Iterator<Item = (Node, Snapshot)> {
        let all = entry.snapshots().into_iter();
        all.map(|snapshot| (Node::Snapshot(self.numbers.number(entry.id(), snapshot.guid)), snapshot))
    }

    fn open_snapshot(&self, number: u64, done: Done<Opened>) {
        let found = self.numbers.snapshot(number).and_then(|(id, guid)| Some((self.folder.get(id)?, guid)));
        let Some((entry, guid)) = found else { return done(Err(NO_ENTRY)) };
        let (handles, trouble) = (self.handles.clone(), self.trouble.clone());
        self.engine.blocking(Box::new(move || match entry.open_snapshot(guid) {
            Ok(open) => done(keep(&handles, OpenFile::Snapshot(open))),
            Err(e) => done(Err(trouble.errno(&e, &entry.path(), "open a snapshot"))),
        }));
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

    /// A write that the kernel passed through may have made the disk longer: `again` is called once we know. Else gives
    /// `done` back.
    fn catch_up<T: Send + 'static>(
        &self,
        handle: Handle,
        done: Done<T>,
        again: impl FnOnce(&Tree, Done<T>) + Send + 'static,
    ) -> Option<Done<T>> {
        let borrowed = self.borrow(handle);
        let open = borrowed.as_ref().and_then(Borrowed::get).and_then(OpenFile::image);
        let Some((image, entry)) = open.filter(|(image, _)| image.may_be_passed()) else { return Some(done) };
        let longer = image.host_status().is_ok_and(|status| status.len > image.size());
        let (Some(tree), true) = (self.own.upgrade(), longer) else { return Some(done) };
        let (image, path) = (image.clone(), entry.path());
        self.engine.blocking(Box::new(move || match image.follow_file() {
            Ok(()) => again(&tree, done),
            Err(e) => done(Err(tree.trouble.errno(&e, &path, "follow the length of the file"))),
        }));
        None
    }

    /// Why `change` is refused; None: it is nothing. Times are taken and forgotten, so that `cp -p` and `touch`
    /// go on: what is shown is the last write (DESIGN.md 2).
    fn refusal(change: &SetAttr, size: u64) -> Option<Errno> {
        let owner = change.mode.is_some() || change.uid.is_some() || change.gid.is_some();
        let resize = change.size.is_some_and(|new| new != size);
        (owner || resize).then_some(NOT_PERMITTED)
    }

    fn open_image(&self, id: u64, flags: OpenFlags, done: Done<Opened>) {
        if let Some(answer) = self.open_unborn(id, flags) {
            return done(answer);
        }
        let entry = match self.entry(id) {
            Ok(entry) => entry,
            Err(errno) => return done(Err(errno)),
        };
        let (handles, trouble, path) = (self.handles.clone(), self.trouble.clone(), entry.path());
        let opened = move |result: Result<OpenImage>| {
            let open = match result {
                Ok(open) => open,
                Err(e) => return done(Err(trouble.errno(&e, &path, "open"))),
            };
            let backing = open.backing().cloned();
            done(keep(&handles, OpenFile::Image(open)).map(|kept| Opened { backing, ..kept }));
        };
        entry.open_for_kernel(flags.writes(), Box::new(opened));
    }
}

/// Gives what was opened a handle. Always direct: an image has no second cache in front of it, and a made-up
/// file has no length to go by.
fn keep(handles: &Handles<OpenFile>, open: OpenFile) -> Answer<Opened> {
    let handle = handles.insert(open).ok_or(Errno(libc::ENFILE))?;
    Ok(Opened { handle, direct: true, backing: None })
}

impl FileSystem for Tree {
    fn lookup(&self, _caller: Caller, parent: Ino, name: &OsStr) -> Answer<Attr> {
        match self.node(parent)? {
            Node::Root if name == PRIVATE_NAME => self.attr(Node::Private),
            Node::Root if name == SNAPSHOTS_NAME => self.attr(Node::Snapshots),
            Node::Root => {
                let image = names::image_of(name).ok_or(NO_ENTRY)?;
                self.attr(Node::Image(self.folder.find_id(image).ok_or(NO_ENTRY)?))
            }
            Node::Private if name == STATS_NAME => self.attr(Node::Stats),
            Node::Private if name == METRICS_NAME => self.attr(Node::Metrics),
            Node::Private => Err(NO_ENTRY),
            Node::Snapshots => {
                let entry = self.folder.find(name).ok_or(NO_ENTRY)?;
                self.attr(Node::SnapshotFolder(entry.id()))
            }
            Node::SnapshotFolder(id) => {
                let label = names::image_of(name).ok_or(NO_ENTRY)?;
                let entry = self.entry(id)?;
                let found = self.snapshots(&entry).find(|(_, snapshot)| label == &*snapshot.name);
                self.attr(found.ok_or(NO_ENTRY)?.0)
            }
            Node::Stats | Node::Metrics | Node::Image(_) | Node::Snapshot(_) => Err(Errno(libc::ENOTDIR)),
        }
    }

    /// Nothing is kept for the kernel's sake: a number leads to its image for as long as that is served.
    fn forget(&self, _ino: Ino, _count: u64) {}

    fn getattr(&self, ino: Ino) -> Answer<Attr> {
        self.attr(self.node(ino)?)
    }

    fn setattr(&self, _caller: Caller, ino: Ino, change: SetAttr, done: Done<Attr>) {
        if self.info.manage
            && let (Ok(Node::Image(id)), Ok(attr)) = (self.node(ino), self.getattr(ino))
            && let Some(size) = change.size.filter(|size| *size != attr.size)
            && Tree::refusal(&change, size).is_none()
        {
            return self.resize_file(id, attr.size, size, done);
        }
        let answer = self.getattr(ino).and_then(|attr| match Tree::refusal(&change, attr.size) {
            Some(errno) => Err(errno),
            None => Ok(attr),
        });
        done(answer);
    }

    fn readdir(&self, ino: Ino) -> Answer<Vec<Name>> {
        let name = |node: Node, kind, name| Name { ino: node.ino(), kind, name };
        match self.node(ino)? {
            Node::Root => {
                let mut all = vec![
                    name(Node::Private, FileKind::Folder, PRIVATE_NAME.into()),
                    name(Node::Snapshots, FileKind::Folder, SNAPSHOTS_NAME.into()),
                ];
                let entries = self.folder.entries();
                let image =
                    |e: &Arc<Entry>| name(Node::Image(e.id()), FileKind::File, names::shown(e.name()));
                all.extend(entries.iter().map(image));
                let unborn = self.folder.all_unborn().into_iter();
                all.extend(unborn.map(|(of, id)| name(Node::Image(id), FileKind::File, names::shown(&of))));
                Ok(all)
            }
            Node::Private => Ok(vec![
                name(Node::Stats, FileKind::File, STATS_NAME.into()),
                name(Node::Metrics, FileKind::File, METRICS_NAME.into()),
            ]),
            Node::Snapshots => {
                let entries = self.folder.entries();
                let folder = |e: &Arc<Entry>| {
                    name(Node::SnapshotFolder(e.id()), FileKind::Folder, e.name().to_owned())
                };
                Ok(entries.iter().map(folder).collect())
            }
            Node::SnapshotFolder(id) => {
                let entry = self.entry(id)?;
                let file =
                    |(node, s): (Node, Snapshot)| name(node, FileKind::File, names::shown(s.name.as_ref()));
                Ok(self.snapshots(&entry).map(file).collect())
            }
            Node::Stats | Node::Metrics | Node::Image(_) | Node::Snapshot(_) => Err(Errno(libc::ENOTDIR)),
        }
    }

    fn statfs(&self, _ino: Ino) -> Answer<Space> {
        match self.folder.space() {
            Ok(space) => Ok(attrs::space(&space)),
            Err(e) => Err(self.trouble.errno(&e, self.folder.path(), "statfs")),
        }
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

    fn getxattr(&self, ino: Ino, name: &OsStr) -> Answer<Vec<u8>> {
        self.attribute(self.node(ino)?, name)
    }

    fn listxattr(&self, ino: Ino) -> Answer<Vec<&'static str>> {
        Ok(self.attribute_names(self.node(ino)?))
    }

    fn open(&self, _caller: Caller, ino: Ino, flags: OpenFlags, done: Done<Opened>) {
        match self.node(ino) {
            Ok(Node::Image(id)) => self.open_image(id, flags, done),
            Ok(Node::Stats | Node::Metrics) if flags.writes() => done(Err(NOT_PERMITTED)),
            Ok(node @ (Node::Stats | Node::Metrics)) => {
                done(keep(&self.handles, OpenFile::Text(self.text(node).unwrap_or_default())));
            }
            Ok(Node::Snapshot(_)) if flags.writes() => done(Err(Errno(libc::EROFS))),
            Ok(Node::Snapshot(number)) => self.open_snapshot(number, done),
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
            None => Now::Done(Err(BAD_HANDLE)),
        }
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
        self.with(handle, done, |open, done| open.fsync(&self.trouble, done));
    }

    fn fallocate(&self, handle: Handle, offset: u64, len: u64, mode: i32, done: Done<()>) {
        let again = move |tree: &Tree, done| tree.fallocate(handle, offset, len, mode, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        let again = move |tree: &Tree, done| tree.fallocate(handle, offset, len, mode, done);
        let Some(done) = self.catch_up(handle, done, again) else { return };
        self.with(handle, done, |open, done| match open {
            OpenFile::Unborn(unborn) if unborn.image().is_none() => {
                self.allocate_unborn(unborn, offset.checked_add(len), mode, done);
            }
            open => open.fallocate(&self.trouble, offset, len, mode, done),
        });
    }

    fn lseek(&self, handle: Handle, offset: u64, whence: Whence, done: Done<u64>) {
        let again = move |tree: &Tree, done| tree.lseek(handle, offset, whence, done);
        let Some(done) = self.adopt(handle, done, again) else { return };
        let again = move |tree: &Tree, done| tree.lseek(handle, offset, whence, done);
        let Some(done) = self.catch_up(handle, done, again) else { return };
        self.with(handle, done, |open, done| {
            open.lseek(&self.trouble, &self.engine, offset, whence, done);
        });
    }
}
