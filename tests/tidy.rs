//! The house is in order: references to its pages lead somewhere, the crash rules read the same wherever they stand, and
//! lines fit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What people read and write; everything else is built or measured.
const HOUSE: &[&str] = &[
    "src",
    "tests",
    "examples",
    "contrib",
    "fuzz/fuzz_targets",
    "man",
    "docs",
    ".ci",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "Cargo.toml",
    "fuzz/README.md",
    "fuzz/run",
];

/// Longest line of a page, in characters.
const WIDTH: usize = 120;

/// Longest source: below 500 lines is the aim.
const LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of the house that is text: its path below the root, and its content.
fn files() -> Vec<(String, String)> {
    let mut left: Vec<PathBuf> =
        HOUSE.iter().map(|part| root().join(part)).filter(|part| part.exists()).collect();
    let mut found = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            left.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if let Ok(text) = fs::read_to_string(&path) {
            let name = path.strip_prefix(root()).expect("below the root").display().to_string();
            found.push((name, text));
        }
    }
    found.sort();
    found
}

fn is_page(name: &str) -> bool {
    name.ends_with(".md")
}

/// The anchor that GitHub makes of a heading.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).flat_map(char::to_lowercase).collect()
}

/// The anchors of a page; a heading that comes again has a number behind it.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut seen = BTreeMap::new();
    let mut anchors = BTreeSet::new();
    let mut code = false;
    for line in page.lines() {
        code ^= line.starts_with("```");
        let heading = line.trim_start_matches('#');
        if !code && line.starts_with('#') && heading.starts_with(' ') {
            let slug = slug(heading);
            let before = seen.entry(slug.clone()).or_insert(0);
            anchors.insert(if *before == 0 { slug } else { format!("{slug}-{before}") });
            *before += 1;
        }
    }
    anchors
}

/// The references of a file to pages: a page as it is written there, and the anchor behind it, which may be empty.
fn references(name: &str, text: &str) -> Vec<(String, String)> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '-' | '_');
    let mut found = Vec::new();
    for (at, _) in text.match_indices(".md") {
        let begin = text[..at].rfind(|c| !is_path(c)).map_or(0, |before| before + 1);
        let behind = &text[at + 3..];
        let anchor = behind.strip_prefix('#').unwrap_or_default();
        let end = anchor.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_'));
        let page = &text[begin..at + 3];
        // A link of a page, a reference anywhere; a bare name in running text ("README.md") is no path.
        let link = is_page(name) && text[..begin].ends_with("](");
        if (link || page.starts_with("docs/")) && !behind.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            found.push((page.to_owned(), anchor[..end.unwrap_or(anchor.len())].to_owned()));
        }
    }
    // A link to a heading of the page itself.
    if is_page(name) {
        let own = Path::new(name).file_name().expect("a name").to_string_lossy().into_owned();
        for part in text.split("](#").skip(1) {
            found.push((own.clone(), part.split(')').next().unwrap_or_default().to_owned()));
        }
    }
    found
}

