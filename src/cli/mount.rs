//! `ploopfs mount`.

mod living;
mod places;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::cli::{Outcome, mount_options, out, size};
use crate::control::client::Client;
use crate::daemon::keeper::{self, Report};
use crate::daemon::launch;
use crate::daemon::settings::{self, Settings};
use crate::daemon::wire::Note;
use crate::error::{Error, Kind, Result};
use crate::fuse::uring;
use crate::image::create::{CreatePlan, create_or_use};
use crate::io::{mounts, process};
use living::{Attempt, already_served, made_meanwhile};
use places::{check_free, check_places, clear_dead};

/// How often a start is tried that met another daemon, which was gone a moment later.
const TRIES: u32 = 4;
/// Fewest and most transport threads that are chosen by the number of CPUs: one would stop the mount at each
/// request that blocks, and many wake cache-cold (docs/kernel.md#hand-over).
const THREADS: (usize, usize) = (2, 8);

/// Arguments of `mount`.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub struct Args {
    /// The folder with the images; made if it is missing
    #[arg(value_name = "IMAGES")]
    images: PathBuf,
    /// Where they are shown; made if it is missing
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
    /// Create an image first, unless one of that name and size is there (may be given again)
    #[arg(long, value_name = "NAME=SIZE", value_parser = parse_create, action = clap::ArgAction::Append)]
    create: Vec<Create>,
    /// Stay in front and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Write to no image
    #[arg(short, long)]
    read_only: bool,
    /// Let descriptors of layered images name files outside of the images folder
    #[arg(long)]
    allow_outside: bool,
    /// Let files be made, grown, renamed, removed and cloned through the mount
    ///
    /// `truncate -s 20G new.img` and `fallocate` of a new file make a thin image, `truncate` to a larger size grows a disk
    /// (a smaller one is refused), `mv` renames an image that is not in use and never replaces one, `rm` removes one
    /// that is not in use, `cp vm1.img vm2.img` makes a clone, and `chmod` and `chown` change the image's file. Without
    /// this each of them is refused (EPERM).
    #[arg(long)]
    manage: bool,
    /// Let the kernel read and write raw images in the daemon's place (FUSE passthrough: Linux 6.9, root)
    ///
    /// Reads, writes and mappings of an image NAME.raw then go straight to its file on the host and cost what they cost
    /// there; fsync, discards and the like still come to the daemon. All other images are served as ever, and so is a raw
    /// one where the kernel or the host cannot do it (the log says why). While such an image is open, snapshots, clones,
    /// backups and changes of size of it are refused, because its writes could not be stopped: close it first, or mount
    /// without this. Not counted by `top` and the metrics, not held back when the host is full (--on-full), and a write
    /// behind the disk's end makes it longer, as on the host. Not together with --cache direct.
    #[arg(long)]
    passthrough: bool,
    /// Do not confine the daemon
    ///
    /// Once the mount works, the daemon gives up what a file server never needs: it opens files below the images folder
    /// only (Landlock; anywhere with --allow-outside), gains no privileges, and makes only the system calls on a list
    /// (seccomp), which has none to start programs, to mount, to trace, or to talk to a network. Of root's powers it keeps
    /// those over files of other owners. What is active is in the log and in .ploopfs/stats.json.
    #[arg(long)]
    no_sandbox: bool,
    /// How to talk to the kernel
    #[arg(long, value_enum, default_value = "fuse")]
    transport: Transport,
    /// Where the host keeps what was read and written: in its page cache, or nowhere (O_DIRECT)
    ///
    /// A guest with a cache of its own loses nothing by `direct`, and the host's memory is left to others. Writes of less
    /// than a block of the host's disk still go through the page cache, and so does everything where the host has no
    /// direct I/O (the log says so).
    #[arg(long, value_enum, default_value = "page")]
    cache: Cache,
    /// Threads that talk to the kernel [default: one for each CPU, 2 to 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Threads that may wait for the host's disks on behalf of one image
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u16).range(1..=1024))]
    runners: u16,
    /// Most memory for block allocation tables
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    bat_cache: u64,
    /// How long a changed allocation table may wait before it is written, in milliseconds; 0: not at all
    #[arg(long, value_name = "MS", default_value = "1000")]
    bat_delay: u64,
    /// What a write does that finds the host full
    #[arg(long, value_enum, default_value = "queue")]
    on_full: WhenFull,
    /// How long such a write waits before it fails, in seconds; 0: for ever
    #[arg(long, value_name = "SECS", default_value = "60")]
    full_timeout: u64,
    /// Free space on the host, in percent, below which the low-water event is raised
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = clap::value_parser!(u8).range(0..=100))]
    low_water: u8,
    /// Run PROGRAM EVENT IMAGE when something happens: low-water, full, space, read-only, restarted
    ///
    /// An IMAGE whose name begins with "-" is given as ./-NAME, and never looks like an option; PLOOPFS_IMAGE has it as it is.
    /// The environment holds PLOOPFS_EVENT, PLOOPFS_IMAGE, PLOOPFS_IMAGES, PLOOPFS_MOUNTPOINT and, where they apply,
    /// PLOOPFS_FREE and PLOOPFS_TOTAL (bytes) and PLOOPFS_REASON.
    #[arg(long, value_name = "PROGRAM")]
    on_event: Option<PathBuf>,
    /// How long open files may hold up the end after SIGTERM, in seconds
    #[arg(long, value_name = "SECS", default_value = "60")]
    stop_timeout: u64,
    /// How long a daemon that was killed may be missed, in seconds; 0 = the mount ends with it
    #[arg(long, value_name = "SECS", default_value = "0", hide = true, value_parser = clap::value_parser!(u64).range(..=86_400))]
    restart_timeout: u64,
    /// Any of these options by its long name, and what mount(8) has for every file system: ro, sync, dirsync, nosymfollow,
    /// SELinux's context= and, of an ordinary user, allow_other count; rw, noauto, nofail, _netdev, x-* and all others are
    /// passed over
    #[arg(short = 'o', value_name = "NAME[=VALUE],...", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// Faults to inject into host files
    #[cfg(feature = "faults")]
    #[arg(long, value_name = "SPEC", hide = true)]
    fault: Option<String>,
}

