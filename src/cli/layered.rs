//! A layered image at rest, for the commands that look: which files it has, what `info` and `check` say of it. Nothing is
//! written and, but for the check, nothing is locked.

use std::ffi::OsString;
use std::fmt::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use serde_json::json;

use crate::cli::space::{Order, Reclaimable};
use crate::cli::target::Target;
use crate::cli::{Outcome, check as check_cli, info as info_cli, out, served, size};
use crate::control::protocol::SnapshotLine;
use crate::control::snapshots;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Delta, Descriptor, Guid};
use crate::format::header::{Header, SECTOR};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::check::{Report, check_level};
use crate::image::kind::{DESCRIPTOR, ImageKind};
use crate::image::labels::Labels;
use crate::image::paths;
use crate::words::quoted;

/// The image's name: that of its folder, without .hdd.
pub fn name(folder: &Path) -> OsString {
    let name = folder.file_name().unwrap_or_default().as_bytes();
    OsString::from_vec(name.strip_suffix(b".hdd").unwrap_or(name).to_vec())
}

/// An image with a descriptor.
pub struct Layered {
    folder: PathBuf,
    pub(super) descriptor: Descriptor,
    pub(super) labels: Labels,
}

impl Layered {
    /// Reads the descriptor in `folder`.
    pub fn read(folder: &Path) -> Result<Layered> {
        let (descriptor, labels) = snapshots::read(folder)?;
        Ok(Layered { folder: folder.to_owned(), descriptor, labels })
    }

    /// Disk size in bytes, as the descriptor has it.
    pub fn size(&self) -> u64 {
        self.descriptor.disk_sectors.saturating_mul(SECTOR)
    }

    /// Space that all files take on the host, in bytes.
    pub fn allocated(&self) -> u64 {
        let paths = self.descriptor.deltas.iter().filter_map(|delta| self.path(delta).ok());
        // stat(2) counts units of 512 bytes. A file that is missing takes none.
        paths.filter_map(|path| path.symlink_metadata().ok()).map(|meta| meta.blocks() * 512).sum()
    }

