//! Checking an image at rest: what contradicts the format, what is merely leaked, what is odd but harmless.
//! Report only; nothing is written. Memory is bounded whatever the file says.

mod used;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::format::extension;
use crate::format::header::{CLOSED, CLOSED_V21, Geometry, HEADER_BYTES, Header, IN_USE, SECTOR, Version};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::kind::ImageKind;
use crate::image::paths::Located;
use crate::io::real::Access;
use used::Used;

/// Errors that are kept in full; of the others only the number. A BAT of garbage would give millions.
pub const MAX_FINDINGS: usize = 100;

/// What kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Problem {
    /// The header contradicts the format, or the file.
    Header,
    /// An entry points into the header or the BAT.
    IntoHeader,
    /// A v1 entry that is not on the grid of clusters.
    OffGrid,
    /// An entry points past the end of the file.
    PastEnd,
    /// The file ends inside a mapped cluster.
    Cut,
    /// Two entries name one file cluster.
    Double,
    /// An entry for a cluster that the disk does not have.
    BeyondDisk,
}

impl Problem {
    /// The word in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Problem::Header => "header",
            Problem::IntoHeader => "into-header",
            Problem::OffGrid => "off-grid",
            Problem::PastEnd => "past-end",
            Problem::Cut => "cut",
            Problem::Double => "double",
            Problem::BeyondDisk => "beyond-disk",
        }
    }
}

/// One error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind.
    pub problem: Problem,
    /// The guest cluster whose entry it is.
    pub cluster: Option<u64>,
    /// Byte in the file at which the field or the entry stands.
    pub offset: Option<u64>,
    /// Field, value and reason.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// The file.
    pub path: PathBuf,
    /// How it is stored.
    pub kind: ImageKind,
    /// The header, where it could be read.
    pub header: Option<Header>,
    /// The first [`MAX_FINDINGS`] errors.
    pub findings: Vec<Finding>,
    /// Number of errors.
    pub errors: u64,
    /// File clusters that nothing refers to: those of the tail, and those before it that take space on the host.
    pub leaks: u64,
    /// File clusters before the tail that nothing refers to and that are holes of the file: free, and cost nothing.
    pub free: u64,
    /// Of these, how many lie behind the last cluster that is used.
    pub tail: u64,
    /// Guest clusters with a good entry.
    pub mapped: u64,
    /// The image was not closed cleanly.
    pub in_use: bool,
    /// Odd, but harmless.
    pub notes: Vec<String>,
}

impl CheckReport {
    /// True when something is worse than a leak or a left-over mark.
    pub fn is_damaged(&self) -> bool {
        self.errors > 0
    }

    fn new(path: &Path, kind: ImageKind) -> CheckReport {
        CheckReport {
            path: path.to_owned(),
            kind,
            header: None,
            findings: Vec::new(),
            errors: 0,
            leaks: 0,
            free: 0,
            tail: 0,
            mapped: 0,
            in_use: false,
            notes: Vec::new(),
        }
    }

    fn error(&mut self, finding: impl FnOnce() -> Finding) {
        self.errors += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding());
        }
    }
}

/// Checks the image at `path`, under its lock. Err: it cannot be read at all (missing, not an image, in use by another
/// process, I/O); damage is in the report.
pub fn check(path: &Path) -> Result<CheckReport> {
    // What another process changes meanwhile would look like damage.
    let (candidate, _lock) = Candidate::open_locked(path)?;
    let kind = candidate.kind()?;
    check_candidate(path, candidate, kind)
}

/// Checks a file that a descriptor names, whatever its own name says of it.
pub fn check_level(at: &Located, kind: ImageKind) -> Result<CheckReport> {
    let (candidate, _lock) = Candidate::open_locked_at(at, Access::ReadOnly)?;
    check_candidate(&at.shown, candidate, kind)
}

pub(super) fn check_candidate(path: &Path, candidate: Candidate, kind: ImageKind) -> Result<CheckReport> {
    if let Err(bad) = candidate.form(kind) {
        let mut report = CheckReport::new(path, kind);
        report.error(|| Finding {
            problem: Problem::Header,
            cluster: None,
            offset: Some(bad.offset),
            message: bad.to_string(),
        });
        return Ok(report);
    }
    check_open(&candidate.open_as(kind)?)
}

