//! Loading a BAT page on behalf of the pios that missed it: one loads, the others go on when it is there.

use super::cache::Loading;
use super::page::Page;
use crate::error::{Error, Kind, Result};
use crate::format::bat::{PAGE_BYTES, cluster_of};
use crate::format::header::HEADER_BYTES;
use crate::io::file::read_full;
use crate::sync::Arc;
use crate::vdisk::Image;
use crate::vdisk::stack::Stack;

impl Image {
    /// Runs `then(token)` once the page of `cluster` is loaded; loads it here when no other thread does, and calls
    /// `fail(token)` when that fails. The token holds no cluster lock. For runners.
    pub(in crate::vdisk) fn with_page<T: Send + 'static>(
        self: &Arc<Self>,
        cluster: u64,
        token: T,
        then: fn(T),
        fail: fn(T, Result<()>),
    ) {
        self.with_page_of(&self.stack(), cluster, token, then, fail);
    }

    /// The same, of this stack.
    pub(in crate::vdisk) fn with_page_of<T: Send + 'static>(
        self: &Arc<Self>,
        stack: &Stack,
        cluster: u64,
        token: T,
        then: fn(T),
        fail: fn(T, Result<()>),
    ) {
        let Some(bat) = &stack.bat else { return then(token) };
        match bat.load_or_queue(cluster, token, |token| Box::new(move || then(token))) {
            Loading::Queued => {}
            Loading::Loaded(token) => then(token),
            Loading::Mine(token) => {
                let (waiting, loaded) = bat.load(cluster, |page| read_page(page, stack));
                waiting.into_iter().for_each(|job| self.submit(job));
                match loaded {
                    Ok(()) => then(token),
                    Err(e) => fail(token, Err(e)),
                }
            }
        }
    }
}

/// Reads a page's entries from every level's file, the top's first, and lays those of the others under them. Blocks on the
/// host.
pub(in crate::vdisk) fn read_page(number: u64, stack: &Stack) -> Result<Box<Page>> {
    let mut page = Box::<Page>::default();
    let mut bytes = [0; PAGE_BYTES as usize];
    for (index, level) in stack.top_down() {
        let start = number * PAGE_BYTES;
        let io = |e: &std::io::Error| Error::io_at(e, &level.path, "cannot read the BAT", start);
        let first = if number == 0 { HEADER_BYTES as usize / 4 } else { 0 };
        // Always after the entries: a merge makes the file longer and enters the cluster then. The length from before would
        // call it damaged.
        let len = || level.file.len().map_err(|e| io(&e));
        let Some(of) = level.geometry() else {
            let cluster = cluster_of(number, first).expect("the first slot behind the header is a cluster's");
            page.merge_raw_under(index, (cluster, first), stack.geometry.cluster, len()?);
            continue;
        };
        let end = of.bat_end().min(start + PAGE_BYTES);
        if end <= start {
            continue; // A lower BAT may be shorter.
        }
        let want = (end - start) as usize;
        let got = read_full(&*level.file, &mut bytes[..want], start).map_err(|e| io(&e))?;
        if got < want {
            let context = format!("the file ends at byte {} inside the BAT", start + got as u64);
            return Err(Error::at(Kind::Damaged, &level.path, context));
        }
        page.merge_under(index, number, &bytes[..want], first..want / 4, &of, len()?);
    }
    Ok(page)
}
