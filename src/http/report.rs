//! The error table: what a client is answered (status, errcode, text, reason), and what the operator reads (level, message, remedy).
//!
//! Every text is a constant: nothing that a neighbour said, and nothing that a client sent, comes back in an answer. The causes
//! are in the log, under the `request_id` that the answer carries: a client's fault at info, a neighbour's at warn, ours at error
//! (decision P12).

use std::fmt::Display;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use tracing::Level;

use crate::delayed_leave::CapacityError;
use crate::driver::DelegationError;
use crate::exchange::{RemoteTokenError, TokenError};
use crate::federation::Failure;
use crate::homeserver::OwnError;
use crate::openid::{Answer, OpenIdError};
use crate::outcome::Outcome;
use crate::request_line::{ErrorReport, note};
use crate::sfu::SfuError;
use crate::wire::BadRequest;

/// The longest wait that is handed on, in seconds.
const MAX_WAIT_SECONDS: u32 = 24 * 60 * 60;

/// Answer to a request that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// Matrix error code.
    pub errcode: &'static str,
    /// Text for humans; Element Call shows it under "Technical details".
    pub text: &'static str,
    /// Reason for the operator, as one word (decision H4).
    pub outcome: Outcome,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
}

/// The body of every error.
#[derive(Serialize)]
pub(super) struct ErrorBody<'a> {
    pub(super) errcode: &'static str,
    pub(super) error: &'static str,
    pub(super) reason: &'static str,
    pub(super) request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) retry_after_ms: Option<u32>,
}

