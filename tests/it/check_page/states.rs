//! States of the page in Chromium: a fault is planted on a deployment of real neighbours, and the page says what it is, to the user and
//! to the operator. In each it is as axe-core wants it, and asks nobody else.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::doctor::stack::{PUBLIC, Plan, Stack, UPGRADE, WEB, client_file, file_with, jwt, sfu};
use crate::leave_real::steered::{Browser, Tab};
use crate::support::network::in_own_network;
use crate::support::process::{self, real_neighbours, say};
use crate::support::wait_until;

/// Debian's; the command `faketime` would stand between us and the service.
const LIBFAKETIME: &str = "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
/// Hosts of the deployment.
const HOSTS: [&str; 3] = ["livekit.example.org", "example.org", "matrix.example.org"];
/// Names that Chromium looks up for itself, whatever page is shown.
const CHROMIUMS: [&str; 5] = [
    "accounts.google.com",
    "clients2.google.com",
    "content-autofill.googleapis.com",
    "optimizationguide-pa.googleapis.com",
    "update.googleapis.com",
];
/// Time for one run of the page: two ways that are blocked take nine seconds each.
const RUN: Duration = Duration::from_secs(60);
/// Sizes at which it is looked at: a phone's and a desktop's.
const PHONE: (u32, u32) = (390, 844);
const DESKTOP: (u32, u32) = (1280, 800);

/// What the user does.
#[derive(Clone, Copy, PartialEq)]
enum With {
    /// Names the homeserver.
    Name,
    /// Opens a link of `doctor --link`.
    Ticket,
    /// The same, once it was used five times.
    UsedTicket,
    /// The same, when its time is over.
    ExpiredTicket,
}

/// A fault that is planted, and what the page finds.
struct Planted {
    name: &'static str,
    plant: fn(&mut Plan),
    with: With,
    /// After the page was opened.
    then: fn(&mut Stack),
    /// Checks and faults that are found, the first of which is the headline.
    finds: &'static [(&'static str, &'static str)],
}

const fn planted(name: &'static str, with: With, finds: &'static [(&'static str, &'static str)], plant: fn(&mut Plan)) -> Planted {
    Planted {
        name,
        plant,
        with,
        then: |_| {},
        finds,
    }
}

fn nginx(plan: &mut Plan, part: &'static str, text: impl Into<String>) {
    plan.nginx.insert(part, text.into());
}

/// Without Synapse, which nothing here needs.
fn plan(stack: &Stack) -> Plan {
    let mut plan = stack.healthy();
    plan.synapse = Value::Null;
    plan.registration = String::new();
    for name in [
        "LIVEKIT_HS_SERVER_NAME",
        "LIVEKIT_AS_TOKEN",
        "LIVEKIT_HS_TOKEN",
        "LIVEKIT_REDIS_URL",
    ] {
        plan.env.remove(name);
    }
    plan.env.insert("LIVEKIT_CHECK_PAGE", "on".into());
    nginx(
        &mut plan,
        "client-api",
        "location /_matrix/client { default_type application/json; add_header Access-Control-Allow-Origin * always; \
         return 404 '{\"errcode\": \"M_UNRECOGNIZED\"}'; }",
    );
    plan
}

const UDP_CLOSED: &str = "table inet t {\nchain blocked {\ntype filter hook input priority 0;\nudp dport 7882 drop\n}\n}";
const ALL_CLOSED: &str =
    "table inet t {\nchain blocked {\ntype filter hook input priority 0;\nudp dport 7882 drop\ntcp dport 7881 drop\n}\n}";

