//! Those who ask: users, strangers, the SFU's webhooks, and participants whose leaves are delegated.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use siege::honest::{SLOT, body};
use siege::places::{LISTED, VERIFIED, scrambled};
use siege::world::{DELAY, World, hashed};
use siege::{http, world};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, sleep_until};

use crate::ledger::{Answer, Ledger};

/// Longer than the service may hold a request.
const TIMEOUT: Duration = Duration::from_secs(40);
const HOUR: Duration = Duration::from_secs(3600);
/// When a client of an SFU that went away tries again, in tenths of a second, each after the last.
const TRIES: [u64; 7] = [3, 3, 14, 30, 60, 80, 70];
/// Everybody leaves within.
pub const ALL_LEAVE_WITHIN: Duration = Duration::from_secs(10);
const PER_ROOM: u64 = 5;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Phase {
    Load,
    AllLeave,
    Over,
}

/// What a participant sees of the SFU.
#[derive(Clone, Copy)]
pub struct Sfu {
    pub is_up: bool,
    /// How often it has forgotten everything.
    pub starts: u64,
}

pub struct Town {
    pub world: Arc<World>,
    pub ledger: Ledger,
    pub service: Mutex<SocketAddr>,
    /// What webhooks are signed with.
    pub key: Mutex<(String, String)>,
    /// The key of the last token.
    pub issuer: Mutex<String>,
    pub phase: watch::Sender<Phase>,
    pub sfu: watch::Sender<Sfu>,
    /// Participants who gave up since their room did not come back.
    pub stranded: AtomicU64,
    pub webhooks_lost: AtomicU64,
    /// As many as livekit-server sends at a time.
    telling: Semaphore,
}

#[derive(Clone, Copy)]
enum Kind {
    Listed,
    Verified,
    Junk,
    Malformed,
    NoSuchPath,
    Preflight,
    Health,
    Webhook,
}

/// How many of each begin each second; the leaves come on top.
const RATES: [(Kind, u64); 8] = [
    (Kind::Listed, 105),
    (Kind::Verified, 60),
    (Kind::Junk, 40),
    (Kind::Malformed, 10),
    (Kind::NoSuchPath, 5),
    (Kind::Preflight, 5),
    (Kind::Health, 20),
    (Kind::Webhook, 55),
];

impl Town {
    pub fn new(world: Arc<World>) -> Self {
        Self {
            service: Mutex::new(world.places.service()),
            world,
            ledger: Ledger::default(),
            key: Mutex::new((world::KEY.into(), world::SECRET.into())),
            issuer: Mutex::default(),
            phase: watch::Sender::new(Phase::Load),
            sfu: watch::Sender::new(Sfu { is_up: true, starts: 0 }),
            stranded: AtomicU64::new(0),
            webhooks_lost: AtomicU64::new(0),
            telling: Semaphore::new(50),
        }
    }

