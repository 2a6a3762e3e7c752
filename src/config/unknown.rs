//! Variables that look like ours and are not (decision P18): a warning with the nearest name, never a value.

use std::cmp::Reverse;

use super::reader::{Reader, is_link};
use super::variables::VARIABLES;

const PREFIX: &str = "LIVEKIT_";
/// More than this many are not told one by one.
const MAX_HINTS: usize = 20;
/// No name that somebody mistyped is longer.
const MAX_NAME_BYTES: usize = 128;

/// Names that others read: the wrappers of this service, and livekit-server, its command line, egress, ingress and agents.
const OTHERS: &[&str] = &[
    "LIVEKIT_AGENT_NAME",
    "LIVEKIT_API_CHECK_INTERVAL",
    "LIVEKIT_API_ENABLE_PSRPC_FOR_GET_LIST_PARTICIPANTS",
    "LIVEKIT_API_EXECUTION_TIMEOUT",
    "LIVEKIT_API_MAX_CHECK_INTERVAL",
    "LIVEKIT_BIND_ADDRESSES",
    "LIVEKIT_CONFIG",
    "LIVEKIT_CONFIG_BODY",
    "LIVEKIT_CONFIG_FILE",
    "LIVEKIT_DEBUG_HANDLER_PORT",
    "LIVEKIT_DEVELOPMENT",
    "LIVEKIT_ENABLE_DATA_TRACKS",
    "LIVEKIT_ENABLE_PARTICIPANT_DATA_BLOB",
    "LIVEKIT_ENVIRONMENT",
    "LIVEKIT_PORT",
    "LIVEKIT_PROJECT",
    "LIVEKIT_REDIS_ADDRESS",
    "LIVEKIT_REDIS_CLUSTER_ADDRESSES",
    "LIVEKIT_REDIS_DB",
    "LIVEKIT_REDIS_DIAL_TIMEOUT",
    "LIVEKIT_REDIS_MAX_REDIRECTS",
    "LIVEKIT_REDIS_POOL_SIZE",
    "LIVEKIT_REDIS_POOL_TIMEOUT",
    "LIVEKIT_REDIS_READ_TIMEOUT",
    "LIVEKIT_REDIS_SENTINEL_ADDRESSES",
    "LIVEKIT_REDIS_SENTINEL_MASTER_NAME",
    "LIVEKIT_REDIS_SENTINEL_PASSWORD",
    "LIVEKIT_REDIS_SENTINEL_USERNAME",
    "LIVEKIT_REDIS_USERNAME",
    "LIVEKIT_REDIS_USE_TLS",
    "LIVEKIT_REDIS_WRITE_TIMEOUT",
    "LIVEKIT_REGION",
    "LIVEKIT_ROOM",
    "LIVEKIT_ROOM_AUTO_CREATE",
    "LIVEKIT_ROOM_CREATE_ROOM_ATTEMPTS",
    "LIVEKIT_ROOM_CREATE_ROOM_ENABLED",
    "LIVEKIT_ROOM_CREATE_ROOM_TIMEOUT",
    "LIVEKIT_ROOM_DEPARTURE_TIMEOUT",
    "LIVEKIT_ROOM_EMPTY_TIMEOUT",
    "LIVEKIT_ROOM_ENABLE_REMOTE_UNMUTE",
    "LIVEKIT_ROOM_MAX_METADATA_SIZE",
    "LIVEKIT_ROOM_MAX_PARTICIPANTS",
    "LIVEKIT_ROOM_MAX_PARTICIPANT_IDENTITY_LENGTH",
    "LIVEKIT_ROOM_MAX_ROOM_NAME_LENGTH",
    "LIVEKIT_ROOM_NAME",
    "LIVEKIT_ROOM_PLAYOUT_DELAY_ENABLED",
    "LIVEKIT_ROOM_PLAYOUT_DELAY_MAX",
    "LIVEKIT_ROOM_PLAYOUT_DELAY_MIN",
    "LIVEKIT_ROOM_SYNC_STREAMS",
    "LIVEKIT_ROOM_UPDATE_BATCH_TARGET_SIZE",
    "LIVEKIT_TOKEN",
    "LIVEKIT_WS_URL",
];

/// How names begin of which others have many.
const OTHERS_FAMILIES: &[&str] = &[
    "LIVEKIT_AGENTS_",
    "LIVEKIT_AUDIO_",
    "LIVEKIT_EGRESS_",
    "LIVEKIT_INFERENCE_",
    "LIVEKIT_INGRESS_",
    "LIVEKIT_LIMIT_",
    "LIVEKIT_LOGGING_",
    "LIVEKIT_METRIC_",
    "LIVEKIT_NODE_",
    "LIVEKIT_PROMETHEUS_",
    "LIVEKIT_PSRPC_",
    "LIVEKIT_REDIS_TLS_",
    "LIVEKIT_RTC_",
    "LIVEKIT_SIGNAL_RELAY_",
    "LIVEKIT_SIP_",
    "LIVEKIT_TRACE_",
    "LIVEKIT_TURN_",
    "LIVEKIT_VIDEO_",
    "LIVEKIT_WEBHOOK_",
];

