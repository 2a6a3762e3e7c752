//! How clients find this service: the well-known file of each homeserver with full access, and the homeserver's transports.

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use url::Url;

use super::check::{Sink, Verdict};
use super::fault::{self, Fault};
use super::ticket::MAX_SERVERS;
use super::{AT_ONCE, MAX_BODY_BYTES, Run, Trouble, page, routes, words};
use crate::federation::{Failure, Look};
use crate::homeserver::OwnError;
use crate::server_name::ServerName;

/// Redirects that are followed to see where they lead.
const MAX_REDIRECTS: usize = 5;
/// Entry of the well-known file that names this service.
const FOCI: &str = "org.matrix.msc4143.rtc_foci";
/// Where a browser with Element Call is.
pub(super) const ORIGIN: HeaderValue = HeaderValue::from_static("https://call.element.io");

const FILE: [&str; 2] = ["well-known", "entry"];

/// The well-known files, the transports, and then the routes at the address that they name.
pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>, routes_sink: &Sink<'_>) {
    let mut found = Vec::<Url>::new();
    let servers = run.servers();
    if servers.is_empty() && run.context.settings.public.is_none() {
        let because = "no homeserver is named: give one with --server";
        sink.skip(&FILE, because);
        return routes_sink.skip(&["routes"], because);
    }
    for some in servers.chunks(AT_ONCE).take(MAX_SERVERS / AT_ONCE) {
        let mut urls = [const { None }; AT_ONCE];
        let mut each = some.iter().zip(&mut urls);
        let mut next = || {
            let one = each.next();
            async {
                if let Some((server, url)) = one {
                    *url = Box::pin(check_server(run, server, sink)).await;
                }
            }
        };
        tokio::join!(next(), next(), next(), next());
        for url in urls.into_iter().flatten() {
            if !found.contains(&url) {
                found.push(url);
            }
        }
    }
    if let Some(public) = &run.context.settings.public
        && !found.contains(public)
    {
        found.push(public.clone());
    }
    if !run.wishes.wants(super::Group::Routes) {
        return;
    }
    if found.is_empty() {
        return routes_sink.skip(&["routes"], "no well-known file names a usable address of this service");
    }
    for url in &found {
        routes::check(run, url, &routes_sink.about(url.as_str().trim_end_matches('/'))).await;
    }
}

/// Address of this service that the file of `server` names, where it can be asked.
async fn check_server(run: &Run<'_>, server: &ServerName, sink: &Sink<'_>) -> Option<Url> {
    let sink = sink.about(server.as_str());
    let url = check_file(run, server, &sink).await;
    if run.wishes.wants(super::Group::Discovery) {
        check_transports(run, server, url.as_ref(), &sink).await;
    }
    url.filter(|url| matches!(url.scheme(), "https" | "http"))
}

/// Address of this service for users of `server`, without a word about what is wrong with it.
pub(super) async fn service_url(run: &Run<'_>, server: &ServerName) -> Option<Url> {
    if let Some(public) = &run.context.settings.public {
        return Some(public.clone());
    }
    let (lines, _unread) = tokio::sync::mpsc::channel(1);
    let silent = Sink::new(&lines, super::Group::Discovery, run.context.view).wanted(false);
    check_file(run, server, &silent).await
}

