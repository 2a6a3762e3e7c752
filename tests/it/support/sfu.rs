//! LiveKit's RoomService as a real livekit-server 1.13.5 answers (`Twirp`, protobuf), with faults on request.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use livekit_protocol as proto;
use prost::Message;
use rustls::ServerConfig;
use serde_json::json;

use super::ca::Ca;
use super::jwt::Jwt;
use super::neighbour::{Neighbour, Reply, Request};
use super::{secrets, unique, unique_loopback};

/// How the SFU misbehaves.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Answers after this time.
    Slow(Duration),
    /// Never answers.
    Hang,
    /// Closes the connection instead of answering.
    Close,
    /// Answers this instead.
    Instead(Reply),
    /// The grant that the call needs is missing: 401 in Twirp JSON.
    NoGrant,
    /// A proxy's error page.
    ProxyPage(u16),
    /// The same, and only for ListRooms.
    NoRoomList(u16),
    /// 200 with a body that is no protobuf.
    Garbage,
    /// Nothing but CreateRoom and GetParticipant is known; anything else is 404 without a body.
    TwoCalls,
    /// Every second request is answered by the front, with a 502: one of two backends is dead.
    HalfDead,
    /// A gateway's or proxy's answer to these calls (ends of their paths), and to no other.
    InsteadOf(&'static [&'static str], Reply),
}

/// What a room looks like in answers.
#[derive(Clone, Debug)]
pub(crate) struct RoomShape {
    pub(crate) num_participants: u32,
    pub(crate) empty_timeout: u32,
    pub(crate) departure_timeout: u32,
    /// How long ago the room was created when it is first asked for.
    pub(crate) age: Duration,
}

impl Default for RoomShape {
    fn default() -> Self {
        Self {
            num_participants: 0,
            empty_timeout: 300,
            departure_timeout: 20,
            age: Duration::ZERO,
        }
    }
}

struct State {
    key: String,
    secret: String,
    /// Other pairs that it takes.
    others: Mutex<Vec<(String, String)>>,
    prefix: String,
    fault: Mutex<Option<Fault>>,
    shape: Mutex<RoomShape>,
    /// Name to sid and creation time in milliseconds.
    rooms: Mutex<HashMap<String, (String, i64)>>,
    /// Who is there, by room and identity.
    present: Mutex<HashMap<(String, String), proto::ParticipantInfo>>,
    /// What was wrong with requests that a real server would have taken.
    complaints: Mutex<Vec<String>>,
    /// Requests of [`Fault::HalfDead`].
    turns: AtomicUsize,
    auto_create: AtomicBool,
}

/// One participant's stay in a room.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) room: String,
    pub(crate) room_sid: String,
    pub(crate) identity: String,
    pub(crate) sid: String,
    pub(crate) joined_at_ms: i64,
}

pub(crate) struct Sfu {
    pub(crate) http: Neighbour,
    tls: Option<Arc<ServerConfig>>,
    state: Arc<State>,
}

impl Sfu {
    pub(crate) fn start() -> Self {
        Self::below("")
    }

    /// Behind a proxy that routes `prefix` to it, and nothing else.
    pub(crate) fn below(prefix: &str) -> Self {
        Self::start_with(unique_loopback(), prefix, None)
    }

    /// Behind TLS, with a certificate for this name.
    pub(crate) fn certified(name: &str) -> Self {
        Self::start_with(unique_loopback(), "", Some(Ca::trusted().server(&[name.to_owned()])))
    }

    /// At this address, behind this TLS.
    pub(crate) fn behind(ip: Ipv4Addr, tls: Arc<ServerConfig>) -> Self {
        Self::start_with(ip, "", Some(tls))
    }

    /// Whether joining opens rooms (`auto_create`).
    pub(crate) fn auto_create(&self, on: bool) {
        self.state.auto_create.store(on, Relaxed);
    }

    fn start_with(ip: Ipv4Addr, prefix: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let state = Arc::new(State {
            key: "sfukey".into(),
            secret: secrets::sfu_secret(),
            others: Mutex::default(),
            prefix: prefix.into(),
            fault: Mutex::default(),
            shape: Mutex::default(),
            rooms: Mutex::default(),
            present: Mutex::default(),
            complaints: Mutex::default(),
            turns: AtomicUsize::new(0),
            auto_create: AtomicBool::new(false),
        });
        let answering = state.clone();
        let address = (ip, 0).into();
        Self {
            http: Neighbour::start(address, tls.clone(), move |request| answering.reply(request)),
            tls,
            state,
        }
    }

