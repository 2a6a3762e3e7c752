//! The public routes, through whatever stands before this service: who answers each of them, and whether browsers may read it.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;
use url::Url;

use super::check::Sink;
use super::discovery::{JSON, ORIGIN, is_for_us, origins};
use super::fault::{self, Fault};
use super::{HEADER, MAX_BODY_BYTES, Run, SLOW_ANSWER, TicketKey, Trouble, Use, Wishes, nonce, page, words};
use crate::clock::unix_seconds;
use crate::federation::{Failure, Look, Looked};

/// Routes that clients need, and one that only apps with LiveKit's SDKs need.
const ROUTES: [&str; 4] = ["get_token", "sfu/get", "delegate_delayed_leave", "token_source"];
const OF_APPS: &str = "token_source";
/// Checks that follow from the first.
const REST: [&str; 2] = ["cors", "slow"];

/// Headers of a preflight.
const PREFLIGHT: [(HeaderName, HeaderValue); 2] = [
    (header::ACCESS_CONTROL_REQUEST_METHOD, HeaderValue::from_static("POST")),
    (header::ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_static("content-type")),
];
const TICKET: HeaderName = HeaderName::from_static(HEADER);
const X_SERVED_BY: HeaderName = HeaderName::from_static("x-served-by");
const OURS: &str = "lk-jwt-service";

/// Program that answered a route.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answerer {
    /// The service, with what it says of itself to whoever has a ticket.
    Ours(Option<String>),
    /// The service, which knows no such path.
    OursElsewhere,
    /// LiveKit, or another program in Go: it has no such path.
    NotFound,
    /// A proxy that does not reach whom it routes to.
    Gateway(u16),
    /// Another program, with this status and page.
    Other(u16, String),
}

