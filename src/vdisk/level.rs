//! One file of an image's stack, and what kind of file it is.

use std::path::PathBuf;

use crate::format::header::{Geometry, Header};
use crate::io::file::HostFile;
use crate::sync::Arc;

/// What one level's file is.
#[derive(Clone, Debug)]
pub enum Layout {
    /// A delta of the ploop format.
    Ploop(Header),
    /// Plain bytes; guest byte = file byte.
    Raw,
}

/// One level of the stack; 0 is the base.
#[derive(Clone, Debug)]
pub struct Level {
    /// The open file.
    pub file: Arc<dyn HostFile>,
    /// For messages.
    pub path: PathBuf,
    /// Its format.
    pub layout: Layout,
}

impl Level {
    /// The geometry of a delta; None for raw.
    pub fn geometry(&self) -> Option<Geometry> {
        match &self.layout {
            Layout::Ploop(header) => Some(header.geometry()),
            Layout::Raw => None,
        }
    }
}
