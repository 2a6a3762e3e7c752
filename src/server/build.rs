//! Builds every part of the service once, from the bottom up, and gives each what it needs of the configuration.
#![expect(clippy::disallowed_methods, reason = "the wiring: starts what runs")]

use std::sync::Arc;

use hyper_util::client::proxy::matcher::Matcher;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::StartError;
use crate::admission::Class;
use crate::admission::rate_limiter::RateLimiter;
use crate::app_service::{self, AppService};
use crate::backoff::as_millis;
use crate::check::Check;
use crate::clock::unix_seconds;
use crate::config::{Config, DelegatedLeave, MetricsBind, Sharing};
use crate::delayed_leave::Bounds;
use crate::dns::Dns;
use crate::doctor::{self, Arrivals, Doctor, View};
use crate::driver::{self, Leaves};
use crate::exchange::{Exchange, Unlisted};
use crate::federation::{Federation, Guard, Settings};
use crate::fleet::{NodeId, Own};
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::http::{App, AppServiceRoutes, Operators};
use crate::kick::{self, KickOnLeave};
use crate::limits::Limits;
use crate::members::Members;
use crate::openid::OpenId;
use crate::presence;
use crate::sfu::Sfu;
use crate::sfu::webhook::Webhook;
use crate::store::{self, Store, StoreError, StoredJobs, Table, VerifiedHomeservers, token};
use crate::tls::Tls;
use crate::token::{Grants, MintError, Minter};

/// Parts that are used once all are built.
pub(super) struct Parts {
    pub(super) app: Arc<App>,
    pub(super) minter: Arc<Minter>,
    pub(super) sfu: Arc<Sfu>,
    pub(super) own: Option<Arc<OwnHomeserver>>,
    pub(super) restored: StoredJobs,
    pub(super) stores: Stores,
}

/// Stores that have to be written before the end.
pub(super) struct Stores {
    pub(super) leaves: Leaves,
    pub(super) kick: Option<KickOnLeave>,
    pub(super) verified: VerifiedHomeservers,
}

/// Ways to neighbours: by which names, trusting which certificates.
struct Network {
    tls: Arc<Tls>,
    dns: Arc<Dns>,
}

/// Neighbours, each by its adapter.
struct Neighbours {
    federation: Arc<Federation>,
    minter: Arc<Minter>,
    sfu: Arc<Sfu>,
    homeservers: Arc<Homeservers>,
    own: Option<Arc<OwnHomeserver>>,
}

/// Builds all parts. Values, not the configuration, go below this file.
pub(super) async fn build(config: &mut Config, limits: &Limits) -> Result<Parts, StartError> {
    let network = Network {
        tls: Arc::new(Tls::new(config.skip_tls_verification, config.certificates.clone())),
        dns: Arc::new(Dns::new(&config.dns_servers)),
    };
    let store = store_of(&config.delegated_leave, &network).await?;
    let mut jobs = store.with(Table::Jobs);
    let fleet = fleet(config, &mut jobs).await?;
    let (federation, verified) = federation(config, limits, &network, &store);
    let (minter, sfu) = sfu(config, &network)?;
    if fleet.is_some() {
        // What ended a room may have been told to another replica.
        sfu.remember_nothing();
    }
    let homeservers = Arc::new(Homeservers::new(federation.clone(), config.cs_api_overrides.clone()));
    let own = config.app_service.clone();
    let own = own.map(|own| Arc::new(OwnHomeserver::new(homeservers.clone(), own.server_name, own.as_token)));
    let neighbours = Neighbours {
        federation,
        minter,
        sfu,
        homeservers,
        own,
    };
    let (jobs, restored) = store::Jobs::start(jobs);
    let leaves = leaves(config, limits, &neighbours, jobs, fleet);
    let kick = kick_on_leave(config, limits, &neighbours, &store, &leaves);
    let arrivals = Arc::new(Arrivals::default());
    share_fleet(&leaves, &neighbours, kick.clone(), store.with(Table::Jobs), arrivals.clone());
    let doctor = doctor(config, &neighbours, store, &leaves, arrivals);
    let app = app(config, limits, &neighbours, &leaves, kick.clone(), doctor);
    let Neighbours { minter, sfu, own, .. } = neighbours;
    Ok(Parts {
        app,
        minter,
        sfu,
        own,
        restored,
        stores: Stores { leaves, kick, verified },
    })
}

async fn store_of(settings: &DelegatedLeave, network: &Network) -> Result<Store, StoreError> {
    match (&settings.redis, &settings.state_path) {
        (Some(redis), _) => Ok(Store::redis(redis.clone(), network.tls.clone(), network.dns.clone())),
        (None, Some(path)) => Store::file(path).await,
        (None, None) => Ok(Store::memory()),
    }
}

