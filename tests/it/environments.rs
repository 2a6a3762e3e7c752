//! Every environment that wrappers, Kubernetes, Docker, systemd and env files are known to make, on the real binary: it
//! starts, or it says what to correct (decisions P15 to P18, P20). Nothing in it may be seen that `hunter2` stands for.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::start;
use crate::support::ca::Ca;
use crate::support::client::Connection;
use crate::support::service::{Service, Setup, free_address, free_port_of};
use crate::support::{unique, wait_until};

type Pairs<'a> = &'a [(&'a str, &'a str)];

/// What becomes of an environment.
enum Outcome {
    /// It serves, and has said each of these.
    Starts(&'static [&'static str]),
    /// It ends with 1, has said each of these, and has opened no port.
    Fails(&'static [&'static str]),
}
use Outcome::{Fails, Starts};

const UUID: &str = "0b0a8a24-5d53-4c4f-9d3c-hunter200000";
/// What a name that is not ours is told.
const NOT_READ: &str = "does not read it";
const NOT_FILLED_IN: &str = "which nothing has filled in";

/// The least that starts; later pairs win, and `-` unsets.
const BASE: Pairs<'static> = &[
    ("LIVEKIT_URL", "wss://livekit.example.com"),
    ("LIVEKIT_KEY", "key"),
    ("LIVEKIT_SECRET", "hunter2-hunter2-hunter2-hunter2-hunter2"),
    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
    ("LIVEKIT_JWT_BIND", "{bind}"),
];

/// What Kubernetes gives every pod of a namespace with these Services.
const SERVICES: Pairs<'static> = &[
    ("KUBERNETES_SERVICE_HOST", "10.43.0.1"),
    ("KUBERNETES_SERVICE_PORT", "443"),
    ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
    ("KUBERNETES_PORT", "tcp://10.43.0.1:443"),
    ("KUBERNETES_PORT_443_TCP_PROTO", "tcp"),
    ("LK_JWT_SERVICE_HOST", "10.43.0.7"),
    ("LK_JWT_SERVICE_PORT", "8080"),
    ("LK_JWT_SERVICE_PORT_HTTP", "8080"),
    ("LK_JWT_PORT", "tcp://10.43.0.7:8080"),
    ("LK_JWT_PORT_8080_TCP", "tcp://10.43.0.7:8080"),
    ("LK_JWT_PORT_8080_TCP_ADDR", "10.43.0.7"),
    ("LIVEKIT_JWT_SERVICE_HOST", "10.43.0.8"),
    ("LIVEKIT_JWT_SERVICE_PORT", "8080"),
    ("LIVEKIT_JWT_PORT", "tcp://10.43.0.8:8080"),
    ("LIVEKIT_JWT_PORT_8080_TCP_PORT", "8080"),
    ("LIVEKIT_SERVICE_HOST", "10.43.0.9"),
    ("LIVEKIT_SERVICE_PORT", "7880"),
    ("LIVEKIT_PORT", "tcp://10.43.0.9:7880"),
    ("LIVEKIT_PORT_7880_TCP", "tcp://10.43.0.9:7880"),
    ("LIVEKIT_SFU_PORT", "udp://10.43.0.9:7882"),
    ("LIVEKIT_SFU_PORT_7882_UDP_ADDR", "10.43.0.9"),
    ("LIVEKIT_REDIS_SERVICE_HOST", "10.43.0.10"),
    ("LIVEKIT_REDIS_PORT", "tcp://10.43.0.10:6379"),
];

/// What a link of Docker adds.
const LINK: Pairs<'static> = &[
    ("LK_JWT_PORT", "tcp://172.17.0.5:8080"),
    ("LK_JWT_NAME", "/caddy/lk-jwt"),
    ("LIVEKIT_SFU_PORT", "tcp://172.17.0.4:7880"),
    ("LIVEKIT_SFU_NAME", "/caddy/livekit-sfu"),
    ("LIVEKIT_SFU_ENV_LIVEKIT_KEYS", "key: hunter2"),
];

/// A directory with the files that the environments name.
struct Files(PathBuf);

