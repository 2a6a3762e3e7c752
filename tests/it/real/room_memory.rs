//! The room memory against a real SFU (decision T6a): a token that was given without asking the SFU opens a room that
//! stands, whatever people do to rooms meanwhile.
//!
//! Two minutes at random; `LK_TESTS_SEED` repeats a run as far as timing allows, `LK_TESTS_ROOM_SECONDS` changes its length.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use livekit_protocol as proto;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::bodies;
use crate::support::client::Call;
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::livekit::Livekit;
use crate::support::process::{self, Process, real_neighbours, say};
use crate::support::service::Service;
use crate::support::{runtime, unique, unique_loopback, unique_room};

/// Rooms that are visited at the same time.
const VISITORS: u64 = 40;
/// Processes of clients; one of them dies now and then.
const CROWDS: usize = 4;
/// A client uses its token at once; the memory's own margin is two seconds.
const AT_ONCE: Duration = Duration::from_secs(1);

/// For how long a room is remembered at the most.
const REMEMBERED: Duration = Duration::from_secs(10);

#[test]
fn a_token_from_memory_opens_a_room_that_stands() {
    if !real_neighbours() {
        return;
    }
    let number = |name: &str, otherwise| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(otherwise);
    let seed = number("LK_TESTS_SEED", rand::random_range(0..1_000_000));
    let time = Duration::from_secs(number("LK_TESTS_ROOM_SECONDS", 120));
    say(&format!("room memory: {} s, LK_TESTS_SEED={seed}", time.as_secs()));

    let livekit = Livekit::shared();
    let home = Homeserver::start();
    let tap = Tap::start(livekit.address());
    let service = livekit
        .setup(&[&home.name])
        .env("LIVEKIT_API_URL", &format!("http://{}", tap.address))
        .env("LIVEKIT_LOG_LEVEL", "info")
        .start();
    let scene = Scene {
        livekit,
        home,
        service,
        tap,
        crowds: std::array::from_fn(|_| Crowd::start()),
        end: Instant::now() + time,
        tally: Tally::default(),
    };
    std::thread::scope(|scope| {
        for n in 0..VISITORS {
            let scene = &scene;
            scope.spawn(move || scene.visit(&mut StdRng::seed_from_u64(seed * VISITORS + n), n));
        }
        scope.spawn(|| scene.kill_crowds(&mut StdRng::seed_from_u64(seed + 1)));
    });
    let tally = &scene.tally;
    say(&tally.table());
    let violations = tally.violations.lock().unwrap();
    assert!(
        violations.is_empty(),
        "{} of {} tokens from memory opened no room:\n{}",
        violations.len(),
        tally.from_memory.load(Relaxed),
        violations.join("\n")
    );
    // The run is worth something: the memory was used, and rooms did end under it.
    let seconds = usize::try_from(time.as_secs()).expect("a short time");
    // Four to six a second, by the dice and by how busy the machine is.
    assert!(tally.from_memory.load(Relaxed) > 2 * seconds, "the memory was hardly used");
    assert!(tally.reopened.load(Relaxed) > seconds / 4, "hardly any room ended");
}

struct Scene {
    // Dropped first: its log is judged while its neighbours still stand.
    service: Service,
    livekit: &'static Livekit,
    home: Homeserver,
    tap: Tap,
    crowds: [Crowd; CROWDS],
    end: Instant,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    rooms: AtomicUsize,
    tokens: AtomicUsize,
    from_memory: AtomicUsize,
    /// Of tokens from memory: used for the first step of a join, and by a real client that joined.
    signals: AtomicUsize,
    joins: AtomicUsize,
    all_joins: AtomicUsize,
    left: AtomicUsize,
    killed: AtomicUsize,
    /// The room had another sid than at the last look: it had ended meanwhile.
    reopened: AtomicUsize,
    /// Although the SFU had just been asked (decision T6b).
    gone_after_call: AtomicUsize,
    violations: Mutex<Vec<String>>,
}

