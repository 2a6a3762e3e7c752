//! Redis: the hash that the Go service uses and two of our own, spoken to in RESP2 with `PING`, `HSET`, `HDEL` and `HSCAN` or
//! `HGETALL`. Where several replicas share it, jobs and tokens are written by scripts, and `shared.rs` reads a stream beside.
//!
//! Written here rather than taken from the `redis` crate (1.8, tried): it builds each answer in memory whole, with lengths as the
//! server says them, so that 200,000 records read by `HGETALL` took 133 MiB, and one value of 500 MiB, read by any command, a
//! GiB; here an answer is handed on as it comes, and what is too long for a record is dropped. Its error texts also repeat what
//! a server says, which may repeat the password (a server that does not know `AUTH` quotes its arguments). No other command
//! is sent for one replica: not `HELLO`, not `CLIENT`; `AUTH` and `SELECT` only where they are configured, `ROLE` and `CLUSTER` only where
//! sentinels or nodes of a cluster are named.

mod resp;

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::shared::{Fence, Shared, SharedStore};
use super::{Change, Failure, Part, RejectedChanges, StoreError, Table};
use crate::config::{self, RedisAddress, RedisTls};
use crate::dns::Dns;
use crate::tls::{Given, Tls};
pub(super) use resp::{Connection, RedisError, Reply, encoded};

/// Time for a connection to stand, for the handshake of TLS, and for the answer to a command or a batch of them.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Time for one of several addresses of a name.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for all records to be read, and to be taken by those who wanted them.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// About how many records come in one portion of a hash.
const SCAN_COUNT: &[u8] = b"512";
/// Writes a record, or removes it, so that a later end stays.
const KEEP_LATER: &str = include_str!("shared/token.lua");
/// How long an idle connection is left alone: shorter than servers and proxies let one be idle.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A Redis server.
pub(super) struct Redis {
    settings: config::Redis,
    address: RedisAddress,
    hash: String,
    tls: Arc<Tls>,
    dns: Arc<Dns>,
    writer: Mutex<Option<Connection>>,
    /// There was a connection to write.
    was_connected: AtomicBool,
    reconnected: Notify,
    /// `HSCAN` was refused.
    no_scan: AtomicBool,
    /// Number of the sentinel, or of the cluster's node, that is asked next.
    guide: AtomicUsize,
    writing: Writing,
}

/// How the table is written.
enum Writing {
    /// As it is told.
    Plain,
    /// Under a watch, where several replicas share it.
    Fenced(Arc<Fence>),
    /// So that a later end stays that another replica has written.
    LaterEnds,
}

/// TCP, TLS or a Unix socket.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

impl Redis {
    pub(super) fn new(settings: config::Redis, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        let tls = match settings.address() {
            RedisAddress::Tcp {
                tls: Some(RedisTls { skip_verify: true }),
                ..
            } => Arc::new(Tls::new(true, Given::default())),
            RedisAddress::Tcp { .. } | RedisAddress::Sentinel { .. } | RedisAddress::Cluster { .. } | RedisAddress::Unix(_) => tls,
        };
        Self::of(settings, tls, dns, Table::Jobs)
    }

    /// Another hash of the same server, by connections of its own.
    pub(super) fn with(&self, table: Table) -> Self {
        Self::of(self.settings.clone(), self.tls.clone(), self.dns.clone(), table)
    }

    fn of(settings: config::Redis, tls: Arc<Tls>, dns: Arc<Dns>, table: Table) -> Self {
        Self {
            address: settings.address(),
            settings,
            hash: format!("lk-jwt:{}", table.name()),
            tls,
            dns,
            writer: Mutex::new(None),
            was_connected: AtomicBool::new(false),
            reconnected: Notify::new(),
            no_scan: AtomicBool::new(false),
            guide: AtomicUsize::new(0),
            writing: Writing::Plain,
        }
    }

    /// The table of jobs, written under a watch only, and the shared keys beside it.
    pub(super) fn share(&mut self) -> SharedStore {
        let fence = Arc::<Fence>::default();
        self.writing = Writing::Fenced(fence.clone());
        let shared = Arc::new(Shared::new(self.with(Table::Jobs)));
        SharedStore { shared, fence }
    }

    /// Has the ends of records stay that are later than ours.
    pub(super) fn keep_later_ends(&mut self) {
        self.writing = Writing::LaterEnds;
    }

    pub(super) const fn is_shared(&self) -> bool {
        matches!(self.writing, Writing::Fenced(_))
    }

    /// The address, without credentials.
    pub(super) fn shown(&self) -> String {
        self.address.to_string()
    }

