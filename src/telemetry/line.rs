//! A line of the log, in text or as a JSON object: escaped, and with people as far as they are to be seen.

#![expect(clippy::disallowed_methods, reason = "stamps each line with its time")]

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Utc};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use crate::config::{LogFormat, LogUsers};

/// Fields that say who it is about, or where they talk.
const PEOPLE: [&str; 8] = [
    "user",
    "user_id",
    "identity",
    "room",
    "room_id",
    "matrix_room",
    "livekit_room",
    "client",
];
/// Hexadecimal digits that stand for a name.
const HASH_DIGITS: usize = 12;
/// Label under which the key for these digits is derived.
const LABEL: &[u8] = b"lk-jwt-service: names in the log";

/// How lines look.
#[derive(Clone)]
pub(super) struct Shape {
    pub(super) format: LogFormat,
    pub(super) colour: bool,
    pub(super) people: People,
}

impl Shape {
    /// Whether nothing may hold the name of a user or a room.
    pub(super) const fn hides_people(&self) -> bool {
        !matches!(self.people, People::Full)
    }
}

/// How people are shown.
#[derive(Clone)]
pub(super) enum People {
    Full,
    /// As an HMAC: a plain hash of a user's id is guessed.
    Hashed(Box<Hmac<Sha256>>),
    Hidden,
}

impl People {
    /// `secret` is what the key is derived from.
    pub(super) fn new(users: LogUsers, secret: &str) -> Self {
        // An HMAC takes a key of any length.
        let mac = |key: &[u8]| Hmac::<Sha256>::new_from_slice(key).ok();
        let derived = || {
            let mut mac = mac(secret.as_bytes())?;
            mac.update(LABEL);
            Some(mac.finalize().into_bytes())
        };
        match users {
            LogUsers::Full => Self::Full,
            LogUsers::Hash => derived()
                .and_then(|key| mac(&key))
                .map_or(Self::Hidden, |mac| Self::Hashed(Box::new(mac))),
            LogUsers::None => Self::Hidden,
        }
    }
}

/// A line that is being written.
pub(crate) struct Line<'a> {
    text: String,
    shape: &'a Shape,
}

impl<'a> Line<'a> {
    /// The beginning that every line has.
    pub(super) fn begin(shape: &'a Shape, level: Level, target: &str) -> Self {
        let mut line = Self {
            text: String::with_capacity(1024),
            shape,
        };
        match shape.format {
            LogFormat::Json => {
                line.text.push_str("{\"timestamp\":\"");
                push_time(&mut line.text);
                line.text.push_str("\",\"level\":\"");
                line.text.push_str(level.as_str());
                line.text.push_str("\",\"target\":");
                line.quoted(target);
            }
            LogFormat::Text => {
                let (dim, colour, end) = if shape.colour {
                    ("\x1b[2m", ansi(level), "\x1b[0m")
                } else {
                    ("", "", "")
                };
                line.text.push_str(dim);
                push_time(&mut line.text);
                // Part by part: `write!` costs as much as all the fields together.
                for part in [end, " ", colour, padded(level), end, " ", dim, target, ":", end] {
                    line.text.push_str(part);
                }
            }
        }
        line
    }

    /// The event's message, in words of ours.
    pub(crate) fn message(&mut self, message: &str) {
        match self.shape.format {
            LogFormat::Json => {
                self.text.push_str(",\"message\":");
                self.quoted(message);
            }
            LogFormat::Text => {
                self.text.push(' ');
                push_escaped(&mut self.text, message);
            }
        }
    }

    /// A word of ours: letters, digits, `_`, `-`, `.`.
    pub(crate) fn word(&mut self, name: &str, word: &str) {
        self.name(name);
        match self.shape.format {
            LogFormat::Json => self.quoted(word),
            LogFormat::Text => self.text.push_str(word),
        }
    }

    /// Text that anybody may have written. Where the field is about people, as they are to be shown.
    pub(crate) fn text(&mut self, name: &str, text: &str) {
        match &self.shape.people {
            People::Hashed(mac) if PEOPLE.contains(&name) => {
                let mut mac = mac.clone();
                mac.update(text.as_bytes());
                let digest = mac.finalize().into_bytes();
                self.name(name);
                self.text.push('"');
                for byte in digest.iter().take(HASH_DIGITS / 2) {
                    let _ = write!(self.text, "{byte:02x}");
                }
                self.text.push('"');
            }
            People::Hidden if PEOPLE.contains(&name) => {}
            People::Full | People::Hashed(_) | People::Hidden => {
                self.name(name);
                self.quoted(text);
            }
        }
    }