impl Tally {
    fn table(&self) -> String {
        let [rooms, tokens, memory, signals, joins, all, left, killed, reopened, gone] = [
            &self.rooms,
            &self.tokens,
            &self.from_memory,
            &self.signals,
            &self.joins,
            &self.all_joins,
            &self.left,
            &self.killed,
            &self.reopened,
            &self.gone_after_call,
        ]
        .map(|counter| counter.load(Relaxed));
        format!(
            "room memory: {tokens} tokens for {rooms} rooms, {memory} from memory, {} violations\n\
             \x20 tokens from memory used at once: {signals} for the first step of a join, {joins} by a real client\n\
             \x20 clients: {all} joined, {left} left, {killed} were killed; rooms that had ended and were opened again: {reopened}\n\
             \x20 gone at once although the SFU had just been asked: {gone}",
            self.violations.lock().unwrap().len(),
        )
    }
}

/// A room and what its visitor knows of it.
struct Visit {
    room: String,
    name: String,
    departure: u32,
    about: String,
    sid: String,
    /// When the SFU dropped a room that it had just made: of an end that it was about to carry out. Without webhooks, as here,
    /// nobody is told (decision T6b), and the room is remembered for its ten seconds.
    dropped: Option<Instant>,
}

impl Scene {
    /// One room after the other.
    fn visit(&self, rng: &mut StdRng, n: u64) {
        let crowd = &self.crowds[usize::try_from(n).expect("few") % CROWDS];
        while !self.over() {
            let departure = pick(rng, &[2, 2, 2, 20, 20, 20, 9, 12]);
            let empty = pick(rng, &[300, 300, 300, 20, 8, 3]);
            let room = unique_room();
            let name = alias(&room, SLOT);
            let mut visit = Visit {
                about: format!("{name}, departure_timeout {departure}, empty_timeout {empty}"),
                room,
                name,
                departure,
                sid: String::new(),
                dropped: None,
            };
            // The others are opened by the service, with its own timeouts.
            if rng.random_bool(0.9) {
                visit.sid = self.livekit.create(&visit.name, empty, departure).sid;
            }
            self.tally.rooms.fetch_add(1, Relaxed);
            let mut inside = None;
            for _ in 0..rng.random_range(4..16) {
                self.pause(rng, visit.departure);
                if self.over() {
                    break;
                }
                let asked = Instant::now();
                let (token, from_memory) = self.ask(&mut visit);
                match rng.random_range(0..10) {
                    0..3 => self.signal(rng, &visit, &token, from_memory.then_some(asked)),
                    3..6 if inside.is_none() => inside = self.join(crowd, &visit, &token, from_memory.then_some(asked)),
                    _ => {}
                }
                if inside.is_some() && rng.random_bool(0.3) {
                    self.pause(rng, 1);
                    self.leave(crowd, inside.take());
                }
            }
            self.leave(crowd, inside);
        }
    }

    fn over(&self) -> bool {
        Instant::now() >= self.end
    }

    /// Mostly short, sometimes until the room is about to end.
    fn pause(&self, rng: &mut StdRng, departure: u32) {
        let seconds = match rng.random_range(0..20) {
            0..10 => rng.random_range(0.0..0.6),
            10..15 => rng.random_range(0.0..3.0),
            _ => (f64::from(departure) + rng.random_range(-2.5..1.5)).max(0.0),
        };
        let left = self.end.saturating_duration_since(Instant::now());
        std::thread::sleep(Duration::from_secs_f64(seconds).min(left));
    }

    /// A token, and whether the SFU was not asked for it. Then the room must stand.
    fn ask(&self, visit: &mut Visit) -> (Value, bool) {
        let before = self.tap.creations_of(&visit.name);
        let body = bodies::get_token_of(&self.home, "alice", &visit.room);
        let began = Instant::now();
        let answer = self.service.call(&Call::json("/get_token", &body));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let from_memory = self.tap.creations_of(&visit.name) == before;
        let sid = self.livekit.room(&visit.name).map(|room| room.sid).unwrap_or_default();
        // A machine that is busy with other tests may look too late.
        let at_once = began.elapsed() < AT_ONCE;
        self.tally.tokens.fetch_add(1, Relaxed);
        if from_memory {
            self.tally.from_memory.fetch_add(1, Relaxed);
        }
        match (sid.is_empty(), from_memory) {
            (true, true) if at_once => self.violation(visit, "the SFU does not list it"),
            (true, true) => {}
            (true, false) => {
                self.tally.gone_after_call.fetch_add(1, Relaxed);
                visit.dropped = Some(Instant::now());
            }
            (false, _) if !visit.sid.is_empty() && sid != visit.sid => {
                self.tally.reopened.fetch_add(1, Relaxed);
            }
            (false, _) => {}
        }
        visit.sid = sid;
        (answer.json(), from_memory)
    }

