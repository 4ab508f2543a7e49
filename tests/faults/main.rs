//! What the library does when the host fails it: failed, short and slow calls, a full disk (feature `faults`).
//! Images live in memory; no kernel is needed.
#![cfg(feature = "faults")]

mod discards;
mod layers;
mod loops;
mod places;
mod rig;
mod space;
mod syncs;
#[path = "../common/crash/watched.rs"]
mod watched;