    /// Everybody begins. Runs in a `LocalSet`.
    pub async fn run(self: Arc<Self>, leaves: u64, short: u64, ramp: Duration) {
        for i in 0..leaves {
            tokio::task::spawn_local(self.clone().leaf(i, i < short, ramp.mul_f64(i as f64 / leaves as f64)));
        }
        let (began, mut phase) = (Instant::now(), self.phase.subscribe());
        let mut due = [0u64; RATES.len()];
        while *phase.borrow_and_update() == Phase::Load {
            for (i, (kind, rate)) in RATES.into_iter().enumerate() {
                let wanted = (began.elapsed().as_secs_f64() * rate as f64) as u64;
                while due[i] < wanted {
                    due[i] += 1;
                    tokio::task::spawn_local(self.clone().once(kind));
                }
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends a request under an id of its own; its status, none without an answer.
    async fn ask(&self, request: &[u8], probe: bool, good: bool) -> (u16, String) {
        let id = self.world.unique();
        let to = *self.service.lock().unwrap();
        let line = request.iter().position(|b| *b == b'\n').map_or(0, |at| at + 1);
        let mut bytes = request[..line].to_vec();
        bytes.extend(format!("X-Request-Id: s{id}\r\n").bytes());
        bytes.extend(&request[line..]);
        let outcome = http::ask(self.world.places.honest(id), to, &bytes, TIMEOUT).await;
        let answer = match (outcome.sent, outcome.status) {
            (false, _) => Answer::NotConnected,
            (true, 0) => Answer::Silent,
            (true, status) => Answer::Status {
                status,
                probe,
                good,
                took: outcome.took,
            },
        };
        self.ledger.note(id, &answer);
        (outcome.status, outcome.body)
    }

    async fn once(self: Arc<Self>, kind: Kind) {
        let n = self.world.unique();
        let to = self.world.places.service();
        match kind {
            Kind::Listed => self.token(LISTED, n).await,
            Kind::Verified => self.token(VERIFIED, n).await,
            Kind::Junk => {
                let mut body = body(LISTED, "junk", n, &format!("!room{}:{LISTED}", n % 50), "m");
                body["openid_token"]["access_token"] = json!(format!("junk{:016x}", scrambled(n)));
                self.ask(&http::post(to, "/get_token", &body.to_string()), false, false).await;
            }
            Kind::Malformed => {
                let bodies = ["{", "{}", "[]", "{\"room\":7}", "null"];
                self.ask(&http::post(to, "/sfu/get", bodies[n as usize % bodies.len()]), false, false)
                    .await;
            }
            Kind::NoSuchPath => {
                let request = format!("GET /nothing/{} HTTP/1.1\r\nHost: {to}\r\n\r\n", n % 100);
                self.ask(request.as_bytes(), false, false).await;
            }
            Kind::Preflight => {
                let request = format!(
                    "OPTIONS /get_token HTTP/1.1\r\nHost: {to}\r\nOrigin: https://call.siege\r\nAccess-Control-Request-Method: POST\r\n\r\n"
                );
                self.ask(request.as_bytes(), true, true).await;
            }
            Kind::Health => {
                let request = format!("GET /healthz HTTP/1.1\r\nHost: {to}\r\n\r\n");
                self.ask(request.as_bytes(), true, true).await;
            }
            // Of participants whose leaves are not delegated.
            Kind::Webhook => {
                self.sfu_is_up().await;
                let (room, identity) = (format!("filler{}", n % 20), format!("@filler{n}:{LISTED}:DEVICE"));
                let joined = self.world.join(&room, &identity);
                let left = self.world.leave(&room, &identity, None);
                self.tell_until_taken(&left.filter(|_| n.is_multiple_of(2)).unwrap_or(joined)).await;
            }
        }
    }

    async fn token(&self, server: &str, n: u64) {
        let to = self.world.places.service();
        let room = format!("!room{}:{server}", n % 50);
        let mut body = body(server, &format!("u{n}"), n, &room, &format!("m{n}"));
        let mut path = "/get_token";
        if n.is_multiple_of(2) {
            path = "/sfu/get";
            body = json!({"room": room, "openid_token": body["openid_token"], "device_id": "DEVICE"});
        }
        let (status, text) = self.ask(&http::post(to, path, &body.to_string()), false, true).await;
        if status == 200
            && let Some(issuer) = issuer(&text)
        {
            *self.issuer.lock().unwrap() = issuer;
        }
    }

    async fn tell(&self, event: &Value) -> bool {
        let (key, secret) = self.key.lock().unwrap().clone();
        let request = self.world.webhook(&event.to_string(), &key, &secret);
        let _turn = self.telling.acquire().await;
        self.ask(&request, false, true).await.0 == 200
    }

    /// As livekit-server does: again after a while.
    async fn tell_until_taken(&self, event: &Value) {
        for pause in [1, 2, 4, 8, 0] {
            if self.tell(event).await {
                return;
            }
            sleep(Duration::from_secs(pause)).await;
        }
        self.webhooks_lost.fetch_add(1, Relaxed);
    }

    async fn sfu_is_up(&self) {
        let _ = self.sfu.subscribe().wait_for(|sfu| sfu.is_up).await;
    }

    /// Somebody who joins with a delegated leave, stays, says goodbye, and comes again.
    async fn leaf(self: Arc<Self>, i: u64, short: bool, after: Duration) {
        sleep(after).await;
        let (user, room) = (format!("p{i}"), format!("!call{}:{LISTED}", i / PER_ROOM));
        let alias = hashed(&[&room, SLOT]);
        let (delay, stays) = if short { (DELAY, (20, 120)) } else { (HOUR, (60, 1200)) };
        let (mut sfu, mut phase) = (self.sfu.subscribe(), self.phase.subscribe());
        for visit in 0u64.. {
            if *phase.borrow_and_update() != Phase::Load {
                return;
            }
            let n = self.world.unique();
            let (member, id) = (format!("m{i}-{visit}"), format!("syd_{i}_{visit}"));
            let mut body = body(LISTED, &user, n, &room, &member);
            body["delay_id"] = json!(id);
            body["delay_timeout"] = json!(delay.as_millis() as u64);
            self.world.schedule(&id, delay);
            let request = http::post(self.world.places.service(), "/delegate_delayed_leave", &body.to_string());
            if self.ask(&request, false, true).await.0 != 200 {
                self.world.forget(&id);
                sleep(Duration::from_millis(1000 + scrambled(n) % 2000)).await;
                continue;
            }
            let identity = hashed(&[&format!("@{user}:{LISTED}"), "DEVICE", &member]);
            self.sfu_is_up().await;
            sfu.borrow_and_update();
            let joined = self.world.join(&alias, &identity);
            self.world.arrive(&id);
            self.tell_until_taken(&joined).await;
            let end = tokio::time::Instant::now() + Duration::from_secs(stays.0 + scrambled(n) % (stays.1 - stays.0));
            let stayed = loop {
                tokio::select! {
                    () = sleep_until(end) => break true,
                    _ = phase.changed() => {
                        sleep(ALL_LEAVE_WITHIN.mul_f64((scrambled(n) % 1000) as f64 / 1000.0)).await;
                        break true;
                    }
                    _ = sfu.changed() => {
                        let now = *sfu.borrow_and_update();
                        if self.world.is_present(&alias, &identity) && now.is_up {
                            continue;
                        }
                        if !self.comes_back(&alias, &identity).await {
                            break false;
                        }
                        sfu.borrow_and_update();
                    }
                }
            };
            if stayed {
                self.sfu_is_up().await;
                if !self.world.is_present(&alias, &identity) && !self.comes_back(&alias, &identity).await {
                    self.strand(&id);
                } else if let Some(left) = self.world.leave(&alias, &identity, Some(&id)) {
                    self.tell_until_taken(&left).await;
                }
            } else {
                self.strand(&id);
            }
            sleep(Duration::from_millis(500 + scrambled(n) % 2000)).await;
        }
    }

    fn strand(&self, id: &str) {
        self.stranded.fetch_add(1, Relaxed);
        self.world.depart(id);
    }

    /// The SFU has forgotten them, or does not answer: as SDKs do, until their room is there again.
    async fn comes_back(&self, room: &str, identity: &str) -> bool {
        for tenths in TRIES {
            sleep(Duration::from_millis(tenths * 100 + scrambled(self.world.unique()) % 50)).await;
            if !self.sfu.borrow().is_up {
                continue;
            }
            if self.world.is_present(room, identity) {
                return true;
            }
            if self.world.has_room(room) {
                let joined = self.world.join(room, identity);
                self.tell_until_taken(&joined).await;
                return true;
            }
        }
        false
    }
}

/// Who signed the token of an answer.
fn issuer(answer: &str) -> Option<String> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    let claims = answer["jwt"].as_str()?.split('.').nth(1)?;
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    Some(claims["iss"].as_str()?.to_owned())
}
