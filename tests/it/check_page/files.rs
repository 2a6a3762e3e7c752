//! The files of the page: their headers, where they are found, and that they are what their script makes.

use std::process::Command;

use crate::support::client::{Answer, Call};
use crate::support::process::{self, real_neighbours};
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::world::World;

const PARTS: [&str; 5] = ["page.css", "page.js", "frame.js", "faults.json", "frame"];
const OF_TICKETS: [&str; 2] = ["media.js", "livekit-client-2.23.0.js"];

fn part(service: &crate::support::service::Service, name: &str) -> Answer {
    service.call(&Call::new("GET", &format!("/check/{name}")).header("Accept-Encoding", "gzip, deflate, br, zstd"))
}

fn policy(answer: &Answer) -> String {
    answer.header("content-security-policy").unwrap_or_default().to_owned()
}

#[test]
fn the_page_is_there_unless_it_is_off() {
    let sfu = Sfu::start();
    for (page, basic, media) in [("off", 404, 404), ("basic", 200, 404), ("on", 200, 200)] {
        let service = Setup::new(&sfu).env("LIVEKIT_CHECK_PAGE", page).start();
        for path in ["/check", "/check/", "/livekit/jwt/check", "/livekit/jwt/check/", "//check"] {
            assert_eq!(service.get(path).status, basic, "{page} {path}");
        }
        for (parts, status) in [(&PARTS[..], basic), (&OF_TICKETS, media)] {
            for name in parts {
                assert_eq!(part(&service, name).status, status, "{page} {name}");
            }
        }
        assert_eq!(part(&service, "livekit-client.js").status, 404);
        // Where a browser asks for a page; machines are told what they were always told.
        let html = Call::new("GET", "/").header("Accept", "text/html,application/xhtml+xml");
        assert_eq!(service.call(&html).status, basic, "{page}");
        service.get("/").assert_errcode(404, "M_UNRECOGNIZED");
        service.call(&Call::post("/", "")).assert_errcode(404, "M_UNRECOGNIZED");
    }
    let service = World::shared();
    assert_eq!(service.service.get("/check").status, 200, "basic is the default");
    service
        .service
        .call(&Call::post("/check", ""))
        .assert_errcode(405, "M_UNRECOGNIZED");
    service.service.get("/check/nothing").assert_errcode(404, "M_UNRECOGNIZED");
}

#[test]
fn every_part_has_its_policy() {
    let sfu = Sfu::start();
    let service = Setup::new(&sfu).env("LIVEKIT_CHECK_PAGE", "on").start();
    let by_https = |path: &str| service.call(&Call::new("GET", path).header("X-Forwarded-Proto", "https"));
    let page = by_https("/check");
    assert_eq!(
        policy(&page),
        "default-src 'none'; script-src 'self'; style-src 'self'; frame-src 'self'; connect-src https: wss:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    assert!(policy(&service.get("/check")).contains("connect-src https: wss: http: ws:;"));
    let frame = policy(&by_https("/check/frame"));
    assert!(
        frame.starts_with("sandbox allow-scripts; ") && frame.ends_with("frame-ancestors 'self'") && !frame.contains("http:"),
        "{frame}"
    );
    for name in PARTS.iter().chain(&OF_TICKETS) {
        let answer = part(&service, name);
        assert!(policy(&answer).contains("default-src 'none'"), "{name}");
        for (header, value) in [("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer")] {
            assert_eq!(answer.header(header), Some(value), "{name}");
        }
        assert_eq!(answer.header("set-cookie"), None);
    }
    for (name, kind) in [
        ("page.js", "text/javascript"),
        ("page.css", "text/css"),
        ("frame", "text/html"),
        ("faults.json", "application/json"),
    ] {
        let answer = part(&service, name);
        assert!(answer.header("content-type").is_some_and(|given| given.starts_with(kind)), "{name}");
    }
    // Nothing is in the page but itself: no address of others, no script within, no configuration but the address that clients get.
    let html = page.text();
    assert!(
        !html.contains("<script>") && !html.contains("style=") && !html.contains("{{"),
        "{html}"
    );
    assert!(html.contains(&format!("data-livekit=\"{}\"", sfu.url())), "{html}");
    assert_eq!(html.matches("://").count(), 1, "{html}");
    assert!(!html.contains(sfu.key()), "{html}");
}

#[test]
fn the_client_of_livekit_is_sent_as_it_is_kept() {
    let sfu = Sfu::start();
    let service = Setup::new(&sfu).env("LIVEKIT_CHECK_PAGE", "on").start();
    let answer = part(&service, OF_TICKETS[1]);
    assert_eq!(
        (answer.header("content-encoding"), answer.header("vary")),
        (Some("br"), Some("Accept-Encoding"))
    );
    let kept = include_bytes!("../../../src/check/page/livekit-client.js.br");
    assert!(answer.body == kept, "it was sent in another form");
    let without = service.get("/check/livekit-client-2.23.0.js");
    without.assert_errcode(406, "M_UNRECOGNIZED");
}

/// What is in the tree is what the script makes of npm's package, which is pinned by its hash.
#[test]
fn the_client_of_livekit_is_that_of_its_package() {
    if !real_neighbours() {
        return;
    }
    let root = env!("CARGO_MANIFEST_DIR");
    let output = Command::new(process::program("node"))
        .arg(format!("{root}/tests/tools/browser/bundle.mjs"))
        .arg(process::tool("browser/node_modules"))
        .args([&format!("{root}/src/check/page/livekit-client.js.br"), "--check"])
        .output()
        .expect("node");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Texts of the page: every fault that it finds is one of `doctor`'s, and has a sentence for the user.
#[test]
fn every_fault_of_the_page_is_one_of_doctors_and_has_a_sentence() {
    let (page, media) = (
        include_str!("../../../src/check/page/page.js"),
        include_str!("../../../src/check/page/media.js"),
    );
    let faults = lk_jwt_service::internals::doctor::fault::ALL;
    let (_, sentences) = page.split_once("const USERS = {").expect("sentences");
    let (sentences, rest) = sentences.split_once("\n\t};").expect("their end");
    let named: Vec<_> = sentences
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once("\":"))
        .map(|(id, _)| id)
        .collect();
    assert!(named.len() > 30, "{named:?}");
    for id in &named {
        assert!(faults.iter().any(|fault| fault.id == *id), "{id} is not a fault of doctor's");
        let quoted = format!("\"{id}\"");
        let is_found = rest.contains(&quoted) || media.contains(&quoted) || matches!(*id, "sfu-udp" | "sfu-tcp");
        assert!(is_found, "{id} is never found");
    }
    for fault in faults {
        let quoted = format!("\"{}\"", fault.id);
        if rest.contains(&quoted) || media.contains(&quoted) {
            assert!(named.contains(&fault.id), "{} has no sentence for the user", fault.id);
        }
    }
}
