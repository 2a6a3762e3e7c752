//! A stand-in for an instance of the Go service, which shares nothing: it reads the hash once, when it starts, and writes each record
//! when it is delegated, after each restart and at its end. Its restarts come at 80 % of the delay. Whoever it has not seen is waited for
//! as long as the delay, departures that are reported meanwhile are ignored, and then the leave is sent.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use livekit_protocol::RoomParticipantIdentity;
use prost::Message as _;
use serde_json::{Value, json};

use super::stage::{Person, Stage};
use crate::support::client::{self, Call};
use crate::support::client_api::UNSTABLE;
use crate::support::jwt::Jwt;
use crate::support::sfu::Session;
use crate::support::webhook;

/// Between two looks at what is due.
const STEP: Duration = Duration::from_millis(20);
/// Between two questions to the SFU about somebody who waits, and about somebody who is there.
const LOOK_UP: Duration = Duration::from_secs(1);
const SANITY_CHECK: Duration = Duration::from_secs(10);

pub(super) struct StandIn {
    instance: Arc<Instance>,
    thread: Option<JoinHandle<()>>,
}

struct Instance {
    redis: SocketAddr,
    api: SocketAddr,
    sfu: SocketAddr,
    key: String,
    secret: String,
    server: String,
    /// By room and identity.
    jobs: Mutex<Jobs>,
    is_over: AtomicBool,
}

type Seat = (String, String);
type Jobs = HashMap<Seat, Job>;

#[derive(Clone)]
struct Job {
    delay_id: String,
    delay: Duration,
    server: String,
    is_connected: bool,
    /// The next restart, or the end of the wait of whoever was not seen.
    due: Instant,
    look_at: Instant,
}

