//! `/healthz` and `/readyz`: alive from the first moment, whatever the neighbours do.

use std::time::{Duration, Instant};

use crate::support::bodies;
use crate::support::client::Call;
use crate::support::neighbour::Greeting;
use crate::support::service::{Service, Setup, free_address};
use crate::support::sfu::Sfu;
use crate::support::world::World;
use crate::support::{unique_room, wait_until};

const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn both_answer_get_and_head_while_every_neighbour_is_down() {
    let world = World::new();
    world.sfu.http.refuse();
    world.home.http.greet(Greeting::Silence);
    for path in ["/healthz", "/readyz"] {
        let answer = world.service.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(answer.body.len() <= 1024, "{path}: {}", answer.text());
        let head = world.service.call(&Call::new("HEAD", path));
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    assert_eq!(world.service.get("/healthz").text(), "");
}

#[test]
fn a_service_whose_neighbours_never_existed_is_healthy() {
    let sfu = Sfu::start();
    sfu.http.refuse();
    let began = Instant::now();
    let service = Setup::new(&sfu).start();
    assert!(began.elapsed() < Duration::from_secs(5), "healthy only after {:?}", began.elapsed());
    assert_eq!(service.get("/readyz").status, 200);
}

/// The neighbours are told of, and count where that is asked for.
#[test]
fn readiness_tells_of_the_neighbours_and_counts_them_where_it_is_strict() {
    let world = World::new();
    let up = |service: &Service| service.get("/readyz").json()["neighbours"]["sfu"].clone();
    wait_until("the SFU to be known as up", TIMEOUT, || up(&world.service) == true);
    assert_eq!(world.service.get("/readyz?strict").status, 200, "what is not known does not count");
    world.sfu.http.refuse();
    let body = bodies::get_token_of(&world.home, "alice", &unique_room());
    assert_eq!(world.service.post("/get_token", &body).status, 500);
    wait_until("the SFU to be known as down", TIMEOUT, || up(&world.service) == false);
    let answer = world.service.get("/readyz");
    assert_eq!((answer.status, &answer.json()["ready"]), (200, &true.into()), "{}", answer.text());
    let answer = world.service.get("/readyz?a=b&strict");
    assert_eq!((answer.status, &answer.json()["ready"]), (503, &false.into()), "{}", answer.text());
}

/// As long as webhooks are refused, five seconds at most.
#[test]
fn it_is_ready_once_it_has_given_up_waiting_for_its_store() {
    let sfu = Sfu::start();
    let service = Setup::new(&sfu)
        .env("LIVEKIT_REDIS_URL", &format!("redis://{}", free_address()))
        .start();
    let answer = service.get("/readyz");
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert_eq!(
        (&answer.json()["restored"], &answer.json()["stopping"]),
        (&false.into(), &false.into())
    );
    assert_eq!(service.get("/healthz").status, 200);
    wait_until("readiness", TIMEOUT, || service.get("/readyz").status == 200);
    assert_eq!(service.get("/readyz").json()["restored"], true);
}

#[test]
fn other_methods_are_refused_by_name() {
    let world = World::shared();
    for path in ["/healthz", "/readyz"] {
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            let answer = world.service.call(&Call::new(method, path));
            answer.assert_errcode(405, "M_UNRECOGNIZED");
            let allow = answer.header("allow").unwrap_or_default().to_owned();
            assert!(allow.contains("GET") && allow.contains("HEAD"), "{method} {path}: Allow: {allow}");
        }
        let options = world.service.call(&Call::new("OPTIONS", path));
        assert_eq!((options.status, options.body.len()), (200, 0), "OPTIONS {path}");
    }
}

#[test]
fn an_answer_takes_milliseconds() {
    let world = World::shared();
    let mut took: Vec<_> = (0..50).map(|_| world.service.get("/healthz").took).collect();
    took.sort_unstable();
    assert!(took[25] < Duration::from_millis(50), "median {:?}", took[25]);
}

#[test]
fn a_probe_is_not_worth_a_line_at_level_info() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    for path in ["/healthz", "/readyz", "/livekit/jwt/healthz"] {
        world.service.get(path);
    }
    // The line of a later request comes after any of theirs.
    let id = "after-the-probes";
    let unknown = bodies::sfu_get(&unique_room(), &world.home.name, &crate::support::secrets::token());
    world.service.call(&Call::json("/sfu/get", &unknown).header("X-Request-Id", id));
    world.service.wait_request(id);
    let log = world.service.log();
    assert!(!log.contains("healthz") && !log.contains("readyz"), "a probe was logged:\n{log}");
}

#[test]
fn an_idle_service_sleeps() {
    let world = World::new();
    assert_eq!(
        world
            .service
            .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()))
            .status,
        200
    );
    let before = world.service.cpu();
    std::thread::sleep(Duration::from_secs(2));
    let used = world.service.cpu() - before;
    assert!(used <= Duration::from_millis(20), "{used:?} of CPU time in two idle seconds");
}
