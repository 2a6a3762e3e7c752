//! Application-service mode: whose application service this is, what it may ask, and whether clients' requests arrive here.

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::arrivals::ROOM;
use super::check::Sink;
use super::fault::{self, Fault};
use super::{Context, Run, answered, nonce, texts};
use crate::homeserver::{OwnError, OwnHomeserver, Subject};
use crate::server_name::ServerName;
use crate::wire::errcode;

const ALL: [&str; 3] = ["whoami", "membership", "forwarding"];

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>) {
    let Some(own) = &run.context.own else {
        return sink.skip(&ALL[..1], "LIVEKIT_HS_SERVER_NAME is not set: standalone routes only");
    };
    let name = own.name();
    let sink = sink.about(name.as_str());
    match whoami(own, run.soon()).await {
        Ok(user_id) => match user_id.split_once(':') {
            Some((_, its_name)) if its_name == name.as_str() => {
                sink.ok("whoami", &format_args!("it knows the as_token, as that of {user_id}"));
            }
            Some(_) | None => {
                let saw = format_args!("it takes us for {user_id}");
                return sink.fail_before(&ALL[1..], "whoami", &fault::AS_SERVER_NAME, &saw);
            }
        },
        Err(error) => return sink.fail_before(&ALL[1..], "whoami", fault_of(&error), &error),
    }
    // Both ask about rooms that do not exist.
    let room = format!("!{ROOM}{}:{name}", nonce());
    let now = Instant::now();
    match Box::pin(own.is_joined(&room, Subject::Server(name), now, run.soon())).await {
        Ok(_) => sink.ok("membership", &"it says who is in a room (MSC4502)"),
        Err(error) => {
            let fault = match error {
                OwnError::Forbidden(_) => &fault::AS_SCOPE,
                OwnError::NoEndpoint(_) => &fault::AS_MEMBERSHIP,
                OwnError::NoApi(_)
                | OwnError::Unreachable(_)
                | OwnError::Timeout
                | OwnError::Token
                | OwnError::Relay(_)
                | OwnError::RelayBusy { .. }
                | OwnError::Status(_)
                | OwnError::Busy { .. }
                | OwnError::Unreadable
                | OwnError::NoId => fault_of(&error),
            };
            sink.fail("membership", fault, &error);
        }
    }
    check_forwarding(run, own, &room, &sink).await;
}

/// The name that is taken for our homeserver's, where that homeserver says that it has another.
pub(super) async fn misnamed(context: &Context, deadline: Instant) -> Option<&ServerName> {
    let own = context.own.as_ref()?;
    let user_id = whoami(own, deadline).await.ok()?;
    let (_, its_name) = user_id.split_once(':')?;
    (its_name != own.name().as_str()).then(|| own.name())
}

async fn whoami(own: &OwnHomeserver, deadline: Instant) -> Result<String, OwnError> {
    let asked = timeout_at(deadline, Box::pin(own.whoami()));
    asked.await.unwrap_or(Err(OwnError::Timeout))
}

/// Asks for a token as a client does; what the homeserver forwards has to arrive here.
async fn check_forwarding(run: &Run<'_>, own: &OwnHomeserver, room: &str, sink: &Sink<'_>) {
    let Some(arrivals) = &run.context.arrivals else {
        return sink.skip(&["forwarding"], "requests go to the running service, which makes no checks now");
    };
    let url = run.context.settings.livekit_url.as_str();
    let body = texts(&[("url", url), ("room_id", room), ("slot_id", "m.call#ROOM"), ("member_id", "doctor")]);
    let asked = own.ask_for_token(Bytes::from(body.to_string()));
    let reply = match timeout_at(run.soon(), Box::pin(asked)).await.unwrap_or(Err(OwnError::Timeout)) {
        Ok(reply) => reply,
        Err(error) => return sink.fail("forwarding", fault_of(&error), &error),
    };
    if arrivals.is_forwarded(room, Instant::now()).await {
        let saw = "a client's request for a token arrives here through the homeserver (MSC4512)";
        return sink.ok("forwarding", &saw);
    }
    let (code, errcode) = (reply.status.as_u16(), errcode(&reply.body));
    let saw = format!(
        "the request for a token did not arrive here, and is answered with {}",
        answered(&reply)
    );
    let fault = match (code, errcode.as_deref()) {
        (404, Some("M_UNRECOGNIZED") | None) => &fault::AS_PROXY_OFF,
        (429, _) => {
            let because = "the homeserver limits how often it is asked (rc_message)";
            return sink.skip(&["forwarding"], because);
        }
        _ => &fault::AS_PROXY_ELSEWHERE,
    };
    sink.fail("forwarding", fault, &saw);
}

const fn fault_of(error: &OwnError) -> &'static Fault {
    match error {
        OwnError::Token => &fault::AS_TOKEN,
        OwnError::NoApi(_)
        | OwnError::Unreachable(_)
        | OwnError::Timeout
        | OwnError::NoEndpoint(_)
        | OwnError::Forbidden(_)
        | OwnError::Relay(_)
        | OwnError::RelayBusy { .. }
        | OwnError::Status(_)
        | OwnError::Busy { .. }
        | OwnError::Unreadable
        | OwnError::NoId => &fault::AS_UNREACHABLE,
    }
}
