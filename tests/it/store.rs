//! The stores: one suite for all of them, and the trouble that each can have.

mod again;
mod odd;
mod refused;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lk_jwt_service::config::Redis;
use lk_jwt_service::internals::dns::Dns;
use lk_jwt_service::internals::store::field;
use lk_jwt_service::internals::store::{JobRecord, Jobs, Part, Replaced, Seen, Store, StoreError, Stored, StoredJobs, VerifiedHomeservers};
use lk_jwt_service::internals::store::{StoredToken, token};
use lk_jwt_service::internals::tls::{Given, Tls};
use lk_jwt_service::secret::Secret;
use tokio::time::{Instant, sleep, timeout};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use crate::support::ca::Ca;
use crate::support::dns::Dns as Zone;
use crate::support::redis::RedisServer;
use crate::support::scene::Scene;
use crate::support::{nothing_may_be_left_out, secrets, unique, unique_loopback, wait_until};

const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the reply to a delegation waits for its write (decision L10).
const WRITE: Duration = Duration::from_secs(3);
const MANY: i64 = 10_000;
const FEW_RECORDS: i64 = 300;
/// Nothing that only takes a change in may take longer. Generous, since the machine is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn memory_keeps_nothing_and_is_never_in_the_way() {
    on_one_thread(async {
        let queue = start_empty(Store::memory()).await;
        assert!(queue.put_and_tell(&job("r", "i")).within(Duration::ZERO).await);
        assert_eq!(queue.stop(Instant::now()).await, 0);
        assert!(Store::memory().ping().await.is_ok());
    });
}

#[test]
fn a_file_does_what_a_store_has_to() {
    let directory = Directory::new();
    suite(MANY, async || Store::file(&directory.path("jobs")).await.expect("the file"));
}

#[test]
fn redis_does_what_a_store_has_to() {
    let Some(server) = RedisServer::start(&[]) else { return };
    suite(MANY, async || redis(&format!("redis://{}", server.address())));
    assert_eq!(commands(&server), ["hdel", "hscan", "hset", "ping"]);
}

/// `store` opens the same store again and again; each has its time alone.
fn suite(many: i64, store: impl AsyncFn() -> Store) {
    on_one_thread(async {
        store().await.ping().await.expect("an answer");
        let queue = start_empty(store().await).await;
        // Put, replace, remove, remove what is not there.
        for n in 0..4 {
            queue.put(&numbered(n));
        }
        assert!(queue.put_and_tell(&restarted(numbered(1), 5)).within(TIMEOUT).await);
        queue.remove(&numbered(2).room, &numbered(2).identity);
        queue.remove("never", "there");
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let expected = [numbered(0), restarted(numbered(1), 5), numbered(3)];
        let (queue, found) = start(store().await).await;
        assert_eq!(found, by_field(expected));

        // The last of many changes of one field wins, whether it is a value or a removal.
        for n in 0..500 {
            queue.put(&restarted(numbered(0), n));
            queue.remove(&numbered(1).room, &numbered(1).identity);
            if n % 50 == 0 {
                assert!(queue.put_and_tell(&restarted(numbered(1), n)).within(TIMEOUT).await);
            }
            queue.remove(&numbered(3).room, &numbered(3).identity);
            queue.put(&restarted(numbered(3), n));
        }
        queue.remove(&numbered(1).room, &numbered(1).identity);
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let (queue, found) = start(store().await).await;
        assert_eq!(found, by_field([restarted(numbered(0), 499), restarted(numbered(3), 499)]));

        let began = Instant::now();
        for n in 0..many {
            queue.put(&numbered(n));
        }
        assert_eq!(queue.stop(began + TIMEOUT).await, 0);
        eprintln!("{many} records stored within {:?}", began.elapsed());
        let began = Instant::now();
        let (queue, found) = start(store().await).await;
        eprintln!("{many} records read within {:?}", began.elapsed());
        assert_eq!(found, by_field((0..many).map(numbered)));
        for n in 0..many {
            queue.remove(&numbered(n).room, &numbered(n).identity);
        }
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        start_empty(store().await).await.stop(Instant::now() + TIMEOUT).await;
    });
}

#[test]
fn redis_may_be_away_for_a_while() {
    let Some(mut server) = RedisServer::start(&[]) else { return };
    on_one_thread(async {
        let queue = start_empty(redis(&format!("redis://{}", server.address()))).await;
        assert!(queue.put_and_tell(&numbered(0)).within(TIMEOUT).await);
        assert!(queue.put_and_tell(&numbered(1)).within(TIMEOUT).await);

        server.kill();
        let began = Instant::now();
        let early = queue.put_and_tell(&restarted(numbered(0), 1));
        for n in 1..1000 {
            queue.put(&restarted(numbered(0), n));
            queue.put(&restarted(numbered(n), n));
        }
        queue.remove(&numbered(1).room, &numbered(1).identity);
        let late = queue.put_and_tell(&numbered(2000));
        assert!(began.elapsed() < AT_ONCE, "changes waited for the store: {:?}", began.elapsed());
        assert!(!late.within(Duration::from_secs(1)).await, "the store is away");
        assert!(began.elapsed() < AT_ONCE * 2, "a wait has its end");
        assert_eq!(queue.waiting(), 1001, "of each job the latest only");

        server.start_again();
        assert!(early.within(TIMEOUT).await, "those who still wait are told");
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let mut expected: Vec<_> = (2..1000).map(|n| restarted(numbered(n), n)).collect();
        expected.extend([restarted(numbered(0), 999), numbered(2000)]);
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field(expected));
    });
}

