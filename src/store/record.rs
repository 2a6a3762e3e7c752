//! A job as it is stored: one field of a hash and its value, in the form that the Go service reads and writes too. Pure.
//!
//! What that service knows stands under its names. What only this service stores stands under one key, `OURS`, which the Go
//! service ignores and no key of which is required. Unknown keys, at every level, are written back as they were read.

use std::borrow::Cow;
use std::io;
use std::str::FromStr as _;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

pub mod time;

/// The longest field and the longest value that are read or written.
pub const MAX_BYTES: usize = 16 * 1024;
/// The longest record, field and value together, that a delegation may lead to (decision L8).
pub const MAX_DELEGATED_BYTES: usize = 2 * 1024;
/// The replaced events that a record names.
pub const MAX_REPLACED: usize = 8;
/// Bytes for what is not known of a new delegation yet and will be stored: sids, times, and that the participant was seen.
const SIGHTING_BYTES: usize = 160;

/// All that is written of a new delegation beside its names is shorter.
const FRAME_BYTES: usize = 320;

/// The key of everything that only this service stores.
const OURS: &str = "LkJwtServiceWatch";

/// A job: what the Go service stores of it, and, from `user` on, what is absent from that service's records. All times are in
/// milliseconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobRecord<'a> {
    /// The room's name on the SFU.
    #[serde(skip)]
    pub room: Cow<'a, str>,
    /// Identity of the participant in the room.
    #[serde(skip)]
    pub identity: Cow<'a, str>,
    /// Id of the delayed event.
    #[serde(skip)]
    pub delay_id: Cow<'a, str>,
    /// The event's delay in milliseconds; what was read may be any number.
    #[serde(skip)]
    pub delay_ms: i64,
    /// Homeserver of the user.
    #[serde(skip)]
    pub homeserver: Cow<'a, str>,
    /// When the event last began to run.
    #[serde(skip)]
    pub restarted_at_ms: i64,
    /// The Matrix user; empty where it is not known.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub user: Cow<'a, str>,
    /// When the delegation arrived.
    #[serde(rename = "delegatedAt", skip_serializing_if = "Option::is_none")]
    pub delegated_at_ms: Option<i64>,
    /// Whether calls carry the as_token and the user.
    #[serde(skip_serializing_if = "is_default")]
    pub as_user: bool,
    /// The participant's sid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sid: Option<Cow<'a, str>>,
    /// When that session joined, by the SFU's clock; 0 where it is not known.
    #[serde(skip_serializing_if = "is_default")]
    pub joined_at_ms: u64,
    /// The room's sid at the last sighting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub room_sid: Option<Cow<'a, str>>,
    /// The last sighting.
    #[serde(rename = "lastSighted", skip_serializing_if = "Option::is_none")]
    pub last_sighted_ms: Option<i64>,
    /// Whether the participant was seen.
    #[serde(skip_serializing_if = "is_default")]
    pub seen: bool,
    /// Events that this delegation replaced and that are still to be cancelled, the oldest first (decision L10). Only the last
    /// [`MAX_REPLACED`] are written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<Replaced<'a>>,
}

/// A delayed event of the same user and homeserver that has to be cancelled until its deadline has passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replaced<'a> {
    /// Id of the delayed event.
    pub delay_id: Cow<'a, str>,
    /// When the homeserver will have sent it, in milliseconds since 1970.
    #[serde(rename = "until")]
    pub until_ms: i64,
}

