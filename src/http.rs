//! The route table, the state of the application and its limits.
//!
//! `edge.rs` is around every request: request id, paths, CORS, error bodies. Each URL has a file of its own name.
#![expect(clippy::disallowed_methods, reason = "the way in: when a request came, and its id")]

mod appservice;
mod body;
mod check;
mod delegate_delayed_leave;
mod doctor;
mod edge;
mod get_token;
mod healthz;
mod metrics;
mod path;
mod place;
mod readyz;
mod report;
mod request;
mod sfu_get;
mod sfu_webhook;
mod token_source;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::routing::{any, get, post};
use http::{HeaderMap, Request, header};
use parking_lot::RwLock;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower_http::catch_panic::CatchPanicLayer;

pub use appservice::AppServiceRoutes;
pub use edge::{Edge, in_our_form};
use place::Waiting;
pub use report::ApiError;

use crate::admission::fair_queue::Places;
use crate::admission::limiter::FairLimiter;
use crate::check::Check;
use crate::config::CheckPage;
use crate::doctor::{Astray, Doctor};
use crate::exchange::Exchange;
use crate::log_throttle::LogThrottle;
use crate::secret::{Keys, Secret};
use crate::telemetry;

/// Most webhooks in flight.
const MAX_WEBHOOKS: usize = 256;

/// Headers that proxies add.
const OF_PROXIES: [&str; 3] = ["x-forwarded-for", "forwarded", "via"];

/// Routes that are for operators.
pub struct Operators {
    /// Whether `/metrics` is a route.
    pub serves_metrics: bool,
    /// The part that answers `/doctor`.
    pub doctor: Arc<Doctor>,
    /// Extent of the page for users.
    pub check_page: CheckPage,
    /// The part that tries media for that page.
    pub check: Arc<Check>,
}

/// Whether a request was forwarded, so that strangers may have sent it.
fn came_through_a_proxy(headers: &HeaderMap) -> bool {
    OF_PROXIES.iter().any(|name| headers.contains_key(*name))
}

/// State that the handlers share.
pub struct App {
    exchange: Arc<Exchange>,
    appservice: Option<Arc<AppServiceRoutes>>,
    url: String,
    path_prefix: Option<String>,
    waiting: Waiting,
    from_homeserver: Arc<Semaphore>,
    for_others: FairLimiter,
    webhooks: Semaphore,
    keys: RwLock<Arc<Keys>>,
    serves_metrics: bool,
    doctor: Arc<Doctor>,
    check_page: CheckPage,
    check: Arc<Check>,
    /// Webhooks without a token of an SFU, and with one.
    bad_webhooks: [LogThrottle; 2],
    stopping: AtomicBool,
}

impl App {
    /// `url` is what clients are told, `path_prefix` a prefix that a proxy may have left on the path, and webhooks are
    /// signed with one of `keys`. `appservice` is there in application-service mode. What is for operators, `operators` says.
    #[must_use]
    pub fn new(
        exchange: Arc<Exchange>,
        appservice: Option<AppServiceRoutes>,
        url: String,
        path_prefix: Option<String>,
        keys: Keys,
        in_flight: usize,
        operators: Operators,
    ) -> Self {
        let Operators {
            serves_metrics,
            doctor,
            check_page,
            check,
        } = operators;
        let others = u32::try_from(in_flight * 3 / 8).unwrap_or(u32::MAX);
        Self {
            exchange,
            appservice: appservice.map(Arc::new),
            url,
            path_prefix,
            waiting: Waiting::new(in_flight),
            // They wait for our homeserver: half, so that the others go on when it hangs.
            from_homeserver: Arc::new(Semaphore::new(in_flight / 2)),
            // Three quarters of these, so that what others let us hold leaves places for our own users. One domain may have half of what
            // there is: a big homeserver's users come in hundreds.
            for_others: FairLimiter::new(Places {
                group_part: 1,
                ..Places::shared(others, true, [others; 3])
            }),
            webhooks: Semaphore::new(MAX_WEBHOOKS),
            keys: RwLock::new(Arc::new(keys)),
            serves_metrics,
            doctor,
            check_page,
            check,
            bad_webhooks: [LogThrottle::once_a_minute(), LogThrottle::once_a_minute()],
            stopping: AtomicBool::new(false),
        }
    }

