//! `lk-jwt-service doctor`: asks the running service, or makes the checks by itself, and draws what comes of it.

mod link;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::sync::Arc;

use hyper_util::client::proxy::matcher::Matcher;
use tokio::sync::mpsc;
use url::Url;

use super::ask::{Asked, ask};
use super::check::{Check, Group, Line, Verdict, View, WAITING};
use super::paint::{self, Pseudonyms};
use super::settings::Environment;
use super::sfu::is_this_machine;
use super::ticket::{MAX_SERVERS, Wishes};
use super::{Context, Settings, run as make, side_by_side};
use crate::access::Homeservers as PolicyList;
use crate::cli::DoctorOptions;
use crate::config::{self, Config, RedisAddress};
use crate::dns::Dns;
use crate::federation::{self, Federation, Guard};
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::runtime;
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::sfu::Sfu;
use crate::store::Store;
use crate::telemetry::say;
use crate::tls::{self, Tls};
use crate::token::{Grants, Minter};

/// Longest access token that is read, in bytes.
const MAX_TOKEN_BYTES: u64 = 4096;
/// Connections to homeservers at a time.
const CONNECTIONS: u32 = 64;

/// Makes the run that `options` ask for. The exit code is 0, or 1 where something is broken, or 2 where nothing could be said.
pub fn run(options: &DoctorOptions) -> ExitCode {
    let work = async {
        let outcome = if options.link {
            link::print(options).await.map(|()| true)
        } else {
            examine(options).await
        };
        outcome.map_or_else(|why| fail(&why), |is_well| ExitCode::from(u8::from(!is_well)))
    };
    match runtime::new() {
        Ok(runtime) => {
            let code = runtime::block_on(&runtime, Box::pin(work));
            // A look-up that hangs keeps nobody waiting.
            runtime.shutdown_background();
            code
        }
        Err(error) => fail(&error),
    }
}

fn fail(why: &dyn Display) -> ExitCode {
    say(&format!("lk-jwt-service doctor: {why}"));
    ExitCode::from(2)
}

/// Whether all is well; in words where nothing could be found out.
async fn examine(options: &DoctorOptions) -> Result<bool, String> {
    let environment = environment(options)?;
    let mut wishes = wishes(options)?;
    let public = options.url.as_deref().map(public_url).transpose()?;
    if wishes.user_token.is_some() && public.as_ref().is_some_and(|url| !may_carry_tokens(url)) {
        return Err("--user-token goes over https or to this machine only: --url is neither".into());
    }
    // From elsewhere, without a secret: what everybody sees.
    let config = if environment.has_key() || public.is_none() || options.dev {
        Some(config(&environment, options.dev)?)
    } else {
        None
    };
    let mut out = Output::new(options, &wishes, config.as_ref(), public.as_ref());
    let (context, secret) = match (config, public) {
        (Some(config), public) => {
            let secret = config.livekit.keys.signing().secret.clone();
            let bases = match &public {
                Some(url) => vec![url.clone()],
                None => here(&environment)?,
            };
            if wishes.user_token.is_some() && !bases.iter().all(may_carry_tokens) {
                return Err("--user-token goes over https or to this machine only: name the service by --url https://...".into());
            }
            match ask_service(&config, &bases, &secret, &wishes, &mut out).await {
                Asked::Made => out.made_by = "service",
                Asked::OtherSecret => {
                    return Err("the service runs with another secret than the one read here: reload it (SIGHUP), or restart it".into());
                }
                Asked::Later(seconds) => return Err(format!("one run at a time, six a minute: try again in {seconds} s")),
                Asked::Nobody(why) => out.note(&format!(
                    "the service does not answer ({why}): this process makes the checks by itself"
                )),
            }
            if out.made_by == "service" && public.is_none() {
                return out.finish(options.strict);
            }
            let view = if public.is_some() { View::Outside } else { View::Inside };
            (context(&config, view, public)?, Some(secret))
        }
        (None, Some(public)) => {
            out.note("no secret is known here: what is public is looked at, and nothing else");
            (stranger(&environment, &wishes, public), None)
        }
        (None, None) => return Err("there are no settings, and no --url".into()),
    };
    if context.view == View::Outside {
        see_from_outside(&mut wishes);
    }
    let (lines, found) = mpsc::channel(WAITING);
    let made = Box::pin(async move { make(&context, &wishes, secret.as_ref(), &lines).await });
    side_by_side(vec![made, Box::pin(out.take_all(found))]).await;
    out.finish(options.strict)
}

