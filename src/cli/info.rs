//! `ploopfs info`.

use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::served::{self, ServedImage};
use crate::cli::{Outcome, out, size, target};
use crate::control::protocol::content::SnapshotAnswer;
use crate::disk::facts::{Facts, LevelFacts};
use crate::disk::space::{ClusterOrder, Freed, Reclaimable};
use crate::error::{Error, Result};
use crate::format::header::{CLOSED, CLOSED_V21, Header, IN_USE};
use crate::image::chain::Form;
use crate::io::holder::{HeldLock, Holder};
use crate::io::lock::Use;
use crate::words::quoted;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: target::FactsArgs,
}

/// What stands for a daemon's lines where no daemon serves the image.
const OFFLINE: &str = "mode:        offline\n";

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.which.image)?;
    if target.path.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        && let Some(live) = served::image(&target.path)?
    {
        return without_file(&live, args.which.json);
    }
    let facts = Facts::of(&target)?;
    let live = served::image(&facts.path)?;
    let reclaimable = facts.reclaimable(live.is_some())?;
    // While our daemon has it open it says more of itself than a lock does.
    let ours = live.as_ref().is_some_and(|live| live.mode != "closed" || facts.snapshot.is_some());
    // What it says is about the live disk.
    let live = live.filter(|_| facts.snapshot.is_none());
    let holder = match facts.top() {
        Some(top) if !ours => holder(&top.file.path)?,
        _ => None,
    };
    if args.which.json {
        out::json(&to_json(&facts, &reclaimable, live.as_ref(), holder.as_ref()))?;
    } else {
        let live = live.as_ref().map_or_else(|| OFFLINE.to_owned(), ServedImage::to_text);
        let held = |holder: Holder| format!("held by:     {}\n", out::printable(&holder.to_string()));
        let held = holder.map(held).unwrap_or_default();
        out::text(&(to_text(&facts) + &space_text(&reclaimable, &facts.path) + &live + &held))?;
    }
    Ok(Outcome::Done)
}

/// An image whose file was removed while it was open: what its daemon says of it is all that there is.
fn without_file(live: &ServedImage, as_json: bool) -> anyhow::Result<Outcome> {
    let image = &live.image;
    if as_json {
        out::json(&json!({
            "name": image.name,
            "path": image.path,
            "kind": image.kind,
            "size": image.size,
            "allocated": image.allocated,
            "levels": [],
            "mode": live.mode,
            "in_use": true,
            "openers": live.openers,
            "reason": live.reason,
            "daemon": live.pid,
            "restarts": live.daemon.restarts,
            "last_pause_ms": live.daemon.last_pause_ms,
            "shown": live.shown.to_string_lossy(),
        }))?;
        return Ok(Outcome::Done);
    }
    let mut text = String::new();
    let rows = [
        ("name:", out::printable(&image.name)),
        ("file:", out::printable(&image.path)),
        ("kind:", out::printable(&image.kind)),
        ("size:", size::human(image.size)),
        ("allocated:", size::human(image.allocated)),
    ];
    for (label, value) in rows {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{label:<13}{value}");
    }
    out::text(&(text + &live.to_text()))?;
    Ok(Outcome::Done)
}

/// The other process that has the file locked.
fn holder(path: &Path) -> Result<Option<Holder>> {
    let file = path.metadata().map_err(|e| Error::io(&e, path, "cannot look at it"))?;
    // As a writer would see it: readers are holders, too.
    Ok(HeldLock::Delta { dev: file.dev(), ino: file.ino(), used: Use::Writer }.holder())
}

/// The in-use mark in words.
fn mark(header: &Header) -> String {
    match header.in_use {
        IN_USE => "set: open, or not closed cleanly".into(),
        CLOSED => "clear".into(),
        CLOSED_V21 => "clear (closed as v2.1)".into(),
        odd => format!("clear (odd value {odd:#x})"),
    }
}

/// One level in JSON.
fn level_json(level: &LevelFacts) -> Value {
    let (image, order) = (&level.file, level.order);
    let path = image.path.to_string_lossy();
    let mut level = json!({ "path": path, "kind": image.kind().as_str(), "length": image.len });
    if let Form::Ploop(header) = &image.form {
        let geometry = header.geometry();
        let more = json!({
            "version": header.version.to_string(),
            "cluster": geometry.cluster,
            "clusters": geometry.clusters(),
            "mapped": order.mapped,
            "pieces": order.pieces,
            "fragmentation": order.fragmentation(),
            "entries": geometry.entries,
            "first_block": geometry.first,
            "in_use": header.is_in_use(),
            "in_use_value": header.in_use,
            "flags": header.flags,
            "extension": header.extension,
        });
        if let (Some(level), Value::Object(more)) = (level.as_object_mut(), more) {
            level.extend(more);
        }
    }
    level
}

/// What could be given back, in JSON.
fn reclaimable_json(found: &Reclaimable) -> Value {
    let Reclaimable { leaked, leaked_unknown, snapshots } = found;
    let freed = |freed: &Freed| {
        let Freed { name, exclusive, reclaimable, why_not } = freed;
        json!({ "name": name, "exclusive": exclusive, "reclaimable": reclaimable, "why_not": why_not })
    };
    let snapshots: Vec<_> = snapshots.iter().map(freed).collect();
    json!({ "leaked": leaked, "leaked_unknown": leaked_unknown, "snapshots": snapshots })
}

