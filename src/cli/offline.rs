//! Work with an image that nobody serves: the live code without a transport, in the command's own process, under the
//! same locks (DESIGN.md 9).

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::target;
use crate::error::{Error, Kind, Result};
use crate::format::header::{HEADER_BYTES, Header};
use crate::image::chain::Candidate;
use crate::image::kind::{Class, ImageKind};
use crate::image::layers::{Direct, Layers};
use crate::image::level::{Layout, Level};
use crate::image::make_folder::make_folder;
use crate::image::paths::image_folder;
use crate::image::switch::switch;
use crate::io::file::read_full;
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::{Access, RealFile};
use crate::progress::Progress;
use crate::vdisk::live::{Done, Work, carry_out as carry_out_live};
use crate::vdisk::{Engine, Image, Options};

/// Does `work` with the image at `path`.
pub fn carry_out(path: &Path, work: &Work, progress: &Progress) -> Result<Done> {
    if target::is_layered(path) {
        return layered(path, work, progress);
    }
    match work {
        Work::Resize { size } => single_file(path, Access::ReadWrite, |image| {
            let size = image.make_writable().and_then(|()| image.grow(*size, progress))?;
            Ok(Done { size: Some(size), ..Done::default() })
        }),
        Work::Track { .. } | Work::Untrack => single_file(path, Access::ReadWrite, |image| {
            image.make_writable()?;
            work.on_disk(image, progress).unwrap_or_else(|| Ok(Done::default()))
        }),
        Work::Compact { dry_run, .. } => {
            let access = if *dry_run { Access::ReadOnly } else { Access::ReadWrite };
            single_file(path, access, |image| {
                if !dry_run {
                    image.make_writable()?;
                }
                work.on_disk(image, progress).unwrap_or_else(|| Ok(Done::default()))
            })
        }
        Work::Snapshot { .. } | Work::Clone { snapshot: None, .. } => {
            layered(&to_folder(path)?, work, progress)
        }
        Work::Clone { snapshot: Some(name), .. }
        | Work::Delete { snapshot: name }
        | Work::Merge { snapshot: name }
        | Work::Switch { snapshot: name } => {
            let what = format!("there is no snapshot {name}: this image has none");
            Err(Error::at(Kind::NotFound, path, what))
        }
        Work::Finish => Ok(Done::default()),
    }
}

/// The end of the work and of the image is the same as in [`single_file`]; the locks are those of `layers`.
fn layered(folder: &Path, work: &Work, progress: &Progress) -> Result<Done> {
    let looks = matches!(work, Work::Compact { dry_run: true, .. });
    let opener = Arc::new(Direct(if looks { Access::ReadOnly } else { Access::Widest }));
    let (layers, chain) = Layers::open(image_folder(folder)?, folder, opener, false)?;
    if let Work::Switch { snapshot } = work {
        let guid = layers.store().find_snapshot(snapshot)?;
        drop(chain);
        return switch(&layers, guid).map(|()| Done::default());
    }
    let image = Image::open(&engine(), &folder.to_string_lossy(), chain)?;
    let writable = if looks { Ok(()) } else { image.make_writable() };
    let result = writable.and_then(|()| carry_out_live(&image, &layers, work, progress));
    let closed = image.close();
    let done = result?;
    closed.map(|()| done)
}

/// Makes a single file a folder, under the file's lock. The lock ends with this step: whoever is first afterwards takes
/// the folder's, and everything is read anew.
fn to_folder(path: &Path) -> Result<PathBuf> {
    let Class::Image { name, .. } = Candidate::open(path)?.class() else {
        return Err(Error::at(Kind::Unsupported, path, "not an image"));
    };
    let file = path.file_name().ok_or_else(|| Error::at(Kind::Invalid, path, "ends in no name"))?;
    let (_, lock) = locked(path, Access::ReadWrite)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let resolved = parent.canonicalize().map_err(|e| Error::io(&e, parent, "cannot resolve the path"))?;
    make_folder(image_folder(&resolved)?.as_fd(), parent, file)?;
    drop(lock);
    Ok(path.with_file_name(name))
}

fn engine() -> Arc<Engine> {
    Engine::new(Options::default(), Box::new(|event| log::warn!("{event}")))
}

fn locked(path: &Path, access: Access) -> Result<(Arc<RealFile>, DeltaLock)> {
    let file = Arc::new(RealFile::open(path, access)?);
    let lock = DeltaLock::acquire(file.clone(), Use::of(access))?;
    Ok((file, lock))
}

/// Order: (1) the lock, so that nothing that is read is old; (2) the image; (3) the work; (4) the close, which makes it
/// durable and clears the mark, also after work that failed; (5) the lock's end.
fn single_file(path: &Path, access: Access, work: impl FnOnce(&Arc<Image>) -> Result<Done>) -> Result<Done> {
    let kind = Candidate::open(path)?.kind()?;
    let (file, lock) = locked(path, access)?;
    let layout = match kind {
        ImageKind::Raw => Layout::Raw,
        ImageKind::Ploop => Layout::Ploop(header(&file, path)?),
    };
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let image = Image::open(&engine(), &name, vec![Level { file, path: path.to_owned(), layout }])?;
    let result = work(&image);
    let closed = image.close();
    drop(lock);
    let done = result?;
    closed.map(|()| done)
}

fn header(file: &RealFile, path: &Path) -> Result<Header> {
    let mut head = [0; HEADER_BYTES as usize];
    let got = read_full(file, &mut head, 0).map_err(|e| Error::io(&e, path, "cannot read the header"))?;
    Header::parse(&head[..got]).map_err(|bad| Error::at(Kind::Damaged, path, bad.to_string()))
}
