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
    /// The SFU has told that this room is over.
    #[serde(skip_serializing_if = "is_default")]
    pub room_over: bool,
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

/// Content of a stored record beside its job: it is written back as it was read.
#[derive(Default)]
struct Beside<'a> {
    /// When the event last began to run, with all its digits and its offset, and the milliseconds that it stands for.
    restarted_at: Option<(i64, String)>,
    delay_ns: Option<i64>,
    unknown: Members<'a>,
    unknown_params: Members<'a>,
    unknown_ours: Members<'a>,
}

impl Beside<'_> {
    fn is_nothing(&self) -> bool {
        let time = self.restarted_at.as_ref();
        time.is_none_or(|(ms, text)| time::format(*ms) == *text)
            && self.delay_ns.is_none_or(|ns| ns % 1_000_000 == 0)
            && [&self.unknown, &self.unknown_params, &self.unknown_ours]
                .into_iter()
                .all(Vec::is_empty)
    }
}

/// Members of an object, in their order.
type Members<'a> = Vec<(Box<str>, &'a RawValue)>;

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Stored<'a> {
    params: Params<'a>,
    restarted_at: Cow<'a, str>,
    #[serde(rename = "LkJwtServiceWatch", skip_serializing_if = "Option::is_none")]
    ours: Option<Box<RawValue>>,
    #[serde(flatten, serialize_with = "as_object")]
    unknown: &'a Members<'a>,
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
    #[serde(flatten, serialize_with = "as_object")]
    unknown: &'a Members<'a>,
}

#[derive(Serialize)]
struct Ours<'a> {
    #[serde(flatten)]
    job: &'a JobRecord<'a>,
    #[serde(flatten, serialize_with = "as_object")]
    unknown: &'a Members<'a>,
}

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
        self.value_over("")
    }

    /// The value in the place of `stored`, of which it keeps what is no part of a job. Where it would be too long to be read again,
    /// that goes first, then the oldest replaced events.
    pub(super) fn value_over(&self, stored: &str) -> String {
        let mut job = self.clone();
        job.replaces.drain(..self.replaces.len().saturating_sub(MAX_REPLACED));
        let beside = parse(stored).map(|(_, beside)| beside).unwrap_or_default();
        let mut value = job.write(&beside);
        if value.len() > MAX_BYTES {
            value = job.write(&Beside::default());
        }
        while value.len() > MAX_BYTES && !job.replaces.is_empty() {
            job.replaces.remove(0);
            value = job.write(&Beside::default());
        }
        value
    }

    fn write(&self, beside: &Beside<'_>) -> String {
        let ours = go_json(&Ours {
            job: self,
            unknown: &beside.unknown_ours,
        });
        let exact_delay = beside.delay_ns.filter(|ns| ns.div_euclid(1_000_000) == self.delay_ms);
        let exact_time = beside.restarted_at.as_ref().filter(|(ms, _)| *ms == self.restarted_at_ms);
        go_json(&Stored {
            params: Params {
                delay_id: &self.delay_id,
                delay_timeout: exact_delay.unwrap_or_else(|| self.delay_ms.saturating_mul(1_000_000)),
                server_name: &self.homeserver,
                room: &self.room,
                identity: &self.identity,
                unknown: &beside.unknown_params,
            },
            restarted_at: exact_time.map_or_else(|| time::format(self.restarted_at_ms).into(), |(_, text)| text.into()),
            ours: (ours != "{}").then(|| RawValue::from_string(ours).ok()).flatten(),
            unknown: &beside.unknown,
        })
    }

    /// Whether the record of a new delegation is short enough (decision L8), with what a sighting will add to it.
    #[must_use]
    pub fn fits(&self) -> bool {
        // Most are short enough however they are written: they need not be written to see it.
        self.longest() + SIGHTING_BYTES <= MAX_DELEGATED_BYTES
            || self.field().len() + self.value().len() + SIGHTING_BYTES <= MAX_DELEGATED_BYTES
    }

    /// Upper bound of the record of a new delegation, field and value together.
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

