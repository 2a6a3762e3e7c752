//! Wiring, serving, stopping.
#![expect(clippy::disallowed_methods, reason = "the wiring: starts what runs")]

use std::convert::Infallible;
use std::future::{Future, pending};
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
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::admission::Class;
use crate::admission::rate_limiter::RateLimiter;
use crate::app_service::AppService;
use crate::backoff::as_millis;
use crate::bind;
use crate::clock::unix_seconds;
use crate::config::{AppServiceConfig, Config, MetricsBind};
use crate::connections::{Connection, Connections, Counted, MAX_HEAD_BYTES, Opened, first_head};
use crate::delayed_leave::Bounds;
use crate::dns::Dns;
use crate::doctor::{self, Arrivals, Doctor, View};
use crate::driver::{self, Leaves, RESTORE_TIMEOUT};
use crate::exchange::{Exchange, Unlisted};
use crate::federation::{Federation, Guard, Settings};
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::http::{App, AppServiceRoutes, Edge, Operators, in_our_form};
use crate::kick::{self, KickOnLeave};
use crate::limits::{Limits, Resources};
use crate::log_throttle::LogThrottle;
use crate::members::Members;
use crate::metrics::{CONTENT_TYPE, METRICS};
use crate::openid::OpenId;
use crate::presence;
use crate::request_line::tell_suppressed;
use crate::secret::{KeyPair, Keys};
use crate::sfu::Sfu;
use crate::store::{self, Store, StoreError, StoredJobs, Table, VerifiedHomeservers, token};
use crate::tls::Tls;
use crate::token::{Grants, MintError, Minter};

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

/// How long webhooks that are signed with a former key are taken.
const FORMER_KEYS_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// The store of delegated leaves and tokens cannot be used.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    Store(#[from] StoreError),
}

/// Serves until `stop` is done, then lets what is in flight finish. Keys and tokens that `reload` brings are used from then on.
///
/// # Errors
/// When the service cannot start. Nothing is bound then.
pub async fn run(config: Config, reload: mpsc::Receiver<Config>, stop: impl Future<Output = ()>) -> Result<(), StartError> {
    let grace = config.shutdown_grace;
    let (bind, metrics, check_interval) = (config.bind.clone(), config.metrics.clone(), config.check_interval);
    let (url, summary) = (config.livekit.shown_url(), config.summary());
    let (keys, tokens) = (config.livekit.keys.clone(), config.app_service.clone());
    let limits = Limits::of(Resources::of_this_process());
    let Parts {
        app,
        minter,
        sfu,
        own,
        leaves,
        restored,
        kick,
        verified,
    } = build(config, &limits).await?;
    // Whoever comes while jobs are being restored finds an open port after that at the latest (decision L11).
    leaves.restore(restored);
    let _ = timeout(MAX_CLOSED_WHILE_RESTORING, leaves.restored()).await;
    let listener = bind.listen().await.map_err(|error| StartError::Listen(bind.to_string(), error))?;
    let metrics = match metrics {
        Some(MetricsBind::At(bind)) => {
            let opened = bind.listen().await;
            let opened = opened.map_err(|error| StartError::ListenMetrics(bind.to_string(), error))?;
            Some((opened, app.clone()))
        }
        Some(MetricsBind::Main) | None => None,
    };
    tracing::info!(name: "listening",
        version = env!("CARGO_PKG_VERSION"),
        address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default(),
        livekit_url = url,
        "listening"
    );
    summary.log();
    let reloaded = Reloaded {
        app: app.clone(),
        minter,
        sfu: sfu.clone(),
        own: own.clone(),
        keys,
        former: FormerKeys::default(),
        tokens,
    };
    tokio::spawn(reloaded.follow(reload));
    tokio::spawn(async move { sfu.watch(check_interval).await });
    if let Some(own) = own {
        tokio::spawn(async move { own.watch(check_interval).await });
    }
    tokio::spawn(watch_webhooks(leaves.clone(), check_interval));
    if let Some((listener, _)) = &metrics {
        let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
        tracing::info!(name: "metrics_served", address, "metrics are served at /metrics");
    }
    if let Some((listener, app)) = metrics {
        tokio::spawn(serve_metrics(listener, app));
    }
    let stores = Stores { leaves, kick, verified };
    serve(listener, Connections::new(&limits), app, stores, stop, grace).await;
    Ok(())
}

