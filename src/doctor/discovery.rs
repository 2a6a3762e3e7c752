//! How clients find this service: the well-known file of each homeserver with full access, and the homeserver's transports.

use std::fmt::Display;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::Value;
use url::Url;

use super::check::{Sink, Verdict};
use super::fault::{self, Fault};
use super::ticket::MAX_SERVERS;
use super::{AT_ONCE, MAX_BODY_BYTES, Run, Trouble, Work, answered, json_of, page, routes, side_by_side, texts, words};
use crate::federation::{Failure, Look, Reply};
use crate::homeserver::OwnError;
use crate::server_name::ServerName;

/// Redirects that are followed to see where they lead.
const MAX_REDIRECTS: usize = 5;
/// Entry of the well-known file that names this service.
const FOCI: &str = "org.matrix.msc4143.rtc_foci";
/// Where a browser with Element Call is.
pub(super) const ORIGIN: HeaderValue = HeaderValue::from_static("https://call.element.io");

/// Kind of what clients send.
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

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
        let checks = some.iter().zip(&mut urls).map(|(server, url)| {
            let sink = sink.about(server.as_str());
            Box::pin(async move { *url = check_server(run, server, &sink).await }) as Work<'_>
        });
        side_by_side(checks.collect()).await;
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
    let url = check_file(run, server, sink).await;
    if run.wishes.wants(super::Group::Discovery) {
        check_transports(run, server, url.as_ref(), sink).await;
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
                sink.fault(verdict, "well-known", fault, &words(&failure), None);
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
            let saw = format_args!("it redirects to {next}, and so on: to no file over https");
            sink.fail_before(&["entry"], "well-known", &fault::WELL_KNOWN_REDIRECT, &saw);
            return None;
        }
        url = next;
    };
    if hops > 0 {
        let verdict = if hides { Verdict::Fail } else { Verdict::Warn };
        let cors = if hides { ", and the redirect has no CORS header" } else { "" };
        let saw = format_args!("it redirects to {url}{cors}");
        sink.fault(verdict, "redirect", &fault::WELL_KNOWN_REDIRECT, &saw, None);
    }
    judge_file(&url, &looked.reply, &example(run, server), sink)
}

/// Judges the file that `url` led to. Address of this service that it names.
fn judge_file(url: &Url, reply: &Reply, example: &str, sink: &Sink<'_>) -> Option<Url> {
    let fault = match reply.status {
        StatusCode::OK => {
            if let Value::Object(file) = json_of(&reply.body) {
                check_headers(&reply.headers, sink);
                return check_entry(file.get(FOCI), example, sink);
            }
            let saw = format_args!("{url} is no JSON object: {}", page(&reply.body));
            sink.fault(Verdict::Fail, "well-known", &fault::WELL_KNOWN_NOT_JSON, &saw, Some(example));
            &fault::WELL_KNOWN_NOT_JSON
        }
        status => {
            let fault = match status {
                StatusCode::NOT_FOUND => &fault::WELL_KNOWN_MISSING,
                _ => &fault::WELL_KNOWN_STATUS,
            };
            let saw = format_args!("{url} is answered with {}", answered(reply));
            sink.fault(Verdict::Fail, "well-known", fault, &saw, Some(example));
            fault
        }
    };
    sink.skip(&["entry"], fault.id);
    None
}

/// Values of `Access-Control-Allow-Origin`, those in one line counted apart.
pub(super) fn origins(headers: &HeaderMap) -> Vec<String> {
    let mut origins = Vec::new();
    for value in headers.get_all(header::ACCESS_CONTROL_ALLOW_ORIGIN) {
        let value = String::from_utf8_lossy(value.as_bytes());
        origins.extend(value.split(',').map(|one| one.trim().to_owned()));
    }
    origins
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
            sink.fail("well-known", &fault::WELL_KNOWN_CORS, &saw);
        }
        [one] if is_for_us(one) => {
            if is_json {
                sink.ok("well-known", &"the file is there, JSON, for browsers too");
            } else {
                let saw = format_args!("its content type is {kind:?}");
                sink.warn("well-known", &fault::WELL_KNOWN_TYPE, &saw);
            }
        }
        [one] => {
            let saw = format_args!("Access-Control-Allow-Origin is {one:?} and not *");
            sink.fail("well-known", &fault::WELL_KNOWN_CORS, &saw);
        }
        several => {
            let saw = format_args!("Access-Control-Allow-Origin has the values {}", several.join(" and "));
            sink.fail("well-known", &fault::WELL_KNOWN_CORS_TWICE, &saw);
        }
    }
}

/// Whether a value of `Access-Control-Allow-Origin` lets Element Call read the answer.
pub(super) fn is_for_us(origin: &str) -> bool {
    origin == "*" || origin.as_bytes() == ORIGIN.as_bytes()
}

