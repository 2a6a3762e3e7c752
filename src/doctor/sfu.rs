//! The SFU: its key, its clock, its API; the same through the public address, with a WebSocket, and where media would go. Webhooks
//! too, since a room that is opened for all this is what they have to tell of.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::Value;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use url::{Host, Url};

use super::arrivals::{Astray, ROOM};
use super::check::{Sink, Verdict, View};
use super::fault::{self, Fault};
use super::media::{Candidate, Ice, answer, binding_request, candidates, is_answer};
use super::signal::{answer_request, field, text};
use super::socket::Socket;
use super::{Run, Trouble, json_of, nonce, page, side_by_side, words};
use crate::clock::unix_seconds;
use crate::federation::{Failure, Guard, Look, Switched, Trust, Upgrade};
use crate::secret::Secret;
use crate::sfu::webhook::WebhookAuthError;
use crate::sfu::{Sfu, SfuError};

/// Difference of the clocks in seconds from which tokens and webhooks are refused, and from which that is near.
const CLOCK_FAIL_SECONDS: u64 = 60;
const CLOCK_WARN_SECONDS: u64 = 20;
/// Within what time a webhook has to arrive.
const WEBHOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the SFU's candidates are waited for after the last one.
const TRICKLE_TIMEOUT: Duration = Duration::from_millis(700);
/// Time from one question by UDP to the next, and how many there are. Of half of them lost either way, one in four is answered.
const UDP_PAUSE: Duration = Duration::from_millis(150);
const UDP_TRIES: u32 = 14;
/// Time that the answer to the last one has.
const UDP_TIMEOUT: Duration = Duration::from_millis(1150);
/// Time for a connection by TCP.
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
/// Body of a refusal that is read, in bytes.
const MAX_REFUSAL_BYTES: usize = 4096;

/// Headers that ask for a WebSocket.
const UPGRADE: [(HeaderName, HeaderValue); 4] = [
    (header::CONNECTION, HeaderValue::from_static("Upgrade")),
    (header::UPGRADE, HeaderValue::from_static("websocket")),
    (header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")),
    (header::SEC_WEBSOCKET_KEY, HeaderValue::from_static("bGstand0LXNlcnZpY2UtMQ==")),
];

/// Reason for which an address that the SFU names is not asked.
const NOT_ASKED: &str = "the address is private, and not one of the configuration";

/// Checks that follow from the API, through the public address, and about media.
const OF_API: [&str; 2] = ["sfu-clock", "auto-create"];
const PUBLIC: [&str; 2] = ["public-url", "websocket"];
const MEDIA: [&str; 4] = ["version", "candidates", "udp", "tcp"];

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>, webhook: &Sink<'_>) {
    let Some(sfu) = &run.context.sfu else {
        let because = "the key of the SFU is not known here";
        sink.skip(&["api"], because);
        check_reach(run, because, sink).await;
        return webhook.skip(&["webhook"], because);
    };
    check_clock(run, sfu, sink).await;
    if let Err(error) = sfu.try_key().await {
        let fault = fault_of(&error);
        let is_about_the_key = matches!(error, SfuError::UnknownKey | SfuError::WrongSecret | SfuError::Clock);
        if run.context.view == View::Outside && !is_about_the_key {
            let because = "the SFU's API need not be reached from outside";
            sink.skip(&["api", "auto-create"], because);
            check_reach(run, because, sink).await;
            return webhook.skip(&["webhook"], because);
        }
        sink.fail_before(&OF_API[1..], "api", fault, &error);
        // Where clients go by another way, that may be wrong by itself.
        if base_of(&run.context.settings.livekit_url) == run.context.settings.livekit_api {
            sink.skip(&PUBLIC, fault.id);
            sink.skip(&MEDIA, fault.id);
        } else {
            check_reach(run, fault.id, sink).await;
        }
        return webhook.skip(&["webhook"], fault.id);
    }
    sink.ok("api", &"it answers and accepts the key");
    check_auto_create(sfu, sink).await;
    let room = format!("{ROOM}{}", nonce());
    let since = std::time::Instant::now();
    if let Err(error) = sfu.open_small_room(&room).await {
        let fault = fault_of(&error);
        sink.fail_before(&PUBLIC, "room", fault, &error);
        sink.skip(&MEDIA, fault.id);
        return webhook.skip(&["webhook"], fault.id);
    }
    let told = Box::pin(check_webhook(run, &room, since, webhook));
    side_by_side(vec![told, Box::pin(check_public(run, sfu, &room, sink))]).await;
    // It ends by itself a minute later where this fails.
    let _ = sfu.delete_room(&room).await;
}

