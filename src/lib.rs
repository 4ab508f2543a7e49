//! ploopfs: thin, snapshotted virtual disks as plain files.
//!
//! The rooms, lowest first: [`io`] (the host), [`format`] (bytes), [`image`] (an image at rest), [`vdisk`] (one
//! live image), [`disk`] (the one door to an image at rest), [`transfer`] (disks in and out of images), [`folder`] (the
//! live set), [`tree`] (what the kernel sees), [`fuse`] (transports), [`control`], [`daemon`] and [`cli`]. A room uses only
//! what stands below it.
#![warn(missing_docs)]
#![deny(clippy::undocumented_unsafe_blocks)]
// R8 by machine (clippy.toml says which, and why). Tests may make and move files as they like.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod cli;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod error;
pub mod folder;
pub mod format;
pub mod fuse;
pub mod image;
pub mod io;
pub mod progress;
pub mod rules;
pub mod sync;
pub mod transfer;
pub mod tree;
pub mod vdisk;
pub mod words;

pub use error::{Error, Kind, Result};
