//! An HTTP/1.1 client that sends the bytes it is told to and shows the bytes it got.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::secrets;

/// Longer than any answer may take.
const TIMEOUT: Duration = Duration::from_secs(40);

/// A request to build.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Call {
    pub(crate) fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.into(),
            target: target.into(),
            headers: Vec::new(),
            body: None,
        }
    }

    pub(crate) fn post(target: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::with_body("POST", target, body)
    }

    pub(crate) fn with_body(method: &str, target: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            body: Some(body.into()),
            ..Self::new(method, target)
        }
    }

    pub(crate) fn json(target: &str, body: &Value) -> Self {
        Self::json_of("POST", target, body)
    }

    pub(crate) fn json_of(method: &str, target: &str, body: &Value) -> Self {
        let call = Self {
            body: Some(body.to_string().into()),
            ..Self::new(method, target)
        };
        call.header("Content-Type", "application/json")
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// On the wire, for a server at `host`.
    pub(crate) fn bytes(&self, host: SocketAddr) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: {host}\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if let Some(body) = &self.body {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        let mut bytes = (head + "\r\n").into_bytes();
        bytes.extend(self.body.iter().flatten());
        bytes
    }
}

/// An answer as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// From the first byte sent to the last byte received.
    pub(crate) took: Duration,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("status {}, no JSON ({e}): {:?}", self.status, self.text()))
    }

    /// A string member of the JSON body, empty where it is missing.
    pub(crate) fn field(&self, name: &str) -> String {
        let json: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        json[name].as_str().unwrap_or_default().to_owned()
    }

    /// Fails unless it is this error, byte for byte, in the form of decisions H3 and H4.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, errcode: &str, error: &str) {
        assert_eq!(
            (self.status, self.field("errcode"), self.field("error")),
            (status, errcode.into(), error.into()),
            "{}",
            self.text()
        );
        self.assert_error_form();
    }

    /// Fails unless it is an error with this code, whatever its text.
    #[track_caller]
    pub(crate) fn assert_errcode(&self, status: u16, errcode: &str) {
        assert_eq!((self.status, self.field("errcode")), (status, errcode.into()), "{}", self.text());
        self.assert_error_form();
    }

    #[track_caller]
    fn assert_error_form(&self) {
        let body = self.json();
        assert_eq!(
            self.header("content-type"),
            Some("application/json"),
            "content type of {}",
            self.text()
        );
        assert!(!self.field("error").is_empty(), "an error without a text: {}", self.text());
        assert_eq!(
            body["request_id"].as_str(),
            self.header("x-request-id"),
            "request_id of {}",
            self.text()
        );
        if self.status == 401 || self.status == 500 {
            assert!(
                !self.field("reason").is_empty(),
                "a {} without a reason: {}",
                self.status,
                self.text()
            );
        }
        for name in body.as_object().expect("an object").keys() {
            let known = ["errcode", "error", "request_id", "reason", "retry_after_ms"];
            assert!(known.contains(&name.as_str()), "unknown member {name} in {}", self.text());
        }
    }

    /// What holds for every answer: CORS (H2), who answers and a request ID (H4), and no secret in an error.
    #[track_caller]
    pub(crate) fn assert_manners(&self) {
        let header = |name| {
            self.header(name)
                .unwrap_or_else(|| panic!("no {name} in a {}: {:?}", self.status, self.headers))
        };
        assert_eq!(header("access-control-allow-origin"), "*");
        let list = |name| header(name).split(',').map(|s| s.trim().to_ascii_lowercase()).collect::<Vec<_>>();
        assert_eq!(list("access-control-allow-methods"), ["get", "post", "options"]);
        for name in [
            "accept",
            "content-type",
            "content-length",
            "accept-encoding",
            "x-csrf-token",
            "authorization",
        ] {
            assert!(
                list("access-control-allow-headers").iter().any(|n| n == name),
                "{name} is not allowed: {:?}",
                self.headers
            );
        }
        let exposed = ["retry-after", "x-request-id", "x-served-by", "date"];
        assert_eq!(list("access-control-expose-headers"), exposed);
        assert_eq!(header("x-served-by"), "lk-jwt-service");
        assert!(header("date").ends_with(" GMT"), "{:?}", self.headers);
        assert_eq!(header("access-control-max-age"), "86400");
        let id = header("x-request-id");
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        assert!((1..=64).contains(&id.len()) && id.chars().all(plain), "request ID {id:?}");
        self.assert_no_secret();
    }

    #[track_caller]
    fn assert_no_secret(&self) {
        secrets::assert_none("a header", &format!("{:?}", self.headers), &[]);
        if self.status >= 400 {
            secrets::assert_none("an error body", &self.text(), &[]);
        }
    }

    /// Reads one answer from the front of `bytes`; `None` when more is needed. Returns what it took.
    fn parse(bytes: &[u8], ended: bool, to_head: bool, took: Duration) -> Option<(Self, usize)> {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let (line, fields) = head.split_once("\r\n").unwrap_or((&head, ""));
        let status: u16 = line.split(' ').nth(1)?.parse().ok()?;
        let headers: Vec<(String, String)> = fields
            .split("\r\n")
            .filter_map(|l| l.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        if status == 100 {
            let (answer, used) = Self::parse(&bytes[end + 4..], ended, to_head, took)?;
            return Some((answer, used + end + 4));
        }
        let mut answer = Self {
            status,
            headers,
            body: Vec::new(),
            took,
        };
        let rest = &bytes[end + 4..];
        let used = if to_head {
            0
        } else if answer.header("transfer-encoding") == Some("chunked") {
            answer.dechunk(rest)?
        } else {
            let length = match answer.header("content-length") {
                Some(length) => length.parse().ok()?,
                None if ended => rest.len(),
                None => return None,
            };
            answer.body = rest.get(..length)?.to_vec();
            length
        };
        Some((answer, end + 4 + used))
    }

    fn dechunk(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            let line = bytes[at..].windows(2).position(|w| w == b"\r\n")?;
            let size = usize::from_str_radix(std::str::from_utf8(&bytes[at..at + line]).ok()?, 16).ok()?;
            at += line + 2;
            self.body.extend(bytes.get(at..at + size)?);
            at += size + 2;
            if size == 0 {
                return Some(at);
            }
        }
    }
}

