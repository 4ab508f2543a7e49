//! `.ploopfs/metrics`: the rules of Prometheus' text format, and figures that are right.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, until};

/// A sample: its name, its labels, its value.
#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// What a scrape found, after the rules of the format were checked.
#[derive(Debug, Default)]
struct Scrape {
    kinds: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

fn is_name(name: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    name.chars().all(rest) && name.starts_with(|c: char| rest(c) && !c.is_ascii_digit())
}

/// `a="x",b="y\"z"` in pairs, the escapes taken away.
fn labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, behind) = rest.split_once("=\"").ok_or(format!("no value: {text}"))?;
        if !is_name(name) || name.contains(':') {
            return Err(format!("no name of a label: {name}"));
        }
        let (mut value, mut chars) = (String::new(), behind.char_indices());
        let end = loop {
            match chars.next().ok_or(format!("no end: {text}"))? {
                (at, '"') => break at,
                (_, '\\') => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c @ ('\\' | '"'))) => value.push(c),
                    other => return Err(format!("{other:?} is no escape: {text}")),
                },
                (_, c) => value.push(c),
            }
        };
        if found.insert(name.to_owned(), value).is_some() {
            return Err(format!("{name} twice: {text}"));
        }
        rest = &behind[end + 1..];
        rest =
            if rest.is_empty() { rest } else { rest.strip_prefix(',').ok_or(format!("no comma: {text}"))? };
    }
    Ok(found)
}

fn sample(line: &str) -> Result<Sample, String> {
    let (series, value) = line.rsplit_once(' ').ok_or(format!("no value: {line}"))?;
    let (name, inside) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}').ok_or(format!("no end: {line}"))?),
        None => (series, ""),
    };
    if !is_name(name) {
        return Err(format!("no name: {line}"));
    }
    let value = value.parse().map_err(|e| format!("{e}: {line}"))?;
    Ok(Sample { name: name.to_owned(), labels: labels(inside)?, value })
}

/// The family that a sample belongs to: that of its name, or the histogram that it is a part of.
fn family_of(name: &str, kinds: &BTreeMap<String, String>) -> Option<String> {
    let parts = ["_bucket", "_sum", "_count"].into_iter().filter_map(|part| name.strip_suffix(part));
    let histogram = parts.into_iter().find(|base| kinds.get(*base).is_some_and(|kind| kind == "histogram"));
    histogram.or(Some(name)).filter(|base| kinds.contains_key(*base)).map(str::to_owned)
}

/// Reads what Prometheus would read, and refuses what it would refuse or what its rules of style forbid.
fn parse(text: &str) -> Result<Scrape, String> {
    let mut scrape = Scrape::default();
    let (mut helps, mut closed) = (BTreeSet::new(), BTreeSet::new());
    let (mut now, mut series) = (String::new(), BTreeSet::new());
    if !text.ends_with('\n') {
        return Err("the last line has no end".into());
    }
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or(format!("no help: {line}"))?;
            if help.is_empty() || !helps.insert(name.to_owned()) {
                return Err(format!("help twice or empty: {line}"));
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or(format!("no type: {line}"))?;
            if !helps.contains(name) || !["counter", "gauge", "histogram"].contains(&kind) {
                return Err(format!("type without help, or unknown: {line}"));
            }
            if (kind == "counter") != name.ends_with("_total") {
                return Err(format!("counters and nothing else end in _total: {line}"));
            }
            if scrape.kinds.insert(name.to_owned(), kind.to_owned()).is_some() {
                return Err(format!("type twice: {line}"));
            }
            closed.insert(std::mem::replace(&mut now, name.to_owned()));
        } else if line.starts_with('#') || line.is_empty() {
            return Err(format!("a line of no kind: {line:?}"));
        } else {
            let sample = sample(line)?;
            let family = family_of(&sample.name, &scrape.kinds).ok_or(format!("no type: {line}"))?;
            if family != now || closed.contains(&family) {
                return Err(format!("a family in two parts: {line}"));
            }
            if !series.insert((sample.name.clone(), sample.labels.clone())) {
                return Err(format!("twice: {line}"));
            }
            scrape.samples.push(sample);
        }
    }
    scrape.check_histograms().map(|()| scrape)
}

impl Scrape {
    /// Buckets rise, the last one is +Inf and is the count, and there is a sum.
    fn check_histograms(&self) -> Result<(), String> {
        for (family, _) in self.kinds.iter().filter(|(_, kind)| *kind == "histogram") {
            let part = |part: &'static str| {
                self.samples.iter().filter(move |s| s.name == format!("{family}_{part}"))
            };
            for count in part("count") {
                let of = |labels: &BTreeMap<String, String>| {
                    let mut labels = labels.clone();
                    labels.remove("le");
                    labels == count.labels
                };
                let buckets: Vec<(f64, f64)> = part("bucket")
                    .filter(|s| of(&s.labels))
                    .map(|s| (s.labels["le"].replace("+Inf", "inf").parse().unwrap_or(f64::NAN), s.value))
                    .collect();
                let rises = buckets.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
                let last = buckets.last().copied();
                if !rises || last != Some((f64::INFINITY, count.value)) || !part("sum").any(|s| of(&s.labels))
                {
                    return Err(format!("{family} {:?}: {buckets:?}", count.labels));
                }
            }
        }
        Ok(())
    }

    fn value(&self, name: &str, wanted: &[(&str, &str)]) -> Option<f64> {
        let fits = |s: &&Sample| {
            s.name == name
                && wanted.iter().all(|(label, value)| s.labels.get(*label).is_some_and(|v| v == value))
        };
        self.samples.iter().find(fits).map(|s| s.value)
    }
}

