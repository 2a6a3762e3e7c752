//! Settings of the log. No mistake here stops a start: a log is there to help.

use tracing::level_filters::LevelFilter;

use super::reader::{Reader, shown};

const LEVEL: &str = "LIVEKIT_LOG_LEVEL";
const FORMAT: &str = "LIVEKIT_LOG_FORMAT";
const USERS: &str = "LIVEKIT_LOG_USERS";
const RUST_LOG: &str = "RUST_LOG";

/// Level and format of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// The level of this service.
    pub level: LevelFilter,
    /// Levels of single modules, by the start of their path.
    pub targets: Vec<(String, LevelFilter)>,
    /// How a line looks.
    pub format: LogFormat,
    /// How users, rooms and clients are shown.
    pub users: LogUsers,
}

/// How users, rooms and clients are shown, in every line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogUsers {
    /// As they are.
    Full,
    /// As a keyed hash, a client as its network.
    Hash,
    /// Not at all.
    None,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people to read.
    Text,
    /// A JSON object per line.
    Json,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: LevelFilter::INFO,
            targets: Vec::new(),
            format: LogFormat::Text,
            users: LogUsers::Full,
        }
    }
}

/// The format alone, for what is told while the configuration cannot be read.
#[must_use]
pub fn format(get: &dyn Fn(&str) -> Option<String>) -> LogFormat {
    match get(FORMAT) {
        Some(format) if format.trim().eq_ignore_ascii_case("json") => LogFormat::Json,
        Some(_) | None => LogFormat::Text,
    }
}

pub(super) fn log(reader: &mut Reader<'_>) -> LogSettings {
    let (bare, targets) = rust_log(reader);
    let given = reader.value(LEVEL);
    let level = match given.as_deref().map(|text| (text, level(text))) {
        Some((_, Some(level))) => level,
        Some((text, None)) => {
            reader.warn(format!(
                "{LEVEL} must be error, warn, info, debug or trace, not {}: info is used",
                shown(text)
            ));
            LevelFilter::INFO
        }
        None => bare.unwrap_or(LevelFilter::INFO),
    };
    let given = reader.value(FORMAT);
    let format = match given.as_deref().map(|text| (text, text.to_ascii_lowercase())) {
        Some((_, format)) if format == "json" => LogFormat::Json,
        Some((_, format)) if format == "text" => LogFormat::Text,
        Some((text, _)) => {
            reader.warn(format!("{FORMAT} must be text or json, not {}: text is used", shown(text)));
            LogFormat::Text
        }
        None => LogFormat::Text,
    };
    LogSettings {
        level,
        targets,
        format,
        users: users(reader),
    }
}

/// A value that is not understood shows nothing: whoever sets it wants less than everything shown.
fn users(reader: &mut Reader<'_>) -> LogUsers {
    let given = reader.value(USERS);
    match given.as_deref().map(|text| (text, text.to_ascii_lowercase())) {
        Some((_, users)) if users == "full" => LogUsers::Full,
        Some((_, users)) if users == "hash" => LogUsers::Hash,
        Some((_, users)) if users == "none" => LogUsers::None,
        Some((text, _)) => {
            reader.warn(format!("{USERS} must be full, hash or none, not {}: none is used", shown(text)));
            LogUsers::None
        }
        None => LogUsers::Full,
    }
}

/// The bare level and the levels of modules; what is not understood is left out.
fn rust_log(reader: &mut Reader<'_>) -> (Option<LevelFilter>, Vec<(String, LevelFilter)>) {
    let (mut bare, mut targets) = (None, Vec::new());
    let text = reader.value(RUST_LOG).unwrap_or_default();
    for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        if let Some(level) = level_or_off(directive) {
            bare = Some(level);
            continue;
        }
        let (target, level) = match directive.rsplit_once('=') {
            Some((target, name)) => (target, level_or_off(name)),
            None => (directive, Some(LevelFilter::TRACE)),
        };
        let module = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':');
        match level {
            Some(level) if !target.is_empty() && target.chars().all(module) => targets.push((target.replace('-', "_"), level)),
            Some(_) | None => reader.warn(format!(
                "{RUST_LOG} has a part that is ignored, because it is not module=level: {}",
                shown(directive)
            )),
        }
    }
    (bare, targets)
}

fn level(text: &str) -> Option<LevelFilter> {
    match text.to_ascii_lowercase().as_str() {
        "error" => Some(LevelFilter::ERROR),
        "warn" | "warning" => Some(LevelFilter::WARN),
        "info" => Some(LevelFilter::INFO),
        "debug" => Some(LevelFilter::DEBUG),
        "trace" => Some(LevelFilter::TRACE),
        _ => None,
    }
}

fn level_or_off(text: &str) -> Option<LevelFilter> {
    if text.eq_ignore_ascii_case("off") {
        Some(LevelFilter::OFF)
    } else {
        level(text)
    }
}
