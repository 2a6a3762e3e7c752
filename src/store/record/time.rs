//! Times as Go writes and reads them: RFC 3339, to the millisecond here. Pure.

/// Go's zero time, 0001-01-01: what stands for a time that is missing.
pub const ZERO_MS: i64 = -62_135_596_800_000;

const DAY_MS: i64 = 86_400_000;
/// From year 0 to the end of year 9999, which is what four digits can show.
const RANGE_MS: (i64, i64) = (-62_167_219_200_000, 253_402_300_799_999);

/// Milliseconds since 1970 as Go writes them: in UTC, a fraction without trailing zeros.
#[must_use]
pub fn format(unix_ms: i64) -> String {
    let unix_ms = unix_ms.clamp(RANGE_MS.0, RANGE_MS.1);
    let (year, month, day) = civil(unix_ms.div_euclid(DAY_MS));
    let ms = unix_ms.rem_euclid(DAY_MS);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    let fraction = match ms % 1000 {
        0 => String::new(),
        ms => format!(".{ms:03}").trim_end_matches('0').to_owned(),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Reads what Go reads: `T` and `Z` in upper case, any offset, a fraction after a point or a comma.
#[must_use]
pub fn parse(text: &str) -> Option<i64> {
    let (date, time) = (text.get(..10)?, text.get(10..19)?);
    let [year, month, day] = numbers(date, [(0, 4), (5, 2), (8, 2)], [(4, b'-'), (7, b'-')])?;
    let [_, hour, minute, second] = numbers(time, [(0, 0), (1, 2), (4, 2), (7, 2)], [(0, b'T'), (3, b':'), (6, b':')])?;
    let in_range = (1..=12).contains(&month) && (1..=days_in(year, month)).contains(&day) && hour < 24 && minute < 60 && second < 60;
    if !in_range {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut ms = 0;
    if let Some(fraction) = rest.strip_prefix(['.', ',']) {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return None;
        }
        for at in 0..3 {
            let digit = fraction.as_bytes()[..digits].get(at).map_or(0, |digit| i64::from(digit - b'0'));
            ms = ms * 10 + digit;
        }
        rest = &fraction[digits..];
    }
    let offset_minutes = match rest.as_bytes() {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), ..] if rest.len() == 6 => {
            let [_, hours, minutes] = numbers(rest, [(0, 0), (1, 2), (4, 2)], [(3, b':')])?;
            if hours > 24 || minutes >= 60 {
                return None;
            }
            let minutes = hours * 60 + minutes;
            if *sign == b'-' { -minutes } else { minutes }
        }
        _ => return None,
    };
    let minutes = (hour * 60 + minute) - offset_minutes;
    Some(days(year, month, day) * DAY_MS + minutes * 60_000 + second * 1000 + ms)
}

/// The numbers at these places (start, digits), if these bytes stand where they should.
fn numbers<const N: usize, const M: usize>(text: &str, places: [(usize, usize); N], fixed: [(usize, u8); M]) -> Option<[i64; N]> {
    let bytes = text.as_bytes();
    if fixed.iter().any(|(at, byte)| bytes.get(*at) != Some(byte)) {
        return None;
    }
    let mut found = [0; N];
    for (number, (start, digits)) in found.iter_mut().zip(places) {
        for byte in bytes.get(start..start + digits)? {
            if !byte.is_ascii_digit() {
                return None;
            }
            *number = *number * 10 + i64::from(byte - b'0');
        }
    }
    Some(found)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01. Years begin in March here, so that the leap day is the last one.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The inverse of [`days`].
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;
