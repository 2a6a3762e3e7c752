//! LiveKit's API keys: from variables, from files, and from LiveKit's own keys file (decision P6).

use std::collections::HashSet;

use yaml_rust2::Event;
use yaml_rust2::parser::Parser;
use yaml_rust2::scanner::TScalarStyle;

use super::reader::{FilePath, Reader};
use super::unexpanded;
use crate::secret::{KeyPair, Keys, Secret};

const KEY: &str = "LIVEKIT_KEY";
const SECRET: &str = "LIVEKIT_SECRET";
const API_KEY: &str = "LIVEKIT_API_KEY";
const API_SECRET: &str = "LIVEKIT_API_SECRET";
/// livekit-server's own variable, which has the form of its keys file.
const KEYS: &str = "LIVEKIT_KEYS";
const KEY_FROM_FILE: &str = "LIVEKIT_KEY_FROM_FILE";
const SECRET_FROM_FILE: &str = "LIVEKIT_SECRET_FROM_FILE";
const KEY_FILE: &str = "LIVEKIT_KEY_FILE";
/// Until 0.2.2 a file with the secret alone, beside a `LIVEKIT_KEY_FILE` with the key alone.
const SECRET_FILE: &str = "LIVEKIT_SECRET_FILE";

/// LiveKit itself warns about secrets below this length.
const MIN_SECRET_BYTES: usize = 32;

pub(super) fn keys(reader: &mut Reader<'_>) -> Option<Keys> {
    let keys = match reader.file(KEY_FILE, FilePath::Shown) {
        Some(content) => from_key_file(reader, &content?),
        None if !ours_are_set(reader) && reader.value(KEYS).is_some() => from_variable(reader),
        None => {
            // Both are read before either is missed, so that both mistakes are reported.
            let (key, secret) = (key(reader), secret(reader));
            Some(Keys::new(pair(key?, secret?), Vec::new()))
        }
    }?;
    if !reader.dev {
        keys.iter().for_each(|pair| warn_about(reader, pair));
    }
    Some(keys)
}

/// Whether anything else than livekit-server's own variable names a key or a secret: that counts, as it did before.
fn ours_are_set(reader: &mut Reader<'_>) -> bool {
    let ours = [KEY, SECRET, API_KEY, API_SECRET, KEY_FROM_FILE, SECRET_FROM_FILE, SECRET_FILE];
    ours.into_iter().any(|name| reader.value(name).is_some())
}

fn from_variable(reader: &mut Reader<'_>) -> Option<Keys> {
    let text = reader.value(KEYS)?;
    if let Some(keys) = of_mapping(&text) {
        return Some(keys);
    }
    parse_key_file(&text)
        .inspect_err(|BadLine { number, problem }| {
            let text = format!("must be `key: secret`, as livekit-server has it, with a line for each pair, but line {number} {problem}");
            reader.mistake(KEYS, text);
        })
        .ok()
}

fn key(reader: &mut Reader<'_>) -> Option<String> {
    if let Some(content) = reader.file(KEY_FROM_FILE, FilePath::Shown) {
        ignored(reader, KEY_FROM_FILE, &[KEY]);
        return content;
    }
    let key = reader
        .value(KEY)
        .or_else(|| reader.value(API_KEY))
        .or_else(|| dev(reader, "devkey"));
    if key.is_none() {
        reader.mistake(
            KEY,
            "must be set to the API key of LiveKit (or LIVEKIT_KEY_FROM_FILE, or LIVEKIT_KEY_FILE, to a file)",
        );
    }
    key
}

