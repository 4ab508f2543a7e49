//! Checking an image at rest: what contradicts the format, what is merely leaked, what is odd but harmless.
//! Report only; nothing is written. Memory is bounded whatever the file says.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::format::extension;
use crate::format::header::{CLOSED, CLOSED_V21, Geometry, HEADER_BYTES, Header, IN_USE, SECTOR, Version};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::kind::ImageKind;
use crate::image::paths::Located;
use crate::io::real::Access;

/// Errors that are kept in full; of the others only the number. A BAT of garbage would give millions.
pub const MAX_FINDINGS: usize = 100;

/// File clusters looked at in one pass: a bitmap of 32 MiB, which holds 256 TiB of 1 MiB clusters. Larger files take
/// more passes, at most 16, since a BAT entry can name 2^32 clusters.
const WINDOW: u64 = 1 << 28;

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
pub struct Report {
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

impl Report {
    /// True when something is worse than a leak or a left-over mark.
    pub fn is_damaged(&self) -> bool {
        self.errors > 0
    }

    fn new(path: &Path, kind: ImageKind) -> Report {
        Report {
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
pub fn check(path: &Path) -> Result<Report> {
    // What somebody else changes meanwhile would look like damage.
    let (candidate, _lock) = Candidate::open_locked(path)?;
    let kind = candidate.kind()?;
    check_candidate(path, candidate, kind)
}

/// Checks a file that a descriptor names, whatever its own name says of it.
pub fn check_level(at: &Located, kind: ImageKind) -> Result<Report> {
    let (candidate, _lock) = Candidate::open_locked_at(at, Access::ReadOnly)?;
    check_candidate(&at.shown, candidate, kind)
}

pub(super) fn check_candidate(path: &Path, candidate: Candidate, kind: ImageKind) -> Result<Report> {
    if let Err(bad) = candidate.form(kind) {
        let mut report = Report::new(path, kind);
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
pub(super) enum Seen {
    /// An entry that is wrong.
    Bad { cluster: u64, value: u32, problem: Problem },
    /// Nothing refers to these file clusters before the last one in use (first, one past the last); some take space.
    Leak { from: u64, to: u64, leaked: u64 },
}

/// Checks an image that is open.
pub fn check_open(image: &AtRest) -> Result<Report> {
    check_and_tell(image, &mut |_| ())
}

/// The same; tells all of what a report cuts short or only counts.
pub(super) fn check_and_tell(image: &AtRest, tell: &mut dyn FnMut(Seen)) -> Result<Report> {
    let mut report = Report::new(&image.path, image.kind());
    match &image.form {
        Form::Raw => {
            if !image.len.is_multiple_of(SECTOR) {
                report.notes.push(format!("the length, {} bytes, is not a multiple of 512", image.len));
            }
        }
        Form::Ploop(header) => {
            report.header = Some(*header);
            check_delta(image, header, &mut report, tell)?;
        }
    }
    Ok(report)
}

fn check_delta(
    image: &AtRest,
    header: &Header,
    report: &mut Report,
    tell: &mut dyn FnMut(Seen),
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
            let place = Entry { cluster, value: entry };
            match place.judge(&geometry, image.len) {
                Ok(file_cluster) => {
                    if first_pass {
                        report.mapped += 1;
                        end = end.max(file_cluster + 1);
                    }
                    if !used.mark(file_cluster) {
                        let what = format!("file cluster {file_cluster} is referred to twice");
                        report.error(|| place.finding(Problem::Double, &what));
                        tell(Seen::Bad { cluster, value: entry, problem: Problem::Double });
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
                        tell(Seen::Bad { cluster, value: entry, problem });
                    }
                }
            }
        })?;
        for (from, to) in used.gaps(end) {
            let found = image.clusters_with_data(&geometry, from, to)?;
            if found > 0 {
                tell(Seen::Leak { from, to, leaked: found });
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
pub(super) struct Entry {
    pub cluster: u64,
    pub value: u32,
}

impl Entry {
    /// The file cluster it names, or what is wrong with it.
    pub fn judge(&self, geometry: &Geometry, len: u64) -> std::result::Result<u64, (Problem, String)> {
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

/// Which file clusters are referred to, one window at a time.
struct Used {
    bits: Vec<u64>,
    start: u64,
    total: u64,
    /// Clusters marked, over all windows.
    count: u64,
}

impl Used {
    fn new(total: u64) -> Used {
        // No more clusters than this can be named by an entry; the rest of the file is leaked anyway.
        let bits = vec![0; total.min(WINDOW).div_ceil(64) as usize];
        Used { bits, start: 0, total: total.min(1 << 32), count: 0 }
    }

    /// Marks a cluster; false when it was marked before. Clusters outside the window count as new.
    fn mark(&mut self, cluster: u64) -> bool {
        let Some(index) = cluster.checked_sub(self.start).filter(|i| *i < WINDOW) else { return true };
        let Some(word) = self.bits.get_mut((index / 64) as usize) else { return true };
        let bit = 1 << (index % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.count += 1;
        true
    }

    /// The runs of clusters of this window, below `end`, that were not marked: first and one past the last.
    fn gaps(&self, end: u64) -> Vec<(u64, u64)> {
        let mut gaps: Vec<(u64, u64)> = Vec::new();
        let end = end.min(self.start + WINDOW);
        let mut at = self.start;
        while at < end {
            let index = at - self.start;
            // Clear bits of the word from here on, then how many in a row.
            let free = !self.bits[(index / 64) as usize] >> (index % 64);
            let rest = 64 - index % 64;
            let used = u64::from(free.trailing_zeros()).min(rest);
            let run = u64::from((!(free.checked_shr(used as u32).unwrap_or(0))).trailing_zeros());
            let (from, to) = ((at + used).min(end), (at + used + run.min(rest - used)).min(end));
            if from < to {
                match gaps.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => gaps.push((from, to)),
                }
            }
            at = at.saturating_add(used + run.min(rest - used));
        }
        gaps
    }

    fn next_window(&mut self) -> bool {
        self.start += WINDOW;
        self.bits.fill(0);
        self.start < self.total
    }
}

/// ploop scans the BAT area to its end, and a later grow would take what stands there for entries.
fn note_padding(image: &AtRest, header: &Header, geometry: &Geometry, report: &mut Report) -> Result<()> {
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

/// True when the header's format extension is there and tells the truth.
pub(super) fn trusted_extension(image: &AtRest, header: &Header) -> Result<bool> {
    let mut unsaid = Report::new(&image.path, image.kind());
    Ok(!extension_clusters(image, header, &header.geometry(), &mut unsaid)?.is_empty())
}

/// File clusters that a trusted format extension uses; says what is wrong with any other.
fn extension_clusters(
    image: &AtRest,
    header: &Header,
    geometry: &Geometry,
    report: &mut Report,
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
mod tests {
    use super::*;
    use crate::format::header::FLAG_EMPTY;

    const CLUSTER: u64 = 32 << 10;

    /// An image of 8 clusters with the given entries and a file of `file_clusters` data clusters.
    struct Maker {
        header: Header,
        entries: Vec<(u64, u32)>,
        file_clusters: u64,
        cut: u64,
    }

    impl Maker {
        fn new(version: Version) -> Maker {
            let mut header = Header::new(version, 8 * CLUSTER, CLUSTER).expect("legal");
            header.flags &= !FLAG_EMPTY;
            Maker { header, entries: Vec::new(), file_clusters: 0, cut: 0 }
        }

        /// Guest cluster -> file cluster.
        fn map(mut self, cluster: u64, file_cluster: u64) -> Maker {
            let geometry = self.header.geometry();
            let entry = geometry.entry(geometry.cluster_position(file_cluster)).expect("fits");
            self.file_clusters = self.file_clusters.max(file_cluster + 1);
            self.raw_entry(cluster, entry)
        }

        fn raw_entry(mut self, cluster: u64, entry: u32) -> Maker {
            self.entries.push((cluster, entry));
            self
        }

        fn check(&self) -> Report {
            let folder = tempfile::tempdir().expect("tmp");
            let path = folder.path().join("vm.hds");
            let geometry = self.header.geometry();
            let mut bytes = self.header.encode().to_vec();
            bytes.resize((geometry.cluster_position(self.file_clusters) - self.cut) as usize, 0);
            for (cluster, entry) in &self.entries {
                let at = (HEADER_BYTES + 4 * cluster) as usize;
                bytes[at..at + 4].copy_from_slice(&entry.to_le_bytes());
            }
            std::fs::write(&path, &bytes).expect("write");
            let report = check(&path).expect("readable");
            assert_eq!(std::fs::read(&path).expect("read"), bytes, "a check changes nothing");
            report
        }

        fn problems(&self) -> Vec<Problem> {
            self.check().findings.iter().map(|finding| finding.problem).collect()
        }
    }

    #[test]
    fn a_good_image_has_nothing_to_report_in_either_version() {
        for version in [Version::V1, Version::V2] {
            let report = Maker::new(version).map(0, 1).map(7, 0).check();
            assert_eq!((report.errors, report.leaks, report.tail, report.mapped), (0, 0, 0, 2));
            assert!(!report.in_use && report.notes.is_empty(), "{report:?}");
        }
    }

    #[test]
    fn every_kind_of_bad_entry_is_named() {
        let v2 = || Maker::new(Version::V2);
        assert_eq!(v2().map(0, 0).map(1, 0).problems(), [Problem::Double]);
        assert_eq!(v2().map(0, 0).raw_entry(1, 2).problems(), [Problem::PastEnd]);
        assert_eq!(v2().map(0, 0).raw_entry(1, u32::MAX).problems(), [Problem::PastEnd]);
        let mut late = v2();
        late.header.first_block *= 2;
        assert_eq!(late.map(0, 0).raw_entry(1, 1).problems(), [Problem::IntoHeader]);
        let v1 = Maker::new(Version::V1).map(0, 0);
        assert_eq!(
            v1.raw_entry(1, 3).raw_entry(2, 64 + 1).problems(),
            [Problem::IntoHeader, Problem::OffGrid]
        );
        let mut short = v2();
        short.header.disk_sectors -= CLUSTER / SECTOR;
        assert_eq!(short.map(6, 0).map(7, 1).problems(), [Problem::BeyondDisk]);
        let finding = &v2().map(0, 0).map(3, 0).check().findings[0];
        assert_eq!((finding.cluster, finding.offset), (Some(3), Some(76)));
        assert_eq!(finding.to_string(), "BAT entry 3 = 0x1 at byte 76: file cluster 0 is referred to twice");
    }

    #[test]
    fn leaks_in_the_middle_and_in_the_tail_are_counted_and_are_no_damage() {
        let mut image = Maker::new(Version::V2).map(0, 2);
        image.file_clusters = 7;
        let report = image.check();
        assert_eq!((report.errors, report.leaks, report.tail, report.free), (0, 6, 4, 0));
        assert!(!report.is_damaged());
    }

    #[test]
    fn holes_between_clusters_in_use_are_free_and_no_leaks() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let header = Header::new(Version::V2, 8 * CLUSTER, CLUSTER).expect("legal");
        let geometry = header.geometry();
        let file = std::fs::File::create_new(&path).expect("create");
        let write =
            |bytes: &[u8], at| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).expect("write");
        write(&header.encode(), 0);
        write(&7u32.to_le_bytes(), HEADER_BYTES);
        // File cluster 2 is leaked, 6 in use, 0, 1, 3, 4 and 5 are holes, 7 is a hole in the tail.
        write(&[1], geometry.cluster_position(2));
        write(&[1], geometry.cluster_position(6));
        file.set_len(geometry.cluster_position(8)).expect("extend");
        let report = check(&path).expect("readable");
        assert_eq!((report.errors, report.leaks, report.tail, report.free), (0, 2, 1, 5), "{report:?}");
    }

    #[test]
    fn gaps_are_the_runs_of_clear_bits() {
        let mut used = Used::new(300);
        for cluster in [0, 1, 5, 63, 64, 130, 200] {
            used.mark(cluster);
        }
        assert_eq!(used.gaps(201), [(2, 5), (6, 63), (65, 130), (131, 200)]);
        assert_eq!(used.gaps(5), [(2, 5)]);
        assert_eq!(used.gaps(250).last(), Some(&(201, 250)));
        assert_eq!(Used::new(300).gaps(300), [(0, 300)]);
        assert!(Used::new(300).gaps(0).is_empty());
    }

    #[test]
    fn a_left_over_mark_is_said_and_is_no_damage() {
        let mut image = Maker::new(Version::V2).map(0, 0);
        image.header.in_use = IN_USE;
        let report = image.check();
        assert!(report.in_use && !report.is_damaged());
        image.header.in_use = 1;
        let report = image.check();
        assert!(!report.in_use && !report.is_damaged());
        assert!(report.notes[0].contains("m_DiskInUse = 0x1"), "{:?}", report.notes);
    }

    #[test]
    fn a_file_cut_inside_a_mapped_cluster_is_damage_but_behind_the_disk_it_is_not() {
        let mut image = Maker::new(Version::V2).map(7, 0);
        image.cut = SECTOR;
        assert_eq!(image.problems(), [Problem::Cut]);
        // The disk ends one sector earlier: what the file lacks nobody can read.
        image.header.disk_sectors -= 1;
        let report = image.check();
        assert_eq!(report.errors, 0);
        assert!(report.notes[0].contains("inside a cluster"), "{:?}", report.notes);
    }

    #[test]
    fn a_dangling_extension_and_a_dirty_padding_are_noted() {
        let mut image = Maker::new(Version::V2).map(0, 0);
        image.header.extension = 1 << 40;
        assert!(image.check().notes[0].contains("dangling"));
        image.header.extension = u64::MAX;
        assert!(image.check().notes[0].contains("dangling"));
        image.header.extension = CLUSTER / SECTOR;
        assert!(image.check().notes[0].contains("stale"));
        image.header.in_use = CLOSED_V21;
        assert!(image.check().notes[0].contains("no magic"));
        // Entry 8 of 8: behind the BAT.
        let report = Maker::new(Version::V2).map(0, 0).raw_entry(8, 1).check();
        assert_eq!(report.errors, 0);
        assert!(report.notes[0].contains("byte 96"), "{:?}", report.notes);
    }

    #[test]
    fn a_trusted_extension_uses_its_clusters_and_they_are_no_leaks() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let mut header = Header::new(Version::V2, 8 * CLUSTER, CLUSTER).expect("legal");
        header.in_use = CLOSED_V21;
        header.extension = 2 * CLUSTER / SECTOR;
        let mut bytes = header.encode().to_vec();
        // File cluster 0: bitmap, 1: extension, 2: leaked.
        bytes.resize(4 * CLUSTER as usize, 0);
        let at = 2 * CLUSTER as usize;
        bytes[at..at + 8].copy_from_slice(&extension::MAGIC.to_le_bytes());
        bytes[at + 24..at + 32].copy_from_slice(&0x2038_5FAE_252C_B34A_u64.to_le_bytes());
        bytes[at + 40] = 40;
        bytes[at + 48 + 28] = 1;
        bytes[at + 48 + 32..at + 48 + 40].copy_from_slice(&(CLUSTER / SECTOR).to_le_bytes());
        std::fs::write(&path, &bytes).expect("write");
        let report = check(&path).expect("readable");
        assert_eq!((report.errors, report.leaks, report.tail), (0, 1, 1), "{report:?}");
    }

    #[test]
    fn a_bad_header_is_one_error_that_names_the_field() {
        let mut image = Maker::new(Version::V2);
        image.header.first_block *= 3;
        image.cut = CLUSTER;
        let report = image.check();
        assert_eq!((report.errors, report.findings[0].problem), (1, Problem::Header));
        assert!(report.findings[0].message.starts_with("m_FirstBlockOffset = 0xc0 at byte 48"), "{report:?}");
    }

    #[test]
    fn garbage_in_a_large_bat_keeps_a_bounded_number_of_findings() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let header = Header::new(Version::V2, 100_000 * CLUSTER, CLUSTER).expect("legal");
        let mut bytes = header.encode().to_vec();
        bytes.resize(header.geometry().bat_end() as usize, 0xff);
        bytes.resize(header.geometry().first as usize, 0);
        std::fs::write(&path, bytes).expect("write");
        let report = check(&path).expect("readable");
        assert_eq!((report.errors, report.findings.len()), (100_000, MAX_FINDINGS));
    }

    #[test]
    fn doubles_and_leaks_are_seen_across_windows() {
        // One-sector clusters in a sparse file of 2^28 + 100 clusters: the second window holds the last 100.
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let header = Header::new(Version::V2, 100 * SECTOR, SECTOR).expect("legal");
        let geometry = header.geometry();
        let total = WINDOW + 100;
        let entry = |file_cluster| geometry.entry(geometry.cluster_position(file_cluster)).expect("fits");
        let mut bytes = header.encode().to_vec();
        for value in [entry(5), entry(total - 1), entry(total - 1), entry(total - 2)] {
            bytes.extend(value.to_le_bytes());
        }
        std::fs::write(&path, bytes).expect("write");
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(geometry.cluster_position(total)).expect("sparse");
        let report = check(&path).expect("readable");
        assert_eq!((report.errors, report.mapped, report.tail), (1, 4, 0));
        // Some free clusters share a host block with one in use, and so take space.
        assert_eq!(report.leaks + report.free, total - 3);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_behind_the_magic_are_checked_without_a_panic(
            fields in proptest::collection::vec(proptest::num::u32::ANY, 12), bat in proptest::collection::vec(0u32..40, 0..600),
            small in proptest::bool::ANY, len in 0u64..1 << 42,
        ) {
            let folder = tempfile::tempdir().expect("tmp");
            let path = folder.path().join("vm.hds");
            let mut bytes = b"WithouFreSpacExt\x02\0\0\0".to_vec();
            let mut fields = fields;
            if small {
                // Plausible numbers, so that the BAT is reached.
                (fields[2], fields[3], fields[4], fields[5], fields[7]) = (fields[2] % 70 + 1, fields[3] % 600, 1, 0, 70);
                fields[8] = 0;
            }
            bytes.extend(fields[..11].iter().flat_map(|field| field.to_le_bytes()));
            bytes.extend(bat.iter().flat_map(|entry| entry.to_le_bytes()));
            std::fs::write(&path, bytes).expect("write");
            std::fs::OpenOptions::new().write(true).open(&path).expect("open").set_len(len % (1 << (len % 43))).expect("sparse");
            let report = check(&path).expect("readable");
            proptest::prop_assert!(report.findings.len() <= MAX_FINDINGS);
            proptest::prop_assert!(report.tail <= report.leaks);
        }
    }
}
