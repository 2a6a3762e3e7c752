//! Paths, methods, CORS, request IDs, sizes: what holds for every route (decisions H1 to H4, H7).

use serde_json::json;

use crate::support::client::Call;
use crate::support::neighbour::Reply;
use crate::support::world::World;
use crate::support::{bodies, unique_room};

const TOKEN_ROUTES: [&str; 2] = ["/get_token", "/sfu/get"];
/// These, and the one whose body is not all.
const ROUTES: [&str; 3] = ["/get_token", "/sfu/get", "/token_source"];

/// Ways in which clients and proxies write the same path (H1).
fn spellings(path: &str, prefix: &str) -> Vec<String> {
    let doubled = path.replace('/', "//");
    let mut all = Vec::new();
    for prefix in ["", prefix] {
        for path in [path, doubled.as_str()] {
            all.extend([
                format!("{prefix}{path}"),
                format!("{prefix}{path}/"),
                format!("{prefix}{path}//"),
                format!("{prefix}/{path}"),
            ]);
        }
    }
    all.push(format!("{}{path}", prefix.replace('/', "//")));
    let encoded: String = path
        .chars()
        .map(|c| if c == '/' { "/".into() } else { format!("%{:02x}", u32::from(c)) })
        .collect();
    for path in [&encoded, &encoded.to_uppercase(), &path.replace('_', "%5F")] {
        all.extend([
            path.clone(),
            format!("{prefix}{path}/"),
            format!("{}{path}", prefix.replace('t', "%74")),
        ]);
    }
    for dotted in ["/.", "/a/..", "/%2e", "/a/%2E%2e", "/a/b/.%2e/..", "/.//", "/a//.."] {
        all.extend([
            format!("{dotted}{path}"),
            format!("{prefix}{dotted}{path}"),
            format!("{dotted}{prefix}{path}{dotted}"),
        ]);
    }
    all.push(format!("/../%2e.{path}"));
    all.push(format!("{path}?a=b"));
    all.push(format!("{prefix}{path}?a=/nope"));
    all
}

#[test]
fn every_spelling_of_a_path_reaches_its_route() {
    let world = World::shared();
    for route in TOKEN_ROUTES {
        for path in spellings(route, "/livekit/jwt") {
            let answer = world.service.call(&Call::post(&path, ""));
            assert_eq!((answer.status, answer.field("errcode")), (400, "M_NOT_JSON".into()), "POST {path}");
        }
    }
    // With its query.
    for path in spellings("/token_source", "/livekit/jwt") {
        let path = path.clone() + if path.contains('?') { "&" } else { "?" } + "matrix_server_name=x&device_id=%3a%2F";
        let answer = world.service.call(&Call::post(&path, "").header("Authorization", "Bearer x"));
        assert_eq!((answer.status, answer.field("errcode")), (400, "M_NOT_JSON".into()), "POST {path}");
    }
    for route in ["/healthz", "/readyz"] {
        for path in spellings(route, "/livekit/jwt") {
            assert_eq!(world.service.get(&path).status, 200, "GET {path}");
        }
    }
}

#[test]
fn the_prefix_can_be_changed() {
    let world = World::with(|setup| setup.env("LIVEKIT_JWT_PATH_PREFIX", "/rtc/auth"));
    for path in spellings("/sfu/get", "/rtc/auth") {
        assert_eq!(world.service.call(&Call::post(&path, "")).status, 400, "POST {path}");
    }
    world
        .service
        .call(&Call::post("/livekit/jwt/sfu/get", ""))
        .assert_errcode(404, "M_UNRECOGNIZED");
}