/// One connection, blocking.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    began: Instant,
}

impl Connection {
    pub(crate) fn open(to: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
            began: Instant::now(),
        })
    }

    /// Sends bytes as they are. An error is kept for the reading side: a server may answer before it has read everything.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.began = Instant::now();
        let _ = self.stream.write_all(bytes);
    }

    /// Says that nothing more will be sent; answers can still be read.
    pub(crate) fn half_close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    /// Whether something has come that was not read.
    pub(crate) fn has_unread(&self) -> bool {
        self.stream.peek(&mut [0]).is_ok_and(|count| count > 0)
    }

    /// The next answer; `None` when the connection ended, or stayed silent for `TIMEOUT`, without one.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        self.answer_to(false)
    }

    pub(crate) fn answer_to(&mut self, head: bool) -> Option<Answer> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some((answer, used)) = Answer::parse(&self.buffer, false, head, self.began.elapsed()) {
                self.buffer.drain(..used);
                return Some(answer);
            }
            match self.stream.read(&mut chunk) {
                Ok(n) if n > 0 => self.buffer.extend(&chunk[..n]),
                _ => return Answer::parse(&self.buffer, true, head, self.began.elapsed()).map(|(answer, _)| answer),
            }
        }
    }

    /// Waits for the other side to close; false when it did not within `within`. Bytes that come before are dropped.
    pub(crate) fn closed_within(&mut self, within: Duration) -> bool {
        let end = Instant::now() + within;
        let mut chunk = [0; 4096];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
                return false;
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => return false,
                Err(_) => return true,
            }
        }
    }
}

/// One request on a connection of its own.
#[track_caller]
pub(crate) fn call(to: SocketAddr, call: &Call) -> Answer {
    let mut connection = Connection::open(to).unwrap_or_else(|e| panic!("cannot connect to {to}: {e}"));
    connection.send(&call.bytes(to));
    connection
        .answer_to(call.method == "HEAD")
        .unwrap_or_else(|| panic!("no answer to {} {}", call.method, call.target))
}

/// All calls, `at_once` of them at a time over kept connections; the answers in the order of the calls, or why there is none.
pub(crate) fn flood(to: SocketAddr, calls: &[Call], at_once: usize) -> Vec<Result<Answer, String>> {
    let queue = std::sync::Arc::new(std::sync::Mutex::new(
        calls.iter().map(|c| c.bytes(to)).enumerate().collect::<Vec<_>>(),
    ));
    queue.lock().unwrap().reverse();
    let workers: Vec<_> = (0..at_once.min(calls.len()))
        .map(|_| {
            let queue = queue.clone();
            super::runtime().spawn(async move {
                let mut answers = Vec::new();
                let mut kept: Option<tokio::net::TcpStream> = None;
                loop {
                    let next = queue.lock().unwrap().pop();
                    let Some((n, bytes)) = next else { return answers };
                    answers.push((n, call_kept(to, &bytes, &mut kept).await));
                }
            })
        })
        .collect();
    let mut all = vec![Err(String::new()); calls.len()];
    for worker in workers {
        for (n, answer) in super::runtime().block_on(worker).expect("a worker of the flood") {
            all[n] = answer;
        }
    }
    all
}

async fn call_kept(to: SocketAddr, bytes: &[u8], kept: &mut Option<tokio::net::TcpStream>) -> Result<Answer, String> {
    let began = Instant::now();
    let failed = |what: &str, error: &dyn std::fmt::Display, used: bool| {
        let connection = if used { "a kept" } else { "a new" };
        format!("{what} on {connection} connection after {:?}: {error}", began.elapsed())
    };
    let used = kept.is_some();
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => tokio::net::TcpStream::connect(to)
            .await
            .map_err(|e| failed("connecting", &e, used))?,
    };
    let _ = stream.set_nodelay(true);
    stream.write_all(bytes).await.map_err(|e| failed("writing", &e, used))?;
    let mut buffer = Vec::new();
    loop {
        if let Some((answer, _)) = Answer::parse(&buffer, false, false, began.elapsed()) {
            if answer.header("connection") != Some("close") {
                *kept = Some(stream);
            }
            return Ok(answer);
        }
        match tokio::time::timeout(TIMEOUT, stream.read_buf(&mut buffer)).await {
            Ok(Ok(0)) => return Err(failed("reading", &"closed", used)),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(failed("reading", &error, used)),
            Err(_) => return Err(failed("reading", &"silence", used)),
        }
    }
}
