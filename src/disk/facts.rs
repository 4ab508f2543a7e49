//! What `info` says of an image or a snapshot at rest: read without a lock, from every file of its chain.

use std::path::PathBuf;

use crate::disk::find::{self, Target};
use crate::disk::layered::Layered;
use crate::disk::snapshots::{self, SnapshotLine};
use crate::disk::space::{ClusterOrder, Reclaimable};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Delta;
use crate::format::header::Header;
use crate::image::chain::{AtRest, Form};

/// One file of the chain.
pub struct LevelFacts {
    /// GUID of the snapshot whose file it is; of a single file, empty.
    pub guid: String,
    /// The file, its header judged.
    pub file: AtRest,
    /// How its clusters lie.
    pub order: ClusterOrder,
}

/// An image or a snapshot.
pub struct Facts {
    /// The image's name.
    pub name: String,
    /// Its file, or its folder.
    pub path: PathBuf,
    /// The snapshot that was asked for.
    pub snapshot: Option<String>,
    /// The levels, base first: at least one.
    pub levels: Vec<LevelFacts>,
    /// The tree of snapshots; None: a single file.
    pub snapshots: Option<Vec<SnapshotLine>>,
    /// Why it is not served, whatever its files look like.
    pub refusal: Option<String>,
}

impl Facts {
    /// Reads what was named. Damage of any file of the chain is an error that names the file and the field.
    pub fn of(target: &Target) -> Result<Facts> {
        let path = &target.path;
        let name = find::name(path)?.to_string_lossy().into_owned();
        let mut refusal = None;
        let (levels, snapshots) = if target.is_layered() {
            let image = Layered::read(path)?;
            refusal = image.descriptor().refusal().map(str::to_owned);
            let chain = image.chain(image.guid(target.snapshot.as_deref())?)?;
            let level = |delta: &Delta| level(delta.guid.to_string(), image.open(delta)?);
            let levels = chain.into_iter().map(level).collect::<Result<Vec<_>>>()?;
            (levels, Some(snapshots::of(path, false)?))
        } else {
            if target.snapshot.is_some() {
                return Err(Error::at(Kind::NotFound, path, "the image has no snapshots"));
            }
            (vec![level(String::new(), AtRest::open(path)?)?], None)
        };
        let (path, snapshot) = (path.clone(), target.snapshot.clone());
        Ok(Facts { name, path, snapshot, levels, snapshots, refusal })
    }

    /// "ploop", "raw" or "layered".
    pub fn kind(&self) -> &'static str {
        match (&self.snapshots, self.top()) {
            (None, Some(top)) => top.file.kind().as_str(),
            _ => "layered",
        }
    }

    /// Disk size in bytes.
    pub fn size(&self) -> u64 {
        self.top().map_or(0, |top| top.file.size())
    }

    /// Space that the files of the chain take on the host, in bytes.
    pub fn allocated(&self) -> u64 {
        self.levels.iter().map(|level| level.file.allocated).sum()
    }

    /// The level that is written.
    pub fn top(&self) -> Option<&LevelFacts> {
        self.levels.last()
    }

    /// The header of the top; None: it is raw.
    pub fn header(&self) -> Option<&Header> {
        match &self.top()?.file.form {
            Form::Ploop(header) => Some(header),
            Form::Raw => None,
        }
    }

    /// What could be given back. `mounted`: a daemon serves it.
    pub fn reclaimable(&self, mounted: bool) -> Result<Reclaimable> {
        let mut found = Reclaimable::leaks(&self.path, mounted);
        if let Some(lines) = &self.snapshots {
            let levels: Vec<_> = self.levels.iter().map(|level| (&*level.guid, &level.file)).collect();
            found.add_snapshots(&levels, lines)?;
        }
        Ok(found)
    }
}

fn level(guid: String, file: AtRest) -> Result<LevelFacts> {
    let order = ClusterOrder::of(&file)?;
    Ok(LevelFacts { guid, file, order })
}
