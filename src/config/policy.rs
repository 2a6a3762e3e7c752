//! Rights of those who are dealt with: what they may do, and how often.

use std::num::NonZeroU32;

use super::reader::{Reader, shown, whole_number};
use crate::access::Source;
use crate::admission::rates::{Rate, Rates};

const PUBLISH_SOURCES: &str = "LIVEKIT_PUBLISH_SOURCES";
const MAX_PARTICIPANTS: &str = "LIVEKIT_MAX_PARTICIPANTS";
/// Requests a minute of each user, unless the operator says otherwise.
const USER_RATE: NonZeroU32 = NonZeroU32::new(60).unwrap();
/// Higher rates than this say `off`.
const MAX_RATE: u64 = 100_000;
/// More participants than any room of LiveKit holds.
const MOST_PARTICIPANTS: u64 = 100_000;

/// How often users, and homeservers that are not listed, may ask.
pub(super) fn rates(reader: &mut Reader<'_>) -> Rates {
    Rates {
        user: rate(reader, "LIVEKIT_RATE_LIMIT_USER", Some(Rate(USER_RATE))),
        homeserver: rate(reader, "LIVEKIT_RATE_LIMIT_HOMESERVER", None),
    }
}

fn rate(reader: &mut Reader<'_>, variable: &'static str, default: Option<Rate>) -> Option<Rate> {
    let Some(value) = reader.value(variable) else { return default };
    if value.eq_ignore_ascii_case("off") {
        return None;
    }
    let number = whole_number(&value).filter(|number| *number <= MAX_RATE);
    let rate = number.and_then(|number| NonZeroU32::new(u32::try_from(number).ok()?));
    if rate.is_none() {
        let text = format!(
            "must be a whole number of requests a minute from 1 to {MAX_RATE}, or off, not {}",
            shown(&value)
        );
        reader.mistake(variable, text);
    }
    rate.map(Rate)
}

/// Kinds of tracks that may be published, in the order of [`Source::ALL`].
pub(super) fn publish_sources(reader: &mut Reader<'_>) -> Vec<Source> {
    let all = Source::ALL.to_vec();
    let Some(value) = reader.value(PUBLISH_SOURCES) else { return all };
    if value.eq_ignore_ascii_case("all") {
        return all;
    }
    let is_named = |source: &Source| super::lists::items(&value).any(|item| item.eq_ignore_ascii_case(source.word()));
    let named: Vec<Source> = all.into_iter().filter(is_named).collect();
    let is_source = |item: &str| Source::ALL.iter().any(|source| item.eq_ignore_ascii_case(source.word()));
    let unknown = super::lists::items(&value).find(|item| !is_source(item));
    if unknown.is_some() || named.is_empty() {
        let words: Vec<_> = Source::ALL.iter().map(|source| source.word()).collect();
        let text = format!(
            "must be all, or some of {}, by comma or space, not {}",
            words.join(", "),
            shown(unknown.unwrap_or(&value))
        );
        reader.mistake(PUBLISH_SOURCES, text);
    }
    named
}

/// How many may be in a room that the service opens; 0 is as many as LiveKit takes.
pub(super) fn max_participants(reader: &mut Reader<'_>) -> u32 {
    let Some(value) = reader.value(MAX_PARTICIPANTS) else { return 0 };
    let number = whole_number(&value).filter(|number| *number <= MOST_PARTICIPANTS);
    let number = number.and_then(|number| u32::try_from(number).ok());
    if number.is_none() {
        let text = format!(
            "must be a whole number of participants up to {MOST_PARTICIPANTS}, 0 for no limit, not {}",
            shown(&value)
        );
        reader.mistake(MAX_PARTICIPANTS, text);
    }
    number.unwrap_or(0)
}
