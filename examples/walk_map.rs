//! Walks the map of a thin image: `walk_map FILE` prints, for every range of the disk that has a place of its own, where
//! the range begins on the disk, its length, and where it lies in the file (bytes). Neighbours are one range.
//!
//! It looks into the rooms behind the library's front (feature `internals`), which promise nothing.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use ploopfs::image::chain::{AtRest, Form};

/// Print the map of a thin image.
#[derive(Parser)]
struct Arguments {
    /// The image's file.
    file: PathBuf,
}

/// Neighbouring clusters that are neighbours in the file, too.
#[derive(Clone, Copy)]
struct Range {
    /// First byte on the disk.
    disk: u64,
    /// First byte in the file.
    file: u64,
    /// Bytes.
    len: u64,
}

fn main() -> anyhow::Result<()> {
    let image = AtRest::open(&Arguments::parse().file)?;
    let Form::Ploop(header) = &image.form else {
        anyhow::bail!(
            "{}: a raw image has no map: byte N of the disk is byte N of the file",
            image.path.display()
        );
    };
    let geometry = header.geometry();
    let mut ranges: Vec<Range> = Vec::new();
    let mut strays = 0;
    image.for_each_entry(&geometry, |cluster, entry| {
        // An entry that names no cluster of the file is damage; `ploopfs check` says more.
        let Some(file) = geometry.position(entry) else {
            strays += 1;
            return;
        };
        let disk = cluster * geometry.cluster;
        match ranges.last_mut() {
            Some(last) if last.disk + last.len == disk && last.file + last.len == file => {
                last.len += geometry.cluster;
            }
            _ => ranges.push(Range { disk, file, len: geometry.cluster }),
        }
    })?;
    let mut out = std::io::stdout().lock();
    for Range { disk, file, len } in ranges {
        writeln!(out, "{disk} {len} {file}")?;
    }
    anyhow::ensure!(strays == 0, "{}: {strays} entries point nowhere", image.path.display());
    Ok(())
}
