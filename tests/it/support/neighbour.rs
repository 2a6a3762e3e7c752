//! A scripted HTTP/1.1 server, with or without TLS, that remembers every connection and every request.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::runtime;

/// What to do with a request.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// An ordinary answer; `Content-Length` and `Date` are added.
    Answer {
        status: u16,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    },
    /// These bytes, then the connection is closed.
    Raw(Vec<u8>),
    /// The beginning of an answer (these bytes), then silence.
    Stall(Vec<u8>),
    /// A 200 with a chunked body of this many spaces, as fast as it is taken.
    Flood(usize),
    /// The first bytes once, then the others again and again, as fast as they are taken.
    Endless(Vec<u8>, Vec<u8>),
    /// The connection is closed without an answer.
    Close,
    /// The connection stays open, silent.
    Hang,
    /// Later.
    After(Duration, Box<Self>),
}

impl Reply {
    pub(crate) fn json(status: u16, body: &serde_json::Value) -> Self {
        Self::Answer {
            status,
            headers: vec![("Content-Type".into(), "application/json".into())],
            body: body.to_string().into(),
        }
    }

    pub(crate) fn text(status: u16, content_type: &str, body: &str) -> Self {
        Self::Answer {
            status,
            headers: vec![("Content-Type".into(), content_type.into())],
            body: body.into(),
        }
    }

    pub(crate) fn redirect(status: u16, location: &str) -> Self {
        Self::Answer {
            status,
            headers: vec![("Location".into(), location.into())],
            body: Vec::new(),
        }
    }

    pub(crate) fn after(self, delay: Duration) -> Self {
        Self::After(delay, Box::new(self))
    }
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) connection: Arc<Connection>,
    /// When it had arrived.
    pub(crate) at: Instant,
    pub(crate) method: String,
    /// Path and query, byte for byte.
    pub(crate) target: String,
    /// Path without the query.
    pub(crate) path: String,
    /// Decoded as a form.
    pub(crate) query: Vec<(String, String)>,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// A connection that was made to us.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) peer: SocketAddr,
    sni: OnceLock<Option<String>>,
}

impl Connection {
    /// The server name asked for in the TLS handshake; `None` without one, or without a finished handshake.
    pub(crate) fn sni(&self) -> Option<&str> {
        self.sni.get()?.as_deref()
    }
}

/// What happens to a connection before any request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// TLS where there is TLS, then HTTP.
    Serve,
    /// Accepted, and never a byte.
    Silence,
    /// Accepted, and closed.
    Close,
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

struct State {
    handler: Box<Handler>,
    tls: Option<TlsAcceptor>,
    greeting: Mutex<Greeting>,
    connections: Mutex<Vec<Arc<Connection>>>,
    requests: Mutex<Vec<Request>>,
    /// Requests being answered, and the most that ever were.
    busy: AtomicUsize,
    busiest: AtomicUsize,
    /// Leaves out the `Date` header.
    dateless: Mutex<bool>,
}

/// The server. Dropping it closes everything.
pub(crate) struct Neighbour {
    address: SocketAddr,
    state: Arc<State>,
    accepting: Mutex<Option<AbortHandle>>,
}

impl Neighbour {
    /// Listens on `address` (port 0: any).
    pub(crate) fn start(
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            handler: Box::new(handler),
            tls: tls.map(TlsAcceptor::from),
            greeting: Mutex::new(Greeting::Serve),
            connections: Mutex::default(),
            requests: Mutex::default(),
            busy: AtomicUsize::new(0),
            busiest: AtomicUsize::new(0),
            dateless: Mutex::default(),
        };
        let listener = listen(address);
        let address = listener.local_addr().expect("address");
        let neighbour = Self {
            address,
            state: Arc::new(state),
            accepting: Mutex::new(None),
        };
        neighbour.accept(listener);
        neighbour
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// For every connection from now on; those that stand are closed.
    pub(crate) fn greet(&self, greeting: Greeting) {
        *self.state.greeting.lock().unwrap() = greeting;
        self.refuse();
        self.listen_again();
    }

    pub(crate) fn without_date(&self) {
        *self.state.dateless.lock().unwrap() = true;
    }

    /// Closes the port and every connection: what connects now is refused.
    pub(crate) fn refuse(&self) {
        if let Some(accepting) = self.accepting.lock().unwrap().take() {
            accepting.abort();
            // A process that another test starts at this moment holds a copy of the listener until it is our binary.
            super::wait_until("the port to close", Duration::from_secs(5), || {
                accepting.is_finished() && std::net::TcpStream::connect(self.address).is_err()
            });
        }
    }

    /// Opens the port again.
    pub(crate) fn listen_again(&self) {
        self.accept(listen(self.address));
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.state.connections.lock().unwrap().clone()
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }

    /// Requests that are being answered now.
    pub(crate) fn busy(&self) -> usize {
        self.state.busy.load(SeqCst)
    }

    /// The most requests that were ever being answered at a time.
    pub(crate) fn most_at_once(&self) -> usize {
        self.state.busiest.load(SeqCst)
    }

    /// How many requests `wanted` picks.
    pub(crate) fn count(&self, wanted: impl Fn(&Request) -> bool) -> usize {
        self.state.requests.lock().unwrap().iter().filter(|r| wanted(r)).count()
    }

