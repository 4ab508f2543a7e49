//! One served folder as processes (docs/design.md#processes).
//!
//! The command line starts the [`keeper`], the keeper starts the daemon ([`start`]). The keeper stays small and
//! stays outside of the `sandbox`: it mounts and unmounts, runs `--on-event`, reports readiness, looks around in `/proc`
//! and `/sys`, and cleans up when the daemon dies. [`wire`] is what the two say to each other. The [`standby`] cleans up when
//! the keeper was killed.

mod child;
pub mod events;
mod heirs;
pub mod holders;
pub mod keeper;
mod keeping;
pub mod launch;
mod link;
mod log;
mod notify;
mod orders;
mod own_mount;
pub mod processes;
mod sandbox;
mod service;
pub mod settings;
mod siblings;
pub mod standby;
pub mod start;
mod stop;
mod succession;
pub mod wire;
mod works;