/// Without our prefix these may be anybody's, so they count only where ours is unset.
const COMMON: &[&str] = &[
    "API_KEY",
    "API_SECRET",
    "API_URL",
    "AS_TOKEN",
    "DNS_SERVERS",
    "HS_TOKEN",
    "JWT_PORT",
    "KEY",
    "KEY_FILE",
    "KEY_FROM_FILE",
    "KEYS",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "MAX_PARTICIPANTS",
    "REDIS_PASSWORD",
    "REDIS_URL",
    "SECRET",
    "SECRET_FILE",
    "SECRET_FROM_FILE",
    "STATE_PATH",
    "URL",
];

/// Warns about each variable that is set and means nothing here, although its name says that it was meant to.
pub(super) fn warn(reader: &mut Reader<'_>) {
    let get = reader.sources.get;
    let set = |name: &str| get(name).is_some_and(|value| !value.trim().is_empty());
    let mut names: Vec<&String> = reader.sources.names.iter().filter(|name| set(name)).collect();
    names.sort_unstable();
    let mut told = 0;
    for name in names {
        let Some(nearest) = mistaken(name, &get, &set) else { continue };
        told += 1;
        if told > MAX_HINTS {
            continue;
        }
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let name = if plain { name.clone() } else { format!("{name:?}") };
        reader.hint(match nearest {
            Some(nearest) => format!("{name} is set, but this service does not read it: did you mean {nearest}?"),
            None => format!("{name} is set, but this service does not read it: --help lists its variables"),
        });
    }
    if told > MAX_HINTS {
        reader.hint(format!(
            "{} more variables are set that this service does not read",
            told - MAX_HINTS
        ));
    }
}

/// `Some` where `name` was meant for us and is not ours; in it the nearest name, if any is near.
fn mistaken(name: &str, get: &dyn Fn(&str) -> Option<String>, set: &dyn Fn(&str) -> bool) -> Option<Option<&'static str>> {
    if name.len() > MAX_NAME_BYTES || ours(name).is_some() || is_of_others(name) || is_of_links(name, get) {
        return None;
    }
    // Another case, a hyphen, a byte order mark or a blank that a file brought along.
    let written = name
        .trim_start_matches('\u{feff}')
        .trim()
        .to_ascii_uppercase()
        .replace(['-', '.'], "_");
    if let Some(meant) = ours(&written) {
        return Some(Some(meant));
    }
    if is_of_others(&written) {
        return None;
    }
    if written.starts_with(PREFIX) {
        return Some(nearest(&written));
    }
    let bare = written.strip_prefix("LK_");
    let meant = ours(&format!("{PREFIX}{}", bare.unwrap_or(&written)))?;
    let anybodys = bare.is_none() && COMMON.contains(&written.as_str()) && set(meant);
    (!anybodys).then_some(Some(meant))
}

fn ours(name: &str) -> Option<&'static str> {
    VARIABLES.iter().map(|variable| variable.name).find(|ours| *ours == name)
}

fn is_of_others(name: &str) -> bool {
    OTHERS.contains(&name) || OTHERS_FAMILIES.iter().any(|family| name.starts_with(family))
}

/// Recognises variables that Kubernetes makes of a Service, and Docker of a link.
fn is_of_links(name: &str, get: &dyn Fn(&str) -> Option<String>) -> bool {
    let linked = |alias: &str| get(&format!("{alias}_PORT")).is_some_and(|value| is_link(&value));
    let numbered = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.match_indices("_PORT_").any(|(at, found)| numbered(&name[at + found.len()..]))
        || name.strip_suffix("_PORT").is_some_and(linked)
        || name.strip_suffix("_NAME").is_some_and(linked)
        || name.match_indices("_ENV_").any(|(at, _)| linked(&name[..at]))
}

/// Of our names, those aside that are old or LiveKit's, the one that takes the fewest changes, words in common counting most.
fn nearest(name: &str) -> Option<&'static str> {
    let rest = &name[PREFIX.len()..];
    let aside = |doc: &str| doc.starts_with("Deprecated") || doc.starts_with("LiveKit's name");
    let candidates = VARIABLES.iter().filter(|variable| !aside(variable.doc));
    candidates
        .filter_map(|variable| {
            let theirs = variable.name.strip_prefix(PREFIX)?;
            let common = rest.split('_').filter(|word| theirs.split('_').any(|other| other == *word)).count();
            let changes = changes(rest, theirs);
            (common > 0 || changes * 2 <= rest.len()).then_some((
                Reverse(changes.saturating_sub(4 * common)),
                Reverse(changes),
                variable.name,
            ))
        })
        .max_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)))
        .map(|(_, _, name)| name)
}

