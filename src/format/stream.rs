//! Backup streams, as bytes (version 1). Pure: no I/O. All integers are little endian.
//!
//! ```text
//! byte 0  8  magic "PLOOPFSB"
//!      8  4  version, 1
//!     12     records, one behind the other: one HEAD, then DATA and ZERO by ascending offset, then one END. Nothing
//!            follows.
//!
//! record  0  4  kind: "HEAD", "DATA", "ZERO", "END."
//!         4  4  length of the payload behind these 32 bytes, in bytes
//!         8  8  offset on the disk in bytes (HEAD, END: 0)
//!        16  8  length on the disk in bytes (DATA: as the payload; HEAD: 0; END: number of records before it)
//!        24  4  crc32c of the payload
//!        28  4  crc32c of bytes 0 to 27, begun with this field of the record before (the first: the crc32c of bytes 0 to
//!               11 of the stream), so that no record can be missing, doubled or moved
//!
//! HEAD    0  8  disk size in bytes
//!         8  8  cluster size of the source in bytes; a hint
//!        16 16  GUID of the snapshot
//!        32 16  GUID of the base: the snapshot on which this stream is applied; zeroes: a full backup
//!        48  8  when it was made, in seconds since 1970
//!        56  6  lengths of three texts in UTF-8, 2 bytes each: name of the image, of the snapshot, of the base
//!        62     the texts
//! ```
//!
//! DATA holds bytes of the disk, ZERO says that a range reads as zeroes. What a full backup does not name is zero, what an
//! incremental one does not name is as in its base. The GUID of a snapshot stands for its content: it is random, stays
//! with the content through merges and clones, and a restored image's snapshot has it, too.

use crate::format::descriptor::Guid;

/// The stream's first bytes, version included.
pub const PREAMBLE_BYTES: usize = 12;
/// A record without its payload.
pub const RECORD_BYTES: usize = 32;
/// Longest payload that is written, in bytes: one system call's worth.
pub const PIECE: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"PLOOPFSB";
const VERSION: u32 = 1;
/// Fixed part of a HEAD's payload.
const HEAD_BYTES: usize = 62;
/// Longest text in a HEAD: a file's name has 255 bytes at most.
const MAX_TEXT: usize = 1024;

/// True for a file that begins like a backup.
pub fn is_stream(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// What is wrong with a stream, in words that follow "FILE: ".
pub type BadStream = String;

/// What a stream is a backup of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Disk size in bytes.
    pub size: u64,
    /// Cluster size of the source in bytes.
    pub cluster: u64,
    /// The snapshot.
    pub guid: Guid,
    /// The snapshot on which it is applied; [`Guid::NONE`]: a full backup.
    pub base: Guid,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// Name of the image.
    pub image: String,
    /// Name of the snapshot.
    pub name: String,
    /// Name of the base.
    pub base_name: String,
}

impl Head {
    /// True for a stream that needs its base.
    pub fn is_incremental(&self) -> bool {
        self.base != Guid::NONE
    }

    /// The payload of the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES);
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(self.cluster.to_le_bytes());
        bytes.extend(self.guid.to_bytes());
        bytes.extend(self.base.to_bytes());
        bytes.extend(self.made.to_le_bytes());
        let texts = [&self.image, &self.name, &self.base_name].map(|text| cut(text));
        texts.iter().for_each(|text| bytes.extend((text.len() as u16).to_le_bytes()));
        texts.iter().for_each(|text| bytes.extend(text.as_bytes()));
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Head, BadStream> {
        let short = || "its head is too short".to_owned();
        let number = |at: usize| u64::from_le_bytes(array(&bytes[at..]));
        if bytes.len() < HEAD_BYTES {
            return Err(short());
        }
        let mut at = HEAD_BYTES;
        let mut texts = [const { String::new() }; 3];
        for (index, text) in texts.iter_mut().enumerate() {
            let len = usize::from(u16::from_le_bytes(array(&bytes[56 + 2 * index..])));
            let part = bytes.get(at..at + len).ok_or_else(short)?;
            *text = String::from_utf8_lossy(part).into_owned();
            at += len;
        }
        let [image, name, base_name] = texts;
        let head = Head {
            size: number(0),
            cluster: number(8),
            guid: Guid::from_bytes(array(&bytes[16..])),
            base: Guid::from_bytes(array(&bytes[32..])),
            made: number(48),
            image,
            name,
            base_name,
        };
        match () {
            () if at != bytes.len() => Err("its head is too long".into()),
            // off_t is signed.
            () if head.size == 0 || i64::try_from(head.size).is_err() => {
                Err(format!("its disk has a size of {} bytes", head.size))
            }
            () if head.guid == Guid::NONE || head.guid == Guid::TOP || head.guid == head.base => {
                Err(format!("it is of no snapshot (GUID {})", head.guid))
            }
            () => Ok(head),
        }
    }
}

/// At most [`MAX_TEXT`] bytes of `text`.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The first `N` bytes of a slice that has them.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[..N]);
    array
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The first: what the stream is.
    Head,
    /// Bytes of the disk.
    Data,
    /// A range of zeroes.
    Zero,
    /// The last.
    End,
}

