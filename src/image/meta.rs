//! The metadata of one file, header and BAT, apart from its data: as text that a person can read and that can be put
//! back, and as a file without data, for a report of a bug.
//!
//! ```text
//! format 1
//! file vm1.hds
//! length 12582912
//! m_Sig 576974686f7546726553706163457874
//! m_Type 2
//! ...                               every field of the header, by its name in docs/format.md#header
//! bat 5 3 9 1                       guest clusters 5, 6, 7 have the entries 9, 10, 11; all others are 0
//! end
//! ```
//!
//! Lines that begin with # say something to a person.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use super::repair::proven_header;
use crate::error::{Error, Kind, Result};
use crate::format::header::{CLOSED, Geometry, HEADER_BYTES, Header, IN_USE};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::paths::Located;
use crate::io::file::{HostStatus, write_full};
use crate::io::lock::DeltaLock;
use crate::io::new_file::NewFile;
use crate::io::real::Access;

/// The header's fields: name, byte, bytes. The magic is in front of them.
const FIELDS: [(&str, usize, usize); 10] = [
    ("m_Type", 16, 4),
    ("m_Heads", 20, 4),
    ("m_Cylinders", 24, 4),
    ("m_Sectors", 28, 4),
    ("m_Size", 32, 4),
    ("m_SizeInSectors", 36, 8),
    ("m_DiskInUse", 44, 4),
    ("m_FirstBlockOffset", 48, 4),
    ("m_Flags", 52, 4),
    ("m_FormatExtensionOffset", 56, 8),
];
const MAGIC_BYTES: usize = 16;
/// Bytes of a BAT that are read or written at a time.
const PIECE: u64 = 1 << 20;

/// Entries of neighbours that grow evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
    entry: u32,
    step: u32,
}

impl Run {
    /// True when the entry of guest cluster `cluster` continues it.
    fn takes(&mut self, cluster: u64, entry: u32) -> bool {
        if self.first + self.count != cluster {
            return false;
        }
        let step = if self.count == 1 { entry.checked_sub(self.entry) } else { Some(self.step) };
        let Some(step) = step.filter(|step| self.at(self.count, *step) == Some(entry)) else { return false };
        (self.step, self.count) = (step, self.count + 1);
        true
    }

    fn at(&self, index: u64, step: u32) -> Option<u32> {
        u32::try_from(u64::from(self.entry) + index.checked_mul(step.into())?).ok()
    }
}

/// The metadata of one file, read from text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The file's name, as it was.
    pub name: String,
    /// The file's length in bytes, as it was.
    pub len: u64,
    head: [u8; HEADER_BYTES as usize],
    runs: Vec<Run>,
}

