//! Durability by a real power cut.
//!
//! The images lie on an ext4 or XFS whose disk is a file B under a loop device; B lies on an outer XFS. A cut is
//! `cp --reflink=always B C`: one moment of that disk, holding only what reached it, taken while everything runs.
//! (A plain copy would mix moments: a block that ext4 checkpoints while the copy runs is in neither half of it.)
//! C is then mounted (journal replay) and served: everything that was synced before the cut must be there.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::churn::{Churn, Kept, contradictions};
use common::{HostFs, Loop, Mount, Rng, Run, Shape, Workload, heavy, long, number_from_env, ok, text};

/// Two images, so that small and large clusters are cut at the same moments.
const IMAGES: [(&str, Shape); 2] = [
    ("small", Shape { cluster: 64 << 10, clusters: 256, threads: 2, seed: 1 }),
    ("large", Shape { cluster: 1 << 20, clusters: 24, threads: 2, seed: 2 }),
];

/// Cuts per host file system.
fn cuts() -> u64 {
    number_from_env("PLOOPFS_CUTS", if long() { 50 } else { 10 })
}

/// The disk under test with its mount and load. Dropped in this order: load, mount, file system, outer one.
struct Machine {
    /// Live operations meanwhile.
    churn: Option<Churn>,
    loads: Vec<Workload>,
    mount: Mount,
    inner: HostFs,
    outer: HostFs,
    kind: &'static str,
}

impl Machine {
    fn start(kind: &'static str, options: &[&str]) -> Machine {
        let outer = HostFs::new("xfs", 3 << 30);
        let inner = HostFs::make(kind, 1 << 30, &outer.path().join("disk"));
        let images = inner.path().join("images");
        std::fs::create_dir(&images).expect("a folder");
        for (name, shape) in &IMAGES {
            let cluster = shape.cluster.to_string();
            let image = images.join(name);
            Run::ploopfs().arg("create").arg(&image).args(["--size", "256M", "--cluster", &cluster]).ok();
        }
        let mount = Mount::over(&images, options);
        let loads = IMAGES.iter().map(|(name, shape)| Workload::start(&mount.flat(name), *shape)).collect();
        Machine { churn: None, loads, mount, inner, outer, kind }
    }

    /// Snapshots, merges and growth go on during the cuts.
    fn with_live_operations(mut self) -> Machine {
        self.churn = Some(Churn::start(&self.mount, &IMAGES.map(|(name, _)| name)));
        self
    }

    fn kept(&self) -> Kept {
        self.churn.as_ref().map(Churn::kept).unwrap_or_default()
    }

    /// Cuts the power once; returns what is wrong afterwards.
    fn cut(&self, number: u64) -> Vec<String> {
        for load in &self.loads {
            load.wait_for_syncs(5);
        }
        // Not in step with the load: the moment of the cut is any.
        std::thread::sleep(Duration::from_millis(Rng::new(number).below(120)));
        let durable: Vec<_> = self.loads.iter().map(Workload::durable).collect();
        let mut kept = self.kept();
        let copy = self.outer.path().join(format!("cut{number}"));
        ok("cp", &["--reflink=always", text(self.inner.backing()), text(&copy)]);
        // Those whose deletion began meanwhile may be there or not.
        let still = self.kept();
        kept.retain(|snapshot, _| still.contains_key(snapshot));
        let problems = self.look_at(&copy, &durable, &kept);
        std::fs::remove_file(&copy).expect("the copy");
        problems
    }

    fn look_at(&self, copy: &Path, durable: &[common::Durable], kept: &Kept) -> Vec<String> {
        let mut problems = Vec::new();
        let after = HostFs::open(self.kind, copy);
        let images = after.path().join("images");
        for (name, _) in &IMAGES {
            let check = Run::ploopfs().args(["check", "--json"]).arg(images.join(name)).run();
            if !check.success() {
                problems.push(format!("{name}: {check}"));
            }
        }
        let mut served = Mount::prepare(&images, &[]);
        let started = served.try_start();
        if !started.success() {
            problems.push(started.to_string());
            return problems;
        }
        for ((load, durable), (name, _)) in self.loads.iter().zip(durable).zip(&IMAGES) {
            // For writing: the first write repairs nothing in silence that the reads below would miss.
            match std::fs::OpenOptions::new().read(true).write(true).open(served.flat(name)) {
                Ok(file) => {
                    let verdict = load.verify(&file, durable);
                    problems.extend(verdict.problems.iter().map(|problem| format!("{name}: {problem}")));
                    if verdict.durable == 0 {
                        problems.push(format!("{name}: nothing was durable, so the cut showed nothing"));
                    }
                }
                Err(error) => problems.push(format!("{name} cannot be opened after the cut: {error}")),
            }
        }
        problems.extend(contradictions(served.point(), kept));
        if problems.is_empty() {
            problems.extend(goes_on_after_the_cut(&mut served));
        }
        problems
    }
}

