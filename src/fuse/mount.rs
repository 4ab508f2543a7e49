//! Mounting, for every transport.
//!
//! fuser could mount, but what it mounts it also unmounts when its session ends, and 0.18 gets that wrong three
//! ways: it tests for "still mounted" the wrong way round (so it may hit a newer mount on the same folder), gives up
//! on EBUSY, and hides the errno. Here a mount is a file descriptor and nothing else; it is unmounted once, by
//! what decided to end it, with [`unmount`](crate::io::unmount::unmount). The process that mounts need not be the one that
//! serves (`session::over`).

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::foreign;
use crate::io::handover::Receiving;

pub use crate::io::connection::DEVICE;

/// There, where SELinux is on.
const SELINUX: &str = "/sys/fs/selinux/status";

/// Largest READ in bytes, as a mount option. The same as the largest WRITE, and as the kernel's own limit of 256
/// pages (fs.fuse.max_pages_limit).
pub const MAX_READ: u32 = 1 << 20;

/// What mount(8) may ask of any file system, as far as it is the kernel's to carry out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedOptions {
    /// Every write is synced before it is answered.
    pub sync: bool,
    /// Every change of a folder is.
    pub dirsync: bool,
    /// No link in it is followed.
    pub nosymfollow: bool,
    /// Labels of SELinux (`context=...`), as they were written: the kernel takes the quotes off.
    pub labels: Vec<String>,
}

impl AskedOptions {
    fn flags(&self) -> MountFlags {
        let each = [
            (self.sync, MountFlags::SYNCHRONOUS),
            (self.dirsync, MountFlags::DIRSYNC),
            (self.nosymfollow, MountFlags::NOSYMFOLLOW),
        ];
        each.into_iter().filter(|(asked, _)| *asked).fold(MountFlags::empty(), |all, (_, flag)| all | flag)
    }
}

/// What the mount table shows and the kernel enforces.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The source shown by findmnt: the images folder.
    pub source: OsString,
    /// Let users other than the mounting one in; permission bits then decide.
    pub allow_other: bool,
    /// Refuse every change.
    pub read_only: bool,
    /// What was asked of mount(8).
    pub asked: AskedOptions,
}

/// Mounts on `mountpoint` (an existing folder, by an [`absolute`] path) and returns the connection. The kernel's INIT waits
/// in it: until a transport has answered that, every access to the mount point hangs. As an ordinary user: through
/// fusermount3.
///
/// As root on the folder itself, by its descriptor: a folder above it may be a user's, who could put a link in the place of
/// the name, and have root mount over any folder of the machine.
pub fn mount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let cannot = |e: io::Error| match e.raw_os_error() {
        Some(libc::ELOOP) => {
            Error::at(Kind::Invalid, mountpoint, "cannot mount here: it became a link just now")
        }
        Some(libc::ENOTDIR) => Error::at(Kind::Invalid, mountpoint, "cannot mount here: not a folder"),
        _ => Error::io(&e, mountpoint, "cannot mount here"),
    };
    let folder = foreign::resolved_folder(mountpoint).map_err(cannot)?;
    if rustix::process::geteuid().is_root() {
        let mode = rustix::fs::fstat(&folder).map_err(|e| cannot(e.into()))?.st_mode;
        mount_directly(&folder, mountpoint, mode, options)
    } else {
        mount_with_helper(mountpoint, options)
    }
}

fn mount_directly(folder: &OwnedFd, mountpoint: &Path, mode: u32, options: &MountOptions) -> Result<OwnedFd> {
    let device =
        rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| match e {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                Error::at(Kind::Unsupported, DEVICE, "the kernel has no FUSE here; try `modprobe fuse`")
            }
            e => Error::io(&e.into(), DEVICE, "cannot open"),
        })?;
    let mut data = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw()
    );
    for option in kernel_options(options) {
        data.push(',');
        data.push_str(option);
    }
    // The kernel knows them where SELinux is on, and takes them for a mistake elsewhere; mount(8) leaves them out there, too.
    if Path::new(SELINUX).exists() {
        for label in &options.asked.labels {
            data.push(',');
            data.push_str(label);
        }
    }
    let data = CString::new(data).map_err(|e| Error::io(&e.into(), mountpoint, "cannot mount here"))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    flags |= options.asked.flags();
    let target = format!("/proc/self/fd/{}", folder.as_raw_fd());
    rustix::mount::mount(options.source.as_os_str(), target, "fuse", flags, data.as_c_str())
        .map_err(|e| Error::io(&e.into(), mountpoint, "cannot mount here"))?;
    Ok(device)
}

