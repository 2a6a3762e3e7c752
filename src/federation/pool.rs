//! Connections that carry HTTP/1.1 requests, one at a time, and are kept for the next one (decision O4).
//!
//! Each is driven by the request that uses it and by nobody else: a request that is given up closes it. All bytes of an
//! answer are counted as they come out of TLS, whatever they are (head, interim answers, chunks, body), and the body is
//! copied into one buffer.

use std::future::poll_fn;
use std::io::{self, Cursor};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{Builder, Connection, Parts, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Chain, Join, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::dial::{Place, Stream};
use super::failure::Failure;
use super::route::Reply;
use crate::admission::{Class, Group};
use crate::text::error_chain;

/// Longest head of an answer.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// Bytes of an answer besides those of its body: the head, interim answers, the frames of chunks.
const MAX_REST_BYTES: usize = 16 * 1024;

/// After so many bytes without a pause it is somebody else's turn on this thread.
const YIELD_AFTER_BYTES: usize = 16 * 1024;

/// Unused connections to one homeserver that are kept, and for how long; the same for a stranger's.
const MAX_IDLE: usize = 32;
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_STRANGER_IDLE: usize = 2;
const STRANGER_IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Unused connections to all strangers that are kept.
const MAX_STRANGERS_IDLE: usize = 128;

/// How many unused connections one route keeps, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keep {
    stranger: bool,
    connections: usize,
    time: Duration,
}

impl Keep {
    /// For a homeserver of `class`.
    pub(super) const fn of(class: Class) -> Self {
        match class {
            Class::Listed | Class::Verified => Self {
                stranger: false,
                connections: MAX_IDLE,
                time: IDLE_TIMEOUT,
            },
            Class::Stranger => Self {
                stranger: true,
                connections: MAX_STRANGER_IDLE,
                time: STRANGER_IDLE_TIMEOUT,
            },
        }
    }
}

/// All connections to homeservers: those in use are counted, the others are kept here.
pub(super) struct Pool {
    most: usize,
    open: Arc<AtomicUsize>,
    keys: AtomicU64,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The one that was put back last is at the end.
    connections: Vec<Kept>,
    reaping: bool,
}

struct Kept {
    key: u64,
    stranger: bool,
    until: Instant,
    connection: Box<Open>,
}

/// The part of the pool that belongs to one route.
pub(super) struct Share {
    pool: Arc<Pool>,
    key: AtomicU64,
    returned: Notify,
}

impl Pool {
    /// With at most `most` connections where some of them are unused: those give way.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            open: Arc::default(),
            keys: AtomicU64::new(0),
            idle: Mutex::default(),
        })
    }

    /// Makes a route's share of the pool.
    pub(super) fn share(self: &Arc<Self>) -> Share {
        Share {
            pool: self.clone(),
            key: AtomicU64::new(self.next_key()),
            returned: Notify::new(),
        }
    }

    fn next_key(&self) -> u64 {
        self.keys.fetch_add(1, Ordering::Relaxed)
    }

    /// Closes the unused connections of a share.
    fn close(&self, key: u64) {
        let mut idle = self.idle.lock();
        let (closed, others) = std::mem::take(&mut idle.connections).into_iter().partition(|kept| kept.key == key);
        idle.connections = others;
        drop(idle);
        drop::<Vec<Kept>>(closed);
    }

    /// A place for one more connection; an unused one is closed for it where there are too many.
    fn count(&self) -> Counted {
        let counted = Counted::new(&self.open);
        if self.open.load(Ordering::Relaxed) > self.most {
            let mut idle = self.idle.lock();
            let connections = &mut idle.connections;
            // The oldest stranger's, else the oldest.
            let at = connections.iter().position(|kept| kept.stranger).unwrap_or(0);
            let closed = (at < connections.len()).then(|| connections.remove(at));
            drop(idle);
            drop(closed);
        }
        counted
    }

    fn put(self: &Arc<Self>, key: u64, keep: Keep, connection: Box<Open>) {
        let mut closed = Vec::new();
        let mut idle = self.idle.lock();
        let Idle { connections, reaping } = &mut *idle;
        if self.open.load(Ordering::Relaxed) > self.most {
            drop(idle);
            return;
        }
        let of_route = |kept: &Kept| kept.key == key;
        if connections.iter().filter(|kept| of_route(kept)).count() >= keep.connections
            && let Some(oldest) = connections.iter().position(of_route)
        {
            closed.push(connections.remove(oldest));
        }
        if keep.stranger
            && connections.iter().filter(|kept| kept.stranger).count() >= MAX_STRANGERS_IDLE
            && let Some(oldest) = connections.iter().position(|kept| kept.stranger)
        {
            closed.push(connections.remove(oldest));
        }
        connections.push(Kept {
            key,
            stranger: keep.stranger,
            until: Instant::now() + keep.time,
            connection,
        });
        if !std::mem::replace(reaping, true) {
            tokio::spawn(reap(Arc::downgrade(self)));
        }
        drop(idle);
        drop(closed);
    }

    fn take(&self, key: u64) -> Option<Box<Open>> {
        let mut idle = self.idle.lock();
        let at = idle.connections.iter().rposition(|kept| kept.key == key)?;
        let kept = idle.connections.remove(at);
        drop(idle);
        Some(kept.connection)
    }

    /// Closes what was unused for too long. When the next one is due; `None`: there is none left.
    fn close_old(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut idle = self.idle.lock();
        let (old, fresh) = std::mem::take(&mut idle.connections)
            .into_iter()
            .partition(|kept| kept.until <= now);
        idle.connections = fresh;
        let next = idle.connections.iter().map(|kept| kept.until).min();
        idle.reaping = next.is_some();
        drop(idle);
        drop::<Vec<Kept>>(old);
        next
    }
}

