//! The kernel's tables of mounts (`/proc/PID/mountinfo`), as far as ours need them.
//!
//! A mount of ours has the type `fuse.ploopfs` and the images folder as its source; that is how a command given a
//! mount point finds the folder and its daemon. A path leads to what lies there now, a mount's number to that mount:
//! so what was found is asked for by number again before it is touched ([`Mount::is_reached`]).
//!
//! One file system may be mounted several times: bound to a second place, or copied into another mount namespace
//! (containers, services with private mounts). It lives until the last of them is gone: `namespaces`.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::foreign;
use crate::error::{Error, Kind, Result};

/// The type that a mount of ours has.
pub const OUR_TYPE: &str = "fuse.ploopfs";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of the mount; not reused while it is mounted.
    pub id: u64,
    /// Number of the mount it lies on.
    pub parent: u64,
    /// The file system's device number, major and minor. All mounts of one file system have the same; it may be another
    /// one than `stat` returns (btrfs).
    pub device: (u32, u32),
    /// What of the file system is mounted: `/`, or the folder or file that was bound.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The group of mounts that what is mounted below it goes to, too.
    pub(super) shared: Option<u64>,
    /// The groups from which it receives what is mounted below them.
    pub(super) masters: Vec<u64>,
    /// File system type.
    pub kind: OsString,
    /// What is mounted; for ours the images folder.
    pub source: PathBuf,
    /// The user who made it, of a FUSE mount: the kernel's word, not the file system's.
    pub owner: Option<u32>,
    /// The options of the file system, as the kernel escapes them.
    options: Vec<u8>,
}

impl Mount {
    /// True for a ploopfs mount, alive or not.
    pub fn is_ours(&self) -> bool {
        self.kind == OUR_TYPE
    }

    /// True when both are of one file system. Its device number is given to another as soon as it has ended, which may just have
    /// happened: that one is known by its source, if it is not the same folder's.
    pub fn is_of_file_system(&self, other: &Mount) -> bool {
        self.device == other.device && self.kind == other.kind && self.source == other.source
    }

    /// True for a FUSE mount that another user made: what is asked there he answers as he likes, and may not answer at all. The
    /// wait for that has no end, and a process that waits cannot even be killed.
    pub fn is_of_another(&self) -> bool {
        self.kind.as_bytes().starts_with(b"fuse") && self.owner.is_some() && !self.is_trusted()
    }

    /// True when root or this user made it. Another user may have named any folder as its source, and shows in it what he
    /// likes.
    pub fn is_trusted(&self) -> bool {
        self.owner.is_some_and(|owner| owner == 0 || owner == rustix::process::geteuid().as_raw())
    }

    /// Why nothing is asked there.
    pub fn not_ours(&self) -> String {
        let owner = self.owner.map(|owner| format!(" {owner}")).unwrap_or_default();
        format!("is a mount of user{owner}, and not looked at")
    }

    /// The mount itself where it [is trusted](Self::is_trusted).
    pub fn trusted(self) -> Result<Mount> {
        self.check_trusted().map(|()| self)
    }

    /// Refuses one that is not trusted, and names whose it is.
    pub fn check_trusted(&self) -> Result<()> {
        let what = match self.owner {
            _ if self.is_trusted() => return Ok(()),
            Some(owner) => {
                format!("is a mount of user {owner}, who is neither root nor you; {}", as_user(owner))
            }
            None => "is a mount, and the kernel does not say whose".into(),
        };
        Err(Error::at(Kind::Access, &self.point, what))
    }

    /// Opens a file of this mount, by its path in it, and of nothing else: not of what lies over it now, and through no link.
    pub fn open(&self, inside: &Path, flags: OFlags) -> io::Result<File> {
        let root = foreign::folder(&self.point)?;
        if foreign::mount_id(&root)? != self.id {
            return Err(io::Error::other("something else lies on the mount point now"));
        }
        foreign::open_beneath(&root, inside, flags)
    }

    /// True when the daemon behind the mount is gone. Asks for free space, which the kernel never answers from
    /// its caches.
    pub fn is_dead(&self) -> bool {
        use rustix::io::Errno;
        matches!(rustix::fs::statvfs(&self.point), Err(Errno::NOTCONN | Errno::CONNABORTED))
    }

