//! The rows of a listing, made from what lies in the folder: no daemon is asked, and nothing is locked.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::target;
use crate::disk::layered::Layered;
use crate::error::{Error, Kind};
use crate::image::chain::Candidate;
use crate::image::kind::{self, Class, DESCRIPTOR, NAMED_BY_DESCRIPTOR, in_text};
use crate::io::mounts;

/// A descriptor larger than this (in bytes) names no files; ploop's own are some KiB.
const MAX_DESCRIPTOR: u64 = 16 << 20;

/// stat(2) counts blocks of this many bytes, whatever the file system's own are.
const SECTOR: u64 = 512;

/// The kind of an image with a descriptor.
const LAYERED: &str = "layered";

/// One image; the fields of `--json`.
#[derive(Debug, Default, Serialize)]
pub(super) struct Row {
    pub name: String,
    pub path: String,
    pub kind: Cow<'static, str>,
    /// Disk size in bytes; none where the image cannot be read.
    pub size: Option<u64>,
    /// Space taken on the host, in bytes.
    pub allocated: u64,
    pub served: bool,
    /// Why it is not served; none for a good image.
    pub reason: Option<String>,
    /// What it can do now; none where no daemon serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The loop devices over it.
    pub loops: Vec<Attached>,
}

/// A loop device over an image.
#[derive(Debug, Serialize)]
pub(super) struct Attached {
    pub device: PathBuf,
    pub direct_io: bool,
    /// The line that switches direct I/O on, where it is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// What is no image.
#[derive(Debug, Serialize)]
pub(super) struct Other {
    pub path: String,
    pub reason: String,
}

/// What lies in `folder`: images, and what is none, with the reason. `served`: a daemon serves it.
pub(super) fn look(folder: &Path, served: bool) -> Result<(Vec<Row>, Vec<Other>), Error> {
    let cannot = |e: &std::io::Error| Error::io(e, folder, "cannot list the folder");
    let mut names = Vec::new();
    for entry in folder.read_dir().map_err(|e| cannot(&e))? {
        names.push(entry.map_err(|e| cannot(&e))?.file_name());
    }
    names.sort();
    let descriptor = read_descriptor(&folder.join(DESCRIPTOR));
    let (mut images, mut others) = (Vec::new(), Vec::new());
    let strange = mounts::of_others(folder);
    for name in &names {
        let path = if folder == Path::new(".") { name.into() } else { folder.join(name) };
        if let Some(mount) = strange.iter().find(|mount| mount.point.file_name() == Some(name)) {
            others.push(Other { path: in_text(path.as_os_str()), reason: mount.not_ours() });
            continue;
        }
        match entry(&path, name, &descriptor, served) {
            Ok(row) => images.push(row),
            Err(reason) => others.push(Other { path: in_text(path.as_os_str()), reason }),
        }
    }
    refuse_levels(folder, &mut images);
    refuse_shared_names(&mut images);
    Ok((images, others))
}

/// One entry of the folder as an image, or why it is none.
fn entry(path: &Path, name: &OsStr, descriptor: &[u8], served: bool) -> Result<Row, String> {
    // The name alone may rule it out; then it is not even opened.
    if name.as_encoded_bytes().starts_with(b".")
        && let Class::NotAnImage { reason } = kind::classify(name, true, b"")
    {
        return Err(reason);
    }
    if target::is_layered(path) {
        return Ok(layered_row(path, served));
    }
    let candidate = match Candidate::open(path) {
        Ok(candidate) => candidate,
        Err(e) => return unreadable(path, name, &e),
    };
    let (name, kind) = match candidate.class() {
        Class::Image { name, kind } => (name, kind),
        Class::NotAnImage { reason } => return Err(reason),
    };
    if path.file_name().is_some_and(|name| kind::descriptor_names(descriptor, name)) {
        return Err(NAMED_BY_DESCRIPTOR.into());
    }
    let (_, allocated) = candidate.extent();
    let (size, reason) = match candidate.open_as(kind) {
        Ok(image) => {
            let damage = image.glance().err();
            (Some(image.size()), damage.map(|e| format!("damaged: {}", without_path(&e, path))))
        }
        Err(e) => (None, Some(format!("damaged: {}", without_path(&e, path)))),
    };
    Ok(Row {
        name: in_text(&name),
        path: in_text(path.as_os_str()),
        kind: kind.as_str().into(),
        size,
        allocated,
        reason,
        ..Row::default()
    })
}

/// A folder with a descriptor.
fn layered_row(path: &Path, served: bool) -> Row {
    let (mut size, mut allocated) = (None, 0);
    let reason = match Layered::read(path) {
        Ok(image) => {
            (size, allocated) = (Some(image.size()), image.allocated());
            // Whether its files may lie elsewhere a daemon that serves it knows better.
            let known = |e: &Error| served && e.kind() == Kind::NotPermitted;
            image.glance().err().filter(|e| !known(e)).map(|e| match e.kind() {
                Kind::Damaged => format!("damaged: {}", without_path(&e, path)),
                _ => without_path(&e, path),
            })
        }
        Err(e) => Some(format!("damaged: {}", without_path(&e, path))),
    };
    Row {
        name: in_text(&kind::folder_image_name(path.file_name().unwrap_or_default())),
        path: in_text(path.as_os_str()),
        kind: LAYERED.into(),
        size,
        allocated,
        reason,
        ..Row::default()
    }
}

/// What could not be opened or read: an image by its name all the same, unless it is no regular file.
fn unreadable(path: &Path, name: &OsStr, e: &Error) -> Result<Row, String> {
    let reason = without_path(e, path);
    match (kind::classify(name, true, b""), path.symlink_metadata()) {
        (Class::Image { name, kind }, Ok(meta)) if meta.is_file() => Ok(Row {
            name: in_text(&name),
            path: in_text(path.as_os_str()),
            kind: kind.as_str().into(),
            size: None,
            allocated: meta.blocks() * SECTOR,
            reason: Some(reason),
            ..Row::default()
        }),
        _ => Err(reason),
    }
}

/// The error's text without the file in front, which stands beside it.
fn without_path(error: &Error, path: &Path) -> String {
    let text = error.to_string();
    let rest = text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text);
    rest.strip_prefix("not an image: ").unwrap_or(rest).to_owned()
}