async fn check_clock(run: &Run<'_>, sfu: &Sfu, sink: &Sink<'_>) {
    let asked = timeout_at(run.soon(), sfu.clock()).await;
    let Ok(Some(theirs)) = asked else {
        return sink.skip(&["sfu-clock"], "the SFU does not say what its clock shows");
    };
    let ours = i64::try_from(unix_seconds()).unwrap_or(i64::MAX);
    let ahead = theirs.saturating_sub(ours);
    let saw = match ahead {
        0 => "the same time there as here".to_owned(),
        1.. => format!("the SFU's clock is {ahead} s ahead of the service's"),
        _ => format!("the SFU's clock is {} s behind the service's", ahead.unsigned_abs()),
    };
    match ahead.unsigned_abs() {
        CLOCK_FAIL_SECONDS.. => sink.fail("sfu-clock", &fault::SFU_CLOCK, &saw),
        CLOCK_WARN_SECONDS.. => sink.warn("sfu-clock", &fault::SFU_CLOCK, &saw),
        _ => sink.ok("sfu-clock", &saw),
    }
}

async fn check_auto_create(sfu: &Sfu, sink: &Sink<'_>) {
    match sfu.opens_rooms_by_joining().await {
        Some(true) => {
            let saw = "a token that may only join would be let into a room that does not exist";
            sink.fail("auto-create", &fault::SFU_AUTO_CREATE, &saw);
        }
        Some(false) => sink.ok("auto-create", &"it is off: rooms are opened by this service only"),
        None => sink.skip(&["auto-create"], "the SFU does not say (GET /rtc/validate)"),
    }
}

async fn check_webhook(run: &Run<'_>, room: &str, since: std::time::Instant, sink: &Sink<'_>) {
    let Some(arrivals) = &run.context.arrivals else {
        return sink.skip(&["webhook"], "webhooks go to the running service, which makes no checks now");
    };
    let deadline = run.ends.min(Instant::now() + WEBHOOK_TIMEOUT);
    if arrivals.is_told_of(room, deadline).await {
        let took = since.elapsed().as_millis();
        let saw = format_args!("room_started of a room made for this arrived after {took} ms");
        return sink.ok("webhook", &saw);
    }
    let snippet = "webhook:\n  api_key: <LIVEKIT_KEY>\n  urls: [\"http://lk-jwt-service:8080/sfu_webhook\"]";
    let (fault, saw) = match arrivals.astray_since(since) {
        None => (
            &fault::WEBHOOK_MISSING,
            "nothing arrived within 3 s of a room that was made for this".to_owned(),
        ),
        Some(Astray::Path(path)) => (&fault::WEBHOOK_PATH, format!("a webhook came to {path}")),
        Some(Astray::Refused(error @ (WebhookAuthError::UnknownKey | WebhookAuthError::Signature))) => {
            (&fault::WEBHOOK_KEY, error.to_string())
        }
        Some(Astray::Refused(error)) => (&fault::WEBHOOK_REFUSED, format!("{error}; {}", error.remedy())),
    };
    sink.fault(Verdict::Fail, "webhook", fault, &saw, Some(snippet));
}

