//! Zero detection: all-zero data written to a hole allocates nothing.

/// True when every byte is zero. Compares 64 bytes at a time, which the compiler turns into vector code.
pub(super) fn is_zero(data: &[u8]) -> bool {
    const BLOCK: [u8; 64] = [0; 64];
    let mut blocks = data.chunks_exact(64);
    blocks.by_ref().all(|b| b == BLOCK) && blocks.remainder().iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in 0..len {
                data[at] = 1;
                assert!(!is_zero(&data), "byte {at} of {len}");
                data[at] = 0;
            }
        }
    }
}