impl StandIn {
    /// Starts, and has read the hash when it is back.
    pub(super) fn start(stage: &Stage) -> Self {
        let instance = Arc::new(Instance {
            redis: stage.redis.address(),
            api: stage.api.http.address(),
            sfu: stage.sfu.http.address(),
            key: stage.sfu.key().to_owned(),
            secret: stage.sfu.secret().to_owned(),
            server: stage.home.name.clone(),
            jobs: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        instance.recover();
        let works = instance.clone();
        let thread = std::thread::spawn(move || {
            while !works.is_over.load(Ordering::Relaxed) {
                let seats: Vec<_> = works.jobs.lock().unwrap().keys().cloned().collect();
                // One after the other: what is reported comes between two of them.
                seats.iter().for_each(|seat| works.step(&mut works.jobs.lock().unwrap(), seat));
                std::thread::sleep(STEP);
            }
        });
        Self {
            instance,
            thread: Some(thread),
        }
    }

    /// Takes a delegation: it is written when this is back.
    pub(super) fn delegate(&self, person: &Person) {
        let job = Job::new(person.delay_id.clone(), person.delay, self.instance.server.clone());
        let seat = (person.alias.clone(), person.identity.clone());
        self.instance.write(&seat, &job);
        self.instance.jobs.lock().unwrap().insert(seat, job);
    }

    pub(super) fn on_joined(&self, session: &Session) {
        let seat = (session.room.clone(), session.identity.clone());
        if let Some(job) = self.instance.jobs.lock().unwrap().get_mut(&seat) {
            job.connect();
        }
    }

    pub(super) fn on_left(&self, session: &Session) {
        let seat = (session.room.clone(), session.identity.clone());
        let mut jobs = self.instance.jobs.lock().unwrap();
        if jobs.get(&seat).is_some_and(|job| job.is_connected) {
            self.instance.end(&mut jobs, &seat, true);
        }
    }
}

impl Drop for StandIn {
    /// Stops as the original does: at once.
    fn drop(&mut self) {
        self.instance.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Job {
    fn new(delay_id: String, delay: Duration, server: String) -> Self {
        let now = Instant::now();
        Self {
            delay_id,
            delay,
            server,
            is_connected: false,
            due: now + delay,
            look_at: now,
        }
    }

    fn connect(&mut self) {
        if !self.is_connected {
            let now = Instant::now();
            (self.is_connected, self.due, self.look_at) = (true, now, now + SANITY_CHECK);
        }
    }
}

impl Instance {
    fn recover(&self) {
        let all = self.redis(&["HGETALL", "lk-jwt:jobs"]);
        for pair in all.chunks_exact(2) {
            let seat: Seat = serde_json::from_str(&pair[0]).expect("a field");
            let value: Value = serde_json::from_str(&pair[1]).expect("a record");
            let restarted = chrono::DateTime::parse_from_rfc3339(value["RestartedAt"].as_str().expect("a time")).expect("a time");
            let delay = Duration::from_nanos(value["Params"]["DelayTimeout"].as_u64().expect("a delay"));
            let runs_until = restarted.timestamp_millis() + i64::try_from(delay.as_millis()).expect("a delay");
            if runs_until <= webhook::now_ms() {
                self.redis(&["HDEL", "lk-jwt:jobs", &pair[0]]);
                continue;
            }
            let text = |name: &str| value["Params"][name].as_str().expect("a text").to_owned();
            assert_eq!(seat, (text("LiveKitRoom"), text("LiveKitIdentity")));
            let job = Job::new(text("DelayId"), delay, text("ServerName"));
            self.jobs.lock().unwrap().insert(seat, job);
        }
    }

    fn step(&self, jobs: &mut Jobs, seat: &Seat) {
        let Some(job) = jobs.get_mut(seat) else { return };
        let now = Instant::now();
        if now >= job.look_at {
            let is_there = self.is_there(seat);
            if job.is_connected && !is_there {
                return self.end(jobs, seat, true);
            }
            job.look_at = now + if job.is_connected { SANITY_CHECK } else { LOOK_UP };
            if is_there {
                job.connect();
            }
        }
        if now < job.due {
            return;
        }
        if !job.is_connected {
            return self.end(jobs, seat, true);
        }
        if self.manage(job, "restart") != 200 {
            return self.end(jobs, seat, false);
        }
        job.due = Instant::now() + job.delay * 8 / 10;
        self.write(seat, job);
    }

    /// The leave is sent, or there is nothing to send; the record goes after that.
    fn end(&self, jobs: &mut Jobs, seat: &Seat, sends: bool) {
        if let Some(job) = jobs.remove(seat)
            && sends
        {
            self.manage(&job, "send");
        }
        self.redis(&["HDEL", "lk-jwt:jobs", &field(seat)]);
    }

    fn write(&self, seat: &Seat, job: &Job) {
        let now = chrono::DateTime::from_timestamp_millis(webhook::now_ms()).expect("a time");
        let params = format!(
            r#"{{"DelayId":"{}","DelayTimeout":{},"ServerName":"{}","LiveKitRoom":"{}","LiveKitIdentity":"{}"}}"#,
            job.delay_id,
            job.delay.as_nanos(),
            job.server,
            seat.0,
            seat.1
        );
        let now = now.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true);
        let value = format!(r#"{{"Params":{params},"RestartedAt":"{now}"}}"#);
        self.redis(&["HSET", "lk-jwt:jobs", &field(seat), &value]);
    }

    fn manage(&self, job: &Job, what: &str) -> u16 {
        let call = Call::post(&format!("{UNSTABLE}{}/{what}", job.delay_id), "{}").header("Content-Type", "application/json");
        client::call(self.api, &call).status
    }

    fn is_there(&self, (room, identity): &Seat) -> bool {
        let now = webhook::now();
        let claims = json!({"iss": self.key, "nbf": now, "exp": now + 60, "video": {"roomAdmin": true, "room": room}});
        let asked = RoomParticipantIdentity {
            room: room.clone(),
            identity: identity.clone(),
            ..RoomParticipantIdentity::default()
        };
        let call = Call::post("/twirp/livekit.RoomService/GetParticipant", asked.encode_to_vec())
            .header("Content-Type", "application/protobuf")
            .header("Authorization", &format!("Bearer {}", Jwt::sign(&claims, &self.secret)));
        client::call(self.sfu, &call).status == 200
    }

    /// The texts of an answer.
    fn redis(&self, command: &[&str]) -> Vec<String> {
        let mut stream = BufReader::new(TcpStream::connect(self.redis).expect("redis-server"));
        let mut text = format!("*{}\r\n", command.len());
        for word in command {
            text += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.get_mut().write_all(text.as_bytes()).expect("redis-server");
        texts(&mut stream)
    }
}

fn field((room, identity): &Seat) -> String {
    serde_json::to_string(&[room, identity]).expect("texts")
}

fn texts(stream: &mut BufReader<TcpStream>) -> Vec<String> {
    let mut line = String::new();
    stream.read_line(&mut line).expect("an answer");
    let length = || line[1..].trim().parse::<usize>().expect("a length");
    match line.as_bytes()[0] {
        b'*' => (0..length()).flat_map(|_| texts(stream)).collect(),
        b'$' => {
            let mut text = vec![0; length() + 2];
            stream.read_exact(&mut text).expect("an answer");
            text.truncate(text.len() - 2);
            vec![String::from_utf8(text).expect("UTF-8")]
        }
        b'-' => panic!("{line}"),
        _ => vec![line.trim().to_owned()],
    }
}
