//! LiveKit's RoomService: one method here is one call, one answer, one time-out.
//! ([LiveKit, "Server APIs"](https://docs.livekit.io/reference/server/server-apis/))

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, header};
use livekit_api::access_token::VideoGrants;
use livekit_protocol::participant_info::State;
use livekit_protocol::{
    CreateRoomRequest, DeleteRoomRequest, DeleteRoomResponse, ListParticipantsRequest, ListRoomsRequest, ListRoomsResponse,
    RemoveParticipantResponse, Room, RoomParticipantIdentity,
};
use lru::LruCache;
use parking_lot::Mutex;
use prost::Message;
use tokio::time::{Instant, timeout};
use url::Url;

use super::endpoint::Endpoint;
use super::refusal::{self, SfuError};
use crate::cache::bounded;
use crate::metrics::{CallResult, METRICS, NeighbourCall};
use crate::secret::Secret;
use crate::text::error_chain;
use crate::tls;
use crate::token::Minter;

/// Time that an ordinary call may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Life of a token for one API call.
const API_TOKEN_TTL: Duration = Duration::from_secs(60);
/// How long the token for the participants of a room serves for further calls.
const TOKEN_REUSED_FOR: Duration = Duration::from_secs(30);
/// Rooms whose tokens are kept.
const MAX_TOKENS: NonZeroUsize = NonZeroUsize::new(512).unwrap();
/// Largest answer that is read.
const MAX_REPLY_BYTES: usize = 4 * 1024 * 1024;
/// Content type that is sent, and that alone makes an answer a yes.
const PROTOBUF: &str = "application/protobuf";
/// Seconds until a room that everybody left is closed.
const DEPARTURE_TIMEOUT_SECONDS: u32 = 20;

/// Calls of the RoomService.
pub(super) struct Api {
    endpoint: Arc<Endpoint>,
    methods: Methods,
    minter: Arc<Minter>,
    /// Of the rooms that are opened here; 0 is no limit.
    max_participants: u32,
    tokens: Mutex<LruCache<Box<str>, Token>>,
    last_date: Mutex<Option<(Instant, i64)>>,
}

/// Fields that are read of LiveKit's `ParticipantInfo`: the whole of it takes five times the memory, and sweeps read everybody's.
#[derive(Clone, PartialEq, Message)]
pub struct Participant {
    /// Sid of the session.
    #[prost(string, tag = "1")]
    pub sid: String,
    /// Identity of the participant.
    #[prost(string, tag = "2")]
    pub identity: String,
    /// Whether it is joining, there or gone.
    #[prost(enumeration = "State", tag = "3")]
    pub state: i32,
    /// When it joined, in seconds since 1970.
    #[prost(int64, tag = "6")]
    pub joined_at: i64,
    /// When it joined, in milliseconds; 0 where an older server does not say it.
    #[prost(int64, tag = "17")]
    pub joined_at_ms: i64,
}

/// Participants of a room, as a `ListParticipantsResponse` has them.
#[derive(Clone, PartialEq, Message)]
struct Participants {
    #[prost(message, repeated, tag = "1")]
    participants: Vec<Participant>,
}

/// The methods of the RoomService, and the question about a join.
struct Methods {
    create_room: Method,
    list_rooms: Method,
    get_participant: Method,
    list_participants: Method,
    remove_participant: Method,
    delete_room: Method,
    validate: Url,
    base: Url,
}

/// A method of the RoomService: where it is, and as what it is counted.
struct Method {
    url: Url,
    call: NeighbourCall,
}

/// A token for the participants of one room.
struct Token {
    bearer: HeaderValue,
    /// By the clock that its life is counted by.
    minted: SystemTime,
}

impl Api {
    pub(super) fn new(base: &Url, endpoint: Arc<Endpoint>, minter: Arc<Minter>, max_participants: u32) -> Self {
        Self {
            endpoint,
            methods: Methods::below(base),
            minter,
            max_participants,
            tokens: Mutex::new(bounded(MAX_TOKENS)),
            last_date: Mutex::new(None),
        }
    }

    /// When an answer with a `Date` came last, and that date in seconds since 1970.
    pub(super) fn last_date(&self) -> Option<(Instant, i64)> {
        *self.last_date.lock()
    }

