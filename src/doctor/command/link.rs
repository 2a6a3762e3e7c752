//! `lk-jwt-service doctor --link`: a link to the page for one user whose calls fail.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use url::Url;

use super::{config, context, environment, may_carry_tokens, public_url, write};
use crate::cli::DoctorOptions;
use crate::clock::unix_seconds;
use crate::config::CheckPage;
use crate::doctor::ticket::{TicketKey, Wishes};
use crate::doctor::{Run, View, discovery, nonce};
use crate::telemetry::say;

/// Life of a link, unless another is asked for.
const LINK_MINUTES: u16 = 30;
/// Time to find out what the public address of the service is.
const FIND_TIMEOUT: Duration = Duration::from_secs(15);

/// Prints the link on stdout, and about it on stderr.
pub(super) async fn print(options: &DoctorOptions) -> Result<(), String> {
    let environment = environment(options)?;
    let config = config(&environment, options.dev)?;
    if config.check_page != CheckPage::On {
        return Err("--link needs LIVEKIT_CHECK_PAGE=on: set it for the service, and start it again".into());
    }
    let secret = config.livekit.keys.signing().secret.clone();
    let public = match &options.url {
        Some(url) => public_url(url)?,
        None => {
            let found = timeout(FIND_TIMEOUT, found(context(&config, View::Inside, None)?)).await;
            found.ok().flatten().ok_or(
                "the public address of this service is not known: no well-known file that can be read from here names it; give it by --url",
            )?
        }
    };
    if !may_carry_tokens(&public) {
        return Err("a link is for one user alone: it goes over https or to this machine only".into());
    }
    let (jti, minutes) = (nonce(), options.link_minutes.unwrap_or(LINK_MINUTES));
    let ticket = TicketKey::of_links(&secret).sign_link(&jti, unix_seconds(), u64::from(minutes) * 60);
    write(&format!("{}/check#t={ticket}\n", public.as_str().trim_end_matches('/')));
    say(&format!(
        "for one user, {minutes} minutes, five uses (of each instance, where there are several); what the user sends from the page is a \
         line of the service's log (of one of the instances): target check, jti {jti}"
    ));
    Ok(())
}

/// Public address of the service, as the first well-known file names it.
async fn found(context: crate::doctor::Context) -> Option<Url> {
    let began = Instant::now();
    let run = Run {
        context: &context,
        wishes: &Wishes::default(),
        secret: None,
        misnamed: None,
        began,
        ends: began + FIND_TIMEOUT,
    };
    for server in run.servers() {
        if let Some(url) = discovery::service_url(&run, &server).await {
            return Some(url);
        }
    }
    None
}
