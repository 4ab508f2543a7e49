//! What lies in an images folder: which entries claim to be images, under which names, and whether they can be.
//!
//! Everything is reached through the folder's one descriptor, links are never followed, and only regular files
//! are opened. Nothing is locked or changed.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Stat};

use super::mounted::{self, Silent};
use crate::error::{self, is_passing};
use crate::format::descriptor::{Delta, Descriptor};
use crate::format::header::SECTOR;
use crate::image::chain::Candidate;
use crate::image::kind::{self, Class, DESCRIPTOR, ImageKind};
use crate::image::paths;
use crate::image::store::Store;
use crate::io::file::read_full;
use crate::io::real::{Access, RealFile};

/// What a file is, whatever it is called: device and inode.
pub(super) type Identity = (u64, u64);

/// A descriptor longer than this is not one that ploop or Parallels wrote (they need some 400 bytes a level), and
/// is not read further.
const DESCRIPTOR_BYTES: usize = 1 << 20;

/// Distinguishes one state of a file from another without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Which file.
    pub identity: Identity,
    /// Length in bytes.
    pub len: u64,
    /// Last change of content: seconds and nanoseconds since 1970.
    pub mtime: (i64, i64),
    /// Number of names.
    pub links: u64,
}

impl Stamp {
    fn of(stat: &Stat) -> Stamp {
        Stamp {
            identity: (stat.st_dev, stat.st_ino),
            len: stat.st_size as u64,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
            links: stat.st_nlink,
        }
    }
}

/// What an image would be served from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// One file.
    File(ImageKind),
    /// A folder with a descriptor.
    Layers,
}

/// An entry of the folder that claims an image's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Its own name in the folder.
    pub file: OsString,
    /// The image's name, without `.img`.
    pub name: OsString,
    /// File or folder.
    pub source: Source,
    /// The state that was looked at.
    pub stamp: Stamp,
    /// Disk size in bytes; 0 when it is not known.
    pub size: u64,
    /// Why it cannot be served.
    pub problem: Option<String>,
    /// What is damaged in it all the same: it is served to be read.
    pub damage: Option<String>,
    /// For a folder: the files in it.
    pub parts: HashSet<Identity>,
    /// For a folder: the files that its descriptor names, wherever they lie.
    pub levels: HashSet<Identity>,
}

/// A file or folder that was looked at.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Its name.
    pub file: OsString,
    /// The state that was looked at.
    pub stamp: Stamp,
    /// None: not an image.
    pub claim: Option<Claim>,
    /// The host had no answer at the moment: this is what was known before, or what its name alone says.
    pub unsure: bool,
}

/// What to do with a file of the folder.
pub(super) enum Look {
    /// Nothing has changed: take this.
    Same(Box<Seen>),
    /// Look at it.
    Inspect,
    /// Not yet (a program still writes it).
    Skip,
}

/// The stamp of the regular file or folder `name`; None when there is neither, or something is mounted there, which may not
/// answer.
pub(super) fn stamp(dir: &OwnedFd, name: &OsStr) -> Option<Stamp> {
    if mounted::other_mount(dir, name).is_some() {
        return None;
    }
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    is_file_or_folder(&stat).then(|| Stamp::of(&stat))
}

/// All that lies in the folder and was not skipped, sorted by name. `judge` is asked about every file that may be
/// an image. Without `allow_outside` a descriptor that names files outside of the folder is a problem.
///
/// What the host cannot say at the moment (no descriptors left, a device that fails) is no fact about an image: what was
/// known `before` of its file goes on to hold, and is marked as unsure. Where it concerns the whole folder, the look fails.
pub(super) fn read(
    dir: &OwnedFd,
    allow_outside: bool,
    judge: &mut dyn FnMut(&OsStr, &Stamp) -> Look,
    before: &dyn Fn(&OsStr) -> Option<Seen>,
    silent: &Silent,
) -> io::Result<Vec<Seen>> {
    let descriptor = read_descriptor(dir)?;
    let mut seen = Vec::new();
    for file in names(dir)? {
        let found = match mounted::other_mount(dir, &file) {
            None => look_at(dir, &file, allow_outside, &descriptor, judge),
            Some(mount) => look_at_mounted(dir, &file, mount, allow_outside, silent, judge),
        };
        match found {
            Ok(found) => seen.extend(found),
            Err(unsure) => {
                let old = before(&file).map(|old| Seen { unsure: true, ..old });
                seen.extend(old.or(unsure.map(|unsure| *unsure)));
            }
        }
    }
    let levels = levels_beside(dir, &descriptor);
    seen.iter_mut().filter(|seen| levels.contains(&seen.stamp.identity)).for_each(|level| level.claim = None);
    Ok(seen)
}

