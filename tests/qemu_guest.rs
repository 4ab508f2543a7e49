//! A guest in QEMU with its disk on the mount: it boots a kernel (in software, no KVM is needed), makes a file system on
//! /mnt/vdisks/vm1.img, writes, is snapshotted while it writes, trims, and powers off. Afterwards the disk and the
//! snapshot hold what the guest had synced, and every check finds them clean.
//!
//! The guest is a kernel of this machine (/boot), and an initramfs of busybox, mke2fs and one script. It takes
//! PLOOPFS_GUEST=1: half a minute on an idle machine, four on one that compiles meanwhile.

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::machine::{Machine, Root, kernel};
use common::{Guest, Loop, Mount, Run, allocated, heavy, number_from_env, ok, temp_dir, text};

/// What the guest does; the other end of its console is this test. `sync FILE` is an fsync.
const GUEST: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
until [ -b /dev/vda ]; do sleep 0.1; done
/sbin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt || poweroff -f
seq 400000 | dd of=/mnt/known bs=64k conv=fsync 2>/dev/null
sum=$(sha256sum </mnt/known)
echo "SUM ${sum%% *}"
{ read word </dev/ttyS0; touch /stop; } &
i=0
while [ ! -e /stop ]; do
    i=$((i + 1))
    seq $i $((i + 5000)) | dd of=/mnt/file$i bs=64k conv=fsync 2>/dev/null
    sync
    echo "SYNCED $i"
done
dd if=/dev/urandom of=/mnt/big bs=1M count=32 conv=fsync 2>/dev/null
echo BIG
read word </dev/ttyS0
rm /mnt/big
sync
fstrim /mnt && echo TRIMMED
umount /mnt && echo UNMOUNTED
poweroff -f
"#;

/// `seq FROM TO`.
fn seq(from: u64, to: u64) -> String {
    (from..=to).map(|number| format!("{number}\n")).collect()
}

/// The value of -drive in the README's line, for this disk.
fn drive(disk: &Path) -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(readme).expect("README.md");
    let mut words = readme.split_whitespace();
    words.find(|word| *word == "-drive").expect("the README's line for QEMU");
    let value = words.next().expect("-drive has a value");
    assert!(value.contains("cache=none") && value.contains("discard=unmap"), "{value}");
    value.replace("/mnt/vdisks/vm1.img", text(disk))
}

/// The number of the next file that the guest has synced.
#[track_caller]
fn synced(machine: &mut Machine) -> u64 {
    machine.expect("SYNCED ").parse().expect("a number")
}

/// The last file that the guest said it had synced, by now.
fn synced_by_now(machine: &mut Machine) -> u64 {
    machine.last("SYNCED ").and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[track_caller]
fn has_files(guest: &Path, last: u64) {
    let known = fs::read_to_string(guest.join("known")).expect("the known file");
    assert!(known == seq(1, 400_000), "the known file has changed");
    for number in 1..=last {
        let file = guest.join(format!("file{number}"));
        let found = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(found == seq(number, number + 5000), "{} is not what was synced", file.display());
    }
}

#[test]
fn a_guest_in_qemu_keeps_what_it_synced_through_a_live_snapshot_a_trim_and_its_end() {
    let test = "a_guest_in_qemu_keeps_what_it_synced_through_a_live_snapshot_a_trim_and_its_end";
    if number_from_env("PLOOPFS_GUEST", 0) == 0 {
        return println!("SKIPPED {test}: PLOOPFS_GUEST=1 switches it on");
    }
    require!("fuse", "loop", "qemu", "guest");
    let _turn = heavy();
    let folder = temp_dir();
    let (image, version) = kernel().expect("asked for before");
    let root = Root::new(folder.path());
    root.add_program("mke2fs", "/sbin/mke2fs");
    root.add_modules(&version, &["virtio_pci", "virtio_blk", "ext4"]);
    root.add_file("init", GUEST);
    let initramfs = root.pack();
    let mut mount = Mount::new(&["--create", "vm1=512M"]);
    let began = Instant::now();
    let mut machine = Machine::start(&image, &initramfs, 256, &["-drive", &drive(&mount.flat("vm1"))]);
    let sum = machine.expect("SUM ");
    println!(
        "GUEST {version}: kernel, file system and first file after {:.1} s",
        began.elapsed().as_secs_f64()
    );

    while synced(&mut machine) < 10 {}
    let sure = synced_by_now(&mut machine);
    let taken = Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("live").run();
    assert!(taken.success(), "{taken}");
    let during = synced_by_now(&mut machine);
    while synced(&mut machine) < during + 10 {}
    machine.say("stop");
    machine.expect("BIG");
    let last = synced_by_now(&mut machine);
    println!("GUEST snapshot in {:?} at file {sure} to {during} of {last}", taken.took);

    let layered = mount.images().join("vm1");
    let deltas = || -> Vec<PathBuf> {
        let files = fs::read_dir(&layered).expect("the image's folder").flatten();
        files.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(".hds")).collect()
    };
    let space = || deltas().iter().map(|file| allocated(file)).sum::<u64>();
    let full = space();
    machine.say("trim");
    machine.expect("TRIMMED");
    let trimmed = space();
    assert!(trimmed + (30 << 20) < full, "the guest's trim of 32 MiB: {full} bytes before, {trimmed} after");
    machine.expect("UNMOUNTED");
    machine.ends();
    drop(machine);
    mount.umount();

    let check = Run::ploopfs().args(["check", "--json"]).arg(mount.images().join("vm1")).ok();
    let check: serde_json::Value = serde_json::from_str(&check).expect("JSON");
    assert_eq!((&check["errors"], &check["leaks"]), (&0.into(), &0.into()), "{check}");
    assert_eq!(deltas().len(), 2, "the snapshot and the disk");
    for delta in deltas() {
        ok("qemu-img", &["check", "-q", "-f", "parallels", text(&delta)]);
    }

    mount.start();
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("e2fsck", &["-f", "-n", text(device.device())]);
    let guest = Guest::mount(device.device(), "ro");
    has_files(guest.path(), last);
    let found = ok("sha256sum", &[guest.path().join("known")]);
    assert!(found.starts_with(&sum), "the guest's own sum: {sum}, ours: {found}");
    assert!(!guest.path().join("big").exists());
    guest.umount();
    device.detach();

    // The snapshot is the disk as after a power cut: a copy of it, so that the journal can be replayed.
    let copy = folder.path().join("copy");
    let snapshot = mount.point().join(".snapshots/vm1/live.img");
    ok("cp", &["--sparse=always", text(&snapshot), text(&copy)]);
    File::open(&copy).and_then(|file| file.sync_all()).expect("a copy");
    let device = Loop::attach(&copy, false);
    let guest = Guest::mount(device.device(), "noatime");
    has_files(guest.path(), sure);
    let later = guest.path().join(format!("file{last}"));
    assert!(!later.exists(), "{} was written long after the snapshot", later.display());
    guest.umount();
    ok("e2fsck", &["-f", "-n", text(device.device())]);
    device.detach();
    mount.umount();
}
