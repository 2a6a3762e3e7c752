//! Around every request: its id, its path as a proxy may have left it, CORS on every answer, the bodies of errors; and the
//! same for what the HTTP library answers by itself.

use std::any::Any;
use std::convert::Infallible;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use tower::ServiceExt as _;
use tracing::Level;

use super::App;
use super::path::normalise;
use super::report::{ApiError, ErrorBody};
use crate::connections::Connection;
use crate::federation::{Guard, Trust};
use crate::outcome::Outcome;
use crate::request_line::{ErrorReport, RequestLine, note};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_SERVED_BY: HeaderName = HeaderName::from_static("x-served-by");
const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");

/// Headers that browsers may send whether they ask or not.
const ALLOWED_HEADERS: &str = "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token, Authorization";
/// Names of other headers that a browser may ask for in one preflight, in bytes.
const MAX_ASKED_HEADERS_BYTES: usize = 1024;

/// Decisions H2 and H4: on every answer, whatever its status.
const ON_EVERY_ANSWER: [(HeaderName, HeaderValue); 6] = [
    (header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")),
    (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS")),
    (header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(ALLOWED_HEADERS)),
    (
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("Retry-After, X-Request-Id, X-Served-By, Date"),
    ),
    (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400")),
    (X_SERVED_BY, HeaderValue::from_static("lk-jwt-service")),
];

/// The id of one request, in its answer and in the log.
struct RequestId(HeaderValue);

/// Facts about a request that a handler has to know besides the request.
#[derive(Clone)]
pub(super) struct Arrived {
    pub(super) connection: Arc<Connection>,
    /// Sender of the request, as far as that can be told.
    pub(super) client: IpAddr,
    /// Address that was asked for, where the request has another spelling of it now.
    pub(super) asked: Option<Uri>,
}

impl Arrived {
    /// Whether the sender is on this machine, and no proxy is between.
    pub(super) fn is_loopback(&self) -> bool {
        self.connection.peer().to_canonical().is_loopback() && self.client.to_canonical().is_loopback()
    }
}

/// The routes with everything around them.
#[derive(Clone)]
pub struct Edge {
    app: Arc<App>,
    router: Router,
}

impl Edge {
    /// Serves all routes of `app`.
    #[must_use]
    pub fn new(app: Arc<App>) -> Self {
        Self {
            router: super::router(app.clone()),
            app,
        }
    }

    /// Answers one request; there is always an answer.
    ///
    /// # Errors
    /// Never.
    pub async fn serve(self, mut request: Request<Body>, connection: Arc<Connection>) -> Result<Response, Infallible> {
        let Self { app, router } = self;
        let id = RequestId::of(&request);
        let path = normalise(request.uri().path(), app.path_prefix.as_deref());
        let asked = path.and_then(|path| rewrite(request.uri_mut(), path));
        let client = client_address(connection.peer(), request.headers());
        let line = RequestLine::begin(id.0.clone(), request.method().clone(), request.uri().path(), Some(client));
        let answering = pin!(async {
            if request.method() == Method::OPTIONS {
                return finish(preflight(request.headers()), &id);
            }
            let introduction = app.introduction(request.headers()).await;
            request.extensions_mut().insert(Arrived { connection, client, asked });
            let mut response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
            if let Some(introduction) = introduction {
                response.headers_mut().insert(X_SERVED_BY, introduction);
            }
            finish(response, &id)
        });
        Ok(line.around(answering).await)
    }
}

/// Finds the sender of a request: the other end of the connection or, where that is a proxy of ours (its address is private), the last
/// public address that the proxies noted. It only orders those who wait for one homeserver, and stands in the log: whoever can
/// forge it wins nothing but another place in that order.
fn client_address(peer: IpAddr, headers: &HeaderMap) -> IpAddr {
    let is_public = |address: &IpAddr| Guard::default().check(*address, Trust::Stranger).is_ok();
    if is_public(&peer) {
        return peer;
    }
    let noted = headers.get_all(X_FORWARDED_FOR).into_iter().rev();
    let addresses = noted.filter_map(|value| value.to_str().ok()).flat_map(|value| value.rsplit(','));
    // Some proxies write the client's port, too.
    let read = |text: &str| {
        text.parse()
            .ok()
            .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
    };
    let public = addresses.filter_map(|address| read(address.trim())).find(is_public);
    public.unwrap_or(peer)
}

/// Allows what a browser asks for before the request that it is about.
fn preflight(asked: &HeaderMap) -> Response {
    let mut response = Response::default();
    let headers = response.headers_mut();
    let depends_on = "Access-Control-Request-Headers, Access-Control-Request-Private-Network";
    headers.insert(header::VARY, HeaderValue::from_static(depends_on));
    if let Some(allowed) = allowed_headers(asked) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    }
    if asked.get(REQUEST_PRIVATE_NETWORK).is_some_and(|value| value == "true") {
        headers.insert(ALLOW_PRIVATE_NETWORK, HeaderValue::from_static("true"));
    }
    response
}

/// The list and what is asked for beside it, where that is anything. Nothing but names of headers comes back.
fn allowed_headers(asked: &HeaderMap) -> Option<HeaderValue> {
    let is_listed = |name: &[u8]| {
        ALLOWED_HEADERS
            .split(", ")
            .any(|listed| listed.as_bytes().eq_ignore_ascii_case(name))
    };
    let asked = asked.get_all(header::ACCESS_CONTROL_REQUEST_HEADERS).into_iter();
    let names = asked
        .flat_map(|list| list.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii);
    let mut others = String::new();
    for name in names
        .filter(|name| !is_listed(name))
        .filter_map(|name| HeaderName::from_bytes(name).ok())
    {
        if others.len() + ", ".len() + name.as_str().len() > MAX_ASKED_HEADERS_BYTES {
            break;
        }
        others.push_str(", ");
        others.push_str(name.as_str());
    }
    let allowed = (!others.is_empty()).then(|| ALLOWED_HEADERS.to_owned() + &others)?;
    HeaderValue::try_from(allowed).ok()
}

fn finish(mut response: Response, id: &RequestId) -> Response {
    let error = response.extensions_mut().remove::<ApiError>();
    let outcome = error.map_or(Outcome::Ok, |error| error.outcome);
    note(|line| line.set_answer(response.status().as_u16(), outcome));
    if let Some(error) = error {
        let json = error_body(&error, id);
        *response.body_mut() = Body::from(json);
        error_headers(response.headers_mut(), &error);
    }
    common_headers(response.headers_mut(), id);
    response
}

fn common_headers(headers: &mut HeaderMap, id: &RequestId) {
    for (name, value) in ON_EVERY_ANSWER {
        headers.entry(name).or_insert(value);
    }
    headers.insert(X_REQUEST_ID, id.0.clone());
}

fn error_headers(headers: &mut HeaderMap, error: &ApiError) {
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = error.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
}

fn error_body(error: &ApiError, id: &RequestId) -> Vec<u8> {
    let body = ErrorBody {
        errcode: error.errcode,
        error: error.text,
        reason: error.outcome.word(),
        request_id: id.as_str(),
        retry_after_ms: error.retry_after.map(|seconds| seconds * 1000),
    };
    // Constants and a checked id always serialise.
    let mut json = serde_json::to_vec(&body).unwrap_or_default();
    json.push(b'\n');
    json
}

/// Rewrites the head with which the HTTP library by itself answers what it cannot read, so that it has the headers and the body
/// that every error has (decision H3); `None` for the head of any other answer.
#[must_use]
pub fn in_our_form(head: &[u8]) -> Option<Vec<u8>> {
    let status = head.strip_prefix(b"HTTP/1.")?.get(2..5).filter(|status| status[0] == b'4')?;
    let (first_line, rest) = head.split_at(head.iter().position(|byte| *byte == b'\n')? + 1);
    // An answer of ours has other headers before these two.
    let rest = rest.strip_prefix(b"connection: close\r\ncontent-length: 0\r\n")?;
    let error = ApiError::unreadable(StatusCode::from_bytes(status).ok()?);
    let id = RequestId::new();
    // Nothing of it is known, not even its path.
    let mut line = RequestLine::begin(id.0.clone(), Method::default(), "", None);
    line.refuse(ErrorReport {
        level: Level::INFO,
        message: "a request could not be read",
        detail: None,
        remedy: Some("this port speaks HTTP/1.1: no TLS, no HTTP/2 (h2c), no PROXY protocol; heads have 16 KiB and 100 headers at most"),
    });
    line.set_answer(error.status.as_u16(), error.outcome);
    drop(line);
    let body = error_body(&error, &id);
    let mut headers = HeaderMap::new();
    error_headers(&mut headers, &error);
    common_headers(&mut headers, &id);
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    let mut answer = first_line.to_vec();
    for (name, value) in &headers {
        answer.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    answer.extend(rest);
    answer.extend(body);
    Some(answer)
}

/// A handler panicked: the panic hook has logged it, the answer is a constant, and the service goes on.
pub(super) fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::INTERNAL.into_response()
}

impl RequestId {
    fn of<B>(request: &Request<B>) -> Self {
        let given = request.headers().get(X_REQUEST_ID).filter(|value| {
            let bytes = value.as_bytes();
            (1..=64).contains(&bytes.len()) && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b))
        });
        // Copied: a part of the head would keep all of it.
        let given = given.and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok());
        given.map_or_else(Self::new, Self)
    }

    fn new() -> Self {
        let made = HeaderValue::from_str(&format!("{:016x}", rand::random::<u64>()));
        Self(made.unwrap_or(HeaderValue::from_static("0")))
    }

    fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