async fn check_file(run: &Run<'_>, server: &ServerName, sink: &Sink<'_>) -> Option<Url> {
    let mut url = Url::parse(&format!("https://{server}/.well-known/matrix/client")).ok()?;
    let (mut hops, mut hides) = (0, false);
    let looked = loop {
        let headers = [(header::ORIGIN, ORIGIN)];
        let look = Look::get(&url, &headers, MAX_BODY_BYTES, run.began);
        let looked = match run.context.federation.look(&look, run.is_configured(&url), run.soon()).await {
            Ok(looked) => looked,
            Err(failure) => {
                let (verdict, fault) = unreachable(run, &failure);
                sink.fault(verdict, "well-known", fault, words(&failure), None);
                sink.skip(&["entry"], fault.id);
                return None;
            }
        };
        let location = looked.reply.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
        let next = location
            .filter(|_| looked.reply.status.is_redirection())
            .and_then(|location| url.join(location).ok());
        let Some(next) = next else { break looked };
        hops += 1;
        hides |= origins(&looked.reply.headers).is_empty();
        if hops > MAX_REDIRECTS || next.scheme() != "https" {
            let saw = format!("it redirects to {next}, and so on: to no file over https");
            sink.fail("well-known", &fault::WELL_KNOWN_REDIRECT, saw);
            sink.skip(&["entry"], fault::WELL_KNOWN_REDIRECT.id);
            return None;
        }
        url = next;
    };
    let (status, headers, body) = (looked.reply.status, &looked.reply.headers, &looked.reply.body);
    if hops > 0 {
        let verdict = if hides { Verdict::Fail } else { Verdict::Warn };
        let cors = if hides { ", and the redirect has no CORS header" } else { "" };
        let saw = format!("it redirects to {url}{cors}");
        sink.fault(verdict, "redirect", &fault::WELL_KNOWN_REDIRECT, saw, None);
    }
    let snippet = Some(example(run, server));
    if status != StatusCode::OK {
        let fault = if status == StatusCode::NOT_FOUND {
            &fault::WELL_KNOWN_MISSING
        } else {
            &fault::WELL_KNOWN_STATUS
        };
        let saw = format!("{url} is answered with {}: {}", status.as_u16(), page(body));
        sink.fault(Verdict::Fail, "well-known", fault, saw, snippet);
        sink.skip(&["entry"], fault.id);
        return None;
    }
    let Ok(Value::Object(file)) = serde_json::from_slice::<Value>(body) else {
        let saw = format!("{url} is no JSON object: {}", page(body));
        sink.fault(Verdict::Fail, "well-known", &fault::WELL_KNOWN_NOT_JSON, saw, snippet);
        sink.skip(&["entry"], fault::WELL_KNOWN_NOT_JSON.id);
        return None;
    };
    check_headers(headers, sink);
    check_entry(file.get(FOCI), snippet, sink)
}

/// Values of `Access-Control-Allow-Origin`, those in one line counted apart.
pub(super) fn origins(headers: &HeaderMap) -> Vec<String> {
    let values = headers.get_all(header::ACCESS_CONTROL_ALLOW_ORIGIN).into_iter();
    values
        .flat_map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .split(',')
                .map(|one| one.trim().to_owned())
                .collect::<Vec<_>>()
        })
        .collect()
}

fn check_headers(headers: &HeaderMap, sink: &Sink<'_>) {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .map(|kind| String::from_utf8_lossy(kind.as_bytes()).into_owned());
    let kind = kind.unwrap_or_default();
    let is_json = kind
        .split(';')
        .next()
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    let origins = origins(headers);
    match &origins[..] {
        [] => {
            let saw = "the file is there, without Access-Control-Allow-Origin";
            sink.fail("well-known", &fault::WELL_KNOWN_CORS, saw);
        }
        [one] if one == "*" || one.as_bytes() == ORIGIN.as_bytes() => {
            if is_json {
                sink.ok("well-known", "the file is there, JSON, for browsers too");
            } else {
                let saw = format!("its content type is {kind:?}");
                sink.warn("well-known", &fault::WELL_KNOWN_TYPE, saw);
            }
        }
        [one] => {
            let saw = format!("Access-Control-Allow-Origin is {one:?} and not *");
            sink.fail("well-known", &fault::WELL_KNOWN_CORS, saw);
        }
        several => {
            let saw = format!("Access-Control-Allow-Origin has the values {}", several.join(" and "));
            sink.fail("well-known", &fault::WELL_KNOWN_CORS_TWICE, saw);
        }
    }
}

