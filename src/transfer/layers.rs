//! A file of another program's format and all it stands on, as an image with snapshots: each file of the backing chain is
//! one level, which holds what that file allocates.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::FlatDisk;
use super::foreign::Foreign;
use super::import::GRAIN;
use super::pieces::{copy, runs};
use super::qemu::{self, Info, Reach};
use super::{filled, writer};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Guid, MAX_CHAIN};
use crate::format::header::{Header, Version};
use crate::format::stream::PIECE;
use crate::image::assemble::Assembly;
use crate::image::create::{self, DEFAULT_CLUSTER, MIN_CLUSTER, check_cluster};
use crate::image::labels::{Labels, MAX_LABEL};
use crate::progress::Progress;
use crate::vdisk::Image;
use crate::words::quoted;

/// Bytes that are discarded between two looks at the progress.
const STRIDE: u64 = 1 << 30;
/// Most clusters that are chosen unasked: a map of 16 MiB for each level, 256 GiB of disk in clusters of 64 KiB.
const MANY_CLUSTERS: u64 = 4 << 20;
/// Endings that say no more than that a file is a disk.
const SUFFIXES: [&str; 9] = ["qcow2", "qcow", "qed", "raw", "img", "vmdk", "vhdx", "vhd", "vdi"];

/// One file of a chain.
#[derive(Clone, Debug)]
pub struct ChainLink {
    /// Where it is.
    pub path: PathBuf,
    /// Its format, in QEMU's word.
    pub format: String,
    /// What is known of it.
    pub info: Info,
}

/// The files on which `file` of `format` stands, the deepest first and itself last. `data`: files that hold the data of
/// another may be read, too.
pub fn chain(file: &Path, format: &str, data: bool) -> Result<Vec<ChainLink>> {
    let mut links: Vec<ChainLink> = Vec::new();
    let mut next = Some((file.to_owned(), format.to_owned()));
    while let Some((path, format)) = next {
        if links.len() == MAX_CHAIN {
            let what = format!("stands on more than {} files", MAX_CHAIN - 1);
            return Err(Error::at(Kind::Unsupported, file, what));
        }
        let info = qemu::info(&path, &format)?;
        if let Some(other) = info.data.as_ref().filter(|_| !data) {
            let what = format!(
                "names the file {other}, and is not whole without it; --with-backing reads that, too, if you trust it"
            );
            return Err(Error::at(Kind::NotPermitted, &path, what));
        }
        if info.size == 0 {
            return Err(Error::at(Kind::Unsupported, &path, "is empty: there is no disk in it"));
        }
        let link = ChainLink { path, format, info };
        next = below(&link)?;
        if let Some((lower, _)) = &next {
            let same = |link: &ChainLink| same(&link.path, lower);
            if same(&link) || links.iter().any(same) {
                return Err(Error::at(Kind::Damaged, &link.path, "stands, by way of others, on itself"));
            }
        }
        links.push(link);
    }
    links.reverse();
    for pair in links.windows(2) {
        if let [lower, upper] = pair
            && lower.info.size > upper.info.size
        {
            let what = format!(
                "has a disk of {} bytes and stands on {} with one of {}; the levels of an image can grow, not shrink: \
                 make it larger (qemu-img resize), or take the disk alone (--with-backing without --layers)",
                upper.info.size,
                lower.path.display(),
                lower.info.size
            );
            return Err(Error::at(Kind::Unsupported, &upper.path, what));
        }
    }
    Ok(links)
}

