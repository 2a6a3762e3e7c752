//! Findings of checks, as they are sent, drawn and counted.

use std::fmt::Display;

use serde_json::Value;
use tokio::sync::mpsc;

use super::fault::Fault;
use super::{json_of, texts};

/// Checks that wait to be sent.
pub const WAITING: usize = 1024;
/// Longest text about what was seen, in bytes: others wrote parts of it.
const MAX_SAW_BYTES: usize = 600;

/// Words for the two places from which something is looked at.
const INSIDE: &str = "inside";
const OUTSIDE: &str = "outside";

/// Groups of checks, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

    /// The group of that word.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|group| group.word() == word)
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All is well.
    Ok,
    /// A doubt: it may be wrong, or will be.
    Warn,
    /// A fault: it is broken.
    Fail,
    /// The check could not be made, because of something else.
    Skip,
}

impl Verdict {
    /// All results, from good to bad.
    pub(super) const ALL: [Self; 4] = [Self::Ok, Self::Warn, Self::Fail, Self::Skip];

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The running service, or a process in its place: behind the same NAT as the SFU, perhaps.
    Inside,
    /// Another machine, which sees what users see.
    Outside,
}

/// A check that was made, or left out.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub about: Option<String>,
    /// Result of the check.
    pub result: Verdict,
    /// Name of the fault, or reason, for which it was left out.
    pub because: Option<String>,
    /// Observation, in words.
    pub saw: String,
    /// Consequence of it.
    pub means: Option<String>,
    /// Remedy for the operator.
    pub remedy: Option<String>,
    /// Text to paste.
    pub snippet: Option<String>,
}

/// Line of the service's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A check that was made.
    Check(Box<Check>),
    /// The end of a group, or of all.
    End {
        /// The group that ended; all groups without one.
        end: Option<Group>,
    },
}

impl Check {
    /// The object that stands for the check in JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut json = texts(&[
            ("check", &self.check),
            ("id", &self.id),
            ("group", self.group.word()),
            ("view", if self.view == View::Outside { OUTSIDE } else { INSIDE }),
            ("result", self.result.word()),
        ]);
        let saw = Some(&self.saw).filter(|saw| !saw.is_empty());
        for (name, text) in [
            ("about", self.about.as_ref()),
            ("because", self.because.as_ref()),
            ("saw", saw),
            ("means", self.means.as_ref()),
            ("do", self.remedy.as_ref()),
            ("snippet", self.snippet.as_ref()),
        ] {
            if let Some(text) = text {
                json[name] = text.as_str().into();
            }
        }
        json
    }
}

impl Line {
    /// The line as it is sent.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Check(check) => check.to_json(),
            Self::End { end } => {
                let mut line = texts(&[]);
                line["end"] = end.map(Group::word).into();
                line
            }
        }
    }

    /// Reads a line as it was sent. By hand, as it is written: what is derived is ten times as large.
    #[must_use]
    pub fn read(line: &[u8]) -> Option<Self> {
        let line = json_of(line);
        let text = |name: &str| line.get(name).and_then(Value::as_str);
        let owned = |name: &str| text(name).map(str::to_owned);
        if let Some(end) = line.get("end") {
            let end = end.as_str().map(|word| Group::named(word).ok_or(()));
            return Some(Self::End {
                end: end.transpose().ok()?,
            });
        }
        let result = text("result")?;
        Some(Self::Check(Box::new(Check {
            check: owned("check")?,
            id: owned("id")?,
            group: Group::named(text("group")?)?,
            view: if text("view")? == OUTSIDE { View::Outside } else { View::Inside },
            about: owned("about"),
            result: Verdict::ALL.into_iter().find(|verdict| verdict.word() == result)?,
            because: owned("because"),
            saw: owned("saw").unwrap_or_default(),
            means: owned("means"),
            remedy: owned("do"),
            snippet: owned("snippet"),
        })))
    }
}

/// Where the checks of one group go. What tells of them is called in so many places that it would be larger inlined.
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

    /// Whether anybody wants what goes here.
    #[must_use]
    pub(super) const fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// Tells that the group has ended.
    pub(super) async fn end(&self) {
        let _ = self.lines.send(Line::End { end: Some(self.group) }).await;
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
    #[inline(never)]
    pub(super) fn ok(&self, check: &'static str, saw: &dyn Display) {
        self.tell(check, Verdict::Ok, None, saw, None);
    }

    /// Tells that something is broken.
    #[inline(never)]
    pub(super) fn fail(&self, check: &'static str, fault: &Fault, saw: &dyn Display) {
        self.tell(check, Verdict::Fail, Some(fault), saw, None);
    }

    /// Tells that something is broken, and that the checks `rest` were left out because of it.
    #[inline(never)]
    pub(super) fn fail_before(&self, rest: &[&'static str], check: &'static str, fault: &Fault, saw: &dyn Display) {
        self.fail(check, fault, saw);
        self.skip(rest, fault.id);
    }

    /// Tells that something may be wrong.
    #[inline(never)]
    pub(super) fn warn(&self, check: &'static str, fault: &Fault, saw: &dyn Display) {
        self.tell(check, Verdict::Warn, Some(fault), saw, None);
    }

    /// Tells of a fault, with a text to paste.
    #[inline(never)]
    pub(super) fn fault(&self, verdict: Verdict, check: &'static str, fault: &Fault, saw: &dyn Display, snippet: Option<&str>) {
        self.tell(check, verdict, Some(fault), saw, snippet);
    }

    /// Tells that checks were left out, because of what else was found, or for another reason.
    pub(super) fn skip(&self, checks: &[&'static str], because: &str) {
        for check in checks {
            self.tell(check, Verdict::Skip, None, &because, None);
        }
    }

    /// Sends a finding. Of a check that was left out, `text` is the reason.
    fn tell(&self, check: &str, result: Verdict, fault: Option<&Fault>, text: &dyn Display, snippet: Option<&str>) {
        if !self.is_wanted {
            return;
        }
        let text = text.to_string();
        let (because, saw) = match result {
            Verdict::Skip => (Some(text), String::new()),
            Verdict::Ok | Verdict::Warn | Verdict::Fail => (None, shown(&text)),
        };
        let check = Check {
            check: check.to_owned(),
            id: fault.map_or(check, |fault| fault.id).to_owned(),
            group: self.group,
            view: self.view,
            about: self.about.map(str::to_owned),
            result,
            because,
            saw,
            means: fault.map(|fault| fault.means.to_owned()),
            remedy: fault.map(|fault| fault.remedy.to_owned()),
            snippet: snippet.or_else(|| fault?.snippet).map(str::to_owned),
        };
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
        sink.ok("a", &"well\u{1b}[2J, eyJhbGciOiJ.eyJpc3M.x-_y, and so on");
        sink.about("example.com").skip(&["b"], "sfu-key");
        sink.warn("c", &fault::SFU_CLOCK, &"x".repeat(2000));
        sink.fail("c", &fault::SFU_CLOCK, &"bad");
        let mut seen = Vec::new();
        while let Ok(line) = sent.try_recv() {
            let text = line.to_json().to_string();
            assert_eq!(Line::read(text.as_bytes()), Some(line.clone()), "{text}");
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
        assert_eq!(end.to_json().to_string(), r#"{"end":"app-service"}"#);
    }
}
