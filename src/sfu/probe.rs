//! Is the SFU there? A `GET` of its base address on a kept connection: livekit-server answers `OK` and, unlike for an API
//! call, writes no line into its log. hyper tells when the connection closes; a pool would not (decision L13).
//!
//! A client that connects between the SFU's first answer and the creation of its room is stranded for good. So a question
//! that meets a closed port tries to connect a few times more before it says so, which costs the SFU nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Scheme;
use http::{Request, Uri, Version, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use tokio::sync::{Notify, OnceCell};
use tokio::time::{sleep, timeout};
use tower::{ServiceExt as _, service_fn};

use super::endpoint::Endpoint;
use crate::dns::DnsError;
use crate::livekit::Reach;

/// How often a closed port is tried within one question, and the pause between: less than 100 ms in all, as the next
/// question comes then.
const CONNECT_ATTEMPTS: usize = 8;
const CONNECT_RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Time for a connection to stand, shared by the addresses of a name: one that is dead must leave some of a question for the next.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);

struct Kept {
    sender: SendRequest<Empty<Bytes>>,
    /// Whether an end of the connection would mean something: nobody announced it.
    watched: Arc<AtomicBool>,
    /// How often the SFU had moved when it was made.
    moves: u64,
}

/// The watch's own connection to the SFU.
pub struct Probe {
    endpoint: Arc<Endpoint>,
    kept: Option<Kept>,
    closed: Arc<Notify>,
}

impl Probe {
    pub(super) fn new(endpoint: Arc<Endpoint>) -> Self {
        Self {
            endpoint,
            kept: None,
            closed: Arc::new(Notify::new()),
        }
    }

    /// Told each time the kept connection closes.
    #[must_use]
    pub fn closed(&self) -> Arc<Notify> {
        self.closed.clone()
    }

    /// Asks the SFU's base address once.
    pub async fn ask(&mut self, within: Duration) -> Reach {
        // Where the SFU was before, somebody else may answer by now; to leave that place is told as its end.
        let kept = self.kept.take();
        let kept = kept.filter(|kept| !kept.sender.is_closed() && kept.moves == self.endpoint.moves());
        let reach = match timeout(within, self.exchange(kept)).await {
            Ok(Some((kept, reach))) => {
                self.kept = kept;
                reach
            }
            Ok(None) => Reach::Unreachable,
            Err(_) => Reach::TimedOut,
        };
        if reach != Reach::Answered {
            self.endpoint.look_again();
        }
        reach
    }

    async fn exchange(&self, kept: Option<Kept>) -> Option<(Option<Kept>, Reach)> {
        let uri = self.endpoint.uri.as_ref()?;
        let mut kept = match kept {
            Some(kept) => kept,
            None => self.connect(uri).await?,
        };
        kept.sender.ready().await.ok()?;
        let mut request =
            Request::get(uri.path_and_query().map_or("/", |path| path.as_str())).header(header::HOST, uri.authority()?.as_str());
        // A proxy is asked for what is not encrypted, and for a tunnel to what is: so does the client of all other calls.
        if let Some(proxy) = self.endpoint.proxy.as_ref().filter(|_| !is_encrypted(uri)) {
            request = request.uri(uri.clone());
            if let Some(auth) = proxy.basic_auth() {
                request = request.header(header::PROXY_AUTHORIZATION, auth);
            }
        }
        let request = request.body(Empty::new()).ok()?;
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
        let moves = self.endpoint.moves();
        // The name is looked up once per question.
        let (resolver, found) = (self.endpoint.resolver.clone(), Arc::new(OnceCell::<Vec<SocketAddr>>::new()));
        let service = service_fn(move |name: Name| {
            let (resolver, found) = (resolver.clone(), found.clone());
            async move {
                let found = found.get_or_try_init(|| resolver.find(name.as_str())).await?;
                Ok::<_, DnsError>(found.clone().into_iter())
            }
        });
        let mut http = HttpConnector::new_with_resolver(service);
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let tls = self.endpoint.tls.config().ok()?;
        let over_tls = || {
            HttpsConnectorBuilder::new()
                .with_tls_config(tls.as_ref().clone())
                .https_or_http()
                .enable_http1()
        };
        let mut attempts = 1;
        let stream = loop {
            let connected = match &self.endpoint.proxy {
                None => over_tls().wrap_connector(http.clone()).oneshot(uri.clone()).await,
                Some(proxy) if is_encrypted(uri) => {
                    let tunnel = Tunnel::new(proxy.uri().clone(), http.clone());
                    let tunnel = proxy.basic_auth().cloned().into_iter().fold(tunnel, Tunnel::with_auth);
                    over_tls().wrap_connector(tunnel).oneshot(uri.clone()).await
                }
                Some(proxy) => over_tls().wrap_connector(http.clone()).oneshot(proxy.uri().clone()).await,
            };
            match connected {
                Ok(stream) => break stream,
                Err(error) if attempts < CONNECT_ATTEMPTS && is_refused(error.as_ref()) => {
                    attempts += 1;
                    sleep(CONNECT_RETRY_PAUSE).await;
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
        Some(Kept { sender, watched, moves })
    }
}

fn is_encrypted(uri: &Uri) -> bool {
    uri.scheme() == Some(&Scheme::HTTPS)
}

/// Whether the port is closed: no program listens there.
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

    use url::Url;

    use super::*;
    use crate::dns::Dns;
    use crate::tls::{Given, Tls};

    fn probe_of(address: SocketAddr) -> Probe {
        let base = Url::parse(&format!("http://{address}")).expect("an address");
        Probe::new(Arc::new(Endpoint::new(
            &base,
            Arc::new(Tls::new(false, Given::default())),
            Arc::new(Dns::new(&[])),
        )))
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
