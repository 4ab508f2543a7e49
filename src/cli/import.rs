//! `ploopfs import`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, clone, out, restore, size, source};
use crate::error::{Error, Kind, Result};
use crate::format::header::has_magic;
use crate::image::create::{Draft, Plan};
use crate::transfer::disk::{Disk, FlatFile};
use crate::transfer::layers::{self, Link};
use crate::transfer::{import, qemu};

/// Arguments of `import`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The disk: a file, or a block device for raw
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The new image, such as images/vm1
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// What FILE is [default: as its name ends, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Cluster size: a power of two from 32K to 64M [default: 1M; with --layers that of the chain, mostly 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster: Option<u64>,
    /// Read the files, too, that FILE names: of which it is an overlay, or that hold its data. Only if you trust it
    #[arg(long)]
    with_backing: bool,
    /// Keep the files on which FILE stands (its backing chain) as snapshots, and read them. Only if you trust it
    ///
    /// Each file of the chain becomes one level, which holds what that file allocates; FILE itself is the live disk.
    /// A snapshot is called like the file that holds its state, without .qcow2, .raw and the like; what a name cannot
    /// have becomes "-", and of two alike the upper one gets a number: vm1, vm1-2. Snapshots inside of a qcow2 file are
    /// not taken along.
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    pace: Pace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Plain bytes
    Raw,
    /// QEMU's own
    Qcow2,
    /// VMware's
    Vmdk,
    /// Hyper-V's
    Vhdx,
    /// The older one of Hyper-V, VHD
    Vpc,
    /// VirtualBox's
    Vdi,
    /// QEMU's before qcow2
    Qcow,
    /// QEMU's, of a short time
    Qed,
}

impl Format {
    /// QEMU's word.
    fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vpc => "vpc",
            Format::Vdi => "vdi",
            Format::Qcow => "qcow",
            Format::Qed => "qed",
        }
    }

    /// As the file's name ends.
    fn of_name(file: &Path) -> Format {
        match file.extension().and_then(|suffix| suffix.to_str()) {
            Some("qcow2") => Format::Qcow2,
            Some("vmdk") => Format::Vmdk,
            Some("vhdx") => Format::Vhdx,
            Some("vhd" | "vpc") => Format::Vpc,
            Some("vdi") => Format::Vdi,
            Some("qcow") => Format::Qcow,
            Some("qed") => Format::Qed,
            _ => Format::Raw,
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let to = clone::new_place(&args.image)?;
    let flat = FlatFile::open(&args.file)?;
    let format = args.format.unwrap_or_else(|| Format::of_name(&args.file));
    if args.format.is_none() && format == Format::Raw {
        not_another(&flat)?;
    }
    let chain = match format {
        Format::Raw => Vec::new(),
        _ if args.layers => layers::chain(&args.file, format.as_str(), args.with_backing)?,
        _ => vec![alone(&args, format)?],
    };
    let notes = notes(&args, &chain);
    if chain.len() > 1 {
        return layered(args, chain, to, notes);
    }
    let bytes = chain.first().map_or(flat.size(), |link| link.info.size);
    if bytes == 0 {
        return Err(Error::at(Kind::Unsupported, &args.file, "is empty: there is no disk in it").into());
    }
    let plan = Plan { cluster: args.cluster, ..Plan::thin(bytes) };
    let draft = Draft::begin(&to, &plan)?;
    let file = args.file.clone();
    let created = work::watched(&args.file, args.pace, move |progress| {
        match format {
            Format::Raw => import::raw(&flat, &draft, progress)?,
            _ => import::other(&file, format.as_str(), bytes, &draft, progress)?,
        }
        draft.finish()
    })?;
    say(&created.path, created.size, notes)
}

/// With the files on which it stands as snapshots.
fn layered(args: Args, chain: Vec<Link>, to: PathBuf, mut notes: Vec<String>) -> anyhow::Result<Outcome> {
    let to = restore::folder_name(to);
    if to.extension().is_some_and(|suffix| suffix == "raw") {
        let what = "a raw image has no snapshots; give a name without .raw, or leave --layers out";
        return Err(Error::at(Kind::Invalid, &to, what).into());
    }
    let names = layers::names(&chain);
    let list = names.iter().zip(&chain).map(|(name, link)| format!("\n  {name}  {}", link.path.display()));
    notes.insert(0, format!("snapshots, the oldest first:{}", list.collect::<String>()));
    let (path, cluster) = (to.clone(), args.cluster.unwrap_or_else(|| layers::cluster(&chain)));
    let size = work::watched(&args.file, args.pace, move |progress| {
        layers::import(&chain, &names, cluster, &to, progress)
    })?;
    say(&path, size, notes)
}

/// Makes it shown, and says what was made.
fn say(path: &Path, bytes: u64, notes: Vec<String>) -> anyhow::Result<Outcome> {
    source::show(path)?;
    let mut text = format!("created {}, {}\n", out::printable(&path.to_string_lossy()), size::human(bytes));
    for line in notes.iter().flat_map(|note| note.split('\n')) {
        text += &out::printable(line);
        text.push('\n');
    }
    out::text(&text)?;
    Ok(Outcome::Done)
}

/// What a person should know, beyond what was made.
fn notes(args: &Args, chain: &[Link]) -> Vec<String> {
    let mut notes = Vec::new();
    if args.layers && chain.len() < 2 {
        notes.push(format!("no snapshots: {} stands on no other file", args.file.display()));
    }
    for link in chain.iter().filter(|link| !link.info.snapshots.is_empty()) {
        let names = link.info.snapshots.join(", ");
        notes.push(format!("not taken along: the snapshots inside of {}: {names}", link.path.display()));
    }
    notes
}

fn alone(args: &Args, format: Format) -> Result<Link> {
    let info = qemu::info(&args.file, format.as_str())?;
    if let Some(other) = info.other().filter(|_| !args.with_backing) {
        let layers = if info.backing.is_some() { "; --layers keeps it as a snapshot" } else { "" };
        let what = format!(
            "names the file {other}, and is not whole without it; --with-backing reads that, too, if you trust \
             it{layers}"
        );
        return Err(Error::at(Kind::NotPermitted, &args.file, what));
    }
    Ok(Link { path: args.file.clone(), format: format.as_str().to_owned(), info })
}

/// What is about to be taken for plain bytes must not look like something else: cloud images are qcow2 and end in .img.
/// Only asked, never believed: the guest of a raw disk writes its first bytes.
fn not_another(flat: &FlatFile) -> Result<()> {
    let mut head = [0; 64];
    let len = flat.size().min(head.len() as u64) as usize;
    let read = flat.file().read_exact_at(&mut head[..len], 0);
    read.map_err(|e| Error::io(&e, flat.path(), "cannot read"))?;
    let known: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"<<< ", "vdi"),
    ];
    if let Some((_, name)) = known.iter().find(|(magic, _)| head.starts_with(magic)) {
        let what = format!("begins like a {name} file; say what it is: --format {name}, or --format raw");
        return Err(Error::at(Kind::Unsupported, flat.path(), what));
    }
    if has_magic(&head) {
        let what =
            "is an image of ours: copy it with ploopfs clone, or say --format raw if it is a disk's content";
        return Err(Error::at(Kind::Unsupported, flat.path(), what));
    }
    Ok(())
}
