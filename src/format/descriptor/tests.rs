//! What is read, what is written, and what each step does to the tree.

use super::*;

const EXAMPLE: &str = r#"<?xml version="1.0"?>
<Virtuozzo_disk_image>
  <Disk_Parameters>
    <Disk_size>20971520</Disk_size>
    <Cylinders>40960</Cylinders><Heads>16</Heads><Sectors>32</Sectors><Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start><End>20971520</End><Blocksize>2048</Blocksize>
      <Image><GUID>{0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10}</GUID><Type>Compressed</Type><File>root.hds</File></Image>
      <Image><GUID>{5FBAABE3-6958-40ff-92a7-860e329aab41}</GUID><Type>Compressed</Type>
             <File>root.hds.{77e0f6c4-2f51-4a9e-8f0b-0b9b6a1d3c22}</File></Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot><GUID>{0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10}</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>
    <Shot><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><ParentGUID>{0F3C2A58-6c1b-4a0e-9a43-1d6b5f6d7a10}</ParentGUID></Shot>
  </Snapshots>
</Virtuozzo_disk_image>
"#;

fn guid(n: u32) -> Guid {
    Guid::parse(&format!("{n:08x}-0000-4000-8000-000000000000")).expect("well formed")
}

fn read(text: &str) -> Descriptor {
    Descriptor::parse(text.as_bytes()).expect(text)
}

fn refused(text: &str) -> String {
    Descriptor::parse(text.as_bytes()).expect_err(text).to_string()
}

/// base <- 1 <- 2 <- top, files "f0" (base, snapshot 1) up to "f2".
fn three() -> Descriptor {
    let mut descriptor = Descriptor::new(2048, 2048, "f0", false);
    descriptor.add_snapshot(guid(1), "f1").expect("fresh");
    descriptor.add_snapshot(guid(2), "f2").expect("fresh");
    descriptor
}

/// The same after a rewrite, and everything that must hold holds.
#[track_caller]
fn sound(descriptor: &Descriptor) {
    let again = Descriptor::parse(&descriptor.to_xml()).expect("what we write is accepted");
    assert_eq!((&again.deltas, &again.shots), (&descriptor.deltas, &descriptor.shots));
    assert_eq!((again.top, again.disk_sectors), (descriptor.top, descriptor.disk_sectors));
}

#[test]
fn the_example_of_the_format_page_is_read_whatever_the_case_of_its_guids() {
    let read = read(EXAMPLE);
    assert_eq!((read.disk_sectors, read.cluster_sectors), (20_971_520, 2048));
    assert_eq!(read.top, Guid::TOP);
    let snapshot = Guid::parse("0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10").expect("well formed");
    assert_eq!(read.chain(read.top).expect("a chain"), [snapshot, Guid::TOP]);
    assert_eq!(read.delta(snapshot).map(|d| &*d.file), Some("root.hds"));
    sound(&read);
}

#[test]
fn a_descriptor_of_parallels_desktop_keeps_what_we_do_not_understand() {
    let text = EXAMPLE
        .replace("<Virtuozzo_disk_image>", "<Parallels_disk_image Version=\"1.0\"><!-- mine -->")
        .replace("</Virtuozzo_disk_image>", "<Later a='1'>x</Later></Parallels_disk_image>")
        .replace(
            "</Disk_Parameters>",
            "<Miscellaneous><A>1</A></Miscellaneous><Uuid>{u}</Uuid></Disk_Parameters>",
        )
        .replace("</Storage>", "<Cache q=\"w\"/></Storage>")
        .replace("<File>root.hds</File>", "<File>root.hds</File><Note>n</Note>")
        .replace("<Shot><GUID>{0f", "<Shot s='2'><Name>before &amp; after</Name><GUID>{0f");
    let mut read = read(&text);
    read.add_snapshot(guid(7), "new").expect("fresh");
    let written = String::from_utf8(read.to_xml()).expect("text");
    for part in [
        "<Parallels_disk_image Version=\"1.0\">",
        "<!-- mine -->",
        "<Later a='1'>x</Later>",
        "<A>1</A>",
        "<Uuid>{u}</Uuid>",
        "<Cache q=\"w\"/>",
        "<Note>n</Note>",
        "<Shot s='2'>",
        "<Name>before &amp; after</Name>",
    ] {
        assert!(written.contains(part), "{part} is missing in {written}");
    }
    // ploop takes what follows the first Image for an image.
    assert!(written.find("<Cache") < written.find("<Image>"), "{written}");
    assert!(written.find("<Blocksize") < written.find("<Image>"), "{written}");
    assert!(written.find("<TopGUID") < written.find("<Shot"), "{written}");
    sound(&read);
}

