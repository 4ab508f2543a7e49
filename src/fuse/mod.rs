//! Transports only: how requests of the kernel reach [`ops::FileSystem`] and how answers go back.

use std::time::Duration;

mod capabilities;
pub mod classic;
mod handshake;
mod lanes;
mod listing;
pub mod mount;
pub mod notify;
pub mod ops;
pub mod session;
mod settings;
pub mod uring;

/// How long the kernel may keep names and attributes without asking. Short, because blocks and times move with every
/// write and are not announced. A name that went and a disk whose size changed are, once the daemon knows
/// (fuse/notify): at the end of a command, or at the next look at the folder. A name that comes need not be: the kernel
/// keeps no missing ones.
const TTL: Duration = Duration::from_secs(1);

/// Largest WRITE in bytes: 256 pages, the kernel's own limit, and the same as for reads.
const MAX_WRITE: u32 = 1 << 20;

/// Longest name, as statfs answers it.
const NAME_MAX: u32 = 255;

/// Three quarters of `max_background`, at least 1: where the kernel's own default has it. Only read-ahead and background
/// writing out heed it.
fn congestion(max_background: u16) -> u16 {
    (max_background - max_background / 4).max(1)
}

/// What a panic said.
fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "(no text)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn congestion_begins_at_three_quarters() {
        assert_eq!(congestion(4096), 3072);
        assert_eq!(congestion(1), 1);
    }
}