/// Its name gets another address, while records of DNS live for ten minutes (decision O2).
#[test]
fn redis_may_move() {
    type Leave = fn(&mut RedisServer);
    let cases: [(&str, Leave, u64); 4] = [
        ("closed", RedisServer::kill, 5),
        ("frozen", |old| old.freeze(), 10),
        (
            "somebody who speaks HTTP",
            |old| somebody_else(old, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
            5,
        ),
        (
            "a Redis that wants another password",
            |old| somebody_else(old, b"-NOAUTH Authentication required.\r\n"),
            5,
        ),
    ];
    for (what, leave, within) in cases {
        let (Some(mut old), Some(new)) = (RedisServer::start(&[]), RedisServer::start(&[])) else {
            return;
        };
        let (dns, name) = (Zone::start(), format!("redis{}.example.org", unique()));
        dns.ttl(600);
        dns.address(&name, &[old.address().ip()]);
        let scene = Scene::with(|setup| dns.serving(setup).env("LIVEKIT_REDIS_URL", &format!("redis://{name}:6379")));
        let delay = Duration::from_secs(3600);
        let jobs = |server: &RedisServer| server.ask(&["HLEN", "lk-jwt:jobs"]);
        scene.delegate(delay);
        wait_until("the first job to be stored", TIMEOUT, || jobs(&old) == ":1\r\n");
        leave(&mut old);
        dns.address(&name, &[new.address().ip()]);
        let moved = Instant::now();
        scene.delegate_as("another", delay);
        wait_until(&format!("the second job to be stored elsewhere: {what}"), TIMEOUT, || {
            jobs(&new) == ":1\r\n"
        });
        eprintln!("{what}: stored elsewhere after {:.1?}", moved.elapsed());
        assert!(moved.elapsed() < Duration::from_secs(within), "{what}: {:?}", moved.elapsed());
    }
}

/// Has this address by now: says this to everybody, whatever they want.
fn somebody_else(old: &mut RedisServer, says: &'static [u8]) {
    old.kill();
    let mut listener = TcpListener::bind(old.address());
    wait_until("the port to be free", TIMEOUT, || {
        listener = TcpListener::bind(old.address());
        listener.is_ok()
    });
    let listener = listener.expect("just seen");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(says);
        }
    });
}

#[test]
fn redis_may_be_frozen_and_old_writes_do_not_come_back() {
    let Some(server) = RedisServer::start(&[]) else { return };
    on_one_thread(async {
        let queue = start_empty(redis(&format!("redis://{}", server.address()))).await;
        assert!(queue.put_and_tell(&numbered(0)).within(TIMEOUT).await);
        server.freeze();
        let began = Instant::now();
        // This is sent, and is carried out after the thaw.
        assert!(!queue.put_and_tell(&restarted(numbered(0), 1)).within(WRITE).await);
        let stuck = queue.put_and_tell(&numbered(1));
        assert!(began.elapsed() < WRITE + AT_ONCE);
        for n in 2..50 {
            queue.put(&restarted(numbered(0), n));
            queue.put(&restarted(numbered(1), n));
            sleep(Duration::from_millis(80)).await;
        }
        queue.remove(&numbered(1).room, &numbered(1).identity);
        server.thaw();
        assert!(stuck.within(TIMEOUT).await);
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        sleep(Duration::from_millis(300)).await;
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field([restarted(numbered(0), 49)]));
    });
}

#[test]
fn what_changed_before_redis_could_be_read_is_not_overwritten_by_what_it_remembers() {
    let Some(mut server) = RedisServer::start(&[]) else { return };
    for n in 0..3 {
        let job = numbered(n);
        server.hset(&job.field(), &job.value());
    }
    server.kill();
    on_one_thread(async {
        let (queue, mut restored) = Jobs::start(redis(&format!("redis://{}", server.address())));
        queue.put(&restarted(numbered(0), 7));
        queue.remove(&numbered(1).room, &numbered(1).identity);
        assert!(
            timeout(Duration::from_secs(1), restored.next()).await.is_err(),
            "there is nobody to ask"
        );
        server.start_again();
        let (found, seen) = reading(&mut restored).await;
        assert_eq!(found, by_field([numbered(2)]));
        assert!(seen.is_some(), "the store was away");
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field([restarted(numbered(0), 7), numbered(2)]));
    });
}

#[test]
fn the_end_comes_in_time_whatever_the_store_does() {
    let Some(server) = RedisServer::start(&[]) else { return };
    on_one_thread(async {
        let queue = start_empty(redis(&format!("redis://{}", server.address()))).await;
        server.freeze();
        for n in 0..10 {
            queue.put(&numbered(n));
        }
        let began = Instant::now();
        assert_eq!(queue.stop(began + Duration::from_secs(1)).await, 10);
        assert!(began.elapsed() < Duration::from_secs(1) + AT_ONCE);
        server.thaw();
    });
}

#[test]
fn redis_may_refuse_everything_but_four_commands() {
    let password = secrets::sfu_secret();
    let user = format!("user jobs on >{password} ~lk-jwt:jobs -@all +ping +hset +hdel +hgetall");
    let user: Vec<&str> = std::iter::once("--user").chain(user.split(' ').skip(1)).collect();
    let Some(server) = RedisServer::start(&user) else { return };
    let url = format!("redis://{}", server.address());
    suite(FEW_RECORDS, async || redis_as(&url, 0, Some("jobs"), Some(&password)));
    on_one_thread(async {
        // The same user has no other database, and no other password.
        for (database, password, remedy) in [
            (3, password.as_str(), "number of the database"),
            (0, "sfusecretNEVERLOGwrong", "LIVEKIT_REDIS_PASSWORD"),
        ] {
            let error = redis_as(&url, database, Some("jobs"), Some(password)).ping().await.unwrap_err();
            assert!(error.remedy().contains(remedy), "{error}: {}", error.remedy());
            assert!(!format!("{error} {error:?}").contains(password));
        }
    });
}

