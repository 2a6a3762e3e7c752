//! The command line: a few words. The settings are environment variables, in `config.rs`.

use std::ffi::OsString;
use std::fmt::Write as _;

mod doctor;

pub use doctor::{DoctorOptions, HELP as DOCTOR_HELP};

use crate::config::{VARIABLES, Variable};

/// Action that the arguments ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve; `dev` fills what is unset with the values of `livekit-server --dev`.
    Serve {
        /// Whether `--dev` was given.
        dev: bool,
    },
    /// Print the text of [`help`].
    Help,
    /// Print the line of [`version`].
    Version,
    /// Check the configuration and print what it comes to; `dev` as for [`Command::Serve`].
    CheckConfig {
        /// Whether `--dev` was given.
        dev: bool,
    },
    /// Run the healthcheck.
    Healthcheck,
    /// Say what is wrong around the service.
    Doctor(Box<DoctorOptions>),
    /// Print how that is asked for.
    DoctorHelp,
    /// Print the registration of an application service.
    GenerateRegistration {
        /// The homeserver; else the environment's.
        server_name: Option<String>,
        /// Where it reaches this service; else this machine.
        url: Option<String>,
    },
    /// Not understood: print this on stderr and exit with 2.
    Invalid(String),
}

impl Command {
    /// Reads the arguments, without the name of the program.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let arguments: Vec<_> = arguments
            .into_iter()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect();
        let words: Vec<_> = arguments.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] => Self::Serve { dev: false },
            ["--dev"] => Self::Serve { dev: true },
            ["check-config"] => Self::CheckConfig { dev: false },
            ["check-config", "--dev"] | ["--dev", "check-config"] => Self::CheckConfig { dev: true },
            ["healthcheck"] => Self::Healthcheck,
            ["doctor", "help" | "--help" | "-h"] => Self::DoctorHelp,
            ["doctor", rest @ ..] => match DoctorOptions::parse(rest) {
                Ok(options) => Self::Doctor(Box::new(options)),
                Err(mistake) => Self::Invalid(format!("doctor: {mistake}; see lk-jwt-service doctor --help")),
            },
            ["generate-registration", rest @ ..] if rest.len() <= 2 && rest.iter().all(|word| !word.starts_with('-')) => {
                Self::GenerateRegistration {
                    server_name: rest.first().map(ToString::to_string),
                    url: rest.get(1).map(ToString::to_string),
                }
            }
            ["generate-registration", rest @ ..] => {
                Self::unexpected(rest.iter().find(|word| word.starts_with('-')).or_else(|| rest.get(2)))
            }
            ["help" | "--help" | "-h"] => Self::Help,
            ["--version" | "-V"] => Self::Version,
            [
                "--dev" | "check-config" | "healthcheck" | "help" | "--help" | "-h" | "--version" | "-V",
                rest @ ..,
            ]
            | rest => Self::unexpected(rest.first()),
        }
    }

    fn unexpected(word: Option<&&str>) -> Self {
        let word = word.copied().unwrap_or_default();
        Self::Invalid(format!(
            "unexpected argument {word:?}. Arguments are no longer ignored, and settings are environment variables: see \
             lk-jwt-service --help"
        ))
    }
}

/// The answer to `--version`.
#[must_use]
pub fn version() -> String {
    concat!("lk-jwt-service ", env!("CARGO_PKG_VERSION"), "\n").to_owned()
}

/// The answer to `--help`: the words and every variable with its default.
#[must_use]
pub fn help() -> String {
    let mut text = version();
    text.push_str(
        "MatrixRTC authorization service: exchanges a Matrix OpenID token for a LiveKit token.

Usage:
  lk-jwt-service               serve
  lk-jwt-service --dev         serve, with the values of `livekit-server --dev` for what is unset; not for production
  lk-jwt-service check-config  say what a start would say, print what the configuration comes to, without secrets, and exit
                               with 0 or 1 (with --dev, too)
  lk-jwt-service healthcheck   exit with 0 if the service on this machine answers, else with 1
  lk-jwt-service doctor        say what is wrong around the service (SFU, proxy, discovery, homeserver, store), and what
                               to do; doctor --help has its options
  lk-jwt-service generate-registration [SERVER_NAME [URL]]
                               print the registration that makes it an application service of that homeserver, which
                               reaches it at URL; else of LIVEKIT_HS_SERVER_NAME, at http://localhost:8080
  lk-jwt-service help          print this (--help, -h)
  lk-jwt-service --version     print the version (-V)

Environment (an empty variable counts as unset, but for LIVEKIT_FULL_ACCESS_HOMESERVERS):
",
    );
    for Variable { name, default, doc } in VARIABLES {
        let default = if default.is_empty() {
            String::new()
        } else {
            format!(" [{default}]")
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name}{default}\n      {doc}");
    }
    text.push_str(
        "
Also honoured: SSL_CERT_FILE and SSL_CERT_DIR (instead of the system's file, and of its directory, of certificates to trust),
HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY (http:// proxies), NO_COLOR.
",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Command {
        Command::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn understands_its_words() {
        for (words, command) in [
            (&[] as &[&str], Command::Serve { dev: false }),
            (&["--dev"], Command::Serve { dev: true }),
            (&["--help"], Command::Help),
            (&["-h"], Command::Help),
            (&["help"], Command::Help),
            (&["check-config"], Command::CheckConfig { dev: false }),
            (&["check-config", "--dev"], Command::CheckConfig { dev: true }),
            (&["--version"], Command::Version),
            (&["-V"], Command::Version),
            (&["healthcheck"], Command::Healthcheck),
            (
                &["generate-registration"],
                Command::GenerateRegistration {
                    server_name: None,
                    url: None,
                },
            ),
            (
                &["generate-registration", "example.com", "http://lk:8080"],
                Command::GenerateRegistration {
                    server_name: Some("example.com".into()),
                    url: Some("http://lk:8080".into()),
                },
            ),
        ] {
            assert_eq!(parse(words), command, "{words:?}");
        }
    }

    #[test]
    fn names_what_it_does_not_understand() {
        for (words, word) in [
            (&["--config"] as &[&str], "--config"),
            (&["--dev", "x"], "x"),
            (&["check-config", "x"], "x"),
            (&["generate-registration", "a", "b", "c"], "c"),
            (&["generate-registration", "--help"], "--help"),
            (&["serve", "--dev"], "serve"),
            (&[""], ""),
            (&["\u{1b}[31m"], "\\u{1b}[31m"),
        ] {
            let Command::Invalid(message) = parse(words) else {
                panic!("{words:?} was understood")
            };
            assert!(
                message.starts_with(&format!("unexpected argument \"{word}\"")) && message.contains("--help"),
                "{message}"
            );
        }
    }

    #[test]
    fn the_help_names_every_variable_and_default() {
        let help = help();
        for Variable { name, default, doc } in VARIABLES {
            let line = if default.is_empty() {
                format!("\n  {name}\n")
            } else {
                format!("\n  {name} [{default}]\n")
            };
            assert!(help.contains(&line) && help.contains(doc), "{name}");
        }
        assert!(
            help.lines().all(|line| line.chars().count() <= 125),
            "a line is too long for a terminal"
        );
        assert!(version().starts_with("lk-jwt-service 1."));
    }

    #[test]
    fn the_readme_has_the_same_table() {
        let readme = include_str!("../README.md");
        for Variable { name, doc, .. } in VARIABLES {
            let row = readme.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
            assert!(row.is_some_and(|row| row.ends_with(&format!("| {doc} |"))), "{name}: {row:?}");
        }
    }
}
