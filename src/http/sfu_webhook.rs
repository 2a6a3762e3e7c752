//! `POST /sfu_webhook`: what livekit-server tells ([LiveKit, "Webhooks"](https://docs.livekit.io/home/server/webhooks/)).
//!
//! The body is read only after the token in front of it was verified. A 5xx makes livekit-server send the event again, a
//! 4xx loses it for good: so 401 is for what is not the SFU's, and 503 for what cannot be acted upon yet.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use http::{Request, StatusCode, header};

use super::App;
use super::body;
use super::edge::Arrived;
use super::report::{ApiError, busy, report_mistake};
use crate::clock::unix_seconds;
use crate::connections::Pot;
use crate::doctor::Astray;
use crate::log_throttle::LogThrottle;
use crate::metrics::{METRICS, WebhookResult};
use crate::request_line::note;
use crate::sfu::webhook::{Claims, Webhook, WebhookAuthError};

static UNREADABLE: LogThrottle = LogThrottle::once_a_minute();

/// Largest webhook in bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<StatusCode, ApiError> {
    let (mut head, body) = request.into_parts();
    let Arrived { connection, .. } = head.extensions.remove::<Arrived>().ok_or(ApiError::INTERNAL)?;
    let authorization = head
        .headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let claims = Claims::verify(authorization, &app.keys(), unix_seconds()).map_err(|error| refuse(&app, error))?;
    note(|line| line.is_proven = true);
    if !app.exchange.leaves.takes_webhooks() {
        return Err(not_ready());
    }
    let _place = app.webhooks.try_acquire().map_err(|_| busy("the places for webhooks are taken"))?;
    let declared = body::declared(&head.headers);
    drop(head);
    let body = body::read(&connection, Pot::Proven, declared, body, MAX_BODY_BYTES).await?;
    let verified = claims.body_matches(&body).map_err(|error| refuse(&app, error))?;
    // The end may have begun while the body was on its way.
    if !app.exchange.leaves.takes_webhooks() {
        return Err(not_ready());
    }
    match Webhook::parse(&body) {
        Ok(webhook) => {
            METRICS.webhook(WebhookResult::Accepted, unix_seconds());
            if let Some(room) = &webhook.room {
                app.doctor.arrivals().told_of(&room.name);
            }
            app.exchange.sfu.handle_webhook(&webhook);
            if let Some(kick) = &app.exchange.kick {
                kick.handle_webhook(&webhook);
            }
            let was_acted_upon = app.exchange.leaves.webhook(verified, &webhook);
            if !app.exchange.leaves.tell(verified, &webhook, was_acted_upon).await {
                return Err(not_ready());
            }
        }
        // The SFU's own, whatever it means: sending it again would not help.
        Err(error) => {
            METRICS.webhook(WebhookResult::Unreadable, unix_seconds());
            UNREADABLE.log(|count| {
                tracing::warn!(name: "webhook_unreadable",
                    reason = error.to_string(),
                    count,
                    "a webhook of the SFU cannot be read and is ignored"
                );
            });
        }
    }
    Ok(StatusCode::OK)
}

fn not_ready() -> ApiError {
    METRICS.webhook(WebhookResult::NotReady, unix_seconds());
    ApiError::NOT_READY
}

fn refuse(app: &App, error: WebhookAuthError) -> ApiError {
    METRICS.webhook(WebhookResult::Rejected, unix_seconds());
    app.doctor.arrivals().astray(Astray::Refused(error));
    report_mistake(&error);
    app.bad_webhooks[usize::from(error.is_of_an_sfu())].log(|count| {
        let (reason, remedy) = (error.to_string(), error.remedy());
        tracing::warn!(name: "webhooks_refused", reason, count, remedy, "webhooks are refused");
    });
    ApiError::BAD_WEBHOOK
}
