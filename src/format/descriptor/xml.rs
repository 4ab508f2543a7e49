//! Just enough of an XML tree to change a descriptor and keep everything in it that is not understood.

use quick_xml::Reader;
use quick_xml::escape::{escape, resolve_predefined_entity};
use quick_xml::events::{BytesStart, Event};

use super::BadXml;

/// Descriptors are a few kilobytes; 1 MiB holds thousands of snapshots.
pub const MAX_BYTES: usize = 1 << 20;
/// The format needs five levels; the rest is for what others nest in it.
const MAX_DEPTH: usize = 32;

/// One part of an element's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum XmlNode {
    /// An element.
    Element(Element),
    /// Text, unescaped.
    Text(String),
    /// A comment or processing instruction, written back as it was.
    Verbatim(String),
}

/// One element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Element {
    /// Its name, prefix included.
    pub name: String,
    /// Its attributes as they were written.
    pub attributes: String,
    /// Its content; white space between elements is not kept.
    pub children: Vec<XmlNode>,
}

impl Element {
    /// An element with text.
    pub(super) fn text(name: &str, text: impl ToString) -> Element {
        Element {
            name: name.into(),
            attributes: String::new(),
            children: vec![XmlNode::Text(text.to_string())],
        }
    }

    /// An element with elements.
    pub(super) fn of(name: &str, children: Vec<Element>) -> Element {
        let children = children.into_iter().map(XmlNode::Element).collect();
        Element { name: name.into(), attributes: String::new(), children }
    }

    /// Its child elements.
    pub(super) fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            XmlNode::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The first child of that name: of duplicates the first wins.
    pub(super) fn child(&self, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.name == name)
    }

    /// The first child of that name; made, as the first of all, when there is none.
    pub(super) fn child_mut(&mut self, name: &str) -> &mut Element {
        let is_it = |node: &XmlNode| matches!(node, XmlNode::Element(element) if element.name == name);
        let at = self.children.iter().position(is_it).unwrap_or_else(|| {
            self.children.insert(0, XmlNode::Element(Element { name: name.into(), ..Element::default() }));
            0
        });
        match &mut self.children[at] {
            XmlNode::Element(element) => element,
            // Found or made above as an element.
            _ => unreachable!("the node at this place is an element"),
        }
    }

    /// Its text without the white space around it.
    pub(super) fn content(&self) -> String {
        let texts = self.children.iter().filter_map(|node| match node {
            XmlNode::Text(text) => Some(text.as_str()),
            _ => None,
        });
        texts.collect::<String>().trim().to_owned()
    }

    /// Makes `text` its whole content.
    pub(super) fn set_content(&mut self, text: impl ToString) {
        self.children = vec![XmlNode::Text(text.to_string())];
    }
}

/// A whole document: one root element, and the comments around it.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<XmlNode>, BadXml> {
    if bytes.len() > MAX_BYTES {
        return Err(BadXml::new("document", bytes.len(), "larger than 1 MiB; this is no descriptor"));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|e| BadXml::new("document", format!("byte {}", e.valid_up_to()), "not UTF-8 text"))?;
    let mut reader = Reader::from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    // The element at the bottom stands for the document.
    let mut open = vec![Element::default()];
    loop {
        let at = reader.buffer_position();
        let broken = |why: String| BadXml::new("document", format!("byte {at}"), why);
        let event = reader.read_event().map_err(|e| broken(e.to_string()))?;
        let [.., inner] = &mut open[..] else { return Err(broken("more is closed than was opened".into())) };
        match event {
            Event::Start(start) => {
                if open.len() > MAX_DEPTH {
                    return Err(broken(format!("elements are nested deeper than {MAX_DEPTH}")));
                }
                open.push(begun(&start).map_err(broken)?);
            }
            Event::Empty(start) => inner.children.push(XmlNode::Element(begun(&start).map_err(broken)?)),
            Event::End(_) => {
                // The reader compares the names; the element for the document has none and is never closed.
                let mut done = open.pop().unwrap_or_default();
                let [.., outer] = &mut open[..] else {
                    return Err(broken("more is closed than was opened".into()));
                };
                tidy(&mut done);
                outer.children.push(XmlNode::Element(done));
            }
            Event::Text(text) => add_text(inner, &text.xml10_content()).map_err(broken)?,
            Event::CData(data) => add_text(inner, &data.xml10_content()).map_err(broken)?,
            Event::GeneralRef(reference) => {
                let character = reference.resolve_char_ref().map_err(|e| broken(e.to_string()))?;
                let name = reference.into_inner();
                match (character, resolve_predefined_entity(&name)) {
                    (Some(character), _) => {
                        add_text(inner, character.encode_utf8(&mut [0; 4])).map_err(broken)?;
                    }
                    (None, Some(text)) => add_text(inner, text).map_err(broken)?,
                    (None, None) => return Err(broken(format!("the entity &{name}; is not known"))),
                }
            }
            Event::Comment(text) => inner.children.push(XmlNode::Verbatim(format!("<!--{}-->", &*text))),
            Event::PI(text) => inner.children.push(XmlNode::Verbatim(format!("<?{}?>", &*text))),
            Event::Decl(_) => {}
            Event::DocType(_) => return Err(broken("a DOCTYPE is not accepted".into())),
            Event::Eof => break,
        }
    }
    if open.len() > 1 {
        let name = open.last().map(|e| e.name.clone()).unwrap_or_default();
        return Err(BadXml::new(name, "", "is not closed; the file was cut short"));
    }
    let mut document = open.pop().unwrap_or_default();
    tidy(&mut document);
    let roots = document.elements().count();
    if roots != 1 || document.children.iter().any(|node| matches!(node, XmlNode::Text(_))) {
        return Err(BadXml::new("document", roots, "must be one element and nothing else"));
    }
    Ok(document.children)
}