/// What a check meets on its way.
#[derive(Clone, Copy, Debug)]
pub(super) enum CheckNote {
    /// An entry that is wrong.
    Bad { cluster: u64, value: u32, problem: Problem },
    /// Nothing refers to these file clusters before the last one in use (first, one past the last); some take space.
    Leak { from: u64, to: u64, leaked: u64 },
}

/// Checks an image that is open.
pub fn check_open(image: &AtRest) -> Result<CheckReport> {
    check_and_note(image, &mut |_| ())
}

/// The same; notes all of what a report cuts short or only counts.
pub(super) fn check_and_note(image: &AtRest, note: &mut dyn FnMut(CheckNote)) -> Result<CheckReport> {
    let mut report = CheckReport::new(&image.path, image.kind());
    match &image.form {
        Form::Raw => {
            if !image.len.is_multiple_of(SECTOR) {
                report.notes.push(format!("the length, {} bytes, is not a multiple of 512", image.len));
            }
        }
        Form::Ploop(header) => {
            report.header = Some(*header);
            check_delta(image, header, &mut report, note)?;
        }
    }
    Ok(report)
}

fn check_delta(
    image: &AtRest,
    header: &Header,
    report: &mut CheckReport,
    note: &mut dyn FnMut(CheckNote),
) -> Result<()> {
    let geometry = header.geometry();
    report.in_use = header.is_in_use();
    if ![IN_USE, CLOSED, CLOSED_V21].contains(&header.in_use) {
        report.notes.push(format!("m_DiskInUse = {:#x} at byte 44 counts as closed", header.in_use));
    }
    let data = image.len - geometry.first;
    if !data.is_multiple_of(geometry.cluster) {
        report.notes.push(format!(
            "the file ends at byte {}, inside a cluster; the kernel's ploop wants whole clusters",
            image.len
        ));
    }
    note_padding(image, header, &geometry, report)?;

    // Clusters that begin inside the file; the last may be cut.
    let file_clusters = data.div_ceil(geometry.cluster);
    let mut used = Used::new(file_clusters);
    let extension = extension_clusters(image, header, &geometry, report)?;
    // One more than the highest cluster in use; known after the first pass.
    let mut end = extension.last().map_or(0, |file_cluster| file_cluster + 1);
    let mut leaked = 0;
    loop {
        let first_pass = used.start == 0;
        for file_cluster in &extension {
            // The bitmap names a cluster that the extension uses as well: seen as a double below.
            used.mark(*file_cluster);
        }
        image.for_each_entry(&geometry, |cluster, entry| {
            let place = BatEntry { cluster, value: entry };
            match place.judge(&geometry, image.len) {
                Ok(file_cluster) => {
                    if first_pass {
                        report.mapped += 1;
                        end = end.max(file_cluster + 1);
                    }
                    if !used.mark(file_cluster) {
                        let what = format!("file cluster {file_cluster} is referred to twice");
                        report.error(|| place.finding(Problem::Double, &what));
                        note(CheckNote::Bad { cluster, value: entry, problem: Problem::Double });
                    }
                }
                Err((problem, why)) => {
                    // What is left of a cut cluster is in use, and no leak.
                    if problem == Problem::Cut
                        && let Some(position) = geometry.position(entry)
                    {
                        end = end.max(geometry.file_cluster(position) + 1);
                        used.mark(geometry.file_cluster(position));
                    }
                    if first_pass {
                        report.error(|| place.finding(problem, &why));
                        note(CheckNote::Bad { cluster, value: entry, problem });
                    }
                }
            }
        })?;
        for (from, to) in used.gaps(end) {
            let found = image.clusters_with_data(&geometry, from, to)?;
            if found > 0 {
                note(CheckNote::Leak { from, to, leaked: found });
            }
            leaked += found;
        }
        if !used.next_window() {
            break;
        }
    }
    report.tail = file_clusters - end;
    report.leaks = report.tail + leaked;
    report.free = file_clusters - used.count - report.leaks;
    Ok(())
}

/// One non-zero BAT entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatEntry {
    pub cluster: u64,
    pub value: u32,
}

