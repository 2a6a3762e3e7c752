//! The fakes themselves: a fake that lies makes every test above it worthless.

use std::time::Duration;

use livekit_protocol as proto;
use prost::Message;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::ca::Ca;
use super::client::{Answer, Call, Connection, call};
use super::homeserver::{Homeserver, WELL_KNOWN};
use super::neighbour::{Greeting, Reply};
use super::own_homeserver::OwnHomeserver;
use super::sfu::{Fault, Sfu};

/// Any CreateRoom call, with this token.
fn create(sfu: &Sfu, token: Option<&str>) -> Answer {
    let asked = proto::CreateRoomRequest {
        name: "r".into(),
        ..Default::default()
    };
    let mut request =
        Call::post("/twirp/livekit.RoomService/CreateRoom", asked.encode_to_vec()).header("Content-Type", "application/protobuf");
    if let Some(token) = token {
        request = request.header("Authorization", &format!("Bearer {token}"));
    }
    call(sfu.http.address(), &request)
}

#[test]
fn the_sfu_refuses_as_the_recorded_one() {
    let sfu = Sfu::start();
    let none = create(&sfu, None);
    assert_eq!(
        (none.status, none.text().as_str()),
        (401, r#"{"code":"unauthenticated","msg":"permissions denied"}"#)
    );
    // {"alg":"HS256"}.{"iss":"sfukey"} with a made-up signature.
    let forged = create(&sfu, Some("eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJzZnVrZXkifQ.AAAA"));
    assert_eq!(
        (forged.status, forged.header("content-type")),
        (401, Some("text/plain; charset=utf-8"))
    );
    assert!(
        forged
            .text()
            .starts_with("invalid token: eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJzZnVrZXkifQ.AAAA, error: token signature is invalid")
    );
    let stranger = create(&sfu, Some("eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJvdGhlciJ9.AAAA"));
    assert_eq!((stranger.status, stranger.text().as_str()), (401, "invalid API key: other"));
    let lost = call(
        sfu.http.address(),
        &Call::post("/elsewhere/twirp/livekit.RoomService/CreateRoom", ""),
    );
    assert_eq!((lost.status, lost.text().as_str()), (404, "404 page not found\n"));
    let unknown = call(sfu.http.address(), &Call::post("/twirp/livekit.RoomService/Nope", ""));
    assert_eq!((unknown.status, unknown.field("code")), (404, "bad_route".into()));
    assert_eq!(call(sfu.http.address(), &Call::new("GET", "/")).text(), "OK");
    assert_eq!(sfu.creations(), 4);
}

#[test]
fn a_port_can_be_closed_and_opened() {
    let sfu = Sfu::start();
    let mut kept = Connection::open(sfu.http.address()).expect("a connection");
    super::wait_until("the connection to be taken", Duration::from_secs(2), || {
        sfu.http.connections().len() == 1
    });
    sfu.http.refuse();
    assert!(kept.closed_within(Duration::from_secs(2)));
    assert!(Connection::open(sfu.http.address()).is_err());
    sfu.http.listen_again();
    assert_eq!(create(&sfu, None).status, 401);
    sfu.http.greet(Greeting::Close);
    assert!(
        Connection::open(sfu.http.address())
            .expect("a connection")
            .closed_within(Duration::from_secs(2))
    );
    sfu.http.greet(Greeting::Serve);
    sfu.fail(Some(Fault::Close));
    let mut cut = Connection::open(sfu.http.address()).expect("a connection");
    cut.send(&Call::new("GET", "/").bytes(sfu.http.address()));
    assert!(cut.answer().is_none());
}

/// One GET over TLS; what came back until the connection fell silent, and the connection's own end.
async fn get(homeserver: &Homeserver, name: &str, target: &str) -> std::io::Result<(String, std::net::SocketAddr)> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(Ca::trusted().file()).expect("the CA"))
        .expect("a CA");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions");
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(homeserver.http.address()).await?;
    let own = tcp.local_addr()?;
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let mut tls = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(name, tcp)
        .await?;
    tls.write_all(format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") && tls.read_buf(&mut answer).await? > 0 {}
    Ok((String::from_utf8_lossy(&answer).into_owned(), own))
}