    /// The first step of a join at a random moment within the second, then gone.
    fn signal(&self, rng: &mut StdRng, visit: &Visit, token: &Value, from_memory: Option<Instant>) {
        std::thread::sleep(AT_ONCE.mul_f64(rng.random_range(0.0..0.9)));
        let stay = Duration::from_millis(rng.random_range(0..300));
        let began = Instant::now();
        let status = self.livekit.signal(token["jwt"].as_str().expect("jwt"), stay);
        // Nor is the margin over: a machine that is busy with other tests may have let it lie.
        if from_memory.is_some_and(|asked| began - asked < AT_ONCE && asked.elapsed() < 2 * AT_ONCE + stay) {
            self.tally.signals.fetch_add(1, Relaxed);
            if status != 101 {
                self.violation(visit, &format!("a join was answered with {status}"));
            }
        }
    }

    fn join(&self, crowd: &Crowd, visit: &Visit, token: &Value, from_memory: Option<Instant>) -> Option<String> {
        let word = |name| token[name].as_str().expect("a string");
        let (who, outcome) = crowd.join(word("url"), word("jwt"));
        let within = from_memory.is_some_and(|asked| asked.elapsed() < AT_ONCE);
        match outcome.as_deref() {
            Some("joined") => {
                self.tally.all_joins.fetch_add(1, Relaxed);
                if from_memory.is_some() {
                    self.tally.joins.fetch_add(1, Relaxed);
                }
                Some(who)
            }
            Some(why) if within && why.contains("404") => {
                self.violation(visit, &format!("a real client: {why}"));
                None
            }
            _ => None,
        }
    }

    fn leave(&self, crowd: &Crowd, who: Option<String>) {
        if let Some(who) = who
            && crowd.leave(&who)
        {
            self.tally.left.fetch_add(1, Relaxed);
        }
    }

    fn violation(&self, visit: &Visit, what: &str) {
        if visit.dropped.is_some_and(|at| at.elapsed() < REMEMBERED + 2 * AT_ONCE) {
            return;
        }
        self.tally.violations.lock().unwrap().push(format!("{}: {what}", visit.about));
    }

    /// Now and then the clients of a crowd die without a goodbye.
    fn kill_crowds(&self, rng: &mut StdRng) {
        loop {
            let pause = Duration::from_secs_f64(rng.random_range(6.0..18.0));
            if Instant::now() + pause >= self.end {
                return;
            }
            std::thread::sleep(pause);
            let killed = self.crowds[rng.random_range(0..CROWDS)].kill();
            self.tally.killed.fetch_add(killed, Relaxed);
        }
    }
}

fn pick(rng: &mut StdRng, from: &[u32]) -> u32 {
    from[rng.random_range(0..from.len())]
}

/// A process of many clients, replaced when it is killed.
struct Crowd {
    process: Mutex<Arc<Process>>,
    /// What it said last about a client.
    said: Arc<Mutex<HashMap<String, String>>>,
}

impl Crowd {
    fn start() -> Self {
        let said = Arc::new(Mutex::new(HashMap::new()));
        Self {
            process: Mutex::new(Self::run(&said)),
            said,
        }
    }