/// Content of a record beside its job: needed to write or delete the record without loss.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    /// The field, where it is not spelled as [`field`] spells it.
    pub(super) field: Option<Box<str>>,
    /// A time with more digits or another offset than ours, and the milliseconds that it stands for.
    restarted_at: Option<(i64, Box<str>)>,
    /// A delay in nanoseconds that is no whole number of milliseconds.
    delay_ns: Option<i64>,
    unknown: Unknown,
    unknown_params: Unknown,
    unknown_ours: Unknown,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Stored<'a> {
    params: Params<'a>,
    restarted_at: Cow<'a, str>,
    #[serde(rename = "LkJwtServiceWatch", skip_serializing_if = "Option::is_none")]
    ours: Option<Box<RawValue>>,
    #[serde(flatten, serialize_with = "members")]
    unknown: &'a Unknown,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Params<'a> {
    delay_id: &'a str,
    delay_timeout: i64,
    server_name: &'a str,
    #[serde(rename = "LiveKitRoom")]
    room: &'a str,
    #[serde(rename = "LiveKitIdentity")]
    identity: &'a str,
    #[serde(flatten, serialize_with = "members")]
    unknown: &'a Unknown,
}

#[derive(Serialize)]
struct Ours<'a> {
    #[serde(flatten)]
    job: &'a JobRecord<'a>,
    #[serde(flatten, serialize_with = "members")]
    unknown: &'a Unknown,
}

/// Members of an object that nobody here knows.
type Unknown = Vec<(Box<str>, Box<RawValue>)>;

/// Why a record cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub(super) &'static str);

impl Unreadable {
    const WRONG_TYPE: Self = Self("a value has the wrong type");
    const NOT_JSON: Self = Self("it is no JSON object");
    const NAMELESS: Self = Self("it names no room or no participant");
}

/// The field of a job.
#[must_use]
pub fn field(room: &str, identity: &str) -> String {
    go_json(&[room, identity])
}

impl JobRecord<'_> {
    /// Field of the job in the table.
    #[must_use]
    pub fn field(&self) -> String {
        field(&self.room, &self.identity)
    }

    /// The value of a job that was never read.
    #[must_use]
    pub fn value(&self) -> String {
        self.value_with(&Origin::default())
    }

    /// The value. Where it would be too long to be read again, unknown keys go first, then the oldest replaced events.
    pub(super) fn value_with(&self, origin: &Origin) -> String {
        let mut job = self.clone();
        job.replaces.drain(..self.replaces.len().saturating_sub(MAX_REPLACED));
        let mut value = job.write(origin);
        while value.len() > MAX_BYTES {
            let written = job.write(&Origin::default());
            if written.len() <= MAX_BYTES || job.replaces.is_empty() {
                return written;
            }
            value = written;
            job.replaces.remove(0);
        }
        value
    }

    fn write(&self, origin: &Origin) -> String {
        let ours = go_json(&Ours {
            job: self,
            unknown: &origin.unknown_ours,
        });
        let exact_delay = origin.delay_ns.filter(|ns| ns.div_euclid(1_000_000) == self.delay_ms);
        let exact_time = origin.restarted_at.as_ref().filter(|(ms, _)| *ms == self.restarted_at_ms);
        go_json(&Stored {
            params: Params {
                delay_id: &self.delay_id,
                delay_timeout: exact_delay.unwrap_or_else(|| self.delay_ms.saturating_mul(1_000_000)),
                server_name: &self.homeserver,
                room: &self.room,
                identity: &self.identity,
                unknown: &origin.unknown_params,
            },
            restarted_at: exact_time.map_or_else(|| time::format(self.restarted_at_ms).into(), |(_, text)| (&**text).into()),
            ours: (ours != "{}").then(|| RawValue::from_string(ours).ok()).flatten(),
            unknown: &origin.unknown,
        })
    }

    /// Whether the record of a new delegation is short enough (decision L8), with what a sighting will add to it.
    #[must_use]
    pub fn fits(&self) -> bool {
        // Most are short enough however they are written: they need not be written to see it.
        self.longest() + SIGHTING_BYTES <= MAX_DELEGATED_BYTES
            || self.field().len() + self.value().len() + SIGHTING_BYTES <= MAX_DELEGATED_BYTES
    }

    /// What the record of a new delegation does not exceed, field and value together.
    fn longest(&self) -> usize {
        // Room and identity stand in both.
        let names = [&self.room, &self.room, &self.identity, &self.identity];
        let names = names.into_iter().chain([&self.delay_id, &self.homeserver, &self.user]);
        let written = |byte: u8| {
            if byte.is_ascii_alphanumeric() || b"+/-._~=@:!#$ ".contains(&byte) {
                1
            } else {
                6
            }
        };
        names.map(|name| name.bytes().map(written).sum::<usize>()).sum::<usize>() + FRAME_BYTES
    }

    /// When the homeserver sends the event unless it is restarted, in milliseconds since 1970.
    #[must_use]
    pub const fn expires_at_ms(&self) -> i64 {
        self.restarted_at_ms.saturating_add(self.delay_ms)
    }
}