/// One `--create`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Create {
    name: String,
    /// Bytes.
    size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Transport {
    /// FUSE over io_uring where the kernel has it and it is switched on, else /dev/fuse
    Auto,
    /// /dev/fuse
    Fuse,
    /// FUSE over io_uring (Linux 6.14; echo Y > /sys/module/fuse/parameters/enable_uring)
    Uring,
}

impl From<Transport> for settings::WantedTransport {
    fn from(transport: Transport) -> settings::WantedTransport {
        match transport {
            Transport::Auto => settings::WantedTransport::Auto,
            Transport::Fuse => settings::WantedTransport::Fuse,
            Transport::Uring => settings::WantedTransport::Uring,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Cache {
    /// The page cache
    Page,
    /// None
    Direct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum WhenFull {
    /// Waits for space
    Queue,
    /// Fails at once
    Error,
}

fn parse_create(text: &str) -> std::result::Result<Create, String> {
    let Some((name, size)) = text.rsplit_once('=') else {
        return Err("write NAME=SIZE, such as vm1=10G".to_owned());
    };
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(format!("'{name}' is no name for an image: no '/' in it, and no '.' in front"));
    }
    Ok(Create { name: name.to_owned(), size: size::parse_disk(size)? })
}

/// Only to parse `-o`: its options are options of `mount` behind two dashes.
#[derive(Debug, Parser)]
#[command(name = "ploopfs mount", no_binary_name = true)]
struct Again {
    #[command(flatten)]
    args: Args,
}

/// `args` with its `-o` carried out. The words of the command line are parsed once more, with the options from `-o`
/// in front, so that an option that stands there by itself wins.
fn with_options(args: Args, words: impl Iterator<Item = OsString>) -> anyhow::Result<Args> {
    if args.options.is_empty() {
        return Ok(args);
    }
    if mount_options::has(&args.options, "remount") {
        let why = "a mount of ploopfs cannot change its options; umount it, and mount it again";
        return Err(Error::new(Kind::Unsupported, format!("in -o: remount: {why}")).into());
    }
    let words = mount_options::spell_out(&args.options)
        .into_iter()
        .chain(words.skip_while(|word| word != "mount").skip(1));
    let again = Again::try_parse_from(words);
    again
        .map(|again| again.args)
        .map_err(|e| Error::new(Kind::Invalid, format!("in -o: {}", first_line(&e))).into())
}

/// What is wrong, without the advice for a command line that follows: mount(8) wrote these options, not a person.
fn first_line(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let line = text.lines().next().unwrap_or_default();
    format!("{}; `ploopfs mount --help` has all options", line.strip_prefix("error: ").unwrap_or(line))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let args = with_options(args, std::env::args_os())?;
    if args.passthrough && args.cache == Cache::Direct {
        let why = "with --passthrough each opener of a raw image decides what the host caches (O_DIRECT), and --cache \
                   direct cannot hold; leave one of them out";
        return Err(Error::new(Kind::Invalid, why).into());
    }
    if args.transport == Transport::Uring {
        // The daemon asks again; here before anything is made.
        uring::available()?;
    }
    mounts::refuse_others([args.images.clone()], true)?;
    let images = folder(&args.images, "cannot make the images folder")?;
    let mountpoint = mounts::resolve(&args.mountpoint)?;
    check_places(&images, &mountpoint)?;
    let settings = settings(&args, images, mountpoint)?;
    for left in (0..TRIES).rev() {
        match attempt(&settings, &args.create)? {
            Attempt::Over(outcome) => return Ok(outcome),
            Attempt::Refused(e) if left == 0 => return Err(e.into()),
            // What was in the way has ended by now.
            Attempt::Refused(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    Ok(Outcome::Done)
}

fn attempt(settings: &Settings, create: &[Create]) -> anyhow::Result<Attempt> {
    let (images, mountpoint) = (settings.images(), settings.mountpoint());
    clear_dead(mountpoint)?;
    let living = Client::find(images)?;
    for wanted in create {
        create_or_use(&images.join(&wanted.name), &CreatePlan::thin(wanted.size))?;
    }
    if let Some(client) = living {
        return already_served(client, images, mountpoint);
    }
    if let Err(e) = check_free(images, mountpoint) {
        return made_meanwhile(e, images, mountpoint);
    }
    folder(mountpoint, "cannot make the mount point")?;
    if settings.foreground {
        return Ok(Attempt::Over(Outcome::Status(keep_in_front(settings))));
    }
    let begun = match launch::launch(settings, &mut out::say) {
        Err(e) if e.kind() == Kind::InUse => return made_meanwhile(e, images, mountpoint),
        begun => begun?,
    };
    if !begun.notes.is_empty() {
        let notes = begun.notes.iter().map(|note| format!("\n  {}", out::printable(note)));
        let block = format!("mounted, without these (also in the log):{}", notes.collect::<String>());
        // Where stderr is closed the notes are in the log alone.
        let _ = writeln!(std::io::stderr(), "ploopfs: {block}");
    }
    Ok(Attempt::Over(Outcome::Done))
}

/// Makes a folder that is missing, and returns its absolute path without links.
fn folder(path: &Path, doing: &str) -> Result<PathBuf> {
    let made = std::fs::create_dir_all(path).and_then(|()| path.canonicalize());
    made.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Error::at(Kind::Invalid, path, "is not a folder"),
        _ => Error::io(&e, path, doing),
    })
}

fn settings(args: &Args, images: PathBuf, mountpoint: PathBuf) -> Result<Settings> {
    let cpus = std::thread::available_parallelism().map_or(THREADS.0, usize::from);
    let on_event = args.on_event.as_deref().map(program).transpose()?;
    let mut settings = Settings {
        images: images.into(),
        mountpoint: mountpoint.into(),
        foreground: args.foreground,
        read_only: args.read_only,
        allow_other: mount_options::has(&args.options, "allow_other"),
        asked: mount_options::asked(&args.options),
        allow_outside: args.allow_outside,
        direct: args.cache == Cache::Direct,
        manage: args.manage,
        passthrough: args.passthrough,
        sandbox: !args.no_sandbox,
        transport: args.transport.into(),
        threads: args.threads.map_or(cpus.clamp(THREADS.0, THREADS.1), usize::from),
        runners: args.runners.into(),
        bat_cache: args.bat_cache,
        bat_delay_ms: args.bat_delay,
        queue_when_full: args.on_full == WhenFull::Queue,
        full_timeout_s: args.full_timeout,
        low_water: args.low_water,
        on_event,
        stop_timeout_s: args.stop_timeout,
        restart_timeout_s: args.restart_timeout,
        no_restart: None,
        takes_over: false,
        restarts: 0,
        faults: 0,
        #[cfg(feature = "faults")]
        fault: args.fault.clone(),
        #[cfg(not(feature = "faults"))]
        fault: None,
    };
    if args.restart_timeout > 0 {
        settings.judge_restart(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
    }
    Ok(settings)
}

/// The program of `--on-event`: the keeper runs in another folder, so a path is made absolute, and a missing
/// program is better found now than on the day it is needed.
fn program(path: &Path) -> Result<OsString> {
    if path.components().count() == 1 {
        // Looked for in PATH.
        return Ok(path.into());
    }
    let found =
        path.canonicalize().map_err(|e| Error::io(&e, path, "cannot find the program of --on-event"))?;
    Ok(found.into())
}

/// The keeper of `-f` is this process.
fn keep_in_front(settings: &Settings) -> ExitCode {
    struct InFront;
    impl Report for InFront {
        fn first(&mut self, note: &Note) -> bool {
            // What was refused is in the log, and that is on stderr already.
            if let Note::Failed { text, .. } = note {
                out::say(text);
            }
            true
        }
        fn in_front(&self) -> bool {
            true
        }
    }
    // Everything that this process opened itself is closed by now.
    process::close_inherited();
    keeper::run(settings, &mut InFront)
}

#[cfg(test)]
mod tests;
