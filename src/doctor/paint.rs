//! How findings are drawn: for people on a terminal or in a pipe, as one JSON document, and without names where they are to be shown
//! to others. Pure.

use std::fmt::Write as _;
use std::net::IpAddr;

use serde_json::Value;

use super::check::{Check, Group, Verdict, View};
use super::texts;
use crate::fleet::NodeId;

/// Where the README explains each fault.
const README: &str = "README.md#";
/// Width of the names of checks.
const WIDTH: usize = 16;

/// Draws a group of checks.
pub(super) fn group(group: Group, checks: &[Check], colour: bool) -> String {
    let paint = |code: &str, text: &str| {
        if colour {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    };
    let mut out = String::new();
    if checks.is_empty() {
        return out;
    }
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{}", paint("1", group.title()));
    for check in checks {
        let code = match check.result {
            Verdict::Ok => "32",
            Verdict::Warn => "33",
            Verdict::Fail => "1;31",
            Verdict::Skip => "2",
        };
        let word = paint(code, &format!("{:<4}", check.result.word()));
        let about = check.about.as_deref().map(|about| format!("{about}: ")).unwrap_or_default();
        let view = if check.view == View::Outside { " (seen from here)" } else { "" };
        let text = match &check.because {
            Some(because) => format!("because {because}"),
            None => check.saw.clone(),
        };
        let _ = writeln!(out, "  {word}  {:<WIDTH$}  {about}{text}{view}", check.check);
        let (Some(means), Some(remedy)) = (&check.means, &check.remedy) else {
            continue;
        };
        let mut line = |name: &str, text: &str| {
            let _ = writeln!(out, "        {}  {text}", paint("2", &format!("{name:<5}")));
        };
        line("means", means);
        line("do", remedy);
        for text in check.snippet.iter().flat_map(|snippet| snippet.lines()) {
            line("", &format!("  {text}"));
        }
        line("see", &format!("{README}{}", check.id));
    }
    out.push('\n');
    out
}

/// Counts results, in words.
pub(super) fn summary(checks: &[Check]) -> String {
    let count = |verdict| checks.iter().filter(|check| check.result == verdict).count();
    format!(
        "{} checks: {} FAIL, {} warn, {} ok, {} skip\n",
        checks.len(),
        count(Verdict::Fail),
        count(Verdict::Warn),
        count(Verdict::Ok),
        count(Verdict::Skip)
    )
}

/// Makes the JSON document of a run; `docs/doctor.schema.json` says what is in it.
pub(super) fn document(checks: &[Check], made_by: &str, notes: &[String]) -> Value {
    let mut summary = texts(&[]);
    for verdict in Verdict::ALL {
        summary[verdict.word()] = checks.iter().filter(|check| check.result == verdict).count().into();
    }
    let mut document = texts(&[("version", env!("CARGO_PKG_VERSION")), ("made_by", made_by)]);
    document["notes"] = notes.into();
    document["checks"] = checks.iter().map(Check::to_json).collect();
    document["summary"] = summary;
    document
}

/// Names and addresses that were replaced, each always by the same word.
#[derive(Debug, Default)]
pub(super) struct Pseudonyms {
    /// Kinds and names, each once.
    replaced: Vec<(&'static str, String)>,
    /// Names of the configuration, which may look like ordinary words.
    known: Vec<String>,
}

impl Pseudonyms {
    /// Replaces these names wherever they stand, besides all that look like names or addresses.
    pub(super) fn of(mut known: Vec<String>) -> Self {
        known.retain(|name| !name.is_empty());
        known.iter_mut().for_each(|name| name.make_ascii_lowercase());
        Self { known, ..Self::default() }
    }

    /// Replaces all names and addresses of a check. What is the same for everybody stays.
    pub(super) fn hide(&mut self, check: &mut Check) {
        check.saw = self.text(&check.saw);
        for text in [&mut check.about, &mut check.because, &mut check.snippet].into_iter().flatten() {
            *text = self.text(text);
        }
    }

    /// Replaces all names and addresses in a text, and what pages say, which may be anything.
    pub(super) fn text(&mut self, text: &str) -> String {
        let mut parts = text.split('“');
        let mut out = self.words(parts.next().unwrap_or_default());
        for part in parts {
            out.push_str("“a page”");
            out.push_str(&self.words(part.split_once('”').map_or("", |(_, rest)| rest)));
        }
        out
    }

    fn words(&mut self, text: &str) -> String {
        const ENDS: &[char] = &['"', '\'', '(', ')', '<', '>', ',', ';', '{', '}', '|', '`', '…'];
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        // Behind a replica's id its host stands in brackets.
        let mut is_behind_id = false;
        while !rest.is_empty() {
            let length = rest.find(|c: char| c.is_whitespace() || ENDS.contains(&c)).unwrap_or(rest.len());
            let (word, tail) = rest.split_at(length);
            let bare = word.trim_end_matches([':', '.', '!', '?']);
            let is_host = is_behind_id && out.ends_with('(') && !bare.is_empty();
            out.push_str(&if is_host { self.name("host", bare) } else { self.word(bare) });
            out.push_str(&word[bare.len()..]);
            let next = tail.chars().next().map_or(0, char::len_utf8);
            out.push_str(&tail[..next]);
            if !word.is_empty() {
                is_behind_id = word.parse::<NodeId>().is_ok();
            }
            rest = &tail[next..];
        }
        out
    }

    fn word(&mut self, word: &str) -> String {
        if word.is_empty() || is_ours(word) {
            return word.to_owned();
        }
        if let Some((scheme, rest)) = word.split_once("://") {
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            let (host, port) = host_and_port(authority);
            let path: Vec<_> = path.split('/').map(|part| self.part(part)).collect();
            return format!("{scheme}://{}{port}{}", self.name("host", host), path.join("/"));
        }
        if word.starts_with('/') {
            let parts: Vec<_> = word.split('/').map(|part| self.part(part)).collect();
            return parts.join("/");
        }
        if word.len() > 1 && word.starts_with('@') {
            return self.name("user", word);
        }
        if word.len() > 1 && word.starts_with(['!', '#']) {
            return self.name("room", word);
        }
        if let Some((before, after)) = word.split_once('=')
            && !before.is_empty()
        {
            return format!("{before}={}", self.word(after));
        }
        let (host, port) = host_and_port(word);
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let kind = if is_address { "address" } else { "host" };
        if is_address || is_host(host) || self.known.contains(&host.to_ascii_lowercase()) || (is_label(host) && !port.is_empty()) {
            return format!("{}{port}", self.name(kind, host));
        }
        // A room's name on the SFU, or an identity there.
        if word.len() >= 40 && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/_-=".contains(&byte)) {
            return self.name("id", word);
        }
        word.to_owned()
    }

    /// A part of a path: an id in it is a name, too.
    fn part(&mut self, part: &str) -> String {
        let is_id = part.starts_with(['@', '!', '#']) || part.contains("%40") || part.contains("%21") || part.len() >= 40;
        if is_id { self.name("id", part) } else { part.to_owned() }
    }

    fn name(&mut self, kind: &'static str, name: &str) -> String {
        let known = self.replaced.iter().position(|(_, replaced)| replaced == name);
        let at = known.unwrap_or(self.replaced.len());
        if known.is_none() {
            self.replaced.push((kind, name.to_owned()));
        }
        let (kind, _) = self.replaced[at];
        let number = self.replaced[..=at].iter().filter(|(of, _)| *of == kind).count();
        format!("{kind}-{number}")
    }
}

/// Splits off a port, with its colon.
fn host_and_port(word: &str) -> (&str, &str) {
    // An IPv6 address without brackets has no port.
    if word.parse::<IpAddr>().is_ok() {
        return (word, "");
    }
    match word.rfind(':') {
        Some(at) if at > 0 && word.len() > at + 1 && word[at + 1..].bytes().all(|byte| byte.is_ascii_digit()) => word.split_at(at),
        Some(_) | None => (word, ""),
    }
}

fn is_label(word: &str) -> bool {
    !word.is_empty()
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        && word.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// Whether it looks like a name in DNS: labels and dots, the last of them a word.
fn is_host(word: &str) -> bool {
    let labels: Vec<_> = word.split('.').collect();
    let last = labels.last().copied().unwrap_or_default();
    labels.len() > 1
        && labels
            .iter()
            .all(|label| is_label(label) || label.bytes().all(|byte| byte.is_ascii_digit()) && !label.is_empty())
        && last.len() > 1
        && last.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// Names of settings, proposals and files look like those of hosts.
fn is_ours(word: &str) -> bool {
    const BEGINNINGS: [&str; 3] = ["org.matrix.msc", "io.element.msc", "m.call#"];
    const WORDS: [&str; 4] = ["homeserver.yaml", "config.yaml", "m.homeserver", "m.server"];
    BEGINNINGS.iter().any(|beginning| word.starts_with(beginning)) || WORDS.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(result: Verdict) -> Check {
        Check {
            check: "api".into(),
            id: "sfu-key".into(),
            group: Group::Sfu,
            view: View::Inside,
            about: Some("example.com".into()),
            result,
            because: None,
            saw: "it says no".into(),
            means: (result == Verdict::Fail).then(|| "no calls".into()),
            remedy: (result == Verdict::Fail).then(|| "do it".into()),
            snippet: (result == Verdict::Fail).then(|| "a:\n  b: c".into()),
        }
    }

    #[test]
    fn a_fault_is_drawn_with_all_that_is_to_be_done() {
        let text = group(Group::Sfu, &[check(Verdict::Ok), check(Verdict::Fail)], false);
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        assert_eq!(
            lines,
            [
                "SFU (livekit-server)",
                "  ok    api               example.com: it says no",
                "  FAIL  api               example.com: it says no",
                "        means  no calls",
                "        do     do it",
                "                 a:",
                "                   b: c",
                "        see    README.md#sfu-key",
                ""
            ]
        );
        assert!(!text.contains('\u{1b}'));
        assert!(group(Group::Sfu, &[check(Verdict::Fail)], true).contains("\u{1b}[1;31mFAIL\u{1b}[0m"));
        assert_eq!(group(Group::Sfu, &[], true), "");
        assert_eq!(
            summary(&[check(Verdict::Ok), check(Verdict::Fail)]),
            "2 checks: 1 FAIL, 0 warn, 1 ok, 0 skip\n"
        );
        let document = document(&[check(Verdict::Fail)], "service", &[]);
        assert_eq!(
            (&document["summary"]["FAIL"], &document["checks"][0]["do"]),
            (&json!(1), &json!("do it"))
        );
    }

    #[test]
    fn no_name_and_no_address_is_left() {
        let mut pseudonyms = Pseudonyms::of(vec!["livekit".to_owned()]);
        for (text, hidden) in [
            (
                "step 4 to 6: SRV or port 8448, asked as example.com at 192.0.2.1:8448; fine",
                "step 4 to 6: SRV or port 8448, asked as host-1 at address-1:8448; fine",
            ),
            (
                "https://example.com/livekit/jwt is answered with 404: no",
                "https://host-1/livekit/jwt is answered with 404: no",
            ),
            ("it is one of @alice:example.com", "it is one of user-1"),
            (
                "wss://sfu.example.com:7443/x?y and [2001:db8::1]:443, 2001:db8::1",
                "wss://host-2:7443/x?y and address-2:443, address-3",
            ),
            ("livekit: the name does not exist", "host-3: the name does not exist"),
            ("redis:6379 and !room:example.com", "host-4:6379 and room-1"),
            (
                "a list org.matrix.msc4143.rtc_foci in homeserver.yaml, 1.13.5, 12 s",
                "a list org.matrix.msc4143.rtc_foci in homeserver.yaml, 1.13.5, 12 s",
            ),
            (
                "/rooms/!a:b/state and O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc",
                "/rooms/id-1/state and id-2",
            ),
            ("\"example.com\"", "\"host-1\""),
            ("404: “Welcome to Acme” by example.com", "404: “a page” by host-1"),
            ("rtc.example.com, m.example.com, example.md", "host-5, host-6, host-7"),
            (
                "0123456789abcdef (acme-x2) watches, of fedcba9876543210 (acme-x1) and 0123456789abcdef (acme-x2)",
                "0123456789abcdef (host-8) watches, of fedcba9876543210 (host-9) and 0123456789abcdef (host-8)",
            ),
        ] {
            assert_eq!(pseudonyms.text(text), hidden);
        }
    }
}
