//! `ploopfs info`.

use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use crate::cli::space::{Order, Reclaimable};
use crate::cli::{Outcome, layered, out, served, size, target};
use crate::error::{Error, Kind};
use crate::format::header::{CLOSED, CLOSED_V21, Header, IN_USE};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::kind::Class;
use crate::io::holder::{Held, Holder};
use crate::io::lock::Use;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: target::Facts,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.which.image)?;
    if target.is_layered() {
        return layered::info(&target, args.which.json);
    }
    if target.snapshot.is_some() {
        return Err(Error::at(Kind::NotFound, &args.which.image, "the image has no snapshots").into());
    }
    let path = target.path;
    let live = served::image(&path)?;
    let candidate = Candidate::open(&path)?;
    let kind = candidate.kind()?;
    let name = match candidate.class() {
        Class::Image { name, .. } => name.to_string_lossy().into_owned(),
        Class::NotAnImage { .. } => String::new(),
    };
    let image = candidate.open_as(kind)?;
    let order = Order::of(&image)?;
    // While our daemon has it open it says more of itself than a lock does.
    let ours = live.as_ref().is_some_and(|live| live.mode != "closed");
    let holder = if ours { None } else { holder(&path)? };
    let reclaimable = Reclaimable::leaks(&path, live.is_some());
    if args.which.json {
        let mut value = to_json(&name, &image, order);
        value["reclaimable"] = json!(reclaimable);
        if let (Some(live), Some(fields)) = (&live, value.as_object_mut()) {
            fields.insert("mode".to_owned(), json!(live.mode));
            fields.insert("openers".to_owned(), json!(live.openers));
            fields.insert("reason".to_owned(), json!(live.reason));
            fields.insert("daemon".to_owned(), json!(live.pid));
            fields.insert("shown".to_owned(), json!(live.shown.to_string_lossy()));
        }
        if let (Some(holder), Some(fields)) = (&holder, value.as_object_mut()) {
            fields.insert("holder".to_owned(), json!(holder.to_string()));
        }
        out::json(&value)?;
    } else {
        let live = live.as_ref().map_or_else(|| OFFLINE.to_owned(), served::Live::to_text);
        let holder = holder.map(|holder| held_by(&holder)).unwrap_or_default();
        out::text(&(to_text(&name, &image, order) + &reclaimable.to_text(&path) + &live + &holder))?;
    }
    Ok(Outcome::Done)
}

/// What stands for a daemon's lines where no daemon serves the image.
pub const OFFLINE: &str = "mode:        offline\n";

/// The line about a process that has the image locked.
pub fn held_by(holder: &Holder) -> String {
    format!("held by:     {}\n", out::printable(&holder.to_string()))
}

/// The other process that has the file locked.
pub fn holder(path: &Path) -> anyhow::Result<Option<Holder>> {
    let file = std::fs::metadata(path)?;
    // As a writer would see it: readers are holders, too.
    Ok(Held::Delta { dev: file.dev(), ino: file.ino(), used: Use::Writer }.holder())
}

/// The in-use mark in words.
pub fn mark(header: &Header) -> String {
    match header.in_use {
        IN_USE => "set: open, or not closed cleanly".into(),
        CLOSED => "clear".into(),
        CLOSED_V21 => "clear (closed as v2.1)".into(),
        odd => format!("clear (odd value {odd:#x})"),
    }
}

/// One level in JSON.
pub fn level_json(image: &AtRest, order: Order) -> serde_json::Value {
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
        if let (Some(level), serde_json::Value::Object(more)) = (level.as_object_mut(), more) {
            level.extend(more);
        }
    }
    level
}

fn to_json(name: &str, image: &AtRest, order: Order) -> serde_json::Value {
    let path = image.path.to_string_lossy();
    let kind = image.kind().as_str();
    let in_use = matches!(&image.form, Form::Ploop(header) if header.is_in_use());
    let level = level_json(image, order);
    json!({
        "name": name,
        "path": path,
        "kind": kind,
        "size": image.size(),
        "allocated": image.allocated,
        "levels": [level],
        "mode": "offline",
        "in_use": in_use,
        "openers": [],
    })
}

fn to_text(name: &str, image: &AtRest, order: Order) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "{:<13}{value}", format!("{label}:"));
    };
    let both = |bytes: u64| format!("{} ({bytes} bytes)", size::human(bytes));
    row("name", out::printable(name));
    row("file", out::printable(&image.path.to_string_lossy()));
    row("size", both(image.size()));
    row("allocated", both(image.allocated));
    row("file length", both(image.len));
    match &image.form {
        Form::Raw => row("kind", "raw".into()),
        Form::Ploop(header) => {
            let geometry = header.geometry();
            row("kind", format!("ploop {}", header.version));
            row("cluster", both(geometry.cluster));
            row("mapped", format!("{} of {} clusters", order.mapped, geometry.clusters()));
            row("fragmented", order.to_text());
            row("in-use mark", mark(header));
            if header.extension != 0 {
                row("extension", format!("at sector {}", header.extension));
            }
        }
    }
    text
}
