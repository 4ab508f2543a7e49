//! `DiskDescriptor.xml` as text and as a struct (docs/format.md#descriptor). Pure: no I/O. What is not understood is
//! kept through a rewrite.

mod check;
mod guid;
mod meaning;
mod tree;
mod xml;

use std::fmt;

pub use guid::Guid;
pub use xml::MAX_BYTES;
use xml::{Element, XmlNode};

use crate::format::header::MAX_CLUSTER_SECTORS;

/// More deltas than any tool makes (ploop stops at 126 in a chain); bounds the work that a hostile file can cause.
const MAX_DELTAS: usize = 4096;
/// Longest chain that is opened, in deltas; the kernel target stops at 253.
pub const MAX_CHAIN: usize = 250;

/// What is wrong with a descriptor, or with what was to be done to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadXml {
    /// The element.
    pub element: String,
    /// Its value; may be empty.
    pub value: String,
    /// What is wrong.
    pub reason: String,
}

impl BadXml {
    fn new(element: impl Into<String>, value: impl ToString, reason: impl Into<String>) -> BadXml {
        BadXml { element: element.into(), value: value.to_string(), reason: reason.into() }
    }
}

impl fmt::Display for BadXml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadXml { element, value, reason } = self;
        // A hostile value must not fill the log.
        let value: String = value.chars().take(120).collect();
        match value.is_empty() {
            true => write!(f, "{element}: {reason}"),
            false => write!(f, "{element} = {value}: {reason}"),
        }
    }
}

impl std::error::Error for BadXml {}

/// Where a crashed operation stood (docs/format.md#markers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// Deleted; is merged as soon as it has one child.
    Temporary,
    /// A merge into the base: what the top has, too, is missing in the base.
    TemporaryZero,
    /// The same, one step on: the two file names are swapped.
    TemporaryZeroSwap,
}

impl Marker {
    const ALL: [Marker; 3] = [Marker::Temporary, Marker::TemporaryZero, Marker::TemporaryZeroSwap];

    /// The element's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Marker::Temporary => "Temporary",
            Marker::TemporaryZero => "TemporaryZero",
            Marker::TemporaryZeroSwap => "TemporaryZeroSwap",
        }
    }
}

/// An `Image`: the file of one delta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Its identity; the same as its [`Shot`]'s.
    pub guid: Guid,
    /// The path as in the XML: relative to the descriptor's folder, or absolute.
    pub file: String,
    /// Type is "Plain": the base is raw. Says nothing of a delta above the base.
    pub plain: bool,
    /// What others put into the element.
    kept: Kept,
}

/// A `Shot`: the place of one delta in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Its identity; the same as its [`Delta`]'s.
    pub guid: Guid,
    /// The delta directly below; [`Guid::NONE`] for a base.
    pub parent: Guid,
    /// What a crash left to do.
    pub marker: Option<Marker>,
    /// What others put into the element.
    kept: Kept,
}

/// The part of an element that is not understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    attributes: String,
    nodes: Vec<XmlNode>,
}

impl Kept {
    fn of(element: &Element, understood: &[&str]) -> Kept {
        let is_kept = |node: &&XmlNode| match node {
            XmlNode::Element(element) => !understood.contains(&element.name.as_str()),
            XmlNode::Text(_) => false,
            XmlNode::Verbatim(_) => true,
        };
        let nodes = element.children.iter().filter(is_kept).cloned().collect();
        Kept { attributes: element.attributes.clone(), nodes }
    }

    fn element(&self, name: &str, understood: Vec<Element>) -> XmlNode {
        let mut element = Element::of(name, understood);
        element.attributes.clone_from(&self.attributes);
        element.children.extend(self.nodes.iter().cloned());
        XmlNode::Element(element)
    }
}

/// A layered image's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Disk size in sectors.
    pub disk_sectors: u64,
    /// Cluster size in sectors.
    pub cluster_sectors: u32,
    /// "Preallocated" was written; only remembered.
    pub preallocated: bool,
    /// The files, in the order of the XML.
    pub deltas: Vec<Delta>,
    /// The tree, in the order of the XML.
    pub shots: Vec<Shot>,
    /// The live delta.
    pub top: Guid,
    /// Part of a ploop "volume": its chain goes on in another folder. Nothing of the tree was checked.
    pub volume: bool,
    /// Why its bytes are not what they look like, so that it must not be served: [`meaning`].
    foreign: Option<String>,
    /// The document as it was read.
    document: Vec<XmlNode>,
}

