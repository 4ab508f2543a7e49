//! How the processes of one mount start each other.

use std::process::Command;

use super::notify;
use super::settings::Settings;
use crate::io::process;

/// A command that starts this program as another of the processes of a mount.
pub(super) fn command(what: &str, settings: &Settings) -> Command {
    let mut command = process::daemon_command("ploopfs");
    // The two paths are for `ps`; what counts is the settings on standard input.
    command.arg(what).arg(&settings.images).arg(&settings.mountpoint).env_remove(notify::SOCKET);
    command
}

/// Closes the pipe to the command line. Should it fail, the pipe stays open, which only a shell that collects our
/// output notices.
pub(super) fn let_go_of_output() {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// Closes the pipe from the command line, which has said all.
pub(super) fn let_go_of_input() {
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
}