/// Those of every run.
const QUICK: &[Planted] = &[
    planted("two CORS values", With::Name, &[("routes", "route-cors-twice")], |plan| {
        nginx(plan, "jwt", jwt("add_header Access-Control-Allow-Origin * always;"));
    }),
    planted(
        "wss in the well-known file",
        With::Name,
        &[("entry", "service-url-scheme")],
        |plan| {
            nginx(
                plan,
                "client-file",
                client_file(&file_with("wss://livekit.example.org/livekit/sfu")),
            );
        },
    ),
    planted("all is well, with a ticket", With::Ticket, &[], |_| {}),
    planted("UDP blocked", With::Ticket, &[("udp", "sfu-udp")], |plan| {
        plan.firewall = UDP_CLOSED.to_owned();
    }),
];

/// The others.
const SLOWER: &[Planted] = &[
    planted("all is well", With::Name, &[], |_| {}),
    planted("no CORS on the routes", With::Name, &[("routes", "route-cors-missing")], |plan| {
        nginx(plan, "jwt", jwt("proxy_hide_header Access-Control-Allow-Origin;"));
    }),
    planted(
        "no CORS on the well-known file",
        With::Name,
        &[("well-known", "well-known-cors")],
        |plan| {
            let file = client_file(&file_with(PUBLIC)).replace("add_header Access-Control-Allow-Origin * always;", "");
            nginx(plan, "client-file", file);
        },
    ),
    planted("well-known missing", With::Name, &[("well-known", "well-known-missing")], |plan| {
        let cors = "add_header Access-Control-Allow-Origin * always;";
        nginx(
            plan,
            "client-file",
            format!("location = /.well-known/matrix/client {{ {cors} return 404; }}"),
        );
    }),
    planted("no entry", With::Name, &[("entry", "well-known-entry")], |plan| {
        nginx(plan, "client-file", client_file("{}"));
    }),
    planted("empty transports", With::Name, &[("transports", "transports-empty")], |plan| {
        let cors = "add_header Access-Control-Allow-Origin * always;";
        nginx(
            plan,
            "client-api",
            format!("location /_matrix/client {{ {cors} return 200 '{{}}'; }}"),
        );
    }),
    planted("prefix lost", With::Name, &[("routes", "route-prefix")], |plan| {
        nginx(plan, "client-file", client_file(&file_with("https://livekit.example.org/rtc/jwt")));
        let lost = "location /rtc/ { proxy_pass http://127.0.0.1:8080/rtc/; }";
        nginx(plan, "jwt", format!("{}\n{lost}", jwt("")));
    }),
    planted(
        "LiveKit at the address of the service",
        With::Name,
        &[("routes", "route-other")],
        |plan| {
            nginx(
                plan,
                "client-file",
                client_file(&file_with("https://livekit.example.org/livekit/sfu")),
            );
        },
    ),
    Planted {
        then: Stack::stop_service,
        ..planted(
            "service away",
            With::Name,
            &[("service", "route-gateway"), ("routes", "route-gateway")],
            |_| {},
        )
    },
    planted("no such server", With::Name, &[("well-known", "well-known-unreachable")], |plan| {
        nginx(plan, "client-file", "location = /.well-known/matrix/client { return 444; }");
    }),
    planted("LiveKit away", With::Name, &[("livekit", "sfu-public-unreachable")], |plan| {
        nginx(plan, "sfu", sfu(UPGRADE).replace("7880", "7999"));
    }),
    planted(
        "LiveKit below another path",
        With::Name,
        &[("livekit", "sfu-public-path")],
        |plan| {
            nginx(plan, "sfu", sfu(UPGRADE).replace(":7880/;", ":7880/other/;"));
        },
    ),
    planted("clock off", With::Name, &[("clock", "client-clock")], |plan| {
        plan.wrapper = vec!["env", LIBFAKETIME, "FAKETIME=+130s"];
    }),
    planted("no upgrade", With::Ticket, &[("signal", "sfu-websocket")], |plan| {
        nginx(plan, "sfu", sfu(""));
    }),
    planted(
        "wrong node_ip",
        With::Ticket,
        &[("udp", "sfu-node-ip"), ("tcp", "sfu-node-ip")],
        |plan| {
            plan.sfu["rtc"]["node_ip"] = json!("10.0.0.5");
        },
    ),
    planted("TCP only", With::Ticket, &[("udp", "sfu-udp")], |plan| {
        plan.sfu["rtc"]["force_tcp"] = json!(true);
    }),
    planted(
        "UDP and TCP blocked",
        With::Ticket,
        &[("udp", "sfu-udp"), ("tcp", "sfu-tcp")],
        |plan| {
            plan.firewall = ALL_CLOSED.to_owned();
        },
    ),
    planted("all is well, with a relay", With::Ticket, &[], |plan| {
        plan.sfu["turn"] = json!({"enabled": true, "udp_port": 3478});
    }),
    planted("a relay that does not answer", With::Ticket, &[("turn", "sfu-turn")], |plan| {
        plan.sfu["turn"] = json!({"enabled": true, "udp_port": 3478});
        plan.firewall = UDP_CLOSED.replace("7882", "3478");
    }),
    planted("used ticket", With::UsedTicket, &[("link", "link-used")], |_| {}),
    planted("expired ticket", With::ExpiredTicket, &[("link", "link-expired")], |_| {}),
];

