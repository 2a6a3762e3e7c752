//! A job as it is stored: one field of a hash and its value, in the form that the Go service reads and writes too. Pure.
//!
//! What that service knows stands under its names. What it does not know stands under one key of ours, `OURS`, which
//! it ignores, and no key of which is required, so that owner and generation of a job can be added there. Keys that
//! nobody here knows are written back as they were read.

use std::borrow::Cow;
use std::io;
use std::str::FromStr as _;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::value::RawValue;

pub mod time;

/// The longest field and the longest value that are read or written.
pub const MAX_BYTES: usize = 16 * 1024;

/// The key below which everything stands that only we store.
const OURS: &str = "LkJwtServiceWatch";

/// A job: what the Go service stores of it, and what we store beside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredJob<'a> {
    /// The room's name on the SFU.
    pub room: Cow<'a, str>,
    /// The participant's identity there.
    pub identity: Cow<'a, str>,
    /// The delayed event.
    pub delay_id: Cow<'a, str>,
    /// Its delay in milliseconds; what was read may be any number.
    pub delay_ms: i64,
    /// The homeserver.
    pub homeserver: Cow<'a, str>,
    /// When the event last began to run, in milliseconds since 1970.
    pub restarted_at_ms: i64,
    /// What only we store.
    pub watch: Watch<'a>,
}

/// What only we store of a job; all of it is absent from a record of the Go service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watch<'a> {
    /// The Matrix user.
    pub user: Option<Cow<'a, str>>,
    /// When the delegation arrived, in milliseconds since 1970.
    pub delegated_at_ms: Option<i64>,
    /// Whether the room may be created for this user's sake.
    pub creates_room: Option<bool>,
    /// Whether calls carry the as_token and the user.
    pub as_user: Option<bool>,
    /// The participant's sid.
    pub sid: Option<Cow<'a, str>>,
    /// When that session joined, by the SFU's clock; 0 where it is not known.
    pub joined_at_ms: u64,
    /// The room's sid at the last sighting.
    pub room_sid: Option<Cow<'a, str>>,
    /// The last sighting, in milliseconds since 1970.
    pub last_sighted_ms: Option<i64>,
    /// Whether the participant was seen.
    pub seen: bool,
}

/// What has to be known of a record that was read in order to write or delete it again without loss.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The field, where it is not spelled as [`field`] spells it.
    field: Option<Box<str>>,
    /// A time with more digits or another offset than ours, and the milliseconds that it stands for.
    restarted_at: Option<(i64, Box<str>)>,
    /// A delay in nanoseconds that is no whole number of milliseconds.
    delay_ns: Option<i64>,
    unknown: Unknown,
    unknown_params: Unknown,
    unknown_watch: Unknown,
}

type Unknown = Vec<(Box<str>, Box<RawValue>)>;

/// Why a record cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Longer than [`MAX_BYTES`].
    #[error("it is too long")]
    TooLong,
    /// Not UTF-8.
    #[error("it is not UTF-8")]
    NotText,
    /// Not a JSON object.
    #[error("it is no JSON object")]
    NotJson,
    /// A known key holds another type than it should.
    #[error("a value has the wrong type")]
    WrongType,
    /// The time is none.
    #[error("RestartedAt is no time")]
    NotTime,
    /// Neither the field nor the value names a room and a participant.
    #[error("it names no room or no participant")]
    Nameless,
}

/// The field of a job.
#[must_use]
pub fn field(room: &str, identity: &str) -> String {
    go_json(&[room, identity])
}

/// The field under which a job is to be stored: the one that it was read from, if any.
#[must_use]
pub fn field_of(room: &str, identity: &str, origin: Option<&Origin>) -> String {
    match origin.and_then(|origin| origin.field.as_deref()) {
        Some(field) => field.to_owned(),
        None => field(room, identity),
    }
}

impl StoredJob<'_> {
    /// The value.
    #[must_use]
    pub fn value(&self, origin: Option<&Origin>) -> String {
        let empty = Origin::default();
        let value = go_json(&Value {
            job: self,
            origin: origin.unwrap_or(&empty),
        });
        if value.len() > MAX_BYTES && origin.is_some() {
            return self.value(None);
        }
        value
    }

    /// When the homeserver sends the event unless it is restarted, in milliseconds since 1970.
    #[must_use]
    pub const fn expires_at_ms(&self) -> i64 {
        self.restarted_at_ms.saturating_add(self.delay_ms)
    }
}

