//! The honest neighbours: homeservers, the SFU, and delayed events with their timers. They say what is true.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use livekit_protocol as proto;
use prost::Message;
use rustls::ServerConfig;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::figures::Samples;
use crate::http::{self, Request};
use crate::places::{LISTED, Places, VERIFIED};

pub const USERINFO: &str = "/_matrix/federation/v1/openid/userinfo";
pub const WELL_KNOWN: &str = "/.well-known/matrix/server";
const DELAYED: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";
pub const KEY: &str = "siegekey";
pub const SECRET: &str = "siegesecretsiegesecretsiegesecret";
/// The delay of every delayed event.
pub const DELAY: Duration = Duration::from_secs(18);
/// A leave must be sent so soon after a goodbye was told.
pub const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// Who judges was late by this: the machine stood still, homeservers and clients with it.
pub const STOOD_STILL: Duration = Duration::from_secs(3);
/// What a homeserver and an SFU need for an answer.
const THINKS: Duration = Duration::from_millis(10);

/// One delayed event.
struct Event {
    delay: Duration,
    deadline: Instant,
    /// Its participant has joined.
    arrived: bool,
    /// The participant's departure was told then.
    departed: Option<Instant>,
    sent: Option<Instant>,
}

#[derive(Default)]
struct State {
    /// How often the SFU was started again.
    starts: u64,
    rooms: HashMap<String, i64>,
    present: HashMap<String, HashMap<String, proto::ParticipantInfo>>,
    events: HashMap<String, Event>,
}

#[derive(Default, Clone)]
pub struct Leaves {
    pub events: u64,
    pub departures: u64,
    /// Sent, or fired by the homeserver, while the participant was there.
    pub false_sent: u64,
    pub false_fired: u64,
    /// Fired while the participant was there, and not only the service had stood still: nobody could restart them.
    pub excused: u64,
    /// Sent, or fired, before the participant had joined: nobody was there.
    pub early: u64,
    /// Not sent in time.
    pub lost: u64,
    /// Fired by the homeserver after they had gone.
    pub by_timer: u64,
    pub slowest: Duration,
    /// When they had gone, and how long it took until that was told.
    pub told: Vec<(Instant, Duration)>,
}

pub struct World {
    pub places: Places,
    pub samples: Arc<Samples>,
    tls: Arc<ServerConfig>,
    state: Mutex<State>,
    leaves: Mutex<Leaves>,
    leave_within: Duration,
    next: AtomicU64,
    /// Replicas of the service, which are asked in turn.
    replicas: Mutex<Vec<SocketAddr>>,
    turn: AtomicU64,
    pub userinfo: AtomicU64,
    pub sfu_calls: AtomicU64,
    pub restarts: AtomicU64,
}

impl World {
    pub fn new(places: Places, samples: Arc<Samples>, tls: Arc<ServerConfig>) -> Self {
        Self {
            places,
            samples,
            tls,
            state: Mutex::default(),
            leaves: Mutex::default(),
            leave_within: LEAVE_WITHIN,
            next: AtomicU64::new(1),
            replicas: Mutex::new(vec![places.service()]),
            turn: AtomicU64::new(0),
            userinfo: AtomicU64::new(0),
            sfu_calls: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
        }
    }

    /// The same with another time within which leaves must be sent.
    #[must_use]
    pub fn with_leaves_within(mut self, most: Duration) -> Self {
        self.leave_within = most;
        self
    }

    /// Those that are asked from now on.
    pub fn serve_at(&self, replicas: Vec<SocketAddr>) {
        *self.replicas.lock().unwrap() = replicas;
    }

    /// Whom a balancer asks next.
    pub fn service(&self) -> SocketAddr {
        let replicas = self.replicas.lock().unwrap();
        replicas[self.turn.fetch_add(1, Relaxed) as usize % replicas.len()]
    }

    pub fn leave_within(&self) -> Duration {
        self.leave_within
    }

