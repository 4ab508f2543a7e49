//! What a command that makes or changes something says as JSON (`--json`), for programs. Fields are added, never renamed.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use crate::cli::out;
use crate::image::kind::in_text;
use crate::utc;

/// Of the object's fields: what a program that knows this number reads, a later one has as well.
const VERSION: u32 = 1;

/// What was done.
#[derive(Debug, Serialize)]
pub(super) struct Made<'a> {
    version: u32,
    /// When it was done, RFC 3339, in UTC.
    time: String,
    /// The command, such as `snapshot create`.
    command: &'static str,
    /// The image that it was done with, as it is found now; null: what was made is all.
    image: Option<String>,
    /// The snapshot that was made, gone back to, deleted or cloned; null: none, or the live disk.
    snapshot: Option<&'a str>,
    /// The new images, in the order in which they were asked for.
    images: Vec<String>,
    /// Size of each new disk in bytes, where the command says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// For people.
    note: Option<&'a str>,
}

impl<'a> Made<'a> {
    /// The command has just done something with `image`.
    pub(super) fn with(
        command: &'static str,
        image: &Path,
        snapshot: Option<&'a str>,
        note: Option<&'a str>,
    ) -> Made<'a> {
        let made = Made::of(command, &[], None);
        Made { image: Some(in_text(image.as_os_str())), snapshot, note, ..made }
    }

    /// The command has just made `images`.
    pub(super) fn of(command: &'static str, images: &[PathBuf], size: Option<u64>) -> Made<'a> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Made {
            version: VERSION,
            time: utc::rfc3339(i64::try_from(now).unwrap_or(i64::MAX)),
            command,
            image: None,
            snapshot: None,
            images: Vec::new(),
            size,
            note: None,
        }
        .and(images)
    }

    /// The same, which has made `images`.
    pub(super) fn and(self, images: &[PathBuf]) -> Made<'a> {
        Made { images: images.iter().map(|image| in_text(image.as_os_str())).collect(), ..self }
    }

    /// Prints it. Where that fails, the error has it: done it is all the same.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        out::done(&(serde_json::to_string_pretty(self)? + "\n"))
    }
}
