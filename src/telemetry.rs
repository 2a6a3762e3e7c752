//! The log: stderr only, escaped, and without what other crates say about requests. `writer.rs` writes it, so that nobody
//! waits for its reader.

mod writer;

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Subscriber, error};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::{FilterExt as _, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{LogFormat, LogSettings};
use writer::{Lines, LogWriter};

/// Our modules, in the library and in the binary.
const OURS: &str = "lk_jwt_service";

/// DNS sees names only, and its details are what an operator needs who asks why a homeserver was not found.
const HARMLESS: &str = "hickory";

/// How long the end of the process waits for what is still to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The writer of this process; none where the system gives no thread.
static WRITER: OnceLock<Option<LogWriter>> = OnceLock::new();

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
        self.0.flush(LAST_WORDS);
    }
}

/// Installs the log and the panic hook of this process.
///
/// # Errors
/// When there is a log already, or the log's thread cannot be started.
pub fn init(settings: &LogSettings) -> Result<Log, LogError> {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let writer = writer().ok_or(LogError::NoThread)?;
    let lines = Lines {
        writer: writer.clone(),
        format: settings.format,
    };
    subscriber(settings, lines, colour).try_init()?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Log(writer.clone()))
}

/// Writes a line to stderr behind the log, whatever the log level, and waits a moment for it.
pub fn say(line: &str) {
    let line = format!("{line}\n");
    match writer() {
        Some(writer) => {
            writer.push(line.as_bytes(), LogFormat::Text);
            writer.flush(LAST_WORDS);
        }
        // Where stderr is closed nobody can be told.
        None => drop(io::stderr().write_all(line.as_bytes())),
    }
}

fn writer() -> Option<&'static LogWriter> {
    WRITER.get_or_init(|| LogWriter::start(io::stderr()).ok()).as_ref()
}

fn subscriber<W>(settings: &LogSettings, writer: W, colour: bool) -> impl Subscriber + Send + Sync + 'static
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    // An error of stderr must not be printed to stderr, which would panic.
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(colour)
        .log_internal_errors(false);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match settings.format {
        LogFormat::Text => Box::new(layer.fmt_fields(debug_fn(text_field).delimited(" "))),
        LogFormat::Json => Box::new(
            layer
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .map_writer(|inner| JsonEscaped { inner }),
        ),
    };
    tracing_subscriber::registry().with(layer.with_filter(wanted(settings).and(permitted())))
}

/// Levels that the operator asks for: ours at the level, others from `warn`, and what `RUST_LOG` names.
fn wanted(settings: &LogSettings) -> Targets {
    Targets::new()
        .with_default(settings.level.min(LevelFilter::WARN))
        .with_target(OURS, settings.level)
        .with_targets(settings.targets.iter().cloned())
}

/// Levels that are permitted whoever asks: below `info`, HTTP and TLS crates print URLs and headers, and so OpenID tokens and JWTs.
/// Since nobody can follow what each crate prints, all are held back but the harmless ones.
fn permitted() -> Targets {
    Targets::new()
        .with_default(LevelFilter::INFO)
        .with_targets([(OURS, LevelFilter::TRACE), (HARMLESS, LevelFilter::TRACE)])
}

/// `name=value`, escaped however the value was recorded, so that no client writes lines of ours or commands of a terminal.
fn text_field(writer: &mut Writer<'_>, field: &tracing::field::Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        let name = field.name().trim_start_matches("r#");
        if writer.has_ansi_escapes() {
            write!(writer, "\x1b[2m{name}=\x1b[0m")?;
        } else {
            write!(writer, "{name}=")?;
        }
    }
    fmt::write(&mut Escaped(writer), format_args!("{value:?}"))
}

/// Whether a character would end the line, steer a terminal, or turn the direction of reading.
fn acts(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Escapes control characters in text.
struct Escaped<'a, 'w>(&'a mut Writer<'w>);

impl fmt::Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            if acts(c) {
                self.0.write_str(&text[plain..at])?;
                write!(self.0, "{}", c.escape_default())?;
                plain = at + c.len_utf8();
            }
        }
        self.0.write_str(&text[plain..])
    }
}

/// Escapes those that JSON allows to stand as they are, beyond ASCII. In JSON such characters are within strings only.
struct JsonEscaped<W> {
    inner: W,
}

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for JsonEscaped<M> {
    type Writer = JsonEscaped<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        JsonEscaped {
            inner: self.inner.make_writer(),
        }
    }
}

impl<W: io::Write> io::Write for JsonEscaped<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if text.chars().any(|c| c > '~' && acts(c)) {
            let escape = |c: char| {
                if c > '~' && acts(c) {
                    format!("\\u{:04x}", u32::from(c))
                } else {
                    c.into()
                }
            };
            self.inner.write_all(text.chars().map(escape).collect::<String>().as_bytes())?;
        } else {
            self.inner.write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Logs a panic as one line at `error` instead of the several that the standard library prints.
fn log_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    error!(
        location,
        reason = message.unwrap_or("unknown"),
        "this service has a bug: a task panicked"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{debug, info, info_span, trace, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged_with(settings: &LogSettings, colour: bool, work: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        tracing::subscriber::with_default(subscriber(settings, move || writer.clone(), colour), work);
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
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
            let span = info_span!("request", id = %FORGED);
            let _entered = span.enter();
            info!(string = FORGED, display = %FORGED, debug = ?FORGED, error = %io::Error::other(FORGED), "message {FORGED}");
            span.record("id", FORGED);
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
