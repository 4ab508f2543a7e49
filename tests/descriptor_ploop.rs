//! Debian's ploop 1.15 as a second judge of chains at rest: it lists, checks, merges and grows what we wrote, and what
//! it leaves opens here. Its kernel module is not needed (docs/format.md#oracles).

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Mount, Run, memory_dir, ok, punch, text, until};
use ploopfs::format::descriptor::Guid;
use ploopfs::format::header::{FLAG_EMPTY, Header};
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::level::Level;
use ploopfs::image::levels::{disk_size, header_above};
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::store::Replaced;
use ploopfs::image::switch::switch;
use ploopfs::io::real::Access;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;

/// A layered image of 16 MiB in memory: ploop calls sparse files on ext4 damaged.
struct Image {
    folder: tempfile::TempDir,
    snapshots: Vec<Guid>,
}

impl Image {
    fn new(snapshots: usize) -> Image {
        let folder = memory_dir();
        create(&folder.path().join("vm"), &CreatePlan::thin(DISK)).expect("created");
        let images = File::open(folder.path()).expect("open");
        make_folder(images.as_fd(), folder.path(), "vm.hds".as_ref(), None).expect("a folder");
        let mut image = Image { folder, snapshots: Vec::new() };
        for level in 0..=snapshots {
            // Each level has a cluster of its own, and one that hides the lower ones'.
            image.fill_top(&[(level as u64, 0x10 + level as u8), (15, 0x80 + level as u8)]);
            if level < snapshots {
                image.snapshot();
            }
        }
        image
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("vm")
    }

    fn xml(&self) -> PathBuf {
        self.path().join("DiskDescriptor.xml")
    }

    fn open(&self) -> (Arc<Layers>, Vec<Level>) {
        let dir = File::open(self.path()).expect("open");
        Layers::open(dir.into(), &self.path(), Arc::new(Direct(Access::ReadWrite)), false)
            .expect("the image opens")
    }

    fn snapshot(&mut self) {
        let (layers, levels) = self.open();
        let mut next = layers.store().descriptor().clone();
        let header = header_above(&levels, &next, disk_size(&levels, &next)).expect("a header");
        let (file, _) = layers.add_delta(&header).expect("a delta");
        let guid = Guid::random();
        next.add_snapshot(guid, &file).expect("fresh");
        layers.store().replace(next).and_then(Replaced::durable).expect("replaced");
        self.snapshots.push(guid);
    }

    /// Puts whole clusters into the top, by hand: (guest cluster, byte).
    fn fill_top(&self, clusters: &[(u64, u8)]) {
        let (_layers, levels) = self.open();
        let file = &levels.last().expect("a top").file;
        let put = |bytes: &[u8], at| ploopfs::io::file::write_full(&**file, bytes, at).expect("write");
        for (cluster, byte) in clusters {
            let end = file.len().expect("a length");
            put(&vec![*byte; MIB as usize], end);
            put(&((end / MIB) as u32).to_le_bytes(), 64 + 4 * cluster);
        }
        let mut header = levels.last().map(header_of).expect("a top");
        header.flags &= !FLAG_EMPTY;
        put(&header.encode(), 0);
    }

    /// The first byte of each guest cluster, as the chain of `guid` shows it; checked to be the whole cluster's.
    fn content(&self, guid: Guid) -> Vec<u8> {
        let (layers, _) = self.open();
        let levels = layers.chain(guid).expect("a chain");
        let disk = disk_size(&levels, layers.store().descriptor());
        (0..disk / MIB)
            .map(|cluster| levels.iter().rev().find_map(|l| mapped(l, cluster)).unwrap_or(0))
            .collect()
    }

    /// What the image was filled with, up to `level`.
    fn expected(level: usize) -> Vec<u8> {
        let mut bytes = vec![0; (DISK / MIB) as usize];
        (0..=level).for_each(|n| bytes[n] = 0x10 + n as u8);
        bytes[15] = 0x80 + level as u8;
        bytes
    }

