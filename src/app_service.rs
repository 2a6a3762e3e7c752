//! Application-service mode: what our homeserver's own MatrixRTC endpoints do, and those of its peers
//! ([MSC4195](https://github.com/matrix-org/matrix-spec-proposals/pull/4195)).
//!
//! Who is asking was settled by the homeserver. What is left: whose SFU is meant, who is in the Matrix room, and, for the
//! SFU of another homeserver, the way there through its homeserver (MSC4512). The rest is `exchange.rs`.
//!
//! A request of a client ends within 25 seconds (decision A5), before the homeserver gives it up after 30: questions to it
//! end 15 s after the request came, a relayed request 8 s later, and the SFU has its 5 s after either.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout_at;
use url::Url;

use crate::access::Access;
use crate::exchange::{Admitted, Exchange, RemoteTokenError, TokenError, must_be_joined};
use crate::homeserver::{OwnHomeserver, Relayed, Subject};
use crate::members::Members;
use crate::openid::VerifiedUser;
use crate::request_line::note;
use crate::retry::{ANSWER_TIMEOUT, Deadline};
use crate::server_name::ServerName;
use crate::wire::{
    ClientDelegationRequest, ClientTokenRequest, DelayedEvent, FederationTokenRequest, HomeserverParticipant, LegacyMember,
    ParticipantRequest, RelayedMember, RelayedTokenRequest,
};

/// Where another homeserver's service is asked: the path that every generation of it knows.
const FEDERATION_PATH: &str = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token";
/// Path that the proposal ends up with for the same endpoint.
const STABLE_FEDERATION_PATH: &str = "/_matrix/federation/v1/rtc/livekit/get_token";
/// When an answer has to be there, come what may.
const TIMEOUT: Duration = Duration::from_secs(24);
/// When the question about a delayed event has to be over, as those about memberships.
const QUESTIONS_TIMEOUT: Duration = Duration::from_secs(15);
/// When a relayed request has to be over.
const RELAY_TIMEOUT: Duration = Duration::from_secs(23);
const _: () = assert!(
    QUESTIONS_TIMEOUT.as_millis() < RELAY_TIMEOUT.as_millis()
        && RELAY_TIMEOUT.as_millis() < TIMEOUT.as_millis()
        && TIMEOUT.as_millis() < ANSWER_TIMEOUT.as_millis(),
    "each step leaves time for the next one, and the answer is there before a proxy in front gives up"
);

/// The endpoints behind a homeserver.
pub struct AppService {
    /// The pipeline that requests join once the user is known.
    pub exchange: Arc<Exchange>,
    /// Our own homeserver, asked with the `as_token`.
    pub own: Arc<OwnHomeserver>,
    /// Memberships of Matrix rooms.
    pub members: Arc<Members>,
    /// Address of the SFU for clients, `LIVEKIT_URL`.
    pub url: String,
}

impl AppService {
    /// A token for one of our users, whom our homeserver has authenticated: of our SFU, or of another homeserver's.
    ///
    /// # Errors
    /// With the first check that refused.
    pub async fn client_token(&self, user_id: &str, request: &ClientTokenRequest, deadline: Deadline) -> Result<String, TokenError> {
        in_time(deadline, self.token_for_ours(user_id, request, deadline)).await
    }

