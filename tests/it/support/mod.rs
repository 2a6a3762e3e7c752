//! The real binary under test, and its neighbours as fakes on real sockets.
//!
//! - [`service`]: starts `lk-jwt-service`, talks to it, and greps its whole log for secrets when it ends
//! - [`homeserver`]: a Matrix homeserver's federation API with TLS
//! - [`client_api`]: its client-server API, as far as delayed events go
//! - [`own_homeserver`]: the homeserver that a service belongs to in application-service mode
//! - [`sfu`]: LiveKit's RoomService; [`webhook`]: what it tells
//! - [`redis`]: a real redis-server
//! - [`neighbour`]: the scripted HTTP server under both
//! - [`dns`]: a DNS server with a scripted zone; [`network`]: a network of the test's own
//! - [`log`]: what it logged, as fields
//! - [`client`]: an HTTP/1.1 client that shows every byte
//! - [`synapse`], [`livekit`]: the real ones, and real clients; [`process`]: the processes that they run in
//! - [`world`]: the arrangement of all of them that most tests need; [`scene`]: the one for delegated leaves
//! - [`cgroup`]: a memory limit of the test's own
//! - [`lateness`]: how much later than it should everything happens on this machine
//! - [`bodies`]: request bodies; [`hashes`] and [`jwt`]: an independent look at answers; [`ca`]: certificates;
//!   [`secrets`]: what must never be seen

pub(crate) mod bodies;
pub(crate) mod bucket;
pub(crate) mod ca;
pub(crate) mod cgroup;
pub(crate) mod client;
pub(crate) mod client_api;
pub(crate) mod dns;
pub(crate) mod hashes;
pub(crate) mod homeserver;
pub(crate) mod jwt;
pub(crate) mod lateness;
pub(crate) mod livekit;
pub(crate) mod log;
pub(crate) mod neighbour;
pub(crate) mod network;
pub(crate) mod own_homeserver;
mod own_tests;
pub(crate) mod process;
pub(crate) mod redis;
pub(crate) mod scene;
pub(crate) mod secrets;
pub(crate) mod service;
pub(crate) mod sfu;
pub(crate) mod stories;
pub(crate) mod synapse;
pub(crate) mod tunnel;
pub(crate) mod udp_relay;
pub(crate) mod webhook;
pub(crate) mod world;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

/// The runtime on which all fakes and all asynchronous clients live.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("runtime")
    });
    &RUNTIME
}

/// A number that no other caller of this process gets.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// A loopback address that no other caller gets: ports cannot collide, a closed port stays closed, and one homeserver's
/// limits are not another's.
pub(crate) fn unique_loopback() -> Ipv4Addr {
    let n = unique();
    let run = (std::process::id() % 200 + 20) as u8;
    Ipv4Addr::new(127, run, (n >> 8) as u8, (n & 0xff) as u8)
}

/// The first address of a /24 of its own: another homeserver is another machine (decision H7a).
pub(crate) fn unique_network() -> Ipv4Addr {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Relaxed) + u64::from(std::process::id()) * 97;
    Ipv4Addr::new(127, 221 + (n >> 8 & 31) as u8, (n & 0xff) as u8, 1)
}

/// A room id that nobody has asked for yet.
pub(crate) fn unique_room() -> String {
    format!("!room{}:example.org", unique())
}

/// Polls until `done`, or fails with `what` after `within`.
#[track_caller]
pub(crate) fn wait_until(what: &str, within: Duration, done: impl FnMut() -> bool) {
    assert!(comes_true(within, done), "still waiting after {within:?}: {what}");
}

/// Polls until `done`; whether that came within this time.
pub(crate) fn comes_true(within: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    while !done() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Something expensive that the tests of a module share while any of them runs. Unlike a static value it is dropped, so
/// that processes end and their logs are checked.
pub(crate) struct Shared<T>(Mutex<Weak<T>>);

impl<T> Shared<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Weak::new()))
    }

    pub(crate) fn get(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let made = Arc::new(make());
            *shared = Arc::downgrade(&made);
            made
        })
    }
}

/// True where left-out tests are failures (`tests/run`, CI).
pub(crate) fn nothing_may_be_left_out() -> bool {
    std::env::var("LK_TESTS_REAL").is_ok_and(|v| v == "1")
}
