//! What the first, the first writing and the last opener of an image cause: its files, its lock, the live image.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::ArcSwapOption;

use super::counted::Stage;
use super::deltas::Deltas;
use super::entry::{Entry, FAILED};
use super::lease::Lease;
use super::live::Live;
use super::locked;
use super::scan::Source;
use crate::error::{Error, Kind, Result};
use crate::format::header::Header;
use crate::image::kind::{ImageKind, in_text};
use crate::image::layers::{Layers, Opened, Opener};
use crate::image::level::read_header;
use crate::io::file::HostFile;
use crate::io::heirs::{Heirs, WITNESSES};
use crate::io::lock::Use;
use crate::io::real::{Access, RealFile};
use crate::ledger::deaths::opening;
use crate::ledger::{Book, running};
use crate::rules::{Rule, broken};
use crate::vdisk::{Image, Layout, Level, Mode, rescue};

/// Opens the files of one image out of those of the folder; kept by its layers, and reports when they are gone.
struct Leasing {
    deltas: Arc<Deltas>,
    _lease: Lease,
}

impl Opener for Leasing {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened> {
        self.deltas.open(dir, file, shown, used)
    }

    fn used(&self) -> Use {
        self.deltas.used()
    }

    fn heirs(&self) -> Arc<Heirs> {
        self.deltas.heirs.clone()
    }
}

impl Entry {
    /// The descriptor and the files of a layered image, and its live chain; opened once for all who use them.
    pub(super) fn open_layers(&self) -> Result<Arc<Layers>> {
        locked(&self.layers).get_or_open(|lease| {
            let path = self.path();
            let dir = self.origin().folder(self.shared.place.fd().as_fd(), &path)?;
            let opener = Arc::new(Leasing { deltas: self.shared.deltas.clone(), _lease: lease });
            Ok(Layers::open(dir, &path, opener, self.shared.allow_outside)?.0)
        })
    }

    pub(super) fn open_file(&self, kind: ImageKind) -> Result<(Opened, Level)> {
        let (path, origin) = (self.path(), self.origin());
        let (dir, deltas) = (self.shared.place.fd(), &self.shared.deltas);
        let opened = match deltas.open_left(origin.identity, &path, Use::Writer) {
            Some(opened) => opened?,
            None => deltas.open(dir.as_fd(), origin.file.as_ref(), &path, Use::Writer)?,
        };
        let status = opened.file.status().map_err(|e| Error::io(&e, &path, "cannot open"))?;
        if (status.dev, status.ino) != origin.identity {
            let why = "is another file now; it will be taken in anew";
            return Err(Error::at(Kind::NotFound, &path, why));
        }
        let layout = match kind {
            ImageKind::Raw => Layout::Raw,
            ImageKind::Ploop => Layout::Ploop(header_of(&*opened.file, &path)?),
        };
        let level = Level { file: opened.file.clone(), path, layout };
        Ok((opened, level))
    }

    /// What the ledger is to have of it.
    fn book(&self, levels: &[Level]) -> Result<Option<Book>> {
        let (Some(ledger), Some(top)) = (&self.shared.ledger, levels.last()) else { return Ok(None) };
        let status = top.file.status().map_err(|e| Error::io(&e, &top.path, "cannot open"))?;
        Ok(Some(Book::of(ledger, self.id(), self.identity(), (status.dev, status.ino))))
    }

    /// Witnesses for a successor: open files of the top that hear a failed sync which this process hears, too.
    fn hand_witnesses(&self, book: &Book, top: &Path, count: usize) {
        let (heirs, origin) = (&self.shared.deltas.heirs, self.origin());
        if !heirs.are_kept() {
            return;
        }
        // One that lies elsewhere is not found so, and has none.
        let mut name = PathBuf::from(&origin.file);
        if origin.source == Source::Layers {
            name.extend(top.file_name());
        }
        let dir = self.shared.place.fd();
        for _ in 0..count {
            let kept = RealFile::open_as(dir, &name, top, Access::Widest).and_then(|file| {
                let status = file.status().map_err(|e| Error::io(&e, top, "cannot open"))?;
                Ok((status.dev, status.ino) == book.file() && heirs.keep(book.file(), true, &file))
            });
            match kept {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => return log::warn!("{e}; should the daemon die, the image will be read-only"),
            }
        }
    }

