//! Around every request: its id, its path as a proxy may have left it, CORS on every answer, the bodies of errors.

use std::any::Any;
use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method, Request, Uri, header};
use tower::ServiceExt as _;

use super::App;
use super::error::{ApiError, ErrorBody};
use crate::connections::Connection;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Decision H2: on every answer, whatever its status.
const CORS: [(HeaderName, HeaderValue); 5] = [
    (header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")),
    (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS")),
    (
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token, Authorization"),
    ),
    (
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("Retry-After, X-Request-Id"),
    ),
    (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400")),
];

/// The id of one request, in its answer and in the log.
#[derive(Clone)]
pub(super) struct RequestId(HeaderValue);

/// What a handler has to know of a request besides the request.
#[derive(Clone)]
pub(super) struct Arrived {
    pub(super) id: RequestId,
    pub(super) connection: Arc<Connection>,
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
        if let Some(path) = normalise(request.uri().path(), app.path_prefix.as_deref()).map(Cow::into_owned) {
            rewrite(request.uri_mut(), &path);
        }
        // Copied, where it is wanted: a part of the head would keep all of it.
        let told = tracing::enabled!(tracing::Level::DEBUG).then(|| (request.method().clone(), request.uri().path().to_owned()));
        let response = if request.method() == Method::OPTIONS {
            Response::default()
        } else {
            request.extensions_mut().insert(Arrived {
                id: id.clone(),
                connection,
            });
            router.oneshot(request).await.unwrap_or_else(|never| match never {})
        };
        if let Some((method, path)) = told {
            tracing::debug!(request_id = id.as_str(), %method, path, status = response.status().as_u16(), "answered");
        }
        Ok(finish(response, &id))
    }
}

fn finish(mut response: Response, id: &RequestId) -> Response {
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        write_error(&mut response, &error, id);
    }
    let headers = response.headers_mut();
    for (name, value) in CORS {
        headers.insert(name, value);
    }
    headers.insert(X_REQUEST_ID, id.0.clone());
    response
}

fn write_error(response: &mut Response, error: &ApiError, id: &RequestId) {
    let body = ErrorBody {
        errcode: error.errcode,
        error: error.text,
        reason: error.reason,
        request_id: id.as_str(),
        retry_after_ms: error.retry_after.map(|seconds| seconds * 1000),
    };
    // Constants and a checked id always serialise.
    let mut json = serde_json::to_vec(&body).unwrap_or_default();
    json.push(b'\n');
    *response.body_mut() = Body::from(json);
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = error.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
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
        let made = || HeaderValue::from_str(&format!("{:016x}", rand::random::<u64>())).unwrap_or(HeaderValue::from_static("0"));
        // Copied: a part of the head would keep all of it.
        let given = given.and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok());
        Self(given.unwrap_or_else(made))
    }

    pub(super) fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The path without doubled and trailing slashes and without the prefix (decision H1), where it differs.
fn normalise<'a>(path: &'a str, prefix: Option<&str>) -> Option<Cow<'a, str>> {
    let mut clean = if path.contains("//") {
        let mut out = String::with_capacity(path.len());
        for c in path.chars() {
            if c != '/' || !out.ends_with('/') {
                out.push(c);
            }
        }
        Cow::Owned(out)
    } else {
        Cow::Borrowed(path)
    };
    if clean.len() > 1 && clean.ends_with('/') {
        clean = clean.trim_end_matches('/').to_owned().into();
    }
    if let Some(rest) = prefix
        .and_then(|prefix| clean.strip_prefix(prefix))
        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
    {
        clean = if rest.is_empty() {
            Cow::Borrowed("/")
        } else {
            rest.to_owned().into()
        };
    }
    (clean != path).then_some(clean)
}

fn rewrite(uri: &mut Uri, path: &str) {
    let mut parts = uri.clone().into_parts();
    // A part of a path that was parsed is a path.
    if let Ok(path) = PathAndQuery::try_from(path) {
        parts.path_and_query = Some(path);
        if let Ok(rewritten) = Uri::from_parts(parts) {
            *uri = rewritten;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_as_proxies_leave_them() {
        let clean = |path| normalise(path, Some("/livekit/jwt")).map_or_else(|| path.to_owned(), Cow::into_owned);
        for (path, expected) in [
            ("/get_token", "/get_token"),
            ("/get_token/", "/get_token"),
            ("//get_token//", "/get_token"),
            ("/livekit/jwt/sfu/get", "/sfu/get"),
            ("/livekit//jwt///sfu/get/", "/sfu/get"),
            ("/livekit/jwt", "/"),
            ("/livekit/jwt/", "/"),
            ("/livekit/jwtx/get_token", "/livekit/jwtx/get_token"),
            ("/", "/"),
            ("//", "/"),
            ("/x/livekit/jwt/get_token", "/x/livekit/jwt/get_token"),
        ] {
            assert_eq!(clean(path), expected, "{path}");
        }
        assert_eq!(normalise("/livekit/jwt/get_token", None), None);
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
