//! Legacy names of two servers that read alike (decisions O3, L8): a leave is replaced by its own user only.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{seconds, watchful};
use crate::support::client_api::ClientApi;
use crate::support::homeserver::Homeserver;
use crate::support::scene::TIMEOUT;
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::{bodies, unique, unique_loopback, unique_room, wait_until};

/// `@alice:host` with the device `8448:D`, and `@alice:host:8448` with the device `D`.
#[test]
fn who_has_a_name_that_reads_alike_cancels_nothing() {
    const DELAY: Duration = seconds(8);
    let ip = unique_loopback();
    let server = format!("{ip}:8448");
    let (sfu, api) = (Sfu::start(), ClientApi::start());
    let home = Homeserver::builder().at(ip, 8448).named(&server).start();
    let overrides = format!("{},{ip}=http://{}", api.override_of(&home), api.http.address());
    let service = watchful(Setup::new(&sfu))
        .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &format!("{server},{ip}"))
        .env("LIVEKIT_CS_API_URL_OVERRIDES", &overrides)
        .start();
    let room = unique_room();
    let [victims, others] = ["victim", "other"].map(|who| format!("syd_{who}{}", unique()));
    let ask = |server: &str, device: &str, delay_id: &str| {
        let mut body = bodies::sfu_get(&room, server, &home.token_of(&format!("@alice:{server}")));
        body["device_id"] = device.into();
        body["delay_id"] = delay_id.into();
        body["delay_timeout"] = json!(8_000);
        service.post("/sfu/get", &body)
    };
    let victim = ask(&server, "D", &victims);
    assert_eq!(victim.status, 200, "{}", victim.text());
    let began = Instant::now();
    let other = ask(&ip.to_string(), "8448:D", &others);
    wait_until("one delay to pass", DELAY + TIMEOUT, || {
        assert_eq!(api.count("cancel", &victims), 0, "cancelled by somebody else: {}", other.status);
        began.elapsed() > DELAY
    });
    assert!(api.count("restart", &victims) > 0, "nobody looks after the victim's event any more");
    eprintln!("reads alike: answered {}, 0 cancelled", other.status);
}