    /// The room, new or existing (which keeps the number of participants that it has), and the `Date` of the answer in seconds since 1970.
    pub(super) async fn create_room(&self, room: &str, empty_timeout: u32) -> Result<(Room, Option<u64>), SfuError> {
        let request = CreateRoomRequest {
            name: room.to_owned(),
            empty_timeout,
            departure_timeout: DEPARTURE_TIMEOUT_SECONDS,
            max_participants: self.max_participants,
            ..CreateRoomRequest::default()
        };
        let (created, answered_at) = self
            .call::<Room>(&self.methods.create_room, self.opener()?, &request, CALL_TIMEOUT)
            .await?;
        its_own(created.name == room)?;
        Ok((created, answered_at))
    }

    /// Opens a room for two at most, hidden ones counted, which ends by itself a minute after it was left alone.
    pub(super) async fn open_small_room(&self, room: &str) -> Result<(), SfuError> {
        let request = CreateRoomRequest {
            name: room.to_owned(),
            empty_timeout: 60,
            departure_timeout: DEPARTURE_TIMEOUT_SECONDS,
            max_participants: 2,
            ..CreateRoomRequest::default()
        };
        let (created, _) = self
            .call::<Room>(&self.methods.create_room, self.opener()?, &request, CALL_TIMEOUT)
            .await?;
        its_own(created.name == room)
    }

    /// Ends a room and the sessions of all who are in it.
    pub(super) async fn delete_room(&self, room: &str) -> Result<(), SfuError> {
        let request = DeleteRoomRequest { room: room.to_owned() };
        self.call::<DeleteRoomResponse>(&self.methods.delete_room, self.opener()?, &request, CALL_TIMEOUT)
            .await?;
        Ok(())
    }

    /// Token for opening and ending rooms.
    fn opener(&self) -> Result<HeaderValue, SfuError> {
        self.bearer(VideoGrants {
            room_create: true,
            ..VideoGrants::default()
        })
    }

    /// Token of one who joins a room, is not seen and does nothing in it; perhaps hears what goes on there.
    pub(super) fn visitor(&self, room: &str, can_subscribe: bool) -> Result<Secret, SfuError> {
        let grants = VideoGrants {
            room_join: true,
            room: room.to_owned(),
            can_subscribe: Some(can_subscribe),
            can_publish: Some(false),
            can_publish_data: Some(false),
            can_update_own_metadata: Some(false),
            hidden: true,
            ..VideoGrants::default()
        };
        let token = self.minter.joining_token(grants, API_TOKEN_TTL).map_err(|_| SfuError::Token)?;
        Ok(Secret::new(token))
    }

    /// Asks the base address for what its clock shows, in seconds since 1970.
    pub(super) async fn clock(&self) -> Option<i64> {
        let answer = self.get(&self.methods.base, None).await?;
        date(answer.headers()).and_then(|date| i64::try_from(date).ok())
    }

    /// Lists those of `names` that exist.
    pub(super) async fn list_rooms(&self, names: Vec<String>) -> Result<Vec<Room>, SfuError> {
        let bearer = self.bearer(VideoGrants {
            room_list: true,
            ..VideoGrants::default()
        })?;
        let request = ListRoomsRequest { names };
        let (list, _) = self
            .call::<ListRoomsResponse>(&self.methods.list_rooms, bearer, &request, CALL_TIMEOUT)
            .await?;
        Ok(list.rooms)
    }

    /// Asks about a participant; [`SfuError::NotFound`] where there is no such room or participant.
    pub(super) async fn get_participant(&self, room: &str, identity: &str, within: Duration) -> Result<Participant, SfuError> {
        let request = RoomParticipantIdentity {
            room: room.to_owned(),
            identity: identity.to_owned(),
            ..RoomParticipantIdentity::default()
        };
        let (participant, _) = self
            .call::<Participant>(&self.methods.get_participant, self.admin(room)?, &request, within)
            .await?;
        its_own(participant.identity == identity)?;
        Ok(participant)
    }