/// The options that the kernel's fuse and fusermount3 both take as text.
fn kernel_options(options: &MountOptions) -> Vec<&'static str> {
    // max_read: MAX_READ in digits.
    let mut list = vec!["subtype=ploopfs", "max_read=1048576", "default_permissions"];
    if options.allow_other {
        list.push("allow_other");
    }
    list
}

/// Asks the set-uid helper of libfuse, which sends the connection's descriptor back over a socket pair. Its end is its
/// standard input: nothing that is started meanwhile inherits it, so that a helper that dies ends the wait below.
fn mount_with_helper(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let failed = |e: io::Error| Error::io(&e, mountpoint, "cannot mount through fusermount3");
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let mut text = OsString::from("nosuid,nodev,noexec,noatime");
    for option in kernel_options(options) {
        text.push(",");
        text.push(option);
    }
    // It knows no other flag.
    if options.asked.sync {
        text.push(",sync");
    }
    if options.asked.dirsync {
        text.push(",dirsync");
    }
    text.push(if options.read_only { ",ro,fsname=" } else { ",fsname=" });
    text.push(escaped(&options.source));
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(text)
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::at(
                Kind::NotPermitted,
                mountpoint,
                "mounting without root needs fusermount3 (package fuse3), which is not installed",
            ),
            _ => failed(e),
        })?;
    let mut from = Receiving::new(&ours);
    // One byte, and the descriptor with it; or the end.
    let received = from.read(&mut [0]).map(|_| from.descriptor());
    let output = child.wait_with_output().map_err(failed)?;
    match received {
        Ok(Some(connection)) => Ok(connection),
        Ok(None) => Err(Error::at(Kind::NotPermitted, mountpoint, complaint(&output))),
        Err(e) => Err(failed(e)),
    }
}

fn complaint(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    format!("cannot mount through fusermount3: {}", said.trim())
}

/// A comma or backslash in the source would end the option.
fn escaped(source: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(source.len());
    for &byte in source.as_bytes() {
        if byte == b',' || byte == b'\\' {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsString::from_vec(out)
}

/// The absolute path of a mount point, taken before mounting: afterwards the daemon must not look at it. One that is
/// absolute was resolved before, and is not resolved again: a link in it now was put there meanwhile.
pub fn absolute(mountpoint: &Path) -> Result<PathBuf> {
    if mountpoint.is_absolute() {
        return Ok(mountpoint.to_owned());
    }
    std::fs::canonicalize(mountpoint).map_err(|e| Error::io(&e, mountpoint, "cannot mount here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_the_source_does_not_become_a_mount_option() {
        assert_eq!(escaped(OsStr::new("a,suid\\b")), OsString::from("a\\,suid\\\\b"));
    }

    #[test]
    fn max_read_as_text_is_the_constant() {
        let options = MountOptions {
            source: "x".into(),
            allow_other: false,
            read_only: false,
            asked: AskedOptions::default(),
        };
        assert!(kernel_options(&options).contains(&format!("max_read={MAX_READ}").as_str()));
    }

    #[test]
    fn a_missing_mount_point_is_named() {
        let options = MountOptions {
            source: "x".into(),
            allow_other: false,
            read_only: false,
            asked: AskedOptions::default(),
        };
        let error = mount(Path::new("/nonexistent/ploopfs"), &options).expect_err("nothing to mount on");
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("/nonexistent/ploopfs"), "{error}");
    }

    #[test]
    fn a_mount_point_that_became_a_link_is_not_followed() {
        let temp = tempfile::tempdir().expect("a folder");
        let (victim, user) = (temp.path().join("etc"), temp.path().join("user"));
        std::fs::create_dir_all(victim.join("mnt")).expect("folders");
        std::os::unix::fs::symlink("etc", &user).expect("a link");
        let options = MountOptions {
            source: "x".into(),
            allow_other: false,
            read_only: false,
            asked: AskedOptions::default(),
        };
        for point in [&user, &user.join("mnt")] {
            let mounted = mount(&absolute(point).expect("as it is"), &options).map(drop);
            // Where it was followed, nothing is left of it.
            let _ = crate::io::unmount::unmount(point, true);
            assert_eq!(mounted.expect_err("a link").kind(), Kind::Invalid);
        }
    }
}