/// Checks through `LIVEKIT_URL`, as clients go.
async fn check_public(run: &Run<'_>, sfu: &Sfu, room: &str, sink: &Sink<'_>) {
    let text = &run.context.settings.livekit_url;
    let Some(base) = base_of(text) else {
        sink.skip(&PUBLIC, "LIVEKIT_URL is not known here");
        return sink.skip(&MEDIA, "LIVEKIT_URL is not known here");
    };
    let Ok(token) = sfu.visitor(room, true) else { return };
    if base.scheme() == "http" && !is_this_machine(&base) {
        sink.warn("public-url", &fault::SFU_PUBLIC_SCHEME, &format_args!("LIVEKIT_URL is {text}"));
    }
    // A room that stands, so that the answer is about the way and not about the room.
    let validated = ask(run, &base, "rtc/validate", Some(&token)).await;
    let trouble = match &validated {
        Err(failure) => Some(unreachable(run, failure)),
        Ok(reply) => judge(reply.0, &reply.1),
    };
    let joined = match trouble {
        None => {
            let saw = "LiveKit answers there and knows the room that was made through its API";
            sink.ok("public-url", &saw);
            let joined = join(run, &base, &token).await;
            match &joined {
                Ok(_) => sink.ok("websocket", &"a WebSocket goes through to the SFU"),
                Err(saw) => sink.fail("websocket", &fault::SFU_WEBSOCKET, saw),
            }
            joined.ok()
        }
        Some((verdict, fault, saw)) => {
            sink.fault(verdict, "public-url", fault, &saw, None);
            sink.skip(&["websocket"], fault.id);
            None
        }
    };
    // What the SFU says of media, it says on the inner way too.
    let joined = match (joined, &run.context.settings.livekit_api) {
        (Some(joined), _) => Some(joined),
        (None, Some(api)) if *api != base => join(run, api, &token).await.ok(),
        (None, _) => None,
    };
    match joined {
        Some(joined) => Box::pin(check_media(run, joined, &base, sink)).await,
        None => sink.skip(&MEDIA, "nobody could join to see it"),
    }
}

/// `LIVEKIT_URL` as an address for HTTP, with a path that ends in a slash.
pub(super) fn base_of(text: &str) -> Option<Url> {
    let (scheme, rest) = text.split_once("://")?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "wss" | "https" => "https",
        "ws" | "http" => "http",
        _ => return None,
    };
    let mut url = Url::parse(&format!("{scheme}://{rest}")).ok()?;
    let path = format!("{}/", url.path().trim_end_matches('/'));
    url.set_path(&path);
    url.set_query(None);
    url.host()?;
    Some(url)
}

pub(super) fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

pub(super) fn bearer(token: &Secret) -> Option<(HeaderName, HeaderValue)> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose())).ok()?;
    value.set_sensitive(true);
    Some((header::AUTHORIZATION, value))
}

/// Whether LiveKit is there at all, where there is no key for more.
async fn check_reach(run: &Run<'_>, because: &str, sink: &Sink<'_>) {
    let Some(base) = base_of(&run.context.settings.livekit_url) else {
        sink.skip(&PUBLIC, "LIVEKIT_URL is not known here");
        return sink.skip(&MEDIA, because);
    };
    let trouble = match ask(run, &base, "rtc/validate", None).await {
        Err(failure) => Some(unreachable(run, &failure)),
        Ok((StatusCode::UNAUTHORIZED, _)) => None,
        Ok((status, body)) => judge(status, &body),
    };
    match trouble {
        None => sink.ok("public-url", &"LiveKit answers there, and wants a token"),
        Some((verdict, fault, saw)) => sink.fault(verdict, "public-url", fault, &saw, None),
    }
    sink.skip(&PUBLIC[1..], because);
    sink.skip(&MEDIA, because);
}

async fn ask(run: &Run<'_>, base: &Url, path: &str, token: Option<&Secret>) -> Result<(StatusCode, Bytes), Failure> {
    let broken = || Failure::Http("the address cannot be asked".into());
    let url = base.join(path).map_err(|_| broken())?;
    let headers: Vec<_> = token
        .map(|token| bearer(token).ok_or_else(broken))
        .transpose()?
        .into_iter()
        .collect();
    let look = Look::get(&url, &headers, MAX_REFUSAL_BYTES, run.began);
    let looked = run.context.federation.look(&look, true, run.soon()).await?;
    Ok((looked.reply.status, looked.reply.body))
}

