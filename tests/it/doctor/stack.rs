//! A whole deployment in a network of its own: Synapse, livekit-server, Redis, nginx with certificates, DNS, and the service in
//! application-service mode. Each part can be planted with a fault; only what differs, and the service, is started anew.

use std::collections::BTreeMap;
use std::fs::write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::ca::Ca;
use crate::support::dns::Dns;
use crate::support::network::{OtherMachine, own, replace_file};
use crate::support::process::{self, Process, program};
use crate::support::redis::RedisServer;
use crate::support::secrets;
use crate::support::service::{Service, Setup, binary};
use crate::support::udp_relay::{Link, UdpRelay};

/// Public addresses of the web server, of the homeserver, and one where nobody is.
pub(crate) const WEB: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 10);
pub(crate) const HOME: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 20);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 53);
/// A laptop somewhere else.
const LAPTOP: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 30);
/// Beginning of a bad link to the SFU's UDP port.
pub(crate) const RELAY: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 40);
const UDP_PORT: u16 = 7882;

pub(crate) const PUBLIC: &str = "https://livekit.example.org/livekit/jwt";
const KEY: &str = "realkey";
const SFU: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7880);
const SERVICE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
const FEDERATION_PORT: u16 = 8008;
const CLIENT_PORT: u16 = 8009;

/// How everything is set up.
#[derive(Clone, PartialEq)]
pub(crate) struct Plan {
    /// livekit-server's configuration.
    pub(crate) sfu: Value,
    /// Additions to Synapse's configuration; null where there is no Synapse.
    pub(crate) synapse: Value,
    /// The registration that Synapse reads.
    pub(crate) registration: String,
    /// Parts of nginx's configuration, by name.
    pub(crate) nginx: BTreeMap<&'static str, String>,
    /// Last year of the homeserver's certificate, and the names in it.
    pub(crate) matrix_certificate: (Option<i32>, Vec<String>),
    /// Variables of the service.
    pub(crate) env: BTreeMap<&'static str, String>,
    /// Command that the service runs under.
    pub(crate) wrapper: Vec<&'static str>,
    /// Rules of nftables.
    pub(crate) firewall: String,
    /// What datagrams to the SFU go over, if they do not go there directly.
    pub(crate) link: Option<Link>,
    /// Options of redis-server.
    pub(crate) redis: Vec<String>,
}

/// The deployment.
pub(crate) struct Stack {
    plan: Option<Plan>,
    healthy: Plan,
    directory: PathBuf,
    service: Option<Service>,
    nginx: Option<Process>,
    sfu: Option<Process>,
    synapse: Option<Process>,
    redis: Option<RedisServer>,
    relay: Option<UdpRelay>,
    laptop: OtherMachine,
    secrets: Vec<String>,
    dns: Dns,
}

/// What a run said.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Run {
    /// The checks of a run with `--json`.
    #[track_caller]
    pub(crate) fn checks(&self) -> Vec<Value> {
        let document: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"));
        document["checks"].as_array().expect("checks").clone()
    }

    /// Names of what was found with this result, each once.
    #[track_caller]
    pub(crate) fn ids(&self, result: &str) -> Vec<String> {
        let mut ids: Vec<_> = self
            .checks()
            .iter()
            .filter(|check| check["result"] == result)
            .map(|check| check["id"].as_str().expect("an id").to_owned())
            .collect();
        ids.sort();
        ids.dedup();
        ids
    }
}

impl Stack {
    /// Starts nothing yet. Must be called in a network of the test's own.
    pub(crate) fn new() -> Self {
        for address in [WEB, HOME, RESOLVER, RELAY] {
            own(address.into());
        }
        replace_file(
            "/etc/resolv.conf",
            &format!("nameserver {RESOLVER}\noptions timeout:1 attempts:1\n"),
        );
        let dns = Dns::at((RESOLVER, 53).into());
        dns.address("livekit.example.org", &[WEB.into()]);
        for name in ["example.org", "matrix.example.org"] {
            dns.address(name, &[HOME.into()]);
        }
        let secret = secrets::sfu_secret();
        let (as_token, hs_token) = (secrets::as_token(), secrets::hs_token());
        Self {
            plan: None,
            healthy: healthy(&secret, &as_token, &hs_token),
            directory: process::directory("doctor"),
            service: None,
            nginx: None,
            sfu: None,
            synapse: None,
            redis: None,
            relay: None,
            laptop: OtherMachine::at(LAPTOP),
            secrets: vec![secret, as_token, hs_token],
            dns,
        }
    }

    pub(crate) fn healthy(&self) -> Plan {
        self.healthy.clone()
    }

    pub(crate) fn service(&self) -> &Service {
        self.service.as_ref().expect("a running service")
    }