/// Writes the metadata of a file as text. A damaged header is written as it is; the BAT as far as it is known
/// where it ends.
pub fn dump(at: &Located, name: &str, to: &mut dyn Write) -> Result<()> {
    let (path, candidate) = (&*at.shown, Candidate::open_at(at)?);
    let mut text = String::from("format 1\n");
    // Writing into a String cannot fail.
    let _ = write!(text, "file {}\nlength {}\n", name.escape_default(), candidate.status.len);
    let mut head = candidate.head.clone();
    head.resize(HEADER_BYTES as usize, 0);
    let magic: String = head[..MAGIC_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
    let _ = writeln!(text, "m_Sig {magic}\n# which is \"{}\"", head[..MAGIC_BYTES].escape_ascii());
    for (name, at, bytes) in FIELDS {
        let value = number(&head[at..at + bytes]);
        let _ = match name {
            "m_DiskInUse" | "m_Flags" => writeln!(text, "{name} {value:#x}"),
            _ => writeln!(text, "{name} {value}"),
        };
    }
    let put = |text: &str, to: &mut dyn Write| {
        to.write_all(text.as_bytes()).map_err(|e| Error::io(&e, path, "cannot write the dump"))
    };
    match proven_header(&candidate) {
        Err(why) => {
            let _ = writeln!(text, "# the BAT is left out: {}", why.to_string().escape_default());
        }
        Ok(header) => {
            let image = at_rest(&candidate, &header);
            let mut run: Option<Run> = None;
            let mut failed = None;
            image.for_each_entry(&header.geometry(), |cluster, entry| {
                if run.as_mut().is_some_and(|run| run.takes(cluster, entry)) {
                    return;
                }
                line(&mut text, run.replace(Run { first: cluster, count: 1, entry, step: 0 }));
                if text.len() > PIECE as usize && failed.is_none() {
                    failed = put(&text, to).err();
                    text.clear();
                }
            })?;
            if let Some(e) = failed {
                return Err(e);
            }
            line(&mut text, run);
        }
    }
    text.push_str("end\n");
    put(&text, to)
}

fn line(text: &mut String, run: Option<Run>) {
    if let Some(Run { first, count, entry, step }) = run {
        let _ = writeln!(text, "bat {first} {count} {entry} {step}");
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn at_rest(candidate: &Candidate, header: &Header) -> AtRest {
    let (len, allocated) = candidate.extent();
    let path = candidate.path.clone();
    AtRest { path, form: Form::Ploop(*header), len, allocated, file: candidate.file.clone() }
}

/// Reads dumps. Err says which line is wrong, and why.
pub fn parse(text: &str) -> std::result::Result<Vec<Meta>, String> {
    let mut all = Vec::new();
    let mut open: Option<(Meta, usize)> = None;
    for (index, line) in text.lines().enumerate() {
        let bad = |why: &str| Err(format!("line {}: {why}", index + 1));
        let line = line.trim();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (word, &mut open) {
            ("", _) | ("#", _) => {}
            ("format", None) if rest == "1" => {
                let meta =
                    Meta { name: String::new(), len: 0, head: [0; HEADER_BYTES as usize], runs: Vec::new() };
                open = Some((meta, 0));
            }
            ("format", None) => return bad("the format of this dump is not known to this program"),
            (_, None) => return bad("a dump begins with \"format 1\""),
            ("file", Some((meta, _))) => meta.name = rest.to_owned(),
            ("length", Some((meta, fields))) => {
                meta.len = value(rest).ok_or_else(|| format!("line {}: not a number", index + 1))?;
                *fields += 1;
            }
            ("m_Sig", Some((meta, fields))) => {
                let bytes: Option<Vec<u8>> = (0..MAGIC_BYTES)
                    .map(|i| rest.get(2 * i..2 * i + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
                    .collect();
                let Some(bytes) = bytes else { return bad("not 16 bytes in hexadecimal digits") };
                meta.head[..MAGIC_BYTES].copy_from_slice(&bytes);
                *fields += 1;
            }
            ("bat", Some((meta, _))) => {
                let numbers: Option<Vec<u64>> = rest.split_whitespace().map(value).collect();
                let run = numbers.and_then(|n| match n[..] {
                    [first, count, entry, step] => Some(Run {
                        first,
                        count,
                        entry: u32::try_from(entry).ok()?,
                        step: u32::try_from(step).ok()?,
                    }),
                    _ => None,
                });
                let sound = run.filter(|run| {
                    let last = run.count.checked_sub(1).and_then(|last| run.at(last, run.step));
                    let after = meta.runs.last().map_or(0, |last| last.first + last.count);
                    last.is_some() && run.first >= after && run.first.checked_add(run.count).is_some()
                });
                let Some(run) = sound else { return bad("not FIRST COUNT ENTRY STEP, or not in order") };
                meta.runs.push(run);
            }
            ("end", Some((_, fields))) => {
                if *fields != FIELDS.len() + 2 {
                    return bad("a field of the header is missing, or is there twice");
                }
                all.extend(open.take().map(|(meta, _)| meta));
            }
            (word, Some((meta, fields))) => {
                let Some((_, at, bytes)) = FIELDS.iter().find(|(name, ..)| *name == word) else {
                    return bad("not a field of the header");
                };
                let fits = value(rest).filter(|value| *bytes == 8 || *value >> (8 * bytes) == 0);
                let Some(value) = fits else { return bad("not a number of this size") };
                meta.head[*at..at + bytes].copy_from_slice(&value.to_le_bytes()[..*bytes]);
                *fields += 1;
            }
        }
    }
    match open {
        Some(_) => Err("the dump has no end: it is cut off".into()),
        None if all.is_empty() => Err("there is no dump in it".into()),
        None => Ok(all),
    }
}

fn value(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => u64::from_str(text).ok(),
    }
}

impl Meta {
    /// The header, checked, and where the last cluster that an entry names ends.
    fn judge(&self) -> std::result::Result<(Header, u64), String> {
        let header = Header::parse(&self.head).map_err(|bad| format!("the header in it cannot be: {bad}"))?;
        let geometry = header.geometry();
        let mut end = geometry.first;
        for run in &self.runs {
            let last = run.first + run.count - 1;
            if last >= geometry.entries {
                return Err(format!("it has an entry {last}, but the BAT has {} only", geometry.entries));
            }
            // The first two say whether all are on the grid; the last is the highest.
            for index in [0, 1, run.count - 1].into_iter().filter(|index| *index < run.count) {
                let entry = run.at(index, run.step).filter(|entry| *entry != 0);
                let Some(at) = entry.and_then(|entry| geometry.position(entry)) else {
                    return Err(format!("the entries from {} on name no cluster", run.first));
                };
                // At least a byte of it, also where the disk has no such cluster.
                end = end.max(at + geometry.cluster_len(run.first + index).max(1));
            }
        }
        Ok((header, end))
    }

    /// The entries `from..from + buf.len()`, as they lie on disk.
    fn fill(&self, from: u64, entries: &mut [u32]) {
        entries.fill(0);
        let to = from + entries.len() as u64;
        let begin = self.runs.partition_point(|run| run.first + run.count <= from);
        for run in self.runs[begin..].iter().take_while(|run| run.first < to) {
            for cluster in run.first.max(from)..(run.first + run.count).min(to) {
                // `parse` has seen that the last one fits.
                entries[(cluster - from) as usize] = run.at(cluster - run.first, run.step).unwrap_or(0);
            }
        }
    }
}

/// A file whose metadata is to be replaced: locked, and judged.
#[derive(Debug)]
pub struct Restore<'a> {
    meta: &'a Meta,
    header: Header,
    candidate: Candidate,
    _lock: DeltaLock,
}

impl<'a> Restore<'a> {
    /// Locks the file, and sees whether `meta` can be its metadata. Changes nothing.
    pub fn prepare(meta: &'a Meta, at: &Located) -> Result<Restore<'a>> {
        let refuse =
            |why: String| Err(Error::at(Kind::Invalid, &at.shown, format!("cannot be restored: {why}")));
        let (header, end) = match meta.judge() {
            Ok(sound) => sound,
            Err(why) => return refuse(why),
        };
        let (candidate, lock) = Candidate::open_locked_at(at, Access::ReadWrite)?;
        let len = candidate.status.len;
        if end > len && !(end == header.geometry().first && meta.runs.is_empty()) {
            return refuse(format!("its entries reach to byte {end}, but the file ends at byte {len}"));
        }
        Ok(Restore { meta, header, candidate, _lock: lock })
    }

    /// The file, as it was opened.
    pub fn file(&self) -> &HostStatus {
        self.candidate.status()
    }

    /// Puts the metadata back. Data is not touched, and the file never becomes shorter.
    ///
    /// 1. the header says in use, durably (R1); 2. the BAT, durable; 3. the header as it was kept, durable, without
    ///    extension.
    ///
    /// 3 before 2, or no 1, and a power cut could leave half of each map under a header that says "clean".
    pub fn carry_out(self) -> Result<()> {
        let (header, file, len) = (self.header, &*self.candidate.file, self.candidate.status.len);
        let cannot = |e: io::Error| Error::io(&e, &self.candidate.path, "cannot restore the metadata");
        let write_header = |header: &Header| {
            write_full(file, &header.encode(), 0).and_then(|()| file.sync_data()).map_err(cannot)
        };
        write_header(&Header { in_use: IN_USE, ..header })?; // 1
        let geometry: Geometry = header.geometry();
        if len < geometry.first {
            file.set_len(geometry.first).map_err(cannot)?;
        }
        let mut at = 0;
        while at < geometry.entries {
            let mut entries = vec![0; (geometry.entries - at).min(PIECE / 4) as usize];
            self.meta.fill(at, &mut entries);
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            write_full(file, &bytes, HEADER_BYTES + 4 * at).map_err(cannot)?; // 2
            at += entries.len() as u64;
        }
        file.sync_all().map_err(cannot)?;
        // What the bitmap in the kept extension says was true when it was kept.
        let in_use = if header.extension == 0 { header.in_use } else { CLOSED };
        write_header(&Header { in_use, extension: 0, ..header }) // 3
    }
}

/// Writes header and BAT of a file to the new file `to`, at the same bytes and of the same length, without any
/// data: a sparse file. Returns the bytes packed.
pub fn pack(at: &Located, to: &Path) -> Result<u64> {
    let candidate = Candidate::open_at(at)?;
    // Where nothing proves how long the BAT is, what follows the header may be data.
    let header = proven_header(&candidate).ok();
    let end = header.map_or(HEADER_BYTES, |header| header.geometry().bat_end()).min(candidate.status.len);
    let image = header.map(|header| at_rest(&candidate, &header));
    let cannot = |e: io::Error| Error::io(&e, to, "cannot pack the metadata");
    let new = NewFile::begin(to)?;
    new.file().set_len(candidate.status.len).map_err(cannot)?;
    new.file().write_all_at(&candidate.head, 0).map_err(cannot)?;
    let mut piece = vec![0; PIECE as usize];
    let mut at = 0;
    while let Some(image) = image.as_ref().filter(|_| at < end) {
        let want = (end - at).min(PIECE) as usize;
        let got = image.read(&mut piece[..want], at)?;
        // A BAT may be mostly zeroes.
        if piece[..got].iter().any(|byte| *byte != 0) {
            new.file().write_all_at(&piece[..got], at).map_err(cannot)?;
        }
        at += want as u64;
    }
    new.commit()?;
    Ok(end)
}

/// A new sparse file of the length of a raw base, without its data.
pub fn pack_raw(at: &Located, to: &Path) -> Result<()> {
    let len = Candidate::open_at(at)?.extent().0;
    let new = NewFile::begin(to)?;
    new.file().set_len(len).map_err(|e| Error::io(&e, to, "cannot pack the metadata"))?;
    new.commit()
}

#[cfg(test)]
mod tests;
