//! The real binary, in a process of its own.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use url::Url;

use super::ca::Ca;
use super::client::{self, Answer, Call, Connection};
use super::dns::Dns;
use super::homeserver::Homeserver;
use super::log::{self, Line};
use super::sfu::Sfu;
use super::{secrets, unique_loopback, wait_until};

/// The binary under test: the one that Cargo built beside the tests, or the one that `LK_TESTS_BINARY` names.
pub(crate) fn binary() -> &'static str {
    static BINARY: LazyLock<String> =
        LazyLock::new(|| std::env::var("LK_TESTS_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_lk-jwt-service").to_owned()));
    &BINARY
}
/// A start takes some ten milliseconds; the rest is for a machine that is busy with other tests.
const START: Duration = Duration::from_secs(20);
/// A line comes at once, or with the next of the checks that are repeated each second in tests.
const LINE: Duration = Duration::from_secs(60);

/// How a service is to be started.
#[derive(Clone)]
pub(crate) struct Setup {
    environment: BTreeMap<String, String>,
    arguments: Vec<String>,
    address: SocketAddr,
    secrets: Vec<String>,
    wrapper: Vec<String>,
    unread_log: bool,
}

impl Setup {
    /// For this SFU; listening on an address of its own, logging at debug, trusting the tests' CA, and allowed to dial
    /// loopback homeservers. Nobody has full access yet.
    pub(crate) fn new(sfu: &Sfu) -> Self {
        let setup = Self::bare();
        let setup = if beside_a_homeserver() {
            setup.beside_a_homeserver()
        } else {
            setup
        };
        setup
            .env("LIVEKIT_URL", &sfu.url())
            .env("LIVEKIT_KEY", sfu.key())
            .env("LIVEKIT_SECRET", sfu.secret())
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "nobody.example.org")
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8,::1/128")
    }

    /// In application-service mode, for a homeserver that none of the tests' users is of, and that is never asked: nothing
    /// of what the standalone routes do may change by it.
    fn beside_a_homeserver(self) -> Self {
        self.env("LIVEKIT_HS_SERVER_NAME", "127.0.0.1:1")
            .env("LIVEKIT_AS_TOKEN", &secrets::as_token())
            .env("LIVEKIT_HS_TOKEN", &secrets::hs_token())
            .env("LIVEKIT_REQUIRE_MEMBERSHIP", "false")
    }

    /// Only the address, the log level and the CA are set.
    pub(crate) fn bare() -> Self {
        let address = free_address();
        let setup = Self {
            environment: BTreeMap::new(),
            arguments: Vec::new(),
            address,
            secrets: Vec::new(),
            wrapper: Vec::new(),
            unread_log: false,
        };
        setup
            .env("LIVEKIT_JWT_BIND", &address.to_string())
            .env("LIVEKIT_LOG_LEVEL", "debug")
            // The crowds of the tests are often one user. What holds when it is unset, `policy` shows.
            .env("LIVEKIT_RATE_LIMIT_USER", "off")
            .env("SSL_CERT_FILE", &Ca::trusted().file().to_string_lossy())
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.environment.remove(name);
        self
    }

    pub(crate) fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Reaches the SFU, and so do clients, by this name, which is where the SFU is for now.
    pub(crate) fn sfu_named(self, name: &str, dns: &Dns) -> Self {
        let url = Url::parse(&self.environment["LIVEKIT_URL"]).expect("an address");
        let host = url.host_str().expect("a host");
        dns.address(name, &[host.parse().expect("an address")]);
        let url = self.environment["LIVEKIT_URL"].replacen(host, name, 1);
        dns.serving(self).env("LIVEKIT_URL", &url)
    }

    /// Lists these homeservers in `LIVEKIT_FULL_ACCESS_HOMESERVERS`.
    pub(crate) fn full_access(self, homeservers: &[&Homeserver]) -> Self {
        let names: Vec<_> = homeservers.iter().map(|h| h.name.as_str()).collect();
        self.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &names.join(","))
    }

    /// One more text that must not be seen in the log.
    pub(crate) fn secret(mut self, secret: &str) -> Self {
        self.secrets.push(secret.into());
        self
    }

    /// Where the tests reach it, when that is not what `LIVEKIT_JWT_BIND` says.
    pub(crate) fn reached_at(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    /// Runs the binary as the last arguments of this command.
    pub(crate) fn wrapped_in(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|s| (*s).to_owned()).collect();
        self
    }

    /// Nobody reads its log before [`Service::read_log`].
    pub(crate) fn unread_log(mut self) -> Self {
        self.unread_log = true;
        self
    }

    /// Starts it and waits until it is healthy.
    #[track_caller]
    pub(crate) fn start(self) -> Service {
        let service = self.spawn();
        service.wait_healthy();
        service
    }

    /// Starts it.
    #[track_caller]
    pub(crate) fn spawn(self) -> Service {
        let mut words: Vec<String> = self.wrapper;
        words.push(binary().into());
        words.extend(self.arguments);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .env_clear()
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {}: {e}", words[0]));
        let stdout = Capture::of(child.stdout.take().expect("piped"), None);
        let (reads, read) = std::sync::mpsc::channel();
        let stderr = Capture::of(child.stderr.take().expect("piped"), Some(read).filter(|_| self.unread_log));
        Service {
            pid: child.id(),
            child: Mutex::new(child),
            address: self.address,
            stdout,
            stderr,
            secrets: self.secrets,
            unread: Mutex::new(Some(reads).filter(|_| self.unread_log)),
        }
    }
}