impl Tag {
    const ALL: [Tag; 4] = [Tag::Head, Tag::Data, Tag::Zero, Tag::End];

    fn bytes(self) -> &'static [u8; 4] {
        match self {
            Tag::Head => b"HEAD",
            Tag::Data => b"DATA",
            Tag::Zero => b"ZERO",
            Tag::End => b"END.",
        }
    }
}

/// Makes records, one after the other.
#[derive(Debug)]
pub struct Encoder {
    chain: u32,
    records: u64,
}

impl Default for Encoder {
    fn default() -> Encoder {
        Encoder { chain: crc32c::crc32c(&Encoder::preamble()), records: 0 }
    }
}

impl Encoder {
    /// The stream's first bytes.
    pub fn preamble() -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..].copy_from_slice(&VERSION.to_le_bytes());
        bytes
    }

    /// The 32 bytes before `payload`. `offset` and `len` in bytes of the disk.
    pub fn record(&mut self, tag: Tag, offset: u64, len: u64, payload: &[u8]) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(tag.bytes());
        bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        bytes[24..28].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        self.chain = crc32c::crc32c_append(self.chain, &bytes[..28]);
        self.records += 1;
        bytes[28..].copy_from_slice(&self.chain.to_le_bytes());
        bytes
    }

    /// The last record.
    pub fn end(&mut self) -> [u8; RECORD_BYTES] {
        let records = self.records;
        self.record(Tag::End, 0, records, &[])
    }
}

/// A record whose head is good. Its payload is not looked at yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub tag: Tag,
    /// Length of the payload in bytes.
    pub payload: usize,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How much of the disk, in bytes.
    pub len: u64,
    crc: u32,
}

impl Record {
    /// Err: these are not the bytes that were written.
    pub fn check(&self, payload: &[u8]) -> Result<(), BadStream> {
        if crc32c::crc32c(payload) == self.crc { Ok(()) } else { Err(damaged("the checksum of its data")) }
    }
}

fn damaged(what: &str) -> BadStream {
    format!("the stream is damaged: {what} is wrong")
}

/// Takes records apart, and sees to it that they are what was written, all of them, in order.
#[derive(Debug)]
pub struct Decoder {
    chain: u32,
    records: u64,
    /// Disk size; None before the HEAD.
    size: Option<u64>,
    /// Where the last record ended on the disk.
    at: u64,
}

impl Decoder {
    /// Begins with the stream's first bytes.
    pub fn new(preamble: &[u8; PREAMBLE_BYTES]) -> Result<Decoder, BadStream> {
        if &preamble[..8] != MAGIC {
            return Err("is no backup of ploopfs".into());
        }
        let version = u32::from_le_bytes(array(&preamble[8..]));
        if version != VERSION {
            return Err(format!("is a backup of version {version}, which this program does not know"));
        }
        Ok(Decoder { chain: crc32c::crc32c(preamble), records: 0, size: None, at: 0 })
    }

    /// The next record's 32 bytes. Err before anything of them is believed.
    pub fn record(&mut self, bytes: &[u8; RECORD_BYTES]) -> Result<Record, BadStream> {
        let chain = crc32c::crc32c_append(self.chain, &bytes[..28]);
        if chain != u32::from_le_bytes(array(&bytes[28..])) {
            return Err(damaged("the checksum of a record"));
        }
        let Some(tag) = Tag::ALL.into_iter().find(|tag| bytes[..4] == *tag.bytes()) else {
            return Err("the stream has a record that this program does not know".into());
        };
        let record = Record {
            tag,
            payload: u32::from_le_bytes(array(&bytes[4..])) as usize,
            offset: u64::from_le_bytes(array(&bytes[8..])),
            len: u64::from_le_bytes(array(&bytes[16..])),
            crc: u32::from_le_bytes(array(&bytes[24..])),
        };
        let end = record.offset.checked_add(record.len);
        let fits = match (record.tag, self.size) {
            (Tag::Head, None) => record.payload <= HEAD_BYTES + 3 * MAX_TEXT && record.len == 0,
            (Tag::Data, Some(size)) => {
                (1..=PIECE).contains(&record.payload)
                    && record.len == record.payload as u64
                    && record.offset >= self.at
                    && end.is_some_and(|end| end <= size)
            }
            (Tag::Zero, Some(size)) => {
                record.payload == 0
                    && record.len > 0
                    && record.offset >= self.at
                    && end.is_some_and(|end| end <= size)
            }
            (Tag::End, Some(_)) => record.payload == 0 && record.len == self.records,
            (Tag::Head, Some(_)) | (_, None) => false,
        };
        if !fits {
            return Err(damaged("a record"));
        }
        if matches!(tag, Tag::Data | Tag::Zero) {
            self.at = end.unwrap_or(u64::MAX);
        }
        self.chain = chain;
        self.records += 1;
        Ok(record)
    }

    /// The payload of the HEAD, checked already.
    pub fn head(&mut self, payload: &[u8]) -> Result<Head, BadStream> {
        let head = Head::parse(payload)?;
        self.size = Some(head.size);
        Ok(head)
    }
}

#[cfg(test)]
mod tests;