#[test]
fn the_homeserver_proves_its_name_and_records_who_asked_what() {
    let homeserver = Homeserver::builder().named("a.example").certified_for(["a.example"]).start();
    homeserver.answer_well_known(Reply::json(200, &serde_json::json!({"m.server": "b.example:443"})));
    let run = |name: &str, target: &str| super::runtime().block_on(get(&homeserver, name, target));
    let (answer, own) = run("a.example", WELL_KNOWN).expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"m.server":"b.example:443"}"#),
        "{answer}"
    );
    let request = &homeserver.http.requests()[0];
    assert_eq!(
        (request.path.as_str(), request.header("host"), request.connection.sni()),
        (WELL_KNOWN, Some("x"), Some("a.example"))
    );
    assert_eq!(request.connection.peer, own);
    let token = homeserver.token("alice");
    let target = format!("{}?access_token={token}", super::homeserver::USERINFO);
    let (answer, _) = run("a.example", &target).expect("an answer");
    assert!(answer.ends_with(r#"{"sub":"@alice:a.example"}"#), "{answer}");
    assert_eq!(homeserver.asked_about(&token), 1);
    let (answer, _) = run("a.example", "/_matrix/federation/v1/openid/userinfo?access_token=x").expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(run("b.example", WELL_KNOWN).is_err(), "a certificate for another name");
    let untrusted = Homeserver::builder()
        .certified_for(["a.example"])
        .signed_by(Ca::untrusted())
        .start();
    assert!(
        super::runtime().block_on(get(&untrusted, "a.example", WELL_KNOWN)).is_err(),
        "a certificate of nobody"
    );
}

/// Row by row what a real Synapse was recorded to answer.
#[test]
fn the_own_homeserver_answers_as_the_recorded_one() {
    let own = OwnHomeserver::start();
    let (room, alice, carol) = ("!5rbKGZO6JYeO2UuSXMpZKshWxVwYTgSNWgGE78AL3nc", own.user("alice"), own.user("carol"));
    own.join(room, &alice);
    own.join(room, own.name());
    own.join("!elsewhere", &carol);
    let event = own.schedule(&alice, room, 600_000);
    let segment = |text: &str| url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let (alice, carol, own_name) = (segment(&alice), segment(&carol), segment(own.name()));
    let rooms = format!("/_matrix/client/unstable/io.element.msc4502/rooms/{}", segment(room));
    let events = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";
    let token = format!("Bearer {}", own.as_token);
    let ask = |method: &str, target: &str, authorization: Option<&str>| {
        let request = match method {
            "GET" => Call::new("GET", target),
            _ => Call::post(target, "{}"),
        };
        let request = authorization
            .iter()
            .fold(request, |request, value| request.header("Authorization", value));
        let answer = call(own.http.address(), &request);
        (answer.status, answer.field("errcode"), answer.text())
    };
    for (target, status, errcode, holds) in [
        (format!("{rooms}/is_joined?mxid={alice}"), 200, "", r#"{"joined":true}"#),
        (format!("{rooms}/is_joined?mxid={carol}"), 200, "", r#"{"joined":false}"#),
        (format!("{rooms}/is_joined?server_name={own_name}"), 200, "", r#"{"joined":true}"#),
        (format!("{rooms}/is_joined?server_name=x&mxid={alice}"), 400, "M_MISSING_PARAM", ""),
        (format!("{rooms}/is_joined"), 400, "M_MISSING_PARAM", ""),
        (format!("{rooms}/is_joined?mxid=x"), 400, "M_INVALID_PARAM", ""),
        (
            rooms.replace(&segment(room), "nope") + "/is_joined?mxid=%40a%3Ab",
            400,
            "M_INVALID_PARAM",
            "",
        ),
        (
            rooms.replace("unstable/io.element.msc4502", "v3") + "/is_joined?mxid=%40a%3Ab",
            404,
            "M_UNRECOGNIZED",
            "",
        ),
        (
            rooms.replace("unstable/io.element.msc4502", "v3") + "/joined_members",
            200,
            "",
            "@alice:",
        ),
        (format!("{events}/{event}?user_id={alice}"), 200, "", r#""delay_ms":600000"#),
        (format!("{events}/{event}?user_id={carol}"), 404, "M_NOT_FOUND", ""),
        (format!("{events}/{event}"), 404, "M_NOT_FOUND", ""),
        (format!("{events}/zzz?user_id={alice}"), 404, "M_NOT_FOUND", ""),
        (format!("{events}/{event}?user_id=%40bob%3Aother"), 403, "M_FORBIDDEN", "masquerade"),
        (
            format!("{events}/{event}?user_id=%40nobody%3A{own_name}"),
            403,
            "M_FORBIDDEN",
            "not registered",
        ),
    ] {
        let answer = ask("GET", &target, Some(&token));
        assert_eq!((answer.0, answer.1.as_str()), (status, errcode), "{target}: {}", answer.2);
        assert!(answer.2.contains(holds), "{target}: {}", answer.2);
        if errcode != "M_UNRECOGNIZED" {
            assert_eq!(ask("GET", &target, None).1, "M_MISSING_TOKEN", "{target}");
            assert_eq!(ask("GET", &target, Some("Bearer zz")).1, "M_UNKNOWN_TOKEN", "{target}");
        }
    }
    // Whoever knows the id of an event may manage it.
    for (what, authorization, status) in [
        ("restart", Some(token.as_str()), 200),
        ("restart", None, 200),
        ("send", Some(token.as_str()), 200),
        ("send", Some(token.as_str()), 404),
        ("restart", None, 404),
    ] {
        let answer = ask("POST", &format!("{events}/{event}/{what}"), authorization);
        assert_eq!(answer.0, status, "{what}: {}", answer.2);
    }
    let relay = |call: serde_json::Value, authorization: &str| {
        let target = "/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy";
        let request = Call::json(target, &call).header("Authorization", authorization);
        super::client::call(own.http.address(), &request)
    };
    own.peer("b", |body| (403, serde_json::json!({"errcode": "M_FORBIDDEN", "error": body["x"]})));
    let path = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token";
    let good = serde_json::json!({"destination": "b", "method": "POST", "path": path, "body": {"x": "no"}});
    assert_eq!(
        relay(good.clone(), &token).text(),
        r#"{"content":{"errcode":"M_FORBIDDEN","error":"no"},"status":403}"#
    );
    assert_eq!(relay(good.clone(), "Bearer zz").status, 401);
    for (member, value, status, errcode) in [
        ("destination", own.name(), 403, "IO.ELEMENT.MSC4512.M_FEDPROXY_DESTINATION_DENIED"),
        ("destination", "nobody", 502, "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED"),
        ("destination", "", 400, "M_MISSING_PARAM"),
        ("method", "PATCH", 400, "M_INVALID_PARAM"),
        (
            "path",
            "/_matrix/federation/v1/version",
            403,
            "IO.ELEMENT.MSC4512.M_FEDPROXY_PATH_NOT_ALLOWED",
        ),
        (
            "path",
            "/_matrix/federation/v1/rtc/livekit/../x",
            403,
            "IO.ELEMENT.MSC4512.M_FEDPROXY_PATH_NOT_ALLOWED",
        ),
    ] {
        let mut call = good.clone();
        call[member] = value.into();
        let answer = relay(call, &token);
        assert_eq!(
            (answer.status, answer.field("errcode").as_str()),
            (status, errcode),
            "{member} {value}"
        );
    }
}
