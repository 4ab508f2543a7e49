//! A stream (`format::stream`) as an image, or as one more snapshot of one. What is written is visible to no opener
//! before the stream's last record has been read and every checksum was right.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use super::{filled, writer};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{Header, SECTOR, Version};
use crate::format::stream::{Decoder, Head, PREAMBLE_BYTES, RECORD_BYTES, Tag};
use crate::image::assemble::Assembly;
use crate::image::create::{DEFAULT_CLUSTER, check_cluster};
use crate::image::diff;
use crate::image::labels::Labels;
use crate::image::layers::{Direct, Layers};
use crate::image::level::Level;
use crate::image::levels::{disk_size, header_above};
use crate::image::paths::image_folder;
use crate::io::real::Access;
use crate::progress::Progress;
use crate::vdisk::Image;
use crate::words::quoted;

/// A stream whose head was read.
pub struct Stream {
    from: Box<dyn Read + Send>,
    decoder: Decoder,
    /// What it is.
    pub head: Head,
    /// Where it comes from, for messages.
    name: String,
}

/// One record with its payload.
enum Entry {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
}

impl Stream {
    /// Reads the head of the stream `from`; `name` is for messages.
    pub fn begin(mut from: Box<dyn Read + Send>, name: &str) -> Result<Stream> {
        let mut preamble = [0; PREAMBLE_BYTES];
        fill(&mut *from, &mut preamble, name)?;
        let decoder = Decoder::new(&preamble).map_err(|bad| Error::at(Kind::Damaged, name, bad))?;
        let head = Head {
            size: 0,
            cluster: 0,
            guid: Guid::NONE,
            base: Guid::NONE,
            made: 0,
            image: String::new(),
            name: String::new(),
            base_name: String::new(),
        };
        let mut stream = Stream { from, decoder, head, name: name.to_owned() };
        let (_, payload) = stream.record()?;
        stream.head = stream.decoder.head(&payload).map_err(|bad| Error::at(Kind::Damaged, name, bad))?;
        Ok(stream)
    }

    fn record(&mut self) -> Result<(crate::format::stream::Record, Vec<u8>)> {
        let damaged = |bad: String| Error::at(Kind::Damaged, &self.name, bad);
        let mut bytes = [0; RECORD_BYTES];
        fill(&mut *self.from, &mut bytes, &self.name)?;
        let record = self.decoder.record(&bytes).map_err(damaged)?;
        let mut payload = vec![0; record.payload];
        fill(&mut *self.from, &mut payload, &self.name)?;
        record.check(&payload).map_err(damaged)?;
        Ok((record, payload))
    }

    /// What comes next; None at the end of a stream that is whole.
    fn entry(&mut self) -> Result<Option<Entry>> {
        let (record, payload) = self.record()?;
        match record.tag {
            Tag::Data => Ok(Some(Entry::Data(record.offset, payload))),
            Tag::Zero => Ok(Some(Entry::Zero(record.offset, record.len))),
            Tag::Head | Tag::End => {
                let mut more = [0];
                match read(&mut *self.from, &mut more) {
                    Ok(0) => Ok(None),
                    Ok(_) => Err(Error::at(Kind::Damaged, &self.name, "something follows the stream's end")),
                    Err(e) => Err(Error::io(&e, &self.name, "cannot read the backup")),
                }
            }
        }
    }

    /// Puts everything into `image`, and returns at the end of a stream that is whole.
    fn pour(&mut self, image: &Arc<Image>, progress: &Progress) -> Result<()> {
        progress.set_total(self.head.size);
        let mut at = 0;
        loop {
            progress.check()?;
            let Some(entry) = self.entry()? else {
                progress.skip(self.head.size - at);
                return Ok(());
            };
            match entry {
                Entry::Data(offset, bytes) => {
                    progress.skip(offset - at);
                    image.write_at(offset, &bytes)?;
                    progress.add(bytes.len() as u64);
                    at = offset + bytes.len() as u64;
                }
                Entry::Zero(offset, len) => {
                    image.discard_at(offset, len)?;
                    progress.skip(offset + len - at);
                    at = offset + len;
                }
            }
        }
    }

