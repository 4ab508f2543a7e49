//! Which ring serves which of the kernel's queues: one queue for each CPU that there could be, whether it is there or
//! not, and one ring with its thread for each that is.

use std::fs;

use crate::fuse::MAX_WRITE;
use crate::io::buffers::LIMIT;

/// Requests that one queue may have under way. One loop device or one submitter sits on one CPU, so its whole queue
/// depth has to fit; 64 measured best.
const DEPTH: u32 = 64;
/// All of them together at first, because each may come to need 1 MiB: half of [`LIMIT`], so that the other half is
/// there for the queue that needs it.
const TOTAL: u32 = (LIMIT / (2 * MAX_WRITE as usize)) as u32;
/// So many are added at a time to a queue of which more than half are out: a request that waits, for a disk that hangs or
/// for space, keeps its entry, and the last one would take those of all other images on that CPU along. Those for which
/// there is no entry wait in the kernel until one is answered, also behind entries that are added later: so more are added
/// early.
pub(super) const ADDED: u32 = 16;
/// When it has fewer than this free: what comes meanwhile, of other images as well, finds an entry. Not more, since for
/// other CPUs there must be some left.
const FREE: u32 = 32;
/// So many a queue may come to have by that, however small its requests are: twice what may be parked.
pub(super) const MOST: u32 = 1024;
/// So many of a queue, or half of it, are lent to no write that waits for its host: they can be answered at any time, and
/// those of other images behind them go on.
const KEPT: u32 = 16;
/// What may be parked, over all images: all of it may come from one CPU, and the other half of that queue is for who has
/// nothing to wait for.
pub const PARKED: usize = MOST as usize / 2;
/// Of a queue whose CPU is not there (yet), and the least of all others.
pub(super) const SPARE: u32 = 4;

/// Whether a crowded queue gets [`ADDED`] more that has `all` and has `free` of them left, while the entries of the session
/// may come to take `bytes` of memory as they are.
pub(super) fn grows(all: u32, free: u32, bytes: usize) -> bool {
    all < MOST && free < FREE && bytes + (ADDED * MAX_WRITE) as usize <= LIMIT
}

/// How many of a queue that has `all` may be lent.
pub(super) fn to_lend(all: u32) -> u32 {
    all - KEPT.min(all / 2)
}

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
            arrange(128, &online).iter().all(|plan| plan.queues == [Queue { depth: 4, ..plan.queues[0] }])
        );
        assert_eq!(arrange(16, &online[..16])[0].queues[0].depth, 17);
        let online: Vec<usize> = (0..1000).collect();
        assert!(arrange(1000, &online).iter().all(|plan| plan.queues[0].depth == 4));
    }

    #[test]
    fn queues_grow_up_to_the_bound_in_bytes_and_each_keeps_some_that_are_free() {
        // As many as can wait of this size, all from one CPU; another queue has its 64.
        let grown = |size: usize, most: u32| {
            let (mut all, mut out) = (64, 0);
            while out < all.min(most) {
                out += 1;
                let bytes = |all| (all - out + 64) as usize * MAX_WRITE as usize + out as usize * size;
                while 2 * out > all && grows(all, all - out, bytes(all)) {
                    all += ADDED;
                }
            }
            (all, out)
        };
        let (all, out) = grown(MAX_WRITE as usize, MOST);
        assert_eq!((all, out), ((LIMIT >> 20) as u32 - 64, all), "large ones take all of it and no more");
        // Small ones: as many as may be parked, and others have enough.
        let (all, out) = grown(4096, PARKED as u32);
        assert!(out == PARKED as u32 && all - out >= FREE, "{out} of {all}");
        assert!(!grows(MOST, 0, 0));
        assert_eq!([to_lend(4), to_lend(64), to_lend(1024)], [2, 48, 1008]);
    }
}