#[test]
fn any_other_path_is_a_404_that_a_browser_may_read() {
    let world = World::shared();
    let paths = [
        "/",
        "/nope",
        "/GET_TOKEN",
        "/sfu",
        "/sfu/",
        "/sfu/get/more",
        "/get_token/more",
        "/get_tokens",
        "/sfu%2Fget",
        "/sfu/get%20",
        "/get%255Ftoken",
        "/get_token/..",
        "/livekit/jwt/../get_token",
        // Broken encodings.
        "/get%5token",
        "/get_token%",
        "/%",
        "/%zz/../get_token",
        "/get_token/%zz/..",
        "/%+5/../get_token",
        // Not in another spelling, whether it is there or not.
        "/./metrics",
        "/%6detrics",
        "/livekit/jwt/metrics",
        "/livekit",
        "/livekit/jwt",
        "/livekit/jwt/",
        "/livekit/jwtx/get_token",
        "/livekit/jwt/livekit/jwt/get_token",
        "/favicon.ico",
        "/twirp/livekit.RoomService/CreateRoom",
    ];
    for path in paths {
        for method in ["GET", "POST", "PUT", "DELETE"] {
            world.service.call(&Call::new(method, path)).assert_errcode(404, "M_UNRECOGNIZED");
        }
        assert_eq!(world.service.call(&Call::new("HEAD", path)).status, 404, "HEAD {path}");
    }
}

#[test]
fn a_wrong_method_is_a_405_that_names_the_right_one() {
    let world = World::shared();
    for path in ROUTES {
        for method in ["GET", "PUT", "DELETE", "PATCH", "TRACE"] {
            let answer = world.service.call(&Call::new(method, path));
            answer.assert_errcode(405, "M_UNRECOGNIZED");
            assert!(
                answer.header("allow").is_some_and(|a| a.contains("POST")),
                "{method} {path}: {:?}",
                answer.headers
            );
        }
        let head = world.service.call(&Call::new("HEAD", path));
        assert_eq!((head.status, head.body.len()), (405, 0), "HEAD {path}");
        assert!(
            head.header("allow").is_some_and(|a| a.contains("POST")),
            "HEAD {path}: {:?}",
            head.headers
        );
    }
}

#[test]
fn options_is_200_and_empty_on_any_path() {
    let world = World::shared();
    for path in [
        "/get_token",
        "/sfu/get",
        "/token_source",
        "/token_source?matrix_server_name=x&device_id=D",
        "/healthz",
        "/readyz",
        "/",
        "/nope",
        "/livekit/jwt/sfu/get",
        "//sfu/get/",
        "/delegate_delayed_leave",
        "/get%5Ftoken/..",
        "/%",
        "/get%zztoken",
        "/a?b=%",
    ] {
        let preflight = Call::new("OPTIONS", path)
            .header("Origin", "https://call.example.org")
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "content-type");
        for call in [preflight, Call::new("OPTIONS", path)] {
            let answer = world.service.call(&call);
            assert_eq!((answer.status, answer.body.len()), (200, 0), "OPTIONS {path}");
            assert_eq!(answer.header("access-control-allow-credentials"), None);
        }
    }
    let whole_server = world
        .service
        .raw(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        .expect("an answer to OPTIONS *");
    assert_eq!((whole_server.status, whole_server.body.len()), (200, 0), "OPTIONS *");
}

/// What a browser asks for in a preflight it may do, whatever this service would do with it.
#[test]
fn a_preflight_is_granted_what_it_asks_for() {
    let world = World::shared();
    let allowed = |asked: &[&str]| {
        let call = asked.iter().fold(Call::new("OPTIONS", "/get_token"), |call, asked| {
            call.header("Access-Control-Request-Headers", asked)
        });
        let answer = world.service.call(&call);
        assert_eq!((answer.status, answer.body.len()), (200, 0), "{asked:?}");
        let names = answer.header("access-control-allow-headers").expect("a list").split(", ");
        let names: Vec<_> = names.map(str::to_owned).collect();
        // `assert_manners` has seen the others.
        names[6..].to_vec()
    };
    assert_eq!(allowed(&["content-type,authorization"]), [""; 0]);
    assert_eq!(
        allowed(&["content-type,traceparent,x-client-version"]),
        ["traceparent", "x-client-version"]
    );
    assert_eq!(allowed(&["sentry-trace", "baggage"]), ["sentry-trace", "baggage"]);
    // Nothing but names of headers comes back, and not without end.
    for asked in [
        "<script>,x-ok",
        "x y,x-ok,",
        ",,x-ok",
        "\u{e4},x-ok",
        "x:y, x-ok ,\"",
        "(),x-ok;q=1,x-ok",
    ] {
        assert_eq!(allowed(&[asked]), ["x-ok"], "{asked}");
    }
    let many: Vec<_> = (0..1_000).map(|n| format!("x-{n:04}")).collect();
    let granted = allowed(&[&many.join(",")]);
    assert_eq!(granted, many[..granted.len()]);
    assert!((100..=128).contains(&granted.len()), "{} of 1,000", granted.len());
    // Only before a request, never with it.
    let call = Call::post("/get_token", "{}").header("Access-Control-Request-Headers", "x-mine");
    let answer = world.service.call(&call);
    assert!(
        !answer
            .header("access-control-allow-headers")
            .is_some_and(|list| list.contains("x-mine"))
    );
    assert_eq!(answer.header("vary"), None);
}

