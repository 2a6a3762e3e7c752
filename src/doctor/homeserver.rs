//! Homeservers: the way to the federation API step by step, OpenID there, and what the client-server API offers.

use std::pin::Pin;

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;
use tokio::time::timeout_at;

use super::check::Sink;
use super::fault::{self, Fault};
use super::ticket::MAX_SERVERS;
use super::{AT_ONCE, MAX_BODY_BYTES, Run, Trouble, Work, answered, json_of, nonce, side_by_side, words};
use crate::clock::unix_seconds;
use crate::dns::DnsError;
use crate::federation::{ClientApi, Failure, Reply};
use crate::secret::Secret;
use crate::server_name::{Host, ServerName};
use crate::wire::errcode;

/// A certificate that ends within this time is told of.
const ENDS_SOON_SECONDS: u64 = 14 * 24 * 60 * 60;
/// Entries of lists that are told of, or looked up, at most.
const MAX_MENTIONED: usize = 20;

const ALL: [&str; 4] = ["federation", "openid", "client-api", "delayed-events"];

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>) {
    let servers = run.servers();
    if servers.is_empty() {
        sink.skip(&ALL, "no homeserver is named: give one with --server");
    }
    for some in servers.chunks(AT_ONCE).take(MAX_SERVERS / AT_ONCE) {
        let checks = some
            .iter()
            .map(|server| Box::pin(check_server(run, server, sink.about(server.as_str()))) as Work<'_>);
        side_by_side(checks.collect()).await;
    }
    if servers.len() > MAX_SERVERS {
        let because = format!("only {MAX_SERVERS} homeservers are looked at: name others with --server");
        sink.skip(&ALL, &because);
    }
    if !run.wishes.servers.is_empty() {
        return;
    }
    for contradiction in run.context.settings.contradictions.iter().take(MAX_MENTIONED) {
        sink.warn("lists", &fault::LISTS_CONTRADICT, contradiction);
    }
    // Of those that are blocked, too, DNS alone is asked.
    for (server, variable) in run.context.settings.mentioned.iter().take(MAX_MENTIONED) {
        if does_not_exist(run, server).await {
            let saw = format_args!("{variable} names it");
            sink.about(server.as_str()).warn("name", &fault::SERVER_NAME, &saw);
        }
    }
}

async fn check_server(run: &Run<'_>, server: &ServerName, sink: Sink<'_>) {
    // One cause, and not what follows from it. A name without addresses may still have SRV records or a delegation.
    let (mut is_typo, mut client) = (false, Err(Failure::Timeout));
    let federation = Box::pin(async { is_typo = check_federation(run, server, &sink).await });
    let client_api = Box::pin(async { client = check_client_api(run, server).await });
    side_by_side(vec![federation, client_api]).await;
    if is_typo {
        return sink.skip(&ALL[2..], fault::SERVER_NAME.id);
    }
    match client {
        Ok(reply) => offers(&reply, &sink),
        Err(failure) => {
            sink.warn("client-api", &fault::CLIENT_API, &words(&failure));
            sink.skip(&["delayed-events"], fault::CLIENT_API.id);
        }
    }
}

/// Whether the federation API failed because there is no such name.
async fn check_federation(run: &Run<'_>, server: &ServerName, sink: &Sink<'_>) -> bool {
    let made_up = format!(
        "/_matrix/federation/v1/openid/userinfo?access_token=lk-jwt-service-doctor-{}",
        nonce()
    );
    let trace = match run
        .context
        .federation
        .trace(server, &made_up, MAX_BODY_BYTES, run.began, run.soon())
        .await
    {
        Ok(trace) => trace,
        Err(failure) => {
            let fault = unreachable(&failure);
            sink.fail_before(&["openid"], "federation", fault, &words(&failure));
            return fault.id == fault::SERVER_NAME.id;
        }
    };
    let address = trace
        .looked
        .facts
        .address
        .map(|address| format!(" at {address}"))
        .unwrap_or_default();
    let way = format!("step {}, asked as {}{address}", trace.step, trace.asked_as);
    let now = unix_seconds();
    let left = trace
        .looked
        .facts
        .certificate_ends
        .map(|ends| u64::try_from(ends).unwrap_or(0).saturating_sub(now));
    match left {
        Some(left) if left < ENDS_SOON_SECONDS => {
            let saw = format_args!("{way}: its certificate ends in {} days", left / 86_400);
            sink.warn("federation", &fault::FEDERATION_CERTIFICATE_ENDS, &saw);
        }
        Some(left) => {
            let saw = format_args!("{way}; its certificate is valid for {} days", left / 86_400);
            sink.ok("federation", &saw);
        }
        None => sink.ok("federation", &way),
    }
    judge_userinfo(&trace.looked.reply, sink);
    false
}

/// Reads what the homeserver says of a token that nobody has.
fn judge_userinfo(reply: &Reply, sink: &Sink<'_>) {
    let (code, errcode) = (reply.status.as_u16(), errcode(&reply.body));
    let saw = format!("userinfo with a made-up token is answered with {}", answered(reply));
    let fault = match (code, errcode.as_deref()) {
        (401, Some(_)) | (403, Some("M_UNKNOWN_TOKEN" | "M_MISSING_TOKEN")) => {
            return sink.ok("openid", &format_args!("{saw}, as it should be"));
        }
        (404, Some(_)) => &fault::OPENID_MISSING,
        (401 | 403 | 429 | 451, _) => &fault::FEDERATION_FORBIDDEN,
        _ => &fault::FEDERATION_PAGE,
    };
    sink.fail("openid", fault, &saw);
}

fn unreachable(failure: &Failure) -> &'static Fault {
    match Trouble::of(failure) {
        Trouble::NoName => &fault::SERVER_NAME,
        Trouble::Certificate => &fault::FEDERATION_CERTIFICATE,
        Trouble::Guarded => &fault::FEDERATION_ADDRESS,
        Trouble::Connection => match failure {
            Failure::NoService(_) | Failure::BadDelegation(_) => &fault::FEDERATION_DELEGATION,
            Failure::Dns { .. }
            | Failure::AddressDenied { .. }
            | Failure::Connect { .. }
            | Failure::Tls { .. }
            | Failure::Proxy { .. }
            | Failure::NoClientApi(_)
            | Failure::Http(_)
            | Failure::TooLarge(_)
            | Failure::Timeout
            | Failure::Busy
            | Failure::Spent => &fault::FEDERATION_UNREACHABLE,
        },
    }
}

