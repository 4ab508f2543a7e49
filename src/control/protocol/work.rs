//! Operations on an image as they are said on the socket. The types here are the protocol's own: a field that is renamed
//! or added in `vdisk::live` does not compile here until it is decided what the socket says of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::vdisk::live::compact::Gain;
use crate::vdisk::live::order::Pieces;
use crate::vdisk::live::{Done, Work};

/// [`Work`], as a client asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "lowercase")]
pub enum WorkRequest {
    /// Freeze what is there as a snapshot.
    Snapshot {
        /// Its name; None: named by the time.
        label: Option<String>,
    },
    /// Delete a snapshot.
    Delete {
        /// Label or GUID.
        snapshot: String,
    },
    /// Merge a snapshot's data with its only child's.
    Merge {
        /// Label or GUID.
        snapshot: String,
    },
    /// Go back to a snapshot.
    Switch {
        /// Label or GUID.
        snapshot: String,
    },
    /// A new image with the same content.
    Clone {
        /// Of which snapshot; None: of the live disk.
        snapshot: Option<String>,
        /// The new image's folder. JSON is text: a path that is none cannot be asked for.
        to: PathBuf,
        /// Copy where the host can neither share extents nor link.
        copy: bool,
    },
    /// Several of them, at once. A daemon that does not know it refuses it, and does not make the first alone.
    Clones {
        /// Of which snapshot; None: of the live disk.
        snapshot: Option<String>,
        /// The new images' folders, side by side.
        to: Vec<PathBuf>,
        /// Copy where the host can neither share extents nor link.
        copy: bool,
    },
    /// Go on with the merges that a crash or a cancel left.
    Finish,
    /// Free zero clusters, and make the live disk's file shorter.
    Compact {
        /// Only say what that would gain.
        dry_run: bool,
        /// Put what stays in the order of the disk.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        defrag: bool,
    },
    /// Begin to track which parts of the disk change.
    Track {
        /// Bytes of disk for each bit; None: as fits.
        granularity: Option<u64>,
    },
    /// Track no more.
    Untrack,
    /// Make the disk larger.
    Resize {
        /// The new size in bytes.
        size: u64,
    },
}

impl From<Work> for WorkRequest {
    fn from(work: Work) -> WorkRequest {
        match work {
            Work::Snapshot { label } => WorkRequest::Snapshot { label },
            Work::Delete { snapshot } => WorkRequest::Delete { snapshot },
            Work::Merge { snapshot } => WorkRequest::Merge { snapshot },
            Work::Switch { snapshot } => WorkRequest::Switch { snapshot },
            Work::Clone { snapshot, mut to, copy } => match (to.pop(), to.is_empty()) {
                (Some(to), true) => WorkRequest::Clone { snapshot, to, copy },
                (last, _) => {
                    to.extend(last);
                    WorkRequest::Clones { snapshot, to, copy }
                }
            },
            Work::Finish => WorkRequest::Finish,
            Work::Compact { dry_run, defrag } => WorkRequest::Compact { dry_run, defrag },
            Work::Track { granularity } => WorkRequest::Track { granularity },
            Work::Untrack => WorkRequest::Untrack,
            Work::Resize { size } => WorkRequest::Resize { size },
        }
    }
}

impl From<WorkRequest> for Work {
    fn from(request: WorkRequest) -> Work {
        match request {
            WorkRequest::Snapshot { label } => Work::Snapshot { label },
            WorkRequest::Delete { snapshot } => Work::Delete { snapshot },
            WorkRequest::Merge { snapshot } => Work::Merge { snapshot },
            WorkRequest::Switch { snapshot } => Work::Switch { snapshot },
            WorkRequest::Clone { snapshot, to, copy } => Work::Clone { snapshot, to: vec![to], copy },
            WorkRequest::Clones { snapshot, to, copy } => Work::Clone { snapshot, to, copy },
            WorkRequest::Finish => Work::Finish,
            WorkRequest::Compact { dry_run, defrag } => Work::Compact { dry_run, defrag },
            WorkRequest::Track { granularity } => Work::Track { granularity },
            WorkRequest::Untrack => Work::Untrack,
            WorkRequest::Resize { size } => Work::Resize { size },
        }
    }
}

/// [`Done`]: what came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneAnswer {
    /// The name of what was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The disk's new size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// What was gained, or would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain: Option<GainAnswer>,
    /// What a person should know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl From<Done> for DoneAnswer {
    fn from(Done { name, size, gain, note }: Done) -> DoneAnswer {
        DoneAnswer { name, size, gain: gain.map(GainAnswer::from), note }
    }
}

impl From<DoneAnswer> for Done {
    fn from(DoneAnswer { name, size, gain, note }: DoneAnswer) -> Done {
        Done { name, size, gain: gain.map(Gain::from), note }
    }
}

/// [`Gain`]: what compacting gains, or has gained. Also what `compact --json` prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GainAnswer {
    /// Bytes of the live disk's own file before.
    pub length: u64,
    /// And after.
    pub length_after: u64,
    /// Bytes that it takes on the host before.
    pub allocated: u64,
    /// And after; before the work an estimate.
    pub allocated_after: u64,
    /// Clusters of zeroes that are freed, or become holes.
    pub zero_clusters: u64,
    /// Moves of clusters.
    pub moved_clusters: u64,
    /// Where they are put in order: what comes of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defrag: Option<PiecesAnswer>,
}

impl From<Gain> for GainAnswer {
    fn from(gain: Gain) -> GainAnswer {
        let Gain { length, length_after, allocated, allocated_after, zero_clusters, moved_clusters, defrag } =
            gain;
        let defrag = defrag.map(PiecesAnswer::from);
        GainAnswer { length, length_after, allocated, allocated_after, zero_clusters, moved_clusters, defrag }
    }
}

impl From<GainAnswer> for Gain {
    fn from(gain: GainAnswer) -> Gain {
        let GainAnswer {
            length,
            length_after,
            allocated,
            allocated_after,
            zero_clusters,
            moved_clusters,
            defrag,
        } = gain;
        let defrag = defrag.map(Pieces::from);
        Gain { length, length_after, allocated, allocated_after, zero_clusters, moved_clusters, defrag }
    }
}

/// [`Pieces`]: what putting the clusters in order gains, or has gained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PiecesAnswer {
    /// Pieces before.
    pub pieces: u64,
    /// And after.
    pub pieces_after: u64,
    /// Bytes that the host must have free meanwhile.
    pub spare: u64,
}

impl From<Pieces> for PiecesAnswer {
    fn from(Pieces { pieces, pieces_after, spare }: Pieces) -> PiecesAnswer {
        PiecesAnswer { pieces, pieces_after, spare }
    }
}

impl From<PiecesAnswer> for Pieces {
    fn from(PiecesAnswer { pieces, pieces_after, spare }: PiecesAnswer) -> Pieces {
        Pieces { pieces, pieces_after, spare }
    }
}
