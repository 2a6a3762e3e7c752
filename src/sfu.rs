//! Step 3, LiveKit: opens rooms.
//!
//! LiveKit's RoomService over our own pooled client: `livekit-api`'s `RoomClient` drops the path prefix of `LIVEKIT_URL`
//! and takes no client. `room_memory.rs` says when a room need not be asked for, `refusal.rs` what a refusal means.

mod refusal;
mod room_memory;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant as StdInstant, UNIX_EPOCH};

use http::{HeaderMap, header};
use livekit_api::access_token::VideoGrants;
use livekit_protocol::{CreateRoomRequest, ListRoomsRequest, ListRoomsResponse, Room};
use prost::Message;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};
use url::Url;

pub use refusal::SfuError;

use crate::dns::Dns;
use crate::hold::pause;
use crate::tls::Tls;
use crate::token::Minter;
use room_memory::{RoomMemory, stands_for};

const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Life of a token for one API call.
const API_TOKEN_TTL: Duration = Duration::from_secs(60);
/// Largest answer that is read.
const MAX_REPLY: usize = 1024 * 1024;
/// Seconds until a room that nobody enters is closed.
const EMPTY_TIMEOUT: u32 = 300;
/// Seconds until a room that everybody left is closed.
const DEPARTURE_TIMEOUT: u32 = 20;

type Creation = Arc<OnceCell<Result<(), SfuError>>>;

/// The SFU.
pub struct Sfu {
    client: OnceLock<reqwest::Client>,
    tls: Arc<Tls>,
    dns: Arc<Dns>,
    room_service: String,
    minter: Arc<Minter>,
    rooms: Mutex<RoomMemory>,
    creations: Mutex<HashMap<Box<str>, Creation>>,
}

impl Sfu {
    /// `base` is the address of the API, path prefix included.
    #[must_use]
    pub fn new(base: &Url, minter: Arc<Minter>, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        Self {
            client: OnceLock::new(),
            tls,
            dns,
            room_service: format!("{}/twirp/livekit.RoomService/", base.as_str().trim_end_matches('/')),
            minter,
            rooms: Mutex::new(RoomMemory::new()),
            creations: Mutex::default(),
        }
    }

