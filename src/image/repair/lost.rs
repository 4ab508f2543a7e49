//! What no entry refers to any more, kept in a file beside the image before its place is given back: after damage it may
//! be the only copy of something. The bytes stand where they stood in the image.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::image::folder_files::{make, own, sync_folder};
use crate::image::paths::Located;
use crate::io::file::{HostFile, read_full, write_full};
use crate::io::real::RealFile;
use crate::io::share::clone_range;

/// Copied at a time.
const PIECE: u64 = 1 << 20;
/// More files of earlier repairs than this are not counted through.
const MOST_FILES: u32 = 1000;

/// The file of one repair. It is made when there is something to keep.
#[derive(Debug)]
pub(super) struct LostFile<'a> {
    image: &'a dyn HostFile,
    /// Where the image is.
    at: &'a Located,
    file: Option<RealFile>,
    /// Bytes in it.
    bytes: u64,
    synced: bool,
}

impl<'a> LostFile<'a> {
    pub(super) fn beside(image: &'a dyn HostFile, at: &'a Located) -> LostFile<'a> {
        LostFile { image, at, file: None, bytes: 0, synced: true }
    }

    /// Where it is and how many bytes it keeps.
    pub(super) fn made(&self) -> Option<(PathBuf, u64)> {
        self.file.as_ref().map(|file| (file.path().to_owned(), self.bytes))
    }

    /// Keeps the bytes `from..to` of the image that are not zero. Not durable before [`sync`](Self::sync). Returns how
    /// many were kept.
    pub(super) fn keep(&mut self, from: u64, to: u64) -> Result<u64> {
        let (image, path) = (self.image, &*self.at.shown);
        let cannot = |e| Error::io(&e, path, "cannot read what nothing refers to");
        let before = self.bytes;
        let mut buffer = vec![0; PIECE as usize];
        let mut at = from;
        while at < to {
            let Some(data) = image.seek_data(at).map_err(cannot)?.filter(|data| *data < to) else {
                break;
            };
            let end = (data / PIECE + 1).saturating_mul(PIECE).min(to);
            let piece = &mut buffer[..(end - data) as usize];
            let got = read_full(image, piece, data).map_err(cannot)?;
            if piece[..got].iter().any(|byte| *byte != 0) {
                self.put(&buffer[..got], data)?;
            }
            at = end;
        }
        Ok(self.bytes - before)
    }

    fn put(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        if self.file.is_none() {
            self.file = Some(self.create()?);
        }
        let Some(file) = &self.file else { return Ok(()) };
        self.synced = false;
        let shared = clone_range(self.image, at, file, at, bytes.len() as u64);
        let written = match shared {
            Ok(true) => Ok(()),
            Ok(false) => write_full(file, bytes, at),
            Err(e) => Err(e),
        };
        written.map_err(|e| self.cannot(&e, file.path()))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn cannot(&self, e: &io::Error, path: &Path) -> Error {
        let doing =
            "cannot keep the data that no entry refers to and that may be what was lost (make room here)";
        Error::io(e, path, doing)
    }

    /// Makes the file, never over another one, with the owner and mode of the image.
    fn create(&self) -> Result<RealFile> {
        let path = &*self.at.shown;
        let folder = path.parent().unwrap_or(Path::new("."));
        let dir = self.at.around()?;
        let like = self.image.status().map_err(|e| Error::io(&e, path, "cannot look at it"))?;
        for number in 1..MOST_FILES {
            let mut lost = OsString::from(self.at.name());
            lost.push(if number == 1 { ".lost".to_owned() } else { format!(".lost-{number}") });
            let path = path.with_file_name(&lost);
            let Some(text) = lost.to_str() else { continue };
            match make(dir.as_fd(), text, like.mode) {
                Ok(file) => {
                    own(&file, &like).map_err(|e| Error::io(&e, &path, "cannot give it its owner"))?;
                    sync_folder(dir.as_fd(), folder)?;
                    return RealFile::from_file(file, path);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(self.cannot(&e, &path)),
            }
        }
        let why = "too many files of earlier repairs lie beside it (NAME.lost-N); move them away";
        Err(Error::at(Kind::Exists, path, why))
    }

    /// Makes durable what was kept.
    pub(super) fn sync(&mut self) -> Result<()> {
        if let Some(file) = &self.file
            && !self.synced
        {
            file.sync_all().map_err(|e| self.cannot(&e, file.path()))?;
            self.synced = true;
        }
        Ok(())
    }
}
