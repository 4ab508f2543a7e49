//! What `top` shows: a table that fits 80 columns, and its order. Pure.

use std::cmp::Ordering;
use std::fmt::Write;

use super::sample::{Found, ImageRow};
use super::screen::{Key, Line, LineLook};
use crate::cli::{out, size};

/// What the columns behind the name take, blanks included.
const FIGURES: usize = 62;
/// The name's, at least.
const NARROW: usize = 16;
/// Lines around the table: two above, its head, one below.
const AROUND: usize = 4;

/// A column to sort by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Sort {
    /// The image's name.
    Name,
    /// Requests per second.
    Io,
    /// Bytes per second.
    Throughput,
    /// The 99th percentile.
    Latency,
    /// Dirty BAT pages.
    Dirty,
    /// Requests under way or waiting.
    Queue,
    /// Space taken on the host.
    Used,
}

impl Sort {
    fn of_key(letter: char) -> Option<Sort> {
        Some(match letter {
            'n' => Sort::Name,
            'i' => Sort::Io,
            't' => Sort::Throughput,
            'l' => Sort::Latency,
            'd' => Sort::Dirty,
            'u' => Sort::Queue,
            's' => Sort::Used,
            _ => return None,
        })
    }

    /// The larger first; what is equal by name.
    fn compare(self, a: &ImageRow, b: &ImageRow) -> Ordering {
        let by = |of: fn(&ImageRow) -> f64| of(b).total_cmp(&of(a));
        let first = match self {
            Sort::Name => Ordering::Equal,
            Sort::Io => by(|row| row.reads + row.writes + row.discards + row.flushes),
            Sort::Throughput => by(|row| row.read_bytes + row.written_bytes),
            Sort::Latency => by(|row| row.both.map_or(-1.0, |both| both.p99_us)),
            Sort::Dirty => b.dirty_pages.cmp(&a.dirty_pages),
            Sort::Queue => b.queue.cmp(&a.queue),
            Sort::Used => b.allocated.cmp(&a.allocated),
        };
        first.then_with(|| a.name.cmp(&b.name))
    }
}

/// What is shown, and how.
pub(super) struct View {
    /// The last measurement.
    pub found: Option<Found>,
    sort: Sort,
    reverse: bool,
    /// Without those that no opener has.
    open_only: bool,
    /// Rows above the first one that is shown.
    skip: usize,
    /// Rows that fit the screen, as it was last drawn.
    fits: usize,
}

impl View {
    /// Nothing measured yet.
    pub(super) fn new(sort: Sort) -> View {
        View { found: None, sort, reverse: false, open_only: false, skip: 0, fits: 1 }
    }

    /// A key.
    pub(super) fn press(&mut self, key: Key) {
        match key {
            Key::Letter('r') => self.reverse = !self.reverse,
            Key::Letter('o') => self.open_only = !self.open_only,
            Key::Letter(letter) => {
                if let Some(sort) = Sort::of_key(letter) {
                    (self.sort, self.reverse, self.skip) = (sort, false, 0);
                }
            }
            Key::Up => self.skip = self.skip.saturating_sub(1),
            Key::Down => self.skip += 1,
            Key::PageUp => self.skip = self.skip.saturating_sub(self.fits),
            Key::PageDown => self.skip += self.fits,
        }
    }

    /// The screen.
    pub(super) fn lines(&mut self, columns: usize, rows: usize) -> Vec<Line> {
        let columns = columns.max(1);
        let line = |text: String, look| Line { text: fit(&text, columns), look };
        let Some(found) = &self.found else {
            return vec![line("ploopfs top: measuring".into(), LineLook::Plain)];
        };
        let mut images = sorted(found, self.sort);
        images.retain(|row| !self.open_only || row.openers > 0);
        if self.reverse {
            images.reverse();
        }
        let troubles = found.troubles.iter().map(|text| line(out::printable(text), LineLook::Alarm));
        let mut lines = vec![line(summary(found), LineLook::Plain), line(space(found), LineLook::Plain)];
        lines.extend(troubles.take(3));
        let width = columns.saturating_sub(FIGURES).max(NARROW);
        lines.push(line(head(width), LineLook::Head));
        self.fits = rows.saturating_sub(lines.len() + 1).max(1);
        self.skip = self.skip.min(images.len().saturating_sub(self.fits));
        for image in images.iter().skip(self.skip).take(self.fits) {
            let look = match &*image.mode {
                "closed" => LineLook::Faint,
                "full-queue" | "full-error" => LineLook::Alarm,
                _ => LineLook::Plain,
            };
            lines.push(line(row(image, width), look));
        }
        lines.resize_with(lines.len().max(rows.saturating_sub(1)), || line(String::new(), LineLook::Plain));
        let keys = "q quit; by n name i I/O t bytes l p99 d dirty u queue s used; r turn; o open";
        lines.push(line(keys.into(), LineLook::Faint));
        lines.truncate(rows.max(AROUND));
        lines
    }
}

