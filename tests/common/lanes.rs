//! Submitters that own disjoint, interleaved slices of a disk (so that clusters are shared between them, and every
//! sector has one expected value), and check every read against their part of a plain vector.

use std::sync::Arc;

use ploopfs::format::header::{CLOSED, FLAG_EMPTY, Header, Version};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::Image;
use proptest::prelude::*;

pub const SECTOR: u64 = 512;

/// An empty image in memory. `late` clusters are put between the BAT and the first data block.
pub fn empty_image(version: Version, cluster_sectors: u32, disk_sectors: u64, late: u64) -> Arc<MemoryFile> {
    let cluster = u64::from(cluster_sectors) * SECTOR;
    let entries = disk_sectors.div_ceil(u64::from(cluster_sectors)) as u32;
    let first = (64 + 4 * u64::from(entries)).next_multiple_of(cluster) + late * cluster;
    let header = Header {
        version,
        heads: 16,
        cylinders: 1,
        cluster_sectors,
        entries,
        disk_sectors,
        in_use: CLOSED,
        first_block: (first / SECTOR) as u32,
        flags: FLAG_EMPTY,
        extension: 0,
    };
    let file = MemoryFile::from_bytes(&header.encode());
    file.set_len(first).expect("memory grows");
    Arc::new(file)
}

#[derive(Clone, Debug)]
pub enum Op {
    Write { at: u64, sectors: u64, byte: u8, durable: bool },
    Read { at: u64, sectors: u64 },
    Discard { at: u64, sectors: u64 },
    Flush,
    Freeze,
}

pub fn op(disk: u64) -> impl Strategy<Value = Op> {
    let at = 0..disk;
    // Mostly within a cluster or two, sometimes over many.
    let sectors = prop_oneof![4 => 1..16u64, 2 => 16..600u64, 1 => 600..3000u64];
    prop_oneof![
        5 => (at.clone(), sectors.clone(), any::<u8>(), prop::bool::weighted(0.1))
            .prop_map(|(at, sectors, byte, durable)| Op::Write { at, sectors, byte, durable }),
        4 => (at.clone(), sectors.clone()).prop_map(|(at, sectors)| Op::Read { at, sectors }),
        2 => (at, sectors).prop_map(|(at, sectors)| Op::Discard { at, sectors }),
        1 => Just(Op::Flush),
        1 => Just(Op::Freeze),
    ]
}

pub const LANES: u64 = 3;
/// Sectors that one submitter owns in a row; then comes the next one's stripe.
const STRIPE: u64 = 40;

/// The pieces of `[at, at + sectors)` that belong to `lane`, in bytes.
pub fn owned(lane: u64, at: u64, sectors: u64, disk: u64) -> Vec<(u64, u64)> {
    let end = (at + sectors).min(disk);
    let mut pieces = Vec::new();
    let mut s = at;
    while s < end {
        let stop = ((s / STRIPE + 1) * STRIPE).min(end);
        if (s / STRIPE) % LANES == lane {
            pieces.push((s * SECTOR, (stop - s) * SECTOR));
        }
        s = stop;
    }
    pieces
}

/// Data that differs from sector to sector; byte 0 stands for zeroes (zero detection).
fn pattern(offset: u64, len: u64, byte: u8) -> Vec<u8> {
    let sector = |i: u64| if byte == 0 { 0 } else { byte ^ ((offset + i) / SECTOR) as u8 | 1 };
    (0..len).map(sector).collect()
}

pub fn apply(image: &Arc<Image>, model: &mut [u8], lane: u64, op: &Op, disk: u64) {
    match *op {
        Op::Write { at, sectors, byte, durable } => {
            for (offset, len) in owned(lane, at, sectors, disk) {
                let data = pattern(offset, len, byte);
                // Both ways in, as a transport uses them.
                match if durable { None } else { image.try_write(offset, &data) } {
                    Some(done) => done.expect("inline write"),
                    None => {
                        let (tell, answer) = std::sync::mpsc::channel();
                        let reply = Box::new(move |r| tell.send(r).expect("waits"));
                        image.write(offset, data.clone().into(), durable, reply);
                        answer.recv().expect("answers").expect("queued write");
                    }
                }
                model[offset as usize..(offset + len) as usize].copy_from_slice(&data);
            }
        }
        Op::Read { at, sectors } => {
            for (offset, len) in owned(lane, at, sectors, disk) {
                check(image, model, offset, len);
            }
        }
        Op::Discard { at, sectors } => {
            for (offset, len) in owned(lane, at, sectors, disk) {
                image.discard_at(offset, len).expect("discard");
                model[offset as usize..(offset + len) as usize].fill(0);
            }
        }
        Op::Flush => image.flush_now().expect("flush"),
        Op::Freeze if lane == 0 => {
            image.freeze();
            image.thaw();
        }
        Op::Freeze => {}
    }
}

pub fn check(image: &Arc<Image>, model: &[u8], offset: u64, len: u64) {
    let mut buf = vec![0xAA; len as usize];
    let data = match image.try_read(offset, &mut buf) {
        Some(n) => {
            assert_eq!(n.expect("inline read"), len as usize);
            buf
        }
        None => image.read_at(offset, len as usize).expect("queued read").to_vec(),
    };
    let expected = &model[offset as usize..(offset + len) as usize];
    if let Some(at) = (0..data.len()).find(|i| data[*i] != expected[*i]) {
        panic!("byte {} is {:#x}, expected {:#x}", offset + at as u64, data[at], expected[at]);
    }
}
