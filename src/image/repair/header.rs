//! A header that cannot be right: what it must have said, where the rest of the file proves it.
//!
//! A field is changed only where something else that is on disk says the same as its new value: the other fields, heads
//! and cylinders, the entries of the BAT, the file's length, the descriptor of a layered image. Two answers are none.

use crate::error::{Error, Kind, Result};
use crate::format::header::{
    FLAG_CONVERSION, Geometry, HEADER_BYTES, Header, MAX_CLUSTER_SECTORS, SECTOR, TYPE, Version, chs,
};
use crate::image::chain::{Candidate, Form};
use crate::image::check::{BatEntry, Problem};
use crate::image::kind::ImageKind;
use crate::io::file::read_full;

/// Cluster sizes that ploop makes: 2^6 to 2^17 sectors.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 6..=17;
/// So many fields may be wrong where nothing but the file itself is known; more would be guessing.
const MOST_WRONG: usize = 2;

/// What is known of a file from elsewhere: the descriptor it belongs to, and the other files of that image.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeaderFacts {
    /// v1 or v2.
    pub version: Option<Version>,
    /// Cluster size in sectors.
    pub cluster_sectors: Option<u32>,
    /// Disk size in sectors.
    pub disk_sectors: Option<u64>,
}

/// A header field that is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in docs/format.md#header.
    pub name: &'static str,
    /// Byte in the file.
    pub offset: u64,
    /// What stands there.
    pub old: u64,
    /// What is put there.
    pub new: u64,
}

/// One header that the file may have had.
struct Guess {
    header: Header,
    geometry: Geometry,
    changed: Vec<Field>,
    good: u64,
    bad: u64,
}

impl Guess {
    fn differs_in(&self, name: &str) -> bool {
        self.changed.iter().any(|field| field.name == name)
    }

    /// More of the BAT speaks for it than against it; or there is nothing in the BAT.
    fn fits(&self) -> bool {
        self.bad <= self.good
    }
}

/// The header of the image, and the fields in which it differs from what stands in the file. Err(Damaged): nothing
/// proves what it should be.
pub(super) fn settle(candidate: &Candidate, facts: &HeaderFacts) -> Result<(Header, Vec<Field>)> {
    let given = match candidate.form(ImageKind::Ploop) {
        // v1 positions depend on the first data block: only the entries say whether it is right.
        Ok(Form::Ploop(header)) if is_usual(&header) && header.version == Version::V2 => {
            return Ok((header, Vec::new()));
        }
        Ok(Form::Ploop(header)) => Ok(header),
        Ok(Form::Raw) => return Err(refused(candidate, "it is a raw file")),
        Err(bad) => Err(bad),
    };
    let Some((magic, kind, raw)) = Header::unchecked(&candidate.head) else {
        return Err(refused(candidate, "the file is shorter than a header (64 bytes)"));
    };
    let mut guesses = guess(candidate, magic, kind, &raw, facts)?;
    score(candidate, &mut guesses)?;
    match given {
        Ok(header) => Ok(better(header, guesses, &raw, facts)),
        Err(_) if raw.flags != u32::MAX && raw.flags & FLAG_CONVERSION != 0 => {
            Err(refused(candidate, "a version conversion was interrupted; finish it with ploop"))
        }
        Err(bad) => {
            guesses.retain(|guess| guess.fits() && proven(guess, &raw, facts));
            guesses.sort_by_key(|guess| (guess.changed.len(), guess.bad));
            let mut best = guesses.into_iter();
            let (first, second) = (best.next(), best.next());
            let rank = |guess: &Guess| (guess.changed.len(), guess.bad);
            match (first, second) {
                (Some(first), Some(second)) if rank(&first) == rank(&second) => {
                    let why = format!("{bad}; more than one header would fit what is in the file");
                    Err(refused(candidate, &why))
                }
                (Some(first), _) => Ok((first.header, first.changed)),
                (None, _) => {
                    let why = format!("{bad}; nothing in the file proves what should stand there");
                    Err(refused(candidate, &why))
                }
            }
        }
    }
}

fn refused(candidate: &Candidate, why: &str) -> Error {
    let what = format!(
        "cannot be repaired: {why}. Nothing was changed. A header that was kept can be put back: ploopfs meta restore"
    );
    Error::at(Kind::Damaged, &candidate.path, what)
}

/// True for what every tool writes: no more entries than the disk needs, and the data right behind them.
fn is_usual(header: &Header) -> bool {
    let geometry = header.geometry();
    let tight = geometry.bat_end().next_multiple_of(geometry.cluster);
    geometry.entries == geometry.clusters()
        && (geometry.first == header.least_first_block() || geometry.first == tight)
}