fn unreachable(run: &Run<'_>, failure: &Failure) -> (Verdict, &'static Fault, String) {
    let trouble = Trouble::of(failure);
    let fault = match trouble {
        Trouble::NoName => &fault::SFU_PUBLIC_NAME,
        Trouble::Certificate => &fault::SFU_PUBLIC_CERTIFICATE,
        Trouble::Guarded | Trouble::Connection => &fault::SFU_PUBLIC_UNREACHABLE,
    };
    (trouble.verdict(run.context.view), fault, words(failure))
}

/// Reads what the public address answered to a token for a room that stands. The SFU's texts may hold our token, and are not shown.
fn judge(status: StatusCode, body: &[u8]) -> Option<(Verdict, &'static Fault, String)> {
    let fail = |fault, saw: String| Some((Verdict::Fail, fault, saw));
    let code = status.as_u16();
    match code {
        200 if body.trim_ascii() == b"success" => None,
        401 if body.starts_with(b"invalid") || body.starts_with(b"permissions denied") => {
            fail(&fault::SFU_PUBLIC_OTHER, "the SFU there does not accept the token".into())
        }
        404 if body.starts_with(b"requested room does not exist") => fail(
            &fault::SFU_PUBLIC_OTHER,
            "the SFU there does not know the room that was just made".into(),
        ),
        502..=504 => fail(
            &fault::SFU_PUBLIC_UNREACHABLE,
            format!("a proxy answers {code}: it does not reach livekit-server"),
        ),
        _ => fail(
            &fault::SFU_PUBLIC_PATH,
            format!("GET …/rtc/validate is answered with {code}: {}", page(body)),
        ),
    }
}

/// Words of the SFU after a join.
pub(super) struct Joined {
    version: String,
    candidates: Vec<Candidate>,
    /// Kept open as long as the candidates are tried.
    socket: Socket<Box<Switched>>,
    ice: Option<Ice>,
}

/// Joins as somebody who sees nobody and is not seen, and listens for where media would go.
pub(super) async fn join(run: &Run<'_>, base: &Url, token: &Secret) -> Result<Joined, String> {
    let url = base
        .join("rtc?protocol=16&sdk=rust&version=1.0&auto_subscribe=1")
        .map_err(|error| error.to_string())?;
    let mut headers = UPGRADE.to_vec();
    headers.push(bearer(token).ok_or("no token could be made")?);
    let look = Look::get(&url, &headers, MAX_REFUSAL_BYTES, run.began);
    let stream = match run.context.federation.upgrade(&look, true, run.soon()).await {
        Ok(Upgrade::Switched(stream)) => stream,
        Ok(Upgrade::Answered(status)) => {
            return Err(format!(
                "the request for a WebSocket is answered with {} instead of 101",
                status.as_u16()
            ));
        }
        Err(failure) => return Err(words(&failure)),
    };
    let mut joined = Joined {
        version: String::new(),
        candidates: Vec::new(),
        socket: Socket::new(stream, rand::random::<u32>().to_be_bytes()),
        ice: None,
    };
    let deadline = run.soon();
    let mut until = deadline;
    while let Ok(Ok(Some(message))) = timeout_at(until, joined.socket.read()).await {
        if joined.hear(&message) {
            until = deadline.min(Instant::now() + TRICKLE_TIMEOUT);
        }
    }
    if joined.version.is_empty() {
        return Err("the WebSocket opens, and the SFU says nothing on it".into());
    }
    Ok(joined)
}

