//! What can be done with an open file: read, write, sync, punch, seek.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::text::Text;
use super::trouble::Trouble;
use super::unborn::Unborn;
use crate::error::{Error, Result};
use crate::folder::{Entry, OpenImage, OpenSnapshot};
use crate::fuse::ops::{Answer, Done, Errno, Now, OpenFlags, Whence};
use crate::io::planned::Planned;
use crate::vdisk::latency::Op;
use crate::vdisk::{Engine, Image, Reply};

/// fallocate: the length stays.
const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
/// fallocate: what loop sends for a discard.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
/// fallocate: make it zeroes; loop sends it with [`KEEP_SIZE`] for `blkdiscard -z`.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// What is behind a handle.
pub(super) enum OpenFile {
    /// An image.
    Image(OpenImage),
    /// A snapshot, read-only.
    Snapshot(OpenSnapshot),
    /// A file that was opened before it was an image.
    Unborn(Arc<Unborn>),
    /// A file that was made up for its open.
    Text(Text),
}

/// Where failures of one file are reported.
struct Report {
    trouble: Arc<Trouble>,
    path: PathBuf,
    doing: &'static str,
}

impl Report {
    fn answer<T>(&self, result: Result<T>) -> Answer<T> {
        result.map_err(|e| self.errno(&e))
    }

    fn errno(&self, e: &Error) -> Errno {
        self.trouble.errno(e, &self.path, self.doing)
    }
}

/// The part of `[offset, offset + len)` that lies before `end`: its length.
fn clip(offset: u64, len: u64, end: u64) -> u64 {
    len.min(end.saturating_sub(offset))
}

fn is_durable(flags: OpenFlags) -> bool {
    // O_SYNC contains O_DSYNC.
    flags.raw & libc::O_DSYNC != 0
}

impl OpenFile {
    /// See [`FileSystem::read_now`](crate::fuse::ops::FileSystem::read_now).
    pub(super) fn read_now(&self, trouble: &Arc<Trouble>, offset: u64, buf: &mut [u8]) -> Now<usize> {
        match self.image() {
            Some((image, entry)) => {
                let len = clip(offset, buf.len() as u64, image.size()) as usize;
                if len == 0 {
                    return Now::Done(Ok(0));
                }
                let began = Instant::now();
                match image.try_read(offset, &mut buf[..len]) {
                    Some(result) => {
                        image.latencies().note(Op::Read, began.elapsed());
                        Now::Done(result.map_err(|e| report(trouble, entry, "read").errno(&e)))
                    }
                    None => Now::Later,
                }
            }
            // It may be an image by now.
            None if matches!(self, OpenFile::Unborn(_)) => Now::Later,
            None => Now::Done(self.text(offset, buf.len()).map(|part| {
                buf[..part.len()].copy_from_slice(&part);
                part.len()
            })),
        }
    }

    /// The image behind it, and whose it is.
    pub(super) fn image(&self) -> Option<(&Arc<Image>, &Arc<Entry>)> {
        match self {
            OpenFile::Image(_) | OpenFile::Unborn(_) => {
                self.open_image().map(|open| (open.image(), open.entry()))
            }
            OpenFile::Snapshot(open) => Some((open.image(), open.entry())),
            OpenFile::Text(_) => None,
        }
    }

    /// The image's live disk.
    fn open_image(&self) -> Option<&OpenImage> {
        match self {
            OpenFile::Image(open) => Some(open),
            OpenFile::Unborn(unborn) => unborn.image(),
            OpenFile::Snapshot(_) | OpenFile::Text(_) => None,
        }
    }

    fn text(&self, offset: u64, len: usize) -> Answer<Bytes> {
        match self {
            OpenFile::Text(text) => text.part(offset, len),
            OpenFile::Image(_) | OpenFile::Snapshot(_) | OpenFile::Unborn(_) => Ok(Bytes::new()),
        }
    }

    /// Reads; answers from any thread.
    pub(super) fn read_later(&self, trouble: &Arc<Trouble>, offset: u64, len: usize, done: Done<Bytes>) {
        match self.image() {
            Some((image, entry)) => {
                image.read(offset, len, timed(image, Op::Read, reply(trouble, entry, "read", done)))
            }
            None => done(self.text(offset, len)),
        }
    }

    /// See [`FileSystem::plan_read`](crate::fuse::ops::FileSystem::plan_read).
    pub(super) fn plan_read(&self, offset: u64, len: usize) -> Option<Planned> {
        let (image, _) = self.image()?;
        let (noted, began) = (image.clone(), Instant::now());
        image.plan_read(offset, len, move |whole| {
            // What could not be read is read again, and noted then.
            if whole {
                noted.latencies().note(Op::Read, began.elapsed());
            }
        })
    }

    /// An image that may be written through this handle, and where `len` bytes at `offset` lie inside.
    ///
    /// A write across the end fails whole, with the errno that a full disk has: loop takes a short write for a
    /// complete one, and the tail would be lost (docs/kernel.md#short-writes).
    fn writable(&self, offset: u64, len: u64) -> Answer<&OpenImage> {
        match self.open_image() {
            Some(open) if open.writes() => {
                let inside = offset.checked_add(len).is_some_and(|end| end <= open.image().size());
                if inside { Ok(open) } else { Err(Errno(libc::ENOSPC)) }
            }
            _ => Err(if let OpenFile::Unborn(unborn) = self { unborn.refusal() } else { Errno(libc::EBADF) }),
        }
    }

