//! The harness of the live tests: guards that clean up whatever happens, commands with a time limit, stamped
//! blocks that tell which write they came from.
#![allow(dead_code)] // every test file is a program of its own and uses its part of this
#![allow(unused_imports)] // likewise

pub mod churn;
pub mod daemons;
pub mod damage;
mod folder;
mod holder;
mod host;
pub mod lanes;
pub mod machine;
mod mount;
pub mod namespace;
mod run;
mod stamp;
mod traced;
mod v1;

pub use folder::Folder;
pub use holder::{Holder, qemu_holds, qemu_reads};
pub use host::{Guest, HostFs, Loop, loops_in, memory_dir, temp_dir};
pub use mount::Mount;
pub use run::{Finished, Run, ok, sh, signal, until};
pub use stamp::{Durable, Shape, Verdict, Workload, punch};
pub use traced::{Traced, kill_if_there};
pub use v1::make_v1;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Skips the test (with its reason printed) where something it needs is missing: `require!("loop", "xfs")`.
#[macro_export]
macro_rules! require {
    ($($need:literal),+) => {{
        fn here() {}
        if !$crate::common::have(std::any::type_name_of_val(&here), &[$($need),+]) {
            return;
        }
    }};
}

/// True when all `needs` are there. What PLOOPFS_REQUIRE lists must be there: then a lack is a failure.
pub fn have(marker: &str, needs: &[&str]) -> bool {
    let test = marker.trim_end_matches("::here");
    let demanded = std::env::var("PLOOPFS_REQUIRE").unwrap_or_default();
    for need in needs {
        if let Some(reason) = missing(need) {
            assert!(
                !demanded.split(',').any(|name| name.trim() == *need),
                "{test} needs `{need}`, which PLOOPFS_REQUIRE demands: {reason}"
            );
            println!("SKIPPED {test}: {reason}");
            return false;
        }
    }
    true
}

/// Why `need` is not there, or None.
fn missing(need: &str) -> Option<String> {
    let programs: &[&str] = match need {
        "fuse" => {
            let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
            return open.err().map(|error| format!("/dev/fuse cannot be opened: {error}"));
        }
        "uring" => return ploopfs::fuse::session::Transport::best().1.map(|why| why.to_string()),
        "passthrough" => {
            if !rustix::process::geteuid().is_root() {
                return Some("FUSE passthrough needs root".to_owned());
            }
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            let release = release.trim();
            let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
            let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            let old = version < (6, 9);
            return old.then(|| format!("Linux {release} has no FUSE passthrough (6.9 has)"));
        }
        "overlay" => {
            let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
            let has = known.lines().any(|line| line.ends_with("\toverlay"));
            return (!has).then(|| "this kernel has no overlay file system".to_owned());
        }
        "loop" => {
            if !rustix::process::geteuid().is_root() {
                return Some("loop devices need root".to_owned());
            }
            let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control");
            return open.err().map(|error| format!("/dev/loop-control cannot be opened: {error}"));
        }
        "landlock" => {
            use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
            let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
            let refused = strict.handle_access(AccessFs::Refer).err();
            return refused.map(|error| format!("this kernel has no Landlock that would do: {error}"));
        }
        "qemu" => &["qemu-img", "qemu-io", "qemu-nbd"],
        "package" => &["cargo-deb", "dpkg", "dpkg-deb", "man"],
        "guest" => &["qemu-system-x86_64", "busybox", "mke2fs", "modprobe", "ldd", "gzip"],
        "ploop" => &["ploop"],
        "fio" => &["fio"],
        "fsx" => &["fsx"],
        "fincore" => &["fincore"],
        "strace" => &["strace"],
        "xfs" => &["mkfs.xfs", "xfs_repair", "xfs_io"],
        "btrfs" => &["mkfs.btrfs", "btrfs"],
        "ext4" => &["mkfs.ext4", "e2fsck"],
        other => return Some(format!("the test asks for `{other}`, which the harness does not know")),
    };
    if let Some(program) = programs.iter().find(|program| find_program(program).is_none()) {
        return Some(format!("{program} is not installed"));
    }
    if need == "guest" && machine::kernel().is_none() {
        return Some("no kernel with modules in /boot (package linux-image-cloud-amd64)".to_owned());
    }
    if matches!(need, "xfs" | "btrfs") {
        // A kernel without the file system fails only at mount; say so before a test has begun.
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if !known.lines().any(|line| line.split_whitespace().last() == Some(need))
            && !Run::new("modprobe").arg(need).run().success()
        {
            return Some(format!("this kernel has no {need}"));
        }
    }
    None
}

/// Where a program lies: PATH, the places root's PATH may miss, and cargo's own.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let home = std::env::var("HOME").unwrap_or_default();
    let cargo = std::env::var("CARGO_HOME").unwrap_or_else(|_| format!("{home}/.cargo"));
    let mut places: Vec<PathBuf> = path.split(':').map(PathBuf::from).collect();
    places.extend(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    places.push(Path::new(&cargo).join("bin"));
    places.into_iter().map(|place| place.join(name)).find(|file| file.is_file())
}

/// One heavy test at a time in this process; a test that failed does not stop the others.
pub fn heavy() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number from the environment, else `default`.
pub fn number_from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// True where PLOOPFS_LONG asks for the long form of the crash tests.
pub fn long() -> bool {
    number_from_env("PLOOPFS_LONG", 0) != 0
}

/// xorshift64*: the same numbers for the same seed on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// `seed` may be anything.
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(len + 8);
        while data.len() < len {
            data.extend_from_slice(&self.next().to_le_bytes());
        }
        data.truncate(len);
        data
    }
}

/// Space that a file takes on its host, in bytes.
pub fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).expect("stat of a file of the test").blocks() * 512
}

/// Reads exactly `len` bytes at `offset` of an open file.
pub fn read_at(file: &std::fs::File, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    file.read_exact_at(&mut data, offset)?;
    Ok(data)
}

/// The in-use mark of a ploop file says "open".
pub fn marked_in_use(file: &Path) -> bool {
    let file = std::fs::File::open(file).expect("the image file");
    read_at(&file, 44, 4).expect("the header") == 0x746F_6E59_u32.to_le_bytes()
}

/// A path as text; test paths are ASCII.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are ASCII")
}