    /// When each request came that `wanted` picks.
    pub(crate) fn times(&self, wanted: impl Fn(&Request) -> bool) -> Vec<Instant> {
        let requests = self.state.requests.lock().unwrap();
        requests
            .iter()
            .filter(|request| wanted(request))
            .map(|request| request.at)
            .collect()
    }

    fn accept(&self, listener: TcpListener) {
        let state = self.state.clone();
        let task = runtime().spawn(async move {
            // Ends with this task, so that closing the port closes the connections too.
            let mut open = JoinSet::new();
            loop {
                while open.try_join_next().is_some() {}
                if let Ok((stream, peer)) = listener.accept().await {
                    open.spawn(serve(state.clone(), stream, peer));
                }
            }
        });
        *self.accepting.lock().unwrap() = Some(task.abort_handle());
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.lock().unwrap().take() {
            accepting.abort();
        }
    }
}

fn listen(address: SocketAddr) -> TcpListener {
    let mut opened = None;
    // As in `refuse`: a copy of a listener that was just closed may be about.
    super::wait_until(&format!("{address} to be free"), Duration::from_secs(5), || {
        opened = match open(address) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => None,
            opened => Some(opened),
        };
        opened.is_some()
    });
    opened
        .expect("just seen")
        .unwrap_or_else(|e| panic!("cannot listen on {address}: {e}"))
}

fn open(address: SocketAddr) -> std::io::Result<TcpListener> {
    let _guard = runtime().enter();
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(4096)
}

async fn serve(state: Arc<State>, stream: TcpStream, peer: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let connection = Arc::new(Connection {
        peer,
        sni: OnceLock::new(),
    });
    state.connections.lock().unwrap().push(connection.clone());
    let greeting = *state.greeting.lock().unwrap();
    match greeting {
        Greeting::Serve => {}
        Greeting::Silence => return silence(stream).await,
        Greeting::Close => return,
    }
    match &state.tls {
        None => talk(&state, &connection, stream).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                let _ = connection.sni.set(stream.get_ref().1.server_name().map(str::to_owned));
                talk(&state, &connection, stream).await;
            }
        }
    }
}

/// Keeps a connection until the other side closes it.
async fn silence(mut stream: impl AsyncRead + Unpin) {
    let mut nothing = [0; 1024];
    while stream.read(&mut nothing).await.is_ok_and(|n| n > 0) {}
}

async fn talk(state: &State, connection: &Arc<Connection>, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(connection, &mut stream, &mut buffer).await {
        let mut busy = Some(Busy::begin(state));
        let mut reply = (state.handler)(&request);
        state.requests.lock().unwrap().push(request);
        while let Reply::After(delay, then) = reply {
            tokio::time::sleep(delay).await;
            reply = *then;
        }
        match reply {
            Reply::After(..) => unreachable!("unwrapped above"),
            Reply::Answer { status, headers, body } => {
                // Before the other side can react.
                busy.take();
                let mut head = format!("HTTP/1.1 {status} Scripted\r\nContent-Length: {}\r\n", body.len());
                if !*state.dateless.lock().unwrap() {
                    head += &format!("Date: {}\r\n", httpdate::fmt_http_date(SystemTime::now()));
                }
                for (name, value) in headers {
                    head += &format!("{name}: {value}\r\n");
                }
                let mut bytes = (head + "\r\n").into_bytes();
                bytes.extend(body);
                if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            Reply::Raw(bytes) => {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Reply::Stall(bytes) => {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.flush().await;
                return silence(stream).await;
            }
            Reply::Flood(length) => {
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
                    .await;
                let chunk = format!("4000\r\n{}\r\n", " ".repeat(0x4000));
                for _ in 0..length.div_ceil(0x4000) {
                    if stream.write_all(chunk.as_bytes()).await.is_err() {
                        return;
                    }
                }
                let _ = stream.write_all(b"0\r\n\r\n").await;
                let _ = stream.flush().await;
            }
            Reply::Endless(first, again) => {
                if stream.write_all(&first).await.is_err() {
                    return;
                }
                while stream.write_all(&again).await.is_ok() {}
                return;
            }
            Reply::Close => return,
            Reply::Hang => return silence(stream).await,
        }
    }
}

/// One request that is being answered.
struct Busy<'a>(&'a State);

impl<'a> Busy<'a> {
    fn begin(state: &'a State) -> Self {
        let now = state.busy.fetch_add(1, SeqCst) + 1;
        state.busiest.fetch_max(now, SeqCst);
        Self(state)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, SeqCst);
    }
}

async fn read_request(connection: &Arc<Connection>, stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Request> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    buffer.drain(..end + 4);
    let (line, fields) = head.split_once("\r\n").unwrap_or((&head, ""));
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: Vec<(String, String)> = fields
        .split("\r\n")
        .filter_map(|l| l.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers
        .iter()
        .find(|(n, _)| n == "content-length")
        .map_or(0, |(_, v)| v.parse().unwrap_or(0));
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer.drain(..length).collect();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    Some(Request {
        connection: connection.clone(),
        at: Instant::now(),
        method,
        path: path.to_owned(),
        query,
        headers,
        body,
        target,
    })
}
