//! A new delta of a layered image: its name, and the file, empty, durable before a descriptor names it (R8).

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::format::header::Header;
use crate::image::folder_files::{make, own, sync_folder, unlink};
use crate::image::reserve::{is_full, with_reserve};
use crate::image::shape;
use crate::io::file::HostStatus;
use crate::io::real::RealFile;
use crate::rules::{Rule, Step, broken, step};

/// A name for the next delta of this image (docs/format.md#files-and-names): that of the base, a dot, a random GUID.
pub(super) fn new_delta_name(descriptor: &Descriptor) -> String {
    let base = descriptor.chain(descriptor.top).ok().and_then(|chain| descriptor.delta(*chain.first()?));
    let file = base.map_or("root.hds", |delta| &delta.file);
    let name = file.rsplit('/').next().unwrap_or(file);
    let stem = match name.rsplit_once('.') {
        Some((stem, guid)) if guid.starts_with('{') && Guid::parse(guid).is_some() => stem,
        _ => name,
    };
    // 255 bytes are a name's limit; the dot and the GUID take 39.
    let mut end = stem.len().min(200);
    while !stem.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{}", &stem[..end], Guid::random())
}

/// Makes a new empty delta with this header in the folder `dir`, with the owner and mode of `like`.
///
/// 1. made exclusively and filled; 2. synced; 3. the folder synced: only then a descriptor may name it.
///
/// A file that could not be finished is removed. On a full host its BAT takes no space before it is written: a switch, which
/// frees more than that, goes on.
pub(super) fn create_delta(
    dir: BorrowedFd<'_>,
    path: &Path,
    name: &str,
    header: &Header,
    like: &HostStatus,
) -> Result<RealFile> {
    let shown = path.join(name);
    // 1.
    let file = create_unsynced(dir, path, name, header, like)?;
    let synced = || {
        // 2.
        if !broken(Rule::R8) {
            file.sync_all().map_err(|e| Error::io(&e, &shown, "cannot create the delta: syncing it"))?;
            step(Step::FileSynced(&shown));
        }
        // 3.
        sync_folder(dir, path)
    };
    if let Err(error) = synced() {
        // Best effort; it was noted before, or has a name that is never looked for.
        let _ = unlink(dir, OsStr::new(name));
        return Err(error);
    }
    RealFile::from_file(file, shown)
}

/// Step 1 alone, for a folder that is made durable as a whole before it gets its name.
pub(super) fn create_unsynced(
    dir: BorrowedFd<'_>,
    path: &Path,
    name: &str,
    header: &Header,
    like: &HostStatus,
) -> Result<File> {
    let cannot = |e: &io::Error, doing: &str| {
        Error::io(e, path.join(name), format!("cannot create the delta: {doing}"))
    };
    let file = make(dir, name, like.mode).map_err(|e| cannot(&e, "making the file"))?;
    let write = || match shape::write_empty(&file, header) {
        Err(e) if is_full(&e) => with_reserve(dir, || write_thin(&file, header)),
        other => other,
    };
    let filled = write()
        .map_err(|e| cannot(&e, "writing it"))
        .and_then(|()| own(&file, like).map_err(|e| cannot(&e, "giving it its owner")));
    match filled {
        Ok(()) => Ok(file),
        Err(error) => {
            // Best effort, likewise.
            let _ = unlink(dir, OsStr::new(name));
            Err(error)
        }
    }
}

/// The header of an empty delta, whose BAT takes space when it is written.
fn write_thin(file: &File, header: &Header) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(header.geometry().first)?;
    file.write_all_at(&header.encode(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::format::header::Version;
    use std::os::fd::AsFd;

    #[test]
    fn a_new_delta_is_named_after_the_base_and_made_once() {
        let mut descriptor =
            Descriptor::new(8, 8, "sub/vm.hds.{5fbaabe3-6958-40ff-92a7-860e329aab41}", false);
        let name = new_delta_name(&descriptor);
        let (stem, guid) = name.split_at(7);
        assert_eq!(stem, "vm.hds.");
        assert!(Guid::parse(guid).is_some());
        descriptor.add_snapshot(Guid::random(), &name).expect("fresh");
        assert!(new_delta_name(&descriptor).starts_with("vm.hds.{"));

        let folder = tempfile::tempdir().expect("tmp");
        let dir = File::open(folder.path()).expect("open");
        let header = Header::new(Version::V2, 1 << 30, 1 << 20).expect("a header");
        let like = HostStatus { mode: 0o640, ..HostStatus::default() };
        let create = || create_delta(dir.as_fd(), folder.path(), &name, &header, &like);
        drop(create().expect("made"));
        assert_eq!(create().expect_err("there").kind(), Kind::Exists);
        let made = std::fs::read(folder.path().join(&name)).expect("read");
        assert_eq!(made.len(), 1 << 20);
        assert_eq!(Header::parse(&made), Ok(header));
    }
}