/// The path and the format of the file below.
fn below(link: &ChainLink) -> Result<Option<(PathBuf, String)>> {
    let Some(backing) = &link.info.backing else { return Ok(None) };
    let refuse = |kind, what: String| Err(Error::at(kind, &link.path, what));
    let path = PathBuf::from(&backing.path);
    if !path.is_absolute() {
        return refuse(Kind::Unsupported, format!("stands on {}, which is no file here", backing.name));
    }
    let format = match &backing.format {
        Some(format) => format.clone(),
        // A VMDK's parents are of its own sort; a QED says where what is below is raw.
        None if ["vmdk", "qed"].contains(&link.format.as_str()) => link.format.clone(),
        // It has no room for that.
        None if link.format == "qcow" => {
            let what = format!(
                "cannot say of which format the file {} is on which it stands; take the disk alone (--with-backing \
                 without --layers)",
                backing.name
            );
            return refuse(Kind::Unsupported, what);
        }
        // The guest of a raw disk writes its first bytes: what those look like must not decide which files are read.
        None => {
            let what = format!(
                "does not say of which format the file {} is on which it stands; write that into it: qemu-img rebase \
                 -u -b {} -F FORMAT {}",
                backing.name,
                quoted(&backing.name),
                quoted(&link.path)
            );
            return refuse(Kind::Unsupported, what);
        }
    };
    if let Err(e) = path.metadata() {
        let why = crate::error::words(&e);
        let what = format!("stands on {}, without which it is not whole: {why}", path.display());
        return refuse(
            if e.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Io },
            what,
        );
    }
    Ok(Some((path, format)))
}

/// One file under two names, perhaps.
fn same(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b)
}

/// The cluster size that the image gets unasked, in bytes: the smallest unit by which a file of the chain maps, so that no
/// level holds more than its file, but one of which a large disk does not have too many.
pub fn cluster(chain: &[ChainLink]) -> u64 {
    let smallest = chain.iter().filter_map(|link| link.info.cluster).min().unwrap_or(DEFAULT_CLUSTER);
    let size = chain.last().map_or(0, |link| link.info.size);
    let mut cluster = smallest.next_power_of_two().clamp(MIN_CLUSTER, create::MAX_CLUSTER);
    while cluster < DEFAULT_CLUSTER && size / cluster > MANY_CLUSTERS {
        cluster *= 2;
    }
    cluster
}

/// What the snapshots are called, the oldest first: each as the file that holds its state.
pub fn names(chain: &[ChainLink]) -> Vec<String> {
    let below = chain.iter().take(chain.len().saturating_sub(1));
    let mut names: Vec<String> = Vec::new();
    for link in below {
        let file = link.path.file_name().unwrap_or_default().to_string_lossy();
        let wanted = label(&file);
        let mut name = wanted.clone();
        let mut number = 2;
        while names.contains(&name) {
            let suffix = format!("-{number}");
            name = wanted[..wanted.len().min(MAX_LABEL - suffix.len())].to_owned() + &suffix;
            number += 1;
        }
        names.push(name);
    }
    names
}

/// A file's name as that of a snapshot.
fn label(file: &str) -> String {
    let stem = match file.rsplit_once('.') {
        Some((stem, suffix)) if SUFFIXES.contains(&suffix.to_ascii_lowercase().as_str()) => stem,
        _ => file,
    };
    let legal = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let text: String = stem.trim_start_matches('.').chars().map(legal).take(MAX_LABEL).collect();
    // Nothing is left of it, or it looks like an identity.
    if Labels::default().check(&text).is_ok() { text } else { "layer".to_owned() }
}

/// Makes the image `to`, a folder, of a chain of two files at least; returns its disk's size in bytes. The last file
/// becomes the live disk, each of the others a snapshot of this name.
///
/// 1. for each file, the deepest first, a level in a dot-folder, filled over the levels below and durable; 2. the rest, and
///    the name ([`Assembly::finish`]). Until 2 there is no image.
pub fn import(
    chain: &[ChainLink],
    names: &[String],
    cluster: u64,
    to: &Path,
    progress: &Progress,
) -> Result<u64> {
    let invalid = |what: String| Error::at(Kind::Invalid, to, what);
    check_cluster(cluster).map_err(invalid)?;
    let mut headers = Vec::new();
    for link in chain {
        // As large as it is there: what stands at a disk's end is looked for at its end.
        let header = Header::new(Version::V2, link.info.size, cluster);
        headers.push(header.map_err(|bad| invalid(bad.to_string()))?);
    }
    progress.set_total(chain.iter().map(|link| link.info.size).sum());
    let mut new = Assembly::begin(to)?;
    // 1.
    let mut levels = Vec::new();
    for (link, header) in chain.iter().zip(&headers) {
        let layer = Foreign::open(&link.path, &link.format, &link.info, Reach::Own, progress)?;
        levels.push(new.delta(header)?);
        let image = writer(&link.path.to_string_lossy(), levels.clone())?;
        filled(&image, |image| pour(&layer, image, levels.len() == 1, progress))?;
    }
    // 2.
    let snapshots: Vec<_> = names.iter().map(|name| (Guid::random(), Some(name.clone()), None)).collect();
    new.finish(&snapshots)?;
    Ok(headers.last().map_or(0, |header| header.geometry().disk))
}

