//! Planted faults on the real deployment: `doctor` names each by its id, and tells of no other.

use std::time::Duration;

use serde_json::{Value, json};

use super::stack::{Plan, RELAY, Stack, UPGRADE, WEB, client_file, file_with, jwt, registration, sfu};
use crate::support::network::in_own_network;
use crate::support::process::{real_neighbours, say};
use crate::support::secrets;
use crate::support::udp_relay::Link;

/// Debian's; the command `faketime` would stand between us and the service.
const LIBFAKETIME: &str = "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
/// Ports of the SFU for media are closed.
const CLOSED: &str = "table inet t {\nchain blocked {\ntype filter hook input priority 0;\nudp dport 7882 drop\ntcp dport 7881 drop\n}\n}";
/// Arguments by which a fault is looked for.
const INSIDE: &[&str] = &[];
const SLOW: &[&str] = &["--slow"];
/// As from a laptop with the secret: another machine in another network.
const OUTSIDE: &[&str] = &["--url", super::stack::PUBLIC];

/// A fault that is planted, and what is to be found.
struct Planted {
    name: &'static str,
    plant: fn(&mut Plan),
    arguments: &'static [&'static str],
    /// Every `FAIL`.
    fails: &'static [&'static str],
    /// Warnings, at least.
    warns: &'static [&'static str],
}