impl JobRecord<'_> {
    /// Copies the texts that the record borrows.
    #[must_use]
    pub fn into_owned(self) -> JobRecord<'static> {
        let own = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        JobRecord {
            room: own(self.room),
            identity: own(self.identity),
            delay_id: own(self.delay_id),
            homeserver: own(self.homeserver),
            user: own(self.user),
            sid: self.sid.map(own),
            room_sid: self.room_sid.map(own),
            replaces: self
                .replaces
                .into_iter()
                .map(|replaced| Replaced {
                    delay_id: own(replaced.delay_id),
                    until_ms: replaced.until_ms,
                })
                .collect(),
            delay_ms: self.delay_ms,
            restarted_at_ms: self.restarted_at_ms,
            delegated_at_ms: self.delegated_at_ms,
            as_user: self.as_user,
            joined_at_ms: self.joined_at_ms,
            room_over: self.room_over,
            last_sighted_ms: self.last_sighted_ms,
            seen: self.seen,
        }
    }

    /// The record of a delegation in order with what is stored for its participant (decision L14): whichever arrived later counts, and
    /// names the other's event among those that are still to be cancelled. Where they arrived within `near_ms` of each other, or the
    /// stored one after `now_ms`, this one counts. `None` where the stored one is another user's.
    #[must_use]
    pub fn in_order_with<'b>(&'b self, stored: Option<&'b JobRecord<'_>>, now_ms: Option<i64>, near_ms: i64) -> Option<JobRecord<'b>> {
        let Some(stored) = stored else { return Some(self.clone()) };
        if !stored.user.is_empty() && stored.user != self.user {
            return None;
        }
        let arrived = |job: &JobRecord<'_>| job.delegated_at_ms.unwrap_or(job.restarted_at_ms);
        let is_same = stored.delay_id == self.delay_id;
        let is_future = now_ms.is_some_and(|now| arrived(stored) > now);
        let counts = is_same || is_future || arrived(self).saturating_add(near_ms) > arrived(stored);
        let (winner, loser) = if counts { (self, stored) } else { (stored, self) };
        let mut merged: JobRecord<'b> = winner.clone();
        if is_same {
            merged.delegated_at_ms = self.delegated_at_ms.max(stored.delegated_at_ms);
            merged.restarted_at_ms = self.restarted_at_ms.max(stored.restarted_at_ms);
        }
        if loser.last_sighted_ms > winner.last_sighted_ms {
            merged.sid = loser.sid.clone();
            merged.joined_at_ms = loser.joined_at_ms;
            merged.room_sid = loser.room_sid.clone();
            merged.room_over = loser.room_over;
            merged.last_sighted_ms = loser.last_sighted_ms;
        }
        // Who was seen before a later delegation may have left, and is waited for.
        merged.seen |= loser.seen && (is_same || loser.last_sighted_ms >= Some(arrived(winner)));
        let own = (!is_same).then(|| Replaced {
            delay_id: loser.delay_id.clone(),
            until_ms: loser.expires_at_ms(),
        });
        merged.replaces = loser
            .replaces
            .iter()
            .cloned()
            .chain(winner.replaces.iter().cloned())
            .chain(own)
            .collect();
        let mut known = std::collections::HashSet::from([merged.delay_id.clone()]);
        merged.replaces.retain(|replaced| known.insert(replaced.delay_id.clone()));
        Some(merged)
    }

    /// Whether whoever has `other`, an earlier record of the same leave, knows all that this one says of events and of who was seen.
    #[must_use]
    pub fn is_covered_by(&self, other: &Self) -> bool {
        let names = |replaced: &Replaced<'_>| other.replaces.iter().any(|known| known.delay_id == replaced.delay_id);
        self.delay_id == other.delay_id && (self.seen, &self.sid) == (other.seen, &other.sid) && self.replaces.iter().all(names)
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

    /// Reads a job with its value, where that holds what is no part of a job, or else with nothing.
    pub(super) fn read_with<'a>(field: &[u8], value: &'a [u8]) -> Result<(Self, &'a str), Unreadable> {
        if field.len() > MAX_BYTES || value.len() > MAX_BYTES {
            return Err(Unreadable("it is too long"));
        }
        const NOT_UTF8: Unreadable = Unreadable("it is not UTF-8");
        let field = std::str::from_utf8(field).map_err(|_| NOT_UTF8)?;
        let value = std::str::from_utf8(value).map_err(|_| NOT_UTF8)?;
        let (mut job, beside) = parse(value)?;
        if job.room.is_empty() || job.identity.is_empty() {
            let (room, identity): (String, String) = serde_json::from_str(field).map_err(|_| Unreadable::NAMELESS)?;
            (job.room, job.identity) = (room.into(), identity.into());
        }
        if job.room.is_empty() || job.identity.is_empty() {
            return Err(Unreadable::NAMELESS);
        }
        if !is_event(&job.delay_id) {
            return Err(Unreadable("DelayId is not the id of an event"));
        }
        Ok((job, if beside.is_nothing() { "" } else { value }))
    }
}