/// After a cut the image is written again, unmounted, and clean.
fn goes_on_after_the_cut(served: &mut Mount) -> Option<String> {
    use std::os::unix::fs::FileExt;
    for (name, shape) in &IMAGES {
        let file = served.open(name);
        for cluster in 0..shape.clusters + 8 {
            if let Err(error) = file.write_all_at(&[9; 512], cluster * shape.cluster + 512) {
                return Some(format!("{name}: a write after the cut: {error}"));
            }
        }
        if let Err(error) = file.sync_all() {
            return Some(format!("{name}: fsync after the cut: {error}"));
        }
    }
    served.umount();
    let check = |name: &str| Run::ploopfs().arg("check").arg(served.images().join(name)).run();
    IMAGES.iter().map(|(name, _)| check(name)).find(|done| !done.success()).map(|done| done.to_string())
}

fn everything_synced_survives(kind: &'static str, live: bool) {
    let _turn = heavy();
    let mut machine = Machine::start(kind, &[]);
    if live {
        machine = machine.with_live_operations();
    }
    let began = Instant::now();
    let cuts = cuts();
    for number in 0..cuts {
        let problems = machine.cut(number);
        assert!(problems.is_empty(), "cut {number} of {cuts} on {kind}:\n{}", problems.join("\n"));
    }
    let operations: u64 = machine.loads.iter().map(Workload::operations).sum();
    for load in &mut machine.loads {
        let errors = load.stop();
        assert!(errors.is_empty(), "the load itself failed: {errors:?}");
    }
    if let Some(churn) = &mut machine.churn {
        println!("{} live operations meanwhile", churn.stop().expect("every live operation works"));
    }
    machine.mount.umount();
    println!("CRASH STATES {cuts}");
    println!("{cuts} cuts on {kind} over {operations} operations in {:?}", began.elapsed());
}

#[test]
fn everything_synced_survives_a_power_cut_on_ext4() {
    require!("fuse", "loop", "xfs");
    everything_synced_survives("ext4", false);
}

#[test]
fn everything_synced_survives_a_power_cut_on_xfs() {
    require!("fuse", "loop", "xfs");
    everything_synced_survives("xfs", false);
}

#[test]
fn everything_synced_and_every_snapshot_survives_a_power_cut_amid_live_operations_on_ext4() {
    require!("fuse", "loop", "xfs");
    everything_synced_survives("ext4", true);
}

#[test]
fn everything_synced_and_every_snapshot_survives_a_power_cut_amid_live_operations_on_xfs() {
    require!("fuse", "loop", "xfs");
    everything_synced_survives("xfs", true);
}

/// The test of the test: acknowledged and lost must be seen.
#[cfg(feature = "faults")]
#[test]
fn a_build_that_skips_fdatasync_does_not_survive_a_power_cut() {
    require!("fuse", "loop", "xfs");
    let _turn = heavy();
    let machine = Machine::start("ext4", &["--fault", "skip-sync"]);
    let caught = (0..10).any(|number| !machine.cut(number).is_empty());
    assert!(caught, "ten power cuts of a build without fdatasync lost nothing: this test proves nothing");
    println!("FAULTS 1");
}

/// A guest's own fsync, through its file system and loop, is as good as ours.
#[test]
fn a_file_synced_inside_a_guest_file_system_survives_a_power_cut() {
    require!("fuse", "loop", "xfs");
    let _turn = heavy();
    let outer = HostFs::new("xfs", 2 << 30);
    let inner = HostFs::make("ext4", 1 << 30, &outer.path().join("disk"));
    let images = inner.path().join("images");
    let mount = Mount::over(&images, &["--create", "vm1=512M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    let guest = common::Guest::mount(device.device(), "noatime");
    let data = Rng::new(3).bytes(5_000_000);
    for round in 0..3 {
        let name = format!("synced{round}");
        std::fs::write(guest.path().join(&name), &data).expect("a file in the guest");
        std::fs::File::open(guest.path().join(&name))
            .and_then(|file| file.sync_all())
            .expect("fsync in the guest");
        std::fs::File::open(guest.path()).and_then(|folder| folder.sync_all()).expect("fsync of the folder");
        std::fs::write(guest.path().join("unsynced"), &data).expect("a file in the guest");
        let copy = outer.path().join("cut");
        ok("cp", &["--reflink=always", text(inner.backing()), text(&copy)]);
        let after = HostFs::open("ext4", &copy);
        let served = Mount::over(&after.path().join("images"), &[]);
        let device = Loop::attach(&served.flat("vm1"), true);
        let again = common::Guest::mount(device.device(), "noatime");
        for earlier in 0..=round {
            let found = std::fs::read(again.path().join(format!("synced{earlier}"))).expect("a synced file");
            assert!(found == data, "synced{earlier} is not what was synced");
        }
        again.umount();
        ok("e2fsck", &["-f", "-n", text(device.device())]);
        device.detach();
        drop(served);
        drop(after);
        std::fs::remove_file(&copy).expect("the copy");
    }
    println!("CRASH STATES 3");
    guest.umount();
    device.detach();
}
