//! Many at once: of one call, of one homeserver, of strangers. What they need is carried in the order of what would be lost.

use std::path::Path;
use std::time::{Duration, Instant};

use lk_jwt_service::internals::store::{JobRecord, Jobs, Store, Stored};
use serde_json::json;

use super::{AT_ONCE, Timers, guests, join, leaves, pass, seconds, send_webhooks, told_left};
use crate::support::bodies::delegate_of;
use crate::support::bucket::Bucket;
use crate::support::client::Call;
use crate::support::client_api::{ClientApi, Managed, done};
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::Reply;
use crate::support::process::directory;
use crate::support::scene::Scene;
use crate::support::service::Setup;
use crate::support::sfu::Fault;
use crate::support::{lateness, runtime, unique, unique_loopback, unique_room, wait_until, webhook};

/// With many at once, the log of each call is more work than the call.
fn quiet(setup: Setup) -> Setup {
    setup.env("LIVEKIT_LOG_LEVEL", "info")
}

/// What a file holds, of a service that has ended.
fn records(state: &str) -> Vec<JobRecord<'static>> {
    runtime().block_on(async {
        let (_jobs, mut stored) = Jobs::start(Store::file(Path::new(state)).await.expect("the file"));
        let mut records = Vec::new();
        while let Some(Stored::Record(job) | Stored::Newer(job)) = stored.next().await {
            records.push(*job);
        }
        records
    })
}

/// All resumes fail at once and everybody is back before the webhooks arrive; the SFU needs 100 ms for an answer, and tells of the
/// new sessions four seconds late. Two to a room, so that no list asks for all of them.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn a_mass_reconnect_reports_nobody() {
    let scene = Scene::with(quiet);
    let guests = guests(&scene, 1_500, 2, seconds(120));
    let sessions = join(&scene, &guests);
    scene.sfu.fail(Some(Fault::Slow(Duration::from_millis(100))));
    let back: Vec<_> = guests.iter().map(|guest| scene.sfu.join(&guest.alias, &guest.identity)).collect();
    let told_at = Instant::now();
    told_left(&scene, &sessions);
    eprintln!("{} webhooks took {:.1?}", guests.len(), told_at.elapsed());
    pass(told_at, seconds(4));
    send_webhooks(&scene, &back.iter().map(webhook::joined).collect::<Vec<_>>());
    pass(told_at, seconds(8));
    eprintln!("mass reconnect: {} of {} reported gone", scene.api.sends(), guests.len());
    assert_eq!(scene.api.sends(), 0);
    leaves(&scene, &guests[0], &back[0]);
}

/// A large call ends, and each send takes a second: those who stay in another room keep their events. 700 of the field's 3,000, and
/// eight seconds of delay in place of fifteen: the sends need about fifteen seconds, as many places as they get.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn the_leaves_of_a_large_call_cost_nobody_in_another_room() {
    let delay = seconds(8);
    let scene = Scene::with(quiet);
    let timers = Timers::default();
    let slow_sends = |call: &Managed, _| match call.what.as_str() {
        "send" => done().after(seconds(1)),
        _ => done(),
    };
    timers.answer(&scene.api, slow_sends);
    let leaving = guests(&scene, 700, 350, seconds(600));
    let sessions = join(&scene, &leaving);
    let began = Instant::now();
    let staying = guests(&scene, 20, 20, delay);
    join(&scene, &staying);
    for guest in &leaving {
        scene.sfu.leave(&guest.alias, &guest.identity);
    }
    let left_at = Instant::now();
    told_left(&scene, &sessions);
    wait_until("all leaves", seconds(60), || scene.api.sends() >= leaving.len());
    pass(left_at, delay + seconds(4));
    let gone = timers.gone(&scene.api, staying.iter().map(|guest| &guest.delay_id), began, delay);
    eprintln!(
        "{} leaves in {:.1?}: {gone} of {} who stay gone",
        leaving.len(),
        left_at.elapsed(),
        staying.len()
    );
    assert_eq!(gone, 0);
    assert_eq!(scene.api.sends(), leaving.len());
}

