//! Configuration: every variable of the service, its default, its check and its line of `--help`.
//!
//! A pure function of a lookup and a file reader: no global, no exit, no log. All mistakes of a start are reported at once
//! (decision P9), each by the name of its variable and what to do; no message holds a secret.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use url::Url;

use crate::access::{Homeservers, HostPattern, Policy, Source};
use crate::admission::rates::Rates;
use crate::bind::Bind;
use crate::server_name::ServerName;
use crate::tls;

mod app_service;
mod check_page;
mod files;
mod keys;
mod listen;
mod lists;
mod livekit;
mod log;
mod outgoing;
mod policy;
mod reader;
mod redis;
mod summary;
pub(crate) mod unexpanded;
mod unknown;
mod variables;

pub use app_service::{AppServiceConfig, Membership};
pub use check_page::CheckPage;
pub use listen::MetricsBind;
pub use livekit::Livekit;
pub use log::{LogFormat, LogSettings, LogUsers, format as log_format};
pub use reader::{ConfigErrors, Sources};
pub use redis::{Redis, RedisAddress, RedisTls, Sharing};
pub use variables::{VARIABLES, Variable};

pub(crate) use files::read as read_file;
pub(crate) use reader::shown;
use reader::{Above, Reader};
pub(crate) use unknown::changes;

/// The whole configuration, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub bind: Bind,
    /// Below which path every route answers too, as `/livekit/jwt`.
    pub path_prefix: Option<String>,
    /// Where metrics are served, if at all.
    pub metrics: Option<MetricsBind>,
    /// Extent of the page for users whose call does not work.
    pub check_page: CheckPage,
    /// How often a neighbour that fails is looked at.
    pub check_interval: Duration,
    /// How long open requests may take after SIGTERM.
    pub shutdown_grace: Duration,
    /// LiveKit and its keys.
    pub livekit: Livekit,
    /// Homeservers whose users may create rooms.
    pub full_access: Homeservers,
    /// Homeservers without full access whose users may publish all the same.
    pub remote_can_publish: Homeservers,
    /// Homeservers that are dealt with: our own and those with full access are among them.
    pub allowed: Homeservers<HostPattern>,
    /// Homeservers that are not dealt with.
    pub blocked: Homeservers<HostPattern>,
    /// How often users and homeservers may ask.
    pub rates: Rates,
    /// Kinds of tracks that may be published.
    pub publish_sources: Vec<Source>,
    /// How many may be in a room that the service opens; 0 is as many as LiveKit takes.
    pub max_participants: u32,
    /// Lifetime of the LiveKit tokens (decision T3).
    pub jwt_ttl: Duration,
    /// Whether users may change their own metadata on the SFU.
    pub can_update_own_metadata: bool,
    /// Whether no certificate is checked.
    pub skip_tls_verification: bool,
    /// Where the operator says that CA certificates are.
    pub certificates: tls::Given,
    /// Where to reach the federation API of these homeservers.
    pub federation_overrides: BTreeMap<ServerName, Url>,
    /// Where to reach the client-server API of these homeservers.
    pub cs_api_overrides: BTreeMap<ServerName, Url>,
    /// Private networks in which homeservers may be that nobody listed.
    pub allowed_networks: Vec<IpNet>,
    /// DNS servers to ask instead of the system's; empty means the system's.
    pub dns_servers: Vec<SocketAddr>,
    /// Level and format of the log.
    pub log: LogSettings,
    /// Settings of delegated leave.
    pub delegated_leave: DelegatedLeave,
    /// The homeserver that this service belongs to, if any.
    pub app_service: Option<AppServiceConfig>,
    /// Whether and how often memberships are checked.
    pub membership: Membership,
    /// Whether what is unset has the values of `livekit-server --dev`, which everybody knows.
    pub dev: bool,
}

/// Settings of delegated leave.
#[derive(Clone, Debug)]
pub struct DelegatedLeave {
    /// The Redis that keeps the jobs.
    pub redis: Option<Redis>,
    /// Whether several replicas share it.
    pub sharing: Sharing,
    /// The directory that keeps the jobs.
    pub state_path: Option<PathBuf>,
    /// How often LiveKit is asked who is still there (decision L3); `None` is off.
    pub sanity_check_interval: Option<Duration>,
    /// How often LiveKit is asked which rooms it has (decision L13); `None` is off.
    pub room_watch_interval: Option<Duration>,
}

impl Config {
    /// Reads the environment and the files that it names, as [`Config::from_sources`] does.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn from_environment(dev: bool) -> Result<(Self, Vec<String>), ConfigErrors> {
        let names: Vec<String> = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
        let sources = Sources {
            get: &environment,
            names: &names,
            read_file: &files::read,
            has_certificates: &tls::holds_certificates,
        };
        Self::from_sources(sources, dev)
    }

    /// The configuration, and the warnings to log about it.
    ///
    /// `dev` fills what is unset with the values of `livekit-server --dev` (decision P13).
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn from_sources(sources: Sources<'_>, dev: bool) -> Result<(Self, Vec<String>), ConfigErrors> {
        let mut reader = Reader::new(sources, dev);
        let config = read(&mut reader);
        reader.finish(config)
    }

    /// Rights of the users of each homeserver.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            allowed: self.allowed.clone(),
            blocked: self.blocked.clone(),
            full_access: self.full_access.clone(),
            remote_can_publish: self.remote_can_publish.clone(),
            own: self.app_service.as_ref().map(|own| own.server_name.clone()),
        }
    }
}

