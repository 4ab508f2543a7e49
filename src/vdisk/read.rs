//! A read pio: shared lock, look-up, read.

use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::locks::Mode;
use super::pio::{Body, Pio};
use super::{Image, Layout};
use crate::error::{Error, Kind, Result};
use crate::io::file::read_full;

/// Runs a read pio; it holds no lock. May block on the host: for runners only.
pub fn run(pio: Pio) {
    pio.with_lock(Mode::Shared, locked);
}

fn locked(mut pio: Pio) {
    let place = match pio.image.place(pio.cluster) {
        Lookup::Miss => return pio.run_with_page(),
        Lookup::Found(place) => place,
    };
    let image = pio.image.clone();
    let Body::Read(buf) = &mut pio.body else { unreachable!("only reads come here") };
    let result = match place {
        Place::None => {
            buf.fill(0);
            Ok(())
        }
        Place::Damaged => Err(image.damaged_entry(pio.cluster)),
        Place::At { level, position } => image.read_level(level, position + pio.start, buf),
    };
    if result.is_ok() {
        image.count_read(buf.len());
    }
    pio.finish(result);
}

impl Image {
    /// Reads all of `buf` from a level's file. What lies behind the end of a raw file is zero; a delta that ends
    /// inside a mapped cluster is an error, never a loop (K2).
    fn read_level(&self, level: u16, position: u64, buf: &mut [u8]) -> Result<()> {
        let level = &self.levels[usize::from(level)];
        let got = read_full(&*level.file, buf, position)
            .map_err(|e| Error::io(&e, &level.path, format!("cannot read at byte {position}")))?;
        if got == buf.len() {
            return Ok(());
        }
        match level.layout {
            Layout::Raw => {
                buf[got..].fill(0);
                Ok(())
            }
            Layout::Ploop(_) => {
                let end = position + got as u64;
                let context = format!("the file ends at byte {end}, inside a cluster that the BAT maps");
                Err(Error::at(Kind::Io, &level.path, context))
            }
        }
    }

    /// The error for a BAT entry that cannot be.
    pub(super) fn damaged_entry(&self, cluster: u64) -> Error {
        let context = format!("the BAT entry of cluster {cluster} is damaged; run `ploopfs check`");
        Error::at(Kind::Damaged, &self.top().path, context)
    }
}