async fn check_client_api(run: &Run<'_>, server: &ServerName) -> Result<Reply, Failure> {
    let api = run.api(server).await?;
    let reply = run.get(&api, "/_matrix/client/versions", None).await?;
    if reply.status == StatusCode::OK && reply.body.trim_ascii_start().starts_with(b"{") {
        return Ok(reply);
    }
    Err(Failure::Http(format!(
        "/_matrix/client/versions is answered with {}",
        answered(&reply)
    )))
}

fn offers(reply: &Reply, sink: &Sink<'_>) {
    let answer = json_of(&reply.body);
    let has = |names: &[&str]| {
        let flags = answer.get("unstable_features");
        names
            .iter()
            .any(|name| flags.and_then(|flags| flags.get(name)) == Some(&Value::Bool(true)))
    };
    // Synapse does not say in /versions whether it has MSC4222: that it is not there means nothing.
    let state_after = if has(&["org.matrix.msc4222", "org.matrix.msc4222.stable"]) {
        ", and MSC4222"
    } else {
        ""
    };
    sink.ok("client-api", &format_args!("it answers /_matrix/client/versions{state_after}"));
    if has(&["org.matrix.msc4140", "org.matrix.msc4140.stable"]) {
        sink.ok("delayed-events", &"delayed events are on (MSC4140)");
    } else {
        let saw = "/versions does not offer org.matrix.msc4140";
        sink.fail("delayed-events", &fault::DELAYED_EVENTS_OFF, &saw);
    }
    if !has(&["org.matrix.msc3266", "org.matrix.msc3266.stable"]) && !speaks(&answer, "v1.15") {
        let saw = "/versions does not offer MSC3266, room summaries";
        sink.warn("features", &fault::HOMESERVER_FEATURES, &saw);
    }
}

/// Whether the homeserver speaks this version of the specification.
fn speaks(answer: &Value, version: &str) -> bool {
    let versions = answer.get("versions").and_then(Value::as_array);
    versions.is_some_and(|versions| versions.iter().any(|one| one.as_str() == Some(version)))
}

async fn does_not_exist(run: &Run<'_>, server: &ServerName) -> bool {
    let Host::Name(host) = server.parts().0 else { return false };
    let asked = timeout_at(run.soon(), run.context.federation.addresses_of(&host)).await;
    matches!(asked, Ok(Err(DnsError::NotFound)))
}

impl Run<'_> {
    /// Finds the client-server API of `server`: what the operator wrote down, or what its file says.
    pub(super) async fn api(&self, server: &ServerName) -> Result<ClientApi, Failure> {
        let federation = &self.context.federation;
        if let Some(url) = self.context.settings.client_apis.get(server) {
            return federation.client_api(server, url, true);
        }
        let found = timeout_at(self.soon(), federation.client_base_url(server, None)).await;
        let base = found.unwrap_or(Err(Failure::Timeout))?;
        federation.client_api(server, &base.url, false)
    }

    /// Asks for the transports of `server`, as the user of `token` or as nobody.
    pub(super) async fn client_api(&self, server: &ServerName, token: Option<&Secret>) -> Result<Reply, Failure> {
        const PATHS: [&str; 2] = [
            "/_matrix/client/v1/rtc/transports",
            "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports",
        ];
        let api = self.api(server).await?;
        let [stable, unstable] = PATHS;
        let reply = self.get(&api, stable, token).await?;
        // Clients try both.
        if reply.status == StatusCode::NOT_FOUND {
            return self.get(&api, unstable, token).await;
        }
        Ok(reply)
    }

    /// Asks a client-server API, as the user of `token` or as nobody.
    pub(super) async fn get(&self, api: &ClientApi, path: &str, token: Option<&Secret>) -> Result<Reply, Failure> {
        self.in_time(Box::pin(api.get(path, token, MAX_BODY_BYTES))).await
    }

    /// Sends JSON to a client-server API as the user of `token`.
    pub(super) async fn post(&self, api: &ClientApi, path: &str, token: &Secret, json: &Value) -> Result<Reply, Failure> {
        let json = Bytes::from(json.to_string());
        self.in_time(Box::pin(api.post(path, Some(token), json, MAX_BODY_BYTES))).await
    }

    /// Waits for an answer as long as for any look.
    async fn in_time(&self, asked: Pin<Box<dyn Future<Output = Result<Reply, Failure>> + Send + '_>>) -> Result<Reply, Failure> {
        timeout_at(self.soon(), asked).await.unwrap_or(Err(Failure::Timeout))
    }
}
