//! As much HTTP as a siege needs, on both sides.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

/// How long a client waits for a connection to be taken by the kernel.
const CONNECT: Duration = Duration::from_secs(5);
/// Most bytes of a request or an answer.
const MAX_BYTES: usize = 256 * 1024;

pub struct Request {
    pub path: String,
    pub query: String,
    pub host: String,
    pub body: Vec<u8>,
}

/// The next request of a connection; none when it ended, is silent for a minute, or is no HTTP.
pub async fn request<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> Option<Request> {
    timeout(Duration::from_secs(60), async {
        loop {
            if let Some(end) = head_end(buffer) {
                let head = std::str::from_utf8(&buffer[..end]).ok()?;
                let length = field(head, "content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
                if buffer.len() >= end + length {
                    let target = head.split(' ').nth(1)?;
                    let (path, query) = target.split_once('?').unwrap_or((target, ""));
                    let request = Request {
                        path: path.into(),
                        query: query.into(),
                        host: field(head, "host").unwrap_or_default().into(),
                        body: buffer[end..end + length].to_vec(),
                    };
                    buffer.drain(..end + length);
                    return Some(request);
                }
            }
            if buffer.len() > MAX_BYTES || stream.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        }
    })
    .await
    .ok()?
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim()).next()
}

pub fn reply(status: u16, kind: &str, body: &[u8]) -> Vec<u8> {
    let mut all = format!(
        "HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    all.extend(body);
    all
}

pub fn json(status: u16, body: &Value) -> Vec<u8> {
    reply(status, "application/json", body.to_string().as_bytes())
}

pub fn unknown_token() -> Vec<u8> {
    json(
        401,
        &serde_json::json!({"errcode": "M_UNKNOWN_TOKEN", "error": "Access token unknown or expired"}),
    )
}

pub fn no_such_page() -> Vec<u8> {
    reply(404, "text/plain", b"no\n")
}

/// Listens with a long queue.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

pub fn post(host: SocketAddr, path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

pub async fn connect(from: Ipv4Addr, to: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    socket.bind((from, 0).into()).ok()?;
    let stream = timeout(CONNECT, socket.connect(to)).await.ok()?.ok()?;
    let _ = stream.set_nodelay(true);
    Some(stream)
}

/// What became of a request. No status where there was no answer.
pub struct Outcome {
    pub status: u16,
    /// Whether somebody took it.
    pub sent: bool,
    /// When it was written.
    pub written: Instant,
    pub took: Duration,
    pub body: String,
}

/// Sends the request over a connection of its own, and waits for the whole answer.
pub async fn ask(from: Ipv4Addr, to: SocketAddr, bytes: &[u8], limit: Duration) -> Outcome {
    let mut outcome = Outcome {
        status: 0,
        sent: false,
        written: Instant::now(),
        took: Duration::ZERO,
        body: String::new(),
    };
    if let Some(mut stream) = connect(from, to).await
        && stream.write_all(bytes).await.is_ok()
    {
        (outcome.sent, outcome.written) = (true, Instant::now());
        if let Ok(Some((status, body))) = timeout(limit, answer(&mut stream)).await {
            (outcome.status, outcome.body) = (status, body);
        }
    }
    outcome.took = outcome.written.elapsed();
    outcome
}

async fn answer(stream: &mut TcpStream) -> Option<(u16, String)> {
    let mut buffer = Vec::with_capacity(2048);
    loop {
        if stream.read_buf(&mut buffer).await.ok()? == 0 || buffer.len() > MAX_BYTES {
            return None;
        }
        if let Some(end) = head_end(&buffer) {
            let head = std::str::from_utf8(&buffer[..end]).ok()?;
            let length: usize = field(head, "content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
            if buffer.len() >= end + length {
                let status = head.split(' ').nth(1)?.parse().ok()?;
                return Some((status, String::from_utf8_lossy(&buffer[end..end + length]).into_owned()));
            }
        }
    }
}
