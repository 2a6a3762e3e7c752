//! Lists of homeservers, of overrides, of networks and of DNS servers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use url::{Host, Url};

use super::reader::{Reader, part_shown};
use crate::access::{Entry, Homeservers, HostPattern};
use crate::server_name::ServerName;

const FULL_ACCESS: &str = "LIVEKIT_FULL_ACCESS_HOMESERVERS";
const LOCAL: &str = "LIVEKIT_LOCAL_HOMESERVERS";
const REMOTE_CAN_PUBLISH: &str = "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS";
const ALLOWED: &str = "LIVEKIT_ALLOWED_HOMESERVERS";
const BLOCKED: &str = "LIVEKIT_BLOCKED_HOMESERVERS";
const DNS_PORT: u16 = 53;

/// Reads who has full access (decision P4). `own` is our homeserver in application-service mode.
pub(super) fn full_access(reader: &mut Reader<'_>, own: Option<&ServerName>) -> Homeservers {
    if let Some(text) = reader.present(FULL_ACCESS) {
        return homeservers(reader, FULL_ACCESS, &text);
    }
    if let Some(text) = reader.present(LOCAL) {
        reader.warn(format!("{LOCAL} is deprecated: rename it to {FULL_ACCESS}"));
        return homeservers(reader, LOCAL, &text);
    }
    if let Some(own) = own {
        return Homeservers::Listed(BTreeSet::from([own.clone()]));
    }
    if !reader.dev {
        reader.warn(format!(
            "{FULL_ACCESS} is not set, so users of every homeserver of the federation may create rooms on your SFU. List the \
             homeservers that you serve, as in {FULL_ACCESS}=example.com, or set it to * if you mean all"
        ));
    }
    Homeservers::All
}

/// Reads which homeservers' users may publish without full access (decision T1).
pub(super) fn remote_can_publish(reader: &mut Reader<'_>) -> Homeservers {
    match reader.value(REMOTE_CAN_PUBLISH) {
        Some(text) => homeservers(reader, REMOTE_CAN_PUBLISH, &text),
        None => Homeservers::All,
    }
}

/// Reads which homeservers are dealt with at all, and which are not. Of both lists every entry has to be understood: one that is
/// not would leave somebody out, or in.
pub(super) fn admitted(
    reader: &mut Reader<'_>,
    full_access: &Homeservers,
    own: Option<&ServerName>,
) -> (Homeservers<HostPattern>, Homeservers<HostPattern>) {
    let named: Vec<&ServerName> = full_access.entries().chain(own).collect();
    let mut allowed = patterns(reader, ALLOWED).unwrap_or(Homeservers::All);
    let blocked = patterns(reader, BLOCKED).unwrap_or_else(|| Homeservers::Listed(BTreeSet::new()));
    if blocked == Homeservers::All {
        reader.mistake(
            BLOCKED,
            format!("is *, so that nobody could call: name homeservers, or set {ALLOWED} to those that may"),
        );
    } else if let Some(name) = named.iter().find(|name| blocked.contains(name)) {
        let text = format!("blocks {name}, which has full access or is our own homeserver: take it from one of the lists");
        reader.mistake(BLOCKED, text);
    }
    if let Homeservers::Listed(list) = &mut allowed {
        list.extend(named.into_iter().map(HostPattern::of));
    }
    (allowed, blocked)
}

/// A list of hosts and domains; `None` where it is unset.
fn patterns(reader: &mut Reader<'_>, variable: &'static str) -> Option<Homeservers<HostPattern>> {
    let text = reader.present(variable)?;
    let (list, useless) = entries(&text);
    if useless.is_empty() && list.entries().next().is_none() && list != Homeservers::All {
        let text = format!("is set, but blank: name homeservers, as in {variable}=example.com,*.example.org, or unset it");
        reader.mistake(variable, text);
    }
    for problem in useless {
        reader.mistake(variable, format!("has an entry that cannot be used: {problem}"));
    }
    Some(list)
}

/// A list that names nobody is a mistake: a failed expansion must not pass for a decision.
fn homeservers(reader: &mut Reader<'_>, variable: &'static str, text: &str) -> Homeservers {
    let (list, useless) = entries::<ServerName>(text);
    for name in list
        .entries()
        .filter(|name| name.as_str().bytes().any(|byte| byte.is_ascii_uppercase()))
    {
        reader.warn(format!(
            "{variable} has an entry with capital letters, {}: names are compared as they stand in user ids, which have none; write {}",
            part_shown(text, name.as_str()),
            part_shown(text, &name.as_str().to_ascii_lowercase())
        ));
    }
    if list != Homeservers::All && list.entries().next().is_none() {
        let detail = if useless.is_empty() {
            "is set, but blank".to_owned()
        } else {
            format!("names nobody: {}", useless.join("; "))
        };
        reader.mistake(
            variable,
            format!("{detail}. Name at least one homeserver, as in {variable}=example.com, or set it to * for all"),
        );
    } else {
        for problem in useless {
            reader.warn(format!("{variable} has an entry that is ignored: {problem}"));
        }
    }
    list
}

/// The entries of a list, and what is wrong with those that cannot be used.
fn entries<E: Entry>(text: &str) -> (Homeservers<E>, Vec<String>) {
    if items(text).eq(["*"]) {
        return (Homeservers::All, Vec::new());
    }
    let mut useless = Vec::new();
    let mut list = BTreeSet::new();
    for item in items(text) {
        match E::parse(item) {
            Some(entry) => {
                list.insert(entry);
            }
            None if item == "*" => useless.push("* means all homeservers only if it stands alone".to_owned()),
            None => useless.push(not_a_server_name(text, item)),
        }
    }
    useless.dedup();
    (Homeservers::Listed(list), useless)
}

