//! Who gets a name: the rules of docs/design.md#what-is-an-image for sources that come, go and clash. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};

use super::scan::{Claim, Identity, Source};

/// An image that is served now.
#[derive(Clone, Debug)]
pub(super) struct Incumbent {
    /// Its number in the live set.
    pub id: u64,
    /// The image's name.
    pub name: OsString,
    /// Its file's name.
    pub file: OsString,
    /// Its file.
    pub identity: Identity,
    /// An opener has it, or is about to: it stays served whatever happens in the folder.
    pub open: bool,
}

/// What becomes of all of them.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Goes on being served, from this claim.
    pub kept: Vec<(u64, Claim)>,
    /// Open, but its file is gone or another now: served until the last close.
    pub vanished: Vec<u64>,
    /// Of these the ones whose file lies in the folder under another name now.
    pub renamed: Vec<(u64, Claim)>,
    /// No longer served.
    pub dropped: Vec<u64>,
    /// To be served from now on.
    pub new: Vec<Claim>,
    /// Not served, and why.
    pub left_out: Vec<(Claim, String)>,
    /// What a crash left while a single file became a folder: a second name of a file that lies in the folder, which
    /// wins. To be removed.
    pub leftovers: Vec<Claim>,
}

/// Files that a folder's descriptor names are levels of that image, under whatever name they lie here: one that is served
/// as an image of its own, and written, takes the layered one with it.
pub(super) fn leave_out_levels(claims: &mut [Claim]) {
    let mut levels: HashMap<Identity, String> = HashMap::new();
    for folder in claims.iter() {
        levels.extend(folder.levels.iter().map(|level| (*level, show(&folder.file))));
    }
    for claim in claims.iter_mut().filter(|claim| claim.source != Source::Layers) {
        if let Some(folder) = levels.get(&claim.stamp.identity) {
            claim.problem =
                Some(format!("is a level of the layered image {folder}/, and no image of its own"));
        }
    }
}

/// Decides over all claims of a folder, sorted by file name.
pub(super) fn decide(claims: Vec<Claim>, incumbents: &[Incumbent]) -> Verdict {
    let mut verdict = Verdict::default();
    // Names that are taken, and from which file; files that are served, and under which name.
    let mut taken: HashMap<OsString, OsString> = HashMap::new();
    let mut served: HashMap<Identity, OsString> = HashMap::new();
    let mut kept_files: HashSet<OsString> = HashSet::new();

    // By name: a look costs as much as there are images, not the square of that.
    let by_file: HashMap<&OsStr, &Claim> =
        claims.iter().map(|claim| (claim.file.as_os_str(), claim)).collect();
    let by_identity: HashMap<Identity, &Claim> =
        claims.iter().map(|claim| (claim.stamp.identity, claim)).collect();
    for old in incumbents {
        let claim = by_file.get(old.file.as_os_str()).filter(|claim| claim.stamp.identity == old.identity);
        // One that was renamed while it was open gives its old name up with the last close.
        match claim.filter(|claim| claim.name == old.name) {
            Some(claim) if old.open || claim.problem.is_none() => {
                verdict.kept.push((old.id, (*claim).clone()));
                kept_files.insert(old.file.clone());
            }
            _ if old.open => {
                let elsewhere = by_identity.get(&old.identity);
                verdict.renamed.extend(elsewhere.map(|&claim| (old.id, claim.clone())));
                verdict.vanished.push(old.id);
            }
            _ => {
                verdict.dropped.push(old.id);
                continue;
            }
        }
        taken.insert(old.name.clone(), old.file.clone());
        served.insert(old.identity, old.name.clone());
    }

    let mut by_name: BTreeMap<OsString, Vec<Claim>> = BTreeMap::new();
    for claim in claims {
        if !kept_files.contains(&claim.file) {
            by_name.entry(claim.name.clone()).or_default().push(claim);
        }
    }
    for (name, mut rivals) in by_name {
        if let Some(file) = taken.get(&name) {
            let reason = format!("the name is taken by {}, which is served; rename one of them", show(file));
            verdict.left_out.extend(rivals.into_iter().map(|claim| (claim, reason.clone())));
            continue;
        }
        if rivals.len() > 1
            && let Some(folder) = folder_of_all(&rivals)
        {
            // "If both are the same file, the folder wins and the leftover goes."
            let (folders, files) = rivals.into_iter().partition(|claim| claim.file == folder);
            verdict.leftovers.extend::<Vec<_>>(files);
            rivals = folders;
        }
        if rivals.len() > 1 {
            leave_out_rivals(rivals, &mut verdict.left_out);
            continue;
        }
        let Some(claim) = rivals.pop() else { continue };
        if let Some(problem) = claim.problem.clone() {
            verdict.left_out.push((claim, problem));
        } else if let Some(other) = served.get(&claim.stamp.identity) {
            let reason = format!("the same file is served as {}.img; a disk has one name", show(other));
            verdict.left_out.push((claim, reason));
        } else {
            served.insert(claim.stamp.identity, name);
            verdict.new.push(claim);
        }
    }
    verdict
}