/// A browser, and what it is to be told.
struct Stage {
    stack: Stack,
    browser: Arc<Browser>,
    axe: String,
    pictures: Option<std::path::PathBuf>,
}

impl Stage {
    fn new(pictures: bool) -> Self {
        let stack = Stack::new();
        let pictures = pictures.then(|| {
            let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("check-page");
            fs::create_dir_all(&directory).expect("a directory below target");
            directory
        });
        Self {
            stack,
            browser: Browser::with_flags("browser/page.js", &["--ignore-certificate-errors"]),
            axe: fs::read_to_string(process::tool("browser/node_modules/axe-core/axe.min.js")).expect("axe-core"),
            pictures,
        }
    }

    /// A link, and the name of its ticket.
    fn link(&self, arguments: &[&str]) -> String {
        let run = self.stack.doctor(&[&["--link"], arguments].concat());
        assert_eq!(run.code, 0, "{run:?}");
        run.stdout.trim().to_owned()
    }

    /// What is wrong with the page about this fault.
    fn judge(&mut self, planted: &Planted) -> Result<(), String> {
        let mut plan = plan(&self.stack);
        (planted.plant)(&mut plan);
        self.stack.apply(&plan);
        let url = match planted.with {
            With::Name => format!("{PUBLIC}/check"),
            With::Ticket | With::UsedTicket => self.link(&[]),
            With::ExpiredTicket => self.expired_link(),
        };
        let tab = self.browser.open();
        tab.drive("look", json!({"width": PHONE.0, "height": PHONE.1, "scheme": "light"}));
        tab.drive("visit", json!({"url": url}));
        wait_state(&tab, "ready");
        let shown = run(&tab, "location.href");
        if shown.as_str().is_none_or(|shown| shown.contains('#')) {
            return Err(format!("the ticket stays in the address bar: {shown}"));
        }
        self.accessible(&tab)?;
        if planted.with == With::UsedTicket {
            self.use_up(&tab, &url);
        }
        (planted.then)(&mut self.stack);
        let name = if planted.with == With::Name { "@alice:example.org" } else { "" };
        run(
            &tab,
            &format!("document.getElementById('name').value = '{name}'; document.getElementById('go').click()"),
        );
        wait_state(&tab, "done");
        let page = read(&tab);
        let wanted: Vec<_> = planted.finds.iter().map(|(check, fault)| json!([check, fault])).collect();
        if page["found"] != json!(wanted) {
            return Err(format!("found {} and not {}: {page:#}", page["found"], json!(wanted)));
        }
        sentences(&page, planted)?;
        self.report(&tab, planted)?;
        self.look(&tab, planted.name)?;
        self.asked_nobody_else(&tab)
    }

    /// A link whose time is over, by the service's clock.
    fn expired_link(&self) -> String {
        let link = self.link(&[]);
        let secret = self.stack.environment()["LIVEKIT_SECRET"].clone();
        super::tickets::expired(&link, &secret)
    }