#[test]
fn numbers_are_read_as_c_reads_them() {
    let with = |text: &str| EXAMPLE.replace("<Blocksize>2048<", &format!("<Blocksize>{text}<"));
    assert_eq!(read(&with("0x800")).cluster_sectors, 2048);
    assert_eq!(read(&with(" 04000\n")).cluster_sectors, 2048);
    for bad in ["", "-1", "+5", "0", "0x", "2048k", "99999999999999999999", "4186128"] {
        assert!(refused(&with(bad)).starts_with("Blocksize"), "{bad}");
    }
}

#[test]
fn an_old_single_image_descriptor_without_shots_or_top_is_completed() {
    let old = |guid: &str| {
        format!(
            "<x><Disk_Parameters><Disk_size>8</Disk_size></Disk_Parameters><StorageData><Storage>\
             <Blocksize>63</Blocksize><Image><GUID>{guid}</GUID><File>a</File></Image></Storage></StorageData>\
             <Snapshots/></x>"
        )
    };
    let top = read(&old("{5fbaabe3-6958-40ff-92a7-860e329aab41}"));
    assert_eq!(top.chain(Guid::TOP).expect("a chain"), [Guid::TOP]);
    let other = read(&old(&guid(3).to_string()));
    assert_eq!(other.top, guid(3));
    sound(&other);
    let no_top = EXAMPLE.replace("<TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>", "");
    assert_eq!(read(&no_top).top, Guid::TOP);
}

#[test]
fn crash_markers_are_read_and_written_back() {
    for marker in Marker::ALL {
        let mut tree = three();
        tree.set_marker(guid(1), Some(marker)).expect("it is there");
        let again = Descriptor::parse(&tree.to_xml()).expect("ours");
        assert_eq!(again.shot(guid(1)).and_then(|shot| shot.marker), Some(marker));
        assert_eq!(again.shot(guid(2)).and_then(|shot| shot.marker), None);
    }
    three().set_marker(Guid::TOP, Some(Marker::Temporary)).expect_err("the top");
}

/// FAULTS 8: Parallels' encrypted disks, and those with padding, were served as plain ones.
#[test]
fn a_field_that_changes_what_the_bytes_mean_keeps_the_disk_from_being_served() {
    let with = |more: &str| EXAMPLE.replace("</Disk_Parameters>", &format!("{more}</Disk_Parameters>"));
    let zero = Guid::NONE.to_string();
    for (harmless, encrypted) in [
        (
            format!("<Engine>{zero}</Engine><Data></Data><Salt/>"),
            "<Engine>{12345678-1234-1234-1234-123456789abc}</Engine>",
        ),
        (String::new(), "<KeyId>vault</KeyId>"),
        (format!("<Engine> {zero}\n</Engine>"), "<Data>AAAA</Data>"),
        ("<Later><Deep/></Later>".into(), "<Later><Deep>1</Deep></Later>"),
    ] {
        assert_eq!(
            read(&with(&format!("<Encryption>{harmless}</Encryption>"))).refusal(),
            None,
            "{harmless}"
        );
        let secret = read(&with(&format!("<Encryption>{encrypted}</Encryption>")));
        assert!(secret.refusal().expect(encrypted).contains("is encrypted"), "{encrypted}");
        // A rewrite keeps it.
        let again = read(&String::from_utf8(secret.written().expect("sound")).expect("text"));
        assert!(again.refusal().is_some(), "{encrypted}");
    }
    for (from, to) in [
        ("<Padding>0<", "<Padding>1<"),
        ("<Start>0<", "<Start>2048<"),
        ("<Padding>", "<LogicSectorSize>4096</LogicSectorSize><Padding>"),
        ("</Sectors>", "</Sectors><Padding>0</Padding><Padding>1</Padding>"),
    ] {
        assert!(read(&EXAMPLE.replace(from, to)).refusal().is_some(), "{to}");
    }
    assert_eq!(read(&with("<LogicSectorSize>512</LogicSectorSize>")).refusal(), None);
    assert_eq!(read(EXAMPLE).refusal(), None);
}