impl Descriptor {
    /// Reads a descriptor of ploop, Virtuozzo or Parallels Desktop.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, BadXml> {
        let document = xml::parse(bytes)?;
        let root = root(&document).ok_or_else(|| BadXml::new("document", "", "has no root element"))?;
        let parameters = required(root, "Disk_Parameters")?;
        let data = required(root, "StorageData")?;
        let storage = required(data, "Storage")?;
        let snapshots = required(root, "Snapshots")?;
        let parts = data.elements().filter(|e| e.name == "Storage").count();
        if parts > 1 {
            return Err(BadXml::new("Storage", parts, "a disk split over several storages is not supported"));
        }
        let cluster = number(required(storage, "Blocksize")?)?;
        if cluster == 0 || cluster > u64::from(MAX_CLUSTER_SECTORS) {
            return Err(BadXml::new(
                "Blocksize",
                cluster,
                format!("the cluster must be 1 to {MAX_CLUSTER_SECTORS} sectors"),
            ));
        }
        let preallocated = match storage.child("Preallocated") {
            Some(element) => number(element)? != 0,
            None => false,
        };
        let disk_sectors = number(required(parameters, "Disk_size")?)?;
        if disk_sectors > i64::MAX as u64 / 512 {
            return Err(BadXml::new("Disk_size", disk_sectors, "larger than any file can be"));
        }
        let bounded = |parent: &Element, name: &str| {
            let count = parent.elements().filter(|e| e.name == name).count();
            match count > MAX_DELTAS {
                true => Err(BadXml::new(name, count, format!("more than {MAX_DELTAS}"))),
                false => Ok(()),
            }
        };
        bounded(storage, "Image")?;
        bounded(snapshots, "Shot")?;
        let top = snapshots.child("TopGUID").map(guid_in).transpose()?;
        let mut read = Descriptor {
            disk_sectors,
            cluster_sectors: cluster as u32, // Compared with a 32-bit limit above.
            preallocated,
            deltas: storage.elements().filter(|e| e.name == "Image").map(delta).collect::<Result<_, _>>()?,
            shots: snapshots.elements().filter(|e| e.name == "Shot").map(shot).collect::<Result<_, _>>()?,
            top: top.unwrap_or(Guid::TOP),
            volume: data.child("Volume").is_some(),
            foreign: meaning::foreign(parameters, storage)?,
            document: Vec::new(),
        };
        read.document = document;
        if !read.volume {
            read.complete(top.is_some());
            read.check()?;
        }
        Ok(read)
    }

    /// A disk of one delta; both sizes in sectors. `plain`: the file is raw.
    pub fn new(disk_sectors: u64, cluster_sectors: u32, base_file: &str, plain: bool) -> Descriptor {
        let delta = Delta { guid: Guid::TOP, file: base_file.into(), plain, kept: Kept::default() };
        let shot = Shot { guid: Guid::TOP, parent: Guid::NONE, marker: None, kept: Kept::default() };
        Descriptor {
            disk_sectors,
            cluster_sectors,
            preallocated: false,
            deltas: vec![delta],
            shots: vec![shot],
            top: Guid::TOP,
            volume: false,
            foreign: None,
            document: vec![XmlNode::Element(Element::of("Virtuozzo_disk_image", Vec::new()))],
        }
    }

    /// Why this disk must not be opened, in a form that follows its name; None: its bytes are what they look like.
    pub fn refusal(&self) -> Option<&str> {
        let volume =
            "is part of a ploop volume, whose chain goes on in another folder; this is not supported";
        if self.volume { Some(volume) } else { self.foreign.as_deref() }
    }

    /// The text, and what reads it again finds the same: a leading blank of a file's name would be trimmed, and a control
    /// character has no place in XML at all.
    pub fn written(&self) -> Result<Vec<u8>, BadXml> {
        let xml = self.to_xml();
        let again = Descriptor::parse(&xml)?;
        for (delta, read) in self.deltas.iter().zip(&again.deltas) {
            if delta.file != read.file {
                return Err(BadXml::new(
                    "File",
                    format!("{:?}", delta.file),
                    "a descriptor cannot hold this name",
                ));
            }
        }
        let tree =
            |d: &Descriptor| (d.disk_sectors, d.cluster_sectors, d.top, d.shots.clone(), d.deltas.clone());
        if tree(self) != tree(&again) {
            return Err(BadXml::new("document", "", "would be read back as something else"));
        }
        Ok(xml)
    }

    /// The text, in the order that ploop needs: after the first `Image` it takes every element for an image, and
    /// after the first `Shot` likewise.
    pub fn to_xml(&self) -> Vec<u8> {
        let mut document = self.document.clone();
        for node in &mut document {
            if let XmlNode::Element(root) = node {
                self.update(root);
            }
        }
        xml::write(&document)
    }

    fn update(&self, root: &mut Element) {
        // A missing part is put in front of what is there, so: last part first.
        let snapshots = root.child_mut("Snapshots");
        snapshots.children.retain(|node| !is_named(node, &["TopGUID", "Shot"]));
        snapshots.children.insert(0, XmlNode::Element(Element::text("TopGUID", self.top)));
        snapshots.children.extend(self.shots.iter().map(Shot::element));

        let storage = root.child_mut("StorageData").child_mut("Storage");
        storage.children.retain(|node| !is_named(node, &["Image", "Preallocated"]));
        if self.preallocated {
            storage.children.push(XmlNode::Element(Element::text("Preallocated", 1)));
        }
        storage.child_mut("Blocksize").set_content(self.cluster_sectors);
        storage.child_mut("End").set_content(self.disk_sectors);
        if storage.child("Start").is_none() {
            storage.child_mut("Start").set_content(0);
        }
        storage.children.extend(self.deltas.iter().map(Delta::element));

        let parameters = root.child_mut("Disk_Parameters");
        let written = parameters.child("Disk_size").and_then(|e| number(e).ok());
        if written != Some(self.disk_sectors) {
            // ploop's own figures for its own disks (docs/format.md#descriptor), which no reader uses.
            let (heads, sectors) = (16, 32);
            for (name, value) in [
                ("Padding", 0),
                ("Sectors", sectors),
                ("Heads", heads),
                ("Cylinders", self.disk_sectors / (heads * sectors)),
                ("Disk_size", self.disk_sectors),
            ] {
                parameters.child_mut(name).set_content(value);
            }
        }
    }
}