/// The header stands as it is, unless another one, off by one field, makes sense of what the BAT says.
fn better(given: Header, mut guesses: Vec<Guess>, raw: &Header, facts: &HeaderFacts) -> (Header, Vec<Field>) {
    let as_it_is = guesses.iter().find(|guess| guess.changed.is_empty()).map_or(0, |guess| guess.bad);
    let all = u64::from(given.entries) * u64::from(given.cluster_sectors);
    guesses.retain(|guess| match &guess.changed[..] {
        // v2 positions do not depend on it. Too low a first block costs nothing.
        [field] if field.name == FIRST.0 && given.version == Version::V2 => {
            guess.bad < as_it_is && is_usual(&guess.header)
        }
        // Too large a disk costs nothing; too small a one takes what the entries behind its end name.
        [field] if field.name == DISK.0 => {
            guess.bad < as_it_is
                && (proven(guess, raw, facts)
                    || field.new == all && !says(raw.heads, raw.cylinders, given.disk_sectors))
        }
        [_] => guess.fits() && guess.bad * 2 < as_it_is && proven(guess, raw, facts),
        _ => false,
    });
    guesses.sort_by_key(|guess| guess.bad);
    match &guesses[..] {
        [first, second, ..] if first.bad == second.bad => (given, Vec::new()),
        [first, ..] => (first.header, first.changed.clone()),
        [] => (given, Vec::new()),
    }
}

const MAGIC: (&str, u64) = ("m_Sig", 0);
const KIND: (&str, u64) = ("m_Type", 16);
const CLUSTER: (&str, u64) = ("m_Sectors", 28);
const ENTRIES: (&str, u64) = ("m_Size", 32);
const DISK: (&str, u64) = ("m_SizeInSectors", 36);
const FIRST: (&str, u64) = ("m_FirstBlockOffset", 48);

/// Every header that differs from what stands in the file in fields whose value can be computed from others.
fn guess(
    candidate: &Candidate,
    magic: Option<Version>,
    kind: u32,
    raw: &Header,
    facts: &HeaderFacts,
) -> Result<Vec<Guess>> {
    let versions = match magic.or(facts.version) {
        Some(version) => vec![version],
        None => vec![Version::V2, Version::V1],
    };
    let mut clusters = vec![raw.cluster_sectors];
    clusters.extend(facts.cluster_sectors);
    clusters.extend(CLUSTER_BITS.map(|bits| 1 << bits));
    clusters.retain(|cluster| (1..=MAX_CLUSTER_SECTORS).contains(cluster));
    distinct(&mut clusters);
    let first_entry = first_entry(candidate)?;
    let mut guesses: Vec<Guess> = Vec::new();
    for version in versions {
        for cluster in &clusters {
            let mut disks = vec![raw.disk_sectors, u64::from(raw.entries) * u64::from(*cluster)];
            disks.extend(facts.disk_sectors);
            distinct(&mut disks);
            for disk_sectors in disks {
                let needed = disk_sectors.div_ceil(u64::from(*cluster));
                let mut counts = vec![raw.entries];
                counts.extend(u32::try_from(needed).ok());
                distinct(&mut counts);
                for entries in counts {
                    let base = Header { version, cluster_sectors: *cluster, disk_sectors, entries, ..*raw };
                    for first_block in first_blocks(&base, first_entry) {
                        let mut header = Header { first_block, ..base };
                        let Ok(geometry) = Header::parse(&header.encode()).map(|header| header.geometry())
                        else {
                            continue;
                        };
                        let changed = changes(magic, kind, raw, &header);
                        if changed.iter().any(|field| field.name == DISK.0) {
                            (header.heads, header.cylinders) = chs(disk_sectors);
                        }
                        guesses.push(Guess { header, geometry, changed, good: 0, bad: 0 });
                    }
                }
            }
        }
    }
    Ok(guesses)
}

/// The field as it is, and where a writer would have put the data: behind the BAT, on the next cluster; in a v1 file on
/// the grid that its first entry lies on.
fn first_blocks(header: &Header, first_entry: Option<u32>) -> Vec<u32> {
    // Not by its geometry: nothing is known of these numbers, and a disk of 2^64 sectors has no size in bytes.
    let cluster = u64::from(header.cluster_sectors) * SECTOR;
    let bat_end = HEADER_BYTES + 4 * u64::from(header.entries);
    let usual = match (header.version, first_entry) {
        (Version::V1, Some(entry)) => {
            let least = bat_end.next_multiple_of(SECTOR);
            let on_grid = u64::from(entry) * SECTOR % cluster;
            least + (on_grid + cluster - least % cluster) % cluster
        }
        _ => bat_end.next_multiple_of(cluster),
    };
    let mut blocks = vec![header.first_block];
    blocks.extend(u32::try_from(usual / SECTOR).ok());
    distinct(&mut blocks);
    blocks
}