fn secret(reader: &mut Reader<'_>) -> Option<String> {
    if let Some(content) = reader.file(SECRET_FROM_FILE, FilePath::Hidden) {
        ignored(reader, SECRET_FROM_FILE, &[SECRET, SECRET_FILE]);
        return content;
    }
    if let Some(secret) = reader.value(SECRET).or_else(|| reader.value(API_SECRET)) {
        return Some(secret);
    }
    if let Some(content) = reader.file(SECRET_FILE, FilePath::Hidden) {
        reader.warn("LIVEKIT_SECRET_FILE is deprecated: rename it to LIVEKIT_SECRET_FROM_FILE");
        return content;
    }
    let secret = dev(reader, "secret");
    if secret.is_none() {
        let text = "must be set to the secret of the API key (or LIVEKIT_SECRET_FROM_FILE, or LIVEKIT_KEY_FILE, to a file)";
        reader.mistake(SECRET, text);
    }
    secret
}

/// Value that `livekit-server --dev` uses (decision P13).
fn dev(reader: &Reader<'_>, value: &str) -> Option<String> {
    reader.dev.then(|| value.to_owned())
}

fn from_key_file(reader: &mut Reader<'_>, content: &str) -> Option<Keys> {
    if !content.contains(':') {
        return from_the_old_pair_of_files(reader, content);
    }
    ignored(reader, KEY_FILE, &[KEY, SECRET, KEY_FROM_FILE, SECRET_FROM_FILE, SECRET_FILE]);
    if let Some(keys) = of_whole_configuration(content) {
        reader.warn(format!(
            "{KEY_FILE} is livekit-server's whole configuration: its `keys:` are used, and nothing else of it"
        ));
        return Some(keys);
    }
    let keys = parse_key_file(content)
        .inspect_err(|BadLine { number, problem }| {
            reader.mistake(
                KEY_FILE,
                format!("needs a file of `key: secret` lines, but line {number} {problem}"),
            );
        })
        .ok()?;
    let form = keys
        .iter()
        .find_map(|pair| unexpanded::whole(&pair.key).or_else(|| unexpanded::whole(pair.secret.expose())));
    if let Some(form) = form {
        reader.unexpanded(KEY_FILE, "names a file that holds", form);
    }
    Some(keys)
}

/// The `keys:` of livekit-server's `config.yaml`, where it is that.
fn of_whole_configuration(content: &str) -> Option<Keys> {
    if !content.lines().any(|line| line.starts_with("keys:")) {
        return None;
    }
    pairs_of(content, Some("keys"))
}

/// The keys of a mapping in braces, `{key: secret}`, where it is that.
fn of_mapping(text: &str) -> Option<Keys> {
    text.starts_with('{').then(|| pairs_of(text, None))?
}

/// Pairs of the mapping that a document is, or that stands in it under this name. As livekit-server reads them, they are as they are
/// written: `0123` is no number.
fn pairs_of(document: &str, name: Option<&str>) -> Option<Keys> {
    let mut parser = Parser::new_from_str(document);
    let (mut depth, mut is_named) = (0, false);
    loop {
        let event = parser.next_token().ok()?.0;
        let is_mapping = matches!(event, Event::MappingStart(..));
        if is_mapping && (is_named || (name.is_none() && depth == 0)) {
            break;
        } else if is_mapping || matches!(event, Event::SequenceStart(..)) {
            depth += 1;
        } else if matches!(event, Event::MappingEnd | Event::SequenceEnd) {
            depth -= 1;
        } else if event == Event::StreamEnd {
            return None;
        }
        is_named = depth == 1 && matches!(&event, Event::Scalar(text, ..) if name == Some(text));
    }
    let mut texts = Vec::new();
    loop {
        let event = parser.next_token().ok()?.0;
        if event == Event::MappingEnd {
            break;
        }
        let Event::Scalar(text, style, ..) = event else { return None };
        if is_null(&text, style) {
            return None;
        }
        texts.push(text);
    }
    let mut names = HashSet::new();
    if !texts.iter().step_by(2).all(|name| names.insert(name)) {
        return None;
    }
    let mut pairs = texts.chunks_exact(2).map(|both| pair(both[0].clone(), both[1].clone()));
    Some(Keys::new(pairs.next()?, pairs.collect()))
}