impl Joined {
    /// Takes in a `SignalResponse`. Whether it is one that counts.
    fn hear(&mut self, message: &[u8]) -> bool {
        let [join, offer, trickle] = [1, 3, 4].map(|number| field(message, number));
        if let Some(join) = join {
            let version = field(join, 12).and_then(|server| text(server, 2));
            self.version = version.filter(|version| !version.is_empty()).unwrap_or("unknown").to_owned();
        }
        if let Some(sdp) = offer.and_then(|offer| text(offer, 2)) {
            self.ice = Ice::parse(sdp);
            self.candidates.extend(candidates(sdp));
        }
        if let Some(init) = trickle.and_then(|trickle| field(trickle, 1)) {
            let init = json_of(init);
            let candidate = init.get("candidate").and_then(Value::as_str).and_then(Candidate::parse);
            self.candidates.extend(candidate);
        }
        join.or(offer).or(trickle).is_some()
    }
}

async fn check_media(run: &Run<'_>, mut joined: Joined, base: &Url, sink: &Sink<'_>) {
    const REST: [&str; 2] = ["udp", "tcp"];
    sink.ok("version", &format_args!("livekit-server {}", joined.version));
    if joined.candidates.is_empty() {
        let saw = "a client that joins is told of no address within a second";
        return sink.fail_before(&REST, "candidates", &fault::SFU_CANDIDATES, &saw);
    }
    let host = base.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let addresses = run.context.federation.addresses_of(host).await.unwrap_or_default();
    let is_public = |ip: &IpAddr| Guard::default().check(*ip, Trust::Stranger).is_ok();
    let listed: Vec<_> = joined.candidates.iter().take(6).map(Candidate::to_string).collect();
    let saw = format!("media goes to {}", listed.join(", "));
    if joined.candidates.iter().any(|candidate| is_public(&candidate.address.ip())) {
        sink.ok("candidates", &saw);
    } else if addresses.iter().any(is_public) {
        let saw = format_args!("{saw}, while LIVEKIT_URL leads to a public address");
        return sink.fail_before(&REST, "candidates", &fault::SFU_NODE_IP, &saw);
    } else if is_this_machine(base) || addresses.iter().all(IpAddr::is_loopback) {
        sink.ok("candidates", &saw);
    } else {
        sink.warn("candidates", &fault::SFU_NODE_IP, &saw);
    }
    // Addresses that the SFU names are not the operator's word: those in private networks are asked only where the configuration
    // leads there, too.
    let may_ask = |candidate: &&Candidate| {
        let ip = candidate.address.ip();
        run.context.federation.may_dial(ip, false) || (addresses.contains(&ip) && run.context.federation.may_dial(ip, true))
    };
    let find = |is_tcp| {
        joined
            .candidates
            .iter()
            .filter(may_ask)
            .find(|candidate| candidate.is_tcp == is_tcp)
            .copied()
    };
    let (udp, tcp) = (find(false), find(true));
    let has = |is_tcp| joined.candidates.iter().any(|candidate| candidate.is_tcp == is_tcp);
    let (has_udp, has_tcp) = (has(false), has(true));
    let verdict = if sink.view() == View::Outside {
        Verdict::Fail
    } else {
        Verdict::Warn
    };
    match udp {
        Some(udp) if answers_by_udp(&mut joined, udp.address).await => {
            sink.ok("udp", &format_args!("the SFU answers at {}", udp.address));
        }
        Some(udp) => {
            let saw = format_args!("no answer to a connectivity check at {}", udp.address);
            sink.fault(verdict, "udp", &fault::SFU_UDP, &saw, None);
        }
        None if has_udp => sink.skip(&["udp"], NOT_ASKED),
        None => sink.fail("udp", &fault::SFU_UDP, &"the SFU names no address for UDP"),
    }
    match tcp {
        Some(tcp) => {
            let why = match timeout(TCP_TIMEOUT, TcpStream::connect(tcp.address)).await {
                Ok(Ok(_)) => return sink.ok("tcp", &format_args!("{} takes connections", tcp.address)),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            sink.fault(verdict, "tcp", &fault::SFU_TCP, &format_args!("{}: {why}", tcp.address), None);
        }
        None if has_tcp => sink.skip(&["tcp"], NOT_ASKED),
        None => sink.warn("tcp", &fault::SFU_TCP, &"the SFU names no address for TCP"),
    }
}

/// Whether the SFU answers a connectivity check by UDP: nothing but the SFU, or what speaks STUN in its place, can.
async fn answers_by_udp(joined: &mut Joined, address: SocketAddr) -> bool {
    let Some(ice) = joined.ice.clone() else { return false };
    let (ufrag, password) = (nonce(), format!("{}{}", nonce(), nonce()));
    let request = answer_request(answer(&ufrag, &password));
    if joined.socket.write(&request).await.is_err() {
        return false;
    }
    let any: IpAddr = if address.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let Ok(socket) = UdpSocket::bind(SocketAddr::new(any, 0)).await else {
        return false;
    };
    if socket.connect(address).await.is_err() {
        return false;
    }
    // One transaction: an answer to the first question is one, however late it comes (RFC 8489, section 6.2.1).
    let id: [u8; 12] = rand::random();
    let question = binding_request(&ice, &ufrag, id);
    let mut buffer = [0; 1500];
    for left in (0..UDP_TRIES).rev() {
        // What cannot be sent now may be later.
        let _ = socket.send(&question).await;
        let until = Instant::now() + if left == 0 { UDP_TIMEOUT } else { UDP_PAUSE };
        while let Ok(heard) = timeout_at(until, socket.recv(&mut buffer)).await {
            match heard {
                Ok(length) if is_answer(&buffer[..length], id) => return true,
                // Its own checks come here, too.
                Ok(_) => {}
                // A port that is closed says so once for each question.
                Err(_) => sleep_until(until).await,
            }
        }
    }
    false
}

fn fault_of(error: &SfuError) -> &'static Fault {
    match error {
        SfuError::Connect(text) if crate::tls::remedy(text).is_some() => &fault::SFU_CERTIFICATE,
        SfuError::Connect(_) | SfuError::Timeout | SfuError::Broken(_) => &fault::SFU_UNREACHABLE,
        SfuError::UnknownKey => &fault::SFU_KEY,
        SfuError::WrongSecret => &fault::SFU_SECRET,
        SfuError::Clock => &fault::SFU_CLOCK,
        SfuError::BadRoute => &fault::SFU_PATH,
        SfuError::NotLiveKit(_) | SfuError::TooLarge => &fault::SFU_NOT_LIVEKIT,
        SfuError::Denied | SfuError::NotFound | SfuError::Refused(_) | SfuError::Overloaded(_) | SfuError::Token => &fault::SFU_TROUBLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_address_is_read_as_clients_do() {
        for (text, base) in [
            ("wss://livekit.example.com", Some("https://livekit.example.com/")),
            (
                "WSS://livekit.example.com/livekit/sfu",
                Some("https://livekit.example.com/livekit/sfu/"),
            ),
            ("ws://localhost:7880/", Some("http://localhost:7880/")),
            ("https://x.example/?a=b", Some("https://x.example/")),
            ("ftp://x.example", None),
            ("", None),
        ] {
            assert_eq!(base_of(text).as_ref().map(Url::as_str), base, "{text}");
        }
    }

    #[test]
    fn answers_of_others_are_told_from_those_of_the_sfu() {
        let id = |status: u16, body: &[u8]| {
            let judged = judge(StatusCode::from_u16(status).unwrap(), body);
            judged.map(|(_, fault, saw)| {
                assert!(!saw.contains("eyJ"), "{saw}");
                fault.id
            })
        };
        assert_eq!(id(200, b"success"), None);
        assert_eq!(id(200, b"<html>"), Some("sfu-public-path"));
        assert_eq!(id(404, b"requested room does not exist"), Some("sfu-public-other"));
        assert_eq!(id(404, b"404 page not found"), Some("sfu-public-path"));
        assert_eq!(id(401, b"invalid API key: x"), Some("sfu-public-other"));
        assert_eq!(id(502, b"<html>"), Some("sfu-public-unreachable"));
        assert_eq!(id(301, b""), Some("sfu-public-path"));
    }
}
