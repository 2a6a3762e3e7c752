//! The log of a service as a program reads it: lines with fields, in both formats.
//!
//! What is waited for is a field: `event`, or `request_id`. The words of a line may be mended, and are asserted where they are the promise.

use std::collections::BTreeMap;

use serde_json::Value;

/// A line of the log.
#[derive(Debug)]
pub(crate) struct Line {
    text: String,
    fields: BTreeMap<String, String>,
}

impl Line {
    /// Whatever is not a line of the log (what is said before there is one) has no fields.
    fn parse(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            fields: of_json(text).unwrap_or_else(|| of_text(text).unwrap_or_default()),
        }
    }

    /// The value of a field, `level`, `target` and `message` among them; empty where there is none.
    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    pub(crate) fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(name, value)| self.field(name) == *value)
    }

    pub(crate) fn contains(&self, text: &str) -> bool {
        self.text.contains(text)
    }

    /// What the line tells the operator: each of these texts is in it.
    #[track_caller]
    pub(crate) fn says(&self, texts: &[&str]) {
        for text in texts {
            assert!(self.contains(text), "{text:?} is not in {}", self.text);
        }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// The lines that have all of these fields.
pub(crate) fn lines(log: &str, fields: &[(&str, &str)]) -> Vec<Line> {
    let may_fit = |line: &&str| fields.iter().all(|(_, value)| line.contains(value));
    log.lines()
        .filter(may_fit)
        .map(Line::parse)
        .filter(|line| line.has(fields))
        .collect()
}

fn of_json(line: &str) -> Option<BTreeMap<String, String>> {
    let Value::Object(object) = serde_json::from_str(line).ok()? else {
        return None;
    };
    let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Some(object.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// `TIME LEVEL TARGET: MESSAGE NAME=VALUE NAME="VALUE"`.
fn of_text(line: &str) -> Option<BTreeMap<String, String>> {
    let (_, rest) = line.split_once(' ')?;
    let (level, rest) = rest.trim_start().split_once(' ')?;
    let (target, rest) = rest.split_once(": ")?;
    let mut fields = BTreeMap::from([("level".to_owned(), level.to_owned()), ("target".to_owned(), target.to_owned())]);
    let mut message = rest;
    let mut at = 0;
    while let Some((start, name, value)) = next_field(rest, at) {
        if at == 0 {
            message = rest[..start].trim_end();
        }
        let (text, end) = unquoted(&rest[value..]);
        fields.insert(name.to_owned(), text);
        at = value + end;
    }
    fields.insert("message".to_owned(), message.to_owned());
    Some(fields)
}

/// Where the next `NAME=` begins, the name, and where its value begins.
fn next_field(text: &str, from: usize) -> Option<(usize, &str, usize)> {
    text[from..].match_indices('=').find_map(|(at, _)| {
        let equals = from + at;
        let start = text[..equals].rfind(' ')? + 1;
        let name = &text[start..equals];
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        (is_name && start >= from).then_some((start, name, equals + 1))
    })
}

/// The value at the beginning of a text, and where it ends.
fn unquoted(text: &str) -> (String, usize) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(' ').unwrap_or(text.len());
        return (text[..end].to_owned(), end);
    };
    let (mut value, mut escaped) = (String::new(), false);
    for (at, c) in quoted.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (value, at + 2),
            c => {
                value.push(c);
                escaped = false;
            }
        }
    }
    (value, text.len())
}

#[test]
fn both_formats_have_the_same_fields() {
    let text = r#"2026-11-29T18:00:00.000001Z  WARN lk_jwt_service::sfu: the SFU: a = b, and c reason="a \"b\" = x=1" count=3 path=/a event=sfu_down"#;
    let json = r#"{"timestamp":"2026-11-29T18:00:00.000001Z","level":"WARN","target":"lk_jwt_service::sfu","message":"the SFU: a = b, and c","reason":"a \"b\" = x=1","count":3,"path":"/a","event":"sfu_down"}"#;
    for line in [text, json].map(Line::parse) {
        for (name, value) in [
            ("level", "WARN"),
            ("target", "lk_jwt_service::sfu"),
            ("message", "the SFU: a = b, and c"),
            ("reason", "a \"b\" = x=1"),
            ("count", "3"),
            ("path", "/a"),
            ("event", "sfu_down"),
        ] {
            assert_eq!(line.field(name), value, "{line}");
        }
    }
    assert!(Line::parse("error: no log yet").fields.is_empty() && Line::parse("").fields.is_empty());
}
