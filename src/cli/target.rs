//! The IMAGE of a command line: looked up on the host, and in the mounts that show one.

use std::path::{Path, PathBuf};

use crate::cli::served;
use crate::disk::find;
pub use crate::disk::find::{Target, is_layered};
use crate::error::{Error, Kind, Result};

/// Arguments of the commands that print facts about one image.
#[derive(Debug, clap::Args)]
pub struct FactsArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Finds the image `IMAGE`: as [`find::find`] does; what a mount of ours shows is found in the images folder behind it.
pub fn find(image: &Path) -> Result<PathBuf> {
    let target = find_any(image)?;
    match target.snapshot {
        None => Ok(target.path),
        Some(_) => Err(Error::at(Kind::Invalid, image, "is a snapshot; this command takes a whole image")),
    }
}

/// Finds `IMAGE` or `IMAGE@SNAPSHOT`.
pub fn find_any(image: &Path) -> Result<Target> {
    find::find(
        image,
        &|image| Ok(served::source_of(image)?.map(|(path, snapshot)| Target { path, snapshot })),
    )
}
