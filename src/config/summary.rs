//! Sums up the settings that the service runs with, in one line (decision P21). It holds no secret, and of URLs neither password
//! nor query.

use std::fmt::{self, Display};
use std::time::Duration;

use super::{Config, DelegatedLeave, MetricsBind, Sharing};
use crate::access::{Homeservers, Source};
use crate::admission::rates::Rate;
use crate::secret::KeyPair;

/// More of a list than this is counted.
const MAX_ITEMS: usize = 10;

/// A configuration as the log tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The address of LiveKit that clients get.
    pub livekit_url: String,
    /// The address at which this service reaches LiveKit.
    pub livekit_api: String,
    /// Where jobs and tokens are kept.
    pub store: String,
    /// Homeservers whose users open rooms.
    pub full_access: String,
    /// Other homeservers whose users may publish.
    pub remote_can_publish: String,
    /// Homeservers that are dealt with.
    pub allowed: String,
    /// Homeservers that are not dealt with.
    pub blocked: String,
    /// Requests a minute of each user and of each homeserver that is not listed.
    pub rate_limits: String,
    /// Kinds of tracks that may be published.
    pub publish_sources: String,
    /// Participants of a room that is opened here.
    pub max_participants: String,
    /// Whether it works beside a homeserver, and which.
    pub mode: String,
    /// Whether tokens are for members, and how often that is looked at.
    pub membership: String,
    /// The path below which every route answers too.
    pub path_prefix: String,
    /// Homeservers whose federation API is where the operator says.
    pub federation_overrides: String,
    /// Homeservers whose client-server API is where the operator says.
    pub cs_api_overrides: String,
    /// Private networks in which strangers' homeservers may be.
    pub allowed_networks: String,
    /// Servers that DNS questions go to.
    pub dns_servers: String,
    /// Lifetime of tokens in seconds.
    pub jwt_ttl_seconds: u64,
    /// How often the SFU is asked for participants and for rooms.
    pub sfu_checks: String,
    /// Whether certificates are checked.
    pub tls_verification: bool,
    /// Where it listens.
    pub bind: String,
    /// Where metrics are served.
    pub metrics: String,
    /// Extent of the page for users.
    pub check_page: String,
    /// The API key that signs, and how many more verify webhooks.
    pub livekit_key: String,
    /// How users, rooms and clients are shown in the log.
    pub log_users: String,
}

impl Config {
    /// Makes the part of the log line that tells about this configuration.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let DelegatedLeave {
            redis,
            sharing,
            state_path,
            sanity_check_interval,
            room_watch_interval,
        } = &self.delegated_leave;
        let store = match (redis, state_path) {
            (Some(redis), _) if *sharing != Sharing::No => format!("{}, shared by several replicas", redis.address()),
            (Some(redis), _) => redis.address().to_string(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "memory".to_owned(),
        };
        let own = self.app_service.as_ref().map(|own| &own.server_name);
        let membership = match (own, self.membership.check_interval) {
            (None, _) => "not checked".to_owned(),
            (Some(_), interval) => {
                let who = if self.membership.required {
                    "required everywhere"
                } else {
                    "required behind the homeserver"
                };
                format!("{who}, participants checked: {}", every(interval))
            }
        };
        Summary {
            livekit_url: self.livekit.shown_url(),
            livekit_api: self.livekit.api_base.to_string(),
            store,
            full_access: homeservers(&self.full_access),
            remote_can_publish: homeservers(&self.remote_can_publish),
            allowed: homeservers(&self.allowed),
            blocked: homeservers(&self.blocked),
            rate_limits: format!(
                "users {}, homeservers {}",
                a_minute(self.rates.user),
                a_minute(self.rates.homeserver)
            ),
            publish_sources: match self.publish_sources.len() {
                all if all == Source::ALL.len() => "all".to_owned(),
                _ => list(self.publish_sources.iter().map(|source| source.word())),
            },
            max_participants: match self.max_participants {
                0 => "no limit".to_owned(),
                most => most.to_string(),
            },
            mode: own.map_or_else(|| "standalone".to_owned(), |own| format!("application service of {own}")),
            membership,
            path_prefix: self.path_prefix.clone().unwrap_or_else(|| "none".to_owned()),
            federation_overrides: list(self.federation_overrides.iter().map(|(name, url)| format!("{name}={url}"))),
            cs_api_overrides: list(self.cs_api_overrides.iter().map(|(name, url)| format!("{name}={url}"))),
            allowed_networks: list(&self.allowed_networks),
            dns_servers: if self.dns_servers.is_empty() {
                "the system's".to_owned()
            } else {
                list(&self.dns_servers)
            },
            jwt_ttl_seconds: self.jwt_ttl.as_secs(),
            sfu_checks: format!(
                "participants {}, rooms {}",
                every(*sanity_check_interval),
                every(*room_watch_interval)
            ),
            tls_verification: !self.skip_tls_verification,
            bind: self.bind.to_string(),
            check_page: self.check_page.word().to_owned(),
            metrics: match &self.metrics {
                None => "off".to_owned(),
                Some(MetricsBind::Main) => "main".to_owned(),
                Some(MetricsBind::At(bind)) => bind.to_string(),
            },
            livekit_key: list(self.livekit.keys.iter().map(KeyPair::shown_key)),
            log_users: format!("{:?}", self.log.users).to_ascii_lowercase(),
        }
    }
}

