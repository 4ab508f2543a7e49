//! What `check` and `check --repair` found, in words and in JSON.

use std::fmt::Write;

use serde_json::json;

use crate::cli::{out, size};
use crate::disk::examine::Examined;
use crate::format::header::SECTOR;
use crate::image::check::CheckReport;

/// A report in JSON.
pub fn to_json(report: &CheckReport) -> serde_json::Value {
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
pub fn to_text(report: &CheckReport) -> String {
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
        line(format_args!("in use: the image was not closed cleanly, or another program has it open"));
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

/// A report of a layered image in JSON.
pub fn layered_json(examined: &Examined) -> serde_json::Value {
    let top = examined.image.descriptor().top;
    let sum =
        |of: fn(&CheckReport) -> u64| examined.reports.iter().map(|(_, report)| of(report)).sum::<u64>();
    let deltas: Vec<_> = examined.reports.iter().map(|(_, report)| to_json(report)).collect();
    json!({
        "path": examined.image.folder().to_string_lossy(),
        "kind": "layered",
        "errors": examined.faults.len() as u64 + sum(|report| report.errors),
        "leaks": sum(|report| report.leaks),
        "in_use": examined.reports.iter().any(|(guid, report)| *guid == top && report.in_use),
        "repaired": 0,
        "findings": examined.faults,
        "notes": examined.notes,
        "deltas": deltas,
    })
}

/// The same in words.
pub fn layered_text(examined: &Examined) -> String {
    let mut text: String = examined.reports.iter().map(|(_, report)| to_text(report)).collect();
    // Writing into a String cannot fail.
    for fault in &examined.faults {
        let _ = writeln!(text, "error: {}", out::printable(fault));
    }
    for note in &examined.notes {
        let _ = writeln!(text, "note: {}", out::printable(note));
    }
    let verdict =
        if examined.is_damaged() { "damaged; keep a copy before anything else" } else { "no errors" };
    let _ = writeln!(text, "{}: {verdict}", out::printable(&examined.image.folder().to_string_lossy()));
    text
}
