//! Wiring, serving, stopping.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::access::Policy;
use crate::app_service::AppService;
use crate::config::Config;
use crate::delayed_leave::store::{Queue, Restored, Store, StoreError};
use crate::delayed_leave::{self, Leaves, jobs};
use crate::dns::Dns;
use crate::exchange::Exchange;
use crate::federation::{Federation, Guard, Settings};
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::http::{App, Appservice, Edge};
use crate::members::Members;
use crate::openid::OpenId;
use crate::removal::{self, Removals};
use crate::server_name::ServerName;
use crate::sfu::Sfu;
use crate::tls::Tls;
use crate::token::{MintError, Minter};

/// Open connections, as far as the file descriptors go; each request in flight may need as many again.
const CONNECTIONS: usize = 5500;
/// Requests in flight (decision H7), as far as there are connections: a quarter of these is left to the probes of
/// `/healthz`, and to being told that the service is busy.
const IN_FLIGHT: usize = 4096;
/// Connections to homeservers in use at a time.
const CONNECTIONS_OUT: u32 = 512;
/// Where there is no place for a new connection, those close that have been idle for this long since their last request,
const IDLE_WHEN_CROWDED: Duration = Duration::from_millis(250);
/// and those whose first request does not come; it may be on its way from far.
const SILENT_WHEN_CROWDED: Duration = Duration::from_secs(1);
/// Time for the first request's head to arrive.
const FIRST_HEAD: Duration = Duration::from_secs(10);
/// Time for the next one's: longer than the proxies in use keep an idle connection (Caddy: 120 s), so that none of them
/// sends a request into a connection that is just being closed.
const NEXT_HEAD: Duration = Duration::from_secs(125);
/// Longest head of a request.
const MAX_HEAD: usize = 16 * 1024;

/// How long the port stays closed while jobs are being restored.
const RESTORING: Duration = Duration::from_secs(2);

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port cannot be opened.
    #[error("cannot listen on LIVEKIT_JWT_BIND={0}: {1}; is another program using the port?")]
    Listen(String, io::Error),
    /// The key pair cannot sign.
    #[error("LIVEKIT_KEY and LIVEKIT_SECRET: {0}")]
    Keys(#[from] MintError),
    /// The store of delegated leaves and tokens cannot be used.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    Store(#[from] StoreError),
}

/// Serves until `stop` is done, then lets what is in flight finish.
///
/// # Errors
/// When the service cannot start. Nothing is bound then.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), StartError> {
    let grace = config.shutdown_grace;
    let bind = config.bind.clone();
    let (url, summary) = (config.livekit.shown_url(), config.summary());
    let connections = connections();
    let in_flight = IN_FLIGHT.min(connections * 3 / 4);
    if in_flight < IN_FLIGHT {
        tracing::info!(
            in_flight,
            remedy = "raise it (ulimit -n, systemd's LimitNOFILE, Docker's --ulimit nofile) where many people call",
            "the limit on open files bounds how many requests are served at a time"
        );
    }
    let Parts {
        app,
        sfu,
        own,
        leaves,
        restored,
        removals,
    } = build(config, in_flight).await?;
    // Whoever comes while jobs are being restored finds an open port after that at the latest (decision L11).
    leaves.restore(restored);
    let _ = timeout(RESTORING, leaves.restored()).await;
    let listener = bind.listen().await.map_err(|error| StartError::Listen(bind.to_string(), error))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default(),
        livekit_url = url,
        "listening"
    );
    summary.log();
    tokio::spawn(async move { sfu.check().await });
    if let Some(own) = own {
        tokio::spawn(async move { own.check().await });
    }
    serve(listener, connections, app, leaves, removals, stop, grace).await;
    Ok(())
}

struct Parts {
    app: Arc<App>,
    sfu: Arc<Sfu>,
    own: Option<Arc<OwnHomeserver>>,
    leaves: Leaves,
    restored: Restored,
    removals: Option<Removals>,
}