/// Gives the address this path, and back what it was.
fn rewrite(uri: &mut Uri, mut path: String) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    if let Some(query) = uri.query() {
        path = path + "?" + query;
    }
    // A part of a path that was parsed is a path.
    parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
    Some(mem::replace(uri, Uri::from_parts(parts).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Client;
    use crate::metrics::{Gauges, METRICS};
    use http_body_util::BodyExt as _;

    #[test]
    fn proxies_of_ours_say_who_the_client_is_and_nobody_else_does() {
        let address = |text: &str| -> IpAddr { text.parse().unwrap() };
        for (peer, noted, expected) in [
            ("9.9.9.9", vec!["8.8.8.8"], "9.9.9.9"),
            ("127.0.0.1", vec![], "127.0.0.1"),
            ("172.18.0.2", vec!["1.1.1.1, 8.8.8.8"], "8.8.8.8"),
            ("::1", vec!["1.1.1.1", "8.8.8.8, 10.0.0.7"], "8.8.8.8"),
            ("10.1.2.3", vec!["8.8.8.8, nonsense, 192.168.0.1"], "8.8.8.8"),
            ("10.1.2.3", vec!["192.168.0.1"], "10.1.2.3"),
            ("::ffff:10.1.2.3", vec!["2a00:1450:4001:82f::200e"], "2a00:1450:4001:82f::1"),
        ] {
            let mut headers = HeaderMap::new();
            for value in noted {
                headers.append(X_FORWARDED_FOR, HeaderValue::from_static(value));
            }
            assert_eq!(
                Client::from(client_address(address(peer), &headers)),
                Client::from(address(expected)),
                "{peer} {headers:?}"
            );
        }
    }

    #[test]
    fn a_browser_may_send_what_it_asks_for_and_nothing_else_comes_back() {
        let allowed = |asked: &[&'static [u8]]| {
            let mut headers = HeaderMap::new();
            for value in asked {
                headers.append(header::ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_bytes(value).unwrap());
            }
            let allowed = allowed_headers(&headers)?;
            Some(allowed.to_str().unwrap().strip_prefix(ALLOWED_HEADERS).unwrap().to_owned())
        };
        for (asked, expected) in [
            (vec![], None),
            (vec![&b""[..]], None),
            (vec![b"content-type,AUTHORIZATION"], None),
            (vec![b"x-a, X-B ,content-type"], Some(", x-a, x-b")),
            (vec![b"x-a", b"x-b"], Some(", x-a, x-b")),
            (vec![b"x a,x-b:,<x>,\xff,(x),x-c,"], Some(", x-c")),
        ] {
            assert_eq!(allowed(&asked).as_deref(), expected, "{asked:?}");
        }
        let long: &'static [u8] = Box::leak([b"x-".as_slice(), &[b'a'; 998]].concat().into());
        let many: &'static [u8] = Box::leak(b"x-bcd,".repeat(2_000).into());
        let length = |asked: &[&'static [u8]]| allowed(asked).unwrap().len();
        assert_eq!(length(&[long]), 1002);
        assert_eq!(length(&[many]), 146 * ", x-bcd".len());
        assert_eq!(length(&[long, many]), 1002 + 3 * ", x-bcd".len());
    }

    #[test]
    fn only_what_the_http_library_answers_by_itself_is_rewritten() {
        let own = b"HTTP/1.0 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";
        let rewritten = String::from_utf8(in_our_form(own).unwrap()).unwrap();
        let (head, body) = rewritten.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 431 Request Header Fields Too Large\r\ncontent-type: "));
        let end = format!("connection: close\r\ncontent-length: {}\r\ndate: now", body.len());
        assert!(head.ends_with(&end), "{head}");
        assert!(body.contains("M_TOO_LARGE"), "{body}");
        for other in [
            &b""[..],
            b"HTTP/1.1",
            b"HTTP/1.1 400 Bad Request",
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\nx-served-by: lk-jwt-service\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 7\r\n\r\n",
            b"{\"errcode\":\"M_UNKNOWN\"}",
        ] {
            assert_eq!(in_our_form(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    /// A panic is a defect: none is known that a request can bring about.
    #[tokio::test]
    async fn a_panic_is_answered_and_counted_as_a_defect() {
        let counted = || {
            let text = METRICS.text(&Gauges::default());
            let name = "lk_jwt_requests_total{route=\"other\",outcome=\"internal_error\"} ";
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map_or(0, |count| count.parse::<u64>().unwrap())
        };
        let before = counted();
        let id = RequestId(HeaderValue::from_static("defect"));
        let line = RequestLine::begin(id.0.clone(), Method::GET, "/nowhere", None);
        let response = line.around(pin!(async { finish(panicked(Box::new("x")), &id) })).await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["reason"], Outcome::InternalError.word());
        assert!(counted() > before);
    }

    #[test]
    fn ids_of_others_are_kept_when_they_are_harmless() {
        let id = |value: &'static [u8]| {
            let request = Request::builder()
                .header("x-request-id", HeaderValue::from_bytes(value).unwrap())
                .body(())
                .unwrap();
            RequestId::of(&request).as_str().to_owned()
        };
        assert_eq!(id(b"abc-DEF_1.2"), "abc-DEF_1.2");
        for odd in [&b""[..], b"a b", b"a\"b", b"\xffabc", &[b'a'; 65]] {
            assert_eq!(id(odd).len(), 16, "{odd:?}");
        }
    }
}