/// The table for `--once`.
pub(super) fn table(found: &Found, sort: Sort) -> String {
    let images = sorted(found, sort);
    let longest = images.iter().map(|image| image.name.chars().count()).max().unwrap_or(0);
    let width = (longest + 2).max(NARROW);
    let mut text = format!("{}\n{}\n{}\n", summary(found), space(found), head(width));
    for image in &images {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{}", row(image, width));
    }
    text
}

/// All images; with several mounts each with its mount point in front.
fn sorted(found: &Found, sort: Sort) -> Vec<ImageRow> {
    let several = found.mounts.len() > 1;
    let mut all = Vec::new();
    for mount in &found.mounts {
        let named = |image: &ImageRow| {
            let name =
                if several { format!("{}/{}", mount.mountpoint, image.name) } else { image.name.clone() };
            ImageRow { name: out::printable(&name), ..image.clone() }
        };
        all.extend(mount.images.iter().map(named));
    }
    all.sort_by(|a, b| sort.compare(a, b));
    all
}

fn summary(found: &Found) -> String {
    let images = || found.mounts.iter().flat_map(|mount| &mount.images);
    let open = images().filter(|image| image.openers > 0).count();
    let sum = |of: fn(&ImageRow) -> f64| images().map(of).sum::<f64>();
    format!(
        "ploopfs top: {}, {open} open; {} reads/s, {} writes/s, read {}/s, written {}/s",
        size::count(images().count() as u64, "image"),
        short(sum(|image| image.reads), 1000.0),
        short(sum(|image| image.writes), 1000.0),
        short(sum(|image| image.read_bytes), 1024.0),
        short(sum(|image| image.written_bytes), 1024.0),
    )
}

fn space(found: &Found) -> String {
    let of = |mount: &super::sample::MountRow| {
        let [free, all] = [mount.host_available, mount.host_size].map(|bytes| short(bytes as f64, 1024.0));
        let restarts = match mount.restarts {
            0 => String::new(),
            many => format!(", restarted {} ({} ms)", size::count(many, "time"), mount.last_pause_ms),
        };
        format!("{}: {free} of {all} free{restarts}", out::printable(&mount.mountpoint))
    };
    found.mounts.iter().map(of).collect::<Vec<_>>().join("; ")
}

fn head(width: usize) -> String {
    columns(
        "NAME",
        width,
        ["R/S", "W/S", "READ/S", "WRITE/S", "P50", "P99", "DIRTY", "QUEUE", "USED"].map(String::from),
    )
}

fn row(image: &ImageRow, width: usize) -> String {
    let state = match &*image.mode {
        "write" => ' ',
        "closed" => '-',
        "read-only" => 'r',
        _ => '!',
    };
    let time =
        |of: fn(&super::sample::Percentiles) -> f64| image.both.map_or("-".into(), |both| micros(of(&both)));
    let figures = [
        short(image.reads, 1000.0),
        short(image.writes, 1000.0),
        short(image.read_bytes, 1024.0),
        short(image.written_bytes, 1024.0),
        time(|both| both.p50_us),
        time(|both| both.p99_us),
        short(image.dirty_pages as f64, 1000.0),
        short(image.queue as f64, 1000.0),
        short(image.allocated as f64, 1024.0),
    ];
    columns(&format!("{state} {}", image.name), width, figures)
}

/// The columns; `FIGURES` is the width of those behind the name.
fn columns(name: &str, width: usize, figures: [String; 9]) -> String {
    const WIDTHS: [usize; 9] = [5, 5, 6, 7, 5, 6, 6, 6, 7];
    let name = fit(name, width);
    let mut text = format!("{name:<width$}");
    for (figure, width) in figures.iter().zip(WIDTHS) {
        // Writing into a String cannot fail.
        let _ = write!(text, " {figure:>width$}");
    }
    text
}

/// At most `width` characters; what is cut off ends in a tilde.
fn fit(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    kept + "~"
}

/// A figure in five characters at most: 0, 12, 999, 1.2K, 120K, 1023M.
fn short(value: f64, step: f64) -> String {
    let (mut value, mut power) = (value, 0);
    // 999.6 would be written as 1000.
    while value.round() >= step && power < 6 {
        value /= step;
        power += 1;
    }
    let unit = ["", "K", "M", "G", "T", "P", "E"][power];
    match power {
        0 => format!("{}", value.round()),
        _ if (value * 10.0).round() < 100.0 => format!("{value:.1}{unit}"),
        _ => format!("{}{unit}", value.round()),
    }
}

