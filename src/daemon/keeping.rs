//! Open files on their way from the daemon to its keeper, over the daemon's standard input, which is a connection.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::wire::{self, Kept};
use crate::io::handover;
use crate::io::heirs::{Fixture, Keeping};
use crate::sync::plain::lock;

/// How long a keeper that reads nothing (it may be stopped) may hold up an open.
const PATIENCE: Duration = Duration::from_secs(5);

/// The way to the keeper.
pub(super) struct ToKeeper {
    /// Protects that lines stay whole. A leaf; held while one is sent.
    line: Mutex<io::Stdin>,
}

impl ToKeeper {
    pub(super) fn new() -> io::Result<ToKeeper> {
        let stdin = io::stdin();
        set_socket_timeout(&stdin, Timeout::Send, Some(PATIENCE))?;
        Ok(ToKeeper { line: Mutex::new(stdin) })
    }
}

impl Keeping for ToKeeper {
    fn keep(&self, file: (u64, u64), witness: bool, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        handover::send(&*lock(&self.line), &wire::line(&Kept::Keep { file, witness })?, Some(descriptor))
    }

    fn keep_fixture(&self, what: Fixture, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        handover::send(&*lock(&self.line), &wire::line(&Kept::Fixture { what })?, Some(descriptor))
    }

    fn asks(&self, file: (u64, u64)) -> io::Result<()> {
        handover::send(&*lock(&self.line), &wire::line(&Kept::Asks { file })?, None)
    }

    fn let_go(&self, file: (u64, u64)) {
        // One that does not hear it keeps a descriptor for nothing.
        let _ = wire::line(&Kept::LetGo { file })
            .and_then(|line| handover::send(&*lock(&self.line), &line, None));
    }
}
