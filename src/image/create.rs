//! Making a new single-file image. It appears under its name complete and durable, or not at all.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::format::header::{BadField, HEADER_BYTES, Header, SECTOR};
use crate::image::chain::{AtRest, Candidate, Form};
use crate::image::kind::{self, Class, DESCRIPTOR, ImageKind};
use crate::image::level::{Layout, Level};
use crate::image::paths::image_folder;
use crate::image::shape::Shape;
pub use crate::image::shape::{
    CreatePlan, DEFAULT_CLUSTER, MAX_CLUSTER, MIN_CLUSTER, check_cluster, template_cluster,
};
use crate::image::store::Store;
use crate::io::new_file::NewFile;
use crate::io::real::RealFile;
use crate::sync::Arc;

/// What was created or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// The file.
    pub path: PathBuf,
    /// Disk size in bytes.
    pub size: u64,
    /// True when it was there before.
    pub existed: bool,
}

/// Creates an image. `image` is its path; `.hds` or `.raw` is put behind a name that ends in neither.
pub fn create(image: &Path, plan: &CreatePlan) -> Result<Created> {
    Draft::begin(image, plan)?.finish()
}

/// Creates an image, or uses the one that has this name and size already. Another size is an error and touches
/// nothing.
pub fn create_or_use(image: &Path, plan: &CreatePlan) -> Result<Created> {
    let place = NewImagePath::of(image, plan.kind)?;
    if place.check_folder().is_ok()
        && let Some(path) = place.taken()?
    {
        let (size, cluster) = size_and_cluster(&path)?;
        // Created by the same words earlier, the disk was rounded up.
        if size != plan.size && Some(size) != plan.size.checked_next_multiple_of(cluster) {
            let why = format!(
                "the image exists with a size of {size} bytes, not {}; give its size, or another name",
                plan.size
            );
            return Err(Error::at(Kind::Exists, path, why));
        }
        return Ok(Created { path, size, existed: true });
    }
    create(image, plan)
}

/// The disk and cluster size of an image that is there, in bytes. Its first snapshot has made a file a folder.
fn size_and_cluster(path: &Path) -> Result<(u64, u64)> {
    if path.join(DESCRIPTOR).symlink_metadata().is_ok() {
        let (descriptor, _) = Store::read(image_folder(path)?.as_fd(), path)?;
        let bytes = |sectors: u64| sectors.saturating_mul(SECTOR);
        return Ok((bytes(descriptor.disk_sectors), bytes(u64::from(descriptor.cluster_sectors).max(1))));
    }
    let there = AtRest::open(path)?;
    let cluster = match &there.form {
        Form::Ploop(header) => header.geometry().cluster,
        Form::Raw => SECTOR,
    };
    Ok((there.size(), cluster))
}

/// A single-file image on its way: it has no name, and no other process sees it. Dropped, it goes.
pub struct Draft {
    place: NewImagePath,
    shape: Shape,
    file: NewFile,
}

impl Draft {
    /// Begins an image, empty. `image` and `plan` as for [`create`].
    pub fn begin(image: &Path, plan: &CreatePlan) -> Result<Draft> {
        let place = NewImagePath::of(image, plan.kind)?;
        let shape = Shape::of(plan, place.kind).map_err(|e| invalid(&place.path(), &e))?;
        place.check_folder()?;
        if let Some(taken) = place.taken()? {
            return Err(Error::at(Kind::Exists, taken, already(&place)));
        }
        let file = NewFile::begin(&place.path())?;
        shape.write(file.file()).map_err(|e| Error::io(&e, place.path(), "cannot create the image"))?;
        Ok(Draft { place, shape, file })
    }

    /// What it will be.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// How it is stored.
    pub fn kind(&self) -> ImageKind {
        self.place.kind
    }

    /// Its file, to be opened as an image.
    pub fn level(&self) -> Result<Level> {
        let cannot = |e: io::Error| Error::io(&e, self.path(), "cannot open the new file");
        let file = self.file.file().try_clone().map_err(cannot)?;
        let layout = match &self.shape {
            Shape::Ploop { header, .. } => Layout::Ploop(*header),
            Shape::Raw { .. } => Layout::Raw,
        };
        let file = Arc::new(RealFile::from_file(file, self.path())?);
        Ok(Level { file, path: self.path().to_owned(), layout })
    }

    /// The disk ends with the sector in which byte `bytes` would be the next: less than was planned. The image was closed,
    /// and nothing is mapped behind that.
    pub fn cut(&mut self, bytes: u64) -> Result<()> {
        let path = self.place.path();
        let cannot = |e: io::Error| Error::io(&e, &path, "cannot write the disk's size");
        let bytes = bytes.next_multiple_of(SECTOR);
        match &mut self.shape {
            Shape::Raw { size, .. } => {
                *size = bytes;
                self.file.file().set_len(bytes).map_err(cannot)
            }
            Shape::Ploop { header, .. } => {
                let mut now = [0; HEADER_BYTES as usize];
                self.file.file().read_exact_at(&mut now, 0).map_err(cannot)?;
                let bad = |bad: BadField| Error::at(Kind::Damaged, &path, bad.to_string());
                let now = Header::parse(&now).map_err(bad)?;
                let like = Header::new(now.version, bytes, now.geometry().cluster).map_err(bad)?;
                // ploop's kernel wants the first cluster right behind the BAT.
                if like.first_block != now.first_block || like.entries > now.entries {
                    return Err(Error::at(Kind::Invalid, &path, "its BAT does not fit the disk's size"));
                }
                *header = Header { flags: now.flags, ..like };
                self.file.file().write_all_at(&header.encode(), 0).map_err(cannot)
            }
        }
    }

