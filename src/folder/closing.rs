//! Uses that are just ending: the kernel sends a close after close(2) has returned, and the image is synced then. What
//! needs an image, or a snapshot, that is not open waits a little before it refuses: `losetup -d` and the command
//! behind it in a script are not to meet.

use std::time::{Duration, Instant};

/// How long such a use may last: a close with its sync on a slow disk. Who really has it open makes one wait as long for
/// the refusal.
const CLOSING: Duration = Duration::from_secs(2);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until `over` is true. False: it still was not after two seconds. Blocks; not for threads of the engine or a
/// transport.
pub(super) fn wait(mut over: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + CLOSING;
    while !over() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}
