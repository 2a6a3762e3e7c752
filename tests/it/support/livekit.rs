//! A real SFU, and real clients of it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use livekit_protocol as proto;
use prost::Message;
use serde_json::{Value, json};

use super::ca::Ca;
use super::client::{self, Answer, Call};
use super::jwt::Jwt;
use super::process::{self, Process};
use super::secrets;
use super::service::Setup;
use super::unique_loopback;

/// A client on a busy machine.
const CLIENT: Duration = Duration::from_secs(60);

/// livekit-server, on ports of its own. Rooms exist when somebody created them: `auto_create: false`.
pub(crate) struct Livekit {
    key: String,
    secret: String,
    address: SocketAddr,
    /// Whom it tells what happens.
    told: Vec<String>,
    /// What its configuration has besides, or instead.
    changes: Value,
    directory: PathBuf,
    process: Mutex<Option<Process>>,
}

impl Livekit {
    /// One for all tests of this process, which it ends with.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Livekit> = OnceLock::new();
        SHARED.get_or_init(|| {
            let livekit = Self::prepare();
            livekit.start();
            livekit
        })
    }

    /// Configured, and not started.
    pub(crate) fn prepare() -> Self {
        Self::prepare_with_webhooks(&[])
    }

    /// The same; it tells these addresses what happens.
    pub(crate) fn prepare_with_webhooks(urls: &[String]) -> Self {
        Self::prepare_with(urls, json!({}))
    }

    /// The same; the sections of its configuration have these members besides, or instead.
    pub(crate) fn prepare_with(urls: &[String], changes: Value) -> Self {
        Self {
            changes,
            key: "realkey".to_owned(),
            secret: secrets::sfu_secret(),
            address: (Ipv4Addr::LOCALHOST, process::free_port()).into(),
            told: urls.to_vec(),
            directory: process::directory("livekit"),
            process: Mutex::new(None),
        }
    }

    /// Another one on the same port of another address, for the same key; it is not started.
    pub(crate) fn elsewhere(&self) -> Self {
        Self {
            changes: self.changes.clone(),
            key: self.key.clone(),
            secret: self.secret.clone(),
            address: (unique_loopback(), self.address.port()).into(),
            told: self.told.clone(),
            directory: process::directory("livekit"),
            process: Mutex::new(None),
        }
    }

    /// Media has other ports each time: while it was away, somebody else may have taken the last ones.
    fn configure(&self) {
        let mut config = json!({
            "port": self.address.port(),
            "bind_addresses": [self.address.ip()],
            "rtc": {
                "tcp_port": process::free_port(),
                "udp_port": process::free_port(),
                "use_external_ip": false,
                "node_ip": "127.0.0.1",
                "interfaces": {"includes": ["lo"]},
                "enable_loopback_candidate": true,
            },
            "keys": {&self.key: &self.secret},
            "room": {"auto_create": false},
            "webhook": {"api_key": &self.key, "urls": self.told},
        });
        for (section, changes) in self.changes.as_object().into_iter().flatten() {
            for (name, value) in changes.as_object().into_iter().flatten() {
                config[section][name] = value.clone();
            }
        }
        // Sections in lines, as people write them; JSON is YAML below.
        let mut text = String::new();
        for (section, value) in config.as_object().into_iter().flatten() {
            match value.as_object() {
                None => text += &format!("{section}: {value}\n"),
                Some(members) => {
                    text += &format!("{section}:\n");
                    members.iter().for_each(|(name, value)| text += &format!("  {name}: {value}\n"));
                }
            }
        }
        std::fs::write(self.configuration(), text).expect("livekit.yaml");
    }

    /// Its configuration file.
    pub(crate) fn configuration(&self) -> PathBuf {
        self.directory.join("livekit.yaml")
    }

    /// `livekit-server --dev`: its own values for everything.
    pub(crate) fn start_dev() -> Self {
        let livekit = Self {
            changes: json!({}),
            key: "devkey".into(),
            secret: "secret".into(),
            address: (Ipv4Addr::LOCALHOST, 7880).into(),
            told: Vec::new(),
            directory: process::directory("livekit"),
            process: Mutex::new(None),
        };
        livekit.run(&["--dev"]);
        livekit
    }

    /// Starts it and waits until it answers.
    pub(crate) fn start(&self) {
        self.configure();
        self.run(&["--config", "livekit.yaml"]);
    }

    /// Ends it abruptly. It may be started again.
    pub(crate) fn kill(&self) {
        *self.process.lock().unwrap() = None;
    }

    fn run(&self, arguments: &[&str]) {
        let mut command = Command::new(process::tool("livekit-server"));
        command.args(arguments);
        let process = Process::start("livekit-server", &command, &self.directory);
        process.wait_ready(|| process::answers(self.address, "/"));
        *self.process.lock().unwrap() = Some(process);
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) fn secret(&self) -> &str {
        &self.secret
    }

    /// As `LIVEKIT_URL` names it.
    pub(crate) fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// A service for this SFU, with full access for these server names, that may dial homeservers on loopback.
    pub(crate) fn setup(&self, full_access: &[&str]) -> Setup {
        Setup::bare()
            .env("LIVEKIT_URL", &self.url())
            .env("LIVEKIT_KEY", &self.key)
            .env("LIVEKIT_SECRET", &self.secret)
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &full_access.join(","))
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
    }

    /// A call of its API with all grants.
    #[track_caller]
    fn call<T: Message + Default>(&self, method: &str, room: &str, request: &impl Message) -> T {
        let answer = self.api(method, room, request);
        assert_eq!(answer.status, 200, "{method}: {}", answer.text());
        T::decode(answer.body.as_slice()).expect("protobuf")
    }

    fn api(&self, method: &str, room: &str, request: &impl Message) -> Answer {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let grants = json!({"roomCreate": true, "roomList": true, "roomAdmin": true, "room": room});
        let claims = json!({"iss": self.key, "exp": now + 60, "video": grants});
        let call = Call::post(&format!("/twirp/livekit.RoomService/{method}"), request.encode_to_vec())
            .header("Content-Type", "application/protobuf")
            .header("Authorization", &format!("Bearer {}", Jwt::sign(&claims, &self.secret)));
        client::call(self.address, &call)
    }

    /// Creates a room past the service. The timeouts of a room that stands already do not change.
    #[track_caller]
    pub(crate) fn create(&self, name: &str, empty_timeout: u32, departure_timeout: u32) -> proto::Room {
        let request = proto::CreateRoomRequest {
            name: name.into(),
            empty_timeout,
            departure_timeout,
            ..Default::default()
        };
        self.call("CreateRoom", name, &request)
    }

    /// Creates a room for so many participants past the service.
    #[track_caller]
    pub(crate) fn create_for(&self, name: &str, max_participants: u32) {
        let request = proto::CreateRoomRequest {
            name: name.into(),
            empty_timeout: 300,
            max_participants,
            ..Default::default()
        };
        let _: proto::Room = self.call("CreateRoom", name, &request);
    }

    /// The room, if it stands.
    #[track_caller]
    pub(crate) fn room(&self, name: &str) -> Option<proto::Room> {
        let names = vec![name.to_owned()];
        let answer: proto::ListRoomsResponse = self.call("ListRooms", "", &proto::ListRoomsRequest { names });
        answer.rooms.into_iter().next()
    }

    /// The identities in it.
    #[track_caller]
    pub(crate) fn participants(&self, room: &str) -> Vec<String> {
        let request = proto::ListParticipantsRequest { room: room.into() };
        let answer: proto::ListParticipantsResponse = self.call("ListParticipants", room, &request);
        answer.participants.into_iter().map(|p| p.identity).collect()
    }

    /// Sources of the tracks in it, by LiveKit's names.
    #[track_caller]
    pub(crate) fn sources(&self, room: &str) -> BTreeSet<&'static str> {
        let request = proto::ListParticipantsRequest { room: room.into() };
        let answer: proto::ListParticipantsResponse = self.call("ListParticipants", room, &request);
        let tracks = answer.participants.iter().flat_map(|participant| &participant.tracks);
        tracks.map(|track| track.source().as_str_name()).collect()
    }

    /// All that it said since it was started the last time.
    pub(crate) fn log(&self) -> String {
        self.process.lock().unwrap().as_ref().map(Process::log).unwrap_or_default()
    }

    /// The end of what it said, for a test that failed.
    pub(crate) fn tail(&self) -> String {
        self.process.lock().unwrap().as_ref().map(|p| p.tail(10)).unwrap_or_default()
    }

    /// The first step of a join, with a token as the service returned it. The status of the answer: 101 when the SFU
    /// would go on, 404 when there is no such room. The connection is dropped after `stay`.
    pub(crate) fn signal(&self, jwt: &str, stay: Duration) -> u16 {
        let call = Call::new("GET", &format!("/rtc?access_token={jwt}&protocol=16&sdk=rust"))
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
        let status = || {
            let mut stream = TcpStream::connect(self.address).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
            stream.write_all(&call.bytes(self.address)).ok()?;
            let mut line = [0; 12];
            stream.read_exact(&mut line).ok()?;
            std::thread::sleep(stay);
            std::str::from_utf8(&line).ok()?.split(' ').nth(1)?.parse().ok()
        };
        status().unwrap_or(0)
    }
}

