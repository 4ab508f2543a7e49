//! What a check of a layered image finds: every delta by itself, under its lock, then whether they fit together.

use std::collections::HashMap;
use std::path::Path;

use crate::disk::layered::Layered;
use crate::error::{Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::header::{Header, SECTOR};
use crate::image::chain::AtRest;
use crate::image::check::{CheckReport, check_level};
use crate::image::levels::{check_raw_base, other_clusters};

/// What a check of a layered image finds: every delta by itself, then whether they fit together.
pub struct Examined {
    /// The image.
    pub image: Layered,
    /// Of every delta that is there.
    pub reports: Vec<(Guid, CheckReport)>,
    /// What contradicts, or cannot be read.
    pub faults: Vec<String>,
    /// What is odd, and harmless.
    pub notes: Vec<String>,
}

/// Looks at every delta under its lock.
pub fn examine(folder: &Path) -> Result<Examined> {
    let image = Layered::read(folder)?;
    let mut reports = Vec::new();
    let (mut faults, mut notes) = (Vec::new(), Vec::new());
    for delta in &image.descriptor().deltas {
        match image.located(delta).and_then(|at| check_level(&at, image.kind(delta))) {
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
    pub fn header(&self, guid: Guid) -> Option<Header> {
        self.reports.iter().find(|(of, _)| *of == guid)?.1.header
    }
}

/// What one delta says that contradicts another one or the descriptor.
fn agreement(
    image: &Layered,
    reports: &[(Guid, CheckReport)],
    faults: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let header = |guid: Guid| {
        let report = reports.iter().find(|(of, _)| *of == guid)?;
        report.1.header
    };
    faults.extend(raw_base(image).err().map(|e| e.to_string()));
    if let Some(why) = image.descriptor().refusal() {
        notes.push(format!("the disk {why}; it is not served"));
    }
    faults.extend(same_files(image));
    for delta in &image.descriptor().deltas {
        if let Some(why) = header(delta.guid).and_then(|header| other_clusters(image.descriptor(), &header)) {
            faults.push(format!("{}: {why}", delta.file));
        }
    }
    for shot in &image.descriptor().shots {
        if shot.marker.is_some() {
            let name = image.labels().name(shot.guid);
            notes.push(format!("the snapshot {name} is deleted, and not merged yet"));
        }
        let (Some(upper), Some(lower)) = (header(shot.guid), header(shot.parent)) else { continue };
        let (name, below) = (image.labels().name(shot.guid), image.labels().name(shot.parent));
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
    for shot in image.descriptor().shots.iter().filter(|shot| shot.guid != image.descriptor().top) {
        if header(shot.guid).is_some_and(|header| header.is_in_use()) {
            let name = image.labels().name(shot.guid);
            notes.push(format!(
                "{name} has an in-use mark: an operation did not finish; the next use finishes it"
            ));
        }
    }
    if let Some(top) = header(image.descriptor().top)
        && top.geometry().disk != image.size()
    {
        let disk = top.geometry().disk;
        notes.push(format!(
            "the descriptor says {} bytes and the top delta {disk}: the delta's is right, the next use corrects it",
            image.size()
        ));
    }
}

/// Two deltas of one file (a hard link): such a chain is not opened, since what is written to one changes the other.
fn same_files(image: &Layered) -> Vec<String> {
    let mut seen: HashMap<(u64, u64), &str> = HashMap::new();
    let mut faults = Vec::new();
    for delta in &image.descriptor().deltas {
        let Some(file) = image.identity(delta) else { continue };
        if let Some(other) = seen.insert(file, &delta.file) {
            faults.push(format!("{} is the same file as {other}", delta.file));
        }
    }
    faults
}

/// Looks whether the raw base of the live disk, if it has one, is whole and is one.
fn raw_base(image: &Layered) -> Result<()> {
    let (descriptor, labels) = (image.descriptor(), image.labels());
    // What else is wrong with these is said elsewhere.
    let Ok(chain) = image.chain(descriptor.top) else { return Ok(()) };
    let level = |index: usize| image.open(chain.get(index)?).ok().map(AtRest::into_level);
    match (chain.first(), level(0)) {
        (Some(base), Some(raw)) => check_raw_base(base.guid, &raw, level(1).as_ref(), descriptor, labels),
        _ => Ok(()),
    }
}