/// The page that a reference in `name` means, below the root.
fn resolve(name: &str, page: &str) -> PathBuf {
    // In code a path begins at the root; in a page, beside the page.
    let folder =
        if is_page(name) { Path::new(name).parent().unwrap_or(Path::new("")) } else { Path::new("") };
    let mut path = PathBuf::new();
    for part in folder.join(page).components() {
        match part {
            std::path::Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    // Text of a page may name a page as code does.
    if !root().join(&path).exists() && page.starts_with("docs/") { PathBuf::from(page) } else { path }
}

#[test]
fn every_reference_to_a_page_leads_to_a_heading_that_is_there() {
    let mut dead = Vec::new();
    let mut count = 0;
    for (name, text) in files().iter().filter(|(name, _)| name != "tests/tidy.rs") {
        for (page, anchor) in references(name, text) {
            count += 1;
            match fs::read_to_string(root().join(resolve(name, &page))) {
                Err(e) => dead.push(format!("{name}: {page}: {e}")),
                Ok(target) if !anchor.is_empty() && !anchors(&target).contains(&anchor) => {
                    dead.push(format!("{name}: {page}#{anchor}: no such heading"));
                }
                Ok(_) => {}
            }
        }
    }
    assert!(dead.is_empty(), "{}", dead.join("\n"));
    assert!(count > 60, "only {count} references were found: the test sees too little");
}

#[test]
fn every_source_that_a_page_names_is_there() {
    let files = files();
    let mut missing = Vec::new();
    let mut count = 0;
    for (name, text) in files.iter().filter(|(name, _)| is_page(name) && !older(name)) {
        // Between backticks: `flush.rs`, `vdisk/flush.rs`, `vdisk/flush.rs::rounds`.
        for word in text.split('`').skip(1).step_by(2).filter(|word| !word.contains(char::is_whitespace)) {
            let (path, function) = word.split_once("::").unwrap_or((word, ""));
            if !path.ends_with(".rs") {
                continue;
            }
            count += 1;
            let fits = |file: &str| file == path || file.ends_with(&format!("/{path}"));
            let mut sources = files.iter().filter(|(file, _)| fits(file)).peekable();
            if sources.peek().is_none() {
                missing.push(format!("{name}: {path}: there is no such file"));
            } else if !function.is_empty()
                && !sources.any(|(_, source)| source.contains(&format!("fn {function}")))
            {
                missing.push(format!("{name}: {word}: there is no such function"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(count > 80, "only {count} sources were found: the test sees too little");
}

#[test]
fn nothing_refers_to_pages_outside_of_the_repository() {
    let gone = ["DESIGN", "FORMAT", "FUSE", "PEERS", "SEEDS", "MODELS", "FAULTS", "RESTART", "REMOTE"];
    let mut strays = Vec::new();
    for (name, text) in files().iter().filter(|(name, _)| name != "tests/tidy.rs") {
        for (number, line) in text.lines().enumerate() {
            if gone.iter().any(|page| line.contains(&format!("{page}.md"))) || line.contains("../shared") {
                strays.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(strays.is_empty(), "{}", strays.join("\n"));
}

#[test]
fn lines_of_a_page_are_not_longer_than_120_columns() {
    let mut long = Vec::new();
    for (name, text) in files().iter().filter(|(name, _)| name.starts_with("docs/") || is_page(name)) {
        let mut code = false;
        for (number, line) in text.lines().enumerate() {
            code ^= line.starts_with("```");
            // A row of a table cannot be broken, and what is pasted is not.
            if !code && !line.starts_with('|') && line.chars().count() > WIDTH && !older(name) {
                long.push(format!("{name}:{}: {} columns", number + 1, line.chars().count()));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// Pages whose lines are older than the rule.
fn older(name: &str) -> bool {
    name == "CHANGELOG.md"
}

/// One line, without marks of emphasis and code.
fn plain(text: &str) -> String {
    text.replace(['*', '`'], "").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Those of docs/restart.md.
const LEDGER_RULES: usize = 7;

/// The text of each rule on its page: what stands between its heading and the next empty line.
fn rules_of_the_page() -> BTreeMap<String, String> {
    let mut rules = BTreeMap::new();
    let read = |page: &str| fs::read_to_string(root().join(page)).expect("the page");
    let parts = |page: &str, letter: &str| -> Vec<String> {
        let mark = format!("\n### {letter}");
        read(page).split(&mark).skip(1).map(|part| format!("{letter}{part}")).collect()
    };
    let (crash, ledger) = (parts("docs/design.md", "R"), parts("docs/restart.md", "L"));
    for part in crash.iter().chain(&ledger) {
        let (number, text) = part.split_once("\n\n").expect("a text");
        let number = number.to_owned();
        let known = rules.insert(number.clone(), plain(text.split("\n\n").next().expect("a text")));
        assert!(known.is_none(), "{number} stands twice on the page");
    }
    rules
}

/// Lines of comments that belong together, joined, of everything in `text` that begins with `mark`.
fn paragraphs(text: &str, mark: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    for line in text.lines() {
        match line.trim_start().strip_prefix(mark).map(str::trim) {
            None | Some("") => all.push(String::new()),
            Some(line) => {
                if line.starts_with("- ") || ["**R", "**L"].iter().any(|mark| line.starts_with(mark)) {
                    all.push(String::new());
                }
                let last = all.last_mut().expect("there is one");
                last.push_str(line);
                last.push(' ');
            }
        }
    }
    all
}

#[test]
fn the_rules_in_the_code_read_as_those_of_the_page() {
    let page = rules_of_the_page();
    assert_eq!(page.len(), 9 + LEDGER_RULES, "{:?}", page.keys());
    // Each variant has the whole text, and behind it what a test build breaks.
    let source = fs::read_to_string(root().join("src/rules.rs")).expect("the rules");
    let variants =
        source.split("pub enum Rule {").nth(1).and_then(|rest| rest.split("\n}").next()).expect("the enum");
    let mut comment = String::new();
    let mut held = BTreeSet::new();
    for line in variants.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            comment.push_str(text);
            comment.push(' ');
        } else if let Some(name) = line.strip_suffix(',') {
            let text = comment.split("Broken:").next().map(plain).unwrap_or_default();
            assert!(comment.contains("Broken:"), "{name} does not say what a test build breaks");
            assert_eq!(Some(&text), page.get(name), "{name} of src/rules.rs is not {name} of docs/design.md");
            held.insert(name.to_owned());
            comment.clear();
        }
    }
    let variants: BTreeSet<String> = page.keys().cloned().collect();
    assert_eq!(held, variants, "every rule is a variant");
    // A home may have a part of a rule: but its words.
    let mut homes = BTreeSet::new();
    for (name, text) in files().iter().filter(|(name, _)| name.starts_with("src/") && name.ends_with(".rs")) {
        for paragraph in paragraphs(text, "//!") {
            let text = paragraph.trim_start_matches("- ");
            let is_rule = ["**R", "**L"].iter().any(|mark| text.starts_with(mark));
            let Some(rest) = text.strip_prefix("**").filter(|_| is_rule) else { continue };
            let (number, said) = rest.split_once("**").expect("an end");
            let said = plain(said);
            let rule = page.get(number).unwrap_or_else(|| panic!("{name}: there is no {number}"));
            assert!(rule.contains(&said), "{name} says of {number}:\n  {said}\nthe page says:\n  {rule}");
            if *rule == said && held.contains(number) {
                homes.insert(number.to_owned());
            }
        }
    }
    assert_eq!(homes, held, "every rule has a home that begins with its text");
}

#[test]
fn every_lock_says_its_place_in_the_order() {
    let mut silent = Vec::new();
    let mut count = 0;
    let is_of_tests =
        |name: &str| name.ends_with("tests.rs") || name.contains("/models/") || name.ends_with("model.rs");
    let is_source = |name: &str| name.starts_with("src/") && name.ends_with(".rs") && !is_of_tests(name);
    for (name, text) in files().iter().filter(|(name, _)| is_source(name)) {
        let mut comment = String::new();
        for line in text.lines().take_while(|line| *line != "#[cfg(test)]" || !text.contains("mod tests {")) {
            let line = line.trim();
            let declares = ["Mutex<", "RwLock<"].iter().any(|lock| line.contains(lock))
                && !["use ", "impl", "fn ", "let ", "MutexGuard<", "=>", "//"]
                    .iter()
                    .any(|other| line.contains(other));
            if declares {
                count += 1;
                let says = |word| comment.contains(word);
                if !["leaf", "efore ", "ehind ", "docs/design.md#lock-order"].into_iter().any(says) {
                    silent.push(format!(
                        "{name}: {line}: its comment says no place in docs/design.md#lock-order"
                    ));
                }
            }
            match line.strip_prefix("//") {
                Some(text) => comment.push_str(text),
                None if line.starts_with("#[") => {}
                None => comment.clear(),
            }
        }
    }
    assert!(silent.is_empty(), "{}", silent.join("\n"));
    assert!(count > 50, "only {count} locks were found: the test sees too little");
}

#[test]
fn a_source_can_be_read_in_one_sitting() {
    let sources = files().into_iter().filter(|(name, _)| name.starts_with("src/") && name.ends_with(".rs"));
    let long: Vec<String> = sources
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES)
        .map(|(name, lines)| format!("{name}: {lines} lines; a part of it is a subject of its own"))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn nothing_but_text_is_kept_outside_of_the_fuzz_corpus() {
    let mut left: Vec<PathBuf> = HOUSE.iter().map(|part| root().join(part)).collect();
    let mut blobs = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let entries = entries.map(|entry| entry.expect("an entry").path());
            left.extend(entries.filter(|path| !path.ends_with("__pycache__")));
        } else if fs::read(&path).is_ok_and(|bytes| String::from_utf8(bytes).is_err()) {
            blobs.push(path.display().to_string());
        }
    }
    assert!(blobs.is_empty(), "no text, so no change of it can be read: {}", blobs.join(", "));
}

#[test]
fn headings_become_anchors_as_github_makes_them() {
    assert_eq!(slug(" A full host"), "a-full-host");
    assert_eq!(slug(" What a fallocate's errno does"), "what-a-fallocates-errno-does");
    assert_eq!(slug(" FUSE, loop (and `rings`)"), "fuse-loop-and-rings");
    let page = "# One\n## Two\n```\n# no heading\n```\n## Two\n#none\n";
    assert_eq!(anchors(page), ["one", "two", "two-1"].map(str::to_owned).into());
    let found = references("src/a.rs", "//! (docs/design.md#r3): and docs/kernel.md.");
    let expected = [("docs/design.md", "r3"), ("docs/kernel.md", "")];
    assert_eq!(found, expected.map(|(page, anchor)| (page.to_owned(), anchor.to_owned())));
    assert_eq!(resolve("docs/a.md", "../SECURITY.md"), Path::new("SECURITY.md"));
}
