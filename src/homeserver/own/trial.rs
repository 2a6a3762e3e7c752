//! Tries our homeserver for `doctor`: each endpoint by itself, with the `as_token`.

use bytes::Bytes;
use serde_json::Value;

use super::{OwnError, OwnHomeserver, QUESTION_TIMEOUT, WHOAMI, refused};
use crate::federation::Reply;
use crate::homeserver::MAX_REPLY_BYTES;
use crate::homeserver::versions::{Offer, Paths};

/// Where clients ask their homeserver for a token (MSC4195).
const GET_TOKEN: Paths = Paths {
    stable: "/_matrix/client/v1/rtc/livekit/get_token",
    unstable: "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
};
/// Where clients ask their homeserver for transports (MSC4143).
const TRANSPORTS: Paths = Paths {
    stable: "/_matrix/client/v1/rtc/transports",
    unstable: "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports",
};

impl OwnHomeserver {
    /// User whom the homeserver takes us for.
    ///
    /// # Errors
    /// When it does not say it.
    pub async fn whoami(&self) -> Result<String, OwnError> {
        let reply = self.get(|_| Offer::Stable, WHOAMI, "", MAX_REPLY_BYTES, QUESTION_TIMEOUT).await?;
        if !reply.status.is_success() {
            return Err(refused(&reply, "account/whoami"));
        }
        let answer: Value = serde_json::from_slice(&reply.body).map_err(|_| OwnError::Unreadable)?;
        let user_id = answer.get("user_id").and_then(Value::as_str);
        user_id.map(str::to_owned).ok_or(OwnError::Unreadable)
    }

    /// Asks for a token as a client does; the homeserver forwards that to its application service (MSC4512).
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn ask_for_token(&self, body: Bytes) -> Result<Reply, OwnError> {
        self.post(|_| Offer::Stable, GET_TOKEN, body).await
    }

    /// Asks for the transports that clients are told.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn transports(&self) -> Result<Reply, OwnError> {
        self.get(|_| Offer::Stable, TRANSPORTS, "", MAX_REPLY_BYTES, QUESTION_TIMEOUT).await
    }
}