/// A file that a descriptor in the folder names, under whatever name, is a level of that image and not served by itself.
fn refuse_levels(folder: &Path, images: &mut [Row]) {
    let mut levels: HashMap<(u64, u64), String> = HashMap::new();
    let below = images.iter().filter(|row| row.kind == LAYERED).map(|row| Path::new(&row.path));
    // The folder may be an image itself.
    for image in below.chain([folder]).filter_map(|folder| Layered::read(folder).ok()) {
        let name = in_text(image.folder().as_os_str());
        levels.extend(image.files().map(|file| (file, name.clone())));
    }
    for row in images.iter_mut().filter(|row| row.kind != LAYERED && row.reason.is_none()) {
        let file = Path::new(&row.path).symlink_metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        if let Some(folder) = file.and_then(|file| levels.get(&file)) {
            row.reason = Some(format!("is a level of the layered image {folder}, and no image of its own"));
        }
    }
}

/// Two sources with one name: neither is served, both are named.
fn refuse_shared_names(images: &mut [Row]) {
    let mut sources: HashMap<String, Vec<String>> = HashMap::new();
    for row in images.iter() {
        sources.entry(row.name.clone()).or_default().push(row.path.clone());
    }
    for row in images {
        let paths = &sources[&row.name];
        if paths.len() > 1 && row.reason.is_none() {
            row.reason =
                Some(format!("{} have one name: neither can be served; rename one", paths.join(" and ")));
        }
    }
}

/// The descriptor's text; empty where there is none.
fn read_descriptor(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(meta) = path.symlink_metadata()
        && meta.is_file()
        && let Ok(file) = std::fs::File::open(path)
        && file.take(MAX_DESCRIPTOR).read_to_end(&mut text).is_err()
    {
        text.clear();
    }
    text
}
