//! Any bytes as a request of the kernel: as an entry of a ring, and as a message of /dev/fuse.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ploopfs::fuse::uring::wire::{Operation, Parts, decode, forgets, split, weight};

/// Where a ring's entry has its parts: 40 bytes of header, 128 of the operation, then the payload.
const HEADER: usize = 40;
const OPERATION: usize = 128;

pub fn uring_wire(data: &[u8]) {
    let (header, rest) = data.split_at(HEADER.min(data.len()));
    let (operation, payload) = rest.split_at(OPERATION.min(rest.len()));
    judge(Parts { header, operation, payload });
    if let Ok(parts) = split(data) {
        judge(parts);
    }
    // The same with a length that fits, so that a fuzzer need not find it.
    if data.len() >= HEADER {
        let mut message = data.to_vec();
        message[..4].copy_from_slice(&(data.len() as u32).to_ne_bytes());
        judge(split(&message).expect("a header, and the length fits"));
    }
}

fn is_name(name: &OsStr) -> bool {
    !name.is_empty() && !name.as_bytes().contains(&0)
}

/// What is read out of a request lies inside of it, and agrees with what it was said to weigh.
fn judge(parts: Parts<'_>) {
    let weight = weight(parts);
    let Ok(request) = decode(parts) else { return };
    match request.operation {
        Operation::Lookup { name }
        | Operation::ChangeName { name }
        | Operation::RemoveFolder { name }
        | Operation::Create { name, .. }
        | Operation::Unlink { name }
        | Operation::GetXattr { name, .. } => {
            assert!(is_name(name) && name.len() < parts.payload.len());
        }
        Operation::Rename { name, new_name, .. } => {
            assert!(is_name(name) && is_name(new_name));
            assert!(name.len() + new_name.len() + 2 <= parts.payload.len());
        }
        Operation::Read { size, .. } => assert_eq!((weight.bytes, weight.writes), (size, None)),
        Operation::Write { handle, data, .. } => {
            assert_eq!((weight.bytes as usize, weight.writes), (data.len(), Some(handle)));
            assert!(data.len() <= parts.payload.len());
        }
        Operation::Forgets { list } => {
            assert_eq!(forgets(list).count() * 16, list.len());
            assert!(list.len() <= parts.payload.len());
        }
        _ => assert_eq!(weight.bytes, 0),
    }
}
