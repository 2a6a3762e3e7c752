//! Where the service listens, and below which path.

use super::reader::{Reader, shown};
use crate::bind::Bind;

const BIND: &str = "LIVEKIT_JWT_BIND";
const PORT: &str = "LIVEKIT_JWT_PORT";
/// The name before 0.2; counts only if nothing newer is set.
const OLD_PORT: &str = "LK_JWT_PORT";
const METRICS: &str = "LIVEKIT_METRICS_BIND";
const METRICS_PATHS: &str = "/metrics, or the prefix and /metrics,";
const PREFIX: &str = "LIVEKIT_JWT_PATH_PREFIX";

pub(super) fn bind(reader: &mut Reader<'_>) -> Bind {
    const DEFAULT: Bind = Bind::any(8080);
    match (reader.value(BIND), reader.value(PORT), reader.value(OLD_PORT)) {
        (Some(_), Some(_), _) => {
            reader.mistake(BIND, format!("and {PORT} must not be set together: remove {PORT}"));
            DEFAULT
        }
        (Some(address), None, _) => Bind::parse(&address).unwrap_or_else(|error| {
            reader.mistake(BIND, format!("{error} (it is {})", shown(&address)));
            DEFAULT
        }),
        (None, Some(port), _) => from_port(reader, PORT, &port),
        (None, None, Some(port)) => from_port(reader, OLD_PORT, &port),
        (None, None, None) => DEFAULT,
    }
}

fn from_port(reader: &mut Reader<'_>, variable: &'static str, port: &str) -> Bind {
    if let Ok(number) = port.parse()
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        reader.warn(format!("{variable} is deprecated: set {BIND}=:{number} instead"));
        return Bind::any(number);
    }
    reader.mistake(
        variable,
        format!(
            "must be a port number such as 8080, not {} ({BIND} takes a whole address)",
            shown(port)
        ),
    );
    Bind::any(0)
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsBind {
    /// At `/metrics` on the main port.
    Main,
    /// On a port of their own.
    At(Bind),
}

pub(super) fn metrics(reader: &mut Reader<'_>) -> Option<MetricsBind> {
    let text = reader.value(METRICS)?;
    match text.to_ascii_lowercase().as_str() {
        "off" | "false" | "no" => None,
        "main" => {
            reader.warn(format!(
                "{METRICS} is main: /metrics is served on the main port, so no proxy may pass {METRICS_PATHS} on"
            ));
            Some(MetricsBind::Main)
        }
        _ => match Bind::parse(&text) {
            Ok(bind) => Some(MetricsBind::At(bind)),
            Err(error) => {
                reader.mistake(
                    METRICS,
                    format!("{error}; main and off are understood, too (it is {})", shown(&text)),
                );
                None
            }
        },
    }
}

/// The path below which every route answers too (decision H1), without a slash at the end.
pub(super) fn path_prefix(reader: &mut Reader<'_>) -> Option<String> {
    let text = reader.value(PREFIX).unwrap_or_else(|| "/livekit/jwt".to_owned());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~');
    let prefix = text.trim_end_matches('/');
    let mut segments = prefix.split('/');
    let rooted = text.starts_with('/') && segments.next() == Some("");
    if !rooted || !segments.all(|part| !matches!(part, "" | "." | "..") && part.chars().all(plain)) {
        reader.mistake(
            PREFIX,
            format!(
                "must be a path such as /livekit/jwt of letters, digits and -._~, or / for none, not {}",
                shown(&text)
            ),
        );
    }
    Some(prefix.to_owned()).filter(|prefix| !prefix.is_empty())
}
