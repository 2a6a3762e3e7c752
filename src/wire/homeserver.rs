//! The bodies that come through a homeserver, and the one that goes to another homeserver's service. Pure.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    BadRequest, MAX_ID_BYTES, MAX_MEMBER_ID_BYTES, MAX_URL_BYTES, ParticipantRequest, is_delay_id, nested, object, optional, required,
};

/// A participant that is asked for through a homeserver, in the words of any generation of the proposal: `member_id`, or
/// `member` with or without the device in it. Where both are there, `member_id` counts.
#[derive(Debug, PartialEq, Eq)]
pub struct HomeserverParticipant {
    /// The participant on the SFU.
    pub participant: ParticipantRequest,
    /// `member` of the older generation.
    pub member: Option<LegacyMember>,
}

/// `member` as older generations of the proposal have it.
#[derive(Debug, PartialEq, Eq)]
pub struct LegacyMember {
    /// Random id of the session.
    pub id: String,
    /// Device that the client says it is. Without it, the identity has two elements, as that of a `member_id`.
    pub claimed_device_id: Option<String>,
    /// User that the client claims to be.
    pub claimed_user_id: Option<String>,
}

impl HomeserverParticipant {
    fn read(body: &Map<String, Value>) -> Result<Self, BadRequest> {
        let room_id = required(body, "room_id", MAX_ID_BYTES, BadRequest::RoomOrSlot)?;
        let slot_id = required(body, "slot_id", MAX_ID_BYTES, BadRequest::RoomOrSlot)?;
        let member_id = optional(body, "member_id", MAX_MEMBER_ID_BYTES)?;
        let member = LegacyMember::read(body)?;
        let (member_id, device) = match (member_id, &member) {
            (Some(member_id), _) => (member_id, None),
            (None, Some(member)) => (member.id.clone(), member.claimed_device_id.clone()),
            (None, None) => return Err(BadRequest::MemberId),
        };
        let participant = match device {
            None => ParticipantRequest::Homeserver {
                room_id,
                slot_id,
                member_id,
            },
            Some(claimed_device_id) => ParticipantRequest::Member {
                room_id,
                slot_id,
                claimed_device_id,
                member_id,
            },
        };
        Ok(Self { participant, member })
    }
}

impl LegacyMember {
    fn read(body: &Map<String, Value>) -> Result<Option<Self>, BadRequest> {
        if body.get("member").is_none_or(Value::is_null) {
            return Ok(None);
        }
        let member = nested(body, "member", BadRequest::MemberId)?;
        Ok(Some(Self {
            id: required(member, "id", MAX_MEMBER_ID_BYTES, BadRequest::MemberId)?,
            claimed_device_id: match optional(member, "claimed_device_id", MAX_ID_BYTES)? {
                None => optional(member, "device_id", MAX_ID_BYTES)?,
                claimed => claimed,
            },
            claimed_user_id: optional(member, "claimed_user_id", MAX_ID_BYTES)?,
        }))
    }
}

/// A token request of one of our homeserver's users.
#[derive(Debug)]
pub struct ClientTokenRequest {
    /// The SFU that the client means.
    pub url: String,
    /// ParticipantKey that is asked for.
    pub wanted: HomeserverParticipant,
    /// Homeserver whose SFU the participant is on, where it is said.
    pub server_name: Option<String>,
}

impl ClientTokenRequest {
    /// Parses the body.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn parse(body: &[u8]) -> Result<Self, BadRequest> {
        let body = object(body)?;
        Ok(Self {
            url: required(&body, "url", MAX_URL_BYTES, BadRequest::Url)?,
            wanted: HomeserverParticipant::read(&body)?,
            // The grammar of server names has a bound, and an answer of its own; so have users' and delayed events' ids below.
            server_name: optional(&body, "server_name", usize::MAX)?,
        })
    }
}

/// A token request of another homeserver, for one of its users.
#[derive(Debug)]
pub struct FederationTokenRequest {
    /// The user, as that homeserver says.
    pub unverified_user_id: String,
    /// The SFU that the client means.
    pub url: String,
    /// ParticipantKey that is asked for.
    pub wanted: HomeserverParticipant,
}

impl FederationTokenRequest {
    /// Parses the body.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn parse(body: &[u8]) -> Result<Self, BadRequest> {
        let body = object(body)?;
        Ok(Self {
            unverified_user_id: required(&body, "user_id", usize::MAX, BadRequest::UserId)?,
            url: required(&body, "url", MAX_URL_BYTES, BadRequest::Url)?,
            wanted: HomeserverParticipant::read(&body)?,
        })
    }
}

/// A delegation of one of our homeserver's users; how long the delay is, the homeserver says.
#[derive(Debug)]
pub struct ClientDelegationRequest {
    /// The SFU that the client means, where it says it: it can only be ours (decision A3).
    pub url: Option<String>,
    /// The participant that is watched.
    pub wanted: HomeserverParticipant,
    /// Id of the delayed event.
    pub delay_id: String,
}

impl ClientDelegationRequest {
    /// Parses the body.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn parse(body: &[u8]) -> Result<Self, BadRequest> {
        let body = object(body)?;
        let url = optional(&body, "url", MAX_URL_BYTES)?;
        let wanted = HomeserverParticipant::read(&body)?;
        let delay_id = required(&body, "delay_id", usize::MAX, BadRequest::NoDelayId)?;
        if !is_delay_id(&delay_id) {
            return Err(BadRequest::DelayId);
        }
        Ok(Self { url, wanted, delay_id })
    }
}

/// The body of a token request to another homeserver's service.
#[derive(Debug, Serialize)]
pub struct RelayedTokenRequest<'a> {
    /// User of our homeserver.
    pub user_id: &'a str,
    /// The SFU that the client means.
    pub url: &'a str,
    /// Id of the Matrix room.
    pub room_id: &'a str,
    /// Slot in the Matrix room.
    pub slot_id: &'a str,
    /// Random id of the session, as the newer generation has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub member_id: Option<&'a str>,
    /// Member id in the form of the older generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub member: Option<RelayedMember<'a>>,
}

/// The field `member` of a request to another homeserver.
#[derive(Debug, Serialize)]
pub struct RelayedMember<'a> {
    /// Random id of the session.
    pub id: &'a str,
    /// Device of the member, as the client says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claimed_device_id: Option<&'a str>,
    /// User of our homeserver.
    pub claimed_user_id: &'a str,
}
