//! `ploopfs map`.

mod cells;
mod picture;
mod source;
mod svg;

use std::borrow::Cow;
use std::io::IsTerminal;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::{Outcome, out, target};
use crate::error::{Error, Kind};
use crate::image::map::{At, Joiner, Range};
use crate::io::new_file::NewFile;
use cells::Drawing;
use source::{LevelInfo, MapSource};

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: target::FactsArgs,
    /// Draw it for the terminal, 80 columns wide
    #[arg(long, conflicts_with = "json")]
    picture: bool,
    /// Draw it into a new file, as SVG (- for standard output)
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    svg: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.which.image)?;
    if let Some(file) = args.svg.as_deref().filter(|file| *file != Path::new("-"))
        && file.symlink_metadata().is_ok()
    {
        // Before the walk, which may take its time.
        return Err(taken(file).into());
    }
    let mut source = MapSource::open(&target)?;
    if args.picture || args.svg.is_some() {
        let mut drawing = Drawing::new(&source);
        walk(&mut source, &mut |_, range| {
            drawing.add(&range);
            Ok(true)
        })?;
        if let Some(file) = &args.svg {
            write_svg(file, &svg::draw(&drawing, &source))?;
        }
        if args.picture {
            // https://no-color.org: set and not empty.
            let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let colours = std::io::stdout().is_terminal() && !plain;
            out::text(&picture::draw(&drawing, &source, colours))?;
        }
        return Ok(Outcome::Done);
    }
    let mut stream = out::OutStream::lock();
    if args.which.json {
        as_json(&mut source, &mut stream)?
    } else {
        as_text(&mut source, &mut stream)?
    }
    stream.end()?;
    Ok(Outcome::Done)
}

/// Goes through all ranges, joined; `each` says whether to go on.
fn walk(
    source: &mut MapSource,
    each: &mut dyn FnMut(&[LevelInfo], Range) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let mut joiner = Joiner::default();
    while let Some(ranges) = source.next_ranges()? {
        for range in ranges {
            if let Some(whole) = joiner.push(range)
                && !each(source.levels(), whole)?
            {
                return Ok(());
            }
        }
    }
    if let Some(last) = joiner.end() {
        each(source.levels(), last)?;
    }
    Ok(())
}

/// As `qemu-img map --output=json` has it, with `level` (0 = base) and `file` beside. A range a line.
fn as_json(source: &mut MapSource, stream: &mut out::OutStream) -> anyhow::Result<()> {
    let mut first = true;
    stream.write("[")?;
    walk(source, &mut |levels, range| {
        let before = if std::mem::take(&mut first) { "" } else { ",\n" };
        stream.write(&format!("{before}{}", serde_json::to_string(&range_line(levels, &range))?))
    })?;
    stream.write("]\n")?;
    Ok(())
}

/// One range, with the fields in the order that QEMU has them.
#[derive(Serialize)]
struct RangeLine<'a> {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    damaged: bool,
}

fn range_line<'a>(levels: &'a [LevelInfo], range: &Range) -> RangeLine<'a> {
    let deepest = levels.len().saturating_sub(1);
    let Range { start, length, .. } = *range;
    let (present, zero) = match range.at {
        At::Nowhere => (false, true),
        At::File { hole, .. } => (true, hole),
        At::Damaged => (true, false),
    };
    let line = RangeLine {
        start,
        length,
        depth: deepest,
        present,
        zero,
        data: !zero,
        compressed: false,
        offset: None,
        level: None,
        file: None,
        damaged: range.at == At::Damaged,
    };
    let At::File { level, offset, .. } = range.at else { return line };
    let file = levels.get(usize::from(level)).map(|info| info.path.to_string_lossy());
    RangeLine {
        depth: deepest.saturating_sub(usize::from(level)),
        offset: Some(offset),
        level: Some(level),
        file,
        ..line
    }
}

fn as_text(source: &mut MapSource, stream: &mut out::OutStream) -> anyhow::Result<()> {
    stream.write(&row("START", "LENGTH", "LEVEL", "OFFSET", "FILE"))?;
    walk(source, &mut |levels, range| {
        let hex = |n: u64| format!("{n:#x}");
        let (start, length) = (hex(range.start), hex(range.length));
        let line = match range.at {
            At::Nowhere => row(&start, &length, "-", "-", "(nothing)"),
            At::Damaged => row(&start, &length, "-", "-", "(damaged: see ploopfs check)"),
            At::File { level, offset, hole } => {
                let file = levels.get(usize::from(level)).map(LevelInfo::file_name).unwrap_or_default();
                let file = if hole { format!("{file} (a hole)") } else { file };
                row(&start, &length, &level.to_string(), &hex(offset), &file)
            }
        };
        stream.write(&line)
    })
}

fn row(start: &str, length: &str, level: &str, offset: &str, file: &str) -> String {
    format!("{start:<15} {length:<15} {level:<5} {offset:<15} {file}\n")
}

fn taken(file: &Path) -> Error {
    Error::at(Kind::Exists, file, "is there already, and nothing is replaced; choose another name")
}

/// The file appears whole or not at all, whatever interrupts us: it gets its name last.
fn write_svg(file: &Path, text: &str) -> anyhow::Result<()> {
    if file == Path::new("-") {
        return out::text(text);
    }
    let new = NewFile::begin_as(file, 0o644)?;
    new.file()
        .write_all_at(text.as_bytes(), 0)
        .map_err(|e| Error::io(&e, file, "cannot write the picture"))?;
    Ok(new.commit()?)
}