    fn use_up(&self, tab: &Tab, link: &str) {
        let ticket = link.split_once("#t=").expect("a ticket").1;
        for _ in 0..5 {
            let script =
                format!("fetch('check/token', {{method: 'POST', headers: {{authorization: 'Bearer {ticket}'}}}}).then(a => a.status)");
            assert_eq!(run(tab, &script), 200);
        }
    }

    /// What the user sends is a line of the log; their addresses are in it where they ticked that.
    fn report(&self, tab: &Tab, planted: &Planted) -> Result<(), String> {
        let is_offered = run(tab, "!document.getElementById('report').hidden");
        let may_report = planted.with == With::Ticket;
        if is_offered != json!(may_report) {
            return Err(format!("to send it to the operator is offered: {is_offered}"));
        }
        if !may_report {
            return Ok(());
        }
        // The addresses of the loopback interface a browser keeps to itself: what it tells is that of a relay, which the SFU has.
        let ticks = run(tab, "!document.getElementById('tick').hidden") == json!(true) && planted.finds.is_empty();
        if ticks {
            run(tab, "document.getElementById('addresses').click()");
        }
        run(tab, "document.getElementById('report').click()");
        let sent = "document.getElementById('sent').textContent";
        wait_until("the report to be sent", RUN, || run(tab, sent) != json!(""));
        let line = self.stack.service().wait_event("check_report");
        let has = |text: &str| line.contains(text);
        let tells = planted
            .finds
            .iter()
            .all(|(check, fault)| has(&format!("{check} fail {fault}")) || has(&format!("{check} warn {fault}")));
        if run(tab, sent) == json!("Sent. Thank you.")
            && tells
            && has("udp ")
            && has(&format!("addresses {WEB}")) == ticks
            && has("addresses") == ticks
        {
            Ok(())
        } else {
            Err(format!("the report is {line}"))
        }
    }

    /// In all sizes and both schemes, with all that can be unfolded.
    fn look(&self, tab: &Tab, name: &str) -> Result<(), String> {
        let words: Vec<_> = name.split(|c: char| !c.is_alphanumeric()).collect();
        for (size, device) in [(PHONE, "phone"), (DESKTOP, "desktop")] {
            for scheme in ["light", "dark"] {
                let mut order = json!({"width": size.0, "height": size.1, "scheme": scheme});
                if let Some(pictures) = &self.pictures {
                    order["file"] = json!(pictures.join(format!("{}-{device}-{scheme}.png", words.join("-"))));
                }
                tab.drive("look", order);
                let wide = run(tab, "document.documentElement.scrollWidth > innerWidth");
                if wide != json!(false) {
                    return Err(format!("it is wider than a {device}"));
                }
                if (device == "phone") == (scheme == "light") {
                    run(tab, "document.querySelectorAll('details').forEach((one) => (one.open = true))");
                    self.accessible(tab)?;
                    run(tab, "document.querySelectorAll('details').forEach((one) => (one.open = false))");
                }
            }
        }
        Ok(())
    }

    fn accessible(&self, tab: &Tab) -> Result<(), String> {
        run(tab, &format!("if (!window.axe) {{ {} }}; null", self.axe));
        let script =
            "axe.run({iframes: false}).then(({violations}) => violations.map(({id, nodes}) => [id, nodes.map((one) => one.html)]))";
        let violations = run(tab, script);
        if violations == json!([]) {
            Ok(())
        } else {
            Err(format!("axe-core: {violations:#}"))
        }
    }

