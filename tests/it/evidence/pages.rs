//! Answers of somebody else (decisions L3, L6): whatever a firewall, a gateway or a proxy says in the homeserver's or the SFU's place
//! is neither a no nor a yes.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{delegate_all, enter_all, nobody_is_sent_until, people, seconds, sent, wait_restarted_all, watchful, within};
use crate::support::client_api::done;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::sfu::Fault;
use crate::support::{lateness, wait_until, webhook};

const DELAY: Duration = seconds(6);
/// Where the restarts at its half fail, and what is left of it must do for a busy machine, too.
const LONG_DELAY: Duration = seconds(10);
const MANY: usize = 50;

fn page(status: u16) -> Reply {
    let body = "<html><head><title>Attention required</title></head><body>blocked</body></html>\n";
    Reply::text(status, "text/html", body)
}

fn nothing(status: u16) -> Reply {
    Reply::Answer {
        status,
        headers: Vec::new(),
        body: Vec::new(),
    }
}

/// Fifty people are there while every answer of the homeserver is this one for so long; then one delay more. None is reported gone,
/// no event runs out, and when they leave, every leave comes.
fn kept_behind(what: &str, reply: &Reply, delay: Duration, time: Duration) {
    let scene = Scene::new();
    let all = people(&scene, MANY);
    delegate_all(&scene, &all, delay);
    let sessions = enter_all(&scene, &all);
    for session in &sessions {
        scene.send_webhook(&webhook::joined(session));
    }
    wait_restarted_all(&scene, &all);
    let began = Instant::now();
    let (page, end) = (reply.clone(), began + time);
    scene
        .api
        .answer(move |_, _| if Instant::now() < end { page.clone() } else { done() });
    nobody_is_sent_until(&scene, &all, end + delay);
    let grace = lateness::since(began);
    for person in &all {
        let after = scene
            .api
            .times("restart", &person.delay_id)
            .into_iter()
            .filter(|at| *at >= end)
            .min();
        // The last restart that was granted was sent before the page came, half a delay before at most.
        let after = after.unwrap_or_else(|| panic!("{what}: a job ended"));
        assert!(after < end + delay / 2 + grace, "{what}: restarted {:?} after it", after - end);
    }
    eprintln!("{what}: 0 of {MANY} reported gone, all restarted again");
    for session in &sessions {
        scene.leave(session, "CLIENT_INITIATED");
    }
    wait_until("every leave", TIMEOUT * 2, || sent(&scene, &all) == MANY);
}

#[test]
fn a_firewalls_page_of_one_second_reports_nobody_gone() {
    kept_behind("403 HTML", &page(403), DELAY, seconds(1));
}

#[test]
fn a_gateway_without_a_route_reports_nobody_gone() {
    let reply = Reply::json(404, &json!({"message": "no Route matched with those values"}));
    kept_behind("no Route matched", &reply, DELAY, seconds(1));
}

/// The restarts that such an answer met are not believed to be done: they are tried again as soon as the homeserver is back.
#[test]
fn a_yes_without_a_word_is_no_restart() {
    kept_behind("200 without a body", &nothing(200), LONG_DELAY, LONG_DELAY / 2);
}

#[test]
fn a_page_with_a_yes_is_no_restart() {
    kept_behind("200 HTML", &page(200), LONG_DELAY, LONG_DELAY / 2);
}

/// A send is done when the homeserver says so: ten seconds of pages lose none.
#[test]
fn leaves_behind_ten_seconds_of_pages_are_sent_after_them() {
    for reply in [page(200)] {
        let scene = Scene::new();
        let all = people(&scene, 20);
        delegate_all(&scene, &all, seconds(20));
        let sessions = enter_all(&scene, &all);
        for session in &sessions {
            scene.send_webhook(&webhook::joined(session));
        }
        wait_restarted_all(&scene, &all);
        let began = Instant::now();
        let end = began + seconds(10);
        scene
            .api
            .answer(move |_, _| if Instant::now() < end { reply.clone() } else { done() });
        for session in &sessions {
            scene.leave(session, "CLIENT_INITIATED");
        }
        let came = |delay_id: &str| scene.api.times("send", delay_id).into_iter().any(|at| at >= end);
        wait_until("every leave", seconds(10) + TIMEOUT * 2, || all.iter().all(|p| came(&p.delay_id)));
        eprintln!("20 of 20 sent {:.1?} after ten seconds of pages", end.elapsed());
    }
}

/// In the SFU's place: for ten seconds nobody is gone, told or not; and after it who really left is sent.
#[test]
fn pages_in_the_sfus_place_are_neither_a_yes_nor_a_no() {
    const CALLS: [&[&str]; 4] = [
        &["/GetParticipant"],
        &["/ListParticipants"],
        &["/ListRooms"],
        &["/GetParticipant", "/ListParticipants", "/ListRooms", "/CreateRoom"],
    ];
    std::thread::scope(|scope| {
        for (case, calls) in CALLS.into_iter().enumerate() {
            scope.spawn(move || {
                let scene = Scene::with(watchful);
                let all = people(&scene, 10);
                delegate_all(&scene, &all, DELAY);
                let sessions = enter_all(&scene, &all);
                for session in &sessions {
                    scene.send_webhook(&webhook::joined(session));
                }
                wait_restarted_all(&scene, &all);
                let reply = if case % 2 == 0 { page(200) } else { nothing(200) };
                scene.sfu.fail(Some(Fault::InsteadOf(calls, reply)));
                // Half of them are said to be gone, by an SFU that was wrong.
                for session in sessions.iter().step_by(2) {
                    scene.send_webhook(&webhook::left(session, "CONNECTION_TIMEOUT"));
                }
                nobody_is_sent_until(&scene, &all, Instant::now() + seconds(10));
                // And half of them go while nothing can be asked.
                for session in sessions.iter().step_by(2) {
                    scene.leave(session, "CLIENT_INITIATED");
                }
                scene.sfu.fail(None);
                let began = Instant::now();
                wait_until(&format!("five leaves: {calls:?}"), seconds(40), || sent(&scene, &all) == 5);
                eprintln!("{calls:?}: 0 of 10 in ten seconds; 5 of 5 sent {:.1?} after them", began.elapsed());
                let staying = all.iter().skip(1).step_by(2);
                wait_until("the time to pass", within(seconds(4), began) + TIMEOUT, || {
                    began.elapsed() > seconds(4)
                });
                assert_eq!(staying.filter(|p| scene.api.count("send", &p.delay_id) > 0).count(), 0, "{calls:?}");
            });
        }
    });
}
