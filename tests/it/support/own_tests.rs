//! The fakes themselves: a fake that lies makes every test above it worthless.

use std::time::Duration;

use livekit_protocol as proto;
use prost::Message;

use super::client::{Answer, Call, Connection, call};
use super::neighbour::Greeting;
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
    assert_eq!((lost.status, lost.field("code")), (404, "bad_route".into()));
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