    /// True when the path of its mount point leads to it, and not to something that was mounted over it, or over a
    /// folder above it. Asks no file system that is mounted there: the descriptor is for its place alone.
    pub fn is_reached(&self) -> bool {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.point, flags, Mode::empty());
        opened.is_ok_and(|root| foreign::mount_id(&root).is_ok_and(|id| id == self.id))
    }

    /// `path` as a path inside of the file system; None where it does not lie below this mount.
    pub fn inside(&self, path: &Path) -> Option<PathBuf> {
        path.strip_prefix(&self.point).ok().map(|rest| self.root.join(rest))
    }

    /// The folders that an overlay takes its files from and puts them into.
    pub fn layers(&self) -> Vec<PathBuf> {
        if self.kind != "overlay" {
            return Vec::new();
        }
        let options = self.options.split(|b| *b == b',').filter_map(|option| {
            let at = option.iter().position(|b| *b == b'=')?;
            let name = option[..at].strip_suffix(b"+").unwrap_or(&option[..at]);
            let known: [&[u8]; 4] = [b"lowerdir", b"upperdir", b"workdir", b"datadir"];
            known.contains(&name).then(|| unescape(&option[at + 1..]))
        });
        let folders = options.flat_map(|value| {
            let parts = value.as_bytes().split(|b| *b == b':').filter(|part| !part.is_empty());
            parts.map(|part| PathBuf::from(OsStr::from_bytes(part))).collect::<Vec<_>>()
        });
        folders.collect()
    }
}

/// What to do where only another user can help.
pub fn as_user(owner: u32) -> String {
    format!("as that user it works: sudo -u '#{owner}' ploopfs ...")
}

/// All mounts of our namespace.
pub fn all() -> Result<Vec<Mount>> {
    const TABLE: &str = "/proc/self/mountinfo";
    let text = fs::read(TABLE).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            let what = "is not mounted, and the table of mounts stands there: mount -t proc proc /proc";
            Error::at(Kind::Unsupported, "/proc", what)
        }
        _ => Error::io(&e, TABLE, "cannot read the table of mounts"),
    })?;
    Ok(table(&text))
}

pub(super) fn table(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse).collect()
}

/// The uppermost mount whose mount point is `point` (absolute, without links).
pub fn at(point: &Path) -> Result<Option<Mount>> {
    let mut here = all()?;
    here.retain(|mount| mount.point == point);
    // By what lies on what: the order of the table is that of mounting, which is another one once a mount was moved.
    let below: HashSet<u64> = here.iter().map(|mount| mount.parent).collect();
    Ok(here.into_iter().rev().find(|mount| !below.contains(&mount.id)))
}

/// The mounts of other users that lie in `folder` itself.
pub fn of_others(folder: &Path) -> Vec<Mount> {
    let mut found = all().unwrap_or_default();
    found.retain(Mount::is_of_another);
    if found.is_empty() {
        return found;
    }
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    found.retain(|mount| mount.point.parent() == Some(&folder));
    found
}

/// Refuses a path into a ploopfs mount of another user, without a look at what lies there: that may never be answered.
/// `point`: the mount point, too; for most commands the table of mounts tells what is needed of that.
pub fn refuse_others(paths: impl IntoIterator<Item = PathBuf>, point: bool) -> Result<()> {
    let table = all().unwrap_or_default();
    if !table.iter().any(|mount| mount.is_ours() && mount.is_of_another()) {
        return Ok(());
    }
    for path in paths {
        let Ok(absolute) = std::path::absolute(&path) else { continue };
        let mut plain = PathBuf::new();
        for part in absolute.components() {
            match part {
                Component::ParentDir => _ = plain.pop(),
                part => plain.push(part),
            }
        }
        match covering_in(&table, &plain) {
            Some(mount) if mount.is_ours() && mount.is_of_another() && (point || mount.point != plain) => {
                mount.check_trusted()?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// `mount` as it is now, wherever that is; None where it is gone. Its number may be another's by then, which the next mount is
/// given: that one is known by its file system.
pub fn now(mount: &Mount) -> Result<Option<Mount>> {
    Ok(by_id(mount.id)?.filter(|now| now.is_of_file_system(mount)))
}

/// The mount with this number, wherever it is now; None where it is gone.
pub fn by_id(id: u64) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().find(|mount| mount.id == id))
}

/// The mount on which `path` (absolute, without links) lies.
pub fn covering(path: &Path) -> Result<Option<Mount>> {
    Ok(covering_in(&all()?, path).cloned())
}

/// The mount of `table` on which `path` (absolute, without links) lies.
pub fn covering_in<'a>(table: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let over = table.iter().filter(|mount| path.starts_with(&mount.point));
    // The last of the longest: it lies uppermost.
    over.max_by_key(|mount| mount.point.as_os_str().len())
}

/// The absolute path of a mount point, without links. It may be missing, and a dead mount may lie on it: its last
/// name is then taken as it is.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(found) => return Ok(found),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) || e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(&e, path, "cannot resolve the path")),
    }
    let absolute = std::path::absolute(path).map_err(|e| Error::io(&e, path, "cannot resolve the path"))?;
    match (absolute.parent(), absolute.file_name()) {
        // Several missing levels: nothing of them can be a link.
        (Some(parent), Some(name)) => Ok(resolve(parent)?.join(name)),
        _ => Err(Error::at(Kind::Invalid, path, "not a path that ends in a name")),
    }
}

