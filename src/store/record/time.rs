//! Times as Go writes and reads them: RFC 3339, to the millisecond here. Pure.

use chrono::{DateTime, SecondsFormat};

/// Go's zero time, 0001-01-01: what stands for a time that is missing.
pub const ZERO_MS: i64 = -62_135_596_800_000;
/// From year 0 to the end of year 9999, which is what four digits can show.
const RANGE_MS: (i64, i64) = (-62_167_219_200_000, 253_402_300_799_999);

/// Milliseconds since 1970 as Go writes them: in UTC, a fraction without trailing zeros.
#[must_use]
pub fn format(unix_ms: i64) -> String {
    let time = DateTime::from_timestamp_millis(unix_ms.clamp(RANGE_MS.0, RANGE_MS.1)).unwrap_or_default();
    let text = time.to_rfc3339_opts(SecondsFormat::Millis, true);
    format!("{}Z", text.trim_end_matches(['Z', '0']).trim_end_matches('.'))
}

/// Reads what Go reads: `T` and `Z` in upper case, no leap second, any offset, a fraction after a point or a comma.
#[must_use]
pub fn parse(text: &str) -> Option<i64> {
    let is_strict = text.as_bytes().get(10) == Some(&b'T') && !text.ends_with('z') && text.get(17..19)? < "60";
    let time = DateTime::parse_from_rfc3339(&text.replacen(',', ".", 1)).ok()?;
    is_strict.then(|| time.timestamp_millis())
}

#[cfg(test)]
mod tests;