/// SIGTERM: each connected job is restarted once more within the ten seconds, and its record is written. 2,000 of the field's
/// 100,000.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn at_the_end_every_job_of_many_is_restarted_once_more() {
    let directory = directory("crowd");
    let state = directory.join("state").to_string_lossy().into_owned();
    let scene = Scene::with(|setup| quiet(setup).env("LIVEKIT_STATE_PATH", &state));
    let guests = guests(&scene, 2_000, 50, seconds(3_600));
    join(&scene, &guests);
    // A restart under way would be the last one.
    pass(Instant::now(), seconds(1));
    let before = scene.api.restarts();
    let (at, stopped_at_ms) = (Instant::now(), webhook::now_ms());
    scene.service.signal("TERM");
    let status = scene.service.wait_exit(seconds(20));
    let took = at.elapsed();
    let again = scene.api.restarts() - before;
    eprintln!("SIGTERM: {again} of {} restarted once more, ended after {took:.1?}", guests.len());
    assert_eq!(status.code(), Some(0));
    assert_eq!(again, guests.len());
    assert!(took < seconds(10) + lateness::since(at), "{took:?}");
    let written = records(&state).iter().filter(|job| job.restarted_at_ms >= stopped_at_ms).count();
    assert_eq!(written, guests.len(), "records that tell of the last restart");
}

/// As Synapse limits an address: one restart a second after a burst of five. Somebody who is never on the SFU delegates ten a
/// second; ten others, on delays of eighteen seconds, lose nothing. Thirty seconds of the field's fifty.
#[test]
fn somebody_who_delegates_ten_a_second_costs_nobody_else_the_event() {
    let delay = seconds(18);
    let scene = Scene::new();
    let bucket = Bucket::new(1.0, 5.0);
    let timers = Timers::default();
    timers.answer(&scene.api, move |_, _| bucket.refuses().unwrap_or_else(done));
    let began = Instant::now();
    let honest = guests(&scene, 10, 10, delay);
    let events: Vec<_> = honest
        .iter()
        .map(|guest| webhook::joined(&scene.sfu.join(&guest.alias, &guest.identity)))
        .collect();
    send_webhooks(&scene, &events);
    let (mut taken, mut asked) = (0, 0);
    while began.elapsed() < seconds(30) {
        let body = delegate_of(&scene.home, "mallory", &unique_room(), &format!("syd_{}", unique()), 18_000);
        let answer = scene.service.post("/delegate_delayed_leave", &body);
        taken += usize::from(answer.status == 200);
        asked += 1;
        pass(began, Duration::from_millis(100) * asked);
    }
    let gone = timers.gone(&scene.api, honest.iter().map(|guest| &guest.delay_id), began, delay);
    let longest = honest.iter().map(|guest| timers.longest(&guest.delay_id, began)).max();
    eprintln!(
        "{taken} of {asked} delegations of one user taken: {gone} of {} others gone, {:.1?} of 18 s at most",
        honest.len(),
        longest.unwrap_or_default()
    );
    assert_eq!(gone, 0);
}

/// People who never come are asked about with pauses that grow, while webhooks work. 500 of the field's 10,000: in the first
/// seconds each is asked about a few times; what is shown is that it gets less.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn people_who_never_come_are_asked_about_less_and_less() {
    let scene = Scene::with(|setup| quiet(setup).env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1"));
    // One webhook, so that they are known to work.
    let witness = guests(&scene, 1, 1, seconds(600));
    join(&scene, &witness);
    let never = guests(&scene, 500, 1, seconds(3_600));
    let delegated = Instant::now();
    let asked = || {
        scene
            .sfu
            .http
            .count(|r| r.path.ends_with("/GetParticipant") || r.path.ends_with("/ListParticipants"))
    };
    let mut counts = vec![asked()];
    for n in 1..=5 {
        pass(delegated, seconds(4) * n);
        counts.push(asked());
    }
    let rates: Vec<_> = counts.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 4.0).collect();
    eprintln!("{} who never come: {rates:?} questions a second", never.len());
    // In the last four of twenty seconds.
    assert!(rates[4] < never.len() as f64 / 6.0, "{rates:?}");
    assert_eq!(scene.api.sends(), 0);
}

