//! What an IMAGE on a command line means: where the file is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::cli::served;
use crate::error::{Error, Kind, Result};

/// What is put behind a name that is not there as given, in this order.
const SUFFIXES: [&str; 3] = [".hds", ".hdd", ".raw"];

/// Finds the file of `IMAGE`: as given, then with .hds, .hdd, .raw behind it. What a mount of ours shows is found
/// in the images folder behind it.
pub fn find(image: &Path) -> Result<PathBuf> {
    if let Some(source) = served::source_of(image)? {
        return Ok(source);
    }
    let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_file());
    if is_file(image) {
        return Ok(image.to_owned());
    }
    let with_suffix = SUFFIXES.iter().map(|suffix| {
        let mut path = OsString::from(image);
        path.push(suffix);
        PathBuf::from(path)
    });
    if let Some(found) = with_suffix.into_iter().find(|path| is_file(path)) {
        return Ok(found);
    }
    match image.symlink_metadata() {
        // A folder, a link, a device: opening it says why it is no image.
        Ok(_) => Ok(image.to_owned()),
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&e, image, "cannot look for the image"))
        }
        Err(_) if image.to_string_lossy().contains('@') => Err(Error::at(
            Kind::NotFound,
            image,
            "no such file; snapshots (IMAGE@SNAPSHOT) are not supported yet",
        )),
        Err(_) => Err(Error::at(
            Kind::NotFound,
            image,
            "no such image, not with .hds, .hdd or .raw behind the name either",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_looked_up_as_given_then_with_each_suffix() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = |name: &str| folder.path().join(name);
        assert_eq!(find(&at("vm")).expect_err("nothing there").kind(), Kind::NotFound);
        // A folder of that name is in nobody's way.
        std::fs::create_dir(at("vm")).expect("mkdir");
        for name in ["vm.raw", "vm.hdd", "vm.hds"] {
            std::fs::write(at(name), "").expect("write");
            assert_eq!(find(&at("vm")).expect("there"), at(name));
        }
        std::fs::write(at("a@b"), "").expect("write");
        assert_eq!(find(&at("a@b")).expect("there"), at("a@b"));
        assert!(find(&at("vm@x")).expect_err("no snapshot").to_string().contains("snapshots"));
    }
}