fn to_json(
    facts: &Facts,
    reclaimable: &Reclaimable,
    live: Option<&ServedImage>,
    holder: Option<&Holder>,
) -> Value {
    let mut value = json!({
        "name": facts.name,
        "path": facts.path.to_string_lossy(),
        "kind": facts.kind(),
        "size": facts.size(),
        "allocated": facts.allocated(),
        "levels": facts.levels.iter().map(level_json).collect::<Vec<_>>(),
        "mode": "offline",
        "in_use": facts.header().is_some_and(Header::is_in_use),
        "openers": [],
        "reclaimable": reclaimable_json(reclaimable),
        "reason": facts.refusal,
    });
    let Some(fields) = value.as_object_mut() else { return value };
    if let Some(lines) = &facts.snapshots {
        let lines: Vec<_> = lines.iter().cloned().map(SnapshotAnswer::from).collect();
        fields.insert("snapshot".to_owned(), json!(facts.snapshot));
        fields.insert("snapshots".to_owned(), json!(lines));
    }
    if let Some(live) = live {
        fields.insert("mode".to_owned(), json!(live.mode));
        fields.insert("openers".to_owned(), json!(live.openers));
        fields.insert("reason".to_owned(), json!(live.reason));
        fields.insert("daemon".to_owned(), json!(live.pid));
        fields.insert("restarts".to_owned(), json!(live.daemon.restarts));
        fields.insert("last_pause_ms".to_owned(), json!(live.daemon.last_pause_ms));
        fields.insert("shown".to_owned(), json!(live.shown.to_string_lossy()));
    }
    if let Some(holder) = holder {
        fields.insert("holder".to_owned(), json!(holder.to_string()));
    }
    value
}

fn to_text(facts: &Facts) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let mut row = |label: &str, value: &str| {
        let _ = writeln!(text, "{:<13}{}", format!("{label}:"), out::printable(value));
    };
    let both = |bytes: u64| format!("{} ({bytes} bytes)", size::human(bytes));
    let path = facts.path.to_string_lossy();
    row("name", &facts.name);
    row(if facts.snapshots.is_some() { "folder" } else { "file" }, &path);
    if let Some(snapshot) = &facts.snapshot {
        row("snapshot", snapshot);
    }
    row("size", &both(facts.size()));
    row("allocated", &both(facts.allocated()));
    if let Some(lines) = &facts.snapshots {
        row("kind", "layered");
        if let Some(why) = &facts.refusal {
            row("not served", why);
        }
        let names: Vec<&str> = lines.iter().filter(|l| !l.current).map(|l| l.name.as_str()).collect();
        row("snapshots", &if names.is_empty() { "none".to_owned() } else { names.join(", ") });
        if let Some(header) = facts.header() {
            row("in-use mark", &mark(header));
        }
        for (index, level) in facts.levels.iter().enumerate() {
            let form = match &level.file.form {
                Form::Raw => "raw".to_owned(),
                Form::Ploop(header) => format!("ploop {}", header.version),
            };
            let file = level.file.path.file_name().unwrap_or_default().to_string_lossy();
            row(&format!("level {index}"), &format!("{file}, {form}, {}", size::human(level.file.allocated)));
            if matches!(level.file.form, Form::Ploop(_)) {
                row("fragmented", &order_text(level.order));
            }
        }
        return text;
    }
    for LevelFacts { file, order, .. } in &facts.levels {
        row("file length", &both(file.len));
        match &file.form {
            Form::Raw => row("kind", "raw"),
            Form::Ploop(header) => {
                let geometry = header.geometry();
                row("kind", &format!("ploop {}", header.version));
                row("cluster", &both(geometry.cluster));
                row("mapped", &format!("{} of {} clusters", order.mapped, geometry.clusters()));
                row("fragmented", &order_text(*order));
                row("in-use mark", &mark(header));
                if header.extension != 0 {
                    row("extension", &format!("at sector {}", header.extension));
                }
            }
        }
    }
    text
}

/// The order of a level in words.
fn order_text(order: ClusterOrder) -> String {
    match order.pieces {
        0 | 1 => "none, in one piece".to_owned(),
        pieces => format!("{}%, in {pieces} pieces", order.fragmentation()),
    }
}

/// The lines about what could be given back.
fn space_text(found: &Reclaimable, image: &Path) -> String {
    let mut text = String::new();
    let mut row = |label: &str, value: &str| {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{:<13}{}", format!("{label}:"), out::printable(value));
    };
    match (found.leaked, &found.leaked_unknown) {
        (Some(0), _) => row("reclaimable", "nothing leaked"),
        (Some(bytes), _) => {
            let command = format!("ploopfs check {} --repair", quoted(image));
            row("reclaimable", &format!("{} leaked: {command}", size::human(bytes)));
        }
        (None, Some(why)) => row("reclaimable", &format!("leaks are not known: {why}")),
        (None, None) => {}
    }
    for freed in &found.snapshots {
        let own = size::human(freed.exclusive);
        let gain = match &freed.why_not {
            Some(why) => format!("deleting it frees nothing: {why}"),
            None => format!("deleting it frees {}", size::human(freed.reclaimable)),
        };
        row("snapshot", &format!("{}: {own} of its own; {gain}", freed.name));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragmentation_is_told_in_percent_and_pieces() {
        let of = |mapped, pieces| order_text(ClusterOrder { mapped, pieces });
        assert_eq!(of(101, 11), "10%, in 11 pieces");
        assert_eq!(of(5, 1), "none, in one piece");
    }
}
