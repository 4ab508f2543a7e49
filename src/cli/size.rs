//! Sizes on the command line, as qemu-img reads them and as we print them, and sizes for people.

use crate::format::header::SECTOR;

/// The suffixes, with their powers of 1024; no suffix and B are bytes.
const SUFFIXES: [(char, u32); 7] = [('B', 0), ('K', 1), ('M', 2), ('G', 3), ('T', 4), ('P', 5), ('E', 6)];

/// Parses a size in bytes: a number, perhaps with a fraction (`1.5G`), and one of K, M, G, T, P, E, upper or lower case; K,
/// Ki and KiB are one, powers of 1024. A fraction of a byte is cut off; without a suffix there is no fraction.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "{text} is not a size; write bytes, or a number with K, M, G, T, P or E, such as 10G or 10GiB"
        )
    };
    let ends = |text: &str, end: &str| {
        let at = text.len().checked_sub(end.len())?;
        text.get(at..)?.eq_ignore_ascii_case(end).then(|| text[..at].to_owned())
    };
    // 10KiB and 10Ki are 10K; B alone stays.
    let short = ends(text, "iB").or_else(|| ends(text, "i"));
    let unit = short.as_deref().unwrap_or(text);
    let last = unit.chars().next_back().ok_or_else(|| "a size cannot be empty".to_string())?;
    let suffix = SUFFIXES.iter().find(|(letter, _)| last.eq_ignore_ascii_case(letter));
    let (number, power) = match suffix {
        Some((_, power)) => (&unit[..unit.len() - 1], *power),
        None => (unit, 0),
    };
    if short.is_some() && power == 0 {
        return Err(wrong());
    }
    let (whole, fraction) = match number.split_once('.') {
        Some((_, fraction)) if power == 0 || fraction.is_empty() => return Err(wrong()),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    // 20 digits hold every u64; 20 more of a fraction are finer than any byte of it.
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return Err(wrong());
    }
    let unit = 1u128 << (10 * power);
    let too_large = || format!("{text} is too large: sizes end below 16E");
    let whole: u128 = whole.parse::<u64>().map_err(|_| too_large())?.into();
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10u128.pow(fraction.len() as u32);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
    u64::try_from(whole * unit + part * unit / scale).map_err(|_| too_large())
}

/// A disk's size: [`parse`], but a bare number that is no whole sector is no size of a disk. `resize vm 20` is meant as 20 GiB,
/// or as who knows what.
pub fn parse_disk(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    if bytes < SECTOR && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{text} bytes are no disk; say the unit, such as {text}G or {text}M"));
    }
    Ok(bytes)
}

/// `count` of something: "1 image", "2 images".
pub fn count(count: u64, of: &str) -> String {
    format!("{count} {of}{}", if count == 1 { "" } else { "s" })
}

/// A size for people: "10 GiB", "1.5 MiB", "512 B". One decimal, rounded to nearest, none where it is 0.
pub fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut power = (63 - (bytes | 1).leading_zeros() as usize) / 10;
    let tenths = |power: usize| (u128::from(bytes) * 10 + (1 << (10 * power)) / 2) >> (10 * power);
    // 1023.97 MiB rounds to 1024.0 MiB: that is 1 GiB.
    if tenths(power) >= 10240 {
        power += 1;
    }
    let tenths = tenths(power);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {}", units[power]),
        (whole, tenth) => format!("{whole}.{tenth} {}", units[power]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("512b"), Ok(512));
        assert_eq!(parse("64K"), Ok(64 << 10));
        assert_eq!(parse("512m"), Ok(512 << 20));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("0.1K"), Ok(102));
        assert_eq!(parse("2T"), Ok(2 << 40));
        assert_eq!(parse("3P"), Ok(3 << 50));
        assert_eq!(parse("15E"), Ok(15 << 60));
        assert_eq!(parse("18446744073709551615"), Ok(u64::MAX));
        for same in ["2Ki", "2KiB", "2kib", "2048B", "2k"] {
            assert_eq!(parse(same), Ok(2048), "{same}");
        }
        assert_eq!(parse("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse("1EiB"), Ok(1 << 60));
    }

    #[test]
    fn what_is_no_size_is_refused_and_nothing_overflows() {
        for text in [
            "", "G", "-1", "+1G", "1.5", "1.", "1.G", ".5G", "10GB", "10iB", "10i", "10Bi", "10GiBB", "GiB",
            "iB", "i", "1 G", "0x10", "1e3", "1.2.3G", "\u{b2}G",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["16E", "18446744073709551616", "99999999999999999999E", "17179869184G"] {
            assert!(parse(text).expect_err(text).contains("too large"));
        }
        let long = format!("1.{}K", "9".repeat(500));
        assert_eq!(parse(&long), Ok(2047));
    }

    #[test]
    fn a_bare_number_below_a_sector_is_no_disk() {
        assert!(parse_disk("20").expect_err("bytes").contains("20G or 20M"));
        assert!(parse_disk("0").is_err());
        assert_eq!(parse_disk("512"), Ok(512));
        assert_eq!(parse_disk("20B"), Ok(20));
        assert_eq!(parse_disk("10G"), Ok(10 << 30));
    }

    #[test]
    fn one_is_no_plural() {
        assert_eq!((count(0, "image"), count(1, "image")), ("0 images".into(), "1 image".into()));
    }

    #[test]
    fn sizes_for_people_have_one_decimal_at_most() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(512), "512 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human((1 << 30) - 1), "1 GiB");
        assert_eq!(human(u64::MAX), "16 EiB");
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text in "[0-9.KMGTPEkbi\u{e9}-]{0,30}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_size_can_be_shown(bytes in proptest::num::u64::ANY) {
            proptest::prop_assert!(human(bytes).len() <= 10);
        }
    }
}
