//! What a daemon that died has left of an image: its entries go to the file, and the image goes on as it was open
//! (docs/restart.md#takeover).
//!
//! The order, whenever it is repeated after another death:
//! 1. fdatasync: what the entries name is durable before they are (R3);
//! 2. the pages are written, page 0 behind the header as it is (R5);
//! 3. the image is opened, and its BAT scanned, without distrust: same kernel, same pages;
//! 4. the mark is made anew, which syncs 2, and only then cuts the file and lets space be handed out (R4);
//! 5. the ledger gives the pages back.
//!
//! 3 before 2: the scan would call the clusters of the entries free, and 4 would cut them off. 5 before 4: a death between
//! the two would leave them to the host's cache alone.
//!
//! **L5** A failure stands in the ledger before any thread hears of it. Before a successor writes an entry it syncs
//! through a witness, an open file that has not asked since the image was opened for writing. The keeper hears first
//! that it is asked, and does not give it again; what it said stands in the ledger before the image gets a new one.
//! With none left, or when it hears a failure, nothing is written, the entries are laid over the BAT in memory, and
//! the image is read-only.

use super::overlaid::Overlaid;
use super::stack::Stack;
use super::{Engine, Image, Level, scan};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{PAGE_BYTES, PAGE_SLOTS, cluster_of, pages};
use crate::format::header::HEADER_BYTES;
use crate::io::file::{read_full, write_full};
use crate::ledger::Book;
use crate::rules::{Rule, broken};
use crate::sync::{Arc, lock};

/// What became of what was left.
pub struct Rescue(Outcome);

enum Outcome {
    /// It is in the file, as the host has it.
    Written,
    /// It waits for space on the host: these pages.
    Waits(Pages),
    /// It is not, and no later sync can make it durable (R7).
    Failed(Error, Pages),
}

/// BAT pages by number.
type Pages = Vec<(u64, Vec<u8>)>;

/// Steps 1 and 2. The image's files are open and locked, and nothing else of this process uses them. `sync` hears a failed
/// sync that the dead daemon may have heard (L5). What makes no sense is an error, and nothing is written: an image that is
/// served without these entries would give back old data.
pub fn rescue(level: &Level, book: &Book, sync: impl FnOnce() -> std::io::Result<()>) -> Result<Rescue> {
    let Some(left) = book.left() else { return Ok(Rescue(Outcome::Written)) };
    let refuse = |what: String| {
        let context = format!("what the daemon before has left of it makes no sense: {what}");
        Error::at(Kind::Damaged, &level.path, context)
    };
    if let Some(why) = &left.nonsense {
        return Err(refuse(why.clone()));
    }
    let copies = judged(level, book, refuse)?;
    if left.failed {
        let what =
            "a sync failed before the daemon was restarted; what was written since the last one may be lost";
        return Ok(Rescue(Outcome::Failed(Error::at(Kind::Io, &level.path, what), copies)));
    }
    let failed = |e: Error, copies| {
        if !broken(Rule::L5) {
            book.failed();
        }
        Ok(Rescue(Outcome::Failed(e, copies)))
    };
    let synced = if broken(Rule::R3) { Ok(()) } else { sync() }; // 1
    if let Err(e) = synced {
        return failed(Error::io(&e, &level.path, "a sync failed while the daemon was restarted"), copies);
    }
    match write(level, &copies) {
        Ok(()) => Ok(Rescue(Outcome::Written)),
        // As any BAT write: it may fit later.
        Err(e) if e.kind() == Kind::NoSpace => Ok(Rescue(Outcome::Waits(copies))),
        Err(e) => failed(e, copies),
    } // 2
}

impl Rescue {
    /// The files of the image as they are to be opened: what could not be written is read all the same.
    fn seen(&self, mut levels: Vec<Level>) -> Vec<Level> {
        let (Outcome::Waits(pages) | Outcome::Failed(_, pages)) = &self.0 else { return levels };
        if let Some(top) = levels.last_mut()
            && let Some(of) = top.geometry().filter(|_| !pages.is_empty())
        {
            top.file = Arc::new(Overlaid::new(top.file.clone(), of.bat_end(), pages));
        }
        levels
    }
}

/// The pages that were left, each entry of which names a place in the file.
fn judged(level: &Level, book: &Book, refuse: impl Fn(String) -> Error) -> Result<Pages> {
    let left = book.left().map_or(&[][..], |left| &left.pages);
    let Some(of) = level.geometry() else {
        return if left.is_empty() {
            Ok(Vec::new())
        } else {
            Err(refuse("entries of a file that has no map".to_owned()))
        };
    };
    let len = level.file.len().map_err(|e| Error::io(&e, &level.path, "cannot rescue its entries"))?;
    let mut copies = Vec::with_capacity(left.len());
    for (number, record) in left {
        let number = u64::from(*number);
        if number >= pages(of.entries) {
            return Err(refuse(format!("BAT page {number}, behind its end")));
        }
        let bytes = book.left_page(*record);
        let first = if number == 0 { HEADER_BYTES as usize / 4 } else { 0 };
        for slot in 0..PAGE_SLOTS {
            let Some(&[a, b, c, d]) = bytes.get(slot * 4..slot * 4 + 4) else { continue };
            let entry = u32::from_le_bytes([a, b, c, d]);
            let sound =
                |entry| cluster_of(number, slot).and_then(|cluster| of.place(cluster, entry, len)).is_some();
            if entry != 0 && (slot < first || !sound(entry)) {
                return Err(refuse(format!("entry {slot} of BAT page {number} is {entry}")));
            }
        }
        copies.push((number, bytes));
    }
    Ok(copies)
}

