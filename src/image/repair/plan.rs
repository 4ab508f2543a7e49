//! What a repair would do: found by the same walk as a check, nothing changed.

use std::collections::HashMap;

use super::header::{Field, HeaderFacts, settle};
use super::{Lost, RepairStep};
use crate::error::{Error, Kind, Result};
use crate::format::header::{CLOSED_V21, Geometry, Header};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::check::{CheckNote, CheckReport, Problem, check_and_note, trusted_extension};
use crate::io::file::HostFile;

/// Entries and runs of clusters that one plan holds; the rest is found when these are repaired. A BAT full of rubbish
/// must not take memory without end.
const MOST: usize = 1 << 20;

/// Space is given back by whole blocks of the host; 4 KiB wherever images are at home.
const HOST_BLOCK: u64 = 4096;

/// A BAT entry that gets another value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wrong {
    pub cluster: u64,
    pub problem: Problem,
}

/// A guest cluster that shares its file cluster with another one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Double {
    pub cluster: u64,
    /// The file cluster of both.
    pub shared: u64,
    /// Who else has it; None: the format extension.
    pub owner: Option<u64>,
}

/// What is to be done with one file.
pub(super) struct RepairPlan {
    /// What the check says.
    pub report: CheckReport,
    /// The header as it should be, apart from the in-use mark.
    pub header: Header,
    /// The fields in which it differs from what stands in the file.
    pub fields: Vec<Field>,
    /// Entries that are cleared.
    pub wrong: Vec<Wrong>,
    /// Entries whose cluster is copied.
    pub doubles: Vec<Double>,
    /// Clusters into which the file ends.
    pub cut: u64,
    /// Runs of file clusters that nothing refers to and that take space: first, one past the last, how many.
    pub leaks: Vec<(u64, u64, u64)>,
    /// The file's length in bytes.
    pub len: u64,
    /// File clusters up to the last one in use.
    pub end: u64,
    /// What nothing refers to may be what a damaged entry stood for: it is kept in a file beside the image.
    pub doubtful: bool,
    /// It is kept before the header is corrected: after that, and a power cut, nothing would show that it is doubtful.
    pub keep_first: bool,
    /// What the guest has lost.
    pub lost: Vec<Lost>,
}

/// Plans for a file whose header nothing is known of yet.
pub(super) fn plan(candidate: &Candidate, facts: &HeaderFacts) -> Result<RepairPlan> {
    let (mut header, mut fields) = settle(candidate, facts)?;
    let damaged = !fields.is_empty();
    let trusted = header.in_use == CLOSED_V21 && !damaged && {
        let image = open(candidate, &header);
        trusted_extension(&image, &header)?
    };
    if header.extension != 0 && !trusted {
        drop_extension(&mut header, &mut fields);
    }
    let mut plan = look(candidate, header, damaged)?;
    if header.extension != 0 && plan.report.errors > 0 {
        // Its bitmap says what changed in a disk that is not this one any more.
        drop_extension(&mut header, &mut fields);
        plan = look(candidate, header, damaged)?;
    }
    plan.fields = fields;
    Ok(plan)
}

fn drop_extension(header: &mut Header, fields: &mut Vec<Field>) {
    let old = std::mem::take(&mut header.extension);
    fields.push(Field { name: "m_FormatExtensionOffset", offset: 56, old, new: 0 });
}

fn open(candidate: &Candidate, header: &Header) -> AtRest {
    AtRest {
        path: candidate.path.clone(),
        form: Form::Ploop(*header),
        // A file that ends before its first data block has no data, and gets its length back.
        len: candidate.status.len.max(header.geometry().first),
        allocated: candidate.extent().1,
        file: candidate.file.clone(),
    }
}

/// Plans with a header that is settled; `damaged`: it was not, or entries were cleared before.
pub(super) fn look(candidate: &Candidate, header: Header, damaged: bool) -> Result<RepairPlan> {
    let image = open(candidate, &header);
    let geometry = header.geometry();
    let (mut wrong, mut doubles, mut leaks) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cut, mut cut_end, mut lost) = (0, 0, Vec::new());
    let mut all_leaks = 0;
    let report = check_and_note(&image, &mut |seen| match seen {
        CheckNote::Leak { from, to, leaked } => {
            all_leaks += leaked;
            if leaks.len() < MOST {
                leaks.push((from, to, leaked));
            }
        }
        CheckNote::Bad { cluster, value, problem } => {
            let position = geometry.position(value);
            match (problem, position) {
                (Problem::Cut, Some(position)) => {
                    cut += 1;
                    cut_end = cut_end.max(geometry.file_cluster(position) + 1);
                    let inside = image.len - position;
                    lose(&mut lost, &geometry, cluster, inside);
                }
                (Problem::Double, Some(position)) if doubles.len() < MOST => {
                    let shared = geometry.file_cluster(position);
                    doubles.push(Double { cluster, shared, owner: None });
                }
                (Problem::Double, _) => {}
                _ if wrong.len() < MOST => {
                    wrong.push(Wrong { cluster, problem });
                    if problem != Problem::BeyondDisk {
                        lose(&mut lost, &geometry, cluster, 0);
                    }
                }
                _ => {}
            }
        }
    })?;
    if wrong.len() == MOST {
        // Before the last of these is cleared the file must not grow: it could come to lie in the file.
        doubles.clear();
    }
    leaks.retain(|(from, to, _)| holds_blocks(&*candidate.file, &geometry, *from, *to));
    find_owners(&image, &geometry, &mut doubles)?;
    let clusters = (image.len - geometry.first).div_ceil(geometry.cluster);
    let doubtful = damaged || !wrong.is_empty() || !doubles.is_empty();
    let plan = RepairPlan {
        end: (clusters - report.tail).max(cut_end),
        report,
        header,
        fields: Vec::new(),
        wrong,
        doubles,
        cut,
        leaks,
        len: candidate.status.len,
        doubtful,
        keep_first: damaged,
        lost,
    };
    plan.room_for_copies(candidate)?;
    Ok(plan)
}