impl Files {
    fn new() -> Self {
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("environments-{}-{}", std::process::id(), unique()));
        fs::create_dir_all(directory.join("empty")).expect("a directory");
        let files = Self(directory);
        for (name, text) in [
            ("key", "key\n"),
            ("secret", UUID),
            ("secret-crlf", "\u{feff}hunter2-hunter2-hunter2-hunter2-hunter2\r\n"),
            ("secret-unexpanded", "${LIVEKIT_SECRET:-hunter2}\n"),
            ("pair", "key: hunter2-hunter2-hunter2-hunter2-hunter2\n"),
            ("pair-crlf", "# keys\r\nkey: hunter2-hunter2-hunter2-hunter2-hunter2\r\n"),
            ("pair-template", "{{ livekit_key }}: {{ livekit_secret }}\n"),
            (
                "registration",
                "id: lk\nurl: null\nas_token: hunter2-as\nhs_token: hunter2-hs\nsender_localpart: lk\nnamespaces: {}\n",
            ),
            ("registration-template", "as_token: <hunter2>\nhs_token: hunter2-hs\n"),
            ("blank", " \n"),
        ] {
            fs::write(files.0.join(name), text).expect("a file");
        }
        fs::write(files.0.join("huge"), vec![b'x'; 1024 * 1024]).expect("a file");
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    fn pipe(&self, name: &str) -> String {
        let path = self.path(name);
        assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
        path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A port that was free on every address a moment ago.
fn free_port_of_all() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port_of(Ipv4Addr::UNSPECIFIED).port()).into()
}