/// Where to listen, by the same variables and rules: for the healthcheck, which needs nothing else.
///
/// # Errors
/// When these variables are wrong.
pub fn bind(get: &dyn Fn(&str) -> Option<String>) -> Result<Bind, ConfigErrors> {
    let mut reader = Reader::new(Sources::variables(get), false);
    let bind = listen::bind(&mut reader);
    reader.finish(Some(bind)).map(|(bind, _)| bind)
}

/// A variable of this process. What is not UTF-8 is kept with replacement characters, for the checks to refuse: it is not unset.
#[must_use]
pub fn environment(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// Reads all variables; `None` only if a mistake was recorded.
fn read(reader: &mut Reader<'_>) -> Option<Config> {
    if reader.dev {
        reader.warn("--dev fills unset variables with the values of `livekit-server --dev`, which everybody knows: not for production");
    }
    outgoing::proxies(reader);
    let certificates = outgoing::certificates(reader);
    unknown::warn(reader);
    let livekit = livekit::livekit(reader);
    let app_service = app_service::app_service(reader);
    let full_access = lists::full_access(reader, app_service.as_ref().map(|own| &own.server_name));
    let (allowed, blocked) = lists::admitted(reader, &full_access, app_service.as_ref().map(|own| &own.server_name));
    let alone = app_service.as_ref().is_some_and(|own| full_access.is_only(&own.server_name));
    let config = Config {
        full_access,
        remote_can_publish: lists::remote_can_publish(reader),
        allowed,
        blocked,
        rates: policy::rates(reader),
        publish_sources: policy::publish_sources(reader),
        max_participants: policy::max_participants(reader),
        jwt_ttl: reader.seconds("LIVEKIT_JWT_TTL_SECONDS", 3600, 60..=86_400, Above::Refuse),
        can_update_own_metadata: can_update_own_metadata(reader),
        bind: listen::bind(reader),
        path_prefix: listen::path_prefix(reader),
        metrics: listen::metrics(reader),
        check_page: check_page::check_page(reader),
        check_interval: reader.seconds("LIVEKIT_NEIGHBOUR_CHECK_INTERVAL_SECONDS", 60, 1..=3600, Above::Refuse),
        shutdown_grace: reader.seconds("LIVEKIT_SHUTDOWN_GRACE_SECONDS", 10, 0..=3600, Above::Refuse),
        skip_tls_verification: skip_tls_verification(reader),
        certificates,
        federation_overrides: lists::overrides(reader, "LIVEKIT_FEDERATION_URL_OVERRIDES"),
        cs_api_overrides: lists::overrides(reader, "LIVEKIT_CS_API_URL_OVERRIDES"),
        allowed_networks: lists::networks(reader, "LIVEKIT_FEDERATION_ALLOWED_NETWORKS"),
        dns_servers: lists::dns_servers(reader, "LIVEKIT_DNS_SERVERS"),
        log: log::log(reader),
        delegated_leave: DelegatedLeave {
            redis: redis::redis(reader),
            sharing: redis::sharing(reader),
            state_path: state_path(reader),
            sanity_check_interval: reader.interval("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", 30),
            room_watch_interval: reader.interval("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS", 30),
        },
        membership: app_service::membership(reader, alone),
        dev: reader.dev,
        app_service,
        // Last, so that all others have been read.
        livekit: livekit?,
    };
    for contradiction in config.policy().contradictions() {
        reader.warn(contradiction);
    }
    Some(config)
}

/// Reads where the state file is, and warns where Redis makes it useless.
fn state_path(reader: &mut Reader<'_>) -> Option<PathBuf> {
    const VARIABLE: &str = "LIVEKIT_STATE_PATH";
    let path = reader.value(VARIABLE)?;
    if reader.value("LIVEKIT_REDIS_URL").is_some() {
        reader.warn(format!(
            "LIVEKIT_REDIS_URL is set, so {VARIABLE} is ignored, and what is stored there is not read: unset one of them"
        ));
    }
    Some(path.into())
}

/// Withholds the right on anything but a yes, as the old service did (decision T2).
fn can_update_own_metadata(reader: &mut Reader<'_>) -> bool {
    const VARIABLE: &str = "LIVEKIT_CAN_UPDATE_OWN_METADATA";
    match reader.switch(VARIABLE) {
        Some(Ok(granted)) => granted,
        Some(Err(value)) => {
            reader.warn(format!("{VARIABLE} must be true or false, not {}: false is used", shown(&value)));
            false
        }
        None => true,
    }
}

/// Only the exact words switch it off (decision P10).
fn skip_tls_verification(reader: &mut Reader<'_>) -> bool {
    const VARIABLE: &str = "LIVEKIT_INSECURE_SKIP_VERIFY_TLS";
    const WORDS: &str = "YES_I_KNOW_WHAT_I_AM_DOING";
    match reader.value(VARIABLE) {
        Some(value) if value == WORDS => {
            reader.warn(format!(
                "!!! {VARIABLE} is on: no TLS certificate is checked, neither of homeservers nor of LiveKit. Anybody on the way can \
                 pose as any of them. Never use it in production !!!"
            ));
            true
        }
        Some(_) => {
            reader.warn(format!(
                "{VARIABLE} is ignored, and certificates are checked: only the exact value {WORDS} switches that off"
            ));
            false
        }
        None => false,
    }
}

#[cfg(test)]
mod tests;
