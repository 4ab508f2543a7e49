//! One served folder as processes (DESIGN.md 8).
//!
//! The command line starts the [`keeper`], the keeper starts the daemon ([`start`]). The keeper stays small and
//! will stay outside of the sandbox: it unmounts, runs `--on-event`, reports readiness, looks around in `/proc` and
//! `/sys`, and cleans up when the daemon dies. [`wire`] is what the two say to each other.

pub mod events;
pub mod holders;
pub mod keeper;
mod link;
mod log;
pub mod mounts;
mod service;
pub mod settings;
pub mod start;
mod stop;
pub mod wire;

use crate::error::{Error, Kind, Result};

/// Starts a named thread that nobody waits for.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = crate::io::process::spawn_thread(name, body);
    started.map(drop).map_err(|e| Error::new(Kind::Io, format!("cannot start the thread {name}: {e}")))
}
