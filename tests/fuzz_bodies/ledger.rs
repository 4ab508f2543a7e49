//! Any bytes as the ledger that a daemon has left: what is found in it fits together, a successor gives nothing of it out
//! again, and what it says of an image is refused, or leads to one that is sound.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ploopfs::format::header::{Header, Version};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::ledger::{Book, Found, Ledger, Open, Sizes, format};
use ploopfs::vdisk::{Image, Layout, Level, rescue};

use super::lazy_engine;

const CLUSTER: u64 = 4096;
const SIZES: Sizes = Sizes { numbers: 3, opens: 4, images: 3, pages: 4, snapshots: 3 };

/// Where each section begins, in words; input goes there, or, with the seventh, over the header as well.
const SECTIONS: [usize; 10] = [64, 512, 1024, 1536, 2048, 2560, 0, 4608, 5120, 9216];

/// The input: first byte, a section; then pieces of a byte for where (in words behind it), one for how many bytes, and these.
fn fill(memory: &[AtomicU64], data: &[u8]) {
    let Some((section, mut rest)) = data.split_first() else { return };
    let mut at = SECTIONS[*section as usize % SECTIONS.len()];
    while let [skip, len, tail @ ..] = rest {
        at += usize::from(*skip);
        let (piece, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        for bytes in piece.chunks(8) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            if let Some(place) = memory.get(at) {
                place.store(u64::from_ne_bytes(word), Ordering::Relaxed);
            }
            at += 1;
        }
        rest = tail;
    }
}

fn sound(found: &Found) {
    let mut ids = HashSet::new();
    for number in &found.numbers {
        assert!(ids.insert(number.id) && number.id < found.next_id, "{found:?}");
        assert!(!number.name.is_empty(), "{found:?}");
    }
    let (mut images, mut pages) = (HashSet::new(), HashSet::new());
    for image in &found.images {
        assert!(images.insert(image.id), "{found:?}");
        assert!(image.nonsense.is_some() || ids.contains(&image.id), "{found:?}");
        assert!(image.pages.iter().all(|(_, slot)| *slot < SIZES.pages && pages.insert(*slot)), "{found:?}");
    }
    assert!(found.snapshots.len() <= SIZES.snapshots as usize, "{found:?}");
    for (place, open) in found.opens.iter().enumerate() {
        assert!(open.handle == 0 || open.handle as u32 as usize == place, "{found:?}");
        assert!(open.open.is_none_or(|one| one.handle == open.handle), "{found:?}");
    }
}

pub fn ledger(data: &[u8]) {
    let bytes = SIZES.bytes().expect("a small ledger");
    let memory: Arc<Vec<AtomicU64>> = Arc::new((0..bytes / 8).map(|_| AtomicU64::new(0)).collect());
    format(&*memory, SIZES).expect("room");
    // A ledger of some use, which the input goes over.
    let before = Arc::new(Ledger::attach(Box::new(memory.clone())).expect("just made"));
    before.number(1, "vm1".as_ref(), (1, 7));
    before.number(2, "vm2".as_ref(), (1, 8));
    before.opened(&Open { handle: 1 << 32, node: 17, flags: 2, request: 5 });
    before.snapshot(0, 1, [4; 16]);
    let book = Book::of(&before, 1, (1, 7), (1, 7));
    book.begin();
    let mut slot = book.reserve().expect("free");
    book.fill(&mut slot, 0, &[0; 4096]);
    fill(&memory, data);

    let Ok(ledger) = Ledger::attach(Box::new(memory)) else { return };
    let ledger = Arc::new(ledger);
    sound(ledger.found());
    let _ = ledger.handshake();
    for id in 1..8 {
        ledger.number(id, "new".as_ref(), (2, id));
        ledger.no_number(id + 1);
    }

    let header = Header::new(Version::V2, 16 * CLUSTER, CLUSTER).expect("a legal size");
    let first = header.geometry().first;
    let mut bytes = header.marked().encode().to_vec();
    bytes.resize((first + 4 * CLUSTER) as usize, 0);
    bytes[first as usize..].fill(9);
    let file: Arc<dyn HostFile> = Arc::new(MemoryFile::from_bytes(&bytes));
    let level = Level { file, path: "fuzz".into(), layout: Layout::Ploop(header.marked()) };
    let book = Arc::new(Book::of(&ledger, 1, (1, 7), (1, 7)));
    if book.left().is_none() {
        return;
    }
    let Ok(rescued) = rescue(&level, &book, || level.file.sync_data()) else { return };
    let Ok(image) = Image::go_on(lazy_engine(), "fuzz", vec![level], &book, rescued) else { return };
    for cluster in 0..16 {
        let found = image.read_at(cluster * CLUSTER, CLUSTER as usize).expect("each entry was judged");
        assert!(found.iter().all(|byte| *byte == found[0]) && [0, 9].contains(&found[0]));
    }
    if image.failure().is_none() {
        image.write_at(0, &[3; 512]).expect("writes");
        image.close().expect("closes");
    }
    image.leave_book();
}
