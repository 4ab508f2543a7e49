//! `ploopfs import`.

use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, clone, input, out, restore, size, source};
use crate::error::{Error, Kind, Result};
use crate::format::header::SECTOR;
use crate::image::create::{CreatePlan, DEFAULT_CLUSTER, Draft, template_cluster};
use crate::transfer::disk::{FlatDisk, FlatFile};
use crate::transfer::foreign::Foreign;
use crate::transfer::layers::{self, ChainLink};
use crate::transfer::qemu::Reach;
use crate::transfer::{import, known, qemu};

/// Arguments of `import`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The disk: a file, or for raw a block device or a pipe; -: standard input
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
    /// Clusters for an image that many clones will be made of: 64K, more for a disk above 64G
    ///
    /// A clone's first write to a cluster copies all of it: small ones cost less space and time where many disks stand on one.
    #[arg(long, conflicts_with_all = ["cluster", "layers"])]
    template: bool,
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

impl Args {
    /// The cluster size that was asked for, of a disk of so many bytes.
    fn cluster_for(&self, bytes: u64) -> Option<u64> {
        self.cluster.or_else(|| self.template.then(|| template_cluster(bytes)))
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let to = clone::new_place(&args.image)?;
    let format = args.format.unwrap_or_else(|| Format::of_name(&args.file));
    let flat = match input::open(&args.file, "a disk")? {
        input::Input::Disk(flat) => {
            if args.file == Path::new("-") {
                raw_only(&args, format, "standard input")?;
            }
            flat
        }
        input::Input::Pipe(pipe, name) => return piped(args, pipe, &name, format, &to),
    };
    if args.format.is_none() && format == Format::Raw {
        not_another(&flat)?;
    }
    let chain = match format {
        Format::Raw => Vec::new(),
        _ if args.layers => layers::chain(&args.file, format.as_str(), args.with_backing)?,
        _ => vec![alone(&args, format)?],
    };
    if let Some(link) = chain.iter().find(|link| link.info.encrypted) {
        let what = "is encrypted, and its key is not asked for here; decrypt it first (qemu-img convert)";
        return Err(Error::at(Kind::Unsupported, &link.path, what).into());
    }
    let mut notes = notes(&args, &chain);
    if chain.len() > 1 {
        return layered(args, chain, to, notes);
    }
    let bytes = chain.first().map_or(flat.size(), |link| link.info.size);
    if bytes == 0 {
        return Err(Error::at(Kind::Unsupported, &args.file, "is empty: there is no disk in it").into());
    }
    notes.extend(filled_up(bytes));
    let plan = CreatePlan { cluster: args.cluster_for(bytes), ..CreatePlan::copy_of(bytes) };
    let draft = Draft::begin(&to, &plan)?;
    let created = work::watched(&args.file, args.pace, move |progress| {
        match chain.first() {
            None => {
                let _lock = flat.lock()?;
                import::disk(&flat, &draft, progress)?;
                flat.refuse_changed()?;
            }
            Some(link) => {
                let disk = Foreign::open(&link.path, &link.format, &link.info, Reach::Chain, progress)?;
                import::disk(&disk, &draft, progress)?;
            }
        }
        draft.finish()
    })?;
    say(&created.path, created.size, notes)
}

/// A disk that comes through a pipe: plain bytes, as many as come.
fn piped(
    args: Args,
    mut pipe: Box<dyn Read + Send>,
    name: &str,
    format: Format,
    to: &Path,
) -> anyhow::Result<Outcome> {
    if format != Format::Raw || args.layers {
        let what =
            "comes through a pipe, and only raw can: other formats are read here and there; give a file";
        return Err(Error::at(Kind::Unsupported, name, what).into());
    }
    let asked = args.format.is_some();
    // How much comes is not known: the smallest.
    let cluster = args.cluster_for(0);
    let mut plan = CreatePlan { cluster, ..CreatePlan::copy_of(1) };
    // Judged before it can be calculated with; a raw image has none.
    let kind = Draft::begin(to, &plan)?.kind();
    plan.size = import::first_size(kind, cluster.unwrap_or(DEFAULT_CLUSTER));
    let mut draft = Draft::begin(to, &plan)?;
    let shown = name.to_owned();
    let (created, came) = work::watched(Path::new(name), args.pace, move |progress| {
        let mut tail = Vec::new();
        let refuse = |head: &[u8], tail: &[u8]| match known::looks_like(head, tail) {
            Some(what) if !asked => Err(Error::at(Kind::Unsupported, &shown, what)),
            _ => Ok(()),
        };
        let mut look = |at: u64, bytes: &[u8]| {
            tail.extend_from_slice(&bytes[bytes.len().saturating_sub(known::TAIL)..]);
            tail.drain(..tail.len().saturating_sub(known::TAIL));
            if at == 0 { refuse(&bytes[..bytes.len().min(known::HEAD)], &[]) } else { Ok(()) }
        };
        let came = import::pipe(&mut *pipe, &shown, &mut draft, progress, &mut look)?;
        refuse(&[], &tail)?;
        Ok((draft.finish()?, came))
    })?;
    say(&created.path, created.size, filled_up(came).into_iter().collect())
}

/// What has no name, and perhaps no other end than its end, is plain bytes.
fn raw_only(args: &Args, format: Format, name: &str) -> Result<()> {
    if format == Format::Raw && !args.layers {
        return Ok(());
    }
    let what = "only raw can come this way: other formats are not read from front to back; give a file";
    Err(Error::at(Kind::Invalid, name, what))
}

/// A disk has whole sectors.
fn filled_up(bytes: u64) -> Option<String> {
    let more = bytes.next_multiple_of(SECTOR) - bytes;
    let what =
        format!("{bytes} bytes are no whole sectors: {more} zeroes stand behind them, as qemu-img does it");
    (more > 0).then_some(what)
}

/// With the files on which it stands as snapshots.
fn layered(
    args: Args,
    chain: Vec<ChainLink>,
    to: PathBuf,
    mut notes: Vec<String>,
) -> anyhow::Result<Outcome> {
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
    out::done(&text)?;
    Ok(Outcome::Done)
}

/// What a person should know, beyond what was made.
fn notes(args: &Args, chain: &[ChainLink]) -> Vec<String> {
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

fn alone(args: &Args, format: Format) -> Result<ChainLink> {
    let info = qemu::info(&args.file, format.as_str())?;
    if let Some(other) = info.other().filter(|_| !args.with_backing) {
        let layers = if info.backing.is_some() { "; --layers keeps it as a snapshot" } else { "" };
        let what = format!(
            "names the file {other}, and is not whole without it; --with-backing reads that, too, if you trust \
             it{layers}"
        );
        return Err(Error::at(Kind::NotPermitted, &args.file, what));
    }
    Ok(ChainLink { path: args.file.clone(), format: format.as_str().to_owned(), info })
}

/// What is about to be taken for plain bytes must not look like something else: cloud images are qcow2 and end in .img.
fn not_another(flat: &FlatFile) -> Result<()> {
    let read = |at: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        let read = flat.file().read_exact_at(&mut bytes, at);
        read.map(|()| bytes).map_err(|e| Error::io(&e, flat.path(), "cannot read"))
    };
    let head = read(0, flat.size().min(known::HEAD as u64))?;
    // A device has its own end, and not that of what was written to it.
    let is_file = flat.file().metadata().is_ok_and(|meta| !meta.file_type().is_block_device());
    let tail = if is_file { flat.size().min(known::TAIL as u64) } else { 0 };
    let tail = read(flat.size() - tail, tail)?;
    match known::looks_like(&head, &tail) {
        Some(what) => Err(Error::at(Kind::Unsupported, flat.path(), what)),
        None => Ok(()),
    }
}