    /// Names that were looked up so far.
    pub(crate) fn names_asked(&self) -> std::collections::BTreeSet<String> {
        self.dns.questions().into_iter().map(|question| question.name).collect()
    }

    pub(crate) fn redis(&self) -> &RedisServer {
        self.redis.as_ref().expect("a running Redis")
    }

    /// Starts and ends what has to be, so that everything is as planned.
    pub(crate) fn apply(&mut self, plan: &Plan) {
        let before = self.plan.take();
        let differs = |part: &dyn Fn(&Plan) -> Value| before.as_ref().is_none_or(|before| part(before) != part(plan));
        let synapse = differs(&|plan| json!([plan.synapse, plan.registration]));
        let sfu = differs(&|plan| json!([plan.sfu]));
        let nginx = differs(&|plan| json!([plan.nginx, plan.matrix_certificate]));
        let redis = differs(&|plan| json!([plan.redis]));
        if differs(&|plan| json!([plan.firewall])) {
            firewall(&plan.firewall);
        }
        // Each time: one instance is asked six times a minute at most.
        self.service = None;
        if synapse {
            self.synapse = None;
            self.synapse = (!plan.synapse.is_null()).then(|| self.start_synapse(plan));
        }
        if redis {
            self.redis = None;
            let options: Vec<_> = plan.redis.iter().map(String::as_str).collect();
            self.redis = RedisServer::start(&options);
        }
        self.relay = None;
        self.relay = plan
            .link
            .map(|link| UdpRelay::start((RELAY, UDP_PORT).into(), (WEB, UDP_PORT).into(), link));
        if sfu {
            self.sfu = None;
            self.sfu = Some(self.start_sfu(plan));
        }
        if nginx {
            self.nginx = None;
            self.nginx = Some(self.start_nginx(plan));
        }
        if let Some(started) = self.synapse.as_ref().filter(|_| synapse) {
            let client = SocketAddr::from((Ipv4Addr::LOCALHOST, CLIENT_PORT));
            started.wait_ready(|| process::answers(client, "/_matrix/client/versions"));
        }
        self.service = Some(self.start_service(plan));
        self.plan = Some(plan.clone());
    }

    pub(crate) fn stop_service(&mut self) {
        self.service = None;
        self.plan = None;
    }

