//! `--on-event PROGRAM`: what the engine reports, and how the keeper runs the program.
//!
//! The program gets the event and the image as arguments (`PROGRAM low-water vm1`) and, in its environment,
//! PLOOPFS_EVENT, PLOOPFS_IMAGE, PLOOPFS_IMAGES (the folder), PLOOPFS_MOUNTPOINT, and, where they apply,
//! PLOOPFS_FREE and PLOOPFS_TOTAL (bytes) and PLOOPFS_REASON. One runs at a time; one that takes too long is killed.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::notify;
use super::settings::Settings;
use super::wire::Event;
use crate::error::Result;
use crate::io::process::spawn_detached as spawn;
use crate::vdisk;

/// Events on their way to the program; more are dropped, because a program that hangs must hold up nobody.
const MAX_WAITING: usize = 64;
/// How long the program may run. It is meant to send a message, not to make room.
const PATIENCE: Duration = Duration::from_secs(60);

impl From<vdisk::Event> for Event {
    fn from(event: vdisk::Event) -> Event {
        let plain = |event: &str, image: String| Event { event: event.to_owned(), image, ..Event::default() };
        match event {
            vdisk::Event::LowWater { image, free, total } => {
                Event { free: Some(free), total: Some(total), ..plain("low-water", image) }
            }
            vdisk::Event::Full { image } => plain("full", image),
            vdisk::Event::Space { image } => plain("space", image),
            vdisk::Event::ReadOnly { image, reason } => {
                Event { reason: Some(reason), ..plain("read-only", image) }
            }
        }
    }
}

impl Event {
    /// The event for the log.
    pub fn sentence(&self) -> String {
        match self.event.as_str() {
            "low-water" => format!(
                "{}: low water: {} of {} bytes are free on the host",
                self.image,
                self.free.unwrap_or(0),
                self.total.unwrap_or(0)
            ),
            "full" => format!("{}: the host is full", self.image),
            "space" => format!("{}: there is space again", self.image),
            _ => format!(
                "{}: {}: {}",
                self.image,
                self.event,
                self.reason.as_deref().unwrap_or("no reason given")
            ),
        }
    }
}

/// Starts the thread that runs the program; None where there is none. What it has to say goes to `warn`.
pub fn runner(settings: &Settings, warn: impl Fn(String) + Send + 'static) -> Result<Option<Sender<Event>>> {
    if settings.on_event.is_none() {
        return Ok(None);
    }
    let (sender, events) = bounded(MAX_WAITING);
    let settings = settings.clone();
    spawn("keeper/events", move || run_all(&settings, &events, &warn))?;
    Ok(Some(sender))
}

fn run_all(settings: &Settings, events: &Receiver<Event>, warn: &dyn Fn(String)) {
    let Some(program) = &settings.on_event else { return };
    for event in events {
        if let Err(why) = run(settings, program, &event) {
            warn(format!("--on-event {}: {} {}: {why}", program.display(), event.event, event.image));
        }
    }
}

fn run(settings: &Settings, program: &std::ffi::OsStr, event: &Event) -> std::result::Result<(), String> {
    let mut command = Command::new(program);
    command.arg(&event.event).arg(&event.image);
    command.env("PLOOPFS_EVENT", &event.event).env("PLOOPFS_IMAGE", &event.image);
    command.env("PLOOPFS_IMAGES", &settings.images).env("PLOOPFS_MOUNTPOINT", &settings.mountpoint);
    let numbers = [("PLOOPFS_FREE", event.free), ("PLOOPFS_TOTAL", event.total)];
    command.envs(numbers.into_iter().filter_map(|(name, n)| n.map(|n| (name, n.to_string()))));
    command.envs(event.reason.iter().map(|reason| ("PLOOPFS_REASON", reason)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).env_remove(notify::SOCKET);
    let mut child = command.spawn().map_err(|e| format!("cannot run it: {e}"))?;
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
