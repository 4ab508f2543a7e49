//! Images with known content, and damage to them of every kind, the same for the same seed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ploopfs::format::header::{FLAG_EMPTY, HEADER_BYTES, Header, IN_USE, SECTOR, Version};

use super::Rng;

/// One kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// An entry past the end of the file.
    PastEnd,
    /// An entry that is all ones.
    AllOnes,
    /// An entry into the header or the BAT (v1 only: no v2 entry but 0 can say so where the first block is the least).
    IntoHeader,
    /// An entry between two clusters (v1 only).
    OffGrid,
    /// An entry that is another one's, too.
    Double,
    /// The file ends inside its last cluster.
    Cut,
    /// Clusters behind the last one in use, one with data.
    Tail,
    /// Data in a cluster that no entry names.
    Leak,
    /// The in-use mark of a crash.
    Mark,
    /// A format extension that is not there.
    Extension,
    /// The first data block too high.
    FirstHigh,
    /// The first data block inside the BAT.
    FirstLow,
    /// A letter of the magic.
    Magic,
    /// m_Type.
    Kind,
    /// The cluster size.
    Cluster,
    /// The number of entries, far too many.
    Entries,
    /// The disk's size, beyond the BAT.
    Disk,
    /// The disk's size, far too small.
    DiskSmall,
}

impl Damage {
    /// Every kind.
    pub const ALL: [Damage; 18] = [
        Damage::PastEnd,
        Damage::AllOnes,
        Damage::IntoHeader,
        Damage::OffGrid,
        Damage::Double,
        Damage::Cut,
        Damage::Tail,
        Damage::Leak,
        Damage::Mark,
        Damage::Extension,
        Damage::FirstHigh,
        Damage::FirstLow,
        Damage::Magic,
        Damage::Kind,
        Damage::Cluster,
        Damage::Entries,
        Damage::Disk,
        Damage::DiskSmall,
    ];

    /// True for a field of the header: of these one is enough for an image, or nothing proves anything.
    pub fn is_of_the_header(self) -> bool {
        matches!(
            self,
            Damage::FirstHigh
                | Damage::FirstLow
                | Damage::Magic
                | Damage::Kind
                | Damage::Cluster
                | Damage::Entries
                | Damage::Disk
                | Damage::DiskSmall
        )
    }

    /// True where the check says nothing worse than a leak, or nothing at all.
    pub fn is_harmless(self) -> bool {
        matches!(self, Damage::Tail | Damage::Leak | Damage::Mark | Damage::Extension)
    }
}

/// An image in a file, and what its disk holds.
#[derive(Debug)]
pub struct Patient {
    pub path: PathBuf,
    pub header: Header,
    /// Guest cluster -> file cluster, as it was made.
    pub map: BTreeMap<u64, u64>,
    /// File clusters of the file as it was made.
    pub file_clusters: u64,
    /// Guest clusters that lost their content.
    pub lost: BTreeSet<u64>,
    /// Guest clusters that have another one's content: (this, whose).
    pub shared: BTreeMap<u64, u64>,
    /// Guest cluster of which so many bytes are left.
    pub cut: Option<(u64, u64)>,
    /// Leaked file clusters with data.
    pub leaked: BTreeSet<u64>,
}

/// The content of a cluster: every sector says whose it is.
pub fn content(number: u64, cluster: u64) -> Vec<u8> {
    let sector = |index: u64| {
        let mut bytes = Rng::new(number * 100_003 + index).bytes(SECTOR as usize);
        bytes[..8].copy_from_slice(&(number + 1).to_le_bytes());
        bytes
    };
    (0..cluster / SECTOR).flat_map(sector).collect()
}