/// The Levenshtein distance, by bytes: names are ASCII, or of nobody.
pub(crate) fn changes(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (line, a) in from.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], line + 1);
        for (column, b) in to.bytes().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(name: &str, set: &[(&str, &str)]) -> Option<Option<&'static str>> {
        let get = |name: &str| set.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        mistaken(name, &get, &|name| get(name).is_some())
    }

    #[test]
    fn counts_changes() {
        for (from, to, expected) in [
            ("", "", 0),
            ("a", "", 1),
            ("", "ab", 2),
            ("URI", "URL", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(changes(from, to), expected, "{from} {to}");
        }
    }

    #[test]
    fn names_what_was_meant() {
        for (name, expected) in [
            ("FULL_ACCESS_HOMESERVERS", "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
            ("HS_SERVER_NAME", "LIVEKIT_HS_SERVER_NAME"),
            ("LK_JWT_BIND", "LIVEKIT_JWT_BIND"),
            ("LIVEKIT_REDIS_URI", "LIVEKIT_REDIS_URL"),
            ("LIVEKIT_FULL_ACCESS", "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
            ("LIVEKIT_FULL_ACCESS_HOMESERVER", "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
            ("LIVEKIT_BIND", "LIVEKIT_JWT_BIND"),
            ("LIVEKIT_JWT_SECRET", "LIVEKIT_SECRET"),
            ("LIVEKIT_SERVER_NAME", "LIVEKIT_HS_SERVER_NAME"),
            ("LIVEKIT_ROOM_WATCH_INTERVAL", "LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS"),
            ("LIVEKIT_SKIP_VERIFY_TLS", "LIVEKIT_INSECURE_SKIP_VERIFY_TLS"),
            ("LK_REDIS_URL", "LIVEKIT_REDIS_URL"),
            ("JWT_BIND", "LIVEKIT_JWT_BIND"),
            ("REDIS_URL", "LIVEKIT_REDIS_URL"),
            ("livekit_url", "LIVEKIT_URL"),
            ("LIVEKIT-URL", "LIVEKIT_URL"),
            ("\u{feff}LIVEKIT_URL", "LIVEKIT_URL"),
            ("LIVEKIT_KEY ", "LIVEKIT_KEY"),
        ] {
            assert_eq!(meant(name, &[]), Some(Some(expected)), "{name}");
        }
        assert_eq!(meant("LIVEKIT_XYZ", &[]), Some(None));
    }

    #[test]
    fn leaves_others_alone() {
        const LINK: &str = "tcp://10.0.0.1:8080";
        for name in [
            "PATH",
            "URLS",
            "REDIS_HOST",
            "MY_LIVEKIT_URL",
            "LIVEKIT_KEYS",
            "LIVEKIT_RTC_UDP_PORT",
            "LIVEKIT_WS_URL",
            "LIVEKIT_WEBHOOK_API_KEY",
            "LIVEKIT_PORT",
            "LIVEKIT_SERVICE_HOST",
            "LIVEKIT_SERVICE_PORT_HTTP",
            "LIVEKIT_PORT_7880_TCP_ADDR",
            "LK_JWT_SERVICE_PORT_8080_TCP",
        ] {
            assert_eq!(meant(name, &[]), None, "{name}");
        }
        let link = [("LIVEKIT_SFU_PORT", LINK), ("LIVEKIT_URL", "x")];
        for name in ["LIVEKIT_SFU_PORT", "LIVEKIT_SFU_NAME", "LIVEKIT_SFU_ENV_LIVEKIT_KEYS", "URL"] {
            assert_eq!(meant(name, &link), None, "{name}");
        }
        assert!(meant("LIVEKIT_SFU_NAME", &[]).is_some() && meant("URL", &[]).is_some());
        assert!(meant("LK_URL", &link).is_some());
    }

    #[test]
    fn nothing_of_others_is_ours() {
        for name in OTHERS {
            assert!(ours(name).is_none(), "{name} is read here");
        }
        for family in OTHERS_FAMILIES {
            assert!(VARIABLES.iter().all(|variable| !variable.name.starts_with(family)), "{family}");
        }
        for name in COMMON {
            assert!(ours(&format!("{PREFIX}{name}")).is_some(), "{name}");
        }
    }
}