    /// Connects, which includes a `PING`.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.connect().await.map(drop).map_err(|error| self.failed(error))
    }

    /// Waits until something was written by another connection than the first.
    pub(super) async fn reconnected(&self) {
        self.reconnected.notified().await;
    }

    /// Waits until the writer's connection has closed, or was idle for so long that it has to be used.
    pub(super) async fn closed(&self) {
        if let Some(connection) = &mut *self.writer.lock().await {
            let _ = timeout(KEEP_ALIVE, connection.closed()).await;
        }
    }

    pub(super) async fn write(&self, changes: &[Change]) -> Result<Option<RejectedChanges>, StoreError> {
        let mut writer = self.writer.lock().await;
        // Only a connection that is known to be in order is put back.
        let mut known = writer.take();
        loop {
            let is_new = known.is_none();
            let mut connection = match known.take() {
                Some(known) => known,
                None => self.connect().await.map_err(|error| self.failed(error))?,
            };
            let is_first = is_new && !self.was_connected.swap(true, Ordering::Relaxed);
            let written = async {
                match &self.writing {
                    Writing::Fenced(fence) => fence.write(&mut connection, changes).await.map(|()| None),
                    Writing::Plain => write(&mut connection, &self.hash, None, changes).await,
                    Writing::LaterEnds => write(&mut connection, &self.hash, Some(KEEP_LATER), changes).await,
                }
            };
            match in_time(written).await {
                // Servers and proxies close idle connections: that is no trouble, and a new one is made at once.
                Err(RedisError::Closed | RedisError::Broken(_)) if !is_new => {}
                Err(error) => return Err(self.failed(error)),
                Ok(refused) => {
                    *writer = Some(connection);
                    if is_new && !is_first {
                        self.reconnected.notify_one();
                    }
                    return Ok(refused.map(|(places, error)| RejectedChanges {
                        places,
                        error: self.store_error(error),
                    }));
                }
            }
        }
    }

    pub(super) async fn load(&self, parts: &mpsc::Sender<Part>) -> Result<usize, StoreError> {
        timeout(LOAD_TIMEOUT, self.load_all(parts))
            .await
            .unwrap_or(Err(RedisError::Timeout))
            .map_err(|error| self.failed(error))
    }

    /// `HSCAN` asks a server for a portion at a time; `HGETALL`, where the other is refused, keeps everybody else waiting.
    async fn load_all(&self, parts: &mpsc::Sender<Part>) -> Result<usize, RedisError> {
        let mut connection = self.connect().await?;
        let (mut cursor, mut skipped) = (Box::from(*b"0"), 0);
        while !self.no_scan.load(Ordering::Relaxed) {
            connection.command(&[b"HSCAN", self.hash.as_bytes(), &cursor, b"COUNT", SCAN_COUNT]);
            connection.send().await?;
            match connection.cursor().await {
                Ok(next) => cursor = next,
                Err(RedisError::Refused { code, .. }) if matches!(&*code, "ERR" | "NOPERM") => {
                    self.no_scan.store(true, Ordering::Relaxed);
                    break;
                }
                Err(error) => return Err(error),
            }
            skipped += take(&mut connection, "HSCAN", parts).await?;
            if *cursor == *b"0" || parts.is_closed() {
                return Ok(skipped);
            }
        }
        connection.command(&[b"HGETALL", self.hash.as_bytes()]);
        connection.send().await?;
        take(&mut connection, "HGETALL", parts).await
    }

    pub(super) async fn connect(&self) -> Result<Connection, RedisError> {
        let wire: Box<dyn Wire> = match &self.address {
            RedisAddress::Unix(path) => Box::new(in_time(async { UnixStream::connect(path).await.map_err(unreachable) }).await?),
            RedisAddress::Tcp { host, port, tls: None } => Box::new(in_time(self.tcp(host, *port)).await?),
            RedisAddress::Tcp { host, port, tls: Some(_) } => {
                let stream = in_time(self.tcp(host, *port)).await?;
                let encrypted = timeout(TIMEOUT, self.encrypted(host, stream)).await;
                Box::new(encrypted.unwrap_or_else(|_| Err(RedisError::Tls("no answer to the handshake".into())))?)
            }
            RedisAddress::Sentinel { sentinels, primary } => Box::new(self.led_by(sentinels, Some(primary)).await?),
            RedisAddress::Cluster { nodes } => Box::new(self.led_by(nodes, None).await?),
        };
        let mut connection = in_time(self.greet(wire)).await?;
        // A sentinel may not know yet that another one is the primary by now.
        if let RedisAddress::Sentinel { .. } = &self.address
            && *in_time(role(&mut connection)).await? != *b"master"
        {
            return Err(unreachable("the server that the sentinels name is no primary"));
        }
        Ok(connection)
    }

    /// Connects to the server that one of these names, sentinels of this primary or nodes of a cluster: each is asked in turn, the one
    /// first that answered last.
    async fn led_by(&self, guides: &[(String, u16)], primary: Option<&str>) -> Result<TcpStream, RedisError> {
        let mut failure = unreachable("no server is named");
        for _ in guides {
            // Whoever gives this up goes on with the next one.
            let turn = self.guide.fetch_add(1, Ordering::Relaxed);
            let Some((host, port)) = guides.get(turn % guides.len()) else {
                break;
            };
            let asked = timeout(CONNECT_TIMEOUT, async {
                match primary {
                    Some(primary) => self.ask_sentinel(host, *port, primary).await,
                    None => self.ask_node(host, *port).await,
                }
            });
            match asked.await.unwrap_or(Err(RedisError::Timeout)) {
                Ok((host, port)) => {
                    self.guide.store(turn, Ordering::Relaxed);
                    return in_time(self.tcp(&host, port)).await;
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn ask_sentinel(&self, host: &str, port: u16, primary: &str) -> Result<(String, u16), RedisError> {
        let mut connection = Connection::new(Box::new(self.tcp(host, port).await?));
        let question: [&[u8]; 3] = [b"SENTINEL", b"get-master-addr-by-name", primary.as_bytes()];
        connection.command(&question);
        connection.send().await?;
        let mut answer = connection.reply("SENTINEL").await;
        // Sentinels may want the same user and password as the server.
        if let (Err(RedisError::Refused { code, .. }), Some(_)) = (&answer, &self.settings.password)
            && &**code == "NOAUTH"
        {
            self.log_in(&mut connection).await?;
            connection.command(&question);
            connection.send().await?;
            answer = connection.reply("SENTINEL").await;
        }
        place(answer?)?.ok_or_else(|| unreachable("the sentinels know no primary of this name"))
    }

    /// Asks a node of the cluster who has our key.
    async fn ask_node(&self, host: &str, port: u16) -> Result<(String, u16), RedisError> {
        let mut connection = Connection::new(Box::new(self.tcp(host, port).await?));
        self.log_in(&mut connection).await?;
        connection.command(&[b"CLUSTER", b"KEYSLOT", self.hash.as_bytes()]);
        connection.command(&[b"CLUSTER", b"SLOTS"]);
        connection.send().await?;
        let slot = number(&connection.reply("CLUSTER").await?.text()?)?;
        let ranges = connection.reply("CLUSTER").await?.list()?.unwrap_or_default();
        for range in ranges {
            let mut range = range.list()?.unwrap_or_default().into_iter();
            let (Some(first), Some(last), Some(owner)) = (range.next(), range.next(), range.next()) else {
                return Err(RedisError::Protocol);
            };
            if (number(&first.text()?)?..=number(&last.text()?)?).contains(&slot) {
                let (owner, port) = place(owner)?.ok_or(RedisError::Protocol)?;
                // Who does not know its own name means the one under which it was asked.
                return Ok((if owner.is_empty() { host.to_owned() } else { owner }, port));
            }
        }
        Err(unreachable("no node of the cluster has our key"))
    }

    /// Logs in and makes sure that somebody is there.
    async fn greet(&self, wire: Box<dyn Wire>) -> Result<Connection, RedisError> {
        let mut connection = Connection::new(wire);
        self.log_in(&mut connection).await?;
        if self.settings.database != 0 {
            connection.ask("SELECT", &[self.settings.database.to_string().as_bytes()]).await?;
        }
        // What was sent on an earlier connection of ours and not answered has been carried out before this is answered:
        // an old write can then not overtake a new one.
        connection.ask("PING", &[]).await?;
        Ok(connection)
    }

    async fn log_in(&self, connection: &mut Connection) -> Result<(), RedisError> {
        // As the Go service has it: a user name alone is nothing to log in with.
        let Some(password) = &self.settings.password else { return Ok(()) };
        let username = self.settings.username.iter().map(String::as_bytes);
        let login: Vec<_> = username.chain([password.expose().as_bytes()]).collect();
        connection.ask("AUTH", &login).await
    }

    async fn tcp(&self, host: &str, port: u16) -> Result<TcpStream, RedisError> {
        let mut failure = String::from("no address");
        for address in self.dns.addresses(host, None).await.map_err(unreachable)? {
            match timeout(CONNECT_TIMEOUT, TcpStream::connect(SocketAddr::new(address, port))).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    // Whatever is in flight when we give a connection up is dropped with it, and not delivered later, when a
                    // newer connection has written something newer.
                    stream.set_zero_linger()?;
                    return Ok(stream);
                }
                Ok(Err(error)) => failure = error.to_string(),
                Err(_) => failure = "no answer".to_owned(),
            }
        }
        Err(unreachable(failure))
    }

    async fn encrypted(&self, host: &str, stream: TcpStream) -> Result<impl Wire + use<>, RedisError> {
        let failed = |error: &dyn Display| RedisError::Tls(error.to_string());
        let name = ServerName::try_from(host.to_owned()).map_err(|_| failed(&"the host is no name for a certificate"))?;
        // Reading the CA bundle takes some milliseconds.
        let tls = self.tls.clone();
        let config = tokio::task::spawn_blocking(move || tls.config()).await;
        let config = config.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        let encrypted = TlsConnector::from(config).connect(name, stream).await;
        encrypted.map_err(|error| failed(&error))
    }

    /// Redis may be elsewhere by now, and its old place somebody else's: DNS is asked past every memory, in the background,
    /// and the next try finds it (decision O2).
    pub(super) fn failed(&self, error: RedisError) -> StoreError {
        if let RedisAddress::Tcp { host, .. } = &self.address {
            let (dns, host) = (self.dns.clone(), host.clone());
            tokio::spawn(async move { dns.addresses(&host, Some(Instant::now())).await });
        }
        self.store_error(error)
    }

    fn store_error(&self, error: RedisError) -> StoreError {
        Failure::Redis(self.address.to_string().into(), error).into()
    }
}

/// A host and a port, as sentinels and nodes of a cluster name a server; more may follow.
fn place(answer: Reply) -> Result<Option<(String, u16)>, RedisError> {
    let mut parts = answer.list()?.unwrap_or_default().into_iter();
    let (Some(host), Some(port)) = (parts.next(), parts.next()) else {
        return Ok(None);
    };
    let host = String::from_utf8_lossy(&host.text()?).into_owned();
    Ok(Some((host, number(&port.text()?)?)))
}

fn number(text: &[u8]) -> Result<u16, RedisError> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.ok_or(RedisError::Protocol)
}