    fn run(said: &Arc<Mutex<HashMap<String, String>>>) -> Arc<Process> {
        let process = Arc::new(Process::start_piped(
            "rooms",
            &process::script("rooms.py"),
            &process::directory("rooms"),
        ));
        assert_eq!(process.line(process::START).as_deref(), Some("ready"));
        let (listener, said) = (Arc::downgrade(&process), said.clone());
        std::thread::spawn(move || {
            while let Some(lines) = listener.upgrade() {
                match lines.poll(Duration::from_millis(100)) {
                    Ok(Some(line)) => {
                        let mut words = line.splitn(3, ' ');
                        let what = words.next().unwrap_or_default();
                        let who = words.next().unwrap_or_default().to_owned();
                        let why = words.next().map_or_else(|| what.to_owned(), |why| format!("{what} {why}"));
                        said.lock().unwrap().insert(who, why);
                    }
                    Ok(None) => {}
                    Err(_ended) => return,
                }
            }
        });
        process
    }

    /// A new client, and what became of it: `joined`, `refused …`, or nothing where the crowd died.
    fn join(&self, url: &str, jwt: &str) -> (String, Option<String>) {
        let who = unique().to_string();
        let process = self.process.lock().unwrap().clone();
        let outcome = self.order(&process, &format!("join {who} {url} {jwt}"), &who);
        (who, outcome)
    }

    /// Whether it was there to leave.
    fn leave(&self, who: &str) -> bool {
        let process = self.process.lock().unwrap().clone();
        self.said.lock().unwrap().remove(who).is_some() && self.order(&process, &format!("leave {who}"), who).is_some()
    }

    fn order(&self, process: &Arc<Process>, order: &str, who: &str) -> Option<String> {
        let end = Instant::now() + Duration::from_secs(20);
        let heard = process.tell(order);
        while heard && Instant::now() < end && Arc::ptr_eq(process, &self.process.lock().unwrap()) {
            if let Some(said) = self.said.lock().unwrap().get(who) {
                return Some(said.clone());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// How many died.
    fn kill(&self) -> usize {
        self.process.lock().unwrap().kill();
        let next = Self::run(&self.said);
        *self.process.lock().unwrap() = next;
        let mut said = self.said.lock().unwrap();
        let inside = said.values().filter(|state| *state == "joined").count();
        said.clear();
        inside
    }
}

/// Passes every byte on, and counts the calls of CreateRoom: its own work is no part of what is tested.
struct Tap {
    address: SocketAddr,
    creations: Creations,
}

type Creations = Arc<Mutex<HashMap<String, usize>>>;

impl Tap {
    fn start(to: SocketAddr) -> Self {
        let creations = Creations::default();
        let counted = creations.clone();
        let listener = runtime()
            .block_on(TcpListener::bind((unique_loopback(), 0)))
            .expect("a listening socket");
        let address = listener.local_addr().expect("address");
        runtime().spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let counted = counted.clone();
                tokio::spawn(async move {
                    if let Ok(server) = TcpStream::connect(to).await {
                        let _ = pass(client, server, &counted).await;
                    }
                });
            }
        });
        Self { address, creations }
    }

    fn creations_of(&self, room: &str) -> usize {
        self.creations.lock().unwrap().get(room).copied().unwrap_or(0)
    }
}

async fn pass(client: TcpStream, server: TcpStream, counted: &Creations) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let back = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let (mut chunk, mut seen) = (vec![0; 16 * 1024], Vec::new());
    loop {
        let n = from_client.read(&mut chunk).await?;
        if n == 0 {
            break;
        }
        seen.extend(&chunk[..n]);
        // Counted before the SFU has all of it, and so before anybody can have an answer.
        while let Some(length) = count(&seen, counted) {
            seen.drain(..length);
        }
        to_server.write_all(&chunk[..n]).await?;
    }
    back.abort();
    Ok(())
}

/// The length of the first request in `bytes` when it is complete; a CreateRoom is counted.
fn count(bytes: &[u8], counted: &Creations) -> Option<usize> {
    let head_end = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..head_end]).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |v| v.trim().parse().unwrap_or(0));
    let body = bytes.get(head_end..head_end + length)?;
    if head.starts_with("post /twirp/livekit.roomservice/createroom ") {
        let asked = proto::CreateRoomRequest::decode(body).expect("a CreateRoom");
        *counted.lock().unwrap().entry(asked.name).or_default() += 1;
    }
    Some(head_end + length)
}
