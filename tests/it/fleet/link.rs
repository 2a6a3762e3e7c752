//! A way from one replica to Redis that can be frozen, cut, passed in one direction only, or led to another server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::support::{runtime, unique_loopback};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Open,
    /// Connections stand, and nothing passes.
    Frozen,
    /// Connections are closed, and so are new ones.
    Cut,
    /// What is sent arrives, and nothing comes back.
    Unanswered,
    /// Nothing passes on connections over which messages are read; the others are open.
    Unread,
}

/// Where it leads, and how.
type State = (SocketAddr, Way);

/// The word by which messages are read.
const READS: &[u8] = b"XREAD";

pub(super) struct Link {
    address: SocketAddr,
    state: watch::Sender<State>,
    task: AbortHandle,
}

impl Link {
    pub(super) fn to(server: SocketAddr) -> Self {
        let at = SocketAddr::from((unique_loopback(), 0));
        let listener = runtime().block_on(TcpListener::bind(at)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (state, seen) = watch::channel((server, Way::Open));
        let task = runtime().spawn(async move {
            while let Ok((outer, _)) = listener.accept().await {
                let (server, way) = *seen.borrow();
                if way == Way::Cut {
                    continue;
                }
                let seen = seen.clone();
                tokio::spawn(async move {
                    let Ok(inner) = TcpStream::connect(server).await else { return };
                    let ((from, back), (answers, to)) = (outer.into_split(), inner.into_split());
                    let reads = Arc::new(AtomicBool::new(false));
                    tokio::select! {
                        () = pump(from, to, seen.clone(), server, (true, reads.clone())) => {}
                        () = pump(answers, back, seen, server, (false, reads)) => {}
                    }
                });
            }
        });
        Self {
            address,
            state,
            task: task.abort_handle(),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn set(&self, way: Way) {
        self.state.send_modify(|state| state.1 = way);
    }

    /// Leads there from now on: connections that stand are closed.
    pub(super) fn lead_to(&self, server: SocketAddr) {
        self.state.send_modify(|state| state.0 = server);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes what comes on; `direction` says whether that goes to the server, and whether messages are read over this connection.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    server: SocketAddr,
    (is_there, reads): (bool, Arc<AtomicBool>),
) {
    let is_over = |(leads_to, way): State| way == Way::Cut || leads_to != server;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            changed = state.changed() => {
                if changed.is_err() || is_over(*state.borrow()) {
                    return;
                }
                continue;
            }
        };
        if read == 0 {
            return;
        }
        if is_there && buffer[..read].windows(READS.len()).any(|word| word == READS) {
            reads.store(true, Ordering::Relaxed);
        }
        loop {
            let now = *state.borrow_and_update();
            if is_over(now) {
                return;
            }
            match now.1 {
                Way::Open => break,
                Way::Unanswered if is_there => break,
                Way::Unread if !reads.load(Ordering::Relaxed) => break,
                Way::Frozen | Way::Unanswered | Way::Unread | Way::Cut => {}
            }
            if state.changed().await.is_err() {
                return;
            }
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