/// Values, not the configuration, go below this function.
async fn build(config: Config, in_flight: usize) -> Result<Parts, StartError> {
    let tls = Arc::new(Tls::new(config.skip_tls_verification));
    let dns = Arc::new(Dns::new(config.dns_servers));
    let own_name = config.app_service.as_ref().map(|own| own.server_name.clone());
    let federation = Arc::new(Federation::new(
        Settings {
            guard: Guard {
                allowed_networks: config.allowed_networks,
                lab: config.skip_tls_verification,
            },
            overrides: config.federation_overrides,
            listed: config.full_access.clone(),
            also_listed: own_name.iter().chain(config.cs_api_overrides.keys()).cloned().collect(),
            proxies: Matcher::from_env(),
            connections: CONNECTIONS_OUT.min(u32::try_from(in_flight / 2).unwrap_or(CONNECTIONS_OUT)).max(16),
        },
        dns.clone(),
        tls.clone(),
    ));
    let signing = config.livekit.keys.signing();
    let minter = Arc::new(Minter::new(signing, config.jwt_ttl, config.can_update_own_metadata)?);
    let sfu = Arc::new(Sfu::new(&config.livekit.api_base, minter.clone(), tls.clone(), dns.clone()));
    let homeservers = Arc::new(Homeservers::new(federation.clone(), config.cs_api_overrides));
    let (own, hs_token) = config
        .app_service
        .map(|own| (OwnHomeserver::new(homeservers.clone(), own.server_name, own.as_token), own.hs_token))
        .unzip();
    let own = own.map(Arc::new);
    let members = own.clone().map(|own| Arc::new(Members::new(own)));
    let (named, own_named) = (config.full_access.clone(), own_name.clone());
    let store = match (config.delegated_leave.redis, config.delegated_leave.state_path) {
        (Some(redis), _) => Store::redis(redis, tls.clone(), dns.clone()),
        (None, Some(path)) => Store::file(&path).await?,
        (None, None) => Store::memory(),
    };
    let own_and_interval = own.clone().zip(config.membership.check_interval);
    let removals = own_and_interval.map(|(own, interval)| {
        let (tokens, restored) = removal::record::Queue::start(&store);
        let removals = Removals::new(removal::Settings {
            own,
            sfu: sfu.clone(),
            store: tokens,
            interval,
        });
        removals.restore(restored);
        removals
    });
    let (store, restored) = Queue::start(store);
    let leaves = Leaves::new(delayed_leave::Settings {
        config: jobs::Config {
            sweep_every: config.delegated_leave.sanity_check_interval,
            list_rooms_every: config.delegated_leave.room_watch_interval,
            ..jobs::Config::default()
        },
        sfu: sfu.clone(),
        homeservers: homeservers.clone(),
        own: own.clone(),
        store,
        named: Box::new(move |server| {
            ServerName::parse(server).is_ok_and(|server| named.names(&server) || own_named.as_ref() == Some(&server))
        }),
    });
    let exchange = Arc::new(Exchange {
        openid: OpenId::new(federation),
        policy: Policy {
            full_access: config.full_access,
            remote_can_publish: config.remote_can_publish,
            own: own_name,
        },
        sfu: sfu.clone(),
        homeservers,
        leaves: leaves.clone(),
        minter,
        own: own.clone(),
        members: members.clone().filter(|_| config.membership.required),
        removals: removals.clone(),
    });
    let appservice = own.clone().zip(members).zip(hs_token).map(|((own, members), hs_token)| {
        let service = AppService {
            exchange: exchange.clone(),
            own,
            members,
            url: config.livekit.url.clone(),
        };
        Appservice::new(service, hs_token)
    });
    let app = Arc::new(App::new(
        exchange,
        appservice,
        config.livekit.url,
        config.path_prefix,
        config.livekit.keys,
        in_flight,
    ));
    Ok(Parts {
        app,
        sfu,
        own,
        leaves,
        restored,
        removals,
    })
}

