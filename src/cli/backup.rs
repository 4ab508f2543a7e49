//! `ploopfs backup`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::cli::output::{pipe, stdout};
use crate::cli::source::DiskSource;
use crate::cli::target::{self, Target};
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, served};
use crate::disk::find;
use crate::disk::work::to_file;
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::stream::Head;
use crate::image::create::DEFAULT_CLUSTER;
use crate::io::new_file::NewFile;
use crate::transfer::backup;
use crate::utc;
use crate::vdisk::live::Work;
use crate::words::quoted;

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
    Pipe(File),
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let mut target = target::find_any(&args.image)?;
    let output = output(args.output.as_deref())?;
    let since = args.since.as_deref().map(|name| base(&target, name)).transpose()?;
    // What it is before its first snapshot.
    let file = (!target.is_layered()).then(|| target.path.file_name().map(OsStr::to_owned)).flatten();
    let own = match &target.snapshot {
        Some(_) => None,
        // Nothing can change it, so that it stands still by itself; and no snapshot can be put there.
        None if cannot_change(&target)? => None,
        None => {
            let work = Work::Snapshot { label: None };
            let name = work::carry_out(&target.path, &work, Pace { rate: None })?.name.unwrap_or_default();
            // A single file is a folder now.
            target = Target { snapshot: Some(name.clone()), ..target::find_any(&args.image)? };
            Some(name)
        }
    };
    let as_it_stands = target.snapshot.is_none();
    let result = write(&target, since, output, args.pace);
    let Some(name) = own else {
        result?;
        if as_it_stands {
            let what = "backed up as it stands: the host is read-only, so that no snapshot was taken, and no later backup \
                        can be made --since this one";
            let _ = writeln!(std::io::stderr(), "{what}");
        }
        return Ok(Outcome::Done);
    };
    if let Err(e) = result {
        // It is no base for another backup: of this one there is nothing.
        let taken_back = take_back(&target.path, &name);
        if taken_back.is_ok()
            && let Some(file) = file.filter(|_| served::serving(&target.path).is_ok_and(|by| by.is_none()))
            && let Err(e) = to_file(&target.path, &file)
        {
            log::debug!("{e}; the image stays a folder");
        }
        if let Err(e) = taken_back {
            let _ = writeln!(
                std::io::stderr(),
                "ploopfs: the snapshot {0} is left, of which there is no backup ({e}); this removes it: ploopfs snapshot delete \
                 {1} {0}",
                quoted(&name),
                quoted(&target.path)
            );
        }
        return Err(e.into());
    }
    // Not on standard output, which may be the backup. A closed stderr is no failure.
    let _ = writeln!(
        std::io::stderr(),
        "snapshot {0} was taken and is kept: the base for --since; this removes it: ploopfs snapshot delete {1} {0}",
        quoted(&name),
        quoted(&target.path)
    );
    Ok(Outcome::Done)
}

/// True for a disk that neither we nor anything else here can write: its place is read-only, or the mount that serves it.
fn cannot_change(target: &Target) -> Result<bool> {
    if let Some((_, image)) = served::serving(&target.path)? {
        return Ok(image.mode == "read-only" && is_read_only(&target.path)?);
    }
    is_read_only(&target.path)
}

/// True where the host's file system says so.
fn is_read_only(path: &Path) -> Result<bool> {
    let status = rustix::fs::statvfs(path).map_err(|e| Error::io(&e.into(), path, "cannot look at it"))?;
    Ok(status.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Deletes the snapshot. The daemon hears a moment after us that we have closed it.
fn take_back(path: &Path, name: &str) -> Result<()> {
    let deadline = Instant::now() + CLOSING;
    loop {
        let work = Work::Delete { snapshot: name.to_owned() };
        match work::clear_up(path, &work) {
            Err(e) if e.kind() == Kind::InUse && Instant::now() < deadline => std::thread::sleep(LOOK),
            other => return other.map(drop),
        }
    }
}

fn output(path: Option<&Path>) -> Result<Output> {
    let Some(path) = path else {
        return stdout("a backup", "give it a file: -o FILE, or > FILE").map(Output::Pipe);
    };
    match pipe(path, "a backup")? {
        Some(pipe) => Ok(Output::Pipe(pipe.into_file())),
        None => NewFile::begin(path).map(Output::New),
    }
}

/// GUID and name of the snapshot that is the base. Before anything is done.
fn base(target: &Target, name: &str) -> Result<(String, String)> {
    let lines = work::snapshots(&target.path)?;
    let found = lines.into_iter().find(|line| line.is(name) && !line.temporary);
    let missing = || {
        let list = quoted(&target.path);
        let what = format!("has no snapshot {name}; these are there: ploopfs snapshot list {list}");
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
    let mut source = DiskSource::open(target)?;
    let diff = since.as_ref().map(|(guid, _)| source.since(guid)).transpose()?;
    let (base, base_name) = since.unwrap_or_default();
    let cluster = diff.as_ref().map(|diff| diff.cluster).or(source.cluster());
    let no_guid = || Error::at(Kind::Damaged, &target.path, format!("{} is no GUID", source.line().guid));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // The live disk has no identity that a snapshot could have.
    let (guid, label) = match &target.snapshot {
        Some(_) => (Guid::parse(&source.line().guid).ok_or_else(no_guid)?, source.line().name.clone()),
        None => (Guid::random(), utc::label(now.as_ref().map_or(0, Duration::as_secs))),
    };
    let head = Head {
        size: source.disk().size(),
        cluster: cluster.unwrap_or(DEFAULT_CLUSTER),
        guid,
        base: Guid::parse(&base).unwrap_or(Guid::NONE),
        made: now.map_or(0, |now| now.as_secs()),
        image: find::name(&target.path)?.to_string_lossy().into_owned(),
        name: label,
        base_name,
    };
    work::watched(&target.path, pace, move |progress| {
        let ranges = diff.as_ref().map(|diff| &*diff.ranges);
        match output {
            Output::New(file) => {
                backup::write(source.disk(), &head, ranges, &mut file.file(), progress)?;
                file.commit()
            }
            Output::Pipe(mut file) => backup::write(source.disk(), &head, ranges, &mut file, progress),
        }
    })
}