fn write(level: &Level, copies: &[(u64, Vec<u8>)]) -> Result<()> {
    let Some(of) = level.geometry() else { return Ok(()) };
    let io = |e: std::io::Error, what: &str| Error::io(&e, &level.path, what);
    for (number, bytes) in copies {
        let (start, mut bytes) = (number * PAGE_BYTES, bytes.clone());
        if *number == 0 {
            let header = &mut bytes[..HEADER_BYTES as usize];
            let got = read_full(&*level.file, header, 0).map_err(|e| io(e, "cannot read the header"))?;
            if got < header.len() {
                return Err(Error::at(Kind::Damaged, &level.path, "its header is gone"));
            }
        }
        let end = (of.bat_end() - start).min(PAGE_BYTES) as usize;
        write_full(&*level.file, &bytes[..end], start).map_err(|e| io(e, "cannot write a BAT page"))?;
    }
    Ok(())
}

impl Image {
    /// What the image does from now on stands in `book`, as far as a successor needs it.
    pub fn keep_in(self: &Arc<Self>, book: &std::sync::Arc<Book>) {
        let stack = self.stack();
        if let Some(bat) = &stack.bat {
            let kept = super::bat::kept::Kept {
                book: book.clone(),
                top: stack.top_index(),
                geometry: stack.geometry,
            };
            bat.keep(kept);
        }
        let _ = self.book.set(book.clone());
    }

    /// The top's file, for messages.
    pub fn top_path(&self) -> std::path::PathBuf {
        self.path()
    }

    /// What the ledger has of it.
    pub fn book(&self) -> Option<&std::sync::Arc<Book>> {
        self.book.get()
    }

    /// Behind its close: nothing of it is left in the ledger.
    pub fn leave_book(&self) {
        let Some(book) = self.book.get() else { return };
        if let Some(bat) = &self.stack().bat {
            bat.leave_ledger();
        }
        book.end();
    }

    /// Steps 3 to 5: an image that was open for writing when its daemon died is so again; or, where its entries could not be
    /// made durable, is read as it was and can no longer be written. What waits for space is dirty, as it was, and stays in
    /// the ledger until it is written. Blocks; not for runners.
    pub fn go_on(
        engine: &Arc<Engine>,
        name: &str,
        levels: Vec<Level>,
        book: &std::sync::Arc<Book>,
        rescued: Rescue,
    ) -> Result<Arc<Image>> {
        let top = levels.last().cloned();
        let image = Image::open_beside(engine, name, rescued.seen(levels))?; // 3
        image.keep_in(book);
        let Some(left) = book.left() else { return Ok(image) };
        if let Outcome::Failed(e, _) = &rescued.0 {
            image.fail(e);
            return Ok(image);
        }
        image.make_writable()?;
        // What the daemon before has written, and not synced.
        image.touched(1);
        if let (Outcome::Waits(pages), Some(top)) = (&rescued.0, &top) {
            image.adopt(book, top, pages)?;
        }
        let header =
            |stack: &Stack| lock(&stack.state.header).as_ref().is_some_and(|header| header.is_in_use());
        if header(&image.stack()) || !left.pages.is_empty() {
            match image.mark_and_wait() {
                // The first write tries again, and waits for space.
                Err(e) if e.kind() == Kind::NoSpace => {}
                marked => marked?, // 4
            }
        }
        book.rescued(); // 5
        Ok(image)
    }

    /// These pages are dirty, and stand in the ledger as they are. What only the file's own entries name (`top` is as it is
    /// there) is free when its page is durable (R4), with what it holds.
    fn adopt(self: &Arc<Self>, book: &Book, top: &Level, pages: &Pages) -> Result<()> {
        let (stack, of) = (self.stack(), self.stack().geometry);
        let Some(after) = lock(&stack.state.scan).take() else { return Ok(()) };
        *lock(&stack.state.scan) = Some(after.and(&scan::scan(top, &of)?));
        for (number, bytes) in pages {
            let number = *number;
            let first = if number == 0 { HEADER_BYTES as usize / 4 } else { 0 };
            let (Some(bat), Some(cluster)) = (&stack.bat, cluster_of(number, first)) else { continue };
            let mut before = vec![0; bytes.len()];
            read_full(&*top.file, &mut before, number * PAGE_BYTES)
                .map_err(|e| Error::io(&e, &top.path, "cannot read the BAT"))?;
            let gone =
                (first..PAGE_SLOTS).filter(|slot| cluster_of(number, *slot).is_some_and(|c| c < of.entries));
            let gone = gone.filter_map(|slot| before.get(slot * 4..slot * 4 + 4)?.try_into().ok());
            let gone = gone.filter_map(|entry| of.position(u32::from_le_bytes(entry)));
            let gone: Vec<u64> = gone.map(|at| of.file_cluster(at)).filter(|c| after.is_free(*c)).collect();
            while !bat.pin(cluster) {
                self.load_and_wait(&stack, cluster)?;
            }
            if let Some(slot) = book.adopt(number) {
                bat.adopt(cluster, slot, gone);
            }
            bat.unpin(cluster);
        }
        self.bat_is_dirty();
        Ok(())
    }
}
