//! Findings of checks, as they are sent, drawn and counted.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::fault::Fault;

/// Checks that wait to be sent.
pub const WAITING: usize = 1024;
/// Longest text about what was seen, in bytes: others wrote parts of it.
const MAX_SAW_BYTES: usize = 600;

/// Groups of checks, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// The SFU and the way to it.
    Sfu,
    /// Webhooks of the SFU.
    Webhook,
    /// Discovery of this service by clients.
    Discovery,
    /// Public routes of this service.
    Routes,
    /// Homeservers: their federation and client-server APIs.
    Homeserver,
    /// Checks of application-service mode.
    AppService,
    /// The store of delegated leaves.
    Store,
    /// A call of one user, from the token to the leave.
    User,
}

impl Group {
    /// All groups, in order.
    pub const ALL: [Self; 8] = [
        Self::Sfu,
        Self::Webhook,
        Self::Discovery,
        Self::Routes,
        Self::Homeserver,
        Self::AppService,
        Self::Store,
        Self::User,
    ];

    /// Word for the group on the command line and in JSON.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Sfu => "sfu",
            Self::Webhook => "webhook",
            Self::Discovery => "discovery",
            Self::Routes => "routes",
            Self::Homeserver => "homeserver",
            Self::AppService => "app-service",
            Self::Store => "store",
            Self::User => "user",
        }
    }

    /// Heading of the group.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Sfu => "SFU (livekit-server)",
            Self::Webhook => "Webhooks of the SFU",
            Self::Discovery => "Discovery by clients",
            Self::Routes => "Public routes of this service",
            Self::Homeserver => "Homeservers",
            Self::AppService => "Application-service mode",
            Self::Store => "Store of delegated leaves",
            Self::User => "A call of this user",
        }
    }
}

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All is well.
    #[serde(rename = "ok")]
    Ok,
    /// A doubt: it may be wrong, or will be.
    #[serde(rename = "warn")]
    Warn,
    /// A fault: it is broken.
    #[serde(rename = "FAIL")]
    Fail,
    /// The check could not be made, because of something else.
    #[serde(rename = "skip")]
    Skip,
}

impl Verdict {
    /// Word for the result.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
            Self::Skip => "skip",
        }
    }
}

/// Place from which something was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// The running service, or a process in its place: behind the same NAT as the SFU, perhaps.
    Inside,
    /// Another machine, which sees what users see.
    Outside,
}

/// A check that was made, or left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Name of the check.
    pub check: String,
    /// Name of the fault; of the check where there is none. An anchor in the README.
    pub id: String,
    /// Group that the check belongs to.
    pub group: Group,
    /// Place from which it was looked at.
    pub view: View,
    /// Server or route that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// Result of the check.
    pub result: Verdict,
    /// Name of the fault, or reason, for which it was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
    /// Observation, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub saw: String,
    /// Consequence of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub means: Option<String>,
    /// Remedy for the operator.
    #[serde(default, rename = "do", skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Text to paste.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snippet: Option<String>,
}

/// Line of the service's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A check that was made.
    Check(Box<Check>),
    /// The end of a group, or of all.
    End {
        /// The group that ended; all groups without one.
        end: Option<Group>,
    },
}

/// Where the checks of one group go.
#[derive(Clone)]
pub(super) struct Sink<'a> {
    lines: &'a mpsc::Sender<Line>,
    group: Group,
    view: View,
    about: Option<&'a str>,
    is_wanted: bool,
}

impl<'a> Sink<'a> {
    /// Makes the sink of a group.
    #[must_use]
    pub(super) const fn new(lines: &'a mpsc::Sender<Line>, group: Group, view: View) -> Self {
        Self {
            lines,
            group,
            view,
            about: None,
            is_wanted: true,
        }
    }

    /// Makes a sink that swallows everything unless `is_wanted`.
    #[must_use]
    pub(super) const fn wanted(self, is_wanted: bool) -> Self {
        Self { is_wanted, ..self }
    }

    /// Makes a sink for what is about `name`.
    #[must_use]
    pub(super) const fn about(&self, name: &'a str) -> Self {
        Self {
            lines: self.lines,
            group: self.group,
            view: self.view,
            about: Some(name),
            is_wanted: self.is_wanted,
        }
    }

    /// Place from which is looked.
    #[must_use]
    pub(super) const fn view(&self) -> View {
        self.view
    }

    /// Tells that a check found all well.
    pub(super) fn ok(&self, check: &'static str, saw: impl Into<String>) {
        let check = self.check(check, check, Verdict::Ok, saw.into());
        self.send(check);
    }