/// Whether a scalar stands for nothing.
fn is_null(text: &str, style: TScalarStyle) -> bool {
    text.is_empty() || (style == TScalarStyle::Plain && matches!(text, "~" | "null" | "Null" | "NULL"))
}

fn from_the_old_pair_of_files(reader: &mut Reader<'_>, key: &str) -> Option<Keys> {
    let Some(secret) = reader.file(SECRET_FILE, FilePath::Hidden) else {
        let text = "needs a file of `key: secret` lines, but there is no colon in it. If it holds the key alone, set \
                    LIVEKIT_KEY_FROM_FILE to it instead, and LIVEKIT_SECRET_FROM_FILE to that of the secret";
        reader.mistake(KEY_FILE, text);
        return None;
    };
    ignored(reader, KEY_FILE, &[KEY, SECRET, KEY_FROM_FILE, SECRET_FROM_FILE]);
    reader.warn(
        "LIVEKIT_KEY_FILE and LIVEKIT_SECRET_FILE for a file each are deprecated: rename them to LIVEKIT_KEY_FROM_FILE and \
         LIVEKIT_SECRET_FROM_FILE",
    );
    Some(Keys::new(pair(key.to_owned(), secret?), Vec::new()))
}

fn ignored(reader: &mut Reader<'_>, used: &str, others: &[&'static str]) {
    let set: Vec<_> = others.iter().copied().filter(|name| reader.value(name).is_some()).collect();
    if !set.is_empty() {
        reader.warn(format!("{used} is set, so {} is ignored", set.join(", ")));
    }
}

fn pair(key: String, secret: String) -> KeyPair {
    KeyPair {
        key,
        secret: Secret::new(secret),
    }
}

impl KeyPair {
    /// The key, unless it looks as if it were the secret.
    #[must_use]
    pub fn shown_key(&self) -> &str {
        if self.is_swapped() {
            "(not shown: it looks like the secret)"
        } else {
            &self.key
        }
    }

    fn is_swapped(&self) -> bool {
        self.secret.expose().len() < MIN_SECRET_BYTES && self.key.len() >= MIN_SECRET_BYTES
    }
}

fn warn_about(reader: &mut Reader<'_>, pair: &KeyPair) {
    let (key, secret) = (&pair.key, pair.secret.expose());
    if pair.is_swapped() {
        reader.warn(format!(
            "{KEY} is long and {SECRET} is short, as if they had been swapped: the key is the public name, the secret has {MIN_SECRET_BYTES} characters or more"
        ));
    } else if secret.len() < MIN_SECRET_BYTES {
        reader.warn(format!(
            "LIVEKIT_SECRET: the secret has fewer than {MIN_SECRET_BYTES} characters and could be guessed: choose a longer one"
        ));
    }
    for (name, value) in [(KEY, key.as_str()), (SECRET, secret)] {
        let quoted = |mark| value.len() > 1 && value.starts_with(mark) && value.ends_with(mark);
        if quoted('"') || quoted('\'') {
            reader.warn(format!(
                "{name} is in quotes, and they are taken as part of it: remove them unless LiveKit has them too"
            ));
        } else if value.contains(char::is_whitespace) {
            reader.warn(format!("{name} has white space inside: check that it is the value alone"));
        }
    }
}

/// Mistake in a line of the keys file; never shows the line.
#[derive(Debug, PartialEq, Eq)]
struct BadLine {
    number: usize,
    problem: &'static str,
}

