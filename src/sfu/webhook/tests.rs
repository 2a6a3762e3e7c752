use hmac::{Hmac, Mac as _};

use super::*;
use crate::secret::{KeyPair, Secret};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Every webhook of a real livekit-server, in order and to the byte, with its token. `tests/it` replays the scenes.
const RECORDED: &str = include_str!("../../../tests/it/data/webhooks.jsonl");

const SECRET: &str = "secretsecretsecretsecretsecretsecret";
/// While the recording was made.
const THEN: u64 = 1_795_241_200;

fn keys(pairs: &[(&str, &str)]) -> Keys {
    let mut pairs = pairs.iter().map(|(key, secret)| KeyPair {
        key: (*key).into(),
        secret: Secret::new(*secret),
    });
    let signing = pairs.next().unwrap();
    Keys::new(signing, pairs.collect())
}

fn devkey() -> Keys {
    keys(&[("devkey", SECRET)])
}

fn sign(header: &Value, payload: &Value, secret: &str) -> String {
    let segment = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", segment(header), segment(payload));
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap().chain_update(&signed);
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

fn hash(body: &[u8]) -> String {
    STANDARD.encode(Sha256::digest(body))
}

fn lines(jsonl: &str) -> Vec<Value> {
    jsonl.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_replicas_tell_each_other_is_read_as_it_was() {
    for line in lines(RECORDED) {
        let webhook = Webhook::parse(line["body"].as_str().unwrap().as_bytes()).unwrap();
        let told = webhook.to_json().to_string();
        assert_eq!(Webhook::parse(told.as_bytes()), Ok(webhook));
        assert!(told.len() < 1024, "{told}");
    }
}

#[test]
fn recorded_webhooks_are_verified() {
    for line in lines(RECORDED) {
        let headers = line["headers"].as_array().unwrap();
        let token = headers.iter().find(|header| header[0] == "Authorization").unwrap();
        let (authorization, body) = (token[1].as_str().unwrap(), line["body"].as_str().unwrap());
        let payload: Value = {
            let segment = authorization.split('.').nth(1).unwrap();
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(segment).unwrap()).unwrap()
        };
        let then = payload["iat"].as_u64().unwrap();
        for spelling in [
            authorization.to_owned(),
            format!("Bearer {authorization}"),
            format!(" bearer  {authorization} "),
        ] {
            let claims = Claims::verify(&spelling, &devkey(), then + 1).unwrap();
            assert_eq!(claims.body_matches(body.as_bytes()).unwrap().issued_at, payload["iat"].as_i64());
            assert_eq!(
                claims.body_matches(format!("{body} ").as_bytes()).unwrap_err(),
                WebhookAuthError::Body
            );
        }
        assert_eq!(Claims::verify(authorization, &devkey(), then + 300 + 59).err(), None);
        assert_eq!(
            Claims::verify(authorization, &devkey(), then + 300 + 61).unwrap_err(),
            WebhookAuthError::Expired
        );
        assert_eq!(
            Claims::verify(authorization, &devkey(), then - 61).unwrap_err(),
            WebhookAuthError::Early
        );
    }
}

#[test]
fn recorded_webhooks_are_read() {
    let mut kinds = std::collections::BTreeMap::new();
    let recorded = lines(RECORDED);
    assert_eq!(recorded.len(), 137);
    for line in &recorded {
        let body: Value = serde_json::from_str(line["body"].as_str().unwrap()).unwrap();
        let webhook = Webhook::parse(body.to_string().as_bytes()).unwrap();
        *kinds.entry(format!("{:?}", webhook.kind)).or_insert(0) += 1;

        let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let int = |value: &Value| value.as_str().map(|digits| digits.parse::<i64>().unwrap());
        assert!(webhook.id.starts_with("EV_"));
        assert_eq!(
            (&*webhook.id, webhook.created_at),
            (string(&body["id"]).as_str(), int(&body["createdAt"]))
        );
        let room = webhook.room.unwrap();
        assert_eq!(
            (&*room.name, &*room.sid),
            (string(&body["room"]["name"]).as_str(), string(&body["room"]["sid"]).as_str())
        );
        assert!(room.sid.starts_with("RM_"));
        assert_eq!(
            u64::from(room.departure_timeout),
            body["room"]["departureTimeout"].as_u64().unwrap_or(0)
        );

        let theirs = &body["participant"];
        assert_eq!(webhook.participant.is_some(), theirs.is_object());
        if let Some(ours) = webhook.participant {
            assert_eq!(
                (&*ours.identity, &*ours.sid),
                (string(&theirs["identity"]).as_str(), string(&theirs["sid"]).as_str())
            );
            assert!(ours.sid.starts_with("PA_") && !ours.identity.is_empty());
            let joined = |key: &str| int(&theirs[key]).unwrap_or(0).cast_unsigned();
            assert_eq!((ours.joined_at, ours.joined_at_ms), (joined("joinedAt"), joined("joinedAtMs")));
            let reason = proto::DisconnectReason::from_str_name(theirs["disconnectReason"].as_str().unwrap_or("UNKNOWN_REASON"));
            assert_eq!(ours.disconnect_reason, reason.unwrap().into());
            let (state, left) = match webhook.kind {
                Kind::ParticipantJoined => (State::Active, false),
                Kind::ParticipantLeft | Kind::ParticipantConnectionAborted => (State::Disconnected, true),
                // LiveKit says identity and sid only.
                Kind::TrackPublished | Kind::TrackUnpublished => (State::Joining, false),
                Kind::RoomStarted | Kind::RoomFinished | Kind::Other => panic!("{:?} of a participant", webhook.kind),
            };
            assert_eq!((ours.state, ours.disconnect_reason != DisconnectReason::Unknown), (state, left));
        }
    }
    let expected = [
        ("ParticipantConnectionAborted", 2),
        ("ParticipantJoined", 29),
        ("ParticipantLeft", 27),
        ("RoomFinished", 22),
        ("RoomStarted", 33),
        ("TrackPublished", 13),
        ("TrackUnpublished", 11),
    ];
    assert_eq!(kinds.iter().map(|(kind, n)| (kind.as_str(), *n)).collect::<Vec<_>>(), expected);
}

#[test]
fn a_token_proves_only_what_it_says() {
    let header = json!({"alg": "HS256", "typ": "JWT"});
    let good = json!({"iss": "devkey", "exp": THEN + 300, "nbf": THEN, "iat": THEN, "sha256": hash(b"{}")});
    let with = |key: &str, value: Value| {
        let mut payload = good.clone();
        payload[key] = value;
        if payload[key].is_null() {
            payload.as_object_mut().unwrap().remove(key);
        }
        sign(&header, &payload, SECRET)
    };
    let verify = |token: &str| Claims::verify(token, &devkey(), THEN).map(|_| ());
    assert_eq!(verify(&sign(&header, &good, SECRET)), Ok(()));
    for (token, error) in [
        (String::new(), WebhookAuthError::Missing),
        (" ".into(), WebhookAuthError::Missing),
        ("Bearer ".into(), WebhookAuthError::NotJwt),
        ("Basic Zm9vOmJhcg==".into(), WebhookAuthError::NotJwt),
        ("a.b".into(), WebhookAuthError::NotJwt),
        ("é.é.é".into(), WebhookAuthError::NotJwt),
        ("a.b.c.d".into(), WebhookAuthError::NotJwt),
        (sign(&json!({"alg": "none"}), &good, SECRET), WebhookAuthError::Algorithm),
        (sign(&json!({"alg": "HS512"}), &good, SECRET), WebhookAuthError::Algorithm),
        (sign(&json!({}), &good, SECRET), WebhookAuthError::NotJwt),
        (sign(&header, &json!([]), SECRET), WebhookAuthError::NotJwt),
        (sign(&header, &good, "another"), WebhookAuthError::Signature),
        (with("iss", json!("somebody")).replace('.', ".x"), WebhookAuthError::NotJwt),
        (with("exp", json!(null)), WebhookAuthError::Endless),
        (with("exp", json!(THEN - 61)), WebhookAuthError::Expired),
        (with("nbf", json!(THEN + 61)), WebhookAuthError::Early),
        (with("sha256", json!(null)), WebhookAuthError::NotWebhook),
        (with("sha256", json!("?")), WebhookAuthError::NotWebhook),
        // Of another length it is the hash of no body.
        (with("sha256", json!("AAAA")), WebhookAuthError::NotWebhook),
    ] {
        assert_eq!(verify(&token), Err(error), "{token}");
        assert!(!error.remedy().is_empty());
    }
    for fine in [
        with("exp", json!(THEN - 59)),
        with("exp", json!(THEN as f64 + 0.5)),
        with("nbf", json!(null)),
        with("nbf", json!(THEN + 59)),
        with("iat", json!(null)),
        with(
            "sha256",
            json!(hash(b"{}").replace('+', "-").replace('/', "_").trim_end_matches('=')),
        ),
    ] {
        let claims = Claims::verify(&fine, &devkey(), THEN).unwrap();
        claims.body_matches(b"{}").unwrap();
        assert_eq!(claims.body_matches(b"").unwrap_err(), WebhookAuthError::Body);
    }
    assert_eq!(
        Claims::verify(&with("iat", json!(null)), &devkey(), THEN)
            .unwrap()
            .body_matches(b"{}")
            .unwrap()
            .issued_at,
        None
    );
}

#[test]
fn every_configured_key_is_tried() {
    let header = json!({"alg": "HS256"});
    let token = |iss: Option<&str>, secret: &str| {
        let mut payload = json!({"exp": THEN + 300, "sha256": hash(b"{}")});
        if let Some(iss) = iss {
            payload["iss"] = json!(iss);
        }
        sign(&header, &payload, secret)
    };
    let keys = keys(&[("first", "one"), ("second", "two"), ("second", "three")]);
    for (iss, secret, outcome) in [
        (Some("first"), "one", Ok(())),
        (Some("second"), "two", Ok(())),
        (Some("second"), "three", Ok(())),
        (Some("renamed"), "two", Ok(())),
        (None, "three", Ok(())),
        (Some("first"), "two", Err(WebhookAuthError::Signature)),
        (Some("renamed"), "four", Err(WebhookAuthError::UnknownKey)),
        (None, "four", Err(WebhookAuthError::UnknownKey)),
        (None, "", Err(WebhookAuthError::UnknownKey)),
    ] {
        assert_eq!(
            Claims::verify(&token(iss, secret), &keys, THEN).map(|_| ()),
            outcome,
            "{iss:?} {secret}"
        );
    }
}

#[test]
fn our_own_tokens_are_no_webhooks() {
    let pair = KeyPair {
        key: "devkey".into(),
        secret: Secret::new(SECRET),
    };
    let grants = crate::token::Grants {
        can_update_own_metadata: true,
        publish_sources: Vec::new(),
    };
    let minter = crate::token::Minter::new(&pair, std::time::Duration::from_secs(3600), grants).unwrap();
    let participant = crate::identity::ParticipantKey {
        room: "r".into(),
        identity: "i".into(),
    };
    let access = crate::access::Access {
        creates_rooms: true,
        publishes: true,
    };
    let grants = livekit_api::access_token::VideoGrants::default();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    for token in [
        minter.mint(&participant, access).unwrap(),
        minter.api_token(grants, std::time::Duration::from_secs(60)).unwrap(),
    ] {
        assert_eq!(Claims::verify(&token, &devkey(), now).unwrap_err(), WebhookAuthError::NotWebhook);
    }
}

#[test]
fn reads_what_other_versions_may_send() {
    let participant = |json: &str| {
        Webhook::parse(format!(r#"{{"participant":{json}}}"#).as_bytes())
            .unwrap()
            .participant
    };
    let read = participant(
        r#"{"identity":"i","sid":"s","state":2,"joined_at":1795241183,"joined_at_ms":"1795241183123","disconnect_reason":14,"name":"\ud800"}"#,
    );
    let expected = Participant {
        identity: "i".into(),
        sid: "s".into(),
        state: State::Active,
        joined_at: 1_795_241_183,
        joined_at_ms: 1_795_241_183_123,
        disconnect_reason: DisconnectReason::ConnectionTimeout,
    };
    assert_eq!(read, Some(expected));
    for (reason, expected) in [
        ("\"CLIENT_INITIATED\"", DisconnectReason::ClientInitiated),
        ("1", DisconnectReason::ClientInitiated),
        ("1.0", DisconnectReason::ClientInitiated),
        ("\"1\"", DisconnectReason::ClientInitiated),
        ("\"MADE_UP\"", DisconnectReason::Unknown),
        ("4711", DisconnectReason::Unknown),
        ("-1", DisconnectReason::Unknown),
        ("1e300", DisconnectReason::Unknown),
        ("null", DisconnectReason::Unknown),
        ("[]", DisconnectReason::Unknown),
    ] {
        let read = participant(&format!(r#"{{"disconnectReason":{reason}}}"#)).unwrap();
        assert_eq!(read.disconnect_reason, expected, "{reason}");
    }
    assert_eq!(participant(r#"{"state":"NEW"}"#).unwrap().state, State::Unknown);
    assert_eq!(
        participant(r#"{"identity":5,"joinedAtMs":"x","sid":null}"#),
        Some(Participant::default())
    );
    for nothing in ["null", "5", "\"x\"", "[]"] {
        assert_eq!(participant(nothing), None);
    }

    let bare = |body: &[u8]| Webhook::parse(body);
    assert_eq!(bare(b"{}"), Ok(Webhook::default()));
    assert_eq!(
        bare(br#"{"event":"egress_started","egressInfo":{"x":[1]}}"#),
        Ok(Webhook::default())
    );
    assert_eq!(bare(br#"{"event":7}"#), Ok(Webhook::default()));
    assert_eq!(bare(br#"{"created_at":5,"createdAt":6}"#).unwrap().created_at, Some(6));
    assert_eq!(&*bare(b"{\"id\":\"a\xffb\"}").unwrap().id, "a\u{fffd}b");
    assert_eq!(&*bare(br#"{"id":"\ud800"}"#).unwrap().id, "");
    assert_eq!(
        bare(br#"{"room":{"numParticipants":-3,"departureTimeout":99999999999}}"#)
            .unwrap()
            .room
            .unwrap()
            .departure_timeout,
        u32::MAX
    );
    for none in [b"" as &[u8], b"[]", b"null", b"{", b"{\"a\":}", b"\xff"] {
        assert_eq!(bare(none), Err(NotJson));
    }
    let deep = format!(r#"{{"x":{}{},"event":"room_started"}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(bare(deep.as_bytes()).unwrap().kind, Kind::RoomStarted);
}

fn key() -> impl Strategy<Value = String> {
    let known = [
        "event",
        "id",
        "createdAt",
        "created_at",
        "room",
        "participant",
        "name",
        "sid",
        "identity",
        "state",
        "joinedAt",
        "joinedAtMs",
        "disconnectReason",
        "disconnect_reason",
        "numParticipants",
        "departureTimeout",
    ];
    prop_oneof![4 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,6}"]
}

fn almost_a_webhook() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n.to_string())),
        prop::sample::select(vec!["participant_left", "room_finished", "CLIENT_INITIATED", "ACTIVE"]).prop_map(|s| json!(s)),
        "\\PC{0,9}".prop_map(|s| json!(s)),
    ];
    let value = leaf.prop_recursive(4, 32, 8, |inner| {
        prop_oneof![
            1 => prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            3 => prop::collection::hash_map(key(), inner, 0..8).prop_map(|map| json!(map)),
        ]
    });
    let recorded: Vec<String> = lines(RECORDED)
        .iter()
        .map(|line| line["body"].as_str().unwrap().to_owned())
        .collect();
    let mangled = (
        prop::sample::select(recorded),
        any::<prop::sample::Index>(),
        any::<u8>(),
        any::<bool>(),
    )
        .prop_map(|(body, at, byte, cut)| {
            let mut bytes = body.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if cut {
                bytes.truncate(at);
            }
            bytes
        });
    prop_oneof![
        value.prop_map(|value| value.to_string().into_bytes()),
        mangled,
        prop::collection::vec(any::<u8>(), 0..128),
    ]
}

proptest! {
    // `tests/fuzz` tries a million.
    #[test]
    fn no_body_is_a_panic(body in almost_a_webhook()) {
        if let Ok(webhook) = Webhook::parse(&body) {
            // Whatever is JSON keeps its room and participant, and only then.
            if let Ok(value) = serde_json::from_slice::<Value>(&body) {
                let has = |key: &str| value.get(key).is_some_and(Value::is_object);
                prop_assert!(!has("room") || webhook.room.is_some());
                prop_assert!(!has("participant") || webhook.participant.is_some());
            }
        }
    }

    #[test]
    fn no_header_is_a_panic_or_a_proof(header in "\\PC{0,40}|(Bearer )?[A-Za-z0-9_-]{0,20}\\.[A-Za-z0-9_-]{0,20}\\.[A-Za-z0-9_-]{0,44}") {
        prop_assert!(Claims::verify(&header, &devkey(), THEN).is_err());
    }

    #[test]
    fn no_payload_proves_anything_without_the_secret(payload in prop::collection::vec(any::<u8>(), 0..80), signed_with_ours: bool) {
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
        let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(&payload));
        let secret = if signed_with_ours { SECRET } else { "theirs" };
        let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap().chain_update(&signed).finalize();
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.into_bytes()));
        prop_assert!(Claims::verify(&token, &devkey(), THEN).is_err());
    }
}
