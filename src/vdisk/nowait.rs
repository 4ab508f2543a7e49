//! How the file of a level is read on a thread that must not wait for a device.

use super::Level;

/// How a level is read on a thread that does not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoWaitReads {
    /// Its host never waits for a device.
    Plain,
    /// Its host says when it would have to wait.
    Nowait,
    /// Not here.
    Wait,
}

/// What a level's host can do. Each level has its own: a request may touch several, and none has to do as another.
pub(super) fn probe(level: &Level) -> NoWaitReads {
    let traits = level.file.traits();
    match (traits.never_blocks, traits.nowait_reads) {
        (true, _) => NoWaitReads::Plain,
        (false, true) => NoWaitReads::Nowait,
        (false, false) => NoWaitReads::Wait,
    }
}
