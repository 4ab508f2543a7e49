//! Scripts in a mount namespace of their own, where ploopfs is installed: nothing of the machine is changed.

use std::path::Path;

use rustix::process::Signal;

use super::run::{Finished, Run};
use super::{signal, text};

/// Puts helpers into /sbin, the binary into /usr/local/bin and the folder's `fstab` into /etc.
const PREPARE: &str = r#"
set -euo pipefail
mkdir -p "$W/seen-sbin" "$W/sbin" "$W/bin"
sbin=$(readlink -f /sbin)
mount --bind "$sbin" "$W/seen-sbin"
cp -as "$W/seen-sbin/." "$W/sbin/"
cp --remove-destination "$HELPERS/mount.fuse.ploopfs" "$HELPERS/umount.fuse.ploopfs" "$W/sbin/"
mount --bind "$W/sbin" "$sbin"
ln -sf "$BIN" "$W/bin/ploopfs"
mount --bind "$W/bin" /usr/local/bin
export PATH="/usr/local/bin:$PATH"
touch "$W/fstab"
mount --bind "$W/fstab" /etc/fstab
cd "$W"
"#;

/// Runs a bash script in `folder`, with mount(8)'s helpers from the folder `helpers` and the binary `ploopfs`.
pub fn installed(folder: &Path, helpers: &Path, ploopfs: &Path, script: &str) -> Finished {
    Run::new("unshare")
        .args(["--mount", "bash", "-c", &format!("{PREPARE}\n{script}")])
        .env("W", text(folder))
        .env("HELPERS", text(helpers))
        .env("BIN", text(ploopfs))
        .run()
}

/// Makes what an ordinary user needs: the binary where every user reaches it, a folder `own` that every user may write, and
/// a FUSE device that is open to all. `as_user COMMAND` is that user.
const FOR_A_USER: &str = r#"
set -eux
cp "$BIN" ploopfs; chmod 755 . ploopfs; mkdir -m 777 own
mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse
as_user() { runuser -u nobody -- "$@"; }
"#;

/// Runs a bash script in `folder`, in a namespace prepared for an ordinary user. Daemons that outlive it are killed; true:
/// there were some.
pub fn for_a_user(folder: &Path, ploopfs: &Path, script: &str) -> (Finished, bool) {
    let here = text(folder);
    let done = Run::new("unshare")
        .args(["--mount", "bash", "-c", &format!("cd \"$W\"\n{FOR_A_USER}\n{script}")])
        .env("W", here)
        .env("BIN", text(ploopfs))
        .limit(60)
        .run();
    let left = Run::new("pgrep").args(["-f", &format!("ploopfs daemon {here}")]).run();
    left.stdout.lines().filter_map(|pid| pid.parse().ok()).for_each(|pid| signal(pid, Signal::KILL));
    (done, !left.stdout.is_empty())
}