    /// Gives it its name, durably ([`NewFile::commit`]).
    pub fn finish(self) -> Result<Created> {
        if let Some(taken) = self.place.taken()? {
            return Err(Error::at(Kind::Exists, taken, already(&self.place)));
        }
        let created = Created { path: self.place.path(), size: self.shape.size(), existed: false };
        self.file.commit().map(|()| created)
    }
}

/// Where the new file goes.
struct NewImagePath {
    folder: PathBuf,
    file_name: OsString,
    /// The image's name: the file's, without its suffix.
    stem: OsString,
    kind: ImageKind,
}

impl NewImagePath {
    fn of(image: &Path, kind: Option<ImageKind>) -> Result<NewImagePath> {
        let refuse = |why: &str| Err(Error::at(Kind::Invalid, image, why));
        let Some(name) = image.file_name().filter(|_| !image.as_os_str().as_bytes().ends_with(b"/")) else {
            return refuse("give the image's name behind the folder, such as images/vm1");
        };
        let suffix = |bytes: &[u8]| match bytes {
            b if b.ends_with(b".hds") => Some(ImageKind::Ploop),
            b if b.ends_with(b".raw") => Some(ImageKind::Raw),
            _ => None,
        };
        let named = suffix(name.as_bytes());
        let kind = match (named, kind) {
            (Some(named), Some(asked)) if named != asked => {
                return refuse("the name's ending contradicts --format; leave one of them out");
            }
            (Some(kind), _) | (None, Some(kind)) => kind,
            (None, None) => ImageKind::Ploop,
        };
        let mut file_name = name.to_owned();
        if named.is_none() {
            file_name.push(match kind {
                ImageKind::Ploop => ".hds",
                ImageKind::Raw => ".raw",
            });
        }
        match kind::classify(&file_name, true, b"") {
            Class::Image { name: stem, .. } => {
                let folder = image.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                Ok(NewImagePath { folder: folder.to_owned(), file_name, stem, kind })
            }
            Class::NotAnImage { reason } => refuse(&format!("no image can have this name: {reason}")),
        }
    }

    fn path(&self) -> PathBuf {
        // "vm1" and not "./vm1" for people who gave no folder.
        if self.folder == Path::new(".") {
            self.file_name.clone().into()
        } else {
            self.folder.join(&self.file_name)
        }
    }

