//! Three replicas on one real Redis, with fakes for the SFU and the homeserver, which see everything.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::link::Link;
use crate::support::client_api::ClientApi;
use crate::support::hashes::{self, SLOT};
use crate::support::homeserver::Homeserver;
use crate::support::redis::RedisServer;
use crate::support::service::{Service, Setup, free_address};
use crate::support::sfu::{Session, Sfu};
use crate::support::{bodies, lateness, unique, unique_room, wait_until, webhook};

/// Longer than anything takes that is not timed by a rule.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);
/// After a failover delegations are answered again by then, and served by guests until then.
pub(super) const WRITES_AGAIN: Duration = Duration::from_secs(10);

/// Options of a server whose replica gets everything at once; else it waits five seconds for others.
pub(super) const SYNC_AT_ONCE: [&str; 2] = ["--repl-diskless-sync-delay", "0"];

pub(super) struct Stage {
    // Dropped first: their logs are judged while the neighbours still stand.
    pub(super) nodes: Vec<Option<Service>>,
    /// The way of each to Redis, to the SFU and to the homeserver.
    pub(super) links: Vec<Link>,
    pub(super) sfu_links: Vec<Link>,
    pub(super) home_links: Vec<Link>,
    pub(super) redis: RedisServer,
    pub(super) sfu: Sfu,
    pub(super) home: Homeserver,
    pub(super) api: ClientApi,
    setup: Setup,
    turn: AtomicUsize,
}

/// Somebody with a delayed event.
#[derive(Clone, Debug)]
pub(super) struct Person {
    pub(super) user: String,
    pub(super) room: String,
    pub(super) alias: String,
    pub(super) identity: String,
    pub(super) delay_id: String,
    pub(super) delay: Duration,
}

impl Stage {
    /// `None` where real neighbours are left out.
    pub(super) fn start(nodes: usize) -> Option<Self> {
        Self::with(nodes, &[])
    }

    /// With these options of redis-server.
    pub(super) fn with(nodes: usize, options: &[&str]) -> Option<Self> {
        let redis = RedisServer::start(options)?;
        lateness::measure();
        let (sfu, home, api) = (Sfu::start(), Homeserver::start(), ClientApi::start());
        let setup = Setup::new(&sfu).full_access(&[&home]).env("LIVEKIT_REDIS_SHARED", "true");
        let mut stage = Self {
            nodes: Vec::new(),
            links: Vec::new(),
            sfu_links: Vec::new(),
            home_links: Vec::new(),
            redis,
            sfu,
            home,
            api,
            setup,
            turn: AtomicUsize::new(0),
        };
        for _ in 0..nodes {
            stage.add(|setup| setup);
        }
        if nodes == 0 {
            return Some(stage);
        }
        stage.wait_one_watcher();
        wait_until("all nodes to be up", TIMEOUT, || {
            let count = stage.living().count();
            stage.living().all(|node| up(node) == count)
        });
        Some(stage)
    }

    /// One more node; its place.
    pub(super) fn add(&mut self, change: impl Fn(Setup) -> Setup) -> usize {
        self.add_as("", change)
    }

    /// One more node with this login at Redis, `user:password@`.
    pub(super) fn add_as(&mut self, login: &str, change: impl Fn(Setup) -> Setup) -> usize {
        let address = free_address();
        let link = Link::to(self.redis.address());
        let (sfu, home) = (Link::to(self.sfu.http.address()), Link::to(self.api.http.address()));
        let setup = self
            .setup
            .clone()
            .env("LIVEKIT_JWT_BIND", &address.to_string())
            .env("LIVEKIT_REDIS_URL", &format!("redis://{login}{}", link.address()))
            .env("LIVEKIT_API_URL", &format!("http://{}", sfu.address()))
            .env(
                "LIVEKIT_CS_API_URL_OVERRIDES",
                &format!("{}=http://{}", self.home.name, home.address()),
            )
            .reached_at(address);
        self.links.push(link);
        self.sfu_links.push(sfu);
        self.home_links.push(home);
        self.nodes.push(Some(change(setup).start()));
        self.nodes.len() - 1
    }

    pub(super) fn living(&self) -> impl Iterator<Item = &Service> {
        self.nodes.iter().flatten()
    }

    /// Round robin, as a balancer does.
    pub(super) fn next(&self) -> &Service {
        let living: Vec<_> = self.living().collect();
        living[self.turn.fetch_add(1, Ordering::Relaxed) % living.len()]
    }