    /// Variables of the service.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let plan = self.plan.as_ref().unwrap_or(&self.healthy);
        self.environment_of(plan)
    }

    fn environment_of(&self, plan: &Plan) -> BTreeMap<String, String> {
        let mut env: BTreeMap<String, String> = plan.env.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        if let Some(redis) = &self.redis
            && let Some(url) = env.get_mut("LIVEKIT_REDIS_URL")
        {
            *url = url.replace("REDIS", &redis.address().to_string());
        }
        env.insert("SSL_CERT_FILE".into(), Ca::trusted().file().to_string_lossy().into_owned());
        env
    }

    fn start_service(&self, plan: &Plan) -> Service {
        let mut setup = Setup::bare();
        for (name, value) in self.environment_of(plan) {
            setup = setup.env(&name, &value);
        }
        setup.wrapped_in(&plan.wrapper).reached_at(SERVICE).start()
    }

    fn start_sfu(&self, plan: &Plan) -> Process {
        write(self.directory.join("livekit.yaml"), plan.sfu.to_string()).expect("livekit.yaml");
        let mut command = Command::new(process::tool("livekit-server"));
        command.args(["--config", "livekit.yaml"]);
        let process = Process::start("livekit-server", &command, &self.directory);
        process.wait_ready(|| process::answers(SFU, "/"));
        process
    }

    fn start_synapse(&self, plan: &Plan) -> Process {
        let directory = process::directory("doctor-synapse");
        let (certificate, key) = Ca::trusted().server_pem(&["matrix.example.org".into()]);
        let (certificate_file, key_file) = (directory.join("cert.pem"), directory.join("key.pem"));
        write(&certificate_file, certificate).expect("cert.pem");
        write(&key_file, key).expect("key.pem");
        let registration = directory.join("registration.yaml");
        write(&registration, &plan.registration).expect("registration.yaml");
        let mut script = process::script("synapse.py");
        script
            .arg(&directory)
            .args([FEDERATION_PORT.to_string(), CLIENT_PORT.to_string()])
            .args([certificate_file, key_file])
            .args(["--server-name", "example.org", "--merge", &plan.synapse.to_string()]);
        if !plan.registration.is_empty() {
            script.arg("--appservice").arg(&registration);
        }
        let output = script.output().expect("python");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("exec {}", String::from_utf8_lossy(&output.stdout))]);
        Process::start("synapse", &command, &directory)
    }

    fn start_nginx(&self, plan: &Plan) -> Process {
        let ca = Ca::trusted();
        let files = |name: &str, (certificate, key): (String, String)| {
            write(self.directory.join(format!("{name}.pem")), certificate).expect("a certificate");
            write(self.directory.join(format!("{name}.key")), key).expect("a key");
        };
        files("web", ca.server_pem(&["livekit.example.org".into()]));
        files("home", ca.server_pem(&["example.org".into()]));
        let (last_year, names) = &plan.matrix_certificate;
        files("matrix", ca.server_pem_until(names, *last_year));
        let part = |name: &str| plan.nginx.get(name).cloned().unwrap_or_default();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {kind};\n"))
            .concat();
        let config = format!(
            "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\nhttp {{\naccess_log access.log;\n{temporary}\
             server {{ listen {WEB}:443 ssl; server_name livekit.example.org; ssl_certificate web.pem; ssl_certificate_key web.key;\n\
             {}\n{}\n}}\n\
             server {{ listen {HOME}:443 ssl; server_name example.org; ssl_certificate home.pem; ssl_certificate_key home.key;\n\
             {}\n{}\n}}\n\
             server {{ listen {HOME}:443 ssl; server_name matrix.example.org; ssl_certificate matrix.pem; ssl_certificate_key matrix.key;\n\
             {}\n{}\n}}\n}}\n",
            part("jwt"),
            part("sfu"),
            part("client-file"),
            part("server-file"),
            part("client-api"),
            part("federation"),
        );
        write(self.directory.join("nginx.conf"), config).expect("nginx.conf");
        let mut command = Command::new(program("nginx"));
        command.args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(&self.directory);
        let process = Process::start("nginx", &command, &self.directory);
        process.wait_ready(|| [WEB, HOME].iter().all(|address| TcpStream::connect((*address, 443)).is_ok()));
        process
    }

    /// Runs `lk-jwt-service doctor` with the service's variables.
    pub(crate) fn doctor(&self, arguments: &[&str]) -> Run {
        self.doctor_with(&self.environment(), arguments, None)
    }

    /// The same with these variables and this on its standard input.
    pub(crate) fn doctor_with(&self, env: &BTreeMap<String, String>, arguments: &[&str], input: Option<&str>) -> Run {
        let wrapper = self.plan.as_ref().map(|plan| plan.wrapper.clone()).unwrap_or_default();
        let wrapper: Vec<_> = wrapper.into_iter().map(str::to_owned).collect();
        self.run(&wrapper, env, arguments, input)
    }

    /// The same on another machine, which reaches the public addresses alone.
    pub(crate) fn doctor_elsewhere(&self, env: &BTreeMap<String, String>, arguments: &[&str]) -> Run {
        self.run(&self.laptop.prefix(), env, arguments, None)
    }

    /// No secret is ever in what it says.
    fn run(&self, wrapper: &[String], env: &BTreeMap<String, String>, arguments: &[&str], input: Option<&str>) -> Run {
        let began = Instant::now();
        let mut words = wrapper.iter().map(String::as_str).chain([binary(), "doctor"]);
        let mut child = Command::new(program(words.next().expect("a program")))
            .args(words)
            .args(arguments)
            .env_clear()
            .envs(env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the service's binary");
        let mut stdin = child.stdin.take().expect("piped");
        std::io::Write::write_all(&mut stdin, input.unwrap_or_default().as_bytes()).expect("stdin");
        drop(stdin);
        let Output { status, stdout, stderr } = child.wait_with_output().expect("an end");
        let run = Run {
            code: status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            took: began.elapsed(),
        };
        // A link is what it prints, and a JWT of its own.
        if !arguments.contains(&"--link") {
            secrets::assert_none("stdout of doctor", &run.stdout, &self.secrets);
        }
        secrets::assert_none("stderr of doctor", &run.stderr, &self.secrets);
        run
    }

    /// The whole answer of a client API call as a new user, and the user's access token.
    pub(crate) fn register(&self, name: &str) -> (String, String) {
        let body = json!({"username": name, "password": "secret", "device_id": "DEV", "auth": {"type": "m.login.dummy"}});
        let call = crate::support::client::Call::json("/_matrix/client/v3/register", &body);
        let client = SocketAddr::from((Ipv4Addr::LOCALHOST, CLIENT_PORT));
        let answer = crate::support::client::call(client, &call);
        assert_eq!(answer.status, 200, "{}", answer.text());
        (answer.field("user_id"), answer.field("access_token"))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

fn firewall(rules: &str) {
    let rules = format!("flush ruleset\n{rules}\n");
    let mut nft = Command::new(program("nft"))
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft");
    std::io::Write::write_all(nft.stdin.as_mut().expect("piped"), rules.as_bytes()).expect("rules");
    drop(nft.stdin.take());
    assert!(nft.wait().expect("nft").success(), "nft refuses:\n{rules}");
}

/// `location` of the well-known file, with this body.
pub(crate) fn client_file(body: &str) -> String {
    format!(
        "location = /.well-known/matrix/client {{ default_type application/json; add_header Access-Control-Allow-Origin * always; \
         return 200 '{body}'; }}"
    )
}

/// The well-known file with this address of the service.
pub(crate) fn file_with(service: &str) -> String {
    json!({
        "m.homeserver": {"base_url": "https://matrix.example.org"},
        "org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": service}],
    })
    .to_string()
}