#[test]
fn redis_may_not_know_what_other_clients_begin_with() {
    let gone = ["HELLO", "CLIENT", "SELECT", "AUTH", "HSCAN", "EVAL", "MULTI"];
    let options: Vec<&str> = gone.iter().flat_map(|command| ["--rename-command", command, ""]).collect();
    let Some(server) = RedisServer::start(&options) else { return };
    let url = format!("redis://{}", server.address());
    suite(FEW_RECORDS, async || redis(&url));
    on_one_thread(async {
        // A server that does not know AUTH repeats the password.
        let error = redis_as(&url, 0, None, Some("sfusecretNEVERLOGrepeated")).ping().await.unwrap_err();
        assert!(error.to_string().ends_with("AUTH was refused (ERR)"), "{error}");
        assert!(!format!("{error:?}").contains("NEVERLOG"));
        assert!(error.remedy().contains("LIVEKIT_REDIS_PASSWORD"));
    });
}

#[test]
fn redis_may_want_a_password_and_hold_the_jobs_in_another_database() {
    let password = secrets::sfu_secret();
    let Some(server) = RedisServer::start(&["--requirepass", &password]) else {
        return;
    };
    let server = server.with_login(&["AUTH", &password]);
    let url = format!("redis://{}", server.address());
    suite(FEW_RECORDS, async || redis_as(&url, 5, None, Some(&password)));
    on_one_thread(async {
        let other = start_empty(redis_as(&url, 5, None, Some(&password))).await;
        assert!(other.put_and_tell(&numbered(1)).within(TIMEOUT).await);
        start_empty(redis_as(&url, 0, None, Some(&password))).await;
        let error = redis(&url).ping().await.unwrap_err();
        assert!(error.remedy().contains("set LIVEKIT_REDIS_PASSWORD"), "{error}");
        let error = redis_as(&url, 0, Some("nobody"), Some(&password)).ping().await.unwrap_err();
        assert!(
            error.to_string().contains("WRONGPASS") && !format!("{error:?}").contains(&password),
            "{error}"
        );
    });
}

#[test]
fn redis_says_why_it_refuses() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let url = format!("redis://{}", server.address());
    on_one_thread(async {
        server.ask(&["SET", "lk-jwt:jobs", "x"]);
        let error = load(&redis(&url)).await.unwrap_err();
        assert!(
            error.to_string().contains("WRONGTYPE") && error.remedy().contains("another program"),
            "{error}"
        );
        server.ask(&["DEL", "lk-jwt:jobs"]);
        server.ask(&["CONFIG", "SET", "maxmemory", "1"]);
        let queue = start_empty(redis(&url)).await;
        assert!(!queue.put_and_tell(&numbered(1)).within(AT_ONCE).await);
        server.ask(&["CONFIG", "SET", "maxmemory", "0"]);
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let (_, found) = start(redis(&url)).await;
        assert_eq!(found, by_field([numbered(1)]));
    });
}

#[test]
fn redis_behind_a_unix_socket_and_behind_tls() {
    let Some(server) = RedisServer::start(&[]) else { return };
    suite(FEW_RECORDS, async || redis(&format!("unix://{}", server.socket().display())));
    let encrypted = tls_in_front_of(server.address(), Ca::untrusted());
    suite(FEW_RECORDS, async || redis(&format!("rediss://{encrypted}?skip_verify=true")));
    on_one_thread(async {
        // This process trusts the system's authorities, and not that of the tests.
        let error = redis(&format!("rediss://{encrypted}")).ping().await.unwrap_err();
        assert!(
            error.to_string().contains("TLS") && error.remedy().contains("SSL_CERT_FILE"),
            "{error}"
        );
        let error = redis(&format!("rediss://{}", server.address())).ping().await.unwrap_err();
        assert!(error.remedy().contains("speaks TLS"), "{error}");
        assert!(redis(&format!("redis://{encrypted}")).ping().await.is_err());
    });
}

/// The whole service, which trusts the authority of `SSL_CERT_FILE`: what is delegated is in Redis, or it is not and there
/// is a warning that names the remedy.
#[test]
fn rediss_needs_a_certificate_that_verifies() {
    let Some(server) = RedisServer::start(&[]) else { return };
    for (authority, verifies) in [(Ca::trusted(), true), (Ca::untrusted(), false)] {
        let url = format!("rediss://{}", tls_in_front_of(server.address(), authority));
        let scene = Scene::with(|setup| setup.env("LIVEKIT_REDIS_URL", &url));
        scene.delegate(TIMEOUT);
        let script = r"return table.concat(redis.call('HVALS', KEYS[1]))";
        let stored = server.ask(&["EVAL", script, "1", "lk-jwt:jobs"]).contains(&scene.delay_id);
        assert_eq!(stored, verifies, "{}", scene.service.log());
        let complains = scene
            .service
            .log()
            .lines()
            .any(|line| line.contains("WARN") && line.contains("SSL_CERT_FILE"));
        assert_eq!(complains, !verifies, "{}", scene.service.log());
    }
}

#[test]
fn idle_connections_may_be_closed() {
    let Some(server) = RedisServer::start(&[]) else { return };
    on_one_thread(async {
        let queue = start_empty(redis(&format!("redis://{}", server.address()))).await;
        let mut times = Vec::new();
        for n in 0..5 {
            let began = Instant::now();
            assert!(queue.put_and_tell(&numbered(n)).within(TIMEOUT).await);
            times.push(began.elapsed());
            server.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
        }
        // The pause after a failure would be longer than that.
        assert!(
            times.iter().skip(1).min() < Some(&Duration::from_millis(95)),
            "a closed connection was a trouble: {times:?}"
        );
    });
}

