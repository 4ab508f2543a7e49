//! `ploopfs top`.

mod sample;
mod screen;
mod view;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::{Outcome, out};
use crate::error::{Error, Kind, Result};
use sample::Watch;
use screen::{Screen, ScreenEvent};
use view::{Sort, View};

/// How often the keyboard and the signals are looked at: a key is answered before a person wonders.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of `top`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this mount [default: all mounts of ploopfs]
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: Option<PathBuf>,
    /// Print one measurement as text and end; the same without a terminal
    #[arg(long)]
    once: bool,
    /// Print one measurement as JSON and end
    #[arg(long, conflicts_with = "once")]
    json: bool,
    /// Seconds that a measurement takes, 0.1 to 60
    #[arg(long, value_name = "SECS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// The column to sort by
    #[arg(long, value_enum, default_value_t = Sort::Io)]
    sort: Sort,
}

fn interval(text: &str) -> std::result::Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=60.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("give seconds from 0.1 to 60".to_owned()),
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let mut watch = Watch::new(args.mountpoint.as_deref())?;
    let live = std::io::stdout().is_terminal() && !args.once && !args.json;
    if live {
        return Ok(interactive(watch, args.interval, args.sort)?);
    }
    // A rate is a difference of two moments.
    watch.look();
    std::thread::sleep(args.interval);
    let found = watch.look();
    if found.mounts.is_empty()
        && let Some(trouble) = found.troubles.first()
    {
        return Err(Error::new(Kind::Io, trouble.clone()).into());
    }
    for trouble in &found.troubles {
        log::warn!("{trouble}");
    }
    if args.json {
        out::json(&found)?;
    } else {
        out::text(&view::table(&found, args.sort))?;
    }
    Ok(Outcome::Done)
}

/// Until q, Ctrl-C or a signal. However it ends, the terminal is as it was.
fn interactive(watch: Watch, interval: Duration, sort: Sort) -> Result<Outcome> {
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(number, signal.clone(), number as usize)
            .map_err(|e| Error::new(Kind::Io, format!("cannot watch for signals: {e}")))?;
    }
    let mut view = View::new(sort);
    // A daemon that does not answer keeps the sampler waiting, and never the keyboard.
    let samples = watch.start(interval)?;
    let mut screen = Screen::open()?;
    loop {
        let mut new = false;
        for found in samples.try_iter() {
            view.found = Some(found);
            new = true;
        }
        if new || screen.is_stale() {
            let (columns, rows) = screen.size()?;
            screen.draw(&view.lines(columns, rows))?;
        }
        match screen.wait(LOOK)? {
            ScreenEvent::Nothing => {}
            ScreenEvent::Resized => screen.make_stale(),
            ScreenEvent::Quit => return Ok(Outcome::Done),
            ScreenEvent::Key(key) => {
                view.press(key);
                screen.make_stale();
            }
        }
        match signal.load(Ordering::Relaxed) {
            0 => {}
            number => return Ok(Outcome::Status(ExitCode::from(128 + number as u8))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_seconds_from_a_tenth_to_a_minute() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "0.05", "61", "-1", "NaN", "inf", "x", ""] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