impl Delta {
    fn element(&self) -> XmlNode {
        let kind = if self.plain { "Plain" } else { "Compressed" };
        let parts = vec![
            Element::text("GUID", self.guid),
            Element::text("Type", kind),
            Element::text("File", &self.file),
        ];
        self.kept.element("Image", parts)
    }
}

impl Shot {
    fn element(&self) -> XmlNode {
        let mut parts = vec![Element::text("GUID", self.guid), Element::text("ParentGUID", self.parent)];
        parts.extend(self.marker.map(|marker| Element::of(marker.as_str(), Vec::new())));
        self.kept.element("Shot", parts)
    }
}

fn is_named(node: &XmlNode, names: &[&str]) -> bool {
    matches!(node, XmlNode::Element(element) if names.contains(&element.name.as_str()))
}

fn root(document: &[XmlNode]) -> Option<&Element> {
    document.iter().find_map(|node| match node {
        XmlNode::Element(element) => Some(element),
        _ => None,
    })
}

fn required<'a>(parent: &'a Element, name: &str) -> Result<&'a Element, BadXml> {
    parent.child(name).ok_or_else(|| BadXml::new(name, "", format!("is missing in {}", parent.name)))
}

/// A number as C's strtoull with base 0 reads it.
fn number(element: &Element) -> Result<u64, BadXml> {
    let text = element.content();
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text.as_str(), 10),
    };
    // from_str_radix would take a sign.
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let value = u64::from_str_radix(digits, radix).ok().filter(|_| plain);
    value.ok_or_else(|| BadXml::new(&*element.name, &text, "not a number"))
}

fn guid_in(element: &Element) -> Result<Guid, BadXml> {
    let text = element.content();
    Guid::parse(&text).ok_or_else(|| BadXml::new(&*element.name, text, "not a GUID"))
}

fn delta(element: &Element) -> Result<Delta, BadXml> {
    let plain = match element.child("Type").map(Element::content).as_deref() {
        Some("Plain") => true,
        Some("Compressed") | None => false,
        Some(other) => return Err(BadXml::new("Type", other, "neither Compressed nor Plain")),
    };
    Ok(Delta {
        guid: guid_in(required(element, "GUID")?)?,
        file: required(element, "File")?.content(),
        plain,
        kept: Kept::of(element, &["GUID", "Type", "File"]),
    })
}

fn shot(element: &Element) -> Result<Shot, BadXml> {
    let marker = Marker::ALL.into_iter().find(|marker| element.child(marker.as_str()).is_some());
    let mut understood = vec!["GUID", "ParentGUID"];
    understood.extend(Marker::ALL.map(Marker::as_str));
    Ok(Shot {
        guid: guid_in(required(element, "GUID")?)?,
        parent: guid_in(required(element, "ParentGUID")?)?,
        marker,
        kept: Kept::of(element, &understood),
    })
}

#[cfg(test)]
mod tests;
