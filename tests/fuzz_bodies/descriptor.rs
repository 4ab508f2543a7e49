//! Any bytes as `DiskDescriptor.xml`: an error or a tree; what is written back reads the same; no file outside the
//! folder around the image is opened.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use ploopfs::format::descriptor::{Descriptor, MAX_BYTES};
use ploopfs::format::header::{Header, Version};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::paths::image_folder;
use ploopfs::io::real::Access;

use super::{folder, not_internal};

pub fn descriptor(data: &[u8]) {
    let Ok(read) = Descriptor::parse(data) else { return };
    let xml = read.to_xml();
    if xml.len() > MAX_BYTES {
        return; // The store refuses to write what it would refuse to read.
    }
    let again = Descriptor::parse(&xml).expect("what we write we read");
    assert!(again.to_xml() == xml, "each rewrite changes something");
    assert_eq!((&again.deltas, &again.shots, again.top), (&read.deltas, &read.shots, read.top));
    assert_eq!((again.disk_sectors, again.cluster_sectors), (read.disk_sectors, read.cluster_sectors));
    for shot in &read.shots {
        if let Ok(chain) = read.chain(shot.guid) {
            assert!(chain.last() == Some(&shot.guid) && chain.len() <= read.shots.len());
        }
    }
    open(data);
}

/// Opens the image with a few files around it. `outside` may be reached by nobody, whatever way is named.
fn open(xml: &[u8]) {
    let folder = folder();
    let images = folder.path().join("images");
    let vm = images.join("vm");
    std::fs::create_dir_all(vm.join("sub")).expect("folders");
    let header = Header::new(Version::V2, 64 << 10, 32 << 10).expect("a legal size");
    let mut delta = header.encode().to_vec();
    delta.resize(header.geometry().first as usize, 0);
    let make = |path: &Path| std::fs::write(path, &delta).expect("space");
    let outside = folder.path().join("outside.hds");
    make(&outside);
    for name in ["root.hds", "a.hds", "b.hds", "sub/c.hds", "../d.hds"] {
        make(&vm.join(name));
    }
    symlink(&outside, vm.join("link.hds")).expect("a link");
    symlink(folder.path(), vm.join("way")).expect("a link");
    std::fs::write(vm.join("DiskDescriptor.xml"), xml).expect("space");
    let secret = std::fs::metadata(&outside).expect("a file").modified().expect("a time");

    let dir = image_folder(&vm).expect("a folder");
    match Layers::open(dir, &vm, Arc::new(Direct(Access::ReadWrite)), false) {
        Ok((layers, levels)) => {
            let ino = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&outside).expect("a file"));
            for level in &levels {
                assert_ne!(level.file.status().expect("open").ino, ino, "a file outside was opened");
            }
            let guids: Vec<_> = layers.store().snapshots().collect();
            for guid in guids {
                if let Err(e) = layers.chain(guid) {
                    not_internal(&e);
                }
            }
        }
        Err(e) => not_internal(&e),
    }
    let now = std::fs::metadata(&outside).expect("a file").modified().expect("a time");
    assert_eq!(now, secret, "a file outside was changed");
    assert!(std::fs::read(&outside).expect("a file") == delta, "a file outside was changed");
}
