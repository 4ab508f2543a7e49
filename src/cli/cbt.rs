//! `ploopfs cbt`: changed-block tracking.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::work::{self, Executor, Pace};
use crate::cli::{Outcome, out, size, target};
use crate::disk::content;
use crate::error::Result;
use crate::vdisk::live::Work;
use crate::vdisk::tracking::Changes;

/// Arguments of `cbt`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Begin to track, and print the uuid of this moment
    ///
    /// Also while the disk is in use: what is written from the end of this command on is tracked. A disk that is tracked
    /// already is refused; stop that first, with the disk closed, or changes between the two are missed.
    Start {
        /// The image
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// Size of the pieces that are tracked, a power of two from 512 on [default: 64K, more for a large disk]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        granularity: Option<u64>,
    },
    /// Track no more
    Stop {
        /// The image
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
    },
    /// List the ranges that have changed since the tracking began
    ///
    /// Also while the disk is in use: what was written before is listed. Of a disk that is not tracked, everything is.
    Show(target::FactsArgs),
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let pace = Pace { rate: None };
    match args.what {
        What::Start { image, granularity } => {
            let path = target::find(&image)?;
            let done = work::carry_out(&path, &Work::Track { granularity }, pace)?;
            out::done(&format!("{}\n", done.name.unwrap_or_default()))?;
        }
        What::Stop { image } => {
            work::carry_out(&target::find(&image)?, &Work::Untrack, pace)?;
        }
        What::Show(which) => {
            let path = target::find(&which.image)?;
            let changes = of(&path)?;
            if which.json {
                out::json(&to_json(&path, &changes))?;
            } else {
                out::text(&to_text(&changes))?;
            }
        }
    }
    Ok(Outcome::Done)
}

/// What has changed in the image at `path`: by the daemon that serves it, else here under the same locks.
fn of(path: &Path) -> Result<Changes> {
    match Executor::of(path)? {
        Executor::Live(mut daemon, name) => Changes::whole(|start| daemon.client.changes(&name, start)),
        Executor::Offline => content::changes(path),
    }
}

fn to_json(path: &Path, changes: &Changes) -> serde_json::Value {
    let range = |(start, length): &(u64, u64)| json!({"start": start, "length": length});
    json!({
        "path": path.to_string_lossy(),
        "tracked": changes.uuid.is_some(),
        "uuid": changes.uuid,
        "reason": changes.reason,
        "size": changes.size,
        "granularity": changes.granularity,
        "bytes": changes.bytes(),
        "ranges": changes.ranges.iter().map(range).collect::<Vec<_>>(),
    })
}

fn to_text(changes: &Changes) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let all = size::human(changes.size);
    if let (Some(uuid), []) = (&changes.uuid, &changes.ranges[..]) {
        return format!("nothing of {all} has changed since {}\n", out::printable(uuid));
    }
    let _ = match &changes.uuid {
        Some(uuid) => {
            let part = size::human(changes.bytes());
            writeln!(text, "{part} of {all} have changed since {}", out::printable(uuid))
        }
        None => {
            let reason = out::printable(changes.reason.as_deref().unwrap_or("it is not tracked"));
            writeln!(text, "all of {all} count as changed: {reason}")
        }
    };
    let _ = writeln!(text, "{:>20} {:>20}", "START", "LENGTH");
    for (start, length) in &changes.ranges {
        let _ = writeln!(text, "{start:>20} {length:>20}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracked() -> Changes {
        let ranges = vec![(0, 65536), (1 << 20, 1 << 20)];
        Changes { uuid: Some("a-b".into()), size: 10 << 20, granularity: 65536, ranges, ..Changes::default() }
    }

    #[test]
    fn before_the_table_is_said_how_much_has_changed_since_when_or_why_everything_has() {
        let text = to_text(&tracked());
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.starts_with("1.1 MiB of 10 MiB have changed since a-b\n"), "{text}");
        let lost =
            Changes { uuid: None, reason: Some("lost".into()), ranges: vec![(0, 10 << 20)], ..tracked() };
        assert!(to_text(&lost).starts_with("all of 10 MiB count as changed: lost\n"), "{}", to_text(&lost));
    }

    #[test]
    fn where_nothing_has_changed_one_sentence_says_so_and_no_table_begins() {
        let none = Changes { ranges: Vec::new(), ..tracked() };
        assert_eq!(to_text(&none), "nothing of 10 MiB has changed since a-b\n");
    }
}
