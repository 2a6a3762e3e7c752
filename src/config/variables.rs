//! The table of all variables: what `--help` prints. A test holds it against what the parser reads.

/// An environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Name of the variable.
    pub name: &'static str,
    /// Value that holds when the variable is unset; empty where nothing does.
    pub default: &'static str,
    /// Meaning of the variable, in one line.
    pub doc: &'static str,
}

const fn variable(name: &'static str, default: &'static str, doc: &'static str) -> Variable {
    Variable { name, default, doc }
}

/// Every variable of the service, in the order of `--help`.
pub const VARIABLES: &[Variable] = &[
    variable(
        "LIVEKIT_URL",
        "required",
        "Address of LiveKit that clients get, e.g. wss://livekit.example.com",
    ),
    variable(
        "LIVEKIT_API_URL",
        "LIVEKIT_URL",
        "Address at which this service reaches LiveKit's API, where it is another one",
    ),
    variable("LIVEKIT_KEY", "required", "API key of LiveKit (LIVEKIT_API_KEY is accepted too)"),
    variable(
        "LIVEKIT_SECRET",
        "required",
        "Secret of that key (LIVEKIT_API_SECRET is accepted too)",
    ),
    variable("LIVEKIT_KEY_FROM_FILE", "", "File that holds the API key"),
    variable("LIVEKIT_SECRET_FROM_FILE", "", "File that holds the secret"),
    variable(
        "LIVEKIT_KEY_FILE",
        "",
        "LiveKit's own keys file, `key: secret` lines: the first signs, all verify webhooks",
    ),
    variable("LIVEKIT_API_KEY", "", "LiveKit's name for LIVEKIT_KEY"),
    variable("LIVEKIT_API_SECRET", "", "LiveKit's name for LIVEKIT_SECRET"),
    variable(
        "LIVEKIT_KEYS",
        "",
        "livekit-server's own variable, `key: secret`: used where nothing else names a key or a secret",
    ),
    variable(
        "LIVEKIT_FULL_ACCESS_HOMESERVERS",
        "*",
        "Homeservers whose users may create rooms, by comma or space; * is all, blank is an error",
    ),
    variable(
        "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS",
        "*",
        "Other homeservers whose users may publish audio and video, by comma or space",
    ),
    variable(
        "LIVEKIT_ALLOWED_HOMESERVERS",
        "*",
        "The only homeservers that are dealt with, names and *.patterns; those with full access always are; blank is an error",
    ),
    variable(
        "LIVEKIT_BLOCKED_HOMESERVERS",
        "",
        "Homeservers that are not dealt with, names and *.patterns, wherever else they are listed; blank is an error",
    ),
    variable(
        "LIVEKIT_RATE_LIMIT_USER",
        "60",
        "Requests a minute of each user, as many at once; more are delayed, then refused; off is no limit",
    ),
    variable(
        "LIVEKIT_RATE_LIMIT_HOMESERVER",
        "off",
        "Requests a minute of all users of a homeserver that is not listed, in the same way",
    ),
    variable(
        "LIVEKIT_PUBLISH_SOURCES",
        "all",
        "Tracks that may be published: camera, microphone, screen_share, screen_share_audio, by comma or space",
    ),
    variable(
        "LIVEKIT_MAX_PARTICIPANTS",
        "",
        "Participants of a room that this service opens; one that stands keeps its number",
    ),
    variable("LIVEKIT_JWT_TTL_SECONDS", "3600", "Lifetime of the LiveKit tokens, 60 to 86400"),
    variable(
        "LIVEKIT_CAN_UPDATE_OWN_METADATA",
        "true",
        "Whether users may change their metadata on the SFU",
    ),
    variable("LIVEKIT_JWT_BIND", ":8080", "Address to listen on: :port, host:port or [IPv6]:port"),
    variable(
        "LIVEKIT_JWT_PATH_PREFIX",
        "/livekit/jwt",
        "Every route also answers below this path; / for none",
    ),
    variable(
        "LIVEKIT_METRICS_BIND",
        "off",
        "Where Prometheus finds /metrics: an address such as 127.0.0.1:9091, or main for the main port",
    ),
    variable(
        "LIVEKIT_CHECK_PAGE",
        "basic",
        "The page /check for users: off, basic (what any visitor sees), or on (media too, with a ticket of doctor --link)",
    ),
    variable(
        "LIVEKIT_SHUTDOWN_GRACE_SECONDS",
        "10",
        "How long open requests may take after SIGTERM, at most 3600",
    ),
    variable(
        "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
        "",
        "YES_I_KNOW_WHAT_I_AM_DOING switches off the check of all certificates; for laboratories",
    ),
    variable(
        "LIVEKIT_FEDERATION_URL_OVERRIDES",
        "",
        "server=https://host:port, by comma: where to reach these homeservers",
    ),
    variable(
        "LIVEKIT_CS_API_URL_OVERRIDES",
        "",
        "server=https://host:port, by comma: their client-server API",
    ),
    variable(
        "LIVEKIT_FEDERATION_ALLOWED_NETWORKS",
        "",
        "Private networks in which unlisted homeservers may be, as 10.1.0.0/16, by comma or space",
    ),
    variable(
        "LIVEKIT_DNS_SERVERS",
        "resolv.conf",
        "DNS servers to ask instead, as 10.0.0.53 or 10.0.0.53:5353, by comma or space",
    ),
    variable("LIVEKIT_LOG_LEVEL", "info", "error, warn, info, debug or trace"),
    variable("LIVEKIT_LOG_FORMAT", "text", "text or json"),
    variable(
        "LIVEKIT_LOG_USERS",
        "full",
        "Users, rooms and clients in the log: full, hash (pseudonyms that stay) or none",
    ),
    variable(
        "RUST_LOG",
        "",
        "Levels of single modules, e.g. lk_jwt_service::federation=debug; a bare level counts if LIVEKIT_LOG_LEVEL is unset",
    ),
    variable(
        "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS",
        "30",
        "How often LiveKit is asked who is still there; 0 is off",
    ),
    variable(
        "LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS",
        "30",
        "How often LiveKit is asked which rooms it has; 0 is off",
    ),
    variable(
        "LIVEKIT_NEIGHBOUR_CHECK_INTERVAL_SECONDS",
        "60",
        "How often a neighbour that fails is looked at, 1 to 3600; one that answers, a tenth as often",
    ),
    variable(
        "LIVEKIT_REDIS_URL",
        "",
        "Redis that keeps what a restart must not lose: redis(s)://, valkey(s)://, redis+sentinel://s1/name, redis+cluster://h1",
    ),
    variable("LIVEKIT_REDIS_PASSWORD", "", "Its password, instead of one in the URL"),
    variable(
        "LIVEKIT_REDIS_SHARED",
        "false",
        "Whether several replicas share that Redis: each serves, one watches",
    ),
    variable(
        "LIVEKIT_JWT_REPLICA_IP",
        "",
        "Set by charts for several replicas: beside a Redis that lets them share it, LIVEKIT_REDIS_SHARED is then true",
    ),
    variable(
        "LIVEKIT_STATE_PATH",
        "",
        "File, or directory for it, that keeps what a restart must not lose, instead of Redis",
    ),
    variable(
        "LIVEKIT_HS_SERVER_NAME",
        "",
        "Application-service mode: our homeserver; then the default of LIVEKIT_FULL_ACCESS_HOMESERVERS, too",
    ),
    variable("LIVEKIT_AS_REGISTRATION_FILE", "", "Its registration file, which holds both tokens"),
    variable("LIVEKIT_AS_TOKEN", "", "Without that file: the token that this service sends"),
    variable("LIVEKIT_HS_TOKEN", "", "Without that file: the token that the homeserver sends"),
    variable(
        "LIVEKIT_REQUIRE_MEMBERSHIP",
        "automatic",
        "Whether tokens are for members of the room only; automatic: if our homeserver alone has full access",
    ),
    variable(
        "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS",
        "30",
        "How often the membership of participants is checked in application-service mode; 0 is off",
    ),
    variable("LIVEKIT_JWT_PORT", "", "Deprecated: port of LIVEKIT_JWT_BIND"),
    variable("LK_JWT_PORT", "", "Deprecated: port of LIVEKIT_JWT_BIND"),
    variable(
        "LIVEKIT_LOCAL_HOMESERVERS",
        "",
        "Deprecated: old name of LIVEKIT_FULL_ACCESS_HOMESERVERS",
    ),
    variable("LIVEKIT_SECRET_FILE", "", "Deprecated: old name of LIVEKIT_SECRET_FROM_FILE"),
];