    /// Reads it to its end without writing anything.
    pub fn verify(mut self, progress: &Progress) -> Result<Head> {
        progress.set_total(self.head.size);
        let mut at = 0;
        while let Some(entry) = self.entry()? {
            progress.check()?;
            let end = match entry {
                Entry::Data(offset, bytes) => offset + bytes.len() as u64,
                Entry::Zero(offset, len) => offset + len,
            };
            progress.skip(end - at);
            at = end;
        }
        Ok(self.head)
    }

    /// Makes the image `to`, a folder: 1. the snapshot's file in a dot-folder, filled; 2. the stream's end is read, so that
    /// everything is known to be right; 3. the file durable; 4. an empty top beside it, durable; 5. the rest, and the name
    /// ([`Assembly::finish`]).
    ///
    /// 5 before 2 could show a disk of which the end is missing.
    pub fn make_image(mut self, to: &Path, progress: &Progress) -> Result<Head> {
        let size = whole_sectors(self.head.size);
        let cluster = check_cluster(self.head.cluster).map_or(DEFAULT_CLUSTER, |()| self.head.cluster);
        let header = Header::new(Version::V2, size, cluster)
            .map_err(|bad| Error::at(Kind::Unsupported, to, bad.to_string()))?;
        let mut new = Assembly::begin(to)?;
        let image = writer(&self.head.image, vec![new.delta(&header)?])?;
        filled(&image, |image| self.pour(image, progress))?;
        let label = Some(&*self.head.name).filter(|name| Labels::default().check(name).is_ok());
        new.delta(&header)?;
        new.finish(&[(self.head.guid, label.map(str::to_owned), taken(&self.head))])?;
        Ok(self.head)
    }

    /// Applies it on the layered image in `folder`: [`apply_on`](Self::apply_on).
    pub fn apply(self, folder: &Path, progress: &Progress) -> Result<(Head, Option<String>)> {
        let opener = Arc::new(Direct(Access::Widest));
        let (layers, chain) = Layers::open(image_folder(folder)?, folder, opener, false)?;
        self.apply_on(&layers, &chain, progress)
    }

    /// Applies it on an image that no other process has open, `chain` being its live chain. Its newest snapshot must be
    /// the stream's base, and its disk must not have changed since. Returns what a person should know.
    ///
    /// 1. a new delta above the base, noted, filled; 2. the stream's end is read; 3. that delta durable; 4. an empty top,
    ///    noted, durable; 5. the label; 6. the descriptor, in which the new delta is a snapshot on the base and the new top
    ///    lies on it: the point of no return; 7. the old, empty top removed.
    ///
    /// Before 6 the image is as it was, and the next open removes what was noted. 6 before 2 or 3 could show a snapshot that
    /// is not all there; 7 before 6 could leave a descriptor that names a missing file.
    pub fn apply_on(
        mut self,
        layers: &Arc<Layers>,
        chain: &[Level],
        progress: &Progress,
    ) -> Result<(Head, Option<String>)> {
        let folder = layers.store().path().to_owned();
        let folder = folder.as_path();
        if !layers.writable() {
            return Err(Error::at(Kind::ReadOnly, folder, "the image cannot be written"));
        }
        let _alone = layers.begin_operation()?;
        let base = self.base(layers, folder)?;
        if !chain.last().map_or(Ok(false), diff::is_empty)? {
            let why = format!(
                "the disk was written since its snapshot {base}, and would lose that; go back first: ploopfs snapshot \
                 switch {} {}",
                quoted(folder),
                quoted(&base)
            );
            return Err(Error::at(Kind::Busy, folder, why));
        }
        layers.store().redo_unsynced()?;
        let mut made = Vec::new();
        let disk = disk_size(chain, layers.store().descriptor());
        let result = self.put_above(layers, disk, &mut made, progress);
        if result.is_err() {
            // Noted: what cannot be removed now goes at the next open.
            let named = |file: &String| layers.store().descriptor().names(file);
            for file in made.iter().filter(|file| !named(file)) {
                layers.remove(file).unwrap_or_else(|e| log::warn!("{e}; the next open tries again"));
            }
        }
        result.map(|note| (self.head, note))
    }