#[test]
fn a_page_of_the_internet_may_ask_a_service_in_the_private_network() {
    let world = World::shared();
    let granted = |method: &str, asked: Option<&str>| {
        let call = Call::new(method, "/healthz");
        let call = asked
            .into_iter()
            .fold(call, |call, asked| call.header("Access-Control-Request-Private-Network", asked));
        let answer = world.service.call(&call);
        let vary = answer.header("vary").map(str::to_ascii_lowercase);
        let named = vary.is_some_and(|vary| vary.contains("access-control-request-private-network"));
        assert_eq!(named, method == "OPTIONS", "{:?}", answer.headers);
        answer.header("access-control-allow-private-network").map(str::to_owned)
    };
    assert_eq!(granted("OPTIONS", Some("true")).as_deref(), Some("true"));
    for (method, asked) in [
        ("OPTIONS", None),
        ("OPTIONS", Some("false")),
        ("OPTIONS", Some("<x>")),
        ("GET", Some("true")),
    ] {
        assert_eq!(granted(method, asked), None, "{method} {asked:?}");
    }
}

#[test]
fn the_origin_is_never_mirrored() {
    let world = World::shared();
    for origin in ["https://call.element.io", "https://appassets.androidplatform.net", "null", ""] {
        for call in [
            Call::new("GET", "/healthz"),
            Call::post("/sfu/get", "{}"),
            Call::post("/token_source", "{}"),
            Call::new("GET", "/nope"),
        ] {
            let answer = world.service.call(&call.header("Origin", origin));
            assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
            assert_eq!(answer.header("access-control-allow-credentials"), None);
        }
    }
}

#[test]
fn a_good_request_id_is_kept_and_any_other_replaced() {
    let world = World::shared();
    for kept in [
        "a",
        "0123456789",
        "A.b_c-D",
        &"x".repeat(64),
        "550e8400-e29b-41d4-a716-446655440000",
    ] {
        for call in [
            Call::new("GET", "/healthz"),
            Call::new("GET", "/nope"),
            Call::post("/get_token", "{}"),
        ] {
            let answer = world.service.call(&call.header("X-Request-Id", kept));
            assert_eq!(answer.header("x-request-id"), Some(kept));
        }
    }
    for replaced in ["", " ", "a b", "a/b", "ä", "<script>", &"x".repeat(65), "a,b", "a\tb", "%0a", "{}"] {
        let answer = world.service.call(&Call::post("/get_token", "{}").header("X-Request-Id", replaced));
        assert_ne!(answer.header("x-request-id"), Some(replaced));
        answer.assert_errcode(400, "M_BAD_JSON");
    }
    let fresh: std::collections::BTreeSet<_> = (0..100)
        .map(|_| world.service.get("/healthz").header("x-request-id").map(str::to_owned))
        .collect();
    assert_eq!(fresh.len(), 100, "request IDs repeat");
}