/// Puts what a file of the chain allocates into the top of `image`. `base`: nothing lies below, so that a zero need not be
/// written.
fn pour(layer: &Foreign, image: &Arc<Image>, base: bool, progress: &Progress) -> Result<()> {
    let size = layer.size();
    if !base {
        layer.zeroes().try_for_each(|zero| {
            // The disk ends with a whole sector.
            let end = if zero.end >= size { image.size() } else { zero.end };
            let strides = (zero.begin..end).step_by(STRIDE as usize);
            strides.map(|at| (at, STRIDE.min(end - at))).try_for_each(|(at, len)| {
                progress.check()?;
                image.discard_at(at, len)
            })
        })?;
    }
    // Zeroes over data are worth looking for only where they make a whole cluster.
    let grain = if base { GRAIN } else { PIECE.min(image.cluster() as usize) };
    copy(layer, &[(0, size)], progress, &|offset, bytes| {
        for (range, zero) in runs(bytes, grain) {
            let at = offset + range.start as u64;
            match zero {
                true if base => {}
                true => image.discard_at(at, range.len() as u64)?,
                false => image.write_at(at, &bytes[range])?,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain_of(files: &[&str]) -> Vec<ChainLink> {
        let link =
            |file: &&str| ChainLink { path: file.into(), format: "qcow2".into(), info: Info::default() };
        files.iter().map(link).collect()
    }

    #[test]
    fn snapshots_are_called_like_the_files_and_two_alike_are_numbered() {
        let files =
            ["/a/vm1.qcow2", "/a/vm1.snap1", "/b/vm1.img", "/c/VM 1 \u{e4}.IMG", "/c/.hidden.raw", "/top"];
        let names = names(&chain_of(&files));
        assert_eq!(names, ["vm1", "vm1.snap1", "vm1-2", "VM-1--", "hidden"]);
    }

    #[test]
    fn a_name_that_no_snapshot_can_have_is_replaced_and_a_long_one_is_cut() {
        let (guid, long) = ("5fbaabe3-6958-40ff-92a7-860e329aab41.qcow2", "x".repeat(90));
        let names = names(&chain_of(&[guid, ".raw", "", &long, &long, "/top"]));
        assert_eq!(names[..3], ["layer", "layer-2", "layer-3"]);
        assert_eq!(names[3..], ["x".repeat(64), "x".repeat(62) + "-2"]);
        let labels = Labels::default();
        names.iter().for_each(|name| labels.check(name).expect("a snapshot can have it"));
    }

    #[test]
    fn clusters_are_those_of_the_chain_unless_there_were_too_many() {
        let with = |clusters: &[Option<u64>], size| {
            let info = |cluster: &Option<u64>| Info { cluster: *cluster, size, ..Info::default() };
            let link = |info| ChainLink { path: PathBuf::new(), format: String::new(), info };
            cluster(&clusters.iter().map(info).map(link).collect::<Vec<_>>())
        };
        assert_eq!(with(&[None, Some(65536)], 1 << 30), 65536);
        assert_eq!(with(&[Some(2 << 20), Some(4 << 20)], 1 << 30), 2 << 20);
        assert_eq!(with(&[Some(512), Some(65536)], 1 << 30), 32768);
        assert_eq!(with(&[None, None], 1 << 30), 1 << 20);
        assert_eq!(with(&[Some(65536)], 256 << 30), 65536);
        assert_eq!(with(&[Some(65536)], 1 << 40), 256 << 10);
        assert_eq!(with(&[Some(65536)], 1 << 50), 1 << 20);
    }
}