impl ApiError {
    /// The path leads nowhere.
    pub const NOT_FOUND: Self = Self::new(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", Outcome::NotFound, "Unrecognized request");
    /// The path exists, with other methods.
    pub const METHOD_NOT_ALLOWED: Self = Self::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "M_UNRECOGNIZED",
        Outcome::MethodNotAllowed,
        "Method not allowed",
    );
    /// The body is larger than any honest one.
    pub const TOO_LARGE: Self = Self::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "M_TOO_LARGE",
        Outcome::TooLarge,
        "The request body is too large",
    );
    /// The body of the request did not arrive in time.
    pub const BODY_TIMEOUT: Self = Self::new(
        StatusCode::REQUEST_TIMEOUT,
        "M_UNKNOWN",
        Outcome::BodyTimeout,
        "The request body did not arrive in time",
    );
    /// The body of the request broke off.
    pub const BODY_BROKEN: Self = Self::new(StatusCode::BAD_REQUEST, "M_NOT_JSON", Outcome::BadRequest, "Error reading request");
    /// Too much is going on.
    const BUSY: Self = Self {
        retry_after: Some(2),
        ..Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "M_UNKNOWN",
            Outcome::Busy,
            "The service is busy, try again in a moment",
        )
    };
    /// Not yet, or not any more.
    pub const NOT_READY: Self = Self {
        retry_after: Some(2),
        ..Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "M_UNKNOWN",
            Outcome::NotReady,
            "Service is shutting down",
        )
    };
    /// A token source without its OpenID token.
    const NO_OPENID_TOKEN: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        "M_MISSING_TOKEN",
        Outcome::TokenMissing,
        "Send the `access_token` of a Matrix OpenID token as one header `Authorization: Bearer ...`; \
         in livekit-client, `headers` must be a plain object",
    );
    /// The caller of an endpoint of the homeserver's gives no token.
    pub const NO_HS_TOKEN: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        "M_MISSING_TOKEN",
        Outcome::HsTokenRejected,
        "Missing access token",
    );
    /// The caller of an endpoint of the homeserver's gives another token than the homeserver has.
    pub const BAD_HS_TOKEN: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        "M_UNKNOWN_TOKEN",
        Outcome::HsTokenRejected,
        "Unrecognised access token",
    );
    /// The homeserver does not say for whom it asks.
    pub const NO_IDENTITY: Self = Self::unauthorised(Outcome::IdentityMissing);
    /// There are no users, rooms or protocols of ours.
    pub const NOTHING_OF_OURS: Self = Self::new(
        StatusCode::NOT_FOUND,
        "M_NOT_FOUND",
        Outcome::NotFound,
        "There is no such thing here",
    );
    /// The caller of `/doctor` does not prove to know the secret that signs, nor that of `/check` to have a ticket of who does.
    pub const NOT_THE_OPERATOR: Self = Self::unauthorised(Outcome::NotAllowed);
    /// The ticket of a link was used as often as it may be, or has nothing to report.
    pub(super) const LINK_USED_UP: Self = Self::forbidden("The link was used as often as it may be");
    /// The client takes no answer that is compressed by brotli.
    pub(super) const ONLY_BROTLI: Self = Self::new(
        StatusCode::NOT_ACCEPTABLE,
        "M_UNRECOGNIZED",
        Outcome::BadRequest,
        "This file is sent compressed by brotli, which browsers take on pages that came by https",
    );
    /// The call of the webhook is not the SFU's.
    pub const BAD_WEBHOOK: Self = Self::unauthorised(Outcome::WebhookRejected);
    /// The client-server API of a homeserver cannot be found.
    const NO_CLIENT_API: Self = Self::bad_json("Unable to resolve client-server API").called(Outcome::ClientApiNotFound);
    /// Our homeserver does not answer in time.
    const SILENT_HOMESERVER: Self = Self::of_neighbour(StatusCode::BAD_GATEWAY, "The homeserver does not answer", true);
    /// The user is none of the homeserver's that asks.
    const FOREIGN_USER_ID: Self = Self::bad_param("The user id is not one of that homeserver");
    /// A defect of this service.
    pub const INTERNAL: Self = Self::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "M_UNKNOWN",
        Outcome::InternalError,
        "Internal Server Error",
    );

    /// The head of a request is not one; the HTTP library has chosen the status.
    pub(super) const fn unreadable(status: StatusCode) -> Self {
        if status.as_u16() == StatusCode::BAD_REQUEST.as_u16() {
            Self::new(
                status,
                "M_UNKNOWN",
                Outcome::BadRequest,
                "The request is not HTTP/1.1 as it should be",
            )
        } else {
            Self::new(status, "M_TOO_LARGE", Outcome::TooLarge, "The head of the request is too large")
        }
    }

    const fn new(status: StatusCode, errcode: &'static str, outcome: Outcome, text: &'static str) -> Self {
        Self {
            status,
            errcode,
            text,
            outcome,
            retry_after: None,
        }
    }

    const fn bad_json(text: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "M_BAD_JSON", Outcome::BadRequest, text)
    }

    const fn missing_param(text: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "M_MISSING_PARAM", Outcome::BadRequest, text)
    }

    const fn bad_param(text: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "M_INVALID_PARAM", Outcome::BadRequest, text)
    }

    const fn forbidden(text: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "M_FORBIDDEN", Outcome::NotAllowed, text)
    }

    /// A neighbour of ours did not do its part.
    const fn of_neighbour(status: StatusCode, text: &'static str, may_pass: bool) -> Self {
        let outcome = if may_pass {
            Outcome::HomeserverUnreachable
        } else {
            Outcome::HomeserverError
        };
        Self::new(status, "M_UNKNOWN", outcome, text)
    }

    /// Another run of `/doctor` is not over, or there were enough of them in the last minute.
    pub(super) const fn examined_already(seconds: u32) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::limit_reached("One run at a time, six a minute")
        }
    }

    /// Another use of the same link is just beginning, or there were enough of all links in the last minute.
    pub(super) const fn checked_already(seconds: u32) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::limit_reached("One at a time, twenty a minute for all links")
        }
    }

    const fn limit_reached(text: &'static str) -> Self {
        Self {
            retry_after: Some(60),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "M_LIMIT_EXCEEDED", Outcome::LimitReached, text)
        }
    }

    /// Answer of whoever is asked too often and says how long to wait: that is handed on (decision A9).
    fn limited(wait: Duration, outcome: Outcome, text: &'static str) -> Self {
        let seconds = wait.as_millis().div_ceil(1000).max(1);
        Self {
            retry_after: Some(u32::try_from(seconds).unwrap_or(u32::MAX).min(MAX_WAIT_SECONDS)),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "M_LIMIT_EXCEEDED", outcome, text)
        }
    }

    const fn unauthorised(outcome: Outcome) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "M_UNAUTHORIZED",
            outcome,
            "The request could not be authorised.",
        )
    }

    const fn no_room(outcome: Outcome) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "M_UNKNOWN",
            outcome,
            "Unable to create room on SFU",
        )
    }

    /// Gives the error another outcome.
    const fn called(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }
}

