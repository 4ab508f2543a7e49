//! Whether the images folder and the mount point can be used.

use std::path::Path;

use crate::cli::{out, served};
use crate::daemon::holders;
use crate::error::{Error, Kind, Result};
use crate::io::mounts::{self, Mount};
use crate::io::unmount::unmount_this;
use crate::words::quoted;

/// A daemon must never need its own mount.
pub(super) fn check_places(images: &Path, mountpoint: &Path) -> Result<()> {
    if mountpoint.starts_with(images) {
        return Err(Error::at(
            Kind::Invalid,
            mountpoint,
            "lies in the images folder; choose a mount point outside of it",
        ));
    }
    if images.starts_with(mountpoint) {
        return Err(Error::at(
            Kind::Invalid,
            mountpoint,
            "would hide the images folder; choose another mount point",
        ));
    }
    match mounts::covering(images)? {
        Some(mount) if mount.is_ours() => {
            let what = "lies on a ploopfs mount; name the folder that holds the images themselves";
            Err(Error::at(Kind::Invalid, images, what))
        }
        _ => Ok(()),
    }
}

/// Takes away mounts whose daemon died, and names what still hangs on them.
pub(super) fn clear_dead(mountpoint: &Path) -> Result<()> {
    while let Some(mount) = mounts::at(mountpoint)? {
        if mount.is_ours()
            && let Err(e) = mount.check_trusted()
        {
            // Whatever else is asked of it may never be answered.
            let what = format!("{e}; to take it away: ploopfs umount --detach {}", quoted(mountpoint));
            return Err(Error::new(e.kind(), what));
        }
        if !served::has_died(&mount)? {
            break;
        }
        let hanging = holders::of(&mount);
        // It alone: another command may have taken it away, and mounted here, just now.
        unmount_this(&mount, true)?;
        let mut lines =
            vec![format!("{}: the daemon of the mount here had died; unmounted", mountpoint.display())];
        lines.extend(
            hanging
                .iter()
                .map(|h| format!("still hanging on the dead mount: {h}; end it with: {}", h.remedy())),
        );
        lines.iter().for_each(|line| out::say(line));
    }
    Ok(())
}

/// Another folder's mount is not covered up: its files would be out of reach.
pub(super) fn check_free(images: &Path, mountpoint: &Path) -> Result<()> {
    let Some(mount) = mounts::at(mountpoint)?.filter(Mount::is_ours) else { return Ok(()) };
    let covers = |folder: &Path| {
        let what = format!("{} is mounted here already; choose another mount point", folder.display());
        Err(Error::at(Kind::InUse, mountpoint, what))
    };
    // The daemon knows its folder as that is called now; the mount's source may be another folder's path since.
    if let Some((folder, _)) = served::of_mount(&mount)? {
        return covers(&folder);
    }
    if mount.source != images {
        return covers(&mount.source);
    }
    let what = format!(
        "is a mount of this folder whose daemon does not answer; end it with: ploopfs umount --detach {}",
        quoted(mountpoint)
    );
    Err(Error::at(Kind::InUse, mountpoint, what))
}
