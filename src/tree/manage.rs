//! `mount --manage`: names that come, change and go through the mount, sizes that grow, and `cp` as a clone.
//!
//! A file that is created is a name without an image (`folder::names`); the first size makes the image. A handle from
//! before that goes on with the image ([`Unborn`]). What changes the folder runs on a thread of its own, since it blocks
//! and the engine's threads may be what it waits for.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, OnceLock};

use super::attrs;
use super::data::OpenFile;
use super::names::{self, Node};
use super::unborn::{Disk, Unborn};
use super::{NOT_PERMITTED, Tree, keep};
use crate::error::{Error, Kind, Result};
use crate::folder::{Entry, OpenImage, Rights};
use crate::fuse::ops::{Answer, Attr, Done, Errno, Handle, Ino, OpenFlags, Opened, SetAttr};
use crate::image::kind::in_text;
use crate::io::process::spawn_detached;
use crate::sync::plain::lock;

/// "Read and write instead": the kernel copies by itself.
const COPY_YOURSELF: Errno = Errno(libc::EOPNOTSUPP);

impl Tree {
    /// Runs `body` on a thread of its own; `done` hears the errno of what failed, and the log the reason.
    fn change<T: Send + 'static>(
        &self,
        doing: &'static str,
        done: Done<T>,
        body: impl FnOnce(&Tree) -> Result<T> + Send + 'static,
    ) {
        let Some(tree) = self.own.upgrade() else { return done(Err(Errno(libc::EIO))) };
        let done = Arc::new(Mutex::new(Some(done)));
        let answer = done.clone();
        let job = move || {
            let result = body(&tree);
            let refused = |e: &Error| tree.trouble.refused(e, doing);
            if let Some(done) = lock(&answer).take() {
                match result {
                    Ok(value) => done(Ok(value)),
                    Err(e) => {
                        done(Err(refused(&e)));
                        tree.folder.name_later(&e, doing);
                    }
                }
            }
        };
        if let Err(e) = spawn_detached("ploopfs/manage", job)
            && let Some(done) = lock(&done).take()
        {
            done(Err(self.trouble.refused(&e, doing)));
        }
    }

    /// The image's name that `name` in the folder `parent` stands for, where names may be changed.
    fn managed<'a>(&self, parent: Ino, name: &'a OsStr) -> Answer<&'a OsStr> {
        match self.node(parent)? {
            Node::Root if self.info.manage => names::image_of(name).ok_or_else(|| {
                let why = "only images have names here, and they end in .img";
                self.trouble.refused(&Error::at(Kind::NotPermitted, name, why), "change names")
            }),
            _ => Err(NOT_PERMITTED),
        }
    }

    /// Opens the file `name`, and makes it where there is none.
    pub(super) fn create_file(
        &self,
        parent: Ino,
        name: &OsStr,
        flags: OpenFlags,
        done: Done<(Attr, Opened)>,
    ) {
        let image = match self.managed(parent, name) {
            Ok(image) => image.to_owned(),
            Err(errno) => return done(Err(errno)),
        };
        if let Some(id) = self.folder.find_id(&image) {
            // Made by another opener since the kernel looked.
            if flags.raw & libc::O_EXCL != 0 {
                return done(Err(Errno(libc::EEXIST)));
            }
            // The answer of a create has no place for passthrough, which all opens of an image have in common: the kernel
            // looks again, and opens what is there.
            if self.folder.get(id).is_some_and(|entry| entry.can_be_passed()) {
                return done(Err(Errno(libc::ESTALE)));
            }
            let Some(tree) = self.own.upgrade() else { return done(Err(Errno(libc::EIO))) };
            let known = move |answer: Answer<Attr>| match answer {
                Ok(attr) => {
                    let opened = move |answer: Answer<Opened>| done(answer.map(|opened| (attr, opened)));
                    // No answer of a create is asked for again: --manage has no ledger.
                    tree.open_image(id, 0, flags, Box::new(opened));
                }
                Err(errno) => done(Err(errno)),
            };
            return self.attr(Node::Image(id), Box::new(known));
        }
        self.change("create", done, move |tree| {
            let id = tree.folder.begin_image(&image)?;
            let unborn = Arc::new(tree.unborn(id, flags, true));
            tree.note_maker(&unborn);
            let file = OpenFile::Unborn(unborn);
            let opened = keep(&tree.handles, file, None);
            let opened = opened.map_err(|_| Error::at(Kind::Io, &image, "too many open files"))?;
            let gone = || Error::at(Kind::NotFound, &image, "is gone again");
            tree.image_attr(id).map(|attr| (attr, opened)).ok_or_else(gone)
        });
    }

    fn unborn(&self, id: u64, flags: OpenFlags, made: bool) -> Unborn {
        Unborn {
            id,
            writes: flags.writes(),
            made,
            image: OnceLock::new(),
            cloned: Mutex::default(),
            growing: Mutex::default(),
        }
    }

    /// Opens a file that has no size yet; None: it is none.
    pub(super) fn open_unborn(&self, id: u64, flags: OpenFlags) -> Option<Answer<Opened>> {
        self.folder.unborn(id)?;
        Some(keep(&self.handles, OpenFile::Unborn(Arc::new(self.unborn(id, flags, false))), None))
    }

    /// What stat shows of an image, or of a file that has no size yet. Blocks.
    fn image_attr(&self, id: u64) -> Option<Attr> {
        match self.folder.get(id) {
            Some(entry) => Some(attrs::image(Node::Image(id), &entry.attributes())),
            None => self.unborn_attr(id),
        }
    }

    /// What stat shows of a file that has no size yet.
    pub(super) fn unborn_attr(&self, id: u64) -> Option<Attr> {
        self.folder.unborn(id)?;
        Some(attrs::unborn(Node::Image(id), &self.owner))
    }

    pub(super) fn rename_file(&self, from: (Ino, &OsStr), to: (Ino, &OsStr), done: Done<()>) {
        match self.managed(from.0, from.1).and_then(|old| Ok((old, self.managed(to.0, to.1)?))) {
            Ok((old, new)) => {
                let (old, new) = (old.to_owned(), new.to_owned());
                self.change("rename", done, move |tree| tree.folder.rename_image(&old, &new));
            }
            Err(errno) => done(Err(errno)),
        }
    }

    pub(super) fn remove_file(&self, parent: Ino, name: &OsStr, done: Done<()>) {
        match self.managed(parent, name) {
            Ok(image) => {
                let image = image.to_owned();
                self.change("remove", done, move |tree| tree.folder.remove_image(&image));
            }
            Err(errno) => done(Err(errno)),
        }
    }

    /// Changes mode, owner, group and size of the image number `id`, of which `now` is shown so far.
    pub(super) fn change_image(&self, id: u64, now: &Attr, change: SetAttr, done: Done<Attr>) {
        let now = now.size;
        self.change("change mode, owner or size", done, move |tree| {
            let gone = || Error::new(Kind::NotFound, "the image is gone");
            let rights = Rights { mode: change.mode, uid: change.uid, gid: change.gid };
            if rights != Rights::default() {
                let why = "has no size yet, and so no file that could have another mode or owner";
                let unborn = || Error::new(Kind::NotPermitted, why);
                tree.folder.get(id).ok_or_else(unborn)?.set_rights(&rights)?;
            }
            let Some(size) = change.size else { return tree.image_attr(id).ok_or_else(gone) };
            // A size in bytes: makes it, or makes it larger.
            match tree.folder.get(id) {
                // A program that copies a file in sets its length at the end, and disks end with a cluster.
                Some(entry) if size < now && tree.is_rounded(&entry, size)? => {}
                Some(entry) if size < now => {
                    let why = format!(
                        "the disk has {now} bytes; {size} would cut off what the guest keeps there, and is not done"
                    );
                    return Err(Error::at(Kind::NotPermitted, entry.path(), why));
                }
                Some(entry) => tree.folder.grow_image(&entry, size)?,
                None => tree.folder.create_image(id, size)?,
            }
            tree.image_attr(id).ok_or_else(gone)
        });
    }

    /// fallocate of a file without a size gives it one, thin. `then` is called with what `handle` is by then.
    pub(super) fn allocate_unborn(&self, unborn: &Unborn, size: Option<u64>, mode: i32, done: Done<()>) {
        match size {
            _ if !unborn.writes => done(Err(Errno(libc::EBADF))),
            Some(size) if mode == 0 && size > 0 => {
                let id = unborn.id;
                self.change("create", done, move |tree| tree.folder.create_image(id, size));
            }
            _ => done(Err(Errno(libc::EOPNOTSUPP))),
        }
    }

    /// The handle's file, where it was opened before it was an image.
    fn unborn_of(&self, handle: Handle) -> Option<Arc<Unborn>> {
        match self.borrow(handle)?.get()? {
            OpenFile::Unborn(unborn) => Some(unborn.clone()),
            _ => None,
        }
    }

    /// An image that came into being under this open handle is opened for it before anything else is done with the
    /// handle: true, and `again` is called after that.
    pub(super) fn adopt<T: 'static>(
        &self,
        handle: Handle,
        done: Done<T>,
        again: impl FnOnce(&Tree, Done<T>) + Send + 'static,
    ) -> Option<Done<T>> {
        if !self.info.manage {
            return self.returned(handle, done, again);
        }
        let Some(unborn) = self.unborn_of(handle).filter(|unborn| unborn.image.get().is_none()) else {
            return Some(done);
        };
        let (Some(entry), Some(tree)) = (self.folder.get(unborn.id), self.own.upgrade()) else {
            return Some(done);
        };
        let path = entry.path();
        let opened = move |result: Result<OpenImage>| {
            let failed = result.as_ref().err().cloned();
            // Another request of this handle may have come first; then this open is given back.
            let _ = unborn.image.set(result.map_err(|e| tree.trouble.errno(&e, &path, "open")));
            again(&tree, done);
            if let Some(e) = failed {
                tree.folder.name_later(&e, "open");
            }
        };
        entry.open_later(self.writes(handle), Box::new(opened));
        None
    }

    fn writes(&self, handle: Handle) -> bool {
        self.unborn_of(handle).is_some_and(|unborn| unborn.writes)
    }

    /// A write that ends at byte `end`, through the handle that made the file, makes it as long as that: `again` is then
    /// called. So a file that is copied in becomes an image. Else gives `done` back.
    pub(super) fn lengthen<T: Send + 'static>(
        &self,
        handle: Handle,
        end: Option<u64>,
        done: Done<T>,
        again: impl FnOnce(&Tree, Done<T>) + Send + 'static,
    ) -> Option<Done<T>> {
        let (Some(unborn), Some(end), Some(tree)) = (self.unborn_of(handle), end, self.own.upgrade()) else {
            return Some(done);
        };
        let short = |tree: &Tree| tree.size_of(unborn.id).is_some_and(|size| size < end);
        if !unborn.made || !unborn.writes || !short(self) {
            return Some(done);
        }
        let unborn = unborn.clone();
        let longer: Done<()> = Box::new(move |answer| match answer {
            Ok(()) => again(&tree, done),
            Err(errno) => done(Err(errno)),
        });
        self.change("write", longer, move |tree| {
            let _alone = lock(&unborn.growing);
            match tree.folder.get(unborn.id) {
                Some(entry) if entry.size() < end => tree.folder.grow_image(&entry, end),
                Some(_) => Ok(()),
                None => tree.folder.create_image(unborn.id, end),
            }
        });
        None
    }

    /// Size of an image, or of a file that has none yet, without asking the host.
    fn size_of(&self, id: u64) -> Option<u64> {
        self.folder.get(id).map(|entry| entry.size()).or_else(|| self.folder.unborn(id).map(|_| 0))
    }

    /// Remembers who makes an image, as long as the handle is open.
    fn note_maker(&self, unborn: &Arc<Unborn>) {
        let mut makers = lock(&self.makers);
        makers.retain(|_, maker| maker.strong_count() > 0);
        makers.insert(unborn.id, Arc::downgrade(unborn));
    }

    /// True when the handle that made the image is open, and `size` bytes would be rounded up to what it has.
    fn is_rounded(&self, entry: &Entry, size: u64) -> Result<bool> {
        let makers = lock(&self.makers);
        let made = makers.get(&entry.id()).is_some_and(|maker| maker.strong_count() > 0);
        drop(makers);
        if !made {
            return Ok(false);
        }
        let open = self.folder.open_image(&in_text(entry.name()), false)?;
        Ok(size.checked_next_multiple_of(open.image().cluster()) == Some(open.image().size()))
    }

    /// Which disk is open under `handle`, and its size in bytes.
    fn disk(&self, handle: Handle) -> Option<(Disk, u64)> {
        let borrowed = self.borrow(handle)?;
        let open = borrowed.get()?;
        let (image, entry) = open.image()?;
        let snapshot = match open {
            OpenFile::Snapshot(snapshot) => Some(snapshot.guid().to_string()),
            _ => None,
        };
        Some(((entry.id(), snapshot), image.size()))
    }

    /// `cp`: the first call, from 0 to 0 into a file that this very handle has made and that was never written, clones
    /// the disk; the calls that follow find everything there. Whatever else: the kernel reads and writes.
    pub(super) fn copy(&self, from: (Handle, u64), to: (Handle, u64), len: u64, done: Done<u64>) {
        let (Some((disk, size)), Some(unborn)) = (self.disk(from.0), self.unborn_of(to.0)) else {
            return done(Err(COPY_YOURSELF));
        };
        let len = len.min(size.saturating_sub(from.1));
        if !unborn.writes {
            return done(Err(Errno(libc::EBADF)));
        }
        if unborn.image.get().is_some() {
            return done(if is_there(&unborn, &disk, from.1, to.1) { Ok(len) } else { Err(COPY_YOURSELF) });
        }
        let whole = from.1 == 0 && to.1 == 0 && unborn.made;
        let handle = to.0;
        self.change("clone", done, move |tree| {
            let copied = whole.then(|| tree.clone_to(&unborn, disk, handle)).transpose()?;
            if copied == Some(true) {
                return Ok(len);
            }
            // A copy has the size of what it is a copy of.
            tree.folder.create_image(unborn.id, size)?;
            Err(Error::new(Kind::Unsupported, "is copied, not cloned"))
        });
    }

    /// Makes the clone, and opens it for the handle. False: the host can neither share nor link the files, or the source is
    /// passed through.
    fn clone_to(&self, unborn: &Arc<Unborn>, disk: Disk, handle: Handle) -> Result<bool> {
        let source =
            self.folder.get(disk.0).ok_or_else(|| Error::new(Kind::NotFound, "the source is gone"))?;
        if source.may_be_passed() {
            return Ok(false);
        }
        match self.folder.clone_image(unborn.id, &source, disk.1.clone()) {
            Err(e) if e.kind() == Kind::Unsupported => return Ok(false),
            other => other?,
        }
        *lock(&unborn.cloned) = Some(disk);
        // Held open from here on, so that any write to it is seen by the next call.
        let (send, receive) = std::sync::mpsc::channel();
        let done: Done<()> = Box::new(move |_| {
            let _ = send.send(());
        });
        if let Some(done) = self.adopt(handle, done, |_, done| done(Ok(()))) {
            done(Ok(()));
        }
        let _ = receive.recv();
        Ok(true)
    }
}

/// The range is the clone's already, and was not written since.
fn is_there(unborn: &Unborn, disk: &Disk, from: u64, to: u64) -> bool {
    let cloned = lock(&unborn.cloned);
    let untouched = unborn.image().is_some_and(|open| {
        let stats = open.image().stats();
        stats.writes == 0 && stats.discards == 0
    });
    from == to && untouched && cloned.as_ref() == Some(disk)
}