impl From<BadRequest> for ApiError {
    fn from(bad: BadRequest) -> Self {
        match bad {
            BadRequest::NotJson => Self::BODY_BROKEN,
            BadRequest::WrongType => Self::bad_json("A field of the request body has the wrong type"),
            BadRequest::RoomOrSlot => Self::bad_json("The request body is missing `room_id` or `slot_id`"),
            BadRequest::LegacyRoom => Self::bad_json("Missing room parameter"),
            BadRequest::Member => Self::bad_json("The request body `member` is missing a `id`, `claimed_user_id` or `claimed_device_id`"),
            BadRequest::OpenIdToken => {
                Self::bad_json("The request body `openid_token` is missing a `access_token` or `matrix_server_name`")
            }
            BadRequest::LegacyOpenIdToken => Self::bad_json("Missing OpenID token parameters"),
            BadRequest::DelegationMember => {
                Self::bad_json("The request body `member` is missing `id`, `claimed_user_id` or `claimed_device_id`")
            }
            BadRequest::DelegationOpenIdToken => {
                Self::bad_json("The request body `openid_token` is missing `access_token` or `matrix_server_name`")
            }
            BadRequest::DelayTimeout => Self::bad_json("The request body `delay_timeout` must be between 1 and 86400000 milliseconds"),
            BadRequest::DelayId => Self::bad_json("The request body `delay_id` is not the id of a delayed event"),
            BadRequest::DeviceId => Self::bad_json("The request body `device_id` must not begin with a port"),
            BadRequest::TooLong => Self::bad_json("The request body has a field that is too long"),
            BadRequest::Url => Self::bad_json("The request body is missing `url`"),
            BadRequest::MemberId => Self::bad_json("The request body is missing `member_id`"),
            BadRequest::UserId => Self::bad_json("The request body is missing `user_id`"),
            BadRequest::NoDelayId => Self::bad_json("The request body is missing `delay_id`"),
            BadRequest::HalfDelay => Self::bad_json("The request body is missing `delay_id` or `delay_timeout`"),
            BadRequest::NoBearer => Self::NO_OPENID_TOKEN,
            BadRequest::NoServerNameParameter => Self::missing_param("The query is missing `matrix_server_name`, of the OpenID token"),
            BadRequest::NoDeviceIdParameter => Self::missing_param("The query is missing `device_id`, of the device that takes part"),
            BadRequest::SlotWithoutMember => Self::bad_param("The query has a `slot_id` and no `member_id`"),
            BadRequest::LongParameter => Self::bad_param("The query has a parameter that is too long, or the token is"),
            BadRequest::DeviceIdParameter => Self::bad_param("The query's `device_id` must not begin with a port"),
            BadRequest::RoomName => Self::bad_json("The request body `room_name` must be the id of a Matrix room, which begins with `!`"),
            BadRequest::NotTheClients => Self::forbidden(
                "`participant_identity`, `participant_name`, `participant_metadata`, `participant_attributes` and `room_config` \
                 must be left out or empty: who takes part is the user of the OpenID token",
            ),
        }
    }
}

/// Kinds of routes: what clients understand differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// `/get_token`, `/sfu/get` and `/token_source`: on 400 `M_BAD_JSON` Element Call asks again without the delayed event.
    Token,
    /// `/delegate_delayed_leave`, and the homeserver's endpoints.
    Delegation,
}

/// A row of the error table.
struct Row {
    answer: ApiError,
    level: Level,
    message: &'static str,
    remedy: Option<&'static str>,
}

impl Row {
    fn remedy(self, remedy: &'static str) -> Self {
        Self {
            remedy: Some(remedy),
            ..self
        }
    }
}

impl ApiError {
    /// Puts a row together: the answer, and what the operator reads about it.
    const fn told(self, level: Level, message: &'static str) -> Row {
        Row {
            answer: self,
            level,
            message,
            remedy: None,
        }
    }

    /// A client's fault that needs no more words.
    const fn refused(self) -> Row {
        self.told(Level::INFO, "refused")
    }
}

/// Tells the operator about `error`, in the line of the request at hand, and says what the client is answered.
pub(super) fn report(error: &TokenError, route: Route) -> ApiError {
    let row = row(error, route);
    tell(row.level, row.message, error, row.remedy);
    row.answer
}

