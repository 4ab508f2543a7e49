//! `ploopfs import`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, clone, out, size, source};
use crate::error::{Error, Kind, Result};
use crate::format::header::has_magic;
use crate::image::create::{Draft, Plan};
use crate::transfer::disk::{Disk, FlatFile};
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
    /// Cluster size: a power of two from 32K to 64M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster: Option<u64>,
    /// Read the files, too, that FILE names: of which it is an overlay, or that hold its data. Only if you trust it
    #[arg(long)]
    with_backing: bool,
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
    let bytes = if format == Format::Raw { flat.size() } else { other_size(&args, format)? };
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
    source::show(&created.path)?;
    let path = out::printable(&created.path.to_string_lossy());
    out::text(&format!("created {path}, {}\n", size::human(created.size)))?;
    Ok(Outcome::Done)
}

fn other_size(args: &Args, format: Format) -> Result<u64> {
    let info = qemu::info(&args.file, format.as_str())?;
    if let Some(other) = info.other.filter(|_| !args.with_backing) {
        let what = format!(
            "names the file {}, and is not whole without it; --with-backing reads that, too, if you trust it",
            out::printable(&other)
        );
        return Err(Error::at(Kind::NotPermitted, &args.file, what));
    }
    Ok(info.size)
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
