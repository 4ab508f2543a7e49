//! The mount of one daemon, as its keeper knows it: by the kernel's number, wherever it is moved and whatever is mounted over
//! it, and never by its path alone.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::processes;
use super::settings::Settings;
use crate::error::{Error, Kind, Result};
use crate::fuse::mount;
use crate::io::mounts::{self, Mount};
use crate::io::unmount::unmount_this;

/// How often a mount that cannot be reached is looked at. What lies over it stays for minutes or days, and a person who has
/// just taken that away looks again later than this.
const LOOK: Duration = Duration::from_secs(1);

/// The mount that a keeper makes for its daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnMount {
    /// The mounts that were on the mount point before, by number: none of them is ours.
    before: HashSet<u64>,
    /// Those of the folder that were elsewhere. They count only where nothing new is on the mount point: the number of one that
    /// goes meanwhile is given to the next mount, which may be ours.
    elsewhere: HashSet<u64>,
    /// Ours, once it is made.
    known: Option<Identity>,
}

/// The kernel's numbers of a mount and of its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    id: u64,
    device: (u32, u32),
}

impl Identity {
    /// True when `mount` shows this file system, of the folder `images`.
    fn is_of(&self, mount: &Mount, images: &Path) -> bool {
        mount.device == self.device && mount.is_ours() && mount.source == images
    }
}

/// Mounts, as the settings say, and returns the connection.
pub(super) fn make(settings: &Settings) -> Result<OwnedFd> {
    mount::mount(settings.mountpoint(), &settings.mount_options())
}

impl OwnMount {
    /// To be called before it is made.
    pub fn before(settings: &Settings) -> OwnMount {
        let (here, mut others): (Vec<Mount>, Vec<Mount>) = mounts::all()
            .unwrap_or_default()
            .into_iter()
            .partition(|mount| mount.point == settings.mountpoint());
        others.retain(|mount| mount.is_ours() && mount.source == settings.images());
        let ids = |all: Vec<Mount>| all.into_iter().map(|mount| mount.id).collect();
        OwnMount { before: ids(here), elsewhere: ids(others), known: None }
    }

    /// To be called as soon as it is made: from now on that one is meant. Returns the device number of its file system.
    pub fn is_made(&mut self, settings: &Settings) -> Result<(u32, u32)> {
        let Some(made) = self.find(settings)? else {
            let what = "was mounted, and is not in the table of mounts: it was taken away just now";
            return Err(Error::at(Kind::Io, settings.mountpoint(), what));
        };
        self.known = Some(Identity { id: made.id, device: made.device });
        Ok(made.device)
    }

    /// The mount of the folder that can only be the one that was made: on the mount point, uppermost or not, or where it was
    /// moved before anything could look.
    fn find(&self, settings: &Settings) -> Result<Option<Mount>> {
        let mut all = mounts::all()?;
        all.retain(|mount| mount.is_ours() && mount.source == settings.images());
        let (mut here, mut others): (Vec<Mount>, Vec<Mount>) =
            all.into_iter().partition(|mount| mount.point == settings.mountpoint());
        here.retain(|mount| !self.before.contains(&mount.id));
        others.retain(|mount| !self.elsewhere.contains(&mount.id) && !self.before.contains(&mount.id));
        Ok(here.pop().or_else(|| others.pop()))
    }

    /// The mount, where it is now. None: it is gone, or was never made.
    ///
    /// Both numbers are given to the next mount as soon as ours is gone, so the images folder counts as well: without it the
    /// end of one daemon, whose mount another command had just taken away, unmounted the folder that was mounted next.
    pub fn current(&self, images: &Path) -> Option<Mount> {
        let known = self.known?;
        mounts::by_id(known.id).ok()?.filter(|now| known.is_of(now, images))
    }

    /// Unmounts it. Done, too, where it is gone already.
    pub fn unmount(&self, images: &Path, detach: bool) -> Result<()> {
        self.current(images).map_or(Ok(()), |mount| unmount_this(&mount, detach))
    }

    /// What is left of it after its daemon's end, second mounts of it included.
    pub fn left(&self, settings: &Settings) -> Vec<Mount> {
        let Some(known) = self.known else {
            // Its maker may have ended before it knew.
            return self.find(settings).ok().flatten().into_iter().collect();
        };
        let mut left = mounts::all().unwrap_or_default();
        left.retain(|mount| known.is_of(mount, settings.images()));
        left
    }

    /// After the daemon's end: true while it is there all the same.
    pub fn is_dead(&self, settings: &Settings) -> bool {
        self.left(settings).iter().any(|mount| !mount.is_reached() || mount.is_dead())
    }

    /// After the daemon's end: takes away what is left of it and can be reached. Returns one that something else lies over.
    pub fn take_away(&self, settings: &Settings, mut say: impl FnMut(&str)) -> Option<Mount> {
        let (reached, covered): (Vec<Mount>, Vec<Mount>) =
            self.left(settings).into_iter().partition(Mount::is_reached);
        // Asked each: numbers of devices are used again, and what lives is another daemon's.
        for mount in reached.iter().filter(|mount| mount.is_dead()) {
            if let Err(e) = unmount_this(mount, true) {
                say(&e.to_string());
            }
        }
        covered.into_iter().next()
    }

    /// After the daemon's end: takes away all that is left. What something else lies over cannot be reached, nor be in
    /// the way, until that is gone: then it would be a dead mount, so it is waited for, and `say` is called once.
    pub fn bury(&self, settings: &Settings, mut say: impl FnMut(&str)) {
        let mut said = false;
        while let Some(covered) = self.take_away(settings, &mut say) {
            if !said {
                let point = covered.point.display();
                say(&format!(
                    "{point}: something was mounted over the dead mount, which goes when that is gone"
                ));
                said = true;
            }
            sleep(LOOK);
        }
    }

    /// Takes away the mount of a daemon whose keeper was killed, which has ended or does so within `patience`.
    pub fn take_dead_away(&self, settings: &Settings, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            // Asked before the look: a daemon that ends behind it may have left one.
            let over = processes::mounted_at(settings.mountpoint()).is_none() || Instant::now() >= deadline;
            // Should it fail, the next mount here takes it away.
            self.take_away(settings, |_| {});
            if over {
                return;
            }
            sleep(Duration::from_millis(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, UnmountFlags};

    #[test]
    fn the_next_mount_which_got_the_numbers_of_ours_is_left_alone() {
        let images = tempfile::tempdir().expect("temp folder");
        let other = tempfile::tempdir().expect("temp folder");
        let point = other.path().canonicalize().expect("there");

        rustix::mount::mount("another", &point, "tmpfs", MountFlags::empty(), None).expect("mount");
        let next = mounts::at(&point).expect("the table").expect("there");
        let known = Some(Identity { id: next.id, device: next.device });
        let ours = OwnMount { before: HashSet::new(), elsewhere: HashSet::new(), known };
        let done = ours.unmount(images.path(), true);
        let left = mounts::at(&point).expect("the table");
        if left.is_some() {
            rustix::mount::unmount(&point, UnmountFlags::DETACH).expect("detach");
        }
        done.expect("ours is gone");
        assert_eq!(left, Some(next));
    }
}