/// An element as it begins. What the reader accepts and no reader would accept once it is written (no name, a stray
/// `/` behind the attributes) is refused: the next change of the descriptor would make it unreadable.
fn begun(start: &BytesStart<'_>) -> Result<Element, String> {
    let name = start.name().as_ref().to_owned();
    if !is_name(&name) {
        return Err(format!("an element cannot be called {name:?}"));
    }
    if let Some(e) = start.attributes().find_map(Result::err) {
        return Err(format!("the attributes of {name}: {e}"));
    }
    Ok(Element { name, attributes: start.attributes_raw().trim().to_owned(), children: Vec::new() })
}

/// A name as XML has them, as far as ASCII goes.
fn is_name(name: &str) -> bool {
    let begins = |c: char| c.is_ascii_alphabetic() || "_:".contains(c) || !c.is_ascii();
    let goes_on = |c: char| begins(c) || c.is_ascii_digit() || "-.".contains(c);
    name.starts_with(begins) && name.chars().all(goes_on)
}

fn add_text(element: &mut Element, text: &str) -> Result<(), String> {
    if let Some(c) = text.chars().find(|&c| c < ' ' && !"\t\n\r".contains(c)) {
        return Err(format!("the character {} has no place in XML", u32::from(c)));
    }
    match element.children.last_mut() {
        Some(XmlNode::Text(before)) => before.push_str(text),
        _ => element.children.push(XmlNode::Text(text.to_owned())),
    }
    Ok(())
}

/// Drops the white space between elements, which the writer makes anew.
fn tidy(element: &mut Element) {
    let is_blank = |node: &XmlNode| matches!(node, XmlNode::Text(text) if text.trim().is_empty());
    let only_blank = element.children.iter().all(|n| !matches!(n, XmlNode::Text(_)) || is_blank(n));
    if only_blank && element.children.iter().any(|node| !matches!(node, XmlNode::Text(_))) {
        element.children.retain(|node| !is_blank(node));
    }
}

/// The document as text.
pub(super) fn write(document: &[XmlNode]) -> Vec<u8> {
    let mut text = String::from("<?xml version=\"1.0\"?>\n");
    for node in document {
        write_node(&mut text, node, Some(0));
    }
    text.into_bytes()
}

/// `indent` is None inside mixed content, where white space would mean something.
fn write_node(out: &mut String, node: &XmlNode, indent: Option<usize>) {
    let start_of_line = |out: &mut String| (0..indent.unwrap_or(0)).for_each(|_| out.push_str("  "));
    start_of_line(out);
    match node {
        // A carriage return as it is would be read as the end of a line.
        XmlNode::Text(text) => out.push_str(&escape(text.as_str()).replace('\r', "&#13;")),
        XmlNode::Verbatim(text) => out.push_str(text),
        XmlNode::Element(element) => {
            let Element { name, attributes, children } = element;
            out.push('<');
            out.push_str(name);
            if !attributes.is_empty() {
                out.push(' ');
                out.push_str(attributes);
            }
            if children.is_empty() {
                out.push_str("/>");
            } else {
                out.push('>');
                let mixed = children.iter().any(|node| matches!(node, XmlNode::Text(_)));
                let inner = indent.filter(|_| !mixed).map(|n| n + 1);
                if inner.is_some() {
                    out.push('\n');
                }
                children.iter().for_each(|child| write_node(out, child, inner));
                if inner.is_some() {
                    start_of_line(out);
                }
                out.push_str("</");
                out.push_str(name);
                out.push('>');
            }
        }
    }
    if indent.is_some() {
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(text: &str) -> String {
        let document = parse(text.as_bytes()).expect(text);
        String::from_utf8(write(&document)).expect("text")
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_tree() {
        let text = "<?xml version='1.0' encoding=\"UTF-8\"?>\n<!-- by hand --><a x=\"1\" y='&lt;'>\n\
                    <b>1 &amp; 2 &lt;3&gt; &#65;</b><c/><!-- in -->mixed<d>x</d><e><![CDATA[<raw>]]></e></a>";
        let document = parse(text.as_bytes()).expect("well formed");
        assert_eq!(parse(&write(&document)).expect("ours"), document);
        assert!(rewritten(text).contains("<a x=\"1\" y='&lt;'>"));
        assert!(rewritten("<a><b> x </b></a>").contains("<b> x </b>"));
    }

    #[test]
    fn hostile_documents_are_refused_with_bounded_work() {
        let deep = format!("{}{}", "<a>".repeat(5000), "</a>".repeat(5000));
        let bomb = "<!DOCTYPE a [<!ENTITY b \"bb\">]><a>&b;</a>";
        let large = format!("<a>{}</a>", " ".repeat(MAX_BYTES));
        for text in
            [&deep, bomb, &large, "", "<a>", "<a></b>", "</a>", "<a/><b/>", "text", "<a>&x;</a>", "<a/>x"]
        {
            parse(text.as_bytes()).expect_err(&text[..text.len().min(40)]);
        }
        parse(b"<a>\xff</a>").expect_err("not UTF-8");
    }

    #[test]
    fn what_could_not_be_read_again_once_written_is_refused() {
        for text in [
            "<a>< />x</a>",
            "<a>< >x</ ></a>",
            "<a><b x='1' / >x</b></a>",
            "<a><b x>1</b></a>",
            "<a>&#1;</a>",
            "<a><1/></a>",
        ] {
            parse(text.as_bytes()).expect_err(text);
        }
    }

    #[test]
    fn a_carriage_return_in_a_text_survives_a_rewrite() {
        let document = parse(b"<a>1&#13;2</a>").expect("well formed");
        assert_eq!(parse(&write(&document)).expect("ours"), document);
    }
}