    /// Ends a participant's session; [`SfuError::NotFound`] where there is no such room or participant. LiveKit Cloud then refuses
    /// the tokens of before; livekit-server does not look at that field (1.13.5).
    pub(super) async fn remove_participant(&self, room: &str, identity: &str) -> Result<(), SfuError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = RoomParticipantIdentity {
            room: room.to_owned(),
            identity: identity.to_owned(),
            revoke_token_ts: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        };
        self.call::<RemoveParticipantResponse>(&self.methods.remove_participant, self.admin(room)?, &request, CALL_TIMEOUT)
            .await?;
        Ok(())
    }

    /// All participants; none where the room does not exist.
    pub(super) async fn list_participants(&self, room: &str, within: Duration) -> Result<Vec<Participant>, SfuError> {
        let request = ListParticipantsRequest { room: room.to_owned() };
        let (list, _) = self
            .call::<Participants>(&self.methods.list_participants, self.admin(room)?, &request, within)
            .await?;
        Ok(list.participants)
    }

    pub(super) fn forget_tokens(&self) {
        self.tokens.lock().clear();
    }

    /// Whether joining a room that does not exist would open it: the SFU is asked whether it would let somebody in, and nobody
    /// goes. `None` where it does not say.
    pub(super) async fn opens_rooms_by_joining(&self) -> Option<bool> {
        let grants = VideoGrants {
            room_join: true,
            room: format!("lk-jwt-service-check-{:016x}", rand::random::<u64>()),
            ..VideoGrants::default()
        };
        let token = self.minter.joining_token(grants, API_TOKEN_TTL).ok()?;
        let mut answer = self.get(&self.methods.validate, Some(bearer(&token)?)).await?;
        match answer.status().as_u16() {
            200 => {
                // LiveKit's word, and not a page of something in its place.
                // What comes first is enough, and a page may be without end.
                let body = answer.chunk().await.ok()??;
                (body.trim_ascii() == b"success").then_some(true)
            }
            404 => Some(false),
            _ => None,
        }
    }

    async fn get(&self, url: &Url, bearer: Option<HeaderValue>) -> Option<reqwest::Response> {
        let mut asked = self.endpoint.client().ok()?.get(url.clone()).timeout(CALL_TIMEOUT);
        if let Some(bearer) = bearer {
            asked = asked.header(header::AUTHORIZATION, bearer);
        }
        asked.send().await.ok()
    }

    async fn call<T: Message + Default>(
        &self,
        method: &Method,
        bearer: HeaderValue,
        request: &impl Message,
        within: Duration,
    ) -> Result<(T, Option<u64>), SfuError> {
        let mut message = T::default();
        let mut decode = |reply: &[u8]| message.merge(reply).is_ok();
        let date = self.send(method, bearer, request.encode_to_vec(), within, &mut decode).await?;
        Ok((message, date))
    }

    /// A call, whatever it is about: this is large, and stands once in the program.
    async fn send(
        &self,
        method: &Method,
        bearer: HeaderValue,
        request: Vec<u8>,
        within: Duration,
        decode: Decode<'_>,
    ) -> Result<Option<u64>, SfuError> {
        let began = Instant::now();
        let request = self
            .endpoint
            .client()?
            .post(method.url.clone())
            .header(header::AUTHORIZATION, bearer)
            .header(header::CONTENT_TYPE, PROTOBUF)
            .body(request);
        // The client's own time-out would cost four allocations for each call.
        let answer = timeout(within, read(request, decode)).await.unwrap_or(Err(SfuError::Timeout));
        METRICS.called(method.call, result(&answer), began.elapsed());
        if answer
            .as_ref()
            .is_err_and(|error| error.connection_failed() || error.is_elsewhere())
        {
            self.endpoint.look_again();
        }
        if let Ok(Some(date)) = &answer {
            let date = i64::try_from(*date).unwrap_or(0);
            *self.last_date.lock() = Some((Instant::now(), date));
        }
        answer
    }

    fn bearer(&self, grants: VideoGrants) -> Result<HeaderValue, SfuError> {
        let token = self.minter.api_token(grants, API_TOKEN_TTL).map_err(|_| SfuError::Token)?;
        bearer(&token).ok_or(SfuError::Token)
    }

    /// The token for the participants of a room. Many jobs ask about the same one.
    fn admin(&self, room: &str) -> Result<HeaderValue, SfuError> {
        let now = SystemTime::now();
        let tokens = || self.tokens.lock();
        if let Some(token) = tokens().get(room)
            && now.duration_since(token.minted).is_ok_and(|age| age < TOKEN_REUSED_FOR)
        {
            return Ok(token.bearer.clone());
        }
        let bearer = self.bearer(VideoGrants {
            room_admin: true,
            room: room.to_owned(),
            ..VideoGrants::default()
        })?;
        let token = Token {
            bearer: bearer.clone(),
            minted: now,
        };
        tokens().put(room.into(), token);
        Ok(bearer)
    }
}

