//! What a new single file is to be, and what goes into it: header, BAT, and space where it is taken at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use crate::format::header::{BadField, FLAG_EMPTY, HEADER_BYTES, Header, SECTOR, Version};
use crate::image::kind::ImageKind;

/// ploop's default cluster in bytes, and QEMU's.
pub const DEFAULT_CLUSTER: u64 = 1 << 20;
/// Smallest cluster in bytes that the ploop tool takes.
pub const MIN_CLUSTER: u64 = 32 << 10;
/// Largest cluster in bytes that the ploop tool takes.
pub const MAX_CLUSTER: u64 = 64 << 20;

/// Smallest cluster in bytes of an image that many clones will be made of. A clone's first write to a cluster copies all of it:
/// 4 MiB of scattered writes took 665 MiB of ext4 with clusters of 1M, 62 with 64K, 31 with 32K (docs/speed.md#clones). Each
/// halving also doubles the map that every clone has; 64K is qcow2's.
const TEMPLATE_CLUSTER: u64 = 64 << 10;
/// So many bytes the map of such an image has at most, unless clusters are the default's: every clone takes as much.
const TEMPLATE_MAP: u64 = 4 << 20;

/// The cluster in bytes for an image of `size` bytes that many clones will be made of: 64K up to 64 GiB, then so large that
/// the map stays small, up to the default.
pub fn template_cluster(size: u64) -> u64 {
    // An entry has 4 bytes.
    size.div_ceil(TEMPLATE_MAP / 4).next_power_of_two().clamp(TEMPLATE_CLUSTER, DEFAULT_CLUSTER)
}

/// Whether new images may have this cluster size in bytes; if not, why.
pub fn check_cluster(cluster: u64) -> std::result::Result<(), String> {
    if cluster.is_power_of_two() && (MIN_CLUSTER..=MAX_CLUSTER).contains(&cluster) {
        return Ok(());
    }
    Err(format!("the cluster size must be a power of two from 32K to 64M, not {cluster}"))
}

/// What to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreatePlan {
    /// Disk size in bytes; rounded up to a cluster (ploop) or a sector (raw).
    pub size: u64,
    /// The disk exists already: its size is rounded up to a sector only, and the last cluster may be a part. What stands at
    /// a disk's end (GPT's second header, labels of md and ZFS) is looked for at the end.
    pub exact: bool,
    /// ploop or raw; None: as the name ends, else ploop.
    pub kind: Option<ImageKind>,
    /// Cluster size in bytes; None: [`DEFAULT_CLUSTER`]. A raw image has none.
    pub cluster: Option<u64>,
    /// Take all host space now.
    pub preallocate: bool,
}

impl CreatePlan {
    /// A thin ploop image with default clusters, as `mount --create NAME=SIZE` makes it. `size` in bytes.
    pub fn thin(size: u64) -> CreatePlan {
        CreatePlan { size, exact: false, kind: None, cluster: None, preallocate: false }
    }

    /// The same for a copy of a disk of `size` bytes.
    pub fn copy_of(size: u64) -> CreatePlan {
        CreatePlan { exact: true, ..CreatePlan::thin(size) }
    }
}

/// What goes into the new file.
pub(super) enum Shape {
    Ploop { header: Header, preallocate: bool },
    Raw { size: u64, preallocate: bool },
}

impl Shape {
    pub(super) fn of(plan: &CreatePlan, kind: ImageKind) -> std::result::Result<Shape, String> {
        if plan.size == 0 {
            return Err("the size must be at least 1 byte".into());
        }
        let too_large = || "the size is too large".to_string();
        let shape = match kind {
            ImageKind::Raw => {
                if plan.cluster.is_some() {
                    return Err("a raw image has no clusters; leave the cluster size out".into());
                }
                let size = plan.size.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
                Shape::Raw { size, preallocate: plan.preallocate }
            }
            ImageKind::Ploop => {
                let cluster = plan.cluster.unwrap_or(DEFAULT_CLUSTER);
                check_cluster(cluster)?;
                let unit = if plan.exact { SECTOR } else { cluster };
                let size = plan.size.checked_next_multiple_of(unit).ok_or_else(too_large)?;
                let mut header = Header::new(Version::V2, size, cluster)
                    .map_err(|BadField { reason, .. }| format!("the size is too large: {reason}"))?;
                if plan.preallocate {
                    // The flag must be exact for `ploop check -f`: set only while the BAT is empty.
                    header.flags &= !FLAG_EMPTY;
                }
                Shape::Ploop { header, preallocate: plan.preallocate }
            }
        };
        // off_t is signed.
        if i64::try_from(shape.file_len()).is_err() { Err(too_large()) } else { Ok(shape) }
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Shape::Ploop { header, .. } => header.disk_sectors * SECTOR,
            Shape::Raw { size, .. } => *size,
        }
    }

    pub(super) fn file_len(&self) -> u64 {
        match self {
            Shape::Ploop { header, preallocate } => {
                let geometry = header.geometry();
                geometry.first + if *preallocate { geometry.clusters() * geometry.cluster } else { 0 }
            }
            Shape::Raw { size, .. } => *size,
        }
    }

    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        file.set_len(self.file_len())?;
        match self {
            Shape::Raw { size, preallocate } => {
                if *preallocate {
                    reserve(file, *size)?;
                }
            }
            Shape::Ploop { header, preallocate } => {
                let geometry = header.geometry();
                if *preallocate {
                    reserve(file, self.file_len())?;
                    write_sequential_bat(file, header)?;
                } else {
                    // The BAT never runs out of space later (R2).
                    reserve(file, geometry.first)?;
                }
                file.write_all_at(&header.encode(), 0)?;
            }
        }
        Ok(())
    }
}

/// Takes host space for the first `len` bytes; where the host cannot reserve, zeroes are written.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    // Large files in steps, so that a signal is not held up for the whole of it on slow file systems.
    const STEP: u64 = 1 << 30;
    let mut at = 0;
    while at < len {
        let step = (len - at).min(STEP);
        match rustix::fs::fallocate(file, FallocateFlags::empty(), at, step) {
            Ok(()) => at += step,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return zero_out(file, at, len),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn zero_out(file: &File, from: u64, to: u64) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let step = (to - at).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..step as usize], at)?;
        at += step;
    }
    Ok(())
}

/// Fills a new delta: header, and an empty BAT whose space is taken (R2).
pub(super) fn write_empty(file: &File, header: &Header) -> io::Result<()> {
    Shape::Ploop { header: *header, preallocate: false }.write(file)
}

/// Guest cluster i in file cluster i behind the header, as ploop's "preallocated" images have it.
fn write_sequential_bat(file: &File, header: &Header) -> io::Result<()> {
    const PIECE: u64 = 64 << 10;
    let geometry = header.geometry();
    let mut next = 0;
    while next < geometry.clusters() {
        let end = (next + PIECE).min(geometry.clusters());
        let mut piece = Vec::with_capacity((end - next) as usize * 4);
        for cluster in next..end {
            let entry = geometry.entry(geometry.cluster_position(cluster));
            // A disk of the format's largest size, full: the last positions have no number.
            let entry = entry.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
            piece.extend(entry.to_le_bytes());
        }
        file.write_all_at(&piece, HEADER_BYTES + next * 4)?;
        next = end;
    }
    Ok(())
}
