//! A merge into a raw file that fails or is broken off at any step.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::*;
use crate::image::create::{CreatePlan, create};
use crate::image::kind::ImageKind;
use crate::image::layers::{Direct, Opened, Opener};
use crate::image::make_folder::make_folder;
use crate::io::fault::{FaultFile, FaultPlan};
use crate::io::lock::Use;
use crate::io::real::Access;
use crate::sync::Arc;
use crate::vdisk::live::{carry_out, carry_out_before_close};
use crate::vdisk::{Engine, Image, Options};

const CLUSTER: u64 = 32 << 10;

/// Opens files that fail as planned.
struct Failing(Arc<FaultPlan>);

impl Opener for Failing {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened> {
        let opened = Direct(Access::ReadWrite).open(dir, file, shown, used)?;
        Ok(Opened { file: Arc::new(FaultFile::new(opened.file.clone(), self.0.clone())), ..opened })
    }
}

fn layers(folder: &Path, faults: &str) -> Arc<Layers> {
    let dir = OwnedFd::from(std::fs::File::open(folder).expect("opens"));
    let plan = faults.parse::<FaultPlan>().expect("a plan");
    Layers::open(dir, folder, Arc::new(Failing(Arc::new(plan))), false).expect("opens").0
}

fn image(layers: &Layers) -> Arc<Image> {
    let engine = Engine::new(Options::default(), Box::new(|_| ()));
    Image::open(&engine, "vm", layers.live_chain().expect("a chain")).expect("opens")
}

/// A raw disk of 17 clusters whose snapshot was deleted, and its content. The top has two clusters with data and one
/// that is a hole.
fn disk() -> (tempfile::TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().expect("tmp");
    let size = 17 * CLUSTER;
    create(
        &folder.path().join("vm"),
        &CreatePlan { kind: Some(ImageKind::Raw), ..CreatePlan::copy_of(size) },
    )
    .expect("created");
    let mut bytes = vec![1; size as usize];
    std::fs::write(folder.path().join("vm.raw"), &bytes).expect("written");
    let images = std::fs::File::open(folder.path()).expect("opens");
    make_folder(images.as_fd(), folder.path(), "vm.raw".as_ref(), None).expect("a folder");
    let layers = layers(&folder.path().join("vm"), "");
    let image = image(&layers);
    image.make_writable().expect("sound");
    let mut write = |at: u64, len: u64, byte: u8| {
        bytes[at as usize..(at + len) as usize].fill(byte);
        match byte {
            0 => image.discard_at(at, len).expect("discarded"),
            _ => image.write_at(at, &vec![byte; len as usize]).expect("written"),
        }
    };
    let work = |work: Work| carry_out(&image, Some(&layers), &work, &Progress::new()).expect("done");
    work(Work::Snapshot { label: Some("one".into()) });
    write(CLUSTER, 4096, 2);
    write(2 * CLUSTER, CLUSTER, 0);
    write(16 * CLUSTER, SECTOR, 3);
    let delete = Work::Delete { snapshot: "one".into() };
    carry_out_before_close(&image, Some(&layers), &delete, &Progress::new()).expect("marked");
    image.close().expect("closes");
    (folder, bytes)
}

#[test]
fn a_merge_that_fails_at_any_step_leaves_the_disk_and_is_done_by_the_next_attempt() {
    let faults = ["write:1:ENOSPC", "write:2:EIO", "punch:1:EIO", "sync:1:EIO", "read:3:EIO"];
    for fault in faults {
        let (folder, bytes) = disk();
        let path = folder.path().join("vm");
        let failing = layers(&path, &format!("fail={fault}"));
        finish(&failing, &Progress::new(), &|| true).expect_err(fault);
        drop(failing);
        let again = layers(&path, "");
        let shown = image(&again).read_at(0, bytes.len()).expect("reads");
        assert!(*shown == *bytes, "another disk after {fault}");
        assert!(finish(&again, &Progress::new(), &|| true).expect("done"), "{fault}");
        assert!(std::fs::read(path.join("vm.raw")).expect("read") == bytes, "{fault}");
        assert_eq!(again.store().descriptor().lone_raw_file(), Some("vm.raw"));
    }
}

#[test]
fn a_host_that_cannot_punch_gets_zeroes() {
    let (folder, bytes) = disk();
    let path = folder.path().join("vm");
    let layers = layers(&path, "fail=punch:1:EOPNOTSUPP");
    assert!(finish(&layers, &Progress::new(), &|| true).expect("done"));
    assert!(std::fs::read(path.join("vm.raw")).expect("read") == bytes);
}

#[test]
fn a_merge_that_is_broken_off_can_go_on_the_other_way() {
    let (folder, bytes) = disk();
    let path = folder.path().join("vm");
    let layers = layers(&path, "");
    let asked = std::cell::Cell::new(0);
    let twice = || {
        asked.set(asked.get() + 1);
        asked.get() < 3
    };
    assert!(!finish(&layers, &Progress::new(), &twice).expect("no error"));
    let image = image(&layers);
    image.make_writable().expect("sound");
    carry_out(&image, Some(&layers), &Work::Finish, &Progress::new()).expect("up");
    assert!(*image.read_at(0, bytes.len()).expect("reads") == *bytes);
    image.close().expect("closes");
    assert!(layers.store().descriptor().unfinished().is_empty());
    assert!(!path.join("vm.raw").exists());
}
