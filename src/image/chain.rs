//! Opening an image at rest for reading: regular files only, no link followed, nothing trusted. Offline commands
//! that report (`info`, `check`, `list`) read through here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::format::header::{BadField, Geometry, HEADER_BYTES, Header};
use crate::image::kind::{self, Class, DESCRIPTOR, HEAD_BYTES, ImageKind};
use crate::image::level::{Layout, Level, judge_header};
use crate::image::paths::Located;
use crate::io::file::{HostFile, HostStatus, read_full};
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::{Access, RealFile};

/// How the bytes of an opened image are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A delta of the ploop format, header checked.
    Ploop(Header),
    /// Plain bytes.
    Raw,
}

/// A single-file image, open for reading.
#[derive(Debug)]
pub struct AtRest {
    /// Where it was found.
    pub path: PathBuf,
    /// Format.
    pub form: Form,
    /// Length in bytes at open.
    pub len: u64,
    /// Space taken on the host, in bytes.
    pub allocated: u64,
    pub(super) file: Arc<dyn HostFile>,
}

impl AtRest {
    /// Opens and classifies `path`. Damaged: the header contradicts the format, or the file ends before its first
    /// data block.
    pub fn open(path: &Path) -> Result<AtRest> {
        let candidate = Candidate::open(path)?;
        let kind = candidate.kind()?;
        candidate.open_as(kind)
    }

    /// Disk size in bytes: what the guest sees.
    pub fn size(&self) -> u64 {
        match &self.form {
            Form::Ploop(header) => header.geometry().disk,
            Form::Raw => self.len,
        }
    }

    /// How it is stored.
    pub fn kind(&self) -> ImageKind {
        match self.form {
            Form::Ploop(_) => ImageKind::Ploop,
            Form::Raw => ImageKind::Raw,
        }
    }

    /// The same file, as the only level of an image that is opened to be read.
    pub fn into_level(self) -> Level {
        let layout = match self.form {
            Form::Ploop(header) => Layout::Ploop(header),
            Form::Raw => Layout::Raw,
        };
        Level { file: self.file, path: self.path, layout }
    }

    /// Reads until `buf` is full or the file ends; returns the bytes read.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        read_full(&*self.file, buf, offset)
            .map_err(|e| Error::io(&e, &self.path, format!("cannot read byte {offset}")))
    }

    /// Number of clusters among the file clusters `from..to` that take space on the host.
    pub fn clusters_with_data(&self, geometry: &Geometry, from: u64, to: u64) -> Result<u64> {
        let cannot = |e| Error::io(&e, &self.path, "cannot look for holes");
        let end = geometry.cluster_position(to);
        let mut at = geometry.cluster_position(from);
        let mut count = 0;
        while at < end {
            let Some(data) = self.file.seek_data(at).map_err(cannot)?.filter(|data| *data < end) else {
                break;
            };
            let hole = self.file.seek_hole(data).map_err(cannot)?.clamp(data + 1, end);
            let (first, last) = (geometry.file_cluster(data), geometry.file_cluster(hole - 1));
            count += last - first + 1;
            at = geometry.cluster_position(last + 1);
        }
        Ok(count)
    }

    /// Calls `each(guest cluster, entry)` for every non-zero BAT entry, in order. Reads a bounded piece at a time, and
    /// nothing past the end of the file.
    pub fn for_each_entry(&self, geometry: &Geometry, mut each: impl FnMut(u64, u32)) -> Result<()> {
        // Large enough that a 512 TiB disk takes few calls, small beside any bound on memory.
        let mut piece = vec![0u8; 256 << 10];
        let end = geometry.bat_end().min(self.len);
        let mut at = HEADER_BYTES;
        while at < end {
            let want = (end - at).min(piece.len() as u64) as usize;
            let got = self.read(&mut piece[..want], at)?;
            let first = (at - HEADER_BYTES) / 4;
            for (index, entry) in piece[..got].chunks_exact(4).enumerate() {
                let entry = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                if entry != 0 {
                    each(first + index as u64, entry);
                }
            }
            if got < want {
                return Err(Error::at(
                    Kind::Damaged,
                    &self.path,
                    "the file became shorter while it was read",
                ));
            }
            at += want as u64;
        }
        Ok(())
    }
}

/// A regular file that may be an image.
#[derive(Debug)]
pub struct Candidate {
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn HostFile>,
    pub(super) status: HostStatus,
    pub(super) head: Vec<u8>,
}

