//! The systemd unit of contrib, run by systemd: in a guest, since a test cannot have the machine's own. The unit's limits do
//! not break the mount; it is ready when the mount works; its stop detaches loop devices and leaves clean images; it comes
//! back when the daemon dies.
//!
//! It takes PLOOPFS_GUEST=1: systemd boots in software in one to three minutes.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::machine::{Machine, Root, kernel};
use common::{find_program, heavy, number_from_env, temp_dir};

/// Where the distribution has systemd.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
exec /usr/lib/systemd/systemd
"#;

/// Runs when the unit is started, as a service beside it.
const CHECK: &str = r#"
export PATH=/bin:/usr/bin
state() { systemctl show -p "$1" --value ploopfs@vms; }
mounts() { grep -c ' /mnt/vdisks fuse.ploopfs ' /proc/mounts; }
loops() { /sbin/losetup -a | wc -l; }
attach() { /sbin/losetup -f --show --direct-io=on /mnt/vdisks/vm1.img; }
echo "READY $(state ActiveState), $(mounts) mount, $(state StatusText)"
device=$(attach)
/sbin/mke2fs -q -t ext4 $device && mkdir /guest && mount -t ext4 $device /guest && echo kept >/guest/file && umount /guest
echo "LOOPS $(loops)"
systemctl stop ploopfs@vms
echo "STOPPED $(state ActiveState), $(state Result), $(mounts) mounts, $(loops) loops"
echo "CHECKED $(ploopfs check /srv/images/vm1)"
systemctl start ploopfs@vms
kill -9 $(sed -n 's/.*"pid": \([0-9]*\).*/\1/p' /mnt/vdisks/.ploopfs/stats.json)
until [ "$(state NRestarts) $(state ActiveState)" = "1 active" ]; do sleep 1; done
mount -t ext4 -o ro $(attach) /guest
echo "RESTARTED $(mounts) mount, $(cat /guest/file)"
poweroff -f
"#;

const CHECK_UNIT: &str = "[Unit]\nWants=ploopfs@vms.service\nAfter=ploopfs@vms.service\n[Service]\nType=oneshot\n\
    StandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\nExecStart=/bin/busybox sh /check\n";

#[test]
fn the_unit_starts_stops_and_starts_again_under_systemd() {
    let test = "the_unit_starts_stops_and_starts_again_under_systemd";
    if number_from_env("PLOOPFS_GUEST", 0) == 0 {
        return println!("SKIPPED {test}: PLOOPFS_GUEST=1 switches it on");
    }
    require!("guest");
    if !Path::new(SYSTEMD).is_file() || find_program("systemctl").is_none() {
        return println!("SKIPPED {test}: systemd is not installed");
    }
    let _turn = heavy();
    let folder = temp_dir();
    let (image, version) = kernel().expect("asked for before");
    let root = Root::new(folder.path());
    for (program, to) in [
        ("mke2fs", "/sbin/mke2fs"),
        ("losetup", "/sbin/losetup"),
        ("systemctl", "/bin/systemctl"),
        (SYSTEMD, SYSTEMD),
        (env!("CARGO_BIN_EXE_ploopfs"), "/usr/bin/ploopfs"),
    ] {
        root.add_program(program, to);
    }
    root.add_modules(&version, &["virtio_pci", "ext4", "fuse", "loop"]);
    // The distribution's targets, which ours is ordered by; nothing of them is wanted but what ours needs.
    for entry in fs::read_dir("/usr/lib/systemd/system").expect("units").flatten() {
        let name = entry.file_name().into_string().expect("ASCII");
        if [".target", ".slice", "modprobe@.service"].iter().any(|end| name.ends_with(end))
            && entry.path().is_file()
        {
            fs::copy(entry.path(), root.path(&format!("usr/lib/systemd/system/{name}"))).expect("a copy");
        }
    }
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd/ploopfs@.service");
    fs::copy(unit, root.path("usr/lib/systemd/system/ploopfs@.service")).expect("a copy");
    let conf = "IMAGES=/srv/images\nMOUNTPOINT=/mnt/vdisks\nOPTIONS=--create vm1=64M --threads 2\n";
    fs::write(root.path("etc/ploopfs/vms.conf"), conf).expect("a file");
    fs::write(root.path("etc/systemd/system/check.service"), CHECK_UNIT).expect("a file");
    fs::write(root.path("etc/machine-id"), "").expect("a file");
    for (to, from) in [
        ("/usr/lib/systemd/system/multi-user.target", "etc/systemd/system/default.target"),
        ("../check.service", "etc/systemd/system/multi-user.target.wants/check.service"),
    ] {
        symlink(to, root.path(from)).unwrap_or_else(|error| panic!("{from}: {error}"));
    }
    for name in ["run", "srv", "tmp"] {
        fs::create_dir_all(root.path(name)).expect("a folder");
    }
    root.add_file("check", CHECK);
    root.add_file("init", INIT);

    let mut machine = Machine::start(&image, &root.pack(), 512, &[]);
    assert_eq!(machine.expect("READY "), "active, 1 mount, /srv/images on /mnt/vdisks");
    assert_eq!(machine.expect("LOOPS "), "1");
    assert_eq!(machine.expect("STOPPED "), "inactive, success, 0 mounts, 0 loops");
    assert_eq!(machine.expect("CHECKED "), "/srv/images/vm1.hds: no errors");
    assert_eq!(machine.expect("RESTARTED "), "1 mount, kept");
    machine.ends();
}