/// The first entry of the BAT that is not 0; of its first MiB, since a v1 file whose header is damaged and which has
/// nothing there is not worth more.
fn first_entry(candidate: &Candidate) -> Result<Option<u32>> {
    let mut bytes = vec![0; 1 << 20];
    let got = read(candidate, &mut bytes, HEADER_BYTES)?;
    let entries = bytes[..got].chunks_exact(4).map(|e| u32::from_le_bytes([e[0], e[1], e[2], e[3]]));
    Ok(entries.into_iter().find(|entry| *entry != 0))
}

fn distinct<T: PartialEq + Copy>(values: &mut Vec<T>) {
    let mut seen: Vec<T> = Vec::new();
    values.retain(|value| {
        let new = !seen.contains(value);
        seen.push(*value);
        new
    });
}

fn changes(magic: Option<Version>, kind: u32, raw: &Header, to: &Header) -> Vec<Field> {
    let magic_of = |version| match version {
        Some(Version::V1) => 1,
        Some(Version::V2) => 2,
        None => 0,
    };
    let disk = if to.version == Version::V1 { raw.disk_sectors & 0xFFFF_FFFF } else { raw.disk_sectors };
    let fields = [
        (MAGIC, magic_of(magic), magic_of(Some(to.version))),
        (KIND, kind.into(), TYPE.into()),
        (CLUSTER, raw.cluster_sectors.into(), to.cluster_sectors.into()),
        (ENTRIES, raw.entries.into(), to.entries.into()),
        (DISK, disk, to.disk_sectors),
        (FIRST, raw.first_block.into(), to.first_block.into()),
    ];
    let changed = fields.into_iter().filter(|(_, old, new)| old != new);
    changed.map(|((name, offset), old, new)| Field { name, offset, old, new }).collect()
}

/// True when something else on disk says the same as every field that is changed.
fn proven(guess: &Guess, raw: &Header, facts: &HeaderFacts) -> bool {
    let header = &guess.header;
    let everything =
        facts.version.is_some() && facts.cluster_sectors.is_some() && facts.disk_sectors.is_some();
    if guess.changed.len() > MOST_WRONG && !everything {
        return false;
    }
    // Nothing of what is not computed from others may be odd where others are computed from it.
    if !is_usual(header) {
        return false;
    }
    let disk_known = facts.disk_sectors == Some(header.disk_sectors)
        || says(raw.heads, raw.cylinders, header.disk_sectors);
    let others = |names: &[&str]| names.iter().all(|name| !guess.differs_in(name));
    guess.changed.iter().all(|field| match field.name {
        name if name == MAGIC.0 => facts.version == Some(header.version) || guess.good > 0,
        name if name == CLUSTER.0 => {
            facts.cluster_sectors == Some(header.cluster_sectors) || others(&[ENTRIES.0, DISK.0, FIRST.0])
        }
        name if name == ENTRIES.0 => disk_known,
        name if name == DISK.0 => disk_known,
        // Legal in one way only, or computed from what is proven.
        _ => true,
    })
}

/// True when heads and cylinders are those that ploop, or QEMU, computes for a disk of this size.
fn says(heads: u32, cylinders: u32, disk_sectors: u64) -> bool {
    let qemu = (16, u32::try_from(disk_sectors / 16 / 32).unwrap_or(u32::MAX));
    disk_sectors > 0 && ((heads, cylinders) == chs(disk_sectors) || (heads, cylinders) == qemu)
}

/// Counts for each guess how many entries of the BAT it makes sense of. One pass over the file.
fn score(candidate: &Candidate, guesses: &mut Vec<Guess>) -> Result<()> {
    let len = candidate.status.len;
    guesses.retain(|guess| guess.geometry.bat_end() <= len);
    let end = guesses.iter().map(|guess| guess.geometry.bat_end()).max().unwrap_or(0);
    let mut piece = vec![0; 256 << 10];
    let mut at = HEADER_BYTES;
    while at < end {
        let want = (end - at).min(piece.len() as u64) as usize;
        let got = read(candidate, &mut piece[..want], at)?;
        for (index, entry) in piece[..got].chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            if value == 0 {
                continue;
            }
            let entry = BatEntry { cluster: (at - HEADER_BYTES) / 4 + index as u64, value };
            for guess in guesses.iter_mut().filter(|guess| entry.cluster < guess.geometry.entries) {
                match entry.judge(&guess.geometry, len) {
                    Ok(_) | Err((Problem::Cut, _)) => guess.good += 1,
                    Err(_) => guess.bad += 1,
                }
            }
        }
        at += want as u64;
    }
    Ok(())
}

fn read(candidate: &Candidate, buf: &mut [u8], at: u64) -> Result<usize> {
    read_full(&*candidate.file, buf, at)
        .map_err(|e| Error::io(&e, &candidate.path, format!("cannot read byte {at}")))
}
