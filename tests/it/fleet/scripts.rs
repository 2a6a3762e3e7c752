//! The scripts on a real Redis beside the model, with random inputs; and what only a real Redis can show.

use std::sync::Arc;
use std::time::Duration;

use lk_jwt_service::config::Redis;
use lk_jwt_service::internals::dns::Dns;
use lk_jwt_service::internals::fleet::{Entry, NodeId, NodeState, Position, Watch};
use lk_jwt_service::internals::store::{Handed, JobRecord, Jobs, Message, News, SharedStore, Store, Stored};
use lk_jwt_service::internals::tls::{Given, Tls};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::{Instant, timeout};

use super::model::{Model, outcome};
use crate::support::redis::RedisServer;

const TIMEOUT: Duration = Duration::from_secs(20);
const ROUNDS: usize = 400;

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { timeout(TIMEOUT * 4, work).await.expect("an end in time") })
}

fn shared(server: &RedisServer) -> (Store, SharedStore) {
    let settings = Redis {
        url: format!("redis://{}", server.address()).parse().expect("a URL"),
        database: 0,
        username: None,
        password: None,
    };
    let mut store = Store::redis(settings, Arc::new(Tls::new(false, Given::default())), Arc::new(Dns::new(&[])));
    let shared = store.share().expect("Redis");
    (store, shared)
}

fn entry(rng: &mut StdRng) -> Entry {
    Entry {
        counter: rng.random_range(0..1000),
        state: [NodeState::Up, NodeState::Waiting, NodeState::Leaving][rng.random_range(0..3)],
        watching: rng.random(),
        since_ms: rng.random_range(0..1_000_000),
        protocol: 1,
        fingerprint: rng.random(),
        shortest_ms: rng.random::<bool>().then(|| rng.random()),
        sfu: rng.random(),
        lacks: ["", "hs.example"][rng.random_range(0..2)].into(),
        reaches: ["", "hs.example"][rng.random_range(0..2)].into(),
        dealt: Position {
            millis: rng.random_range(0..1_000),
            number: rng.random_range(0..10),
        },
        host: "a \"host\"\u{7}".into(),
    }
}

fn record(rng: &mut StdRng, now_ms: i64) -> JobRecord<'static> {
    let at = now_ms + [-10_000, -400, -200, 0, 60_000][rng.random_range(0..5)];
    JobRecord {
        room: format!("room{}", rng.random_range(0..3)).into(),
        identity: "id \"<&".into(),
        delay_id: format!("syd{}", rng.random_range(0..4)).into(),
        delay_ms: 18_000,
        homeserver: "hs.example".into(),
        restarted_at_ms: at,
        user: if rng.random_range(0..10) == 0 {
            "@bob:hs.example"
        } else {
            "@alice:hs.example"
        }
        .into(),
        delegated_at_ms: Some(at),
        ..JobRecord::default()
    }
}