/// FAULTS 9: the name came out of the descriptor as another one, or not at all, and the disk did not open any more.
#[test]
fn a_name_that_would_be_read_back_as_another_is_not_written() {
    for name in [" lead", "trail ", "\ttab", "new\n", "\u{1}ctl", "a\u{b}b", "\u{a0}wide"] {
        Descriptor::new(2048, 2048, name, false).written().expect_err(name);
    }
    for name in ["in the middle", "a&b<c>.hds", "\u{e9}\u{4e2d}.hds", "a\rb", "\"quoted\"", "]]>"] {
        Descriptor::new(2048, 2048, name, false).written().expect(name);
    }
}

#[test]
fn a_volume_is_recognised_and_not_checked() {
    let volume = EXAMPLE
        .replace("<Storage>", "<Volume><Parent>../p</Parent></Volume><Storage>")
        .replace("<ParentGUID>{0F3C", "<ParentGUID>{1111");
    assert!(read(&volume).volume);
    assert!(!read(EXAMPLE).volume);
}

#[test]
fn broken_trees_are_refused_and_the_element_is_named() {
    let cases = [
        ("<File>root.hds</File>", "<File/>", "File"),
        ("<File>root.hds</File>", "", "File"),
        ("root.hds.{77e0f6c4-2f51-4a9e-8f0b-0b9b6a1d3c22}", "root.hds", "File = root.hds"),
        ("<Type>Compressed</Type><File>", "<Type>Odd</Type><File>", "Type = Odd"),
        (
            "<Image><GUID>{0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10}",
            "<Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "GUID",
        ),
        ("<GUID>{0f3c2a58", "<GUID>{zf3c2a58", "GUID"),
        ("<ParentGUID>{0F3C2A58", "<ParentGUID>{11111111", "ParentGUID"),
        ("<TopGUID>{5f", "<TopGUID>{6f", "TopGUID"),
        (
            "<TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "<TopGUID>{0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10}",
            "ParentGUID",
        ),
        (
            "<ParentGUID>{0F3C2A58-6c1b-4a0e-9a43-1d6b5f6d7a10}</ParentGUID>",
            "<ParentGUID>{0F3C2A58-6c1b-4a0e-9a43-1d6b5f6d7a10}</ParentGUID><Temporary/>",
            "Temporary",
        ),
        (
            "<ParentGUID>{00000000-0000-0000-0000-000000000000}",
            "<ParentGUID>{0f3c2a58-6c1b-4a0e-9a43-1d6b5f6d7a10}",
            "ParentGUID",
        ),
        ("</StorageData>", "<Storage/></StorageData>", "Storage = 2"),
        ("<Disk_size>20971520</Disk_size>", "", "Disk_size"),
        ("<Disk_size>20971520", "<Disk_size>99999999999999999", "Disk_size"),
    ];
    for (from, to, named) in cases {
        let text = EXAMPLE.replace(from, to);
        assert_ne!(text, EXAMPLE, "{from}");
        let said = refused(&text);
        assert!(said.starts_with(named), "{said}, not {named}");
    }
    for gone in ["Disk_Parameters", "StorageData", "Snapshots"] {
        let text = EXAMPLE.replace(&format!("{gone}>"), "Other>");
        assert!(refused(&text).starts_with(gone), "{gone}");
    }
}

