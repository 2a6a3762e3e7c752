//! Reads variables and files, and collects what is wrong with them.
//!
//! It knows how a value is written (trimmed, empty means unset), not what it means.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use super::unexpanded;

/// Where a configuration is read from: the process in [`Config::from_environment`](super::Config::from_environment).
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The value of a variable.
    pub get: &'a dyn Fn(&str) -> Option<String>,
    /// The names of all variables that are set.
    pub names: &'a [String],
    /// The text of a file.
    pub read_file: &'a dyn Fn(&str) -> io::Result<String>,
    /// Whether a file, or one of the files in a directory, holds a CA certificate.
    pub has_certificates: &'a dyn Fn(&Path) -> io::Result<bool>,
}

impl<'a> Sources<'a> {
    /// Variables alone: no file can be read.
    #[must_use]
    pub const fn variables(get: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            get,
            names: &[],
            read_file: &|_| Err(io::Error::new(io::ErrorKind::Unsupported, "no file is read here")),
            has_certificates: &|_| Ok(true),
        }
    }
}

/// All mistakes of one start, at least one, and what may be behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    mistakes: Vec<Mistake>,
    hints: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mistake {
    variable: &'static str,
    text: String,
}

impl ConfigErrors {
    /// Each mistake with its variable, then what may be behind them.
    pub fn lines(&self) -> impl Iterator<Item = (Option<&'static str>, &str)> {
        let mistakes = self.mistakes.iter().map(|mistake| (Some(mistake.variable), mistake.text.as_str()));
        mistakes.chain(self.hints.iter().map(|hint| (None, hint.as_str())))
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Mistake { variable, text }) in self.mistakes.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{variable} {text}")?;
        }
        self.hints.iter().try_for_each(|hint| write!(f, "\n{hint}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Treatment of a number above its range.
#[derive(Clone, Copy)]
pub(super) enum Above {
    Refuse,
    /// Take the highest value: the old service had no limit, so somebody may have written it.
    Clamp,
}

pub(super) struct Reader<'a> {
    pub(super) sources: Sources<'a>,
    /// Fill what is unset with the values of `livekit-server --dev`.
    pub(super) dev: bool,
    mistakes: Vec<Mistake>,
    warnings: Vec<String>,
    hints: Vec<String>,
    /// Variables with a failed expansion: whatever else is wrong with them follows from it.
    unexpanded: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(sources: Sources<'a>, dev: bool) -> Self {
        Self {
            sources,
            dev,
            mistakes: Vec::new(),
            warnings: Vec::new(),
            hints: Vec::new(),
            unexpanded: Vec::new(),
        }
    }

    /// Returns what was read with the warnings, or all mistakes. `result` is `None` only if a mistake was recorded.
    pub(super) fn finish<T>(self, result: Option<T>) -> Result<(T, Vec<String>), ConfigErrors> {
        match result {
            Some(result) if self.mistakes.is_empty() => Ok((result, [self.warnings, self.hints].concat())),
            Some(_) | None => Err(ConfigErrors {
                mistakes: self.mistakes,
                hints: self.hints,
            }),
        }
    }

    /// Records a mistake; `text` continues a sentence that starts with the variable's name.
    pub(super) fn mistake(&mut self, variable: &'static str, text: impl Into<String>) {
        let mistake = Mistake {
            variable,
            text: text.into(),
        };
        // A variable may be read twice.
        if !self.mistakes.contains(&mistake) && !self.unexpanded.contains(&variable) {
            self.mistakes.push(mistake);
        }
    }

    /// Records a failed expansion, which explains whatever else is wrong with that variable; `place` is where it stands.
    pub(super) fn unexpanded(&mut self, variable: &'static str, place: &str, form: &str) {
        let text = format!("{place} {form}, which nothing has filled in: write the value itself, or correct what was to put it there");
        self.mistake(variable, text);
        self.unexpanded.push(variable);
    }

    pub(super) fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        // A variable may be read twice.
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }

    /// Records a warning that is told beside mistakes, too, because it may explain them.
    pub(super) fn hint(&mut self, text: String) {
        self.hints.push(text);
    }

    /// The trimmed value; blank is unset (decision P3).
    pub(super) fn value(&mut self, variable: &'static str) -> Option<String> {
        self.present(variable).filter(|value| !value.is_empty())
    }

    /// The trimmed value, which may be blank, for variables where that is not the same as unset (decision P4).
    pub(super) fn present(&mut self, variable: &'static str) -> Option<String> {
        let value = (self.sources.get)(variable)?.trim().to_owned();
        if value.contains(char::REPLACEMENT_CHARACTER) {
            self.mistake(variable, "is not valid UTF-8: write it again");
            return None;
        }
        if variable.ends_with("_PORT") && is_link(&value) {
            self.warn(format!(
                "{variable} counts as unset: Kubernetes made it of a Service of that name (enableServiceLinks: false in the pod prevents it)"
            ));
            return None;
        }
        if let Some(form) = unexpanded::in_variable(variable, &value)
            && !self.unexpanded.contains(&variable)
        {
            self.unexpanded(variable, "holds", form);
        }
        Some(value)
    }

    /// The trimmed content of the file that `variable` names.
    ///
    /// Outer `None`: unset. Inner `None`: it cannot be used, and that is recorded.
    pub(super) fn file(&mut self, variable: &'static str, path: FilePath) -> Option<Option<String>> {
        let name = self.value(variable)?;
        let shown = match path {
            FilePath::Shown if name.starts_with('/') => format!("{name:?}"),
            FilePath::Shown | FilePath::Hidden => "the file that it names".to_owned(),
        };
        Some(match (self.sources.read_file)(&name) {
            Ok(text) => {
                let text = text.trim_start_matches('\u{feff}').trim();
                if text.is_empty() {
                    self.mistake(variable, format!("needs a file with content: {shown} is empty"));
                }
                if let Some(form) = unexpanded::whole(text) {
                    self.unexpanded(variable, "names a file that holds", form);
                }
                Some(text.to_owned()).filter(|text| !text.is_empty())
            }
            Err(error) => {
                self.mistake(
                    variable,
                    format!("needs the path of a file that this user may read: {shown} gives \"{error}\""),
                );
                None
            }
        })
    }

    /// A whole number of seconds.
    pub(super) fn seconds(&mut self, variable: &'static str, default: u64, range: RangeInclusive<u64>, above: Above) -> Duration {
        let (low, high) = (*range.start(), *range.end());
        let default = Duration::from_secs(default);
        let Some(value) = self.value(variable) else { return default };
        let seconds = match whole_number(&value) {
            Some(seconds) if range.contains(&seconds) => seconds,
            Some(seconds) if seconds > high && matches!(above, Above::Clamp) => {
                self.warn(format!("{variable} is above {high} seconds, so {high} is used"));
                high
            }
            Some(_) | None => {
                self.mistake(
                    variable,
                    format!("must be a whole number of seconds from {low} to {high}, not {}", shown(&value)),
                );
                return default;
            }
        };
        Duration::from_secs(seconds)
    }

    /// An interval in seconds, where 0 switches something off.
    pub(super) fn interval(&mut self, variable: &'static str, default: u64) -> Option<Duration> {
        const DAY_SECONDS: u64 = 86_400;
        Some(self.seconds(variable, default, 0..=DAY_SECONDS, Above::Clamp)).filter(|interval| !interval.is_zero())
    }

    /// `true` or `false` in the usual spellings; the inner `Err` is the value of something else.
    pub(super) fn switch(&mut self, variable: &'static str) -> Option<Result<bool, String>> {
        let value = self.value(variable)?;
        Some(match value.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err(value),
        })
    }
}

