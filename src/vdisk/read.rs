//! A read pio: shared lock, look-up, read.

use super::Image;
use super::bat::cache::Lookup;
use super::bat::page::Place;
use super::locks::LockMode;
use super::pio::Pio;
use crate::error::{Error, Kind};

/// Runs a read pio; it holds no lock. May block on the host: for runners only.
pub(super) fn run(pio: Pio) {
    pio.with_lock(LockMode::Shared, locked);
}

fn locked(mut pio: Pio) {
    let image = pio.image.clone();
    let stack = image.stack();
    let place = match stack.place(pio.cluster) {
        Lookup::Miss => return pio.run_with_page(),
        Lookup::Found(place) => place,
    };
    let (cluster, start) = (pio.cluster, pio.start);
    let buf = pio.make_room();
    let result = match place {
        Place::None => {
            buf.fill(0);
            Ok(())
        }
        Place::Damaged => Err(image.damaged_entry(cluster)),
        Place::At { level, position } => image.read_level(&stack, level, position + start, buf),
    };
    if result.is_ok() {
        image.count_read(buf.len());
    }
    pio.finish(result);
}

impl Image {
    /// The error for a BAT entry that cannot be.
    pub(super) fn damaged_entry(&self, cluster: u64) -> Error {
        let context = format!("the BAT entry of cluster {cluster} is damaged; run `ploopfs check`");
        Error::at(Kind::Damaged, self.path(), context)
    }
}