#[test]
fn too_many_images_and_too_long_chains_are_refused() {
    let mut tall = Descriptor::new(8, 8, "f0", false);
    for n in 1..MAX_CHAIN as u32 {
        tall.add_snapshot(guid(n), &format!("f{n}")).expect("below the limit");
    }
    sound(&tall);
    let before = tall.clone();
    tall.add_snapshot(guid(9999), "more").expect_err("above the limit");
    tall.switch(guid(5), "other").expect("a short chain");
    assert_eq!(before.chain(Guid::TOP).expect("a chain").len(), MAX_CHAIN);
    let image = "<Image><GUID>{0}</GUID><File>f</File></Image>";
    assert!(
        refused(&EXAMPLE.replace("</Storage>", &format!("{}</Storage>", image.repeat(5000))))
            .contains("4096")
    );
}

#[test]
fn a_snapshot_gets_the_old_tops_file_and_the_new_top_lies_on_it() {
    let tree = three();
    assert_eq!(tree.chain(Guid::TOP).expect("a chain"), [guid(1), guid(2), Guid::TOP]);
    let files: Vec<_> =
        [guid(1), guid(2), Guid::TOP].map(|g| tree.delta(g).expect("there").file.clone()).into();
    assert_eq!(files, ["f0", "f1", "f2"]);
    assert_eq!(tree.children(guid(1)), [guid(2)]);
    sound(&tree);
    let mut same = tree.clone();
    for (taken, file) in [(guid(1), "x"), (Guid::TOP, "x"), (Guid::NONE, "x"), (guid(5), "f1")] {
        same.add_snapshot(taken, file).expect_err("taken");
    }
    assert_eq!(same, tree);
}

#[test]
fn an_old_random_top_becomes_the_constant_with_the_next_snapshot() {
    let text = EXAMPLE.replace("5fbaabe3", "12345678").replace("5FBAABE3", "12345678");
    let mut old = read(&text);
    assert_ne!(old.top, Guid::TOP);
    old.add_snapshot(guid(1), "new").expect("fresh");
    assert_eq!(old.top, Guid::TOP);
    sound(&old);
}

#[test]
fn a_merge_keeps_the_childs_guid_and_the_surviving_file() {
    for (survivor, gone) in [("f0", "f1"), ("f1", "f0")] {
        let mut tree = three();
        assert_eq!(tree.remove_merged(guid(1), guid(2), survivor).expect("an only child"), gone);
        assert_eq!(tree.chain(Guid::TOP).expect("a chain"), [guid(2), Guid::TOP]);
        assert_eq!(tree.delta(guid(2)).map(|d| &*d.file), Some(survivor));
        sound(&tree);
    }
    let mut tree = three();
    tree.remove_merged(guid(1), Guid::TOP, "f0").expect_err("not its child");
    tree.remove_merged(guid(1), guid(2), "f2").expect_err("a third file");
    tree.remove_merged(guid(8), guid(2), "f1").expect_err("not there");
    assert_eq!(tree, three());
}

#[test]
fn a_merge_up_out_of_a_raw_base_leaves_no_plain_type_behind() {
    let mut raw = Descriptor::new(8, 8, "f0", true);
    raw.add_snapshot(guid(1), "f1").expect("fresh");
    raw.add_snapshot(guid(2), "f2").expect("fresh");
    assert!(raw.deltas.iter().all(|delta| delta.plain), "ploop writes Plain on all");
    let mut down = raw.clone();
    down.remove_merged(guid(1), guid(2), "f0").expect("down");
    assert!(down.deltas.iter().all(|delta| delta.plain));
    raw.remove_merged(guid(1), guid(2), "f1").expect("up");
    assert!(!raw.deltas.iter().any(|delta| delta.plain));
    sound(&raw);
}