    /// The other homeserver whose token is wanted; none where it is one of ours.
    #[must_use]
    pub fn destination<'a>(&self, request: &'a ClientTokenRequest) -> Option<&'a str> {
        request.server_name.as_deref().filter(|name| *name != self.own.name().as_str())
    }

    async fn token_for_ours(&self, user_id: &str, request: &ClientTokenRequest, deadline: Deadline) -> Result<String, TokenError> {
        let wanted = &request.wanted;
        note(|line| line.matrix_room = Some(wanted.participant.room_id().into()));
        let other = self.destination(request);
        if other.is_none() {
            self.must_be_ours(&request.url)?;
        }
        let user = self.own_user(user_id, wanted)?;
        let other = other.map(ServerName::parse).transpose().map_err(|_| TokenError::BadDestination)?;
        note(|line| line.server = other.as_ref().map(|other| other.as_str().into()));
        if let Some(other) = &other {
            self.exchange.must_be_admitted(other)?;
        }
        self.exchange.limit_rate(&user, false, deadline).await?;
        self.must_be_reachable(deadline).await?;
        self.must_be_joined(wanted.participant.room_id(), Subject::User(&user.id), deadline)
            .await?;
        match other {
            None => {
                let admitted = Admitted {
                    user: &user,
                    access: Access::of_member(true),
                    is_member: true,
                };
                self.exchange.issue(&admitted, &wanted.participant, None, deadline).await
            }
            Some(other) => {
                self.must_be_joined(wanted.participant.room_id(), Subject::Server(&other), deadline)
                    .await?;
                self.relay(&user, &other, request, deadline).await
            }
        }
    }

    /// A token for a user of the homeserver `origin`, which our homeserver has authenticated.
    ///
    /// # Errors
    /// With the first check that refused.
    pub async fn federation_token(&self, origin: &str, request: &FederationTokenRequest, deadline: Deadline) -> Result<String, TokenError> {
        in_time(deadline, self.token_for_theirs(origin, request, deadline)).await
    }

    async fn token_for_theirs(&self, origin: &str, request: &FederationTokenRequest, deadline: Deadline) -> Result<String, TokenError> {
        let wanted = &request.wanted;
        let user = VerifiedUser::vouched_for(request.unverified_user_id.clone()).ok_or(TokenError::BadUserId)?;
        if user.server.as_str() != origin {
            return Err(TokenError::ForeignUser);
        }
        must_be_claimed(wanted, &user)?;
        let room_id = wanted.participant.room_id();
        note(|line| {
            line.matrix_room = Some(room_id.into());
            (line.user, line.server) = (Some(user.id.as_str().into()), Some(origin.into()));
        });
        self.exchange.must_be_admitted(&user.server)?;
        self.exchange.limit_rate(&user, false, deadline).await?;
        self.must_be_reachable(deadline).await?;
        self.must_be_joined(room_id, Subject::Server(self.own.name()), deadline).await?;
        self.must_be_joined(room_id, Subject::User(&user.id), deadline).await?;
        self.must_be_ours(&request.url)?;
        let admitted = Admitted {
            user: &user,
            access: Access::of_member(self.exchange.policy.of(&user.server).publishes),
            is_member: true,
        };
        self.exchange.issue(&admitted, &wanted.participant, None, deadline).await
    }

    /// Takes over a delayed leave event of one of our users. How long its delay is, and that it is theirs, our homeserver
    /// says.
    ///
    /// # Errors
    /// With the first check that refused.
    pub async fn delegate(&self, user_id: &str, request: ClientDelegationRequest, deadline: Deadline) -> Result<(), TokenError> {
        in_time(deadline, self.take_over(user_id, request, deadline)).await
    }

    async fn take_over(&self, user_id: &str, request: ClientDelegationRequest, deadline: Deadline) -> Result<(), TokenError> {
        let ClientDelegationRequest { url, wanted, delay_id } = request;
        note(|line| line.matrix_room = Some(wanted.participant.room_id().into()));
        if let Some(url) = url {
            self.must_be_ours(&url)?;
        }
        let user = self.own_user(user_id, &wanted)?;
        self.exchange.limit_rate(&user, true, deadline).await?;
        self.must_be_reachable(deadline).await?;
        let ends = deadline.received + QUESTIONS_TIMEOUT;
        let found = self.own.delayed_event(&delay_id, &user.id, deadline.retry_until, ends).await;
        let room_id = wanted.participant.room_id();
        let event = found
            .map_err(TokenError::Event)?
            .filter(|event| event.room_id == room_id)
            .ok_or(TokenError::NoSuchEvent)?;
        self.must_be_joined(room_id, Subject::User(&user.id), deadline).await?;
        let event = DelayedEvent {
            id: delay_id,
            delay: event.delay,
        };
        self.exchange.take_over(&user, &wanted.participant, &event, deadline).await
    }

    /// The homeserver speaks for its own users only: for one of another server it, or `LIVEKIT_HS_SERVER_NAME`, is not what
    /// it should be.
    fn own_user(&self, user_id: &str, wanted: &HomeserverParticipant) -> Result<VerifiedUser, TokenError> {
        let user = VerifiedUser::vouched_for(user_id.to_owned()).ok_or(TokenError::BadUserId)?;
        if user.server != *self.own.name() {
            return Err(TokenError::NotOurUser(user.server));
        }
        must_be_claimed(wanted, &user)?;
        note(|line| line.user = Some(user.id.as_str().into()));
        Ok(user)
    }

    fn must_be_ours(&self, url: &str) -> Result<(), TokenError> {
        if is_same_sfu(url, &self.url) {
            Ok(())
        } else {
            Err(TokenError::OtherSfu)
        }
    }

    async fn must_be_reachable(&self, deadline: Deadline) -> Result<(), TokenError> {
        self.own.resolve(deadline.retry_until).await.map_err(TokenError::OwnClientApi)
    }

    async fn must_be_joined(&self, room_id: &str, subject: Subject<'_>, deadline: Deadline) -> Result<(), TokenError> {
        must_be_joined(&self.members, room_id, subject, deadline).await
    }

    /// Asks the other homeserver's service, in the words of the newer generation; where it does not understand them and the
    /// client spoke those of the older one, once more in these.
    async fn relay(
        &self,
        user: &VerifiedUser,
        other: &ServerName,
        request: &ClientTokenRequest,
        deadline: Deadline,
    ) -> Result<String, TokenError> {
        let mut path = FEDERATION_PATH;
        let mut relayed = self.ask(user, other, path, request, None, deadline).await?;
        if relayed.status == 404 && errcode(&relayed) == Some("M_UNRECOGNIZED") {
            path = STABLE_FEDERATION_PATH;
            relayed = self.ask(user, other, path, request, None, deadline).await?;
        }
        if let Some(member) = &request.wanted.member
            && relayed.status == 400
            && matches!(errcode(&relayed), Some("M_NOT_JSON" | "M_BAD_JSON"))
        {
            relayed = self.ask(user, other, path, request, Some(member), deadline).await?;
        }
        match (relayed.status, errcode(&relayed), relayed.content.get("jwt")) {
            (200..=299, _, Some(Value::String(jwt))) if !jwt.is_empty() => Ok(jwt.clone()),
            (403, Some("M_FORBIDDEN"), _) => Err(TokenError::Remote(RemoteTokenError::Forbidden)),
            (400, Some("M_INVALID_PARAM"), _) => Err(TokenError::Remote(RemoteTokenError::InvalidParam)),
            (status, _, _) => Err(TokenError::Remote(RemoteTokenError::Unusable(status))),
        }
    }

    async fn ask(
        &self,
        user: &VerifiedUser,
        other: &ServerName,
        path: &str,
        request: &ClientTokenRequest,
        in_old_words: Option<&LegacyMember>,
        deadline: Deadline,
    ) -> Result<Relayed, TokenError> {
        let (room_id, slot_id, member_id) = match &request.wanted.participant {
            ParticipantRequest::Homeserver {
                room_id,
                slot_id,
                member_id,
            }
            | ParticipantRequest::Member {
                room_id,
                slot_id,
                member_id,
                ..
            } => (room_id, slot_id, member_id),
            // No body that comes through a homeserver is parsed into it.
            ParticipantRequest::Legacy { .. } => return Err(TokenError::BadDestination),
        };
        let relayed = RelayedTokenRequest {
            user_id: &user.id,
            url: &request.url,
            room_id,
            slot_id,
            member_id: Some(member_id.as_str()).filter(|_| in_old_words.is_none()),
            member: in_old_words.map(|member| RelayedMember {
                id: &member.id,
                claimed_device_id: member.claimed_device_id.as_deref(),
                claimed_user_id: &user.id,
            }),
        };
        // Texts always serialise.
        let body = serde_json::to_value(&relayed).unwrap_or_default();
        self.own
            .relay(other, path, &body, deadline.retry_until, deadline.received + RELAY_TIMEOUT)
            .await
            .map_err(TokenError::Relay)
    }
}