impl Answerer {
    /// Fault where it is not this service; `other` where all that is known is that somebody else answers.
    const fn fault_or(&self, other: &'static Fault) -> &'static Fault {
        match self {
            Self::OursElsewhere => &fault::ROUTE_PREFIX,
            Self::Gateway(_) => &fault::ROUTE_GATEWAY,
            Self::Ours(_) | Self::NotFound | Self::Other(..) => other,
        }
    }
}

/// Answers of one route.
struct Answer {
    route: &'static str,
    by: Answerer,
    /// Values of `Access-Control-Allow-Origin` of the answer, and of that to the preflight.
    posted: Vec<String>,
    preflight: Vec<String>,
}

impl Answer {
    const fn is_ours(&self) -> bool {
        matches!(self.by, Answerer::Ours(_))
    }
}

pub(super) async fn check(run: &Run<'_>, base: &Url, sink: &Sink<'_>) {
    let ticket = run.secret.map(|secret| {
        let (key, now) = (TicketKey::derive(secret), unix_seconds());
        (key.sign(Use::Who, &nonce(), &Wishes::default(), now), key)
    });
    let who = ticket.as_ref().map(|(ticket, _)| ticket.as_str());
    let mut answers = Vec::new();
    for route in ROUTES {
        let (by, posted) = match ask(run, base, route, Method::POST, who, run.soon()).await {
            Ok(looked) => (answerer(&looked), origins(&looked.reply.headers)),
            Err(failure) => return cannot_be_asked(run, &failure, sink),
        };
        let preflight = match ask(run, base, route, Method::OPTIONS, None, run.soon()).await {
            Ok(looked) => origins(&looked.reply.headers),
            Err(failure) => return cannot_be_asked(run, &failure, sink),
        };
        answers.push(Answer {
            route,
            by,
            posted,
            preflight,
        });
    }
    let ours: Vec<_> = answers.iter().filter(|answer| answer.is_ours()).collect();
    if ours.is_empty() {
        let Some(Answer { by, .. }) = answers.first() else { return };
        let saw = format_args!("POST /get_token: {}", said(by));
        return sink.fail_before(&REST, "routes", by.fault_or(&fault::ROUTE_OTHER), &saw);
    }
    let mut missing = false;
    for Answer { route, by, .. } in answers.iter().filter(|answer| !answer.is_ours()) {
        let fault = by.fault_or(&fault::ROUTE_MISSING);
        if *route == OF_APPS {
            let saw = format_args!(
                "POST /{route}: {}; apps with LiveKit's SDKs need it, Element Call does not",
                said(by)
            );
            sink.warn("routes", fault, &saw);
        } else if !missing {
            // One cause, told once.
            let others: Vec<_> = answers
                .iter()
                .filter(|answer| answer.route != OF_APPS && !answer.is_ours())
                .map(|answer| format!("/{}", answer.route))
                .collect();
            missing = true;
            let saw = format_args!("POST {}: {}", others.join(", "), said(by));
            sink.fail("routes", fault, &saw);
        }
    }
    let introduced = ours.iter().find_map(|answer| match &answer.by {
        Answerer::Ours(introduced) => introduced.as_deref(),
        Answerer::OursElsewhere | Answerer::NotFound | Answerer::Gateway(_) | Answerer::Other(..) => None,
    });
    match (introduced, who) {
        (None, Some(_)) => {
            let saw = "an lk-jwt-service answers that does not know this one's secret";
            sink.fail("routes", &fault::ROUTE_INSTANCE, &saw);
        }
        (introduced, _) if !missing => {
            let by = introduced.unwrap_or(OURS);
            let saw = format_args!("{} of {} arrive at this service ({by})", ours.len(), ROUTES.len());
            sink.ok("routes", &saw);
        }
        _ => {}
    }
    check_cors(&ours, sink);
    match &ticket {
        Some((_, key)) if run.wishes.slow => check_slow(run, base, key, sink).await,
        Some(_) | None => {}
    }
}

async fn ask(run: &Run<'_>, base: &Url, route: &str, method: Method, ticket: Option<&str>, deadline: Instant) -> Result<Looked, Failure> {
    // As clients put it together, doubled slashes included.
    let text = format!(
        "{}/{route}",
        base.as_str()
            .strip_suffix('/')
            .filter(|_| base.path() == "/")
            .unwrap_or(base.as_str())
    );
    let url = Url::parse(&text).map_err(|error| Failure::Http(error.to_string()))?;
    let (mut headers, body) = match method {
        Method::OPTIONS => (PREFLIGHT.to_vec(), Bytes::new()),
        _ => (vec![(header::CONTENT_TYPE, JSON)], Bytes::from_static(b"{}")),
    };
    headers.push((header::ORIGIN, ORIGIN));
    if let Some(mut ticket) = ticket.and_then(|ticket| HeaderValue::try_from(ticket).ok()) {
        ticket.set_sensitive(true);
        headers.push((TICKET, ticket));
    }
    let look = Look {
        url: &url,
        method,
        headers: &headers,
        body,
        limit: MAX_BODY_BYTES,
        since: run.began,
    };
    run.context.federation.look(&look, run.is_configured(base), deadline).await
}

fn cannot_be_asked(run: &Run<'_>, failure: &Failure, sink: &Sink<'_>) {
    let trouble = Trouble::of(failure);
    let fault = match trouble {
        Trouble::NoName => &fault::ROUTE_NAME,
        Trouble::Certificate => &fault::ROUTE_CERTIFICATE,
        Trouble::Guarded | Trouble::Connection => &fault::ROUTE_UNREACHABLE,
    };
    sink.fault(trouble.verdict(run.context.view), "routes", fault, &words(failure), None);
    sink.skip(&REST, fault.id);
}

fn answerer(looked: &Looked) -> Answerer {
    let (status, body) = (looked.reply.status, &looked.reply.body);
    let served_by = looked
        .reply
        .headers
        .get(X_SERVED_BY)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    match status.as_u16() {
        _ if served_by.starts_with(OURS) && status == StatusCode::NOT_FOUND => Answerer::OursElsewhere,
        _ if served_by.starts_with(OURS) => Answerer::Ours(Some(served_by.to_owned()).filter(|by| by.contains("instance="))),
        404 if body.trim_ascii_end() == b"404 page not found" => Answerer::NotFound,
        code @ 502..=504 => Answerer::Gateway(code),
        code => Answerer::Other(code, page(body)),
    }
}

fn said(answerer: &Answerer) -> String {
    match answerer {
        Answerer::Ours(_) => "this service answers".to_owned(),
        Answerer::OursElsewhere => "this service answers 404: the path that arrives is none of its own".to_owned(),
        Answerer::NotFound => "LiveKit (or Traefik) answers \"404 page not found\"".to_owned(),
        Answerer::Gateway(code) => format!("a proxy answers {code}"),
        Answerer::Other(code, page) => format!("something else answers {code}: {page}"),
    }
}

fn check_cors(answers: &[&Answer], sink: &Sink<'_>) {
    let mut is_well = true;
    for fault in [&fault::ROUTE_CORS_MISSING, &fault::ROUTE_CORS_TWICE] {
        let mut wrong = Vec::new();
        for answer in answers {
            for (method, origins) in [("POST", &answer.posted), ("OPTIONS", &answer.preflight)] {
                if fault_of(origins).is_some_and(|found| found.id == fault.id) {
                    wrong.push(format!("{method} /{}", answer.route));
                }
            }
        }
        if let Some(first) = answers.first().filter(|_| !wrong.is_empty()) {
            is_well = false;
            let values: Vec<_> = first.posted.iter().chain(&first.preflight).collect();
            let saw = format_args!("{}; the values are {values:?}", wrong.join(", "));
            sink.fail("cors", fault, &saw);
        }
    }
    if is_well {
        sink.ok("cors", &"browsers may read the answers");
    }
}

fn fault_of(origins: &[String]) -> Option<&'static Fault> {
    match origins {
        [one] if is_for_us(one) => None,
        [] | [_] => Some(&fault::ROUTE_CORS_MISSING),
        _ => Some(&fault::ROUTE_CORS_TWICE),
    }
}

/// A proxy that ends an answer which takes as long as a homeserver may.
async fn check_slow(run: &Run<'_>, base: &Url, key: &TicketKey, sink: &Sink<'_>) {
    let ticket = key.sign(Use::Slow, &nonce(), &Wishes::default(), unix_seconds());
    let began = Instant::now();
    let deadline = run.ends.min(began + SLOW_ANSWER + Duration::from_secs(5));
    let answer = ask(run, base, ROUTES[0], Method::POST, Some(&ticket), deadline).await;
    let took = began.elapsed().as_secs();
    let saw = match answer.as_ref().map(answerer) {
        Ok(Answerer::Ours(_)) if took + 1 >= SLOW_ANSWER.as_secs() => {
            return sink.ok("slow", &format_args!("an answer that takes {took} s comes through"));
        }
        Ok(Answerer::Ours(_)) => return sink.skip(&["slow"], "another instance answers, at once"),
        Ok(other) => said(&other),
        Err(failure) => words(failure),
    };
    sink.fail("slow", &fault::ROUTE_CUT_OFF, &format_args!("after {took} s: {saw}"));
}
