//! `ploopfs export`.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::cli::source::Source;
use crate::cli::target::{self, Target};
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, served, size};
use crate::error::{Error, Kind, Result};
use crate::io::new_file::NewFile;
use crate::transfer::disk::FlatFile;
use crate::transfer::{export, qemu};

/// Arguments of `export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or IMAGE@SNAPSHOT
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// The new file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What it shall be [default: qcow2 where the name ends so, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    #[command(flatten)]
    pace: Pace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Plain bytes, holes where the disk has none
    Raw,
    /// QEMU's own, by the program qemu-img
    Qcow2,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.image)?;
    let named = args.file.extension().is_some_and(|suffix| suffix == "qcow2");
    let format = args.format.unwrap_or(if named { Format::Qcow2 } else { Format::Raw });
    let file = NewFile::begin(&args.file)?;
    nobody_writes(&target)?;
    let source = Source::open(&target)?;
    let bytes = source.disk().size();
    let path = args.file.clone();
    let before = source.shown().map(stamp).transpose()?;
    let source = work::watched(&args.file, args.pace, move |progress| {
        match (format, source.shown()) {
            (Format::Raw, _) => export::raw(source.disk(), file.file(), &path, progress)?,
            (Format::Qcow2, Some(flat)) => {
                qemu::convert(&[], ("raw", flat.path()), ("qcow2", &file.open_path()), bytes, progress)?;
            }
            (Format::Qcow2, None) => {
                // qemu-img cannot see what only we can read: a thin copy beside it, without a name, for as long as it takes.
                let flat = NewFile::begin(&path)?;
                export::raw(source.disk(), flat.file(), &path, progress)?;
                progress.restart();
                let from = flat.open_path();
                qemu::convert(&[], ("raw", &from), ("qcow2", &file.open_path()), bytes, progress)?;
            }
        }
        // Before it gets its name: what was written meanwhile is half in it.
        if target.snapshot.is_none() {
            unchanged(&target, source.shown(), before)?;
        }
        file.commit()?;
        Ok(source)
    })?;
    drop(source);
    let shown = out::printable(&args.file.to_string_lossy());
    out::text(&format!("created {shown}, {}\n", size::human(bytes)))?;
    Ok(Outcome::Done)
}

/// A live disk that somebody writes has no state that could be copied.
fn nobody_writes(target: &Target) -> Result<()> {
    if target.snapshot.is_some() {
        return Ok(());
    }
    match served::serving(&target.path)? {
        Some((_, image)) if image.openers > 0 && image.mode != "read-only" => {
            let path = target.path.display();
            let what = format!(
                "is open for writing; take a snapshot and export that: ploopfs snapshot create {path} NAME; ploopfs export \
                 {path}@NAME"
            );
            Err(Error::at(Kind::InUse, &target.path, what))
        }
        _ => Ok(()),
    }
}

/// Time of the last write, as the daemon knows it now and not as the kernel remembers it.
fn stamp(shown: &FlatFile) -> Result<(i64, i64)> {
    let flags = rustix::fs::AtFlags::STATX_FORCE_SYNC;
    let cannot = |e: std::io::Error| Error::io(&e, shown.path(), "cannot look at it");
    match rustix::fs::statx(rustix::fs::CWD, shown.path(), flags, rustix::fs::StatxFlags::MTIME) {
        Ok(stat) => Ok((stat.stx_mtime.tv_sec, i64::from(stat.stx_mtime.tv_nsec))),
        Err(_) => shown.file().metadata().map(|meta| (meta.mtime(), meta.mtime_nsec())).map_err(cannot),
    }
}

fn unchanged(target: &Target, shown: Option<&FlatFile>, before: Option<(i64, i64)>) -> Result<()> {
    nobody_writes(target)?;
    match shown {
        Some(shown) if Some(stamp(shown)?) != before => {
            let what = "was written while it was read; export a snapshot of it, or try again";
            Err(Error::at(Kind::Busy, &target.path, what))
        }
        _ => Ok(()),
    }
}