/// 401 and 500 say why; `assert_error_form` checks that every one does. Here are the two that are promised by name.
#[test]
fn a_refusal_gives_its_reason() {
    let world = World::shared();
    let unknown = bodies::get_token(
        &unique_room(),
        &world.home.name,
        &crate::support::secrets::token(),
        &world.home.user("eve"),
    );
    let answer = world.service.post("/get_token", &unknown);
    answer.assert_error(401, "M_UNAUTHORIZED", "The request could not be authorised.");
    assert_eq!(answer.field("reason"), "token_rejected");
    let mismatch = bodies::get_token(
        &unique_room(),
        &world.home.name,
        &world.home.token("eve"),
        &world.home.user("alice"),
    );
    let answer = world.service.post("/get_token", &mismatch);
    answer.assert_error(401, "M_UNAUTHORIZED", "The request could not be authorised.");
    assert_eq!(answer.field("reason"), "user_mismatch");
}

/// A complete body of exactly `length` bytes.
fn padded(world: &World, length: usize) -> Vec<u8> {
    let mut body = bodies::get_token_of(&world.home, "alice", &unique_room());
    body["padding"] = json!("");
    let missing = length - body.to_string().len();
    body["padding"] = json!("x".repeat(missing));
    body.to_string().into_bytes()
}

#[test]
fn bodies_end_at_64_kib() {
    let world = World::shared();
    let limit = 64 * 1024;
    let fits = world.service.call(&Call::post("/get_token", padded(&world, limit)));
    assert_eq!(fits.status, 200, "{}", fits.text());
    for path in ["/get_token", "/sfu/get", "/token_source", "/livekit/jwt/sfu/get/"] {
        for length in [limit + 1, limit * 2, 1 << 20] {
            world
                .service
                .call(&Call::post(path, padded(&world, length)))
                .assert_errcode(413, "M_TOO_LARGE");
        }
    }
    // Announced, and refused before it is sent.
    let announced = format!("POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 30 << 20);
    let answer = world
        .service
        .raw(announced.as_bytes())
        .expect("an answer to a body that was only announced");
    answer.assert_errcode(413, "M_TOO_LARGE");
    answer.assert_manners();
    // Never announced: chunked.
    let mut chunked = b"POST /get_token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..80 {
        chunked.extend(b"400\r\n");
        chunked.extend([b' '; 0x400]);
        chunked.extend(b"\r\n");
    }
    chunked.extend(b"0\r\n\r\n");
    let answer = world.service.raw(&chunked).expect("an answer to a chunked body");
    answer.assert_errcode(413, "M_TOO_LARGE");
    answer.assert_manners();
}

#[test]
fn bodies_may_be_chunked_announced_by_expect_or_sent_by_http_1_0() {
    let world = World::shared();
    let body = || bodies::sfu_get_of(&world.home, "alice", &unique_room()).to_string();
    let text = body();
    let (front, back) = text.split_at(30);
    let chunked = format!(
        "POST /sfu/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{front}\r\n{:x}\r\n{back}\r\n0\r\n\r\n",
        front.len(),
        back.len()
    );
    assert_eq!(world.service.raw(chunked.as_bytes()).expect("chunked").status, 200);
    let text = body();
    let expecting = format!(
        "POST /sfu/get HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    );
    assert_eq!(world.service.raw(expecting.as_bytes()).expect("100-continue").status, 200);
    let text = body();
    let old = format!("POST /sfu/get HTTP/1.0\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    assert_eq!(world.service.raw(old.as_bytes()).expect("HTTP/1.0").status, 200);
}

/// One of each status that the router makes has the headers of H2 and H4; `Service::call` checks them on all answers.
#[test]
fn manners_hold_for_every_status() {
    let world = World::with(|setup| setup);
    let mut seen = std::collections::BTreeSet::new();
    let mut see = |call: &Call| seen.insert(world.service.call(call).status);
    see(&Call::new("GET", "/healthz"));
    see(&Call::new("GET", "/nope"));
    see(&Call::new("GET", "/get_token"));
    see(&Call::post("/get_token", "{}"));
    see(&Call::post("/get_token", vec![b' '; 70_000]));
    see(&Call::json(
        "/sfu/get",
        &bodies::sfu_get(&unique_room(), &world.home.name, &crate::support::secrets::token()),
    ));
    world.sfu.fail(Some(crate::support::sfu::Fault::Instead(Reply::text(
        401,
        "text/plain",
        "invalid API key: x",
    ))));
    see(&Call::json("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room())));
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [200, 400, 401, 404, 405, 413, 500]);
}
