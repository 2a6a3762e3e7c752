//! The core under pressure, on the real binary: many at once, neighbours that stall, processes that stand still, and events that
//! take each other's place. Nobody who is there is reported gone (decision L1).
//!
//! Where a number of the field is larger than a test on two busy cores carries, the test says so.

mod crowds;
mod frozen;
mod replaced;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::bodies::delegate_of;
use crate::support::client::Call;
use crate::support::client_api::{ClientApi, Managed};
use crate::support::hashes::{self, SLOT};
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::sfu::Session;
use crate::support::{unique, unique_room, wait_until, webhook};

/// Requests of a crowd under way at a time.
const AT_ONCE: usize = 32;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Lets this much time pass.
fn pass(from: Instant, time: Duration) {
    wait_until("the time to pass", time + TIMEOUT, || from.elapsed() >= time);
}

/// Somebody with a delegated leave.
#[derive(Clone)]
struct Guest {
    alias: String,
    identity: String,
    delay_id: String,
}

/// So many hand over their events, each with a user id of its own, so many to a room.
#[track_caller]
fn guests(scene: &Scene, count: usize, per_room: usize, delay: Duration) -> Vec<Guest> {
    let millis = u64::try_from(delay.as_millis()).expect("a delay");
    let mut room = String::new();
    let (calls, guests): (Vec<_>, Vec<_>) = (0..count)
        .map(|n| {
            if n % per_room == 0 {
                room = unique_room();
            }
            let (user, delay_id) = (format!("guest{}", unique()), format!("syd_{}", unique()));
            let body = delegate_of(&scene.home, &user, &room, &delay_id, millis);
            let guest = Guest {
                alias: hashes::alias(&room, SLOT),
                identity: hashes::identity(&scene.home.user(&user), "DEVICE", "member1"),
                delay_id,
            };
            (Call::json("/delegate_delayed_leave", &body), guest)
        })
        .unzip();
    for answer in scene.service.flood(&calls, AT_ONCE) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    guests
}

/// All of them join, and the SFU says so; returns when each has been restarted.
#[track_caller]
fn join(scene: &Scene, guests: &[Guest]) -> Vec<Session> {
    let sessions: Vec<_> = guests.iter().map(|guest| scene.sfu.join(&guest.alias, &guest.identity)).collect();
    let events: Vec<_> = sessions.iter().map(webhook::joined).collect();
    send_webhooks(scene, &events);
    // Some were restarted while they were waited for.
    let mut waited_for = guests.iter().peekable();
    wait_until("the restarts of those who joined", TIMEOUT * 3, || {
        while waited_for
            .next_if(|guest| scene.api.count("restart", &guest.delay_id) > 0)
            .is_some()
        {}
        waited_for.peek().is_none()
    });
    sessions
}

/// The SFU tells all this, and is heard.
#[track_caller]
fn send_webhooks(scene: &Scene, events: &[serde_json::Value]) {
    let calls: Vec<_> = events.iter().map(|event| webhook::signed(&scene.sfu, &event.to_string())).collect();
    for answer in scene.service.flood(&calls, AT_ONCE) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

/// The SFU tells that they have all left.
#[track_caller]
fn told_left(scene: &Scene, sessions: &[Session]) {
    let left = |session| webhook::left(session, "CLIENT_INITIATED");
    send_webhooks(scene, &sessions.iter().map(left).collect::<Vec<_>>());
}

/// This one leaves, and is reported: the watch goes on.
#[track_caller]
fn leaves(scene: &Scene, guest: &Guest, session: &Session) {
    scene.sfu.leave(&guest.alias, &guest.identity);
    told_left(scene, std::slice::from_ref(session));
    wait_until("the leave of one who is gone", TIMEOUT * 2, || {
        scene.api.count("send", &guest.delay_id) > 0
    });
}

/// When the homeserver granted restarts, by event: its timer fires one delay after the last one.
#[derive(Clone, Default)]
struct Timers(Arc<Mutex<HashMap<String, Vec<Instant>>>>);

impl Timers {
    /// The homeserver answers so, and what it grants is noted.
    fn answer(&self, api: &ClientApi, script: impl Fn(&Managed, usize) -> Reply + Send + Sync + 'static) {
        let timers = self.clone();
        api.answer(move |call, before| {
            let reply = script(call, before);
            if call.what == "restart" && is_granted(&reply) {
                let mut timers = timers.0.lock().unwrap();
                timers.entry(call.delay_id.clone()).or_default().push(call.at);
            }
            reply
        });
    }

    /// How long this event ran at most without a granted restart, from `since` until now.
    fn longest(&self, delay_id: &str, since: Instant) -> Duration {
        let timers = self.0.lock().unwrap();
        let granted = timers.get(delay_id).map(Vec::as_slice).unwrap_or_default();
        let mut last = since;
        let mut longest = Duration::ZERO;
        for at in granted.iter().copied().filter(|at| *at >= since).chain([Instant::now()]) {
            longest = longest.max(at - last);
            last = at;
        }
        longest
    }

    /// How many of these have run out, or were sent.
    fn gone<'a>(&self, api: &ClientApi, ids: impl IntoIterator<Item = &'a String>, since: Instant, delay: Duration) -> usize {
        let ids = ids.into_iter();
        ids.filter(|id| self.longest(id, since) >= delay || api.count("send", id) > 0)
            .count()
    }
}

fn is_granted(reply: &Reply) -> bool {
    match reply {
        Reply::Answer { status, .. } => *status == 200,
        Reply::After(_, then) => is_granted(then),
        Reply::Raw(_) | Reply::Stall(_) | Reply::Flood(_) | Reply::Endless(..) | Reply::Close | Reply::Hang => false,
    }
}