/// Has the service make the checks.
async fn ask_service(config: &Config, bases: &[Url], secret: &Secret, wishes: &Wishes, out: &mut Output) -> Asked {
    let tls = Tls::new(config.skip_tls_verification, config.certificates.clone());
    let (lines, found) = mpsc::channel(WAITING);
    let mut asked = Asked::Nobody(String::new());
    let asking = Box::pin(async {
        asked = ask(bases, secret, wishes, &tls, &lines).await;
        drop(lines);
    });
    side_by_side(vec![asking, Box::pin(out.take_all(found))]).await;
    asked
}

fn environment(options: &DoctorOptions) -> Result<Environment, String> {
    let environment = match (options.pid, &options.env_file) {
        (Some(_), Some(_)) => return Err("--pid and --env-file are two places for the same settings: give one".into()),
        (Some(pid), None) => Environment::of_process(pid),
        (None, Some(file)) => Environment::of_file(file),
        (None, None) => Ok(Environment::own()),
    };
    environment.map_err(|error| error.to_string())
}

fn config(environment: &Environment, dev: bool) -> Result<Config, String> {
    let config = environment.config(dev);
    config.map_err(|mistakes| format!("the settings cannot be used; the service would not start with them either:\n{mistakes}"))
}

fn wishes(options: &DoctorOptions) -> Result<Wishes, String> {
    let mut only = Vec::new();
    for word in &options.only {
        let words = || Group::ALL.map(Group::word).join(", ");
        only.push(Group::named(word).ok_or_else(|| format!("--only {word}: the groups are {}", words()))?);
    }
    if let Some(name) = options.servers.iter().find(|name| ServerName::parse(name).is_err()) {
        return Err(format!("--server {name}: that is not the name of a homeserver"));
    }
    if options.servers.len() > MAX_SERVERS {
        return Err(format!("--server: {MAX_SERVERS} homeservers at most"));
    }
    let user_token = options.user_token.as_deref().map(read_token).transpose()?;
    Ok(Wishes {
        only,
        slow: options.slow,
        servers: options.servers.clone(),
        user_token,
        room: options.room.clone(),
    })
}

/// Reads an access token; never from the command line, which everybody on the machine sees.
fn read_token(path: &str) -> Result<String, String> {
    let mut text = String::new();
    let file = match path {
        // As a file: there is one kind of reader then.
        "-" => io::stdin().as_fd().try_clone_to_owned().map(fs::File::from),
        _ => fs::File::open(path),
    };
    file.and_then(|file| file.take(MAX_TOKEN_BYTES).read_to_string(&mut text))
        .map_err(|error| format!("--user-token: {error}; it is the path of a file, or - for stdin"))?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("--user-token: the file does not hold an access token".into());
    }
    Ok(token.to_owned())
}

fn public_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok();
    url.filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some() && url.query().is_none() && url.username().is_empty())
        .ok_or_else(|| "--url needs the public address of the service, as https://livekit.example.com/livekit/jwt".to_owned())
}

fn may_carry_tokens(url: &Url) -> bool {
    url.scheme() == "https" || is_this_machine(url)
}

/// Where the service listens, seen from this machine.
fn here(environment: &Environment) -> Result<Vec<Url>, String> {
    let bind = config::bind(&|name| environment.get(name)).map_err(|mistakes| mistakes.to_string())?;
    let address = |(host, port): (String, u16)| {
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        Url::parse(&format!("http://{host}:{port}")).ok()
    };
    Ok(bind.healthcheck_targets().into_iter().filter_map(address).collect())
}

/// Leaves the wishes that can be met from outside, without the network, the store and the webhooks of the service.
fn see_from_outside(wishes: &mut Wishes) {
    let mut seen = vec![Group::Sfu, Group::Discovery, Group::Routes, Group::Homeserver];
    seen.retain(|group| wishes.wants(*group));
    (wishes.only, wishes.user_token) = (seen, None);
}