/// The files that the descriptor of the folder itself names, under whatever name they lie in it.
fn levels_beside(dir: &OwnedFd, descriptor: &[u8]) -> HashSet<Identity> {
    let Ok(descriptor) = Descriptor::parse(descriptor) else { return HashSet::new() };
    let named = |delta: &Delta| paths::named(dir.as_fd(), Path::new(""), &delta.file, false);
    let found = descriptor.deltas.iter().filter_map(|delta| named(delta).ok().flatten());
    found.map(|stat| (stat.st_dev, stat.st_ino)).collect()
}

/// What one name of the folder is; None: nothing, or not yet. An error: the host had no answer; with what can be said of a
/// file of which nothing was known before.
fn look_at(
    dir: &OwnedFd,
    file: &OsStr,
    allow_outside: bool,
    descriptor: &[u8],
    judge: &mut dyn FnMut(&OsStr, &Stamp) -> Look,
) -> Result<Option<Seen>, Option<Box<Seen>>> {
    let stat = match rustix::fs::statat(dir, file, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(e) if is_passing(e.raw_os_error()) => return Err(None),
        // It is gone again; then it is no claim.
        Err(_) => return Ok(None),
    };
    let stamp = Stamp::of(&stat);
    let (claim, unsure) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let looked = look_at_folder(dir, file, stamp, allow_outside);
            (looked.map_err(|_| None)?, false)
        }
        FileType::RegularFile if kind::descriptor_names(descriptor, file) => (None, false),
        FileType::RegularFile => match judge(file, &stamp) {
            Look::Same(same) => return Ok(Some(*same)),
            Look::Inspect => inspect(dir, file, stamp),
            Look::Skip => return Ok(None),
        },
        _ => (None, false),
    };
    let seen = Seen { file: file.to_owned(), stamp, claim, unsure };
    if unsure { Err(Some(Box::new(seen))) } else { Ok(Some(seen)) }
}

/// The same of an entry on which the file system `mount` is mounted, which may not answer.
fn look_at_mounted(
    dir: &OwnedFd,
    file: &OsStr,
    mount: u64,
    allow_outside: bool,
    silent: &Silent,
    judge: &mut dyn FnMut(&OsStr, &Stamp) -> Look,
) -> Result<Option<Seen>, Option<Box<Seen>>> {
    let name = file.to_owned();
    let answer = silent.ask(dir, mount, file, move |dir| {
        let mut is_file = false;
        // It is inspected in any case, since its thread cannot ask the caller.
        let found = look_at(dir, &name, allow_outside, &[], &mut |_, _| {
            is_file = true;
            Look::Inspect
        });
        (found, is_file)
    });
    let nothing_known = || {
        let stamp = Stamp { identity: (0, 0), len: 0, mtime: (0, 0), links: 0 };
        Some(Box::new(Seen { file: file.to_owned(), stamp, claim: None, unsure: true }))
    };
    let Some((found, is_file)) = answer else { return Err(nothing_known()) };
    match found {
        Ok(Some(seen)) if is_file => match judge(file, &seen.stamp) {
            Look::Same(same) => Ok(Some(*same)),
            Look::Inspect => Ok(Some(seen)),
            Look::Skip => Ok(None),
        },
        found => found,
    }
}

/// Every name that does not begin with a dot, sorted.
fn names(dir: &impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !name.starts_with(b".") {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort();
    Ok(names)
}

/// The descriptor beside the files of the folder. Without it levels of another image would be taken for images: that it
/// cannot be read at the moment is an error.
fn read_descriptor(dir: &OwnedFd) -> io::Result<Vec<u8>> {
    let file = match RealFile::open_at(dir, DESCRIPTOR, Access::ReadOnly) {
        Ok(file) => file,
        Err(e) if e.is_passing() => return Err(io::Error::from_raw_os_error(e.errno())),
        Err(_) => return Ok(Vec::new()),
    };
    let mut bytes = vec![0; DESCRIPTOR_BYTES];
    let n = read_full(&file, &mut bytes, 0)?;
    bytes.truncate(n);
    Ok(bytes)
}

/// A folder that holds a descriptor is a layered image; its files may also lie outside, as the left-over of a
/// crash while a single file became a folder.
///
/// Fails where the host has no answer at the moment.
fn look_at_folder(
    dir: &OwnedFd,
    name: &OsStr,
    stamp: Stamp,
    allow_outside: bool,
) -> Result<Option<Claim>, Passing> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Some(inner) = there(rustix::fs::openat(dir, name, flags, Mode::empty()))? else { return Ok(None) };
    let described = rustix::fs::statat(&inner, DESCRIPTOR, AtFlags::SYMLINK_NOFOLLOW);
    if there(described)?.is_none_or(|stat| !is_file_or_folder(&stat)) {
        return Ok(None);
    }
    let mut parts = HashSet::new();
    for part in names(&inner).map_err(|_| Passing)? {
        let stat = there(rustix::fs::statat(&inner, &part, AtFlags::SYMLINK_NOFOLLOW))?;
        parts.extend(stat.filter(is_file_or_folder).map(|stat| Stamp::of(&stat).identity));
    }
    let mut levels = HashSet::new();
    let (size, problem) = match Store::read(inner.as_fd(), Path::new(name)) {
        Err(e) if e.is_passing() => return Err(Passing),
        Ok((descriptor, _)) => {
            let mut problem = descriptor.refusal().map(str::to_owned);
            for delta in &descriptor.deltas {
                match paths::present(inner.as_fd(), Path::new(name), &descriptor, delta, allow_outside) {
                    Ok(stat) => drop(levels.insert((stat.st_dev, stat.st_ino))),
                    Err(e) if e.is_passing() => return Err(Passing),
                    Err(e) => problem = problem.or(Some(e.to_string())),
                }
            }
            (descriptor.disk_sectors * SECTOR, problem)
        }
        Err(e) => (0, Some(e.to_string())),
    };
    Ok(Some(Claim {
        file: name.to_owned(),
        name: kind::folder_image_name(name),
        source: Source::Layers,
        stamp,
        size,
        problem,
        damage: None,
        parts,
        levels,
    }))
}

