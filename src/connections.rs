//! The connections of clients: what each holds, and who gives way where something runs out (decisions P14, H7). Which one
//! that is, `admission::crowd` decides.
//!
//! Everything here counts what has come, never what was announced or opened: announcing costs a client nothing.
#![expect(clippy::disallowed_methods, reason = "sockets: when something came is read here")]

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use crate::admission::crowd::{Look, Phase, give_way, slowest};
use crate::limits::Limits;
use crate::log_throttle::LogThrottle;
use crate::metrics::{Limit, METRICS};

/// Longest head of a request.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Bytes that a head may have besides the pot: longer than an honest one, and as much as the HTTP library has for it in any case.
const OWN_HEAD_BYTES: usize = 8 * 1024;
/// Bytes that are read at a time.
const CHUNK_BYTES: usize = 4 * 1024;
/// A head is held so many times at most: as it came, and in the buffer of the HTTP library, which doubles.
const HEAD_COPIES: usize = 3;
/// The least that the proven have for their bodies: two of the largest webhooks.
const MIN_PROVEN_BYTES: usize = 2 * 1024 * 1024;
/// However many wait for a pot, everybody is looked at so often.
const CHECK_INTERVAL_MS: u64 = 20;
/// An answer that a client does not take in this time is lost; all of them fit into the kernel's buffer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that nobody wants any more are read up to this many chunks, before a connection is closed.
const MAX_UNREAD_CHUNKS: usize = 64;
/// A client that has shut down its writing side may still want the answer, or may be gone: both look the same.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(2);
/// The beginning of HTTP/2 up to the end of what HTTP/1.1 takes for a head.
const HTTP_2: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// Pot of memory that a body takes from, so that strangers' bodies never keep out those of somebody who has proved themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pot {
    /// Bodies of anybody, before it is known who sends them.
    Strangers,
    /// The SFU's and our homeserver's: they are proved before the body is read.
    Proven,
    /// Heads of unusual length, which may be held until there is an answer.
    Heads,
}

impl Pot {
    const ALL: [Self; 3] = [Self::Strangers, Self::Proven, Self::Heads];
}

/// Outcome of taking bytes from a pot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The bytes belong to the caller now.
    Yes,
    /// Not yet; everybody else is too young to be judged.
    NotYet,
    /// The caller is the slowest, and has to give up what it holds.
    GiveWay,
}

/// All connections of clients, with the pots that they share.
pub struct Connections {
    most: usize,
    began: Instant,
    open: Mutex<Registry>,
    pots: [PotState; 3],
    told: LogThrottle,
}

#[derive(Default)]
struct Registry {
    by_id: HashMap<u64, Arc<Connection>>,
    next: u64,
    stopping: bool,
}

struct PotState {
    most: usize,
    held: AtomicUsize,
    /// When everybody who holds some of it was last found to be too young to be judged.
    all_young: AtomicU64,
}

const GO_ON: u8 = 0;
const ANSWER_BUSY: u8 = 1;
const CLOSE: u8 = 2;

/// A connection, as seen by all who may ask it to give way.
pub struct Connection {
    all: Arc<Connections>,
    id: u64,
    peer: IpAddr,
    phase: AtomicU8,
    since: AtomicU64,
    /// Milliseconds since then in which nothing was read, for want of memory.
    kept_waiting: AtomicU64,
    bytes: AtomicU64,
    held: [AtomicUsize; 3],
    had_large_head: AtomicBool,
    /// Whether the connection has no HTTP state yet.
    opening: AtomicBool,
    order: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

/// Keeps a connection among the open ones until it is dropped.
pub struct Opened(Arc<Connection>);

impl Connections {
    /// Makes an empty registry with the bounds of `limits`.
    #[must_use]
    pub fn new(limits: &Limits) -> Arc<Self> {
        let pot = |most| PotState {
            most,
            held: AtomicUsize::new(0),
            all_young: AtomicU64::new(0),
        };
        Arc::new(Self {
            most: limits.connections,
            began: Instant::now(),
            open: Mutex::default(),
            pots: Pot::ALL.map(|one| match one {
                Pot::Strangers => pot(limits.body_bytes),
                Pot::Proven => pot((limits.body_bytes / 4).max(MIN_PROVEN_BYTES)),
                Pot::Heads => pot(limits.body_bytes / 16),
            }),
            told: LogThrottle::once_a_minute(),
        })
    }