/// The process of an environment, once more where another test has taken its port on one of all addresses meanwhile.
fn started(environment: &[Pairs<'_>], files: &Files) -> Service {
    let mut tries = 0;
    loop {
        let service = spawn(environment, files);
        tries += 1;
        wait_until("a start or its end", Duration::from_secs(20), || {
            service.exit_status().is_some() || service.has_event("listening")
        });
        let ended = service.exit_status().is_some() && service.wait_exit(Duration::from_secs(1)).code().is_some();
        if !ended || tries == 5 || !service.log().contains("Address already in use") {
            return service;
        }
    }
}

fn spawn(environment: &[Pairs<'_>], files: &Files) -> Service {
    prepare(environment, files).spawn()
}

/// An environment in which `{dir}`, `{bind}`, `{port}` and `{ca}` are filled in.
fn prepare(environment: &[Pairs<'_>], files: &Files) -> Setup {
    let on_all = environment.iter().copied().flatten().any(|(_, value)| value.contains("{port}"));
    let address = if on_all { free_port_of_all() } else { free_address() };
    let ca = Ca::trusted().file().to_string_lossy();
    let fill = |value: &str| {
        value
            .replace("{dir}", &files.0.to_string_lossy())
            .replace("{bind}", &address.to_string())
            .replace("{port}", &address.port().to_string())
            .replace("{ca}", &ca)
    };
    let mut setup = Setup::bare().unset("LIVEKIT_LOG_LEVEL").unset("LIVEKIT_JWT_BIND");
    for (name, value) in environment.iter().copied().flatten() {
        setup = match *value {
            "-" => setup.unset(name),
            value => setup.env(name, &fill(value)),
        };
    }
    setup.reached_at(address).secret("hunter2")
}

fn assert_outcome(what: &str, service: &Service, outcome: &Outcome) {
    match outcome {
        Starts(said) => {
            service.wait_healthy();
            service.wait_event("running_with");
            let log = service.log();
            for text in *said {
                assert!(log.contains(text), "{what}: {text:?} is not said:\n{log}");
            }
            assert!(said.contains(&NOT_READ) || !log.contains(NOT_READ), "{what}:\n{log}");
        }
        Fails(said) => {
            let code = service.wait_exit(Duration::from_secs(10)).code();
            let log = service.log();
            assert_eq!(code, Some(1), "{what}:\n{log}");
            for text in *said {
                assert!(log.contains(text), "{what}: {text:?} is not said:\n{log}");
            }
            assert!(Connection::open(service.address()).is_err(), "{what}: the port is open");
        }
    }
}

fn assert_each(table: &[(&str, &[Pairs<'_>], Outcome)]) {
    let files = Files::new();
    for (what, environment, outcome) in table {
        let code = start::assert_check_config_says_the_same(what, &prepare(environment, &files));
        assert_eq!(code, i32::from(matches!(outcome, Fails(_))), "{what}");
    }
    for portion in table.chunks(8) {
        let running: Vec<_> = portion
            .iter()
            .map(|(what, environment, outcome)| (what, started(environment, &files), outcome))
            .collect();
        for (what, service, outcome) in &running {
            assert_outcome(what, service, outcome);
        }
    }
}

#[test]
fn every_wrapper_starts() {
    let keys: Pairs<'_> = &[("LIVEKIT_KEY", "key"), ("LIVEKIT_SECRET", UUID)];
    let bind: Pairs<'_> = &[("LIVEKIT_JWT_BIND", "{bind}")];
    assert_each(&[
        (
            "ess-helm, in a namespace with its Services",
            &[
                &[
                    ("LIVEKIT_KEY", "matrix-rtc"),
                    ("LIVEKIT_SECRET_FROM_FILE", "{dir}/secret"),
                    ("LIVEKIT_URL", "wss://mrtc.ess.localhost"),
                    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "ess.localhost"),
                    (
                        "LIVEKIT_CS_API_URL_OVERRIDES",
                        "ess.localhost=http://ess-synapse.ess.svc.cluster.local.:8008",
                    ),
                    ("ESS_MATRIX_RTC_AUTHORISATION_SERVICE_PORT", "tcp://10.43.0.7:8080"),
                ],
                SERVICES,
                bind,
            ],
            Starts(&["ess.localhost=http://ess-synapse.ess.svc.cluster.local.:8008/"]),
        ),
        (
            "ess-helm with the application service and several replicas",
            &[
                &[
                    ("LIVEKIT_KEY", "matrix-rtc"),
                    ("LIVEKIT_SECRET_FROM_FILE", "{dir}/secret"),
                    ("LIVEKIT_URL", "wss://mrtc.ess.localhost"),
                    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
                    ("LIVEKIT_AS_REGISTRATION_FILE", "{dir}/registration"),
                    ("LIVEKIT_HS_SERVER_NAME", "ess.localhost"),
                    ("LIVEKIT_JWT_REPLICA_IP", "10.42.0.17"),
                ],
                bind,
            ],
            Starts(&["application service of ess.localhost"]),
        ),
        (
            "matrix-docker-ansible-deploy",
            &[
                keys,
                &[
                    ("LIVEKIT_JWT_BIND", ":{port}"),
                    ("LIVEKIT_URL", "wss://matrix.example.com/livekit-server"),
                    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
                    ("LIVEKIT_CS_API_URL_OVERRIDES", ""),
                ],
            ],
            Starts(&[]),
        ),
        (
            "NixOS with a key file",
            &[&[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_JWT_BIND", ":{port}"),
                ("LIVEKIT_KEY_FILE", "{dir}/pair"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
                ("CREDENTIALS_DIRECTORY", "{dir}"),
                ("INVOCATION_ID", "0123456789abcdef"),
            ]],
            Starts(&[]),
        ),
        (
            "NixOS with credentials",
            &[&[
                ("LIVEKIT_URL", "ws://127.0.0.1:7880"),
                ("LIVEKIT_JWT_BIND", "{bind}"),
                ("LIVEKIT_KEY_FROM_FILE", "{dir}/key"),
                ("LIVEKIT_SECRET_FROM_FILE", "{dir}/secret"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
            ]],
            Starts(&[]),
        ),
        (
            "NixOS, the older module",
            &[&[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_JWT_PORT", "{port}"),
                ("LIVEKIT_KEY_FILE", "{dir}/pair"),
            ]],
            Starts(&["LIVEKIT_JWT_PORT is deprecated"]),
        ),
        (
            "Element Call's compose file",
            &[&[
                ("LIVEKIT_JWT_PORT", "{port}"),
                ("LIVEKIT_URL", "wss://matrix-rtc.m.localhost/livekit/sfu"),
                ("LIVEKIT_KEY", "devkey"),
                ("LIVEKIT_SECRET", "secret"),
                ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
            ]],
            Starts(&["wss://matrix-rtc.m.localhost/livekit/sfu"]),
        ),
        (
            "tuwunel and continuwuity",
            &[
                keys,
                &[
                    ("LIVEKIT_JWT_BIND", ":{port}"),
                    ("LIVEKIT_URL", "wss://livekit.example.com"),
                    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
                ],
            ],
            Starts(&[]),
        ),
        (
            "tuwunel-helm and the operator, with secretKeyRef",
            &[keys, bind, SERVICES, &[("LIVEKIT_URL", "wss://livekit.example.com")]],
            Starts(&["LIVEKIT_JWT_PORT counts as unset: Kubernetes"]),
        ),
        (
            "element-call-helm of 2024",
            &[keys, bind, &[("LIVEKIT_URL", "wss://sfu.example.com")]],
            Starts(&["LIVEKIT_FULL_ACCESS_HOMESERVERS is not set"]),
        ),
        (
            "element-docker-demo",
            &[
                keys,
                &[
                    ("LIVEKIT_URL", "wss://livekit.example.com"),
                    ("LK_JWT_PORT", "{port}"),
                    ("SSL_CERT_FILE", "{ca}"),
                ],
            ],
            Starts(&["LK_JWT_PORT is deprecated"]),
        ),
        (
            "compose and quadlet files in the wild",
            &[&[
                ("LIVEKIT_URL", "https://livekit.example.com"),
                ("LIVEKIT_KEY_FILE", "{dir}/pair"),
                ("LIVEKIT_JWT_PORT", "{port}"),
                ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "30"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com, matrix.example.org"),
            ]],
            Starts(&[]),
        ),
        (
            "version 0.2.2",
            &[
                bind,
                &[
                    ("LIVEKIT_URL", "wss://livekit.example.com"),
                    ("LIVEKIT_KEY_FILE", "{dir}/key"),
                    ("LIVEKIT_SECRET_FILE", "{dir}/secret"),
                    ("LIVEKIT_LOCAL_HOMESERVERS", "example.com"),
                ],
            ],
            Starts(&[]),
        ),
        (
            "one .env for livekit-server, its egress and ingress, and this service",
            &[
                BASE,
                &[
                    ("LIVEKIT_KEYS", "key: hunter2"),
                    ("LIVEKIT_CONFIG", "port: 7880"),
                    ("LIVEKIT_PORT", "7880"),
                    ("LIVEKIT_RTC_UDP_PORT", "7882"),
                    ("LIVEKIT_REDIS_ADDRESS", "redis:6379"),
                    ("LIVEKIT_WS_URL", "ws://livekit:7880"),
                    ("LIVEKIT_TURN_CERT", "/cert.pem"),
                    ("LIVEKIT_API_KEY", "key"),
                    ("LIVEKIT_API_SECRET", "hunter2"),
                    ("EGRESS_CONFIG_BODY", "hunter2"),
                    ("LOG_LEVEL", "debug"),
                    ("LIVEKIT_LOG_LEVEL", "info"),
                ],
            ],
            Starts(&[]),
        ),
    ]);
}

#[test]
fn odd_environments_start_or_say_what_to_correct() {
    let no_keys: Pairs<'_> = &[("LIVEKIT_KEY", "-"), ("LIVEKIT_SECRET", "-")];
    let no_secret: Pairs<'_> = &[("LIVEKIT_SECRET", "-")];
    let own: Pairs<'_> = &[("LIVEKIT_HS_SERVER_NAME", "example.com")];
    assert_each(&[
        // Kubernetes and Docker.
        (
            "Services named lk-jwt, livekit-jwt and livekit",
            &[BASE, SERVICES],
            Starts(&["LIVEKIT_JWT_PORT counts as unset: Kubernetes", "LK_JWT_PORT counts as unset"]),
        ),
        ("a link of Docker", &[BASE, LINK], Starts(&["LK_JWT_PORT counts as unset"])),
        (
            "envFrom of a ConfigMap with another case",
            &[BASE, &[("livekit-url", "wss://hunter2")]],
            Starts(&[NOT_READ, "did you mean LIVEKIT_URL?"]),
        ),
        (
            "Helm's template, not rendered",
            &[BASE, &[("LIVEKIT_URL", "wss://{{ .Values.livekit.host }}")]],
            Fails(&["LIVEKIT_URL holds {{ … }}", NOT_FILLED_IN]),
        ),
        (
            "Kubernetes' own $(NAME) of a variable that is not there",
            &[BASE, &[("LIVEKIT_CS_API_URL_OVERRIDES", "example.com=http://$(SYNAPSE_HOST):8008")]],
            Fails(&["LIVEKIT_CS_API_URL_OVERRIDES holds $(…)"]),
        ),
        // env files.
        (
            "an env file with Windows line ends",
            &[
                BASE,
                &[
                    ("LIVEKIT_URL", "wss://livekit.example.com\r"),
                    ("LIVEKIT_KEY", "key\r"),
                    ("LIVEKIT_JWT_BIND", "{bind}\r"),
                    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com\r"),
                    ("LIVEKIT_CS_API_URL_OVERRIDES", "\r"),
                    ("SSL_CERT_FILE", "{ca}\r"),
                    ("LIVEKIT_LOG_FORMAT", "text\r"),
                ],
            ],
            Starts(&[]),
        ),
        (
            "the same with a proxy",
            &[BASE, &[("HTTPS_PROXY", "http://user:hunter2@proxy:3128\r")]],
            Fails(&["HTTPS_PROXY has white space or a line end around it"]),
        ),
        (
            "an env file with a byte order mark",
            &[BASE, &[("LIVEKIT_URL", "-"), ("\u{feff}LIVEKIT_URL", "wss://livekit.example.com")]],
            Fails(&["LIVEKIT_URL must be set", "did you mean LIVEKIT_URL?"]),
        ),
        (
            "an env file that keeps quotes around keys",
            &[BASE, &[("LIVEKIT_KEY", "\"key\""), ("LIVEKIT_LOG_LEVEL", "\"info\"")]],
            Starts(&["LIVEKIT_KEY is in quotes"]),
        ),
        (
            "an env file that keeps quotes around an address",
            &[BASE, &[("LIVEKIT_URL", "\"wss://livekit.example.com\"")]],
            Fails(&["LIVEKIT_URL must be", "is in quotes: remove them"]),
        ),
        (
            "an env file that keeps quotes around a list",
            &[BASE, &[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "'example.com'")]],
            Fails(&["LIVEKIT_FULL_ACCESS_HOMESERVERS", "write example.com"]),
        ),
        (
            "a file of blanks",
            &[BASE, no_secret, &[("LIVEKIT_SECRET_FROM_FILE", "{dir}/blank")]],
            Fails(&["LIVEKIT_SECRET_FROM_FILE needs a file with content"]),
        ),
        // Compose.
        (
            "Compose with $$, or an env_file that expands nothing",
            &[BASE, &[("LIVEKIT_URL", "wss://${HOST}/x"), ("LIVEKIT_SECRET", "${LIVEKIT_SECRET}")]],
            Fails(&["LIVEKIT_URL holds ${…}", "LIVEKIT_SECRET holds ${…}", NOT_FILLED_IN]),
        ),
        (
            "a variable without braces, not expanded",
            &[BASE, &[("LIVEKIT_URL", "wss://$HOST/x")]],
            Fails(&["LIVEKIT_URL must be", "cannot be a name"]),
        ),
        (
            "a list that expanded to nothing",
            &[BASE, &[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "")]],
            Fails(&["LIVEKIT_FULL_ACCESS_HOMESERVERS is set, but blank"]),
        ),
        (
            "everything else expanded to nothing",
            &[
                BASE,
                &[
                    ("LIVEKIT_API_URL", ""),
                    ("LIVEKIT_JWT_PORT", ""),
                    ("LIVEKIT_REDIS_URL", ""),
                    ("LIVEKIT_REDIS_PASSWORD", ""),
                    ("LIVEKIT_AS_TOKEN", ""),
                    ("HTTPS_PROXY", ""),
                    ("ALL_PROXY", ""),
                    ("SSL_CERT_FILE", ""),
                    ("SSL_CERT_DIR", ""),
                    ("LIVEKIT_NOBODYS", ""),
                ],
            ],
            Starts(&[]),
        ),
        (
            "the example of a documentation",
            &[BASE, &[("LIVEKIT_URL", "<your livekit url>"), ("LIVEKIT_KEY", "<your key>")]],
            Fails(&["LIVEKIT_URL holds <…>", "LIVEKIT_KEY holds <…>"]),
        ),
        // systemd.
        (
            "systemd: a specifier in an EnvironmentFile",
            &[BASE, &[("LIVEKIT_URL", "wss://%H.example.com")]],
            Fails(&["LIVEKIT_URL must be"]),
        ),
        (
            "systemd: the directory of credentials, not expanded",
            &[BASE, no_secret, &[("LIVEKIT_SECRET_FROM_FILE", "${CREDENTIALS_DIRECTORY}/secret")]],
            Fails(&["LIVEKIT_SECRET_FROM_FILE holds ${…}"]),
        ),
        (
            "systemd: no UTF-8 in sight",
            &[BASE, no_secret, &[("LIVEKIT_SECRET_FROM_FILE", "{dir}/secret-crlf"), ("LANG", "C")]],
            Starts(&[]),
        ),
        // Files.
        (
            "a keys file with Windows line ends",
            &[BASE, no_keys, &[("LIVEKIT_KEY_FILE", "{dir}/pair-crlf")]],
            Starts(&[]),
        ),
        (
            "a secret that nobody expanded, in a file",
            &[BASE, no_secret, &[("LIVEKIT_SECRET_FROM_FILE", "{dir}/secret-unexpanded")]],
            Fails(&["LIVEKIT_SECRET_FROM_FILE names a file that holds ${…}"]),
        ),
        (
            "a keys file that is a template",
            &[BASE, no_keys, &[("LIVEKIT_KEY_FILE", "{dir}/pair-template")]],
            Fails(&["LIVEKIT_KEY_FILE names a file that holds {{ … }}"]),
        ),
        (
            "a registration that is a template",
            &[BASE, own, &[("LIVEKIT_AS_REGISTRATION_FILE", "{dir}/registration-template")]],
            Fails(&["LIVEKIT_AS_REGISTRATION_FILE names a file that holds <…>"]),
        ),
        (
            "a bind mount of a file that is not there: Docker makes a directory of it",
            &[BASE, no_secret, &[("LIVEKIT_SECRET_FROM_FILE", "{dir}/empty")]],
            Fails(&["LIVEKIT_SECRET_FROM_FILE needs the path of a file", "it is a directory"]),
        ),
        (
            "/dev/null, /dev/zero and a whole disk image",
            &[
                BASE,
                no_keys,
                own,
                &[
                    ("LIVEKIT_KEY_FROM_FILE", "/dev/null"),
                    ("LIVEKIT_SECRET_FROM_FILE", "/dev/zero"),
                    ("LIVEKIT_AS_REGISTRATION_FILE", "{dir}/huge"),
                ],
            ],
            Fails(&[
                "LIVEKIT_KEY_FROM_FILE needs the path of a file",
                "LIVEKIT_SECRET_FROM_FILE needs the path of a file",
                "LIVEKIT_AS_REGISTRATION_FILE needs the path of a file",
                "it is a device",
                "longer than any such file",
            ]),
        ),
        // Certificates.
        (
            "a CA file that is not there",
            &[BASE, &[("SSL_CERT_FILE", "{dir}/no-ca.crt")]],
            Fails(&["SSL_CERT_FILE needs a file of CA certificates", "No such file"]),
        ),
        (
            "a CA file without certificates, and a directory that is empty",
            &[BASE, &[("SSL_CERT_FILE", "{dir}/blank"), ("SSL_CERT_DIR", "{dir}/empty")]],
            Fails(&["SSL_CERT_FILE needs a file with CA", "SSL_CERT_DIR needs a directory with CA"]),
        ),
        (
            "a directory as CA file is a directory of certificates",
            &[BASE, &[("SSL_CERT_FILE", "{dir}")]],
            Fails(&["SSL_CERT_FILE needs a file"]),
        ),
        // Proxies.
        (
            "a SOCKS proxy",
            &[BASE, &[("HTTPS_PROXY", "socks5://user:hunter2@proxy:1080")]],
            Fails(&["HTTPS_PROXY names a SOCKS proxy, which is not supported: set it to the http:// address"]),
        ),
        (
            "a SOCKS proxy for everything, in small letters",
            &[BASE, &[("all_proxy", "socks5h://127.0.0.1:1080")]],
            Fails(&["all_proxy names a SOCKS proxy"]),
        ),
        (
            "a proxy behind TLS",
            &[BASE, &[("https_proxy", "https://user:hunter2@proxy:3129")]],
            Fails(&["https_proxy names a proxy that is reached by https://"]),
        ),
        (
            "a desktop's three proxies",
            &[
                BASE,
                &[
                    ("http_proxy", "http://127.0.0.1:7890"),
                    ("https_proxy", "http://user:hunter2@127.0.0.1:7890"),
                    ("all_proxy", "socks5://127.0.0.1:7890"),
                ],
            ],
            Starts(&[]),
        ),
        // Names.
        (
            "names without our prefix, or with another one",
            &[
                BASE,
                &[
                    ("FULL_ACCESS_HOMESERVERS", "hunter2"),
                    ("HS_SERVER_NAME", "hunter2"),
                    ("LK_JWT_BIND", ":hunter2"),
                    ("LIVEKIT_REDIS_URI", "redis://:hunter2@redis"),
                ],
            ],
            Starts(&[
                NOT_READ,
                "did you mean LIVEKIT_FULL_ACCESS_HOMESERVERS?",
                "did you mean LIVEKIT_HS_SERVER_NAME?",
                "did you mean LIVEKIT_JWT_BIND?",
                "did you mean LIVEKIT_REDIS_URL?",
            ]),
        ),
        // Passwords.
        (
            "an address of LiveKit with a password",
            &[BASE, &[("LIVEKIT_URL", "wss://user:hunter2@livekit.example.com/sfu?key=hunter2")]],
            Starts(&["LIVEKIT_URL holds a user name or password", "wss://livekit.example.com/sfu"]),
        ),
        (
            "passwords in addresses that are wrong besides",
            &[
                BASE,
                &[
                    ("LIVEKIT_URL", "livekit://user:hunter2@host"),
                    ("LIVEKIT_API_URL", "http://user:hunter2@livekit:7880"),
                    ("LIVEKIT_REDIS_URL", "redis://:hunter2@redis:port"),
                    ("LIVEKIT_CS_API_URL_OVERRIDES", "example.com=https://user:hunter2,x@host"),
                    ("LIVEKIT_FEDERATION_URL_OVERRIDES", "example.com=https://user:hunter2@host"),
                    ("HTTP_PROXY", "gopher://user:hunter2@proxy"),
                ],
            ],
            Fails(&[
                "LIVEKIT_URL must be",
                "LIVEKIT_API_URL must be",
                "LIVEKIT_REDIS_URL must be",
                "LIVEKIT_CS_API_URL_OVERRIDES must be",
                "LIVEKIT_FEDERATION_URL_OVERRIDES must be",
                "HTTP_PROXY must be",
            ]),
        ),
    ]);
}

/// `LIVEKIT_SECRET_FROM_FILE=<(pass show livekit)`: the writer takes its time, and it works.
#[test]
fn a_pipe_is_a_file() {
    let files = Files::new();
    let pipe = files.pipe("pipe");
    let environment: Pairs<'_> = &[("LIVEKIT_SECRET", "-"), ("LIVEKIT_SECRET_FROM_FILE", "{dir}/pipe")];
    let service = spawn(&[BASE, environment], &files);
    let mut writer = fs::OpenOptions::new().write(true).open(&pipe).expect("a reader");
    writer.write_all(b"hunter2-hunter2-hunter2-").expect("written");
    // Not there yet: it waits for the rest.
    assert!(Connection::open(service.address()).is_err());
    writer.write_all(b"hunter2-hunter2\n").expect("written");
    drop(writer);
    assert_outcome("a pipe", &service, &Starts(&[]));

    if !std::path::Path::new("/bin/bash").exists() {
        return;
    }
    let shell = "LIVEKIT_KEY_FILE=<(echo 'key: hunter2-hunter2-hunter2-hunter2-hunter2') exec \"$0\"";
    // It starts, and answers.
    Setup::bare()
        .env("LIVEKIT_URL", "wss://livekit.example.com")
        .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com")
        .wrapped_in(&["/bin/bash", "-c", shell])
        .secret("hunter2")
        .start();
}

#[test]
fn a_pipe_into_which_nobody_writes_stops_the_start_after_five_seconds() {
    let files = Files::new();
    let pipe = files.pipe("pipe");
    let environment: Pairs<'_> = &[("LIVEKIT_SECRET", "-"), ("LIVEKIT_SECRET_FROM_FILE", "{dir}/pipe")];
    // Nobody opens it; somebody opens it, writes, and goes on having it open.
    for writes in [false, true] {
        let began = Instant::now();
        let service = spawn(&[BASE, environment], &files);
        let writer = writes.then(|| {
            let mut writer = fs::OpenOptions::new().write(true).open(&pipe).expect("a reader");
            writer.write_all(b"hunter2").expect("written");
            writer
        });
        let said: &[&str] = &["LIVEKIT_SECRET_FROM_FILE needs the path of a file", "within 5 s"];
        let code = service.wait_exit(Duration::from_secs(15)).code();
        let took = began.elapsed();
        assert_eq!(code, Some(1), "{}", service.log());
        assert!(said.iter().all(|text| service.log().contains(text)), "{}", service.log());
        assert!((Duration::from_secs(5)..Duration::from_secs(8)).contains(&took), "{took:?}");
        drop(writer);
    }
}
