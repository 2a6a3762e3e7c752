//! The `as_token` goes to our homeserver's client-server API and to nobody else, whatever anybody names.

use std::time::Duration;

use serde_json::json;

use super::{Ask, OTHER, Stage};
use crate::support::hashes::{SLOT, alias, homeserver_identity};
use crate::support::homeserver::{CLIENT_WELL_KNOWN, Homeserver};
use crate::support::neighbour::{Neighbour, Reply};
use crate::support::own_homeserver::{Asked, OwnHomeserver};
use crate::support::{unique_loopback, wait_until, webhook};

/// Two hosts that nobody should trust, with and without TLS: to any request they answer what a homeserver would.
struct Evil {
    plain: Neighbour,
    tls: Homeserver,
}

impl Evil {
    fn start() -> Self {
        let yes = |_: &_| Reply::json(200, &json!({"joined": true, "jwt": "evil", "unstable_features": {}}));
        Self {
            plain: Neighbour::start((unique_loopback(), 0).into(), None, yes),
            tls: Homeserver::start(),
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.plain.address())
    }

    fn tls_url(&self) -> String {
        format!("https://{}", self.tls.name)
    }

    /// Nobody brought it a token of any kind.
    #[track_caller]
    fn assert_innocent(&self) {
        for request in self.plain.requests().iter().chain(&self.tls.http.requests()) {
            let whole = format!(
                "{} {:?} {}",
                request.target,
                request.headers,
                String::from_utf8_lossy(&request.body)
            );
            assert!(!whole.contains("NEVERLOG") && request.header("authorization").is_none(), "{whole}");
        }
    }

    /// Nobody called at all.
    #[track_caller]
    fn assert_lonely(&self) {
        let calls: Vec<_> = self
            .plain
            .requests()
            .into_iter()
            .chain(self.tls.http.requests())
            .map(|r| r.target)
            .collect();
        assert_eq!(calls, [""; 0]);
        assert_eq!(self.plain.connections().len() + self.tls.http.connections().len(), 0);
    }
}

#[test]
fn whatever_a_request_names_only_our_homeserver_is_called() {
    let (stage, evil) = (Stage::new(), Evil::start());
    let own = stage.own.name().to_owned();
    let hosts = [evil.tls.name.clone(), evil.plain.address().to_string()];
    for host in &hosts {
        // Another homeserver: it is told by ours.
        let ask = stage
            .client()
            .set("server_name", host.as_str())
            .set("url", format!("http://{host}"));
        stage.own.join(&ask.room(), host);
        // Its service says to go elsewhere.
        let elsewhere = format!("http://{host}/x");
        stage.own.peer(host, move |_| {
            (302, json!({"jwt": elsewhere, "Location": elsewhere, "url": elsewhere}))
        });
        stage.call(&ask).assert_errcode(502, "M_UNKNOWN");
        for url in [
            format!("ws://{host}"),
            format!("{}@{host}", stage.sfu.url()),
            format!("{}/../{host}", stage.sfu.url()),
        ] {
            stage
                .call(&stage.client().set("url", url.as_str()))
                .assert_errcode(400, "M_INVALID_PARAM");
        }
        // A homeserver, and its users.
        let bob = format!("@bob:{host}");
        let mut ask = stage.federated().set("user_id", bob.as_str());
        ask.who = Some(host.clone());
        stage.own.join(&ask.room(), &bob);
        assert_eq!(stage.call(&ask).status, 200);
        for user in [
            bob.clone(),
            format!("@alice:{own}@{host}"),
            format!("@alice:{own}#{host}"),
            format!("@alice:{host}/{own}"),
            format!("@alice:{own}.{host}"),
            format!("@alice:{own}:80"),
            format!("@:{own}"),
        ] {
            let mut ask = stage.client();
            ask.who = Some(user.clone());
            let answer = stage.service.call(&ask.call());
            assert_eq!(answer.status, 400, "{user:?}: {}", answer.text());
        }
        for (origin, user) in [(format!("{own}/{host}"), "@a:b".to_owned()), (host.clone(), format!("@a:{own}"))] {
            let mut ask = stage.federated().set("user_id", user.as_str());
            ask.who = Some(origin.clone());
            stage.call(&ask).assert_errcode(403, "M_FORBIDDEN");
        }
    }
    for name in [
        "http://evil.example",
        "evil.example/x",
        "evil.example?x",
        "evil.example#x",
        "a@evil.example",
        "../..",
        "evil.example\n",
        "evil.example\0",
        "%2e%2e",
    ] {
        let before = stage.own.asked().len();
        let answer = stage.call(&stage.client().set("server_name", name));
        answer.assert_errcode(400, "M_INVALID_PARAM");
        assert_eq!(stage.own.asked().len(), before, "{name:?}");
    }
    evil.assert_lonely();
    assert_eq!(stage.own.count(|asked| *asked == Asked::Unknown), 0);
}

