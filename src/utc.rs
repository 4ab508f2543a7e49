//! Points in time as text, in UTC, without a time zone database.

/// Year, month, day, hour, minute, second of a moment in seconds since 1970.
fn parts(seconds: i64) -> (i64, u32, u32, u32, u32, u32) {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400) as u32);
    // Years that begin in March have their odd day at the end; 719468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = (day - (153 * month + 2) / 5 + 1) as u32;
    let (month, next) = if month < 10 { (month as u32 + 3, 0) } else { (month as u32 - 9, 1) };
    (year + era * 400 + next, month, date, second / 3600, second / 60 % 60, second % 60)
}

/// As a name: 2026-11-20T22.45.01; colons would not do in file names everywhere.
pub fn label(seconds: u64) -> String {
    let (year, month, day, hour, minute, second) = parts(i64::try_from(seconds).unwrap_or(i64::MAX));
    format!("{year:04}-{month:02}-{day:02}T{hour:02}.{minute:02}.{second:02}")
}

/// For people: 2026-11-20 22:45:01.
pub fn shown(seconds: i64) -> String {
    let (year, month, day, hour, minute, second) = parts(seconds);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// For programs, as RFC 3339 has it: 2026-11-20T22:45:01Z.
pub fn rfc3339(seconds: i64) -> String {
    shown(seconds).replace(' ', "T") + "Z"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_without_a_name_is_named_by_the_time() {
        assert_eq!(label(0), "1970-01-01T00.00.00");
        assert_eq!(label(1_795_214_701), "2026-11-20T22.45.01");
        assert_eq!(label(951_782_400), "2000-02-29T00.00.00");
    }

    #[test]
    fn moments_are_shown_as_date_prints_them() {
        assert_eq!(shown(0), "1970-01-01 00:00:00");
        assert_eq!(shown(1_795_214_701), "2026-11-20 22:45:01");
        assert_eq!(shown(951_827_696), "2000-02-29 12:34:56");
        assert_eq!(shown(-1), "1969-12-31 23:59:59");
        assert_eq!(shown(4_107_542_399), "2100-02-28 23:59:59");
        assert_eq!(rfc3339(1_795_214_701), "2026-11-20T22:45:01Z");
    }
}
