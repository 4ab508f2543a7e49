//! How a folder is mounted, whichever transport serves it.

use std::ffi::OsString;

use crate::fuse::mount::AskedOptions;

/// How a folder is mounted and served.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Transport threads, at least 1. More let more requests wait on the host at once, but each wakes cache-cold.
    pub threads: usize,
    /// Let users other than the mounting one in. Ordinary users need `user_allow_other` in /etc/fuse.conf for it.
    pub allow_other: bool,
    /// Refuse every change.
    pub read_only: bool,
    /// The source shown by findmnt: the images folder.
    pub fs_name: OsString,
    /// How many asynchronous requests the kernel may have outstanding, over all images of the mount: the true
    /// queue depth of loop devices and libaio. The kernel holds ordinary users to fs/fuse's max_user_bgreq.
    pub max_background: u16,
    /// Agree with the kernel on passthrough, where it has it: see [`Session::passes_through`](super::session::Session::passes_through).
    pub passthrough: bool,
    /// What was asked of mount(8).
    pub asked: AskedOptions,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            // One per CPU; below 2 a single slow write would stop the mount, above 8 they only share a queue lock.
            threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
            allow_other: rustix::process::geteuid().is_root(),
            read_only: false,
            fs_name: "ploopfs".into(),
            // 256 for each of 16 busy loop devices.
            max_background: 4096,
            passthrough: false,
            asked: AskedOptions::default(),
        }
    }
}
