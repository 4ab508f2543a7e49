//! SEEK_DATA and SEEK_HOLE on the guest's disk: what the BAT maps, refined by the host file's own holes.

use super::Image;
use super::bat::cache::{Loading, Lookup};
use super::bat::page::Place;
use crate::error::{Error, Result};
use crate::sync::Arc;

impl Image {
    /// First byte at or after `offset` that may hold data; None when only holes follow. Blocks: not for runners
    /// or transport threads.
    pub fn seek_data(self: &Arc<Self>, offset: u64) -> Result<Option<u64>> {
        let mut at = offset;
        while at < self.size() {
            let (begin, place) = self.place_at(at)?;
            let end = (begin + self.cluster).min(self.size());
            match place {
                Place::None => {}
                Place::Damaged => return Ok(Some(at)),
                Place::At { level, position } => {
                    let level = &self.levels[usize::from(level)];
                    let from = position + (at - begin);
                    let found = level.file.seek_data(from).map_err(|e| self.seek_error(&e))?;
                    if let Some(data) = found.map(|d| begin + (d - position)).filter(|d| *d < end) {
                        return Ok(Some(data));
                    }
                }
            }
            at = end;
        }
        Ok(None)
    }

    /// First byte at or after `offset` that lies in a hole; the disk's end counts as one. Blocks.
    pub fn seek_hole(self: &Arc<Self>, offset: u64) -> Result<u64> {
        let mut at = offset;
        while at < self.size() {
            let (begin, place) = self.place_at(at)?;
            let end = (begin + self.cluster).min(self.size());
            match place {
                Place::None => return Ok(at),
                Place::Damaged => {}
                Place::At { level, position } => {
                    let level = &self.levels[usize::from(level)];
                    let from = position + (at - begin);
                    let hole = level.file.seek_hole(from).map_err(|e| self.seek_error(&e))?;
                    let hole = begin + (hole - position);
                    if hole < end {
                        return Ok(hole);
                    }
                }
            }
            at = end;
        }
        Ok(self.size())
    }

    fn seek_error(&self, e: &std::io::Error) -> Error {
        Error::io(e, &self.top().path, "cannot find holes")
    }

    /// First byte of the guest cluster that holds `at`, and its place; loads the BAT page when needed.
    fn place_at(self: &Arc<Self>, at: u64) -> Result<(u64, Place)> {
        let cluster = at / self.cluster;
        loop {
            if let Lookup::Found(place) = self.place(cluster) {
                return Ok((cluster * self.cluster, place));
            }
            let Some(bat) = &self.bat else { unreachable!("raw clusters are always found") };
            let (tell, loaded) = std::sync::mpsc::channel();
            let job = |tell: std::sync::mpsc::Sender<()>| -> super::runner::Job {
                Box::new(move || {
                    let _ = tell.send(());
                })
            };
            match bat.load_or_queue(cluster, tell, job) {
                Loading::Loaded(_) => {}
                Loading::Mine(_) => {
                    let (waiting, result) = bat.load(cluster, &self.levels);
                    waiting.into_iter().for_each(|job| self.submit(job));
                    result?;
                }
                // The loader is a runner or another seek; neither waits for us.
                Loading::Queued => {
                    let _ = loaded.recv();
                }
            }
        }
    }
}