fn parse(value: &str) -> Result<(JobRecord<'static>, Beside<'_>), Unreadable> {
    let mut beside = Beside::default();
    let mut job = JobRecord {
        restarted_at_ms: time::ZERO_MS,
        ..JobRecord::default()
    };
    for (key, raw) in members(value)? {
        match key.to_ascii_lowercase().as_str() {
            "params" | "restartedat" if is_null(raw) => {}
            "params" => parse_params(&mut job, &mut beside, members(raw.get())?)?,
            "restartedat" => {
                let text: String = serde_json::from_str(raw.get()).map_err(|_| Unreadable::WRONG_TYPE)?;
                job.restarted_at_ms = time::parse(&text).ok_or(Unreadable("RestartedAt is no time"))?;
                beside.restarted_at = Some((job.restarted_at_ms, text));
            }
            // Ours is an extra: what is wrong in it is as good as absent.
            _ if &*key == OURS => parse_ours(&mut job, &mut beside, members(raw.get()).unwrap_or_default()),
            _ => beside.unknown.push((key, raw)),
        }
    }
    Ok((job, beside))
}

fn parse_params<'a>(job: &mut JobRecord<'_>, beside: &mut Beside<'a>, params: Members<'a>) -> Result<(), Unreadable> {
    for (key, raw) in params {
        let text = match key.to_ascii_lowercase().as_str() {
            "delayid" => &mut job.delay_id,
            "servername" => &mut job.homeserver,
            "livekitroom" => &mut job.room,
            "livekitidentity" => &mut job.identity,
            "delaytimeout" => {
                if !is_null(raw) {
                    let ns = integer(raw).ok_or(Unreadable::WRONG_TYPE)?;
                    (job.delay_ms, beside.delay_ns) = (ns.div_euclid(1_000_000), Some(ns));
                }
                continue;
            }
            _ => {
                beside.unknown_params.push((key, raw));
                continue;
            }
        };
        if !is_null(raw) {
            *text = string(raw).ok_or(Unreadable::WRONG_TYPE)?;
        }
    }
    Ok(())
}

fn parse_ours<'a>(job: &mut JobRecord<'_>, beside: &mut Beside<'a>, ours: Members<'a>) {
    for (key, raw) in ours {
        match &*key {
            "user" => job.user = string(raw).unwrap_or_default(),
            "delegatedAt" => job.delegated_at_ms = integer(raw),
            "asUser" => job.as_user = boolean(raw),
            "sid" => job.sid = string(raw),
            "joinedAtMs" => job.joined_at_ms = integer(raw).and_then(|ms| ms.try_into().ok()).unwrap_or(0),
            "roomSid" => job.room_sid = string(raw),
            "roomOver" => job.room_over = boolean(raw),
            "lastSighted" => job.last_sighted_ms = integer(raw),
            "seen" => job.seen = boolean(raw),
            "replaces" => {
                let read: Vec<Replaced<'static>> = serde_json::from_str(raw.get()).unwrap_or_default();
                job.replaces = read.into_iter().filter(|replaced| is_event(&replaced.delay_id)).collect();
                job.replaces.drain(..job.replaces.len().saturating_sub(MAX_REPLACED));
            }
            // Always true where former versions wrote it.
            "createsRoom" => {}
            _ => beside.unknown_ours.push((key, raw)),
        }
    }
}

fn is_event(delay_id: &str) -> bool {
    !matches!(delay_id, "" | "." | "..")
}

fn members(json: &str) -> Result<Members<'_>, Unreadable> {
    struct Object;
    impl<'de> Visitor<'de> for Object {
        type Value = Members<'de>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut members = Vec::new();
            while let Some(member) = map.next_entry()? {
                members.push(member);
            }
            Ok(members)
        }
    }
    let mut json = serde_json::Deserializer::from_str(json);
    let members = json.deserialize_map(Object).map_err(|_| Unreadable::NOT_JSON)?;
    json.end().map_err(|_| Unreadable::NOT_JSON)?;
    Ok(members)
}

fn as_object<S: Serializer>(members: &&Members<'_>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(members.iter().map(|(key, raw)| (key, raw)))
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
