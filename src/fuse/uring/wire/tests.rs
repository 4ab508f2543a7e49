//! Requests, whole and broken.

use zerocopy::IntoBytes;

use super::*;

fn message(opcode: u32, rest: &[u8]) -> Vec<u8> {
    let len = (HEADER + rest.len()) as u32;
    let (unique, nodeid, uid, gid, pid) = (7, 2, 1000, 100, 42);
    let h = InHeader { len, opcode, unique, nodeid, uid, gid, pid, total_extlen: 0, padding: 0 };
    [h.as_bytes(), rest].concat()
}

fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn read(message: &[u8]) -> Result<Operation<'_>, Malformed> {
    decode(split(message)?).map(|request| request.operation)
}

#[test]
fn structures_are_as_long_as_the_kernels() {
    assert_eq!((HEADER, size_of::<SetAttrIn>(), size_of::<ReadIn>()), (40, 88, 40));
    assert_eq!((size_of::<FallocateIn>(), size_of::<LseekIn>(), size_of::<OpenIn>()), (32, 24, 8));
    assert_eq!((size_of::<CopyIn>(), size_of::<CreateIn>(), size_of::<Rename2In>()), (56, 16, 16));
}

#[test]
fn a_write_carries_its_data_and_its_flags() {
    let mut rest = words(&[9, 4096, 3, 0]);
    rest.extend(words(&[libc::O_DSYNC as u64]));
    rest.extend(b"abcd");
    let message = message(WRITE, &rest);
    let wanted = Operation::Write { handle: 9, offset: 4096, data: b"abc", flags: libc::O_DSYNC };
    assert_eq!(read(&message), Ok(wanted));
    let parts = split(&message).expect("whole");
    assert_eq!(weight(parts), Weight { bytes: 3, writes: Some(9) });
    assert_eq!(decode(parts).expect("whole").caller, Caller { uid: 1000, gid: 100, pid: 42, request: 7 });
}

#[test]
fn a_write_that_claims_more_than_there_is_is_malformed() {
    let mut rest = words(&[9, 4096, 5, 0, 0]);
    rest.extend(b"abcd");
    assert_eq!(read(&message(WRITE, &rest)), Err(Malformed));
}

#[test]
fn a_name_ends_at_its_nul_and_must_have_one() {
    assert_eq!(read(&message(LOOKUP, b"vm1\0x\0")), Ok(Operation::Lookup { name: OsStr::new("vm1") }));
    assert_eq!(read(&message(LOOKUP, b"vm1")), Err(Malformed));
    assert_eq!(read(&message(LOOKUP, b"\0")), Err(Malformed));
}

#[test]
fn a_rename_has_two_names_and_the_newer_form_flags() {
    let names = b"old\0new\0";
    let (name, new_name) = (OsStr::new("old"), OsStr::new("new"));
    let rename = [&words(&[1])[..], names].concat();
    let wanted = Operation::Rename { name, parent: 1, new_name, flags: 0 };
    assert_eq!(read(&message(RENAME, &rename)), Ok(wanted));
    let rename = [&words(&[1, 2])[..], names].concat();
    let wanted = Operation::Rename { name, parent: 1, new_name, flags: 2 };
    assert_eq!(read(&message(RENAME2, &rename)), Ok(wanted));
    assert_eq!(read(&message(RENAME, &[&words(&[1])[..], b"old\0new"].concat())), Err(Malformed));
}

#[test]
fn both_forms_of_copy_file_range_name_two_handles() {
    let copy = words(&[5, 4096, 77, 6, 8192, 1 << 40, 0]);
    for (opcode, wide) in [(COPY_FILE_RANGE, false), (COPY_FILE_RANGE_64, true)] {
        let wanted = Operation::CopyRange { from: (5, 4096), to: (6, 8192), len: 1 << 40, wide };
        assert_eq!(read(&message(opcode, &copy)), Ok(wanted));
    }
}

#[test]
fn forgotten_look_ups_are_counted_and_a_count_that_lies_is_malformed() {
    let list = words(&[2, 5, 1, 6, 3]);
    let message = message(BATCH_FORGET, &list);
    let Ok(Operation::Forgets { list }) = read(&message) else { panic!("two pairs") };
    assert_eq!(forgets(list).collect::<Vec<_>>(), [(5, 1), (6, 3)]);
    let lie = words(&[u64::from(u32::MAX), 5, 1]);
    assert_eq!(read(&self::message(BATCH_FORGET, &lie)), Err(Malformed));
}

#[test]
fn only_what_setattr_asks_for_is_changed() {
    let mut rest = vec![0xff; size_of::<SetAttrIn>()];
    rest[..4].copy_from_slice(&FATTR_SIZE.to_ne_bytes());
    let Ok(Operation::SetAttr(change)) = read(&message(SETATTR, &rest)) else { panic!("a setattr") };
    assert_eq!(change, SetAttr { size: Some(u64::MAX), ..SetAttr::default() });
}

#[test]
fn a_message_cut_anywhere_is_malformed_or_something_else_and_never_a_panic() {
    for opcode in 0..64 {
        let whole = message(opcode, &[1; 200]);
        for end in 0..whole.len() {
            let cut = &whole[..end];
            assert_eq!(split(cut).err(), Some(Malformed), "the length does not fit");
            let (header, rest) = cut.split_at(end.min(HEADER));
            let _ = decode(Parts { header, operation: rest, payload: rest });
        }
    }
}
