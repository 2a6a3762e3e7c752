//! Records that others wrote, or that are out of date: what the store says is trusted no more than a request (case B16).

use std::time::{Duration, SystemTime};

use lk_jwt_service::internals::store::{JobRecord, Jobs, Stored};
use tokio::time::{Instant, timeout};

use super::{TIMEOUT, job, on_one_thread, redis};
use crate::support::redis::RedisServer;

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
    i64::try_from(now.as_millis()).expect("a time")
}

/// What a reading brings, in its order; `true` where it takes the place of the one before.
async fn brought(server: &RedisServer) -> (Jobs, Vec<(JobRecord<'static>, bool)>) {
    let (jobs, mut stored) = Jobs::start(redis(&format!("redis://{}", server.address())));
    let mut found = Vec::new();
    loop {
        match timeout(TIMEOUT, stored.next()).await.expect("in time").expect("an end") {
            Stored::Record(job) => found.push((*job, false)),
            Stored::Newer(job) => found.push((*job, true)),
            Stored::End(_) => return (jobs, found),
        }
    }
}

#[test]
fn what_looks_expired_is_handed_over_and_what_is_over_for_a_day_is_removed() {
    const DAY: i64 = 24 * 3_600_000;
    let Some(server) = RedisServer::start(&[]) else { return };
    let aged = |identity: &str, age_ms: i64, delay_ms: i64| JobRecord {
        restarted_at_ms: now_ms() - age_ms,
        delay_ms,
        ..job("r", identity)
    };
    let records = [
        aged("expired", 3_600_000, 8000),
        aged("just", DAY + 8000 - 60_000, 8000),
        aged("over", DAY + 8000 + 60_000, 8000),
        aged("long", 0, 40 * DAY),
        aged("future", -3_600_000, 8000),
        aged("negative", 0, -5),
    ];
    for record in &records {
        server.hset(&record.field(), &record.value());
    }
    let mut unreadable = vec![job("r", ""), job("", "i")];
    unreadable.extend(["", ".", ".."].map(|delay_id| JobRecord {
        delay_id: delay_id.into(),
        ..job("r", &format!("none{delay_id}"))
    }));
    for record in &unreadable {
        server.hset(&record.field(), &record.value());
    }
    on_one_thread(async {
        let (jobs, found) = brought(&server).await;
        let mut found: Vec<_> = found.into_iter().map(|(job, _)| job).collect();
        found.sort_by(|a, b| a.identity.cmp(&b.identity));
        let mut expected: Vec<_> = records.iter().filter(|job| job.identity != "over").cloned().collect();
        expected.sort_by(|a, b| a.identity.cmp(&b.identity));
        assert_eq!(found, expected);
        assert_eq!(jobs.stop(Instant::now() + TIMEOUT).await, 0);
        assert_eq!(server.hget(&records[2].field()), None, "what is over is removed");
        let left = records.len() - 1 + unreadable.len();
        assert_eq!(
            server.ask(&["HLEN", "lk-jwt:jobs"]),
            format!(":{left}\r\n"),
            "what cannot be read is left"
        );
    });
}

#[test]
fn of_two_fields_for_one_job_the_later_one_counts_and_the_other_one_goes() {
    let later = |n: i64| JobRecord {
        restarted_at_ms: job("r", "i").restarted_at_ms + n * 60_000,
        delay_id: format!("syd_{n}").into(),
        ..job("r", "i")
    };
    let (plain, odd, odder) = (job("r", "i").field(), r#"["r", "i"]"#, r#"[ "r","\u0069" ]"#);
    for (records, ends) in [
        ([(&*plain, 1), (odd, 2), (odder, 3)], false),
        ([(&*plain, 3), (odd, 2), (odder, 1)], false),
        ([(&*plain, 2), (odd, 3), (odder, 1)], true),
    ] {
        let Some(server) = RedisServer::start(&[]) else { return };
        for (field, n) in records {
            server.hset(field, &later(n).value());
        }
        on_one_thread(async {
            let (jobs, found) = brought(&server).await;
            assert_eq!(found.last().map(|(job, _)| job), Some(&later(3)), "{records:?}");
            assert!(!found[0].1 && found[1..].iter().all(|(_, newer)| *newer), "{found:?}");
            let (latest, _) = records.iter().find(|(_, n)| *n == 3).expect("the latest");
            let mut changed = later(3);
            changed.restarted_at_ms += 1;
            if ends {
                jobs.remove("r", "i");
            } else {
                jobs.put(&changed);
            }
            assert_eq!(jobs.stop(Instant::now() + TIMEOUT).await, 0);
            assert_eq!(server.hget(latest), (!ends).then(|| changed.value()), "{records:?}");
            let left = usize::from(!ends);
            assert_eq!(server.ask(&["HLEN", "lk-jwt:jobs"]), format!(":{left}\r\n"), "{records:?}");
        });
    }
}

#[test]
fn an_older_spelling_of_a_job_that_changed_here_meanwhile_is_removed() {
    let Some(mut server) = RedisServer::start(&[]) else { return };
    let odd = r#"["r", "i"]"#;
    server.hset(odd, &job("r", "i").value());
    server.kill();
    on_one_thread(async {
        let (jobs, mut stored) = Jobs::start(redis(&format!("redis://{}", server.address())));
        let mut newer = job("r", "i");
        newer.delay_id = "syd_new".into();
        jobs.put(&newer);
        server.start_again();
        let next = timeout(Duration::from_secs(20), stored.next()).await.expect("in time");
        assert!(matches!(next, Some(Stored::End(_))), "{next:?}");
        assert_eq!(jobs.stop(Instant::now() + TIMEOUT).await, 0);
        assert_eq!(server.hget(odd), None);
        assert_eq!(server.hget(&newer.field()), Some(newer.value()));
    });
}