    /// Every delta alone is clean to QEMU, and the whole to ploop, which repairs nothing.
    #[track_caller]
    fn is_clean(&self) {
        let copy = memory_dir();
        ok("cp", &["-r", "--sparse=never", text(&self.path()), text(copy.path())]);
        let folder = copy.path().join("vm");
        let before = contents(&folder);
        let (layers, _) = self.open();
        let mut files = vec!["DiskDescriptor.xml".to_owned()];
        files.extend(layers.store().descriptor().deltas.iter().map(|delta| delta.file.clone()));
        for file in &files {
            let done = Run::new("ploop").args(["check", "-f", text(&folder.join(file))]).run();
            assert!(done.success() && !done.output().contains("Error"), "{done}");
        }
        assert!(contents(&folder) == before, "ploop changed something");
        for file in &files[1..] {
            ok("qemu-img", &["check", "-f", "parallels", text(&folder.join(file))]);
        }
    }
}

fn header_of(level: &Level) -> Header {
    let mut bytes = [0; 64];
    ploopfs::io::file::read_full(&*level.file, &mut bytes, 0).expect("read");
    Header::parse(&bytes).expect("a header")
}

/// The byte that fills the cluster in this level; None where the level does not map it.
fn mapped(level: &Level, cluster: u64) -> Option<u8> {
    let mut entry = [0; 4];
    if cluster >= u64::from(header_of(level).entries) {
        return None;
    }
    ploopfs::io::file::read_full(&*level.file, &mut entry, 64 + 4 * cluster).expect("read");
    let at = u64::from(u32::from_le_bytes(entry));
    if at == 0 {
        return None;
    }
    let mut bytes = vec![0; MIB as usize];
    ploopfs::io::file::read_full(&*level.file, &mut bytes, at * MIB).expect("read");
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "cluster {cluster} is torn");
    Some(bytes[0])
}

/// Names and bytes of the deltas and the descriptor.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).expect("list").flatten();
    let mut all: Vec<_> = entries
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).expect("read")))
        .filter(|(name, _)| !name.ends_with(".lck"))
        .collect();
    all.sort();
    all
}

fn ploop(args: &[&str]) -> String {
    let done = Run::new("ploop").args(args).run();
    assert!(done.success(), "ploop {args:?}: {done}");
    done.output()
}

#[test]
fn ploop_lists_the_snapshots_that_we_wrote() {
    require!("ploop");
    let image = Image::new(3);
    let listed = ploop(&["snapshot-list", "-H", "-o", "uuid,parent_uuid,current", text(&image.xml())]);
    let mut parent = Guid::NONE;
    for guid in image.snapshots.iter().chain([&Guid::TOP]) {
        let line = listed.lines().find(|line| line.trim_start().starts_with(&guid.to_string()));
        let line = line.unwrap_or_else(|| panic!("{guid} is not in {listed}"));
        assert!(line.contains(&parent.to_string()), "{line}: not on {parent}");
        assert_eq!(line.contains('*'), *guid == Guid::TOP, "{line}");
        parent = *guid;
    }
}

#[test]
fn a_chain_and_a_switched_tree_are_clean_to_ploop_and_qemu() {
    require!("ploop");
    let image = Image::new(3);
    image.is_clean();
    let (layers, _) = image.open();
    switch(&layers, image.snapshots[0]).expect("switched");
    drop(layers);
    image.is_clean();
    assert_eq!(image.content(Guid::TOP), Image::expected(0));
    assert_eq!(image.content(image.snapshots[2]), Image::expected(2));
}

#[test]
fn what_ploop_merged_opens_here_with_the_same_content() {
    require!("ploop");
    let image = Image::new(3);
    ploop(&["snapshot-delete", "-u", &image.snapshots[1].to_string(), text(&image.xml())]);
    let (layers, levels) = image.open();
    assert_eq!(levels.len(), 3);
    assert!(layers.store().descriptor().shot(image.snapshots[1]).is_none());
    drop((layers, levels));
    assert_eq!(image.content(image.snapshots[0]), Image::expected(0));
    assert_eq!(image.content(image.snapshots[2]), Image::expected(2));
    assert_eq!(image.content(Guid::TOP), Image::expected(3));
    ploop(&["snapshot-delete", "-u", &image.snapshots[0].to_string(), text(&image.xml())]);
    ploop(&["snapshot-delete", "-u", &image.snapshots[2].to_string(), text(&image.xml())]);
    assert_eq!(image.open().1.len(), 1);
    assert_eq!(image.content(Guid::TOP), Image::expected(3));
    image.is_clean();
}

