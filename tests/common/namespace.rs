//! Scripts in a mount namespace of their own, where ploopfs is installed: nothing of the machine is changed.

use std::path::Path;

use super::run::{Finished, Run};
use super::text;

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