const fn planted(name: &'static str, fails: &'static [&'static str], plant: fn(&mut Plan)) -> Planted {
    Planted {
        name,
        plant,
        arguments: INSIDE,
        fails,
        warns: &[],
    }
}

fn env(plan: &mut Plan, name: &'static str, value: &str) {
    plan.env.insert(name, value.to_owned());
}

fn nginx(plan: &mut Plan, part: &'static str, text: impl Into<String>) {
    plan.nginx.insert(part, text.into());
}

fn service_url(plan: &mut Plan, url: &str) {
    nginx(plan, "client-file", client_file(&file_with(url)));
}

/// The SFU tells its clients of the other end of this link.
fn slow_link(plan: &mut Plan, link: Link) {
    plan.sfu["rtc"]["node_ip"] = json!(RELAY.to_string());
    plan.link = Some(link);
}

/// Those that need no start of Synapse, two to three seconds each.
const QUICK: &[Planted] = &[
    planted("wrong secret", &["sfu-secret"], |plan| {
        env(plan, "LIVEKIT_SECRET", &secrets::sfu_secret());
    }),
    planted("auto_create on", &["sfu-auto-create"], |plan| {
        plan.sfu["room"]["auto_create"] = json!(true);
    }),
    planted("no WebSocket upgrade", &["sfu-websocket"], |plan| nginx(plan, "sfu", sfu(""))),
    planted("private node_ip", &["sfu-node-ip"], |plan| {
        plan.sfu["rtc"]["node_ip"] = json!("10.0.0.5");
    }),
    planted("no webhook", &["webhook-missing"], |plan| plan.sfu["webhook"]["urls"] = json!([])),
    planted("only /sfu/get is routed", &["route-missing"], |plan| {
        let exact = "location = /livekit/jwt/sfu/get { proxy_pass http://127.0.0.1:8080/sfu/get; }";
        nginx(plan, "jwt", format!("{exact} location / {{ proxy_pass http://127.0.0.1:7880; }}"));
    }),
    planted("two CORS values", &["route-cors-twice"], |plan| {
        nginx(plan, "jwt", jwt("add_header Access-Control-Allow-Origin * always;"));
    }),
    planted("well-known missing", &["well-known-missing"], |plan| nginx(plan, "client-file", "")),
    planted("another host in the well-known file", &["route-other"], |plan| {
        service_url(plan, "https://matrix.example.org/livekit/jwt");
    }),
    planted("federation port closed", &["federation-unreachable"], |plan| {
        let file = "location = /.well-known/matrix/server { return 200 '{\"m.server\": \"matrix.example.org:8449\"}'; }";
        nginx(plan, "server-file", file);
    }),
    planted("Redis denies writing", &["store-rights"], |plan| {
        let rights = [
            "--user", "default", "on", "nopass", "~*", "&*", "-@all", "+ping", "+hgetall", "+hscan",
        ];
        plan.redis = rights.map(str::to_owned).to_vec();
    }),
    planted("a typo in a list", &["server-name"], |plan| {
        env(plan, "LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.org,exmaple.org");
    }),
];

/// The others.
const SLOWER: &[Planted] = &[
    planted("wrong key", &["sfu-key"], |plan| env(plan, "LIVEKIT_KEY", "nobody")),
    planted("clock off by two minutes", &["sfu-clock"], |plan| {
        plan.wrapper = vec!["env", LIBFAKETIME, "FAKETIME=+130s"];
    }),
    Planted {
        warns: &["lists-contradict", "server-name"],
        ..planted("lists that contradict, with a typo", &[], |plan| {
            env(plan, "LIVEKIT_ALLOWED_HOMESERVERS", "evil.example.org");
            env(plan, "LIVEKIT_BLOCKED_HOMESERVERS", "*.example.org,exmaple.org");
        })
    },
    planted("SFU not reached", &["sfu-unreachable"], |plan| {
        env(plan, "LIVEKIT_API_URL", "http://127.0.0.1:7999");
    }),
    planted("wrong path of the API", &["sfu-path"], |plan| {
        env(plan, "LIVEKIT_API_URL", "http://127.0.0.1:7880/wrong");
    }),
    Planted {
        // Inside it may be a NAT without hairpin.
        warns: &["sfu-udp", "sfu-tcp"],
        ..planted("TCP and UDP closed, seen from inside", &[], |plan| {
            plan.firewall = CLOSED.to_owned();
        })
    },
    Planted {
        arguments: OUTSIDE,
        // The service warns of the same from inside.
        warns: &["sfu-udp", "sfu-tcp"],
        ..planted("TCP and UDP closed, seen from outside", &["sfu-tcp", "sfu-udp"], |plan| {
            plan.firewall = CLOSED.to_owned();
        })
    },
    Planted {
        arguments: OUTSIDE,
        warns: &["sfu-udp"],
        ..planted("UDP blocked", &["sfu-udp"], |plan| {
            plan.firewall = "table inet t {\nchain blocked {\ntype filter hook input priority 0;\nudp dport 7882 drop\n}\n}".into();
        })
    },
    Planted {
        arguments: OUTSIDE,
        // The service itself sees nothing of it.
        ..planted("UDP blocked on the way", &["sfu-udp"], |plan| {
            plan.firewall =
                "table inet t {\nchain blocked {\ntype filter hook input priority 0;\niifname != \"lo\" udp dport 7882 drop\n}\n}".into();
        })
    },
    Planted {
        arguments: OUTSIDE,
        ..planted("a slow link that loses every other datagram is no fault", &[], |plan| {
            slow_link(
                plan,
                Link {
                    delay: Duration::from_millis(450),
                    one_of: 2,
                },
            );
        })
    },
    Planted {
        arguments: OUTSIDE,
        warns: &["sfu-udp"],
        ..planted("a link that loses all", &["sfu-udp"], |plan| {
            slow_link(
                plan,
                Link {
                    delay: Duration::ZERO,
                    one_of: usize::MAX,
                },
            );
        })
    },
    Planted {
        warns: &["sfu-public-unreachable", "route-unreachable", "sfu-udp", "sfu-tcp"],
        // The public address is not reached from behind the same NAT; others reach it.
        ..planted("no hairpin", &[], |plan| {
            plan.wrapper = vec!["setpriv", "--reuid=65534", "--clear-groups"];
            plan.firewall = format!(
                "table inet t {{\nchain blocked {{\ntype filter hook output priority 0;\nmeta skuid 65534 ip daddr {WEB} drop\n}}\n}}"
            );
        })
    },
    planted(
        "a host of LIVEKIT_URL that is none",
        &["sfu-public-name", "transports-url"],
        |plan| {
            // The homeserver's transport has the right one.
            env(plan, "LIVEKIT_URL", "wss://nowhere.example.org/livekit/sfu");
        },
    ),
    Planted {
        warns: &["sfu-public-unreachable"],
        // The homeserver's transport has the right one.
        ..planted("a port of LIVEKIT_URL that is closed", &["transports-url"], |plan| {
            env(plan, "LIVEKIT_URL", "wss://livekit.example.org:444/livekit/sfu");
        })
    },
    planted("wrong path of the SFU", &["sfu-public-path"], |plan| {
        nginx(plan, "sfu", sfu(UPGRADE).replace("7880/", "7880/wrong/"));
    }),
    planted("webhook at a wrong path", &["webhook-path"], |plan| {
        plan.sfu["webhook"]["urls"] = json!(["http://127.0.0.1:8080/webhook"]);
    }),
    planted("webhook with another key", &["webhook-key"], |plan| {
        plan.sfu["keys"]["other"] = json!(secrets::sfu_secret());
        plan.sfu["webhook"]["api_key"] = json!("other");
    }),
    planted("prefix that nobody knows", &["route-prefix"], |plan| {
        nginx(plan, "jwt", jwt("").replace("8080/", "8080/other/"));
    }),
    planted("no CORS", &["route-cors-missing"], |plan| {
        nginx(plan, "jwt", jwt("proxy_hide_header Access-Control-Allow-Origin;"));
    }),
    Planted {
        arguments: SLOW,
        ..planted("a proxy that cuts off after 5 s", &["route-cut-off"], |plan| {
            nginx(plan, "jwt", jwt("").replace("proxy_read_timeout 30s", "proxy_read_timeout 5s"));
        })
    },
    planted("a proxy that does not reach the service", &["route-gateway"], |plan| {
        nginx(plan, "jwt", jwt("").replace("8080/", "8081/"));
    }),
    planted("a page in place of the well-known file", &["well-known-not-json"], |plan| {
        nginx(plan, "client-file", client_file("<html><title>Welcome</title></html>"));
    }),
    planted("well-known without CORS", &["well-known-cors"], |plan| {
        let file = plan.nginx["client-file"].replace("add_header Access-Control-Allow-Origin * always;", "");
        nginx(plan, "client-file", file);
    }),
    planted("well-known with two CORS values", &["well-known-cors-twice"], |plan| {
        let twice = "add_header Access-Control-Allow-Origin * always; add_header Access-Control-Allow-Origin https://x.example always;";
        let file = plan.nginx["client-file"].replace("add_header Access-Control-Allow-Origin * always;", twice);
        nginx(plan, "client-file", file);
    }),
    planted("wss in the well-known file", &["service-url-scheme"], |plan| {
        service_url(plan, "wss://livekit.example.org/livekit/jwt");
    }),
    planted("well-known behind a redirect", &["well-known-redirect"], |plan| {
        let file = plan.nginx["client-file"].replace("/.well-known/matrix/client", "/moved");
        let redirect = "location = /.well-known/matrix/client { return 302 https://example.org/moved; }";
        nginx(plan, "client-file", format!("{redirect} {file}"));
    }),
    Planted {
        warns: &["service-url-slash"],
        ..planted("a slash too much", &[], |plan| {
            service_url(plan, "https://livekit.example.org/livekit/jwt/");
        })
    },
    planted("no entry", &["well-known-entry"], |plan| {
        nginx(
            plan,
            "client-file",
            client_file("{\"m.homeserver\": {\"base_url\": \"https://matrix.example.org\"}}"),
        );
    }),
    Planted {
        warns: &["well-known-type"],
        ..planted("text in place of JSON", &[], |plan| {
            let file = plan.nginx["client-file"].replace("application/json", "text/plain");
            nginx(plan, "client-file", file);
        })
    },
    planted("transports {} at the stable path", &["transports-empty"], |plan| {
        let empty = "location = /_matrix/client/v1/rtc/transports { default_type application/json; return 200 '{}'; }";
        let api = format!("{empty} {}", plan.nginx["client-api"]);
        nginx(plan, "client-api", api);
        env(plan, "LIVEKIT_CS_API_URL_OVERRIDES", "example.org=https://matrix.example.org");
    }),
    planted("transports {} at the unstable path", &["transports-empty"], |plan| {
        plan.synapse["matrix_rtc"]["transports"] = json!([]);
    }),
    planted("another transport", &["transports-url"], |plan| {
        plan.synapse["matrix_rtc"]["transports"][0]["url"] = json!("wss://other.example.org");
    }),
    planted("openid resource missing", &["openid-missing"], |plan| {
        plan.synapse["listeners"] = json!([
            {"port": 8009, "bind_addresses": ["127.0.0.1"], "type": "http", "tls": false, "resources": [{"names": ["client"]}]},
            {"port": 8008, "bind_addresses": ["127.0.0.1"], "type": "http", "tls": true, "resources": [{"names": ["client"]}]},
        ]);
    }),
    planted("certificate expired", &["federation-certificate"], |plan| {
        plan.matrix_certificate.0 = Some(2020);
    }),
    planted("certificate for another name", &["federation-certificate"], |plan| {
        plan.matrix_certificate.1 = vec!["other.example.org".to_owned()];
    }),
    planted("a firewall says 403", &["federation-forbidden"], |plan| {
        nginx(
            plan,
            "federation",
            "location /_matrix/federation { return 403 '<html>blocked</html>'; }",
        );
    }),
    planted("delayed events off", &["delayed-events-off"], |plan| {
        plan.synapse["max_event_delay_duration"] = Value::Null;
    }),
    planted("MSC4502 off", &["as-membership"], |plan| {
        plan.synapse["experimental_features"]["msc4502_enabled"] = json!(false);
    }),
    planted("MSC4512 off", &["as-proxy-off"], |plan| {
        plan.synapse["experimental_features"]["msc4512_enabled"] = json!(false);
    }),
    planted("registration of another", &["as-token"], |plan| {
        plan.registration = registration(&secrets::as_token(), &secrets::hs_token(), "http://127.0.0.1:8080");
    }),
    planted("the proxy of the registration leads elsewhere", &["as-proxy-elsewhere"], |plan| {
        plan.registration = plan.registration.replace("http://127.0.0.1:8080", "http://127.0.0.1:8099");
    }),
    planted("wrong server name", &["as-server-name"], |plan| {
        env(plan, "LIVEKIT_HS_SERVER_NAME", "matrix.example.org");
        env(
            plan,
            "LIVEKIT_CS_API_URL_OVERRIDES",
            "matrix.example.org=http://127.0.0.1:8009,example.org=http://127.0.0.1:8009",
        );
    }),
];

/// What is wrong with what was found.
fn judge(stack: &Stack, planted: &Planted) -> Option<String> {
    let arguments = [planted.arguments, &["--json"]].concat();
    let run = if planted.arguments == OUTSIDE {
        stack.doctor_elsewhere(&stack.environment(), &arguments)
    } else {
        stack.doctor(&arguments)
    };
    let (fails, warns) = (run.ids("FAIL"), run.ids("warn"));
    let mut expected: Vec<_> = planted.fails.to_vec();
    expected.sort_unstable();
    let mut wrong = Vec::new();
    if fails != expected {
        wrong.push(format!("FAIL {fails:?} and not {expected:?}"));
    }
    for warning in planted.warns {
        if !warns.iter().any(|warn| warn == warning) {
            wrong.push(format!("no warning {warning}, but {warns:?}"));
        }
    }
    if run.code != i32::from(!fails.is_empty()) {
        wrong.push(format!("exit code {}", run.code));
    }
    for check in run.checks().iter().filter(|check| check["result"] == "FAIL") {
        if check["means"].as_str().is_none_or(str::is_empty) || check["do"].as_str().is_none_or(str::is_empty) {
            wrong.push(format!("no remedy: {check}"));
        }
    }
    (!wrong.is_empty()).then(|| format!("{}: {}\n{}", planted.name, wrong.join("; "), run.stdout))
}

fn plant(all: &[Planted]) {
    let mut stack = Stack::new();
    let mut wrong = Vec::new();
    // `./tests/faults NAME` plants those alone whose name has that in it.
    let wanted = std::env::var("LK_TESTS_FAULTS").unwrap_or_default();
    for planted in all.iter().filter(|planted| planted.name.contains(&wanted)) {
        let mut plan = stack.healthy();
        (planted.plant)(&mut plan);
        stack.apply(&plan);
        let judged = judge(&stack, planted);
        say(&format!(
            "{} {}",
            if judged.is_none() { "found" } else { "NOT FOUND" },
            planted.name
        ));
        wrong.extend(judged);
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all.len(), wrong.join("\n"));
}

#[test]
fn a_healthy_deployment_has_no_fault_and_twelve_faults_are_named() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| {
        let mut stack = Stack::new();
        let plan = stack.healthy();
        stack.apply(&plan);
        let run = stack.doctor(&["--json"]);
        assert_eq!((run.ids("FAIL"), run.ids("warn")), (vec![], vec![]), "{}", run.stdout);
        assert!(run.took < Duration::from_secs(10), "{:?}", run.took);
        assert_eq!(run.code, 0);
        let document: Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert_eq!(document["made_by"], "service");
        let made = |check: &str| run.checks().iter().any(|one| one["check"] == check && one["result"] == "ok");
        for check in [
            "api",
            "sfu-clock",
            "auto-create",
            "public-url",
            "websocket",
            "version",
            "candidates",
            "udp",
            "tcp",
            "webhook",
            "well-known",
            "entry",
            "transports",
            "routes",
            "cors",
            "federation",
            "openid",
            "client-api",
            "delayed-events",
            "whoami",
            "membership",
            "forwarding",
            "store",
            "store-write",
            "store-records",
        ] {
            assert!(made(check), "{check} was not made:\n{}", run.stdout);
        }
        assert!(run.stdout.contains(&format!("udp {WEB}:7882")), "{}", run.stdout);
        drop(stack);
        plant(QUICK);
    });
}

#[test]
#[ignore = "some minutes, of which Synapse's starts are most: ./tests/faults"]
fn all_other_faults_are_named() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| plant(SLOWER));
}