/// What each cluster of the disk is full of, through a mount.
fn bytes_of(image: &Path) -> Vec<u8> {
    let mount = Mount::over(image.parent().expect("a folder"), &["--read-only"]);
    let flat = std::fs::read(mount.flat("vm")).expect("reads");
    flat.chunks(MIB as usize)
        .map(|cluster| {
            assert!(cluster.iter().all(|b| *b == cluster[0]), "a mixture");
            cluster[0]
        })
        .collect()
}

/// The image's snapshots and the disk go through the daemon; then the original tool takes them over, and gives them back.
#[test]
fn a_chain_that_the_daemon_made_live_is_checked_merged_and_grown_by_ploop_and_reads_back() {
    require!("fuse", "ploop", "qemu");
    let images = memory_dir();
    let image = images.path().join("vm");
    let mut mount = Mount::over(images.path(), &["--create", "vm=16M"]);
    let flat = mount.flat("vm");
    let fill = |cluster: u64, byte: u8| {
        let open = std::fs::OpenOptions::new().write(true).open(&flat).expect("opens");
        open.write_all_at(&[byte; MIB as usize], cluster * MIB).expect("written");
        open.sync_all().expect("synced");
    };
    for (n, label) in ["a", "b", "c"].iter().enumerate() {
        fill(n as u64, 1 + n as u8);
        fill(15, 0x80 + n as u8);
        Run::ploopfs().args(["snapshot", "create", text(&flat), label]).ok();
    }
    fill(7, 0x77);
    // A discard over lower data: a mapped hole in the top.
    let open = std::fs::OpenOptions::new().write(true).open(&flat).expect("opens");
    punch(&open, 0, MIB).expect("punched");
    drop(open);
    let then = std::fs::read(&flat).expect("reads");
    mount.umount();
    let xml = image.join("DiskDescriptor.xml");
    let guids: Vec<String> = ploop(&["snapshot-list", "-H", "-o", "uuid", text(&xml)])
        .lines()
        .map(|line| line.trim().trim_start_matches('*').trim().to_owned())
        .filter(|guid| guid.starts_with('{') && *guid != Guid::TOP.to_string())
        .collect();
    assert_eq!(guids.len(), 3, "{guids:?}");
    let clean = |image: &Path| {
        let copy = memory_dir();
        ok("cp", &["-r", "--sparse=never", text(image), text(copy.path())]);
        let done =
            Run::new("ploop").args(["check", "-f", text(&copy.path().join("vm/DiskDescriptor.xml"))]).run();
        assert!(done.success() && !done.output().contains("Error"), "{done}");
    };
    clean(&image);
    let expected: Vec<u8> = then.chunks(MIB as usize).map(|cluster| cluster[0]).collect();
    assert_eq!((expected[0], expected[1], expected[2], expected[7], expected[15]), (0, 2, 3, 0x77, 0x82));
    for guid in &guids {
        ploop(&["snapshot-delete", "-u", guid, text(&xml)]);
        assert_eq!(bytes_of(&image), expected, "after ploop merged {guid}");
    }
    let files: Vec<PathBuf> = std::fs::read_dir(&image)
        .expect("the image's folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| !text(path).contains("DiskDescriptor") && !text(path).ends_with(".json"))
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    ok("qemu-img", &["check", "-f", "parallels", text(&files[0])]);
    ploop(&["grow", "-s", &(2 * DISK / 512).to_string(), text(&files[0])]);
    let mut grown = expected;
    grown.resize((2 * DISK / MIB) as usize, 0);
    assert_eq!(bytes_of(&image), grown, "after ploop grew it");
}

/// `ploop merge UPPER LOWER` knows nothing of a descriptor: two of our files alone.
#[test]
fn two_bare_deltas_of_ours_are_merged_by_ploop() {
    require!("ploop");
    let image = Image::new(1);
    let files: Vec<PathBuf> = image.open().1.into_iter().map(|level| level.path).collect();
    ploop(&["merge", text(&files[1]), text(&files[0])]);
    // The lower file has it all now; alone it is an image.
    let alone = memory_dir();
    let single = alone.path().join("vm.hds");
    std::fs::copy(&files[0], &single).expect("copied");
    ok("qemu-img", &["check", "-f", "parallels", text(&single)]);
    assert_eq!(bytes_of(&single), Image::expected(1));
}

#[test]
fn a_top_that_ploop_grew_opens_here_and_the_descriptor_follows() {
    require!("ploop");
    let image = Image::new(1);
    let top = image.open().1.pop().expect("a top").path;
    // ploop counts in sectors where no unit is given.
    ploop(&["grow", "-s", &(2 * DISK / 512).to_string(), text(&top)]);
    let (layers, levels) = image.open();
    assert_eq!(disk_size(&levels, layers.store().descriptor()), 2 * DISK);
    assert_eq!(layers.store().descriptor().disk_sectors, 2 * DISK / 512);
    drop((layers, levels));
    let mut grown = Image::expected(1);
    grown.resize((2 * DISK / MIB) as usize, 0);
    assert_eq!(image.content(Guid::TOP), grown);
    assert_eq!(image.content(image.snapshots[0]), Image::expected(0));
    // ploop's own check calls the Empty flag that its grow wrote incorrect; QEMU does not look at it.
    ok("qemu-img", &["check", "-f", "parallels", text(&top)]);
}

#[test]
fn a_descriptor_written_by_hand_opens_here_and_keeps_its_extras() {
    require!("ploop");
    let image = Image::new(1);
    let written = std::fs::read_to_string(image.xml()).expect("text");
    let by_hand = written
        .replace("Virtuozzo_disk_image", "Parallels_disk_image")
        .replace("<Blocksize>2048<", "<Blocksize>0x800<")
        .replace("<ParentGUID>", "<Name>mine</Name><ParentGUID>");
    std::fs::write(image.xml(), by_hand.replace("{5fbaabe3", "{5FBAABE3")).expect("write");
    assert_eq!(image.content(Guid::TOP), Image::expected(1));
    let (layers, _) = image.open();
    switch(&layers, image.snapshots[0]).expect("switched");
    drop(layers);
    let kept = std::fs::read_to_string(image.xml()).expect("text");
    assert!(kept.contains("<Name>mine</Name>") && kept.contains("<Parallels_disk_image>"), "{kept}");
    ploop(&["snapshot-list", text(&image.xml())]);
    image.is_clean();
}

#[test]
fn while_we_have_the_descriptor_ploop_waits() {
    require!("ploop");
    let image = Image::new(1);
    let (layers, levels) = image.open();
    let xml = image.xml();
    let deleting = std::thread::spawn({
        let guid = image.snapshots[0].to_string();
        move || Run::new("ploop").args(["snapshot-delete", "-u", &guid, text(&xml)]).run()
    });
    // Seen waiting for the lock, not merely slow to start.
    let lock = image.path().join("DiskDescriptor.xml.lck");
    let inode = format!(":{} ", lock.metadata().expect("our lock").ino());
    let waits = || {
        let locks = std::fs::read_to_string("/proc/locks").expect("locks");
        locks.lines().any(|line| line.contains("->") && line.contains(&inode))
    };
    assert!(until(Duration::from_secs(20), || deleting.is_finished() || waits()), "ploop did not come");
    assert!(!deleting.is_finished(), "ploop did not wait");
    assert_eq!(levels.len(), 2);
    drop((layers, levels));
    let done = deleting.join().expect("no panic");
    assert!(done.success(), "{done}");
    assert_eq!(image.content(Guid::TOP), Image::expected(1));
}
