//! `ploopfs diff`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::work::Executor;
use crate::cli::{Outcome, out, size, target};
use crate::control::protocol::content::DiffSideAnswer;
use crate::disk::content;
use crate::error::Result;
use crate::image::diff::{Diff, Side};

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// A snapshot: its name or its GUID
    #[arg(value_name = "FROM")]
    from: String,
    /// Another one [default: the live disk]
    #[arg(value_name = "TO")]
    to: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.image)?;
    let diff = of(&path, &args.from, args.to.as_deref())?;
    if args.json {
        let ranges: Vec<_> =
            diff.ranges.iter().map(|(start, length)| json!({"start": start, "length": length})).collect();
        out::json(&json!({
            "path": path.to_string_lossy(),
            "from": DiffSideAnswer::from(diff.from.clone()),
            "to": DiffSideAnswer::from(diff.to.clone()),
            "cluster": diff.cluster,
            "bytes": diff.bytes(),
            "ranges": ranges,
        }))?;
    } else {
        out::text(&to_text(&diff))?;
    }
    Ok(Outcome::Done)
}

/// Compares two snapshots of the image at `path`: by the daemon that serves it, else here under the same locks.
fn of(path: &Path, from: &str, to: Option<&str>) -> Result<Diff> {
    match Executor::of(path)? {
        Executor::Live(mut daemon, name) => Diff::whole(|start| daemon.client.diff(&name, from, to, start)),
        Executor::Offline => content::diff(path, from, to),
    }
}

fn to_text(diff: &Diff) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{:>20} {:>20}", "START", "LENGTH");
    for (start, length) in &diff.ranges {
        let _ = writeln!(text, "{start:>20} {length:>20}");
    }
    let name = |side: &Side| match &*side.name {
        "" => "the disk".to_owned(),
        name => out::printable(name),
    };
    let _ = writeln!(
        text,
        "{} of {} may differ between {} and {}",
        size::human(diff.bytes()),
        size::human(diff.from.size.max(diff.to.size)),
        name(&diff.from),
        name(&diff.to)
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_sums_up_what_may_differ() {
        let side = |name: &str| Side { name: name.into(), guid: String::new(), size: 10 << 20 };
        let diff = Diff {
            from: side("monday"),
            to: side(""),
            cluster: 1 << 20,
            ranges: vec![(0, 1 << 20), (5 << 20, 2 << 20)],
            next: None,
        };
        let text = to_text(&diff);
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.ends_with("3 MiB of 10 MiB may differ between monday and the disk\n"), "{text}");
    }
}