/// Says what to write instead of `text`, a part of `whole`, where that can be guessed.
pub(super) fn not_a_server_name(whole: &str, text: &str) -> String {
    let bare = text.trim_matches(['"', '\'']);
    let bare = bare.split_once("://").map_or(bare, |(_, rest)| rest);
    let bare = bare.split(['/', '?', '#']).next().unwrap_or(bare);
    // Of a user ID the part after the first colon.
    let bare = match bare.strip_prefix('@') {
        Some(user) => user.split_once(':').map_or("", |(_, server)| server),
        None => bare.rsplit_once('@').map_or(bare, |(_, host)| host),
    };
    // In `https://user:12 34@host` the first entry is a piece of a password.
    let guessed = ServerName::parse(bare).ok().filter(|_| text.contains('@') || !whole.contains('@'));
    let remedy = guessed.map_or_else(
        || "write it as in user IDs after the colon".to_owned(),
        |name| format!("write {name}"),
    );
    format!("{} is not a server name and never matches, {remedy}", part_shown(whole, text))
}

/// `server=url,...` (decision O6); of a server named twice the last entry counts.
pub(super) fn overrides(reader: &mut Reader<'_>, variable: &'static str) -> BTreeMap<ServerName, Url> {
    let mut found = BTreeMap::new();
    let Some(text) = reader.value(variable) else { return found };
    for (index, entry) in text.split(',').enumerate() {
        match parse_override(&text, entry) {
            Ok((server, url)) => {
                found.insert(server, url);
            }
            Err(problem) => {
                let text = format!("must be server=https://host:port, by comma, but entry {}: {problem}", index + 1);
                reader.mistake(variable, text);
            }
        }
    }
    found
}

fn parse_override(whole: &str, entry: &str) -> Result<(ServerName, Url), String> {
    if entry.trim().is_empty() {
        return Err("is empty; remove its comma".to_owned());
    }
    let (server, url) = entry
        .split_once('=')
        .ok_or_else(|| format!("has no `=` in {}", part_shown(whole, entry.trim())))?;
    let (server, url) = (server.trim(), url.trim());
    if server.is_empty() || url.is_empty() {
        return Err(format!("has nothing on one side of the `=` in {}", part_shown(whole, entry.trim())));
    }
    let name = ServerName::parse(server).map_err(|_| not_a_server_name(whole, server))?;
    Ok((name, base_url(whole, url)?))
}

/// An http or https address; https where the scheme is missing.
fn base_url(whole: &str, text: &str) -> Result<Url, String> {
    let problem = |problem: &str| format!("{problem} in {}", part_shown(whole, text));
    let schemeless = !text.contains("://");
    if schemeless
        && text
            .split_once(':')
            .is_some_and(|(scheme, _)| ["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()))
    {
        return Err(problem("lacks the // after the scheme"));
    }
    let url = if schemeless {
        Url::parse(&format!("https://{text}"))
    } else {
        Url::parse(text)
    };
    let url = url.map_err(|_| problem("has no valid URL"))?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err(problem("has a scheme other than http and https"));
    }
    if !can_be_reached(&url) {
        return Err(problem("has a host that cannot be a name"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(problem("has a user name or password, which is not supported,"));
    }
    if url.query().is_some() || url.fragment().is_some() || text.contains(char::is_whitespace) {
        return Err(problem("has a `?`, a `#` or white space"));
    }
    Ok(url)
}

/// Whether the host is an address, or a name that DNS can have: `$HOST`, which nothing has filled in, is none.
pub(super) fn can_be_reached(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)),
        Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
        None => false,
    }
}

/// Networks in CIDR form; an address alone is a network of one.
pub(super) fn networks(reader: &mut Reader<'_>, variable: &'static str) -> Vec<IpNet> {
    let parse = |item: &str| item.parse::<IpNet>().ok().or_else(|| item.parse::<IpAddr>().ok().map(IpNet::from));
    let found = each(
        reader,
        variable,
        "must be networks such as 10.1.0.0/16 or fd00::/8, by comma or space",
        parse,
    );
    found.iter().map(IpNet::trunc).collect()
}

/// Addresses of DNS servers, with or without a port.
pub(super) fn dns_servers(reader: &mut Reader<'_>, variable: &'static str) -> Vec<SocketAddr> {
    let parse = |item: &str| {
        let bare = item.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(item);
        let address = bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DNS_PORT));
        address.or_else(|_| item.parse()).ok().filter(|address| address.port() != 0)
    };
    each(
        reader,
        variable,
        "must be IP addresses such as 10.0.0.53, 10.0.0.53:5353 or [fd00::53]:53, by comma or space",
        parse,
    )
}

fn each<T>(reader: &mut Reader<'_>, variable: &'static str, form: &str, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
    let Some(text) = reader.value(variable) else { return Vec::new() };
    let mut found = Vec::new();
    for item in items(&text) {
        match parse(item) {
            Some(value) => found.push(value),
            None => reader.mistake(variable, format!("{form}, not {}", part_shown(&text, item))),
        }
    }
    if items(&text).next().is_none() {
        reader.mistake(variable, form);
    }
    found
}

/// Separated by commas and white space, as many as there are.
pub(super) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c == ',' || c.is_whitespace()).filter(|item| !item.is_empty())
}