fn check_entry(foci: Option<&Value>, example: &str, sink: &Sink<'_>) -> Option<Url> {
    let foci = foci.and_then(Value::as_array);
    let is_livekit = |focus: &&Value| focus.get("type").and_then(Value::as_str) == Some("livekit");
    let livekit = foci.and_then(|foci| foci.iter().find(is_livekit));
    let fail = |fault, saw: &dyn Display| sink.fault(Verdict::Fail, "entry", fault, saw, Some(example));
    let Some(text) = livekit.and_then(|focus| focus.get("livekit_service_url")?.as_str()) else {
        match (foci, livekit) {
            (None, _) => fail(&fault::WELL_KNOWN_ENTRY, &format_args!("there is no list {FOCI} in it")),
            (Some(_), None) => fail(&fault::WELL_KNOWN_ENTRY, &format_args!("no entry of {FOCI} has the type livekit")),
            (Some(_), Some(_)) => fail(&fault::WELL_KNOWN_ENTRY, &"its entry has no livekit_service_url"),
        }
        return None;
    };
    let Some(url) = Url::parse(text).ok().filter(|url| url.host().is_some()) else {
        fail(&fault::SERVICE_URL_SCHEME, &format_args!("livekit_service_url is {text:?}"));
        return None;
    };
    let saw = format_args!("livekit_service_url is {text}");
    if url.scheme() != "https" {
        fail(&fault::SERVICE_URL_SCHEME, &saw);
        return None;
    }
    if text.ends_with('/') {
        sink.warn("entry", &fault::SERVICE_URL_SLASH, &saw);
    } else {
        sink.ok("entry", &format_args!("it names {text}"));
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
    let service = match &settings.public {
        Some(public) => public.as_str().trim_end_matches('/').to_owned(),
        None => {
            let livekit = Url::parse(&settings.livekit_url).ok();
            let host = livekit.as_ref().and_then(Url::host_str).unwrap_or("livekit.example.com");
            format!("https://{host}/livekit/jwt")
        }
    };
    let base = match settings.client_apis.get(server) {
        Some(url) if url.scheme() == "https" => url.as_str().trim_end_matches('/').to_owned(),
        Some(_) | None => format!("https://matrix.{server}"),
    };
    let focus = texts(&[("type", "livekit"), ("livekit_service_url", &service)]);
    let mut file = texts(&[]);
    file["m.homeserver"] = texts(&[("base_url", &base)]);
    file[FOCI] = vec![focus].into();
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
    judge_transports(run, &reply, service, sink);
}

/// Judges what a homeserver says about transports.
pub(super) fn judge_transports(run: &Run<'_>, reply: &Reply, service: Option<&Url>, sink: &Sink<'_>) {
    let answer = json_of(&reply.body);
    let errcode = answer.get("errcode").and_then(Value::as_str);
    match (reply.status.as_u16(), errcode) {
        (404, _) | (400, Some("M_UNRECOGNIZED")) => {
            let saw = "the homeserver has no such endpoint: clients look at the well-known file";
            return sink.ok("transports", &saw);
        }
        (401 | 403, Some(_)) => {
            let because = "the homeserver tells them to users only: give --user-token";
            return sink.skip(&["transports"], because);
        }
        (200, _) if answer.is_object() => {}
        _ => {
            let saw = format_args!("it is answered with {}", answered(reply));
            return sink.warn("transports", &fault::TRANSPORTS_UNREADABLE, &saw);
        }
    }
    let ours = run.context.settings.livekit_url.as_str();
    let wanted = format!(
        "matrix_rtc:\n  transports:\n    - type: livekit\n      url: {}\n      livekit_service_url: {}",
        if ours.is_empty() {
            "wss://livekit.example.com/livekit/sfu"
        } else {
            ours
        },
        service.map_or("https://livekit.example.com/livekit/jwt", |url| url.as_str().trim_end_matches('/')),
    );
    let tell = |verdict, fault, saw: &dyn Display| sink.fault(verdict, "transports", fault, saw, Some(&wanted));
    let is_livekit = |one: &&Value| {
        one.get("type")
            .and_then(Value::as_str)
            .is_some_and(|kind| kind.ends_with("livekit"))
    };
    let list = answer.get("rtc_transports").and_then(Value::as_array);
    let Some(livekit) = list.and_then(|list| list.iter().find(is_livekit)) else {
        let saw = format_args!("it answers {}", page(&reply.body));
        return tell(Verdict::Fail, &fault::TRANSPORTS_EMPTY, &saw);
    };
    let text = |name: &str| livekit.get(name).and_then(Value::as_str);
    match (text("url"), text("livekit_service_url")) {
        (Some(url), _) if !ours.is_empty() && !is_same(url, ours) => {
            let saw = format_args!("url is {url}, and LIVEKIT_URL is {ours}");
            tell(Verdict::Fail, &fault::TRANSPORTS_URL, &saw);
        }
        (Some(url), None) => {
            let saw = format_args!("it names {url} and no livekit_service_url, which clients of the standalone routes need");
            tell(Verdict::Warn, &fault::TRANSPORTS_URL, &saw);
        }
        (_, Some(service)) if !service.starts_with("https://") => {
            let saw = format_args!("livekit_service_url is {service}");
            tell(Verdict::Fail, &fault::SERVICE_URL_SCHEME, &saw);
        }
        (None, None) => {
            let saw = "its entry names neither url nor livekit_service_url";
            tell(Verdict::Fail, &fault::TRANSPORTS_URL, &saw);
        }
        (Some(url), Some(service)) => sink.ok("transports", &format_args!("it names {url} and {service}")),
        (None, Some(service)) => sink.ok("transports", &format_args!("it names {service}")),
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
