//! `ploopfs restore`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, clone, input, out, size, source, target};
use crate::error::{Error, Kind, Result};
use crate::format::stream::Head;
use crate::transfer::restore::Stream;
use crate::utc;

/// Arguments of `restore`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The backup; -: standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The new image; for an incremental backup, the image that has its base
    #[arg(value_name = "IMAGE", required_unless_present = "check", conflicts_with = "check")]
    image: Option<PathBuf>,
    /// Only read the backup, check it, and say what it is
    #[arg(long)]
    check: bool,
    /// Print JSON
    #[arg(long, requires = "check")]
    json: bool,
    #[command(flatten)]
    pace: Pace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let (from, name) = stream(&args.file)?;
    let shown = PathBuf::from(&name);
    let Some(image) = args.image else {
        let head =
            work::watched(&shown, args.pace, move |progress| Stream::begin(from, &name)?.verify(progress))?;
        if args.json {
            out::json(&to_json(&head))?
        } else {
            out::text(&to_text(&head))?
        }
        return Ok(Outcome::Done);
    };
    let pace = args.pace;
    let (path, head, note) = work::watched(&image.clone(), pace, move |progress| {
        // The stream says which of the two it is; until its head is read nothing is looked for.
        let stream = Stream::begin(from, &name)?;
        if stream.head.is_incremental() {
            let folder = existing(&image, &stream.head)?;
            let (head, note) = stream.apply(&folder, progress)?;
            Ok((folder, head, note))
        } else {
            let to = folder_name(clone::new_place(&image)?);
            let head = stream.make_image(&to, progress)?;
            Ok((to, head, None))
        }
    })?;
    source::show(&path)?;
    if let Some(note) = note {
        out::done(&format!("{}\n", out::printable(&note)))?;
    }
    let shown = out::printable(&path.to_string_lossy());
    let text = match head.is_incremental() {
        true => format!("{shown}: is at the snapshot {} now\n", out::printable(&head.name)),
        false => format!("created {shown}, {}\n", size::human(head.size)),
    };
    out::done(&text)?;
    Ok(Outcome::Done)
}

/// The stream, and its name for messages.
fn stream(file: &Path) -> Result<(Box<dyn Read + Send>, String)> {
    if file == Path::new("-") {
        return input::stdin_to_end("a backup");
    }
    let opened = File::open(file).map_err(|e| Error::io(&e, file, "cannot open the backup"))?;
    if opened.metadata().is_ok_and(|meta| meta.is_dir()) {
        return Err(Error::at(Kind::Unsupported, file, "is a folder, not a backup"));
    }
    // Two reads a record: its 32 bytes should not cost a system call of their own.
    let buffered = std::io::BufReader::with_capacity(1 << 20, opened);
    Ok((Box::new(buffered), file.to_string_lossy().into_owned()))
}

/// The image that has the base of an incremental backup.
fn existing(image: &Path, head: &Head) -> Result<PathBuf> {
    let base = format!("its base, the snapshot {} ({})", head.base_name, head.base);
    let path = target::find(image).map_err(|e| match e.kind() {
        Kind::NotFound => {
            let what = format!("no such image; the backup is an incremental one: restore {base}, first");
            Error::at(Kind::NotFound, image, what)
        }
        _ => e,
    })?;
    if !target::is_layered(&path) {
        let what = format!("has no snapshots; the backup goes on an image whose newest one is {base}");
        return Err(Error::at(Kind::Unsupported, &path, what));
    }
    Ok(path)
}

/// An image with a snapshot is a folder, whatever suffix was given out of habit.
pub fn folder_name(path: PathBuf) -> PathBuf {
    match path.extension() {
        Some(suffix) if suffix == "hds" || suffix == "hdd" => path.with_extension(""),
        _ => path,
    }
}

fn to_json(head: &Head) -> serde_json::Value {
    let base = head.is_incremental().then(|| json!({"name": head.base_name, "guid": head.base.to_string()}));
    json!({
        "kind": if head.is_incremental() { "incremental" } else { "full" },
        "image": head.image,
        "size": head.size,
        "snapshot": {"name": head.name, "guid": head.guid.to_string()},
        "base": base,
        "made": head.made,
    })
}

fn to_text(head: &Head) -> String {
    let since = match head.is_incremental() {
        true => format!(", since {} {}", out::printable(&head.base_name), head.base),
        false => String::new(),
    };
    format!(
        "whole and undamaged: {} backup of {}@{} {}{since}, {}, made {} UTC\n",
        if head.is_incremental() { "incremental" } else { "full" },
        out::printable(&head.image),
        out::printable(&head.name),
        head.guid,
        size::human(head.size),
        utc::shown(i64::try_from(head.made).unwrap_or(0)),
    )
}
