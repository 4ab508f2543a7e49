//! What an IMAGE on a command line means: where the image is, and which snapshot of it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::image::chain::Candidate;
use crate::image::kind::{Class, DESCRIPTOR, folder_image_name};

/// What is put behind a name that is not there as given, in this order.
const SUFFIXES: [&str; 3] = [".hds", ".hdd", ".raw"];

/// What was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The image's file, or the folder of a layered one.
    pub path: PathBuf,
    /// The snapshot that was named; None: the live disk.
    pub snapshot: Option<String>,
}

impl Target {
    /// True for a folder with a descriptor.
    pub fn is_layered(&self) -> bool {
        is_layered(&self.path)
    }
}

/// True for a folder with a descriptor.
pub fn is_layered(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_dir())
        && path.join(DESCRIPTOR).symlink_metadata().is_ok_and(|meta| meta.is_file())
}

/// The name of the image at `path`, without what it is shown with; an error that says why where it is none.
pub fn name(path: &Path) -> Result<OsString> {
    if is_layered(path) {
        // "." and the like have a name only when resolved.
        let found = path.canonicalize().map_err(|e| Error::io(&e, path, "cannot resolve the path"))?;
        return Ok(folder_image_name(found.file_name().unwrap_or(OsStr::new("/"))));
    }
    match Candidate::open(path)?.class() {
        Class::Image { name, .. } => Ok(name),
        Class::NotAnImage { reason } => {
            Err(Error::at(Kind::Unsupported, path, format!("not an image: {reason}")))
        }
    }
}

/// Finds `IMAGE` or `IMAGE@SNAPSHOT`: as given, then with .hds, .hdd, .raw behind it; a file, or the folder of a layered
/// image. A file whose name has an @ in it goes first. `shown` knows what a mount shows; it is asked before the host.
pub fn find(image: &Path, shown: &dyn Fn(&Path) -> Result<Option<Target>>) -> Result<Target> {
    if let Some(target) = shown(image)? {
        return Ok(target);
    }
    if let Some(path) = on_host(image) {
        return Ok(Target { path, snapshot: None });
    }
    if let Some((before, snapshot)) = image.to_str().and_then(|text| text.rsplit_once('@'))
        && !snapshot.contains('/')
    {
        if snapshot.is_empty() {
            return Err(Error::at(Kind::Invalid, image, "no name of a snapshot behind the @"));
        }
        let target = find(Path::new(before), shown)?;
        if target.snapshot.is_some() {
            return Err(Error::at(Kind::Invalid, image, "a snapshot of a snapshot; name one"));
        }
        return Ok(Target { snapshot: Some(snapshot.to_owned()), ..target });
    }
    match image.symlink_metadata() {
        // A folder, a link, a device: opening it says why it is no image.
        Ok(_) => Ok(Target { path: image.to_owned(), snapshot: None }),
        Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Err(Error::io(&e, image, "cannot look for the image"))
        }
        Err(_) => Err(Error::at(
            Kind::NotFound,
            image,
            "no such image, not with .hds, .hdd or .raw behind the name either",
        )),
    }
}

fn on_host(image: &Path) -> Option<PathBuf> {
    let is_image = |path: &Path| is_layered(path) || path.symlink_metadata().is_ok_and(|meta| meta.is_file());
    if image.file_name().is_some_and(|name| name == DESCRIPTOR) {
        let folder = image.parent().filter(|folder| is_layered(folder))?;
        return Some(folder.to_owned());
    }
    if is_image(image) {
        return Some(image.to_owned());
    }
    let with_suffix = SUFFIXES.iter().map(|suffix| {
        let mut path = OsString::from(image);
        path.push(suffix);
        PathBuf::from(path)
    });
    if let Some(found) = with_suffix.into_iter().find(|path| is_image(path)) {
        return Some(found);
    }
    // A single file that its first snapshot turned into a folder is still found by its old name.
    let suffix = image.extension().map(|ext| format!(".{}", ext.to_string_lossy()))?;
    let folder = SUFFIXES.contains(&&*suffix).then(|| image.with_extension(""))?;
    (image.symlink_metadata().is_err() && is_layered(&folder)).then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_rest(image: &Path) -> Result<Target> {
        find(image, &|_| Ok(None))
    }

    #[test]
    fn an_image_is_looked_up_as_given_then_with_each_suffix() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = |name: &str| folder.path().join(name);
        assert_eq!(at_rest(&at("vm")).expect_err("nothing there").kind(), Kind::NotFound);
        // A folder of that name that is no image does not hide the files.
        std::fs::create_dir(at("vm")).expect("mkdir");
        for name in ["vm.raw", "vm.hdd", "vm.hds"] {
            std::fs::write(at(name), "").expect("write");
            assert_eq!(at_rest(&at("vm")).expect("there").path, at(name));
        }
        std::fs::write(at("a@b"), "").expect("write");
        assert_eq!(at_rest(&at("a@b")).expect("there").path, at("a@b"));
    }

    #[test]
    fn a_snapshot_is_named_behind_an_at() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("vm.hds"), "").expect("write");
        let target = at_rest(&at("vm@monday")).expect("there");
        assert_eq!(target, Target { path: at("vm.hds"), snapshot: Some("monday".into()) });
        assert_eq!(at_rest(&at("vm@")).expect_err("no name").kind(), Kind::Invalid);
        assert_eq!(at_rest(&at("no@monday")).expect_err("no image").kind(), Kind::NotFound);
    }

    #[test]
    fn the_folder_of_a_layered_image_is_found_by_its_name_its_descriptor_and_its_old_file() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = |name: &str| folder.path().join(name);
        for name in ["vm", "other.hdd"] {
            std::fs::create_dir(at(name)).expect("mkdir");
            std::fs::write(at(name).join(DESCRIPTOR), "").expect("write");
        }
        for name in ["vm", "vm/DiskDescriptor.xml", "vm.hds", "vm.raw"] {
            assert_eq!(at_rest(&at(name)).expect("there").path, at("vm"), "{name}");
        }
        assert_eq!(at_rest(&at("other")).expect("there").path, at("other.hdd"));
        assert!(at_rest(&at("other@x")).expect("there").is_layered());
    }
}