/// Tells the operator that a room could not be opened for the page, and says what the page is answered.
pub(super) fn report_sfu(error: SfuError) -> ApiError {
    report(&TokenError::Sfu(error), Route::Token)
}

/// Tells the operator, in the line of the request at hand, what there is too much of, and says what the client is answered.
pub(super) fn busy(cause: &'static str) -> ApiError {
    tell(Level::INFO, "refused", &cause, None);
    ApiError::BUSY
}

/// Tells the operator, in the line of the request at hand, what is wrong with the request itself.
pub(super) fn report_mistake(mistake: &dyn Display) {
    tell(Level::INFO, "refused", mistake, None);
}

fn tell(level: Level, message: &'static str, detail: &dyn Display, remedy: Option<&'static str>) {
    let detail = Some(detail.to_string().into());
    note(|line| {
        line.refuse(ErrorReport {
            level,
            message,
            detail,
            remedy,
        });
    });
}

/// Row of `error`. On the token routes the call matters more than its leave: after 400 the client asks again without it.
fn row(error: &TokenError, route: Route) -> Row {
    match error {
        TokenError::BadServerName => ApiError::unauthorised(Outcome::InvalidServerName).refused(),
        TokenError::BlockedHomeserver => ApiError::forbidden("This service is not for users of that homeserver")
            .called(Outcome::BlockedHomeserver)
            .refused(),
        TokenError::OpenId(error) => openid_row(error),
        TokenError::UserMismatch => {
            ApiError::unauthorised(Outcome::UserMismatch).told(Level::INFO, "refused: the user could not be verified")
        }
        TokenError::RateExceeded(exceeded) => ApiError::limited(exceeded.wait, Outcome::RateLimited, "Too many requests, try again later")
            .told(Level::INFO, "refused: too many requests")
            .remedy("a client that asks so often is out of order; where many people share one user, raise the limit or set it to off"),
        TokenError::DelegationDenied => {
            let text = "Delegation of delayed events is only supported for full access users";
            match route {
                Route::Token => ApiError::bad_json(text).called(Outcome::NotAllowed).refused(),
                Route::Delegation => ApiError::forbidden(text).refused(),
            }
        }
        TokenError::Delegation(error) => delegation_row(error, route),
        TokenError::Sfu(error) => {
            // A page of something in between is nothing that the SFU said.
            let is_away = error.may_pass() || matches!(error, SfuError::NotLiveKit(_));
            ApiError::no_room(if is_away { Outcome::SfuUnreachable } else { Outcome::SfuRejected })
                .told(Level::WARN, "refused: the room could not be opened on the SFU")
                .remedy(error.remedy())
        }
        TokenError::Mint(_) => ApiError::INTERNAL.told(Level::ERROR, "refused: the token could not be signed"),
        TokenError::NotJoined => ApiError::forbidden("Not joined to the Matrix room")
            .called(Outcome::NotJoined)
            .refused(),
        TokenError::OwnClientApi(failure) => {
            let is_late = matches!(failure, Failure::Timeout);
            let answer = if is_late {
                ApiError::SILENT_HOMESERVER
            } else {
                ApiError::NO_CLIENT_API
            };
            answer
                .told(Level::WARN, "refused: our homeserver's client-server API cannot be found")
                .remedy(failure.remedy())
        }
        TokenError::OutOfTime => ApiError::SILENT_HOMESERVER
            .told(Level::WARN, "refused: no answer in time")
            .remedy("look for the homeserver or the SFU that is slow in the lines before"),
        TokenError::Membership(error) => own_row(error, StatusCode::BAD_GATEWAY, "The homeserver does not say who is in the room"),
        TokenError::Event(error) => own_row(
            error,
            StatusCode::SERVICE_UNAVAILABLE,
            "The homeserver does not say whose delayed event that is",
        ),
        TokenError::Relay(error) => own_row(error, StatusCode::BAD_GATEWAY, "The other homeserver cannot be reached"),
        TokenError::TooManyTokens => {
            ApiError::limit_reached("Too many tokens are in use").told(Level::WARN, "refused: a token that could not be watched")
        }
        // Of a client's own making, or a sign that the homeserver's list of transports names another address than ours.
        TokenError::OtherSfu => ApiError::bad_param("The request body `url` is not the SFU of this service")
            .called(Outcome::OtherSfu)
            .told(Level::INFO, "refused: a token for another SFU")
            .remedy("the homeserver's matrix_rtc.transports must give clients the same address as LIVEKIT_URL"),
        TokenError::BadUserId => ApiError::FOREIGN_USER_ID.refused(),
        TokenError::NotOurUser(_) => ApiError::FOREIGN_USER_ID
            .told(Level::WARN, "refused: the homeserver is not the one that is configured")
            .remedy("LIVEKIT_HS_SERVER_NAME must be the server_name of the homeserver that has our registration"),
        TokenError::ForeignUser => ApiError::forbidden("The user is not one of the homeserver that asks").refused(),
        TokenError::ClaimedUser => ApiError::bad_param("The request body `member` claims another user").refused(),
        TokenError::BadDestination => ApiError::bad_param("The request body `server_name` is not a server name").refused(),
        TokenError::NoSuchEvent => ApiError::bad_param("The user has no such delayed event in that room").refused(),
        TokenError::Remote(error) => remote_row(*error),
    }
}

