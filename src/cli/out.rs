//! Standard output: written in one piece, and a reader that went away (`ploopfs list | head -1`) is no failure.

use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Context;
use serde::Serialize;

pub use crate::error::printable;

/// Writes `text` to standard output.
pub fn text(text: &str) -> anyhow::Result<()> {
    bytes(text.as_bytes())
}

/// Writes `bytes` to standard output.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Writes a line for a person to standard error: what is not the command's answer. Nothing is lost where stderr is closed.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "ploopfs: {}", printable(line));
}

/// Writes `value` as indented JSON and a newline.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Standard output for what comes in many pieces. A reader that went away ends it, and is no failure.
pub struct Stream(Option<BufWriter<StdoutLock<'static>>>);

impl Stream {
    /// Locks standard output.
    pub fn lock() -> Stream {
        Stream(Some(BufWriter::new(io::stdout().lock())))
    }

    /// Writes `text`; false: the reader has gone.
    pub fn write(&mut self, text: &str) -> anyhow::Result<bool> {
        self.step(|stdout| stdout.write_all(text.as_bytes()))
    }

    /// Writes what is left.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.step(BufWriter::flush).map(drop)
    }

    fn step(
        &mut self,
        act: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>,
    ) -> anyhow::Result<bool> {
        let Some(stdout) = &mut self.0 else { return Ok(false) };
        match act(stdout) {
            Ok(()) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            Err(e) => return Err(e).context("cannot write to standard output"),
        }
        // What is left in it would be written once more, and fail once more.
        if let Some(stdout) = self.0.take() {
            let _ = stdout.into_parts();
        }
        Ok(false)
    }
}
