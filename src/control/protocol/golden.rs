//! The lines of docs/control.md are what other programs rely on: each is written and read here, made from
//! the program's types, so that a line that changes is seen before they do.

use std::collections::BTreeMap;

use serde_json::Value;

use super::*;
use crate::disk::snapshots::SnapshotLine;
use crate::image::diff::{Diff, Side};
use crate::image::map::{At, MapLevel, Piece, Range};
use crate::tree::{Document, ImageStats, Sandbox};
use crate::vdisk::latency::{BUCKETS, Histogram};
use crate::vdisk::live::compact::Gain;
use crate::vdisk::live::order::Pieces;
use crate::vdisk::live::{Done, Work};
use crate::vdisk::tracking::Changes;

/// The lines of all blocks of `language` in the page.
fn lines(language: &str) -> Vec<&'static str> {
    let page = include_str!("../../../docs/control.md");
    let blocks = page.split("```").skip(1).step_by(2);
    let of = blocks.filter_map(|block| block.split_once('\n').filter(|(named, _)| *named == language));
    of.flat_map(|(_, lines)| lines.lines()).collect()
}

fn requests() -> Vec<Op> {
    let image = || "vm1".to_owned();
    let snapshot = || "monday".to_owned();
    let work = |work: Work| Op::Work { image: image(), work: work.into(), rate: None };
    vec![
        Op::Hello,
        Op::List,
        Op::Stats,
        Op::Rescan { made: None },
        Op::Rescan { made: Some("vm2.hds".into()) },
        Op::Snapshots { image: image() },
        Op::Map { image: image(), snapshot: None, offset: 0 },
        Op::Map { image: image(), snapshot: Some(snapshot()), offset: 1 << 30 },
        Op::Diff { image: image(), from: snapshot(), to: None, start: 0 },
        Op::Diff { image: image(), from: snapshot(), to: Some("tuesday".into()), start: 1 << 30 },
        Op::Changes { image: image(), start: 0 },
        Op::Cancel { image: image() },
        work(Work::Snapshot { label: None }),
        work(Work::Snapshot { label: Some(snapshot()) }),
        work(Work::Delete { snapshot: snapshot() }),
        work(Work::Merge { snapshot: snapshot() }),
        work(Work::Switch { snapshot: snapshot() }),
        work(Work::Finish),
        work(Work::Clone { snapshot: None, to: vec!["/images/vm2".into()], copy: false }),
        work(Work::Clone { snapshot: Some(snapshot()), to: vec!["/images/vm2".into()], copy: true }),
        work(Work::Clone {
            snapshot: Some(snapshot()),
            to: vec!["/images/vm2".into(), "/images/vm3".into()],
            copy: false,
        }),
        work(Work::Compact { dry_run: true, defrag: false }),
        work(Work::Compact { dry_run: false, defrag: true }),
        work(Work::Resize { size: 1 << 40 }),
        work(Work::Track { granularity: None }),
        work(Work::Track { granularity: Some(65536) }),
        Op::Work { image: image(), work: Work::Untrack.into(), rate: Some(1 << 20) },
        Op::Stop,
        Op::Wait,
    ]
}

