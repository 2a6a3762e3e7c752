//! `GET /readyz` (decision H8): send requests here? Not until delegated leaves are restored, five seconds at most, and not once the
//! service is stopping. The neighbours are told of, and count with `?strict` only: while they are away requests are held, which serves
//! clients better than an address without a server behind it. Where several replicas share a Redis, the body says how this one sees the
//! others; not to what came through a proxy, since their names are nobody else's business.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode, Uri, header};
use serde::Serialize;

use super::{App, came_through_a_proxy};
use crate::driver::fleet::FleetReport;
use crate::metrics::{METRICS, Neighbour};

#[derive(Serialize)]
struct Readiness {
    ready: bool,
    restored: bool,
    stopping: bool,
    /// By name; `None` while nothing is known.
    neighbours: BTreeMap<&'static str, Option<bool>>,
    #[serde(flatten)]
    fleet: Option<FleetReport>,
}

pub(super) async fn get(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    let leaves = &app.exchange.leaves;
    let stopping = app.stopping.load(Ordering::Relaxed) || leaves.is_leaving();
    // Webhooks are not taken while stopping either.
    let restored = stopping || leaves.takes_webhooks();
    let neighbours: BTreeMap<_, _> = Neighbour::ALL
        .iter()
        .map(|&neighbour| (neighbour.word(), METRICS.neighbour_up(neighbour)))
        .collect();
    let is_strict = uri.query().is_some_and(|query| query.split('&').any(|part| part == "strict"));
    let is_alone = is_strict && neighbours.values().any(|up| *up == Some(false));
    let ready = restored && !stopping && !is_alone;
    let report = Readiness {
        ready,
        restored,
        stopping,
        neighbours,
        fleet: if came_through_a_proxy(&headers) { None } else { leaves.fleet() },
    };
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // Names, numbers and switches always serialise.
    let body = serde_json::to_string(&report).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