/// True in the second pass of `tests/run`: the suites of the standalone routes, in application-service mode.
pub(crate) fn beside_a_homeserver() -> bool {
    std::env::var("LK_TESTS_APPSERVICE").is_ok_and(|v| v == "1")
}

/// A loopback address and port on which nothing listens, and nothing of these tests ever will.
pub(crate) fn free_address() -> SocketAddr {
    free_port_of(unique_loopback())
}

/// A port that was free a moment ago.
pub(crate) fn free_port_of(ip: Ipv4Addr) -> SocketAddr {
    TcpListener::bind((ip, 0)).and_then(|l| l.local_addr()).expect("a free port")
}

/// A running service. When it is dropped its process is killed and its whole log is searched for secrets.
pub(crate) struct Service {
    child: Mutex<Child>,
    pub(crate) pid: u32,
    address: SocketAddr,
    stdout: Capture,
    stderr: Capture,
    secrets: Vec<String>,
    /// Dropped when the log is to be read.
    unread: Mutex<Option<Sender<()>>>,
}

impl Service {
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    #[track_caller]
    pub(crate) fn wait_healthy(&self) {
        let healthy = || {
            if let Some(status) = self.exit_status() {
                self.stderr.wait_end();
                panic!("the service ended ({status}) instead of serving:\n{}{}", self.stdout(), self.log());
            }
            let mut connection = Connection::open(self.address).ok()?;
            connection.send(&Call::new("GET", "/healthz").bytes(self.address));
            connection.answer().filter(|a| a.status == 200)
        };
        let end = Instant::now() + START;
        while healthy().is_none() {
            assert!(Instant::now() < end, "not healthy within {START:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// One request; every answer is checked for what holds for all of them.
    #[track_caller]
    pub(crate) fn call(&self, call: &Call) -> Answer {
        let answer = client::call(self.address, call);
        answer.assert_manners();
        answer
    }

    #[track_caller]
    pub(crate) fn get(&self, target: &str) -> Answer {
        self.call(&Call::new("GET", target))
    }

    #[track_caller]
    pub(crate) fn post(&self, target: &str, body: &Value) -> Answer {
        self.call(&Call::json(target, body))
    }

    /// Bytes as they are, on a connection of their own; `None` when it ends without an answer.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Option<Answer> {
        let mut connection = self.connect();
        connection.send(bytes);
        connection.answer()
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> Connection {
        Connection::open(self.address).unwrap_or_else(|e| panic!("cannot connect to {}: {e}\n{}", self.address, self.log()))
    }

    /// Many requests, `at_once` at a time; every answer is checked, every request must have one.
    #[track_caller]
    pub(crate) fn flood(&self, calls: &[Call], at_once: usize) -> Vec<Answer> {
        let answers = client::flood(self.address, calls, at_once);
        let answers: Vec<_> = answers
            .into_iter()
            .map(|a| a.unwrap_or_else(|why| panic!("a request of the flood had no answer: {why}")))
            .collect();
        answers.iter().for_each(Answer::assert_manners);
        answers
    }

    /// A request in the background.
    pub(crate) fn begin(&self, call: &Call) -> JoinHandle<Option<Answer>> {
        let (address, bytes) = (self.address, call.bytes(self.address));
        std::thread::spawn(move || {
            let mut connection = Connection::open(address).ok()?;
            connection.send(&bytes);
            connection.answer()
        })
    }

    /// From now on its log is read.
    pub(crate) fn read_log(&self) {
        drop(self.unread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
    }

    /// Everything on stderr so far. What was logged before an answer is in it when that has arrived: the thread that writes the
    /// log is waited for, a second at most.
    pub(crate) fn log(&self) -> String {
        let end = Instant::now() + Duration::from_secs(1);
        let mut text = self.stderr.text();
        loop {
            while self.is_logging() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            // What was written may still be on its way through the pipe.
            std::thread::sleep(Duration::from_millis(2));
            let now = self.stderr.text();
            if now.len() == text.len() || Instant::now() >= end {
                return now;
            }
            text = now;
        }
    }

    fn is_logging(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid))
            .into_iter()
            .flatten()
            .flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok())
            .any(|stat| stat.contains("(log-busy)") || (stat.contains("(log)") && !stat.contains("(log) S")))
    }

    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// The lines so far that have these fields.
    pub(crate) fn lines(&self, fields: &[(&str, &str)]) -> Vec<Line> {
        log::lines(&self.log(), fields)
    }

    pub(crate) fn has_event(&self, event: &str) -> bool {
        !self.lines(&[("event", event)]).is_empty()
    }

    /// Whether one of its warnings about the configuration, which come before `listening`, has all of these texts.
    #[track_caller]
    pub(crate) fn warns_of(&self, texts: &[&str]) -> bool {
        self.wait_event("listening");
        let warnings = self.lines(&[("event", "configuration")]);
        warnings.iter().any(|line| texts.iter().all(|text| line.contains(text)))
    }

    /// Waits for a line about this event.
    #[track_caller]
    pub(crate) fn wait_event(&self, event: &str) -> Line {
        self.wait_line(&[("event", event)])
    }

    /// Waits for the line of the request with this id.
    #[track_caller]
    pub(crate) fn wait_request(&self, id: &str) -> Line {
        self.wait_line(&[("target", "request"), ("request_id", id)])
    }

    /// Waits for the line of the request that was answered so.
    #[track_caller]
    pub(crate) fn wait_line_of(&self, answer: &Answer) -> Line {
        self.wait_request(answer.header("x-request-id").expect("an ID"))
    }

    /// Waits for a line that has these fields.
    #[track_caller]
    pub(crate) fn wait_line(&self, fields: &[(&str, &str)]) -> Line {
        self.wait_line_after(0, fields)
    }

    /// The same, in what was logged since the log was `mark` bytes long.
    #[track_caller]
    pub(crate) fn wait_line_after(&self, mark: usize, fields: &[(&str, &str)]) -> Line {
        let end = Instant::now() + LINE;
        loop {
            let log = self.log();
            let new = log.get(mark..).unwrap_or_default();
            if let Some(line) = log::lines(new, fields).into_iter().next() {
                return line;
            }
            assert!(Instant::now() < end, "no line of the log has {fields:?}:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.pid, name);
    }

    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().expect("wait for the service")
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub(crate) fn wait_exit(&self, within: Duration) -> ExitStatus {
        let mut status = None;
        wait_until("the service to end", within, || {
            status = self.exit_status();
            status.is_some()
        });
        self.stdout.wait_end();
        self.stderr.wait_end();
        status.expect("just seen")
    }

    /// Resident memory.
    pub(crate) fn rss_kib(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find(|l| l.starts_with("VmRSS")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Open file descriptors.
    pub(crate) fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("fd").count()
    }

    /// User and system time so far.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = self.proc("stat");
        let rest = &stat[stat.rfind(')').expect("a name") + 2..];
        let ticks: u64 = rest
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|n| n.parse::<u64>().expect("ticks"))
            .sum();
        Duration::from_millis(ticks * 10)
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid)).expect("a running service")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
        self.read_log();
        self.stdout.wait_end();
        self.stderr.wait_end();
        if std::thread::panicking() {
            let log = self.log();
            // What a test waits for by asking is not what it fails by.
            let lines = log.lines().rev().filter(|line| !line.contains("route=readyz"));
            let tail: Vec<_> = lines.take(100).collect();
            eprintln!("the end of the log of the service ({}):", self.address);
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        } else {
            secrets::assert_none("the log", &self.log(), &self.secrets);
            secrets::assert_none("stdout", &self.stdout(), &self.secrets);
            let panic = self.log().lines().find(|line| line.contains("panicked")).map(str::to_owned);
            assert_eq!(panic, None, "the service panicked");
        }
    }
}

/// Sends a signal by name (`TERM`, `INT`, …).
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("/bin/sh")
        .args(["-c", &format!("kill -{name} {pid}")])
        .status()
        .expect("sh");
    assert!(status.success(), "kill -{name} {pid}");
}

/// What a pipe said, read by a thread of its own.
struct Capture {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl Capture {
    /// Reads at once, or when the other end of `until` was dropped.
    fn of(mut pipe: impl Read + Send + 'static, until: Option<Receiver<()>>) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let into = text.clone();
        let reader = std::thread::spawn(move || {
            let _ = until.map(|until| until.recv());
            let mut chunk = [0; 16 * 1024];
            while let Ok(n) = pipe.read(&mut chunk) {
                if n == 0 {
                    return;
                }
                into.lock().unwrap().extend(&chunk[..n]);
            }
        });
        Self {
            text,
            reader: Mutex::new(Some(reader)),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    fn wait_end(&self) {
        if let Some(reader) = self.reader.lock().unwrap().take() {
            let _ = reader.join();
        }
    }
}