/// LiveKit's keys file: a flat YAML mapping of text to text. The part of YAML that such files use is small enough to read here.
fn parse_key_file(content: &str) -> Result<Keys, BadLine> {
    let mut pairs: Vec<KeyPair> = Vec::new();
    // A key whose secret is on the next line, which the old service took.
    let mut waiting: Option<(usize, String)> = None;
    for (index, line) in content.lines().enumerate() {
        let number = index + 1;
        let bad = |problem| BadLine { number, problem };
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || line == "---" || line == "..." {
            continue;
        }
        let (key, secret) = match waiting.take() {
            Some((_, key)) if !line.contains(':') => (key, scalar(line).map_err(bad)?),
            Some((number, _)) => {
                return Err(BadLine {
                    number,
                    problem: "has no secret",
                });
            }
            None => {
                let (key, rest) = split_key(line).map_err(bad)?;
                match scalar(rest).map_err(bad)? {
                    secret if secret.is_empty() => {
                        waiting = Some((number, key));
                        continue;
                    }
                    secret => (key, secret),
                }
            }
        };
        if secret.is_empty() {
            return Err(bad("has no secret"));
        }
        if pairs.iter().any(|pair| pair.key == key) {
            return Err(bad("repeats a key"));
        }
        pairs.push(pair(key, secret));
    }
    if let Some((number, _)) = waiting {
        return Err(BadLine {
            number,
            problem: "has no secret",
        });
    }
    let mut pairs = pairs.into_iter();
    let signing = pairs.next().ok_or(BadLine {
        number: 1,
        problem: "and all others are comments",
    })?;
    Ok(Keys::new(signing, pairs.collect()))
}

/// Splits `key: secret`. As in YAML at the first colon before white space; else, as the old service did, at the first colon.
fn split_key(line: &str) -> Result<(String, &str), &'static str> {
    const NO_COLON: &str = "has no colon";
    if line.starts_with(['{', '[']) || line.starts_with("- ") {
        return Err("is not of that form");
    }
    let (key, rest) = if let Some(quoted) = quoted(line)? {
        let (key, rest) = quoted;
        (key, rest.trim_start().strip_prefix(':').ok_or(NO_COLON)?)
    } else {
        let before_space = |at: &usize| line[at + 1..].chars().next().is_none_or(char::is_whitespace);
        let mut colons = line.match_indices(':').map(|(at, _)| at);
        let first = colons.clone().next().ok_or(NO_COLON)?;
        let at = colons.find(before_space).unwrap_or(first);
        (line[..at].trim().to_owned(), &line[at + 1..])
    };
    if key.is_empty() { Err("has no key") } else { Ok((key, rest)) }
}

/// A value without its quotes and the comment after it.
fn scalar(text: &str) -> Result<String, &'static str> {
    let text = text.trim();
    if let Some((value, rest)) = quoted(text)? {
        let rest = rest.trim_start();
        return if rest.is_empty() || rest.starts_with('#') {
            Ok(value)
        } else {
            Err("goes on after the closing quote")
        };
    }
    let comment = |(at, _): &(usize, &str)| text[..*at].chars().next_back().is_none_or(char::is_whitespace);
    let end = text.match_indices('#').find(comment).map_or(text.len(), |(at, _)| at);
    Ok(text[..end].trim_end().to_owned())
}