fn answers() -> Vec<Answer> {
    let ok = Answer::done;
    let hello = Hello {
        pid: 1201,
        keeper: 1199,
        version: "0.1.0".into(),
        mountpoint: "/mnt/vdisks".into(),
        images: "/images".into(),
        transport: "uring".into(),
        read_only: false,
        closing: false,
        device: Some((0, 57)),
        restarts: 2,
        last_pause_ms: 40,
    };
    let image = ImageLine {
        name: "vm1".into(),
        path: "/images/vm1.hds".into(),
        kind: "ploop".into(),
        size: 1 << 30,
        allocated: 1 << 20,
        served: true,
        reason: None,
        mode: "write".into(),
        openers: 1,
    };
    let line = SnapshotLine {
        name: "monday".into(),
        guid: "{f0d2a1c4-0000-4000-8000-000000000001}".into(),
        parent: None,
        created: Some(1_767_225_600),
        exclusive: 1 << 20,
        shared: 0,
        current: false,
        temporary: false,
    };
    let gain = Gain {
        length: 5 << 20,
        length_after: 3 << 20,
        allocated: 5 << 20,
        allocated_after: 3 << 20,
        zero_clusters: 2,
        moved_clusters: 1,
        defrag: Some(Pieces { pieces: 4, pieces_after: 1, spare: 1 << 20 }),
    };
    let side = |name: &str| Side { name: name.into(), guid: line.guid.clone(), size: 1 << 30 };
    let counters = ImageStats {
        mode: "write".into(),
        openers: 1,
        reads: 2,
        read_bytes: 8192,
        size: 1 << 30,
        latency: BTreeMap::from([("read".into(), Histogram { buckets: [0; BUCKETS], nanos: 0 })]),
        ..ImageStats::default()
    };
    let stats = Document {
        pid: 1201,
        transport: "uring".into(),
        mountpoint: "/mnt/vdisks".into(),
        sandbox: Sandbox { no_new_privs: true, landlock: true, seccomp: true },
        restarts: 2,
        last_pause_ms: 40,
        host_available: 1 << 33,
        host_size: 1 << 34,
        images: BTreeMap::from([("vm1".into(), counters)]),
    };
    let range = |start, at| Range { start, length: 1 << 20, at };
    let map = Piece {
        levels: vec![MapLevel { path: "/images/vm1.hds".into(), length: 2 << 20 }],
        size: 3 << 20,
        cluster: 1 << 20,
        ranges: vec![
            range(0, At::File { level: 0, offset: 1 << 20, hole: false }),
            range(1 << 20, At::Nowhere),
            range(2 << 20, At::Damaged),
        ],
        next: 3 << 20,
    };
    let ranges = vec![(0, 1 << 20)];
    let diff = Diff {
        from: side("monday"),
        to: side(""),
        cluster: 1 << 20,
        ranges: ranges.clone(),
        next: Some(1 << 30),
    };
    let changes = Changes {
        uuid: Some("f0d2a1c4-0000-4000-8000-000000000002".into()),
        reason: None,
        size: 1 << 30,
        granularity: 65536,
        ranges,
        next: None,
    };
    let untracked = Changes { reason: Some("is not tracked".into()), size: 1 << 30, ..Changes::default() };
    let done = |done: Done| Answer { done: Some(done.into()), ..ok() };
    let closed = |error: Option<&str>| Closed { name: "vm1".into(), error: error.map(str::to_owned) };
    vec![
        ok(),
        Answer::failed(&Error::new(Kind::InUse, "vm1: in use")),
        Answer { hello: Some(hello), ..ok() },
        Answer { images: Some(vec![image]), ..ok() },
        Answer { stats: Some(stats.into()), ..ok() },
        Answer { snapshots: Some(vec![line.clone().into()]), ..ok() },
        Answer { map: Some(map.into()), ..ok() },
        Answer { diff: Some(diff.into()), ..ok() },
        Answer { changes: Some(changes.into()), ..ok() },
        Answer { changes: Some(untracked.into()), ..ok() },
        done(Done { name: Some("monday".into()), ..Done::default() }),
        done(Done { size: Some(1 << 40), ..Done::default() }),
        done(Done { gain: Some(gain), note: Some("a note".into()), ..Done::default() }),
        Answer { closed: Some(vec![closed(None), closed(Some("cannot sync"))]), ..ok() },
    ]
}

/// Each line of the page is what is written now, and is read as what was written.
fn agree<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(language: &str, values: &[T]) {
    let (page, written): (Vec<_>, Vec<String>) =
        (lines(language), values.iter().map(|v| serde_json::to_string(v).expect("plain data")).collect());
    assert_eq!(
        page,
        written,
        "docs/control.md, blocks of {language}; as they are written now:\n{}",
        written.join("\n")
    );
    for (line, value) in page.iter().zip(values) {
        assert_eq!(&serde_json::from_str::<T>(line).expect(line), value);
        // A later version adds fields; this one passes over them.
        let mut more: Value = serde_json::from_str(line).expect(line);
        more["added_later"] = Value::from(1);
        assert_eq!(&serde_json::from_value::<T>(more).expect(line), value);
    }
}

#[test]
fn the_requests_of_the_page_are_those_that_are_read() {
    let requests: Vec<_> = requests().into_iter().map(|op| Request { v: VERSION, op }).collect();
    agree("json-request", &requests);
}

#[test]
fn the_answers_of_the_page_are_those_that_are_written() {
    agree("json-answer", &answers());
    agree("json-progress", &[Interim { v: VERSION, progress: Amount { done: 1 << 20, total: 1 << 30 } }]);
}
