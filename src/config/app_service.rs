//! Application-service mode: the homeserver that this service belongs to, and its tokens.

use std::time::Duration;

use super::lists::not_a_server_name;
use super::reader::{FilePath, Reader, shown};
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
pub struct AppService {
    /// Its name.
    pub server_name: ServerName,
    /// What the two prove to each other who they are with.
    pub tokens: AppServiceTokens,
}

/// The tokens of the application service.
#[derive(Clone, Debug)]
pub enum AppServiceTokens {
    /// Given one by one.
    Given {
        /// What we send.
        as_token: Secret,
        /// What the homeserver sends.
        hs_token: Secret,
    },
    /// The content of the registration file, which holds both.
    Registration(Secret),
}

/// Whether and how often the membership of users is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    /// `None`: decided by the list of homeservers with full access (decision A7).
    pub required: Option<bool>,
    /// How often participants are checked (decision A8); `None` is off.
    pub check_interval: Option<Duration>,
}

/// All or nothing: a half is a mistake.
pub(super) fn app_service(reader: &mut Reader<'_>) -> Option<AppService> {
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
        Some(content) => content.map(|content| AppServiceTokens::Registration(Secret::new(content))),
        None => {
            let as_token = token(reader, AS_TOKEN, as_token);
            let hs_token = token(reader, HS_TOKEN, hs_token);
            as_token
                .zip(hs_token)
                .map(|(as_token, hs_token)| AppServiceTokens::Given { as_token, hs_token })
        }
    };
    Some(AppService {
        server_name: server_name?,
        tokens: tokens?,
    })
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
            format!("must be the name of your homeserver: {}", not_a_server_name(&name)),
        );
    }
    parsed.ok()
}

fn token(reader: &mut Reader<'_>, variable: &'static str, value: Option<String>) -> Option<Secret> {
    if value.is_none() {
        let text = format!("must be set for application-service mode: set it, or {REGISTRATION}, or unset {SERVER_NAME} and both tokens");
        reader.mistake(variable, text);
    }
    value.map(Secret::new)
}

pub(super) fn membership(reader: &mut Reader<'_>) -> Membership {
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
        required,
        check_interval: reader.interval(MEMBERSHIP_INTERVAL, 30),
    }
}
