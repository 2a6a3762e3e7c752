//! Synapse behind a name whose address moves, with a TTL of 600 (decision O2).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Neighbours;
use crate::support::dns::Dns;
use crate::support::synapse::CERTIFIED;
use crate::support::tunnel::Tunnel;
use crate::support::{unique_loopback, wait_until};

#[test]
fn a_homeserver_that_was_made_anew_elsewhere_is_found() {
    let Some(real) = Neighbours::get() else { return };
    let dns = Dns::start();
    dns.ttl(600);
    let federation: SocketAddr = real.home.name.parse().expect("an address");
    let client_api = real.home.client_api();
    // Both ports on one machine, as a container has them.
    let machine = || {
        let ip = unique_loopback();
        dns.address(CERTIFIED, &[ip.into()]);
        [federation, client_api].map(|to| Tunnel::start((ip, to.port()).into(), to))
    };
    let former = machine();
    let name = &real.home.name;
    let setup = dns.serving(real.livekit.setup(&[name])).env(
        "LIVEKIT_FEDERATION_URL_OVERRIDES",
        &format!("{name}=https://{CERTIFIED}:{}", federation.port()),
    );
    let service = setup
        .env(
            "LIVEKIT_CS_API_URL_OVERRIDES",
            &format!("{name}=http://{CERTIFIED}:{}", client_api.port()),
        )
        .start();
    let alice = real.home.register("alice");
    let room = alice.create_room();
    let at = Instant::now();
    let scheduled = alice.request(
        "PUT",
        &format!("/_matrix/client/v3/rooms/{room}/send/org.example.left/1?org.matrix.msc4140.delay=6000"),
        Some(&json!({})),
    );
    assert_eq!(scheduled.status, 200, "{}", scheduled.text());
    let delay_id = scheduled.field("delay_id");
    let mut body = alice.get_token(&room);
    body["delay_id"] = json!(delay_id);
    body["delay_timeout"] = json!(6000);
    let answer = service.post("/get_token", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(former.iter().all(|tunnel| tunnel.passed() > 0), "both were asked");

    drop(former);
    let now = machine();
    let answer = service.post("/get_token", &alice.get_token(&room));
    assert_eq!(answer.status, 200, "{}", answer.text());
    eprintln!("after the move: {:?}", answer.took);
    assert!(now[0].passed() > 0);
    // Its delay is over, and it is restarted where Synapse is now.
    wait_until("the delay to be over", Duration::from_secs(10), || {
        at.elapsed() > Duration::from_secs(8)
    });
    assert!(now[1].passed() > 0);
    let events = alice.request("GET", "/_matrix/client/unstable/org.matrix.msc4140/delayed_events", None);
    assert!(events.status == 200 && events.text().contains(&delay_id), "{}", events.text());
}