    /// See [`FileSystem::write_now`](crate::fuse::ops::FileSystem::write_now).
    pub(super) fn write_now(
        &self,
        trouble: &Arc<Trouble>,
        offset: u64,
        data: &[u8],
        flags: OpenFlags,
    ) -> Now<usize> {
        let open = match self.writable(offset, data.len() as u64) {
            Ok(open) => open,
            // It may be an image by now, or become longer.
            Err(_) if matches!(self, OpenFile::Unborn(_)) => return Now::Later,
            Err(errno) => return Now::Done(Err(errno)),
        };
        if is_durable(flags) {
            return Now::Later;
        }
        let began = Instant::now();
        let Some(result) = open.image().try_write(offset, data) else { return Now::Later };
        open.image().latencies().note(Op::Write, began.elapsed());
        match result {
            Ok(()) => Now::Done(Ok(data.len())),
            Err(e) => Now::Done(Err(report(trouble, open.entry(), "write").errno(&e))),
        }
    }

    /// Writes; answers from any thread.
    pub(super) fn write_later(
        &self,
        trouble: &Arc<Trouble>,
        offset: u64,
        data: Bytes,
        flags: OpenFlags,
        done: Done<usize>,
    ) {
        let len = data.len();
        match self.writable(offset, len as u64) {
            Ok(open) => {
                let done = Box::new(move |answer: Answer<()>| done(answer.map(|()| len)));
                let reply = timed(open.image(), Op::Write, reply(trouble, open.entry(), "write", done));
                open.image().write(offset, data, is_durable(flags), reply);
            }
            Err(errno) => done(Err(errno)),
        }
    }

    /// True when a write may wait for a device.
    pub(super) fn writes_may_block(&self) -> bool {
        self.open_image().is_some_and(|open| !open.never_blocks())
    }

    /// Everything acknowledged before is durable. On an image that no opener could have changed that is so already.
    pub(super) fn fsync(&self, trouble: &Arc<Trouble>, done: Done<()>) {
        match self.open_image() {
            Some(open) if open.may_change() => {
                open.image().flush(timed(
                    open.image(),
                    Op::Flush,
                    reply(trouble, open.entry(), "sync", done),
                ));
            }
            _ => done(Ok(())),
        }
    }

    /// Punches and zeroes. What lies behind the end is cut off; what would change the size is not supported.
    pub(super) fn fallocate(&self, trouble: &Arc<Trouble>, offset: u64, len: u64, mode: i32, done: Done<()>) {
        let open = match self.writable(0, 0) {
            Ok(_) if len == 0 => return done(Err(Errno(libc::EINVAL))),
            Ok(open) => open,
            Err(errno) => return done(Err(errno)),
        };
        let clipped = clip(offset, len, open.image().size());
        let supported = match mode {
            PUNCH => true,
            _ if mode == ZERO | KEEP_SIZE => true,
            ZERO => clipped == len,
            _ => false,
        };
        match clipped {
            _ if !supported => done(Err(Errno(libc::EOPNOTSUPP))),
            0 => done(Ok(())),
            _ => {
                let reply = reply(trouble, open.entry(), "discard", done);
                open.image().discard(offset, clipped, timed(open.image(), Op::Discard, reply));
            }
        }
    }

    /// SEEK_DATA and SEEK_HOLE.
    pub(super) fn lseek(
        &self,
        trouble: &Arc<Trouble>,
        engine: &Engine,
        offset: u64,
        whence: Whence,
        done: Done<u64>,
    ) {
        let size = match (self.image(), self) {
            (Some((image, _)), _) => image.size(),
            (None, OpenFile::Text(text)) => text.len(),
            (None, _) => 0,
        };
        if offset >= size {
            return done(Err(Errno(libc::ENXIO)));
        }
        let Some((image, entry)) = self.image() else {
            return done(Ok(if whence == Whence::Data { offset } else { size }));
        };
        let image = image.clone();
        let report = report(trouble, entry, "seek");
        engine.blocking(entry.id(), Box::new(move || done(seek(&image, offset, whence, &report))));
    }
}

fn seek(image: &Arc<Image>, offset: u64, whence: Whence, report: &Report) -> Answer<u64> {
    match whence {
        Whence::Data => report.answer(image.seek_data(offset))?.ok_or(Errno(libc::ENXIO)),
        Whence::Hole => report.answer(image.seek_hole(offset)),
    }
}

fn report(trouble: &Arc<Trouble>, entry: &Arc<Entry>, doing: &'static str) -> Report {
    Report { trouble: trouble.clone(), path: entry.path(), doing }
}

/// The image's answer, as the transport wants it.
fn reply<T: 'static>(
    trouble: &Arc<Trouble>,
    entry: &Arc<Entry>,
    doing: &'static str,
    done: Done<T>,
) -> Reply<T> {
    let (trouble, entry) = (trouble.clone(), entry.clone());
    Box::new(move |result| {
        done(result.map_err(|e| Report { trouble, path: entry.path(), doing }.errno(&e)));
    })
}

/// The same answer, its time noted.
fn timed<T: 'static>(image: &Arc<Image>, op: Op, reply: Reply<T>) -> Reply<T> {
    let (image, began) = (image.clone(), Instant::now());
    Box::new(move |result| {
        image.latencies().note(op, began.elapsed());
        reply(result);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_flags_make_a_write_durable() {
        assert!(is_durable(OpenFlags { raw: libc::O_RDWR | libc::O_DSYNC }));
        assert!(is_durable(OpenFlags { raw: libc::O_WRONLY | libc::O_SYNC }));
        assert!(!is_durable(OpenFlags { raw: libc::O_RDWR | libc::O_DIRECT }));
    }

    #[test]
    fn ranges_are_cut_at_the_end_without_overflow() {
        assert_eq!(clip(0, 10, 5), 5);
        assert_eq!(clip(5, 10, 5), 0);
        assert_eq!(clip(u64::MAX, u64::MAX, 5), 0);
    }
}