/// The parts that a service with this configuration has, as far as checks need them.
fn context(config: &Config, view: View, public: Option<Url>) -> Result<Context, String> {
    let settings = Settings {
        public,
        ..Settings::of(config)
    };
    let tls = Arc::new(Tls::new(config.skip_tls_verification, config.certificates.clone()));
    let dns = Arc::new(Dns::new(&config.dns_servers));
    let federation = Arc::new(Federation::new(
        federation::Settings {
            guard: Guard {
                allowed_networks: config.allowed_networks.clone(),
                lab: config.skip_tls_verification,
            },
            overrides: config.federation_overrides.clone(),
            listed: config.full_access.clone(),
            also_listed: settings.servers.iter().chain(config.cs_api_overrides.keys()).cloned().collect(),
            proxies: Matcher::from_env(),
            connections_out: CONNECTIONS,
            remember: Box::new(|_, _| {}),
        },
        dns.clone(),
        tls.clone(),
    ));
    let grants = Grants {
        can_update_own_metadata: config.can_update_own_metadata,
        publish_sources: config.publish_sources.clone(),
    };
    let minter = Minter::new(config.livekit.keys.signing(), config.jwt_ttl, grants);
    let minter = Arc::new(minter.map_err(|error| error.to_string())?);
    // From outside, the SFU's API is where clients find the SFU.
    let api = match view {
        View::Inside => settings.livekit_api.clone(),
        View::Outside => super::sfu::base_of(&config.livekit.url),
    };
    let sfu = api.map(|api| Arc::new(Sfu::new(&api, config.max_participants, minter, tls.clone(), dns.clone())));
    let homeservers = Arc::new(Homeservers::new(federation.clone(), config.cs_api_overrides.clone()));
    let (own, store) = match view {
        View::Outside => (None, None),
        View::Inside => {
            let own = config.app_service.as_ref();
            let own = own.map(|own| Arc::new(OwnHomeserver::new(homeservers, own.server_name.clone(), own.as_token.clone())));
            let store = match (&config.delegated_leave.redis, &config.delegated_leave.state_path) {
                (Some(redis), _) => Some(Store::redis(redis.clone(), tls, dns)),
                // A file belongs to one process, and would be made where there is none.
                (None, Some(_)) => None,
                (None, None) => Some(Store::memory()),
            };
            (own, store)
        }
    };
    Ok(Context {
        view,
        federation,
        sfu,
        own,
        store,
        knows: None,
        fleet: None,
        arrivals: None,
        settings,
    })
}

/// The parts of somebody who knows no secret: the way to what is public.
fn stranger(environment: &Environment, wishes: &Wishes, public: Url) -> Context {
    let certificates = tls::Given::new(environment.get(tls::CERT_FILE), environment.get(tls::CERT_DIR));
    let servers: Vec<_> = wishes.servers.iter().filter_map(|name| ServerName::parse(name).ok()).collect();
    let federation = Federation::new(
        federation::Settings {
            guard: Guard::default(),
            overrides: BTreeMap::new(),
            listed: PolicyList::Listed(BTreeSet::new()),
            also_listed: servers.clone(),
            proxies: Matcher::from_env(),
            connections_out: CONNECTIONS,
            remember: Box::new(|_, _| {}),
        },
        Arc::new(Dns::new(&[])),
        Arc::new(Tls::new(false, certificates)),
    );
    Context {
        view: View::Outside,
        federation: Arc::new(federation),
        sfu: None,
        own: None,
        store: None,
        knows: None,
        fleet: None,
        arrivals: None,
        settings: Settings {
            livekit_url: environment.get("LIVEKIT_URL").unwrap_or_default(),
            servers,
            public: Some(public),
            ..Settings::default()
        },
    }
}

/// Findings of a run, and how they are shown.
struct Output {
    json: bool,
    colour: bool,
    progress: bool,
    made_by: &'static str,
    notes: Vec<String>,
    pseudonyms: Option<Pseudonyms>,
    wanted: Vec<Group>,
    ended: Vec<Group>,
    /// Checks that were made: those that are drawn, and then the others, by group.
    checks: Vec<Check>,
    drawn: usize,
}

impl Output {
    fn new(options: &DoctorOptions, wishes: &Wishes, config: Option<&Config>, public: Option<&Url>) -> Self {
        let is_terminal = io::stdout().is_terminal();
        let colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let mut names = config.map(names_in).unwrap_or_default();
        names.extend(public.and_then(Url::host_str).map(str::to_owned));
        Self {
            json: options.json,
            colour,
            progress: is_terminal && !options.json,
            made_by: "command",
            notes: Vec::new(),
            pseudonyms: options.anonymize.then(|| Pseudonyms::of(names)),
            wanted: Group::ALL.into_iter().filter(|group| wishes.wants(*group)).collect(),
            ended: Vec::new(),
            checks: Vec::new(),
            drawn: 0,
        }
    }

    fn note(&mut self, note: &str) {
        let note = match &mut self.pseudonyms {
            Some(pseudonyms) => pseudonyms.text(note),
            None => note.to_owned(),
        };
        if !self.json {
            say(&note);
        }
        self.notes.push(note);
    }

    /// Takes in what is found, until nothing more comes.
    async fn take_all(&mut self, mut found: mpsc::Receiver<Line>) {
        while let Some(line) = found.recv().await {
            self.take(line);
        }
    }

