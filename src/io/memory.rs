//! A delta file in memory, for tests and models: sparse in 4 KiB blocks, so that punching gives space back.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard};

use super::file::{HostFile, HostSpace, HostStatus, HostTraits};
use crate::sync::plain::lock;

const BLOCK: u64 = 4096;

/// A sparse file in memory.
#[derive(Debug, Default)]
pub struct MemoryFile {
    /// Protects blocks and length. A leaf.
    inner: Mutex<Inner>,
}

#[derive(Debug, Default, Clone)]
struct Inner {
    len: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl MemoryFile {
    /// An empty file.
    pub fn new() -> MemoryFile {
        MemoryFile::default()
    }

    /// A file with this content.
    pub fn from_bytes(bytes: &[u8]) -> MemoryFile {
        let file = MemoryFile::new();
        file.lock().write(bytes, 0);
        file
    }

    /// The whole content.
    pub fn to_bytes(&self) -> Vec<u8> {
        let inner = self.lock();
        let mut bytes = vec![0; inner.len as usize];
        inner.read(&mut bytes, 0);
        bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Inner {
    fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let n = (buf.len() as u64).min(self.len.saturating_sub(offset)) as usize;
        let mut done = 0;
        while done < n {
            let at = offset + done as u64;
            let (block, inside) = (at / BLOCK, (at % BLOCK) as usize);
            let step = (n - done).min(BLOCK as usize - inside);
            match self.blocks.get(&block) {
                Some(b) => buf[done..done + step].copy_from_slice(&b[inside..inside + step]),
                None => buf[done..done + step].fill(0),
            }
            done += step;
        }
        n
    }

    fn write(&mut self, data: &[u8], offset: u64) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (block, inside) = (at / BLOCK, (at % BLOCK) as usize);
            let step = (data.len() - done).min(BLOCK as usize - inside);
            let b = self.blocks.entry(block).or_insert_with(|| vec![0; BLOCK as usize].into());
            b[inside..inside + step].copy_from_slice(&data[done..done + step]);
            done += step;
        }
        self.len = self.len.max(offset + data.len() as u64);
    }

    fn punch(&mut self, offset: u64, end: u64) {
        let mut at = offset;
        while at < end {
            let (block, inside) = (at / BLOCK, at % BLOCK);
            let step = (end - at).min(BLOCK - inside);
            if step == BLOCK {
                self.blocks.remove(&block);
            } else if let Some(b) = self.blocks.get_mut(&block) {
                b[inside as usize..(inside + step) as usize].fill(0);
            }
            at += step;
        }
    }
}

impl HostFile for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.lock().read(buf, offset))
    }
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.lock().write(data, offset);
        Ok(data.len())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if len < inner.len {
            let end = inner.len.next_multiple_of(BLOCK);
            inner.punch(len, end);
        }
        inner.len = len;
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.lock();
        let end = (offset + len).min(inner.len.next_multiple_of(BLOCK));
        inner.punch(offset, end);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let inner = self.lock();
        let next = inner.blocks.range(offset / BLOCK..).next();
        Ok(next.map(|(b, _)| (b * BLOCK).max(offset)).filter(|at| *at < inner.len))
    }
    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        let inner = self.lock();
        let mut block = offset / BLOCK;
        if !inner.blocks.contains_key(&block) {
            return Ok(offset.min(inner.len));
        }
        while inner.blocks.contains_key(&block) {
            block += 1;
        }
        Ok((block * BLOCK).min(inner.len))
    }
    fn status(&self) -> io::Result<HostStatus> {
        let inner = self.lock();
        let blocks = inner.blocks.len() as u64 * (BLOCK / 512);
        Ok(HostStatus { len: inner.len, blocks, mode: 0o600, links: 1, ..HostStatus::default() })
    }
    fn space(&self) -> io::Result<HostSpace> {
        Ok(HostSpace {
            total: 1 << 50,
            free: 1 << 49,
            available: 1 << 49,
            files: 1 << 20,
            files_free: 1 << 19,
        })
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
    fn traits(&self) -> HostTraits {
        HostTraits { nowait_reads: false, never_blocks: true, device: 0 }
    }
}