#[test]
fn a_switch_drops_the_old_top_and_branches_the_tree() {
    let mut tree = three();
    assert_eq!(tree.switch(guid(1), "f9").expect("a snapshot").file, "f2");
    assert_eq!(tree.chain(Guid::TOP).expect("a chain"), [guid(1), Guid::TOP]);
    assert_eq!(tree.children(guid(1)).len(), 2);
    sound(&tree);
    let before = tree.clone();
    tree.switch(Guid::TOP, "x").expect_err("the top");
    tree.switch(guid(1), "f0").expect_err("a file in use");
    tree.switch(guid(8), "x").expect_err("not there");
    tree.remove_leaf(guid(1)).expect_err("has children");
    tree.remove_leaf(Guid::TOP).expect_err("the top");
    tree.remove_merged(guid(1), guid(2), "f0").expect_err("two children");
    assert_eq!(tree, before);
    assert_eq!(tree.remove_leaf(guid(2)).expect("a leaf").file, "f1");
    sound(&tree);
}

#[test]
fn files_change_places_but_never_a_raw_base() {
    let mut tree = three();
    tree.swap_files(guid(2), Guid::TOP).expect("both there");
    assert_eq!(tree.delta(guid(2)).map(|d| &*d.file), Some("f2"));
    assert_eq!(tree.delta(Guid::TOP).map(|d| &*d.file), Some("f1"));
    sound(&tree);
    let mut raw = Descriptor::new(8, 8, "f0", true);
    raw.add_snapshot(guid(1), "f1").expect("fresh");
    raw.swap_files(guid(1), Guid::TOP).expect_err("raw");
}

#[test]
fn a_clone_has_one_chain_and_what_was_deleted_stays_deleted() {
    let mut tree = three();
    tree.switch(guid(1), "f9").expect("a snapshot");
    tree.set_marker(guid(1), Some(Marker::Temporary)).expect("there");
    assert_eq!(tree.unfinished(), [], "two children");
    let clone = tree.clone_of(guid(2), "new").expect("a snapshot");
    assert_eq!(clone.chain(Guid::TOP).expect("a chain"), [guid(1), guid(2), Guid::TOP]);
    assert_eq!(clone.deltas.len(), 3);
    assert_eq!(clone.unfinished(), [guid(1)]);
    sound(&clone);
    tree.clone_of(Guid::TOP, "x").expect_err("the live top");
}

#[test]
fn a_delta_takes_another_file_but_not_a_taken_one() {
    let mut tree = three();
    tree.set_file(guid(1), "other").expect("free");
    tree.set_file(guid(1), "other").expect("its own");
    tree.set_file(guid(1), "f1").expect_err("taken");
    sound(&tree);
}

#[test]
fn a_new_size_changes_every_place_that_has_it() {
    let mut tree = read(EXAMPLE);
    tree.set_size(41_943_040);
    let written = String::from_utf8(tree.to_xml()).expect("text");
    assert!(written.contains("<Disk_size>41943040<") && written.contains("<End>41943040<"), "{written}");
    assert!(written.contains("<Cylinders>81920<"), "{written}");
    sound(&tree);
}

#[test]
fn rubbish_never_panics() {
    let mut text = EXAMPLE.as_bytes().to_vec();
    for at in 0..text.len() {
        let kept = text[at];
        for byte in [b'<', b'>', b'&', 0, 0xff, b'{'] {
            text[at] = byte;
            let _ = Descriptor::parse(&text).map(|d| d.to_xml());
        }
        text[at] = kept;
        let _ = Descriptor::parse(&text[..at]);
    }
}