    /// The same rooms and people at another address, on the same port. Faults are those of the old place.
    pub(crate) fn elsewhere(&self) -> Neighbour {
        let answering = self.state.clone();
        let address = (unique_loopback(), self.http.address().port()).into();
        Neighbour::start(address, self.tls.clone(), move |request| answering.answer(request))
    }

    /// A forward proxy that is asked for this SFU by any name.
    pub(crate) fn proxy(&self) -> Neighbour {
        let answering = self.state.clone();
        Neighbour::start((unique_loopback(), 0).into(), None, move |request| {
            let mut asked = request.clone();
            let at = request.path.match_indices('/').nth(2).map_or(0, |(at, _)| at);
            asked.path = request.path[at..].to_owned();
            answering.answer(&asked)
        })
    }

    pub(crate) fn key(&self) -> &str {
        &self.state.key
    }

    pub(crate) fn secret(&self) -> &str {
        &self.state.secret
    }

    /// Takes this pair, too, from now on.
    pub(crate) fn accept(&self, key: &str, secret: &str) {
        self.state.others.lock().unwrap().push((key.into(), secret.into()));
    }

    /// As `LIVEKIT_URL` names it.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        format!("{scheme}://{}{}", self.http.address(), self.state.prefix)
    }

    pub(crate) fn fail(&self, fault: Option<Fault>) {
        *self.state.fault.lock().unwrap() = fault;
    }

    pub(crate) fn shape_rooms(&self, shape: RoomShape) {
        *self.state.shape.lock().unwrap() = shape;
    }

    /// Forgets all rooms, as a restart does.
    pub(crate) fn forget_rooms(&self) {
        self.state.rooms.lock().unwrap().clear();
    }

    /// Somebody is there from now on, with a new session; returns that session.
    pub(crate) fn join(&self, room: &str, identity: &str) -> Session {
        self.state.room(&proto::CreateRoomRequest {
            name: room.into(),
            ..Default::default()
        });
        let room_sid = self.state.rooms.lock().unwrap()[room].0.clone();
        let session = Session {
            room: room.into(),
            room_sid,
            identity: identity.into(),
            sid: format!("PA_{:012}", unique()),
            joined_at_ms: now_ms(),
        };
        self.enter(&session);
        session
    }

    /// This session is there from now on.
    pub(crate) fn enter(&self, session: &Session) {
        let participant = proto::ParticipantInfo {
            sid: session.sid.clone(),
            identity: session.identity.clone(),
            state: proto::participant_info::State::Active.into(),
            joined_at: session.joined_at_ms / 1000,
            joined_at_ms: session.joined_at_ms,
            ..Default::default()
        };
        let key = (session.room.clone(), session.identity.clone());
        self.state.present.lock().unwrap().insert(key, participant);
    }

    /// The room stands under this sid, or it does not stand.
    pub(crate) fn set_room(&self, room: &str, sid: Option<&str>) {
        let mut rooms = self.state.rooms.lock().unwrap();
        match sid {
            Some(sid) => drop(rooms.insert(room.into(), (sid.into(), now_ms()))),
            None => drop(rooms.remove(room)),
        }
    }

    /// Nobody of this identity is there from now on.
    pub(crate) fn leave(&self, room: &str, identity: &str) {
        self.state.present.lock().unwrap().remove(&(room.into(), identity.into()));
    }

    /// The session of this identity that is there.
    pub(crate) fn sid_of(&self, room: &str, identity: &str) -> Option<String> {
        let present = self.state.present.lock().unwrap();
        present
            .get(&(room.into(), identity.into()))
            .map(|participant| participant.sid.clone())
    }

    /// When GetParticipant was asked about this one.
    pub(crate) fn lookups(&self, room: &str, identity: &str) -> Vec<Instant> {
        let about = |r: &Request| {
            r.path.ends_with("/GetParticipant")
                && proto::RoomParticipantIdentity::decode(r.body.as_slice()).is_ok_and(|a| a.room == room && a.identity == identity)
        };
        self.http.times(about)
    }

    /// When somebody asked for the removal of this one.
    pub(crate) fn removals(&self, room: &str, identity: &str) -> Vec<Instant> {
        let about = |r: &Request| {
            r.path.ends_with("/RemoveParticipant")
                && proto::RoomParticipantIdentity::decode(r.body.as_slice()).is_ok_and(|a| a.room == room && a.identity == identity)
        };
        self.http.times(about)
    }

    /// The moments in seconds since 1970 before which tokens were to be refused when this one was removed.
    pub(crate) fn revocations(&self, room: &str, identity: &str) -> Vec<u64> {
        let removals = self.http.requests().into_iter().filter(|r| r.path.ends_with("/RemoveParticipant"));
        let asked = removals.filter_map(|r| proto::RoomParticipantIdentity::decode(r.body.as_slice()).ok());
        let of_it = asked.filter(|a| a.room == room && a.identity == identity);
        of_it.filter_map(|a| u64::try_from(a.revoke_token_ts).ok()).collect()
    }

    /// Whether somebody is there.
    pub(crate) fn has(&self, room: &str, identity: &str) -> bool {
        self.state.present.lock().unwrap().contains_key(&(room.into(), identity.into()))
    }

    /// The names of the rooms that stand.
    pub(crate) fn rooms(&self) -> Vec<String> {
        self.state.rooms.lock().unwrap().keys().cloned().collect()
    }

    /// How often CreateRoom was called.
    pub(crate) fn creations(&self) -> usize {
        self.http.count(|r| r.path.ends_with("/CreateRoom"))
    }

    /// How often CreateRoom was called for this room.
    pub(crate) fn creations_of(&self, alias: &str) -> usize {
        self.asked_to_create(alias).len()
    }

    /// The calls of CreateRoom for this room.
    pub(crate) fn asked_to_create(&self, alias: &str) -> Vec<proto::CreateRoomRequest> {
        let requests = self
            .http
            .requests()
            .into_iter()
            .filter(|request| request.path.ends_with("/CreateRoom"));
        let creations = requests.filter_map(|request| proto::CreateRoomRequest::decode(request.body.as_slice()).ok());
        creations.filter(|creation| creation.name == alias).collect()
    }

    /// Anything that was wrong with the requests besides what their answers said.
    pub(crate) fn complaints(&self) -> Vec<String> {
        self.state.complaints.lock().unwrap().clone()
    }
}