    /// Whether nothing may hold the name of a user or a room.
    pub(crate) const fn hides_people(&self) -> bool {
        self.shape.hides_people()
    }

    /// A client's address; in lines that hash people its network, a /24 or a /48.
    pub(crate) fn client(&mut self, address: IpAddr) {
        match (&self.shape.people, address.to_canonical()) {
            (People::Full, IpAddr::V4(v4)) => {
                self.name("client");
                for (octet, before) in v4.octets().into_iter().zip(['"', '.', '.', '.']) {
                    self.text.push(before);
                    self.text.push_str(itoa::Buffer::new().format(octet));
                }
                self.text.push('"');
            }
            (People::Full, IpAddr::V6(v6)) => {
                self.name("client");
                let _ = write!(self.text, "\"{v6}\"");
            }
            (People::Hashed(_), IpAddr::V4(v4)) => {
                let [a, b, c, _] = v4.octets();
                self.name("client");
                let _ = write!(self.text, "\"{a}.{b}.{c}.0/24\"");
            }
            (People::Hashed(_), IpAddr::V6(v6)) => {
                let [a, b, c, ..] = v6.segments();
                self.name("client");
                let _ = write!(self.text, "\"{a:x}:{b:x}:{c:x}::/48\"");
            }
            (People::Hidden, _) => {}
        }
    }

    /// Any kind of number.
    pub(crate) fn number(&mut self, name: &str, number: u64) {
        self.name(name);
        self.text.push_str(itoa::Buffer::new().format(number));
    }

    /// Yes or no.
    pub(crate) fn flag(&mut self, name: &str, flag: bool) {
        self.name(name);
        self.text.push_str(if flag { "true" } else { "false" });
    }

    /// The whole line.
    pub(super) fn end(mut self) -> String {
        self.text.push_str(match self.shape.format {
            LogFormat::Json => "}\n",
            LogFormat::Text => "\n",
        });
        self.text
    }

    fn name(&mut self, name: &str) {
        match self.shape.format {
            LogFormat::Json => {
                self.text.push_str(",\"");
                self.text.push_str(name);
                self.text.push_str("\":");
            }
            LogFormat::Text if self.shape.colour => {
                self.text.push_str(" \x1b[2m");
                self.text.push_str(name);
                self.text.push_str("=\x1b[0m");
            }
            LogFormat::Text => {
                self.text.push(' ');
                self.text.push_str(name);
                self.text.push('=');
            }
        }
    }

    fn quoted(&mut self, text: &str) {
        match self.shape.format {
            LogFormat::Json | LogFormat::Text if is_plain(text) => {
                self.text.push('"');
                self.text.push_str(text);
                self.text.push('"');
            }
            LogFormat::Text => {
                // As Rust writes a string, which leaves some characters as they are that act all the same.
                let _ = fmt::write(&mut Escaped(&mut self.text), format_args!("{text:?}"));
            }
            LogFormat::Json => push_json(&mut self.text, text),
        }
    }
}

/// Fields of an event of `tracing`.
impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message(value),
            name => self.text(plain(name), value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(plain(field.name()), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.name(plain(field.name()));
        let _ = write!(self.text, "{value}");
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.name(plain(field.name()));
        let _ = write!(self.text, "{value}");
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.flag(plain(field.name()), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let (name, text) = (plain(field.name()), format!("{value:?}"));
        if name == "message" {
            return self.message(&text);
        }
        if PEOPLE.contains(&name) || matches!(self.shape.format, LogFormat::Json) {
            return self.text(name, &text);
        }
        self.name(name);
        push_escaped(&mut self.text, &text);
    }
}

/// The whole line of an event.
pub(super) fn of_event(shape: &Shape, event: &Event<'_>) -> String {
    let mut line = Line::begin(shape, *event.metadata().level(), event.metadata().target());
    event.record(&mut line);
    // Else the place in the source, which `tracing` has made up.
    let name = event.metadata().name();
    if !name.starts_with("event ") {
        line.word("event", name);
    }
    line.end()
}

fn plain(name: &str) -> &str {
    name.trim_start_matches("r#")
}

/// Whether a character would end the line, steer a terminal, or turn the direction of reading.
pub(crate) fn acts(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn push_escaped(into: &mut String, text: &str) {
    if is_plain(text) {
        into.push_str(text);
    } else {
        let _ = Escaped(into).write_str(text);
    }
}

/// Escapes such characters in text, so that no client writes lines of ours or commands of a terminal.
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            if acts(c) {
                self.0.push_str(&text[plain..at]);
                self.0.extend(c.escape_default());
                plain = at + c.len_utf8();
            }
        }
        self.0.push_str(&text[plain..]);
        Ok(())
    }
}