/// Notes that a guest cluster has lost what lies from byte `inside` on.
fn lose(lost: &mut Vec<Lost>, geometry: &Geometry, cluster: u64, inside: u64) {
    let end = ((cluster + 1) * geometry.cluster).min(geometry.disk);
    let offset = cluster * geometry.cluster + inside;
    match lost.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len = end - last.offset,
        _ => lost.push(Lost { offset, len: end.saturating_sub(offset) }),
    }
}

/// False where all that takes space in these clusters are host blocks that reach into clusters in use.
fn holds_blocks(file: &dyn HostFile, geometry: &Geometry, from: u64, to: u64) -> bool {
    let start = geometry.cluster_position(from).next_multiple_of(HOST_BLOCK);
    let end = geometry.cluster_position(to) / HOST_BLOCK * HOST_BLOCK;
    // Where the host cannot say, it is tried.
    start < end && file.seek_data(start).map_or(true, |data| data.is_some_and(|data| data < end))
}

/// Who had the cluster first.
fn find_owners(image: &AtRest, geometry: &Geometry, doubles: &mut [Double]) -> Result<()> {
    if doubles.is_empty() {
        return Ok(());
    }
    let mut owners: HashMap<u64, Option<u64>> = doubles.iter().map(|double| (double.shared, None)).collect();
    image.for_each_entry(geometry, |cluster, entry| {
        let position = geometry.position(entry).filter(|at| *at < image.len && cluster < geometry.clusters());
        if let Some(owner) = position.and_then(|at| owners.get_mut(&geometry.file_cluster(at))) {
            owner.get_or_insert(cluster);
        }
    })?;
    for double in doubles {
        double.owner = owners.get(&double.shared).copied().flatten();
    }
    Ok(())
}

impl RepairPlan {
    /// The length that the file should have.
    pub(super) fn good_len(&self) -> u64 {
        self.header.geometry().cluster_position(self.end)
    }

    /// True when there is nothing to do but, perhaps, to clear the mark.
    pub(super) fn is_empty(&self) -> bool {
        self.leaks.is_empty() && self.has_only_leaks()
    }

    /// True when there is nothing to do but to give back leaks before the last cluster in use.
    pub(super) fn has_only_leaks(&self) -> bool {
        self.fields.is_empty()
            && self.wrong.is_empty()
            && self.doubles.is_empty()
            && self.len == self.good_len()
    }

    /// The format counts file clusters in 32 bits.
    fn room_for_copies(&self, candidate: &Candidate) -> Result<()> {
        let geometry = self.header.geometry();
        let last = self.end + self.doubles.len() as u64;
        if !self.doubles.is_empty() && geometry.entry(geometry.cluster_position(last)).is_none() {
            let why =
                "clusters that are used twice must be copied, and the format has no numbers left for that";
            return Err(Error::at(Kind::NoSpace, &candidate.path, why));
        }
        Ok(())
    }

    /// The steps, in their order.
    pub(super) fn steps(&self) -> Vec<RepairStep> {
        let geometry = self.header.geometry();
        let mut steps: Vec<RepairStep> = self.fields.iter().cloned().map(RepairStep::Field).collect();
        let tail = self.len > self.good_len();
        let free = |save: bool| {
            let run = move |(from, to, clusters): &(u64, u64, u64)| RepairStep::Free {
                from: *from,
                to: *to,
                clusters: *clusters,
                saved: save,
            };
            self.leaks.iter().map(run)
        };
        steps.extend(free(self.doubtful));
        for Wrong { cluster, problem } in &self.wrong {
            match steps.last_mut() {
                Some(RepairStep::Clear { first, count, problem: of })
                    if of == problem && *first + *count == *cluster =>
                {
                    *count += 1;
                }
                _ => steps.push(RepairStep::Clear { first: *cluster, count: 1, problem: *problem }),
            }
        }
        if tail {
            let clusters = self.report.tail;
            let (from, to) = (self.len, self.good_len());
            steps.push(RepairStep::Cut { from, to, clusters, saved: self.doubtful });
        } else if self.len < self.good_len() {
            steps.push(RepairStep::Complete { from: self.len, to: self.good_len(), clusters: self.cut });
        }
        for double in &self.doubles {
            let at = geometry.cluster_position(double.shared);
            steps.push(RepairStep::Copy { cluster: double.cluster, owner: double.owner, at });
        }
        steps
    }
}
