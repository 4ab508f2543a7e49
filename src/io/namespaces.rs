//! The mounts of all namespaces: where else a file system is mounted, and what goes along when one place is unmounted.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use super::mounts::{Mount, all, table};
use crate::error::Result;

/// The mounts of one other namespace, as one of its processes sees them.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// A process in it.
    pub pid: u32,
    /// Its mounts.
    pub mounts: Vec<Mount>,
}

/// The tables of every mount namespace that has a process which we may look at.
#[derive(Clone, Debug)]
pub struct Everywhere {
    /// Of our own namespace.
    pub here: Vec<Mount>,
    /// Of the others.
    pub others: Vec<Namespace>,
}

impl Everywhere {
    /// Looks at all processes.
    pub fn look() -> Result<Everywhere> {
        let here = all()?;
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let own = namespace("self");
        let (mut seen, mut others) = (HashSet::new(), Vec::new());
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Processes of others cannot be looked at; those that just ended are no matter.
            let Some(theirs) = namespace(&pid.to_string()) else { continue };
            // A process in a chroot sees what lies below it only.
            let root = fs::read_link(entry.path().join("root")).unwrap_or_default();
            if Some(&theirs) == own.as_ref() || !seen.insert((theirs, root)) {
                continue;
            }
            if let Ok(text) = fs::read(entry.path().join("mountinfo")) {
                others.push(Namespace { pid, mounts: table(&text) });
            }
        }
        Ok(Everywhere { here, others })
    }

    /// All mounts of all namespaces, each with a process of its namespace; None: ours.
    pub fn all(&self) -> impl Iterator<Item = (Option<u32>, &Mount)> {
        let here = self.here.iter().map(|mount| (None, mount));
        here.chain(self.others.iter().flat_map(|ns| ns.mounts.iter().map(|mount| (Some(ns.pid), mount))))
    }

    /// The other mounts of `mount`'s file system that stay when it is unmounted: those of our namespace, and those of others
    /// that go along with none of them.
    pub fn staying(&self, mount: &Mount) -> Vec<(Option<u32>, Mount)> {
        let same = |one: &&Mount| one.is_of_file_system(mount) && one.id != mount.id;
        let bases: Vec<Base> = std::iter::once(mount)
            .chain(self.here.iter().filter(same))
            .filter_map(|base| Base::of(base, self))
            .collect();
        let own = bases.first().filter(|_| place(mount, &self.here).is_some());
        let here =
            self.here.iter().filter(same).filter(|one| !own.is_some_and(|own| own.takes(one, &self.here)));
        let mut found: Vec<(Option<u32>, Mount)> = here.map(|one| (None, one.clone())).collect();
        for ns in &self.others {
            let stays = |one: &&Mount| !bases.iter().any(|base| base.takes(one, &ns.mounts));
            found.extend(ns.mounts.iter().filter(same).filter(stays).map(|one| (Some(ns.pid), one.clone())));
        }
        found
    }
}

/// Where a mount is: the mount below it, and the path of its mount point in that file system.
fn place<'a>(one: &Mount, table: &'a [Mount]) -> Option<(&'a Mount, PathBuf)> {
    let parent = table.iter().find(|other| other.id == one.parent)?;
    Some((parent, parent.inside(&one.point)?))
}

/// A mount of our namespace, and what an umount of it takes along.
///
/// A copy goes along where it came along: where the mount that it lies on receives what happens on the one below
/// (directly, or handed on), in the same place.
struct Base {
    /// Of its mount point.
    place: PathBuf,
    /// The groups that hear of it.
    reached: HashSet<u64>,
}

impl Base {
    fn of(mount: &Mount, tables: &Everywhere) -> Option<Base> {
        let (parent, place) = place(mount, &tables.here)?;
        let mut reached: HashSet<u64> = parent.shared.into_iter().collect();
        loop {
            let known = reached.len();
            let hear = |one: &Mount| one.masters.iter().any(|group| reached.contains(group));
            let next: Vec<u64> =
                tables.all().filter(|(_, one)| hear(one)).filter_map(|(_, one)| one.shared).collect();
            reached.extend(next);
            if reached.len() == known {
                return Some(Base { place, reached });
            }
        }
    }

    fn takes(&self, one: &Mount, table: &[Mount]) -> bool {
        place(one, table).is_some_and(|(parent, place)| {
            let hears = parent.shared.iter().chain(&parent.masters).any(|group| self.reached.contains(group));
            place == self.place && hears
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::mounts::parse;

    fn of(lines: &[&str]) -> Vec<Mount> {
        lines.iter().map(|line| parse(line.as_bytes()).expect("a whole line")).collect()
    }

    #[test]
    fn a_copy_in_a_namespace_that_follows_ours_goes_along_and_a_private_one_stays() {
        let here = of(&[
            "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
            "50 1 0:57 / /mnt/v rw shared:9 - fuse.ploopfs /srv rw",
            "51 1 0:57 / /bound rw shared:9 - fuse.ploopfs /srv rw",
        ]);
        let bound_follows = of(&[
            "400 0 8:1 / / rw master:1 - ext4 /dev/sda1 rw",
            "401 400 0:57 / /bound rw master:9 - fuse.ploopfs /srv rw",
        ]);
        let follows = of(&[
            "100 0 8:1 / / rw shared:2 master:1 - ext4 /dev/sda1 rw",
            "101 100 0:57 / /mnt/v rw master:9 - fuse.ploopfs /srv rw",
        ]);
        let second_hand = of(&[
            "200 0 8:1 / / rw master:2 - ext4 /dev/sda1 rw",
            "201 200 0:57 / /mnt/v rw - fuse.ploopfs /srv rw",
        ]);
        let private =
            of(&["300 0 8:1 / / rw - ext4 /dev/sda1 rw", "301 300 0:57 / /mnt/v rw - fuse.ploopfs /srv rw"]);
        let others = [(6, bound_follows), (7, follows), (8, second_hand), (9, private)];
        let others = others.into_iter().map(|(pid, mounts)| Namespace { pid, mounts }).collect();
        let tables = Everywhere { here, others };
        let staying: Vec<_> =
            tables.staying(&tables.here[1]).into_iter().map(|(pid, mount)| (pid, mount.id)).collect();
        assert_eq!(staying, [(None, 51), (Some(9), 301)]);
    }
}
