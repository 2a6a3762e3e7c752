//! Reads variables and files, and collects what is wrong with them.
//!
//! It knows how a value is written (trimmed, empty means unset), not what it means.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

/// All mistakes of one start, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<Mistake>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mistake {
    variable: &'static str,
    text: String,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Mistake { variable, text }) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{variable} {text}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// What a number above its range means.
#[derive(Clone, Copy)]
pub(super) enum Above {
    Refuse,
    /// Take the highest value: the old service had no limit, so somebody may have written it.
    Clamp,
}

pub(super) struct Reader<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    read_file: &'a dyn Fn(&str) -> io::Result<String>,
    /// Fill what is unset with the values of `livekit-server --dev`.
    pub(super) dev: bool,
    mistakes: Vec<Mistake>,
    warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(get: &'a dyn Fn(&str) -> Option<String>, read_file: &'a dyn Fn(&str) -> io::Result<String>, dev: bool) -> Self {
        Self {
            get,
            read_file,
            dev,
            mistakes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// What was read and the warnings, or all mistakes. `result` is `None` only if a mistake was recorded.
    pub(super) fn finish<T>(self, result: Option<T>) -> Result<(T, Vec<String>), ConfigErrors> {
        match result {
            Some(result) if self.mistakes.is_empty() => Ok((result, self.warnings)),
            Some(_) | None => Err(ConfigErrors(self.mistakes)),
        }
    }

    /// Records a mistake; `text` continues a sentence that starts with the variable's name.
    pub(super) fn mistake(&mut self, variable: &'static str, text: impl Into<String>) {
        let mistake = Mistake {
            variable,
            text: text.into(),
        };
        // A variable may be read twice.
        if !self.mistakes.contains(&mistake) {
            self.mistakes.push(mistake);
        }
    }

    pub(super) fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// The trimmed value; blank is unset (decision P3).
    pub(super) fn value(&mut self, variable: &'static str) -> Option<String> {
        self.present(variable).filter(|value| !value.is_empty())
    }

    /// The trimmed value, which may be blank, for the variable where that is not the same as unset (decision P4).
    pub(super) fn present(&mut self, variable: &'static str) -> Option<String> {
        let value = (self.get)(variable)?.trim().to_owned();
        if value.contains(char::REPLACEMENT_CHARACTER) {
            self.mistake(variable, "is not valid UTF-8: write it again");
            return None;
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
        Some(match (self.read_file)(&name) {
            Ok(text) => {
                let text = text.trim_start_matches('\u{feff}').trim();
                if text.is_empty() {
                    self.mistake(variable, format!("needs a file with content: {shown} is empty"));
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
        const DAY: u64 = 86_400;
        Some(self.seconds(variable, default, 0..=DAY, Above::Clamp)).filter(|interval| !interval.is_zero())
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

/// A value for a message: quoted, escaped, short, and not at all if it may hold a password (`user:password@host`).
pub(super) fn shown(value: &str) -> String {
    const LONGEST: usize = 80;
    if value.contains('@') {
        "the given value (not repeated here: it may hold a password)".to_owned()
    } else if value.chars().count() > LONGEST {
        format!("{:?}...", value.chars().take(LONGEST).collect::<String>())
    } else {
        format!("{value:?}")
    }
}

/// Digits with an optional plus sign; what does not fit is the largest number there is.
fn whole_number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().unwrap_or(u64::MAX))
}