struct Parts {
    app: Arc<App>,
    minter: Arc<Minter>,
    sfu: Arc<Sfu>,
    own: Option<Arc<OwnHomeserver>>,
    leaves: Leaves,
    restored: StoredJobs,
    kick: Option<KickOnLeave>,
    verified: VerifiedHomeservers,
}

/// Values, not the configuration, go below this function.
async fn build(config: Config, limits: &Limits) -> Result<Parts, StartError> {
    let examined = doctor::Settings::of(&config);
    let policy = config.policy();
    let tls = Arc::new(Tls::new(config.skip_tls_verification, config.certificates));
    let dns = Arc::new(Dns::new(&config.dns_servers));
    let own_name = config.app_service.as_ref().map(|own| own.server_name.clone());
    let store = match (config.delegated_leave.redis, config.delegated_leave.state_path) {
        (Some(redis), _) => Store::redis(redis, tls.clone(), dns.clone()),
        (None, Some(path)) => Store::file(&path).await?,
        (None, None) => Store::memory(),
    };
    let examined_store = store.with(Table::Jobs);
    let (verified, mut already_verified) = VerifiedHomeservers::start(&store, unix_seconds());
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
            connections_out: u32::try_from(limits.connections_out).unwrap_or(u32::MAX),
            remember: Box::new({
                let verified = verified.clone();
                move |host, at| match at {
                    Some(at) => verified.remember(host, at),
                    None => verified.forget(host),
                }
            }),
        },
        dns.clone(),
        tls.clone(),
    ));
    tokio::spawn({
        let federation = federation.clone();
        async move {
            while let Some((host, at)) = already_verified.next().await {
                federation.restore(&host, at);
            }
        }
    });
    let signing = config.livekit.keys.signing();
    let grants = Grants {
        can_update_own_metadata: config.can_update_own_metadata,
        publish_sources: config.publish_sources,
    };
    let minter = Arc::new(Minter::new(signing, config.jwt_ttl, grants)?);
    let sfu = Sfu::new(
        &config.livekit.api_base,
        config.max_participants,
        minter.clone(),
        tls.clone(),
        dns.clone(),
    );
    let sfu = Arc::new(sfu);
    let homeservers = Arc::new(Homeservers::new(federation.clone(), config.cs_api_overrides));
    let (own, hs_token) = config
        .app_service
        .map(|own| (OwnHomeserver::new(homeservers.clone(), own.server_name, own.as_token), own.hs_token))
        .unzip();
    let own = own.map(Arc::new);
    let members = own.clone().map(|own| Arc::new(Members::new(own)));
    let own_and_interval = own.clone().zip(config.membership.check_interval);
    let tokens = own_and_interval.map(|(own, interval)| (own, interval, token::Queue::start(&store)));
    let (store, restored) = store::Jobs::start(store);
    let leaves = Leaves::new(driver::Settings {
        core: driver::core::Settings {
            presence: presence::Settings {
                sweep_ms: config.delegated_leave.sanity_check_interval.map(as_millis),
                list_rooms_ms: config.delegated_leave.room_watch_interval.map(as_millis),
            },
            bounds: Bounds {
                total: u32::try_from(limits.jobs).unwrap_or(u32::MAX),
                ..Bounds::default()
            },
        },
        sfu: sfu.clone(),
        homeservers: homeservers.clone(),
        own: own.clone(),
        store,
        listed: Box::new({
            let homeservers = homeservers.clone();
            move |server| homeservers.class(server) == Class::Listed
        }),
    });
    let on_leave = tokens.map(|(own, interval, (tokens, restored))| {
        let on_leave = KickOnLeave::new(kick::Settings {
            own,
            sfu: sfu.clone(),
            store: tokens,
            interval,
            max_tokens: limits.tokens,
            end_delegated_leave: Box::new({
                let leaves = leaves.clone();
                move |room, identity| leaves.kicked(room, identity)
            }),
        });
        on_leave.restore(restored);
        leaves.share_lists(Box::new({
            let on_leave = on_leave.clone();
            move |room, identities, asked| on_leave.handle_list(room, identities, asked)
        }));
        on_leave
    });
    let exchange = Arc::new(Exchange {
        openid: OpenId::new(federation.clone()),
        policy,
        rates: RateLimiter::new(config.rates),
        sfu: sfu.clone(),
        leaves: leaves.clone(),
        minter: minter.clone(),
        members: members.clone().filter(|_| config.membership.required),
        kick: on_leave.clone(),
        unlisted: Unlisted::default(),
    });
    let arrivals = Arc::new(Arrivals::default());
    let doctor = Doctor::new(
        doctor::Context {
            view: View::Inside,
            federation,
            sfu: Some(sfu.clone()),
            own: own.clone(),
            store: Some(examined_store),
            knows: Some(Box::new({
                let leaves = leaves.clone();
                move |room, identity| leaves.knows(room, identity)
            })),
            arrivals: Some(arrivals.clone()),
            settings: examined,
        },
        arrivals,
        config.dev,
    );
    let appservice = own.clone().zip(members).zip(hs_token).map(|((own, members), hs_token)| {
        let service = AppService {
            exchange: exchange.clone(),
            own,
            members,
            url: config.livekit.url.clone(),
        };
        AppServiceRoutes::new(service, hs_token)
    });
    let app = Arc::new(App::new(
        exchange,
        appservice,
        config.livekit.url,
        config.path_prefix,
        config.livekit.keys,
        limits.in_flight,
        Operators {
            serves_metrics: config.metrics == Some(MetricsBind::Main),
            doctor: Arc::new(doctor),
        },
    ));
    Ok(Parts {
        app,
        minter,
        sfu,
        own,
        leaves,
        restored,
        kick: on_leave,
        verified,
    })
}

