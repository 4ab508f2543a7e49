//! The mount of one daemon, as its keeper knows it: by the kernel's number, wherever it is moved and whatever is mounted over
//! it, and never by its path alone.

use std::collections::HashSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::settings::Settings;
use crate::error::Result;
use crate::io::mounts::{self, Mount};
use crate::io::unmount::{unmount, unmount_this};

/// How often a mount that cannot be reached is looked at. What lies over it stays for minutes or days, and a person who has
/// just taken that away looks again later than this.
const LOOK: Duration = Duration::from_secs(1);

/// The mount of the daemon that a keeper has started, or is about to start.
pub struct OwnMount {
    /// The mounts that were on the mount point before the daemon, by number: none of them is its own. Not those elsewhere: the
    /// number of one that goes meanwhile is given to the next mount, which may be ours.
    before: HashSet<u64>,
    /// The daemon's, once it said that it works.
    known: Option<Mount>,
}

impl OwnMount {
    /// To be called before the daemon is started.
    pub fn before(settings: &Settings) -> OwnMount {
        let mut before = mounts::all().unwrap_or_default();
        before.retain(|mount| mount.point == settings.mountpoint());
        OwnMount { before: before.into_iter().map(|mount| mount.id).collect(), known: None }
    }

    /// The daemon says that its mount works: from now on that one is meant.
    pub fn works(&mut self, settings: &Settings) {
        self.known = self.made(settings);
    }

    /// True once the mount worked.
    pub fn has_worked(&self) -> bool {
        self.known.is_some()
    }

    /// What lies uppermost on the mount point, if it can only be the mount of the daemon that was started.
    fn made(&self, settings: &Settings) -> Option<Mount> {
        let found = mounts::at(settings.mountpoint()).ok()??;
        let fits = found.is_ours() && found.source == settings.images() && !self.before.contains(&found.id);
        fits.then_some(found)
    }

    /// The mount, where it is now. None: it is gone.
    pub fn current(&self, settings: &Settings) -> Option<Mount> {
        match &self.known {
            Some(known) => mounts::by_id(known.id).ok()?.filter(|now| now.device == known.device),
            None => self.made(settings),
        }
    }

    /// Unmounts it. Done, too, where it is gone already.
    pub fn unmount(&self, settings: &Settings, detach: bool) -> Result<()> {
        self.current(settings).map_or(Ok(()), |mount| unmount_this(&mount, detach))
    }

    /// What is left of it after its daemon's end, second mounts of it included.
    pub fn left(&self) -> Vec<Mount> {
        let mut left = mounts::all().unwrap_or_default();
        left.retain(|mount| {
            self.known.as_ref().is_some_and(|known| {
                (mount.device, &mount.source, &mount.kind) == (known.device, &known.source, &known.kind)
            })
        });
        left
    }

    /// After the daemon's end: true while it is there all the same.
    pub fn is_dead(&self) -> bool {
        self.left().iter().any(|mount| !mount.is_reached() || mount.is_dead())
    }

    /// After the daemon's end: takes away all that is left. What something else lies over cannot be reached, nor be in
    /// the way, until that is gone: then it would be a dead mount, so it is waited for, and `say` is called once.
    pub fn bury(&self, mut say: impl FnMut(&str)) {
        let mut told = false;
        loop {
            let (reached, covered): (Vec<Mount>, Vec<Mount>) =
                self.left().into_iter().partition(Mount::is_reached);
            // Asked each: numbers of devices are used again, and what lives is another daemon's.
            for mount in reached.iter().filter(|mount| mount.is_dead()) {
                if let Err(e) = unmount_this(mount, true) {
                    say(&e.to_string());
                }
            }
            let Some(mount) = covered.first() else { return };
            if !told {
                let point = mount.point.display();
                say(&format!(
                    "{point}: something was mounted over the dead mount, which goes when that is gone"
                ));
                told = true;
            }
            sleep(LOOK);
        }
    }

    /// Takes away the mount of a daemon whose start failed, which has ended or does so within `patience`.
    pub fn take_dead_away(&self, settings: &Settings, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(mount) = self.made(settings)
                && mount.is_dead()
            {
                // Should it fail, the next mount here takes it away.
                let _ = unmount(&mount.point, true);
                return;
            }
            if Instant::now() >= deadline {
                return;
            }
            sleep(Duration::from_millis(50));
        }
    }
}
