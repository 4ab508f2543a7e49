//! A clone takes no space: shared extents where the host has them, hard links elsewhere.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use common::{Guest, HostFs};
use ploopfs::format::descriptor::Guid;
use ploopfs::image::clone::clone;
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::store::Replaced;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;

const MIB: u64 = 1 << 20;

/// An image with 64 MiB of data in its base and one snapshot, cloned. Returns the links of the clone's base, and the
/// space that the clone took.
fn cloned(images: &Path) -> (u64, u64) {
    let plan = CreatePlan { preallocate: true, ..CreatePlan::thin(64 * MIB) };
    create(&images.join("vm"), &plan).expect("created");
    let data = File::options().write(true).open(images.join("vm.hds")).expect("open");
    (1..65).for_each(|n| data.write_all_at(&[n as u8; MIB as usize], n * MIB).expect("write"));
    data.sync_all().expect("sync");
    let folder = File::open(images).expect("open");
    make_folder(folder.as_fd(), images, "vm.hds".as_ref(), None).expect("a folder");
    let dir = File::open(images.join("vm")).expect("open");
    let opener = Arc::new(Direct(Access::ReadWrite));
    let (layers, levels) = Layers::open(dir.into(), &images.join("vm"), opener, false).expect("opens");
    let mut next = layers.store().descriptor().clone();
    let mut header = levels[0]
        .geometry()
        .map(|g| ploopfs::format::header::Header::new(g.version, g.disk, g.cluster).expect("a header"));
    let (file, _) = layers.add_delta(&header.take().expect("a delta")).expect("made");
    let guid = Guid::random();
    next.add_snapshot(guid, &file).expect("fresh");
    layers.store().replace(next).and_then(Replaced::durable).expect("replaced");
    let free = || {
        let fs = rustix::fs::statvfs(images).expect("statvfs");
        fs.f_bfree * fs.f_frsize
    };
    let before = free();
    clone(&layers, guid, &images.join("copy"), false, &Progress::new()).expect("cloned");
    folder.sync_all().expect("sync");
    let taken = before.saturating_sub(free());
    let base = images.join("copy/copy.hds");
    let same = std::fs::read(&base).expect("read") == std::fs::read(images.join("vm/vm.hds")).expect("read");
    assert!(same, "the clone differs");
    (base.metadata().expect("there").nlink(), taken)
}

#[test]
fn on_xfs_a_clone_shares_extents_and_no_file() {
    require!("loop", "xfs");
    let host = HostFs::new("xfs", 400 * MIB);
    let (links, taken) = cloned(host.path());
    assert_eq!(links, 1);
    assert!(taken < 8 * MIB, "the clone took {taken} bytes");
}

#[test]
fn on_ext4_a_clone_links_the_frozen_deltas() {
    require!("loop", "ext4");
    let host = HostFs::new("ext4", 400 * MIB);
    let (links, taken) = cloned(host.path());
    assert_eq!(links, 2);
    assert!(taken < 8 * MIB, "the clone took {taken} bytes");
}

/// FAULTS 72: overlayfs makes a file of its lower layer another one when it is linked, and the clone was refused because the
/// file "was replaced".
#[test]
fn on_overlayfs_files_of_the_lower_layer_are_cloned() {
    require!("loop", "ext4", "overlay");
    let lower = common::temp_dir();
    let run =
        |args: &[&str], folder: &Path| common::Run::ploopfs().args(args).in_folder(folder).limit(60).ok();
    run(&["create", "vm", "--size", "8M"], lower.path());
    run(&["snapshot", "create", "vm", "a"], lower.path());
    let host = HostFs::new("ext4", 128 * MIB);
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| host.path().join(name));
    [&upper, &work, &merged].iter().for_each(|path| std::fs::create_dir(path).expect("a folder"));
    let (lower_text, upper, work, point) =
        (common::text(lower.path()), common::text(&upper), common::text(&work), common::text(&merged));
    let options = format!("lowerdir={lower_text},upperdir={upper},workdir={work}");
    common::ok("mount", &["-t", "overlay", "-o", &options, "overlay", point]);
    let guest = Guest::adopt(&merged);
    for (new, more) in [("one", None), ("two", Some("--copy"))] {
        let args: Vec<&str> = ["clone", "vm@a", new].into_iter().chain(more).collect();
        run(&args, &merged);
        run(&["check", new], &merged);
    }
    guest.umount();
}
