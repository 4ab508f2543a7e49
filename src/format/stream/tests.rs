//! The records of a backup stream: what is refused when they are cut, moved or nonsense.

use super::*;

fn head() -> Head {
    Head {
        size: 100,
        cluster: 1 << 20,
        guid: Guid::random(),
        base: Guid::random(),
        made: 7,
        image: "vm1".into(),
        name: "tuesday".into(),
        base_name: "monday".into(),
    }
}

/// A decoder behind a good HEAD, and the encoder that goes on.
fn begun() -> (Encoder, Decoder) {
    let (mut encoder, mut decoder) = (Encoder::default(), Decoder::new(&Encoder::preamble()).expect("ours"));
    let payload = head().encode();
    decoder.record(&encoder.record(Tag::Head, 0, 0, &payload)).expect("a good record");
    decoder.head(&payload).expect("a good head");
    (encoder, decoder)
}

#[test]
fn a_head_reads_back() {
    let head = head();
    assert_eq!(Head::parse(&head.encode()), Ok(head.clone()));
    let full = Head { base: Guid::NONE, base_name: String::new(), ..head };
    assert!(Head::parse(&full.encode()).is_ok_and(|read| !read.is_incremental()));
}

#[test]
fn heads_that_say_nonsense_are_refused() {
    let good = head();
    let bad = [
        Head { size: 0, ..good.clone() },
        Head { size: u64::MAX, ..good.clone() },
        Head { guid: Guid::NONE, ..good.clone() },
        Head { guid: Guid::TOP, ..good.clone() },
        Head { guid: good.base, ..good.clone() },
    ];
    for head in bad {
        Head::parse(&head.encode()).expect_err("nonsense");
    }
    let bytes = good.encode();
    for len in 0..bytes.len() {
        Head::parse(&bytes[..len]).expect_err("cut off");
    }
    Head::parse(&[&bytes[..], b"x"].concat()).expect_err("too long");
}

#[test]
fn a_record_that_is_missing_doubled_or_moved_breaks_the_chain() {
    let (mut encoder, decoder) = begun();
    let first = encoder.record(Tag::Zero, 0, 10, &[]);
    let second = encoder.record(Tag::Zero, 10, 10, &[]);
    let end = encoder.end();
    for order in [[&second, &first], [&first, &first], [&first, &end], [&second, &end]] {
        let mut decoder = Decoder { chain: decoder.chain, records: 1, size: Some(100), at: 0 };
        assert!(order.iter().any(|bytes| decoder.record(bytes).is_err()), "{order:?}");
    }
}

#[test]
fn records_with_good_checksums_that_lie_elsewhere_are_refused() {
    for (tag, offset, len, payload) in [
        (Tag::Data, 98, 3, &b"abc"[..]),
        (Tag::Data, 0, 4, b"abc"),
        (Tag::Data, 0, 0, b""),
        (Tag::Zero, 0, 0, b""),
        (Tag::Zero, u64::MAX, 2, b""),
        (Tag::Zero, 0, 101, b""),
        (Tag::Head, 0, 0, b""),
        (Tag::End, 0, 7, b""),
    ] {
        let (mut encoder, mut decoder) = begun();
        decoder.record(&encoder.record(tag, offset, len, payload)).expect_err("nonsense");
    }
    let (mut encoder, mut decoder) = begun();
    decoder.record(&encoder.record(Tag::Zero, 50, 10, &[])).expect("good");
    decoder.record(&encoder.record(Tag::Zero, 59, 1, &[])).expect_err("goes back");
}
