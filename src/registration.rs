//! `lk-jwt-service generate-registration`: the file that makes this service an application service of a homeserver
//! ([application-service API, "Registration"](https://spec.matrix.org/v1.16/application-service-api/#registration)).
//!
//! It carries the names of MSC4502 and MSC4512 twice: Synapse 1.163 reads the unstable ones only and ignores the others.

use crate::config;
use crate::config::unexpanded::whole;
use crate::server_name::ServerName;

/// Reasons for which there is no registration to print.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistrationError {
    /// No server name was given.
    #[error(
        "for which homeserver? Name it: lk-jwt-service generate-registration example.com http://lk-jwt-service:8080, or set LIVEKIT_HS_SERVER_NAME"
    )]
    NoServerName,
    /// The given server name is invalid.
    #[error("{0:?} is not the name of a homeserver: it is what stands behind the colon of its user ids, as example.com")]
    ServerName(String),
    /// The given address is invalid.
    #[error("{shown} is not an address of this service: it is where the homeserver reaches it, as http://lk-jwt-service:8080", shown = config::shown(.0))]
    Address(String),
    /// A token that is given cannot be one.
    #[error("{0} is set, but must be printable ASCII without spaces and quotes")]
    Token(&'static str),
    /// The given token holds a placeholder.
    #[error("{0} holds a placeholder that nothing has filled in: write the value itself, or unset it")]
    Placeholder(&'static str),
}

/// The registration for `server_name`, which reaches this service at `url`.
///
/// What is not given comes from the environment: `LIVEKIT_HS_SERVER_NAME`, the port of `LIVEKIT_JWT_BIND`, and the two tokens,
/// which are made of `random` (256 bits each) where they are unset.
///
/// # Errors
/// When no usable registration would come of it.
pub fn generate(
    server_name: Option<String>,
    url: Option<String>,
    get: &dyn Fn(&str) -> Option<String>,
    random: &mut dyn FnMut() -> [u8; 32],
) -> Result<String, RegistrationError> {
    let value = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let name = server_name
        .or_else(|| value("LIVEKIT_HS_SERVER_NAME"))
        .ok_or(RegistrationError::NoServerName)?;
    let name = ServerName::parse(&name).map_err(|_| RegistrationError::ServerName(name))?;
    let url = url.unwrap_or_else(|| format!("http://localhost:{}", port(value("LIVEKIT_JWT_BIND").as_deref())));
    if !is_address(&url) {
        return Err(RegistrationError::Address(url));
    }
    let url = url.trim_end_matches('/');
    let mut token = |variable: &'static str| match value(variable) {
        Some(token) if whole(&token).is_some() => Err(RegistrationError::Placeholder(variable)),
        Some(token) if token.bytes().all(|b| b.is_ascii_graphic() && !b"'\"\\".contains(&b)) => Ok(token),
        Some(_) => Err(RegistrationError::Token(variable)),
        None => Ok(random().iter().map(|byte| format!("{byte:02x}")).collect()),
    };
    let (as_token, hs_token) = (token("LIVEKIT_AS_TOKEN")?, token("LIVEKIT_HS_TOKEN")?);
    let users = format!("^@.+:{}$", escaped(name.as_str()));
    Ok(format!(
        "# Registration of lk-jwt-service as an application service of {name}. It holds secrets: keep it readable for the two only.
#
# 1. Synapse: list this file in app_service_config_files, set experimental_features msc4502_enabled and msc4512_enabled to true
#    and max_event_delay_duration to 24h, and restart it.
# 2. lk-jwt-service: LIVEKIT_AS_REGISTRATION_FILE names this file, LIVEKIT_HS_SERVER_NAME={name}.
id: lk-jwt-service
as_token: '{as_token}'
hs_token: '{hs_token}'
sender_localpart: lk-jwt-service
# No events are pushed: this service asks.
url: null
# Restarts of delayed events must not be limited.
rate_limited: false
# In the name of whom it may act: of the homeserver's own users, and of nobody else.
namespaces:
  users:
    - exclusive: false
      regex: '{users}'
  aliases: []
  rooms: []

# Where the homeserver sends its MatrixRTC endpoints (MSC4512), and what this service may ask (MSC4502).
proxy_prefix: rtc/livekit
proxy_url: '{url}'
scopes:
  - urn:matrix:client:rooms:is_joined
# The same, as Synapse 1.163 reads it.
io.element.msc4512.proxy_prefix: rtc/livekit
io.element.msc4512.proxy_url: '{url}'
io.element.msc4502.scopes:
  - urn:matrix:client:io.element.msc4502:rooms:is_joined
"
    ))
}

/// The port of an address to listen on.
fn port(bind: Option<&str>) -> u16 {
    bind.and_then(|bind| bind.rsplit(':').next()?.parse().ok()).unwrap_or(8080)
}

