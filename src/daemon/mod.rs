//! One served folder as processes (docs/design.md#processes).
//!
//! The command line starts the [`keeper`], the keeper starts the daemon ([`start`]). The keeper stays small and
//! stays outside of the `sandbox`: it unmounts, runs `--on-event`, reports readiness, looks around in `/proc` and
//! `/sys`, and cleans up when the daemon dies. [`wire`] is what the two say to each other.

pub mod events;
pub mod holders;
pub mod keeper;
mod link;
mod log;
mod notify;
mod own_mount;
pub mod processes;
mod sandbox;
mod service;
pub mod settings;
pub mod start;
mod stop;
pub mod wire;
mod works;