/// Row of a refusal of another homeserver's service.
fn remote_row(error: RemoteTokenError) -> Row {
    match error {
        RemoteTokenError::Forbidden => ApiError::forbidden("The other homeserver's service refuses the request").refused(),
        RemoteTokenError::InvalidParam => ApiError::bad_param("The other homeserver's service does not take these parameters").refused(),
        RemoteTokenError::Unusable(_) => {
            ApiError::of_neighbour(StatusCode::BAD_GATEWAY, "The other homeserver's service gives no token", false)
                .told(Level::INFO, "refused: no token from the other homeserver's service")
                .remedy("the other homeserver's service is out of order, or too old or too new for ours")
        }
    }
}

/// Row of a delegation that is not taken.
fn delegation_row(error: &DelegationError, route: Route) -> Row {
    let not_ready = match route {
        Route::Token => ApiError::bad_json("Delegation of delayed events is not available at the moment").called(Outcome::NotReady),
        Route::Delegation => ApiError::NOT_READY,
    };
    match error {
        DelegationError::TooLong => ApiError::from(BadRequest::TooLong).refused(),
        DelegationError::NotReady => not_ready.refused(),
        DelegationError::Limit(CapacityError::Stopping) => not_ready.told(Level::WARN, "refused: delegation"),
        DelegationError::Limit(_) => {
            let text = "Too many delayed events are delegated already";
            let answer = match route {
                Route::Token => ApiError::bad_json(text).called(Outcome::LimitReached),
                Route::Delegation => ApiError::limit_reached(text),
            };
            answer.told(Level::WARN, "refused: delegation")
        }
        DelegationError::ClientApi(failure) => ApiError::NO_CLIENT_API
            .told(Level::WARN, "refused: the homeserver's client-server API cannot be found")
            .remedy(failure.remedy()),
    }
}

/// Row of a user who could not be verified.
fn openid_row(error: &OpenIdError) -> Row {
    let answer = ApiError::unauthorised(error.outcome());
    match error {
        OpenIdError::Busy => ApiError::BUSY
            .told(Level::WARN, "refused: overloaded")
            .remedy(Failure::Busy.remedy()),
        OpenIdError::Rejected | OpenIdError::ForeignUser => answer.told(Level::INFO, "refused: the user could not be verified"),
        // Names come from strangers, and most of those that lead nowhere are probes: no warnings for these. The first
        // refusal of an address is told by `federation.rs`.
        OpenIdError::Unreachable { failure, known } => {
            let is_trouble = *known && !matches!(failure, Failure::AddressDenied { .. });
            answer
                .told(
                    if is_trouble { Level::WARN } else { Level::INFO },
                    "refused: the homeserver could not be reached",
                )
                .remedy(failure.remedy())
        }
        OpenIdError::Unusable { known, answer: said } => answer
            .told(
                if *known { Level::WARN } else { Level::INFO },
                "refused: the homeserver's answer is unusable",
            )
            .remedy(unusable(*said)),
    }
}

