//! The ploop/Parallels format as bytes: pure functions, no I/O. Facts: FORMAT.md 1.

pub mod bat;
pub mod descriptor;
pub mod extension;
pub mod header;
pub mod stream;