/// A real client (LiveKit's Python SDK) that publishes a microphone and a camera, and says how that went. Dropping it kills it.
pub(crate) struct Publisher(Process);

impl Publisher {
    pub(crate) fn start(answer: &Value) -> Self {
        let mut command = process::script("publish.py");
        command.args([answer["url"].as_str().expect("url"), answer["jwt"].as_str().expect("jwt")]);
        Self(Process::start_piped("publisher", &command, &process::directory("publisher")))
    }

    /// The next thing that it says.
    #[track_caller]
    pub(crate) fn line(&self) -> String {
        self.0.line(CLIENT).expect("it ended without a word")
    }
}

/// A real client (LiveKit's Python SDK) that tries to join. Dropping it kills it.
pub(crate) struct Client(Process);

impl Client {
    /// As a client does it: with what the service answered.
    pub(crate) fn start(answer: &Value) -> Self {
        Self::run(answer, &["600"])
    }

    fn run(answer: &Value, arguments: &[&str]) -> Self {
        let mut command = process::script("client.py");
        command
            .args([answer["url"].as_str().expect("url"), answer["jwt"].as_str().expect("jwt")])
            .args(arguments)
            .env("SSL_CERT_FILE", Ca::trusted().file());
        Self(Process::start_piped("client", &command, &process::directory("client")))
    }