    /// Where a delta's file lies. A descriptor comes from elsewhere, and must not make us read just any file: those of
    /// its folder and of the folder beside are enough.
    pub(super) fn path(&self, delta: &Delta) -> Result<PathBuf> {
        let file = Path::new(&delta.file);
        let folder = self.folder.canonicalize();
        let folder = folder.map_err(|e| Error::io(&e, &self.folder, "cannot resolve the path"))?;
        let around = folder.parent().unwrap_or(&folder);
        let mut found = folder.clone();
        for part in file.components() {
            match part {
                Component::RootDir => found = PathBuf::from("/"),
                Component::ParentDir => drop(found.pop()),
                Component::Normal(name) => found.push(name),
                Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if !found.starts_with(around) || found == folder {
            let what = format!("names the file {}, which lies outside of the images folder", delta.file);
            return Err(Error::at(Kind::NotPermitted, self.folder.join(DESCRIPTOR), what));
        }
        // The same without links on the way; what is missing is told by whoever opens it.
        let dir = paths::image_folder(&folder)?;
        match paths::resolve(dir.as_fd(), file, &self.folder.join(file), false) {
            Err(e) if e.kind() == Kind::NotPermitted => return Err(e),
            _ => {}
        }
        // As it was named on the command line, where that can be said.
        match found.strip_prefix(&folder) {
            Ok(inside) => Ok(self.folder.join(inside)),
            Err(_) => Ok(found),
        }
    }

    /// Why a mount would not serve it: a file outside of the images folder, or one that is no regular file.
    pub fn hostile(&self) -> Result<()> {
        let dir = paths::image_folder(&self.folder)?;
        paths::hostile(dir.as_fd(), &self.folder, &self.descriptor, false)
    }

    /// Files of the folder that a crashed operation made or dropped and that no delta has.
    pub(super) fn left_over(&self) -> Vec<String> {
        let there = |file: &&str| self.folder.join(file).symlink_metadata().is_ok();
        self.labels.noted(&self.descriptor).filter(there).map(str::to_owned).collect()
    }

    pub(super) fn kind(&self, delta: &Delta) -> ImageKind {
        let is_base = self.descriptor.shot(delta.guid).is_some_and(|shot| shot.parent == Guid::NONE);
        if delta.plain && is_base { ImageKind::Raw } else { ImageKind::Ploop }
    }

    fn delta(&self, guid: Guid) -> Result<&Delta> {
        let what =
            || Error::at(Kind::Damaged, self.folder.join(DESCRIPTOR), format!("has no file for {guid}"));
        self.descriptor.delta(guid).ok_or_else(what)
    }

    /// The snapshot of this name; None is the live disk.
    fn guid(&self, snapshot: Option<&str>) -> Result<Guid> {
        let Some(name) = snapshot else { return Ok(self.descriptor.top) };
        let what = format!(
            "has no snapshot {name}; these are there: ploopfs snapshot list {}",
            quoted(&self.folder)
        );
        let found = self.labels.find(&self.descriptor, name).filter(|guid| *guid != self.descriptor.top);
        found.ok_or_else(|| Error::at(Kind::NotFound, &self.folder, what))
    }

    fn chain(&self, guid: Guid) -> Result<Vec<&Delta>> {
        let chain = self.descriptor.chain(guid);
        let chain =
            chain.map_err(|e| Error::at(Kind::Damaged, self.folder.join(DESCRIPTOR), e.to_string()))?;
        chain.into_iter().map(|guid| self.delta(guid)).collect()
    }

    fn open(&self, delta: &Delta) -> Result<AtRest> {
        Candidate::open(&self.path(delta)?)?.open_as(self.kind(delta))
    }
}

/// `info` of a layered image or a snapshot of it.
pub fn info(target: &Target, as_json: bool) -> anyhow::Result<Outcome> {
    let image = Layered::read(&target.path)?;
    let live = if target.snapshot.is_none() { served::image(&target.path)? } else { None };
    let levels = image.chain(image.guid(target.snapshot.as_deref())?)?;
    let open = |delta: &Delta| Ok((delta.guid.to_string(), image.open(delta)?));
    let levels: Vec<(String, AtRest)> = levels.into_iter().map(open).collect::<Result<_>>()?;
    let top = levels.last().map(|(_, top)| top);
    let size = top.map_or(0, AtRest::size);
    let in_use = top.is_some_and(|top| matches!(&top.form, Form::Ploop(h) if h.is_in_use()));
    let allocated: u64 = levels.iter().map(|(_, level)| level.allocated).sum();
    let lines = snapshots::of(&target.path)?;
    let name = name(&target.path).to_string_lossy().into_owned();
    let orders: Vec<Order> = levels.iter().map(|(_, level)| Order::of(level)).collect::<Result<_>>()?;
    let served = served::serving(&target.path)?.is_some();
    let mut reclaimable = Reclaimable::leaks(&target.path, served);
    reclaimable.add_snapshots(&levels, &lines)?;
    let holder = match top {
        Some(top) if !served => info_cli::holder(&top.path)?,
        _ => None,
    };
    if !as_json {
        let live = live.map_or_else(|| info_cli::OFFLINE.to_owned(), |live| live.to_text());
        let holder = holder.map(|holder| info_cli::held_by(&holder)).unwrap_or_default();
        let facts = to_text(&name, target, &levels, &orders, (size, allocated), &lines);
        out::text(&(facts + &reclaimable.to_text(&target.path) + &live + &holder))?;
        return Ok(Outcome::Done);
    }
    let with_order = levels.iter().zip(&orders);
    let level_values: Vec<_> =
        with_order.map(|((_, level), order)| info_cli::level_json(level, *order)).collect();
    let mut value = json!({
        "name": name,
        "path": target.path.to_string_lossy(),
        "kind": "layered",
        "snapshot": target.snapshot,
        "size": size,
        "allocated": allocated,
        "levels": level_values,
        "snapshots": lines,
        "mode": "offline",
        "in_use": in_use,
        "openers": [],
        "reclaimable": reclaimable,
    });
    if let (Some(holder), Some(fields)) = (&holder, value.as_object_mut()) {
        fields.insert("holder".to_owned(), json!(holder.to_string()));
    }
    if let (Some(live), Some(fields)) = (&live, value.as_object_mut()) {
        fields.insert("mode".to_owned(), json!(live.mode));
        fields.insert("openers".to_owned(), json!(live.openers));
        fields.insert("reason".to_owned(), json!(live.reason));
        fields.insert("daemon".to_owned(), json!(live.pid));
        fields.insert("shown".to_owned(), json!(live.shown.to_string_lossy()));
    }
    out::json(&value)?;
    Ok(Outcome::Done)
}

fn to_text(
    name: &str,
    target: &Target,
    levels: &[(String, AtRest)],
    orders: &[Order],
    (size, allocated): (u64, u64),
    lines: &[SnapshotLine],
) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let mut row = |label: &str, value: &str| {
        let _ = writeln!(text, "{:<13}{}", format!("{label}:"), out::printable(value));
    };
    let both = |bytes: u64| format!("{} ({bytes} bytes)", size::human(bytes));
    row("name", name);
    row("folder", &target.path.to_string_lossy());
    if let Some(snapshot) = &target.snapshot {
        row("snapshot", snapshot);
    }
    row("size", &both(size));
    row("allocated", &both(allocated));
    row("kind", "layered");
    let snapshots: Vec<&str> = lines.iter().filter(|l| !l.current).map(|l| l.name.as_str()).collect();
    row("snapshots", &if snapshots.is_empty() { "none".to_owned() } else { snapshots.join(", ") });
    if let Some((_, AtRest { form: Form::Ploop(header), .. })) = levels.last() {
        row("in-use mark", &info_cli::mark(header));
    }
    for (index, ((_, level), order)) in levels.iter().zip(orders).enumerate() {
        let form = match &level.form {
            Form::Raw => "raw".to_owned(),
            Form::Ploop(header) => format!("ploop {}", header.version),
        };
        let file = level.path.file_name().unwrap_or_default().to_string_lossy();
        row(&format!("level {index}"), &format!("{file}, {form}, {}", size::human(level.allocated)));
        if matches!(level.form, Form::Ploop(_)) {
            row("fragmented", &order.to_text());
        }
    }
    text
}

/// What a check of a layered image finds: every delta by itself, then whether they fit together.
pub struct Examined {
    pub(super) image: Layered,
    /// Of every delta that is there.
    pub(super) reports: Vec<(Guid, Report)>,
    faults: Vec<String>,
    notes: Vec<String>,
}

/// Looks at every delta under its lock.
pub fn examine(folder: &Path) -> Result<Examined> {
    let image = Layered::read(folder)?;
    let mut reports = Vec::new();
    let (mut faults, mut notes) = (Vec::new(), Vec::new());
    for delta in &image.descriptor.deltas {
        match image.path(delta).and_then(|path| check_level(&path, image.kind(delta))) {
            Ok(report) => reports.push((delta.guid, report)),
            Err(e)
                if matches!(
                    e.kind(),
                    Kind::NotFound | Kind::NotPermitted | Kind::Invalid | Kind::Unsupported
                ) =>
            {
                faults.push(e.to_string());
            }
            Err(e) => return Err(e),
        }
    }
    agreement(&image, &reports, &mut faults, &mut notes);
    Ok(Examined { image, reports, faults, notes })
}

impl Examined {
    /// True when something is worse than a leak or a left-over mark.
    pub fn is_damaged(&self) -> bool {
        !self.faults.is_empty() || self.reports.iter().any(|(_, report)| report.is_damaged())
    }