/// Rooms, users and events whose names look like paths and queries.
#[test]
fn a_name_stays_one_segment_and_one_parameter() {
    let stage = Stage::new();
    for room in [
        "!../../../_matrix/client/v3/account/whoami:x",
        "!..",
        "!/../..",
        "!%2e%2e%2fadmin",
        "!r?mxid=@admin:x&server_name=y",
        "!r#fragment:x",
        "!r\0:x",
        "!r\n:x",
        "!r\r\nHost: evil:x",
        "!r +&=;:x",
        "!räum\u{202e}:x",
        "!a/is_joined?x",
        "!\\..\\x",
    ] {
        let user = stage.own.user("alice");
        stage.own.join(room, &user);
        let answer = stage.call(&stage.client_in(room));
        assert_eq!(answer.status, 200, "{room:?}: {}", answer.text());
        let asked = stage.own.asked().pop().expect("a question").1;
        let expected = Asked::IsJoined {
            stable: false,
            room: room.into(),
            mxid: Some(user.clone()),
            server: None,
        };
        assert_eq!(asked, expected);
        let mut delegation = stage.client_in(room).set("delay_id", stage.own.schedule(&user, room, 600_000));
        delegation.path = super::DELEGATE.into();
        assert_eq!(stage.call(&delegation).status, 200, "{room:?}");
        let relayed = stage.relayed().set("room_id", room);
        stage.own.join(room, OTHER);
        assert_eq!(stage.call(&relayed).status, 200, "{room:?}");
        assert_eq!(stage.own.relayed().pop().expect("a relay")["body"]["room_id"], room);
    }
    // Users with historical names; what a header cannot hold does not come.
    for local in [
        "al/../ice",
        "al?x=1&user_id=@bob",
        "al#x",
        "al%2e%2e",
        "a+b c",
        "älice",
        "al\u{202e}",
    ] {
        let user = format!("@{local}:{}", stage.own.name());
        let mut ask = stage.client();
        stage.own.join(&ask.room(), &user);
        ask.who = Some(user.clone());
        assert_eq!(stage.call(&ask).status, 200, "{user}");
    }
    for delay_id in ["../../x", "a/b", "a?user_id=@bob:x", "a#b", "%2e%2e", "a\0b", "a\nb", "syd_ä"] {
        let ask = stage.delegation().set("delay_id", delay_id);
        stage.call(&ask).assert_errcode(400, "M_INVALID_PARAM");
        let asked = stage.own.asked().pop().expect("a question").1;
        let expected = Asked::Event {
            stable: false,
            delay_id: delay_id.into(),
        };
        assert_eq!(asked, expected);
    }
    // What is no room's id at all is not asked about.
    for room in ["../../../x", "#alias:x", "!", ".", "..", "/", "%21r", " !r"] {
        let before = stage.own.asked().len();
        stage.call(&stage.client_in(room)).assert_errcode(403, "M_FORBIDDEN");
        assert_eq!(stage.own.asked().len(), before, "{room:?}");
    }
    let (before, long) = (stage.own.asked().len(), format!("!{}", "r".repeat(255)));
    for ask in [stage.client(), stage.relayed(), stage.federated(), stage.delegation()] {
        stage.call(&ask.set("room_id", long.as_str())).assert_errcode(400, "M_BAD_JSON");
    }
    assert_eq!(stage.own.asked().len(), before, "an id that is too long");
    assert_eq!(stage.own.count(|asked| *asked == Asked::Unknown), 0);
}

#[test]
fn redirects_of_our_homeserver_are_not_followed() {
    let (stage, evil) = (Stage::new(), Evil::start());
    for status in [301, 302, 303, 307, 308] {
        for target in [evil.url(), evil.tls_url()] {
            stage
                .own
                .script(move |request, _| Some(Reply::redirect(status, &format!("{target}{}", request.target))));
            for (make, expected) in [
                (Stage::client as fn(&Stage) -> Ask, 502),
                (Stage::relayed, 502),
                (Stage::federated, 502),
                (Stage::delegation, 503),
            ] {
                let answer = stage.call(&make(&stage));
                assert_eq!(answer.status, expected, "{status}: {}", answer.text());
            }
        }
    }
    // The endpoints behind the first question, too.
    let target = evil.url();
    stage.own.script(move |request, asked| {
        let last = asked.is_relay() || asked.is_about_user() && request.query("mxid").is_some_and(|user| user.starts_with("@delegates:"));
        last.then(|| Reply::redirect(307, &format!("{target}{}", request.target)))
    });
    assert_eq!(stage.call(&stage.relayed()).status, 502);
    let mut delegation = stage.delegation();
    let user = stage.own.user("delegates");
    delegation = delegation
        .clone()
        .set("delay_id", stage.own.schedule(&user, &delegation.room(), 600_000));
    delegation.who = Some(user);
    assert_eq!(stage.call(&delegation).status, 502);
    evil.assert_lonely();
}

