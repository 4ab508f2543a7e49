//! The ploop/Parallels format as bytes: pure functions, no I/O. Facts: docs/format.md.

pub mod bat;
pub mod descriptor;
pub mod extension;
mod geometry;
pub mod header;
pub mod stream;
