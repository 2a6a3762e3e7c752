//! Is the SFU there? A `GET` of its base address on a kept connection: livekit-server answers `OK` and, unlike for an API
//! call, writes no line into its log. hyper tells when the connection closes; a pool would not (decision L13).
//!
//! A client that knocks between the SFU's first answer and the creation of its room is stranded for good. So a question
//! that meets a closed port knocks a few times more before it says so. Nobody hears it.

use std::net::{IpAddr, SocketAddr};
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
use tokio::sync::{Notify, OnceCell};
use tokio::time::{sleep, timeout};
use tower::{ServiceExt as _, service_fn};
use url::Url;

use crate::delayed_leave::watch::Reach;
use crate::dns::Dns;
use crate::tls::Tls;

/// How often a closed port is tried within one question, and the pause between: less than 100 ms in all, as the next
/// question comes then.
const KNOCKS: usize = 8;
const BETWEEN_KNOCKS: Duration = Duration::from_millis(10);

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
        // The name is looked up once per question.
        let (dns, found) = (self.dns.clone(), Arc::new(OnceCell::new()));
        let resolver = service_fn(move |name: Name| {
            let (dns, found) = (dns.clone(), found.clone());
            async move {
                let addresses: &Vec<IpAddr> = found.get_or_try_init(|| dns.addresses(name.as_str(), None)).await?;
                Ok::<_, crate::dns::DnsError>(addresses.clone().into_iter().map(|ip| SocketAddr::new(ip, 0)))
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
        let mut knocks = 1;
        let stream = loop {
            match connector.clone().oneshot(uri.clone()).await {
                Ok(stream) => break stream,
                Err(error) if knocks < KNOCKS && is_refused(error.as_ref()) => {
                    knocks += 1;
                    sleep(BETWEEN_KNOCKS).await;
                }
                Err(_) => return None,
            }
        };
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

/// Nobody listens there.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    fn probe_of(address: SocketAddr) -> Probe {
        let base = Url::parse(&format!("http://{address}")).expect("an address");
        Probe::new(&base, Arc::new(Tls::new(false)), Arc::new(Dns::new(&[])))
    }

    fn answer_once(listener: &TcpListener) {
        let (mut stream, _) = listener.accept().expect("a connection");
        let _ = stream.read(&mut [0; 1000]);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK");
    }

    /// Twenty times the port opens 30 ms after the question. A busy machine may miss some of them.
    #[tokio::test]
    async fn a_port_that_opens_during_a_question_is_found_by_it() {
        const ALL: usize = 20;
        let mut found = 0;
        for _ in 0..ALL {
            let address = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
            let mut probe = probe_of(address);
            let question = tokio::spawn(async move { probe.ask(Duration::from_secs(1)).await });
            sleep(Duration::from_millis(30)).await;
            let was_over = question.is_finished();
            // Another process may have taken the port meanwhile.
            let Ok(listener) = TcpListener::bind(address) else { continue };
            std::thread::spawn(move || answer_once(&listener));
            let reach = question.await.expect("the question");
            found += usize::from(!was_over && reach == Reach::Answered);
        }
        assert!(found >= ALL / 2, "{found} of {ALL}");
    }

    #[tokio::test]
    async fn a_port_that_stays_closed_is_unreachable() {
        let address = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        assert_eq!(probe_of(address).ask(Duration::from_secs(60)).await, Reach::Unreachable);
    }
}
