//! A plain file, a pipe, or a file of another program's format, as a single-file image. The disk keeps its size, to the
//! sector.

use std::io::Read;
use std::sync::Arc;

use super::disk::FlatDisk;
use super::pieces::{copy, runs};
use super::{filled, writer};
use crate::error::{Error, Kind, Result};
use crate::format::header::HEADER_BYTES;
use crate::format::stream::PIECE;
use crate::image::create::Draft;
use crate::image::kind::ImageKind;
use crate::progress::Progress;
use crate::vdisk::Image;

/// A run of zeroes of this many bytes is left out, a hole in the image's file: a block of most hosts. What QEMU's formats
/// call data is whole clusters of theirs, of which a part may be used.
pub(super) const GRAIN: usize = 4 << 10;
/// A raw image of unknown length begins with this many bytes, and doubles: a hole.
const RAW_STEP: u64 = 1 << 30;

/// Copies `disk` into the new image; it is durable when this returns, and still has no name.
pub fn disk(disk: &dyn FlatDisk, draft: &Draft, progress: &Progress) -> Result<()> {
    progress.set_total(disk.size());
    let image = writer(&draft.path().to_string_lossy(), vec![draft.level()?])?;
    filled(&image, |image| {
        copy(disk, &[(0, disk.size())], progress, &|offset, bytes| put(image, offset, bytes))
    })
}

fn put(image: &Arc<Image>, offset: u64, bytes: &[u8]) -> Result<()> {
    for (range, zero) in runs(bytes, GRAIN) {
        if !zero {
            image.write_at(offset + range.start as u64, &bytes[range])?;
        }
    }
    Ok(())
}

/// Size in bytes with which an image for a pipe is begun, whose length is not known: all that fits without another cluster
/// of BAT, so that [`Draft::cut`] leaves the layout of an image that was created with the right size.
pub fn first_size(kind: ImageKind, cluster: u64) -> u64 {
    match kind {
        ImageKind::Raw => RAW_STEP,
        ImageKind::Ploop => fits(1, cluster),
    }
}

/// The largest disk, in bytes, of which header and BAT take `clusters` clusters.
fn fits(clusters: u64, cluster: u64) -> u64 {
    ((clusters * cluster - HEADER_BYTES) / 4).saturating_mul(cluster)
}

/// Copies what `from` gives into the new image, until it ends; `name` is for messages, and `look` sees everything once.
/// Returns how many bytes came. Durable when this returns, and still without a name.
///
/// 1. the disk grows ahead of what comes; 2. what came is written; 3. closed, which makes it durable; 4. the disk is cut to
///    what came. 4 before 3: the header would be written by two.
pub fn pipe(
    from: &mut dyn Read,
    name: &str,
    draft: &mut Draft,
    progress: &Progress,
    look: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<u64> {
    let image = writer(&draft.path().to_string_lossy(), vec![draft.level()?])?;
    let unhurried = Progress::new();
    let came = filled(&image, |image| {
        let (mut at, mut steps) = (0, 1);
        let mut buf = vec![0; PIECE];
        loop {
            progress.check()?;
            let got = fill(from, &mut buf).map_err(|e| Error::io(&e, name, "cannot read"))?;
            if got == 0 {
                return Ok(at);
            }
            look(at, &buf[..got])?;
            // 1.
            while at + got as u64 > image.size() {
                steps += 1;
                let next = match draft.kind() {
                    ImageKind::Raw => image.size().saturating_mul(2),
                    ImageKind::Ploop => fits(steps, image.cluster()),
                };
                image.grow(next, &unhurried)?;
            }
            // 2.
            put(image, at, &buf[..got])?;
            at += got as u64;
            progress.add(got as u64);
        }
    })?; // 3.
    if came == 0 {
        return Err(Error::at(Kind::Unsupported, name, "is empty: there is no disk in it"));
    }
    // 4.
    draft.cut(came)?;
    Ok(came)
}

/// Reads until `buf` is full or nothing comes any more.
fn fill(from: &mut dyn Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match from.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::chain::{AtRest, Form};
    use crate::image::create::CreatePlan;

    #[test]
    fn a_pipe_gives_the_same_image_as_a_file_of_its_length_however_far_it_had_to_grow() {
        let folder = tempfile::tempdir().expect("tmp");
        let cluster = 32 << 10;
        let step = first_size(ImageKind::Ploop, cluster);
        for len in [1, 512, step - 1, step, step + 1, step * 2 + 5] {
            let ends = |at: u64, bytes: &mut [u8]| {
                bytes.fill(0);
                let end = at + bytes.len() as u64;
                for spot in [0, len - 1].into_iter().filter(|spot| (at..end).contains(spot)) {
                    bytes[(spot - at) as usize] = 7;
                }
            };
            struct Ends<F>(u64, u64, F);
            impl<F: Fn(u64, &mut [u8])> Read for Ends<F> {
                fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                    let n = (self.1 - self.0).min(buf.len() as u64).min(900_000) as usize;
                    (self.2)(self.0, &mut buf[..n]);
                    self.0 += n as u64;
                    Ok(n)
                }
            }
            let plan = CreatePlan { cluster: Some(cluster), ..CreatePlan::copy_of(step) };
            let path = folder.path().join(format!("vm{len}"));
            let mut draft = Draft::begin(&path, &plan).expect("begun");
            let mut seen = 0;
            let mut look = |at: u64, bytes: &[u8]| {
                assert_eq!(at, seen);
                seen += bytes.len() as u64;
                Ok(())
            };
            let came = pipe(&mut Ends(0, len, ends), "pipe", &mut draft, &Progress::new(), &mut look);
            assert_eq!((came.expect("poured"), seen), (len, len));
            let made = AtRest::open(&draft.finish().expect("named").path).expect("opens");
            let Form::Ploop(header) = made.form else { panic!("ploop") };
            let like = crate::format::header::Header::new(header.version, len, cluster).expect("a header");
            assert_eq!(header, crate::format::header::Header { flags: 0, ..like }, "{len}");
        }
    }
}
