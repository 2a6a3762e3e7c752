//! The log: stderr only, escaped, and without what other crates say about requests. `writer.rs` writes it, so that nobody
//! waits for its reader.

mod line;
mod writer;

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber, error};
use tracing_subscriber::filter::{FilterExt as _, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{LogFormat, LogSettings};
use crate::secret::Secret;
pub(crate) use line::{Line, acts};
use line::{People, Shape};
use writer::LogWriter;

/// Our modules, in the library and in the binary.
const OURS: &str = "lk_jwt_service";
/// The lines about requests, so that they can be chosen by `RUST_LOG` and found.
pub const REQUEST: &str = "request";
/// Target of the reports that users send from the page.
pub const CHECK: &str = "check";

/// DNS sees names only, and its details are what an operator needs who asks why a homeserver was not found.
const HARMLESS: &str = "hickory";

/// How long the end of the process waits for what is still to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The writer of this process; none where the system gives no thread.
static WRITER: OnceLock<Option<LogWriter>> = OnceLock::new();
/// How lines of this process look, once that is known.
static SHAPE: OnceLock<Shape> = OnceLock::new();
/// Lines about requests wait for [`before_idle`].
static HELD: AtomicBool = AtomicBool::new(false);

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The system gives no thread.
    #[error("the log's thread cannot be started; is there a limit on processes or threads?")]
    NoThread,
    /// Another logger is installed already.
    #[error("{0}")]
    Installed(#[from] TryInitError),
}

/// The log of this process. Dropping it waits a moment for what is not written yet.
#[must_use]
pub struct Log(LogWriter);

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// Installs the log and the panic hook of this process. Names of people are hashed, where they are, with a key that is derived
/// from `secret`.
///
/// # Errors
/// When there is a log already, or the log's thread cannot be started.
pub fn init(settings: &LogSettings, secret: &Secret) -> Result<Log, LogError> {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let writer = writer().ok_or(LogError::NoThread)?;
    let shape = SHAPE.get_or_init(|| Shape {
        format: settings.format,
        colour,
        people: People::new(settings.users, secret.expose()),
    });
    let write = |line: &str| writer.push(line.as_bytes(), shape.format);
    subscriber(settings, shape.clone(), write).try_init()?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Log(writer.clone()))
}

/// Writes a line to stderr behind the log, whatever the log level, and waits a moment for it.
pub fn say(line: &str) {
    let line = format!("{line}\n");
    match writer() {
        Some(writer) => {
            writer.push(line.as_bytes(), LogFormat::Text);
            writer.flush(FLUSH_TIMEOUT);
        }
        // Where stderr is closed nobody can be told.
        None => drop(io::stderr().write_all(line.as_bytes())),
    }
}

/// Says why the service does not start as an object of the log in JSON; what is wrong with a variable, under its name.
pub fn say_json_error(variable: Option<&str>, message: &dyn Display) {
    let shape = Shape {
        format: LogFormat::Json,
        colour: false,
        people: People::Full,
    };
    let mut line = Line::begin(&shape, Level::ERROR, OURS);
    match variable {
        Some(variable) => {
            line.message(&format!("{variable} {message}"));
            line.word("variable", variable);
        }
        None => line.message(&message.to_string()),
    }
    say(line.end().trim_end());
}

/// Writes the line of a request, the fields of which `fill` adds. It bypasses `tracing`, which would cost more than all the
/// rest of a request's line; whether it is wanted at all is the caller's question.
pub(crate) fn request(level: Level, fill: impl FnOnce(&mut Line<'_>)) {
    let (Some(shape), Some(writer)) = (SHAPE.get(), writer()) else {
        return;
    };
    let mut line = Line::begin(shape, level, REQUEST);
    fill(&mut line);
    let line = line.end();
    // To wake the log's thread for each line would cost more than the line.
    writer.push_quietly(line.as_bytes(), shape.format);
    HELD.store(true, Relaxed);
}

/// Whether nothing may hold the name of a user or a room: what strangers wrote freely, such as a path, must stay out.
pub(crate) fn hides_people() -> bool {
    SHAPE.get().is_some_and(Shape::hides_people)
}

/// To be called whenever the process has nothing to do: what was held back for company is written.
pub fn before_idle() {
    if HELD.load(Relaxed) {
        HELD.store(false, Relaxed);
        if let Some(writer) = writer() {
            writer.wake_sleeper();
        }
    }
}

fn writer() -> Option<&'static LogWriter> {
    WRITER.get_or_init(|| LogWriter::start(io::stderr()).ok()).as_ref()
}

fn subscriber(settings: &LogSettings, shape: Shape, write: impl Fn(&str) + Send + Sync + 'static) -> impl Subscriber + Send + Sync {
    let layer = LogLayer { shape, write };
    tracing_subscriber::registry().with(layer.with_filter(wanted(settings).and(permitted())))
}

/// Each event is one line.
struct LogLayer<W> {
    shape: Shape,
    write: W,
}

impl<S: Subscriber, W: Fn(&str) + 'static> Layer<S> for LogLayer<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        (self.write)(&line::of_event(&self.shape, event));
    }
}

/// Levels that the operator asks for: ours at the level, others from `warn`, and what `RUST_LOG` names.
fn wanted(settings: &LogSettings) -> Targets {
    Targets::new()
        .with_default(settings.level.min(LevelFilter::WARN))
        .with_target(OURS, settings.level)
        .with_target(REQUEST, settings.level)
        .with_target(CHECK, settings.level)
        .with_targets(settings.targets.iter().cloned())
}