    fn take(&mut self, line: Line) {
        match line {
            Line::Check(mut check) => {
                if let Some(pseudonyms) = &mut self.pseudonyms {
                    pseudonyms.hide(&mut check);
                }
                let at = self.end_of(check.group);
                self.checks.insert(at, *check);
                if self.progress {
                    write(&format!("\r{} checks made …\u{1b}[K", self.checks.len()));
                }
            }
            Line::End { end: Some(group) } => {
                self.ended.push(group);
                self.draw(false);
            }
            Line::End { end: None } => {
                self.draw(true);
                self.ended.clear();
            }
        }
    }

    /// Draws the groups that are complete, in order; all that are there at the end.
    fn draw(&mut self, all: bool) {
        for at in 0..self.wanted.len() {
            let group = self.wanted[at];
            if !all && !self.ended.contains(&group) {
                return;
            }
            let end = self.end_of(group);
            let of_group = &self.checks[self.drawn..end];
            if !self.json && !of_group.is_empty() {
                let erase = if self.progress { "\r\u{1b}[K" } else { "" };
                write(&format!("{erase}{}", paint::group(group, of_group, self.colour)));
            }
            self.drawn = end;
        }
    }

    /// Where the checks of a group end that are not drawn yet.
    fn end_of(&self, group: Group) -> usize {
        self.drawn + self.checks[self.drawn..].partition_point(|check| check.group <= group)
    }

    /// Says how it ended. An error where nothing was found out, since no check could be made.
    fn finish(mut self, strict: bool) -> Result<bool, String> {
        self.draw(true);
        if self.checks.is_empty() {
            return Err("no check was made".into());
        }
        if self.json {
            let document = paint::document(&self.checks, self.made_by, &self.notes);
            write(&format!("{document:#}\n"));
        } else {
            write(&paint::summary(&self.checks));
        }
        if self.checks.iter().all(|check| check.result == Verdict::Skip) {
            return Err("no check could be made: see why they were left out".into());
        }
        let is_bad = |check: &Check| check.result == Verdict::Fail || (strict && check.result == Verdict::Warn);
        Ok(!self.checks.iter().any(is_bad))
    }
}

/// Hosts of the configuration, which may look like ordinary words.
fn names_in(config: &Config) -> Vec<String> {
    let settings = Settings::of(config);
    let livekit = Url::parse(&settings.livekit_url).ok();
    let mut names = Vec::new();
    let mut add = |url: &Url| names.extend(url.host_str().map(str::to_owned));
    settings.client_apis.values().for_each(&mut add);
    config.federation_overrides.values().for_each(&mut add);
    [settings.livekit_api.as_ref(), livekit.as_ref()]
        .into_iter()
        .flatten()
        .for_each(add);
    match config.delegated_leave.redis.as_ref().map(config::Redis::address) {
        Some(RedisAddress::Tcp { host, .. }) => names.push(host),
        Some(RedisAddress::Sentinel { sentinels, primary }) => {
            names.extend(sentinels.into_iter().map(|(host, _)| host));
            names.push(primary);
        }
        Some(RedisAddress::Cluster { nodes }) => names.extend(nodes.into_iter().map(|(host, _)| host)),
        Some(RedisAddress::Unix(_)) | None => {}
    }
    names.extend(settings.servers.iter().map(ToString::to_string));
    names.extend(settings.mentioned.iter().map(|(name, _)| name.to_string()));
    names
}

fn write(text: &str) {
    let mut out = io::stdout().lock();
    // The exit code says it too, so a closed stdout changes nothing.
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_over_https_or_to_this_machine() {
        for (url, may) in [
            ("https://a.example", true),
            ("http://localhost:8080", true),
            ("http://127.0.0.1:8080/x", true),
            ("http://[::1]", true),
            ("http://a.example", false),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(may_carry_tokens(&public_url(url).unwrap()), may, "{url}");
        }
        for none in ["", "a.example", "wss://a.example", "https://user@a.example", "https://a.example?x"] {
            assert!(public_url(none).is_err(), "{none}");
        }
    }

    #[test]
    fn only_what_is_known_is_wished_for() {
        let options = |only: &[&str], servers: &[&str]| DoctorOptions {
            only: only.iter().map(ToString::to_string).collect(),
            servers: servers.iter().map(ToString::to_string).collect(),
            ..DoctorOptions::default()
        };
        let mut made = wishes(&options(&["store", "sfu"], &["a.example"])).unwrap();
        assert_eq!(made.only, [Group::Store, Group::Sfu]);
        see_from_outside(&mut made);
        assert_eq!(made.only, [Group::Sfu]);
        for (only, servers, mistake) in [
            (&["x"][..], &[][..], "--only x"),
            (&[], &["a b"], "--server a b"),
            (&[], &["a"; 21], "20"),
        ] {
            assert!(wishes(&options(only, servers)).err().is_some_and(|text| text.contains(mistake)));
        }
        assert!(read_token("/nonexistent").is_err());
    }
}