/// Checks that the address has nothing in it that would have to be quoted otherwise than it is.
fn is_address(url: &str) -> bool {
    let plain = url.bytes().all(|b| b.is_ascii_graphic() && !b"'\"\\".contains(&b));
    plain
        && url::Url::parse(url).is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https") && url.host_str().is_some() && url.query().is_none() && url.fragment().is_none()
        })
}

/// A server name as a regular expression that fits nothing else.
fn escaped(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 8);
    for c in name.chars() {
        if matches!(c, '.' | '[' | ']') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use yaml_rust2::{Yaml, YamlLoader};

    use super::*;

    fn with(server_name: Option<&str>, url: Option<&str>, environment: &[(&str, &str)]) -> Result<String, RegistrationError> {
        let get = |name: &str| environment.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        let mut seed = 0;
        let mut random = || {
            seed += 1;
            [seed; 32]
        };
        generate(server_name.map(str::to_owned), url.map(str::to_owned), &get, &mut random)
    }

    fn yaml(text: &str) -> Yaml {
        YamlLoader::load_from_str(text).unwrap().remove(0)
    }

    #[test]
    fn holds_what_homeservers_of_both_generations_read() {
        let yaml = yaml(&with(Some("example.com"), Some("http://lk:8080/"), &[]).unwrap());
        for (key, value) in [
            ("id", "lk-jwt-service"),
            ("sender_localpart", "lk-jwt-service"),
            ("proxy_prefix", "rtc/livekit"),
            ("proxy_url", "http://lk:8080"),
            ("io.element.msc4512.proxy_prefix", "rtc/livekit"),
            ("io.element.msc4512.proxy_url", "http://lk:8080"),
        ] {
            assert_eq!(yaml[key].as_str(), Some(value), "{key}");
        }
        assert_eq!(yaml["url"], Yaml::Null);
        assert_eq!(yaml["rate_limited"], Yaml::Boolean(false));
        assert_eq!(yaml["scopes"][0].as_str(), Some("urn:matrix:client:rooms:is_joined"));
        assert_eq!(
            yaml["io.element.msc4502.scopes"][0].as_str(),
            Some("urn:matrix:client:io.element.msc4502:rooms:is_joined")
        );
        let users = &yaml["namespaces"]["users"][0];
        assert_eq!(
            (users["regex"].as_str(), &users["exclusive"]),
            (Some(r"^@.+:example\.com$"), &Yaml::Boolean(false))
        );
        let (as_token, hs_token) = (yaml["as_token"].as_str().unwrap(), yaml["hs_token"].as_str().unwrap());
        assert!(as_token.len() == 64 && hs_token.len() == 64 && as_token != hs_token);
    }

    #[test]
    fn the_environment_says_what_the_arguments_do_not() {
        let environment = [
            ("LIVEKIT_HS_SERVER_NAME", "[::1]:8448"),
            ("LIVEKIT_JWT_BIND", "127.0.0.1:9090"),
            ("LIVEKIT_AS_TOKEN", "ours"),
            ("LIVEKIT_HS_TOKEN", ""),
        ];
        let yaml = yaml(&with(None, None, &environment).unwrap());
        assert_eq!(yaml["proxy_url"].as_str(), Some("http://localhost:9090"));
        assert_eq!(yaml["as_token"].as_str(), Some("ours"));
        assert_eq!(yaml["hs_token"].as_str(), Some("01".repeat(32).as_str()));
        assert_eq!(yaml["namespaces"]["users"][0]["regex"].as_str(), Some(r"^@.+:\[::1\]:8448$"));
    }

    #[test]
    fn what_cannot_work_is_not_printed() {
        assert_eq!(with(None, None, &[]), Err(RegistrationError::NoServerName));
        for name in ["https://example.com", "@a:example.com", "a b", "example.com'"] {
            assert_eq!(with(Some(name), None, &[]), Err(RegistrationError::ServerName(name.into())));
        }
        for url in ["lk:8080", "ftp://lk", "http://", "http://lk'", "http://lk/?x", "http://lk x"] {
            assert_eq!(
                with(Some("example.com"), Some(url), &[]),
                Err(RegistrationError::Address(url.into()))
            );
        }
        assert_eq!(
            with(Some("example.com"), None, &[("LIVEKIT_HS_TOKEN", "it's")]),
            Err(RegistrationError::Token("LIVEKIT_HS_TOKEN"))
        );
        assert_eq!(
            with(Some("example.com"), None, &[("LIVEKIT_AS_TOKEN", "${AS_TOKEN}")]),
            Err(RegistrationError::Placeholder("LIVEKIT_AS_TOKEN"))
        );
        let text = RegistrationError::Address("http://user:hunter2@lk/?x".into()).to_string();
        assert!(!text.contains("hunter2"), "{text}");
    }
}