    /// Opens it, with what a daemon before has left of it (`vdisk::rescue` has the order).
    fn open_kept(&self, book: &Arc<Book>, name: &str, levels: Vec<Level>) -> Result<Arc<Image>> {
        let engine = &self.shared.engine;
        if book.left().is_none() {
            let image = Image::open(engine, name, levels)?;
            image.keep_in(book);
            return Ok(image);
        }
        let left_of = book.left().map(|left| left.file);
        let Some(level) = levels.last().filter(|_| left_of == Some(book.file())).cloned() else {
            let what = "has another top than when the daemon before ended";
            return Err(Error::at(Kind::Damaged, self.path(), what));
        };
        let witness = self.shared.deltas.witness(book.file(), &level.path)?;
        let rescued = rescue(&level, book, || match &witness {
            _ if broken(Rule::L5) => level.file.sync_data(),
            Some(witness) => witness.sync_data(),
            // Should a sync have failed, nothing would tell.
            None if self.shared.deltas.heirs.are_kept() => {
                Err(io::Error::other("no open file is left to ask"))
            }
            None => level.file.sync_data(),
        })?;
        let image = Image::go_on(engine, name, levels, book, rescued)?;
        // The one that was asked has said all that it had.
        self.hand_witnesses(book, &level.path, 1);
        Ok(image)
    }
}

impl Stage for Entry {
    type Live = Arc<Live>;

    /// Order: (1) open; (2) lock; (3) read the header: before the lock, a user who is just leaving would be seen
    /// half done.
    fn open(&self) -> Result<Arc<Live>> {
        let work = opening(self.id());
        if running::refuses(work) {
            let what = "opening it has ended the daemon: it stays closed; run: ploopfs check";
            return Err(Error::at(Kind::Io, self.path(), what));
        }
        let _executing = running::begin(work);
        let (layers, hold, levels, can_write) = match self.origin().source {
            Source::File(kind) => {
                let (opened, level) = self.open_file(kind)?;
                let can_write = opened.writable;
                (None, Some(opened), vec![level], can_write)
            }
            Source::Layers => {
                let layers = self.open_layers()?;
                let (levels, can_write) = (layers.live_chain()?, layers.writable());
                (Some(layers), None, levels, can_write)
            }
        };
        // What is written on a transport's thread goes to the top alone.
        let never_blocks = levels.last().is_some_and(|top| top.file.traits().never_blocks);
        let name = in_text(self.name());
        let image = match self.book(&levels)? {
            Some(book) => self.open_kept(&Arc::new(book), &name, levels)?,
            None => Image::open(&self.shared.engine, &name, levels)?,
        };
        self.size.store(image.size(), Ordering::Release);
        let (layers, hold) = (ArcSwapOption::new(layers), Mutex::new(hold));
        let live = Arc::new(Live { image, can_write, never_blocks, layers, hold });
        self.live.store(Some(live.clone()));
        Ok(live)
    }

    fn make_writable(&self, live: &Arc<Live>) -> Result<()> {
        if self.shared.read_only || !live.can_write {
            let why =
                if self.shared.read_only { "the mount is read-only" } else { "the host refuses writing" };
            return Err(Error::at(Kind::ReadOnly, self.path(), why));
        }
        // A snapshot that is being read has kept the descriptor open since the sync failed that made the image read-only.
        if let Some(layers) = &*live.layers.load() {
            layers.store().redo_unsynced()?;
        }
        if let Some(book) = live.image.book()
            && book.begin()
        {
            self.hand_witnesses(book, &live.image.top_path(), WITNESSES);
        }
        live.image.make_writable()
    }

    fn check_writable(&self, live: &Arc<Live>) -> Result<()> {
        match live.image.stats().mode {
            Mode::ReadOnly => Err(Error::at(Kind::ReadOnly, self.path(), FAILED)),
            _ => Ok(()),
        }
    }

    /// Order: (1) the image's own close: durable, mark cleared; (2) the lock, where nothing is under way any more. Swapped,
    /// another process would open an image that we still change.
    fn close(&self, live: Arc<Live>) -> Result<()> {
        let (now, status) = (Instant::now(), live.image.host_status());
        let result = live.image.close();
        let passed = live.image.backing().is_some_and(|backing| backing.end());
        // Passed through, it is as long as its users made it.
        let len = status.as_ref().map_or(0, |status| if passed { status.len } else { 0 });
        self.size.store(live.image.size().max(len), Ordering::Release);
        if let Ok(status) = status {
            let mut last = locked(&self.last);
            (last.status, last.asked) = (status, Some(now));
        }
        live.image.leave_book();
        self.live.store(None);
        let locks = (locked(&live.hold).take(), live.layers.swap(None));
        // By force, beside an operation: a write of it may still be under way.
        if live.image.is_busy() {
            live.image.keep(locks);
        }
        result
    }
}

/// Reads the header, and says what a person should know of it.
fn header_of(file: &dyn HostFile, path: &Path) -> Result<Header> {
    let header = read_header(file, path)?;
    if header.is_in_use() {
        log::warn!("{}: was not closed cleanly; it is scanned before its first write", path.display());
    }
    Ok(header)
}
