//! A machine that a neighbour seems to be on: passes every byte on to where it really is.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::runtime;

/// Dropping it closes its port and all connections.
pub(crate) struct Tunnel {
    address: SocketAddr,
    leads_to: Arc<Mutex<SocketAddr>>,
    passed: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Tunnel {
    /// From `at` (port 0: any) to `to`.
    pub(crate) fn start(at: SocketAddr, to: SocketAddr) -> Self {
        let listener = runtime()
            .block_on(TcpListener::bind(at))
            .unwrap_or_else(|error| panic!("cannot listen on {at}: {error}"));
        let address = listener.local_addr().expect("address");
        let (leads_to, passed) = (Arc::new(Mutex::new(to)), Arc::new(AtomicUsize::new(0)));
        let (way, counted) = (leads_to.clone(), passed.clone());
        let task = runtime().spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((mut outer, _)) = listener.accept().await {
                counted.fetch_add(1, Relaxed);
                let to = *way.lock().unwrap();
                open.spawn(async move {
                    let mut inner = TcpStream::connect(to).await.ok()?;
                    tokio::io::copy_bidirectional(&mut inner, &mut outer).await.ok()
                });
            }
        });
        Self {
            address,
            leads_to,
            passed,
            task: task.abort_handle(),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections go from now on.
    pub(crate) fn leads_to(&self, to: SocketAddr) {
        *self.leads_to.lock().unwrap() = to;
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
