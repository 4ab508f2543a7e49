//! `ploopfs snapshot`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::freeze::FrozenFileSystems;
use crate::cli::made::Made;
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, attach, out, served, size, target};
use crate::control::protocol::content::SnapshotAnswer;
use crate::disk::find::is_layered;
use crate::disk::layered::Layered;
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::io::loopdev;
use crate::utc;
use crate::vdisk::live::{Done, Work};

/// Arguments of `snapshot`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Keep the disk as it is now under a name, and print the name
    ///
    /// The disk may be in use: its user waits for some milliseconds. The snapshot holds what was written to it until
    /// then, as after a power cut; with --freeze, what is in the caches of a file system on it too.
    Create {
        /// The image
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// Its name: letters, digits, dots, dashes and underscores [default: the time, in UTC]
        #[arg(value_name = "NAME")]
        name: Option<String>,
        /// Freeze the file systems mounted from it through loop devices meanwhile, 10 s at most
        #[arg(long)]
        freeze: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the snapshots of an image, and how much space they take
    ///
    /// TAKEN is -, where another program took it. OWN is what a snapshot's own file takes, SHARED what it has in common with
    /// those it stands on. One that is deleted stays until its data is merged.
    List {
        #[command(flatten)]
        which: target::FactsArgs,
    },
    /// Delete a snapshot; every other one, and the disk, keep their content
    ///
    /// Its data goes to the only one that stands on it. Where several do, it is only marked, and goes away with the last
    /// but one of them. May be interrupted, and be done again.
    ///
    /// Over a raw file, what has changed goes down into it where that is less; with its last snapshot gone the image is that
    /// file again. Not while the disk is open: then all of the raw file is copied up, and the image is in the ploop format.
    Delete {
        #[command(flatten)]
        which: Named,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        pace: Pace,
    },
    /// Go back to a snapshot; what the disk has had since then is lost, unless a snapshot has it
    ///
    /// Refused while the disk is open.
    Switch {
        #[command(flatten)]
        which: Named,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// An image and one of its snapshots.
#[derive(Debug, clap::Args)]
pub struct Named {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// The snapshot: its name or its GUID
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: String,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    match args.what {
        What::Create { image, name, freeze, json } => {
            let path = target::find(&image)?;
            let name = create(&path, name, freeze)?;
            if json {
                Made::with("snapshot create", &work::as_it_is(&path), Some(&name), None).print()?;
            } else {
                out::done(&format!("{}\n", out::printable(&name)))?;
            }
        }
        What::List { which } => {
            let lines = work::snapshots(&target::find(&which.image)?)?;
            if which.json {
                let lines: Vec<_> = lines.into_iter().map(SnapshotAnswer::from).collect();
                out::json(&json!({ "snapshots": lines }))?;
            } else {
                out::text(&to_text(&lines))?;
            }
        }
        What::Delete { which, json, pace } => {
            let path = target::find(&which.image)?;
            forewarn(&path, &which.snapshot)?;
            let work = Work::Delete { snapshot: which.snapshot.clone() };
            changed("snapshot delete", &path, &which.snapshot, &work::carry_out(&path, &work, pace)?, json)?;
        }
        What::Switch { which, json } => {
            let path = target::find(&which.image)?;
            let work = Work::Switch { snapshot: which.snapshot.clone() };
            let done = work::carry_out(&path, &work, Pace { rate: None })?;
            changed("snapshot switch", &path, &which.snapshot, &done, json)?;
        }
    }
    Ok(Outcome::Done)
}

/// Says on standard error, before a merge begins, that it copies all of a raw base and that the image is ploop afterwards,
/// where that is so. What is wrong with the image or the name, the work itself says.
pub fn forewarn(path: &Path, snapshot: &str) -> anyhow::Result<()> {
    if !is_layered(path) {
        return Ok(());
    }
    let Ok(image) = Layered::read(path) else { return Ok(()) };
    let Ok(guid) = image.guid(Some(snapshot)) else { return Ok(()) };
    let Some(merge) = image.raw_merge(guid) else { return Ok(()) };
    let waits =
        merge.goes_down && merge.under_the_disk && served::stays_open(path, |_| true).unwrap_or(false);
    if merge.goes_down && !waits {
        return Ok(());
    }
    let rather = match waits {
        true => {
            "; while nothing has the disk open, only what has changed is copied, and it stays raw: Ctrl-C, close it, \
             and give this command again"
        }
        false => "",
    };
    out::say(&format!(
        "{snapshot} is a raw file: up to {} of it are copied into the file that stands on it, and the image is in the \
         ploop format afterwards{rather}",
        size::human(merge.bytes)
    ));
    Ok(())
}

/// What came of work with a snapshot.
fn changed(
    command: &'static str,
    path: &Path,
    snapshot: &str,
    done: &Done,
    json: bool,
) -> anyhow::Result<()> {
    match json {
        true => Made::with(command, &work::as_it_is(path), Some(snapshot), done.note.as_deref()).print(),
        false => say(done),
    }
}

/// What a person should know of work that was done.
pub fn say(done: &Done) -> anyhow::Result<()> {
    match &done.note {
        Some(note) => out::text(&format!("{}\n", out::printable(note))),
        None => Ok(()),
    }
}

fn create(path: &Path, name: Option<String>, freeze: bool) -> Result<String> {
    let frozen = if freeze {
        let shown = attach::shown(path)?;
        Some(FrozenFileSystems::new(path, &loopdev::over(&shown)?)?)
    } else {
        None
    };
    let work = Work::Snapshot { label: name };
    let done = work::carry_out(path, &work, Pace { rate: None });
    // Thawed before anything is said, whatever came of it.
    let in_time = frozen.is_none_or(FrozenFileSystems::thaw);
    let name = done?.name.unwrap_or_default();
    if !in_time {
        let what = format!(
            "the snapshot {name} was made, but its file system was thawed before (after 10 s, or by another program): \
             it is as after a power cut"
        );
        return Err(Error::at(Kind::Io, path, what));
    }
    Ok(name)
}

fn to_text(lines: &[SnapshotLine]) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    // With the widest state a line has 80 columns; a name that is longer moves what follows it.
    let _ = writeln!(text, "{:<28} {:<19} {:>10} {:>10}  STATE", "NAME", "TAKEN (UTC)", "OWN", "SHARED");
    // Depth first; what was not shown yet, with its indentation. Only where several stand on one it grows, so that a
    // long chain stays readable.
    let children = |parent: Option<&str>| -> Vec<&SnapshotLine> {
        lines.iter().filter(|line| line.parent.as_deref() == parent).rev().collect()
    };
    let mut waiting: Vec<(&SnapshotLine, usize)> = children(None).into_iter().map(|line| (line, 0)).collect();
    while let Some((line, depth)) = waiting.pop() {
        let name = if line.current { "(the disk)" } else { &line.name };
        let name = format!("{:width$}{}", "", out::printable(name), width = 2 * depth);
        let taken = line.created.map_or_else(|| "-".to_owned(), utc::shown);
        let state = match (line.current, line.temporary) {
            (true, _) => "current",
            (_, true) => "deleted",
            _ => "",
        };
        let (own, shared) = (size::human(line.exclusive), size::human(line.shared));
        let row = format!("{name:<28} {taken:<19} {own:>10} {shared:>10}  {state}");
        let _ = writeln!(text, "{}", row.trim_end());
        let above = children(Some(&line.guid));
        let depth = depth + usize::from(above.len() > 1);
        waiting.extend(above.into_iter().map(|child| (child, depth)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, parent: Option<&str>) -> SnapshotLine {
        let (guid, parent) = (format!("{{{name}}}"), parent.map(|p| format!("{{{p}}}")));
        SnapshotLine { name: name.into(), guid, parent, created: Some(0), ..SnapshotLine::default() }
    }

    #[test]
    fn the_tree_is_indented_where_it_branches() {
        let mut lines =
            vec![line("a", None), line("b", Some("a")), line("c", Some("b")), line("d", Some("b"))];
        lines[3].current = true;
        let text = to_text(&lines);
        let names: Vec<&str> = text.lines().skip(1).map(|l| l[..12].trim_end()).collect();
        assert_eq!(names, ["a", "b", "  c", "  (the disk)"]);
        assert!(text.contains("1970-01-01 00:00:00"), "{text}");
    }
}
