//! Which ring serves which of the kernel's queues: one queue for each CPU that there could be, whether it is there or
//! not, and one ring with its thread for each that is.

use std::fs;

/// Requests that one queue may have under way. One loop device or one submitter sits on one CPU, so its whole queue
/// depth has to fit; 64 measured best.
const DEPTH: u32 = 64;
/// All of them together, because each may come to need 1 MiB.
const TOTAL: u32 = 1024;
/// So many are added at a time to a queue of which more than half are out: a request that waits, for a disk that hangs or
/// for space, keeps its entry, and the last one would take those of all other images on that CPU along. Those for which
/// there is no entry wait in the kernel until one is answered, also behind entries that are added later: so more are added
/// early.
pub(super) const ADDED: u32 = 64;
/// So many a queue may come to have by that: what a loop device has under way, twice. More would only move the waiting of
/// a slow disk from the kernel's memory into ours.
pub(super) const AHEAD: u32 = 256;
/// And so many while requests are parked for space, which may be long; they take memory as far as they are used.
pub(super) const MOST: u32 = 1024;
/// What may be parked, over all images: all of it may come from one CPU, and the other half of that queue is for who has
/// nothing to wait for.
pub const PARKED: usize = MOST as usize / 2;
/// Of a queue whose CPU is not there (yet), and the least of all others.
const SPARE: u32 = 4;

/// Entries for one queue of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    /// Its number, which is that of a CPU.
    pub(super) id: u16,
    /// How many requests it may have under way.
    pub(super) depth: u32,
}

/// One ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CpuPlan {
    /// The CPU whose queue it has, and to which its thread may be bound (see `affinity`); None: several.
    pub(super) cpu: Option<usize>,
    /// The queues it serves.
    pub(super) queues: Vec<Queue>,
}

/// The rings for this machine.
pub(super) fn plan() -> Vec<CpuPlan> {
    let list = |name: &str| {
        let path = format!("/sys/devices/system/cpu/{name}");
        fs::read_to_string(&path).ok().and_then(|text| parse(&text))
    };
    let online = list("online").unwrap_or_default();
    let known = std::thread::available_parallelism().map_or(1, usize::from);
    let possible = list("possible").map_or(known.max(online.len()), |cpus| cpus.len());
    arrange(possible, &online)
}

/// `possible`: how many queues there are, numbered from 0.
fn arrange(possible: usize, online: &[usize]) -> Vec<CpuPlan> {
    let mut plans: Vec<CpuPlan> = online
        .iter()
        .filter(|&&cpu| cpu < possible)
        .map(|&cpu| CpuPlan { cpu: Some(cpu), queues: Vec::new() })
        .collect();
    if plans.is_empty() {
        plans.push(CpuPlan { cpu: None, queues: Vec::new() });
    }
    let depth = (TOTAL / plans.len() as u32).clamp(SPARE, DEPTH);
    for queue in 0..possible {
        let Ok(id) = u16::try_from(queue) else { break };
        let own = plans.iter().position(|plan| plan.cpu == Some(queue));
        let depth = if own.is_some() { depth } else { SPARE };
        let ring = own.unwrap_or(queue % plans.len());
        plans[ring].queues.push(Queue { id, depth });
    }
    plans
}

/// A list of the kernel such as `0-3,5`.
fn parse(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // A list that is no list must not take all memory.
        if last >= usize::from(u16::MAX) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_and_rubbish_is_none() {
        assert_eq!(parse("0-1\n"), Some(vec![0, 1]));
        assert_eq!(parse("0,2-4"), Some(vec![0, 2, 3, 4]));
        for rubbish in ["", "a", "1-", "0-99999999999", "-3"] {
            assert_eq!(parse(rubbish), None, "{rubbish:?}");
        }
    }

    #[test]
    fn every_queue_has_entries_also_that_of_a_cpu_that_is_not_there() {
        let plans = arrange(4, &[0, 2]);
        let queue = |id, depth| Queue { id, depth };
        assert_eq!(plans[0], CpuPlan { cpu: Some(0), queues: vec![queue(0, 64)] });
        assert_eq!(plans[1], CpuPlan { cpu: Some(2), queues: vec![queue(1, 4), queue(2, 64), queue(3, 4)] });
        assert_eq!(arrange(2, &[])[0].queues.len(), 2);
    }

    #[test]
    fn many_cpus_share_what_one_mount_may_take() {
        let online: Vec<usize> = (0..128).collect();
        assert!(
            arrange(128, &online).iter().all(|plan| plan.queues == [Queue { depth: 8, ..plan.queues[0] }])
        );
        let online: Vec<usize> = (0..1000).collect();
        assert!(arrange(1000, &online).iter().all(|plan| plan.queues[0].depth == 4));
    }
}
