//! Serving and stopping. What there is to serve, `build.rs` puts together.
#![expect(clippy::disallowed_methods, reason = "starts what runs, and serves by the clock")]

mod build;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, Request, StatusCode, header};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::bind::{self, Bind};
use crate::config::{Config, MetricsBind};
use crate::connections::{Connection, Connections, Counted, MAX_HEAD_BYTES, Opened, first_head};
use crate::driver::{Leaves, RESTORE_TIMEOUT};
use crate::http::{App, Edge, in_our_form};
use crate::limits::{Limits, Resources};
use crate::log_throttle::LogThrottle;
use crate::metrics::{CONTENT_TYPE, METRICS};
use crate::reload::Reloaded;
use crate::request_line::tell_suppressed;
use crate::store::StoreError;
use crate::token::MintError;
use build::{Stores, build};

static NOT_ACCEPTED: LogThrottle = LogThrottle::once_a_minute();

/// Time for the first request's head to arrive.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the next one's: longer than the proxies in use keep an idle connection (Caddy: 120 s), so that none of them
/// sends a request into a connection that is just being closed.
const NEXT_HEAD_TIMEOUT: Duration = Duration::from_secs(125);

/// A webhook about somebody who has joined comes within that time.
const WEBHOOKS_WITHIN: Duration = Duration::from_secs(30);

/// Scrapes at a time, and the time for one.
const MAX_SCRAPES: usize = 8;
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(15);

/// Time for the stores at least, once everything else has come to its end.
const MIN_STORE_TIME: Duration = Duration::from_secs(2);

/// How long the port stays closed while jobs are being restored.
const MAX_CLOSED_WHILE_RESTORING: Duration = Duration::from_secs(2);
const _: () = assert!(
    MAX_CLOSED_WHILE_RESTORING.as_millis() < RESTORE_TIMEOUT.as_millis(),
    "an open port answers 503 to webhooks and delegations until the jobs are restored"
);

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port cannot be opened.
    #[error("cannot listen on LIVEKIT_JWT_BIND={0}: {1}; {remedy}", remedy = bind::remedy(.1))]
    Listen(String, io::Error),
    /// The port of the metrics cannot be opened.
    #[error("cannot listen on LIVEKIT_METRICS_BIND={0}: {1}; {remedy}", remedy = bind::remedy(.1))]
    ListenMetrics(String, io::Error),
    /// The key pair cannot sign.
    #[error("LIVEKIT_KEY and LIVEKIT_SECRET: {0}")]
    Keys(#[from] MintError),
    /// Redis cannot be shared by several replicas.
    #[error("LIVEKIT_REDIS_SHARED: {0}; {SHARED_REMEDY}")]
    Shared(StoreError),
    /// The store of delegated leaves and tokens cannot be used.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    Store(#[from] StoreError),
}

/// Rights of a Redis that several replicas share.
const SHARED_REMEDY: &str = "several replicas need Redis 6.2 or newer, or Valkey, and a user with \
    +ping +time +hset +hget +hdel +hgetall +hlen +hscan +get +set +xadd +xlen +xread +xrange +xtrim +eval +evalsha on ~lk-jwt:* ~{lk-jwt:jobs}:*";

/// How long requests are taken after the order to stop, so that another replica can take the watch.
const HAND_OVER_TIME: Duration = Duration::from_secs(3);

/// Time in which what had come at the end is read.
const READING_TIME: Duration = Duration::from_millis(50);

