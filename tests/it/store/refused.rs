//! What a store refuses keeps nothing else back (decision L10).

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use lk_jwt_service::internals::store::Jobs;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep};

use super::{TIMEOUT, by_field, job, numbered, on_one_thread, reading, redis, start, start_empty};
use crate::support::redis::RedisServer;
use crate::support::unique_loopback;

async fn wait_records(server: &RedisServer, count: usize, within: Duration) -> Duration {
    let began = Instant::now();
    while server.ask(&["HLEN", "lk-jwt:jobs"]) != format!(":{count}\r\n") {
        assert!(began.elapsed() < within, "{} are there", server.ask(&["HLEN", "lk-jwt:jobs"]));
        sleep(Duration::from_millis(50)).await;
    }
    began.elapsed()
}

/// Case B14: 3,000 ended jobs stayed in it, since their removals stood behind refused records.
#[test]
fn a_full_redis_gets_emptier() {
    const ENDED: i64 = 3000;
    let Some(server) = RedisServer::start(&["--appendonly", "no"]) else {
        return;
    };
    on_one_thread(async {
        let queue = start_empty(redis(&format!("redis://{}", server.address()))).await;
        for n in 0..ENDED {
            queue.put(&numbered(n));
        }
        wait_records(&server, 3000, TIMEOUT).await;
        server.ask(&["CONFIG", "SET", "maxmemory", "1"]);
        for n in ENDED..2 * ENDED {
            queue.put(&numbered(n));
        }
        let began = Instant::now();
        while !server.ask(&["INFO", "errorstats"]).contains("errorstat_OOM") {
            assert!(began.elapsed() < TIMEOUT, "nothing was refused");
            sleep(Duration::from_millis(20)).await;
        }
        for n in 0..ENDED {
            queue.remove(&numbered(n).room, &numbered(n).identity);
        }
        let took = wait_records(&server, 0, Duration::from_secs(5)).await;
        eprintln!("{ENDED} ended jobs have left a full Redis after {took:.1?}");
        // Redis has them before the queue has heard of it.
        let began = Instant::now();
        while queue.waiting() != 3000 {
            assert!(began.elapsed() < TIMEOUT, "{} wait", queue.waiting());
            sleep(Duration::from_millis(5)).await;
        }
        server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field((ENDED..2 * ENDED).map(numbered)));
    });
}

/// A proxy that ends every connection over which this comes.
fn proxy_without(text: &'static str, server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind((unique_loopback(), 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("a listener");
    crate::support::runtime().spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = tokio::net::TcpStream::connect(server).await.ok()?.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
                let mut bytes = vec![0; 64 * 1024];
                loop {
                    let read = from_client.read(&mut bytes).await.ok()?;
                    let bytes = &bytes[..read];
                    if read == 0 || bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
                        return Some(());
                    }
                    to_server.write_all(bytes).await.ok()?;
                }
            });
        }
    });
    address
}

#[test]
fn a_change_that_ends_the_connection_waits_behind_the_others() {
    let Some(server) = RedisServer::start(&["--appendonly", "no"]) else {
        return;
    };
    let proxy = proxy_without("poison", server.address());
    on_one_thread(async {
        let (queue, mut stored) = Jobs::start(redis(&format!("redis://{proxy}")));
        reading(&mut stored).await;
        queue.put(&job("room", "poison"));
        for n in 0..2000 {
            queue.put(&numbered(n));
        }
        let took = wait_records(&server, 2000, TIMEOUT).await;
        eprintln!("2000 others were stored after {took:.1?}");
        queue.put(&numbered(2000));
        wait_records(&server, 2001, TIMEOUT).await;
        queue.remove("room", "poison");
        queue.remove(&numbered(5).room, &numbered(5).identity);
        wait_records(&server, 2000, TIMEOUT).await;
    });
}
