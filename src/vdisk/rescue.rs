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

use super::stack::Stack;
use super::{Image, Level};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{PAGE_BYTES, PAGE_SLOTS, cluster_of, pages};
use crate::format::header::HEADER_BYTES;
use crate::io::file::{read_full, write_full};
use crate::ledger::Book;
use crate::sync::{Arc, lock};

/// What became of what was left.
pub enum Rescue {
    /// It is in the file, as the host has it.
    Written,
    /// It is not, and no later sync can make it durable (R7).
    Failed(Error),
}

/// Steps 1 and 2. The image's files are open and locked, and nothing else of this process uses them. `sync` hears a failed
/// sync that the dead daemon may have heard (L5). What makes no sense is an error, and nothing is written: an image that is
/// served without these entries would give back old data.
pub fn rescue(level: &Level, book: &Book, sync: impl FnOnce() -> std::io::Result<()>) -> Result<Rescue> {
    let Some(left) = book.left() else { return Ok(Rescue::Written) };
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
        return Ok(Rescue::Failed(Error::at(Kind::Io, &level.path, what)));
    }
    let written = sync()
        .map_err(|e| Error::io(&e, &level.path, "a sync failed while the daemon was restarted")) // 1
        .and_then(|()| write(level, &copies)); // 2
    Ok(match written {
        Ok(()) => Rescue::Written,
        Err(e) => {
            book.failed();
            Rescue::Failed(e)
        }
    })
}

/// The pages that were left, each entry of which names a place in the file.
fn judged(level: &Level, book: &Book, refuse: impl Fn(String) -> Error) -> Result<Vec<(u64, Vec<u8>)>> {
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

    /// Steps 4 and 5: an image that was open for writing when its daemon died is so again; or, where its entries could not be
    /// made durable, is read as it was and can no longer be written. Blocks; not for runners.
    pub fn go_on(self: &Arc<Self>, book: &Book, rescued: Rescue) -> Result<()> {
        let Some(left) = book.left() else { return Ok(()) };
        if let Rescue::Failed(e) = rescued {
            if self.stack().top_down().nth(1).is_some() && !left.pages.is_empty() {
                // What a discard has taken away may lie in the file, and what is below it is not known.
                return Err(e);
            }
            left.pages
                .iter()
                .try_for_each(|(number, record)| self.lay_over(*number, &book.left_page(*record)))?;
            self.fail(&e);
            return Ok(());
        }
        self.make_writable()?;
        // What the daemon before has written, and not synced.
        self.touched(1);
        let header =
            |stack: &Stack| lock(&stack.state.header).as_ref().is_some_and(|header| header.is_in_use());
        if header(&self.stack()) || !left.pages.is_empty() {
            self.mark_and_wait()?; // 4
        }
        book.rescued(); // 5
        Ok(())
    }

    /// The entries of a page that are in no file, for as long as the image is open.
    fn lay_over(self: &Arc<Self>, number: u32, bytes: &[u8]) -> Result<()> {
        let stack = self.stack();
        let first = if number == 0 { HEADER_BYTES as usize / 4 } else { 0 };
        let (Some(bat), Some(cluster)) = (&stack.bat, cluster_of(number.into(), first)) else {
            return Ok(());
        };
        while !bat.pin(cluster) {
            self.load_and_wait(&stack, cluster)?;
        }
        let len =
            stack.top().file.len().map_err(|e| Error::io(&e, &stack.top().path, "cannot read the BAT"))?;
        for slot in first..PAGE_SLOTS {
            let (Some(&[a, b, c, d]), Some(cluster)) =
                (bytes.get(slot * 4..slot * 4 + 4), cluster_of(number.into(), slot))
            else {
                continue;
            };
            let entry = u32::from_le_bytes([a, b, c, d]);
            if cluster < stack.geometry.entries {
                bat.lay_over(cluster, stack.top_index(), stack.geometry.place(cluster, entry, len));
            }
        }
        Ok(())
    }
}