#[test]
fn what_is_not_redis_is_told_in_time() {
    on_one_thread(async {
        let closed = SocketAddr::new(unique_loopback().into(), 6379);
        let error = redis(&format!("redis://{closed}")).ping().await.unwrap_err();
        assert!(error.to_string().contains("cannot connect"), "{error}");
        assert!(redis("redis://no-such-host.invalid").ping().await.is_err());
        assert!(redis("unix:///no/such/socket").ping().await.is_err());

        let silent = TcpListener::bind((unique_loopback(), 0)).expect("a port");
        let began = Instant::now();
        let error = redis(&format!("redis://{}", silent.local_addr().unwrap()))
            .ping()
            .await
            .unwrap_err();
        assert!(error.to_string().contains("no answer in time"), "{error}");
        assert!(began.elapsed() < WRITE + AT_ONCE);

        let http = TcpListener::bind((unique_loopback(), 0)).expect("a port");
        let address = http.local_addr().unwrap();
        std::thread::spawn(move || http.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        let error = redis(&format!("redis://{address}")).ping().await.unwrap_err();
        assert!(error.remedy().contains("Redis and to nothing else"), "{error}");
    });
}

#[test]
fn records_of_the_go_service_are_read_and_written_back_without_loss() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let plain = (
        r#"["krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","@a:x:DEV"]"#,
        r#"{"Params":{"DelayId":"syd_1","DelayTimeout":8000000000,"ServerName":"example.com","LiveKitRoom":"krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","LiveKitIdentity":"@a:x:DEV"},"RestartedAt":"2126-07-23T09:28:51.123456789Z"}"#,
    );
    let escaped = (
        r#"["krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","@\u003ca\u003e\u0026:x:DEV"]"#,
        r#"{"Params":{"DelayId":"a\u0026b","DelayTimeout":3600000000000,"ServerName":"example.com","LiveKitRoom":"krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","LiveKitIdentity":"@\u003ca\u003e\u0026:x:DEV"},"RestartedAt":"2126-07-23T11:28:51+02:00"}"#,
    );
    for (field, value) in [plain, escaped] {
        server.hset(field, value);
    }
    server.hset("by hand", "{}");
    server.hset(r#"["a","b"]"#, "no JSON");
    on_one_thread(async {
        let (queue, mut restored) = Jobs::start(redis(&format!("redis://{}", server.address())));
        let (found, _) = reading(&mut restored).await;
        let identities: Vec<_> = found.values().map(|job| &*job.identity).collect();
        assert_eq!(identities, ["@<a>&:x:DEV", "@a:x:DEV"]);
        found.values().for_each(|job| queue.put(job));
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        for (field, value) in [plain, escaped] {
            assert_eq!(server.hget(field).as_deref(), Some(value));
        }
        assert_eq!(server.ask(&["HLEN", "lk-jwt:jobs"]), ":4\r\n", "what cannot be read is left there");

        let (queue, restored) = Jobs::start(redis(&format!("redis://{}", server.address())));
        drop(restored);
        found.values().for_each(|job| queue.remove(&job.room, &job.identity));
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        assert_eq!(server.ask(&["HLEN", "lk-jwt:jobs"]), ":2\r\n");
    });
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn a_hash_that_is_not_ours_does_not_fill_the_memory() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let large = "x".repeat(1024 * 1024);
    for n in 0..20 {
        server.hset(&format!("large {n}"), &large);
    }
    server.hset(&field("r", "i"), &job("r", "i").value());
    on_one_thread(async {
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field([job("r", "i")]));
        for n in 20..260 {
            server.hset(&format!("large {n}"), &large);
        }
        let (_, found) = start(redis(&format!("redis://{}", server.address()))).await;
        assert_eq!(found, by_field([job("r", "i")]));
    });
}

#[test]
fn tokens_live_beside_jobs_in_a_file() {
    let directory = Directory::new();
    beside_each_other(async || Store::file(&directory.path("state")).await.expect("the file"));
}

#[test]
fn tokens_live_beside_jobs_in_redis() {
    let Some(server) = RedisServer::start(&[]) else { return };
    beside_each_other(async || redis(&format!("redis://{}", server.address())));
    assert!(server.ask(&["HEXISTS", "lk-jwt:tokens", &field("r", "i")]).starts_with(":1"));
    assert_eq!(commands(&server), ["hdel", "hexists", "hscan", "hset", "ping"]);
}