impl Patient {
    /// Makes a sound image: half of its clusters mapped, in any order, with holes between them.
    pub fn new(path: &Path, version: Version, cluster: u64, clusters: u64, rng: &mut Rng) -> Patient {
        let mut header = Header::new(version, clusters * cluster, cluster).expect("a legal size");
        header.flags &= !FLAG_EMPTY;
        let geometry = header.geometry();
        let mut places: Vec<u64> = (0..clusters).collect();
        for i in (1..places.len()).rev() {
            places.swap(i, rng.below(i as u64 + 1) as usize);
        }
        let file = File::create_new(path).expect("a new file");
        file.write_all_at(&header.encode(), 0).expect("the header");
        let mut map = BTreeMap::new();
        // The first two and the last are always there, so that there is something to damage.
        for guest in (0..clusters).filter(|guest| *guest < 2 || *guest + 1 == clusters || rng.below(2) == 0) {
            let place = places.pop().expect("as many places as clusters");
            map.insert(guest, place);
            file.write_all_at(&content(guest, cluster), geometry.cluster_position(place)).expect("data");
        }
        let file_clusters = map.values().max().map_or(0, |last| last + 1);
        file.set_len(geometry.cluster_position(file_clusters)).expect("the length");
        let mut patient = Patient {
            path: path.to_owned(),
            header,
            map,
            file_clusters,
            lost: BTreeSet::new(),
            shared: BTreeMap::new(),
            cut: None,
            leaked: BTreeSet::new(),
        };
        for (guest, place) in patient.map.clone() {
            let entry = geometry.entry(geometry.cluster_position(place)).expect("fits");
            patient.put_entry(guest, entry);
        }
        patient
    }

