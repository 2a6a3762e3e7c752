//! Real homeservers: Synapse with TLS for its federation API, signed by the tests' authority.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::ca::Ca;
use super::client::{self, Answer, Call};
use super::process::{self, Process};
use super::unique;

/// A DNS name in its certificate.
pub(crate) const CERTIFIED: &str = "synapse.example.org";

pub(crate) struct Synapse {
    /// Its Matrix server name: address and port of its federation API.
    pub(crate) name: String,
    client: SocketAddr,
    directory: PathBuf,
    process: Process,
}

/// A user of a real homeserver, and the device they logged in with.
pub(crate) struct User<'a> {
    pub(crate) homeserver: &'a Synapse,
    pub(crate) id: String,
    pub(crate) device: String,
    access_token: String,
}

impl Synapse {
    /// Two of them, for all tests of this process, which they end with.
    pub(crate) fn pair() -> &'static [Self; 2] {
        static PAIR: OnceLock<[Synapse; 2]> = OnceLock::new();
        PAIR.get_or_init(|| {
            let pair = [Self::spawn(&[]), Self::spawn(&[])];
            pair.iter().for_each(Self::wait_ready);
            pair
        })
    }

    /// One with the limits on delayed events that Synapse has by itself.
    pub(crate) fn start_limited() -> Self {
        let synapse = Self::spawn(&["--default-delayed-event-limits"]);
        synapse.wait_ready();
        synapse
    }

    /// One that nobody else is given.
    pub(crate) fn start() -> Self {
        let synapse = Self::spawn(&[]);
        synapse.wait_ready();
        synapse
    }

    fn spawn(arguments: &[&str]) -> Self {
        Self::spawn_at([process::free_port(), process::free_port()], arguments)
    }

    /// One whose application service has this registration, on these ports for its federation and its client-server API;
    /// [`Self::wait_ready`] waits for it.
    pub(crate) fn spawn_with(registration: &Path, ports: [u16; 2]) -> Self {
        Self::spawn_at(ports, &["--appservice", &registration.to_string_lossy()])
    }

    fn spawn_at([federation, client]: [u16; 2], arguments: &[&str]) -> Self {
        let directory = process::directory("synapse");
        let (certificate, key) = Ca::trusted().server_pem(&["127.0.0.1".into(), CERTIFIED.into()]);
        let (certificate_file, key_file) = (directory.join("cert.pem"), directory.join("key.pem"));
        std::fs::write(&certificate_file, certificate).expect("cert.pem");
        std::fs::write(&key_file, key).expect("key.pem");
        let output = process::script("synapse.py")
            .arg(&directory)
            .args([federation.to_string(), client.to_string()])
            .args([certificate_file, key_file])
            .args(arguments)
            .output()
            .expect("python");
        assert!(
            output.status.success(),
            "synapse.py failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("exec {}", String::from_utf8_lossy(&output.stdout))]);
        Self {
            name: format!("127.0.0.1:{federation}"),
            client: (Ipv4Addr::LOCALHOST, client).into(),
            process: Process::start("synapse", &command, &directory),
            directory,
        }
    }

    pub(crate) fn wait_ready(&self) {
        self.process
            .wait_ready(|| process::answers(self.client, "/_matrix/client/versions"));
    }

    /// Registers a user that nobody else has.
    #[track_caller]
    pub(crate) fn register(&self, name: &str) -> User<'_> {
        let device = format!("{}DEVICE", name.to_uppercase());
        let body = json!({
            "username": format!("{name}{}", unique()), "password": "secret", "device_id": device, "auth": {"type": "m.login.dummy"},
        });
        let user = self.call("/_matrix/client/v3/register", &body, None);
        User {
            homeserver: self,
            id: user["user_id"].as_str().expect("user_id").into(),
            device,
            access_token: user["access_token"].as_str().expect("access_token").into(),
        }
    }

    #[track_caller]
    fn call(&self, path: &str, body: &Value, access_token: Option<&str>) -> Value {
        let mut call = Call::json(path, body);
        if let Some(token) = access_token {
            call = call.header("Authorization", &format!("Bearer {token}"));
        }
        let answer: Answer = client::call(self.client, &call);
        assert_eq!(answer.status, 200, "POST {path}: {}", answer.text());
        answer.json()
    }

    /// SIGSTOP: connections are still made, and nothing is answered; its timers stand still.
    pub(crate) fn freeze(&self) {
        self.process.signal("STOP");
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.process.signal("CONT");
    }

    /// Where its client-server API is.
    pub(crate) fn client_api(&self) -> SocketAddr {
        self.client
    }

    /// The end of what it said, for a test that failed.
    pub(crate) fn tail(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("synapse.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(10)..].join("\n");
        format!("{last}\n{}", self.process.tail(10))
    }
}

impl User<'_> {
    /// A Matrix room of theirs.
    #[track_caller]
    pub(crate) fn create_room(&self) -> String {
        let room = self
            .homeserver
            .call("/_matrix/client/v3/createRoom", &json!({}), Some(&self.access_token));
        room["room_id"].as_str().expect("room_id").into()
    }

    /// One in which everybody may say that they are in a call.
    #[track_caller]
    pub(crate) fn create_call_room(&self) -> String {
        let open = json!({"preset": "public_chat", "power_level_content_override": {"state_default": 0}});
        let room = self
            .homeserver
            .call("/_matrix/client/v3/createRoom", &open, Some(&self.access_token));
        room["room_id"].as_str().expect("room_id").into()
    }

    #[track_caller]
    pub(crate) fn join(&self, room: &str) {
        let path = format!("/_matrix/client/v3/rooms/{room}/join");
        self.homeserver.call(&path, &json!({}), Some(&self.access_token));
    }

    /// A call of the client-server API with their access token.
    pub(crate) fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let call = match body {
            Some(body) => Call::json_of(method, path, body),
            None => Call::new(method, path),
        };
        let call = call.header("Authorization", &format!("Bearer {}", self.access_token));
        client::call(self.homeserver.client, &call)
    }

    /// What their homeserver answers to `request_token`, as a client passes it on.
    #[track_caller]
    pub(crate) fn request_token(&self) -> Value {
        let path = format!("/_matrix/client/v3/user/{}/openid/request_token", self.id);
        self.homeserver.call(&path, &json!({}), Some(&self.access_token))
    }

    /// A `/get_token` body with a fresh OpenID token.
    #[track_caller]
    pub(crate) fn get_token(&self, room: &str) -> Value {
        json!({
            "room_id": room,
            "slot_id": super::hashes::SLOT,
            "openid_token": self.request_token(),
            "member": {"id": "member1", "claimed_user_id": self.id, "claimed_device_id": self.device},
        })
    }

    /// A legacy `/sfu/get` body with a fresh OpenID token.
    #[track_caller]
    pub(crate) fn sfu_get(&self, room: &str) -> Value {
        json!({"room": room, "openid_token": self.request_token(), "device_id": self.device})
    }
}
