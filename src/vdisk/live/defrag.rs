//! Putting the clusters of the live disk's file in the order of the disk: after compacting frees the zeroes, and in place
//! of its moves from the tail. `order` says which moves; each is one of `compact`'s, under the cluster's lock, while I/O
//! goes on.
//!
//! 1. free places in front are kept for the clusters that belong there; a guest's first writes go behind them;
//! 2. a round, and a scrub: what is free so far is clean, and the entries are counted;
//! 3. clusters move, each into a place that has been free and clean since the last round;
//! 4. a round: their data is durable, then their entries (R3), and only then the places that they left are free (R4);
//! 5. a scrub: those places are punched, durably, and clean. On with 3 until all is in order.
//!
//! 2 before 1: a guest could take a place after it was counted as free, and what belongs there would stay elsewhere. A
//! place that is filled again (3) before 4 is lost to the cluster that left it: a power cut brings the old entry back,
//! with the new data under it. 3 before 5 lets what lay there before show through: zeroes are not copied.
//!
//! A cancel, a close, a crash or a full host in between leaves clusters in other places, and no more; the next one goes
//! on from there. Where the file cannot grow, guests get what is kept: their clusters then stay where they are.

use crate::error::{Error, Kind, Result};
use crate::format::bat::{cluster_of, slot_of};
use crate::progress::Progress;
use crate::rules::{Rule, broken};
use crate::vdisk::live::compact::Moved;
use crate::vdisk::live::order::{FileOrder, Moves, OrderStep};
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::Stack;