fn check_entry(foci: Option<&Value>, snippet: Option<String>, sink: &Sink<'_>) -> Option<Url> {
    let foci = foci.and_then(Value::as_array);
    let livekit = foci.and_then(|foci| {
        foci.iter()
            .find(|focus| focus.get("type").and_then(Value::as_str) == Some("livekit"))
    });
    let text = livekit.and_then(|focus| focus.get("livekit_service_url")?.as_str());
    let Some(text) = text else {
        let saw = match (foci, livekit) {
            (None, _) => format!("there is no list {FOCI} in it"),
            (Some(_), None) => format!("no entry of {FOCI} has the type livekit"),
            (Some(_), Some(_)) => "its entry has no livekit_service_url".to_owned(),
        };
        sink.fault(Verdict::Fail, "entry", &fault::WELL_KNOWN_ENTRY, saw, snippet);
        return None;
    };
    let url = Url::parse(text).ok().filter(|url| url.host().is_some());
    let Some(url) = url else {
        let saw = format!("livekit_service_url is {text:?}");
        sink.fault(Verdict::Fail, "entry", &fault::SERVICE_URL_SCHEME, saw, snippet);
        return None;
    };
    if url.scheme() != "https" {
        let saw = format!("livekit_service_url is {text}");
        sink.fault(Verdict::Fail, "entry", &fault::SERVICE_URL_SCHEME, saw, snippet);
        return None;
    }
    if text.ends_with('/') {
        let saw = format!("livekit_service_url is {text}");
        sink.warn("entry", &fault::SERVICE_URL_SLASH, saw);
    } else {
        sink.ok("entry", format!("it names {text}"));
    }
    Some(url)
}

fn unreachable(run: &Run<'_>, failure: &Failure) -> (Verdict, &'static Fault) {
    let trouble = Trouble::of(failure);
    let fault = match trouble {
        Trouble::NoName => &fault::SERVER_NAME,
        Trouble::Certificate => &fault::WELL_KNOWN_CERTIFICATE,
        Trouble::Guarded | Trouble::Connection => &fault::WELL_KNOWN_UNREACHABLE,
    };
    (trouble.verdict(run.context.view), fault)
}

/// The exact file for this deployment.
fn example(run: &Run<'_>, server: &ServerName) -> String {
    let settings = &run.context.settings;
    let host = Url::parse(&settings.livekit_url)
        .ok()
        .and_then(|url| url.host_str().map(str::to_owned));
    let service = settings.public.as_ref().map_or_else(
        || format!("https://{}/livekit/jwt", host.as_deref().unwrap_or("livekit.example.com")),
        |public| public.as_str().trim_end_matches('/').to_owned(),
    );
    let client = settings.client_apis.get(server).filter(|url| url.scheme() == "https");
    let base = client.map_or_else(
        || format!("https://matrix.{server}"),
        |url| url.as_str().trim_end_matches('/').to_owned(),
    );
    let file = json!({
        "m.homeserver": {"base_url": base},
        FOCI: [{"type": "livekit", "livekit_service_url": service}],
    });
    format!("{file:#}")
}

/// The transports that the homeserver tells clients, as far as they can be seen from here.
async fn check_transports(run: &Run<'_>, server: &ServerName, service: Option<&Url>, sink: &Sink<'_>) {
    let reply = match &run.context.own {
        // With the as_token, which is sent to our own homeserver only.
        Some(own) if own.name() == server => own.transports().await.map_err(|error| match error {
            OwnError::NoApi(failure) | OwnError::Unreachable(failure) => words(&failure),
            other @ (OwnError::Timeout
            | OwnError::NoEndpoint(_)
            | OwnError::Token
            | OwnError::Forbidden(_)
            | OwnError::Relay(_)
            | OwnError::RelayBusy { .. }
            | OwnError::Status(_)
            | OwnError::Busy { .. }
            | OwnError::Unreadable
            | OwnError::NoId) => other.to_string(),
        }),
        Some(_) | None => run.client_api(server, None).await.map_err(|failure| words(&failure)),
    };
    let reply = match reply {
        Ok(reply) => reply,
        Err(why) => return sink.skip(&["transports"], &why),
    };
    judge_transports(run, reply.status, &reply.body, service, sink);
}