    pub fn unique(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    /// Listens for all that stand throughout, at their places or where `at` says instead.
    pub async fn stand(self: &Arc<Self>, at: impl Fn(Ipv4Addr) -> Ipv4Addr) -> std::io::Result<()> {
        self.homeserver(LISTED, at(self.places.listed()).into())?;
        self.homeserver(VERIFIED, at(self.places.verified()).into())?;
        for (address, what) in [(self.places.sfu(), Plain::Sfu), (self.places.listed_client_api(), Plain::ClientApi)] {
            let SocketAddr::V4(address) = address else { continue };
            let listener = http::listen((at(*address.ip()), address.port()).into())?;
            let world = self.clone();
            tokio::spawn(async move {
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        let _ = stream.set_nodelay(true);
                        tokio::spawn(world.clone().talk(stream, what));
                    }
                }
            });
        }
        let world = self.clone();
        tokio::spawn(async move {
            let mut last = Instant::now();
            loop {
                sleep(Duration::from_millis(20)).await;
                let now = Instant::now();
                world.judge(now, now - last);
                last = now;
            }
        });
        Ok(())
    }

    /// A homeserver with TLS on both ports, until it is aborted.
    pub fn homeserver(self: &Arc<Self>, name: &str, at: std::net::IpAddr) -> std::io::Result<Vec<AbortHandle>> {
        let mut tasks = Vec::new();
        for port in [443, 8448] {
            let listener = http::listen(SocketAddr::new(at, port))?;
            let (world, name) = (self.clone(), Arc::<str>::from(name));
            let serving = tokio::spawn(async move {
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        let _ = stream.set_nodelay(true);
                        let (world, name) = (world.clone(), name.clone());
                        tokio::spawn(async move {
                            let acceptor = TlsAcceptor::from(world.tls.clone());
                            if let Ok(Ok(stream)) = timeout(Duration::from_secs(10), acceptor.accept(stream)).await {
                                world.talk_as_homeserver(stream, &name).await;
                            }
                        });
                    }
                }
            });
            tasks.push(serving.abort_handle());
        }
        Ok(tasks)
    }

    async fn talk_as_homeserver<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S, name: &str) {
        let mut buffer = Vec::new();
        while let Some(request) = http::request(&mut stream, &mut buffer).await {
            let answer = match request.path.as_str() {
                WELL_KNOWN if name == VERIFIED => http::json(200, &json!({"m.server": format!("{VERIFIED}:8448")})),
                USERINFO => {
                    self.userinfo.fetch_add(1, Relaxed);
                    sleep(THINKS).await;
                    let token = request.query.strip_prefix("access_token=").unwrap_or_default();
                    match token.strip_prefix("good_").and_then(|t| t.split('_').next()) {
                        Some(user) => http::json(200, &json!({"sub": format!("@{user}:{name}")})),
                        None => http::unknown_token(),
                    }
                }
                _ => http::no_such_page(),
            };
            if stream.write_all(&answer).await.is_err() || stream.flush().await.is_err() {
                return;
            }
        }
    }

    async fn talk(self: Arc<Self>, mut stream: tokio::net::TcpStream, what: Plain) {
        let mut buffer = Vec::new();
        while let Some(request) = http::request(&mut stream, &mut buffer).await {
            sleep(THINKS).await;
            let answer = match what {
                Plain::Sfu => self.sfu(&request),
                Plain::ClientApi => self.client_api(&request),
            };
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    fn sfu(&self, request: &Request) -> Vec<u8> {
        self.sfu_calls.fetch_add(1, Relaxed);
        let body = request.body.as_slice();
        let mut state = self.state.lock().unwrap();
        match request.path.strip_prefix("/twirp/livekit.RoomService/") {
            None => http::reply(200, "text/plain", b"OK"),
            Some("CreateRoom") => match proto::CreateRoomRequest::decode(body) {
                Ok(asked) => protobuf(&state.room(&asked.name)),
                Err(_) => malformed(),
            },
            Some("GetParticipant") => match proto::RoomParticipantIdentity::decode(body) {
                Ok(asked) => match state.present.get(&asked.room).and_then(|room| room.get(&asked.identity)) {
                    Some(participant) => protobuf(participant),
                    None => twirp(404, "not_found", "twirp error unknown: participant does not exist"),
                },
                Err(_) => malformed(),
            },
            Some("ListParticipants") => match proto::ListParticipantsRequest::decode(body) {
                Ok(asked) => protobuf(&proto::ListParticipantsResponse {
                    participants: state.in_room(&asked.room).cloned().collect(),
                }),
                Err(_) => malformed(),
            },
            Some("ListRooms") => match proto::ListRoomsRequest::decode(body) {
                Ok(asked) => {
                    let all: Vec<String> = state.rooms.keys().cloned().collect();
                    let wanted = all.into_iter().filter(|n| asked.names.is_empty() || asked.names.contains(n));
                    protobuf(&proto::ListRoomsResponse {
                        rooms: wanted.map(|name| state.room(&name)).collect(),
                    })
                }
                Err(_) => malformed(),
            },
            Some(_) => twirp(404, "bad_route", "no handler for path"),
        }
    }

    fn client_api(&self, request: &Request) -> Vec<u8> {
        if request.path == "/_matrix/client/versions" {
            return http::json(
                200,
                &json!({"versions": ["v1.1", "v1.12"], "unstable_features": {"org.matrix.msc4140": true}}),
            );
        }
        let call = request.path.strip_prefix(DELAYED).and_then(|rest| rest.split_once('/'));
        let Some((id, what)) = call else {
            return http::json(404, &json!({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}));
        };
        let now = Instant::now();
        let mut state = self.state.lock().unwrap();
        let gone = || http::json(404, &json!({"errcode": "M_NOT_FOUND", "error": "Delayed event not found"}));
        let Some(event) = state.events.get_mut(id) else {
            return gone();
        };
        if event.sent.is_some() {
            return gone();
        }
        match what {
            "restart" => {
                self.restarts.fetch_add(1, Relaxed);
                event.deadline = now + event.delay;
            }
            "send" => {
                event.sent = Some(now);
                match event.departed {
                    Some(at) => {
                        let mut leaves = self.leaves.lock().unwrap();
                        leaves.slowest = leaves.slowest.max(now - at);
                        leaves.told.push((at, now - at));
                    }
                    None if event.arrived => self.leaves.lock().unwrap().false_sent += 1,
                    None => self.leaves.lock().unwrap().early += 1,
                }
            }
            _ => {
                state.events.remove(id);
            }
        }
        http::json(200, &json!({}))
    }

    /// Fires the timers that are over, and gives up on leaves that were not sent.
    /// Nothing was seen for the time that is `unseen`.
    fn judge(&self, now: Instant, unseen: Duration) {
        let allowed = self
            .samples
            .lateness
            .forgiven(now.checked_sub(Duration::from_secs(2)).unwrap_or(now), now);
        let mut state = self.state.lock().unwrap();
        let mut leaves = self.leaves.lock().unwrap();
        state.events.retain(|_, event| match (event.sent, event.departed) {
            (Some(_), _) => false,
            (None, None) if now > event.deadline + allowed => {
                let since = now.checked_sub(event.delay.min(DELAY)).unwrap_or(now);
                if !event.arrived {
                    leaves.early += 1;
                } else if self.samples.lateness.worst(since, now).max(unseen) >= STOOD_STILL {
                    leaves.excused += 1;
                } else {
                    leaves.false_fired += 1;
                }
                false
            }
            (None, Some(at)) if now > event.deadline + allowed => {
                leaves.by_timer += 1;
                leaves.told.push((at, now - at));
                false
            }
            (None, Some(at)) if now > at + self.leave_within + allowed => {
                leaves.lost += 1;
                false
            }
            (None, _) => true,
        });
    }

    pub fn leaves(&self) -> Leaves {
        self.leaves.lock().unwrap().clone()
    }

    /// The homeserver takes an event that will be sent after its delay.
    pub fn schedule(&self, id: &str, delay: Duration) {
        self.leaves.lock().unwrap().events += 1;
        let event = Event {
            delay,
            deadline: Instant::now() + delay,
            arrived: false,
            departed: None,
            sent: None,
        };
        self.state.lock().unwrap().events.insert(id.into(), event);
    }

    /// Its client cares for the event by itself.
    pub fn forget(&self, id: &str) {
        self.state.lock().unwrap().events.remove(id);
    }

    /// Somebody joins; returns the webhook that tells it.
    pub fn join(&self, room: &str, identity: &str) -> Value {
        let now = now_ms();
        let participant = proto::ParticipantInfo {
            sid: format!("PA_{:012}", self.unique()),
            identity: identity.into(),
            state: proto::participant_info::State::Active.into(),
            joined_at: now / 1000,
            joined_at_ms: now,
            ..Default::default()
        };
        self.state.lock().unwrap().room(room);
        let told = self.told("participant_joined", room, &participant, None);
        let mut state = self.state.lock().unwrap();
        state.present.entry(room.into()).or_default().insert(identity.into(), participant);
        told
    }

    /// Somebody says goodbye; returns the webhook that tells it.
    pub fn leave(&self, room: &str, identity: &str, id: Option<&str>) -> Option<Value> {
        let mut state = self.state.lock().unwrap();
        let participant = state.present.get_mut(room)?.remove(identity)?;
        drop(state);
        if let Some(id) = id {
            self.depart(id);
        }
        Some(self.told("participant_left", room, &participant, Some("CLIENT_INITIATED")))
    }

    /// Whoever has this event has joined.
    pub fn arrive(&self, id: &str) {
        if let Some(event) = self.state.lock().unwrap().events.get_mut(id) {
            event.arrived = true;
        }
    }

    /// Whoever has this event is gone for good.
    pub fn depart(&self, id: &str) {
        if let Some(event) = self.state.lock().unwrap().events.get_mut(id) {
            event.departed.get_or_insert_with(Instant::now);
            self.leaves.lock().unwrap().departures += 1;
        }
    }

    /// The SFU was started again: it knows no room and nobody.
    pub fn forget_all_rooms(&self) {
        let mut state = self.state.lock().unwrap();
        state.starts += 1;
        state.rooms.clear();
        state.present.clear();
    }

    pub fn has_room(&self, room: &str) -> bool {
        self.state.lock().unwrap().rooms.contains_key(room)
    }

    pub fn is_present(&self, room: &str, identity: &str) -> bool {
        let state = self.state.lock().unwrap();
        state.present.get(room).is_some_and(|room| room.contains_key(identity))
    }

    /// Events that the homeserver still has.
    pub fn events(&self) -> usize {
        self.state.lock().unwrap().events.len()
    }

    /// Departures that were told since this was asked last.
    pub fn take_told(&self) -> Vec<(Instant, Duration)> {
        std::mem::take(&mut self.leaves.lock().unwrap().told)
    }

    fn told(&self, event: &str, room: &str, participant: &proto::ParticipantInfo, reason: Option<&str>) -> Value {
        let mut about = json!({
            "sid": participant.sid,
            "identity": participant.identity,
            "state": if reason.is_none() { "ACTIVE" } else { "DISCONNECTED" },
            "joinedAt": participant.joined_at.to_string(),
            "joinedAtMs": participant.joined_at_ms.to_string(),
            "version": 3,
        });
        if let Some(reason) = reason {
            about["disconnectReason"] = reason.into();
        }
        json!({
            "event": event,
            "room": {"sid": self.state.lock().unwrap().sid(room), "name": room, "emptyTimeout": 300, "departureTimeout": 20},
            "participant": about,
            "id": format!("EV_{}", self.unique()),
            "createdAt": (now_ms() / 1000).to_string(),
        })
    }

    /// The request that brings a webhook, signed with `secret`.
    pub fn webhook(&self, body: &str, key: &str, secret: &str) -> Vec<u8> {
        let now = now_ms() / 1000;
        let claims = json!({
            "iss": key,
            "exp": now + 300,
            "nbf": now,
            "iat": now,
            "sha256": STANDARD.encode(Sha256::digest(body)),
        });
        let token = signed(&claims, secret);
        format!(
            "POST /sfu_webhook HTTP/1.1\r\nHost: {}\r\nContent-Type: application/webhook+json\r\nAuthorization: {token}\r\nContent-Length: {}\r\n\r\n{body}",
            self.service(),
            body.len()
        )
        .into_bytes()
    }
}

#[derive(Clone, Copy)]
enum Plain {
    Sfu,
    ClientApi,
}

impl State {
    fn room(&mut self, name: &str) -> proto::Room {
        let created = *self.rooms.entry(name.into()).or_insert_with(now_ms);
        proto::Room {
            sid: self.sid(name),
            name: name.into(),
            empty_timeout: 300,
            departure_timeout: 20,
            creation_time: created / 1000,
            creation_time_ms: created,
            num_participants: self.in_room(name).count() as u32,
            ..Default::default()
        }
    }

    fn in_room(&self, room: &str) -> impl Iterator<Item = &proto::ParticipantInfo> {
        self.present.get(room).into_iter().flat_map(HashMap::values)
    }

    fn sid(&self, room: &str) -> String {
        let letters: String = room.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        format!("RM_{letters}{}", self.starts)
    }
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_millis() as i64
}

fn protobuf(message: &impl Message) -> Vec<u8> {
    http::reply(200, "application/protobuf", &message.encode_to_vec())
}

fn twirp(status: u16, code: &str, msg: &str) -> Vec<u8> {
    http::json(status, &json!({"code": code, "msg": msg}))
}

fn malformed() -> Vec<u8> {
    twirp(400, "malformed", "the protobuf request could not be decoded")
}

/// The LiveKit room of a Matrix room, or a participant's identity.
pub fn hashed(parts: &[&str]) -> String {
    STANDARD_NO_PAD.encode(Sha256::digest(serde_json::to_vec(parts).expect("strings")))
}

fn signed(claims: &Value, secret: &str) -> String {
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let text = format!(
        "{}.{}",
        part(br#"{"alg":"HS256","typ":"JWT"}"#),
        part(claims.to_string().as_bytes())
    );
    let mut block = [0u8; 64];
    block[..secret.len()].copy_from_slice(secret.as_bytes());
    let inner = Sha256::new().chain_update(block.map(|b| b ^ 0x36)).chain_update(&text).finalize();
    let outer = Sha256::new().chain_update(block.map(|b| b ^ 0x5c)).chain_update(inner).finalize();
    format!("{text}.{}", part(&outer))
}