/// Whether a server is a primary, in its own word.
async fn role(connection: &mut Connection) -> Result<Box<[u8]>, RedisError> {
    connection.command(&[b"ROLE"]);
    connection.send().await?;
    let answer = connection.reply("ROLE").await?.list()?.unwrap_or_default();
    answer.into_iter().next().ok_or(RedisError::Protocol)?.text()
}

/// Hands over the fields and values of an answer, and says how many were too long for it.
async fn take(connection: &mut Connection, command: &'static str, parts: &mpsc::Sender<Part>) -> Result<usize, RedisError> {
    let mut skipped = 0;
    for _ in 0..connection.pairs(command).await? {
        let Some(entry) = connection.pair().await? else {
            skipped += 1;
            continue;
        };
        if parts.send(Part::Record(entry)).await.is_err() {
            break;
        }
    }
    Ok(skipped)
}

async fn in_time<T>(work: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    timeout(TIMEOUT, work).await.unwrap_or(Err(RedisError::Timeout))
}

fn unreachable(error: impl Display) -> RedisError {
    RedisError::Unreachable(error.to_string())
}

/// Writes changes, by a script where there is one, and returns which were refused for their own sake, or for want of room, and why the
/// first of them.
async fn write(
    connection: &mut Connection,
    hash: &str,
    script: Option<&'static str>,
    changes: &[Change],
) -> Result<Option<(Vec<usize>, RedisError)>, RedisError> {
    if changes.is_empty() {
        return connection.ask("PING", &[]).await.map(|()| None);
    }
    let command = |change: &Change| match (script, &change.value) {
        (Some(_), _) => "EVAL",
        (None, Some(_)) => "HSET",
        (None, None) => "HDEL",
    };
    for change in changes {
        let mut words = vec![command(change).as_bytes()];
        words.extend(script.into_iter().flat_map(|script| [script.as_bytes(), b"1"]));
        // One field at a time: more of them in one command is what not every server and proxy understands.
        words.extend([hash.as_bytes(), change.field.as_bytes()]);
        words.extend(change.value.iter().map(|value| value.as_bytes()));
        connection.command(&words);
    }
    connection.send().await?;
    let (mut places, mut first, mut failure) = (Vec::new(), None, None);
    for (place, change) in changes.iter().enumerate() {
        match connection.done(command(change)).await {
            Ok(()) => {}
            Err(error) if error.concerns_one_change() => {
                places.push(place);
                first = first.or(Some(error));
            }
            // The answers to the others are still to come.
            Err(error @ RedisError::Refused { .. }) => failure = failure.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(first.map(|error| (places, error))),
    }
}
