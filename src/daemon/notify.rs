//! Reports to a service manager: sd_notify(3), a datagram to the socket that it names in the environment.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use super::stop;

/// The variable that names the socket. It is meant for the process that was started, not for those that it starts.
pub(super) const SOCKET: &str = "NOTIFY_SOCKET";

/// Microseconds after which silence counts as death, and the process that is to speak.
const WATCHDOG_TIME: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// The mount works.
pub(super) fn ready(status: &str) {
    report(&format!("READY=1\nSTATUS={}", status.replace('\n', " ")));
}

/// The end was asked for, and may take `patience` for the users of images, and a while to close them.
pub(super) fn stopping(patience: Duration) {
    let patience = (patience + stop::CLOSING).as_micros();
    report(&format!("STOPPING=1\nSTATUS=closing images\nEXTEND_TIMEOUT_USEC={patience}"));
}

/// The daemon answers.
pub(super) fn alive() {
    report("WATCHDOG=1");
}

/// How often the service manager is to hear that: twice in the time after which it takes us for dead. None: never.
pub(super) fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let for_us = number(WATCHDOG_PID).is_none_or(|pid| pid == u64::from(std::process::id()));
    let time = number(WATCHDOG_TIME).filter(|time| *time > 0 && for_us)?;
    Some(Duration::from_micros(time / 2))
}

fn report(state: &str) {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    if let Err(e) = send(&socket, state) {
        // The service manager gives up after a time, and this is why. A closed stderr loses it.
        let _ = writeln!(io::stderr(), "ploopfs: {SOCKET}={}: {e}", socket.display());
    }
}

/// A socket's name is a path, or, with an @ in front, an abstract one.
fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(OsString::from(socket))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}