/// Serves until `stop` is done, then lets what is in flight finish. Keys and tokens that `reload` brings are used from then on.
///
/// # Errors
/// When the service cannot start. Nothing is bound then.
pub async fn run(mut config: Config, reload: mpsc::Receiver<Config>, stop: impl Future<Output = ()>) -> Result<(), StartError> {
    let limits = Limits::of(Resources::of_this_process());
    let parts = build(&mut config, &limits).await?;
    let (app, stores) = (parts.app, parts.stores);
    // Whoever comes while jobs are being restored finds an open port after that at the latest (decision L11).
    stores.leaves.restore(parts.restored);
    let _ = timeout(MAX_CLOSED_WHILE_RESTORING, stores.leaves.restored()).await;
    let listener = listen(&config.bind, StartError::Listen).await?;
    let metrics = match &config.metrics {
        Some(MetricsBind::At(bind)) => Some(listen(bind, StartError::ListenMetrics).await?),
        Some(MetricsBind::Main) | None => None,
    };
    tracing::info!(name: "listening",
        version = env!("CARGO_PKG_VERSION"),
        address = address_of(&listener),
        livekit_url = config.livekit.shown_url(),
        "listening"
    );
    config.summary().log();
    if let Some(listener) = metrics {
        tracing::info!(name: "metrics_served", address = address_of(&listener), "metrics are served at /metrics");
        tokio::spawn(serve_metrics(listener, app.clone()));
    }
    let (interval, grace) = (config.check_interval, config.shutdown_grace);
    let (keys, tokens) = (config.livekit.keys, config.app_service);
    let reloaded = Reloaded::new(app.clone(), parts.minter, parts.sfu.clone(), parts.own.clone(), keys, tokens);
    tokio::spawn(reloaded.follow(reload));
    tokio::spawn(async move { parts.sfu.watch(interval).await });
    if let Some(own) = parts.own {
        tokio::spawn(async move { own.watch(interval).await });
    }
    tokio::spawn(watch_webhooks(stores.leaves.clone(), interval));
    let leaving = stores.leaves.clone();
    let stop = async move {
        stop.await;
        leaving.hand_over(HAND_OVER_TIME.min(grace)).await;
    };
    serve(listener, Connections::new(&limits), app, stores, stop, grace).await;
    Ok(())
}

async fn listen(bind: &Bind, failed: fn(String, io::Error) -> StartError) -> Result<TcpListener, StartError> {
    bind.listen().await.map_err(|error| failed(bind.to_string(), error))
}

fn address_of(listener: &TcpListener) -> String {
    listener.local_addr().map(|address| address.to_string()).unwrap_or_default()
}

/// Accepts connections until `stop` is done, then closes idle ones and waits for the others, `grace` at most.
async fn serve(
    listener: TcpListener,
    connections: Arc<Connections>,
    app: Arc<App>,
    stores: Stores,
    stop: impl Future<Output = ()>,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let edge = Edge::new(app.clone());
    let open = |(stream, peer): (TcpStream, SocketAddr)| {
        if let Some(opened) = connections.open(peer.ip()) {
            tokio::spawn(serve_connection(stream, opened, edge.clone(), graceful.watcher()));
        }
    };
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        if connections.is_full() {
            // Whoever has sent something by now is heard before anybody has to give way.
            yield_now().await;
        }
        open(accepted);
    }
    // What has come by now is taken in, and has a moment to be read: closed, it would be reset.
    for _ in 0..connections.most() {
        let Ok(accepted) = timeout(Duration::ZERO, accept(&listener)).await else {
            break;
        };
        open(accepted);
    }
    drop(listener);
    app.stop();
    sleep(READING_TIME).await;
    connections.stop();
    tracing::info!(name: "stopping", grace_seconds = grace.as_secs(), "stopping: requests in flight may finish");
    let deadline = Instant::now() + grace;
    let requests = async {
        if timeout_at(deadline, graceful.shutdown()).await.is_err() {
            tracing::warn!(name: "requests_cut_off", "some requests did not finish in LIVEKIT_SHUTDOWN_GRACE_SECONDS and were cut off");
        }
    };
    tokio::join!(requests, stores.leaves.stop(deadline), app.end_checks(deadline));
    // However long the others took, what they have changed is written (decision L12).
    let deadline = deadline.max(Instant::now() + MIN_STORE_TIME);
    let tokens = async {
        if let Some(kick) = &stores.kick {
            kick.close_store(deadline).await;
        }
    };
    tokio::join!(stores.leaves.close_store(deadline), tokens, stores.verified.stop(deadline));
    tell_suppressed();
}

