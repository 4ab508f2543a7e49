//! Repairing one file of an image at rest: found by the same walk as a check, put right in an order that a power cut at
//! any moment leaves no worse, and reported in full.
//!
//! What is wrong is put right in place; what is lost is said, as ranges of the disk. No data goes that may be the only
//! copy: clusters that no entry refers to are, beside damage, kept in a file `NAME.lost` before their place is given back;
//! of a cluster with two owners both keep the content.

mod act;
mod header;
mod lost;
mod plan;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::format::header::Header;
use crate::image::chain::Candidate;
use crate::image::check::{CheckReport, Problem, check_candidate};
use crate::image::kind::ImageKind;
use crate::image::paths::Located;
use crate::io::file::{HostFile, HostStatus};
use crate::io::real::Access;
use act::RepairTarget;
pub use header::{Field, HeaderFacts};
use lost::LostFile;
use plan::RepairPlan;

/// More rounds than any damage needs: entries, then what they hid. Each round repairs a million of each kind.
const MOST_ROUNDS: usize = 2048;

/// One thing that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepairStep {
    /// A field of the header is corrected.
    Field(Field),
    /// Entries of the BAT become 0.
    Clear {
        /// The first guest cluster.
        first: u64,
        /// How many.
        count: u64,
        /// What is wrong with them.
        problem: Problem,
    },
    /// File clusters that nothing refers to are given back.
    Free {
        /// The first file cluster.
        from: u64,
        /// One past the last.
        to: u64,
        /// How many of them take space.
        clusters: u64,
        /// Their content is kept beside the image.
        saved: bool,
    },
    /// The file is cut behind the last cluster in use.
    Cut {
        /// Its length in bytes.
        from: u64,
        /// Its new length in bytes.
        to: u64,
        /// File clusters that go.
        clusters: u64,
        /// Their content is kept beside the image.
        saved: bool,
    },
    /// The file becomes longer, so that its last cluster, or its header, is whole.
    Complete {
        /// Its length in bytes.
        from: u64,
        /// Its new length in bytes.
        to: u64,
        /// Mapped clusters that were cut short.
        clusters: u64,
    },
    /// A guest cluster gets a copy of what it shared with another one.
    Copy {
        /// The guest cluster.
        cluster: u64,
        /// The other one; None: the format extension.
        owner: Option<u64>,
        /// Byte of the shared cluster in the file.
        at: u64,
    },
    /// The left-over in-use mark is cleared.
    Close,
}

impl RepairStep {
    /// How many faults it repairs.
    pub fn count(&self) -> u64 {
        match self {
            RepairStep::Field(_) | RepairStep::Copy { .. } | RepairStep::Close => 1,
            RepairStep::Clear { count, .. } => *count,
            RepairStep::Free { clusters, .. } => *clusters,
            RepairStep::Cut { clusters, .. } | RepairStep::Complete { clusters, .. } => (*clusters).max(1),
        }
    }
}

impl fmt::Display for RepairStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept =
            |saved: bool| if saved { "; what they hold is kept in a .lost file beside it" } else { "" };
        match self {
            RepairStep::Field(Field { name: "m_Sig", new, .. }) => {
                write!(f, "m_Sig at byte 0: becomes the magic of version {new}")
            }
            RepairStep::Field(Field { name, offset, old, new }) => {
                write!(f, "{name} at byte {offset}: {old:#x} becomes {new:#x}")
            }
            RepairStep::Clear { first, count, problem } => {
                let why = match problem {
                    Problem::IntoHeader => "before the first data block",
                    Problem::OffGrid => "between two clusters",
                    Problem::BeyondDisk => "for clusters that the disk does not have",
                    _ => "past the end of the file",
                };
                let what = if *problem == Problem::BeyondDisk { "stand" } else { "point" };
                match count {
                    1 => write!(f, "BAT entry {first}, which {what}s {why}, becomes 0"),
                    _ => write!(
                        f,
                        "BAT entries {first} to {}, which {what} {why}, become 0",
                        first + count - 1
                    ),
                }
            }
            RepairStep::Free { from, to, clusters, saved } => write!(
                f,
                "leak: {clusters} clusters of the file, between its clusters {from} and {}, are given back{}",
                to - 1,
                kept(*saved)
            ),
            RepairStep::Cut { from, to, clusters, saved } => write!(
                f,
                "leak: {clusters} clusters at the end: the file is cut from {from} to {to} bytes{}",
                kept(*saved)
            ),
            RepairStep::Complete { from, to, clusters: 0 } => {
                write!(f, "the file is made longer, from {from} to {to} bytes, to a whole cluster")
            }
            RepairStep::Complete { from, to, .. } => write!(
                f,
                "the file ends inside a mapped cluster: it is made longer, from {from} to {to} bytes, with zeroes"
            ),
            RepairStep::Copy { cluster, owner: Some(owner), at } => write!(
                f,
                "guest clusters {owner} and {cluster} are two owners of the cluster at byte {at}: both now have the same \
                 data, {cluster} a copy; one of them is wrong"
            ),
            RepairStep::Copy { cluster, owner: None, at } => {
                write!(f, "guest cluster {cluster} gets a copy of the cluster at byte {at}")
            }
            RepairStep::Close => f.write_str("the left-over in-use mark is cleared"),
        }
    }
}

/// A part of the disk whose data is gone: it reads as zero, or as the levels below have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Byte of the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What came of a repair, or would come.
#[derive(Debug)]
pub struct RepairOutcome {
    /// What a check says now.
    pub report: CheckReport,
    /// What was done, or would be.
    pub steps: Vec<RepairStep>,
    /// What the guest has lost.
    pub lost: Vec<Lost>,
    /// The file with what nothing refers to, and the bytes in it.
    pub saved: Option<(PathBuf, u64)>,
    /// Faults repaired; 0 for a dry run.
    pub repaired: u64,
}