impl JobRecord<'static> {
    /// Reads a record.
    ///
    /// # Errors
    /// When it is not one.
    pub fn read(field: &[u8], value: &[u8]) -> Result<Self, Unreadable> {
        Self::read_with(field, value).map(|(job, _)| job)
    }

    /// Reads a job with its origin, which is empty where the record is written as [`Self::value`] writes it.
    pub(super) fn read_with(field: &[u8], value: &[u8]) -> Result<(Self, Origin), Unreadable> {
        if field.len() > MAX_BYTES || value.len() > MAX_BYTES {
            return Err(Unreadable("it is too long"));
        }
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| Unreadable("it is not UTF-8"));
        read(text(field)?, text(value)?)
    }
}

impl Origin {
    /// Forgets what the job as it is written now has overwritten. `false` where nothing is left to remember.
    pub(super) fn keep_for(&mut self, job: &JobRecord<'_>) -> bool {
        self.restarted_at.take_if(|(ms, _)| *ms != job.restarted_at_ms);
        !self.is_plain()
    }

    pub(super) fn is_plain(&self) -> bool {
        self.field.is_none() && self.restarted_at.is_none() && self.delay_ns.is_none() && self.lists().all(Vec::is_empty)
    }

    /// About how much memory the record takes.
    pub(super) fn bytes(&self) -> usize {
        let texts = [self.field.as_deref(), self.restarted_at.as_ref().map(|(_, text)| &**text)];
        let members = self.lists().flatten().map(|(key, raw)| 48 + key.len() + raw.get().len());
        size_of::<Self>() + texts.into_iter().flatten().map(str::len).sum::<usize>() + members.sum::<usize>()
    }

    fn lists(&self) -> impl Iterator<Item = &Unknown> {
        [&self.unknown, &self.unknown_params, &self.unknown_ours].into_iter()
    }
}

fn read(stored_field: &str, value: &str) -> Result<(JobRecord<'static>, Origin), Unreadable> {
    let mut origin = Origin::default();
    let mut job = JobRecord {
        restarted_at_ms: time::ZERO_MS,
        ..JobRecord::default()
    };
    for (key, raw) in entries(value)? {
        if key.eq_ignore_ascii_case("Params") {
            if !is_null(raw) {
                read_params(&mut job, &mut origin, entries(raw.get())?)?;
            }
        } else if key.eq_ignore_ascii_case("RestartedAt") {
            if is_null(raw) {
                continue;
            }
            let text: String = serde_json::from_str(raw.get()).map_err(|_| Unreadable::WRONG_TYPE)?;
            job.restarted_at_ms = time::parse(&text).ok_or(Unreadable("RestartedAt is no time"))?;
            origin.restarted_at = (time::format(job.restarted_at_ms) != text).then(|| (job.restarted_at_ms, text.into()));
        } else if &*key == OURS {
            // Ours is an extra: what is wrong in it is as good as absent.
            read_ours(&mut job, &mut origin, entries(raw.get()).unwrap_or_default());
        } else {
            origin.unknown.push((key, raw.to_owned()));
        }
    }
    if job.room.is_empty() || job.identity.is_empty() {
        let (room, identity): (String, String) = serde_json::from_str(stored_field).map_err(|_| Unreadable::NAMELESS)?;
        (job.room, job.identity) = (room.into(), identity.into());
    }
    if job.room.is_empty() || job.identity.is_empty() {
        return Err(Unreadable::NAMELESS);
    }
    if !is_event(&job.delay_id) {
        return Err(Unreadable("DelayId is not the id of an event"));
    }
    origin.field = (job.field() != stored_field).then(|| stored_field.into());
    Ok((job, origin))
}