/// Whether all of the text is ASCII that nobody has to escape. Eight bytes at a time, since most of a line goes through here.
fn is_plain(text: &str) -> bool {
    /// Lowest bit of each byte.
    const LOW: u64 = u64::from_ne_bytes([1; 8]);
    /// Highest bit of each byte.
    const HIGH: u64 = LOW << 7;
    // Each has a highest bit where a byte is below `than`, above `than`, or that one.
    let below = |bytes: u64, than: u8| bytes.wrapping_sub(LOW * u64::from(than)) & !bytes;
    let above = |bytes: u64, than: u8| bytes.wrapping_add(LOW * u64::from(0x7f - than)) | bytes;
    let is = |bytes: u64, byte: u8| below(bytes ^ (LOW * u64::from(byte)), 1);
    let acts = |bytes: u64| (below(bytes, b' ') | above(bytes, b'~') | is(bytes, b'"') | is(bytes, b'\\')) & HIGH;
    let (eights, rest) = text.as_bytes().as_chunks();
    let mut last = [b' '; 8];
    last[..rest.len()].copy_from_slice(rest);
    eights.iter().chain([&last]).all(|eight| acts(u64::from_ne_bytes(*eight)) == 0)
}

fn push_json(into: &mut String, text: &str) {
    into.push('"');
    for c in text.chars() {
        match c {
            '"' => into.push_str("\\\""),
            '\\' => into.push_str("\\\\"),
            '\n' => into.push_str("\\n"),
            '\r' => into.push_str("\\r"),
            '\t' => into.push_str("\\t"),
            // All of these are in the basic plane.
            c if acts(c) => drop(write!(into, "\\u{:04x}", u32::from(c))),
            c => into.push(c),
        }
    }
    into.push('"');
}

const fn padded(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => " WARN",
        Level::INFO => " INFO",
        Level::DEBUG => "DEBUG",
        Level::TRACE => "TRACE",
    }
}

const fn ansi(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG => "\x1b[34m",
        Level::TRACE => "\x1b[35m",
    }
}

/// The present moment in UTC, as RFC 3339 writes it, to the microsecond.
pub(super) fn push_time(into: &mut String) {
    thread_local! {
        /// The second that was written last, and how: working out a date costs more than the rest of a line.
        static LAST: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    LAST.with_borrow_mut(|(second, text)| {
        if *second != now.as_secs() {
            *second = now.as_secs();
            let date = DateTime::<Utc>::from_timestamp(i64::try_from(*second).unwrap_or(0), 0).unwrap_or_default();
            *text = date.format("%Y-%m-%dT%H:%M:%S").to_string();
        }
        into.push_str(text);
    });
    // The first digit makes all the others show.
    into.push('.');
    into.push_str(&itoa::Buffer::new().format(1_000_000 + now.subsec_micros())[1..]);
    into.push('Z');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_plain_where_no_byte_has_to_be_escaped_wherever_it_stands() {
        for length in 0..20 {
            let plain = "~ a".chars().cycle().take(length).collect::<String>();
            assert!(is_plain(&plain), "{plain}");
            for at in 0..length {
                for other in 0..=u8::MAX {
                    let other = char::from(other);
                    let text = format!("{}{other}{}", &plain[..at], &plain[at + 1..]);
                    let expected = matches!(other, ' '..='~') && !matches!(other, '"' | '\\');
                    assert_eq!(is_plain(&text), expected, "{text:?}");
                }
            }
        }
    }
}