/// Joins the replicas on one Redis, where several share it. Those that serve another SFU, or another homeserver, must not watch each
/// other's leaves.
async fn fleet(config: &mut Config, jobs: &mut Store) -> Result<Option<driver::fleet::Settings>, StartError> {
    let sharing = &mut config.delegated_leave.sharing;
    if *sharing == Sharing::No {
        return Ok(None);
    }
    let mut shared = jobs.with(Table::Jobs);
    let Some(store) = shared.share() else { return Ok(None) };
    match store.shared.check().await.map_err(StartError::Shared) {
        Ok(()) => *jobs = shared,
        Err(error) if *sharing == Sharing::May => {
            tracing::error!(name: "not_shared",
                "{error}. LIVEKIT_JWT_REPLICA_IP is set: this replica goes on as if it were alone, and has to be, until it has that"
            );
            *sharing = Sharing::No;
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let livekit = app_service::normal(&config.livekit.url).map_or_else(|| config.livekit.url.clone(), String::from);
    let own = config.app_service.as_ref().map(|own| own.server_name.as_str());
    let digest = Sha256::digest(format!("{livekit} {}", own.unwrap_or_default()).as_bytes());
    let own = Own {
        node: NodeId(rand::random()),
        fingerprint: digest.first_chunk().copied().map_or(0, u64::from_le_bytes),
        host: std::env::var("HOSTNAME")
            .unwrap_or_default()
            .chars()
            .take(64)
            .collect::<String>()
            .into(),
    };
    Ok(Some(driver::fleet::Settings { own, store }))
}

/// Has all parts told of what other replicas were told, and the tokens read where this one watches.
fn share_fleet(leaves: &Leaves, neighbours: &Neighbours, kick: Option<KickOnLeave>, store: Store, arrivals: Arc<Arrivals>) {
    let (sfu, told) = (neighbours.sfu.clone(), kick.clone());
    let on_webhook = move |webhook: &Webhook| {
        if let Some(room) = &webhook.room {
            arrivals.told_of(&room.name);
        }
        sfu.handle_webhook(webhook);
        if let Some(kick) = &told {
            kick.handle_webhook(webhook);
        }
    };
    let reading = parking_lot::Mutex::new(None::<tokio::task::JoinHandle<()>>);
    let on_watch = move || {
        let mut reading = reading.lock();
        // One at a time: while Redis is away it waits.
        let is_reading = reading.as_ref().is_some_and(|reading| !reading.is_finished());
        if let Some(kick) = kick.as_ref().filter(|_| !is_reading) {
            let (queue, restored) = token::Queue::start(&store);
            *reading = Some(kick.restore(restored.once()));
            // It was made to read, and has nothing to write.
            tokio::spawn(async move { queue.stop(Instant::now()).await });
        }
    };
    leaves.share_fleet(Box::new(on_webhook), Box::new(on_watch));
}

/// The way to homeservers, which knows those again that verified a token before the start.
fn federation(config: &Config, limits: &Limits, network: &Network, store: &Store) -> (Arc<Federation>, VerifiedHomeservers) {
    let (verified, mut already_verified) = VerifiedHomeservers::start(store, unix_seconds());
    let own = config.app_service.as_ref().map(|own| &own.server_name);
    let settings = Settings {
        guard: Guard {
            allowed_networks: config.allowed_networks.clone(),
            lab: config.skip_tls_verification,
        },
        overrides: config.federation_overrides.clone(),
        listed: config.full_access.clone(),
        also_listed: own.into_iter().chain(config.cs_api_overrides.keys()).cloned().collect(),
        proxies: Matcher::from_env(),
        connections_out: u32::try_from(limits.connections_out).unwrap_or(u32::MAX),
        remember: Box::new({
            let verified = verified.clone();
            move |host, at| match at {
                Some(at) => verified.remember(host, at),
                None => verified.forget(host),
            }
        }),
    };
    let federation = Arc::new(Federation::new(settings, network.dns.clone(), network.tls.clone()));
    tokio::spawn({
        let federation = federation.clone();
        async move {
            while let Some((host, at)) = already_verified.next().await {
                federation.restore(&host, at);
            }
        }
    });
    (federation, verified)
}

/// The SFU, and who signs tokens for it.
fn sfu(config: &Config, network: &Network) -> Result<(Arc<Minter>, Arc<Sfu>), MintError> {
    let grants = Grants {
        can_update_own_metadata: config.can_update_own_metadata,
        publish_sources: config.publish_sources.clone(),
    };
    let minter = Arc::new(Minter::new(config.livekit.keys.signing(), config.jwt_ttl, grants)?);
    let sfu = Sfu::new(
        &config.livekit.api_base,
        config.max_participants,
        minter.clone(),
        network.tls.clone(),
        network.dns.clone(),
    );
    Ok((minter, Arc::new(sfu)))
}

/// The watch over delegated leaves.
fn leaves(config: &Config, limits: &Limits, neighbours: &Neighbours, store: store::Jobs, fleet: Option<driver::fleet::Settings>) -> Leaves {
    Leaves::new(driver::Settings {
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
        sfu: neighbours.sfu.clone(),
        homeservers: neighbours.homeservers.clone(),
        own: neighbours.own.clone(),
        store,
        listed: is_listed(neighbours),
        fleet,
    })
}

/// Whether the operator listed a homeserver.
fn is_listed(neighbours: &Neighbours) -> Box<dyn Fn(&str) -> bool + Send + Sync> {
    let homeservers = neighbours.homeservers.clone();
    Box::new(move |server| homeservers.class(server) == Class::Listed)
}

/// The watch over memberships, where they are watched; it has the leaves' lists of participants.
fn kick_on_leave(config: &Config, limits: &Limits, neighbours: &Neighbours, store: &Store, leaves: &Leaves) -> Option<KickOnLeave> {
    let (own, interval) = neighbours.own.clone().zip(config.membership.check_interval)?;
    let is_shared = config.delegated_leave.sharing != Sharing::No;
    let (tokens, restored) = if is_shared {
        token::Queue::start_shared(store)
    } else {
        token::Queue::start(store)
    };
    let overrides = config.cs_api_overrides.keys().chain(config.federation_overrides.keys());
    let is_another_listed = config.full_access.entries().chain(overrides).any(|name| name != own.name());
    let kick = KickOnLeave::new(kick::Settings {
        own,
        sfu: neighbours.sfu.clone(),
        store: tokens,
        interval,
        max_tokens: limits.tokens,
        is_listed: is_another_listed.then(|| is_listed(neighbours)),
        is_ours: Box::new({
            let leaves = leaves.clone();
            move || leaves.watches_all()
        }),
        end_delegated_leave: Box::new({
            let leaves = leaves.clone();
            move |room, identity| leaves.kicked(room, identity)
        }),
    });
    // Where several replicas share them, the tokens are the watcher's business.
    if !is_shared {
        drop(kick.restore(restored));
    }
    leaves.share_lists(Box::new({
        let kick = kick.clone();
        move |room, identities, asked| kick.handle_list(room, identities, asked)
    }));
    Some(kick)
}

/// The part that examines all others.
fn doctor(config: &Config, neighbours: &Neighbours, store: Store, leaves: &Leaves, arrivals: Arc<Arrivals>) -> Doctor {
    let context = doctor::Context {
        view: View::Inside,
        federation: neighbours.federation.clone(),
        sfu: Some(neighbours.sfu.clone()),
        own: neighbours.own.clone(),
        store: Some(store),
        // Where one of several replicas watches, the others know of no leave.
        knows: if config.delegated_leave.sharing == Sharing::No {
            let leaves = leaves.clone();
            Some(Box::new(move |room, identity| leaves.knows(room, identity)))
        } else {
            None
        },
        fleet: Some(Box::new({
            let leaves = leaves.clone();
            move || leaves.fleet()
        })),
        arrivals: Some(arrivals.clone()),
        settings: doctor::Settings::of(config),
    };
    Doctor::new(context, arrivals, config.dev)
}

/// The pipeline, with the routes around it.
fn app(config: &Config, limits: &Limits, neighbours: &Neighbours, leaves: &Leaves, kick: Option<KickOnLeave>, doctor: Doctor) -> Arc<App> {
    let members = neighbours.own.clone().map(|own| Arc::new(Members::new(own)));
    let exchange = Arc::new(Exchange {
        openid: OpenId::new(neighbours.federation.clone()),
        policy: config.policy(),
        rates: RateLimiter::new(config.rates),
        sfu: neighbours.sfu.clone(),
        leaves: leaves.clone(),
        minter: neighbours.minter.clone(),
        members: members.clone().filter(|_| config.membership.required),
        kick,
        unlisted: Unlisted::default(),
    });
    let behind_the_homeserver = neighbours.own.clone().zip(members).zip(config.app_service.as_ref());
    let appservice = behind_the_homeserver.map(|((own, members), settings)| {
        let service = AppService {
            exchange: exchange.clone(),
            own,
            members,
            url: config.livekit.url.clone(),
        };
        AppServiceRoutes::new(service, settings.hs_token.clone())
    });
    Arc::new(App::new(
        exchange,
        appservice,
        config.livekit.url.clone(),
        config.path_prefix.clone(),
        config.livekit.keys.clone(),
        limits.in_flight,
        Operators {
            serves_metrics: config.metrics == Some(MetricsBind::Main),
            doctor: Arc::new(doctor),
            check_page: config.check_page,
            check: Arc::new(Check::new(neighbours.sfu.clone(), config.dev)),
        },
    ))
}
