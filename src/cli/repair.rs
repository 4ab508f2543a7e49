//! `ploopfs check --repair`: what was done, or would be, and what is lost.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::cli::{Outcome, out, report, served, target};
use crate::disk::examine::{Examined, examine};
use crate::disk::layered::Layered;
use crate::disk::owner::{other_names, refuse_level, refuse_opened};
use crate::disk::work;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{Header, SECTOR};
use crate::image::kind::{DESCRIPTOR, ImageKind};
use crate::image::paths::{Located, image_folder};
use crate::image::repair::{self, HeaderFacts, repair};
use crate::image::store::{Replaced, Store};
use crate::io::file::HostStatus;
use crate::io::lock::Use;
use crate::progress::Progress;
use crate::vdisk::live::Work;

/// Lines of one sort that are printed; of the rest only the number. JSON has them all.
const MOST_LINES: usize = 100;

/// What a repair says, beside the check's report.
#[derive(Default)]
struct RepairSummary {
    dry_run: bool,
    steps: Vec<String>,
    lost: Vec<Value>,
    lost_lines: Vec<String>,
    saved: Vec<Value>,
    saved_lines: Vec<String>,
    /// Why something stays as it is.
    refused: Vec<String>,
    /// Faults repaired.
    repaired: u64,
    /// Faults that a dry run would repair.
    would_repair: u64,
}

impl RepairSummary {
    /// Takes over what was done to one file; `name`: which, where there are several. `below`: what is lost shows what
    /// lies below.
    fn add(&mut self, name: Option<&str>, below: bool, outcome: &repair::RepairOutcome) {
        let of = name.map(|name| format!("{name}: ")).unwrap_or_default();
        for step in &outcome.steps {
            self.steps.push(format!("{of}{step}"));
            self.would_repair += step.count();
        }
        self.repaired += outcome.repaired;
        for lost in &outcome.lost {
            let end = lost.offset + lost.len;
            let now = if below { "as the levels below have it" } else { "as zero" };
            let tense = if self.dry_run { "would read" } else { "read" };
            self.lost_lines.push(format!(
                "{of}bytes {} to {} of the disk ({} bytes) {tense} {now}",
                lost.offset,
                end - 1,
                lost.len
            ));
            self.lost.push(json!({ "file": name, "offset": lost.offset, "len": lost.len }));
        }
        if let Some((path, bytes)) = &outcome.saved {
            let path = path.to_string_lossy();
            self.saved_lines.push(format!(
                "{bytes} bytes that no entry refers to, at the place where they stood: {path}; remove it when nothing is missed"
            ));
            self.saved.push(json!({ "path": path, "bytes": bytes }));
        }
    }

    /// A step that is not of one file, and how many faults it repairs.
    fn step(&mut self, what: String, count: u64) {
        self.steps.push(what);
        self.would_repair += count;
        if !self.dry_run {
            self.repaired += count;
        }
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        let did = if self.dry_run { "would repair" } else { "repaired" };
        for (label, lines) in [
            (did, &self.steps),
            ("lost", &self.lost_lines),
            ("kept", &self.saved_lines),
            ("not repaired", &self.refused),
        ] {
            // Writing into a String cannot fail.
            for line in lines.iter().take(MOST_LINES) {
                let _ = writeln!(text, "{label}: {}", out::printable(line));
            }
            if lines.len() > MOST_LINES {
                let _ = writeln!(text, "{label}: {} more of the kind", lines.len() - MOST_LINES);
            }
        }
        text
    }

    fn into_json(self, mut value: Value) -> Value {
        if let Some(fields) = value.as_object_mut() {
            fields.insert("dry_run".into(), json!(self.dry_run));
            fields.insert("repaired".into(), json!(self.repaired));
            if self.dry_run {
                fields.insert("would_repair".into(), json!(self.would_repair));
            }
            fields.insert("steps".into(), json!(self.steps));
            fields.insert("lost".into(), json!(self.lost));
            fields.insert("kept".into(), json!(self.saved));
            fields.insert("refused".into(), json!(self.refused));
        }
        value
    }
}

/// Repairs the image at `path`.
pub fn run(path: &Path, dry_run: bool, as_json: bool) -> anyhow::Result<Outcome> {
    if !dry_run {
        refuse_level(path)?;
    }
    let mut summary = RepairSummary { dry_run, ..RepairSummary::default() };
    let (text, value, damaged) = if target::is_layered(path) {
        let examined = layered_image(path, &mut summary)?;
        (report::layered_text(&examined), report::layered_json(&examined), examined.is_damaged())
    } else {
        if !dry_run && let Some(names) = other_names(path) {
            out::say(&names);
        }
        let at = Located::of(path)?;
        let refuse = |file: &HostStatus| refuse_opened(&at, file);
        let outcome = repair(&at, None, &HeaderFacts::default(), dry_run, &refuse)?;
        summary.add(None, false, &outcome);
        let found = &outcome.report;
        (report::to_text(found), report::to_json(found), found.is_damaged())
    };
    if summary.repaired > 0
        && let Some(folder) = path.parent()
        && let Some(mut daemon) = served::of_folder(folder)?
    {
        // Left out so far, perhaps.
        daemon.client.rescan()?;
    }
    if as_json {
        out::json(&summary.into_json(value))?;
    } else if dry_run {
        out::text(&format!("{text}{}nothing was changed\n", summary.to_text()))?;
    } else {
        out::text(&(summary.to_text() + &text))?;
    }
    Ok(if damaged { Outcome::Damaged } else { Outcome::Done })
}

