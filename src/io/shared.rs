//! Memory that outlives the process that writes it: a sealed memfd, which one process makes and another maps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Makes `len` bytes of zeroes, which no holder of the descriptor can make shorter or longer: a mapping that lost its file
/// would end the process that reads there (SIGBUS).
pub fn make(name: &str, len: u64) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, len)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory)
}

/// Such memory, mapped. It stays out of core files.
#[derive(Debug)]
pub struct Shared {
    base: NonNull<AtomicU64>,
    /// In bytes.
    len: usize,
}

// SAFETY: the memory is plain bytes, owned by the mapping, and reached as atomics only.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps all of `memory`, which [`make`] has made: what is not sealed is refused.
    pub fn map(memory: impl AsFd) -> io::Result<Shared> {
        let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if !rustix::fs::fcntl_get_seals(&memory)?.contains(SealFlags::SHRINK) {
            return Err(odd("the memory is not sealed"));
        }
        let len = usize::try_from(rustix::fs::fstat(&memory)?.st_size).map_err(|_| odd("no length"))?;
        if len == 0 {
            return Err(odd("the memory is empty"));
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at a place that the kernel chooses, of a file that cannot become shorter.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &memory, 0)? };
        // SAFETY: the mapping just made; a refusal costs a larger core file.
        let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast()).ok_or_else(|| odd("no address"))?;
        Ok(Shared { base, len })
    }

    /// All of it, as whole words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, has `len` bytes, lives as long as `self`, and is reached as atomics only, by
        // this process and by every other that maps it through here.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len / size_of::<AtomicU64>()) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_mapping_writes_another_reads_after_its_end() {
        let memory = make("test", 8192).expect("a memfd");
        let first = Shared::map(&memory).expect("mapped");
        first.words()[1023].store(7, Ordering::Release);
        drop(first);
        let second = Shared::map(&memory).expect("mapped");
        assert_eq!((second.words().len(), second.words()[1023].load(Ordering::Acquire)), (1024, 7));
    }

    #[test]
    fn memory_that_can_be_cut_is_not_mapped() {
        let memory = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&memory, 4096).expect("a length");
        assert_eq!(Shared::map(&memory).expect_err("refused").kind(), io::ErrorKind::InvalidData);
        rustix::fs::ftruncate(make("test", 4096).expect("a memfd"), 0).expect_err("it is sealed");
    }
}