    /// The file, for changing it.
    pub fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).expect("the image")
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("the image")
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, at).expect("a write");
    }

    fn put_entry(&mut self, guest: u64, entry: u32) {
        self.put(HEADER_BYTES + 4 * guest, &entry.to_le_bytes());
    }

    /// A mapped guest cluster that nothing has happened to yet, if one is left.
    fn healthy(&self, rng: &mut Rng) -> Option<u64> {
        let well = |guest: &&u64| {
            !self.lost.contains(*guest)
                && !self.shared.contains_key(*guest)
                && !self.shared.values().any(|whose| whose == *guest)
                && self.cut.is_none_or(|(cut, _)| cut != **guest)
        };
        let all: Vec<u64> = self.map.keys().filter(well).copied().collect();
        (all.len() > 2).then(|| all[rng.below(all.len() as u64) as usize])
    }

    /// A file cluster that no entry ever named, before the end of the file.
    fn hole(&self, rng: &mut Rng) -> Option<u64> {
        let used: BTreeSet<u64> = self.map.values().copied().collect();
        let free: Vec<u64> =
            (0..self.file_clusters).filter(|c| !used.contains(c) && !self.leaked.contains(c)).collect();
        (!free.is_empty()).then(|| free[rng.below(free.len() as u64) as usize])
    }

    /// Does damage; false where this image cannot have it.
    pub fn hurt(&mut self, damage: Damage, rng: &mut Rng) -> bool {
        let geometry = self.header.geometry();
        let v1 = self.header.version == Version::V1;
        let per_cluster = u64::from(self.header.cluster_sectors);
        let unit = |position: u64| geometry.entry(position).expect("fits");
        let field = |patient: &Patient, at: u64, value: u32| patient.put(at, &value.to_le_bytes());
        match damage {
            Damage::PastEnd | Damage::AllOnes | Damage::IntoHeader | Damage::OffGrid => {
                if !v1 && matches!(damage, Damage::IntoHeader | Damage::OffGrid) {
                    return false;
                }
                let Some(guest) = self.healthy(rng) else { return false };
                let entry = match damage {
                    // Far enough that the tail and the copies of doubles stay below.
                    Damage::PastEnd => {
                        unit(geometry.cluster_position(self.file_clusters + 300 + rng.below(1000)))
                    }
                    Damage::AllOnes => u32::MAX,
                    Damage::IntoHeader => 1 + rng.below(geometry.first / SECTOR - 1) as u32,
                    _ => {
                        let place = geometry.cluster_position(rng.below(self.file_clusters));
                        (place / SECTOR + 1 + rng.below(per_cluster - 1)) as u32
                    }
                };
                self.put_entry(guest, entry);
                self.lost.insert(guest);
            }
            Damage::Double => {
                let (Some(guest), Some(whose)) = (self.healthy(rng), self.healthy(rng)) else { return false };
                if guest == whose {
                    return false;
                }
                self.put_entry(guest, unit(geometry.cluster_position(self.map[&whose])));
                self.shared.insert(guest, whose);
            }
            Damage::Cut => {
                let last = self.map.iter().find(|(_, place)| **place + 1 == self.file_clusters);
                let Some((guest, place)) = last.map(|(guest, place)| (*guest, *place)) else { return false };
                let at = geometry.cluster_position(place);
                let file = self.file();
                let len = file.metadata().expect("stat").len();
                let touched = self.lost.contains(&guest)
                    || self.shared.contains_key(&guest)
                    || self.shared.values().any(|whose| *whose == guest);
                if touched || len != at + geometry.cluster {
                    return false;
                }
                let left = SECTOR * (1 + rng.below(per_cluster - 1));
                file.set_len(at + left).expect("truncate");
                self.cut = Some((guest, left));
            }
            Damage::Tail => {
                if self.cut.is_some() {
                    return false;
                }
                let more = 2 + rng.below(20);
                let first = self.file_clusters;
                let file = self.file();
                file.set_len(geometry.cluster_position(first + more)).expect("extend");
                file.write_all_at(&content(1000 + first, geometry.cluster), geometry.cluster_position(first))
                    .expect("data");
                self.leaked.insert(first);
                self.file_clusters += more;
            }
            Damage::Leak => {
                let Some(place) = self.hole(rng) else { return false };
                self.put(geometry.cluster_position(place), &content(1000 + place, geometry.cluster));
                self.leaked.insert(place);
            }
            Damage::Mark => field(self, 44, IN_USE),
            Damage::Extension => self.put(56, &(self.file_clusters * per_cluster * 1000).to_le_bytes()),
            Damage::FirstHigh => {
                let blocks = 1 + rng.below(self.file_clusters + 5);
                field(self, 48, self.header.first_block + (blocks * per_cluster) as u32);
            }
            Damage::FirstLow => {
                // Of a v1 file 0 is legal.
                let low = if v1 { 1 } else { 0 };
                if v1 && self.header.first_block <= 1 {
                    return false;
                }
                field(self, 48, low);
            }
            Damage::Magic => self.put(rng.below(16), b"?"),
            Damage::Kind => field(self, 16, 3 + rng.below(1000) as u32),
            Damage::Cluster => field(self, 28, (per_cluster << (1 + rng.below(3))) as u32),
            Damage::Entries => field(self, 32, self.header.entries + (1 << (20 + rng.below(8)))),
            Damage::Disk => self.put(36, &(self.header.disk_sectors << (8 + rng.below(3))).to_le_bytes()),
            Damage::DiskSmall => self.put(36, &(per_cluster + 3).to_le_bytes()),
        }
        true
    }

    /// What the disk must read after a repair.
    pub fn wanted(&self) -> Vec<u8> {
        let cluster = self.header.geometry().cluster;
        let mut disk = vec![0; (self.header.disk_sectors * SECTOR) as usize];
        for guest in self.map.keys().filter(|guest| !self.lost.contains(guest)) {
            let whose = self.shared.get(guest).unwrap_or(guest);
            let mut bytes = content(*whose, cluster);
            if let Some((_, left)) = self.cut.filter(|(cut, _)| cut == guest) {
                bytes[left as usize..].fill(0);
            }
            let at = (guest * cluster) as usize;
            disk[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        disk
    }

    /// File clusters with data that no entry names any more: what a repair must keep.
    pub fn orphans(&self) -> BTreeMap<u64, Vec<u8>> {
        let cluster = self.header.geometry().cluster;
        let gone = self.lost.iter().chain(self.shared.keys());
        let mut orphans: BTreeMap<u64, Vec<u8>> =
            gone.map(|guest| (self.map[guest], content(*guest, cluster))).collect();
        orphans.extend(self.leaked.iter().map(|place| (*place, content(1000 + place, cluster))));
        orphans
    }
}