impl StoredJob<'static> {
    /// Reads a record. There is no [`Origin`] where it is written as we would write it.
    ///
    /// # Errors
    /// When it is not one.
    pub fn read(field: &[u8], value: &[u8]) -> Result<(Self, Option<Box<Origin>>), Unreadable> {
        if field.len() > MAX_BYTES || value.len() > MAX_BYTES {
            return Err(Unreadable::TooLong);
        }
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| Unreadable::NotText);
        read(text(field)?, text(value)?)
    }
}

fn read(stored_field: &str, value: &str) -> Result<(StoredJob<'static>, Option<Box<Origin>>), Unreadable> {
    let mut origin = Origin::default();
    let (mut room, mut identity, mut delay_id, mut homeserver) = Default::default();
    let (mut delay_ms, mut restarted_at_ms) = (0, time::ZERO_MS);
    let mut watch = Watch::default();

    for (key, raw) in entries(value)? {
        if key.eq_ignore_ascii_case("Params") {
            if is_null(raw) {
                continue;
            }
            for (key, raw) in entries(raw.get())? {
                match key.to_ascii_lowercase().as_str() {
                    "delayid" => set(&mut delay_id, raw)?,
                    "servername" => set(&mut homeserver, raw)?,
                    "livekitroom" => set(&mut room, raw)?,
                    "livekitidentity" => set(&mut identity, raw)?,
                    "delaytimeout" if is_null(raw) => {}
                    "delaytimeout" => {
                        let ns = integer(raw).ok_or(Unreadable::WrongType)?;
                        delay_ms = ns.div_euclid(1_000_000);
                        origin.delay_ns = (ns % 1_000_000 != 0).then_some(ns);
                    }
                    _ => origin.unknown_params.push((key, raw.to_owned())),
                }
            }
        } else if key.eq_ignore_ascii_case("RestartedAt") {
            if is_null(raw) {
                continue;
            }
            let text: String = serde_json::from_str(raw.get()).map_err(|_| Unreadable::WrongType)?;
            restarted_at_ms = time::parse(&text).ok_or(Unreadable::NotTime)?;
            origin.restarted_at = (time::format(restarted_at_ms) != text).then(|| (restarted_at_ms, text.into()));
        } else if &*key == OURS {
            // Ours is an extra: what is wrong in it is as good as absent.
            for (key, raw) in entries(raw.get()).unwrap_or_default() {
                let known = match &*key {
                    "user" => put(&mut watch.user, string(raw)),
                    "delegatedAt" => put(&mut watch.delegated_at_ms, integer(raw)),
                    "createsRoom" => put(&mut watch.creates_room, boolean(raw)),
                    "asUser" => put(&mut watch.as_user, boolean(raw)),
                    "sid" => put(&mut watch.sid, string(raw)),
                    "joinedAtMs" => {
                        watch.joined_at_ms = integer(raw).and_then(|ms| ms.try_into().ok()).unwrap_or(0);
                        true
                    }
                    "roomSid" => put(&mut watch.room_sid, string(raw)),
                    "lastSighted" => put(&mut watch.last_sighted_ms, integer(raw)),
                    "seen" => {
                        watch.seen = boolean(raw).unwrap_or(false);
                        true
                    }
                    _ => false,
                };
                if !known {
                    origin.unknown_watch.push((key, raw.to_owned()));
                }
            }
        } else {
            origin.unknown.push((key, raw.to_owned()));
        }
    }

    if room.is_empty() || identity.is_empty() {
        (room, identity) = serde_json::from_str(stored_field).map_err(|_| Unreadable::Nameless)?;
        if room.is_empty() || identity.is_empty() {
            return Err(Unreadable::Nameless);
        }
    }
    if field(&room, &identity) != stored_field {
        origin.field = Some(stored_field.into());
    }
    let job = StoredJob {
        room: room.into(),
        identity: identity.into(),
        delay_id: delay_id.into(),
        delay_ms,
        homeserver: homeserver.into(),
        restarted_at_ms,
        watch,
    };
    let plain = origin.field.is_none()
        && origin.restarted_at.is_none()
        && origin.delay_ns.is_none()
        && [&origin.unknown, &origin.unknown_params, &origin.unknown_watch]
            .iter()
            .all(|list| list.is_empty());
    Ok((job, (!plain).then(|| Box::new(origin))))
}

/// The members of an object, in their order.
fn entries(json: &str) -> Result<Vec<(Box<str>, &RawValue)>, Unreadable> {
    let Entries(entries) = serde_json::from_str(json).map_err(|_| Unreadable::NotJson)?;
    Ok(entries)
}

