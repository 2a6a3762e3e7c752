//! The honest: users, the SFU's webhooks, delegated leaves, health checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::figures::Class;
use crate::http;
use crate::places::{LISTED, MOST_FRESH, VERIFIED, scrambled};
use crate::world::{DELAY, KEY, LEAVE_WITHIN, SECRET, World, hashed};

pub const SLOT: &str = "m.call#ROOM";
/// Longer than the service may hold a request.
const TIMEOUT: Duration = Duration::from_secs(15);
pub const PARTICIPANTS: u64 = 40;
/// A fresh homeserver comes so often.
const FRESH_EVERY: Duration = Duration::from_secs(2);
/// Junk for one is known to come so long before its first user.
const JUNK_FIRST: Duration = Duration::from_millis(500);

/// What the honest tell the attackers, and what they are told.
#[derive(Default)]
pub struct Signals {
    pub stop: AtomicBool,
    /// The fresh homeserver that junk goes to.
    pub besieged: AtomicU64,
}

pub fn fresh_name(k: u64) -> String {
    format!("matrix.fresh{k}.siege")
}

/// The body of `/get_token`, for somebody with a token that their homeserver knows.
pub fn body(server: &str, user: &str, n: u64, room: &str, member: &str) -> Value {
    json!({
        "room_id": room,
        "slot_id": SLOT,
        "openid_token": {
            "access_token": format!("good_{user}_{:016x}", scrambled(n)),
            "token_type": "Bearer",
            "matrix_server_name": server,
            "expires_in": 3600,
        },
        "member": {"id": member, "claimed_user_id": format!("@{user}:{server}"), "claimed_device_id": "DEVICE"},
    })
}

/// Asks for a token as a user of `server` does; returns the status.
pub async fn exchange(world: &World, server: &str, class: Option<Class>) -> u16 {
    let n = world.unique();
    let (user, room) = (format!("u{n}"), format!("!room{}:{server}", n % 50));
    let mut body = body(server, &user, n, &room, &format!("m{n}"));
    let mut path = "/get_token";
    if n.is_multiple_of(2) {
        path = "/sfu/get";
        body = json!({"room": room, "openid_token": body["openid_token"], "device_id": "DEVICE"});
    }
    let to = world.service();
    let request = http::post(to, path, &body.to_string());
    let outcome = http::ask(world.places.honest(n), to, &request, TIMEOUT).await;
    if let Some(class) = class {
        world.samples.add(class, &outcome);
    }
    outcome.status
}

/// Does something `rate` times a second until it is stopped, whatever becomes of it.
async fn steadily<F: Future<Output = ()> + 'static>(signals: Arc<Signals>, rate: u32, mut what: impl FnMut() -> F) {
    let mut ticks = interval(Duration::from_secs(1) / rate);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while !signals.stop.load(Relaxed) {
        ticks.tick().await;
        tokio::task::spawn_local(what());
    }
}

/// Everybody begins; ends when they were stopped. Runs in a `LocalSet`.
pub async fn run(world: Arc<World>, signals: Arc<Signals>) {
    let spawn = |rate, what: Activity| {
        let world = world.clone();
        tokio::task::spawn_local(steadily(signals.clone(), rate, move || what.once(world.clone())));
    };
    spawn(5, Activity::Ask(LISTED, Class::Listed));
    spawn(5, Activity::Ask(VERIFIED, Class::Verified));
    spawn(10, Activity::Health);
    spawn(20, Activity::Webhook);
    for i in 0..PARTICIPANTS {
        tokio::task::spawn_local(participant(world.clone(), signals.clone(), i));
    }
    let mut ticks = interval(FRESH_EVERY);
    for k in 1..MOST_FRESH {
        ticks.tick().await;
        if signals.stop.load(Relaxed) {
            return;
        }
        tokio::task::spawn_local(fresh(world.clone(), signals.clone(), k));
    }
}

