//! What was entered is found again, whatever came before it and whatever is full.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

const SIZES: Sizes = Sizes { numbers: 4, opens: 4, images: 3, pages: 4, snapshots: 2 };

fn memory(sizes: Sizes) -> Arc<Vec<AtomicU64>> {
    let words = sizes.bytes().expect("a small ledger") / 8;
    let memory: Arc<Vec<AtomicU64>> = Arc::new((0..words).map(|_| AtomicU64::new(0)).collect());
    format(&*memory, sizes).expect("room");
    memory
}

fn attach(memory: &Arc<Vec<AtomicU64>>) -> Arc<Ledger> {
    Arc::new(Ledger::attach(Box::new(memory.clone())).expect("a ledger"))
}

#[derive(Clone, Debug)]
enum Step {
    Number {
        id: u64,
        file: u64,
    },
    NoNumber {
        id: u64,
    },
    Open {
        place: u32,
        uses: u32,
    },
    Release {
        place: u32,
    },
    Begin {
        image: u64,
    },
    Fail {
        image: u64,
    },
    Enter {
        image: u64,
        entry: usize,
        value: u32,
    },
    Durable {
        image: u64,
    },
    End {
        image: u64,
    },
    /// Another daemon takes over, and rescues all.
    Succeed,
}

fn step() -> impl Strategy<Value = Step> {
    let image = 1..4u64;
    prop_oneof![
        (1..5u64, 1..9u64).prop_map(|(id, file)| Step::Number { id, file }),
        (1..5u64).prop_map(|id| Step::NoNumber { id }),
        (0..4u32, 1..9u32).prop_map(|(place, uses)| Step::Open { place, uses }),
        (0..4u32).prop_map(|place| Step::Release { place }),
        image.clone().prop_map(|image| Step::Begin { image }),
        image.clone().prop_map(|image| Step::Fail { image }),
        (image.clone(), 0..1024usize, any::<u32>()).prop_map(|(image, entry, value)| Step::Enter {
            image,
            entry,
            value
        }),
        image.clone().prop_map(|image| Step::Durable { image }),
        image.prop_map(|image| Step::End { image }),
        Just(Step::Succeed),
    ]
}

/// An open image, as its daemon has it.
struct Live {
    book: Book,
    slot: Option<Slot>,
}

/// What must be found.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    numbers: BTreeMap<u64, u64>,
    opens: BTreeMap<u32, u64>,
    /// By image: failed, and the page that is not durable.
    images: BTreeMap<u64, (bool, Option<Vec<u8>>)>,
}

fn of(ledger: &Ledger) -> Model {
    let found = ledger.found();
    let page = |image: &FoundImage| {
        let (_, record) = image.pages.first()?;
        let words = ledger.record(ledger.layout.page(*record));
        Some(words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect())
    };
    Model {
        numbers: found.numbers.iter().map(|number| (number.id, number.file.1)).collect(),
        opens: found
            .opens
            .iter()
            .filter_map(|place| place.open)
            .map(|o| (o.handle as u32, o.handle))
            .collect(),
        images: found.images.iter().map(|image| (image.id, (image.failed, page(image)))).collect(),
    }
}

