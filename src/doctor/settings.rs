//! Settings that count: those of this process (as `docker exec` gives it the service's), of an environment file, or of another process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{self, Config, ConfigErrors, Sources};
use crate::tls;

/// Largest environment file in bytes.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Variables, and where the files are that they name.
pub(super) struct Environment {
    /// Names and values; of one name the last value counts.
    variables: Vec<(String, String)>,
    /// Root directory of the process whose variables they are.
    root: Option<PathBuf>,
}

/// The variables cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnvironmentError {
    #[error("--env-file {0}: {1}")]
    File(String, io::Error),
    #[error("--pid {0}: {1}; it is the process of the service, and root may read it")]
    Process(u32, io::Error),
}

impl Environment {
    /// Variables of this process.
    pub(super) fn own() -> Self {
        let variables = std::env::vars_os();
        let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        Self {
            variables: variables.map(|(name, value)| (text(name), text(value))).collect(),
            root: None,
        }
    }

    /// Variables of a file, `NAME=value` in each line, before those of this process.
    pub(super) fn of_file(path: &str) -> Result<Self, EnvironmentError> {
        let failed = |error| EnvironmentError::File(path.to_owned(), error);
        let size = fs::metadata(path).map_err(failed)?.len();
        if size > MAX_FILE_BYTES {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is too long")));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        let mut own = Self::own();
        own.variables.extend(lines(&text));
        Ok(own)
    }

    /// Variables of another process, with the files as it sees them.
    pub(super) fn of_process(pid: u32) -> Result<Self, EnvironmentError> {
        let bytes = fs::read(format!("/proc/{pid}/environ")).map_err(|error| EnvironmentError::Process(pid, error))?;
        let pairs = bytes.split(|byte| *byte == 0).filter_map(|pair| {
            let pair = String::from_utf8_lossy(pair);
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        Ok(Self {
            variables: pairs.collect(),
            root: Some(PathBuf::from(format!("/proc/{pid}/root"))),
        })
    }

    pub(super) fn get(&self, name: &str) -> Option<String> {
        let mut variables = self.variables.iter().rev();
        variables.find(|(found, _)| found == name).map(|(_, value)| value.clone())
    }

    /// Whether anything says which key signs.
    pub(super) fn has_key(&self) -> bool {
        const KEYS: [&str; 8] = [
            "LIVEKIT_KEY",
            "LIVEKIT_SECRET",
            "LIVEKIT_API_KEY",
            "LIVEKIT_API_SECRET",
            "LIVEKIT_KEY_FILE",
            "LIVEKIT_KEYS",
            "LIVEKIT_SECRET_FROM_FILE",
            "LIVEKIT_SECRET_FILE",
        ];
        KEYS.iter().any(|key| self.get(key).is_some_and(|value| !value.trim().is_empty()))
    }

    /// The configuration that a service with these variables has.
    pub(super) fn config(&self, dev: bool) -> Result<Config, ConfigErrors> {
        let names: Vec<String> = self.variables.iter().map(|(name, _)| name.clone()).collect();
        let sources = Sources {
            get: &|name| self.get(name),
            names: &names,
            read_file: &|path| config::read_file(&self.inside(path).to_string_lossy()),
            has_certificates: &|path| tls::holds_certificates(&self.inside(&path.to_string_lossy())),
        };
        Config::from_sources(sources, dev).map(|(config, _)| config)
    }

    /// Where a file of that process is for this one.
    fn inside(&self, path: &str) -> PathBuf {
        match &self.root {
            Some(root) => root.join(path.trim_start_matches('/')),
            None => Path::new(path).to_path_buf(),
        }
    }
}

/// Reads lines as Docker and systemd do; both leave out comments, and quotes around a whole value are taken off.
fn lines(text: &str) -> impl Iterator<Item = (String, String)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (name, value) = line.split_once('=').filter(|_| !line.starts_with(['#', ';']))?;
        let value = value.trim();
        let quoted = ['"', '\'']
            .iter()
            .find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        let name = name.trim().trim_start_matches("export ").trim();
        Some((name.to_owned(), quoted.unwrap_or(value).to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_files_are_read_as_their_users_do() {
        let text = "# comment\n\nLIVEKIT_KEY=devkey\nLIVEKIT_SECRET=\"a=b\"\n export X = 'y'\nnothing\nEMPTY=\n";
        let pairs: Vec<_> = lines(text).collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            pairs,
            [
                pair("LIVEKIT_KEY", "devkey"),
                pair("LIVEKIT_SECRET", "a=b"),
                pair("X", "y"),
                pair("EMPTY", "")
            ]
        );
    }

    #[test]
    fn the_settings_of_a_process_are_those_of_its_environment() {
        let own = Environment::of_process(std::process::id()).unwrap();
        assert_eq!(own.get("PATH"), std::env::var("PATH").ok());
        assert!(own.inside("/etc/hostname").starts_with("/proc"));
        assert!(Environment::of_process(u32::MAX).is_err());
    }
}
