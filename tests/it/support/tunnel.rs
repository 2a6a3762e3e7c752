//! A machine that a neighbour seems to be on: passes every byte on to where it really is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::runtime;

/// Dropping it closes its port and all connections.
pub(crate) struct Tunnel {
    passed: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Tunnel {
    /// From the port of `at` to `to`.
    pub(crate) fn start(at: SocketAddr, to: SocketAddr) -> Self {
        let listener = runtime()
            .block_on(TcpListener::bind(at))
            .unwrap_or_else(|error| panic!("cannot listen on {at}: {error}"));
        let passed = Arc::new(AtomicUsize::new(0));
        let counted = passed.clone();
        let task = runtime().spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((mut outer, _)) = listener.accept().await {
                counted.fetch_add(1, Relaxed);
                open.spawn(async move {
                    let mut inner = TcpStream::connect(to).await.ok()?;
                    tokio::io::copy_bidirectional(&mut inner, &mut outer).await.ok()
                });
            }
        });
        Self {
            passed,
            task: task.abort_handle(),
        }
    }

    /// How many connections came this way.
    pub(crate) fn passed(&self) -> usize {
        self.passed.load(Relaxed)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}