/// Waits for the next connection.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                NOT_ACCEPTED.log(|count| {
                    tracing::warn!(name: "accept_failed",
                        error = error.to_string(),
                        count,
                        "a connection could not be accepted; too few file descriptors? (ulimit -n)"
                    );
                });
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Tells once that webhooks do not come although somebody with a delegated leave has joined, and once that they do.
async fn watch_webhooks(leaves: Leaves, interval: Duration) {
    let within = WEBHOOKS_WITHIN.min(interval / 2);
    let mut without_since = None;
    let mut is_told = false;
    loop {
        sleep(within / 3).await;
        if METRICS.last_webhook() > 0 {
            if is_told {
                tracing::info!(name: "webhooks_arrive", "webhooks of the SFU arrive");
            }
            return;
        }
        if leaves.gauges().jobs_watched == 0 {
            without_since = None;
            continue;
        }
        let since = *without_since.get_or_insert_with(Instant::now);
        if !is_told && since.elapsed() >= within {
            is_told = true;
            tracing::warn!(name: "webhooks_missing",
                remedy = "name this service's /sfu_webhook in webhook.urls of livekit-server's configuration, with webhook.api_key",
                "no webhook of the SFU has arrived although somebody has joined: departures are found by asking, and reported later"
            );
        }
    }
}

/// Answers scrapes on a port of their own, a few at a time: nobody else has business there.
async fn serve_metrics(listener: TcpListener, app: Arc<App>) {
    let places = Arc::new(Semaphore::new(MAX_SCRAPES));
    loop {
        // Nobody closes it.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, _) = accept(&listener).await;
        let app = app.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request: Request<Incoming>| {
                let app = app.clone();
                async move { Ok::<_, Infallible>(scrape(&app, &request)) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(FIRST_HEAD_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // How it ends is the other side's business.
            let _ = timeout(SCRAPE_TIMEOUT, connection).await;
        });
    }
}

fn scrape(app: &App, request: &Request<Incoming>) -> Response {
    let mut response = Response::default();
    if request.uri().path() != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    *response.body_mut() = Body::from(app.metrics());
    let kind = HeaderValue::from_static(CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Until the first head is there, a connection has no HTTP state: nobody has paid for it yet.
async fn serve_connection(stream: TcpStream, opened: Opened, edge: Edge, watcher: Watcher) {
    // Answers are one write each; without it the last bytes may wait for an acknowledgement.
    let _ = stream.set_nodelay(true);
    let connection = opened.connection();
    let head = tokio::select! {
        biased;
        () = connection.told_to_close() => return,
        head = timeout(FIRST_HEAD_TIMEOUT, first_head(&stream, connection)) => head,
    };
    let Ok(Some(head)) = head else { return };
    let http = Box::pin(http(stream, head, connection.clone(), edge, watcher));
    tokio::select! {
        // How a connection ends, a reset included, is the client's business.
        () = http => {}
        () = connection.told_to_close() => {}
    }
}

async fn http(stream: TcpStream, head: Vec<u8>, connection: Arc<Connection>, edge: Edge, watcher: Watcher) {
    let stream = TokioIo::new(Counted::new(stream, head, connection.clone(), in_our_form));
    let service = service_fn(move |request: Request<Incoming>| {
        // Before anything more is read: whether a FIN is the end of everything hangs on it.
        connection.request_begins(!request.body().is_end_stream());
        answer(edge.clone(), request, connection.clone())
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(NEXT_HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        // The buffer may hold a little more.
        .max_header_size(MAX_HEAD_BYTES)
        .serve_connection(stream, service);
    let _ = watcher.watch(connection).await;
}

async fn answer(edge: Edge, request: Request<Incoming>, connection: Arc<Connection>) -> Result<Response, Infallible> {
    let mut answer = edge.serve(request.map(Body::new), connection.clone()).await;
    connection.request_is_over();
    if let Ok(answer) = &mut answer
        && connection.had_large_head()
    {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}