/// The host has no answer at the moment.
struct Passing;

/// What was found; None: it is not there, or not for us.
fn there<T>(found: rustix::io::Result<T>) -> Result<Option<T>, Passing> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if is_passing(e.raw_os_error()) => Err(Passing),
        Err(_) => Ok(None),
    }
}

fn is_file_or_folder(stat: &Stat) -> bool {
    matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Directory)
}

/// The folder `name` as it is now: no layered image any more, perhaps; None: the host has no answer at the moment.
pub(super) fn folder_again(
    dir: &OwnedFd,
    name: &OsStr,
    allow_outside: bool,
    silent: &Silent,
) -> Option<Option<Claim>> {
    if let Some(mount) = mounted::other_mount(dir, name) {
        let mut judge = |_: &OsStr, _: &Stamp| Look::Inspect;
        let found = look_at_mounted(dir, name, mount, allow_outside, silent, &mut judge).ok()?;
        return Some(found.and_then(|seen| seen.claim));
    }
    let Some(stamp) = stamp(dir, name) else { return Some(None) };
    look_at_folder(dir, name, stamp, allow_outside).ok()
}

/// The regular file `name` as it is now.
pub(super) fn file_again(dir: &OwnedFd, name: &OsStr) -> Option<Seen> {
    let stamp = stamp(dir, name)?;
    let (claim, unsure) = inspect(dir, name, stamp);
    Some(Seen { file: name.to_owned(), stamp, claim, unsure })
}

/// Opens a regular file and sees what it is; None: not an image. And true where the host had no answer at the moment.
fn inspect(dir: &OwnedFd, name: &OsStr, stamp: Stamp) -> (Option<Claim>, bool) {
    let opened = RealFile::open_at(dir, name, Access::ReadOnly);
    let read = opened.and_then(|file| Candidate::read(Path::new(name), Arc::new(file)));
    let unsure = read.as_ref().is_err_and(error::Error::is_passing);
    (claim_of(name, stamp, read.map_err(|e| format!("cannot be opened: {e}"))), unsure)
}

/// What a regular file is that is open, and was called `name`.
pub(super) fn claim_of_open(name: &OsStr, file: Arc<RealFile>) -> Option<Claim> {
    let stamp = Stamp::of(&rustix::fs::fstat(&*file).ok()?);
    let read = Candidate::read(Path::new(name), file);
    claim_of(name, stamp, read.map_err(|e| format!("cannot be opened: {e}")))
}