    /// The header of a delta, where it can be read.
    pub(super) fn header(&self, guid: Guid) -> Option<Header> {
        self.reports.iter().find(|(of, _)| *of == guid)?.1.header
    }

    /// In JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let top = self.image.descriptor.top;
        let sum = |of: fn(&Report) -> u64| self.reports.iter().map(|(_, report)| of(report)).sum::<u64>();
        let deltas: Vec<_> = self.reports.iter().map(|(_, report)| check_cli::to_json(report)).collect();
        json!({
            "path": self.image.folder.to_string_lossy(),
            "kind": "layered",
            "errors": self.faults.len() as u64 + sum(|report| report.errors),
            "leaks": sum(|report| report.leaks),
            "in_use": self.reports.iter().any(|(guid, report)| *guid == top && report.in_use),
            "repaired": 0,
            "findings": self.faults,
            "notes": self.notes,
            "deltas": deltas,
        })
    }

    /// In words.
    pub fn to_text(&self) -> String {
        let mut text: String = self.reports.iter().map(|(_, report)| check_cli::to_text(report)).collect();
        // Writing into a String cannot fail.
        for fault in &self.faults {
            let _ = writeln!(text, "error: {}", out::printable(fault));
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {}", out::printable(note));
        }
        let verdict =
            if self.is_damaged() { "damaged; keep a copy before anything else" } else { "no errors" };
        let _ = writeln!(text, "{}: {verdict}", out::printable(&self.image.folder.to_string_lossy()));
        text
    }
}