proptest! {
    #[test]
    fn what_was_entered_is_found(steps in prop::collection::vec(step(), 1..60)) {
        let memory = memory(SIZES);
        let mut ledger = attach(&memory);
        let mut model = Model::default();
        let mut live: BTreeMap<u64, Live> = BTreeMap::new();
        for step in steps {
            match step {
                // Of an image that is open the file stays.
                Step::Number { id, file } if !live.contains_key(&id) => {
                    ledger.number(id, "vm".as_ref(), (1, file));
                    model.numbers.insert(id, file);
                }
                Step::NoNumber { id } if !live.contains_key(&id) => {
                    ledger.no_number(id);
                    model.numbers.remove(&id);
                }
                Step::Open { place, uses } if !model.opens.contains_key(&place) => {
                    let handle = u64::from(uses) << 32 | u64::from(place);
                    ledger.opened(&Open { handle, node: 17, flags: 2, request: 100 + u64::from(place) });
                    model.opens.insert(place, handle);
                }
                Step::Release { place } => {
                    ledger.released(u64::from(place));
                    model.opens.remove(&place);
                }
                Step::Begin { image } if model.numbers.contains_key(&image) && !live.contains_key(&image) => {
                    let book = Book::of(&ledger, image, (1, model.numbers[&image]), (1, model.numbers[&image]));
                    book.begin();
                    live.insert(image, Live { book, slot: None });
                    model.images.insert(image, (false, None));
                }
                Step::Fail { image } => {
                    if let Some(one) = live.get(&image) {
                        one.book.failed();
                        model.images.get_mut(&image).expect("live").0 = true;
                    }
                }
                Step::Enter { image, entry, value } => {
                    let Some(one) = live.get_mut(&image) else { continue };
                    let page = &mut model.images.get_mut(&image).expect("live").1;
                    let page = page.get_or_insert_with(|| vec![0; 4096]);
                    page[entry * 4..entry * 4 + 4].copy_from_slice(&value.to_le_bytes());
                    match &mut one.slot {
                        Some(slot) if one.book.is_filled(slot) => one.book.change(slot, entry, value),
                        slot => {
                            let slot = slot.get_or_insert_with(|| one.book.reserve().expect("one each"));
                            one.book.fill(slot, 3, page);
                        }
                    }
                }
                Step::Durable { image } => {
                    let Some(one) = live.get_mut(&image) else { continue };
                    if let Some(slot) = one.slot.take() {
                        one.book.give_back(slot);
                    }
                    model.images.get_mut(&image).expect("live").1 = None;
                }
                Step::End { image } => {
                    if let Some(Live { book, slot }) = live.remove(&image) {
                        slot.into_iter().for_each(|slot| book.give_back(slot));
                        book.end();
                        model.images.remove(&image);
                    }
                }
                Step::Succeed => {
                    live.clear();
                    ledger = attach(&memory);
                    prop_assert_eq!(of(&ledger), model.clone());
                    for (image, (_, page)) in &mut model.images {
                        let book = Book::of(&ledger, *image, (1, model.numbers[image]), (1, model.numbers[image]));
                        prop_assert!(book.left().is_some());
                        book.rescued();
                        *page = None;
                        live.insert(*image, Live { book, slot: None });
                    }
                }
                _ => {}
            }
            let now = attach(&memory);
            prop_assert_eq!(of(&now), model.clone());
            prop_assert!(now.found().nonsense.is_empty() && !now.found().beyond);
        }
    }
}

#[test]
fn what_has_no_room_ends_the_mount_with_its_daemon() {
    let memory = memory(Sizes { numbers: 1, opens: 1, images: 1, pages: 1, snapshots: 1 });
    let one = attach(&memory);
    one.number(1, "a".as_ref(), (1, 1));
    one.opened(&Open { handle: 1 << 32, node: 17, flags: 0, request: 1 });
    assert!(!attach(&memory).found().beyond);
    one.number(2, "b".as_ref(), (1, 2));
    assert!(attach(&memory).found().beyond);
}

#[test]
fn a_free_place_remembers_its_handle_and_a_number_is_not_given_again() {
    let memory = memory(SIZES);
    let before = attach(&memory);
    before.next_number(9);
    before.opened(&Open { handle: 7 << 32, node: 17, flags: 0, request: 1 });
    before.released(7 << 32);
    before.handle_given(3 << 32 | 1);
    let found = attach(&memory);
    let places: Vec<_> = found.found().opens.iter().map(|place| (place.handle, place.open)).collect();
    assert_eq!(places, [(7 << 32, None), (3 << 32 | 1, None)]);
    assert_eq!(found.found().next_id, 9);
}

#[test]
fn a_snapshot_keeps_its_number_and_a_number_its_snapshot() {
    let memory = memory(SIZES);
    let before = attach(&memory);
    before.snapshot(0, 7, [1; 16]);
    before.snapshot(1, 7, [2; 16]);
    let found = [Some((7, [1; 16])), Some((7, [2; 16]))];
    assert_eq!(attach(&memory).found().snapshots, found);
    // Dead between the two words: it is none, and its number is not given again.
    memory[before.layout.snapshot(1).0].store(0, Ordering::Relaxed);
    assert_eq!(attach(&memory).found().snapshots, [found[0], None]);
    assert!(!attach(&memory).found().beyond);
    before.snapshot(2, 7, [3; 16]);
    assert!(attach(&memory).found().beyond, "there is no place for it");
}

#[test]
fn another_version_is_refused() {
    let memory = memory(SIZES);
    memory[layout::VERSION_WORD].store(2, Ordering::Relaxed);
    let error = Ledger::attach(Box::new(memory)).map(drop).expect_err("not ours");
    assert!(error.to_string().contains("version is 2"), "{error}");
}

#[test]
fn a_page_that_was_left_is_given_out_only_when_it_was_rescued() {
    let memory = memory(Sizes { pages: 1, ..SIZES });
    let before = attach(&memory);
    before.number(1, "a".as_ref(), (1, 1));
    let book = Book::of(&before, 1, (1, 1), (1, 1));
    book.begin();
    let mut slot = book.reserve().expect("free");
    book.fill(&mut slot, 0, &[5; 4096]);
    let after = attach(&memory);
    let book = Book::of(&after, 1, (1, 1), (1, 1));
    assert!(book.is_full() && book.reserve().is_none());
    let pages = &book.left().expect("left").pages;
    assert_eq!((pages[0].0, book.left_page(pages[0].1)), (0, vec![5; 4096]));
    book.rescued();
    assert!(book.reserve().is_some());
}