    /// Place of the node that says that it watches.
    pub(super) fn watcher(&self) -> Option<usize> {
        let mut watching = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.as_ref().is_some_and(|node| readyz(node)["watches"].as_bool().unwrap_or(false)));
        let first = watching.next().map(|(at, _)| at);
        if watching.next().is_some() { None } else { first }
    }

    /// Waits until that one watches, and says so.
    #[track_caller]
    pub(super) fn wait_other_watcher(&self, former: usize, within: Duration) -> usize {
        let mut found = None;
        wait_until("another watcher", within, || {
            let watches = |node: &Service| readyz(node)["watches"].as_bool().unwrap_or(false);
            let all = self.nodes.iter().enumerate();
            found = all
                .filter(|(at, _)| *at != former)
                .find(|(_, node)| node.as_ref().is_some_and(watches))
                .map(|(at, _)| at);
            found.is_some()
        });
        found.expect("just seen")
    }

    /// Waits until no node looks after guests of its own.
    #[track_caller]
    pub(super) fn wait_no_guests(&self) {
        wait_until("no guests", TIMEOUT, || self.living().all(|node| readyz(node)["guests"] == 0));
    }

    /// Waits until all nodes reach Redis again, and it has what they took meanwhile.
    #[track_caller]
    pub(super) fn wait_handed_over(&self) {
        wait_until("no guests, and Redis", TIMEOUT, || {
            let is_done = |node: &Value| node["guests"] == 0 && node["redis"] == true;
            self.living().all(|node| is_done(&readyz(node)))
        });
    }

    #[track_caller]
    pub(super) fn wait_one_watcher(&self) -> usize {
        let mut found = None;
        wait_until("exactly one watcher", TIMEOUT, || {
            found = self.watcher();
            found.is_some()
        });
        found.expect("just seen")
    }

    /// A node that does not watch.
    pub(super) fn server(&self) -> usize {
        let watcher = self.wait_one_watcher();
        (0..self.nodes.len())
            .find(|&at| at != watcher && self.nodes[at].is_some())
            .expect("a server")
    }

    /// kill -9.
    pub(super) fn kill(&mut self, at: usize) -> Instant {
        let node = self.nodes[at].take().expect("a running node");
        node.signal("KILL");
        let now = Instant::now();
        node.wait_exit(TIMEOUT);
        now
    }

    pub(super) fn person(&self, delay: Duration) -> Person {
        let (room, user) = (unique_room(), format!("u{}", unique()));
        Person {
            alias: hashes::alias(&room, SLOT),
            identity: hashes::identity(&self.home.user(&user), "DEVICE", "member1"),
            delay_id: format!("syd_{}", unique()),
            user,
            room,
            delay,
        }
    }

    /// The status of the answer to a delegation.
    pub(super) fn delegate_at(&self, node: &Service, person: &Person) -> u16 {
        let millis = u64::try_from(person.delay.as_millis()).expect("a delay");
        let body = bodies::delegate_of(&self.home, &person.user, &person.room, &person.delay_id, millis);
        node.post("/delegate_delayed_leave", &body).status
    }

    /// Somebody delegates a leave, and joins; both are told to whoever is next.
    #[track_caller]
    pub(super) fn arrive(&self, delay: Duration) -> (Person, Session) {
        let person = self.person(delay);
        assert_eq!(self.delegate_at(self.next(), &person), 200);
        let session = self.sfu.join(&person.alias, &person.identity);
        self.tell(&webhook::joined(&session));
        (person, session)
    }

    /// Tells whoever is next of a webhook, until it is taken, as LiveKit does.
    #[track_caller]
    pub(super) fn tell(&self, event: &Value) {
        wait_until("a webhook to be taken", TIMEOUT, || {
            webhook::tell(self.next(), &self.sfu, event).status == 200
        });
    }

    #[track_caller]
    pub(super) fn leave(&self, session: &Session) -> Instant {
        self.sfu.leave(&session.room, &session.identity);
        let at = Instant::now();
        self.tell(&webhook::left(session, "CLIENT_INITIATED"));
        at
    }

    /// The same where the room is over with them, and nobody says that they left.
    #[track_caller]
    pub(super) fn finish(&self, session: &Session) -> Instant {
        self.sfu.leave(&session.room, &session.identity);
        self.sfu.set_room(&session.room, None);
        let at = Instant::now();
        let mut event = webhook::event("room_finished", session, None);
        event.as_object_mut().expect("an event").remove("participant");
        self.tell(&event);
        at
    }

    /// How late the first restarts since `killed` were, at most: each is due at half of the delay, and cannot come while nobody watches.
    pub(super) fn latest_restart(&self, people: &[(Person, Session)], killed: Instant) -> Duration {
        let late = people.iter().filter_map(|(person, _)| {
            let times = self.api.times("restart", &person.delay_id);
            let next = *times.iter().find(|at| **at > killed)?;
            let last = times.into_iter().rfind(|at| *at <= killed)?;
            Some(next.saturating_duration_since((last + person.delay / 2).max(killed)))
        });
        late.max().unwrap_or_default()
    }

    #[track_caller]
    pub(super) fn wait_restarted(&self, people: &[(Person, Session)], after: Instant) {
        wait_until("all events to be restarted", TIMEOUT, || {
            people
                .iter()
                .all(|(person, _)| self.api.times("restart", &person.delay_id).iter().any(|at| *at > after))
        });
    }

    /// Waits for one more look at the SFU about everybody.
    #[track_caller]
    pub(super) fn wait_looked_up(&self, people: &[(Person, Session)], after: Instant, within: Duration) -> Duration {
        let mut last = None;
        wait_until("the SFU to be asked about everybody", within, || {
            let first = |(person, _): &(Person, Session)| {
                let all = self.sfu.lookups(&person.alias, &person.identity);
                all.into_iter().find(|at| *at > after)
            };
            last = people
                .iter()
                .map(first)
                .collect::<Option<Vec<_>>>()
                .and_then(|all| all.into_iter().max());
            last.is_some()
        });
        last.expect("just seen") - after
    }

    /// How long after `gone` the leave came.
    #[track_caller]
    pub(super) fn wait_sent(&self, person: &Person, gone: Instant, within: Duration) -> Duration {
        wait_until("the leave to be sent", within, || self.api.count("send", &person.delay_id) > 0);
        self.api.times("send", &person.delay_id)[0].saturating_duration_since(gone)
    }

    /// Nobody who is there was reported gone, and no event has run out.
    #[track_caller]
    pub(super) fn assert_there(&self, people: &[(Person, Session)]) {
        let now = Instant::now();
        for (person, _) in people {
            assert_eq!(
                self.api.count("send", &person.delay_id),
                0,
                "somebody who is there was reported gone"
            );
            let mut alive = self.api.times("restart", &person.delay_id);
            alive.push(now);
            for pair in alive.windows(2) {
                // A machine that stands still for seconds restarts nothing meanwhile.
                let limit = within(person.delay, pair[0]);
                assert!(pair[1] - pair[0] < limit, "an event ran out: {:?}", pair[1] - pair[0]);
            }
        }
    }

    /// The highest epoch that anybody knows.
    pub(super) fn epoch(&self) -> u64 {
        self.living().filter_map(|node| readyz(node)["epoch"].as_u64()).max().unwrap_or(0)
    }

    /// What stands in the hash, by field.
    pub(super) fn records(&self) -> usize {
        let answer = self.redis.ask(&["HLEN", "lk-jwt:jobs"]);
        answer.trim_start_matches(':').trim().parse().expect("a number")
    }
}

pub(super) fn readyz(node: &Service) -> Value {
    serde_json::from_str(&node.get("/readyz").text()).unwrap_or_default()
}

pub(super) fn up(node: &Service) -> usize {
    let report = readyz(node);
    let nodes = report["nodes"].as_array().cloned().unwrap_or_default();
    nodes.iter().filter(|node| node["state"] == "up").count()
}

/// That long, and what this machine was late by since then. Beside other tests each process has its own turn at the processors, of which
/// the lateness of this one says little: three beats more. `./tests/fleet` has the machine for itself.
pub(super) fn within(limit: Duration, began: Instant) -> Duration {
    let is_alone = super::length::is_full();
    let turns = if is_alone { Duration::ZERO } else { Duration::from_millis(1500) };
    limit + turns + lateness::since(began) * 2
}

/// The states of all nodes, for a message.
pub(super) fn states(stage: &Stage) -> BTreeMap<usize, Value> {
    let all = stage.nodes.iter().enumerate();
    all.filter_map(|(at, node)| Some((at, readyz(node.as_ref()?)))).collect()
}
