//! Finds the running service where the healthcheck finds it, or where `--url` says, and has it make the checks.

use std::time::Duration;

use http::{StatusCode, header};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::check::Line;
use super::sfu::bearer;
use super::ticket::{TicketKey, Use, Wishes};
use super::{RUN_TIMEOUT, SLOW_RUN_TIMEOUT, below, nonce};
use crate::clock::unix_seconds;
use crate::secret::Secret;
use crate::tls::Tls;

/// More than a run takes: what is on the way still comes.
const MARGIN: Duration = Duration::from_secs(2);
/// Longest line of an answer, in bytes.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// Outcome of asking the service.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// The service made the checks.
    Made,
    /// The service is there and has another secret.
    OtherSecret,
    /// The service is there, and another run is not over, or there were too many.
    Later(String),
    /// The service does not answer, or something else does.
    Nobody(String),
}

/// Asks at the first of `bases` that answers; findings go to `lines`.
pub(super) async fn ask(bases: &[Url], secret: &Secret, wishes: &Wishes, tls: &Tls, lines: &mpsc::Sender<Line>) -> Asked {
    let mut nobody = Asked::Nobody("there is no address to ask".to_owned());
    for base in bases {
        match ask_at(base, secret, wishes, tls, lines).await {
            Asked::Nobody(why) => nobody = Asked::Nobody(why),
            asked @ (Asked::Made | Asked::OtherSecret | Asked::Later(_)) => return asked,
        }
    }
    nobody
}

async fn ask_at(base: &Url, secret: &Secret, wishes: &Wishes, tls: &Tls, lines: &mpsc::Sender<Line>) -> Asked {
    let nobody = |why: String| Asked::Nobody(format!("{base}: {why}"));
    let ticket = TicketKey::derive(secret).sign(Use::Run, &nonce(), wishes, unix_seconds());
    let (client, bearer) = match (client(base, tls), bearer(&Secret::new(ticket))) {
        (Ok(client), Some(bearer)) => (client, bearer),
        (Err(why), _) => return nobody(why),
        (Ok(_), None) => return nobody("no ticket can be made".into()),
    };
    let deadline = Instant::now() + MARGIN + if wishes.slow { SLOW_RUN_TIMEOUT } else { RUN_TIMEOUT };
    let request = client.post(below(base, "doctor")).header(bearer.0, bearer.1).send();
    // A proxy may keep the head until the end.
    let head = timeout_at(deadline, request).await;
    let mut answer = match head {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if error.is_connect() => return nobody("no connection can be made".into()),
        Ok(Err(error)) => return nobody(error.without_url().to_string()),
        Err(_) => return nobody("no answer in time".into()),
    };
    let is_ours = answer
        .headers()
        .get("x-served-by")
        .is_some_and(|by| by.as_bytes().starts_with(b"lk-jwt-service"));
    match answer.status() {
        StatusCode::OK if is_ours => {}
        StatusCode::UNAUTHORIZED if is_ours => return Asked::OtherSecret,
        StatusCode::TOO_MANY_REQUESTS if is_ours => {
            let wait = answer
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok())
                .unwrap_or("60");
            return Asked::Later(wait.to_owned());
        }
        status => return nobody(format!("answered with {} by something that does not know doctor", status.as_u16())),
    }
    let mut buffer = Vec::new();
    while let Ok(Ok(Some(chunk))) = timeout_at(deadline, answer.chunk()).await {
        buffer.extend_from_slice(&chunk);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<_> = buffer.drain(..=end).collect();
            let Some(line) = Line::read(&line) else { continue };
            let is_last = matches!(line, Line::End { end: None });
            let _ = lines.send(line).await;
            if is_last {
                return Asked::Made;
            }
        }
        if buffer.len() > MAX_LINE_BYTES {
            break;
        }
    }
    Asked::Nobody(format!("{base}: the answer broke off"))
}

/// A client for one address; on this machine no proxy of the environment stands between.
fn client(base: &Url, tls: &Tls) -> Result<reqwest::Client, String> {
    let builder = tls.client().map_err(|error| error.to_string())?;
    let builder = if base.scheme() == "https" { builder } else { builder.no_proxy() };
    builder.build().map_err(|error| error.without_url().to_string())
}