impl BatEntry {
    /// The file cluster it names, or what is wrong with it.
    pub(super) fn judge(&self, geometry: &Geometry, len: u64) -> std::result::Result<u64, (Problem, String)> {
        let clusters = geometry.clusters();
        if self.cluster >= clusters {
            return Err((Problem::BeyondDisk, format!("the disk has {clusters} clusters only")));
        }
        if self.value == u32::MAX {
            return Err((Problem::PastEnd, "no file has a cluster of this number".into()));
        }
        let Some(position) = geometry.position(self.value) else {
            // Only v1 entries can lie off the grid.
            let above = u64::from(self.value) * SECTOR >= geometry.first;
            return Err(match geometry.version {
                Version::V1 if above => (Problem::OffGrid, "it is not on the grid of clusters".into()),
                _ => (
                    Problem::IntoHeader,
                    format!("it points before the first data block, byte {}", geometry.first),
                ),
            });
        };
        if position >= len {
            return Err((
                Problem::PastEnd,
                format!("byte {position} is past the end of the file, byte {len}"),
            ));
        }
        if geometry.place(self.cluster, self.value, len).is_none() {
            return Err((Problem::Cut, format!("the file ends inside its cluster, at byte {len}")));
        }
        Ok(geometry.file_cluster(position))
    }

    fn finding(&self, problem: Problem, why: &str) -> Finding {
        let offset = HEADER_BYTES + 4 * self.cluster;
        Finding {
            problem,
            cluster: Some(self.cluster),
            offset: Some(offset),
            message: format!("BAT entry {} = {:#x} at byte {offset}: {why}", self.cluster, self.value),
        }
    }
}

/// ploop scans the BAT area to its end, and a later grow would take what stands there for entries.
fn note_padding(
    image: &AtRest,
    header: &Header,
    geometry: &Geometry,
    report: &mut CheckReport,
) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    let mut at = geometry.bat_end();
    // A late first block may leave room for something we do not know; only the BAT's own last cluster must be zero.
    let end = geometry.first.min(at.next_multiple_of(geometry.cluster));
    // A large gap in a strange file is not worth reading all of it.
    let end = end.min(at.saturating_add(64 << 20));
    while at < end {
        let want = (end - at).min(piece.len() as u64) as usize;
        let got = image.read(&mut piece[..want], at)?;
        if let Some(index) = piece[..got].iter().position(|byte| *byte != 0) {
            let version = header.version;
            let byte = at + index as u64;
            report
                .notes
                .push(format!("byte {byte} between the BAT and the data is not zero ({version} image)"));
            return Ok(());
        }
        at += want as u64;
    }
    Ok(())
}

/// True when the header's format extension is there and is true.
pub(super) fn trusted_extension(image: &AtRest, header: &Header) -> Result<bool> {
    let mut unsaid = CheckReport::new(&image.path, image.kind());
    Ok(!extension_clusters(image, header, &header.geometry(), &mut unsaid)?.is_empty())
}

/// File clusters that a trusted format extension uses; says what is wrong with any other.
fn extension_clusters(
    image: &AtRest,
    header: &Header,
    geometry: &Geometry,
    report: &mut CheckReport,
) -> Result<Vec<u64>> {
    if header.extension == 0 {
        return Ok(Vec::new());
    }
    let at = header.extension.checked_mul(SECTOR);
    let field = format!("m_FormatExtensionOffset = {:#x} at byte 56", header.extension);
    let clusters_of = |at: u64| {
        let inside =
            at >= geometry.first && at < image.len && (at - geometry.first).is_multiple_of(geometry.cluster);
        inside.then(|| geometry.file_cluster(at))
    };
    let Some((at, cluster)) = at.and_then(|at| Some((at, clusters_of(at)?))) else {
        report
            .notes
            .push(format!("{field}: no cluster of this file (a dangling extension, which is ignored)"));
        return Ok(Vec::new());
    };
    if header.in_use != CLOSED_V21 {
        report.notes.push(format!("{field}: the extension is stale, since the image was not closed as v2.1"));
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; geometry.cluster.min(extension::MAX_BYTES as u64) as usize];
    let got = image.read(&mut bytes, at)?;
    let Some(bitmaps) = extension::bitmap_sectors(&bytes[..got]) else {
        report.notes.push(format!("{field}: the extension has no magic and is ignored"));
        return Ok(Vec::new());
    };
    report.notes.push(format!("{field}: a format extension with {} bitmap clusters", bitmaps.len()));
    let mut clusters = vec![cluster];
    clusters.extend(bitmaps.into_iter().filter_map(|sector| clusters_of(sector.checked_mul(SECTOR)?)));
    // A cluster that the table names twice is no damage of the disk.
    clusters.sort_unstable();
    clusters.dedup();
    Ok(clusters)
}

#[cfg(test)]
mod tests;