#[test]
fn scripts_do_what_the_model_does() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let (store, shared) = shared(&server);
    run(async {
        let (jobs, _stored) = Jobs::start(store);
        let mut rng = StdRng::seed_from_u64(17);
        let mut model = Model::default();
        let ids = [NodeId(1), NodeId(2), NodeId(u64::MAX)];
        let watches: Vec<_> = ids
            .iter()
            .flat_map(|&node| (1..4).map(move |epoch| Watch { node, epoch }))
            .collect();
        let names = ["user:a".to_owned(), "homeserver:hs.example".to_owned()];
        let mut told = 0;
        for round in 0..ROUNDS {
            let any = watches[rng.random_range(0..watches.len())];
            let likely = if rng.random() { model.watch.unwrap_or(any) } else { any };
            match rng.random_range(0..7) {
                0 | 1 => {
                    let (node, entry) = (ids[rng.random_range(0..3)], entry(&mut rng));
                    let own = rng.random::<bool>().then_some(likely);
                    let remove: Vec<_> = ids
                        .iter()
                        .copied()
                        .filter(|id| *id != node && rng.random_range(0..8) == 0)
                        .collect();
                    // One that is there, or none.
                    let place = rng.random_range(0..=model.messages.len());
                    let trim = match (model.messages.get(place), rng.random_range(0..4)) {
                        (Some(message), 0) => message.at,
                        (_, 1) => Position {
                            millis: 9_000_000_000_000,
                            number: 7,
                        },
                        (_, _) => Position::FIRST,
                    };
                    let answer = shared.shared.beat(node, &entry, own, trim, &remove).await.expect("an answer");
                    model.now_ms = answer.redis_ms;
                    let mut expected = model.beat(node, &entry, own, trim, &remove);
                    let mut found = answer;
                    found.entries.sort_by_key(|(id, _)| *id);
                    expected.entries.sort_by_key(|(id, _)| *id);
                    assert_eq!(found, expected, "round {round}");
                }
                2 => {
                    let seen = rng.random::<bool>().then_some(likely);
                    // Twice: it may be run again without harm.
                    for _ in 0..2 {
                        let found = shared.shared.change(seen, any).await.expect("an answer");
                        assert_eq!(found, model.change(seen, any), "round {round}");
                    }
                }
                3 => {
                    shared.fence.set(Some(likely));
                    let record = record(&mut rng, model.now_ms);
                    assert!(jobs.put_and_tell(&record).within(TIMEOUT).await);
                    model.put(likely, &record);
                }
                4 => {
                    shared.fence.set(Some(likely));
                    let record = record(&mut rng, model.now_ms);
                    jobs.remove(&record.room, &record.identity);
                    while jobs.waiting() > 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    model.remove(likely, &record.field());
                }
                5 => {
                    let full: Vec<_> = names.iter().filter(|_| rng.random_range(0..3) == 0).cloned().collect();
                    shared.shared.bound(likely, &full).await.expect("an answer");
                    model.bound(likely, &full);
                }
                _ => {
                    let record = record(&mut rng, model.now_ms);
                    let handed = shared
                        .shared
                        .delegate(&record, &names, Instant::now() + TIMEOUT)
                        .await
                        .expect("an answer");
                    // Redis's clock goes on meanwhile; only a time that lies far in the future counts as one.
                    let expected = model.delegate(&record, &names);
                    assert_eq!(outcome(handed), expected, "round {round}: {record:?}");
                    if let Handed::Done(at) = handed {
                        told += 1;
                        model.messages.push(Message { at, news: News::Other });
                    }
                }
            }
            assert_eq!(
                server.ask(&["HLEN", "lk-jwt:jobs"]),
                format!(":{}\r\n", model.jobs.len()),
                "round {round}"
            );
            for (field, value) in &model.jobs {
                assert_eq!(server.hget(field).as_ref(), Some(value), "round {round}");
            }
            let length = server.ask(&["XLEN", "{lk-jwt:jobs}:in"]);
            assert_eq!(length, format!(":{}\r\n", model.messages.len()), "round {round}");
        }
        assert!(told > 20, "too few delegations to show anything: {told}");
        eprintln!("{ROUNDS} random steps as in the model, {told} delegations among them");
    });
}

#[test]
fn readers_get_all_messages_once_and_all_again_after_a_reconnection() {
    let Some(mut server) = RedisServer::start(&[]) else { return };
    let (_, shared) = shared(&server);
    run(async {
        let reader = &shared.shared;
        assert_eq!(reader.read(Duration::from_millis(50)).await.expect("an answer").1, []);
        for n in 0..600 {
            assert!(reader.tell_webhook(NodeId(7), &format!("{{\"n\":{n}}}")).await.expect("an answer"));
        }
        let mut all = Vec::new();
        while all.len() < 600 {
            all.extend(reader.read(Duration::from_millis(50)).await.expect("an answer").1);
        }
        let texts: Vec<_> = all.iter().map(|message| message.news.clone()).collect();
        let expected: Vec<_> = (0..600)
            .map(|n| News::Webhook(NodeId(7), format!("{{\"n\":{n}}}").into_bytes().into()))
            .collect();
        assert_eq!(texts, expected);
        assert_eq!(reader.read(Duration::from_millis(50)).await.expect("an answer").1, []);
        server.kill();
        assert!(reader.read(Duration::from_millis(50)).await.is_err());
        server.start_again();
        let mut again = reader.read(Duration::from_millis(50)).await.expect("an answer").1;
        while again.len() < 600 {
            again.extend(reader.read(Duration::from_millis(50)).await.expect("an answer").1);
        }
        assert_eq!(again, all);
    });
}

/// By other hands: a watcher that nobody is must not keep all from watching.
#[test]
fn what_is_no_watch_is_written_over() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let (_store, shared) = shared(&server);
    run(async {
        let mut rng = StdRng::seed_from_u64(1);
        let own = Watch {
            node: NodeId(0xab),
            epoch: 1,
        };
        for text in [
            "somebody",
            " ",
            "00000000000000ab",
            "00000000000000ab 0",
            "00000000000000ab 01",
            "00000000000000ab +1",
            "00000000000000AB 1",
            "0000000000000ab 1",
            "00000000000000ab 1 ",
            "00000000000000ab 1\n",
            "00000000000000ab 1000000000000000",
            "00000000000000ab 18446744073709551615",
        ] {
            server.ask(&["SET", "{lk-jwt:jobs}:watcher", text]);
            let beat = shared.shared.beat(NodeId(2), &entry(&mut rng), None, Position::FIRST, &[]).await;
            assert_eq!(beat.expect("an answer").watch, None, "{text:?}");
            assert_eq!(shared.shared.change(None, own).await.expect("an answer"), Some(own), "{text:?}");
        }
        let last = Watch {
            node: NodeId(2),
            epoch: 999_999_999_999_999,
        };
        server.ask(&["SET", "{lk-jwt:jobs}:watcher", &last.to_string()]);
        assert_eq!(shared.shared.change(None, own).await.expect("an answer"), Some(last));
        assert_eq!(shared.shared.change(Some(last), own).await.expect("an answer"), Some(own));
    });
}