struct Entries<'a>(Vec<(Box<str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

fn set(text: &mut String, raw: &RawValue) -> Result<(), Unreadable> {
    if !is_null(raw) {
        *text = serde_json::from_str(raw.get()).map_err(|_| Unreadable::WrongType)?;
    }
    Ok(())
}

fn put<T>(slot: &mut Option<T>, value: Option<T>) -> bool {
    *slot = value;
    true
}

fn string(raw: &RawValue) -> Option<Cow<'static, str>> {
    serde_json::from_str(raw.get()).ok().map(Cow::Owned)
}

fn boolean(raw: &RawValue) -> Option<bool> {
    bool::from_str(raw.get()).ok()
}

/// A whole number, also when it is written with a fraction of zero.
fn integer(raw: &RawValue) -> Option<i64> {
    raw.get().parse().ok().or_else(|| {
        let number: f64 = serde_json::from_str(raw.get()).ok()?;
        // The bounds are exact in `f64`; the upper one is just beyond the largest `i64`.
        let whole = number.fract() == 0.0 && (-9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0).contains(&number);
        #[expect(clippy::cast_possible_truncation, reason = "checked")]
        whole.then_some(number as i64)
    })
}

struct Value<'a> {
    job: &'a StoredJob<'a>,
    origin: &'a Origin,
}

impl Serialize for Value<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { job, origin } = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("Params", &Params(self))?;
        match &origin.restarted_at {
            Some((ms, text)) if *ms == job.restarted_at_ms => map.serialize_entry("RestartedAt", text)?,
            Some(_) | None => map.serialize_entry("RestartedAt", &time::format(job.restarted_at_ms))?,
        }
        if job.watch != Watch::default() || !origin.unknown_watch.is_empty() {
            map.serialize_entry(OURS, &Ours(self))?;
        }
        for (key, raw) in &origin.unknown {
            map.serialize_entry(key, raw)?;
        }
        map.end()
    }
}

struct Params<'a>(&'a Value<'a>);

impl Serialize for Params<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Value { job, origin } = self.0;
        let exact = origin.delay_ns.filter(|ns| ns.div_euclid(1_000_000) == job.delay_ms);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("DelayId", &job.delay_id)?;
        map.serialize_entry("DelayTimeout", &exact.unwrap_or_else(|| job.delay_ms.saturating_mul(1_000_000)))?;
        map.serialize_entry("ServerName", &job.homeserver)?;
        map.serialize_entry("LiveKitRoom", &job.room)?;
        map.serialize_entry("LiveKitIdentity", &job.identity)?;
        for (key, raw) in &origin.unknown_params {
            map.serialize_entry(key, raw)?;
        }
        map.end()
    }
}

struct Ours<'a>(&'a Value<'a>);

impl Serialize for Ours<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        fn entry<M: serde::ser::SerializeMap, T: Serialize>(map: &mut M, key: &str, value: Option<T>) -> Result<(), M::Error> {
            value.map_or(Ok(()), |value| map.serialize_entry(key, &value))
        }
        let Value { job, origin } = self.0;
        let watch = &job.watch;
        let mut map = serializer.serialize_map(None)?;
        entry(&mut map, "user", watch.user.as_ref())?;
        entry(&mut map, "delegatedAt", watch.delegated_at_ms)?;
        entry(&mut map, "createsRoom", watch.creates_room)?;
        entry(&mut map, "asUser", watch.as_user)?;
        entry(&mut map, "sid", watch.sid.as_ref())?;
        entry(&mut map, "joinedAtMs", Some(watch.joined_at_ms).filter(|ms| *ms != 0))?;
        entry(&mut map, "roomSid", watch.room_sid.as_ref())?;
        entry(&mut map, "lastSighted", watch.last_sighted_ms)?;
        entry(&mut map, "seen", Some(watch.seen).filter(|seen| *seen))?;
        for (key, raw) in &origin.unknown_watch {
            map.serialize_entry(key, raw)?;
        }
        map.end()
    }
}

fn go_json(value: &impl Serialize) -> String {
    let mut out = Vec::with_capacity(512);
    // Writing to memory does not fail, and every text that is written is UTF-8.
    let _ = value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, AsGo));
    String::from_utf8(out).unwrap_or_default()
}

/// Go escapes what might end a script element of a page.
struct AsGo;

impl serde_json::ser::Formatter for AsGo {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            let (plain, tail) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = tail.chars();
            if let Some(c) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests;
