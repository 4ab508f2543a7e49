//! The hidden commands that `mount` starts itself again with.

use std::ffi::OsString;

use crate::cli::Outcome;
use crate::daemon::{keeper, standby, start};

/// Arguments of `keeper`, `standby` and `daemon`: folder and mount point, for `ps` only; what counts comes on standard input.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(hide = true)]
    shown: Vec<OsString>,
}

/// The keeper.
pub(super) fn keeper(_args: Args) -> anyhow::Result<Outcome> {
    Ok(Outcome::Status(keeper::main()))
}

/// The standby.
pub(super) fn standby(_args: Args) -> anyhow::Result<Outcome> {
    Ok(Outcome::Status(standby::main()))
}

/// The daemon.
pub(super) fn daemon(_args: Args) -> anyhow::Result<Outcome> {
    Ok(Outcome::Status(start::main()))
}