#[test]
fn a_full_redis_changes_its_watcher_and_gets_emptier() {
    let Some(server) = RedisServer::start(&["--maxmemory", "6mb", "--maxmemory-policy", "noeviction"]) else {
        return;
    };
    let (store, shared) = shared(&server);
    run(async {
        let mut rng = StdRng::seed_from_u64(1);
        let watch = Watch { node: NodeId(1), epoch: 1 };
        assert_eq!(shared.shared.change(None, watch).await.expect("an answer"), Some(watch));
        shared.fence.set(Some(watch));
        let (jobs, _stored) = Jobs::start(store);
        let kept = record(&mut rng, 0);
        assert!(jobs.put_and_tell(&kept).within(TIMEOUT).await);
        let filler = "x".repeat(100_000);
        for n in 0..200 {
            if server.ask(&["SET", &format!("filler{n}"), &filler]).starts_with("-OOM") {
                break;
            }
        }
        assert!(server.ask(&["SET", "one-more", &filler]).starts_with("-OOM"), "Redis is not full");
        let entry = entry(&mut rng);
        let beat = shared.shared.beat(NodeId(2), &entry, None, Position::FIRST, &[]).await;
        assert_eq!(beat.expect("a full Redis takes beats").watch, Some(watch));
        let next = Watch { node: NodeId(2), epoch: 2 };
        assert_eq!(
            shared
                .shared
                .change(Some(watch), next)
                .await
                .expect("a full Redis changes its watcher"),
            Some(next)
        );
        shared.fence.set(Some(next));
        jobs.remove(&kept.room, &kept.identity);
        while jobs.waiting() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(server.ask(&["HLEN", "lk-jwt:jobs"]), ":0\r\n");
    });
}

#[test]
fn the_table_is_read_when_that_is_asked_for_and_never_else() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let (store, _shared) = shared(&server);
    run(async {
        let mut rng = StdRng::seed_from_u64(3);
        let job = record(&mut rng, lk_now());
        server.hset(&job.field(), &job.value());
        let (jobs, mut stored) = Jobs::start(store);
        assert!(
            timeout(Duration::from_millis(300), stored.next()).await.is_err(),
            "read without being asked"
        );
        for _ in 0..2 {
            jobs.read_now();
            assert!(matches!(stored.next().await, Some(Stored::Record(found)) if *found == job));
            assert!(matches!(stored.next().await, Some(Stored::End(Some(_)))));
        }
    });
}

fn lk_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
    i64::try_from(now.as_millis()).expect("a moment")
}

#[test]
fn a_missing_right_is_named() {
    let rights = [
        "time", "hset", "hget", "hdel", "hgetall", "hlen", "hscan", "get", "set", "xadd", "xlen", "xread", "xrange", "xtrim", "eval",
        "evalsha",
    ];
    let Some(server) = RedisServer::start(&[]) else { return };
    let all = rights.map(|right| format!("+{right}"));
    run(async {
        for missing in [None].into_iter().chain(rights.map(Some)) {
            server.ask(&["ACL", "DELUSER", "lk"]);
            let mut command = vec!["ACL", "SETUSER", "lk", "on", ">secret", "~lk-jwt:*", "~{lk-jwt:jobs}:*", "+ping"];
            command.extend(
                all.iter()
                    .map(String::as_str)
                    .filter(|right| missing.is_none_or(|missing| right[1..] != *missing)),
            );
            assert_eq!(server.ask(&command), "+OK\r\n");
            let settings = Redis {
                url: format!("redis://{}", server.address()).parse().expect("a URL"),
                database: 0,
                username: Some("lk".to_owned()),
                password: Some(lk_jwt_service::secret::Secret::new("secret")),
            };
            let mut store = Store::redis(settings, Arc::new(Tls::new(false, Given::default())), Arc::new(Dns::new(&[])));
            let checked = store.share().expect("Redis").shared.check().await;
            match missing {
                None => checked.expect("all rights"),
                Some(missing) => {
                    let error = checked.expect_err(missing).to_string();
                    let named = format!("{} was refused (NOPERM)", missing.to_uppercase());
                    assert!(error.contains(&named), "{missing}: {error}");
                }
            }
        }
    });
}
