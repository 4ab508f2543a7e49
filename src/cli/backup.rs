//! `ploopfs backup`.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::cli::source::Source;
use crate::cli::target::{self, Target};
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, layered, out};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::stream::Head;
use crate::image::create::DEFAULT_CLUSTER;
use crate::io::new_file::NewFile;
use crate::transfer::backup;
use crate::vdisk::live::Work;

/// Arguments of `backup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or IMAGE@SNAPSHOT
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// Only what may differ from this older snapshot
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<String>,
    /// Write to this new file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    pace: Pace,
}

/// How long a daemon may take to notice that a file was closed: far longer than it does.
const CLOSING: Duration = Duration::from_secs(5);
/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// Where the stream goes.
enum Output {
    New(NewFile),
    Stdout(File),
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let mut target = target::find_any(&args.image)?;
    let output = output(args.output.as_deref())?;
    let since = args.since.as_deref().map(|name| base(&target, name)).transpose()?;
    let own = match &target.snapshot {
        Some(_) => None,
        None => {
            let work = Work::Snapshot { label: None };
            let name = work::carry_out(&target.path, &work, Pace { rate: None })?.name.unwrap_or_default();
            // A single file is a folder now.
            target = Target { snapshot: Some(name.clone()), ..target::find_any(&args.image)? };
            Some(name)
        }
    };
    let result = write(&target, since, output, args.pace);
    let Some(name) = own else { return Ok(result.map(|()| Outcome::Done)?) };
    if let Err(e) = result {
        // Nobody can use it as a base: of this backup there is nothing.
        if let Err(e) = take_back(&target.path, &name) {
            let _ = writeln!(std::io::stderr(), "the snapshot {name} is left: {e}");
        }
        return Err(e.into());
    }
    // Not on standard output, which may be the backup. Nobody may be listening.
    let _ = writeln!(
        std::io::stderr(),
        "snapshot {} was taken and is kept: the base for --since; `ploopfs snapshot delete` removes it",
        out::printable(&name)
    );
    Ok(Outcome::Done)
}

/// Deletes the snapshot. The daemon hears a moment after us that we have closed it.
fn take_back(path: &Path, name: &str) -> Result<()> {
    let deadline = Instant::now() + CLOSING;
    loop {
        let work = Work::Delete { snapshot: name.to_owned() };
        match work::carry_out(path, &work, Pace { rate: None }) {
            Err(e) if e.kind() == Kind::InUse && Instant::now() < deadline => std::thread::sleep(LOOK),
            other => return other.map(drop),
        }
    }
}

fn output(path: Option<&Path>) -> Result<Output> {
    let Some(path) = path else {
        let stdout = std::io::stdout();
        if stdout.is_terminal() {
            let what = "a backup is not for a terminal; give it a file: -o FILE, or > FILE";
            return Err(Error::new(Kind::Invalid, what));
        }
        // Past the buffer of standard output, which looks for ends of lines.
        let fd = stdout.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|e| Error::io(&e, "standard output", "cannot use it"))?;
        return Ok(Output::Stdout(File::from(fd)));
    };
    NewFile::begin(path).map(Output::New)
}

/// GUID and name of the snapshot that is the base. Before anything is done.
fn base(target: &Target, name: &str) -> Result<(String, String)> {
    let lines = work::snapshots(&target.path)?;
    let found = lines.into_iter().find(|line| line.is(name) && !line.temporary);
    let missing = || {
        let what = format!("has no snapshot {name}; ploopfs snapshot list shows what it has");
        Error::at(Kind::NotFound, &target.path, what)
    };
    let line = found.ok_or_else(missing)?;
    if target.snapshot.as_ref().is_some_and(|snapshot| line.is(snapshot)) {
        let what = format!("the snapshot {name} does not differ from itself; name an older one");
        return Err(Error::at(Kind::Invalid, &target.path, what));
    }
    Ok((line.guid, line.name))
}

fn write(target: &Target, since: Option<(String, String)>, output: Output, pace: Pace) -> Result<()> {
    let mut source = Source::open(target)?;
    let diff = since.as_ref().map(|(guid, _)| source.since(guid)).transpose()?;
    let (base, base_name) = since.unwrap_or_default();
    let cluster = diff.as_ref().map(|diff| diff.cluster).or(source.cluster);
    let no_guid = || Error::at(Kind::Damaged, &target.path, format!("{} is no GUID", source.line.guid));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let name = match target::is_layered(&target.path) {
        true => layered::name(&target.path),
        false => target.path.file_stem().unwrap_or_default().to_owned(),
    };
    let head = Head {
        size: source.disk().size(),
        cluster: cluster.unwrap_or(DEFAULT_CLUSTER),
        guid: Guid::parse(&source.line.guid).ok_or_else(no_guid)?,
        base: Guid::parse(&base).unwrap_or(Guid::NONE),
        made: now.map_or(0, |now| now.as_secs()),
        image: name.to_string_lossy().into_owned(),
        name: source.line.name.clone(),
        base_name,
    };
    work::watched(&target.path, pace, move |progress| {
        let ranges = diff.as_ref().map(|diff| &*diff.ranges);
        match output {
            Output::New(file) => {
                backup::write(source.disk(), &head, ranges, &mut file.file(), progress)?;
                file.commit()
            }
            Output::Stdout(mut file) => backup::write(source.disk(), &head, ranges, &mut file, progress),
        }
    })
}
