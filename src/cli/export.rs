//! `ploopfs export`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cli::output::{self, Pipe};
use crate::cli::source::{self, DiskSource};
use crate::cli::target::{self, Target};
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, served, size};
use crate::error::{Error, Kind, Result};
use crate::io::new_file::NewFile;
use crate::progress::Progress;
use crate::transfer::device::BlockDevice;
use crate::transfer::disk::{FlatDisk, FlatFile};
use crate::transfer::export;
use crate::words::quoted;

/// Arguments of `export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or IMAGE@SNAPSHOT
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// The new file; for raw also a block device, which is overwritten, or a pipe; -: standard output
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

/// Where the disk goes.
enum To {
    New(NewFile),
    Device(BlockDevice),
    Pipe(Pipe),
}

impl To {
    /// Opens what was named, for a disk of `bytes`.
    fn open(file: &Path, format: Format, bytes: u64) -> Result<To> {
        let raw_only = |what| match format {
            Format::Raw => Ok(()),
            Format::Qcow2 => {
                let what = format!("is {what}, and only raw can go there; give a new file");
                Err(Error::at(Kind::Invalid, file, what))
            }
        };
        if let Some(pipe) = output::pipe(file, "a disk")? {
            raw_only("a pipe")?;
            return Ok(To::Pipe(pipe));
        }
        if BlockDevice::is_at(file) {
            raw_only("a device")?;
            return BlockDevice::open(file, bytes).map(To::Device);
        }
        NewFile::begin(file).map(To::New)
    }

    /// What a cancelled export leaves.
    fn left(&self) -> &'static str {
        match self {
            To::New(_) => "nothing is left of it",
            To::Device(_) => "a part of the disk is on the device",
            To::Pipe(_) => "a part of the disk was written",
        }
    }

    fn write(&mut self, format: Format, disk: &dyn FlatDisk, path: &Path, progress: &Progress) -> Result<()> {
        match (self, format) {
            (To::New(file), Format::Raw) => export::raw(disk, file.file(), path, progress),
            (To::New(file), Format::Qcow2) => export::qcow2(disk, file, progress),
            (To::Device(device), _) => export::device(disk, device, progress),
            (To::Pipe(pipe), _) => pipe.write_disk(disk, progress),
        }
    }

    /// The end of what was written, and what a person should know.
    fn finish(self, path: &Path, bytes: u64) -> Result<Option<String>> {
        let (shown, human) = (out::printable(&path.to_string_lossy()), size::human(bytes));
        match self {
            To::New(file) => {
                file.commit()?;
                // Not what was asked for, and done all the same: the mount sees a new file in its folder by itself.
                source::show(path).unwrap_or_else(|e| log::debug!("{e}"));
                Ok(Some(format!("created {shown}, {human}\n")))
            }
            To::Device(device) => {
                let rest = match device.size() - bytes {
                    0 => String::new(),
                    rest => format!("; the {rest} bytes behind it are as they were"),
                };
                Ok(Some(format!("{shown}: has the disk of {human}{rest}\n")))
            }
            // Words may go where the disk went.
            To::Pipe(pipe) => pipe.finish().map(|()| None),
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.image)?;
    let named = args.file.extension().is_some_and(|suffix| suffix == "qcow2");
    let format = args.format.unwrap_or(if named { Format::Qcow2 } else { Format::Raw });
    refuse_written(&target)?;
    let source = DiskSource::open(&target)?;
    let bytes = source.disk().size();
    let mut to = To::open(&args.file, format, bytes)?;
    let path = args.file.clone();
    let before = source.shown().map(stamp).transpose()?;
    let (source, said) = work::watched_with(&args.file, args.pace, to.left(), move |progress| {
        to.write(format, source.disk(), &path, progress)?;
        // Before it gets its name: what was written meanwhile is half in it.
        if target.snapshot.is_none() {
            unchanged(&target, source.shown(), before)?;
        }
        Ok((source, to.finish(&path, bytes)?))
    })?;
    drop(source);
    if let Some(said) = said {
        out::done(&said)?;
    }
    Ok(Outcome::Done)
}

/// A live disk that is open for writing has no state that could be copied.
fn refuse_written(target: &Target) -> Result<()> {
    if target.snapshot.is_some() {
        return Ok(());
    }
    if served::stays_open(&target.path, |image| image.mode != "read-only")? {
        let path = quoted(&target.path);
        let what = format!(
            "is open for writing; take a snapshot and export that: ploopfs snapshot create {path} NAME; ploopfs export \
             {path}@NAME"
        );
        return Err(Error::at(Kind::InUse, &target.path, what));
    }
    Ok(())
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
    refuse_written(target)?;
    match shown {
        Some(shown) if Some(stamp(shown)?) != before => {
            let what = "was written while it was read; export a snapshot of it, or try again";
            Err(Error::at(Kind::Busy, &target.path, what))
        }
        _ => Ok(()),
    }
}
