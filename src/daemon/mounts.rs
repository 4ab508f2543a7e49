//! The kernel's table of mounts (`/proc/self/mountinfo`), as far as ours need it.
//!
//! A mount of ours has the type `fuse.ploopfs` and the images folder as its source; that is how a command given a
//! mount point finds the folder and its daemon.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Kind, Result};
use crate::io::foreign;

/// The type that a mount of ours has.
pub const OUR_TYPE: &str = "fuse.ploopfs";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of the mount; not reused while it is mounted.
    pub id: u64,
    /// Number of the mount it lies on.
    pub parent: u64,
    /// Where it is mounted.
    pub point: PathBuf,
    /// File system type.
    pub kind: OsString,
    /// What is mounted; for ours the images folder.
    pub source: PathBuf,
    /// The user who made it, of a FUSE mount: the kernel's word, not the file system's.
    pub owner: Option<u32>,
}

impl Mount {
    /// True for a ploopfs mount, alive or not.
    pub fn is_ours(&self) -> bool {
        self.kind == OUR_TYPE
    }

    /// The mount itself, unless another user made it, who may have named any folder as its source, and shows in it what
    /// he likes.
    pub fn trusted(self) -> Result<Mount> {
        match self.owner {
            Some(0) => Ok(self),
            Some(owner) if owner == rustix::process::geteuid().as_raw() => Ok(self),
            Some(owner) => {
                let what =
                    format!("is a mount of user {owner}, who is neither root nor you; {}", as_user(owner));
                Err(Error::at(Kind::Access, &self.point, what))
            }
            None => {
                Err(Error::at(Kind::Access, &self.point, "is a mount, and the kernel does not say whose"))
            }
        }
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
}

/// What to do where only another user can help.
pub fn as_user(owner: u32) -> String {
    format!("as that user it works: sudo -u '#{owner}' ploopfs ...")
}

/// All mounts of our namespace, in the order of mounting.
pub fn all() -> Result<Vec<Mount>> {
    const TABLE: &str = "/proc/self/mountinfo";
    let text = std::fs::read(TABLE).map_err(|e| Error::io(&e, TABLE, "cannot read the table of mounts"))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The uppermost mount whose mount point is `point` (absolute, without links).
pub fn at(point: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|m| m.point == point))
}

/// The mount on which `path` (absolute, without links) lies.
pub fn covering(path: &Path) -> Result<Option<Mount>> {
    let mut found: Option<Mount> = None;
    for mount in all()? {
        let longer =
            found.as_ref().is_none_or(|f| mount.point.as_os_str().len() >= f.point.as_os_str().len());
        if path.starts_with(&mount.point) && longer {
            found = Some(mount);
        }
    }
    Ok(found)
}

/// The absolute path of a mount point, without links. It may be missing, and a dead mount may lie on it: its last
/// name is then taken as it is.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    match std::fs::canonicalize(path) {
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
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let point = unescape(fields.nth(2)?).into();
    let mut behind = fields.skip_while(|f| *f != b"-").skip(1);
    let kind = unescape(behind.next()?);
    let source = unescape(behind.next()?).into();
    let options = behind.next().unwrap_or_default().split(|b| *b == b',');
    let owner = options.filter_map(|option| option.strip_prefix(b"user_id=")).find_map(number);
    let owner = owner.and_then(|owner| u32::try_from(owner).ok());
    Some(Mount { id, parent, point, kind, source, owner })
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