    /// Verifies webhooks with these keys from now on.
    pub fn verify_with(&self, keys: Keys) {
        *self.keys.write() = Arc::new(keys);
    }

    /// The keys that verify webhooks.
    fn keys(&self) -> Arc<Keys> {
        self.keys.read().clone()
    }

    /// Our homeserver, if there is one, proves itself by this token from now on.
    pub fn admit_homeserver_with(&self, hs_token: Secret) {
        if let Some(appservice) = &self.appservice {
            appservice.use_token(hs_token);
        }
    }

    /// Ends the rooms of the page, until `deadline`.
    pub async fn end_checks(&self, deadline: Instant) {
        self.check.stop(deadline).await;
    }

    /// From now on `/readyz` sends traffic elsewhere.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

/// Builds the table of all routes.
pub fn router(app: Arc<App>) -> Router {
    // Our homeserver.
    let router = app.appservice.as_ref().map_or_else(Router::new, appservice::routes);
    let router = router
        // Clients.
        .route("/get_token", post(get_token::post).fallback(method_not_allowed))
        .route("/sfu/get", post(sfu_get::post).fallback(method_not_allowed))
        .route("/token_source", post(token_source::post).fallback(method_not_allowed))
        .route(
            "/delegate_delayed_leave",
            post(delegate_delayed_leave::post).fallback(method_not_allowed),
        )
        // livekit-server.
        .route("/sfu_webhook", post(sfu_webhook::post).fallback(method_not_allowed))
        // Operators.
        .route("/healthz", get(healthz::get).fallback(method_not_allowed))
        .route("/readyz", get(readyz::get).fallback(method_not_allowed))
        .route("/metrics", get(metrics::get).fallback(not_found))
        .route("/doctor", post(doctor::post).fallback(method_not_allowed));
    // Users.
    let router = check::routes(router, app.check_page);
    router
        .fallback(any(not_found))
        .layer(CatchPanicLayer::custom(edge::panicked))
        .with_state(app)
}

/// A route of ours below another prefix, or a webhook at another path, is a proxy or a configuration to correct.
async fn not_found(State(app): State<Arc<App>>, request: Request<Body>) -> ApiError {
    // Apart: anybody can have either said.
    static REQUESTS: LogThrottle = LogThrottle::once_a_minute();
    static WEBHOOKS: LogThrottle = LogThrottle::once_a_minute();
    const CLIENTS: [&str; 4] = ["/get_token", "/sfu/get", "/token_source", "/delegate_delayed_leave"];
    let path = request.uri().path();
    let is_webhook = || {
        let kind = request.headers().get(header::CONTENT_TYPE);
        kind.is_some_and(|kind| kind == "application/webhook+json") || path.ends_with("/sfu_webhook")
    };
    let ours = CLIENTS.into_iter().find(|route| path.ends_with(route));
    let remedy = match ours {
        Some(_) => "let the proxy strip what stands before the route, or set LIVEKIT_JWT_PATH_PREFIX to it",
        None if is_webhook() => {
            app.doctor.arrivals().astray(Astray::Path(path.into()));
            "webhook.urls of livekit-server must end in /sfu_webhook, with nothing or LIVEKIT_JWT_PATH_PREFIX before it"
        }
        None => return ApiError::NOT_FOUND,
    };
    let throttle = if ours.is_some() { &REQUESTS } else { &WEBHOOKS };
    throttle.log(|count| {
        let path = (!telemetry::hides_people()).then(|| path.get(..256).unwrap_or(path));
        match ours {
            Some(route) => tracing::warn!(name: "misdirected_request", path, count, remedy, "a request for {route} came at another path"),
            None => tracing::warn!(name: "misdirected_webhook", path, count, remedy, "a webhook came at another path"),
        }
    });
    ApiError::NOT_FOUND
}

async fn method_not_allowed() -> ApiError {
    ApiError::METHOD_NOT_ALLOWED
}
