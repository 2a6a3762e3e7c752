//! The endpoints behind our homeserver, in application-service mode only: their paths, and who may call them.
//!
//! The homeserver forwards `…/rtc/livekit/…` under any version of its APIs (MSC4512), so every prefix that a client may use
//! is served. It proves itself by the `hs_token` before anything of a request is read, and says for whom it asks in a header.

mod delegate_delayed_leave;
mod federation_get_token;
mod get_token;
mod ping;
mod transactions;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::routing::{any, post, put};
use http::{HeaderMap, HeaderName, Request, header};
use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::report::{ApiError, busy};
use super::request::Received;
use super::{App, method_not_allowed};
use crate::admission::fair_queue::Asker;
use crate::admission::limiter::Permit;
use crate::app_service::AppService;
use crate::connections::Pot;
use crate::log_throttle::LogThrottle;
use crate::metrics::Limit;
use crate::request_line::note;
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::wire::BadRequest;

/// Beginnings of the client-server paths (decision A1).
const CLIENT: [&str; 3] = [
    "/_matrix/client/v1/rtc/livekit",
    "/_matrix/client/v3/rtc/livekit",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit",
];
/// Beginnings of the server-server paths.
const FEDERATION: [&str; 2] = [
    "/_matrix/federation/v1/rtc/livekit",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit",
];
/// For which user our homeserver asks.
const USER: HeaderName = HeaderName::from_static("x-matrix-user-identifier");
/// For which homeserver our homeserver asks.
const ORIGIN: HeaderName = HeaderName::from_static("x-matrix-origin");

/// State of the endpoints behind our homeserver.
pub struct AppServiceRoutes {
    service: AppService,
    hs_token: RwLock<Secret>,
    refused: LogThrottle,
}

impl AppServiceRoutes {
    /// The homeserver proves itself by `hs_token`.
    #[must_use]
    pub const fn new(service: AppService, hs_token: Secret) -> Self {
        Self {
            service,
            hs_token: RwLock::new(hs_token),
            refused: LogThrottle::once_a_minute(),
        }
    }

    /// The homeserver proves itself by `hs_token` from now on.
    pub(super) fn use_token(&self, hs_token: Secret) {
        *self.hs_token.write() = hs_token;
    }

    /// Whether it is our homeserver that calls.
    fn admit(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .filter(|token| !token.is_empty())
            .ok_or(ApiError::NO_HS_TOKEN)?;
        // Of their hashes, so that the time does not tell the length either.
        let ours = Sha256::digest(self.hs_token.read().expose());
        let given = Sha256::digest(token);
        if bool::from(given.as_slice().ct_eq(ours.as_slice())) {
            note(|line| line.is_proven = true);
            return Ok(());
        }
        self.refused.log(|count| {
            let remedy = "if it is your homeserver, it has another registration than this service: the hs_token differs";
            tracing::warn!(name: "homeserver_calls_refused", count, remedy, "calls to the homeserver's endpoints are refused");
        });
        Err(ApiError::BAD_HS_TOKEN)
    }
}

/// A request of our homeserver: whether it is, what it asks for, and for whom, in the order of the contract.
async fn heard<T>(
    app: &App,
    appservice: &AppServiceRoutes,
    request: Request<Body>,
    whom: &HeaderName,
    parse: fn(&[u8]) -> Result<T, BadRequest>,
) -> Result<(Received, String, T), ApiError> {
    appservice.admit(request.headers())?;
    let identity = identity(request.headers(), whom);
    let (received, parsed) = Received::parse(request, Pot::Proven, parse).await?;
    let identity = identity.ok_or(ApiError::NO_IDENTITY)?;
    let place = app.from_homeserver.clone().try_acquire_owned().map_err(|_| {
        received.connection.crowded(Limit::HomeserverRequests);
        busy("the places for the homeserver's requests are taken")
    })?;
    Ok((received.with(place), identity, parsed))
}

/// A place among the requests of users of other homeservers, and for tokens of theirs. No domain has so many that the next one finds
/// none: user ids cost their homeserver nothing, and a domain had to be registered. A name that is none has no users, and waits for nobody.
fn place_for_others<'a>(app: &'a App, received: &Received, origin: &str) -> Result<Option<Permit<'a>>, ApiError> {
    let Ok(origin) = ServerName::parse(origin) else { return Ok(None) };
    let who = app.exchange.openid.who(&origin);
    let asker = Asker {
        class: who.class,
        group: who.domain,
        domain: who.domain,
        name: who.name,
        client: 0,
    };
    let place = app.for_others.try_acquire(asker).ok_or_else(|| {
        received.connection.crowded(Limit::HomeserverRequests);
        busy("the places for requests of that homeserver's users are taken")
    })?;
    Ok(Some(place))
}

/// For whom the homeserver asks; what is no UTF-8 is nobody's name.
fn identity(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let value = headers.get(name)?;
    Some(String::from_utf8_lossy(value.as_bytes()).trim().to_owned()).filter(|identity| !identity.is_empty())
}

/// Every route of this mode.
pub(super) fn routes(appservice: &Arc<AppServiceRoutes>) -> Router<Arc<App>> {
    let mut router = Router::new();
    for prefix in CLIENT {
        router = router
            .route(&format!("{prefix}/get_token"), post(get_token::post).fallback(method_not_allowed))
            .route(
                &format!("{prefix}/delegate_delayed_leave"),
                post(delegate_delayed_leave::post).fallback(method_not_allowed),
            );
    }
    for prefix in FEDERATION {
        router = router.route(
            &format!("{prefix}/get_token"),
            post(federation_get_token::post).fallback(method_not_allowed),
        );
    }
    router
        .route("/_matrix/app/v1/ping", any(ping::any))
        .route(
            "/_matrix/app/v1/transactions/{txn_id}",
            put(transactions::put).fallback(method_not_allowed),
        )
        .route("/_matrix/app/v1/{*rest}", any(ping::nothing_of_ours))
        .layer(axum::Extension(appservice.clone()))
}