    /// Tells that something is broken.
    pub(super) fn fail(&self, check: &'static str, fault: &Fault, saw: impl Into<String>) {
        self.fault(Verdict::Fail, check, fault, saw, None);
    }

    /// Tells that something may be wrong.
    pub(super) fn warn(&self, check: &'static str, fault: &Fault, saw: impl Into<String>) {
        self.fault(Verdict::Warn, check, fault, saw, None);
    }

    /// Tells of a fault, with a text to paste.
    pub(super) fn fault(&self, verdict: Verdict, check: &'static str, fault: &Fault, saw: impl Into<String>, snippet: Option<String>) {
        let check = Check {
            means: Some(fault.means.to_owned()),
            remedy: Some(fault.remedy.to_owned()),
            snippet: snippet.or_else(|| fault.snippet.map(str::to_owned)),
            ..self.check(check, fault.id, verdict, saw.into())
        };
        self.send(check);
    }

    /// Tells that checks were left out, because of what else was found, or for another reason.
    pub(super) fn skip(&self, checks: &[&'static str], because: &str) {
        for check in checks {
            let check = Check {
                because: Some(because.to_owned()),
                ..self.check(check, check, Verdict::Skip, String::new())
            };
            self.send(check);
        }
    }

    fn check(&self, check: &str, id: &str, result: Verdict, saw: String) -> Check {
        Check {
            check: check.to_owned(),
            id: id.to_owned(),
            group: self.group,
            view: self.view,
            about: self.about.map(str::to_owned),
            result,
            because: None,
            saw: shown(&saw),
            means: None,
            remedy: None,
            snippet: None,
        }
    }

    fn send(&self, check: Check) {
        if !self.is_wanted {
            return;
        }
        // Where nobody listens any more, the run ends; there is room for more checks than a run has.
        let _ = self.lines.try_send(Line::Check(Box::new(check)));
    }
}

/// Stands for a token that a neighbour repeated.
const HIDDEN: &str = "[token]";

/// Text that others may have written, without what a terminal acts upon, without anything that begins as a JWT does, and not longer
/// than is read.
fn shown(text: &str) -> String {
    let mut parts = text.split("eyJ");
    let first = parts.next().unwrap_or_default().to_owned();
    let text = parts.fold(first, |text, part| {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if text.ends_with(HIDDEN) && rest.len() < part.len() {
            text + rest
        } else {
            text + HIDDEN + rest
        }
    });
    let mut out = String::with_capacity(text.len().min(MAX_SAW_BYTES));
    for c in text.chars() {
        if out.len() >= MAX_SAW_BYTES {
            out.push('…');
            break;
        }
        let acts = c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        out.push(if acts { ' ' } else { c });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::fault;

    #[tokio::test]
    async fn a_line_is_read_again_as_it_was_sent() {
        let (lines, mut sent) = mpsc::channel(WAITING);
        let sink = Sink::new(&lines, Group::Sfu, View::Inside);
        sink.ok("a", "well\u{1b}[2J, eyJhbGciOiJ.eyJpc3M.x-_y, and so on");
        sink.about("example.com").skip(&["b"], "sfu-key");
        sink.warn("c", &fault::SFU_CLOCK, "x".repeat(2000));
        sink.fail("c", &fault::SFU_CLOCK, "bad");
        let mut seen = Vec::new();
        while let Ok(line) = sent.try_recv() {
            let text = serde_json::to_string(&line).unwrap();
            assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line, "{text}");
            let Line::Check(check) = line else { panic!("{text}") };
            assert!(check.check != "a" || check.saw == "well [2J, [token], and so on", "{text}");
            seen.push((check.id, check.result, check.because, check.saw.len() < 700));
        }
        assert_eq!(
            seen,
            [
                ("a".into(), Verdict::Ok, None, true),
                ("b".into(), Verdict::Skip, Some("sfu-key".into()), true),
                ("sfu-clock".into(), Verdict::Warn, None, true),
                ("sfu-clock".into(), Verdict::Fail, None, true),
            ]
        );
        let end = Line::End {
            end: Some(Group::AppService),
        };
        assert_eq!(serde_json::to_string(&end).unwrap(), r#"{"end":"app-service"}"#);
    }

    #[test]
    fn words_are_those_of_the_json() {
        for group in Group::ALL {
            assert_eq!(serde_json::to_string(&group).unwrap(), format!("{:?}", group.word()));
        }
        for verdict in [Verdict::Ok, Verdict::Warn, Verdict::Fail, Verdict::Skip] {
            assert_eq!(serde_json::to_string(&verdict).unwrap(), format!("{:?}", verdict.word()));
        }
    }
}
