//! Who is behind the names that the attackers write: tarpits, bombs, endless heads, and one victim.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use crate::http;
use crate::places::{self, Places, VICTIM_PORTS, VICTIMS, number, scrambled};
use crate::world::{USERINFO, WELL_KNOWN};

/// Nobody holds a connection longer.
const HELD_FOR: Duration = Duration::from_secs(60);
/// Chunks of a bomb, a byte each.
const CHUNKS: usize = 65_500;
/// What an endless stream of interim answers brings, in bytes a second.
const STREAM: usize = 4 * 1024 * 1024;
const BLOCK: usize = 64 * 1024;
/// Most names that are remembered.
const MAX_ASKED: usize = 50_000;

#[derive(Default)]
pub struct Seen {
    pub bombs_begun: AtomicU64,
    pub bombs_whole: AtomicU64,
    pub streams: AtomicU64,
    pub streamed: AtomicU64,
    pub tarpits: AtomicU64,
    pub hung: AtomicU64,
    pub verified: AtomicU64,
    pub redirects: AtomicU64,
    pub victim_connections: AtomicU64,
    pub victim_unknown: AtomicU64,
    /// Connections by the number of the request that they are for.
    pub dials: Mutex<HashMap<u64, u64>>,
    /// How often these names were asked at userinfo.
    asked: Mutex<HashMap<String, u64>>,
}

#[derive(Clone, Copy)]
enum Behaviour {
    /// Takes connections and says nothing.
    Tarpit,
    /// Speaks TLS; the name decides.
    Speaks,
    /// Counts and closes.
    Victim,
}

pub struct Hostile {
    seen: Arc<Seen>,
    tls: Arc<ServerConfig>,
    bomb: Vec<u8>,
    stream: Vec<u8>,
}

/// Listens everywhere.
pub fn stand(places: Places, tls: Arc<ServerConfig>, seen: Arc<Seen>) -> std::io::Result<()> {
    let hostile = Arc::new(Hostile {
        seen,
        tls,
        bomb: b"1\r\n \r\n".repeat(CHUNKS),
        stream: b"HTTP/1.1 102 Processing\r\n\r\n".repeat(BLOCK / 27),
    });
    let mut all: Vec<(Ipv4Addr, u16, Behaviour)> = Vec::new();
    let mut at = |address, ports: &[u16], behaviour| all.extend(ports.iter().map(|port| (address, *port, behaviour)));
    const BOTH: [u16; 2] = [443, 8448];
    for n in 0..4 {
        at(places.tarpit(n), &BOTH, Behaviour::Tarpit);
        let spelled = if n % 2 == 0 { Behaviour::Tarpit } else { Behaviour::Speaks };
        at(places.spelled(n), &[443, 8448, 8449, 9443], spelled);
        at(places.slow(n), &BOTH, Behaviour::Speaks);
        at(places.informer(n), &BOTH, Behaviour::Speaks);
    }
    (0..8).for_each(|n| at(places.bomb(n), &BOTH, Behaviour::Speaks));
    (0..places::DOMAINS).for_each(|k| at(places.domain(k), &BOTH, Behaviour::Speaks));
    at(places.redirector(), &[443], Behaviour::Speaks);
    (0..VICTIMS).for_each(|n| at(places.victim(n), &[443], Behaviour::Victim));
    (0..VICTIMS).for_each(|n| at(places.victim(n), &VICTIM_PORTS, Behaviour::Victim));
    for (address, port, behaviour) in all {
        let listener = http::listen(SocketAddr::new(address.into(), port))?;
        let hostile = hostile.clone();
        tokio::spawn(async move {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(timeout(HELD_FOR, hostile.clone().meet(stream, behaviour)));
                }
            }
        });
    }
    Ok(())
}