    /// Bound of open connections.
    #[must_use]
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Whether somebody has to give way for the next one.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.open.lock().by_id.len() >= self.most
    }

    /// A connection was accepted. Where there are too many, others give way at once; `None` only when nearly all wait for
    /// their answers.
    pub fn open(self: &Arc<Self>, peer: IpAddr) -> Option<Opened> {
        let mut open = self.open.lock();
        if open.by_id.len() >= self.most {
            // A few at a time, so that a flood costs one look at everybody per batch.
            let now = self.now();
            let crowd = open.by_id.values().map(|connection| (connection.id, connection.look(now)));
            for id in give_way(crowd, (self.most / 64).max(1)) {
                if let Some(connection) = open.by_id.remove(&id) {
                    connection.tell(CLOSE);
                }
            }
            self.crowded(Limit::Connections);
        }
        if open.by_id.len() >= self.most + self.most / 4 {
            return None;
        }
        let id = open.next;
        open.next += 1;
        let connection = Arc::new(Connection {
            all: self.clone(),
            id,
            peer,
            phase: AtomicU8::new(Phase::Silent as u8),
            since: AtomicU64::new(self.now()),
            kept_waiting: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            held: Default::default(),
            had_large_head: AtomicBool::new(false),
            opening: AtomicBool::new(true),
            order: AtomicU8::new(if open.stopping { CLOSE } else { GO_ON }),
            waker: Mutex::new(None),
        });
        open.by_id.insert(id, connection.clone());
        Some(Opened(connection))
    }

    /// Closes those on which no request has come: they are nobody's, and must not hold up the end.
    pub fn stop(&self) {
        let mut open = self.open.lock();
        open.stopping = true;
        for connection in open.by_id.values().filter(|connection| connection.opening.load(Relaxed)) {
            connection.tell(CLOSE);
        }
    }

    /// Warns, once a minute, that something has run out.
    pub fn crowded(&self, what: Limit) {
        METRICS.limit_hit(what);
        self.told.log(|count| {
            let what = what.word();
            let remedy = "a flood of requests? limit them in the proxy; where many people call, allow more memory and open files (LimitNOFILE, ulimit -n)";
            tracing::warn!(name: "overload", what, count, remedy, "too much at once: the slowest and the oldest are turned away");
        });
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.all.open.lock().by_id.remove(&self.0.id);
        for pot in Pot::ALL {
            self.0.give_back(pot, usize::MAX);
        }
    }
}

impl Opened {
    /// Returns the connection that was opened.
    #[must_use]
    pub fn connection(&self) -> &Arc<Connection> {
        &self.0
    }
}

impl Connection {
    /// The other end of it: a client, or a proxy.
    #[must_use]
    pub const fn peer(&self) -> IpAddr {
        self.peer
    }

    /// Bytes came in. False when this connection must end: its head is large, and there is no memory for it.
    fn on_bytes(&self, count: usize) -> bool {
        let count = count as u64;
        if self.phase() == Phase::Silent {
            self.enter(Phase::Head, count);
        } else {
            self.bytes.fetch_add(count, Relaxed);
        }
        if self.phase() != Phase::Head {
            return true;
        }
        let bytes = self.bytes.load(Relaxed);
        let beyond = bytes.saturating_sub(OWN_HEAD_BYTES as u64).min(count);
        if beyond == 0 {
            return true;
        }
        self.had_large_head.store(true, Relaxed);
        let beyond = usize::try_from(beyond).unwrap_or(usize::MAX).saturating_mul(HEAD_COPIES);
        // Nobody has to give way for a head: no honest one is so long.
        self.take_free(Pot::Heads, beyond)
    }

    /// A head is complete.
    pub fn request_begins(&self, has_body: bool) {
        let _ = self.order.compare_exchange(ANSWER_BUSY, GO_ON, Relaxed, Relaxed);
        self.enter(if has_body { Phase::Body } else { Phase::Complete }, 0);
    }

