//! What a daemon has left, read by its successor as a file from a stranger would be: every number is judged, and what does
//! not fit costs the image that it belongs to, or is said. Nothing is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{BEYOND, Layout, NEXT_ID};
use super::numbers::MAX_NAME;
use super::opens::Open;
use super::{Identity, book, numbers, opens, pages, snapshots};

/// A number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundNumber {
    pub(super) record: u32,
    /// The image's number.
    pub id: u64,
    /// Its name.
    pub name: OsString,
    /// Its file.
    pub file: Identity,
}

/// An open file; or what a free place remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundOpen {
    /// The last handle of the place; 0: it has had none.
    pub handle: u64,
    /// False: what stands there makes no sense, and the place is not used again.
    pub usable: bool,
    /// It is open.
    pub open: Option<Open>,
}

/// An image that was open for writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundImage {
    pub(super) record: u32,
    /// Its number.
    pub id: u64,
    /// Its top.
    pub file: Identity,
    /// A sync has failed.
    pub failed: bool,
    /// A successor cannot go on with it.
    pub beyond: bool,
    /// BAT pages, by number, and their slots.
    pub pages: Vec<(u32, u32)>,
    /// What of it makes no sense: nothing of it may be trusted.
    pub nonsense: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The first number that no image has had.
    pub next_id: u64,
    /// Something was served that a successor cannot go on with.
    pub beyond: bool,
    /// By record.
    pub numbers: Vec<FoundNumber>,
    /// By place, up to the last that was ever used.
    pub opens: Vec<FoundOpen>,
    /// By record.
    pub images: Vec<FoundImage>,
    /// By number: image and GUID. None: the number was given, and it is not known to which.
    pub snapshots: Vec<Option<(u64, [u8; 16])>>,
    /// What makes no sense and belongs to no image, one sentence each.
    pub nonsense: Vec<String>,
}

/// Sentences of nonsense that are kept: a broken ledger has as many as records.
const MOST_SAID: usize = 16;

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words[at].load(Ordering::Acquire)
}

impl Found {
    pub(super) fn read(words: &[AtomicU64], layout: &Layout) -> Found {
        let mut found = Found { beyond: load(words, BEYOND) != 0, ..Found::default() };
        let used = layout.used(words);
        found.read_numbers(words, layout, used.numbers);
        found.read_opens(words, layout, used.opens);
        found.read_images(words, layout, used.images);
        found.read_pages(words, layout, used.pages);
        found.snapshots = (0..used.snapshots).map(|record| snapshot(words, layout, record)).collect();
        found
    }

    fn say(&mut self, what: String) {
        if self.nonsense.len() < MOST_SAID {
            self.nonsense.push(what);
        }
    }

    fn read_numbers(&mut self, words: &[AtomicU64], layout: &Layout, used: u32) {
        let mut seen: HashMap<u64, usize> = HashMap::new();
        let mut last = 0;
        for record in 0..used {
            let (first, len) = layout.number(record);
            let words = &words[first..first + len];
            if load(words, numbers::STATE) != numbers::TAKEN {
                continue;
            }
            let (id, name_len) = (load(words, numbers::ID), load(words, numbers::LEN) as usize);
            let bytes = words[numbers::NAME..].iter().flat_map(|w| w.load(Ordering::Relaxed).to_ne_bytes());
            let name: Vec<u8> = bytes.take(name_len.min(MAX_NAME + 1)).collect();
            let sound = (1..=MAX_NAME).contains(&name.len())
                && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
                && (1..1 << 61).contains(&id);
            let file = (load(words, numbers::DEV), load(words, numbers::INO));
            if !sound {
                self.say(format!("number {id} of record {record} is none"));
                continue;
            }
            if let Some(other) = seen.insert(id, self.numbers.len()) {
                // Which of the two it is cannot be known.
                self.say(format!("number {id} is given twice"));
                self.numbers[other].file = (0, 0);
                continue;
            }
            last = last.max(id);
            self.numbers.push(FoundNumber { record, id, name: OsString::from_vec(name), file });
        }
        self.next_id = load(words, NEXT_ID).clamp(1, 1 << 61).max(last + 1);
    }

