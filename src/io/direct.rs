//! A host file past the host's page cache (`mount --cache direct`): what is read goes to the guest and is cached there
//! only.
//!
//! A second descriptor with O_DIRECT stands beside the ordinary one. What the host's alignment allows goes through it:
//! whole blocks, from memory that is copied into place where it lies wrong. Reads of parts of blocks read the blocks
//! around them. Writes of parts of blocks go through the page cache, where the kernel reads, changes and writes the block
//! under its own lock; two of them to one block, done here, would lose one. The kernel keeps both ways coherent: a direct
//! read writes dirty pages out first, a direct write drops the pages it passes. (Where it cannot drop one, because that
//! was dirtied again, it makes the next sync fail. That needs a mapping: on ext4, XFS and btrfs a buffered write has the
//! inode's lock alone, and a direct write shares it until the pages are dropped.)

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use zerocopy::IntoBytes;

use super::file::{HostFile, HostSpace, HostStatus, HostTraits, passed_on};
use super::pages::{AlignedPage, PAGE, grow};
use super::real::RealFile;

/// Alignment where the host does not say: the largest that disks have.
const ALIGN: usize = PAGE;
/// Most that is copied at once: a request's own limit (docs/kernel.md#init), and a block on either side.
const BOUNCE: usize = (1 << 20) + 2 * ALIGN;