/// Many made-up homeserver names of one machine, whose calls are held for 9.9 s of their delays of ten: they keep nobody's call from
/// being made, neither before a restart of the service nor after it. 60 of the field's 600 names, with twenty events each.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn made_up_homeservers_that_hold_their_calls_cost_nobody_the_event() {
    let delay = seconds(10);
    let directory = directory("strangers");
    let state = directory.join("state").to_string_lossy().into_owned();
    let mut setup = None;
    let mut scene = Scene::with(|plain| {
        let stored = quiet(plain)
            .env("LIVEKIT_STATE_PATH", &state)
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*");
        setup = Some(stored.clone());
        stored
    });
    let timers = Timers::default();
    timers.answer(&scene.api, |_, _| done());
    let began = Instant::now();
    let honest = guests(&scene, 20, 20, delay);
    join(&scene, &honest);

    let (machine, held) = (unique_loopback(), ClientApi::start());
    held.answer(|_, _| done().after(Duration::from_millis(9_900)));
    let strangers: Vec<_> = (0..60).map(|_| Homeserver::builder().at(machine, 0).start()).collect();
    let file = json!({"m.homeserver": {"base_url": held.url()}});
    strangers
        .iter()
        .for_each(|far| far.answer_client_well_known(Reply::json(200, &file)));
    let mut taken = 0;
    for n in 0..20 {
        let calls: Vec<_> = strangers
            .iter()
            .map(|far| {
                let body = delegate_of(far, &format!("user{n}"), &unique_room(), &format!("syd_{}", unique()), 10_000);
                Call::json("/delegate_delayed_leave", &body)
            })
            .collect();
        let answers = scene.service.flood(&calls, AT_ONCE);
        taken += answers.iter().filter(|answer| answer.status == 200).count();
    }
    eprintln!(
        "{taken} delegations of strangers within {:.1?}, {} calls held",
        began.elapsed(),
        held.http.busy()
    );
    assert!(taken >= 600, "{taken}");
    let told = Instant::now();
    pass(told, seconds(12));
    let busiest = held.http.most_at_once();
    let before = timers.gone(&scene.api, honest.iter().map(|guest| &guest.delay_id), began, delay);

    scene.service.signal("KILL");
    scene.service.wait_exit(seconds(10));
    scene.service = setup.expect("just set").start();
    let started = Instant::now();
    pass(started, seconds(11));
    let after = timers.gone(&scene.api, honest.iter().map(|guest| &guest.delay_id), began, delay);
    eprintln!(
        "strangers: {before} of {} gone, {after} after a restart; {busiest} calls held at a time before it, {} in all",
        honest.len(),
        held.http.most_at_once()
    );
    assert_eq!((before, after), (0, 0));
    let newcomer = guests(&scene, 1, 1, delay);
    join(&scene, &newcomer);
}

/// As many events of people who never came as are kept, of one homeserver: a listed homeserver's user is taken all the same, and one
/// of the others gives way.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn those_who_never_came_refuse_nobody() {
    const KEPT: usize = 20_000;
    let directory = directory("never");
    let state = directory.join("state");
    let restarted_at_ms = webhook::now_ms();
    runtime().block_on(async {
        let (jobs, mut stored) = Jobs::start(Store::file(&state).await.expect("a file"));
        while !matches!(stored.next().await, Some(Stored::End(_)) | None) {}
        for n in 0..KEPT {
            jobs.put(&JobRecord {
                room: format!("room{n}").into(),
                identity: format!("identity{n}").into(),
                delay_id: format!("syd_never{n}").into(),
                delay_ms: 86_400_000,
                homeserver: "strangers.example.org".into(),
                user: format!("@user{}:strangers.example.org", n / 50).into(),
                restarted_at_ms,
                ..JobRecord::default()
            });
        }
        assert_eq!(jobs.stop(tokio::time::Instant::now() + seconds(20)).await, 0);
    });
    let scene = Scene::with(|setup| quiet(setup).env("LIVEKIT_STATE_PATH", &state.to_string_lossy()));
    scene.service.wait_event("leaves_restored");
    let before = Instant::now();
    let newcomers = guests(&scene, 5, 5, seconds(60));
    join(&scene, &newcomers);
    eprintln!("{KEPT} who never came: 5 of 5 newcomers taken within {:.1?}", before.elapsed());
    scene.service.signal("TERM");
    scene.service.wait_exit(seconds(30));
    let left = records(&state.to_string_lossy());
    let left = left.iter().filter(|job| job.homeserver == "strangers.example.org").count();
    assert!(left < KEPT, "nobody gave way: {left}");
}
