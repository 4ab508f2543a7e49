//! Taking a mount away: by the process that decided to end it, once; as an ordinary user through libfuse's helper.

use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::mounts::{self, Mount};
use crate::error::{Error, Kind, Result};

/// Unmounts `mount`, as [`unmount`] does, wherever it was moved to, and nothing that was mounted over it or took its place
/// ([`Kind::Busy`]). Done, too, where it is gone already.
pub fn unmount_this(mount: &Mount, detach: bool) -> Result<()> {
    match attempt(mount, detach) {
        // Another command was faster, at whatever point of this.
        Err(_) if mounts::now(mount)?.is_none() => Ok(()),
        result => result,
    }
}

fn attempt(mount: &Mount, detach: bool) -> Result<()> {
    let Some(now) = mounts::now(mount)? else { return Ok(()) };
    if !now.is_reached() {
        let what = match mounts::at(&now.point)? {
            Some(over) if over.id != now.id => {
                format!(
                    "cannot be unmounted: a mount of type {} lies over it; umount that first",
                    over.kind.display()
                )
            }
            _ => "cannot be unmounted: something was mounted over a folder above it; umount that first"
                .to_owned(),
        };
        return Err(Error::at(Kind::Busy, &now.point, what));
    }
    unmount(&now.point, detach)
}

/// Unmounts once. `detach`: the name goes away now and the connection ends when the last open file is closed;
/// else EBUSY ([`Kind::Busy`]) while anything is open (a loop device, for one).
pub fn unmount(mountpoint: &Path, detach: bool) -> Result<()> {
    let flags = if detach { UnmountFlags::DETACH } else { UnmountFlags::empty() } | UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(mountpoint, flags) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => unmount_with_helper(mountpoint, detach),
        Err(e) => Err(Error::io(&e.into(), mountpoint, "cannot unmount")),
    }
}

fn unmount_with_helper(mountpoint: &Path, detach: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if detach {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::io(&e, mountpoint, "cannot unmount through fusermount3"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let kind = if said.contains("busy") { Kind::Busy } else { Kind::NotPermitted };
    Err(Error::at(kind, mountpoint, format!("cannot unmount through fusermount3: {}", said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_busy_mount_is_refused_plainly_and_detached_otherwise() {
        let dir = tempfile::tempdir().expect("temp folder");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", dir.path(), "tmpfs", flags, None).expect("mount");
        let user = File::create(dir.path().join("f")).expect("create");
        let busy = unmount(dir.path(), false);
        unmount(dir.path(), true).expect("detach");
        drop(user);
        assert_eq!(busy.expect_err("busy").kind(), Kind::Busy);
        let none = unmount(dir.path(), false).expect_err("nothing there");
        assert_eq!(none.errno(), libc::EINVAL);
    }

    #[test]
    fn the_next_mount_which_got_the_number_of_this_one_is_left_alone() {
        let dir = tempfile::tempdir().expect("temp folder");
        let point = dir.path().canonicalize().expect("there");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("next", &point, "tmpfs", flags, None).expect("mount");
        let next = mounts::at(&point).expect("the table").expect("there");
        let mut gone = next.clone();
        gone.source = "gone".into();
        let done = unmount_this(&gone, true);
        let left = mounts::at(&point).expect("the table");
        if left.is_some() {
            unmount(&point, true).expect("detach");
        }
        done.expect("it is gone");
        assert_eq!(left, Some(next));
    }

    #[test]
    fn of_two_that_take_the_same_mount_away_none_is_told_that_it_failed() {
        let dir = tempfile::tempdir().expect("temp folder");
        let point = dir.path().canonicalize().expect("there");
        for _ in 0..50 {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("none", &point, "tmpfs", flags, None).expect("mount");
            let mount = mounts::at(&point).expect("the table").expect("there");
            let results = std::thread::scope(|scope| {
                let each = [(); 4].map(|()| scope.spawn(|| unmount_this(&mount, true)));
                each.map(|one| one.join().expect("no panic"))
            });
            let left = mounts::at(&point).expect("the table");
            if left.is_some() {
                unmount(&point, true).expect("detach");
            }
            assert!(left.is_none());
            for result in results {
                result.expect("gone is gone");
            }
        }
    }
}