    /// Waits until it is in the room; its identity as the SFU told it.
    #[track_caller]
    pub(crate) fn joined(&self) -> String {
        let line = self.0.line(CLIENT).unwrap_or_default();
        let said: Vec<_> = line.split(' ').collect();
        assert!(said.len() == 3 && said[0] == "joined", "the client could not join: {line:?}");
        said[1].to_owned()
    }

    /// Joins and stays; its identity as the SFU told it.
    #[track_caller]
    pub(crate) fn join(answer: &Value) -> (Self, String) {
        let client = Self::start(answer);
        let identity = client.joined();
        (client, identity)
    }

    /// Says goodbye.
    pub(crate) fn leave(&self) {
        self.0.signal("TERM");
    }

    /// Waits until the SFU ends it, and tells why, by LiveKit's name.
    #[track_caller]
    pub(crate) fn disconnected(&self) -> String {
        loop {
            let line = self.0.line(CLIENT).expect("it ended without a word");
            if let Some(reason) = line.strip_prefix("disconnected ") {
                return reason.to_owned();
            }
        }
    }

    /// Fails unless the SFU answers that it will not have it; why.
    #[track_caller]
    pub(crate) fn refused(answer: &Value) -> String {
        let client = Self::run(answer, &["--expect-refused"]);
        let line = client.0.line(CLIENT).unwrap_or_default();
        let why = line
            .strip_prefix("refused ")
            .unwrap_or_else(|| panic!("the client was not refused: {line:?}"));
        why.to_owned()
    }
}