impl Hostile {
    async fn meet(self: Arc<Self>, mut stream: TcpStream, behaviour: Behaviour) {
        match behaviour {
            Behaviour::Tarpit => {
                self.seen.tarpits.fetch_add(1, Relaxed);
                until_closed(&mut stream).await;
            }
            Behaviour::Speaks => {
                if let Ok(stream) = TlsAcceptor::from(self.tls.clone()).accept(stream).await {
                    self.talk(stream).await;
                }
            }
            Behaviour::Victim => {
                self.seen.victim_connections.fetch_add(1, Relaxed);
                let hello = timeout(
                    Duration::from_secs(5),
                    LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream),
                )
                .await;
                let of = hello.ok().and_then(Result::ok).and_then(|start| {
                    let hello = start.client_hello();
                    number(hello.server_name()?.split('.').next()?)
                });
                match of {
                    Some(n) => *self.seen.dials.lock().unwrap().entry(n).or_default() += 1,
                    None => drop(self.seen.victim_unknown.fetch_add(1, Relaxed)),
                }
            }
        }
    }

    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) {
        let mut buffer = Vec::new();
        while let Some(request) = http::request(&mut stream, &mut buffer).await {
            let host = request
                .host
                .split(':')
                .next()
                .unwrap_or_default()
                .trim_end_matches('.')
                .to_ascii_lowercase();
            let labels: Vec<&str> = host.split('.').collect();
            let [first, .., below, _] = labels[..] else {
                return;
            };
            if below == "fanr" {
                self.seen.redirects.fetch_add(1, Relaxed);
                let to = match request.path.as_str() {
                    WELL_KNOWN => format!("https://{host}/1"),
                    "/1" => format!("https://{host}/2"),
                    "/2" => format!("https://{host}/3"),
                    _ => format!("https://{first}.victim.siege{WELL_KNOWN}"),
                };
                let answer = format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
                if write(&mut stream, answer.as_bytes()).await.is_err() {
                    return;
                }
                continue;
            }
            if request.path != USERINFO {
                if write(&mut stream, &http::no_such_page()).await.is_err() {
                    return;
                }
                continue;
            }
            // Verified at first, and worse afterwards.
            if self.verifies(first, below, &request.host) {
                self.seen.verified.fetch_add(1, Relaxed);
                if write(&mut stream, &http::unknown_token()).await.is_err() {
                    return;
                }
                continue;
            }
            match below {
                "bomb" => {
                    self.seen.bombs_begun.fetch_add(1, Relaxed);
                    let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
                    if write(&mut stream, head).await.is_ok() && write(&mut stream, &self.bomb).await.is_ok() {
                        self.seen.bombs_whole.fetch_add(1, Relaxed);
                        until_closed(&mut stream).await;
                    }
                    return;
                }
                "info" => {
                    self.seen.streams.fetch_add(1, Relaxed);
                    while write(&mut stream, &self.stream).await.is_ok() {
                        self.seen.streamed.fetch_add(self.stream.len() as u64, Relaxed);
                        sleep(Duration::from_micros((BLOCK * 1_000_000 / STREAM) as u64)).await;
                    }
                    return;
                }
                _ => {
                    self.seen.hung.fetch_add(1, Relaxed);
                    until_closed(&mut stream).await;
                    return;
                }
            }
        }
    }

    fn verifies(&self, first: &str, below: &str, host: &str) -> bool {
        let known = first.starts_with('v')
            || below.starts_with('d')
            || below == "evil" && scrambled(host.bytes().map(u64::from).sum()).is_multiple_of(4);
        if !known {
            return false;
        }
        let mut asked = self.seen.asked.lock().unwrap();
        if asked.len() >= MAX_ASKED {
            asked.clear();
        }
        let times = asked.entry(host.to_owned()).or_default();
        *times += 1;
        *times == 1
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Reads and says nothing until the other side has enough.
async fn until_closed<S: AsyncRead + Unpin>(stream: &mut S) {
    let mut buffer = [0; 512];
    while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {}
}
