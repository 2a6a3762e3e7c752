//! A real redis-server.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use super::process::{program, real_neighbours};
use super::{unique, unique_loopback, wait_until};

/// Longest wait for an answer in a test.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Keeps what it has acknowledged across [`RedisServer::kill`]. Killed when it is dropped.
pub(crate) struct RedisServer {
    address: Ipv4Addr,
    directory: PathBuf,
    options: Vec<String>,
    child: Option<Child>,
    login: Vec<String>,
    off_seconds: i64,
}

impl RedisServer {
    /// Starts one with these options of redis-server; `None` where real neighbours are left out, which is said.
    pub(crate) fn start(options: &[&str]) -> Option<Self> {
        Self::start_by(0, options)
    }

    /// The same by a clock that is off by so many seconds.
    pub(crate) fn start_by(off_seconds: i64, options: &[&str]) -> Option<Self> {
        if !real_neighbours() {
            return None;
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("redis-{}-{}", std::process::id(), unique()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let mut server = Self {
            address: unique_loopback(),
            directory,
            options: options.iter().map(|&option| option.to_owned()).collect(),
            child: None,
            login: Vec::new(),
            off_seconds,
        };
        server.start_again();
        Some(server)
    }

    /// With a command that [`RedisServer::ask`] begins with.
    pub(crate) fn with_login(mut self, login: &[&str]) -> Self {
        self.login = login.iter().map(|&part| part.to_owned()).collect();
        self
    }

    pub(crate) fn start_again(&mut self) {
        let mut options = self.options.iter().map(String::as_str);
        let mut command = Command::new(program("redis-server"));
        command
            .args(["--bind", &self.address.to_string(), "--port", "6379", "--protected-mode", "no"])
            .args(["--replica-announce-ip", &self.address.to_string()])
            .args(["--cluster-announce-ip", &self.address.to_string()])
            .args(["--save", "", "--appendonly", "yes", "--appendfsync", "always"])
            .args(["--unixsocket", &self.socket().display().to_string(), "--dir"])
            .arg(&self.directory)
            .args(options.by_ref())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if self.off_seconds != 0 {
            command
                .env("LD_PRELOAD", clock())
                .env("CLOCK_OFF_SECONDS", self.off_seconds.to_string());
        }
        self.child = Some(command.spawn().expect("redis-server"));
        wait_until("redis-server to answer", TIMEOUT, || {
            self.try_ask(&["PING"]).is_some_and(|answer| !answer.starts_with("-LOADING"))
        });
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.address.into(), 6379)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        // A path in the target directory may be too long for a socket.
        std::env::temp_dir().join(format!("lk-jwt-{}-{}.sock", std::process::id(), self.address))
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP: connections are still made, and nothing is answered.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal("CONT");
    }

    pub(crate) fn is_frozen(&self) -> bool {
        let pid = self.child.as_ref().map(Child::id);
        let stat = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        stat.is_some_and(|stat| stat.contains(") T "))
    }

    fn signal(&self, name: &str) {
        let pid = self.child.as_ref().expect("a running server").id();
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {pid}");
    }

    /// The answer to one command, as it comes over the wire.
    pub(crate) fn ask(&self, command: &[&str]) -> String {
        self.try_ask(command).expect("an answer of redis-server")
    }

    pub(crate) fn hset(&self, field: &str, value: &str) {
        let answer = self.ask(&["HSET", "lk-jwt:jobs", field, value]);
        assert!(answer.starts_with(':'), "{answer}");
    }

    /// The value of a field.
    pub(crate) fn hget(&self, field: &str) -> Option<String> {
        let answer = self.ask(&["HGET", "lk-jwt:jobs", field]);
        if answer == "$-1\r\n" {
            return None;
        }
        let (_, value) = answer.split_once("\r\n").expect("a bulk string");
        Some(value.strip_suffix("\r\n").expect("an end").to_owned())
    }

    /// The same; nothing, where the connection is closed instead, as when the server becomes a primary.
    pub(crate) fn try_ask(&self, command: &[&str]) -> Option<String> {
        let mut stream = TcpStream::connect_timeout(&self.address(), TIMEOUT).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        let login: Vec<&str> = self.login.iter().map(String::as_str).collect();
        if !login.is_empty() {
            stream.write_all(&encoded(&login)).ok()?;
            assert_eq!(stream_line(&mut stream)?, "+OK\r\n");
        }
        stream.write_all(&encoded(command)).ok()?;
        let first = stream_line(&mut stream)?;
        let mut answer = first.clone();
        if let Some(length) = first.strip_prefix('$').and_then(|digits| digits.trim().parse::<usize>().ok()) {
            let mut rest = vec![0; length + 2];
            stream.read_exact(&mut rest).ok()?;
            answer.push_str(&String::from_utf8_lossy(&rest));
        }
        Some(answer)
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
        let _ = std::fs::remove_file(self.socket());
    }
}

/// The library that puts a clock off.
fn clock() -> &'static Path {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("clock-{}.so", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/clock.c");
        let mut compiler = Command::new(program("cc"));
        let made = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        assert!(made.is_ok_and(|made| made.success()), "cc fails");
        library
    });
    &LIBRARY
}

fn encoded(command: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", command.len());
    for part in command {
        bytes.push_str(&format!("${}\r\n{part}\r\n", part.len()));
    }
    bytes.into_bytes()
}

fn stream_line(stream: &mut TcpStream) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    String::from_utf8(line).ok()
}
