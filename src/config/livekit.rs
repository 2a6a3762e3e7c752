//! Where LiveKit is, for clients and for us (decision P7).

use std::net::IpAddr;

use url::{Host, Url};

use super::keys;
use super::lists::can_be_reached;
use super::reader::{Reader, shown};
use crate::secret::Keys;

const URL: &str = "LIVEKIT_URL";
const API_URL: &str = "LIVEKIT_API_URL";

/// LiveKit, as clients and as we reach it.
#[derive(Clone, Debug)]
pub struct Livekit {
    /// Address that clients get, as it was given.
    pub url: String,
    /// Base of its API, http or https. The path ends in `/`, so `join("twirp/...")` keeps a prefix.
    pub api_base: Url,
    /// API keys of the SFU.
    pub keys: Keys,
}

impl Livekit {
    /// The address that clients get, for the log: without what could be a password, and that is also a query.
    #[must_use]
    pub fn shown_url(&self) -> String {
        let text = self.url.split(['?', '#']).next().unwrap_or_default();
        match (text.split_once("://"), text.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
            (Some(_) | None, _) => text.to_owned(),
        }
    }
}

pub(super) fn livekit(reader: &mut Reader<'_>) -> Option<Livekit> {
    // All three are read before any is missed, so that all mistakes are reported.
    let (url, api_url, keys) = (client_url(reader), api_url(reader), keys::keys(reader));
    let (url, derived) = url?;
    Some(Livekit {
        url,
        api_base: api_url?.unwrap_or(derived),
        keys: keys?,
    })
}

/// The address as given, and the API base that follows from it.
fn client_url(reader: &mut Reader<'_>) -> Option<(String, Url)> {
    let dev = reader.dev.then(|| "ws://localhost:7880".to_owned());
    let Some(text) = reader.value(URL).or(dev) else {
        reader.mistake(
            URL,
            "must be set to the address of LiveKit that clients reach, as in wss://livekit.example.com",
        );
        return None;
    };
    match parse(&text) {
        Ok(mut url) => {
            if has_credentials(&url) {
                reader.warn(format!("{URL} holds a user name or password, and every client gets it: remove it"));
                // Both can only fail for URLs without a host.
                let _ = url.set_username("");
                let _ = url.set_password(None);
            }
            if !reader.dev {
                warn_about(reader, &text, &url);
            }
            Some((text, as_base(url)))
        }
        Err(problem) => {
            reader.mistake(
                URL,
                format!("must be a ws, wss, http or https address such as wss://livekit.example.com, but {problem}"),
            );
            None
        }
    }
}

/// Clients get it, and most of them are browsers elsewhere.
fn warn_about(reader: &mut Reader<'_>, text: &str, url: &Url) {
    let inside = format!("clients elsewhere cannot use it. The public address belongs there; {API_URL} is for the inner one");
    let problem = match url.host() {
        Some(Host::Domain("localhost")) => Some("is this machine itself"),
        Some(Host::Domain(name)) if !name.trim_end_matches('.').contains('.') => Some("has a name that only its own network knows"),
        Some(Host::Domain(_)) | None => None,
        Some(Host::Ipv4(ip)) => is_inner(ip.into()),
        Some(Host::Ipv6(ip)) => is_inner(ip.into()),
    };
    if let Some(problem) = problem {
        reader.warn(format!("{URL} {problem}: {inside}"));
    } else if text.get(..3).is_some_and(|scheme| scheme.eq_ignore_ascii_case("ws:")) || text.to_ascii_lowercase().starts_with("http:") {
        reader.warn(format!(
            "{URL} is not encrypted: browsers refuse it on pages that came by https. Write wss://, with a proxy that does TLS before LiveKit"
        ));
    }
}

fn is_inner(ip: IpAddr) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let is_private = match ip {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local() || (v4.octets()[0] == 100 && (64..128).contains(&v4.octets()[1])),
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local(),
    };
    if ip.is_loopback() {
        Some("is this machine itself")
    } else {
        is_private.then_some("is a private address")
    }
}

