//! The options of `lk-jwt-service doctor`.

/// Options of `lk-jwt-service doctor`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DoctorOptions {
    /// Print a link for one user instead of making checks.
    pub link: bool,
    /// How long that link can be used, in minutes.
    pub link_minutes: Option<u16>,
    /// Print one JSON document.
    pub json: bool,
    /// Print no name and no address.
    pub anonymize: bool,
    /// Let warnings count as failures.
    pub strict: bool,
    /// Wait for an answer that takes long.
    pub slow: bool,
    /// Values of `livekit-server --dev` for what is unset.
    pub dev: bool,
    /// Groups of checks; all without one.
    pub only: Vec<String>,
    /// Homeservers instead of those of the configuration.
    pub servers: Vec<String>,
    /// Public address of the service.
    pub url: Option<String>,
    /// File of variables.
    pub env_file: Option<String>,
    /// Process whose variables count.
    pub pid: Option<u32>,
    /// File that holds a user's access token; `-` is stdin.
    pub user_token: Option<String>,
    /// Matrix room of that user's call.
    pub room: Option<String>,
}

impl DoctorOptions {
    /// Reads the words after `doctor`; the word that is not understood, or lacks its value, otherwise.
    pub(super) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut words = words.iter().copied();
        while let Some(word) = words.next() {
            let (name, mut given) = match word.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value)),
                Some(_) | None => (word, None),
            };
            if let Some(flag) = options.flag(name)
                && given.is_none()
            {
                *flag = true;
                continue;
            }
            let mut value = || {
                let value = given.take().or_else(|| words.next()).filter(|value| !value.is_empty());
                value.map(str::to_owned).ok_or_else(|| format!("{name} needs a value"))
            };
            let list = |text: String| {
                text.split(',')
                    .map(|one| one.trim().to_owned())
                    .filter(|one| !one.is_empty())
                    .collect::<Vec<_>>()
            };
            match name {
                "--only" => options.only.extend(list(value()?)),
                "--server" => options.servers.extend(list(value()?)),
                "--url" => options.url = Some(value()?),
                "--env-file" => options.env_file = Some(value()?),
                "--pid" => options.pid = Some(value()?.parse().map_err(|_| "--pid needs a number".to_owned())?),
                "--user-token" => options.user_token = Some(value()?),
                "--room" => options.room = Some(value()?),
                "--for" => options.link_minutes = Some(minutes(&value()?)?),
                _ => return Err(format!("unexpected argument {word:?}")),
            }
        }
        if options.link_minutes.is_some() && !options.link {
            return Err("--for goes with --link".to_owned());
        }
        Ok(options)
    }

    fn flag(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "--link" => Some(&mut self.link),
            "--json" => Some(&mut self.json),
            "--anonymize" => Some(&mut self.anonymize),
            "--strict" => Some(&mut self.strict),
            "--slow" => Some(&mut self.slow),
            "--dev" => Some(&mut self.dev),
            _ => None,
        }
    }
}

/// Reads a time such as `30m` or `2h`, four hours at most.
fn minutes(text: &str) -> Result<u16, String> {
    let (number, unit) = match text.strip_suffix('h') {
        Some(hours) => (hours, 60),
        None => (text.strip_suffix('m').unwrap_or(text), 1),
    };
    let minutes = number.parse::<u16>().ok().and_then(|number| number.checked_mul(unit));
    let minutes = minutes.filter(|minutes| (1..=MAX_LINK_MINUTES).contains(minutes));
    minutes.ok_or_else(|| format!("--for needs a time such as 30m or 2h, 4h at most, not {text:?}"))
}

/// Longest life of a link.
const MAX_LINK_MINUTES: u16 = 240;

/// Text of `lk-jwt-service doctor --help`.
pub const HELP: &str = "lk-jwt-service doctor: what is wrong around this service, and what to do about it

The running service makes the checks; it is found where the healthcheck finds it. Where nothing answers, they are made by
this process, which says so. Settings and the secret come from the environment, as in
`docker exec CONTAINER /lk-jwt-service doctor`.

  --env-file FILE      take the variables from this file (root: a unit's EnvironmentFile)
  --pid N              take the variables and files of this process (root: a unit with LoadCredential or DynamicUser)
  --url URL            public address of the service, as https://livekit.example.com/livekit/jwt: what is public is
                       looked at from here, too; without a secret nothing else is
  --server NAME[,...]  homeservers to look at instead of those with full access, 20 at most
  --only GROUP[,...]   sfu, webhook, discovery, routes, homeserver, app-service, store, user
  --slow               also wait for an answer that takes 12 s, which a proxy may cut off (45 s in all, else 20 s)
  --user-token FILE    try a call with the access token in this file (- is stdin): OpenID token, LiveKit token, join, leave
  --room ID            of that call: may the user say in this Matrix room that they are in it?
  --link               print a link for one user whose calls fail: the page /check tries media with it, five times
                       (LIVEKIT_CHECK_PAGE=on); what the user sends from there is in the service's log
  --for TIME           how long that link can be used, as 30m (which it is without) or 2h, 4h at most
  --dev                the service runs with --dev
  --json               one JSON document (docs/doctor.schema.json)
  --anonymize          no name and no address in the output
  --strict             warnings count as failures

Exit code: 0 nothing is broken, 1 something is, 2 the checks could not be made. No secret is ever printed.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_fits_a_terminal_and_names_every_option() {
        assert!(HELP.lines().all(|line| line.chars().count() <= 125));
        for option in [
            "--json",
            "--strict",
            "--slow",
            "--dev",
            "--pid",
            "--room",
            "--anonymize",
            "--user-token",
            "--env-file",
            "--link",
            "--for",
        ] {
            assert!(HELP.contains(&format!("\n  {option} ")), "{option}");
        }
    }

    #[test]
    fn options_are_read_in_both_forms() {
        let options = DoctorOptions::parse(&[
            "--json",
            "--only",
            "sfu,store",
            "--only=user",
            "--server=a.example",
            "--pid",
            "7",
            "--user-token",
            "-",
            "--strict",
        ]);
        let expected = DoctorOptions {
            json: true,
            strict: true,
            only: vec!["sfu".into(), "store".into(), "user".into()],
            servers: vec!["a.example".into()],
            pid: Some(7),
            user_token: Some("-".into()),
            ..DoctorOptions::default()
        };
        assert_eq!(options, Ok(expected));
        for (time, minutes) in [("30m", 30), ("4h", 240), ("90", 90)] {
            let options = DoctorOptions::parse(&["--link", "--for", time]);
            assert_eq!(
                options.map(|options| (options.link, options.link_minutes)),
                Ok((true, Some(minutes)))
            );
        }
        for (words, mistake) in [
            (&["--pid"][..], "--pid needs a value"),
            (&["--pid", "x"], "--pid needs a number"),
            (&["--json=yes"], "unexpected argument \"--json=yes\""),
            (&["example.com"], "unexpected argument \"example.com\""),
            (&["--url="], "--url needs a value"),
            (&["--for", "30m"], "--for goes with --link"),
            (
                &["--link", "--for", "5h"],
                "--for needs a time such as 30m or 2h, 4h at most, not \"5h\"",
            ),
            (
                &["--link", "--for", "0"],
                "--for needs a time such as 30m or 2h, 4h at most, not \"0\"",
            ),
            (
                &["--link", "--for=soon"],
                "--for needs a time such as 30m or 2h, 4h at most, not \"soon\"",
            ),
        ] {
            assert_eq!(DoctorOptions::parse(words), Err(mistake.to_owned()));
        }
    }
}
