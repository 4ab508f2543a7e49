//! What one mount was asked to do; travels from the command line through the keeper to the daemon.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fuse::mount::{self, AskedOptions};
use crate::ledger::Sizes;
use crate::vdisk::bat::page::Page;
use crate::vdisk::{OnFull, Options};

/// Background requests of the connection: at least twice what the runners and 256 per loop device can keep
/// busy (docs/kernel.md#init).
pub const BACKGROUND: u16 = 4096;

/// BAT pages that may be pinned beside those that are dirty: more than all threads together pin at once.
const PINNED: u64 = 1024;
/// Most pages of a ledger: 64 GiB of BAT are 64 TiB of disk at the least, and memory is taken as far as it is needed.
const MOST_PAGES: u32 = 1 << 24;

/// The kernel from which on requests that a dead daemon has read are sent again. 6.9 can do it as well, but for a fault of
/// its first releases.
const RESENDS: (u32, u32) = (6, 10);

/// How requests of the kernel arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantedTransport {
    /// The best one that works here.
    Auto,
    /// /dev/fuse.
    Fuse,
    /// FUSE over io_uring, or not at all.
    Uring,
}

/// All settings of a mount. Paths are absolute and without links.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// The images folder.
    pub images: OsString,
    /// Where it is mounted.
    pub mountpoint: OsString,
    /// The keeper stays in front and everything is logged to stderr.
    pub foreground: bool,
    /// No image is ever opened for writing.
    pub read_only: bool,
    /// Users other than an ordinary one who mounts may come in; root's mounts are open to all by themselves.
    pub allow_other: bool,
    /// What was asked of mount(8).
    pub asked: AskedOptions,
    /// Descriptors may name deltas outside of the images folder.
    pub allow_outside: bool,
    /// Deltas are read and written past the host's page cache.
    pub direct: bool,
    /// Names and sizes of images may be changed through the mount.
    pub manage: bool,
    /// The kernel reads and writes raw images in our place, where it can.
    pub passthrough: bool,
    /// The daemon confines itself.
    pub sandbox: bool,
    /// How requests arrive.
    pub transport: WantedTransport,
    /// Transport threads.
    pub threads: usize,
    /// Runner threads.
    pub runners: usize,
    /// Bound of the BAT cache in bytes.
    pub bat_cache: u64,
    /// How long a changed BAT page may stay unwritten, in milliseconds.
    pub bat_delay_ms: u64,
    /// Park writes when the host is full, instead of failing them.
    pub queue_when_full: bool,
    /// How long a parked write waits, in seconds; 0 = for ever.
    pub full_timeout_s: u64,
    /// Percent of free host space below which the low-water event is raised.
    pub low_water: u8,
    /// Program to run on events.
    pub on_event: Option<OsString>,
    /// How long open files may hold up an orderly stop, in seconds.
    pub stop_timeout_s: u64,
    /// How long a daemon that died may be missed before the mount ends, in seconds; 0 = it ends at once.
    pub restart_timeout_s: u64,
    /// Why none can be missed, though that was asked for.
    pub no_restart: Option<String>,
    /// The daemon goes on with what another one has begun. Set by the keeper.
    pub takes_over: bool,
    /// How many there will have been then. Set by the keeper.
    pub restarts: u64,
    /// So many daemons in a row died by their own fault, the last one included; 0: that one did not. Set by the keeper.
    #[serde(default)]
    pub faults: u32,
    /// Faults to inject (feature `faults`).
    pub fault: Option<String>,
}

impl Settings {
    /// The images folder.
    pub fn images(&self) -> &Path {
        Path::new(&self.images)
    }

    /// The mount point.
    pub fn mountpoint(&self) -> &Path {
        Path::new(&self.mountpoint)
    }

    /// How long open files may hold up an orderly stop.
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout_s)
    }

    /// How long a daemon that died may be missed; None: the mount ends with it.
    pub fn restart_timeout(&self) -> Option<Duration> {
        let asked = (self.restart_timeout_s > 0).then(|| Duration::from_secs(self.restart_timeout_s));
        asked.filter(|_| self.no_restart.is_none())
    }

    /// Why a successor could not go on with a mount of these settings on the kernel `release`, where that was asked for.
    pub fn judge_restart(&mut self, release: &str) {
        let why = if self.manage || self.passthrough || self.transport == WantedTransport::Uring {
            "what --manage, --passthrough or --transport uring does could not be gone on with".to_owned()
        } else if version(release).is_some_and(|version| version >= RESENDS) {
            return;
        } else {
            format!("it needs Linux {}.{}, and this is {}", RESENDS.0, RESENDS.1, release.trim())
        };
        self.no_restart = (self.restart_timeout_s > 0)
            .then(|| format!("restart-timeout: {why}; the mount ends with its daemon"));
    }

    /// How much the ledger holds.
    pub fn ledger(&self) -> Sizes {
        let pages = (self.bat_cache / Page::COST).max(16) + PINNED;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX).min(MOST_PAGES);
        Sizes { numbers: 1 << 16, opens: 1 << 16, images: 1 << 14, pages, snapshots: 1 << 16 }
    }

    /// The options of the mount, as the kernel takes them.
    pub fn mount_options(&self) -> mount::MountOptions {
        mount::MountOptions {
            source: self.images.clone(),
            allow_other: self.lets_others_in(),
            read_only: self.read_only,
            asked: self.asked.clone(),
        }
    }

    /// Users other than the mounting one may come in.
    pub fn lets_others_in(&self) -> bool {
        rustix::process::geteuid().is_root() || self.allow_other
    }

    /// The settings of the engine.
    pub fn engine(&self) -> Options {
        Options {
            runners: self.runners,
            bat_cache: self.bat_cache,
            bat_delay: Duration::from_millis(self.bat_delay_ms),
            on_full: if self.queue_when_full { OnFull::Queue } else { OnFull::Error },
            full_timeout: (self.full_timeout_s != 0).then(|| Duration::from_secs(self.full_timeout_s)),
            low_water: self.low_water,
            background: BACKGROUND.into(),
            ..Options::default()
        }
    }
}

/// Of a kernel, as `uname -r` says it.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_as_numbers_and_what_is_none_is_older_than_all() {
        let resends = |release: &str| version(release).is_some_and(|version| version >= RESENDS);
        for new in ["6.10.0", "6.18.3-cloud-amd64\n", "7.0", "6.100-rc1"] {
            assert!(resends(new), "{new}");
        }
        for old in ["6.9.12", "6.1.0-40-amd64", "5.15", "", "six.ten", "6"] {
            assert!(!resends(old), "{old}");
        }
    }
}
