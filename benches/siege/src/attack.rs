//! The attackers: 32 addresses, no account anywhere.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::honest::{Signals, fresh_name};
use crate::http;
use crate::places::{DOMAINS, LISTED, Places, VERIFIED, scrambled};
use crate::world::{KEY, World};

/// Most connections or requests of one kind in the air.
const MOST_IN_AIR: u64 = 4_000;
/// Nobody waits longer for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Nobody holds a connection longer.
const HELD_FOR: Duration = Duration::from_secs(120);
/// Spellings and names of the hanging homeservers, by kinds of a fifth each.
const SPELLINGS: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    StalledHeads,
    Silent,
    ChunkBombs,
    Streams,
    JunkListed,
    JunkVerified,
    JunkNew,
    HangingNames,
    FanOuts,
    StalledWebhooks,
    ForgedTickets,
}

impl Kind {
    pub const ALL: [Self; 11] = [
        Self::StalledHeads,
        Self::Silent,
        Self::ChunkBombs,
        Self::Streams,
        Self::JunkListed,
        Self::JunkVerified,
        Self::JunkNew,
        Self::HangingNames,
        Self::FanOuts,
        Self::StalledWebhooks,
        Self::ForgedTickets,
    ];

    /// Its name, and how many of it begin each second.
    pub fn plan(self) -> (&'static str, u64) {
        match self {
            Self::StalledHeads => ("stalled-heads", 50),
            Self::Silent => ("silent", 50),
            Self::ChunkBombs => ("chunk-bombs", 5),
            Self::Streams => ("1xx-streams", 2),
            Self::JunkListed => ("junk-listed", 100),
            Self::JunkVerified => ("junk-verified", 100),
            Self::JunkNew => ("junk-new", 100),
            Self::HangingNames => ("hanging-names", 50),
            Self::FanOuts => ("fan-outs", 5),
            Self::StalledWebhooks => ("stalled-webhooks", 5),
            Self::ForgedTickets => ("forged-tickets", 100),
        }
    }
}

/// What became of the attacks of one kind.
#[derive(Default)]
pub struct Tally {
    pub begun: AtomicU64,
    /// Not begun, since too many were in the air.
    pub skipped: AtomicU64,
    pub in_air: AtomicU64,
    pub most_in_air: AtomicU64,
    pub not_connected: AtomicU64,
    pub answered_200: AtomicU64,
    pub answered_401: AtomicU64,
    pub answered_503: AtomicU64,
    pub answered_else: AtomicU64,
    pub closed: AtomicU64,
    pub gave_up: AtomicU64,
}

pub struct Attackers {
    pub places: Places,
    pub world: Arc<World>,
    pub signals: Arc<Signals>,
    pub tallies: [Tally; Kind::ALL.len()],
    pub next: AtomicU64,
}

enum End {
    NotConnected,
    Answered(u16),
    Closed,
    GaveUp,
}

