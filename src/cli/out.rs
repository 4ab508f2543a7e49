//! Standard output: written in one piece, and a reader that went away (`ploopfs list | head -1`) is no failure.

use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Context;
use serde::Serialize;

pub use crate::error::printable;
use crate::error::{Error, Kind, Result};
use crate::io::standard;

/// Refuses a standard output to which nothing can be written, before what a command would say there is found or done. A
/// caller that wants no words has /dev/null for them.
pub fn usable() -> Result<()> {
    standard::output().map_err(|e| {
        let what = format!(
            "standard output is closed, or not open for writing ({}), and the answer goes there; to drop it: > /dev/null",
            crate::error::words(&e)
        );
        Error::new(Kind::Io, what)
    })
}

/// Writes `text` to standard output.
pub fn text(text: &str) -> anyhow::Result<()> {
    bytes(text.as_bytes())
}

/// Writes `bytes` to standard output.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    usable()?;
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Writes what is said of a wrong command line to standard error, or the help that was asked for to standard output.
pub fn usage(usage: &clap::Error) -> anyhow::Result<()> {
    if usage.use_stderr() {
        // As all that is said there.
        let _ = usage.print();
        return Ok(());
    }
    usable()?;
    match usage.print().and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// Writes to standard output what was done. Where that fails, the error has it: done it is all the same.
pub fn done(text: &str) -> anyhow::Result<()> {
    self::text(text)
        .with_context(|| format!("done, but it cannot be said on standard output: {}", text.trim_end()))
}

/// Writes a line for a person to standard error: what is not the command's answer. Nothing is lost where stderr is closed.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "ploopfs: {}", printable(line));
}

/// Writes what a person may want to know, and no program needs, to standard output, if that takes it.
pub fn remark(text: &str) {
    if usable().is_ok() {
        let _ = io::stdout().lock().write_all(text.as_bytes());
    }
}

/// Writes `value` as indented JSON and a newline.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Standard output for what comes in many pieces. A reader that went away ends it, and is no failure.
pub struct OutStream(Option<BufWriter<StdoutLock<'static>>>);

impl OutStream {
    /// Locks standard output.
    pub fn lock() -> OutStream {
        OutStream(Some(BufWriter::new(io::stdout().lock())))
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
