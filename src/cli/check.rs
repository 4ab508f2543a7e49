//! `ploopfs check`.

use std::fmt::Write;

use serde_json::json;

use crate::cli::{Outcome, layered, out, repair, size, target};
use crate::format::header::SECTOR;
use crate::image::check::{Report, check};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: target::Facts,
    /// Put right what can be put right, and say what is lost
    #[arg(long)]
    repair: bool,
    /// Only show what --repair would do
    #[arg(long, requires = "repair")]
    dry_run: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.which.image)?;
    if args.repair {
        return repair::run(&path, args.dry_run, args.which.json);
    }
    if target::is_layered(&path) {
        return layered::check(&path, args.which.json);
    }
    let report = check(&path)?;
    if args.which.json {
        out::json(&to_json(&report))?;
    } else {
        out::text(&to_text(&report))?;
    }
    Ok(if report.is_damaged() { Outcome::Damaged } else { Outcome::Done })
}

/// A report in JSON.
pub fn to_json(report: &Report) -> serde_json::Value {
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "problem": finding.problem.as_str(),
                "cluster": finding.cluster,
                "offset": finding.offset,
                "message": finding.message,
            })
        })
        .collect();
    json!({
        "path": report.path.to_string_lossy(),
        "kind": report.kind.as_str(),
        "errors": report.errors,
        "leaks": report.leaks,
        "tail": report.tail,
        "free": report.free,
        "mapped": report.mapped,
        "in_use": report.in_use,
        // What looks repairs nothing; `repair` puts its own number here.
        "repaired": 0,
        "findings": findings,
        "notes": report.notes,
    })
}

/// A report in words.
pub fn to_text(report: &Report) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let mut line = |what: std::fmt::Arguments| {
        let _ = writeln!(text, "{what}");
    };
    for finding in &report.findings {
        line(format_args!("error: {finding}"));
    }
    let unsaid = report.errors - report.findings.len() as u64;
    if unsaid > 0 {
        line(format_args!("error: {unsaid} more of the kind"));
    }
    if report.in_use {
        line(format_args!("in use: the image was not closed cleanly, or somebody has it open"));
    }
    if report.leaks > 0 {
        let cluster = report.header.map_or(0, |header| u64::from(header.cluster_sectors) * SECTOR);
        let (bytes, tail) = (size::human(report.leaks.saturating_mul(cluster)), report.tail);
        line(format_args!(
            "leaks: {} ({bytes}) that nothing refers to, {tail} at the end",
            size::count(report.leaks, "cluster")
        ));
    }
    if report.free > 0 {
        let holes = size::count(report.free, "cluster");
        line(format_args!("free: {holes} inside the file, as holes, which cost nothing"));
    }
    for note in &report.notes {
        line(format_args!("note: {note}"));
    }
    let path = out::printable(&report.path.to_string_lossy());
    match (report.errors, report.leaks, report.in_use) {
        (0, 0, false) => line(format_args!("{path}: no errors")),
        (0, ..) => line(format_args!("{path}: no errors; the above does no harm")),
        (1, ..) => line(format_args!("{path}: damaged, 1 error; keep a copy before anything else")),
        (errors, ..) => {
            line(format_args!("{path}: damaged, {errors} errors; keep a copy before anything else"))
        }
    }
    text
}