    fn read_opens(&mut self, words: &[AtomicU64], layout: &Layout, used: u32) {
        let mut requests = HashSet::new();
        for place in 0..used {
            let (first, len) = layout.open(place);
            let words = &words[first..first + len];
            let (state, handle) = (load(words, opens::STATE), load(words, opens::HANDLE));
            let mut open = (state == opens::OPEN).then(|| Open {
                handle,
                node: load(words, opens::NODE),
                flags: (load(words, opens::FLAGS) as u32).cast_signed(),
                request: load(words, opens::REQUEST),
            });
            if handle == 0 && state != opens::OPEN {
                self.opens.push(FoundOpen { handle, usable: true, open: None });
                continue;
            }
            if handle as u32 != place || handle >> 32 == 0 {
                self.say(format!("handle {handle:#x} does not belong to place {place}"));
                self.opens.push(FoundOpen { handle: 0, usable: false, open: None });
                continue;
            }
            if open.is_some_and(|open| !requests.insert(open.request)) {
                self.say(format!("handle {handle:#x} comes from a request that has another"));
                open = None;
            }
            self.opens.push(FoundOpen { handle, usable: true, open });
        }
    }

    fn read_images(&mut self, words: &[AtomicU64], layout: &Layout, used: u32) {
        let files: HashMap<u64, Identity> =
            self.numbers.iter().map(|number| (number.id, number.file)).collect();
        let mut seen = HashSet::new();
        for record in 0..used {
            let (first, len) = layout.image(record);
            let words = &words[first..first + len];
            if load(words, book::STATE) != book::WRITTEN {
                continue;
            }
            let id = load(words, book::ID);
            let file = (load(words, book::DEV), load(words, book::INO));
            let owner = (load(words, book::OWNER_DEV), load(words, book::OWNER_INO));
            if !seen.insert(id) {
                self.say(format!("image {id} is written twice"));
                self.beyond = true;
                continue;
            }
            let nonsense = match files.get(&id) {
                None => Some("it has no number".to_owned()),
                Some(known) if *known != owner => Some("its number is another file's".to_owned()),
                Some(_) => None,
            };
            let (failed, beyond) = (load(words, book::FAILED) != 0, load(words, book::BEYOND) != 0);
            self.images.push(FoundImage { record, id, file, failed, beyond, pages: Vec::new(), nonsense });
        }
    }

    fn read_pages(&mut self, words: &[AtomicU64], layout: &Layout, used: u32) {
        let by_id: HashMap<u64, usize> =
            self.images.iter().enumerate().map(|(at, image)| (image.id, at)).collect();
        let mut all: Vec<BTreeMap<u32, u32>> = vec![BTreeMap::new(); self.images.len()];
        for record in 0..used {
            let (first, len) = layout.state(record);
            let words = &words[first..first + len];
            if load(words, pages::STATE) != pages::FILLED {
                continue;
            }
            let id = load(words, pages::IMAGE);
            let file = (load(words, pages::DEV), load(words, pages::INO));
            let Some(&at) = by_id.get(&id) else {
                // Entries that were acknowledged, of an image that cannot be found.
                self.say(format!("a BAT page of image {id}, which is not open"));
                self.beyond = true;
                continue;
            };
            let image = &mut self.images[at];
            match u32::try_from(load(words, pages::NUMBER)) {
                Ok(number) if file == image.file => {
                    if all[at].insert(number, record).is_some() {
                        image.nonsense = Some(format!("BAT page {number} is there twice"));
                    }
                }
                _ => image.nonsense = Some("a BAT page of it is another file's".to_owned()),
            }
        }
        for (image, pages) in self.images.iter_mut().zip(all) {
            image.pages = pages.into_iter().collect();
        }
    }
}

fn snapshot(words: &[AtomicU64], layout: &Layout, record: u32) -> Option<(u64, [u8; 16])> {
    let (first, len) = layout.snapshot(record);
    let words = &words[first..first + len];
    let mut guid = [0; 16];
    for (piece, word) in guid.chunks_exact_mut(8).zip(&words[snapshots::GUID..]) {
        piece.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
    (load(words, snapshots::STATE) == snapshots::TAKEN).then(|| (load(words, snapshots::IMAGE), guid))
}