impl Methods {
    fn below(base: &Url) -> Self {
        let prefix = base.path().trim_end_matches('/');
        let below = |path: &str| {
            let mut url = base.clone();
            url.set_path(&format!("{prefix}/{path}"));
            url
        };
        let method = |name: &str, call| Method {
            url: below(&format!("twirp/livekit.RoomService/{name}")),
            call,
        };
        Self {
            create_room: method("CreateRoom", NeighbourCall::CreateRoom),
            list_rooms: method("ListRooms", NeighbourCall::ListRooms),
            get_participant: method("GetParticipant", NeighbourCall::GetParticipant),
            list_participants: method("ListParticipants", NeighbourCall::ListParticipants),
            remove_participant: method("RemoveParticipant", NeighbourCall::RemoveParticipant),
            delete_room: method("DeleteRoom", NeighbourCall::DeleteRoom),
            validate: below("rtc/validate"),
            base: base.clone(),
        }
    }
}

/// Takes the message out of an answer; false where there is none in it.
type Decode<'a> = &'a mut (dyn FnMut(&[u8]) -> bool + Send);

/// Sends a request and reads the answer to it.
async fn read(request: reqwest::RequestBuilder, decode: Decode<'_>) -> Result<Option<u64>, SfuError> {
    let mut response = request.send().await.map_err(failure)?;
    let mut reply = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failure)? {
        if reply.len() + chunk.len() > MAX_REPLY_BYTES {
            return Err(SfuError::TooLarge);
        }
        reply.extend_from_slice(&chunk);
    }
    let (status, headers) = (response.status(), response.headers());
    // An empty page is a valid message that says "nobody".
    if status != http::StatusCode::OK || !is_protobuf(headers) {
        return Err(refusal::read(status, &reply));
    }
    if !decode(&reply) {
        return Err(SfuError::NotLiveKit(status.as_u16()));
    }
    Ok(date(headers))
}

fn result<T>(answer: &Result<T, SfuError>) -> CallResult {
    match answer {
        Ok(_) => CallResult::Ok,
        Err(error) if error.is_refusal() || matches!(error, SfuError::NotFound) => CallResult::Refused,
        Err(_) => CallResult::Failed,
    }
}

fn bearer(token: &str) -> Option<HeaderValue> {
    let mut bearer = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
    bearer.set_sensitive(true);
    Some(bearer)
}

/// A yes counts only where it is about what was asked.
fn its_own(is_about_it: bool) -> Result<(), SfuError> {
    if is_about_it { Ok(()) } else { Err(SfuError::NotLiveKit(200)) }
}

fn is_protobuf(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default();
    kind.trim().eq_ignore_ascii_case(PROTOBUF)
}

/// Seconds since 1970 that the answer's `Date` names.
fn date(headers: &HeaderMap) -> Option<u64> {
    let date = httpdate::parse_http_date(headers.get(header::DATE)?.to_str().ok()?).ok()?;
    Some(date.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

fn failure(error: reqwest::Error) -> SfuError {
    let error = error.without_url();
    if error.is_timeout() {
        SfuError::Timeout
    } else if error.is_connect() {
        SfuError::Connect(tls::with_date(error_chain(&error)))
    } else {
        SfuError::Broken(error_chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use livekit_protocol::{ListParticipantsResponse, ParticipantInfo, TrackInfo};

    use super::*;

    #[test]
    fn what_is_read_of_a_participant_stands_where_livekit_puts_it() {
        let whole = ParticipantInfo {
            sid: "PA_1".into(),
            identity: "@a:x:D".into(),
            state: State::Active.into(),
            joined_at: 7,
            joined_at_ms: 7_001,
            name: "Alice".into(),
            tracks: vec![TrackInfo::default()],
            attributes: [("a".into(), "b".into())].into(),
            ..ParticipantInfo::default()
        };
        let list = ListParticipantsResponse {
            participants: vec![whole.clone(), ParticipantInfo::default()],
        };
        let read = Participants::decode(list.encode_to_vec().as_slice()).unwrap().participants;
        let expected = Participant {
            sid: whole.sid,
            identity: whole.identity,
            state: whole.state,
            joined_at: whole.joined_at,
            joined_at_ms: whole.joined_at_ms,
        };
        assert_eq!(read, [expected, Participant::default()]);
    }
}