    fn asked_nobody_else(&self, tab: &Tab) -> Result<(), String> {
        let requests = tab.drive("requests", json!({}));
        let requests: BTreeSet<_> = requests.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        let is_ours = |url: &&str| {
            HOSTS.iter().any(|host| {
                ["https", "wss"]
                    .iter()
                    .any(|scheme| url.starts_with(&format!("{scheme}://{host}/")))
            })
        };
        let strangers: Vec<_> = requests
            .iter()
            .filter(|url| !is_ours(url) && **url != "about:blank" && !url.starts_with("data:"))
            .collect();
        // The frame of another process is heard, too.
        let heard = requests.contains("https://livekit.example.org/livekit/sfu/rtc/validate");
        let names: Vec<_> = self
            .stack
            .names_asked()
            .into_iter()
            .filter(|name| ![&HOSTS[..], &CHROMIUMS].concat().contains(&name.trim_end_matches('.')))
            .collect();
        if strangers.is_empty() && names.is_empty() && heard {
            Ok(())
        } else {
            Err(format!("asked others: {strangers:?}; looked up {names:?}; of {requests:#?}"))
        }
    }
}

fn run(tab: &Tab, script: &str) -> Value {
    tab.drive("run", json!({"script": script}))
}

fn wait_state(tab: &Tab, state: &str) {
    let end = Instant::now() + RUN;
    loop {
        // Between two pages there is none.
        let now = run(tab, "document.documentElement?.dataset.state ?? ''");
        if now == state {
            return;
        }
        assert!(Instant::now() < end, "the page is {now} and not {state}: {:#}", read(tab));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the page shows.
fn read(tab: &Tab) -> Value {
    let script = "(() => {
        const text = (id) => document.getElementById(id).innerText;
        const items = [...document.querySelectorAll('#checks li')];
        return {
            headline: text('headline'), sentence: text('sentence'), operator: text('operator'),
            all: items.map((one) => one.textContent),
            found: items.filter((one) => ['fail', 'warn'].includes(one.className))
                .map((one) => [checks(one), one.querySelector('code')?.textContent]),
        };
        function checks(one) { return one.dataset.check; }
    })()";
    run(tab, script)
}

/// A sentence for the user and one for the operator, which is `doctor`'s.
fn sentences(page: &Value, planted: &Planted) -> Result<(), String> {
    let text = |name: &str| page[name].as_str().unwrap_or_default().to_owned();
    let (headline, sentence, operator) = (text("headline"), text("sentence"), text("operator"));
    let Some((_, id)) = planted.finds.first() else {
        let is_well = headline.starts_with("Nothing is wrong") && sentence.len() > 40 && operator.is_empty();
        return is_well.then_some(()).ok_or_else(|| format!("no word that all is well: {page:#}"));
    };
    let fault = lk_jwt_service::internals::doctor::fault::ALL.iter().find(|fault| fault.id == *id);
    let fault = fault.ok_or_else(|| format!("{id} is not a fault of doctor's"))?;
    let has = |text: &str| operator.contains(text);
    let plain = sentence.len() > 40 && !sentence.contains(id) && !sentence.contains("CORS") && !headline.is_empty();
    if plain && has(id) && has(fault.means) && has(fault.remedy) && has("Seen: ") {
        Ok(())
    } else {
        Err(format!("a sentence is missing: {page:#}"))
    }
}

fn plant(all: &[&[Planted]], pictures: bool) {
    let mut stage = Stage::new(pictures);
    let mut wrong = Vec::new();
    let wanted = std::env::var("LK_TESTS_FAULTS").unwrap_or_default();
    for planted in all.iter().copied().flatten().filter(|planted| planted.name.contains(&wanted)) {
        let began = Instant::now();
        let judged = stage.judge(planted);
        let took = began.elapsed().as_secs();
        match judged {
            Ok(()) => say(&format!("found {} ({took} s)", planted.name)),
            Err(why) => {
                say(&format!("NOT FOUND {} ({took} s)", planted.name));
                wrong.push(format!("{}: {why}", planted.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn four_states_are_told_to_user_and_operator() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| plant(&[QUICK], false));
}

#[test]
#[ignore = "all states take some minutes: ./tests/faults"]
fn all_states_are_told_to_user_and_operator() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| plant(&[QUICK, SLOWER], true));
}