impl Candidate {
    /// Opens a regular file for reading, without following a link and without waiting (a FIFO or a device is never
    /// opened), and reads its first bytes.
    pub fn open(path: &Path) -> Result<Candidate> {
        explain_irregular(path)?;
        Candidate::read(path, Arc::new(RealFile::open(path, Access::ReadOnly)?))
    }

    /// Like [`open`](Self::open), but keeps every writer out first, or says who has the image
    /// ([`Kind::InUse`]): what was read before the lock may be old.
    pub fn open_locked(path: &Path) -> Result<(Candidate, DeltaLock)> {
        Candidate::open_locked_as(path, Access::ReadOnly)
    }

    /// The same; a file that is to be changed keeps readers out, too.
    pub fn open_locked_as(path: &Path, access: Access) -> Result<(Candidate, DeltaLock)> {
        explain_irregular(path)?;
        Candidate::open_locked_at(&Located::of(path)?, access)
    }

    /// The same for a file that was looked for already.
    pub fn open_locked_at(at: &Located, access: Access) -> Result<(Candidate, DeltaLock)> {
        explain_irregular(&at.shown)?;
        let file = Arc::new(at.open(access)?);
        let lock = DeltaLock::acquire(Arc::clone(&file), Use::of(access))?;
        Ok((Candidate::read(&at.shown, file)?, lock))
    }

    /// Opens it without a lock.
    pub fn open_at(at: &Located) -> Result<Candidate> {
        explain_irregular(&at.shown)?;
        Candidate::read(&at.shown, Arc::new(at.open(Access::ReadOnly)?))
    }

    /// The file as it is now.
    pub fn read(path: &Path, file: Arc<dyn HostFile>) -> Result<Candidate> {
        let cannot = |e| Error::io(&e, path, "cannot read the header");
        let status = file.status().map_err(cannot)?;
        let mut head = vec![0; HEAD_BYTES];
        let got = read_full(&*file, &mut head, 0).map_err(cannot)?;
        head.truncate(got);
        Ok(Candidate { path: path.to_owned(), file, status, head })
    }

    /// What the rule of the images folder says of it.
    pub fn class(&self) -> Class {
        match self.path.file_name() {
            Some(name) => kind::classify(name, true, &self.head),
            None => Class::NotAnImage { reason: "the path ends in no name".into() },
        }
    }

    /// How it is stored; an error that says why when it is no image.
    pub fn kind(&self) -> Result<ImageKind> {
        match self.class() {
            Class::Image { kind, .. } => Ok(kind),
            Class::NotAnImage { reason } => {
                Err(Error::at(Kind::Unsupported, &self.path, format!("not an image: {reason}")))
            }
        }
    }

    /// Reads it as `kind`: the header is checked against the format, and against the file's length.
    pub fn form(&self, kind: ImageKind) -> std::result::Result<Form, BadField> {
        if kind == ImageKind::Raw {
            return Ok(Form::Raw);
        }
        judge_header(&self.head, self.status.len).map(Form::Ploop)
    }

    /// Reads it as `kind`. Err(Damaged) names the field.
    pub fn open_as(self, kind: ImageKind) -> Result<AtRest> {
        let form = self.form(kind).map_err(|bad| Error::at(Kind::Damaged, &self.path, bad.to_string()))?;
        // st_blocks counts units of 512 bytes whatever the file system's block is.
        let allocated = self.status.blocks * 512;
        Ok(AtRest { path: self.path, form, len: self.status.len, allocated, file: self.file })
    }

    /// What the host said of it.
    pub fn status(&self) -> &HostStatus {
        &self.status
    }

    /// Length in bytes and space taken on the host in bytes.
    pub fn extent(&self) -> (u64, u64) {
        (self.status.len, self.status.blocks * 512)
    }
}

/// Says of a folder or a link what the open, which refuses both, cannot know.
fn explain_irregular(path: &Path) -> Result<()> {
    let meta = match path.symlink_metadata() {
        Ok(meta) if !meta.is_file() => meta,
        _ => return Ok(()),
    };
    let why = if meta.is_dir() {
        kind::folder_reason(path.join(DESCRIPTOR).symlink_metadata().is_ok_and(|m| m.is_file()))
    } else if meta.file_type().is_symlink() {
        "a symbolic link; images are opened without following links, so name the file itself"
    } else {
        "not a regular file"
    };
    Err(Error::at(Kind::Unsupported, path, format!("not an image: {why}")))
}