/// A quoted text at the start, and what follows it; `None` where it starts without a quote.
fn quoted(text: &str) -> Result<Option<(String, &str)>, &'static str> {
    let mut chars = text.char_indices().peekable();
    let Some((_, quote @ ('"' | '\''))) = chars.next() else {
        return Ok(None);
    };
    let mut value = String::new();
    while let Some((at, c)) = chars.next() {
        if c == quote {
            // Inside single quotes, two of them are one.
            if quote == '\'' && chars.next_if(|(_, next)| *next == '\'').is_some() {
                value.push('\'');
                continue;
            }
            return Ok(Some((value, &text[at + 1..])));
        }
        value.push(match c {
            '\\' if quote == '"' => match chars.next() {
                Some((_, escaped @ ('"' | '\\' | '/'))) => escaped,
                _ => return Err("has an escape other than \\\" and \\\\"),
            },
            plain => plain,
        });
    }
    Err("has no closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(content: &str) -> Result<Vec<(String, String)>, BadLine> {
        let keys = parse_key_file(content)?;
        Ok(keys
            .iter()
            .map(|pair| (pair.key.clone(), pair.secret.expose().to_owned()))
            .collect())
    }

    #[test]
    fn reads_what_livekit_and_the_old_service_read() {
        for (content, expected) in [
            ("key: secret", &[("key", "secret")] as &[_]),
            ("key:secret", &[("key", "secret")]),
            ("key : secret\r\n", &[("key", "secret")]),
            ("key:\n  secret\n", &[("key", "secret")]),
            ("one: a\ntwo: b\n", &[("one", "a"), ("two", "b")]),
            (
                "# mine\n---\none: a # the first\n\n'two': \"b\" # quoted\n",
                &[("one", "a"), ("two", "b")],
            ),
            ("key: a:b:c", &[("key", "a:b:c")]),
            ("key:a:b", &[("key", "a:b")]),
            ("a:b: secret", &[("a:b", "secret")]),
            ("\"a: b\": secret", &[("a: b", "secret")]),
            ("key: a#b", &[("key", "a#b")]),
            (r#"key: "a\"b\\c # d""#, &[("key", r#"a"b\c # d"#)]),
            ("key: 'it''s'", &[("key", "it's")]),
            ("key: aGVsbG8=", &[("key", "aGVsbG8=")]),
        ] {
            let expected: Vec<_> = expected
                .iter()
                .map(|(key, secret)| ((*key).to_owned(), (*secret).to_owned()))
                .collect();
            assert_eq!(pairs(content), Ok(expected), "{content:?}");
        }
    }

    #[test]
    fn of_a_configuration_or_a_mapping_it_takes_what_is_written() {
        let configuration = "port: 7880\nrtc:\n  keys: {no: no}\n  hosts: [keys, {a: b}]\nkeys:\n  0123: 0x10\n  'a b': \"c: d\"\n  +1: 1.50\nroom:\n  x: y\n";
        let written: &[_] = &[("0123", "0x10"), ("a b", "c: d"), ("+1", "1.50")];
        for (found, expected) in [
            (of_whole_configuration(configuration), written),
            (of_mapping("{0123: 0x10, 'a b': \"c: d\", +1: 1.50}"), written),
            (of_mapping("{true: no}"), &[("true", "no")]),
        ] {
            let found = found.expect("keys");
            let found: Vec<_> = found.iter().map(|pair| (pair.key.as_str(), pair.secret.expose())).collect();
            assert_eq!(found, expected);
        }
        for broken in ["{a: b, a: c}", "{a: ~}", "{a: [b]}", "{a: }", "{a: b", "{}"] {
            assert!(of_mapping(broken).is_none(), "{broken}");
        }
        for broken in ["keys:\n", "keys: a\n", "keys:\n- a: b\n", "other:\n  keys:\n    a: b\n"] {
            assert!(of_whole_configuration(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn names_the_line_that_it_cannot_read() {
        for (content, number, problem) in [
            ("key:", 1, "has no secret"),
            ("key: # none", 1, "has no secret"),
            ("key: \"\"\nother: b", 1, "has no secret"),
            ("one:\ntwo: b", 1, "has no secret"),
            (": secret", 1, "has no key"),
            ("one: a\ntwo", 2, "has no colon"),
            ("one: a\none: b", 2, "repeats a key"),
            ("{one: a}", 1, "is not of that form"),
            ("- one: a", 1, "is not of that form"),
            ("one: \"a", 1, "has no closing quote"),
            ("one: 'a' b", 1, "goes on after the closing quote"),
            (r#"one: "\n""#, 1, "has an escape other than \\\" and \\\\"),
            ("# a: comment", 1, "and all others are comments"),
        ] {
            assert_eq!(pairs(content), Err(BadLine { number, problem }), "{content:?}");
        }
    }
}