    /// The whole request is here.
    pub fn request_is_complete(&self) {
        self.enter(Phase::Complete, 0);
    }

    /// There is an answer. Whether it is taken is the client's business.
    pub fn request_is_over(&self) {
        self.enter(Phase::Silent, 0);
    }

    /// Whether the buffers have grown for a large head: the connection ends with the answer, and they with it.
    #[must_use]
    pub fn had_large_head(&self) -> bool {
        self.had_large_head.load(Relaxed)
    }

    /// Takes `bytes` of a pot. Where it is empty, whoever has been slowest for a while gives up what it holds.
    pub fn take(&self, pot: Pot, bytes: usize) -> Taken {
        let state = &self.all.pots[pot as usize];
        loop {
            if self.take_free(pot, bytes) {
                return Taken::Yes;
            }
            let now = self.all.now();
            if now < state.all_young.load(Relaxed) + CHECK_INTERVAL_MS {
                return Taken::NotYet;
            }
            let slowest = {
                let open = self.all.open.lock();
                let holding = open.by_id.values().filter(|other| other.held[pot as usize].load(Relaxed) > 0);
                slowest(holding.map(|other| (other, other.look(now)))).cloned()
            };
            let Some(slowest) = slowest else {
                state.all_young.store(now, Relaxed);
                return Taken::NotYet;
            };
            self.all.crowded(Limit::RequestBodies);
            slowest.give_back(pot, usize::MAX);
            if slowest.id == self.id {
                return Taken::GiveWay;
            }
            slowest.tell(if slowest.phase() == Phase::Body { ANSWER_BUSY } else { CLOSE });
        }
    }

    fn take_free(&self, pot: Pot, bytes: usize) -> bool {
        let state = &self.all.pots[pot as usize];
        let more = |held: usize| held.checked_add(bytes).filter(|held| *held <= state.most);
        let taken = state.held.fetch_update(Relaxed, Relaxed, more).is_ok();
        if taken {
            self.held[pot as usize].fetch_add(bytes, Relaxed);
        }
        taken
    }

    /// Gives back `bytes`, or what is left of them.
    pub fn give_back(&self, pot: Pot, bytes: usize) {
        let held = &self.held[pot as usize];
        let before = held.fetch_update(Relaxed, Relaxed, |held| Some(held.saturating_sub(bytes)));
        let freed = before.unwrap_or_else(|held| held).min(bytes);
        self.all.pots[pot as usize].held.fetch_sub(freed, Relaxed);
    }

    /// Has the request answered as busy: it lost its place.
    pub fn answer_busy(&self) {
        self.tell(ANSWER_BUSY);
    }

    /// Warns, once a minute, that something has run out.
    pub fn crowded(&self, what: Limit) {
        self.all.crowded(what);
    }

    /// Ends when this request must be answered as busy. Both this and the next are for the task of the connection.
    pub async fn told_to_answer_busy(&self) {
        poll_fn(|cx| self.poll_order(cx, ANSWER_BUSY)).await;
    }

    /// Ends when this connection must be closed.
    pub async fn told_to_close(&self) {
        poll_fn(|cx| self.poll_order(cx, CLOSE)).await;
    }