/// Each step has its time; together, with what others began, they have no more than this.
async fn in_time<T>(deadline: Deadline, work: impl Future<Output = Result<T, TokenError>>) -> Result<T, TokenError> {
    timeout_at(deadline.received + TIMEOUT, work)
        .await
        .unwrap_or(Err(TokenError::OutOfTime))
}

/// `member` may name the user, but not another one.
fn must_be_claimed(wanted: &HomeserverParticipant, user: &VerifiedUser) -> Result<(), TokenError> {
    let claimed = wanted.member.as_ref().and_then(|member| member.claimed_user_id.as_deref());
    if claimed.is_some_and(|claimed| claimed != user.id) {
        return Err(TokenError::ClaimedUser);
    }
    Ok(())
}

fn errcode(relayed: &Relayed) -> Option<&str> {
    relayed.content.get("errcode")?.as_str()
}

/// The one spelling of an SFU's address (decision A3): the case of scheme and host, the scheme's own port and a slash at the end make no
/// difference; `wss` is `https`, `ws` is `http`.
#[must_use]
pub fn normal(url: &str) -> Option<Url> {
    let mut url: Url = url.parse().ok()?;
    let scheme = match url.scheme() {
        "wss" => "https",
        "ws" => "http",
        other => other,
    };
    let scheme = scheme.to_owned();
    url.set_scheme(&scheme).ok()?;
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Some(url)
}