fn read_params(job: &mut JobRecord<'_>, origin: &mut Origin, params: Vec<(Box<str>, &RawValue)>) -> Result<(), Unreadable> {
    for (key, raw) in params {
        let text = match key.to_ascii_lowercase().as_str() {
            "delayid" => &mut job.delay_id,
            "servername" => &mut job.homeserver,
            "livekitroom" => &mut job.room,
            "livekitidentity" => &mut job.identity,
            "delaytimeout" => {
                if !is_null(raw) {
                    let ns = integer(raw).ok_or(Unreadable::WRONG_TYPE)?;
                    job.delay_ms = ns.div_euclid(1_000_000);
                    origin.delay_ns = (ns % 1_000_000 != 0).then_some(ns);
                }
                continue;
            }
            _ => {
                origin.unknown_params.push((key, raw.to_owned()));
                continue;
            }
        };
        if !is_null(raw) {
            *text = string(raw).ok_or(Unreadable::WRONG_TYPE)?;
        }
    }
    Ok(())
}

fn read_ours(job: &mut JobRecord<'_>, origin: &mut Origin, ours: Vec<(Box<str>, &RawValue)>) {
    for (key, raw) in ours {
        match &*key {
            "user" => job.user = string(raw).unwrap_or_default(),
            "delegatedAt" => job.delegated_at_ms = integer(raw),
            "asUser" => job.as_user = boolean(raw),
            "sid" => job.sid = string(raw),
            "joinedAtMs" => job.joined_at_ms = integer(raw).and_then(|ms| ms.try_into().ok()).unwrap_or(0),
            "roomSid" => job.room_sid = string(raw),
            "lastSighted" => job.last_sighted_ms = integer(raw),
            "seen" => job.seen = boolean(raw),
            "replaces" => {
                let read: Vec<Replaced<'static>> = serde_json::from_str(raw.get()).unwrap_or_default();
                job.replaces = read.into_iter().filter(|replaced| is_event(&replaced.delay_id)).collect();
                job.replaces.drain(..job.replaces.len().saturating_sub(MAX_REPLACED));
            }
            // Always true where former versions wrote it.
            "createsRoom" => {}
            _ => origin.unknown_ours.push((key, raw.to_owned())),
        }
    }
}

fn is_event(delay_id: &str) -> bool {
    !matches!(delay_id, "" | "." | "..")
}

/// The members of an object, in their order.
fn entries(json: &str) -> Result<Vec<(Box<str>, &RawValue)>, Unreadable> {
    struct Members;
    impl<'de> Visitor<'de> for Members {
        type Value = Vec<(Box<str>, &'de RawValue)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    let mut json = serde_json::Deserializer::from_str(json);
    let entries = json.deserialize_map(Members).map_err(|_| Unreadable::NOT_JSON)?;
    json.end().map_err(|_| Unreadable::NOT_JSON)?;
    Ok(entries)
}

fn members<S: Serializer>(unknown: &&Unknown, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(unknown.iter().map(|(key, raw)| (key, raw)))
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

fn string(raw: &RawValue) -> Option<Cow<'static, str>> {
    serde_json::from_str(raw.get()).ok().map(Cow::Owned)
}

fn boolean(raw: &RawValue) -> bool {
    bool::from_str(raw.get()).unwrap_or(false)
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