/// Each replica knows the end of the tokens that it has issued itself, and the watcher those of a minute ago.
#[test]
fn a_token_of_another_replica_with_a_later_end_stays() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let stored = |identity| server.ask(&["HGET", "lk-jwt:tokens", &field("r", identity)]);
    let later = 4_000_000_000_000;
    on_one_thread(async {
        let store = redis(&format!("redis://{}", server.address()));
        let written = async |change: Option<StoredToken<'static>>| {
            let (tokens, _) = token::Queue::start_shared(&store);
            match change {
                Some(token) => tokens.put(&token),
                None => tokens.remove("r", "i"),
            }
            assert_eq!(tokens.stop(Instant::now() + TIMEOUT).await, 0);
        };
        let end = |end, left| StoredToken {
            left,
            ..token("r", "i", end)
        };
        written(None).await;
        for (change, expected) in [
            (Some(end(later, false)), end(later, false)),
            // What is told of the user is written all the same.
            (Some(end(later - 1, true)), end(later, true)),
            (None, end(later, true)),
            (Some(end(later + 1, false)), end(later + 1, false)),
            // A user of the same name on the SFU.
            (
                Some(StoredToken {
                    user_id: r#"@"expiresAt":1:example.org"#.into(),
                    ..end(1, true)
                }),
                end(later + 1, false),
            ),
        ] {
            written(change).await;
            let value = stored("i").lines().nth(1).map(str::to_owned).unwrap_or_default();
            assert_eq!(StoredToken::read(field("r", "i").as_bytes(), value.as_bytes()).ok(), Some(expected));
        }
        // What is over goes, and what is no record is written over.
        server.ask(&["HSET", "lk-jwt:tokens", &field("r", "i"), r#"{"expiresAt":1000}"#]);
        written(None).await;
        assert_eq!(stored("i"), "$-1\r\n");
        for other in [
            "",
            "[]",
            "7",
            "{",
            r#"{"expiresAt":"9e99"}"#,
            r#"{"expiresAt":1e16}"#,
            r#"{"expiresAt":NaN}"#,
            "\u{0}",
        ] {
            server.ask(&["HSET", "lk-jwt:tokens", &field("r", "i"), other]);
            written(Some(end(1, false))).await;
            assert!(stored("i").contains("\"expiresAt\":1,"), "{other}: {}", stored("i"));
        }
    });
    let mut commands = commands(&server);
    // A reading may have begun that nobody waits for.
    commands.retain(|command| command != "hscan");
    assert_eq!(commands, ["eval", "hdel", "hget", "hset", "ping", "time"]);
}

/// Under one name, and neither disturbs the other.
fn beside_each_other(store: impl AsyncFn() -> Store) {
    on_one_thread(async {
        let opened = store().await;
        let (tokens, mut restored) = token::Queue::start(&opened);
        assert_eq!(restored.next().await, Some(token::Found::All { again: false }));
        let jobs = start_empty(opened).await;
        tokens.put(&token("r", "i", 1));
        jobs.put(&job("r", "i"));
        tokens.put(&token("r", "i", 2));
        tokens.put(&token("r", "j", 3));
        tokens.remove("r", "j");
        let end = Instant::now() + TIMEOUT;
        assert_eq!((tokens.stop(end).await, jobs.stop(end).await), (0, 0));
        drop((tokens, jobs));

        let opened = store().await;
        let (tokens, mut restored) = token::Queue::start(&opened);
        assert_eq!(restored.next().await, Some(token::Found::Token(token("r", "i", 2))));
        assert_eq!(restored.next().await, Some(token::Found::All { again: false }));
        let (jobs, found) = start(opened).await;
        assert_eq!(found, by_field([job("r", "i")]));
        jobs.remove("r", "i");
        let end = Instant::now() + TIMEOUT;
        assert_eq!((tokens.stop(end).await, jobs.stop(end).await), (0, 0));
        drop((tokens, jobs, restored));

        let opened = store().await;
        let (_, mut restored) = token::Queue::start(&opened);
        assert_eq!(restored.next().await, Some(token::Found::Token(token("r", "i", 2))));
        start_empty(opened).await;
    });
}

#[test]
fn verified_homeservers_live_in_a_file() {
    let directory = Directory::new();
    verified(async || Store::file(&directory.path("state")).await.expect("the file"));
}

#[test]
fn verified_homeservers_live_in_redis() {
    let Some(server) = RedisServer::start(&[]) else { return };
    verified(async || redis(&format!("redis://{}", server.address())));
    // By other hands: what is no record of ours, what is out of date, and one of a clock that was ahead.
    for (host, value) in [
        ("soon.example", "soon"),
        ("old.example", "1799000000"),
        ("ahead.example", "1900000000"),
        (&"x".repeat(300), "1800000000"),
    ] {
        server.ask(&["HSET", "lk-jwt:homeservers", host, value]);
    }
    on_one_thread(async {
        let (table, found) = homeservers(&redis(&format!("redis://{}", server.address())), NOW + 4000).await;
        assert_eq!(found.get("ahead.example"), Some(&(NOW + 4000)));
        assert!(!found.contains_key("soon.example") && !found.contains_key("old.example"));
        table.stop(Instant::now() + TIMEOUT).await;
    });
    for (host, there) in [("soon.example", 0), ("old.example", 0), ("ahead.example", 1), ("x.example", 1)] {
        assert_eq!(
            server.ask(&["HEXISTS", "lk-jwt:homeservers", host]),
            format!(":{there}\r\n"),
            "{host}"
        );
    }
    assert_eq!(commands(&server), ["hdel", "hexists", "hscan", "hset", "ping"]);
}

#[test]
fn verified_homeservers_are_kept_nowhere_without_a_store() {
    on_one_thread(async {
        let (table, found) = homeservers(&Store::memory(), NOW).await;
        assert_eq!(found, BTreeMap::new());
        table.remember("x.example", NOW);
        table.forget("x.example");
        table.stop(Instant::now()).await;
    });
}

/// Seconds since 1970.
const NOW: u64 = 1_800_000_000;

async fn homeservers(store: &Store, now: u64) -> (VerifiedHomeservers, BTreeMap<String, u64>) {
    let (table, mut restored) = VerifiedHomeservers::start(store, now);
    let mut found = BTreeMap::new();
    while let Some((host, at)) = timeout(TIMEOUT, restored.next()).await.expect("homeservers in time") {
        found.insert(host, at);
    }
    (table, found)
}

/// Lets go of the store.
async fn end(table: VerifiedHomeservers) {
    table.stop(Instant::now() + TIMEOUT).await;
}