/// `Some(None)` is unset, `None` is wrong.
fn api_url(reader: &mut Reader<'_>) -> Option<Option<Url>> {
    let Some(text) = reader.value(API_URL) else { return Some(None) };
    let credentials = |url: Url| {
        if has_credentials(&url) {
            Err("holds a user name or password".to_owned())
        } else {
            Ok(url)
        }
    };
    match parse(&text).and_then(credentials) {
        Ok(url) => Some(Some(as_base(url))),
        Err(problem) => {
            reader.mistake(
                API_URL,
                format!("must be a plain http, https, ws or wss address such as http://livekit:7880, but {problem}"),
            );
            None
        }
    }
}

fn has_credentials(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// The address with its scheme turned from ws into http.
fn parse(text: &str) -> Result<Url, String> {
    let wrong = |what: &str| format!("{} {what}", shown(text));
    if text.starts_with(['"', '\'']) {
        return Err(wrong("is in quotes: remove them"));
    }
    let (scheme, rest) = text
        .split_once("://")
        .ok_or_else(|| wrong("has no scheme: write wss:// (or ws://) before it"))?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "ws" | "http" => "http",
        "wss" | "https" => "https",
        _ => return Err(wrong("has another scheme")),
    };
    // A URL parser would skip the empty host and take the first part of the path.
    if rest.is_empty() || rest.starts_with(['/', '\\']) {
        return Err(wrong("has no host"));
    }
    if text.contains(char::is_whitespace) {
        return Err(wrong("has white space inside"));
    }
    let url = Url::parse(&format!("{scheme}://{rest}")).map_err(|error| wrong(&format!("is not an address: {error}")))?;
    if can_be_reached(&url) {
        Ok(url)
    } else {
        Err(wrong("has a host that cannot be a name"))
    }
}

fn as_base(mut url: Url) -> Url {
    url.set_query(None);
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_base_keeps_the_path() {
        for (text, base) in [
            ("wss://livekit.example.com", "https://livekit.example.com/"),
            ("ws://localhost:7880", "http://localhost:7880/"),
            ("WSS://Example.com/livekit/sfu", "https://example.com/livekit/sfu/"),
            ("wss://example.com/livekit/sfu/", "https://example.com/livekit/sfu/"),
            ("https://example.com:443/a?b#c", "https://example.com/a/"),
            ("http://[::1]:7880", "http://[::1]:7880/"),
        ] {
            assert_eq!(as_base(parse(text).unwrap()).as_str(), base, "{text}");
        }
        let base = as_base(parse("wss://example.com/livekit/sfu").unwrap());
        assert_eq!(base.join("twirp/x").unwrap().path(), "/livekit/sfu/twirp/x");
    }

    #[test]
    fn the_log_sees_no_password() {
        for (url, shown) in [
            ("wss://livekit.example.com/sfu/", "wss://livekit.example.com/sfu/"),
            ("wss://user:hunter2@livekit.example.com/sfu", "wss://livekit.example.com/sfu"),
            ("wss://user:hunter2@hunter2@livekit.example.com", "wss://livekit.example.com"),
            ("wss://user:1/hunter2@livekit.example.com", "wss://livekit.example.com"),
            (
                "wss://livekit.example.com/sfu?token=hunter2#hunter2",
                "wss://livekit.example.com/sfu",
            ),
        ] {
            let livekit = Livekit {
                url: url.to_owned(),
                api_base: as_base(parse(url).unwrap()),
                keys: Keys::new(
                    crate::secret::KeyPair {
                        key: String::new(),
                        secret: crate::secret::Secret::new(""),
                    },
                    Vec::new(),
                ),
            };
            assert_eq!(livekit.shown_url(), shown);
        }
    }

    #[test]
    fn refuses_what_no_client_could_use() {
        for text in [
            "livekit.example.com",
            "livekit.example.com:7880",
            "wss:livekit.example.com",
            "ftp://example.com",
            "wss://",
            "wss:///sfu",
            "wss://:7880",
            "wss://a b",
            "wss://example.com:99999",
            "\"wss://example.com\"",
            "<nil>",
            "wss://$HOST/x",
            "wss://%HOST%/x",
            "wss://%H.example.com",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
