//! A snapshot as a stream (`format::stream`).

use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};

use super::disk::FlatDisk;
use super::pieces::{DiskPiece, DiskPieces, runs};
use crate::error::{Error, Kind, Result};
use crate::format::stream::{Encoder, Head, PIECE, Tag};
use crate::io::process::no_thread;
use crate::progress::Progress;

/// Pieces read ahead of the writer.
const AHEAD: usize = 8;
/// A run of zeroes in the middle of data is worth a record of its own from here on, in bytes.
const GRAIN: usize = 64 << 10;

/// What is on its way to the writer.
enum Part {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
}

/// Writes the stream of `disk` to `out`: of the whole disk, or of `ranges` (begin and length in bytes, ascending).
pub fn write(
    disk: &dyn FlatDisk,
    head: &Head,
    ranges: Option<&[(u64, u64)]>,
    out: &mut dyn Write,
    progress: &Progress,
) -> Result<()> {
    let all = [(0, disk.size())];
    let ranges = ranges.unwrap_or(&all);
    progress.set_total(ranges.iter().map(|(_, len)| len).sum());
    let mut sink = Sink { out, encoder: Encoder::default(), incremental: head.is_incremental() };
    sink.begin(head)?;
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Result<Part>>(AHEAD);
        let read = |send: &SyncSender<Result<Part>>| -> Result<()> {
            for piece in DiskPieces::new(disk, ranges) {
                progress.check()?;
                let part = match piece? {
                    DiskPiece::Hole(offset, len) => Part::Zero(offset, len),
                    DiskPiece::Data(offset, len) => {
                        let mut bytes = vec![0; len];
                        disk.read(offset, &mut bytes)?;
                        Part::Data(offset, bytes)
                    }
                };
                // The writer failed: it says why.
                if send.send(Ok(part)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        let reader = move || {
            if let Err(e) = read(&send) {
                let _ = send.send(Err(e));
            }
        };
        let name = "ploopfs/read";
        let started = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, reader);
        started.map_err(no_thread(name))?;
        for part in receive {
            match part? {
                Part::Zero(offset, len) => {
                    sink.zero(offset, len)?;
                    progress.skip(len);
                }
                Part::Data(offset, bytes) => {
                    sink.bytes(offset, &bytes)?;
                    progress.add(bytes.len() as u64);
                }
            }
        }
        progress.check()?;
        sink.end()
    })
}

struct Sink<'a> {
    out: &'a mut dyn Write,
    encoder: Encoder,
    incremental: bool,
}

impl Sink<'_> {
    fn put(&mut self, tag: Tag, offset: u64, len: u64, payload: &[u8]) -> Result<()> {
        let record = self.encoder.record(tag, offset, len, payload);
        self.out.write_all(&record).and_then(|()| self.out.write_all(payload)).map_err(|e| broken(&e))
    }

    fn begin(&mut self, head: &Head) -> Result<()> {
        self.out.write_all(&Encoder::preamble()).map_err(|e| broken(&e))?;
        self.put(Tag::Head, 0, 0, &head.encode())
    }

    /// A full backup leaves out what is zero; an incremental one says that it became so.
    fn zero(&mut self, offset: u64, len: u64) -> Result<()> {
        if self.incremental { self.put(Tag::Zero, offset, len, &[]) } else { Ok(()) }
    }

    fn bytes(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        // Where something lies below, a zeroed part of a cluster would cost the restore a copy of it.
        let grain = if self.incremental { PIECE } else { GRAIN };
        for (range, zero) in runs(bytes, grain) {
            let at = offset + range.start as u64;
            if zero {
                self.zero(at, range.len() as u64)?;
            } else {
                self.put(Tag::Data, at, range.len() as u64, &bytes[range])?;
            }
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        let end = self.encoder.end();
        self.out.write_all(&end).and_then(|()| self.out.flush()).map_err(|e| broken(&e))
    }
}

fn broken(e: &io::Error) -> Error {
    let kind = e.raw_os_error().map_or(Kind::Io, Kind::of_errno);
    Error::new(kind, format!("cannot write the backup: {}", crate::error::words(e)))
}
