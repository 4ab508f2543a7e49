//! The commands: a file or a folder for each, with its arguments, what it asks of daemon or library, and its words.
//! Beside them what several need: `target`, `served`, `source`, `work` (who carries it out), `out`, `output`, `input`,
//! `report`, `size`, `utc`. What must hold of images is below.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};

use crate::error::{Error, Kind};
use crate::io::mounts;

pub mod attach;
pub mod backup;
pub mod cbt;
pub mod check;
pub mod clone;
pub mod compact;
pub mod completions;
pub mod create;
mod daemon_end;
mod daemon_entry;
pub mod detach;
pub mod diff;
pub mod export;
pub mod freeze;
pub mod import;
pub mod info;
mod input;
pub mod list;
mod made;
pub mod man;
pub mod map;
pub mod merge;
pub mod meta;
pub mod mount;
mod mount_options;
pub mod out;
mod output;
pub mod repair;
pub mod report;
pub mod resize;
pub mod restore;
pub mod served;
pub mod size;
pub mod snapshot;
pub mod source;
pub mod target;
pub mod top;
pub mod umount;
pub mod work;

/// What a command ends with: done, or done with something to say through the exit status.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Exit status 0.
    Done,
    /// Exit status 3: the command worked, and found damage.
    Damaged,
    /// The exit status of a process that the command was or waited for; everything is said already.
    Status(ExitCode),
}

