//! Checks what every outgoing connection depends on and libraries read by themselves: forward proxies (decision P20) and CA
//! certificates (decision P11). Only what would fail at each request is looked for here.

use std::path::Path;

use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;

use super::reader::Reader;
use crate::tls::{CERT_DIR, CERT_FILE, Given};

/// The variable that is read, and the one that is read where that is not set at all.
type Spellings = [&'static str; 2];

const HTTP: Spellings = ["HTTP_PROXY", "http_proxy"];
const HTTPS: Spellings = ["HTTPS_PROXY", "https_proxy"];
const ALL: Spellings = ["ALL_PROXY", "all_proxy"];

/// Checks the forward proxies that will be used.
pub(super) fn proxies(reader: &mut Reader<'_>) {
    let (http, https) = (check(reader, HTTP), check(reader, HTTPS));
    // It counts only where one of the others is missing: whoever has all three may have another kind of proxy in it.
    if !http || !https {
        check(reader, ALL);
    }
}

/// Checks the proxy in a variable, and tells whether one is set.
fn check(reader: &mut Reader<'_>, [upper, lower]: Spellings) -> bool {
    let raw = |name: &str| (reader.sources.get)(name);
    let name = if raw(upper).is_some() { upper } else { lower };
    let (raw, hidden) = (
        raw(name).unwrap_or_default(),
        raw(lower).is_some_and(|value| !value.trim().is_empty()),
    );
    let Some(value) = reader.value(name) else {
        if name == upper && hidden {
            reader.warn(format!("{upper} is set to nothing, so {lower} does not count"));
        }
        return false;
    };
    if raw != value {
        reader.mistake(
            name,
            "has white space or a line end around it: remove it (a file with Windows line ends brings one)",
        );
    } else if let Err(problem) = usable(&value) {
        reader.mistake(name, problem);
    }
    true
}

/// Asks the library that will read it, so that both always agree.
fn usable(value: &str) -> Result<(), &'static str> {
    let matcher = Matcher::builder().all(value).build();
    let proxy = matcher.intercept(&Uri::from_static("https://homeserver.invalid/"));
    match proxy.as_ref().and_then(|proxy| proxy.uri().scheme_str()) {
        Some("http") => Ok(()),
        Some("https") => Err(
            "names a proxy that is reached by https://, which is not supported: set it to the http:// address of a proxy, or unset it and list \
             in NO_PROXY what is reached directly",
        ),
        Some(_) => Err(SOCKS),
        None if value.starts_with("socks") => Err(SOCKS),
        None => Err("must be the address of a proxy such as http://proxy:3128: this one cannot be used"),
    }
}

const SOCKS: &str = "names a SOCKS proxy, which is not supported: set it to the http:// address of an HTTP proxy (most SOCKS proxies have one \
                     too), or unset it";

/// CA certificates that somebody names must be there: to go on with others would trust whom nobody chose.
pub(super) fn certificates(reader: &mut Reader<'_>) -> Given {
    let (file, dirs) = (reader.value(CERT_FILE), reader.value(CERT_DIR));
    let given = Given::new(file, dirs);
    let holds_any = reader.sources.has_certificates;
    if let Some(file) = &given.file {
        match holds_any(file) {
            Ok(true) => {}
            Ok(false) => reader.mistake(
                CERT_FILE,
                format!("needs a file with CA certificates in PEM form: {} has none", shown(file)),
            ),
            Err(error) => reader.mistake(
                CERT_FILE,
                format!(
                    "needs a file of CA certificates that this user may read: {} gives \"{error}\"",
                    shown(file)
                ),
            ),
        }
    }
    // Of several directories one with certificates is enough.
    let answers: Vec<_> = given.dirs.iter().map(|dir| (dir, holds_any(dir))).collect();
    if answers.iter().any(|(_, answer)| matches!(answer, Ok(true))) {
        return given;
    }
    for (dir, answer) in answers {
        let problem = answer.map_or_else(|error| format!("gives \"{error}\""), |_| "has none".to_owned());
        reader.mistake(
            CERT_DIR,
            format!("needs a directory with CA certificates in PEM form: {} {problem}", shown(dir)),
        );
    }
    given
}

fn shown(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_proxies_are_usable() {
        for value in [
            "http://proxy:3128",
            "http://proxy:3128/",
            "HTTP://proxy",
            "proxy:3128",
            "http://user:hunter2@proxy:3128",
            "http://[::1]:3128",
            "10.0.0.1:3128",
        ] {
            assert_eq!(usable(value), Ok(()), "{value}");
        }
        for (value, expected) in [
            ("socks5://proxy:1080", "SOCKS"),
            ("socks5h://user:hunter2@proxy:1080", "SOCKS"),
            ("socks4://proxy:1080", "SOCKS"),
            ("https://user:hunter2@proxy:3129", "https://, which is not supported"),
            ("ftp://proxy", "cannot be used"),
            ("socks://proxy", "SOCKS"),
            ("http://", "cannot be used"),
            ("http://a b", "cannot be used"),
            ("\"http://proxy:3128\"", "cannot be used"),
        ] {
            let problem = usable(value).unwrap_err();
            assert!(problem.contains(expected) && !problem.contains("hunter2"), "{value}: {problem}");
        }
    }
}