fn claim_of(name: &OsStr, stamp: Stamp, read: Result<Candidate, String>) -> Option<Claim> {
    // A file that cannot be read is an image if its name says so, and its trouble is shown.
    let class = read.as_ref().map_or_else(|_| kind::classify(name, true, &[]), Candidate::class);
    let Class::Image { name: image, kind } = class else { return None };
    let form = |file: &Candidate| file.form(kind).map_err(|field| format!("damaged: {field}"));
    let (size, problem, damage) = match read.and_then(|file| form(&file).map(|_| file)) {
        Err(problem) => (0, Some(problem), None),
        Ok(file) => match file.open_as(kind) {
            Err(e) => (0, Some(format!("damaged: {e}")), None),
            Ok(file) => (file.size(), None, file.glance().err().map(|e| format!("damaged: {e}"))),
        },
    };
    let source = Source::File(kind);
    Some(Claim {
        file: name.to_owned(),
        name: image,
        source,
        stamp,
        size,
        problem,
        damage,
        parts: HashSet::new(),
        levels: HashSet::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// An empty image.
    fn header() -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        bytes[..16].copy_from_slice(b"WithouFreSpacExt");
        bytes[16] = 2;
        bytes[28..32].copy_from_slice(&2048u32.to_le_bytes());
        bytes[32..36].copy_from_slice(&10u32.to_le_bytes());
        bytes[36..44].copy_from_slice(&20480u64.to_le_bytes());
        bytes[48..52].copy_from_slice(&2048u32.to_le_bytes());
        bytes
    }

    fn scan(path: &Path) -> Vec<Claim> {
        let dir = OwnedFd::from(fs::File::open(path).expect("the folder opens"));
        let seen = read(&dir, false, &mut |_, _| Look::Inspect, &|_| None, &Silent::default())
            .expect("the folder can be read");
        seen.into_iter().filter_map(|s| s.claim).collect()
    }

    fn names_of(claims: &[Claim]) -> Vec<&str> {
        claims.iter().map(|c| c.name.to_str().expect("ASCII")).collect()
    }

    #[test]
    fn regular_files_become_claims_with_their_disk_size() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("a.hds"), header()).expect("written");
        fs::write(temp.path().join("b.raw"), [1; 1000]).expect("written");
        fs::write(temp.path().join("c"), header()).expect("written");
        fs::write(temp.path().join("notes.txt"), "x").expect("written");
        fs::write(temp.path().join(".hidden.hds"), header()).expect("written");
        let claims = scan(temp.path());
        assert_eq!(names_of(&claims), ["a", "b", "c"]);
        assert_eq!(claims.iter().map(|c| c.size).collect::<Vec<_>>(), [20480 * 512, 1000, 20480 * 512]);
        assert!(claims.iter().all(|c| c.problem.is_none()));
    }

    #[test]
    fn links_pipes_and_plain_folders_are_no_claims() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("a.hds"), header()).expect("written");
        symlink("a.hds", temp.path().join("b.hds")).expect("linked");
        fs::create_dir(temp.path().join("d.hds")).expect("made");
        let pipe = temp.path().join("p.raw");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, 0o600.into(), 0).expect("made");
        assert_eq!(names_of(&scan(temp.path())), ["a"]);
    }

    #[test]
    fn a_bad_header_is_a_claim_with_a_reason() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("short.hds"), b"With").expect("written");
        let mut bad = header();
        bad[28] = 0;
        bad[29] = 0;
        fs::write(temp.path().join("zero.hds"), bad).expect("written");
        // It was taken in, and could not be opened.
        fs::write(temp.path().join("ends.hds"), &header()[..4096]).expect("written");
        let claims = scan(temp.path());
        assert_eq!(names_of(&claims), ["ends", "short", "zero"]);
        assert!(claims[0].problem.as_ref().expect("damaged").contains("ends at byte 4096"));
        assert!(claims[1].problem.is_some());
        assert!(claims[2].problem.as_ref().expect("damaged").contains("m_Sectors"));
    }

    #[test]
    fn a_folder_with_a_descriptor_is_a_layered_claim_and_knows_its_files() {
        let temp = tempfile::tempdir().expect("a folder");
        let inner = temp.path().join("vm1.hdd");
        fs::create_dir(&inner).expect("made");
        fs::write(inner.join(DESCRIPTOR), "<x/>").expect("written");
        fs::write(temp.path().join("vm1.hds"), header()).expect("written");
        fs::hard_link(temp.path().join("vm1.hds"), inner.join("vm1.hds")).expect("linked");
        let claims = scan(temp.path());
        assert_eq!(names_of(&claims), ["vm1", "vm1"]);
        assert_eq!(claims[0].source, Source::Layers);
        assert!(claims[0].parts.contains(&claims[1].stamp.identity));
    }

    #[test]
    fn a_file_that_a_descriptor_beside_it_names_is_no_image_of_its_own() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("root.hds"), header()).expect("written");
        fs::write(temp.path().join("own.hds"), header()).expect("written");
        fs::write(temp.path().join(DESCRIPTOR), "<File>root.hds</File>").expect("written");
        assert_eq!(names_of(&scan(temp.path())), ["own"]);
        // Nor is a second name of it.
        fs::hard_link(temp.path().join("root.hds"), temp.path().join("second.hds")).expect("linked");
        fs::write(temp.path().join(DESCRIPTOR), Descriptor::new(20480, 2048, "root.hds", false).to_xml())
            .expect("written");
        assert_eq!(names_of(&scan(temp.path())), ["own"]);
    }
}