/// Row of something that our homeserver did not do for us. A pause that it asks for is handed on (decision A9).
fn own_row(error: &OwnError, status: StatusCode, text: &'static str) -> Row {
    let answer = match error.limited_for() {
        Some(wait) => ApiError::limited(wait, Outcome::HomeserverLimited, "The homeserver is asked too often"),
        None => ApiError::of_neighbour(status, text, error.may_pass()),
    };
    let row = if matches!(error, OwnError::Relay(_) | OwnError::RelayBusy { .. }) {
        answer.told(Level::INFO, "refused: the other homeserver's service gives no answer")
    } else {
        answer.told(Level::WARN, "refused: our homeserver did not do its part")
    };
    row.remedy(error.remedy())
}

/// Remedy for an answer to userinfo that is neither yes nor no.
const fn unusable(answer: Answer) -> &'static str {
    let (Answer::Status(status) | Answer::NoJson(status)) = answer else {
        return "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)";
    };
    match status {
        301 | 302 | 303 | 307 | 308 => {
            "it redirects, which is not followed: name the host that it redirects to in its .well-known/matrix/server (or in \
             LIVEKIT_FEDERATION_URL_OVERRIDES), or serve /_matrix/federation where it is asked"
        }
        403 => {
            "federation is refused: by a firewall, an allow-list, or a homeserver with federation switched off; let this service's address \
             through, and see that a listener has the `openid` resource, which needs no federation"
        }
        429 => "the homeserver, or what stands before it, limits how often it is asked: raise the limit for this service's address",
        502..=504 => {
            "the proxy before the homeserver answers and the homeserver behind it does not: see that it runs, and where the proxy sends \
             /_matrix/federation"
        }
        _ => "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)",
    }
}

/// The edge writes the body, since it knows the request's id.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::rates::{RateExceeded, RateLimit};
    use crate::federation::AddressDenied;
    use crate::openid::Answer;

    #[test]
    fn what_the_guard_refused_looks_like_an_unreachable_homeserver() {
        let refused = Failure::AddressDenied {
            host: "x".into(),
            address: [127, 0, 0, 1].into(),
            why: AddressDenied::Private,
        };
        let refused = TokenError::from(OpenIdError::Unreachable {
            failure: refused,
            known: true,
        });
        let away = TokenError::from(OpenIdError::Unreachable {
            failure: Failure::Timeout,
            known: false,
        });
        assert_eq!(row(&refused, Route::Token).answer, row(&away, Route::Token).answer);
    }

    #[test]
    fn every_refusal_has_its_row() {
        for (refusal, status, errcode, reason) in [
            (TokenError::DelegationDenied, 400, "M_BAD_JSON", Outcome::NotAllowed),
            (
                DelegationError::ClientApi(Failure::Timeout).into(),
                400,
                "M_BAD_JSON",
                Outcome::ClientApiNotFound,
            ),
            (TokenError::BadServerName, 401, "M_UNAUTHORIZED", Outcome::InvalidServerName),
            (TokenError::BlockedHomeserver, 403, "M_FORBIDDEN", Outcome::BlockedHomeserver),
            (
                RateExceeded {
                    limit: RateLimit::User,
                    wait: Duration::from_millis(10_500),
                }
                .into(),
                429,
                "M_LIMIT_EXCEEDED",
                Outcome::RateLimited,
            ),
            (OpenIdError::Rejected.into(), 401, "M_UNAUTHORIZED", Outcome::TokenRejected),
            (
                OpenIdError::Unusable {
                    answer: Answer::NoSub,
                    known: true,
                }
                .into(),
                401,
                "M_UNAUTHORIZED",
                Outcome::HomeserverError,
            ),
            (OpenIdError::ForeignUser.into(), 401, "M_UNAUTHORIZED", Outcome::UserMismatch),
            (TokenError::UserMismatch, 401, "M_UNAUTHORIZED", Outcome::UserMismatch),
            (OpenIdError::Busy.into(), 503, "M_UNKNOWN", Outcome::Busy),
            (SfuError::Timeout.into(), 500, "M_UNKNOWN", Outcome::SfuUnreachable),
            (SfuError::NotLiveKit(401).into(), 500, "M_UNKNOWN", Outcome::SfuUnreachable),
            (SfuError::WrongSecret.into(), 500, "M_UNKNOWN", Outcome::SfuRejected),
        ] {
            let error = row(&refusal, Route::Token).answer;
            assert_eq!(
                (error.status.as_u16(), error.errcode, error.outcome),
                (status, errcode, reason),
                "{refusal}"
            );
        }
    }
}