/// The one sound folder whose parts all its rivals are.
fn folder_of_all(rivals: &[Claim]) -> Option<OsString> {
    let mut folders = rivals.iter().filter(|claim| claim.source == Source::Layers);
    let (folder, None) = (folders.next()?, folders.next()) else { return None };
    let files = rivals.iter().filter(|claim| claim.source != Source::Layers);
    let whole = folder.problem.is_none();
    (whole && files.into_iter().all(|file| folder.parts.contains(&file.stamp.identity)))
        .then(|| folder.file.clone())
}

/// Two sources with one name: neither is served and both are named.
fn leave_out_rivals(rivals: Vec<Claim>, left_out: &mut Vec<(Claim, String)>) {
    let files: Vec<String> = rivals.iter().map(|c| show(&c.file)).collect();
    let clash = format!(
        "{} sources with the name {}: {}; none is served until only one is left",
        rivals.len(),
        show(&rivals[0].name),
        files.join(", ")
    );
    let folder = rivals.iter().find(|c| c.source == Source::Layers).cloned();
    // "If both are the same file, the folder wins": the file then is a left-over and no rival.
    let is_part = |c: &Claim| folder.as_ref().is_some_and(|f| f.parts.contains(&c.stamp.identity));
    let only_parts = rivals.iter().all(|c| c.source == Source::Layers || is_part(c));
    let folders = rivals.iter().filter(|c| c.source == Source::Layers).count();
    for claim in rivals {
        let reason = match (&folder, &claim.problem) {
            (Some(folder), _) if is_part(&claim) => {
                let folder = show(&folder.file);
                format!("the same file lies in {folder}/, which wins; it is left from a crash")
            }
            (Some(_), Some(problem)) if only_parts && folders == 1 => problem.clone(),
            _ => clash.clone(),
        };
        left_out.push((claim, reason));
    }
}

