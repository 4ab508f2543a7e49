//! Where a map comes from: the daemon that serves the image, else the files, under the same locks.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::cli::out;
use crate::cli::served::{self, Daemon};
use crate::cli::target::Target;
use crate::disk::find;
use crate::disk::layered::Layered;
use crate::disk::open::OpenDisk;
use crate::error::{Error, Kind, Result};
use crate::image::map::{Piece, Range};
use crate::io::real::Access;
use crate::vdisk::Options;

/// BAT pages in memory while an image is walked front to back once: a bound, not a cache that pays.
const BAT_CACHE: u64 = 1 << 20;

/// One level, for people.
#[derive(Clone, Debug)]
pub(super) struct LevelInfo {
    /// Its file.
    pub path: PathBuf,
    /// The file's length in bytes.
    pub length: u64,
    /// The snapshot that it is, or "live disk".
    pub label: String,
}

impl LevelInfo {
    /// The file's name, fit for a terminal.
    pub(super) fn file_name(&self) -> String {
        out::printable(&self.path.file_name().unwrap_or_default().to_string_lossy())
    }
}

enum From {
    Daemon(Box<Daemon>, String),
    Files(OpenDisk),
}

/// An image that is mapped.
pub(super) struct MapSource {
    from: From,
    name: String,
    snapshot: Option<String>,
    path: PathBuf,
    levels: Vec<LevelInfo>,
    /// The piece that comes next.
    piece: Piece,
    /// It was given out.
    taken: bool,
}

impl MapSource {
    /// Opens `target`, and looks at its first piece.
    pub(super) fn open(target: &Target) -> Result<MapSource> {
        let path = &target.path;
        let (mut from, name) = match served::serving(path)? {
            Some((daemon, line)) => (From::Daemon(Box::new(daemon), line.name.clone()), line.name),
            None => from_files(target)?,
        };
        let piece = piece(&mut from, target.snapshot.as_deref(), 0)?;
        let levels = levels(path, &piece)?;
        let (path, snapshot) = (path.clone(), target.snapshot.clone());
        Ok(MapSource { from, name, snapshot, path, levels, piece, taken: false })
    }

    /// The image's name, and the snapshot's behind an @.
    pub(super) fn title(&self) -> String {
        let snapshot = self.snapshot.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
        out::printable(&format!("{}{snapshot}", self.name))
    }

    /// The levels, base first.
    pub(super) fn levels(&self) -> &[LevelInfo] {
        &self.levels
    }

    /// Disk size in bytes, as it was at the beginning.
    pub(super) fn size(&self) -> u64 {
        self.piece.size
    }

    /// Cluster size in bytes.
    pub(super) fn cluster(&self) -> u64 {
        self.piece.cluster
    }

    /// The ranges that come next; None at the end.
    pub(super) fn next_ranges(&mut self) -> Result<Option<Vec<Range>>> {
        if !std::mem::replace(&mut self.taken, true) {
            return Ok(Some(std::mem::take(&mut self.piece.ranges)));
        }
        if self.piece.next >= self.piece.size {
            return Ok(None);
        }
        let next = piece(&mut self.from, self.snapshot.as_deref(), self.piece.next)?;
        // What was said of level 1 must be true of level 1 to the end.
        if !next.same_levels(&self.piece) {
            let why = "a snapshot or a merge changed its levels while it was mapped; map it again";
            return Err(Error::at(Kind::Busy, &self.path, why));
        }
        // The disk may have grown; the map is that of the disk as it was. An end that stands still has no end.
        let size = self.piece.size;
        if next.next <= self.piece.next {
            return Err(Error::at(Kind::Io, &self.path, "the map does not go on"));
        }
        self.piece = Piece { size, ranges: Vec::new(), ..next.clone() };
        let cut = |range: Range| Range { length: range.length.min(size - range.start), ..range };
        Ok(Some(next.ranges.into_iter().filter(|range| range.start < size).map(cut).collect()))
    }
}

fn piece(from: &mut From, snapshot: Option<&str>, offset: u64) -> Result<Piece> {
    match from {
        From::Daemon(daemon, name) => daemon.client.map(name, snapshot, offset),
        From::Files(opened) => opened.image.map_piece(offset),
    }
}

fn from_files(target: &Target) -> Result<(From, String)> {
    let options = Options { bat_cache: BAT_CACHE, ..Options::default() };
    let opened = OpenDisk::open(&target.path, target.snapshot.as_deref(), Access::ReadOnly, options)?;
    let name = find::name(&target.path)?.to_string_lossy().into_owned();
    Ok((From::Files(opened), name))
}

/// The levels of a piece, with the snapshots' names.
fn levels(path: &Path, piece: &Piece) -> Result<Vec<LevelInfo>> {
    let mut labels: HashMap<OsString, String> = HashMap::new();
    if find::is_layered(path) {
        let image = Layered::read(path)?;
        for delta in &image.descriptor().deltas {
            let file = Path::new(&delta.file).file_name().unwrap_or_default().to_owned();
            let live = delta.guid == image.descriptor().top;
            labels.insert(file, if live { "live disk".into() } else { image.labels().name(delta.guid) });
        }
    }
    let info = |level: &crate::image::map::MapLevel| LevelInfo {
        label: labels
            .get(level.path.file_name().unwrap_or_default())
            .cloned()
            .unwrap_or_else(|| "live disk".to_owned()),
        path: level.path.clone(),
        length: level.length,
    };
    Ok(piece.levels.iter().map(info).collect())
}