impl RepairOutcome {
    fn unchanged(report: CheckReport) -> RepairOutcome {
        RepairOutcome { report, steps: Vec::new(), lost: Vec::new(), saved: None, repaired: 0 }
    }
}

/// Repairs the file `at` under its lock, or says what it would do. `kind`: how it is stored, where a descriptor says
/// so. `refuse` looks at the file that was opened. Err(InUse): another process has it. Err(Damaged): the header cannot be
/// what it is, and nothing proves what it was; nothing is changed.
///
/// The order, in rounds until there is nothing left to put right:
/// 1. the header, corrected, says in use, durably (R1);
/// 2. beside damage, what nothing refers to is copied to `NAME.lost`, that is made durable, and then its place is given
///    back, a batch at a time;
/// 3. entries that name nothing become 0, durably;
/// 4. the file is cut, or made whole;
/// 5. second owners get their copies, durable (R3, and R2: the file is longer);
/// 6. the second owners' entries name the copies, durably;
/// 7. without damage, leaks are given back;
/// 8. the header says closed, durably.
///
/// 2 comes before 1, but for giving back, where the header is corrected. 3 before 2: after a power cut what is kept would look like a mere leak, and go. 4 or 5 before 3: an entry past the end
/// could come to name a copy of another cluster's data. 6 before 5: an entry past the end, or naming half a copy. 8 is
/// last: until then the next check looks again. A crash anywhere leaves what the next repair finds and goes on with.
pub fn repair(
    at: &Located,
    kind: Option<ImageKind>,
    facts: &HeaderFacts,
    dry_run: bool,
    refuse: &dyn Fn(&HostStatus) -> Result<()>,
) -> Result<RepairOutcome> {
    let access = if dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let (candidate, lock) = Candidate::open_locked_at(at, access)?;
    if !dry_run {
        refuse(candidate.status())?;
    }
    let kind = match kind {
        Some(kind) => kind,
        None => candidate.kind()?,
    };
    if kind == ImageKind::Raw {
        return Ok(RepairOutcome::unchanged(check_candidate(&at.shown, candidate, kind)?));
    }
    // A look changes nothing, and lets other readers by.
    let _long = (!dry_run).then(|| lock.begin_long()).transpose()?;
    repair_open(at, &candidate.file, facts, dry_run)
}

/// The same for a file of the ploop format that is open and locked.
pub fn repair_open(
    at: &Located,
    file: &Arc<dyn HostFile>,
    facts: &HeaderFacts,
    dry_run: bool,
) -> Result<RepairOutcome> {
    let (path, kind) = (&*at.shown, ImageKind::Ploop);
    // What a crash left in the page cache may never have reached the disk (R7). Only clean pages can be dropped, and a
    // sync that fails reports an old failure: what is read from now on is what the disk has.
    if !dry_run && let Err(e) = file.sync_data() {
        log::warn!("{}: an earlier write never reached the disk: {e}", path.display());
    }
    file.drop_cache().map_err(|e| Error::io(&e, path, "cannot drop the page cache"))?;
    let candidate = Candidate::read(path, file.clone())?;
    let target = RepairTarget { file: &**file, path };

    let mut plan = plan::plan(&candidate, facts)?;
    let was_in_use = plan.header.is_in_use();
    let mut outcome = RepairOutcome::unchanged(plan.report.clone());
    if dry_run {
        outcome.take_over(&mut plan);
        if was_in_use {
            outcome.steps.push(RepairStep::Close);
        }
        if candidate.form(kind).is_err() {
            outcome.report = check_candidate(path, candidate, kind)?;
        }
        return Ok(outcome);
    }
    if plan.is_empty() && !was_in_use {
        return Ok(outcome);
    }
    let header = plan.header;
    // Leaks are nothing that the guest, or a bitmap of what changed, knows of.
    let mut as_it_was = !was_in_use;
    let mut lost = LostFile::beside(&**file, at);
    for _ in 0..MOST_ROUNDS {
        if plan.is_empty() {
            break;
        }
        as_it_was &= !plan.doubtful && plan.cut == 0 && plan.fields.is_empty();
        act::carry_out(&plan, &target, &mut lost)?;
        outcome.take_over(&mut plan);
        let (doubtful, leaks) = (plan.doubtful, plan.report.leaks);
        // The header of the plan, not of the file: that one says in use.
        plan = plan::look(&Candidate::read(path, file.clone())?, header, doubtful)?;
        // A host that cannot punch keeps its leaks.
        if plan.has_only_leaks() && plan.report.leaks >= leaks {
            break;
        }
    }
    outcome.saved = lost.made();
    if !plan.has_only_leaks() {
        let why = "is damaged beyond what can be put right; see ploopfs check";
        return Err(Error::at(Kind::Damaged, path, why));
    }
    act::close(&header, plan.report.mapped == 0, as_it_was, &target)?;
    if was_in_use {
        outcome.steps.push(RepairStep::Close);
    }
    outcome.repaired = outcome.steps.iter().map(RepairStep::count).sum();
    outcome.report = check_candidate(path, Candidate::read(path, file.clone())?, kind)?;
    Ok(outcome)
}

/// The header of a file, as it is or as the rest of the file proves it was.
pub(super) fn proven_header(candidate: &Candidate) -> Result<Header> {
    header::settle(candidate, &HeaderFacts::default()).map(|(header, _)| header)
}

impl RepairOutcome {
    /// Takes over what a plan comes to.
    fn take_over(&mut self, plan: &mut RepairPlan) {
        self.steps.extend(plan.steps());
        self.lost.append(&mut plan.lost);
    }
}