/// `location` of the service, with more lines.
pub(crate) fn jwt(more: &str) -> String {
    format!("location /livekit/jwt/ {{ proxy_pass http://{SERVICE}/; proxy_read_timeout 30s; {more} }}")
}

/// `location` of the SFU, with these lines about the upgrade.
pub(crate) fn sfu(upgrade: &str) -> String {
    format!("location /livekit/sfu/ {{ proxy_pass http://{SFU}/; proxy_http_version 1.1; proxy_buffering off; {upgrade} }}")
}

pub(crate) const UPGRADE: &str = "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection \"upgrade\";";

/// A registration with the tokens of the service, or others.
pub(crate) fn registration(as_token: &str, hs_token: &str, proxy: &str) -> String {
    let printed = Command::new(binary())
        .args(["generate-registration", "example.org", proxy])
        .env_clear()
        .env("LIVEKIT_AS_TOKEN", as_token)
        .env("LIVEKIT_HS_TOKEN", hs_token)
        .output()
        .expect("the service's binary");
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    String::from_utf8_lossy(&printed.stdout).into_owned()
}

fn healthy(secret: &str, as_token: &str, hs_token: &str) -> Plan {
    let env = [
        ("LIVEKIT_URL", "wss://livekit.example.org/livekit/sfu"),
        ("LIVEKIT_API_URL", "http://127.0.0.1:7880"),
        ("LIVEKIT_KEY", KEY),
        ("LIVEKIT_SECRET", secret),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.org"),
        ("LIVEKIT_JWT_BIND", "127.0.0.1:8080"),
        ("LIVEKIT_HS_SERVER_NAME", "example.org"),
        ("LIVEKIT_AS_TOKEN", as_token),
        ("LIVEKIT_HS_TOKEN", hs_token),
        ("LIVEKIT_CS_API_URL_OVERRIDES", "example.org=http://127.0.0.1:8009"),
        ("LIVEKIT_REDIS_URL", "redis://REDIS"),
        ("LIVEKIT_LOG_LEVEL", "debug"),
    ];
    Plan {
        sfu: json!({
            "port": SFU.port(),
            "bind_addresses": ["127.0.0.1"],
            "rtc": {
                "tcp_port": 7881,
                "udp_port": UDP_PORT,
                "use_external_ip": false,
                "node_ip": WEB.to_string(),
                "interfaces": {"includes": ["lo"]},
                "ips": {"includes": [format!("{WEB}/32")]},
                "enable_loopback_candidate": true,
            },
            "keys": {KEY: secret},
            "room": {"auto_create": false},
            "webhook": {"api_key": KEY, "urls": [format!("http://{SERVICE}/sfu_webhook")]},
        }),
        synapse: json!({
            "public_baseurl": "https://matrix.example.org/",
            "matrix_rtc": {"transports": [{
                "type": "livekit", "url": "wss://livekit.example.org/livekit/sfu", "livekit_service_url": PUBLIC,
            }]},
        }),
        registration: registration(as_token, hs_token, &format!("http://{SERVICE}")),
        nginx: BTreeMap::from([
            ("jwt", jwt("")),
            ("sfu", sfu(UPGRADE)),
            ("client-file", client_file(&file_with(PUBLIC))),
            (
                "server-file",
                "location = /.well-known/matrix/server { default_type application/json; \
                 return 200 '{\"m.server\": \"matrix.example.org:443\"}'; }"
                    .to_owned(),
            ),
            (
                "client-api",
                format!("location /_matrix/client {{ proxy_pass http://127.0.0.1:{CLIENT_PORT}; }}"),
            ),
            (
                "federation",
                format!("location /_matrix/federation {{ proxy_pass https://127.0.0.1:{FEDERATION_PORT}; }}"),
            ),
        ]),
        matrix_certificate: (None, vec!["matrix.example.org".to_owned()]),
        env: env.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
        wrapper: Vec::new(),
        firewall: String::new(),
        link: None,
        redis: Vec::new(),
    }
}