/// Keys and tokens that are read again while the service runs, and who uses them (decision P19).
struct Reloaded {
    app: Arc<App>,
    minter: Arc<Minter>,
    sfu: Arc<Sfu>,
    own: Option<Arc<OwnHomeserver>>,
    keys: Keys,
    former: FormerKeys,
    tokens: Option<AppServiceConfig>,
}

/// Keys that are in the file no longer, and until when they verify webhooks.
#[derive(Default)]
struct FormerKeys(Vec<(KeyPair, Instant)>);

impl FormerKeys {
    /// Gives `keys`, which are used no longer, their day from now on.
    fn add(&mut self, keys: &Keys, now: Instant) {
        self.0.extend(keys.iter().map(|pair| (pair.clone(), now + FORMER_KEYS_LIFE)));
    }

    /// All keys that verify now: those in use, and those whose day is not over.
    fn with(&mut self, keys: &Keys, now: Instant) -> Keys {
        self.0.retain(|(pair, until)| *until > now && !keys.has(pair));
        keys.with_former(self.0.iter().map(|(pair, _)| pair))
    }

    /// When the next one's day is over.
    fn next_end(&self) -> Option<Instant> {
        self.0.iter().map(|(_, until)| *until).min()
    }
}

impl Reloaded {
    /// Uses what `reload` brings, and forgets former keys when their day is over.
    async fn follow(mut self, mut reload: mpsc::Receiver<Config>) {
        loop {
            let next = self.former.next_end();
            let end = async {
                match next {
                    Some(until) => sleep_until(until).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                config = reload.recv() => match config {
                    Some(config) => {
                        self.use_tokens(config.app_service);
                        self.use_keys(config.livekit.keys);
                    }
                    None => return,
                },
                () = end => self.verify(),
            }
        }
    }

    /// Signs with other keys from now on.
    fn use_keys(&mut self, keys: Keys) {
        if let Err(error) = self.minter.sign_with(keys.signing()) {
            tracing::error!(name: "keys_unusable", reason = error.to_string(), "the keys cannot be used; the former ones go on");
            return;
        }
        self.sfu.forget_tokens();
        self.former.add(&self.keys, Instant::now());
        self.keys = keys;
        self.verify();
        tracing::info!(name: "keys_reloaded",
            key = self.keys.signing().key,
            "the keys were read again: tokens are signed with the first of them"
        );
    }

    fn verify(&mut self) {
        self.app.verify_with(self.former.with(&self.keys, Instant::now()));
    }

    /// Takes other tokens of the registration. There are no former ones: the homeserver reads its own when it is started again.
    fn use_tokens(&mut self, tokens: Option<AppServiceConfig>) {
        let (Some(own), Some(tokens)) = (&self.own, tokens) else { return };
        let is_same = |former: &AppServiceConfig| {
            former.as_token.expose() == tokens.as_token.expose() && former.hs_token.expose() == tokens.hs_token.expose()
        };
        if self.tokens.as_ref().is_some_and(is_same) {
            return;
        }
        own.use_token(tokens.as_token.clone());
        self.app.admit_homeserver_with(tokens.hs_token.clone());
        self.tokens = Some(tokens);
        tracing::info!(name: "registration_reloaded",
            "the registration was read again: its tokens are used from now on; the homeserver must have the same"
        );
        let own = own.clone();
        tokio::spawn(async move { own.check(Duration::ZERO).await });
    }
}

/// Stores that have to be written before the end.
struct Stores {
    leaves: Leaves,
    kick: Option<KickOnLeave>,
    verified: VerifiedHomeservers,
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
    let mut stop = pin!(stop);
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut stop => break,
        };
        if connections.is_full() {
            // Whoever has sent something by now is heard before anybody has to give way.
            yield_now().await;
        }
        if let Some(opened) = connections.open(peer.ip()) {
            tokio::spawn(serve_connection(stream, opened, edge.clone(), graceful.watcher()));
        }
    }
    drop(listener);
    app.stop();
    connections.stop();
    tracing::info!(name: "stopping", grace_seconds = grace.as_secs(), "stopping: requests in flight may finish");
    let deadline = Instant::now() + grace;
    let requests = async {
        if timeout_at(deadline, graceful.shutdown()).await.is_err() {
            tracing::warn!(name: "requests_cut_off", "some requests did not finish in LIVEKIT_SHUTDOWN_GRACE_SECONDS and were cut off");
        }
    };
    tokio::join!(requests, stores.leaves.stop(deadline));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn a_former_key_verifies_for_a_day_however_often_the_files_are_read() {
        let keys = |name: &str| {
            let (key, secret) = (name.to_owned(), Secret::new(name));
            Keys::new(KeyPair { key, secret }, Vec::new())
        };
        let names = |keys: Keys| keys.iter().map(|pair| pair.key.clone()).collect::<Vec<_>>();
        let (mut former, began, hour) = (FormerKeys::default(), Instant::now(), Duration::from_secs(3600));
        former.add(&keys("a"), began);
        assert_eq!(names(former.with(&keys("b"), began)), ["b", "a"]);
        // The same file again, and another one.
        former.add(&keys("b"), began + hour);
        assert_eq!(names(former.with(&keys("b"), began + hour)), ["b", "a"]);
        former.add(&keys("b"), began + hour * 2);
        assert_eq!(names(former.with(&keys("c"), began + hour * 2)), ["c", "a", "b"]);
        assert_eq!(former.next_end(), Some(began + hour * 24));
        assert_eq!(names(former.with(&keys("c"), began + hour * 24)), ["c", "b"]);
        // A key that comes back is in use.
        former.add(&keys("c"), began + hour * 25);
        assert_eq!(names(former.with(&keys("b"), began + hour * 25)), ["b", "c"]);
        assert_eq!(names(former.with(&keys("b"), began + hour * 49)), ["b"]);
        assert_eq!(former.next_end(), None);
    }
}