/// Accepts connections until `stop` is done, then closes idle ones and waits for the others, `grace` at most.
async fn serve(
    listener: TcpListener,
    connections: usize,
    app: Arc<App>,
    leaves: Leaves,
    removals: Option<Removals>,
    stop: impl Future<Output = ()>,
    grace: Duration,
) {
    let places = Arc::new(Semaphore::new(connections));
    let graceful = GracefulShutdown::new();
    let (stopping, _) = watch::channel(false);
    let (crowded, _) = watch::channel(());
    let edge = Edge::new(app.clone());
    let mut stop = pin!(stop);
    loop {
        let accepted = async {
            let place = place(&places, &crowded).await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, edge.clone(), &graceful, stopping.subscribe(), crowded.subscribe());
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(
                    error = error.to_string(),
                    "a connection could not be accepted; too few file descriptors? (ulimit -n)"
                );
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    app.stop();
    stopping.send_replace(true);
    tracing::info!(grace_seconds = grace.as_secs(), "stopping: requests in flight may finish");
    let deadline = Instant::now() + grace;
    let requests = async {
        if timeout_at(deadline, graceful.shutdown()).await.is_err() {
            tracing::warn!("some requests did not finish in LIVEKIT_SHUTDOWN_GRACE_SECONDS and were cut off");
        }
    };
    tokio::join!(requests, leaves.stop(deadline));
    let tokens = async {
        if let Some(removals) = removals {
            removals.close_store(deadline).await;
        }
    };
    tokio::join!(leaves.close_store(deadline), tokens);
}

/// A place for one more connection. While there is none, idle connections are asked for theirs, and the kernel keeps new
/// ones waiting.
async fn place(places: &Arc<Semaphore>, crowded: &watch::Sender<()>) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    loop {
        crowded.send_replace(());
        if let Ok(place) = timeout(IDLE_WHEN_CROWDED * 2, places.clone().acquire_owned()).await {
            // Never closed.
            return place.ok();
        }
    }
}

fn connection(
    stream: TcpStream,
    edge: Edge,
    graceful: &GracefulShutdown,
    mut stopping: watch::Receiver<bool>,
    mut crowded: watch::Receiver<()>,
) -> impl Future<Output = ()> + Send + use<> {
    // Answers are one write each; without it the last bytes may wait for an acknowledgement.
    let _ = stream.set_nodelay(true);
    // How many requests have begun, and ended: odd while one is being answered.
    let steps = Arc::new(AtomicUsize::new(0));
    let step = steps.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        step.fetch_add(1, Ordering::Relaxed);
        answer(edge.clone(), request, step.clone())
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(NEXT_HEAD)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let connection = graceful.watch(connection);
    async move {
        let mut connection = pin!(connection);
        // Until the first request is there, a connection is nobody's: it neither lives long nor holds up the end.
        let mut first = pin!(async {
            tokio::select! {
                () = sleep(FIRST_HEAD) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
        });
        let mut opening = true;
        let mut idle: Option<(usize, Instant)> = None;
        loop {
            let until = idle.map(|(_, until)| until);
            tokio::select! {
                // How a connection ends, a reset included, is the client's business.
                _ = &mut connection => return,
                () = &mut first, if opening => {
                    opening = false;
                    if steps.load(Ordering::Relaxed) == 0 {
                        return;
                    }
                }
                Ok(()) = crowded.changed(), if idle.is_none() => {
                    let step = steps.load(Ordering::Relaxed);
                    if step.is_multiple_of(2) {
                        let grace = if step == 0 { SILENT_WHEN_CROWDED } else { IDLE_WHEN_CROWDED };
                        idle = Some((step, Instant::now() + grace));
                    }
                }
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                    if idle.take().is_some_and(|(step, _)| step == steps.load(Ordering::Relaxed)) {
                        return;
                    }
                }
            }
        }
    }
}

async fn answer(edge: Edge, request: Request<Incoming>, step: Arc<AtomicUsize>) -> Result<Response, Infallible> {
    let answer = edge.serve(request.map(Body::new)).await;
    step.fetch_add(1, Ordering::Relaxed);
    answer
}

/// Half of the file descriptors that this process may open, the other half being for the way out.
fn connections() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits.lines().find_map(|line| {
        line.strip_prefix("Max open files")?
            .split_whitespace()
            .next()?
            .parse::<usize>()
            .ok()
    });
    soft.map_or(CONNECTIONS, |soft| (soft / 2).clamp(16, CONNECTIONS))
}
