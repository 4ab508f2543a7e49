//! The handshake with the kernel: its INIT and our answer, which a successor repeats to itself.

use std::sync::atomic::Ordering;

use super::Ledger;
use super::layout::SESSION;

/// Room for each of the two messages, in bytes: INIT has 104, its answer 80.
const ROOM: usize = 512;
const WORDS: usize = ROOM / 8;
/// Words behind [`SESSION`].
const INIT_LEN: usize = 1;
const ANSWER_LEN: usize = 2;
const INIT: usize = 8;
const ANSWER: usize = INIT + WORDS;
/// Both messages stand there.
const AGREED: u64 = 1;

/// What was said at the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// The kernel's INIT.
    pub init: Vec<u8>,
    /// Our answer, from fuse_out_header on.
    pub answer: Vec<u8>,
}

impl Ledger {
    /// Keeps the handshake, before the kernel hears the answer. False: it is too long, and no successor can repeat it.
    pub fn keep_handshake(&self, said: &Handshake) -> bool {
        if said.init.len() > ROOM || said.answer.len() > ROOM {
            return false;
        }
        self.put_bytes(SESSION + INIT, &said.init);
        self.put_bytes(SESSION + ANSWER, &said.answer);
        self.word(SESSION + INIT_LEN).store(said.init.len() as u64, Ordering::Relaxed);
        self.word(SESSION + ANSWER_LEN).store(said.answer.len() as u64, Ordering::Relaxed);
        self.word(SESSION).store(AGREED, Ordering::Release);
        true
    }

    /// What was kept; None: nothing, or nonsense.
    pub fn handshake(&self) -> Option<Handshake> {
        let agreed = self.word(SESSION).load(Ordering::Acquire) == AGREED;
        let len = |at: usize| {
            let len = usize::try_from(self.word(SESSION + at).load(Ordering::Relaxed)).ok()?;
            (1..=ROOM).contains(&len).then_some(len)
        };
        let (init, answer) = (len(INIT_LEN)?, len(ANSWER_LEN)?);
        agreed.then(|| Handshake {
            init: self.bytes_at(SESSION + INIT, init),
            answer: self.bytes_at(SESSION + ANSWER, answer),
        })
    }

    fn put_bytes(&self, first: usize, bytes: &[u8]) {
        for (word, piece) in self.memory.words()[first..].iter().zip(bytes.chunks(8)) {
            word.store(packed(piece), Ordering::Relaxed);
        }
    }

    fn bytes_at(&self, first: usize, len: usize) -> Vec<u8> {
        let words = self.memory.words()[first..].iter().take(len.div_ceil(8));
        let mut bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// Up to eight bytes as a word.
pub(super) fn packed(piece: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..piece.len()].copy_from_slice(piece);
    u64::from_ne_bytes(word)
}