impl Summary {
    /// Writes the line.
    pub fn log(&self) {
        tracing::info!(name: "running_with",
            version = env!("CARGO_PKG_VERSION"),
            livekit_url = self.livekit_url,
            livekit_api = self.livekit_api,
            store = self.store,
            full_access = self.full_access,
            remote_can_publish = self.remote_can_publish,
            allowed = self.allowed,
            blocked = self.blocked,
            rate_limits = self.rate_limits,
            publish_sources = self.publish_sources,
            max_participants = self.max_participants,
            mode = self.mode,
            membership = self.membership,
            path_prefix = self.path_prefix,
            federation_overrides = self.federation_overrides,
            cs_api_overrides = self.cs_api_overrides,
            allowed_networks = self.allowed_networks,
            dns_servers = self.dns_servers,
            jwt_ttl_seconds = self.jwt_ttl_seconds,
            sfu_checks = self.sfu_checks,
            tls_verification = self.tls_verification,
            metrics = self.metrics,
            check_page = self.check_page,
            log_users = self.log_users,
            "running with"
        );
    }
}

/// The effective configuration as rows for people, one setting each.
impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: [(&str, &dyn Display); 25] = [
            ("livekit_url", &self.livekit_url),
            ("livekit_api", &self.livekit_api),
            ("livekit_key", &self.livekit_key),
            ("bind", &self.bind),
            ("path_prefix", &self.path_prefix),
            ("metrics", &self.metrics),
            ("check_page", &self.check_page),
            ("full_access", &self.full_access),
            ("remote_can_publish", &self.remote_can_publish),
            ("allowed", &self.allowed),
            ("blocked", &self.blocked),
            ("rate_limits", &self.rate_limits),
            ("publish_sources", &self.publish_sources),
            ("max_participants", &self.max_participants),
            ("mode", &self.mode),
            ("membership", &self.membership),
            ("store", &self.store),
            ("federation_overrides", &self.federation_overrides),
            ("cs_api_overrides", &self.cs_api_overrides),
            ("allowed_networks", &self.allowed_networks),
            ("dns_servers", &self.dns_servers),
            ("jwt_ttl_seconds", &self.jwt_ttl_seconds),
            ("sfu_checks", &self.sfu_checks),
            ("tls_verification", &self.tls_verification),
            ("log_users", &self.log_users),
        ];
        rows.iter().try_for_each(|(name, value)| writeln!(f, "{name:<21} {value}"))
    }
}

fn every(interval: Option<Duration>) -> String {
    interval.map_or_else(|| "off".to_owned(), |interval| format!("every {} s", interval.as_secs()))
}

fn a_minute(rate: Option<Rate>) -> String {
    rate.map_or_else(|| "off".to_owned(), |Rate(number)| format!("{number} a minute"))
}

fn homeservers<E: Display>(homeservers: &Homeservers<E>) -> String {
    match homeservers {
        Homeservers::All => "*".to_owned(),
        Homeservers::Listed(names) => list(names),
    }
}

/// The first ones and how many more there are.
fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut items = items.into_iter();
    let mut text = String::new();
    for item in items.by_ref().take(MAX_ITEMS) {
        let separator = if text.is_empty() { "" } else { ", " };
        text = format!("{text}{separator}{item}");
    }
    match (text.is_empty(), items.count()) {
        (true, _) => "none".to_owned(),
        (false, 0) => text,
        (false, more) => format!("{text} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut() {
        assert_eq!(list(Vec::<u8>::new()), "none");
        assert_eq!(list([1, 2]), "1, 2");
        assert_eq!(list(0..10), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9");
        assert_eq!(list(0..1000), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more");
    }
}