async fn reap(pool: Weak<Pool>) {
    // Several are closed at a time.
    const PAUSE: Duration = Duration::from_millis(250);
    while let Some(next) = pool.upgrade().and_then(|pool| pool.close_old()) {
        sleep_until(next + PAUSE).await;
    }
}

impl Share {
    /// Returns the key of the route's connections; those that were opened under a former key are not kept.
    pub(super) fn key(&self) -> u64 {
        self.key.load(Ordering::Relaxed)
    }

    /// The machines at the other end of the unused connection that would be taken.
    pub(super) fn group(&self) -> Option<Group> {
        let idle = self.pool.idle.lock();
        let key = self.key();
        let kept = idle.connections.iter().rfind(|kept| kept.key == key);
        kept.map(|kept| kept.connection.group)
    }

    /// Closes the connections: the unused ones now, those in use after it.
    pub(super) fn renew(&self) {
        let former = self.key.swap(self.pool.next_key(), Ordering::Relaxed);
        self.pool.close(former);
    }

    /// An unused connection that still works.
    pub(super) fn take(&self) -> Option<Box<Open>> {
        while let Some(mut connection) = self.pool.take(self.key()) {
            if connection.is_usable() {
                return Some(connection);
            }
        }
        None
    }

    /// Waits until somebody else has done with a connection, and takes it.
    pub(super) async fn returned(&self) -> Box<Open> {
        loop {
            let mut returned = pin!(self.returned.notified());
            returned.as_mut().enable();
            if let Some(connection) = self.take() {
                return connection;
            }
            returned.await;
        }
    }

    /// Keeps `connection`, which was opened or taken under `key`, for the next request.
    pub(super) fn put(&self, key: u64, mut connection: Box<Open>, keep: Keep) {
        if key == self.key() && connection.is_usable() {
            self.pool.put(key, keep, connection);
            self.returned.notify_waiters();
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.pool.close(self.key());
    }
}

/// An open connection between two requests, or with one.
pub(super) struct Open {
    sender: SendRequest<Full<Bytes>>,
    connection: Connection<TokioIo<Metered>, Full<Bytes>>,
    ended: bool,
    left: Arc<AtomicUsize>,
    group: Group,
    _counted: Counted,
}

/// A request that got no answer.
pub(super) struct Unanswered {
    pub(super) failure: Failure,
    /// Whether the request may be sent once more: no byte came, and it does no harm.
    pub(super) again: bool,
}

impl Open {
    /// Begins HTTP on the connection that `open` makes.
    ///
    /// # Errors
    /// When HTTP cannot begin, or what `open` says.
    pub(super) async fn new<'a>(
        pool: &Pool,
        open: impl Future<Output = Result<(Stream, Place<'a>), Failure>>,
    ) -> Result<(Box<Self>, Place<'a>), Failure> {
        let counted = pool.count();
        let left = Arc::new(AtomicUsize::new(0));
        let (stream, place) = open.await?;
        let stream = Metered {
            stream,
            left: left.clone(),
            at_once: 0,
        };
        let (sender, connection) = Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::Http(error_chain(&error)))?;
        let open = Box::new(Self {
            sender,
            connection,
            ended: false,
            left,
            group: place.group,
            _counted: counted,
        });
        Ok((open, place))
    }

    /// Machines at the other end of the connection.
    pub(super) const fn group(&self) -> Group {
        self.group
    }