    /// Sees to it that `room` stands. What may pass is tried again until `deadline`; one try is made in any case.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn ensure_room(&self, room: &str, deadline: Instant) -> Result<(), SfuError> {
        if lock(&self.rooms).stands(room, StdInstant::now()) {
            return Ok(());
        }
        let mut tries = 1;
        loop {
            let outcome = self.create_once(room).await;
            let Err(error) = outcome else {
                return Ok(());
            };
            let pause = pause(tries);
            if !error.may_pass() || Instant::now() + pause >= deadline {
                return Err(error);
            }
            tracing::debug!(reason = error.to_string(), tries, "trying the SFU again");
            sleep(pause).await;
            tries += 1;
        }
    }

    /// All who want the same room at the same time share one call. When the one who makes it goes away, the next one
    /// makes it.
    async fn create_once(&self, room: &str) -> Result<(), SfuError> {
        let creation = lock(&self.creations).entry(room.into()).or_default().clone();
        let shared = Shared { sfu: self, room, creation };
        shared.creation.get_or_init(|| self.create(room)).await.clone()
    }

    async fn create(&self, room: &str) -> Result<(), SfuError> {
        let asked = StdInstant::now();
        let request = CreateRoomRequest {
            name: room.to_owned(),
            empty_timeout: EMPTY_TIMEOUT,
            departure_timeout: DEPARTURE_TIMEOUT,
            ..CreateRoomRequest::default()
        };
        let grants = VideoGrants {
            room_create: true,
            ..VideoGrants::default()
        };
        let outcome = self.call::<Room>("CreateRoom", grants, &request).await;
        let mut rooms = lock(&self.rooms);
        match outcome {
            Ok((created, answered_at)) => {
                let stands = stands_for(&created, answered_at);
                if !stands.is_zero() {
                    rooms.remember(room, asked + stands);
                }
                Ok(())
            }
            Err(error) => {
                if error.connection_failed() {
                    rooms.forget_all();
                }
                Err(error)
            }
        }
    }

    /// Made at first use: reading the CA bundle takes longer than the whole rest of the start.
    fn client(&self) -> Result<&reqwest::Client, SfuError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let tls = self.tls.config().map_err(|error| SfuError::Connect(error.to_string()))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls.as_ref().clone())
            .dns_resolver(Arc::new(Names(self.dns.clone())))
            .redirect(reqwest::redirect::Policy::none())
            .http1_only()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(32)
            .user_agent(concat!("lk-jwt-service/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| SfuError::Connect(error.without_url().to_string()))?;
        Ok(self.client.get_or_init(|| client))
    }

    /// Asks a cheap question and logs what is wrong: a wrong key or path is told at the start and not by the first user.
    pub async fn check(&self) {
        // Reading the CA bundle takes some milliseconds, in which the service has to answer already.
        let tls = self.tls.clone();
        let _ = tokio::task::spawn_blocking(move || tls.config().map(drop)).await;
        let grants = VideoGrants {
            room_list: true,
            ..VideoGrants::default()
        };
        // The name of no room: the answer is empty whatever goes on there.
        let request = ListRoomsRequest {
            names: vec!["-".to_owned()],
        };
        match self.call::<ListRoomsResponse>("ListRooms", grants, &request).await {
            Ok(_) => tracing::info!("the SFU answers and accepts the key"),
            Err(error) => {
                let (reason, remedy) = (error.to_string(), error.remedy());
                tracing::warn!(
                    reason,
                    remedy,
                    "the SFU cannot be used; requests that open a room will fail until it can"
                );
            }
        }
    }

    /// One call of LiveKit's RoomService, and the `Date` of its answer.
    async fn call<T: Message + Default>(
        &self,
        method: &'static str,
        grants: VideoGrants,
        request: &impl Message,
    ) -> Result<(T, Option<u64>), SfuError> {
        let token = self.minter.api_token(grants, API_TOKEN_TTL).map_err(|_| SfuError::Token)?;
        let request = self
            .client()?
            .post(format!("{}{method}", self.room_service))
            .bearer_auth(token)
            .header(header::CONTENT_TYPE, "application/protobuf")
            .timeout(CALL_TIMEOUT)
            .body(request.encode_to_vec());
        let mut response = request.send().await.map_err(failure)?;
        let mut reply = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failure)? {
            if reply.len() + chunk.len() > MAX_REPLY {
                return Err(SfuError::Unreadable);
            }
            reply.extend_from_slice(&chunk);
        }
        if response.status() != http::StatusCode::OK {
            return Err(refusal::read(response.status(), &reply));
        }
        let message = T::decode(reply.as_slice()).map_err(|_| SfuError::Unreadable)?;
        Ok((message, date(response.headers())))
    }
}

/// One of those who share a call. The last one to go, or the first one after the answer, clears the entry away; a
/// client that hangs up is dropped in the middle of it.
struct Shared<'a> {
    sfu: &'a Sfu,
    room: &'a str,
    creation: Creation,
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let mut creations = lock(&self.sfu.creations);
        let ours = creations.get(self.room).is_some_and(|current| Arc::ptr_eq(current, &self.creation));
        // Two owners are the table and this one.
        if ours && (self.creation.initialized() || Arc::strong_count(&self.creation) <= 2) {
            creations.remove(self.room);
        }
    }
}

/// The SFU's name is resolved as homeservers' names are; its address is the operator's own choice and not guarded.
struct Names(Arc<Dns>);

impl reqwest::dns::Resolve for Names {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let dns = self.0.clone();
        Box::pin(async move {
            let addresses = dns.addresses(name.as_str()).await?;
            let sockets: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, 0)).collect();
            Ok(Box::new(sockets.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// Seconds since 1970 that the answer's `Date` names.
fn date(headers: &HeaderMap) -> Option<u64> {
    let date = httpdate::parse_http_date(headers.get(header::DATE)?.to_str().ok()?).ok()?;
    Some(date.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

fn failure(error: reqwest::Error) -> SfuError {
    let error = error.without_url();
    let text = || {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    };
    if error.is_timeout() {
        SfuError::Timeout
    } else if error.is_connect() {
        SfuError::Connect(text())
    } else {
        SfuError::Broken(text())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