/// Levels that are permitted whoever asks: below `info`, HTTP and TLS crates print URLs and headers, and so OpenID tokens and JWTs.
/// Since nobody can follow what each crate prints, all are held back but the harmless ones.
fn permitted() -> Targets {
    Targets::new().with_default(LevelFilter::INFO).with_targets([
        (OURS, LevelFilter::TRACE),
        (REQUEST, LevelFilter::TRACE),
        (HARMLESS, LevelFilter::TRACE),
    ])
}

/// Logs a panic as one line at `error` instead of the several that the standard library prints.
fn log_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    error!(name: "panic",
        location,
        reason = message.unwrap_or("unknown"),
        "this service has a bug: a task panicked"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing::{debug, info, trace, warn};

    use super::line::acts;
    use super::*;

    fn logged_with(settings: &LogSettings, colour: bool, work: impl FnOnce()) -> String {
        let sink = Arc::new(Mutex::new(String::new()));
        let into = sink.clone();
        let shape = Shape {
            format: settings.format,
            colour,
            people: People::new(settings.users, "hunter2"),
        };
        let write = move |line: &str| into.lock().push_str(line);
        tracing::subscriber::with_default(subscriber(settings, shape, write), work);
        sink.lock().clone()
    }

    fn logged(settings: &LogSettings, work: impl FnOnce()) -> String {
        logged_with(settings, false, work)
    }

    fn level(level: LevelFilter) -> LogSettings {
        LogSettings {
            level,
            ..LogSettings::default()
        }
    }

    const FORGED: &str = "a\nERROR forged \u{1b}[2Jé\u{9b}\u{202e}\u{2028}\u{7f}\r\t";

    #[test]
    fn no_value_writes_a_line_or_a_command_however_it_is_recorded() {
        let text = logged(&LogSettings::default(), || {
            info!(string = FORGED, display = %FORGED, debug = ?FORGED, error = %io::Error::other(FORGED), "message {FORGED}");
            info!("{}", FORGED);
        });
        assert_eq!(text.lines().count(), 2, "{text}");
        let allowed = |c: char| c == '\n' || !acts(c);
        assert!(text.chars().all(allowed), "{text:?}");
        let value = r"a\nERROR forged \u{1b}[2Jé\u{9b}\u{202e}\u{2028}\u{7f}\r\t";
        for expected in [
            format!("message {value}"),
            format!("string=\"{value}\""),
            format!(" display={value}"),
            format!(" error={value}"),
        ] {
            assert!(text.contains(&expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn json_is_one_flat_object_per_line() {
        let settings = LogSettings {
            format: LogFormat::Json,
            ..LogSettings::default()
        };
        let text = logged(&settings, || info!(string = FORGED, display = %FORGED, count = 3, "done"));
        assert_eq!(text.lines().count(), 1, "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["message"], "done");
        assert_eq!(value["level"], "INFO");
        assert_eq!(value["string"], FORGED);
        assert_eq!(value["display"], FORGED);
        assert_eq!(value["count"], 3);
        let allowed = |c: char| c == '\n' || !acts(c);
        assert!(text.chars().all(allowed), "{text:?}");
    }

    #[test]
    fn colour_only_on_a_terminal() {
        assert!(!logged_with(&LogSettings::default(), false, || info!(a = 1, "x")).contains('\u{1b}'));
        let colour = logged_with(&LogSettings::default(), true, || info!(a = FORGED, "x"));
        assert!(colour.contains("\u{1b}[2ma=\u{1b}[0m\"a\\nERROR forged \\u{1b}[2J"), "{colour:?}");
    }

    fn everything() {
        error!("our error");
        warn!("our warn");
        info!("our info");
        debug!("our debug");
        trace!("our trace");
        warn!(target: "reqwest::connect", "their warn");
        info!(target: "hyper_util::client", "their info");
        debug!(target: "hyper_util::client", "their debug");
        trace!(target: "rustls", "their trace");
        debug!(target: "hickory_resolver", "dns debug");
    }

    #[test]
    fn others_are_quiet_and_what_may_hold_tokens_never_speaks() {
        let lines = |settings: &LogSettings| -> Vec<String> {
            let text = logged(settings, everything);
            text.lines().map(|line| line.split(": ").last().unwrap().to_owned()).collect()
        };
        assert_eq!(lines(&level(LevelFilter::ERROR)), ["our error"]);
        assert_eq!(
            lines(&level(LevelFilter::INFO)),
            ["our error", "our warn", "our info", "their warn"]
        );
        assert_eq!(
            lines(&level(LevelFilter::TRACE)),
            ["our error", "our warn", "our info", "our debug", "our trace", "their warn"]
        );
        let named = |targets: &[(&str, LevelFilter)]| LogSettings {
            targets: targets.iter().map(|(target, level)| ((*target).to_owned(), *level)).collect(),
            ..LogSettings::default()
        };
        let loud = named(&[
            ("hyper_util", LevelFilter::TRACE),
            ("rustls", LevelFilter::TRACE),
            ("hy", LevelFilter::TRACE),
        ]);
        assert_eq!(lines(&loud), ["our error", "our warn", "our info", "their warn", "their info"]);
        let dns = named(&[
            ("hickory_resolver", LevelFilter::DEBUG),
            ("lk_jwt_service::telemetry", LevelFilter::WARN),
        ]);
        assert_eq!(lines(&dns), ["our error", "our warn", "their warn", "dns debug"]);
    }

    #[test]
    fn a_panic_is_one_line() {
        let text = logged(&LogSettings::default(), || {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(log_panic));
            let caught = std::panic::catch_unwind(|| panic!("a\nb"));
            std::panic::set_hook(before);
            assert!(caught.is_err());
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("ERROR") && text.contains(r#"reason="a\nb""#) && text.contains("telemetry.rs:"),
            "{text}"
        );
    }
}
