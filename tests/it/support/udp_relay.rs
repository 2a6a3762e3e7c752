//! A bad link for UDP: everything is late, and some of it is lost.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// What a link does to each datagram, either way.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Link {
    /// Time that a datagram takes, one way.
    pub(crate) delay: Duration,
    /// How many are sent for each that arrives.
    pub(crate) one_of: usize,
}

/// A relay between whoever sends to one address and another.
pub(crate) struct UdpRelay(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl UdpRelay {
    /// Starts it: what is sent `at` this address goes `to` that one, and the answers back.
    pub(crate) fn start(at: SocketAddr, to: SocketAddr, link: Link) -> Self {
        let socket = std::net::UdpSocket::bind(at).unwrap_or_else(|e| panic!("cannot take {at}: {e}"));
        socket.set_nonblocking(true).expect("nonblocking");
        let (stop, stopped) = oneshot::channel();
        // A runtime of its own: all sockets are closed when it is gone, not some time later.
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let socket = Arc::new(UdpSocket::from_std(socket).expect("a socket"));
                tokio::select! {
                    _ = stopped => {}
                    () = relay(socket, to, link) => {}
                }
            });
        });
        Self(Some((stop, thread)))
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

async fn relay(near: Arc<UdpSocket>, to: SocketAddr, link: Link) {
    let (found, mut arrived) = mpsc::unbounded_channel::<(Arc<UdpSocket>, SocketAddr, Vec<u8>)>();
    let mut fars: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut sent: usize = 0;
    let mut buffer = [0; 2048];
    loop {
        let (out, whom, datagram) = tokio::select! {
            // An error is an ICMP message about an earlier datagram.
            received = near.recv_from(&mut buffer) => {
                let Ok((length, from)) = received else { continue };
                let far = match fars.entry(from) {
                    Entry::Occupied(far) => Arc::clone(far.get()),
                    Entry::Vacant(place) => {
                        let far = Arc::new(UdpSocket::bind(("0.0.0.0", 0)).await.expect("a socket"));
                        tasks.spawn(back(Arc::clone(&far), Arc::clone(&near), from, found.clone()));
                        Arc::clone(place.insert(far))
                    }
                };
                (far, to, buffer[..length].to_vec())
            }
            Some(back) = arrived.recv() => back,
        };
        if sent.is_multiple_of(link.one_of) {
            tasks.spawn(async move {
                tokio::time::sleep(link.delay).await;
                let _ = out.send_to(&datagram, whom).await;
            });
        }
        sent += 1;
    }
}

async fn back(far: Arc<UdpSocket>, near: Arc<UdpSocket>, to: SocketAddr, found: UnboundedSender<(Arc<UdpSocket>, SocketAddr, Vec<u8>)>) {
    let mut buffer = [0; 2048];
    loop {
        let Ok((length, _)) = far.recv_from(&mut buffer).await else {
            continue;
        };
        let _ = found.send((Arc::clone(&near), to, buffer[..length].to_vec()));
    }
}
