//! The way to a homeserver's client-server API: an address that the operator wrote down, or the one in
//! `https://<name>/.well-known/matrix/client`, dialled through the guard like everything else that strangers name
//! ([client-server API, "Well-known URI"](https://spec.matrix.org/v1.16/client-server-api/#well-known-uri)).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use url::Url;

use super::Federation;
use super::dial::{Attempt, Dialer, Dialled};
use super::failure::Failure;
use super::follow;
use super::guard::Trust;
use super::route::{Ask, Link, Reply, Route, host_of};
use super::well_known::life;
use crate::admission::budget::Budget;
use crate::admission::{Class, Who};
use crate::secret::Secret;
use crate::server_name::ServerName;

/// Largest well-known file (the specification's limit is of that order).
const MAX_FILE_BYTES: usize = 64 * 1024;
const TIMEOUT: Duration = Duration::from_secs(4);

/// Where a homeserver's client-server API is said to be, and for how long.
pub struct BaseUrl {
    /// Address that the file gives, `m.homeserver.base_url`.
    pub url: Url,
    /// How long that may be believed.
    pub life: Duration,
}

/// A homeserver's client-server API with its pooled connections.
pub struct ClientApi {
    link: Link,
    dialer: Arc<Dialer>,
    who: Who,
    may_carry_secrets: bool,
}

impl Federation {
    /// Asks the well-known file of `server` for its client-server API. With `since`, what DNS was asked before that moment
    /// does not count: what is remembered could not be used.
    ///
    /// # Errors
    /// When there is no file with a usable address.
    pub async fn client_base_url(&self, server: &ServerName, since: Option<Instant>) -> Result<BaseUrl, Failure> {
        let (host, port) = server.parts();
        let path = "/.well-known/matrix/client";
        let who = self.long_verified(server);
        let (budget, queued) = (Budget::of(who.class), Notify::new());
        let attempt = Attempt::new(who, &budget, &queued, None);
        attempt.asks_since(since);
        let file = follow::get(&self.dialer, host, port, path, self.trust(server), MAX_FILE_BYTES, &attempt);
        let reply = timeout(TIMEOUT, file).await.unwrap_or(Err(Failure::Timeout))?;
        let Some(reply) = reply else {
            return Err(Failure::NoClientApi("redirects lead nowhere"));
        };
        if reply.status != StatusCode::OK {
            return Err(if reply.status.is_server_error() {
                Failure::Http(format!("status {}", reply.status.as_u16()))
            } else {
                Failure::NoClientApi("there is no such file")
            });
        }
        let url = base_url(&reply.body).ok_or(Failure::NoClientApi("it names no http or https address"))?;
        Ok(BaseUrl {
            url,
            life: life(&reply.headers, SystemTime::now()),
        })
    }

    /// The API at `base`. Where the operator wrote `base` down, the guard has no say.
    ///
    /// # Errors
    /// When no connection can be made to such an address.
    pub fn client_api(&self, server: &ServerName, base: &Url, from_operator: bool) -> Result<ClientApi, Failure> {
        let dialled = if from_operator {
            Dialled::Override
        } else {
            Dialled::Guarded(self.trust(server))
        };
        let route = Route::to_url(base, dialled)?;
        Ok(ClientApi {
            may_carry_secrets: from_operator || base.scheme() == "https" || self.dialer.guard.lab,
            link: Link::new(&self.dialer, Arc::new(route)),
            dialer: self.dialer.clone(),
            who: self.long_verified(server),
        })
    }

    /// Counts the homeserver as verified at least: a caller of its client-server API has verified a token, be it long ago.
    fn long_verified(&self, server: &ServerName) -> Who {
        self.dialer.hasher.who(server, self.class(server).min(Class::Verified))
    }

    pub(super) fn trust(&self, server: &ServerName) -> Trust {
        if self.is_listed(server) { Trust::Listed } else { Trust::Stranger }
    }
}

impl ClientApi {
    /// Whether the way there is encrypted, or chosen by the operator.
    pub(crate) const fn may_carry_secrets(&self) -> bool {
        self.may_carry_secrets
    }

    /// Marks the way to the API as doubtful: the next call follows it anew, as DNS says.
    pub(crate) fn doubt(&self) {
        self.link.doubt(Instant::now());
    }

    /// GETs a path below the base.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn get(&self, path_and_query: &str, token: Option<&Secret>, limit: usize) -> Result<Reply, Failure> {
        self.ask(Method::GET, path_and_query, token, None, limit).await
    }

    /// POSTs JSON to a path below the base.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn post(&self, path_and_query: &str, token: Option<&Secret>, json: Bytes, limit: usize) -> Result<Reply, Failure> {
        self.ask(Method::POST, path_and_query, token, Some(json), limit).await
    }

    /// Each call has a budget of its own: nobody makes many of them happen.
    async fn ask(
        &self,
        method: Method,
        path_and_query: &str,
        token: Option<&Secret>,
        json: Option<Bytes>,
        limit: usize,
    ) -> Result<Reply, Failure> {
        let ask = Ask {
            method,
            path_and_query,
            token,
            json,
        };
        let (budget, queued) = (Budget::of(self.who.class), Notify::new());
        let attempt = Attempt::new(self.who, &budget, &queued, None);
        // Boxed: whoever has not come this far does not carry it.
        Box::pin(self.link.ask(&self.dialer, &ask, limit, &attempt)).await
    }
}

fn base_url(body: &[u8]) -> Option<Url> {
    let Ok(Value::Object(file)) = serde_json::from_slice(body) else {
        return None;
    };
    let url: Url = file.get("m.homeserver")?.get("base_url")?.as_str()?.parse().ok()?;
    let usable = matches!(url.scheme(), "http" | "https") && host_of(&url).is_some() && url.query().is_none() && url.fragment().is_none();
    usable.then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_file() {
        let read = |body: &str| base_url(body.as_bytes()).map(String::from);
        assert_eq!(
            read(r#"{"m.homeserver":{"base_url":"https://m.example.com"},"x":1}"#).as_deref(),
            Some("https://m.example.com/")
        );
        assert_eq!(
            read(r#"{"m.homeserver":{"base_url":"http://m.example.com:8008/p/"}}"#).as_deref(),
            Some("http://m.example.com:8008/p/")
        );
        for body in [
            "",
            "[]",
            "{}",
            r#"{"m.homeserver":5}"#,
            r#"{"m.homeserver":{"base_url":""}}"#,
            r#"{"m.homeserver":{"base_url":"m.example.com"}}"#,
            r#"{"m.homeserver":{"base_url":"ftp://m.example.com"}}"#,
            r#"{"m.homeserver":{"base_url":"https://m.example.com/?x"}}"#,
        ] {
            assert_eq!(read(body), None, "{body}");
        }
    }
}