/// Thin, snapshotted virtual disks as plain files.
#[derive(Debug, Parser)]
#[command(name = "ploopfs", version, max_term_width = 100)]
#[command(after_help = "Exit status: 0 done, 1 failed, 2 usage, 3 image damaged, 4 image in use.")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands, in the order of `--help`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the images of a folder as flat files
    ///
    /// Returns when the mount works; a daemon in the background goes on serving it. Mounting the same folder again on
    /// the same mount point says so and is no error.
    Mount(mount::Args),
    /// End a mount
    ///
    /// Returns when every image is closed and the daemon has ended. While files are open nothing happens, and who has
    /// them open is said, with the command that ends it (exit status 4).
    Umount(umount::Args),
    /// Put a loop device with direct I/O over an image, and print its name
    Attach(attach::Args),
    /// Take a loop device away, and wait until it is gone
    Detach(detach::Args),
    /// Create an image
    ///
    /// IMAGE is the path of the new file; .hds is put behind it (.raw for a raw image) unless it ends so already. The
    /// file appears complete and durable, or not at all; nothing is ever replaced.
    Create(create::Args),
    /// List the images of a folder
    ///
    /// An image is a file that ends in .hds or .raw, or begins with the ploop magic. Damaged images are listed with the
    /// reason; --all names everything else as well, and says why it is no image. Without a folder, the images of this folder
    /// are listed, and every mount of this user with what it shows.
    List(list::Args),
    /// Show what an image is
    ///
    /// IMAGE is looked up as given, then with .hds, .hdd and .raw behind it. Beside size and space: how fragmented it is (of
    /// the places where one cluster follows another, how many are jumps in the file), what could be given back and why the
    /// rest could not, its mode, and who has it open.
    Info(info::Args),
    /// Show where each part of a disk lies: in which level's file, and where nothing is
    ///
    /// A line for each range that lies in one piece, in hexadecimal: where it begins on the disk, its length, its level (0 is
    /// the base), where it begins in the level's file. --json has the fields of `qemu-img map --output=json`, and level and
    /// file. An image that a mount serves is mapped by its daemon, also while it is in use; a map shows each part as it
    /// was when it was looked at. Memory does not grow with the disk.
    Map(map::Args),
    /// Make, list, delete and go back to snapshots of an image
    ///
    /// Of an image that a mount serves while it is in use, of others offline. A first snapshot turns the image's file into
    /// a folder of the same name.
    Snapshot(snapshot::Args),
    /// Merge a snapshot into the one that stands on it
    ///
    /// The same as `ploopfs snapshot delete`, for a snapshot on which only one other, or the disk, stands.
    Merge(merge::Args),
    /// Make a new image with the content of another one, or of a snapshot
    ///
    /// Takes no space where the host file system shares extents (XFS, btrfs). Elsewhere the frozen files are linked.
    ///
    /// Several, up to 256 in one folder, are made at once: all names are judged before the first is made, all files are made
    /// durable by one sync of the host's file system, and then each gets its name. An error or a Ctrl-C before that leaves
    /// none; a power cut, or an error in between, leaves whole ones, and the message names them.
    Clone(clone::Args),
    /// List the ranges that may differ between two snapshots of an image
    ///
    /// Nothing has to be prepared and no data is read: the maps of the files that are not part of both have it. Whole
    /// clusters are listed; what is not listed is equal. What only the larger of two disks has counts as different. TO
    /// may be left out: the live disk, as it is now.
    Diff(diff::Args),
    /// Write a snapshot as a stream: all of it, or what has changed since an older one
    ///
    /// The stream goes to standard output or to a new file. It has checksums and an end, so that a restore notices whatever
    /// was lost or damaged on the way. Only data is in it, uncompressed: ploopfs backup vm1@monday | zstd > monday.zst
    ///
    /// Without @SNAPSHOT, a backup takes a snapshot of the disk as it is now, named by the time, and keeps it (the name is
    /// said on standard error): the next backup can be made --since it. If the backup fails, the snapshot goes again; one that was killed leaves it. Delete
    /// old ones with ploopfs snapshot delete; only the one that the next backup is to be made --since has to stay. The disk
    /// may be in use all the time.
    ///
    /// A full backup and those --since the one before each are a chain: restore them in this order.
    Backup(backup::Args),
    /// Make an image from a backup, or bring it up to date with an incremental one
    ///
    /// Of a full backup a new image is made, with the snapshot that was backed up. An incremental one is applied on an image
    /// whose newest snapshot is its base, whose disk has not been written since, and which is not in use; its snapshot
    /// is the newest one then, and the disk stands on it. Any other image is refused. Nothing can be seen of it before
    /// the whole stream was read and every checksum was right; if it is cut off or damaged (exit status 3), all is as
    /// before.
    Restore(restore::Args),
    /// Make an image from a raw file, a block device, a pipe, or a qcow2, VMDK, VHDX, VHD, VDI or QED file
    ///
    /// Holes and zeroes take no space, and the disk keeps its size, to the sector. Formats other than raw are read by the
    /// programs qemu-img and qemu-nbd, which must be installed. What looks like a format that is not read here, or is
    /// compressed, is refused unless --format raw says that it is a disk all the same. A file that names others (an overlay's base, a file with the data) is refused without
    /// --with-backing or --layers: its author would choose which files of this machine are read. The image appears
    /// whole, or not at all; nothing is ever replaced.
    Import(import::Args),
    /// Write an image or a snapshot to a new raw or qcow2 file, into a pipe, or to a block device
    ///
    /// Holes and zeroes take no space. Into a pipe: ploopfs export vm1@monday - | zstd > monday.zst. A device, such as
    /// /dev/sdx, is overwritten; it must be large enough, and neither mounted nor in use. A disk that is open for writing is refused (exit status 4): take a snapshot and export
    /// IMAGE@SNAPSHOT, which may be done at any time. qcow2 is written by the programs qemu-img and
    /// qemu-nbd, which must be installed. A new FILE appears whole, or not at all; no file is ever replaced.
    Export(export::Args),
    /// Track which parts of a disk change, for backup programs
    ///
    /// The changes are kept as a dirty bitmap in the image's format extension, as ploop and QEMU have it: in memory while the
    /// image can be written, in its file while it is closed. After a crash, or when another program has written the image,
    /// the tracking is lost, and everything counts as changed.
    ///
    /// The uuid names the moment since when changes are tracked. A program that remembers another one, or finds none, has to
    /// read the whole disk. QEMU reads the bitmap, and what QEMU writes ends the tracking. ploop 1.15, which knows no bitmaps,
    /// takes the image for one that was not closed, and its check -f cuts the bitmap off.
    ///
    /// Of snapshots, ploopfs diff and ploopfs backup find the changes without any tracking.
    Cbt(cbt::Args),
    /// Make a disk larger, also while it is in use
    ///
    /// Loop devices over it get the new size. A disk is not made smaller: that would cut off what the guest keeps
    /// there.
    Resize(resize::Args),
    /// Check an image for damage and leaks, and repair it
    ///
    /// IMAGE is looked up as given, then with .hds, .hdd and .raw behind it. Without --repair nothing is written. Exit
    /// status 0: nothing worse than leaks or a left-over in-use mark (both are said); 3: damage, and with --repair: damage
    /// that is left; 4: another process has the image open.
    ///
    /// --repair gives leaks back, finishes what a crash interrupted, clears a left-over in-use mark, corrects a header where
    /// the rest of the file proves what it was, and takes BAT entries away that point nowhere: what the disk lost by that is
    /// said, as ranges of bytes. Two entries that name one cluster get a copy each. Data that no entry refers to is, beside
    /// damage, kept in the file IMAGE.lost, at the bytes where it stood in the image. Keep a copy of a damaged image first.
    Check(check::Args),
    /// Watch what the images of a mount are doing
    ///
    /// Requests and bytes per second, the time within which half and 99 of 100 reads and writes were answered, BAT pages that
    /// are not durable yet, requests under way or waiting, space taken on the host. In front of a name: - closed, r
    /// read-only, ! out of space. Keys: q ends it; n, i, t, l, d, u, s sort; r turns the order; o hides closed images; arrows
    /// scroll. Without a terminal one measurement is printed.
    Top(top::Args),
    /// Give space back: free zero clusters, and make the file shorter
    ///
    /// Also while the disk is in use. Clusters of zeroes are freed, free space inside the file is punched, and clusters from
    /// the end of the file move into free places in front. Only the live disk's own file: what snapshots keep stays. Ctrl-C
    /// ends it at any time, and what is done until then stays done. What it gains is said before it begins.
    ///
    /// --defrag also puts the clusters in the order of the disk: a file that grew as the guest first wrote here and there is
    /// read from front to back again. Most clusters that lie elsewhere are copied once, a few twice; the host needs 64 MiB of
    /// free space meanwhile. A second time nothing moves. Files of snapshots stay as they are.
    Compact(compact::Args),
    /// Dump, restore and pack the metadata of an image: its header and its map
    Meta(meta::Args),
    /// Print the completion script for a shell
    ///
    /// For bash: ploopfs completions bash > /etc/bash_completion.d/ploopfs
    Completions(completions::Args),
    /// Write the man pages into a folder
    #[command(hide = true)]
    Man(man::Args),
    /// The process that freezes file systems for a snapshot, and thaws them
    #[command(hide = true)]
    ThawGuard(freeze::Args),
    /// The process that keeps a daemon; started by mount
    #[command(hide = true)]
    Keeper(daemon_entry::Args),
    /// The process that takes a mount away when its keeper was killed; started by the keeper
    #[command(hide = true)]
    Standby(daemon_entry::Args),
    /// The process that serves a folder; started by its keeper
    #[command(hide = true)]
    Daemon(daemon_entry::Args),
}

