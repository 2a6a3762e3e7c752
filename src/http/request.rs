//! Parts that the JSON routes share: a request that has arrived whole, and an answer in JSON.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::body;
use super::edge::{Arrived, RequestId};
use super::error::ApiError;
use crate::admission::Client;
use crate::connections::{Connection, Pot};
use crate::exchange::{Arrival, Patience};
use crate::federation::{Guard, Trust};
use crate::wire::BadRequest;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Largest body of a client route.
const MAX_BODY: usize = 64 * 1024;

/// When a request arrived, what it is called in the log, and on which connection it came.
pub(super) struct Received {
    pub(super) at: Instant,
    client: Client,
    id: RequestId,
    pub(super) connection: Arc<Connection>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Received {
    /// Reads the body and parses it. Nothing but the fields is left of the request then.
    pub(super) async fn parse<T>(
        request: Request<Body>,
        pot: Pot,
        parse: impl FnOnce(&[u8]) -> Result<T, BadRequest>,
    ) -> Result<(Self, T), ApiError> {
        let at = Instant::now();
        let (mut head, body) = request.into_parts();
        let Arrived { id, connection } = head.extensions.remove::<Arrived>().ok_or(ApiError::INTERNAL)?;
        let declared = body::declared(&head.headers);
        let client = client(connection.peer(), &head.headers);
        drop(head);
        let parsed = {
            let body = body::read(&connection, pot, declared, body, MAX_BODY).await?;
            parse(&body).inspect_err(|bad| {
                tracing::debug!(request_id = id.as_str(), reason = bad.to_string(), "bad request");
            })?
        };
        Ok((
            Self {
                at,
                client,
                id,
                connection,
                _place: None,
            },
            parsed,
        ))
    }

    /// The request has this place until it is answered.
    pub(super) fn with(self, place: OwnedSemaphorePermit) -> Self {
        Self {
            _place: Some(place),
            ..self
        }
    }

    /// When it came, how long it may take, and from whom it is.
    pub(super) fn arrival(&self, patience: fn(Instant) -> Patience) -> Arrival {
        Arrival {
            patience: patience(self.at),
            client: self.client,
        }
    }

    /// Id of the request.
    pub(super) fn id(&self) -> &str {
        self.id.as_str()
    }
}

/// Finds the sender of a request: the other end of the connection or, where that is a proxy of ours (its address is private), the
/// last public address that the proxies noted. It only orders those who wait for one homeserver: whoever can forge it wins nothing
/// but another place in that order.
fn client(peer: IpAddr, headers: &HeaderMap) -> Client {
    let is_public = |address: &IpAddr| Guard::default().check(*address, Trust::Stranger).is_ok();
    if is_public(&peer) {
        return Client::from(peer);
    }
    let noted = headers.get_all(X_FORWARDED_FOR).into_iter().rev();
    let addresses = noted.filter_map(|value| value.to_str().ok()).flat_map(|value| value.rsplit(','));
    let public = addresses.filter_map(|address| address.trim().parse().ok()).find(is_public);
    Client::from(public.unwrap_or(peer))
}

/// 200 with one JSON object and a newline.
pub(super) fn json_reply(reply: &impl Serialize) -> Result<Response, ApiError> {
    let mut json = serde_json::to_vec(reply).map_err(|_| ApiError::INTERNAL)?;
    json.push(b'\n');
    let mut response = json.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

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
                client(address(peer), &headers),
                Client::from(address(expected)),
                "{peer} {headers:?}"
            );
        }
    }
}