impl State {
    fn reply(&self, request: &Request) -> Reply {
        let fault = self.fault.lock().unwrap().clone();
        match fault {
            None => self.answer(request),
            Some(Fault::Slow(delay)) => self.answer(request).after(delay),
            Some(Fault::Hang) => Reply::Hang,
            Some(Fault::Close) => Reply::Close,
            Some(Fault::Instead(reply)) => reply,
            Some(Fault::NoGrant) => twirp(401, "unauthenticated", "permissions denied"),
            Some(Fault::NoRoomList(_)) if !request.path.ends_with("/ListRooms") => self.answer(request),
            Some(Fault::ProxyPage(status) | Fault::NoRoomList(status)) => Reply::text(
                status,
                "text/html",
                &format!(
                    "<html>\r\n<head><title>{status}</title></head>\r\n<body><center><h1>{status}</h1></center><hr><center>nginx</center></body>\r\n</html>\r\n"
                ),
            ),
            Some(Fault::TwoCalls) if ["/CreateRoom", "/GetParticipant"].iter().any(|call| request.path.ends_with(call)) => {
                self.answer(request)
            }
            Some(Fault::TwoCalls) => Reply::Answer {
                status: 404,
                headers: Vec::new(),
                body: Vec::new(),
            },
            Some(Fault::HalfDead) if self.turns.fetch_add(1, Relaxed).is_multiple_of(2) => {
                Reply::text(502, "text/html", "<h1>Bad Gateway</h1>")
            }
            Some(Fault::HalfDead) => self.answer(request),
            Some(Fault::InsteadOf(calls, reply)) if calls.iter().any(|call| request.path.ends_with(call)) => reply,
            Some(Fault::InsteadOf(..)) => self.answer(request),
            Some(Fault::Garbage) => Reply::text(200, "application/protobuf", "\u{7f}garbage that is no protobuf"),
        }
    }