/// Judges what a homeserver says about transports.
pub(super) fn judge_transports(run: &Run<'_>, status: StatusCode, body: &[u8], service: Option<&Url>, sink: &Sink<'_>) {
    let answer: Option<Value> = serde_json::from_slice(body).ok();
    let errcode = answer.as_ref().and_then(|answer| answer.get("errcode")?.as_str());
    match (status.as_u16(), errcode) {
        (404, _) | (400, Some("M_UNRECOGNIZED")) => {
            return sink.ok(
                "transports",
                "the homeserver has no such endpoint: clients look at the well-known file",
            );
        }
        (401 | 403, Some(_)) => {
            let because = "the homeserver tells them to users only: give --user-token";
            return sink.skip(&["transports"], because);
        }
        (200, _) if answer.as_ref().is_some_and(Value::is_object) => {}
        (code, _) => {
            let saw = format!("it is answered with {code}: {}", page(body));
            return sink.warn("transports", &fault::TRANSPORTS_UNREADABLE, saw);
        }
    }
    let settings = &run.context.settings;
    let wanted = format!(
        "matrix_rtc:\n  transports:\n    - type: livekit\n      url: {}\n      livekit_service_url: {}",
        if settings.livekit_url.is_empty() {
            "wss://livekit.example.com/livekit/sfu"
        } else {
            &settings.livekit_url
        },
        service.map_or("https://livekit.example.com/livekit/jwt", |url| url.as_str().trim_end_matches('/')),
    );
    let list = answer.as_ref().and_then(|answer| answer.get("rtc_transports")?.as_array());
    let livekit = list.and_then(|list| {
        list.iter().find(|one| {
            one.get("type")
                .and_then(Value::as_str)
                .is_some_and(|kind| kind.ends_with("livekit"))
        })
    });
    let Some(livekit) = livekit else {
        let saw = format!("it answers {}", page(body));
        return sink.fault(Verdict::Fail, "transports", &fault::TRANSPORTS_EMPTY, saw, Some(wanted));
    };
    let text = |name: &str| livekit.get(name).and_then(Value::as_str);
    match (text("url"), text("livekit_service_url")) {
        (Some(url), _) if !settings.livekit_url.is_empty() && !is_same(url, &settings.livekit_url) => {
            let saw = format!("url is {url}, and LIVEKIT_URL is {}", settings.livekit_url);
            sink.fault(Verdict::Fail, "transports", &fault::TRANSPORTS_URL, saw, Some(wanted));
        }
        (Some(url), None) => {
            let saw = format!("it names {url} and no livekit_service_url, which clients of the standalone routes need");
            sink.fault(Verdict::Warn, "transports", &fault::TRANSPORTS_URL, saw, Some(wanted));
        }
        (_, Some(service)) if !service.starts_with("https://") => {
            let saw = format!("livekit_service_url is {service}");
            sink.fault(Verdict::Fail, "transports", &fault::SERVICE_URL_SCHEME, saw, Some(wanted));
        }
        (None, None) => {
            let saw = "its entry names neither url nor livekit_service_url";
            sink.fault(Verdict::Fail, "transports", &fault::TRANSPORTS_URL, saw, Some(wanted));
        }
        (url, service) => {
            let names: Vec<_> = url.into_iter().chain(service).collect();
            sink.ok("transports", format!("it names {}", names.join(" and ")));
        }
    }
}

/// Whether both addresses are one: ws is http, and a slash at the end says nothing.
fn is_same(one: &str, other: &str) -> bool {
    let normal = |text: &str| {
        let text = text
            .trim()
            .trim_end_matches('/')
            .replacen("wss://", "https://", 1)
            .replacen("ws://", "http://", 1);
        Url::parse(&text).map_or(text, String::from)
    };
    normal(one) == normal(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_cors_are_counted_in_whatever_lines() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static(value));
            }
            origins(&headers).len()
        };
        assert_eq!(
            [headers(&[]), headers(&["*"]), headers(&["*", "*"]), headers(&["*, *"])],
            [0, 1, 2, 2]
        );
    }

    #[test]
    fn addresses_are_compared_as_the_service_does() {
        assert!(is_same("wss://a.example/sfu/", "wss://A.example:443/sfu"));
        assert!(is_same("https://a.example", "wss://a.example"));
        assert!(!is_same("wss://a.example", "ws://a.example"));
    }
}