#[test]
fn redirects_of_restarts_are_not_followed() {
    let (stage, evil) = (Stage::new(), Evil::start());
    let ask = stage.delegation();
    let short = stage.own.schedule(&stage.own.user("alice"), &ask.room(), 1_000);
    let target = evil.url();
    stage.own.script(move |request, asked| {
        let managed = matches!(asked, Asked::Manage { .. });
        managed.then(|| Reply::redirect(307, &format!("{target}{}", request.target)))
    });
    assert_eq!(stage.call(&ask.clone().set("delay_id", short.as_str())).status, 200);
    let identity = homeserver_identity(&stage.own.user("alice"), "member1");
    let session = stage.sfu.join(&alias(&ask.room(), SLOT), &identity);
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
    wait_until("a restart and another try", Duration::from_secs(20), || {
        stage.own.managed(&short, "restart").len() >= 2
    });
    evil.assert_lonely();
}

fn well_known(base_url: &str) -> Reply {
    Reply::json(200, &json!({"m.homeserver": {"base_url": base_url}}))
}

#[test]
fn a_well_known_file_may_name_https_only() {
    // The good case, without which the others show nothing.
    let own = OwnHomeserver::start_with_tls();
    own.federation.answer_client_well_known(well_known(&own.url()));
    let stage = Stage::lost(own);
    assert_eq!(stage.call(&stage.client()).status, 200);
    assert_eq!(stage.call(&stage.relayed()).status, 200);

    let evil = Evil::start();
    for ours in [true, false] {
        let own = OwnHomeserver::start();
        let base = if ours { own.url() } else { evil.url() };
        own.federation.answer_client_well_known(well_known(&base));
        let stage = Stage::lost(own);
        for make in [Stage::client, Stage::relayed, Stage::federated, Stage::delegation] as [fn(&Stage) -> Ask; 4] {
            let answer = stage.call(&make(&stage));
            answer.assert_errcode(400, "M_BAD_JSON");
            // What is warned about says what to set.
            stage
                .service
                .wait_line_of(&answer)
                .says(&["WARN", "refused", "LIVEKIT_CS_API_URL_OVERRIDES"]);
        }
        assert_eq!(stage.own.asked().len(), 0);
    }
    evil.assert_innocent();
}

#[test]
fn in_a_laboratory_http_will_do() {
    let own = OwnHomeserver::start();
    own.federation.answer_client_well_known(well_known(&own.url()));
    let stage = Stage::of(own, |setup| {
        setup
            .unset("LIVEKIT_CS_API_URL_OVERRIDES")
            .env("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
    });
    assert_eq!(stage.call(&stage.client()).status, 200);
}

/// The file may be elsewhere, but whoever hands it out sees no token.
#[test]
fn redirects_of_the_well_known_file_take_no_token_along() {
    for status in [301, 302, 307, 308] {
        let (evil, own) = (Evil::start(), OwnHomeserver::start_with_tls());
        let location = format!("{}{CLIENT_WELL_KNOWN}", evil.tls_url());
        own.federation.answer_client_well_known(Reply::redirect(status, &location));
        evil.tls.answer_client_well_known(well_known(&own.url()));
        let stage = Stage::lost(own);
        assert_eq!(stage.call(&stage.client()).status, 200, "{status}");
        assert_eq!(evil.tls.http.requests().len(), 1);
        evil.assert_innocent();
        // To http it is not followed at all.
        let (evil, own) = (Evil::start(), OwnHomeserver::start_with_tls());
        let location = format!("{}{CLIENT_WELL_KNOWN}", evil.url());
        own.federation.answer_client_well_known(Reply::redirect(status, &location));
        let stage = Stage::lost(own);
        stage.call(&stage.client()).assert_errcode(400, "M_BAD_JSON");
        evil.assert_lonely();
        assert_eq!(stage.own.asked().len(), 0);
    }
}

/// Everything at once, at the finest level of the log; `Stage` looks at every answer, and at the log when it ends.
#[test]
fn no_log_and_no_answer_holds_a_token() {
    let stage = Stage::new();
    for make in [Stage::client, Stage::relayed, Stage::federated, Stage::delegation] as [fn(&Stage) -> Ask; 4] {
        assert_eq!(stage.call(&make(&stage)).status, 200);
        for status in [400, 401, 403] {
            // A homeserver that repeats what it was sent.
            stage.own.script(move |request, _| {
                let sent = format!(
                    "{} {:?} {}",
                    request.target,
                    request.headers,
                    String::from_utf8_lossy(&request.body)
                );
                Some(Reply::json(
                    status,
                    &json!({"errcode": sent, "error": sent, "joined": sent, "status": sent}),
                ))
            });
            let answer = stage.call(&make(&stage));
            assert!(answer.status >= 400, "{status}: {}", answer.text());
            stage.own.unscript();
        }
    }
    let log = stage.service.log();
    assert!(log.contains("DEBUG") && log.contains("refused"), "nothing in the log to look at");
}