    /// Sends `request` and reads the whole answer.
    pub(super) async fn exchange(&mut self, request: Request<Full<Bytes>>, limit: usize) -> Result<Reply, Unanswered> {
        let began = Instant::now();
        let budget = limit.saturating_add(MAX_REST_BYTES);
        self.left.store(budget, Ordering::Relaxed);
        let safe = matches!(*request.method(), Method::GET | Method::HEAD);
        let Self {
            sender,
            connection,
            ended,
            left,
            ..
        } = self;
        let sent = sender.try_send_request(request);
        let mut answer = pin!(async {
            let response = sent.await.map_err(|mut error| Unanswered {
                again: error.take_message().is_some() || (safe && left.load(Ordering::Relaxed) == budget),
                failure: Failure::Http(error_chain(error.error())),
            })?;
            collect(response, limit)
                .await
                .map_err(|failure| Unanswered { failure, again: false })
        });
        let reply = poll_fn(|cx| {
            if let Poll::Ready(reply) = answer.as_mut().poll(cx) {
                return Poll::Ready(reply);
            }
            *ended = Pin::new(&mut *connection).poll(cx).is_ready();
            let polled = answer.as_mut().poll(cx);
            if polled.is_pending() && *ended {
                return Poll::Ready(Err(Unanswered {
                    failure: Failure::Http("the connection was closed before the answer was complete".into()),
                    again: false,
                }));
            }
            polled
        })
        .await;
        let spent = left.swap(0, Ordering::Relaxed) == 0;
        reply
            .map(|reply| Reply {
                took: began.elapsed(),
                ..reply
            })
            .map_err(|unanswered| {
                if spent {
                    Unanswered {
                        failure: Failure::TooLarge(limit),
                        again: false,
                    }
                } else {
                    unanswered
                }
            })
    }

    /// Asks for another protocol: the connection where the other side speaks that from here on, else the status of its answer. At most
    /// `limit` bytes come in all.
    pub(super) async fn upgrade(self, request: Request<Full<Bytes>>, limit: usize) -> Result<Result<Switched, StatusCode>, Failure> {
        let Self {
            mut sender,
            mut connection,
            left,
            ..
        } = self;
        left.store(limit, Ordering::Relaxed);
        let mut answer = pin!(sender.send_request(request));
        let (mut status, mut ended) = (None, false);
        let asked = poll_fn(|cx| {
            // What goes wrong there, the answer says.
            ended = ended || connection.poll_without_shutdown(cx).is_ready();
            if status.is_none() {
                status = Some(ready!(answer.as_mut().poll(cx))?.status());
            }
            // HTTP ends where the other protocol begins.
            match status {
                Some(StatusCode::SWITCHING_PROTOCOLS) if !ended => Poll::Pending,
                status => Poll::Ready(Ok(status)),
            }
        });
        let status = asked.await.map_err(|error: hyper::Error| Failure::Http(error_chain(&error)))?;
        if let Some(status) = status.filter(|status| *status != StatusCode::SWITCHING_PROTOCOLS) {
            return Ok(Err(status));
        }
        let Parts { io, read_buf, .. } = connection.into_parts();
        let (read, write) = tokio::io::split(io.into_inner());
        Ok(Ok(tokio::io::join(AsyncReadExt::chain(Cursor::new(read_buf), read), write)))
    }

    /// Lets the connection do what is left to do, and says whether it can carry one more request.
    fn is_usable(&mut self) -> bool {
        if !self.ended {
            let mut nobody = Context::from_waker(std::task::Waker::noop());
            self.ended = Pin::new(&mut self.connection).poll(&mut nobody).is_ready();
        }
        !self.ended && self.sender.is_ready()
    }
}

async fn collect(response: http::Response<hyper::body::Incoming>, limit: usize) -> Result<Reply, Failure> {
    let (head, mut body) = response.into_parts();
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::Http(error_chain(&error)))?;
        let Some(data) = frame.data_ref() else { continue };
        let needed = whole.len() + data.remaining();
        if needed > limit {
            return Err(Failure::TooLarge(limit));
        }
        if needed > whole.capacity() {
            // Twice as much each time, and never more than the limit.
            whole.reserve_exact((whole.capacity() * 2).clamp(needed, limit) - whole.len());
        }
        whole.extend_from_slice(data);
    }
    Ok(Reply {
        status: head.status,
        headers: head.headers,
        body: whole.into(),
        took: Duration::ZERO,
    })
}

/// Counts one connection while it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection on which another protocol is spoken than HTTP; what came of that with the last of HTTP is read first.
pub type Switched = Join<Chain<Cursor<Bytes>, ReadHalf<Metered>>, WriteHalf<Metered>>;

/// A stream from which only so many bytes may come.
pub struct Metered {
    stream: Stream,
    left: Arc<AtomicUsize>,
    at_once: usize,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.at_once >= YIELD_AFTER_BYTES {
            self.at_once = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let Poll::Ready(done) = Pin::new(&mut self.stream).poll_read(cx, buf) else {
            self.at_once = 0;
            return Poll::Pending;
        };
        done?;
        let read = buf.filled().len() - before;
        self.at_once += read;
        let left = self.left.load(Ordering::Relaxed).checked_sub(read);
        self.left.store(left.unwrap_or(0), Ordering::Relaxed);
        Poll::Ready(if left.is_some() {
            Ok(())
        } else {
            Err(io::Error::other("more bytes than any honest answer has"))
        })
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