/// Whether an error about a file may repeat its path.
#[derive(Clone, Copy)]
pub(super) enum FilePath {
    Shown,
    /// The value may be the secret itself, put into the wrong variable.
    Hidden,
}

/// Whether a port is an address as Kubernetes and Docker put it into the environment, `tcp://10.0.0.1:8080` (decision P16).
pub(super) fn is_link(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.trim_start().starts_with(scheme))
}

/// A value for a message: quoted, escaped, short, and not at all if it may hold a password (`user:password@host`).
pub(crate) fn shown(value: &str) -> String {
    part_shown(value, value)
}

/// A part of a value for a message. A password may hold whatever separates the parts, so the whole value decides.
pub(super) fn part_shown(whole: &str, value: &str) -> String {
    const MAX_SHOWN_CHARS: usize = 80;
    if whole.contains(['@', '?']) {
        "the given value (not repeated here: it may hold a password)".to_owned()
    } else if value.chars().count() > MAX_SHOWN_CHARS {
        format!("{:?}...", value.chars().take(MAX_SHOWN_CHARS).collect::<String>())
    } else {
        format!("{value:?}")
    }
}

/// Digits with an optional plus sign; what does not fit is the largest number there is.
pub(super) fn whole_number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().unwrap_or(u64::MAX))
}