    fn check_folder(&self) -> Result<()> {
        match self.folder.metadata() {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => Err(Error::at(Kind::Invalid, &self.folder, "not a folder")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Error::at(Kind::NotFound, &self.folder, "no such folder; make it first (mkdir)"))
            }
            Err(e) => Err(Error::io(&e, &self.folder, "cannot look into the folder")),
        }
    }

    /// Whatever has the image's name already: the file itself, or a source that would be shown under the same name,
    /// so that neither could be served.
    fn taken(&self) -> Result<Option<PathBuf>> {
        let own = self.path();
        match own.symlink_metadata() {
            Ok(_) => return Ok(Some(own)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&e, &own, "cannot look for the image")),
        }
        for suffix in ["", ".hds", ".raw", ".hdd", ".img"] {
            let mut name = self.stem.clone();
            name.push(suffix);
            let path = own.with_file_name(&name);
            let layered = path.join(DESCRIPTOR).symlink_metadata().is_ok();
            let same = Candidate::open(&path)
                .is_ok_and(|there| matches!(there.class(), Class::Image { name, .. } if name == self.stem));
            if layered || same {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

fn already(place: &NewImagePath) -> String {
    format!("there is an image named {} already; choose another name", Path::new(&place.stem).display())
}

/// The name under which the image `image` would be shown, without `.img`; an error where none can have it.
pub(super) fn shown_name(image: &Path) -> Result<OsString> {
    NewImagePath::of(image, None).map(|place| place.stem)
}

/// What already has the name of the image that `image` would be: itself, or another source shown under it.
pub(super) fn taken_by(image: &Path) -> Result<Option<PathBuf>> {
    let place = NewImagePath::of(image, None)?;
    place.check_folder()?;
    place.taken()
}

fn invalid(path: &Path, why: &str) -> Error {
    Error::at(Kind::Invalid, path, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = folder
            .read_dir()
            .expect("the folder is there")
            .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_name_gets_a_suffix_unless_it_has_one_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().expect("tmp");
        let make = |name: &str, kind| {
            create(&folder.path().join(name), &CreatePlan { kind, ..CreatePlan::thin(5 * MIB) })
                .expect("created")
                .path
        };
        assert_eq!(make("a", None), folder.path().join("a.hds"));
        assert_eq!(make("b.hds", None), folder.path().join("b.hds"));
        assert_eq!(make("c.raw", None), folder.path().join("c.raw"));
        assert_eq!(make("d", Some(ImageKind::Raw)), folder.path().join("d.raw"));
        assert_eq!(names(folder.path()), ["a.hds", "b.hds", "c.raw", "d.raw"]);
        assert_eq!(AtRest::open(&folder.path().join("a.hds")).expect("opens").len, MIB);
    }

    #[test]
    fn a_name_that_is_taken_by_another_source_is_refused() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = |name: &str| folder.path().join(name);
        create(&at("a.raw"), &CreatePlan::thin(MIB)).expect("created");
        std::fs::create_dir(at("b")).expect("mkdir");
        std::fs::write(at("b/DiskDescriptor.xml"), "").expect("write");
        std::fs::write(at("c"), "just a file").expect("write");
        for name in ["a", "a.raw", "b", "b.raw"] {
            assert_eq!(
                create(&at(name), &CreatePlan::thin(MIB)).expect_err("taken").kind(),
                Kind::Exists,
                "{name}"
            );
        }
        create(&at("c"), &CreatePlan::thin(MIB)).expect("a file that is no image takes no name");
    }

    #[test]
    fn an_existing_image_is_used_when_the_size_is_the_same_and_left_alone_otherwise() {
        let folder = tempfile::tempdir().expect("tmp");
        let at = folder.path().join("vm");
        // Not a multiple of the cluster: the second time it must still count as the same size.
        let plan = CreatePlan::thin(5 * MIB + 1);
        assert!(!create_or_use(&at, &plan).expect("created").existed);
        let again = create_or_use(&at, &plan).expect("used");
        assert_eq!((again.existed, again.size), (true, 6 * MIB));
        let before = std::fs::read(&again.path).expect("read");
        assert_eq!(
            create_or_use(&at, &CreatePlan::thin(7 * MIB)).expect_err("another size").kind(),
            Kind::Exists
        );
        assert_eq!(std::fs::read(&again.path).expect("read"), before);
        assert_eq!(names(folder.path()), ["vm.hds"]);
    }

    #[test]
    fn bad_arguments_are_usage_errors_and_leave_nothing() {
        let folder = tempfile::tempdir().expect("tmp");
        let bad = |name: &str, plan: CreatePlan| {
            let error = create(&folder.path().join(name), &plan).expect_err(name);
            assert_eq!(error.kind(), Kind::Invalid, "{error}");
        };
        bad("zero", CreatePlan::thin(0));
        bad("huge", CreatePlan::thin(u64::MAX));
        bad("huge.raw", CreatePlan::thin(u64::MAX));
        bad(".dot", CreatePlan::thin(MIB));
        bad("slash/", CreatePlan::thin(MIB));
        bad("x.{5fbaabe3-6958-40ff-92a7-860e329aab41}.hds/..", CreatePlan::thin(MIB));
        for cluster in [16 << 10, 128 << 20, 48 << 10, 0] {
            bad("cluster", CreatePlan { cluster: Some(cluster), ..CreatePlan::thin(MIB) });
        }
        bad("c.raw", CreatePlan { cluster: Some(MIB), ..CreatePlan::thin(MIB) });
        bad("c.raw", CreatePlan { kind: Some(ImageKind::Ploop), ..CreatePlan::thin(MIB) });
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_name_taken_at_the_last_moment_is_not_replaced_and_no_unfinished_file_is_left() {
        let folder = tempfile::tempdir().expect("tmp");
        let path = folder.path().join("vm.hds");
        let draft = Draft::begin(&path, &CreatePlan::thin(MIB)).expect("begun");
        std::fs::write(&path, "another's").expect("write");
        assert_eq!(draft.finish().expect_err("taken").kind(), Kind::Exists);
        assert_eq!(std::fs::read(&path).expect("read"), b"another's");
        assert_eq!(names(folder.path()), ["vm.hds"]);
    }

    #[test]
    fn a_preallocated_image_has_its_space_and_a_sequential_bat() {
        let folder = tempfile::tempdir().expect("tmp");
        let plan = CreatePlan { preallocate: true, cluster: Some(32 << 10), ..CreatePlan::thin(3 * MIB) };
        let image =
            AtRest::open(&create(&folder.path().join("vm"), &plan).expect("created").path).expect("opens");
        let Form::Ploop(header) = image.form else { panic!("ploop") };
        assert_eq!(header.flags, 0);
        let mut entries = Vec::new();
        image
            .for_each_entry(&header.geometry(), |cluster, entry| entries.push((cluster, entry)))
            .expect("read");
        assert_eq!(entries, (0..96).map(|i| (i, i as u32 + 1)).collect::<Vec<_>>());
        assert_eq!(image.len, 97 * (32 << 10));
        assert!(image.allocated >= image.len);
    }
}