fn verified(store: impl AsyncFn() -> Store) {
    const DAY: u64 = 24 * 3600;
    on_one_thread(async {
        let (table, found) = homeservers(&store().await, NOW).await;
        assert_eq!(found, BTreeMap::new());
        table.remember("x.example", NOW);
        table.remember("y.example", NOW);
        table.remember("z.example", NOW);
        table.remember("x.example", NOW + 3600);
        table.forget("y.example");
        table.forget("never.example");
        table.remember(&"n".repeat(256), NOW);
        table.remember("", NOW);
        end(table).await;
        let left = [("x.example".to_owned(), NOW + 3600), ("z.example".to_owned(), NOW)];
        let (table, found) = homeservers(&store().await, NOW + 3601).await;
        assert_eq!(found, BTreeMap::from(left.clone()));
        end(table).await;

        // A day later the older one is not a homeserver that has verified any more, and its record goes.
        let (table, found) = homeservers(&store().await, NOW + DAY + 1).await;
        assert_eq!(found, BTreeMap::from([left[0].clone()]));
        end(table).await;
        let (table, found) = homeservers(&store().await, NOW + 3601).await;
        assert_eq!(found, BTreeMap::from([left[0].clone()]), "it is gone from the store");
        // While the service runs, too.
        table.remember("w.example", NOW + 3600 + DAY + 1);
        end(table).await;
        let (table, found) = homeservers(&store().await, NOW + 3601 + DAY).await;
        assert_eq!(found, BTreeMap::from([("w.example".to_owned(), NOW + 3601 + DAY)]));
        end(table).await;

        // A full table stays as it is until room is made.
        let (table, _) = homeservers(&store().await, NOW + 3601 + DAY).await;
        for n in 0..5000 {
            table.remember(&format!("n{n}.example"), NOW + 3601 + DAY);
        }
        table.forget("w.example");
        table.remember("late.example", NOW + 3601 + DAY);
        end(table).await;
        let (table, found) = homeservers(&store().await, NOW + 3601 + DAY).await;
        assert_eq!(found.len(), 4096);
        assert!(found.contains_key("late.example") && found.contains_key("n4094.example") && !found.contains_key("n4095.example"));
        for host in found.keys() {
            table.forget(host);
        }
        table.remember("x.example", NOW + 3600);
        end(table).await;
        let (table, found) = homeservers(&store().await, NOW + 3601).await;
        assert_eq!(found, BTreeMap::from([left[0].clone()]));
        end(table).await;
    });
}

/// A log in memory: what is at `info` or above.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<String>>);

impl<S: tracing::Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        if level <= tracing::Level::INFO {
            let mut line = format!(" {level} ");
            event.record(&mut |field: &tracing::field::Field, value: &dyn Debug| {
                line += &format!("{field}={value:?} ");
            });
            self.0.lock().unwrap().push_str(&(line + "\n"));
        }
    }
}

#[test]
fn a_redis_that_denies_the_hash_of_homeservers_keeps_jobs_all_the_same() {
    let Some(server) = RedisServer::start(&[]) else { return };
    for (user, refused) in [("narrow", false), ("wrong-type", true)] {
        let acl = [
            "ACL",
            "SETUSER",
            user,
            "on",
            ">password",
            "-@all",
            "+ping",
            "+hset",
            "+hdel",
            "+hgetall",
        ];
        let keys = if refused { "~lk-jwt:*" } else { "~lk-jwt:jobs" };
        assert_eq!(server.ask(&[&acl[..], &[keys]].concat()), "+OK\r\n");
        if refused {
            server.ask(&["SET", "lk-jwt:homeservers", "something else"]);
        }
        let lines = Lines::default();
        let log = lines.clone();
        let subscriber = tracing_subscriber::registry().with(log);
        let logging = tracing::subscriber::set_default(subscriber);
        on_one_thread(async {
            let store = redis_as(&format!("redis://{}", server.address()), 0, Some(user), Some("password"));
            let (table, found) = homeservers(&store, NOW).await;
            assert_eq!(found, BTreeMap::new(), "the reading ends");
            table.remember("x.example", NOW);
            let began = Instant::now();
            table.stop(began + TIMEOUT).await;
            assert!(began.elapsed() < AT_ONCE, "nothing is tried again");
            let jobs = start_empty(store).await;
            assert!(jobs.put_and_tell(&job("r", "i")).within(TIMEOUT).await);
            jobs.remove("r", "i");
            assert_eq!(jobs.stop(Instant::now() + TIMEOUT).await, 0);
        });
        drop(logging);
        let log = lines.0.lock().unwrap().clone();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(
            log.contains(" INFO ") && log.contains("verified homeservers are not stored"),
            "{log}"
        );
    }
    assert_eq!(server.ask(&["GET", "lk-jwt:homeservers"]), "$14\r\nsomething else\r\n");
}

#[test]
fn a_file_with_jobs_alone_gets_the_second_table() {
    let directory = Directory::new();
    let path = directory.path("state");
    let table: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("jobs");
    let database = redb::Database::create(&path).expect("a database");
    let transaction = database.begin_write().expect("a transaction");
    let (name, value) = (field("r", "i"), job("r", "i").value());
    transaction
        .open_table(table)
        .and_then(|mut table| Ok(table.insert(name.as_bytes(), value.as_bytes()).map(drop)?))
        .expect("a record");
    transaction.commit().expect("a commit");
    drop(database);
    on_one_thread(async {
        let opened = Store::file(&path).await.expect("the file");
        let (tokens, mut restored) = token::Queue::start(&opened);
        assert_eq!(restored.next().await, Some(token::Found::All { again: false }));
        let (_, found) = start(opened).await;
        assert_eq!(found, by_field([job("r", "i")]));
        tokens.put(&token("r", "i", 1));
        assert_eq!(tokens.stop(Instant::now() + TIMEOUT).await, 0);
    });
}