/// `check` of a layered image.
pub fn check(folder: &Path, as_json: bool) -> anyhow::Result<Outcome> {
    let examined = examine(folder)?;
    if as_json {
        out::json(&examined.to_json())?;
    } else {
        out::text(&examined.to_text())?;
    }
    Ok(if examined.is_damaged() { Outcome::Damaged } else { Outcome::Done })
}

/// What one delta says that contradicts another one or the descriptor.
fn agreement(image: &Layered, reports: &[(Guid, Report)], faults: &mut Vec<String>, notes: &mut Vec<String>) {
    let header = |guid: Guid| {
        let report = reports.iter().find(|(of, _)| *of == guid)?;
        report.1.header
    };
    if image.descriptor.volume {
        notes.push("a ploop volume: its chain goes on in another folder; it is not served".to_owned());
    }
    for shot in &image.descriptor.shots {
        if shot.marker.is_some() {
            let name = image.labels.name(shot.guid);
            notes.push(format!("the snapshot {name} is deleted, and not merged yet"));
        }
        let (Some(upper), Some(lower)) = (header(shot.guid), header(shot.parent)) else { continue };
        let (name, below) = (image.labels.name(shot.guid), image.labels.name(shot.parent));
        if upper.version != lower.version {
            faults.push(format!(
                "{name} is of version {}, and {below} below it of {}",
                upper.version, lower.version
            ));
        }
        if upper.cluster_sectors != lower.cluster_sectors {
            let [upper, lower] = [upper, lower].map(|h| u64::from(h.cluster_sectors) * SECTOR);
            faults.push(format!("{name} has clusters of {upper} bytes, and {below} below it of {lower}"));
        }
        if lower.geometry().clusters() > upper.geometry().clusters() {
            faults.push(format!("{below} is larger than {name}, which stands on it"));
        }
    }
    for shot in image.descriptor.shots.iter().filter(|shot| shot.guid != image.descriptor.top) {
        if header(shot.guid).is_some_and(|header| header.is_in_use()) {
            let name = image.labels.name(shot.guid);
            notes.push(format!(
                "{name} has an in-use mark: an operation did not finish; the next use finishes it"
            ));
        }
    }
    if let Some(top) = header(image.descriptor.top)
        && top.geometry().disk != image.size()
    {
        let disk = top.geometry().disk;
        notes.push(format!(
            "the descriptor says {} bytes and the top delta {disk}: the delta's is right, the next use corrects it",
            image.size()
        ));
    }
}
