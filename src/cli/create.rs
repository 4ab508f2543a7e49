//! `ploopfs create`.

use std::path::PathBuf;

use crate::cli::made::Made;
use crate::cli::{Outcome, out, size, source};
use crate::image::create::{CreatePlan, create, template_cluster};
use crate::image::kind::ImageKind;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The new image, such as images/vm1
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Size of the disk, such as 10G; rounded up to a cluster
    #[arg(long, value_name = "SIZE", value_parser = size::parse_disk)]
    size: u64,
    /// Cluster size: a power of two from 32K to 64M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster: Option<u64>,
    /// Clusters for an image that many clones will be made of: 64K, more for a disk above 64G
    ///
    /// A clone's first write to a cluster copies all of it: small ones cost less space and time where many disks stand on one.
    #[arg(long, conflicts_with = "cluster")]
    template: bool,
    /// How the image is stored [default: ploop, or as the name ends]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Take all the space on the host now
    #[arg(long)]
    preallocate: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// Thin, with everything ploopfs can do
    Ploop,
    /// Plain bytes
    Raw,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let kind = args.format.map(|format| match format {
        Format::Ploop => ImageKind::Ploop,
        Format::Raw => ImageKind::Raw,
    });
    let plan = CreatePlan {
        kind,
        cluster: args.cluster.or_else(|| args.template.then(|| template_cluster(args.size))),
        preallocate: args.preallocate,
        ..CreatePlan::thin(args.size)
    };
    let created = create(&args.image, &plan)?;
    source::show(&created.path)?;
    if args.json {
        let path = std::path::absolute(&created.path).unwrap_or_else(|_| created.path.clone());
        Made::of("create", &[path], Some(created.size)).print()?;
        return Ok(Outcome::Done);
    }
    let path = out::printable(&created.path.to_string_lossy());
    out::done(&format!("created {path}, {}\n", size::human(created.size)))?;
    Ok(Outcome::Done)
}
