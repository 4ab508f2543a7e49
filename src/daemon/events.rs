//! `--on-event PROGRAM`: what the engine reports, and how the keeper runs the program.
//!
//! The program gets the event and the image as arguments (`PROGRAM low-water vm1`; a name that begins with `-` has `./` in
//! front there, for the folder's owner chose it) and, in its environment,
//! PLOOPFS_EVENT, PLOOPFS_IMAGE, PLOOPFS_IMAGES (the folder), PLOOPFS_MOUNTPOINT, and, where they apply,
//! PLOOPFS_FREE and PLOOPFS_TOTAL (bytes), PLOOPFS_REASON, PLOOPFS_RESTARTS and PLOOPFS_PAUSE_MS. What is about the mount has
//! no image: an empty argument. One runs at a time; one that takes too long is killed.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::notify;
use super::settings::Settings;
use super::wire::{Event, What};
use crate::error::Result;
use crate::io::process::{self, spawn_detached as spawn};
use crate::vdisk;

/// Events on their way to the program; more are dropped, because a program that hangs must not hold up a thread of the
/// daemon.
const MAX_WAITING: usize = 64;
/// How long the program may run. It is meant to send a message, not to make room.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest name that a file has, in bytes.
const MAX_NAME: usize = 255;
/// The longest reason, in bytes: two paths and a sentence. An environment has an end.
const MAX_REASON: usize = 16 << 10;

impl From<vdisk::ImageEvent> for Event {
    fn from(event: vdisk::ImageEvent) -> Event {
        let (image, what) = match event {
            vdisk::ImageEvent::LowWater { image, free, total } => (image, What::LowWater { free, total }),
            vdisk::ImageEvent::Full { image } => (image, What::Full),
            vdisk::ImageEvent::Space { image } => (image, What::Space),
            vdisk::ImageEvent::ReadOnly { image, reason } => (image, What::ReadOnly { reason }),
        };
        Event { image, what }
    }
}

impl Event {
    /// The event for the log.
    pub fn sentence(&self) -> String {
        let image = &self.image;
        match &self.what {
            What::LowWater { free, total } => {
                format!("{image}: low water: {free} of {total} bytes are free on the host")
            }
            What::Full => format!("{image}: the host is full"),
            What::Space => format!("{image}: there is space again"),
            What::ReadOnly { reason } => format!("{image}: read-only: {reason}"),
            What::Restarted { pause_ms, .. } => {
                format!("the daemon was restarted; requests waited for {pause_ms} ms")
            }
        }
    }

    /// Why no program is run for it: the daemon reads files that others made, and is not believed.
    pub fn objection(&self) -> Option<&'static str> {
        if self.image.is_empty() || self.image.len() > MAX_NAME || self.image.contains(['/', '\0']) {
            return Some("is no name of an image");
        }
        match &self.what {
            What::ReadOnly { reason } if reason.len() > MAX_REASON || reason.contains('\0') => {
                Some("has a reason that is no sentence")
            }
            What::Restarted { .. } => Some("is none of a daemon's"),
            _ => None,
        }
    }

    /// The name as an argument: a program takes no name for an option of its own.
    fn argument(&self) -> String {
        if self.image.starts_with('-') { format!("./{}", self.image) } else { self.image.clone() }
    }
}

impl What {
    fn word(&self) -> &'static str {
        match self {
            What::LowWater { .. } => "low-water",
            What::Full => "full",
            What::Space => "space",
            What::ReadOnly { .. } => "read-only",
            What::Restarted { .. } => "restarted",
        }
    }
}

/// Starts the thread that runs the program; None where there is none. What it has to say goes to `warn`. `oom_score`: what the
/// program gets, where it is not to be as safe as this process has become.
pub fn runner(
    settings: &Settings,
    oom_score: Option<i32>,
    warn: impl Fn(String) + Send + 'static,
) -> Result<Option<Sender<Event>>> {
    if settings.on_event.is_none() {
        return Ok(None);
    }
    let (sender, events) = bounded(MAX_WAITING);
    let settings = settings.clone();
    spawn("keeper/events", move || run_all(&settings, oom_score, &events, &warn))?;
    Ok(Some(sender))
}

fn run_all(settings: &Settings, oom_score: Option<i32>, events: &Receiver<Event>, warn: &dyn Fn(String)) {
    let Some(program) = &settings.on_event else { return };
    for event in events {
        if let Err(why) = run(settings, program, oom_score, &event) {
            warn(format!("--on-event {}: {} {}: {why}", program.display(), event.what.word(), event.image));
        }
    }
}

fn run(
    settings: &Settings,
    program: &std::ffi::OsStr,
    oom_score: Option<i32>,
    event: &Event,
) -> std::result::Result<(), String> {
    let mut command = Command::new(program);
    command.arg(event.what.word()).arg(event.argument());
    command.env("PLOOPFS_EVENT", event.what.word()).env("PLOOPFS_IMAGE", &event.image);
    command.env("PLOOPFS_IMAGES", &settings.images).env("PLOOPFS_MOUNTPOINT", &settings.mountpoint);
    match &event.what {
        What::LowWater { free, total } => {
            command.env("PLOOPFS_FREE", free.to_string()).env("PLOOPFS_TOTAL", total.to_string());
        }
        What::ReadOnly { reason } => {
            command.env("PLOOPFS_REASON", reason);
        }
        What::Restarted { restarts, pause_ms } => {
            command
                .env("PLOOPFS_RESTARTS", restarts.to_string())
                .env("PLOOPFS_PAUSE_MS", pause_ms.to_string());
        }
        What::Full | What::Space => {}
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).env_remove(notify::SOCKET);
    let mut child = command.spawn().map_err(|e| format!("cannot run it: {e}"))?;
    if let Some(score) = oom_score {
        process::set_oom_score(&child, score);
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{status}")),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            Ok(None) => {
                // Killed and reaped; both can only fail when it has just ended.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("killed after {} s", PATIENCE.as_secs()));
            }
            Err(e) => return Err(format!("cannot wait for it: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(image: &str) -> Event {
        Event { image: image.into(), what: What::Full }
    }

    #[test]
    fn a_name_that_looks_like_an_option_is_none() {
        for (name, argument) in [("-rf", "./-rf"), ("--output=x", "./--output=x"), ("a -b", "a -b")] {
            assert_eq!(full(name).argument(), argument);
            assert_eq!(full(name).objection(), None);
        }
    }

    #[test]
    fn what_no_image_can_be_called_runs_no_program() {
        for name in ["", "a/b", "../x", "a\0b", &"x".repeat(MAX_NAME + 1)] {
            assert!(full(name).objection().is_some(), "{name}");
        }
        let read_only = |reason: String| Event { image: "a".into(), what: What::ReadOnly { reason } };
        assert!(read_only("x\0y".into()).objection().is_some());
        assert!(read_only("x".repeat(MAX_REASON + 1)).objection().is_some());
        assert_eq!(read_only("its sync failed".into()).objection(), None);
    }
}
