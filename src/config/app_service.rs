//! Application-service mode: the homeserver that this service belongs to, and its tokens.

use std::time::Duration;

use yaml_rust2::{Yaml, YamlLoader};

use super::lists::not_a_server_name;
use super::reader::{FilePath, Reader, shown};
use super::unexpanded;
use crate::secret::Secret;
use crate::server_name::ServerName;

const SERVER_NAME: &str = "LIVEKIT_HS_SERVER_NAME";
const REGISTRATION: &str = "LIVEKIT_AS_REGISTRATION_FILE";
const AS_TOKEN: &str = "LIVEKIT_AS_TOKEN";
const HS_TOKEN: &str = "LIVEKIT_HS_TOKEN";
const REQUIRE_MEMBERSHIP: &str = "LIVEKIT_REQUIRE_MEMBERSHIP";
const MEMBERSHIP_INTERVAL: &str = "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS";

/// The homeserver that this service belongs to.
#[derive(Clone, Debug)]
pub struct AppServiceConfig {
    /// Server name of our homeserver.
    pub server_name: ServerName,
    /// Token with which this service proves to the homeserver who it is.
    pub as_token: Secret,
    /// Token with which the homeserver proves who it is.
    pub hs_token: Secret,
}

/// Whether and how often the membership of users is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Whether the standalone routes are for members only (decision A7).
    pub required: bool,
    /// How often participants are checked (decision A8); `None` is off.
    pub check_interval: Option<Duration>,
}

/// All or nothing: a half is a mistake.
pub(super) fn app_service(reader: &mut Reader<'_>) -> Option<AppServiceConfig> {
    let name = reader.value(SERVER_NAME);
    let registration = reader.file(REGISTRATION, FilePath::Shown);
    // Beside a registration file the two variables are ignored.
    let (as_token, hs_token) = if registration.is_some() {
        (None, None)
    } else {
        (reader.value(AS_TOKEN), reader.value(HS_TOKEN))
    };
    if name.is_none() && registration.is_none() && as_token.is_none() && hs_token.is_none() {
        return None;
    }
    let server_name = server_name(reader, name);
    let tokens = match registration {
        Some(content) => content.and_then(|content| from_registration(reader, &content)),
        None => {
            let as_token = token(reader, AS_TOKEN, as_token);
            let hs_token = token(reader, HS_TOKEN, hs_token);
            as_token.zip(hs_token)
        }
    };
    let (server_name, (as_token, hs_token)) = server_name.zip(tokens)?;
    if as_token.expose() == hs_token.expose() {
        reader.warn(format!(
            "{AS_TOKEN} and {HS_TOKEN} (or those of the registration) are the same: who sees one call can pose as either side. Use \
             two random values, as `lk-jwt-service generate-registration` does"
        ));
    }
    Some(AppServiceConfig {
        server_name,
        as_token,
        hs_token,
    })
}

/// Of the file only the tokens are read: the rest of it is for the homeserver.
fn from_registration(reader: &mut Reader<'_>, content: &str) -> Option<(Secret, Secret)> {
    // The parser's words may hold a piece of the file, and so of a token.
    let documents = match YamlLoader::load_from_str(content) {
        Ok(documents) => documents,
        Err(error) => {
            let text = if error.info().ends_with("duplicated key in mapping") {
                format!("needs a file that has every key once: line {} repeats one", error.marker().line())
            } else {
                "needs a file that is valid YAML: this one is not".to_owned()
            };
            reader.mistake(REGISTRATION, text);
            return None;
        }
    };
    let Some(mapping) = documents.first().and_then(Yaml::as_hash) else {
        reader.mistake(
            REGISTRATION,
            "needs the registration of an application service, a YAML mapping: this file has none",
        );
        return None;
    };
    let mut token = |key: &str| match mapping.get(&Yaml::String(key.to_owned())).and_then(Yaml::as_str) {
        Some(token) if is_token(token.trim()) => {
            if let Some(form) = unexpanded::whole(token) {
                reader.unexpanded(REGISTRATION, "names a file that holds", form);
            }
            Some(Secret::new(token.trim()))
        }
        Some(_) | None => {
            let text = format!("needs a file with a usable `{key}`: text in quotes, printable ASCII without spaces");
            reader.mistake(REGISTRATION, text);
            None
        }
    };
    let (as_token, hs_token) = (token("as_token"), token("hs_token"));
    as_token.zip(hs_token)
}

/// Checks that the token fits into a header.
fn is_token(token: &str) -> bool {
    !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())
}

fn server_name(reader: &mut Reader<'_>, name: Option<String>) -> Option<ServerName> {
    let Some(name) = name else {
        let text = format!("must be set, because {REGISTRATION}, {AS_TOKEN} or {HS_TOKEN} is: name your homeserver, or unset them all");
        reader.mistake(SERVER_NAME, text);
        return None;
    };
    let parsed = ServerName::parse(&name);
    if parsed.is_err() {
        reader.mistake(
            SERVER_NAME,
            format!("must be the name of your homeserver: {}", not_a_server_name(&name, &name)),
        );
    }
    parsed.ok()
}

fn token(reader: &mut Reader<'_>, variable: &'static str, value: Option<String>) -> Option<Secret> {
    if value.is_none() {
        let text = format!("must be set for application-service mode: set it, or {REGISTRATION}, or unset {SERVER_NAME} and both tokens");
        reader.mistake(variable, text);
    }
    let value = value?;
    if !is_token(&value) {
        reader.mistake(variable, "must be printable ASCII without spaces, as the registration has it");
        return None;
    }
    Some(Secret::new(value))
}

/// `alone`: our own homeserver is the only one with full access.
pub(super) fn membership(reader: &mut Reader<'_>, alone: bool) -> Membership {
    let required = match reader.switch(REQUIRE_MEMBERSHIP) {
        Some(Ok(required)) => Some(required),
        Some(Err(value)) => {
            reader.mistake(
                REQUIRE_MEMBERSHIP,
                format!("must be true or false, or unset to let the service decide, not {}", shown(&value)),
            );
            None
        }
        None => None,
    };
    if required == Some(true)
        && [SERVER_NAME, REGISTRATION, AS_TOKEN]
            .iter()
            .all(|name| reader.value(name).is_none())
    {
        let text = format!("is true, but only application-service mode can check memberships: set {SERVER_NAME} and {REGISTRATION} too");
        reader.mistake(REQUIRE_MEMBERSHIP, text);
    }
    Membership {
        required: required.unwrap_or(alone),
        check_interval: reader.interval(MEMBERSHIP_INTERVAL, 30),
    }
}