/// A time in five characters at most.
fn micros(micros: f64) -> String {
    match micros {
        us if us < 999.5 => format!("{us:.0}us"),
        us if us < 9950.0 => format!("{:.1}ms", us / 1e3),
        us if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        us => format!("{:.1}s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{MountRow, Percentiles};
    use super::*;

    fn found(images: Vec<ImageRow>) -> Found {
        let mount = MountRow {
            restarts: 0,
            last_pause_ms: 0,
            mountpoint: "/mnt/vdisks".into(),
            pid: 1,
            host_available: 1 << 34,
            host_size: 1 << 40,
            images,
        };
        Found { seconds: 1.0, mounts: vec![mount], troubles: Vec::new() }
    }

    fn image(name: &str, reads: f64) -> ImageRow {
        ImageRow { name: name.into(), mode: "write".into(), openers: 1, reads, ..ImageRow::default() }
    }

    fn view(images: Vec<ImageRow>) -> View {
        View { found: Some(found(images)), ..View::new(Sort::Io) }
    }

    #[test]
    fn figures_take_five_characters_at_most() {
        let cases = [
            (0.0, "0"),
            (999.4, "999"),
            (999.6, "1.0K"),
            (1200.0, "1.2K"),
            (9960.0, "10K"),
            (999_400.0, "999K"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value, 1000.0), text);
        }
        assert_eq!(short(1023.0 * 1024.0, 1024.0), "1023K");
        assert_eq!(short(u64::MAX as f64, 1024.0), "16E");
        for (us, text) in [(0.4, "0us"), (85.0, "85us"), (999.6, "1.0ms"), (9960.0, "10ms"), (1.25e6, "1.2s")]
        {
            assert_eq!(micros(us), text);
        }
        for power in 0..19 {
            for digit in [1.0, 9.49, 9.96, 9.996] {
                let value = digit * 10f64.powi(power);
                assert!(short(value, 1000.0).len() <= 5 && short(value, 1024.0).len() <= 5, "{value}");
            }
        }
    }

    #[test]
    fn a_screen_has_its_rows_and_no_line_wider_than_it() {
        let mut busy = image("a-name-that-is-far-too-long-for-a-column-of-a-screen", 1e12);
        busy.both = Some(Percentiles { p50_us: 999_400.0, p99_us: 16e6 });
        (busy.written_bytes, busy.dirty_pages, busy.queue, busy.allocated) =
            (1e18, u64::MAX, u64::MAX, u64::MAX);
        let images: Vec<ImageRow> =
            (0..100).map(|i| ImageRow { name: format!("{i}{}", busy.name), ..busy.clone() }).collect();
        for (columns, rows) in [(80, 24), (132, 50), (40, 10), (1, 1), (0, 0)] {
            let lines = view(images.clone()).lines(columns, rows);
            assert!(lines.len() <= rows.max(AROUND), "{columns}x{rows}");
            assert!(
                lines.iter().all(|line| line.text.chars().count() <= columns.max(1)),
                "{columns}x{rows}: {lines:?}"
            );
        }
        let lines = view(images).lines(80, 24);
        assert_eq!(lines.len(), 24);
        assert!(lines[2].text.ends_with("USED") && lines[3].text.ends_with("16E"), "{lines:?}");
    }

    #[test]
    fn keys_sort_turn_hide_and_scroll() {
        let closed = ImageRow { mode: "closed".into(), openers: 0, ..image("c", 0.0) };
        let mut view = view(vec![image("a", 1.0), image("b", 5.0), closed]);
        let names = |view: &mut View| -> Vec<char> {
            let lines = view.lines(80, 24);
            let rows = lines.iter().skip(3).filter_map(|line| line.text.get(2..3)?.chars().next());
            rows.take_while(|c| *c != ' ').filter(|c| "abc".contains(*c)).collect()
        };
        assert_eq!(names(&mut view), ['b', 'a', 'c']);
        view.press(Key::Letter('r'));
        assert_eq!(names(&mut view), ['c', 'a', 'b']);
        view.press(Key::Letter('n'));
        assert_eq!(names(&mut view), ['a', 'b', 'c']);
        view.press(Key::Letter('o'));
        assert_eq!(names(&mut view), ['a', 'b']);
        view.press(Key::Letter('x'));
        view.press(Key::Down);
        assert_eq!(names(&mut view), ['a', 'b'], "nothing to scroll to");
        let lines = view.lines(80, 5);
        assert_eq!(lines.len(), 5);
        view.press(Key::Down);
        let lines = view.lines(80, 5);
        assert!(lines[3].text.starts_with("  b"), "{lines:?}");
    }

    #[test]
    fn every_key_of_the_last_line_does_something() {
        for letter in "nitldus".chars() {
            assert!(Sort::of_key(letter).is_some(), "{letter}");
        }
    }
}