impl Command {
    /// True where it may have something to say on standard output, by which its caller goes on: an answer, or a name.
    fn answers(&self) -> bool {
        match self {
            Command::Mount(_) | Command::Umount(_) | Command::Detach(_) | Command::Man(_) => false,
            // Their output is the business of the process that started them.
            Command::ThawGuard(_) | Command::Keeper(_) | Command::Standby(_) | Command::Daemon(_) => false,
            _ => true,
        }
    }

    fn run(self) -> anyhow::Result<Outcome> {
        match self {
            Command::Mount(args) => mount::run(args),
            Command::Umount(args) => umount::run(args),
            Command::Attach(args) => attach::run(args),
            Command::Detach(args) => detach::run(args),
            Command::Create(args) => create::run(args),
            Command::List(args) => list::run(args),
            Command::Info(args) => info::run(args),
            Command::Map(args) => map::run(args),
            Command::Snapshot(args) => snapshot::run(args),
            Command::Merge(args) => merge::run(args),
            Command::Clone(args) => clone::run(args),
            Command::Diff(args) => diff::run(args),
            Command::Backup(args) => backup::run(args),
            Command::Restore(args) => restore::run(args),
            Command::Import(args) => import::run(args),
            Command::Export(args) => export::run(args),
            Command::Cbt(args) => cbt::run(args),
            Command::Resize(args) => resize::run(args),
            Command::Check(args) => check::run(args),
            Command::Top(args) => top::run(args),
            Command::Compact(args) => compact::run(args),
            Command::Meta(args) => meta::run(args),
            Command::Completions(args) => completions::run(args),
            Command::Man(args) => man::run(args),
            Command::ThawGuard(args) => freeze::guard(args),
            Command::Keeper(args) => daemon_entry::keeper(args),
            Command::Standby(args) => daemon_entry::standby(args),
            Command::Daemon(args) => daemon_entry::daemon(args),
        }
    }
}

/// The program: parses `args` (the program's name first), runs the command, says what went wrong on stderr.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A limit of a file's size (`ulimit -f`) is an errno of the write, EFBIG, and not the end of the process. A handler that
    // only notes it, and not SIG_IGN, which the programs that we run would inherit. Without it: as before.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(usage) => {
            // Help and version go to stdout with status 0.
            let status = ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2));
            return match out::usage(&usage) {
                Ok(()) => status,
                Err(e) => failed(&e),
            };
        }
    };
    // Before anything is read or changed.
    let usable = if cli.command.answers() { out::usable() } else { Ok(()) };
    let usable = usable.and_then(|()| mounts::refuse_others(paths(&args), false));
    match usable.map_err(Into::into).and_then(|()| cli.command.run()) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Status(status)) => status,
        Ok(Outcome::Damaged) => ExitCode::from(Kind::Damaged.exit_status()),
        Err(error) => failed(&error),
    }
}

/// The words of a command line that may be paths: each, and what stands behind a =.
fn paths(args: &[OsString]) -> impl Iterator<Item = PathBuf> {
    let value = |word: &OsString| {
        let at = word.as_bytes().iter().position(|byte| *byte == b'=')?;
        Some(OsStr::from_bytes(&word.as_bytes()[at + 1..]).into())
    };
    args.iter().skip(1).flat_map(move |word| [Some(PathBuf::from(word)), value(word)].into_iter().flatten())
}

/// Says on stderr what went wrong; the exit status.
fn failed(error: &anyhow::Error) -> ExitCode {
    // eprintln! would panic where stderr is closed.
    let text = format!("{error:#}");
    let lines: Vec<String> = text.lines().map(out::printable).collect();
    let _ = writeln!(std::io::stderr(), "ploopfs: {}", lines.join("\n"));
    let kind = error.downcast_ref::<Error>().map(Error::kind);
    ExitCode::from(kind.map_or(1, Kind::exit_status))
}