/// Repairs an image of several files, and returns what a check says then:
/// 1. every delta is looked at, so that nothing is begun while another process has one open;
/// 2. every delta is repaired by itself, under the descriptor's lock and its own;
/// 3. the descriptor's cluster size, where all deltas agree on another one;
/// 4. where nothing is damaged any more, what a crash interrupted is finished, by the code that does it live: files that
///    no delta has are removed, the disk's size is the top's, deleted snapshots are merged.
///
/// 4 before 2 would merge clusters that are not where the BAT says.
fn layered_image(folder: &Path, summary: &mut RepairSummary) -> Result<Examined> {
    let store = match summary.dry_run {
        // The lock has a file, which may not be there yet.
        true => None,
        false => Some(Store::open(image_folder(folder)?, folder, Use::Writer, &Arc::default())?),
    };
    let before = examine(folder)?; // 1
    let image = &before.image;
    if image.descriptor().volume {
        let why = "is part of a ploop volume, whose chain goes on in another folder; this is not repaired";
        return Err(Error::at(Kind::Unsupported, folder.join(DESCRIPTOR), why));
    }
    for delta in &image.descriptor().deltas {
        let kind = image.kind(delta);
        // Missing and forbidden files are in the report.
        if !before.reports.iter().any(|(guid, _)| *guid == delta.guid) || kind == ImageKind::Raw {
            continue;
        }
        let at = image.located(delta)?;
        let below = image.descriptor().shot(delta.guid).is_some_and(|shot| shot.parent != Guid::NONE);
        match repair(&at, Some(kind), &facts(&before, delta.guid), summary.dry_run, &|_| Ok(())) {
            Ok(outcome) => summary.add(Some(&delta.file), below, &outcome), // 2
            // The header: it is in the report of the check, but why it stays as it is is not.
            Err(e) if e.kind() == Kind::Damaged => summary.refused.push(e.to_string()),
            Err(e) => return Err(e),
        }
    }
    if let Some(store) = store {
        correct_cluster(store, summary)?; // 3
    }
    let examined = examine(folder)?;
    let left = Interrupted::of(&examined);
    if summary.dry_run {
        left.add_to(summary);
    } else if !examined.is_damaged() && left.count() > 0 {
        work::carry_out(folder, &Work::Finish, &Progress::new())?; // 4
        let after = examine(folder)?;
        if Interrupted::of(&after).count() == 0 {
            left.add_to(summary);
        }
        return Ok(after);
    }
    Ok(examined)
}

/// What the descriptor and the other deltas say of the header of one.
fn facts(examined: &Examined, of: Guid) -> HeaderFacts {
    let descriptor = examined.image.descriptor();
    let others = examined.reports.iter().filter(|(guid, _)| *guid != of);
    HeaderFacts {
        version: others.filter_map(|(_, report)| report.header).map(|header| header.version).next(),
        cluster_sectors: Some(descriptor.cluster_sectors),
        // A snapshot has the size of its own time.
        disk_sectors: (of == descriptor.top).then_some(descriptor.disk_sectors),
    }
}

/// The files are right: their data lies as their headers say.
fn correct_cluster(mut store: Store, summary: &mut RepairSummary) -> Result<()> {
    let examined = examine(store.path())?;
    let guids: Vec<Guid> = store.descriptor().deltas.iter().map(|delta| delta.guid).collect();
    let mut sizes: Vec<u32> = guids
        .iter()
        .filter_map(|guid| examined.header(*guid))
        .map(|header: Header| header.cluster_sectors)
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    let old = store.descriptor().cluster_sectors;
    if let [new] = sizes[..]
        && new != old
    {
        let mut next = store.descriptor().clone();
        next.cluster_sectors = new;
        store.replace(next).and_then(Replaced::durable)?;
        summary.step(format!("{DESCRIPTOR}: Blocksize {old} becomes {new}, as all deltas have it"), 1);
    }
    Ok(())
}

/// What a crash left to do.
struct Interrupted {
    merges: Vec<String>,
    files: Vec<String>,
    /// The descriptor's size and the top's, in bytes, where they differ.
    size: Option<(u64, u64)>,
}

impl Interrupted {
    fn of(examined: &Examined) -> Interrupted {
        let image: &Layered = &examined.image;
        let descriptor = image.descriptor();
        let merges = descriptor.unfinished().into_iter().map(|guid| image.labels().name(guid)).collect();
        let top = examined.header(descriptor.top).map(|header| header.disk_sectors * SECTOR);
        let size = top.map(|top| (image.size(), top)).filter(|(old, new)| old != new);
        Interrupted { merges, files: image.left_over(), size }
    }

    fn count(&self) -> u64 {
        self.merges.len() as u64 + self.files.len() as u64 + u64::from(self.size.is_some())
    }

    fn add_to(&self, summary: &mut RepairSummary) {
        if let Some((old, new)) = self.size {
            summary
                .step(format!("{DESCRIPTOR}: Disk_size of {old} bytes becomes {new}, as the top has it"), 1);
        }
        for file in &self.files {
            summary.step(
                format!("{file}: left by an operation that did not end, and part of nothing: removed"),
                1,
            );
        }
        for name in &self.merges {
            summary.step(format!("the snapshot {name}, which was deleted, is merged into the one on it"), 1);
        }
    }
}