fn scrape(mount: &Mount) -> Scrape {
    let text = fs::read_to_string(mount.point().join(".ploopfs/metrics")).expect("metrics");
    parse(&text).unwrap_or_else(|why| panic!("{why}\n{text}"))
}

#[test]
fn metrics_follow_the_rules_of_the_format_and_count_what_was_done() {
    require!("fuse");
    let folder = common::temp_dir();
    let odd = "a \"b\" \\c\nd";
    fs::write(folder.path().join(format!("{odd}.raw")), vec![0; 1 << 20]).expect("a raw image");
    let mount = Mount::over(folder.path(), &["--create", "vm1=64M"]);
    let idle = scrape(&mount);
    assert_eq!(idle.value("ploopfs_images", &[]), Some(2.0));
    assert_eq!(idle.value("ploopfs_image_size_bytes", &[("image", odd)]), Some((1 << 20) as f64));
    assert_eq!(idle.value("ploopfs_image_mode", &[("image", odd), ("mode", "closed")]), Some(1.0));
    assert_eq!(
        idle.value("ploopfs_image_reads_total", &[("image", "vm1")]),
        None,
        "closed images count nothing"
    );

    let file = mount.open("vm1");
    for block in 0..10 {
        file.write_all_at(&[1; 4096], block * 4096).expect("write");
    }
    file.sync_all().expect("sync");
    file.read_exact_at(&mut [0; 4096], 0).expect("read");
    let busy = scrape(&mount);
    let vm1 = |name: &str| busy.value(name, &[("image", "vm1")]).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(vm1("ploopfs_image_writes_total"), 10.0);
    assert_eq!(vm1("ploopfs_image_written_bytes_total"), 40960.0);
    assert!(vm1("ploopfs_image_flushes_total") >= 1.0 && vm1("ploopfs_image_reads_total") >= 1.0);
    assert_eq!(vm1("ploopfs_image_openers"), 1.0);
    for (op, least) in [("write", 10.0), ("read", 1.0), ("flush", 1.0), ("discard", 0.0)] {
        let labels = [("image", "vm1"), ("op", op)];
        let count = busy.value("ploopfs_image_latency_seconds_count", &labels).expect("a histogram");
        let sum = busy.value("ploopfs_image_latency_seconds_sum", &labels).expect("a histogram");
        assert!(count >= least && (count > 0.0) == (sum > 0.0), "{op}: {count} {sum}");
        assert!(sum < 60.0, "{op}: {sum} s");
    }
    assert_eq!(busy.value("ploopfs_image_mode", &[("image", "vm1"), ("mode", "write")]), Some(1.0));
    let modes = busy.samples.iter().filter(|s| s.name == "ploopfs_image_mode" && s.value == 1.0).count();
    assert_eq!(modes, 2, "each image has one mode");
    drop(file);
    assert!(until(std::time::Duration::from_secs(10), || mount.mode("vm1") == "closed"));
    assert_eq!(scrape(&mount).value("ploopfs_image_reads_total", &[("image", "vm1")]), None);
}

#[test]
fn the_metrics_file_is_listed_and_cannot_be_written() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let own = mount.point().join(".ploopfs");
    let names: BTreeSet<String> = fs::read_dir(&own)
        .expect("readdir")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, ["metrics", "stats.json"].map(String::from).into());
    let metrics: &Path = &own.join("metrics");
    let error = fs::OpenOptions::new().write(true).open(metrics).expect_err("read-only");
    assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)), "{error}");
}

#[test]
fn the_reader_of_this_test_refuses_what_prometheus_refuses() {
    let good = "# HELP a_total A.\n# TYPE a_total counter\na_total{i=\"x\"} 1\na_total{i=\"y\"} 2\n";
    parse(good).expect("good");
    let family = |text: &str| format!("# HELP h H.\n# TYPE h histogram\n{text}");
    let rising = "h_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 1.5\nh_count 2\n";
    parse(&family(rising)).expect("good");
    for bad in [
        good.trim_end().to_owned(),
        good.replace("# HELP a_total A.\n", ""),
        good.replace("# TYPE a_total counter\n", ""),
        good.replace("a_total", "a"),
        good.replace("counter", "gauge"),
        good.replace("\"y\"", "\"x\""),
        good.replace("\"y\"", "\"y"),
        good.replace("{i", "{1"),
        good.replace(" 2\n", " two\n"),
        format!("{good}# HELP b B.\n# TYPE b gauge\nb 1\na_total{{i=\"z\"}} 3\n"),
        format!("{good}\n"),
        family(&rising.replace("} 1\n", "} 3\n")),
        family(&rising.replace("h_count 2", "h_count 3")),
        family(&rising.replace("h_sum 1.5\n", "")),
    ] {
        assert!(parse(&bad).is_err(), "{bad}");
    }
}