    fn poll_order(&self, cx: &Context<'_>, order: u8) -> Poll<()> {
        if self.order.load(Relaxed) >= order {
            return Poll::Ready(());
        }
        let mut waker = self.waker.lock();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        drop(waker);
        // Told in between.
        if self.order.load(Relaxed) >= order {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    fn tell(&self, order: u8) {
        self.order.fetch_max(order, Relaxed);
        let waker = self.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn enter(&self, phase: Phase, bytes: u64) {
        self.phase.store(phase as u8, Relaxed);
        self.since.store(self.all.now(), Relaxed);
        self.kept_waiting.store(0, Relaxed);
        self.bytes.store(bytes, Relaxed);
    }

    /// Takes in that nothing was read for that long, since a pot was empty.
    pub fn was_kept_waiting(&self, pause: Duration) {
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        self.kept_waiting.fetch_add(millis, Relaxed);
    }

    fn awaits_answer(&self) -> bool {
        matches!(self.phase(), Phase::Body | Phase::Complete)
    }

    fn phase(&self) -> Phase {
        let phase = self.phase.load(Relaxed);
        let all = [Phase::Silent, Phase::Head, Phase::Body];
        all.into_iter().find(|one| *one as u8 == phase).unwrap_or(Phase::Complete)
    }

    fn look(&self, now: u64) -> Look {
        Look {
            phase: self.phase(),
            age: Duration::from_millis(now.saturating_sub(self.since.load(Relaxed))),
            kept_waiting: Duration::from_millis(self.kept_waiting.load(Relaxed)),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

/// The first head on a new connection, whole, and what came with it. Nothing but these bytes is held until then. `None` when
/// the client left, or held more than there is memory for.
pub async fn first_head(stream: &TcpStream, connection: &Connection) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    loop {
        stream.readable().await.ok()?;
        match read_into(&mut head, stream) {
            // What there is, the HTTP library judges.
            Ok(0) if head.is_empty() => return None,
            Ok(0) => break,
            Ok(count) => {
                if !connection.on_bytes(count) {
                    return None;
                }
                if is_whole(&head, count) {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
    connection.opening.store(false, Relaxed);
    if head.starts_with(HTTP_2) {
        // The HTTP library refuses this much, and says nothing to the whole of it.
        head.truncate(HTTP_2.len());
    }
    Some(head)
}

fn read_into(head: &mut Vec<u8>, stream: &TcpStream) -> io::Result<usize> {
    let mut chunk = [0; CHUNK_BYTES];
    let count = stream.try_read(&mut chunk)?;
    if head.capacity() - head.len() < count {
        head.reserve_exact(count.max(256));
    }
    head.extend_from_slice(&chunk[..count]);
    Ok(count)
}

/// Whether the HTTP library has something to say to this, `count` bytes of which are new.
fn is_whole(head: &[u8], count: usize) -> bool {
    let new = &head[head.len().saturating_sub(count + 3)..];
    let ends = new.windows(2).any(|end| end == b"\n\n") || new.windows(3).any(|end| end == b"\n\r\n");
    let odd = head.first().is_some_and(|first| !first.is_ascii_alphabetic());
    ends || odd || head.len() >= MAX_HEAD_BYTES
}

/// Rewrites a head that the HTTP library wrote without being asked; `None` for any other.
pub type Rewrite = fn(head: &[u8]) -> Option<Vec<u8>>;

/// A client's stream with its first head put back, which counts what comes.
pub struct Counted {
    stream: TcpStream,
    first: Vec<u8>,
    given: usize,
    connection: Arc<Connection>,
    rewrite: Rewrite,
    /// Runs while the client takes nothing, and from its FIN to its answer.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Counted {
    /// Wraps a stream of which `first` was read already.
    #[must_use]
    pub const fn new(stream: TcpStream, first: Vec<u8>, connection: Arc<Connection>, rewrite: Rewrite) -> Self {
        Self {
            stream,
            first,
            given: 0,
            connection,
            rewrite,
            timer: None,
        }
    }

    /// Ready when the client has been waited for so long.
    fn wait(&mut self, cx: &mut Context<'_>, longest: Duration) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(longest)));
        timer.as_mut().poll(cx)
    }

    /// Gives up a client that takes nothing.
    fn patiently<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.timer.take().is_some() {
                // The end of the stream, if that was waited for, is to be read now.
                cx.waker().wake_by_ref();
            }
            return written;
        }
        ready!(self.wait(cx, WRITE_TIMEOUT));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Writes the beginning of `bytes`, which begin with what the HTTP library has put at the front of an answer.
    fn write(&mut self, cx: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Some((head, rewritten)) = bytes.first().and_then(|head| Some((head, (self.rewrite)(head)?))) else {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        };
        if ready!(Pin::new(&mut self.stream).poll_write(cx, &rewritten))? < rewritten.len() {
            // It is the last answer on this connection, and the client has not taken those before.
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(head.len()))
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // A little at a time: the HTTP library's buffer grows as soon as it was full once.
        let most = into.remaining().min(CHUNK_BYTES);
        if !self.first.is_empty() {
            let rest = &self.first[self.given..];
            let count = rest.len().min(most);
            into.put_slice(&rest[..count]);
            self.given += count;
            if self.given == self.first.len() {
                self.first = Vec::new();
            }
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        // What is not read is not made ready either: to fill a buffer with zeros costs more than to read a request.
        ready!(Pin::new(&mut (&mut self.stream).take(most as u64)).poll_read(cx, into))?;
        let count = into.filled().len() - before;
        // The HTTP library gives up a request at the end of the stream, and an answer that is on its way.
        if count == 0 && (self.connection.awaits_answer() || self.timer.is_some()) {
            ready!(self.wait(cx, HALF_CLOSED_TIMEOUT));
        }
        if count > 0 && !self.connection.on_bytes(count) {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = self.write(cx, bytes);
        self.patiently(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // While it has bytes of a next request, the HTTP library does not read, but it asks for this whenever it is woken.
        if self.connection.awaits_answer()
            && let Poll::Ready(0) = self.stream.poll_peek(cx, &mut ReadBuf::new(&mut [0]))?
        {
            ready!(self.wait(cx, HALF_CLOSED_TIMEOUT));
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        // Closing with unread bytes resets the connection, and may take an answer away that the client has not read yet.
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..MAX_UNREAD_CHUNKS {
            match self.stream.try_read(&mut chunk) {
                Ok(count) if count > 0 => {}
                Ok(_) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Resources;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn connections(most: usize, body_bytes: usize) -> Arc<Connections> {
        let limits = Limits::of(Resources {
            descriptors: None,
            memory: None,
        });
        Connections::new(&Limits {
            connections: most,
            body_bytes,
            ..limits
        })
    }

    #[test]
    fn a_newcomer_takes_the_place_of_somebody_silent() {
        let all = connections(16, 0);
        let mut open: Vec<_> = (0..16).filter_map(|_| all.open(PEER)).collect();
        open[3].connection().request_begins(false);
        let newcomer = all.open(PEER);
        assert!(newcomer.is_some());
        let told = |opened: &Opened| opened.connection().order.load(Relaxed);
        assert_eq!(open.iter().filter(|opened| told(opened) == CLOSE).count(), 1);
        assert_eq!(told(&open[3]), GO_ON);
        open.clear();
        drop(newcomer);
        assert!(all.open.lock().by_id.is_empty());
    }

    #[test]
    fn nobody_gives_way_whose_request_is_complete() {
        let all = connections(16, 0);
        let open: Vec<_> = std::iter::from_fn(|| all.open(PEER).inspect(|opened| opened.connection().request_begins(false))).collect();
        assert_eq!(open.len(), 20);
    }

    #[test]
    fn what_is_taken_comes_back() {
        let all = connections(16, 1000);
        let (one, other) = (all.open(PEER).unwrap(), all.open(PEER).unwrap());
        assert_eq!(one.connection().take(Pot::Strangers, 900), Taken::Yes);
        assert_eq!(other.connection().take(Pot::Proven, 900), Taken::Yes);
        assert_eq!(other.connection().take(Pot::Strangers, 200), Taken::NotYet);
        one.connection().give_back(Pot::Strangers, 500);
        assert_eq!(other.connection().take(Pot::Strangers, 200), Taken::Yes);
        drop((one, other));
        assert!(all.pots.iter().all(|pot| pot.held.load(Relaxed) == 0));
    }

    #[test]
    fn heads_are_given_on_when_they_are_whole() {
        for whole in [
            &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            b"GET / HTTP/1.1\n\n",
            b"\x16\x03\x01",
            &[b'a'; MAX_HEAD_BYTES],
        ] {
            assert!(is_whole(whole, whole.len()));
            assert!(is_whole(whole, 1), "the last byte alone");
        }
        assert!(!is_whole(b"GET / HTTP/1.1\r\nHost: x\r\n", 1));
        assert!(!is_whole(b"G", 1));
    }
}