fn is_same_sfu(url: &str, ours: &str) -> bool {
    url == ours || normal(url).zip(normal(ours)).is_some_and(|(url, ours)| url == ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sfu_may_be_spelled_in_several_ways() {
        const OURS: &str = "wss://sfu.example.com/livekit/sfu";
        for same in [
            OURS,
            "wss://sfu.example.com/livekit/sfu/",
            "WSS://SFU.example.COM/livekit/sfu",
            "wss://sfu.example.com:443/livekit/sfu//",
            "https://sfu.example.com/livekit/sfu",
            "https://sfu.example.com:443/livekit/sfu/",
        ] {
            assert!(is_same_sfu(same, OURS) && is_same_sfu(OURS, same), "{same}");
        }
        for other in [
            "ws://sfu.example.com/livekit/sfu",
            "http://sfu.example.com/livekit/sfu",
            "wss://sfu.example.com:80/livekit/sfu",
            "wss://sfu.example.com:444/livekit/sfu",
            "wss://sfu.example.com/livekit",
            "wss://sfu.example.com/Livekit/sfu",
            "wss://sfu.example.com/livekit/sfu?x",
            "wss://sfu.example.com/livekit/sfu#x",
            "wss://user@sfu.example.com/livekit/sfu",
            "wss://sfu.example.com.evil.example/livekit/sfu",
            "",
            "sfu.example.com",
        ] {
            assert!(!is_same_sfu(other, OURS), "{other}");
        }
        assert!(is_same_sfu("ws://LOCALHOST:80", "ws://localhost/"));
        assert!(is_same_sfu("wss://sfu.example.com", "wss://sfu.example.com/"));
        assert!(is_same_sfu("http://sfu.example.com", "ws://sfu.example.com:80/"));
    }
}
