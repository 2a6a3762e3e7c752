use super::*;

fn stored() -> StoredJobs {
    Jobs::start(Store::memory()).1
}

fn record(restarted_at_ms: i64) -> JobRecord<'static> {
    JobRecord {
        room: "r".into(),
        identity: "i".into(),
        delay_id: format!("syd_{restarted_at_ms}").into(),
        delay_ms: 8000,
        restarted_at_ms,
        ..JobRecord::default()
    }
}

fn read(stored: &mut StoredJobs, field: &str, value: &str) -> Option<Stored> {
    let (job, value) = JobRecord::read_with(field.as_bytes(), value.as_bytes()).unwrap();
    stored.take(job, field, value)
}

#[tokio::test]
async fn a_store_that_keeps_nothing_ends_its_reading_at_once() {
    let mut stored = stored();
    assert!(matches!(stored.next().await, Some(Stored::End(None))));
    assert!(stored.next().await.is_none());
}

#[tokio::test]
async fn a_field_that_comes_twice_is_no_second_field() {
    let (mut stored, now) = (stored(), unix_millis());
    let (ours, theirs) = (r#"["r","i"]"#, r#"["r", "i"]"#);
    assert!(matches!(read(&mut stored, ours, &record(now).value()), Some(Stored::Record(_))));
    // A reading may bring a record twice.
    assert!(read(&mut stored, ours, &record(now + 5).value()).is_none());
    // The other spelling counts where it is the newer one, once.
    assert!(read(&mut stored, theirs, &record(now).value()).is_none());
    let newer = read(&mut stored, theirs, &record(now + 9).value());
    assert!(matches!(newer, Some(Stored::Newer(job)) if *job == record(now + 9)));
    assert!(read(&mut stored, theirs, &record(now + 9).value()).is_none());
}

#[tokio::test]
async fn what_others_have_in_their_records_is_kept_within_a_bound_and_no_longer_than_it_has_to_be() {
    let (mut stored, now) = (stored(), unix_millis());
    let filler = format!("{{\"filler\":\"{}\",", "x".repeat(9300));
    for n in 0..10_000 {
        let job = JobRecord {
            identity: format!("i{n}").into(),
            ..record(now)
        };
        assert!(read(&mut stored, &job.field(), &job.value().replacen('{', &filler, 1)).is_some());
    }
    let foreign = stored.jobs.foreign.lock();
    assert!((1000..4000).contains(&foreign.known.len()) && foreign.bytes <= MAX_FOREIGN_BYTES);
    drop(foreign);
    for n in 0..10_000 {
        stored.jobs.foreign.lock().take(&field("r", &format!("i{n}")));
    }
    assert_eq!(stored.jobs.foreign.lock().bytes, 0);

    // More digits of a time count as long as the time does.
    let value = record(now).value().replace("Z\"", "0001Z\"");
    assert!(read(&mut stored, &record(now).field(), &value).is_some());
    assert_eq!(stored.jobs.written(&record(now)).1, value);
    assert_eq!(stored.jobs.written(&record(now + 4000)).1, record(now + 4000).value());
    assert!(stored.jobs.foreign.lock().known.is_empty());
}

#[tokio::test(start_paused = true)]
async fn jobs_are_put_again_within_ten_seconds_however_many_there_are() {
    for jobs in [1_usize, 51, 100_000] {
        let (mut seen, began) = (Seen::default(), Instant::now());
        for _ in 0..jobs {
            seen.spread(jobs).await;
        }
        assert!(began.elapsed() <= SPREAD_OVER, "{jobs}: {:?}", began.elapsed());
        assert!(jobs == 1 || began.elapsed() > SPREAD_OVER * 9 / 10, "{jobs}: {:?}", began.elapsed());
    }
}
