//! `ploopfs meta`.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::cli::{Outcome, out, size, target};
use crate::disk::layered::Layered;
use crate::disk::owner::{other_names, refuse_level, refuse_opened};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Delta;
use crate::image::chain::Candidate;
use crate::image::kind::{DESCRIPTOR, ImageKind};
use crate::image::labels::LABELS_NAME;
use crate::image::meta::{self, Meta, Restore};
use crate::image::paths::Located;
use crate::io::new_file::NewFile;

/// Arguments of `meta`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Print header and map of an image as text
    ///
    /// Of a layered image: of each of its files, with the descriptor as a comment. What is printed can be put back.
    Dump {
        /// The image, or one file of a layered one
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
    },
    /// Put header and map back from a dump
    ///
    /// The data is not touched. The map must be that of this image as it is now: after any change it names wrong clusters.
    /// Make a dump of what is there first.
    Restore {
        /// The dump
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The image; of a layered one, the dump says which file
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
    },
    /// Write header and map to a new file of the same length, without any data
    ///
    /// For a report of a bug: nothing of what is on the disk is in it. It is sparse: pack it with tar --sparse. Of a layered
    /// image a folder is made.
    Pack {
        /// The image, or one file of a layered one
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// The new file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    match args.what {
        What::Dump { image } => dump(&target::find(&image)?)?,
        What::Restore { file, image } => restore(&file, &target::find(&image)?)?,
        What::Pack { image, file } => {
            let bytes = size::human(pack(&target::find(&image)?, &file)?);
            out::done(&format!(
                "{}: {bytes} of metadata, no data\n",
                out::printable(&file.to_string_lossy())
            ))?;
        }
    }
    Ok(Outcome::Done)
}

/// The files of the image at `path` that have metadata, each with its name; and raw ones.
fn files(path: &Path, layered: Option<&Layered>) -> Result<Vec<(String, Located, ImageKind)>> {
    if let Some(image) = layered {
        let file = |delta: &Delta| Ok((delta.file.clone(), image.located(delta)?, image.kind(delta)));
        return image.descriptor().deltas.iter().map(file).collect();
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let at = Located::of(path)?;
    let is_raw = Candidate::open_at(&at)?.kind().is_ok_and(|kind| kind == ImageKind::Raw);
    Ok(vec![(name, at, if is_raw { ImageKind::Raw } else { ImageKind::Ploop })])
}

/// The image of several files at `path`, opened; None: it is one file.
fn layered(path: &Path) -> Result<Option<Layered>> {
    target::is_layered(path).then(|| Layered::read(path)).transpose()
}

fn raw(path: &Path) -> Error {
    Error::at(Kind::Unsupported, path, "a raw image is all data: it has no metadata")
}

fn dump(path: &Path) -> Result<()> {
    let layered = layered(path)?;
    let files = files(path, layered.as_ref())?;
    if let [(_, file, ImageKind::Raw)] = &files[..] {
        return Err(raw(&file.shown));
    }
    let mut stdout = BufWriter::new(io::stdout().lock());
    let cannot = |e: io::Error| Error::io(&e, path, "cannot write the dump");
    let put = |line: &str, to: &mut dyn Write| writeln!(to, "{line}").map_err(cannot);
    put("# Header and map of an image; ploopfs meta restore FILE IMAGE puts them back.", &mut stdout)?;
    if let Some(image) = &layered {
        let text = image.beside(DESCRIPTOR)?.unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            put(&format!("# {}", out::printable(line)), &mut stdout)?;
        }
    }
    for (name, file, kind) in &files {
        match kind {
            ImageKind::Raw => put(&format!("# {} is raw", out::printable(name)), &mut stdout)?,
            ImageKind::Ploop => meta::dump(file, name, &mut stdout)?,
        }
    }
    stdout.flush().map_err(cannot)
}

fn restore(dump: &Path, path: &Path) -> Result<()> {
    refuse_level(path)?;
    let text = std::fs::read_to_string(dump).map_err(|e| Error::io(&e, dump, "cannot read the dump"))?;
    let refuse = |why: String| Error::at(Kind::Invalid, dump, why);
    let all = meta::parse(&text).map_err(refuse)?;
    let layered = layered(path)?;
    let files = files(path, layered.as_ref())?;
    let find = |meta: &Meta| -> Result<&Located> {
        match &files[..] {
            // A file may have got another name since.
            [(_, file, kind)] if all.len() == 1 && layered.is_none() => match kind {
                ImageKind::Raw => Err(raw(&file.shown)),
                ImageKind::Ploop => Ok(file),
            },
            _ => {
                let same = |(name, _, kind): &&(String, Located, ImageKind)| {
                    *kind == ImageKind::Ploop && name.escape_default().to_string() == meta.name
                };
                let why = || refuse(format!("the image {} has no file {}", path.display(), meta.name));
                files.iter().find(same).map(|(_, file, _)| file).ok_or_else(why)
            }
        }
    };
    // All of them first, each under its lock: half of a layered image's map is none.
    let prepare = |meta| {
        let at = find(meta)?;
        let prepared = Restore::prepare(meta, at)?;
        // A file of a layered image is a level, of that one.
        if layered.is_none() {
            refuse_opened(at, prepared.file())?;
        }
        Ok(prepared)
    };
    let prepared: Vec<Restore<'_>> = all.iter().map(prepare).collect::<Result<_>>()?;
    if let Some(names) = other_names(path) {
        out::say(&names);
    }
    prepared.into_iter().try_for_each(Restore::carry_out)
}

/// Returns the bytes packed.
fn pack(path: &Path, to: &Path) -> Result<u64> {
    let layered = layered(path)?;
    let mut bytes = 0;
    if let Some(image) = &layered {
        let mut beside = Vec::new();
        for name in [DESCRIPTOR, LABELS_NAME] {
            beside.extend(image.beside(name)?.map(|text| (to.join(name), text)));
        }
        std::fs::create_dir(to).map_err(|e| Error::io(&e, to, "cannot make the folder"))?;
        for (copy, text) in beside {
            let new = NewFile::begin(&copy)?;
            new.file().write_all(&text).map_err(|e| Error::io(&e, &copy, "cannot copy"))?;
            new.commit()?;
        }
    }
    for (name, file, kind) in files(path, layered.as_ref())? {
        // A file that lies elsewhere comes along; the descriptor then says where it was.
        let name = Path::new(&name).file_name().unwrap_or_default().to_owned();
        let to = if layered.is_some() { to.join(name) } else { to.to_owned() };
        match kind {
            ImageKind::Raw if layered.is_none() => return Err(raw(&file.shown)),
            ImageKind::Raw => meta::pack_raw(&file, &to)?,
            ImageKind::Ploop => bytes += meta::pack(&file, &to)?,
        }
    }
    Ok(bytes)
}