#[derive(Clone, Copy)]
enum Activity {
    Ask(&'static str, Class),
    Health,
    Webhook,
}

impl Activity {
    async fn once(self, world: Arc<World>) {
        let n = world.unique();
        let (from, to) = (world.places.honest(n), world.service());
        match self {
            Self::Ask(server, class) => {
                exchange(&world, server, Some(class)).await;
            }
            Self::Health => {
                let request = format!("GET /healthz HTTP/1.1\r\nHost: {to}\r\n\r\n");
                world
                    .samples
                    .add(Class::Health, &http::ask(from, to, request.as_bytes(), TIMEOUT).await);
            }
            // Of participants whose leaves are not delegated.
            Self::Webhook => {
                let (room, identity) = (format!("filler{}", n % 20), format!("@filler{n}:{LISTED}:DEVICE"));
                let joined = world.join(&room, &identity);
                let told = world
                    .leave(&room, &identity, None)
                    .filter(|_| n.is_multiple_of(2))
                    .unwrap_or(joined);
                tell(&world, &told).await;
            }
        }
    }
}

/// Brings a webhook; true when it was taken.
async fn tell(world: &World, event: &Value) -> bool {
    let (from, to) = (world.places.honest(world.unique()), world.service());
    let request = world.webhook(&event.to_string(), KEY, SECRET);
    let outcome = http::ask(from, to, &request, TIMEOUT).await;
    world.samples.add(Class::Webhook, &outcome);
    outcome.status == 200
}

/// As livekit-server does: again after a while, five times in all.
async fn tell_until_taken(world: &World, event: &Value) {
    for pause in [1, 2, 4, 8, 0] {
        if tell(world, event).await {
            return;
        }
        sleep(Duration::from_secs(pause)).await;
    }
}

/// Somebody who joins with a delegated leave, stays, says goodbye, and comes again.
async fn participant(world: Arc<World>, signals: Arc<Signals>, i: u64) {
    let stays = [8, 15, 30, 10_000][(i % 4) as usize];
    let (user, room) = (format!("p{i}"), format!("!call{}:{LISTED}", i / 5));
    sleep(Duration::from_millis(i * 100)).await;
    for visit in 0..1_000 {
        if signals.stop.load(Relaxed) {
            return;
        }
        let n = world.unique();
        let (member, id) = (format!("m{i}-{visit}"), format!("syd_{i}_{visit}"));
        let mut body = body(LISTED, &user, n, &room, &member);
        body["delay_id"] = json!(id);
        body["delay_timeout"] = json!(DELAY.as_millis() as u64);
        world.schedule(&id, DELAY);
        let to = world.service();
        let request = http::post(to, "/delegate_delayed_leave", &body.to_string());
        let outcome = http::ask(world.places.honest(n), to, &request, TIMEOUT).await;
        world.samples.add(Class::Delegation, &outcome);
        if outcome.status != 200 {
            world.forget(&id);
            sleep(Duration::from_secs(2)).await;
            continue;
        }
        let alias = hashed(&[&room, SLOT]);
        let identity = hashed(&[&format!("@{user}:{LISTED}"), "DEVICE", &member]);
        let joined = world.join(&alias, &identity);
        world.arrive(&id);
        tell_until_taken(&world, &joined).await;
        for _ in 0..stays * 10 {
            sleep(Duration::from_millis(100)).await;
            if signals.stop.load(Relaxed) {
                // Stays, and is watched over until the end.
                return;
            }
        }
        if let Some(left) = world.leave(&alias, &identity, Some(&id)) {
            tell_until_taken(&world, &left).await;
        }
        sleep(LEAVE_WITHIN / 2).await;
    }
}

/// A homeserver that nobody has heard of, and its users. Junk is on every other one.
async fn fresh(world: Arc<World>, signals: Arc<Signals>, k: u64) {
    let name = fresh_name(k);
    let Ok(tasks) = world.homeserver(&name, world.places.fresh(k).into()) else {
        eprintln!("siege: {name} cannot listen");
        return;
    };
    let class = if k % 2 == 1 { Class::New } else { Class::NewQuiet };
    if class == Class::New {
        signals.besieged.store(k, Relaxed);
    }
    sleep(JUNK_FIRST).await;
    for _ in 0..7 {
        if signals.stop.load(Relaxed) {
            break;
        }
        let (world, name) = (world.clone(), name.clone());
        tokio::task::spawn_local(async move { exchange(&world, &name, Some(class)).await });
        sleep(JUNK_FIRST).await;
    }
    sleep(TIMEOUT).await;
    tasks.iter().for_each(tokio::task::AbortHandle::abort);
}