/// One line: `36 35 98:0 /root /point options optional... - type source superoptions`.
pub(super) fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut device = fields.next()?.split(|b| *b == b':');
    let mut half = || u32::try_from(number(device.next()?)?).ok();
    let device = (half()?, half()?);
    let root = unescape(fields.next()?).into();
    let point = unescape(fields.next()?).into();
    let optional: Vec<&[u8]> = fields.by_ref().skip(1).take_while(|field| *field != b"-").collect();
    let tagged = |tag: &[u8]| optional.iter().find_map(|field| number(field.strip_prefix(tag)?));
    let shared = tagged(b"shared:");
    let masters = [tagged(b"master:"), tagged(b"propagate_from:")].into_iter().flatten().collect();
    let kind = unescape(fields.next()?);
    let source = unescape(fields.next()?).into();
    let options = fields.next().unwrap_or_default().to_vec();
    let mut each = options.split(|b| *b == b',');
    let owner = each.find_map(|option| u32::try_from(number(option.strip_prefix(b"user_id=")?)?).ok());
    Some(Mount { id, parent, device, root, point, shared, masters, kind, source, owner, options })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Blanks, tabs, newlines and backslashes are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, behind)) = rest.split_first() {
        let code = (first == b'\\').then(|| behind.get(..3)).flatten().and_then(octal);
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &behind[3..];
            }
            None => {
                out.push(first);
                rest = behind;
            }
        }
    }
    OsString::from_vec(out)
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(OsStr::from_bytes(digits).to_str()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_blanks_in_its_paths_and_optional_fields_is_read() {
        let line = br"612 30 0:57 / /mnt/a\040b rw,nosuid shared:5 master:1 - fuse.ploopfs /srv/my\040disks rw,user_id=0";
        let mount = parse(line).expect("a whole line");
        assert_eq!((mount.id, mount.parent), (612, 30));
        assert_eq!(mount.point, Path::new("/mnt/a b"));
        assert_eq!(mount.source, Path::new("/srv/my disks"));
        assert!(mount.is_ours());
        assert_eq!(mount.owner, Some(0));
        assert_eq!((mount.device, mount.root.as_path()), ((0, 57), Path::new("/")));
    }

    #[test]
    fn a_line_with_bytes_that_are_no_utf8_is_a_line_like_others() {
        let mut line = b"612 30 0:57 / /mnt/caf".to_vec();
        line.extend_from_slice(b"\xe9 rw - ext4 /dev/loop3 rw");
        let mount = parse(&line).expect("a whole line");
        assert_eq!(mount.point.as_os_str().as_bytes(), b"/mnt/caf\xe9");
        assert_eq!(mount.source, Path::new("/dev/loop3"));
    }

    #[test]
    fn an_overlay_names_its_folders() {
        let line =
            "9 1 0:60 / /o rw - overlay overlay rw,lowerdir=/a\\040b:/c,upperdir=/u,workdir=/w,uuid=on";
        let layers = parse(line.as_bytes()).expect("a whole line").layers();
        assert_eq!(layers, ["/a b", "/c", "/u", "/w"].map(PathBuf::from));
    }

    #[test]
    fn a_broken_line_is_skipped() {
        assert_eq!(parse(b"12 13 0:1 / /mnt"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn a_missing_mount_point_resolves_below_its_existing_folder() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let real = dir.path().canonicalize().expect("it exists");
        assert_eq!(resolve(&dir.path().join("a/b")).expect("missing is fine"), real.join("a/b"));
    }
}