#[test]
fn a_file_may_be_named_by_its_directory_and_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = Directory::new();
    suite(FEW_RECORDS, async || Store::file(&directory.0).await.expect("the file"));
    let file = directory.path("lk-jwt-service.redb");
    assert_eq!(std::fs::metadata(&file).expect("the file").permissions().mode() & 0o777, 0o600);
    suite(FEW_RECORDS, async || Store::file(&file).await.expect("the file"));
}

#[test]
fn a_file_of_others_is_a_clear_error_and_left_as_it_is_and_a_damaged_one_is_set_aside() {
    let directory = Directory::new();
    let refused = |path: PathBuf| {
        on_one_thread(async move {
            let Err(error) = Store::file(&path).await else {
                panic!("{} was taken", path.display())
            };
            let text = format!("{error}; {}", error.remedy());
            assert!(text.starts_with(&format!("LIVEKIT_STATE_PATH={}: ", path.display())), "{text}");
            text
        })
    };
    for (name, content) in [
        ("text", b"not a database, but somebody's text\n" as &[u8]),
        ("short", b"x"),
        ("zeros", &[0; 8192]),
    ] {
        let path = directory.path(name);
        std::fs::write(&path, content).expect("a file");
        let text = refused(path.clone());
        assert!(
            text.contains("not one that this service made") && text.contains("path of its own"),
            "{text}"
        );
        assert_eq!(std::fs::read(&path).expect("the file"), content);
    }
    assert!(refused(directory.path("no/such/directory")).contains("make the directory"));

    // Made under another name first, of which nothing stays.
    let fresh = directory.path("fresh");
    std::fs::create_dir(&fresh).expect("a directory");
    on_one_thread(async { drop(Store::file(&fresh).await.expect("a new file")) });
    assert_eq!(std::fs::read_dir(&fresh).expect("the directory").count(), 1);

    // Another program's database.
    let other = directory.path("other");
    let database = redb::Database::create(&other).expect("a database");
    let transaction = database.begin_write().expect("a transaction");
    transaction
        .open_table(redb::TableDefinition::<&str, u64>::new("theirs"))
        .expect("a table");
    transaction.commit().expect("a commit");
    assert!(refused(other.clone()).contains("another process uses this file"));
    drop(database);
    assert!(refused(other).contains("not one that this service made"));

    // Ours, damaged.
    let path = directory.path("damaged");
    on_one_thread(async {
        let queue = start_empty(Store::file(&path).await.expect("the file")).await;
        for n in 0..1000 {
            queue.put(&numbered(n));
        }
        assert!(refused_while_open(&path).await.contains("another process uses this file"));
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
    });
    let whole = std::fs::read(&path).expect("the file");
    let mut set_aside = 0;
    let halves = [(9, 320), (64, 512), (9, whole.len() / 2), (whole.len() / 2, whole.len())];
    let bytes = (0..40).map(|n| 9 + n * (whole.len() - 10) / 40).map(|at| (at, at + 1));
    for (from, to) in halves.into_iter().chain(bytes) {
        let mut damaged = whole.clone();
        damaged[from..to].iter_mut().for_each(|byte| *byte ^= 0xa5);
        std::fs::write(&path, &damaged).expect("the file");
        let found = on_one_thread(async {
            let store = Store::file(&path).await.unwrap_or_else(|error| panic!("{from}..{to}: {error}"));
            // Where the damage is found while it is read, what was read is used, and the rest is set aside.
            let found = match load(&store).await {
                Ok(found) => found,
                Err(_) => load(&store).await.unwrap_or_else(|error| panic!("{from}..{to}: {error}")),
            };
            // It is used from then on.
            let (queue, _) = start(store).await;
            queue.put(&numbered(5000));
            assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0, "{from}..{to}");
            found
        });
        assert!(found <= 1001, "{from}..{to}: {found}");
        for entry in std::fs::read_dir(path.parent().expect("a directory")).expect("the directory") {
            let entry = entry.expect("a file");
            if entry.file_name().to_string_lossy().starts_with("damaged.damaged-") {
                assert!(entry.metadata().expect("the file").len() > 0, "{from}..{to}");
                std::fs::remove_file(entry.path()).expect("a file");
                set_aside += 1;
            }
        }
    }
    eprintln!("44 damages: the file was set aside {set_aside} times");
    assert!(set_aside > 3);
}

async fn refused_while_open(path: &Path) -> String {
    match Store::file(path).await {
        Err(error) => error.to_string(),
        Ok(_) => panic!("two have the same file"),
    }
}

#[test]
fn what_a_file_has_acknowledged_survives_kill_9() {
    let directory = Directory::new();
    let path = directory.path("jobs");
    on_one_thread(async {
        let queue = start_empty(Store::file(&path).await.expect("the file")).await;
        for n in 0..100 {
            assert!(queue.put_and_tell(&numbered(n)).within(TIMEOUT).await);
        }
        // What another process would find if this one were killed now.
        let copy = directory.path("copy");
        std::fs::copy(&path, &copy).expect("a copy");
        let (_, found) = start(Store::file(&copy).await.expect("the copy")).await;
        assert_eq!(found, by_field((0..100).map(numbered)));
    });
}

#[test]
fn a_disk_may_be_full_for_a_while() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.0.path("jobs");
    on_one_thread(async {
        let queue = start_empty(Store::file(&path).await.expect("the file")).await;
        assert!(queue.put_and_tell(&numbered(0)).within(TIMEOUT).await);
        let filler = disk.0.path("filler");
        let mut file = std::fs::File::create(&filler).expect("a file");
        while file.write_all(&[0; 4096]).is_ok() {}
        for n in 0..5000 {
            queue.put(&numbered(n));
        }
        assert!(
            !queue.put_and_tell(&numbered(5000)).within(Duration::from_secs(1)).await,
            "the disk is full"
        );
        // What was there is still there.
        let copy = Directory::new();
        std::fs::copy(&path, copy.path("jobs")).expect("a copy");
        let (_, found) = start(Store::file(&copy.path("jobs")).await.expect("the copy")).await;
        assert!(found.values().any(|job| *job == numbered(0)));
        drop(file);
        std::fs::remove_file(filler).expect("room");
        assert!(queue.put_and_tell(&numbered(5001)).within(TIMEOUT).await);
        assert_eq!(queue.stop(Instant::now() + TIMEOUT).await, 0);
        let (_, found) = start(Store::file(&path).await.expect("the file")).await;
        assert_eq!(found, by_field((0..=5001).map(numbered)));
    });
}

