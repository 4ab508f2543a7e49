//! A delta some BAT pages of which are in the ledger, and not in its file: the host was full, or a sync failed, when they
//! were to be written (`rescue`). All that reads the file reads these pages instead: the BAT cache, the scan, the level
//! above. One that is written whole is in the file from then on.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::format::bat::PAGE_BYTES;
use crate::format::header::HEADER_BYTES;
use crate::io::file::{HostFile, HostSpace, HostStatus, HostTraits, passed_on};
use crate::sync::{Arc, Mutex, lock};

/// The file and its pages.
#[derive(Debug)]
pub(super) struct Overlaid {
    file: Arc<dyn HostFile>,
    /// Where the BAT ends: what lies behind is the file's alone.
    end: u64,
    /// By number. Protects that a read sees a page or the file, where it was just written. A leaf; held while the file's BAT
    /// is read and written.
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl Overlaid {
    /// `file`, whose BAT ends at `end`, under `pages`.
    pub(super) fn new(file: Arc<dyn HostFile>, end: u64, pages: &[(u64, Vec<u8>)]) -> Overlaid {
        Overlaid { file, end, pages: Mutex::new(pages.iter().cloned().collect()) }
    }

    /// The bytes of the file that a page has: the header is none of them.
    fn place(&self, number: u64) -> Range<u64> {
        let start = number * PAGE_BYTES;
        start.max(HEADER_BYTES)..(start + PAGE_BYTES).min(self.end)
    }

    fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if offset >= self.end {
            return read(buf);
        }
        let pages = lock(&self.pages);
        let got = read(&mut *buf)?;
        for (number, page) in pages.range(offset / PAGE_BYTES..=(offset + got as u64) / PAGE_BYTES) {
            let place = self.place(*number);
            let (from, to) = (place.start.max(offset), place.end.min(offset + got as u64));
            if from < to {
                let first = (from - number * PAGE_BYTES) as usize;
                let len = (to - from) as usize;
                buf[(from - offset) as usize..][..len].copy_from_slice(&page[first..first + len]);
            }
        }
        Ok(got)
    }
}

impl HostFile for Overlaid {
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
        fn traits(&self) -> HostTraits;
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read(buf, offset, |buf| self.file.read_at(buf, offset))
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read(buf, offset, |buf| self.file.read_at_nowait(buf, offset))
    }

    fn queued_read(&self, offset: u64, len: usize) -> Option<BorrowedFd<'_>> {
        self.file.queued_read(offset, len).filter(|_| offset >= self.end)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        if offset >= self.end {
            return self.file.write_at(data, offset);
        }
        let mut pages = lock(&self.pages);
        let written = self.file.write_at(data, offset)?;
        pages.retain(|number, _| {
            let place = self.place(*number);
            place.start < offset || place.end > offset + written as u64
        });
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memory::MemoryFile;

    #[test]
    fn a_page_is_read_in_the_place_of_the_files_until_it_is_written_whole() {
        let file = Arc::new(MemoryFile::from_bytes(&[1; 20_000]));
        let overlaid = Overlaid::new(file.clone(), 8000, &[(0, vec![7; 4096]), (1, vec![8; 4096])]);
        let all = || {
            let mut found = vec![0; 20_000];
            overlaid.read_at(&mut found, 0).expect("read");
            [0, 63, 64, 4095, 4096, 7999, 8000].map(|at| found[at])
        };
        assert_eq!(all(), [1, 1, 7, 7, 8, 8, 1]);
        let mut piece = [0; 10];
        overlaid.read_at(&mut piece, 4090).expect("read");
        assert_eq!(piece, [7, 7, 7, 7, 7, 7, 8, 8, 8, 8]);
        overlaid.write_at(&[2; 64], 0).expect("a header");
        assert_eq!(all(), [2, 2, 7, 7, 8, 8, 1]);
        overlaid.write_at(&[3; 4096], 0).expect("a page with its header");
        assert_eq!(all(), [3, 3, 3, 3, 8, 8, 1]);
        overlaid.write_at(&[4; 3904], 4096).expect("the last page of the BAT");
        assert_eq!(all(), [3, 3, 3, 3, 4, 4, 1]);
    }
}