impl Attackers {
    /// Attacks until it is stopped. Runs in a `LocalSet`, which ends what is in the air when it is dropped.
    pub async fn run(self: Arc<Self>, kinds: Vec<Kind>) {
        let began = Instant::now();
        let mut due = [0u64; Kind::ALL.len()];
        while !self.signals.stop.load(Relaxed) {
            for kind in &kinds {
                let i = *kind as usize;
                let wanted = (began.elapsed().as_secs_f64() * kind.plan().1 as f64) as u64;
                while due[i] < wanted {
                    due[i] += 1;
                    self.begin(*kind, due[i] - 1);
                }
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn begin(self: &Arc<Self>, kind: Kind, i: u64) {
        let tally = &self.tallies[kind as usize];
        if tally.in_air.load(Relaxed) >= MOST_IN_AIR {
            tally.skipped.fetch_add(1, Relaxed);
            return;
        }
        tally.begun.fetch_add(1, Relaxed);
        let in_air = tally.in_air.fetch_add(1, Relaxed) + 1;
        tally.most_in_air.fetch_max(in_air, Relaxed);
        let me = self.clone();
        tokio::task::spawn_local(async move {
            let end = me.attack(kind, i).await;
            let tally = &me.tallies[kind as usize];
            tally.in_air.fetch_sub(1, Relaxed);
            let to = match end {
                End::NotConnected => &tally.not_connected,
                End::Answered(200) => &tally.answered_200,
                End::Answered(401) => &tally.answered_401,
                End::Answered(503) => &tally.answered_503,
                End::Answered(_) => &tally.answered_else,
                End::Closed => &tally.closed,
                End::GaveUp => &tally.gave_up,
            };
            to.fetch_add(1, Relaxed);
        });
    }

    async fn attack(&self, kind: Kind, i: u64) -> End {
        let to = self.world.service();
        match kind {
            Kind::StalledHeads if i.is_multiple_of(2) => {
                let head =
                    format!("POST /get_token HTTP/1.1\r\nHost: {to}\r\nContent-Type: application/json\r\nContent-Length: 2000\r\n\r\n");
                self.send(to, head.as_bytes(), HELD_FOR).await
            }
            Kind::StalledHeads => {
                let head = format!("POST /get_token HTTP/1.1\r\nHost: {to}\r\nX-Padding: {i:060}\r\n");
                self.send(to, head.as_bytes(), HELD_FOR).await
            }
            Kind::Silent => self.send(to, b"", HELD_FOR).await,
            // Every other one is behind a name that was verified before.
            Kind::ChunkBombs => {
                let name = match i % 4 {
                    0 => format!("b{i}.bomb.siege:8448"),
                    2 => format!("b{i}.bomb.siege"),
                    _ => format!("v{}.bomb.siege:8448", i / 2 % 10),
                };
                self.ask(to, &name).await
            }
            Kind::Streams if i.is_multiple_of(2) => self.ask(to, &format!("i{i}.info.siege:8448")).await,
            Kind::Streams => self.ask(to, &format!("v{}.info.siege:8448", i / 2 % 4)).await,
            Kind::JunkListed => self.ask(to, LISTED).await,
            Kind::JunkVerified => self.ask(to, VERIFIED).await,
            Kind::JunkNew => self.ask(to, &fresh_name(self.signals.besieged.load(Relaxed).max(1))).await,
            Kind::HangingNames => self.ask(to, &hanging(i)).await,
            Kind::FanOuts => {
                self.ask(to, &format!("f{i}.{}.siege", ["fan", "fanr", "fana"][(i % 3) as usize]))
                    .await
            }
            Kind::StalledWebhooks => {
                let body = format!(
                    "{{\"event\":\"participant_left\",\"id\":\"EV_{i}\",\"padding\":\"{}\"}}",
                    "x".repeat(1400)
                );
                // The signature is somebody else's; of every other one the body stays away.
                let mut request = self.world.webhook(&body, KEY, "notthesecretnotthesecretnotthese");
                if i.is_multiple_of(2) {
                    request.truncate(request.len() - body.len());
                } else {
                    // Neither does the head come to its end.
                    request.truncate(request.len() - body.len() - 2);
                }
                self.send(to, &request, HELD_FOR).await
            }
            // For doctor. Of every other one the body stays away.
            Kind::ForgedTickets => {
                let ticket = "eyJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJkb2N0b3IifQ.c2lnbmVkLWJ5LW5vYm9keS1hdC1hbGwtMDEyMzQ1Njc4OWE";
                let length = [0, 60_000][(i % 2) as usize];
                let head =
                    format!("POST /doctor HTTP/1.1\r\nHost: {to}\r\nAuthorization: Bearer {ticket}\r\nContent-Length: {length}\r\n\r\n");
                self.send(to, head.as_bytes(), HELD_FOR).await
            }
        }
    }

    /// A whole request for a token of `server`, with a token that nobody knows and nobody else has written.
    async fn ask(&self, to: SocketAddr, server: &str) -> End {
        let n = self.next.fetch_add(1, Relaxed);
        let body = json!({
            "room_id": format!("!r{}:{server}", n % 1000),
            "slot_id": "m.call#ROOM",
            "openid_token": {
                "access_token": format!("junk{:016x}{n:08x}", scrambled(n)),
                "token_type": "Bearer",
                "matrix_server_name": server,
                "expires_in": 3600,
            },
            "member": {"id": format!("j{n}"), "claimed_user_id": format!("@j{n}:{server}"), "claimed_device_id": "JUNK"},
        });
        self.send(to, &http::post(to, "/get_token", &body.to_string()), TIMEOUT).await
    }

    /// Writes, and holds the connection until there is an answer or an end.
    async fn send(&self, to: SocketAddr, bytes: &[u8], limit: Duration) -> End {
        let Some(mut stream) = http::connect(self.places.attacker(self.next.fetch_add(1, Relaxed)), to).await else {
            return End::NotConnected;
        };
        if !bytes.is_empty() && stream.write_all(bytes).await.is_err() {
            return End::Closed;
        }
        let mut buffer = [0; 512];
        match timeout(limit, stream.read(&mut buffer)).await {
            Err(_) => End::GaveUp,
            Ok(Ok(n)) if n > 12 => {
                let status = std::str::from_utf8(&buffer[9..12]).ok().and_then(|s| s.parse().ok());
                End::Answered(status.unwrap_or(0))
            }
            Ok(_) => End::Closed,
        }
    }
}

/// Names that hang, in DNS, in TLS or at userinfo.
fn hanging(i: u64) -> String {
    let n = i % SPELLINGS;
    match n % 5 {
        // A few names in many spellings.
        0 => {
            let bits = scrambled(n);
            let letters = format!("hang{}.evil.siege", n / 5 % 4);
            let spell = |(at, c): (usize, char)| if bits >> at & 1 == 1 { c.to_ascii_uppercase() } else { c };
            let name: String = letters.chars().enumerate().map(spell).collect();
            let dot = ["", "", "."][(bits >> 32) as usize % 3];
            let port = ["", ":8448", ":9443", ":8449", ":09443", ":08448"][(bits >> 40) as usize % 6];
            format!("{name}{dot}{port}")
        }
        1 => format!("w{n}.silent.siege{}", [":8448", ""][(n / 5 % 2) as usize]),
        2 => format!("w{n}.tarpit.siege{}", [":8448", ""][(n / 5 % 2) as usize]),
        3 => format!("w{n}.slow.siege{}", [":8448", ""][(n / 5 % 2) as usize]),
        // Domains of their own: fifty names at a time verify, and then hang three times.
        _ => {
            let s = i / 5;
            let k = s / 200 * 50 + s % 50;
            format!("x{k}.d{}.siege:8448", k % DOMAINS)
        }
    }
}