    fn answer(&self, request: &Request) -> Reply {
        if request.method == "GET" && request.path == format!("{}/", self.prefix) {
            return Reply::text(200, "text/plain; charset=utf-8", "OK");
        }
        if request.path == format!("{}/rtc/validate", self.prefix) {
            return if self.auto_create.load(Relaxed) {
                Reply::text(200, "text/plain; charset=utf-8", "success")
            } else {
                Reply::text(404, "text/plain; charset=utf-8", "requested room does not exist")
            };
        }
        let Some(method) = request.path.strip_prefix(&format!("{}/twirp/livekit.RoomService/", self.prefix)) else {
            return Reply::text(404, "text/plain; charset=utf-8", "404 page not found\n");
        };
        let token = request.header("authorization").and_then(|a| a.strip_prefix("Bearer "));
        let claims = match token {
            None => serde_json::Value::Null,
            Some(token) => match self.claims(token) {
                Ok(claims) => claims,
                Err(refusal) => return Reply::text(401, "text/plain; charset=utf-8", &refusal),
            },
        };
        self.check_form(request, method, &claims);
        let granted = |grant: &str| claims["video"][grant] == true;
        match method {
            "CreateRoom" if !granted("roomCreate") => denied(),
            "CreateRoom" => match proto::CreateRoomRequest::decode(request.body.as_slice()) {
                Ok(asked) if asked.name.len() > 256 => twirp(
                    400,
                    "invalid_argument",
                    "twirp error unknown: room name length exceeds limits: max length 256",
                ),
                Ok(asked) => protobuf(&self.room(&asked)),
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            "GetParticipant" if !granted("roomAdmin") => denied(),
            "GetParticipant" => match proto::RoomParticipantIdentity::decode(request.body.as_slice()) {
                Ok(asked) => match self.present.lock().unwrap().get(&(asked.room, asked.identity)) {
                    Some(participant) => protobuf(participant),
                    None => twirp(404, "not_found", "twirp error unknown: participant does not exist"),
                },
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            "RemoveParticipant" if !granted("roomAdmin") => denied(),
            "RemoveParticipant" => match proto::RoomParticipantIdentity::decode(request.body.as_slice()) {
                Ok(asked) if claims["video"]["room"] != asked.room.as_str() => denied(),
                Ok(asked) => match self.present.lock().unwrap().remove(&(asked.room, asked.identity)) {
                    Some(_) => protobuf(&proto::RemoveParticipantResponse {}),
                    None => twirp(404, "not_found", "twirp error unknown: participant does not exist"),
                },
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            "ListParticipants" if !granted("roomAdmin") => denied(),
            "ListParticipants" => match proto::ListParticipantsRequest::decode(request.body.as_slice()) {
                Ok(asked) => protobuf(&self.participants(&asked.room)),
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            "DeleteRoom" if !granted("roomCreate") => denied(),
            "DeleteRoom" => match proto::DeleteRoomRequest::decode(request.body.as_slice()) {
                Ok(asked) => match self.rooms.lock().unwrap().remove(&asked.room) {
                    Some(_) => protobuf(&proto::DeleteRoomResponse {}),
                    None => twirp(404, "not_found", "twirp error unknown: requested room does not exist"),
                },
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            "ListRooms" if !granted("roomList") => denied(),
            "ListRooms" => match proto::ListRoomsRequest::decode(request.body.as_slice()) {
                Ok(asked) => protobuf(&self.list(&asked)),
                Err(_) => twirp(400, "malformed", "the protobuf request could not be decoded"),
            },
            _ => bad_route(request),
        }
    }

    /// What the token says, or the text with which a real server refuses it.
    fn claims(&self, token: &str) -> Result<serde_json::Value, String> {
        let jwt = Jwt::decode(token).ok_or_else(|| format!("invalid token: {token}, error: token is malformed"))?;
        let others = self.others.lock().unwrap();
        let other = others.iter().find(|(key, _)| jwt.claims["iss"] == key.as_str());
        let secret = match other {
            Some((_, secret)) => secret,
            None if jwt.claims["iss"] == self.key.as_str() => &self.secret,
            None => return Err(format!("invalid API key: {}", jwt.claims["iss"].as_str().unwrap_or_default())),
        };
        if !jwt.is_signed_with(secret) {
            return Err(format!(
                "invalid token: {token}, error: token signature is invalid: signature is invalid"
            ));
        }
        let now = now_ms() / 1000;
        if jwt.claims["exp"].as_i64().unwrap_or(0) + 60 < now {
            return Err(format!("invalid token: {token}, error: token has invalid claims: token is expired"));
        }
        if jwt.claims["nbf"].as_i64().unwrap_or(0) > now + 60 {
            return Err(format!(
                "invalid token: {token}, error: token has invalid claims: token is not valid yet"
            ));
        }
        Ok(jwt.claims)
    }

    /// What our service promises beyond what a real server asks for (decision T6).
    fn check_form(&self, request: &Request, method: &str, claims: &serde_json::Value) {
        let complain = |text: String| self.complaints.lock().unwrap().push(format!("{method}: {text}"));
        if request.method != "POST" {
            complain(format!("method {}", request.method));
        }
        if request.header("content-type") != Some("application/protobuf") {
            complain(format!("content type {:?}", request.header("content-type")));
        }
        let lifetime = claims["exp"].as_i64().unwrap_or(i64::MAX) - now_ms() / 1000;
        if lifetime > 90 {
            complain(format!("the token lives {lifetime} s, not a minute"));
        }
        if claims["video"]["roomJoin"] == true {
            complain("the token could join a room".into());
        }
    }

    fn room(&self, asked: &proto::CreateRoomRequest) -> proto::Room {
        let shape = self.shape.lock().unwrap().clone();
        let here = self.present.lock().unwrap().keys().filter(|(room, _)| *room == asked.name).count();
        let mut rooms = self.rooms.lock().unwrap();
        let fresh = || {
            (
                format!("RM_{:012}", unique()),
                now_ms() - i64::try_from(shape.age.as_millis()).unwrap_or(0),
            )
        };
        let (sid, creation_time_ms) = rooms.entry(asked.name.clone()).or_insert_with(fresh).clone();
        proto::Room {
            sid,
            name: asked.name.clone(),
            empty_timeout: shape.empty_timeout,
            departure_timeout: shape.departure_timeout,
            creation_time: creation_time_ms / 1000,
            creation_time_ms,
            turn_password: "turnpassword".into(),
            enabled_codecs: ["audio/opus", "video/VP8"]
                .map(|mime| proto::Codec {
                    mime: mime.into(),
                    ..Default::default()
                })
                .into(),
            num_participants: shape.num_participants.max(u32::try_from(here).unwrap_or(0)),
            ..Default::default()
        }
    }

    fn participants(&self, room: &str) -> proto::ListParticipantsResponse {
        let present = self.present.lock().unwrap();
        let here = present.iter().filter(|((name, _), _)| name == room);
        proto::ListParticipantsResponse {
            participants: here.map(|(_, participant)| participant.clone()).collect(),
        }
    }

    fn list(&self, asked: &proto::ListRoomsRequest) -> proto::ListRoomsResponse {
        let names = self.rooms.lock().unwrap().keys().cloned().collect::<Vec<_>>();
        let wanted = names.into_iter().filter(|n| asked.names.is_empty() || asked.names.contains(n));
        let rooms = wanted
            .map(|name| {
                self.room(&proto::CreateRoomRequest {
                    name,
                    ..Default::default()
                })
            })
            .collect();
        proto::ListRoomsResponse { rooms }
    }
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_millis()).ok())
        .unwrap_or(0)
}

fn protobuf(message: &impl Message) -> Reply {
    let headers = vec![("Content-Type".into(), "application/protobuf".into())];
    Reply::Answer {
        status: 200,
        headers,
        body: message.encode_to_vec(),
    }
}

fn twirp(status: u16, code: &str, msg: &str) -> Reply {
    Reply::json(status, &json!({"code": code, "msg": msg}))
}

fn denied() -> Reply {
    twirp(401, "unauthenticated", "permissions denied")
}

fn bad_route(request: &Request) -> Reply {
    Reply::json(
        404,
        &json!({
            "code": "bad_route",
            "msg": format!("no handler for path {:?}", request.path),
            "meta": {"twirp_invalid_route": format!("{} {}", request.method, request.path)},
        }),
    )
}
