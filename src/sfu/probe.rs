//! Is the SFU there? A `GET` of its base address on a kept connection: livekit-server answers `OK` and, unlike for an API
//! call, writes no line into its log. hyper tells when the connection closes; a pool would not (decision L13).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, Version, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use tokio::sync::Notify;
use tokio::time::timeout;
use tower::{ServiceExt as _, service_fn};
use url::Url;

use crate::delayed_leave::watch::Reach;
use crate::dns::Dns;
use crate::tls::Tls;

struct Kept {
    sender: SendRequest<Empty<Bytes>>,
    /// Its end would mean something: nobody announced it.
    watched: Arc<AtomicBool>,
}

/// The watch's own connection to the SFU.
pub struct Probe {
    uri: Option<Uri>,
    tls: Arc<Tls>,
    dns: Arc<Dns>,
    kept: Option<Kept>,
    closed: Arc<Notify>,
}

impl Probe {
    pub(super) fn new(base: &Url, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        Self {
            uri: base.as_str().parse().ok(),
            tls,
            dns,
            kept: None,
            closed: Arc::new(Notify::new()),
        }
    }

    /// Told each time the kept connection closes.
    #[must_use]
    pub fn closed(&self) -> Arc<Notify> {
        self.closed.clone()
    }

    /// Asks once.
    pub async fn ask(&mut self, within: Duration) -> Reach {
        let kept = self.kept.take().filter(|kept| !kept.sender.is_closed());
        match timeout(within, self.exchange(kept)).await {
            Ok(Some((kept, reach))) => {
                self.kept = kept;
                reach
            }
            Ok(None) => Reach::Unreachable,
            Err(_) => Reach::TimedOut,
        }
    }

    async fn exchange(&self, kept: Option<Kept>) -> Option<(Option<Kept>, Reach)> {
        let uri = self.uri.as_ref()?;
        let mut kept = match kept {
            Some(kept) => kept,
            None => self.connect(uri).await?,
        };
        kept.sender.ready().await.ok()?;
        let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(header::HOST, uri.authority()?.as_str())
            .body(Empty::new())
            .ok()?;
        let response = kept.sender.send_request(request).await.ok()?;
        let status = response.status().as_u16();
        let announced = response
            .headers()
            .get(header::CONNECTION)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
        let keeps = response.version() >= Version::HTTP_11 && !announced;
        kept.watched.store(keeps, Ordering::Relaxed);
        let mut body = response.into_body();
        // Read and dropped frame by frame, so that the connection can be used again.
        while let Some(frame) = body.frame().await {
            frame.ok()?;
        }
        let reach = if (502..=504).contains(&status) {
            Reach::Unreachable
        } else {
            Reach::Answered
        };
        Some((keeps.then_some(kept), reach))
    }

    async fn connect(&self, uri: &Uri) -> Option<Kept> {
        let dns = self.dns.clone();
        let resolver = service_fn(move |name: Name| {
            let dns = dns.clone();
            async move {
                let addresses = dns.addresses(name.as_str()).await?;
                Ok::<_, crate::dns::DnsError>(addresses.into_iter().map(|ip| SocketAddr::new(ip, 0)))
            }
        });
        let mut http = HttpConnector::new_with_resolver(resolver);
        http.enforce_http(false);
        http.set_nodelay(true);
        let tls = self.tls.config().ok()?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls.as_ref().clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let stream = connector.oneshot(uri.clone()).await.ok()?;
        let (sender, connection) = handshake(stream).await.ok()?;
        let closed = self.closed.clone();
        let watched = Arc::new(AtomicBool::new(true));
        let watching = watched.clone();
        tokio::spawn(async move {
            // However it ended: it ended.
            let _ = connection.await;
            if watching.load(Ordering::Relaxed) {
                closed.notify_one();
            }
        });
        Some(Kept { sender, watched })
    }
}
