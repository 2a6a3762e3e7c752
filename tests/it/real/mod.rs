//! Against real neighbours: Synapse, livekit-server, LiveKit's own client, reverse proxies.
//!
//! `tests/run` installs them. Without it (`LK_TESTS_REAL`) these tests are left out, which stderr says.

mod alerts;
mod appservice;
mod dev;
mod edge;
mod exchange;
mod fakes;
mod faults;
mod moves;
mod policy;
mod proxies;
mod room_memory;
mod sdks;
mod sfu;

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::support::ca::Ca;
use crate::support::hashes::{SLOT, alias};
use crate::support::jwt::Jwt;
use crate::support::livekit::Livekit;
use crate::support::process::{real_neighbours, say};
use crate::support::service::Service;
use crate::support::synapse::Synapse;

/// The neighbours that the tests of this module share.
struct Neighbours {
    /// Has full access where a test does not say otherwise.
    home: &'static Synapse,
    /// Has not.
    away: &'static Synapse,
    livekit: &'static Livekit,
}

impl Neighbours {
    /// `None` where these tests are left out.
    fn get() -> Option<Self> {
        if !real_neighbours() {
            return None;
        }
        let livekit = Livekit::shared();
        let [home, away] = Synapse::pair();
        Some(Self { home, away, livekit })
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, tail) in [
                ("homeserver A", self.home.tail()),
                ("homeserver B", self.away.tail()),
                ("livekit-server", self.livekit.tail()),
            ] {
                say(&format!("the end of the log of {name}:\n{tail}"));
            }
        }
    }
}

/// What a token says that a service gave for `livekit`; its signature is checked.
#[track_caller]
fn claims(answer: &Value, livekit: &Livekit) -> Value {
    let jwt = Jwt::decode(answer["jwt"].as_str().expect("jwt")).expect("a JWT");
    assert!(
        jwt.is_signed_with(livekit.secret()),
        "not signed with the secret that the SFU knows"
    );
    jwt.claims
}

/// Fails unless it is a token for everything that a call needs, and nothing else.
#[track_caller]
fn assert_grants(claims: &Value, key: &str, identity: &str, room: &str) {
    assert_eq!((&claims["iss"], &claims["sub"]), (&json!(key), &json!(identity)));
    let granted: serde_json::Map<_, _> = claims["video"]
        .as_object()
        .expect("grants")
        .iter()
        .filter(|(_, value)| **value != json!(false) && **value != json!("") && **value != json!([]))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let expected = json!({
        "roomJoin": true, "room": alias(room, SLOT), "canPublish": true, "canSubscribe": true, "canPublishData": true,
        "canUpdateOwnMetadata": true,
    });
    assert_eq!(Value::Object(granted), expected);
}

/// Fails when the log holds one of these OpenID tokens. (JWTs and the SFU's secret are searched for in every log.)
#[track_caller]
fn assert_not_logged(service: &Service, bodies: &[&Value]) {
    for body in bodies {
        let token = body["openid_token"]["access_token"].as_str().expect("a token");
        assert!(!service.log().contains(token), "an OpenID token is in the log");
    }
}

/// A client that trusts the tests' authority.
fn https() -> reqwest::Client {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(Ca::trusted().file()).expect("a certificate"))
        .expect("a root");
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .no_proxy()
        .build()
        .expect("a client")
}