fn show(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::scan::Stamp;
    use crate::image::kind::ImageKind;

    fn claim(file: &str, name: &str, ino: u64) -> Claim {
        Claim {
            file: file.into(),
            name: name.into(),
            source: Source::File(ImageKind::Ploop),
            stamp: Stamp { identity: (1, ino), len: 0, mtime: (0, 0), links: 1 },
            size: 1,
            problem: None,
            damage: None,
            parts: HashSet::new(),
            levels: HashSet::new(),
        }
    }

    fn served(id: u64, name: &str, file: &str, ino: u64, open: bool) -> Incumbent {
        Incumbent { id, name: name.into(), file: file.into(), identity: (1, ino), open }
    }

    fn new_names(verdict: &Verdict) -> Vec<&str> {
        verdict.new.iter().map(|c| c.name.to_str().expect("ASCII")).collect()
    }

    #[test]
    fn two_sources_with_one_name_are_both_left_out_and_both_named() {
        let verdict =
            decide(vec![claim("a.hds", "a", 1), claim("a.raw", "a", 2), claim("b.raw", "b", 3)], &[]);
        assert_eq!(new_names(&verdict), ["b"]);
        assert_eq!(verdict.left_out.len(), 2);
        for (_, reason) in &verdict.left_out {
            assert!(reason.contains("a.hds, a.raw"), "{reason}");
        }
    }

    #[test]
    fn a_newcomer_with_a_served_name_is_left_out() {
        let old = [served(7, "a", "a.raw", 2, false)];
        let verdict = decide(vec![claim("a.hds", "a", 1), claim("a.raw", "a", 2)], &old);
        assert_eq!(verdict.kept[0].0, 7);
        assert!(verdict.new.is_empty());
        assert!(verdict.left_out[0].1.contains("a.raw"));
    }

    #[test]
    fn when_one_of_two_goes_the_other_is_served() {
        assert_eq!(new_names(&decide(vec![claim("a.raw", "a", 2)], &[])), ["a"]);
        let old = [served(7, "a", "a.hds", 1, false)];
        let verdict = decide(vec![claim("a.raw", "a", 2)], &old);
        assert_eq!((verdict.dropped.as_slice(), new_names(&verdict)), (&[7][..], vec!["a"]));
    }

    #[test]
    fn an_open_image_stays_when_its_file_goes_or_is_replaced() {
        let old = [served(7, "a", "a.hds", 1, true)];
        let verdict = decide(vec![], &old);
        assert_eq!((verdict.vanished.as_slice(), verdict.dropped.len()), (&[7][..], 0));
        let verdict = decide(vec![claim("a.hds", "a", 9)], &old);
        assert_eq!(verdict.vanished, [7]);
        assert_eq!(verdict.left_out.len(), 1);
    }

    #[test]
    fn a_closed_image_that_was_replaced_is_a_new_image() {
        let verdict = decide(vec![claim("a.hds", "a", 9)], &[served(7, "a", "a.hds", 1, false)]);
        assert_eq!((verdict.dropped.as_slice(), new_names(&verdict)), (&[7][..], vec!["a"]));
    }

    #[test]
    fn an_open_image_that_was_renamed_is_not_served_twice() {
        let verdict = decide(vec![claim("b.hds", "b", 1)], &[served(7, "a", "a.hds", 1, true)]);
        assert!(verdict.new.is_empty());
        assert!(verdict.left_out[0].1.contains("a.img"));
        assert_eq!(
            (verdict.vanished.as_slice(), verdict.renamed[0].1.file.to_str()),
            (&[7][..], Some("b.hds"))
        );
        let verdict = decide(vec![claim("b.hds", "b", 1)], &[served(7, "a", "a.hds", 1, false)]);
        assert_eq!(new_names(&verdict), ["b"]);
        // It follows its file, and still ends under its old name.
        let verdict = decide(vec![claim("b.hds", "b", 1)], &[served(7, "a", "b.hds", 1, true)]);
        assert_eq!((verdict.kept.len(), verdict.renamed.len(), verdict.new.len()), (0, 1, 0));
        let verdict = decide(vec![claim("b.hds", "b", 1)], &[served(7, "a", "b.hds", 1, false)]);
        assert_eq!((verdict.dropped.as_slice(), new_names(&verdict)), (&[7][..], vec!["b"]));
    }

    #[test]
    fn one_file_with_two_names_is_served_once() {
        let verdict = decide(vec![claim("a.hds", "a", 1), claim("b.hds", "b", 1)], &[]);
        assert_eq!(new_names(&verdict), ["a"]);
        assert!(verdict.left_out[0].1.contains("a.img"));
    }

    #[test]
    fn damage_is_a_reason_and_spoils_a_closed_image_but_not_an_open_one() {
        let mut bad = claim("a.hds", "a", 1);
        bad.problem = Some("damaged: m_Type".into());
        let verdict = decide(vec![bad.clone()], &[]);
        assert_eq!(verdict.left_out[0].1, "damaged: m_Type");
        let verdict = decide(vec![bad.clone()], &[served(7, "a", "a.hds", 1, false)]);
        assert_eq!((verdict.dropped.len(), verdict.left_out.len()), (1, 1));
        let verdict = decide(vec![bad], &[served(7, "a", "a.hds", 1, true)]);
        assert_eq!((verdict.kept.len(), verdict.left_out.len()), (1, 0));
    }

    #[test]
    fn a_second_name_of_a_level_is_not_served_also_where_it_was_before_and_nobody_has_it_open() {
        let mut folder = claim("vm", "vm", 5);
        folder.source = Source::Layers;
        folder.levels.insert((1, 1));
        for (open, served_still) in [(false, false), (true, true)] {
            let mut claims = vec![folder.clone(), claim("x.hds", "x", 1), claim("y.hds", "y", 2)];
            leave_out_levels(&mut claims);
            let verdict = decide(claims, &[served(7, "x", "x.hds", 1, open)]);
            assert_eq!(verdict.kept.len() == 1, served_still);
            assert_eq!(new_names(&verdict), ["vm", "y"]);
            assert!(served_still || verdict.left_out[0].1.contains("the layered image vm/"));
        }
    }

    #[test]
    fn of_a_folder_and_its_own_file_the_folder_wins() {
        let mut folder = claim("a", "a", 5);
        folder.source = Source::Layers;
        folder.problem = Some("layered".into());
        folder.parts.insert((1, 1));
        let verdict = decide(vec![folder.clone(), claim("a.hds", "a", 1)], &[]);
        assert_eq!(verdict.left_out[0].1, "layered");
        assert!(verdict.left_out[1].1.contains("left from a crash"));
        let verdict = decide(vec![folder, claim("a.hds", "a", 2)], &[]);
        assert!(verdict.left_out.iter().all(|(_, reason)| reason.starts_with("2 sources")));
    }
}
