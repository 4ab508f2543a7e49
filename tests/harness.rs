//! The harness tests itself, so that a test that passes means something.

mod common;

use std::time::Duration;

use common::{HostFs, Loop, Run, Shape, Workload, allocated, punch, temp_dir};

#[test]
fn a_command_that_hangs_is_ended_at_its_limit() {
    let done = Run::new("sleep").arg("60").limit(1).run();
    assert_eq!(done.status, None);
    assert!(done.took < Duration::from_secs(10));
}

#[test]
fn a_host_file_system_and_its_loop_device_leave_nothing_behind() {
    require!("loop");
    let (folder, device) = {
        let host = HostFs::new("ext4", 64 << 20);
        std::fs::write(host.path().join("file"), b"text").expect("a file on the host file system");
        (host.path().to_owned(), common::loops_in(host.backing()))
    };
    assert_eq!(device.len(), 1);
    assert!(!folder.exists());
    assert_eq!(common::loops_in(&folder), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_loop_device_over_a_file_is_direct_or_not_as_asked() {
    require!("loop");
    let folder = temp_dir();
    let file = folder.path().join("disk");
    std::fs::write(&file, vec![1; 1 << 20]).expect("a file");
    for direct in [true, false] {
        let device = Loop::attach(&file, direct);
        assert_eq!(device.direct(), direct);
        device.detach();
    }
    assert!(allocated(&file) >= 1 << 20);
}

const SHAPE: Shape = Shape { cluster: 65536, clusters: 32, threads: 2, seed: 7 };

fn load_on_a_plain_file() -> (tempfile::NamedTempFile, Workload) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(SHAPE.span()).expect("a sparse file");
    let mut load = Workload::start(file.path(), SHAPE);
    load.wait_for_syncs(50);
    assert!(load.stop().is_empty());
    (file, load)
}

#[test]
fn a_plain_file_under_load_passes_the_verification() {
    let (file, load) = load_on_a_plain_file();
    let verdict = load.verify(file.as_file(), &load.durable());
    assert!(verdict.durable > 0);
    assert_eq!(verdict.problems, Vec::<String>::new());
}

#[test]
fn a_lost_durable_write_is_found() {
    let (file, load) = load_on_a_plain_file();
    punch(file.as_file(), 0, SHAPE.span()).expect("a hole in a plain file");
    let verdict = load.verify(file.as_file(), &load.durable());
    assert!(verdict.problems.iter().any(|problem| problem.contains("was durable")), "{:?}", verdict.problems);
}

#[test]
fn bytes_that_no_write_put_there_are_found() {
    use std::os::unix::fs::FileExt;
    let (file, load) = load_on_a_plain_file();
    file.as_file().write_all_at(&[0x5a; 512], 4096).expect("a write to a plain file");
    let verdict = load.verify(file.as_file(), &load.durable());
    assert!(
        verdict.problems.iter().any(|problem| problem.contains("no write here")),
        "{:?}",
        verdict.problems
    );
}

/// The power cut of tests/power_cut.rs on a plain file of the host: what ext4 and XFS promise is kept by the copy, so
/// that whatever is lost there was lost by us.
#[test]
fn a_copy_of_a_live_host_disk_has_everything_that_was_synced_to_a_plain_file() {
    require!("loop", "xfs");
    let outer = HostFs::new("xfs", 3 << 30);
    for kind in ["ext4", "xfs"] {
        let inner = HostFs::make(kind, 512 << 20, &outer.path().join(kind));
        let file = std::fs::File::create(inner.path().join("flat")).expect("a file");
        file.set_len(SHAPE.span()).and_then(|()| file.sync_all()).expect("a sparse file");
        let load = Workload::start(&inner.path().join("flat"), SHAPE);
        for cut in 0..4 {
            load.wait_for_syncs(20);
            let durable = load.durable();
            let copy = outer.path().join("copy");
            common::ok("cp", &["--reflink=always", common::text(inner.backing()), common::text(&copy)]);
            let after = HostFs::open(kind, &copy);
            let file = std::fs::File::open(after.path().join("flat")).expect("the file after the cut");
            let verdict = load.verify(&file, &durable);
            assert!(verdict.problems.is_empty(), "{kind}, cut {cut}:\n{}", verdict.problems.join("\n"));
            assert!(verdict.durable > 0);
            drop((file, after));
            std::fs::remove_file(&copy).expect("the copy");
        }
    }
}