    /// The name of the image's newest snapshot, which must be the base.
    fn base(&self, layers: &Layers, folder: &Path) -> Result<String> {
        let head = &self.head;
        let store = layers.store();
        let (descriptor, labels) = (store.descriptor(), store.labels());
        let refuse = |why: String| Err(Error::at(Kind::Unsupported, folder, why));
        if descriptor.shot(head.guid).is_some() {
            return refuse(format!("has the snapshot {} of this backup already", labels.name(head.guid)));
        }
        let newest = descriptor.shot(descriptor.top).map_or(Guid::NONE, |shot| shot.parent);
        if newest == head.base {
            return Ok(labels.name(newest));
        }
        let newest = if newest == Guid::NONE {
            "the image has none".to_owned()
        } else {
            format!("here that is {} ({newest})", labels.name(newest))
        };
        refuse(format!(
            "the backup goes on an image whose newest snapshot is {} ({}); {newest}",
            head.base_name, head.base
        ))
    }

    /// `disk`: bytes of the disk as it is, which may have grown since its newest snapshot. It stays as large.
    fn put_above(
        &mut self,
        layers: &Arc<Layers>,
        disk: u64,
        made: &mut Vec<String>,
        progress: &Progress,
    ) -> Result<Option<String>> {
        let head = self.head.clone();
        let descriptor = layers.store().descriptor().clone();
        let old = descriptor.delta(descriptor.top).map(|top| top.file.clone()).unwrap_or_default();
        let mut levels = layers.chain(head.base)?;
        let (size, below) = (whole_sectors(head.size), diff::size(&levels)?);
        if size < below {
            let why = format!(
                "its snapshot {} has {below} bytes, and the one of this backup {size}: it is not the one that the backup \
                 stands on, though it has its GUID",
                head.base_name
            );
            return Err(Error::at(Kind::Unsupported, layers.store().path(), why));
        }
        let header = header_above(&levels, &descriptor, size)?;
        let top_header = header_above(&levels, &descriptor, size.max(disk))?;
        // 1.
        let (file, level) = layers.add_delta(&header)?;
        made.push(file.clone());
        levels.push(level);
        // 2., 3.
        let image = writer(&head.image, levels)?;
        filled(&image, |image| self.pour(image, progress))?;
        // 4.
        let (top, _) = layers.add_delta(&top_header)?;
        made.push(top.clone());
        // 5.
        let mut store = layers.store();
        let label = Some(&*head.name).filter(|name| store.labels().check(name).is_ok());
        store.set_label(head.guid, label, taken(&head))?;
        // 6.
        let mut next = descriptor.clone();
        next.set_file(next.top, &file)
            .and_then(|()| next.add_snapshot(head.guid, &top))
            .map_err(|bad| Error::at(Kind::Damaged, store.path(), bad.to_string()))?;
        next.set_size(top_header.disk_sectors);
        store.replace(next)?.durable()?;
        drop(store);
        // 7.
        layers.remove(&old).unwrap_or_else(|e| log::warn!("{e}; the next open tries again"));
        Ok(label
            .is_none()
            .then(|| format!("the name {} is taken here: the snapshot is {}", head.name, head.guid)))
    }
}

/// When its snapshot was taken, as far as a stream says: it was there when the stream was made.
fn taken(head: &Head) -> Option<i64> {
    i64::try_from(head.made).ok()
}

/// A disk ends with a whole sector.
fn whole_sectors(size: u64) -> u64 {
    size.div_ceil(SECTOR) * SECTOR
}

fn read(from: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buf) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn fill(from: &mut dyn Read, buf: &mut [u8], name: &str) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match read(from, &mut buf[done..]) {
            Ok(0) => {
                return Err(Error::at(Kind::Damaged, name, "the backup ends too early: it is not whole"));
            }
            Ok(n) => done += n,
            Err(e) => return Err(Error::io(&e, name, "cannot read the backup")),
        }
    }
    Ok(())
}