// Helpers.

fn on_one_thread<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { timeout(Duration::from_secs(120), work).await.expect("an end in time") })
}

fn redis(url: &str) -> Store {
    redis_as(url, 0, None, None)
}

fn redis_as(url: &str, database: u32, username: Option<&str>, password: Option<&str>) -> Store {
    let settings = Redis {
        url: url.parse().expect("a URL"),
        database,
        username: username.map(str::to_owned),
        password: password.map(Secret::new),
    };
    Store::redis(settings, Arc::new(Tls::new(false, Given::default())), Arc::new(Dns::new(&[])))
}

/// Starts and reads everything.
async fn start(store: Store) -> (Jobs, BTreeMap<String, JobRecord<'static>>) {
    let (jobs, mut stored) = Jobs::start(store);
    let (found, _) = reading(&mut stored).await;
    (jobs, found)
}

/// Everything until the end of a reading.
async fn reading(stored: &mut StoredJobs) -> (BTreeMap<String, JobRecord<'static>>, Option<Seen>) {
    let mut found = BTreeMap::new();
    loop {
        match timeout(TIMEOUT, stored.next()).await.expect("records in time").expect("an end") {
            Stored::Record(job) | Stored::Newer(job) => found.insert(job.field(), *job),
            Stored::End(seen) => return (found, seen),
        };
    }
}

async fn start_empty(store: Store) -> Jobs {
    let (queue, found) = start(store).await;
    assert_eq!(found, BTreeMap::new());
    queue
}

/// Reads everything, and counts.
async fn load(store: &Store) -> Result<usize, StoreError> {
    let (sender, mut parts) = tokio::sync::mpsc::channel(1);
    let counting = async {
        let mut found = 0;
        while let Some(part) = parts.recv().await {
            found += usize::from(matches!(part, Part::Record(_)));
        }
        found
    };
    let loading = async {
        let sender = sender;
        store.load(&sender).await
    };
    let (outcome, found) = tokio::join!(loading, counting);
    outcome.map(|_| found)
}

fn by_field(jobs: impl IntoIterator<Item = JobRecord<'static>>) -> BTreeMap<String, JobRecord<'static>> {
    jobs.into_iter().map(|job| (job.field(), job)).collect()
}

fn token(room: &str, identity: &str, expires_at: i64) -> StoredToken<'static> {
    StoredToken {
        room: room.to_owned().into(),
        identity: identity.to_owned().into(),
        room_id: "!r:example.org".into(),
        user_id: "@a:example.org".into(),
        expires_at,
        last_seen: None,
        member: true,
        left: false,
    }
}

fn job(room: &str, identity: &str) -> JobRecord<'static> {
    JobRecord {
        room: room.to_owned().into(),
        identity: identity.to_owned().into(),
        delay_id: format!("syd_{identity}").into(),
        delay_ms: 8000,
        homeserver: "example.org".into(),
        restarted_at_ms: 4_940_000_000_123,
        user: "@a:example.org".into(),
        sid: Some("PA_Pt7njTzCJd84".into()),
        room_sid: Some("RM_fVRDLoGhLVAK".into()),
        seen: true,
        replaces: vec![Replaced {
            delay_id: "syd_0".into(),
            until_ms: 4_940_000_008_000,
        }],
        ..JobRecord::default()
    }
}

fn numbered(n: i64) -> JobRecord<'static> {
    job(&format!("<room {}>", n % 100), &format!("@user{n}:example.org:DEVICE"))
}

fn restarted(mut job: JobRecord<'static>, times: i64) -> JobRecord<'static> {
    job.restarted_at_ms += times * 4000;
    job
}

/// Which commands the server was ever asked, but for those of this test.
fn commands(server: &RedisServer) -> Vec<String> {
    let statistics = server.ask(&["INFO", "commandstats"]);
    let mut commands: Vec<_> = statistics
        .lines()
        .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(':'))
        .map(|(command, _)| command.to_owned())
        .filter(|command| command != "info")
        .collect();
    commands.sort();
    commands
}

/// A port that speaks TLS and passes everything on.
fn tls_in_front_of(server: SocketAddr, authority: &Ca) -> SocketAddr {
    let listener = TcpListener::bind((unique_loopback(), 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("a listener");
    let acceptor = tokio_rustls::TlsAcceptor::from(authority.server(&[address.ip().to_string()]));
    crate::support::runtime().spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut client = acceptor.accept(stream).await.ok()?;
                let mut server = tokio::net::TcpStream::connect(server).await.ok()?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await.ok()
            });
        }
    });
    address
}

/// A file system of 8 MiB, where one may be mounted.
struct SmallDisk(Directory);

impl SmallDisk {
    fn new() -> Option<Self> {
        let disk = Self(Directory::new());
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
            .arg(&disk.0.0)
            .output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(disk);
        }
        assert!(!nothing_may_be_left_out(), "no file system may be mounted here");
        eprintln!("left out: a_disk_may_be_full_for_a_while, since no file system may be mounted here");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0.0).output();
    }
}

/// Removed when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("state-{}-{}", std::process::id(), unique()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
