//! The report that a user sends from the page to the operator: known fields of JSON, as one short text. Pure.

use serde::Deserialize;

use crate::telemetry::acts;

/// Longest report in bytes, as it is sent.
pub const MAX_REPORT_BYTES: usize = 8 * 1024;
/// Longest text of it in the log, in bytes.
const MAX_TEXT_BYTES: usize = 2 * 1024;

/// Findings of the page, as it sends them.
#[derive(Deserialize)]
pub struct Report {
    /// Homeserver that the user named.
    #[serde(default)]
    server: String,
    /// Name that the browser gives itself.
    #[serde(default)]
    browser: String,
    /// Checks that were made.
    #[serde(default)]
    checks: Vec<Finding>,
    /// Addresses of the user's device, where they ticked that.
    #[serde(default)]
    addresses: Vec<String>,
}

/// Finding of one check.
#[derive(Deserialize)]
struct Finding {
    /// Name of the check.
    check: String,
    /// `ok`, `warn`, `fail` or `skip`.
    result: String,
    /// The fault, as `doctor` names it.
    #[serde(default)]
    fault: String,
    /// Sight that the page had, in its words.
    #[serde(default)]
    saw: String,
}

impl Report {
    /// Reads what a page sent; `None` where that is no report.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        // A list of the same values is none.
        serde_json::from_slice(body)
            .ok()
            .filter(|_| body.trim_ascii_start().starts_with(b"{"))
    }

    /// The text for the log: nothing in it acts on a terminal or needs a backslash. With `hides_people` it holds names of checks and
    /// faults alone.
    #[must_use]
    pub fn text(&self, hides_people: bool) -> String {
        let mut text = String::new();
        for Finding { check, result, fault, saw } in &self.checks {
            let separator = if text.is_empty() { "" } else { "; " };
            let fault = if fault.is_empty() {
                String::new()
            } else {
                format!(" {}", word(fault))
            };
            text.push_str(&format!("{separator}{} {}{fault}", word(check), word(result)));
            if !hides_people && !saw.is_empty() {
                text.push_str(&format!(" ({saw})"));
            }
        }
        if !hides_people {
            for (name, value) in [
                ("server", &self.server),
                ("browser", &self.browser),
                ("addresses", &self.addresses.join(", ")),
            ] {
                if !value.is_empty() {
                    text = format!("{name} {value}; {text}");
                }
            }
        }
        plain(&text)
    }
}

/// A name of ours; whatever else was sent in its place is none.
fn word(text: &str) -> &str {
    let is_word = text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if is_word { text } else { "?" }
}

/// Text that stands in a line of the log as it is, cut to its longest.
fn plain(text: &str) -> String {
    let harmless = text.chars().map(|c| match c {
        '"' => '\'',
        '\\' => '/',
        c if acts(c) => ' ',
        c => c,
    });
    let mut plain = String::new();
    for c in harmless {
        if plain.len() + c.len_utf8() > MAX_TEXT_BYTES {
            break;
        }
        plain.push(c);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report() -> Report {
        let body = json!({
            "server": "example.org",
            "browser": "Firefox",
            "unknown": {"a": 1},
            "checks": [
                {"check": "well-known", "result": "ok", "saw": "it is there"},
                {"check": "udp", "result": "fail", "fault": "sfu-udp", "saw": "no way to 8.8.4.10:7882"},
            ],
            "addresses": ["192.0.2.7"],
        });
        Report::parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_report_is_one_text_of_known_fields() {
        assert_eq!(
            report().text(false),
            "addresses 192.0.2.7; browser Firefox; server example.org; well-known ok (it is there); udp fail sfu-udp (no way to 8.8.4.10:7882)"
        );
        assert_eq!(report().text(true), "well-known ok; udp fail sfu-udp");
    }

    #[test]
    fn nothing_in_it_writes_a_line_of_its_own_and_nothing_is_long() {
        let body = json!({"checks": [
            {"check": "a\nERROR", "result": "\u{1b}[31m", "saw": "x\r\n\" \\ \u{202e}end"},
            {"check": "b", "result": "ok", "saw": "\u{e4}".repeat(3_000)},
        ]});
        let text = Report::parse(body.to_string().as_bytes()).unwrap().text(false);
        assert!(text.starts_with("? ? (x  ' /  end); b ok (\u{e4}\u{e4}"), "{text}");
        assert!((2_047..=2_048).contains(&text.len()), "{}", text.len());
        for none in [&b""[..], b"[]", b"7", b"{\"checks\": 1}", b"{\"checks\": [{}]}", b"\xff"] {
            assert!(Report::parse(none).is_none(), "{none:?}");
        }
    }
}
