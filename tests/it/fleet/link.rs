//! A way from one replica to Redis that can be frozen, cut, or passed in one direction only.

use std::net::SocketAddr;

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
}

pub(super) struct Link {
    address: SocketAddr,
    way: watch::Sender<Way>,
    task: AbortHandle,
}

impl Link {
    pub(super) fn to(server: SocketAddr) -> Self {
        let at = SocketAddr::from((unique_loopback(), 0));
        let listener = runtime().block_on(TcpListener::bind(at)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (way, seen) = watch::channel(Way::Open);
        let task = runtime().spawn(async move {
            while let Ok((outer, _)) = listener.accept().await {
                if *seen.borrow() == Way::Cut {
                    continue;
                }
                let seen = seen.clone();
                tokio::spawn(async move {
                    let Ok(inner) = TcpStream::connect(server).await else { return };
                    let ((from, back), (answers, to)) = (outer.into_split(), inner.into_split());
                    tokio::select! {
                        () = pump(from, to, seen.clone(), true) => {}
                        () = pump(answers, back, seen, false) => {}
                    }
                });
            }
        });
        Self {
            address,
            way,
            task: task.abort_handle(),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Way>, is_there: bool) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            changed = way.changed() => {
                if changed.is_err() || *way.borrow() == Way::Cut {
                    return;
                }
                continue;
            }
        };
        if read == 0 {
            return;
        }
        loop {
            let now = *way.borrow_and_update();
            match now {
                Way::Open => break,
                Way::Unanswered if is_there => break,
                Way::Cut => return,
                Way::Frozen | Way::Unanswered => {}
            }
            if way.changed().await.is_err() {
                return;
            }
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
