//! The machinery of the crash tests: a world of recorded files, the states a power cut leaves of it, and their judge.
//! Included by those tests alone (`#[path]`): the others need not compile it.
#![allow(dead_code)] // each of them uses its part

pub mod campaign;
#[cfg(feature = "break-rules")]
pub mod clones;
#[cfg(feature = "break-rules")]
pub mod folder;
#[cfg(feature = "break-rules")]
pub mod images;
pub mod judge;
pub mod power;
#[cfg(feature = "break-rules")]
pub mod restored;
pub mod tracked;
pub mod watched;
pub mod world;