thread_local! {
    /// Grows to the largest request that this thread has copied, [`BOUNCE`] at most.
    static MEMORY: RefCell<Vec<AlignedPage>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` bytes of aligned memory.
fn with_memory<T>(len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    MEMORY.with_borrow_mut(|pages| {
        grow(pages, len);
        work(&mut pages.as_mut_slice().as_mut_bytes()[..len])
    })
}

/// A file with both its descriptors.
#[derive(Debug)]
pub struct DirectFile {
    file: Arc<RealFile>,
    direct: File,
    /// Alignment of offset and length, in bytes: a power of two.
    block: u64,
    /// Alignment of memory, in bytes: a power of two, [`ALIGN`] at most.
    memory: usize,
    /// The host refused a direct request: buffered from then on.
    refused: AtomicBool,
}

impl DirectFile {
    /// Puts direct I/O around an open file. Gives the file back where its host has none, or keeps files in memory anyway.
    pub fn over(file: Arc<RealFile>) -> Result<DirectFile, Arc<RealFile>> {
        if file.traits().never_blocks {
            return Err(file);
        }
        match open(&file) {
            Ok((direct, block, memory)) => {
                Ok(DirectFile { file, direct, block, memory, refused: AtomicBool::new(false) })
            }
            Err(e) => {
                log::warn!("{}: no direct I/O on this host, cached instead: {e}", file.path().display());
                Err(file)
            }
        }
    }

    fn usable(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    fn is_whole(&self, offset: u64, len: usize) -> bool {
        len > 0 && (offset | len as u64).is_multiple_of(self.block)
    }

    fn lies_right(&self, memory: &[u8]) -> bool {
        memory.as_ptr().addr().is_multiple_of(self.memory)
    }

    /// The answer of a direct request; None: the host does not do it (ENOTBLK, or EINVAL of one that is aligned), and
    /// the page cache has to.
    fn judge(&self, result: rustix::io::Result<usize>) -> Option<io::Result<usize>> {
        match result {
            Err(e @ (Errno::NOTBLK | Errno::INVAL | Errno::OPNOTSUPP)) => {
                if !self.refused.swap(true, Ordering::Relaxed) {
                    let path = self.file.path().display();
                    log::warn!("{path}: the host refuses direct I/O ({e}); cached from now on");
                }
                None
            }
            result => Some(result.map_err(Into::into)),
        }
    }

    fn read(&self, memory: &mut [u8], offset: u64) -> Option<io::Result<usize>> {
        self.judge(retry_on_intr(|| rustix::io::pread(&self.direct, &mut *memory, offset)))
    }

    fn write(&self, memory: &[u8], offset: u64) -> Option<io::Result<usize>> {
        self.judge(retry_on_intr(|| rustix::io::pwrite(&self.direct, memory, offset)))
    }

    /// Reads the blocks around the range, and copies the range out.
    fn read_around(&self, buf: &mut [u8], offset: u64) -> Option<io::Result<usize>> {
        let first = offset & !(self.block - 1);
        let front = (offset - first) as usize;
        let len = buf.len().min((1 << 20) - front);
        let whole = (front + len).next_multiple_of(self.block as usize);
        with_memory(whole, |memory| {
            let read = self.read(memory, first)?;
            Some(read.map(|n| {
                let n = n.saturating_sub(front).min(len);
                buf[..n].copy_from_slice(&memory[front..front + n]);
                n
            }))
        })
    }
}

/// The second descriptor, and the alignments of offsets and of memory. Through /proc: the name may be another file's by
/// now.
fn open(file: &RealFile) -> rustix::io::Result<(File, u64, usize)> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let (mut block, mut memory) = (ALIGN as u32, ALIGN as u32);
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        (block, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align.max(1));
    }
    let fits = |align: u32| align.is_power_of_two() && align as usize <= ALIGN;
    if !fits(block) || !fits(memory) {
        return Err(Errno::OPNOTSUPP);
    }
    let access = if file.writable() { OFlags::RDWR } else { OFlags::RDONLY };
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let direct = retry_on_intr(|| {
        rustix::fs::openat(CWD, &*path, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
    })?;
    Ok((File::from(direct), block.into(), memory as usize))
}

impl HostFile for DirectFile {
    passed_on! {
        fn len(&self) -> io::Result<u64>;
        fn set_len(&self, len: u64) -> io::Result<()>;
        fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
        fn sync_data(&self) -> io::Result<()>;
        fn sync_all(&self) -> io::Result<()>;
        fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;
        fn seek_hole(&self, offset: u64) -> io::Result<u64>;
        fn status(&self) -> io::Result<HostStatus>;
        fn space(&self) -> io::Result<HostSpace>;
        fn drop_cache(&self) -> io::Result<()>;
        fn descriptor(&self) -> Option<BorrowedFd<'_>>;
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.usable() && !buf.is_empty() && i64::try_from(offset).is_ok() {
            let read = if self.is_whole(offset, buf.len()) && self.lies_right(buf) {
                self.read(buf, offset)
            } else {
                self.read_around(buf, offset)
            };
            if let Some(read) = read {
                return read;
            }
        }
        self.file.read_at(buf, offset)
    }

    fn read_at_nowait(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(Errno::AGAIN.into())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        if self.usable() && self.is_whole(offset, data.len()) {
            let written = if self.lies_right(data) {
                self.write(data, offset)
            } else {
                let len = data.len().min(BOUNCE & !(ALIGN - 1));
                with_memory(len, |memory| {
                    memory.copy_from_slice(&data[..len]);
                    self.write(memory, offset)
                })
            };
            match written {
                // A host that takes nothing and names no reason would make the caller try for ever.
                Some(Ok(0)) => return Err(Errno::IO.into()),
                Some(written) => return written,
                None => {}
            }
        }
        self.file.write_at(data, offset)
    }

    fn traits(&self) -> HostTraits {
        // Nothing is cached, so no read ends at once.
        HostTraits { nowait_reads: false, ..self.file.traits() }
    }

    fn queued_read(&self, offset: u64, len: usize) -> Option<BorrowedFd<'_>> {
        (self.usable() && self.is_whole(offset, len)).then(|| self.direct.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::file::{read_full, write_full};
    use crate::io::real::Access;

    /// In /var/tmp: /tmp may be a tmpfs, which has nothing to be direct to.
    fn file() -> Option<(tempfile::TempDir, DirectFile)> {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let path = dir.path().join("delta.hds");
        File::create(&path).expect("created");
        let file = Arc::new(RealFile::open(&path, Access::ReadWrite).expect("opens"));
        match DirectFile::over(file) {
            Ok(file) => Some((dir, file)),
            Err(_) => {
                println!("SKIPPED direct I/O: /var/tmp has none");
                None
            }
        }
    }

    #[test]
    fn any_offset_length_and_memory_reads_what_was_written() {
        let Some((_dir, file)) = file() else { return };
        let mut model = vec![0u8; 256 << 10];
        write_full(&file, &model, 0).expect("written");
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut place = vec![0u8; 72 << 10];
        for turn in 0..400 {
            let unit = [1, 512, 4096][turn % 3];
            let at = next(model.len() / unit) * unit;
            let len = (1 + next(16)) * unit;
            let len = len.min(model.len() - at);
            // Memory that lies anywhere.
            let lie = next(4096);
            let part = &mut place[lie..lie + len];
            if turn % 2 == 0 {
                part.fill(turn as u8);
                write_full(&file, part, at as u64).expect("written");
                model[at..at + len].copy_from_slice(part);
            } else {
                assert_eq!(read_full(&file, part, at as u64).expect("read"), len);
                assert!(*part == model[at..at + len], "{len} bytes at {at}");
            }
        }
        assert!(file.usable(), "the host refused");
        let mut end = [1u8; 1000];
        assert_eq!(read_full(&file, &mut end, (256 << 10) - 10).expect("read"), 10);
        assert_eq!(file.read_at(&mut end, 1 << 20).expect("read"), 0);
    }

    #[test]
    fn aligned_reads_leave_nothing_in_the_page_cache() {
        let Some((_dir, file)) = file() else { return };
        write_full(&file, &vec![7u8; 1 << 20], 0).expect("written");
        file.sync_all().expect("synced");
        file.drop_cache().expect("dropped");
        let mut buf = vec![0u8; 1 << 20];
        assert_eq!(read_full(&file, &mut buf, 0).expect("read"), 1 << 20);
        assert!(buf.iter().all(|&byte| byte == 7));
        let cached = file.file.read_at_nowait(&mut buf[..4096], 512 << 10);
        assert_eq!(cached.expect_err("not cached").raw_os_error(), Some(libc::EAGAIN));
    }

    /// Were a page dirtied while a direct write passes it, the kernel would report EIO at the next sync, and that ends an
    /// image.
    #[test]
    fn parts_of_blocks_beside_direct_writes_fail_no_sync_and_lose_nothing() {
        let Some((_dir, file)) = file() else { return };
        write_full(&file, &vec![0u8; 256 << 10], 0).expect("written");
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // As the zeroing of a BAT that grows: from the middle of a block, over many.
            let parts = scope.spawn(|| {
                let mut turns = 0u8;
                while !end.load(Ordering::Relaxed) {
                    turns = turns.wrapping_add(1);
                    write_full(&file, &[turns; (64 << 10) - 100], 4096 + 100).expect("buffered");
                }
                turns
            });
            // As rounds: the block before it, whole, and the block behind.
            let whole = scope.spawn(|| {
                let mut turns = 0u8;
                while !end.load(Ordering::Relaxed) {
                    turns = turns.wrapping_add(1);
                    write_full(&file, &[turns; 4096], 0).expect("direct");
                    write_full(&file, &[turns; 4096], 68 << 10).expect("direct");
                }
                turns
            });
            for _ in 0..50 {
                file.sync_data().expect("no sync fails");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            end.store(true, Ordering::Relaxed);
            let (parts, whole) = (parts.join().expect("no panic"), whole.join().expect("no panic"));
            let mut found = vec![0u8; 72 << 10];
            read_full(&file, &mut found, 0).expect("read");
            assert!(found[..4096].iter().chain(&found[68 << 10..]).all(|byte| *byte == whole));
            assert!(found[4096..4196].iter().all(|byte| *byte == 0));
            assert!(found[4196..68 << 10].iter().all(|byte| *byte == parts));
        });
        file.sync_all().expect("no sync fails");
        assert!(file.usable(), "the host refused");
    }

    #[test]
    fn a_file_in_memory_is_left_alone() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let path = dir.path().join("f");
        File::create(&path).expect("created");
        let file = Arc::new(RealFile::open(&path, Access::ReadWrite).expect("opens"));
        assert!(DirectFile::over(file).is_err());
    }
}
