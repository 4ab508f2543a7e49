//! Commands with a time limit, whose output is in the failure message.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a command may take unless it says otherwise: long for a busy 2-core machine, short for a hang.
const LIMIT: Duration = Duration::from_secs(120);

/// A command about to be run.
pub struct Run {
    program: OsString,
    args: Vec<OsString>,
    limit: Duration,
    input: Vec<u8>,
    folder: Option<OsString>,
    env: Vec<(String, String)>,
}

/// What came of it.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub line: String,
    /// None when the time limit ended it.
    pub status: Option<ExitStatus>,
    /// Standard output, lossy.
    pub stdout: String,
    /// Standard error, lossy.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Run {
    /// `program` as found in PATH, or where root's PATH may not look.
    pub fn new(program: impl AsRef<OsStr>) -> Run {
        let found = program.as_ref().to_str().and_then(super::find_program);
        let program = found.map_or_else(|| program.as_ref().to_owned(), Into::into);
        Run { program, args: Vec::new(), limit: LIMIT, input: Vec::new(), folder: None, env: Vec::new() }
    }

    /// The binary under test.
    pub fn ploopfs() -> Run {
        Run::new(env!("CARGO_BIN_EXE_ploopfs"))
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Run {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Run {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Ends it after this many seconds.
    pub fn limit(mut self, seconds: u64) -> Run {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Its standard input (else empty).
    pub fn input(mut self, data: impl Into<Vec<u8>>) -> Run {
        self.input = data.into();
        self
    }

    /// Its working folder.
    pub fn in_folder(mut self, folder: &Path) -> Run {
        self.folder = Some(folder.as_os_str().to_owned());
        self
    }

    /// A variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Run {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs it. Output goes to files, not pipes: a daemon that it leaves behind cannot keep us waiting.
    pub fn run(self) -> Finished {
        let scratch = || tempfile::tempfile().expect("a scratch file");
        let (mut input, mut stdout, mut stderr) = (scratch(), scratch(), scratch());
        input.write_all(&self.input).expect("a scratch file");
        input.rewind().expect("a scratch file");
        let stdio = |file: &File| Stdio::from(file.try_clone().expect("a descriptor"));
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(stdio(&input)).stdout(stdio(&stdout)).stderr(stdio(&stderr));
        command.envs(self.env.iter().map(|(name, value)| (name, value))).process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let line = std::iter::once(&self.program).chain(&self.args);
        let line = line.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let began = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
        let status = loop {
            if let Some(status) = child.try_wait().expect("our own child") {
                break Some(status);
            }
            if began.elapsed() > self.limit {
                // The group is the child's own, so nobody else is hit.
                if let Some(group) = rustix::process::Pid::from_raw(child.id() as i32) {
                    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                }
                // A process stuck in the kernel may not even die of this: leave it, and say so.
                let _ =
                    until(Duration::from_secs(5), || child.try_wait().is_ok_and(|status| status.is_some()));
                break None;
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        let took = began.elapsed();
        let slurp = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a scratch file");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (stdout, stderr) = (slurp(&mut stdout), slurp(&mut stderr));
        Finished { line, status, stdout, stderr, took }
    }

    /// Runs it and demands success; returns standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        let done = self.run();
        assert!(done.success(), "{done}");
        done.stdout
    }

    /// Runs it and demands this exit status.
    #[track_caller]
    pub fn status(self, wanted: i32) -> Finished {
        let done = self.run();
        assert_eq!(done.code(), Some(wanted), "{done}");
        done
    }
}

impl Finished {
    /// Exit status 0 within the limit.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// The exit status, None for a signal or the limit.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// Both streams in one.
    pub fn output(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            Some(status) => writeln!(f, "`{}` ended with {status} after {:?}", self.line, self.took)?,
            None => writeln!(f, "`{}` did not end within {:?}", self.line, self.took)?,
        }
        write!(f, "--- stdout\n{}--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// Runs a program that must succeed.
#[track_caller]
pub fn ok<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    Run::new(program).args(args).ok()
}

/// Runs a bash script that must succeed.
#[track_caller]
pub fn sh(script: &str) -> String {
    Run::new("bash").args(["-euo", "pipefail", "-c", script]).ok()
}

/// Polls until `done` says yes; false when the time is over.
pub fn until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal to a process of ours.
#[track_caller]
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("our own process");
}