impl Operating<'_> {
    /// Clusters moved in a round: as much as the file is extended by at a time (64 MiB). To copy that takes many times as
    /// long as the syncs of the round, it is little of any host's free space, and what moves behind the end fits into
    /// one extension.
    pub(super) fn at_a_time(&self) -> usize {
        (self.engine.options.extend / self.cluster).max(1) as usize
    }

    /// Where the clusters that the top maps lie.
    pub(super) fn order(&self, progress: &Progress) -> Result<FileOrder> {
        let stack = arc_swap::Guard::into_inner(self.stack());
        let (clusters, mut order, mut first) = (stack.geometry.clusters(), FileOrder::default(), 0);
        while first < clusters {
            self.stopped(progress)?;
            for (cluster, position, _) in self.own_clusters(&stack, first, clusters)? {
                order.push(cluster, stack.geometry.file_cluster(position));
            }
            first = cluster_of(slot_of(first).0 + 1, 0).unwrap_or(clusters);
        }
        Ok(order)
    }

    /// The steps at the head of this file; `moved` counts the moves. The image is marked in use.
    pub(super) fn put_in_order(&self, progress: &Progress, moved: &mut u64) -> Result<()> {
        let stack = arc_swap::Guard::into_inner(self.stack());
        let held = stack.allocator().hold(); // 1
        self.flush_now()?;
        self.scrub_all()?; // 2
        let order = self.order(progress)?;
        let end = order.len();
        held.only_before(end);
        let (mut plan, clusters) = order.plan(self.at_a_time());
        loop {
            let round = plan.next_round();
            if round.is_empty() {
                return Ok(());
            }
            for step in round {
                let what = (clusters[step.rank].into(), step, end);
                let done = self.take_step(&stack, &mut plan, what, progress); // 3
                if done.map_err(|e| self.no_room(e))? {
                    *moved += 1;
                    progress.add_while(self.cluster, || !self.is_closing());
                }
                self.flush_if_much()?;
            }
            if broken(Rule::R4) {
                continue;
            }
            self.flush_now()?; // 4
            self.scrub_all()?; // 5
        }
    }

    /// Moves `cluster`, where to `step` says, and notes in the plan what came of it; true when it has moved. Behind
    /// `end` no place is taken.
    fn take_step(
        &self,
        stack: &Stack,
        plan: &mut Moves,
        (cluster, step, end): (u64, OrderStep, u64),
        progress: &Progress,
    ) -> Result<bool> {
        let from = stack.geometry.cluster_position(plan.place(step.rank));
        loop {
            self.stopped(progress)?;
            let moved = match step.to {
                Some(place) => self.move_to(cluster, from, &|alloc| alloc.take_this(place))?,
                None => self.move_to(cluster, from, &|alloc| alloc.take_ready_from(end))?,
            };
            match (moved, step.to) {
                (Moved::To(place), _) => plan.moved(step.rank, place),
                (Moved::NotThere, _) => plan.gone(step.rank),
                (Moved::NoPlace, Some(place)) => plan.taken(place),
                (Moved::NoPlace, None) => {
                    self.wait_for_space(Some(end))?;
                    continue;
                }
            }
            return Ok(matches!(moved, Moved::To(_)));
        }
    }

    /// What a person should know who hears that the host is full.
    fn no_room(&self, e: Error) -> Error {
        if e.kind() != Kind::NoSpace {
            return e;
        }
        let spare = self.at_a_time() as u64 * self.cluster;
        let why = format!(
            "the host file system is full; what was put in order stays so. Free {spare} bytes there, and the same \
             command goes on"
        );
        Error::at(Kind::NoSpace, self.path(), why)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::error::Kind;
    use crate::format::header::{Header, Version};
    use crate::io::fault::{FaultFile, FaultPlan};
    use crate::io::file::HostFile;
    use crate::io::memory::MemoryFile;
    use crate::progress::Progress;
    use crate::sync::Arc;
    use crate::vdisk::races::until;
    use crate::vdisk::{Engine, Image, Layout, Level, OnFull, Options};

    /// Two blocks: one of them may be all zero, and is then not copied.
    const CLUSTER: u64 = 8192;
    const CLUSTERS: u64 = 300;

    struct Disk {
        file: Arc<MemoryFile>,
        faults: Arc<FaultPlan>,
        image: Arc<Image>,
        header: Header,
        model: Vec<u8>,
        random: u64,
    }

    impl Disk {
        /// An empty one that moves `at_a_time` clusters in a round.
        fn new(at_a_time: u64, seed: u64) -> Disk {
            let header = Header::new(Version::V2, CLUSTERS * CLUSTER, CLUSTER).expect("fits the format");
            let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
            file.set_len(header.geometry().first).expect("memory grows");
            let faults = Arc::new("".parse::<FaultPlan>().expect("a plan"));
            let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(file.clone(), faults.clone()));
            let options =
                Options { extend: at_a_time * CLUSTER, on_full: OnFull::Error, ..Options::default() };
            let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
            let image = Image::open(&Engine::new(options, Box::new(|_| ())), "memory", vec![level]);
            let image = image.expect("opens");
            image.make_writable().expect("the BAT is sound");
            let model = vec![0; (CLUSTERS * CLUSTER) as usize];
            Disk { file, faults, image, header, model, random: seed }
        }

        /// One whose clusters lie in any order, with gaps, some of them half zero.
        fn scattered(at_a_time: u64, seed: u64) -> Disk {
            let mut disk = Disk::new(at_a_time, seed);
            for _ in 0..2 * CLUSTERS {
                let (cluster, half) = (disk.below(CLUSTERS), disk.below(2));
                disk.write(cluster * CLUSTER + half * CLUSTER / 2, 4096);
            }
            for _ in 0..CLUSTERS / 6 {
                let at = disk.below(CLUSTERS) * CLUSTER;
                disk.image.discard_at(at, CLUSTER).expect("a discard");
                disk.model[at as usize..][..CLUSTER as usize].fill(0);
            }
            disk
        }

        fn below(&mut self, n: u64) -> u64 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.random >> 33) % n
        }

        fn write(&mut self, at: u64, len: usize) {
            let byte = 1 + self.below(255) as u8;
            self.image.write_at(at, &vec![byte; len]).expect("written");
            self.model[at as usize..][..len].fill(byte);
        }

        #[track_caller]
        fn holds_what_it_should(&self) {
            let data = self.image.read_at(0, self.model.len()).expect("read");
            let other = data.iter().zip(&self.model).position(|(is, should)| is != should);
            assert_eq!(other, None, "the first byte that differs");
        }

        /// Where the mapped clusters lie, in the order of the disk, as the file says.
        fn places(&self) -> Vec<u64> {
            let (bytes, geometry) = (self.file.to_bytes(), self.header.geometry());
            let entries = bytes[64..64 + 4 * CLUSTERS as usize].chunks_exact(4);
            let entries = entries.map(|e| u32::from_le_bytes(e.try_into().expect("four bytes")));
            let position = |entry| geometry.position(entry).expect("on the grid");
            entries.filter(|e| *e != 0).map(|e| geometry.file_cluster(position(e))).collect()
        }

        #[track_caller]
        fn is_in_order(&self) {
            let places = self.places();
            let n = places.len() as u64;
            assert!(places.iter().copied().eq(0..n), "{places:?}");
            assert_eq!(self.file.to_bytes().len() as u64, self.header.geometry().cluster_position(n));
        }
    }

    #[test]
    fn any_order_becomes_the_disk_s_and_a_second_time_nothing_moves() {
        for (seed, at_a_time) in [1, 2, 3, 8, 64, 1000].into_iter().enumerate() {
            let disk = Disk::scattered(at_a_time, seed as u64);
            let said = disk.image.defrag_gain(&Progress::new()).expect("a look");
            let progress = Progress::new();
            let done = disk.image.defrag(&progress).expect("in order");
            disk.holds_what_it_should();
            disk.is_in_order();
            assert_eq!(
                (said.moved_clusters, said.length_after, said.defrag),
                (done.moved_clusters, done.length_after, done.defrag),
                "it does what it says"
            );
            let pieces = done.defrag.expect("pieces");
            assert!(pieces.pieces > 10 && pieces.pieces_after == 1, "{pieces:?}");
            assert!(pieces.spare <= at_a_time * CLUSTER, "{pieces:?}");
            let (so_far, total) = progress.so_far();
            assert!(so_far == total && total >= done.moved_clusters * CLUSTER, "{so_far} of {total}");
            let again = disk.image.defrag(&Progress::new()).expect("in order");
            assert_eq!(again.moved_clusters, 0);
            disk.image.close().expect("closes");
            disk.is_in_order();
        }
    }

    #[test]
    fn a_rehearsal_changes_no_byte() {
        let disk = Disk::scattered(8, 1);
        disk.image.flush_now().expect("flushed");
        let before = disk.file.to_bytes();
        disk.image.defrag_gain(&Progress::new()).expect("a look");
        assert!(disk.file.to_bytes() == before);
    }

    #[test]
    fn a_cancel_in_the_middle_loses_nothing_and_the_next_one_goes_on() {
        let disk = Disk::scattered(4, 7);
        let pieces = disk.image.defrag_gain(&Progress::new()).expect("a look").moved_clusters;
        let progress = Progress::with_rate(Some(100 * CLUSTER));
        std::thread::scope(|scope| {
            let work = scope.spawn(|| disk.image.defrag(&progress));
            until(|| progress.so_far().0 > 40 * CLUSTER);
            progress.cancel();
            assert_eq!(work.join().expect("no panic").expect_err("cancelled").kind(), Kind::Cancelled);
        });
        disk.holds_what_it_should();
        let left = disk.image.defrag_gain(&Progress::new()).expect("a look").moved_clusters;
        assert!(0 < left && left < pieces, "{left} of {pieces} moves are left");
        disk.image.defrag(&Progress::new()).expect("in order");
        disk.holds_what_it_should();
        disk.is_in_order();
    }

    #[test]
    fn a_full_host_is_an_error_that_says_what_to_do_and_the_next_one_goes_on() {
        let mut disk = Disk::scattered(4, 3);
        disk.image.flush_now().expect("flushed");
        disk.faults.set_full(true);
        let e = disk.image.defrag(&Progress::new()).expect_err("no space");
        assert_eq!(e.kind(), Kind::NoSpace, "{e}");
        assert!(e.to_string().contains("memory") && e.to_string().contains("Free 32768 bytes"), "{e}");
        disk.faults.set_full(false);
        disk.holds_what_it_should();
        disk.write(5 * CLUSTER, 4096);
        disk.image.defrag(&Progress::new()).expect("in order");
        disk.holds_what_it_should();
        disk.is_in_order();
    }

    #[test]
    fn what_guests_write_and_discard_meanwhile_is_there_at_the_end() {
        let mut disk = Disk::scattered(4, 11);
        let threads = 3;
        let progress = Progress::with_rate(Some(2000 * CLUSTER));
        let end = crate::sync::AtomicBool::new(false);
        let model = disk.model.clone();
        let theirs: Vec<(u64, Vec<u8>)> = std::thread::scope(|scope| {
            let guests: Vec<_> = (0..threads)
                .map(|guest| {
                    let (image, end, mut model) = (&disk.image, &end, model.clone());
                    scope.spawn(move || {
                        let mut n = guest;
                        while !end.load(crate::sync::Ordering::SeqCst) {
                            n += 1;
                            let cluster = (n * 7919 % (CLUSTERS / threads)) * threads + guest;
                            let at = cluster * CLUSTER + n % 2 * 4096;
                            let (range, byte) = (at as usize..at as usize + 4096, (n % 251) as u8);
                            if n.is_multiple_of(5) {
                                let whole = (cluster * CLUSTER) as usize;
                                image.discard_at(cluster * CLUSTER, CLUSTER).expect("a discard");
                                model[whole..whole + CLUSTER as usize].fill(0);
                            } else {
                                image.write_at(at, &[byte; 4096]).expect("written");
                                model[range.clone()].fill(byte);
                            }
                            let read = image.read_at(at, 4096).expect("read");
                            assert!(read[..] == model[range], "cluster {cluster}");
                        }
                        (guest, model)
                    })
                })
                .collect();
            for _ in 0..3 {
                disk.image.defrag(&progress).expect("as far as the guests let it");
            }
            end.store(true, crate::sync::Ordering::SeqCst);
            guests.into_iter().map(|guest| guest.join().expect("no guest panics")).collect()
        });
        for (guest, model) in theirs {
            for cluster in (0..CLUSTERS).filter(|cluster| cluster % threads == guest) {
                let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
                disk.model[range.clone()].copy_from_slice(&model[range]);
            }
        }
        disk.holds_what_it_should();
        disk.image.defrag(&Progress::new()).expect("in order");
        disk.holds_what_it_should();
        disk.is_in_order();
        disk.image.close().expect("closes");
    }
}
